"""Mamba-1 for inference (Gu and Dao 2023), readable beside the equations and token-major throughout.

    B        batch                            L  tokens
    d_model  width of the residual stream     V  vocabulary
    D        channels (d_inner)               N  states a channel (d_state)
    R        rank of the step (dt_rank)       W  width of the convolution (d_conv)

A layer computes, with the residual stream h in float32 and x the output of the layer before it:

    h     = h + x
    x, z  = in_proj rms_norm(h)                                  section 3.4, figure 3
    u     = silu(conv1d(x))
    s, B, C = x_proj u                                           section 3.2: step, input and output depend on u
    y     = selective_scan(u, dt_proj s, A, B, C, D, gate z)     algorithm 2; softplus and the step's bias inside
    x     = out_proj y

What transformers' `MambaForCausalLM` computes, with the scan's state in float32. Does NOT include: training, padding,
sampling, projections with a bias. Checkpoints and random weights are in `corey.mamba_weights`, CUDA graphs and greedy
generation in `corey.mamba_session`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from corey._check import bad_type, bad_value
from corey.conv import causal_conv1d, causal_conv1d_update
from corey.norm import add_rms_norm
from corey.scan import selective_scan
from corey.state_update import selective_state_update

ChunkPolicy = Callable[..., "int | Tensor | None"]


@dataclass(frozen=True)
class MambaConfig:
    """The shape of a model. Names as in mamba_ssm; norm_epsilon is added to the mean square."""

    d_model: int
    n_layer: int
    vocab_size: int
    d_inner: int
    dt_rank: int
    d_state: int = 16
    d_conv: int = 4
    norm_epsilon: float = 1e-5
    tie_embeddings: bool = True


@dataclass(frozen=True)
class Layer:
    """Weights of one layer, in the model's dtype but for the last three, which the recurrence takes in float32."""

    norm: Tensor  # (d_model,)
    in_proj: Tensor  # (2 D, d_model)
    conv_weight: Tensor  # (D, W)
    conv_bias: Tensor  # (D,)
    x_proj: Tensor  # (R + 2 N, D)
    dt_proj: Tensor  # (D, R)
    out_proj: Tensor  # (d_model, D)
    dt_bias: Tensor  # (D,) float32
    A: Tensor  # (D, N) float32, negative
    D: Tensor  # (D,) float32


@dataclass(frozen=True)
class State:
    """All that a batch of sequences remembers; `Mamba` updates it in place, so that CUDA graphs find it again."""

    conv: Tensor  # (n_layer, B, D, W - 1) in the model's dtype: the last inputs of each convolution, oldest first
    ssm: Tensor  # (n_layer, B, D, N) float32

    def zero_(self) -> "State":
        """Back to before the first token."""
        self.conv.zero_()
        self.ssm.zero_()
        return self


@dataclass(frozen=True, eq=False)
class Mamba:
    """A model: call it on tokens, or `step` it by one. No weight requires grad."""

    config: MambaConfig
    embedding: Tensor  # (V, d_model)
    layers: tuple[Layer, ...]
    norm: Tensor  # (d_model,)
    lm_head: Tensor  # (V, d_model)

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.dtype

    def new_state(self, batch: int) -> State:
        """The state before the first token: zeros."""
        if not isinstance(batch, int) or isinstance(batch, bool):
            raise bad_type("batch", batch, "an int")
        if batch < 1:
            raise bad_value("batch", batch, "at least 1")
        c = self.config
        return State(
            conv=torch.zeros(c.n_layer, batch, c.d_inner, c.d_conv - 1, dtype=self.dtype, device=self.device),
            ssm=torch.zeros(c.n_layer, batch, c.d_inner, c.d_state, device=self.device),
        )

    def __call__(
        self,
        ids: Tensor,
        state: State | None = None,
        *,
        last_only: bool = False,
        chunk_policy: ChunkPolicy | None = None,
    ) -> Tensor:
        """Logits of every token, (B, L, V) float32; of the last one, (B, 1, V), with `last_only`.

        ids: (B, L) int64 on the model's device, L at least 1. Rows are of one length: there is no padding.
        state: goes on from there and is left after the last token; None starts from zeros and keeps nothing. A prompt
            may so be read in pieces. Where each starts at a multiple of the scan's 128-token tile, the scan and the
            convolution give the bits of one call; a matrix product may round a row otherwise among fewer rows.
        chunk_policy: called `chunk_policy(u, layer=int)` with what each scan receives, u (B, D, L), as the schedulers
            of `corey.schedulers` are; returns the scan's chunk_size. Never changes the result. On CUDA one with
            `on_the_way` is not called in the layers it is for: the convolution takes its statistic and its decision.

        Raises TypeError or ValueError naming the argument.
        """
        self._check_ids(ids, "(B, L), L at least 1", 2)
        self._check_state(state, len(ids))
        if not isinstance(last_only, bool):
            raise bad_type("last_only", last_only, "a bool")
        if chunk_policy is not None and not callable(chunk_policy):
            raise bad_type("chunk_policy", chunk_policy, "a callable such as a corey.schedulers.Scheduler, or None")
        x, residual = F.embedding(ids, self.embedding), None  # (B, L, d_model)
        after = []
        for i, layer in enumerate(self.layers):
            x, residual = add_rms_norm(x, residual, layer.norm, self.config.norm_epsilon)  # (B, L, d_model), twice
            before = (None, None) if state is None else (state.conv[i], state.ssm[i])
            only = last_only and i == len(self.layers) - 1  # nothing reads the others
            x, *states = _mix(layer, x, *before, chunk_policy, i, only)  # (B, L, d_model), or (B, 1, d_model)
            after.append(states)
        if state is not None:  # two launches, where a copy a layer would be two a layer
            torch.stack([conv for conv, _ in after], out=state.conv)
            torch.stack([ssm for _, ssm in after], out=state.ssm)
        if last_only:
            residual = residual[:, -1:]  # (B, 1, d_model)
        return self._logits(x, residual)

    def step(self, ids: Tensor, state: State) -> Tensor:
        """Logits (B, V) float32 after one more token, ids (B,) int64; the state moves on. Raises as a call does."""
        self._check_ids(ids, "(B,)", 1)
        if state is None:
            raise bad_type("state", state, "a State")
        self._check_state(state, len(ids))
        x, residual = F.embedding(ids, self.embedding), None  # (B, d_model)
        for layer, conv, ssm in zip(self.layers, state.conv, state.ssm):
            x, residual = add_rms_norm(x, residual, layer.norm, self.config.norm_epsilon)  # (B, d_model), twice
            x = _mix_token(layer, x, conv, ssm)  # (B, d_model)
        return self._logits(x, residual)

    def _logits(self, x: Tensor, residual: Tensor) -> Tensor:
        x, _ = add_rms_norm(x, residual, self.norm, self.config.norm_epsilon)  # (..., d_model)
        return F.linear(x, self.lm_head).float()  # (..., V)

    def _check_ids(self, ids: object, want: str, dim: int) -> None:
        if not isinstance(ids, Tensor):
            raise bad_type("ids", ids, f"an int64 tensor {want}")
        if ids.dtype != torch.int64:
            raise bad_value("ids", ids.dtype, "torch.int64")
        if ids.dim() != dim or ids.numel() == 0:
            raise bad_value("ids", f"shape {tuple(ids.shape)}", want)
        if ids.device != self.device:
            raise bad_value("ids", f"a tensor on {ids.device}", f"one on {self.device}, where the model is")

    def _check_state(self, state: object, batch: int) -> None:
        if state is None:
            return
        if not isinstance(state, State):
            raise bad_type("state", state, "a State or None")
        c = self.config
        got = tuple(state.conv.shape), state.conv.dtype, tuple(state.ssm.shape), state.ssm.dtype, state.ssm.device
        conv, ssm = (c.n_layer, batch, c.d_inner, c.d_conv - 1), (c.n_layer, batch, c.d_inner, c.d_state)
        if got != (conv, self.dtype, ssm, torch.float32, self.device):
            raise bad_value("state", got, f"new_state({batch}) of this model")


