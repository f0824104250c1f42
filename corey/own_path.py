"""The lean model beside transformers' own path with the same weights: another implementation of the same equations.

The two add in another order, so bits differ. What counts is by how much, from which token on greedy decoding parts, and
how near to a tie the choice was there.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from corey.equivalence import sequence_nll
from corey.generation import greedy_decode, prefill
from corey.longbench import Protocol
from corey.mamba import Mamba
from corey.policy_equivalence import PASSIVE, Rows, decode, read_prompt
from corey.progress import progress
from corey.side_by_side import logit_columns, token_columns

OWN_PATH = "transformers' own path"


def transformers_twin(model: Mamba) -> torch.nn.Module:
    """transformers' MambaForCausalLM with the weights of a lean model, which it shares where it can.

    Its A_log is the logarithm of the lean model's A, so that its A may differ in the last bits. A_log, D and the step's
    bias are float32 whatever the dtype, as in the lean model.
    """
    from transformers import MambaConfig, MambaForCausalLM

    c = model.config
    config = MambaConfig(
        vocab_size=c.vocab_size, hidden_size=c.d_model, intermediate_size=c.d_inner, expand=c.d_inner // c.d_model,
        num_hidden_layers=c.n_layer, state_size=c.d_state, conv_kernel=c.d_conv, time_step_rank=c.dt_rank,
        layer_norm_epsilon=c.norm_epsilon, tie_word_embeddings=c.tie_embeddings,
    )  # fmt: skip
    with torch.device(model.device):
        twin = MambaForCausalLM(config)
    weights = {
        "backbone.embeddings.weight": model.embedding,
        "backbone.norm_f.weight": model.norm,
        "lm_head.weight": model.lm_head,
    }
    for i, layer in enumerate(model.layers):
        mixer = {
            "A_log": (-layer.A).log(),
            "D": layer.D,
            "conv1d.weight": layer.conv_weight[:, None],
            "conv1d.bias": layer.conv_bias,
            "in_proj.weight": layer.in_proj,
            "x_proj.weight": layer.x_proj,
            "dt_proj.weight": layer.dt_proj,
            "dt_proj.bias": layer.dt_bias,
            "out_proj.weight": layer.out_proj,
        }
        weights[f"backbone.layers.{i}.norm.weight"] = layer.norm
        weights |= {f"backbone.layers.{i}.mixer.{name}": tensor for name, tensor in mixer.items()}
    twin.load_state_dict(weights, assign=True)  # strict: every tensor or an error
    return twin.requires_grad_(False).eval()


@torch.inference_mode()
def own_path_rows(
    model: Mamba,
    client: torch.nn.Module,
    tokenizer,
    rows: Rows,
    *,
    protocol: Protocol,
    max_prompt_tokens: int,
    new_tokens: int,
) -> list[dict]:
    """Tidy rows, two a prompt: the lean model without a policy, and transformers' model of the same weights, unrouted.

    Columns: task, row_id, protocol, side, prompt_tokens, nll_nats, nll_tokens, new_tokens and those of `logit_columns`
    and `token_columns`, which compare with the lean model; top2_gap is the lean model's.
    """
    found = []
    for task, row in progress(rows, "prompts"):
        ids = protocol.encode(tokenizer, task, row, max_prompt_tokens).ids
        lean, state, _ = read_prompt(model, torch.tensor([ids], device=model.device), None)  # (L, V)
        with _exact_convolutions():
            own, cache = prefill(client, ids)
            theirs = greedy_decode(client, own, cache, max_new_tokens=new_tokens, eos_token_id=None)
        made = {PASSIVE: decode(model, state, lean[-1:], new_tokens)[0], OWN_PATH: theirs}
        for side, logits in {PASSIVE: lean, OWN_PATH: own.float()}.items():
            nll_nats, nll_tokens = sequence_nll(logits, torch.tensor(ids, device=logits.device))
            found.append(
                {
                    "task": task,
                    "row_id": row["_id"],
                    "protocol": protocol.name,
                    "side": side,
                    "prompt_tokens": len(ids),
                    "nll_nats": nll_nats,
                    "nll_tokens": nll_tokens,
                    **logit_columns(lean, logits),
                    **token_columns(made[PASSIVE], made[side]),
                    "new_tokens": new_tokens,
                }
            )
    return found


@contextmanager
def _exact_convolutions() -> Iterator[None]:
    """cuDNN rounds the inputs of float32 convolutions to TF32 unless told otherwise; torch's matrix products do not."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before
