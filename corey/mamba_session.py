"""Prefill and greedy decoding of `corey.mamba`, on CUDA by replaying graphs.

A graph holds the launches of a whole forward, so the host's share of it is one call. Eagerly, a decode step and a
prefill of a few thousand tokens take the host longer than the GPU.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from corey._check import bad_type, bad_value
from corey.mamba import ChunkPolicy, Mamba
from corey.scan import TILE

MOST_GRAPHS = 8  # of a session
MOST_SEEN = 4096  # keys remembered to have come once
BLOCK = 32  # tokens between two looks of the host at what was generated


class Session:
    """A batch of sequences under way: their state, the token each goes on with, and the graphs that move them on.

    model: the model. batch: how many sequences. graphs: None for CUDA graphs on CUDA and none on a CPU; False for
    eager calls everywhere.

    `state` is as `Mamba` leaves it and `token` (B,) int64 the best token after it, which no call has read yet; both are
    updated in place. A forward runs eagerly the first time that its shape comes and is captured in a graph the second
    time: one for the decode step and one for each (tokens, chunk policy) of prefill. The MOST_GRAPHS used last are
    kept, in memory that they share. A graph gives the bits of the eager call. Methods return inference tensors.
    """

    def __init__(self, model: Mamba, batch: int = 1, *, graphs: bool | None = None):
        if not isinstance(model, Mamba):
            raise bad_type("model", model, "a corey.mamba.Mamba")
        if graphs is not None and not isinstance(graphs, bool):
            raise bad_type("graphs", graphs, "a bool or None")
        if graphs and model.device.type != "cuda":
            raise bad_value("graphs", graphs, f"None or False for a model on {model.device}: graphs are CUDA's")
        self.model = model
        self.state = model.new_state(batch)
        self.token = torch.zeros(batch, dtype=torch.int64, device=model.device)
        self.graphs = model.device.type == "cuda" if graphs is None else graphs
        self._captured: OrderedDict[Hashable, _Graph] = OrderedDict()  # the latest used last
        self._seen: set[Hashable] = set()
        self._pool = torch.cuda.graph_pool_handle() if self.graphs else None

    @property
    def batch(self) -> int:
        return len(self.token)

    @torch.inference_mode()
    def prefill(
        self,
        token_ids: Tensor | Sequence[Sequence[int]],
        *,
        piece: int | None = None,
        chunk_policy: ChunkPolicy | None = None,
    ) -> Tensor:
        """Forget what was before and read prompts; logits (B, V) float32 after their last token.

        token_ids: (B, L) int64, or B lists of L ids, L at least 1. All rows have one length, as nothing is padded.
            Ids that come on CUDA are not checked against the vocabulary, which would wait for the device.
        piece: tokens that one forward reads, a multiple of the scan's 128-token tile; None for all of them. Bounds the
            memory of long prompts, and one graph serves all full pieces.
        chunk_policy: as in `Mamba`, and hashable. What it decides on the host is decided once for a graph. In a session
            with graphs it must not wait for the device, which no graph can hold: "device-hist" does not, "hist" does.

        Raises TypeError or ValueError naming the argument.
        """
        ids = self._as_ids(token_ids)
        if piece is not None and (not isinstance(piece, int) or isinstance(piece, bool)):
            raise bad_type("piece", piece, "an int or None")
        if piece is not None and (piece < 1 or piece % TILE):
            raise bad_value("piece", piece, f"a positive multiple of the {TILE}-token tile")
        if chunk_policy is not None and not (callable(chunk_policy) and isinstance(chunk_policy, Hashable)):
            raise bad_type("chunk_policy", chunk_policy, "a hashable callable such as a corey.schedulers.Scheduler")
        self.state.zero_()
        policy = _WithoutReads.guard(chunk_policy) if self.graphs and chunk_policy else chunk_policy

        def read(ids: Tensor) -> Tensor:
            logits = self.model(ids, self.state, last_only=True, chunk_policy=policy)[:, 0]  # (B, V)
            torch.argmax(logits, -1, out=self.token)
            return logits

        for part in ids.split(piece or ids.shape[1], dim=1):  # (B, piece)
            logits = self._run((part.shape[1], chunk_policy), read, part)
        return logits.clone()  # a graph's own is overwritten by its next replay

    @torch.inference_mode()
    def decode(self, count: int) -> Tensor:
        """The next `count` greedy tokens, (B, count) int64 on the device, without waiting for it.

        Every step reads `token` and replaces it by the best token after that one.
        """
        _check_count("count", count)
        tokens = self.token.new_empty(self.batch, count)
        for i in range(count):
            self._run("step", self._step)
            tokens[:, i] = self.token
        return tokens

    def generate(
        self,
        token_ids: Tensor | Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        eos_token_id: int | None = None,
        piece: int | None = None,
        chunk_policy: ChunkPolicy | None = None,
        progress: bool = False,
    ) -> list[list[int]]:
        """Greedy continuation of B prompts: up to max_new_tokens ids for each, the end token included where it came.

        eos_token_id: ends its row; None never ends one. The host looks every BLOCK tokens, so that steps do not wait
            for it, and the session may be up to BLOCK - 1 tokens further than what is returned.
        progress: draw a bar. Other arguments, and errors, as in `prefill`.
        """
        _check_count("max_new_tokens", max_new_tokens)
        if eos_token_id is not None and (not isinstance(eos_token_id, int) or isinstance(eos_token_id, bool)):
            raise bad_type("eos_token_id", eos_token_id, "an int or None")
        if not isinstance(progress, bool):
            raise bad_type("progress", progress, "a bool")
        self.prefill(token_ids, piece=piece, chunk_policy=chunk_policy)
        rows = self.token[:, None].tolist()
        bar = _progress_bar(max_new_tokens) if progress else None
        made = 1
        while made < max_new_tokens and not all(eos_token_id in row for row in rows):
            block = self.decode(min(BLOCK, max_new_tokens - made)).tolist()
            for row, more in zip(rows, block):
                row += more
            if bar is not None:
                bar.update(len(rows[0]) - made)
            made = len(rows[0])
        if bar is not None:
            bar.close()
        return [row[: row.index(eos_token_id) + 1] if eos_token_id in row else row for row in rows]

    def _step(self) -> Tensor:
        logits = self.model.step(self.token, self.state)  # (B, V)
        torch.argmax(logits, -1, out=self.token)
        return logits

    def _run(self, key: Hashable, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """function(*inputs), which depends on `key` and on nothing else that changes but tensors of the session."""
        if not self.graphs:
            return function(*inputs)
        graph = self._captured.get(key)
        if graph is None:
            if key not in self._seen:  # a length that comes once is not worth a capture, and this loads every kernel
                if len(self._seen) >= MOST_SEEN:
                    self._seen.clear()
                self._seen.add(key)
                return function(*inputs)
            graph = self._captured[key] = _Graph(function, inputs, self._pool, self.model.device)
            if len(self._captured) > MOST_GRAPHS:  # now: the capture has waited for replays under way
                self._captured.popitem(last=False)
        self._captured.move_to_end(key)
        return graph.replay(inputs)

    def _as_ids(self, token_ids: object) -> Tensor:
        """(B, L) on the model's device, checked where that needs no wait."""
        if not isinstance(token_ids, Tensor):
            if isinstance(token_ids, str) or not isinstance(token_ids, Sequence) or not token_ids:
                raise bad_type("token_ids", token_ids, "an int64 tensor (B, L) or B lists of L ids")
            if not all(isinstance(row, Sequence) and not isinstance(row, str) for row in token_ids):
                raise bad_type("token_ids", token_ids[0], "in every row a list of ids")
            if len(lengths := {len(row) for row in token_ids}) > 1:
                raise bad_value("token_ids", f"rows of {min(lengths)} to {max(lengths)} ids", "rows of one length")
            if not all(isinstance(each, int) and not isinstance(each, bool) for row in token_ids for each in row):
                raise bad_type("token_ids", token_ids, "ints")
            token_ids = torch.tensor(token_ids, dtype=torch.int64)
        if token_ids.dtype != torch.int64:
            raise bad_value("token_ids", token_ids.dtype, "torch.int64")
        if token_ids.dim() != 2 or len(token_ids) != self.batch or token_ids.numel() == 0:
            raise bad_value("token_ids", f"shape {tuple(token_ids.shape)}", f"({self.batch}, L), L at least 1")
        if token_ids.device.type == "cpu":
            low, high, size = int(token_ids.min()), int(token_ids.max()), self.model.config.vocab_size
            if low < 0 or high >= size:
                raise bad_value("token_ids", f"ids from {low} to {high}", f"ids from 0 to {size - 1}")
        return token_ids.to(self.model.device)