def _mix(
    layer: Layer,
    x: Tensor,
    conv: Tensor | None,
    ssm: Tensor | None,
    chunk_policy: ChunkPolicy | None,
    index: int,
    last_only: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The mixer over L tokens: (B, L, d_model) -> the same, or the last token's, and both states after that.

    Every transposed tensor is a view: the convolution and the scan read and write token-major memory.
    """
    rank, states = layer.dt_proj.shape[1], layer.A.shape[1]
    x, z = F.linear(x, layer.in_proj).chunk(2, dim=-1)  # (B, L, D) each, views
    counted = getattr(chunk_policy, "on_the_way", None) if x.is_cuda else None  # decides without another pass over u
    counted = counted if index % getattr(chunk_policy, "every", 1) == 0 else None
    u, conv, *statistic = causal_conv1d(
        x.transpose(1, 2),
        layer.conv_weight,
        layer.conv_bias,
        "silu",
        initial_state=conv,
        return_last_state=True,
        histogram=counted,
    )  # (B, D, L), (B, D, W - 1)
    if counted is not None:
        chunk_size = statistic[0].chunk_size
    else:
        chunk_size = None if chunk_policy is None else chunk_policy(u, layer=index)
    s, B, C = F.linear(u.transpose(1, 2), layer.x_proj).split([rank, states, states], dim=-1)  # (B, L, R), (B, L, N) x2
    delta = F.linear(s, layer.dt_proj)  # (B, L, D); bias and softplus are the scan's
    y, ssm = selective_scan(
        u,
        delta.transpose(1, 2),
        layer.A,
        B.transpose(1, 2),
        C.transpose(1, 2),
        layer.D,
        z.transpose(1, 2),
        layer.dt_bias,
        delta_softplus=True,
        return_last_state=True,
        initial_state=ssm,
        chunk_size=chunk_size,
    )  # (B, D, L), (B, D, N)
    y = y[:, :, -1:] if last_only else y  # (B, D, L or 1)
    return F.linear(y.transpose(1, 2), layer.out_proj), conv, ssm  # (B, L or 1, d_model)


def _mix_token(layer: Layer, x: Tensor, conv: Tensor, ssm: Tensor) -> Tensor:
    """The mixer over one token: (B, d_model) -> the same; both states move on in place."""
    rank, states = layer.dt_proj.shape[1], layer.A.shape[1]
    x, z = F.linear(x, layer.in_proj).chunk(2, dim=-1)  # (B, D) each, views
    u = causal_conv1d_update(x, conv, layer.conv_weight, layer.conv_bias, "silu")  # (B, D)
    s, B, C = F.linear(u, layer.x_proj).split([rank, states, states], dim=-1)  # (B, R), (B, N), (B, N)
    delta = F.linear(s, layer.dt_proj)  # (B, D)
    y = selective_state_update(ssm, u, delta, layer.A, B, C, layer.D, z, layer.dt_bias, dt_softplus=True)  # (B, D)
    return F.linear(y, layer.out_proj)  # (B, d_model)
