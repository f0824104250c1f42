"""The lean model under every chunk policy, prompt by prompt, against the same model without a policy.

All logits of a prompt, the state that it leaves and the greedy tokens after it are compared where they are, on the
device, and a few numbers a prompt cross to the host. `corey.side_by_side` does the same for transformers' model.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from corey._check import bad_type, bad_value
from corey.ablation_policies import build_policies
from corey.equivalence import bitwise_equal, sequence_nll
from corey.generation import Generation, best_two
from corey.longbench import Protocol
from corey.mamba import ChunkPolicy, Mamba, State
from corey.progress import progress
from corey.samples import MADE_TASKS, held_out_rows
from corey.schedulers import PUBLISHED_RANGES, get_scheduler
from corey.side_by_side import logit_columns, token_columns

PASSIVE = "passive"  # no policy: the scan takes its chunk from the shape
ON_THE_WAY = "device-hist on the way"  # counted by the convolution, over a range fixed beforehand
FIXED_RANGE = (-4.0, 4.0)
GROUP = 64  # prompts that are decoded together

Rows = Sequence[tuple[str, dict]]  # (official task, LongBench row)


def chosen_policies(
    chunk_sizes: Sequence[int], names: Sequence[str], *, device_type: str
) -> dict[str, ChunkPolicy | None]:
    """Passive, a static chunk of every size, and the named policies of the scheduler ablation, in this order.

    The forms of device-hist decide on a GPU without the host. On a CPU they answer with an int as hist does.
    """
    c_min, c_max, h_ref = PUBLISHED_RANGES["ablation"]
    rule = {"c_min": c_min, "c_max": c_max, "h_ref": h_ref}
    built = build_policies(chunk_sizes, stride=8, seed=0, device_type=device_type) | {
        "device-hist": get_scheduler("device-hist", **rule),
        ON_THE_WAY: get_scheduler("device-hist", range=FIXED_RANGE, **rule),
    }
    if unknown := [name for name in names if name not in built]:
        raise bad_value("names", repr(unknown[0]), f"one of {', '.join(built)}")
    return {PASSIVE: None} | {name: built[name] for name in [*(f"static-{size}" for size in chunk_sizes), *names]}


def made_prompts(count: int) -> list[tuple[str, dict]]:
    """The first `count` held-out made rows as (official task, row), the four tasks in turn.

    The first 80 are those of data/samples; every later one follows from its seed as well.
    """
    if not isinstance(count, int) or isinstance(count, bool):
        raise bad_type("count", count, "an int")
    if count < 1:
        raise bad_value("count", count, "at least 1")
    each = -(-count // len(MADE_TASKS))
    turns = zip(*(held_out_rows(made, each) for made in MADE_TASKS))
    return [(task, row) for turn in turns for task, row in zip(MADE_TASKS.values(), turn)][:count]


def policy_rows(
    model: Mamba,
    tokenizer,
    rows: Rows,
    policies: Mapping[str, ChunkPolicy | None],
    *,
    protocol: Protocol,
    max_prompt_tokens: int,
    new_tokens: int,
    scored: bool = True,
) -> list[dict]:
    """Tidy rows, one for each prompt and policy; every policy is compared with the first, the passive one.

    rows: the prompts, encoded and cut by `protocol`. policies: as `chosen_policies` gives them.
    new_tokens: greedy tokens after each prompt; an end token does not stop them.
    scored: whether the text up to the end token is scored, which random weights have no use for.

    Prompts are read in batches of one. They are decoded GROUP at a time, each policy in a batch of its own from the
    states that it left, so that a prompt has the same neighbours under every policy.

    Columns: those of `compare_sides` but chunks, prefill_s and prediction; distinct_chunks, all that the layers were
    given, ascending, empty where the host never knows; nll_nats and nll_tokens, over the prompt alone;
    state_bitwise_equal, of convolution and scan after the prompt.
    """
    if not policies or next(iter(policies.values())) is not None:
        raise bad_value("policies", list(policies), "None, the passive side, as the first")
    if not isinstance(new_tokens, int) or isinstance(new_tokens, bool) or new_tokens < 1:
        raise bad_value("new_tokens", new_tokens, "an int of at least 1")
    found = []
    for start in range(0, len(rows), GROUP):
        group = rows[start : start + GROUP]
        prompts = [protocol.encode(tokenizer, task, row, max_prompt_tokens) for task, row in group]
        read, ends = _read_prompts(model, [prompt.ids for prompt in prompts], policies)
        made = {name: decode(model, *_joined(each), new_tokens) for name, each in ends.items()}
        for index, ((task, row), prompt) in enumerate(zip(group, prompts)):
            for name in policies:
                generation = made[name][index]
                found.append(
                    {
                        "task": task,
                        "row_id": row["_id"],
                        "protocol": protocol.name,
                        "side": name,
                        "prompt_tokens": len(prompt.ids),
                        "prompt_tokens_before_cut": prompt.tokens_before,
                        "truncated": prompt.truncated,
                        **read[name][index],
                        **token_columns(made[PASSIVE][index], generation),
                        "new_tokens": new_tokens,
                        **(_score_columns(protocol, tokenizer, task, row, generation) if scored else {}),
                    }
                )
    return found


@torch.inference_mode()
def decode(model: Mamba, state: State, logits: Tensor, count: int) -> list[Generation]:
    """`count` greedy tokens of B sequences, whose state moves on in place; the host waits once, at the end.

    logits: (B, V) after the last token that the state has seen.
    """
    tokens, gaps = [], []
    while True:
        token, gap = best_two(logits)  # (B,), (B,)
        tokens.append(token)
        gaps.append(gap)
        if len(tokens) == count:
            break
        logits = model.step(token, state)  # (B, V)
    columns = zip(torch.stack(tokens, 1).tolist(), torch.stack(gaps, 1).tolist())
    return [Generation(tuple(each), tuple(distances)) for each, distances in columns]


@torch.inference_mode()
def read_prompt(model: Mamba, ids: Tensor, policy: ChunkPolicy | None) -> tuple[Tensor, State, str]:
    """Logits (L, V) of a prompt, ids (1, L), the state after it, and the distinct chunks that its layers were given."""
    chunks: list[int | Tensor] = []

    def noted(u: Tensor, layer: int) -> int | Tensor | None:
        chunks.append(policy(u, layer=layer))
        return chunks[-1]

    # what the convolution decides on the way is never asked of the policy itself
    unasked = policy is None or (model.device.type == "cuda" and getattr(policy, "on_the_way", None) is not None)
    state = model.new_state(1)
    logits = model(ids, state, chunk_policy=policy if unasked else noted)[0]
    return logits, state, " ".join(map(str, sorted({int(chunk) for chunk in chunks})))


def _read_prompts(
    model: Mamba, prompts: Sequence[Sequence[int]], policies: Mapping[str, ChunkPolicy | None]
) -> tuple[dict[str, list[dict]], dict[str, list[tuple[State, Tensor]]]]:
    """By policy and prompt: the columns on reading it, and what decoding starts from."""
    columns, ends = {name: [] for name in policies}, {name: [] for name in policies}
    for ids in progress(prompts, "prompts"):
        ids = torch.tensor([ids], device=model.device)  # (1, L)
        passive = None
        for name, policy in policies.items():
            logits, state, chunks = read_prompt(model, ids, policy)
            passive = passive or (logits, state)
            nll_nats, nll_tokens = sequence_nll(logits, ids[0])
            columns[name].append(
                {
                    "distinct_chunks": chunks,
                    "nll_nats": nll_nats,
                    "nll_tokens": nll_tokens,
                    **logit_columns(passive[0], logits),
                    "state_bitwise_equal": _same_state(passive[1], state),
                }
            )
            ends[name].append((state, logits[-1:].clone()))  # the clone lets go of the other rows
    return columns, ends


def _same_state(a: State, b: State) -> bool:
    return bitwise_equal(a.conv, b.conv) and bitwise_equal(a.ssm, b.ssm)


def _joined(ends: Sequence[tuple[State, Tensor]]) -> tuple[State, Tensor]:
    """The states of B prompts as one, and their last logits, (B, V)."""
    states, logits = zip(*ends)
    conv, ssm = (torch.cat([getattr(state, name) for state in states], 1) for name in ("conv", "ssm"))
    return State(conv, ssm), torch.cat(logits)


def _score_columns(protocol: Protocol, tokenizer, task: str, row: dict, generation: Generation) -> dict:
    tokens = list(generation.tokens)
    if tokenizer.eos_token_id in tokens:
        tokens = tokens[: tokens.index(tokenizer.eos_token_id)]
    score = protocol.score(task, tokenizer.decode(tokens, skip_special_tokens=True), row)
    return {"score": score.value, "score_failure": score.failure}
