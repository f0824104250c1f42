"""What every chunk rule costs in every serving regime, prefill by prefill, and its regret against an oracle.

A rule is measured in two steps. "live": it decides layer by layer, as the prefill comes to each scan. "recorded": the
same chunks, noted beforehand, from a list. So live over recorded is what deciding costs and recorded over the oracle
what the choice costs. On a GPU both are taken in two engines: "calls" launches every kernel from the host, begun on an
idle device, and "graph" replays a CUDA graph, where a rule that waits for a number cannot be, so that of such a rule
only the choice is there. On a CPU there are calls.

The oracle knows the regime: the static chunk that is fastest in it. It is chosen in a block of rounds of its own, in
which static chunks alone are timed, and judged with all the rules in another, so that none is best by luck.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from corey import benchmark
from corey._check import bad_value
from corey.ablation_policies import OPERATOR, Recorded, build_policies
from corey.clocks import from_idle
from corey.mamba import Mamba
from corey.mamba_session import MOST_GRAPHS, Session
from corey.progress import progress
from corey.regimes import Regime
from corey.scan import TILE
from corey.schedulers import Scheduler

ONE_STATIC = "one static"  # the static chunk that is best over all regimes, chosen as the oracle is
ALL = "all"  # the regime of an average over regimes
STRIDE = 8  # tokens between those that sampled-hist reads, as published
READING = ("hist", "sampled-hist", "cheap-proxy", "variance-proxy", "guarded-hist", "device-hist")
RESAMPLES = 1999


def first_layers(model: Mamba, count: int) -> Mamba:
    """The model's first `count` layers between its embedding and its head; all of them where it has no more."""
    layers = model.layers[:count]
    return replace(model, config=replace(model.config, n_layer=len(layers)), layers=layers)


# ---- the rules -------------------------------------------------------------------------------------------------------


def build_rules(chunk_sizes: Iterable[int], device_type: str, *, seed: int) -> dict[str, Scheduler | None]:
    """The rules by name: static chunks, what reads nothing, and what reads the scan's input, as in the ablation."""
    known = build_policies(chunk_sizes, stride=STRIDE, seed=seed, device_type=device_type)
    statics = [f"static-{size}" for size in sorted(chunk_sizes)]
    names = (*statics, OPERATOR, "shape", "table", "random", *READING)
    return {name: known[name] for name in names if name in known}


def decides(name: str) -> bool:
    """Whether a rule has anything to decide while a prefill runs."""
    return name != OPERATOR and not name.startswith("static-")


def note_choices(session: Session, ids: Tensor, rule: Scheduler | None) -> tuple[tuple[int | None, ...], float]:
    """The chunk of every layer in one prefill by `rule`, and the mean over layers of its statistic, NaN without one."""
    chunks, statistics = [], []

    def watch(u: Tensor, layer: int) -> int | Tensor | None:
        chunk = None if rule is None else rule(u, layer=layer)
        chunks.append(None if chunk is None else int(chunk))
        if rule is not None and rule.statistic is not None:
            statistics.append(float(rule.statistic(u)))
        return chunk

    session.prefill(ids, chunk_policy=watch)
    return tuple(chunks), float(np.mean(statistics)) if statistics else float("nan")


# ---- measuring -------------------------------------------------------------------------------------------------------


