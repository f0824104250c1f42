"""Every chunk policy end to end, prefill and decode apart, and what its statistic, its decision and its chunk cost.

The forms of `corey.ablation_policies` are all timed against a static chunk, the reference. unread / reference is the
cost of the statistic, forced / unread that of deciding, which on a GPU holds the wait for the statistic, and replayed /
reference the effect of the chunk. If that is all there is, their product is published / reference.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import pandas as pd
import torch
from torch import Tensor

from corey import benchmark
from corey.ablation_policies import (
    ADAPTIVE,
    REFERENCE,
    SHUFFLED,
    all_forms,
    build_policies,
    record,
    scan_inputs,
    shuffled,
)
from corey.clocks import from_idle
from corey.mamba import ChunkPolicy, Mamba
from corey.mamba_session import Session
from corey.progress import progress
from corey.schedulers import fit_oracle, static

PRICED = (*ADAPTIVE, "table", "table-always-reads")  # policies whose cost is more than their chunk's
GROUP = 4  # forms timed in the same rounds, and the reference with them: a machine's speed drifts within seconds
ENGINES = {"cpu": ("calls",), "cuda": ("calls", "graph")}  # started by the host, or replayed from a CUDA graph

Calls = dict[tuple[str, str, str], Callable[[], Tensor]]  # (scheduler, form, step)


def measure(
    model: Mamba, ids: Tensor, engine: str, *, chunk_sizes: Sequence[int], split: Iterable[str], stride: int,
    decode_tokens: int, choose_rounds: int, rounds: int, seed: int,
) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:  # fmt: skip
    """(latency, bits, chunks) of every policy in one engine, "calls" or "graph".

    latency: rows of `benchmark.paired` with scheduler, form, step, block, group and engine. Static chunks alone are
    timed in the block "choose", and the fastest of them is the oracle of the block "judge". There a round is of a
    group: a few forms, all those of one policy together, and the reference. bits: whether each form's logits and
    greedy tokens are the reference's. chunks: chunk_size by scheduler and layer. Policies in `split` are taken apart.
    """
    device = model.device
    policies = build_policies(chunk_sizes, stride=stride, seed=seed, device_type=device.type)
    statics = {(name, "published"): each for name, each in policies.items() if re.fullmatch(r"static-\d+", name)}
    before_replay = 2 if engine == "graph" else 1  # a graph is captured at the second call and replayed from there
    first = _calls(model, ids, statics, engine, 0)
    chosen = _timed(first, engine, device, rounds=choose_rounds, warmup=before_replay, seed=seed)
    policies["oracle"] = static(fastest_static(chosen))
    inputs = scan_inputs(model, ids)
    recorded = {name: record(policy, inputs) for name, policy in policies.items() if policy is not None}
    policies[SHUFFLED] = shuffled(recorded["hist"], seed)
    calls = _calls(model, ids, all_forms(policies, recorded, split, engine), engine, decode_tokens)
    bits = bit_rows(calls, before_replay)
    timed = [  # a round of every group in turn, so that a bad minute falls on all; without a warm-up, as all have run
        _timed(each, engine, device, rounds=1, warmup=0, seed=seed + index).assign(
            block="judge", group=group, round=index
        )
        for index in progress(range(rounds), "rounds")
        for group, each in enumerate(_groups(calls))
    ]
    latency = pd.concat([chosen.assign(block="choose", group=0), *timed], ignore_index=True)
    chunks = pd.DataFrame(
        {"scheduler": name, "layer": layer, "chunk_size": chunk}
        for name, each in recorded.items()
        for layer, chunk in enumerate(each)
    )
    return latency.assign(engine=engine), bits.assign(engine=engine), chunks.assign(engine=engine)


def fastest_static(rows: pd.DataFrame) -> int:
    """The chunk of the least median prefill in rows of static policies, as `corey.schedulers.fit_oracle` picks it."""
    medians = rows.groupby("scheduler").latency_us.median()
    shape = {"batch": 0, "d_inner": 0, "seqlen": 0}  # one shape for all, whichever it is
    sweep = [shape | {"chunk_size": int(name.split("-")[1]), "latency_us": value} for name, value in medians.items()]
    return fit_oracle(sweep)[0, 0, 0]


def bit_rows(calls: Calls, times: int) -> pd.DataFrame:
    """Whether logits and, where it decodes, tokens have the reference's bits, at the last of so many calls.

    One row for each scheduler and form. A decode follows its own prefill in `calls`.
    """
    results = {key: [call() for _ in range(times)][-1] for key, call in calls.items()}
    equal = {key: torch.equal(each, results[REFERENCE, "published", key[2]]) for key, each in results.items()}
    return pd.DataFrame(
        {
            "scheduler": name,
            "form": form,
            "logits_bitwise_equal": same,
            "tokens_equal": equal.get((name, form, "decode")),
        }
        for (name, form, step), same in equal.items()
        if step == "prefill"
    )


def _calls(
    model: Mamba, ids: Tensor, forms: Mapping[tuple[str, str], ChunkPolicy | None], engine: str, decode_tokens: int
) -> Calls:
    """Prefill of every form and, unless decode_tokens is 0, decode of whole policies, each in a session of its own.

    A session keeps its graphs, and so many policies would push one another out of a shared one.
    """
    calls = {}
    for (name, form), policy in forms.items():
        session = Session(model, graphs=engine == "graph")
        calls[name, form, "prefill"] = partial(session.prefill, ids, chunk_policy=policy)
        if decode_tokens and form == "published":
            calls[name, form, "decode"] = partial(session.decode, decode_tokens)
    return calls


def _groups(calls: Calls) -> list[Calls]:
    """The calls by GROUP forms or, where a policy's own are more, as many as these; the reference's in each."""
    groups: list[Calls] = []
    schedulers = dict.fromkeys(key[0] for key in calls if key[0] != REFERENCE)
    room = 0
    for scheduler in schedulers:
        forms = {key[1] for key in calls if key[0] == scheduler}
        if len(forms) > room:
            groups.append({key: call for key, call in calls.items() if key[0] == REFERENCE})
            room = GROUP
        groups[-1] |= {key: call for key, call in calls.items() if key[0] == scheduler}
        room -= len(forms)
    return groups


def _timed(calls: Calls, engine: str, device: torch.device, *, rounds: int, warmup: int, seed: int) -> pd.DataFrame:
    keys = {row_name(*key): key for key in calls}
    functions = {row_name(*key): from_idle(call, device) if engine == "calls" else call for key, call in calls.items()}
    rows = benchmark.paired(functions, rounds=rounds, warmup=warmup, seed=seed, device=device)
    rows[["scheduler", "form", "step"]] = [keys[name] for name in rows.name]
    return rows


def row_name(scheduler: str, form: str = "published", step: str = "prefill") -> str:
    """The name under which a call is timed."""
    return f"{scheduler} {form} {step}"


# ---- ratios ----------------------------------------------------------------------------------------------------------


def judged(rows: pd.DataFrame, engine: str) -> pd.DataFrame:
    """The rows of one engine that policies are judged on: name, scheduler, form, step, round, latency_us.

    The step "generation" is prefill and decode added up. A time is taken relative to the reference's of its own group
    and round, and given in units of the reference's median, so that policies of different groups can be compared.
    """
    rows = rows[(rows.engine == engine) & (rows.block == "judge")]
    place, form = ["group", "round"], ["scheduler", "form"]
    times = rows.set_index([*place, *form, "step"]).latency_us.unstack("step")
    times["generation"] = times.sum(axis=1, skipna=False)
    reference = times.xs((REFERENCE, "published"), level=form)
    relative = times / reference.reindex(times.index.droplevel(form)).to_numpy() * reference.median()
    found = relative.stack().dropna().rename("latency_us").reset_index()
    found = found[(found.scheduler != REFERENCE) | (found.group == 0)].drop(columns="group")
    return found.assign(name=[row_name(*key) for key in zip(found.scheduler, found.form, found.step)])


def policy_ratios(rows: pd.DataFrame) -> pd.DataFrame:
    """Latency of every policy over the reference's, from `judged` rows, with 95 % intervals.

    Columns scheduler, step, median_us, ratio, low, high, n. The reference itself, at ratio 1, is left out; the control
    is the reference once more.
    """
    found = []
    published = rows[rows.form == "published"]
    for (scheduler, step), group in published.groupby(["scheduler", "step"], sort=False):
        if scheduler != REFERENCE:
            ratio = benchmark.ratio_interval(published, row_name(scheduler, step=step), row_name(REFERENCE, step=step))
            found.append({"scheduler": scheduler, "step": step, "median_us": group.latency_us.median()} | ratio)
    return pd.DataFrame(found)


def overheads(rows: pd.DataFrame) -> pd.DataFrame:
    """What every policy of PRICED costs and what its cost is made of, from `judged` rows, with 95 % intervals.

    Columns scheduler, part, ratio, low, high, n. part: statistic, decision and chunk, as the module says; all, for the
    published form; unexplained, all over the product of the three. Parts that were not timed are left out.
    """
    prefills = rows[rows.step == "prefill"]
    by_round = prefills.pivot(index="round", columns="name", values="latency_us")
    found = []
    for scheduler in (name for name in PRICED if name in set(prefills.scheduler)):
        name = {form: row_name(scheduler, form) for form in ("published", "forced", "unread", "replayed")}
        reference = row_name(REFERENCE)
        parts = {
            "statistic": (name["unread"], reference),
            "decision": (name["forced"], name["unread"] if name["unread"] in by_round else reference),
            "chunk": (name["replayed"], reference),
            "all": (name["published"], reference),
        }
        timed = {part: pair for part, pair in parts.items() if set(pair) <= set(by_round)}
        ratios = {part: benchmark.ratio_interval(prefills, *pair) for part, pair in timed.items()}
        if {"decision", "chunk", "all"} <= set(timed):
            product = by_round[name["forced"]] * by_round[name["replayed"]] / by_round[reference]
            both = pd.concat([prefills, product.rename("latency_us").reset_index().assign(name="product")])
            ratios["unexplained"] = benchmark.ratio_interval(both, name["published"], "product")
        found += [{"scheduler": scheduler, "part": part} | ratio for part, ratio in ratios.items()]
    return pd.DataFrame(found)


def beyond(ratios: pd.DataFrame, margin: float) -> pd.DataFrame:
    """The rows of a table of ratios whose whole interval lies outside [1 / (1 + margin), 1 + margin]."""
    return ratios[(ratios.low > 1 + margin) | (ratios.high < 1 / (1 + margin))]


def faster_than(
    rows: pd.DataFrame, schedulers: Iterable[str], than: str, step: str = "prefill", margin: float = 0.0
) -> list[str]:
    """Those of the schedulers that are faster than another by more than the margin, by their whole interval.

    The intervals hold at 95 % for all of the schedulers together (Bonferroni), so that more of them find no more.
    """
    measured = [scheduler for scheduler in schedulers if row_name(scheduler, step=step) in set(rows.name)]
    found = []
    for scheduler in measured:
        pair = row_name(scheduler, step=step), row_name(than, step=step)
        ratio = benchmark.ratio_interval(rows, *pair, confidence=1 - 0.05 / len(measured))
        if ratio["high"] < 1 / (1 + margin):
            found.append(scheduler)
    return found