class _Graph:
    """A function of static tensors, captured; its inputs are copied to where it reads them."""

    def __init__(self, function: Callable[..., Tensor], inputs: tuple[Tensor, ...], pool: object, device: torch.device):
        self.inputs = [x.clone() for x in inputs]
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device), torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"):
            self.output = function(*self.inputs)

    def replay(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """The output, which lies where the next replay of any graph of the pool may write."""
        for static, x in zip(self.inputs, inputs):
            static.copy_(x)
        self.graph.replay()
        return self.output


class _WithoutReads(TorchDispatchMode):
    """Refuses what needs a tensor's values on the host. A capture that failed on that would leave torch's allocator in
    a bad state (pytorch#180395), so a policy is watched in every call, of which the first is eager."""

    @staticmethod
    def guard(policy: ChunkPolicy) -> ChunkPolicy:
        if getattr(policy, "on_the_way", None) is not None:
            return policy  # decided by the convolution

        def ask(u: Tensor, layer: int) -> "int | Tensor | None":
            with _WithoutReads():
                return policy(u, layer=layer)

        return ask

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        reads = not _READS.isdisjoint(function.tags) or function is torch.ops.aten.is_nonzero.default
        if not reads:
            result = function(*args, **(kwargs or {}))
            on_host = isinstance(result, Tensor) and result.device.type == "cpu"
            reads = on_host and any(isinstance(x, Tensor) and x.is_cuda for x in args)
        if reads:
            want = "one that leaves its decision on the device, such as device-hist, or Session(graphs=False)"
            raise bad_value("chunk_policy", "one that waits for the device", want)
        return result


_READS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


def _progress_bar(total: int):
    from tqdm.auto import tqdm

    bar = tqdm(total=total, unit="token")
    bar.update(1)  # the prefill's
    return bar


def _check_count(name: str, count: object) -> None:
    if not isinstance(count, int) or isinstance(count, bool):
        raise bad_type(name, count, "an int")
    if count < 1:
        raise bad_value(name, count, "at least 1")
