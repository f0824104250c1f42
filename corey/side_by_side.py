"""One prompt through one model with different scans, side by side: logits, greedy tokens, score and perplexity.

The first side is the passive one that every other is compared with. All sides see the same token ids in the same pieces
and batches of one, so whatever differs comes from the scan.
"""

import copy
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from corey._check import bad_type, bad_value
from corey.equivalence import compare_logits, compare_tokens, sequence_nll
from corey.generation import Generation, greedy_decode, prefill
from corey.longbench import Protocol
from corey.routing import route
from corey.scan import scan_reset_ref, selective_scan


@dataclass(frozen=True)
class Side:
    """A way to run the model. chunk_size: as in `corey.routing.route`. scan: the operator, or None for transformers'
    own path, which is not routed. answers: whether to go on after the prompt, for an answer and for perplexity."""

    name: str
    chunk_size: int | Callable | None = None
    scan: Callable | None = selective_scan
    answers: bool = True


@dataclass(frozen=True)
class Run:
    """One side's results: logits (L, V) at the prompt's positions; nll_nats over prompt and reference; generation;
    chunks of the prompt's scans by layer. None for what a side does not do; transformers' path has no nll_nats, since
    it cannot go on from a cache with several tokens."""

    logits: torch.Tensor
    nll_nats: float | None
    nll_tokens: int
    generation: Generation | None
    chunks: tuple[int | None, ...]
    prefill_s: float


def state_dropping_scan(*args, initial_state: torch.Tensor | None = None, **kwargs) -> object:
    """The control: the paper's host loop, which forgets the state at every chunk boundary and at every new piece."""
    return scan_reset_ref(*args, **kwargs)


def run_side(
    model: torch.nn.Module,
    prompt_ids: Sequence[int],
    reference_ids: Sequence[int],
    side: Side,
    *,
    max_new_tokens: int,
    eos_token_id: int | None,
) -> Run:
    """Prefill the prompt, score the reference as its continuation, and decode greedily from the same cache."""
    if not isinstance(side, Side):
        raise bad_type("side", side, "a Side")
    if not reference_ids:
        raise bad_value("reference_ids", "no token", "at least one")
    routed = nullcontext() if side.scan is None else route(model, chunk_size=side.chunk_size, scan=side.scan)
    with routed, torch.inference_mode():
        start = time.perf_counter()
        logits, cache = prefill(model, prompt_ids)  # (L, V)
        if logits.is_cuda:
            torch.cuda.synchronize(logits.device)  # launched is not done
        elapsed = time.perf_counter() - start
        chunks = () if side.scan is None else tuple(routed.chunks)
        nll_nats = None
        if side.answers and side.scan is not None:
            ids = torch.tensor([*prompt_ids, *reference_ids], device=logits.device)  # (L + R,)
            after = model(ids[None, len(prompt_ids) :], cache_params=copy.deepcopy(cache), use_cache=True)
            nll_nats, _ = sequence_nll(torch.cat([logits, after.logits[0]]), ids)  # (L + R, V)
        generation = None
        if side.answers:
            generation = greedy_decode(model, logits, cache, max_new_tokens=max_new_tokens, eos_token_id=eos_token_id)
    return Run(logits, nll_nats, len(prompt_ids) + len(reference_ids) - 1, generation, chunks, elapsed)


def compare_sides(
    model: torch.nn.Module,
    tokenizer,
    task: str,
    row: dict,
    sides: Sequence[Side],
    *,
    protocol: Protocol,
    max_prompt_tokens: int,
    max_new_tokens: int | None = None,
) -> list[dict]:
    """Tidy rows, one a side, of one LongBench row; every side is compared with the first, the passive one.

    task: official name. max_new_tokens: None for the protocol's own generation length. The reference that perplexity
    continues the prompt with is a blank and the first answer.

    Columns: task, row_id, protocol, side; prompt_tokens after and prompt_tokens_before_cut before truncation,
    truncated; chunks of the prompt's scans by layer, in tokens; prefill_s; nll_nats and nll_tokens over prompt and
    reference; logits_bitwise_equal, logit_max_abs_diff, logit_rms_diff, logit_first_divergence (position) and
    argmax_agreement (fraction) over the prompt's logits; tokens_equal, token_agreement, token_first_divergence and the
    passive side's top2_gap there, over the decoded tokens; new_tokens, prediction, score in [0, 1] and score_failure.
    Missing where a side does not answer.
    """
    if not sides or not sides[0].answers:
        raise bad_value("sides", f"{len(sides)} sides", "at least one, the first of which answers")
    prompt = protocol.encode(tokenizer, task, row, max_prompt_tokens)
    reference = tokenizer(" " + row["answers"][0], add_special_tokens=False)["input_ids"]
    runs, rows = [], []
    for side in sides:
        run = run_side(
            model,
            prompt.ids,
            reference,
            side,
            max_new_tokens=max_new_tokens or protocol.max_new_tokens[task],
            eos_token_id=tokenizer.eos_token_id,
        )
        runs.append(run)
        rows.append(
            {
                "task": task,
                "row_id": row["_id"],
                "protocol": protocol.name,
                "side": side.name,
                "prompt_tokens": len(prompt.ids),
                "prompt_tokens_before_cut": prompt.tokens_before,
                "truncated": prompt.truncated,
                "chunks": " ".join(str(chunk) for chunk in run.chunks),
                "prefill_s": run.prefill_s,
                "nll_nats": run.nll_nats,
                "nll_tokens": run.nll_tokens,
                **logit_columns(runs[0].logits, run.logits),
                **token_columns(runs[0].generation, run.generation),
                **_answer_columns(protocol, tokenizer, task, row, run),
            }
        )
    return rows


def logit_columns(passive: torch.Tensor, logits: torch.Tensor) -> dict:
    """How the logits (L, V) of one prompt differ from the passive side's, as columns of `compare_sides`."""
    found = compare_logits(passive, logits)
    return {
        "logits_bitwise_equal": found.bitwise_equal,
        "logit_max_abs_diff": found.max_abs_diff,
        "logit_rms_diff": found.rms_diff,
        "logit_first_divergence": found.first_divergence,
        "argmax_agreement": (passive.argmax(-1) == logits.argmax(-1)).double().mean().item(),
    }


def token_columns(passive: Generation, generation: Generation | None) -> dict:
    """Agreement of the decoded tokens, and how sure the passive side was where they part."""
    if generation is None:
        return {"tokens_equal": None, "token_agreement": None, "token_first_divergence": None, "top2_gap": None}
    found = compare_tokens(passive.tokens, generation.tokens)
    first = found.first_divergence
    gap = passive.top2_gaps[first] if first is not None and first < len(passive.tokens) else None
    return {
        "tokens_equal": found.equal,
        "token_agreement": found.agreement,
        "token_first_divergence": first,
        "top2_gap": gap,
    }


def _answer_columns(protocol: Protocol, tokenizer, task: str, row: dict, run: Run) -> dict:
    if run.generation is None:
        return {"new_tokens": None, "prediction": None, "score": None, "score_failure": None}
    prediction = tokenizer.decode(list(run.generation.tokens), skip_special_tokens=True)
    score = protocol.score(task, prediction, row)
    return {
        "new_tokens": len(run.generation.tokens),
        "prediction": prediction,
        "score": score.value,
        "score_failure": score.failure,
    }