def measure_regimes(
    model: Mamba, regimes: Sequence[Regime], rules: Mapping[str, Scheduler | None], *, rounds: Sequence[int], seed: int
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(latency, choices): the tables of `measure_regime` for one regime after the other; `rounds` has one number each.

    Raises ValueError for another count of rounds and for a kind that comes twice, which names its regime.
    """
    if len(rounds) != len(regimes):
        raise bad_value("rounds", f"{len(rounds)} numbers", f"one for each of {len(regimes)} regimes")
    if len({regime.kind for regime in regimes}) < len(regimes):
        raise bad_value("regimes", [regime.kind for regime in regimes], "every kind once")
    tables = [
        measure_regime(model, regime, rules, rounds=n, seed=seed)
        for regime, n in progress(zip(regimes, rounds), "regimes", total=len(regimes))
    ]
    latency, choices = (pd.concat(each, ignore_index=True) for each in zip(*tables))
    return latency, choices


def measure_regime(
    model: Mamba, regime: Regime, rules: Mapping[str, Scheduler | None], *, rounds: int, seed: int
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(latency, choices) of one regime, all rules in the same interleaved rounds.

    latency: rows of `benchmark.paired` with regime, batch, seqlen, block, engine, step, scheduler; one prefill each.
    The block "choose" times static chunks and "judge" everything, in as many rounds.
    choices: one row a rule: its chunks by layer; timed_as, the rule under whose name these chunks were timed, since
    what is the same for the scan is timed once; reads_values; statistic_nats; and bitwise_equal, whether every timed
    prefill of it gave the operator's logits to the last bit.
    """
    ids = regime.prompts(seed=seed).to(model.device)
    session = Session(model, regime.batch, graphs=False)
    noted = {name: note_choices(session, ids, rule) for name, rule in rules.items()}
    timed_as = _same_for_the_scan({name: chunks for name, (chunks, _) in noted.items()}, regime.seqlen)
    recorded = {name: Recorded(noted[name][0]) for name in dict.fromkeys(timed_as.values())}
    forms = _forms(session, ids, rules, recorded)
    logits: dict[tuple, Tensor] = {}
    functions = {" ".join(key): partial(_keep, logits, key, form) for key, form in forms.items()}
    statics = {name: each for name, each in functions.items() if name.split(" ")[2].startswith("static-")}
    warmup = 3 if model.device.type == "cuda" else 0  # a graph is captured at its second call; a CPU is warm by now
    common = {"rounds": rounds, "warmup": warmup, "device": model.device}
    choose, judge = benchmark.paired(statics, seed=seed, **common), benchmark.paired(functions, seed=seed + 1, **common)
    latency = pd.concat([choose.assign(block="choose"), judge.assign(block="judge")], ignore_index=True)
    latency[["engine", "step", "scheduler"]] = latency.pop("name").str.split(" ", n=2, expand=True)
    equal = {key: torch.equal(each, logits["calls", "recorded", OPERATOR]) for key, each in logits.items()}
    choices = pd.DataFrame(
        {
            "scheduler": name,
            "chunks": " ".join(map(str, chunks)),
            "timed_as": timed_as[name],
            "reads_values": rules[name] is not None and rules[name].statistic is not None,
            "statistic_nats": statistic,
            "bitwise_equal": all(same for (_, _, timed), same in equal.items() if timed in (name, timed_as[name])),
        }
        for name, (chunks, statistic) in noted.items()
    )
    place = {"regime": regime.kind, "batch": regime.batch, "seqlen": regime.seqlen}
    return latency.assign(**place), choices.assign(**place)


def _same_for_the_scan(chunks: Mapping[str, Sequence[int | None]], seqlen: int) -> dict[str, str]:
    """The first rule with the same chunks, for each; a chunk longer than the sequence is the whole sequence."""
    whole = -(-seqlen // TILE) * TILE
    effective = {
        name: tuple(None if chunk is None else min(chunk, whole) for chunk in each) for name, each in chunks.items()
    }
    first: dict[tuple, str] = {}
    for name, each in effective.items():
        first.setdefault(each, name)
    return {name: first[each] for name, each in effective.items()}


def _forms(
    session: Session, ids: Tensor, rules: Mapping[str, Scheduler | None], recorded: Mapping[str, Recorded]
) -> dict[tuple[str, str, str], Callable[[], Tensor]]:
    """What is timed, by (engine, step, rule): prefills of `session` and, on a GPU, of sessions with graphs."""
    live = {("live", name): rule for name, rule in rules.items() if decides(name)}
    steps = {("recorded", name): policy for name, policy in recorded.items()} | live
    calls = {
        ("calls", *step): from_idle(partial(session.prefill, ids, chunk_policy=policy), ids.device)
        for step, policy in steps.items()
    }
    if ids.device.type == "cpu":
        return calls
    captured = [step for step in steps if step[0] == "recorded" or step[1] == "device-hist"]
    sessions = [Session(session.model, session.batch) for _ in range(0, len(captured), MOST_GRAPHS)]
    return calls | {
        ("graph", *step): partial(sessions[index // MOST_GRAPHS].prefill, ids, chunk_policy=steps[step])
        for index, step in enumerate(captured)
    }


def _keep(logits: dict, key: tuple, prefill: Callable[[], Tensor]) -> None:
    logits[key] = prefill()


# ---- the published table ---------------------------------------------------------------------------------------------


def published_regrets(table: pd.DataFrame) -> pd.DataFrame:
    """Mean over regimes of data/published/mixed_regime.csv by rule, with over_oracle_percent."""
    wide = table.pivot(index="regime", columns="chunk_size", values="latency_ms")
    rules = {f"static-{size}": wide[size] for size in wide}
    rules["table"] = wide[512].where(wide.index != "short_chat", wide[128])  # its only regime of short prompts
    rules["oracle"] = wide.min(axis=1)
    means = pd.Series({name: each.mean() for name, each in rules.items()}, name="mean_ms")
    return means.to_frame().assign(over_oracle_percent=100 * (means / means["oracle"] - 1))


# ---- regret ----------------------------------------------------------------------------------------------------------


def regret_rows(latency: pd.DataFrame, choices: pd.DataFrame, *, seed: int = 0) -> pd.DataFrame:
    """Regret of each rule in each regime and over all of them, from the tables of `measure_regimes`.

    One row a regime, engine, scheduler and part, with regret_percent, its 95 % interval low_percent and high_percent,
    and n rounds. Parts: "choice", recorded over the oracle; "deciding", live over recorded; "total", the rule as it
    runs over the oracle. The regime ALL is the geometric mean of the regimes, each of the same weight, and n there the
    fewest rounds of any. The scheduler ONE_STATIC is the static chunk that is best on that mean: what it costs is all
    that knowing the regime could win.

    Regret is the median of ratios within the rounds that judge; the interval is a bootstrap over them, with the oracle
    as it was chosen in others.
    """
    generator = np.random.default_rng(seed)
    places = latency.drop_duplicates("regime").set_index("regime")[["batch", "seqlen"]]
    found = []
    for engine, rows in latency.groupby("engine", sort=False):
        times = {
            regime: _Times.of(each, choices[choices.regime == regime])
            for regime, each in rows.groupby("regime", sort=False)
        }
        for (scheduler, part), draws in _draws(times, generator).items():
            by_regime = draws | {ALL: np.mean(list(draws.values()), axis=0)}
            row = {"engine": engine, "scheduler": scheduler, "part": part}
            counts = {regime: len(times[regime].recorded[OPERATOR]) for regime in draws}
            counts[ALL] = min(counts.values())
            found += [
                {"regime": regime} | row | percent(each, "regret") | {"n": counts[regime]}
                for regime, each in by_regime.items()
            ]
    table = pd.DataFrame(found).join(places.astype("Int64"), on="regime")
    first = ["regime", "batch", "seqlen", "engine", "scheduler", "part"]
    return table[first + [column for column in table if column not in first]]


@dataclass(frozen=True)
class _Times:
    """Log latencies of one regime and engine: (rounds,) each by rule, of the block that judges, and `standing` of the
    static chunks in the one that chooses."""

    recorded: dict[str, np.ndarray]
    live: dict[str, np.ndarray]  # of rules that were timed as they decide
    total: dict[str, np.ndarray]  # the rule as it runs, of those that can run in this engine
    standing: pd.Series  # by static rule

    @staticmethod
    def of(latency: pd.DataFrame, choices: pd.DataFrame) -> "_Times":
        keys = {"index": "round", "columns": ["step", "scheduler"], "values": "latency_us"}
        chosen, logs = (
            np.log(latency[latency.block == block].pivot(**keys).sort_index(axis=1)) for block in ("choose", "judge")
        )
        timed_as = dict(zip(choices.scheduler, choices.timed_as))
        statics = [name for name in timed_as if name.startswith("static-")]
        recorded = {name: logs["recorded", timed].to_numpy() for name, timed in timed_as.items()}
        live = {name: logs["live", name].to_numpy() for step, name in logs if step == "live"}
        reads_nothing = set(choices[~choices.reads_values.astype(bool)].scheduler)
        total = {name: live.get(name, each) for name, each in recorded.items() if name in live or name in reads_nothing}
        tried = np.stack([chosen["recorded", timed_as[name]] for name in statics], axis=1)
        return _Times(recorded, live, total, pd.Series(standing(tried), index=statics))


def _draws(times: Mapping[str, _Times], generator: np.random.Generator) -> dict[tuple, dict[str, np.ndarray]]:
    """For each (rule, part) and regime the log regret: the estimate and RESAMPLES draws of it."""
    one_static = sum(each.standing for each in times.values()).idxmin()
    found: dict[tuple, dict[str, np.ndarray]] = {}
    for regime, each in times.items():
        oracle = each.recorded[each.standing.idxmin()]
        parts = {(name, "choice"): log - oracle for name, log in each.recorded.items()}
        parts |= {(name, "deciding"): log - each.recorded[name] for name, log in each.live.items()}
        parts |= {(name, "total"): log - oracle for name, log in each.total.items()}
        parts |= {(ONE_STATIC, part): each.recorded[one_static] - oracle for part in ("choice", "total")}
        for key, logs in parts.items():
            found.setdefault(key, {})[regime] = resampled_medians(logs, generator)
    return found


def standing(statics: np.ndarray) -> np.ndarray:
    """The median over rounds of each static chunk's log latency against the mean of all in its round."""
    return np.median(statics - statics.mean(axis=1, keepdims=True), axis=0)


def resampled_medians(logs: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """The median over rounds, then RESAMPLES bootstrap draws of it."""
    picks = generator.integers(len(logs), size=(RESAMPLES, len(logs)))
    return np.concatenate([[np.median(logs)], np.median(logs[picks], axis=1)])


def percent(draws: np.ndarray, name: str) -> dict[str, float]:
    """<name>_percent with its 95 % interval, from the estimate of a log ratio and the bootstrap draws behind it."""
    low, high = np.quantile(draws[1:], [0.025, 0.975])
    names = (f"{name}_percent", "low_percent", "high_percent")
    return {name: float(100 * np.expm1(value)) for name, value in zip(names, (draws[0], low, high))}
