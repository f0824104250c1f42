"""Prefill and greedy decoding of a transformers causal language model, one sequence at a time.

The two steps are apart because only the prefill runs the full-sequence scan: what routing changes is visible in its
logits and in the state that it leaves in the cache.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from corey._check import bad_type, bad_value
from corey.routing import pytorch_on_cpu


@dataclass(frozen=True)
class Generation:
    """Greedy tokens (the end-of-text token included when it came), and for each the distance in logits between the best
    and the second-best token: a difference between two implementations below it cannot change the choice."""

    tokens: tuple[int, ...]
    top2_gaps: tuple[float, ...]


@pytorch_on_cpu()
@torch.inference_mode()
def prefill(model: torch.nn.Module, token_ids: Sequence[int], *, use_cache: bool = True) -> tuple[torch.Tensor, object]:
    """One forward over the whole prompt: logits (L, V) and the cache it leaves (None without `use_cache`).

    model: a transformers causal language model. token_ids: ids of one sequence, at least one.
    """
    _check_model(model)
    ids = _check_ids(model, token_ids)  # (1, L)
    output = model(ids, use_cache=use_cache)
    return output.logits[0], output.cache_params


@pytorch_on_cpu()
@torch.inference_mode()
def greedy_decode(
    model: torch.nn.Module, logits: torch.Tensor, cache: object, *, max_new_tokens: int, eos_token_id: int | None
) -> Generation:
    """Continue a prefill with the best token at every step, until `eos_token_id` or `max_new_tokens`.

    logits: (L, V) or (1, V); the last row chooses the first token. cache: the prefill's; it is advanced in place.
    """
    _check_model(model)
    if not isinstance(logits, torch.Tensor) or logits.dim() != 2 or not len(logits):
        raise bad_value("logits", getattr(logits, "shape", type(logits).__name__), "a tensor (L, V), L at least 1")
    if cache is None:
        raise bad_type("cache", cache, "the cache of a prefill")
    if not isinstance(max_new_tokens, int) or isinstance(max_new_tokens, bool) or max_new_tokens < 1:
        raise bad_value("max_new_tokens", max_new_tokens, "an int of at least 1")
    tokens, gaps = [], []
    last = logits[-1]  # (V,)
    while True:
        token, gap = best_two(last[None])
        tokens.append(int(token))
        gaps.append(gap.item())
        if tokens[-1] == eos_token_id or len(tokens) == max_new_tokens:
            return Generation(tuple(tokens), tuple(gaps))
        step = torch.tensor([tokens[-1:]], device=logits.device)  # (1, 1)
        last = model(step, cache_params=cache, use_cache=True).logits[0, -1]


def best_two(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Best token of each row, (B,) int64, and its distance from the second best, (B,) float32. logits: (B, V).

    In half precision ties are common. A gap of zero shows one, and the choice between the two does not vary by run.
    """
    logits = logits.float()
    token = logits.argmax(-1)  # (B,); topk says nothing about the order of equals
    second = logits.scatter(-1, token[:, None], -torch.inf).amax(-1)  # (B,)
    return token, logits.gather(-1, token[:, None])[:, 0] - second


def greedy_tokens(
    model: torch.nn.Module, token_ids: Sequence[int], *, max_new_tokens: int, eos_token_id: int | None
) -> Generation:
    """Prefill and greedy decoding in one call."""
    logits, cache = prefill(model, token_ids)
    return greedy_decode(model, logits, cache, max_new_tokens=max_new_tokens, eos_token_id=eos_token_id)


def _check_model(model: object) -> None:
    if not isinstance(model, torch.nn.Module) or not hasattr(model, "config"):
        raise bad_type("model", model, "a transformers causal language model")
    if model.training:
        raise bad_value("model", "a model in training mode", "one in evaluation mode (model.eval())")


def _check_ids(model: torch.nn.Module, token_ids: Sequence[int]) -> torch.Tensor:
    if isinstance(token_ids, str) or not isinstance(token_ids, Sequence):
        raise bad_type("token_ids", token_ids, "a sequence of int")
    if not token_ids:
        raise bad_value("token_ids", "no token", "at least one")
    if not all(isinstance(token, int) and 0 <= token < model.config.vocab_size for token in token_ids):
        raise bad_value("token_ids", "an id outside the vocabulary", f"ints from 0 to {model.config.vocab_size - 1}")
    return torch.tensor([list(token_ids)], device=model.device)  # (1, L)
