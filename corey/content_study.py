"""The null test of a rule that reads content: prompts of one batch and length, different in content alone.

Such a rule can win only where the content moves the time of a prefill or its fastest chunk. All contents and chunks are
timed in the same interleaved rounds, on a GPU as replays of one graph a chunk, which reads one content after the other.
"""

from collections.abc import Iterable, Sequence
from functools import partial

import numpy as np
import pandas as pd

from corey import benchmark
from corey.mamba import Mamba
from corey.mamba_session import Session
from corey.regime_study import note_choices, percent, resampled_medians, standing
from corey.regimes import Regime
from corey.scan import TILE
from corey.schedulers import get_scheduler

AGAIN = "again"  # the control: the first kind, drawn once more


def measure_contents(
    model: Mamba,
    kinds: Sequence[str],
    batch: int,
    seqlen: int,
    chunk_sizes: Iterable[int],
    *,
    rounds: int,
    seed: int,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(latency, contents): rows of `benchmark.paired` with content, chunk_size, batch and seqlen; and for each content
    the mean over layers of the entropy of the scan's input, entropy_nats.
    """
    ids = {kind: Regime(kind, batch, seqlen).prompts(seed=seed).to(model.device) for kind in kinds}
    ids[AGAIN] = Regime(kinds[0], batch, seqlen).prompts(seed=seed + 1).to(model.device)
    sizes = sorted({min(size, -(-seqlen // TILE) * TILE) for size in chunk_sizes})
    policies = {size: get_scheduler("static", chunk_size=size) for size in sizes}
    sessions = {size: Session(model, batch) for size in sizes}
    functions = {
        f"{content} {size}": partial(sessions[size].prefill, each, chunk_policy=policies[size])
        for content, each in ids.items()
        for size in sizes
    }
    latency = benchmark.paired(functions, rounds=rounds, seed=seed, device=model.device)
    latency[["content", "chunk_size"]] = latency.pop("name").str.rsplit(" ", n=1, expand=True)
    eager = Session(model, batch, graphs=False)
    contents = pd.DataFrame(
        {"content": content, "entropy_nats": note_choices(eager, each, get_scheduler("hist"))[1]}
        for content, each in ids.items()
    )
    shape = {"batch": batch, "seqlen": seqlen}
    return latency.astype({"chunk_size": int}).assign(**shape), contents.assign(**shape)


def content_ratios(latency: pd.DataFrame, kinds: Sequence[str], margin: float) -> pd.DataFrame:
    """Latency of each content over that of the first kind, over all chunks: ratio with its 90 % interval, two verdicts.

    The control comes first. `equivalent`: the interval lies inside [1 / (1 + margin), 1 + margin]; `differs`: wholly
    outside. Where neither holds the measurement is too noisy for the margin.
    """
    logs = np.log(latency.set_index(["round", "content", "chunk_size"]).latency_us)
    over_chunks = np.exp(logs.groupby(["round", "content"]).mean()).reset_index().rename(columns={"content": "name"})
    found = []
    for name in (AGAIN, *kinds[1:]):
        row = {"content": name} | benchmark.equivalent_within(over_chunks, name, kinds[0], margin)
        found.append(row | {"differs": row["low"] > 1 + margin or row["high"] < 1 / (1 + margin)})
    return pd.DataFrame(found)


def content_gains(latency: pd.DataFrame, kinds: Sequence[str], *, seed: int = 0) -> pd.DataFrame:
    """What the right chunk gains: rows (content, part, gain_percent with its 95 % interval, n rounds).

    part "chunk": the content's slowest chunk over its fastest. "beyond the others": how much more of that the first
    kind has than the other kinds on average. "knowing the content", over all: the chunk that is fastest for all
    together over each content's own fastest, which is what a rule that reads content could win at most. Chunks are
    chosen on even rounds and judged on odd ones, which are the n that the interval is over.
    """
    generator = np.random.default_rng(seed)
    wide = latency.pivot(index="round", columns=["content", "chunk_size"], values="latency_us").sort_index(axis=1)
    logs = {name: np.log(wide[name].to_numpy()) for name in (*kinds, AGAIN)}  # (rounds, chunks) each
    places = {name: standing(each[::2]) for name, each in logs.items()}
    on = {name: each[1::2] for name, each in logs.items()}
    gains = {name: each[:, places[name].argmax()] - each[:, places[name].argmin()] for name, each in on.items()}
    for_all = np.mean(list(places.values()), axis=0).argmin()
    parts = {(name, "chunk"): each for name, each in gains.items()}
    parts[kinds[0], "beyond the others"] = gains[kinds[0]] - np.mean([gains[name] for name in kinds[1:]], axis=0)
    parts["all", "knowing the content"] = np.mean(
        [each[:, for_all] - each[:, places[name].argmin()] for name, each in on.items()], axis=0
    )
    return pd.DataFrame(
        {"content": name, "part": part, **percent(resampled_medians(each, generator), "gain"), "n": len(each)}
        for (name, part), each in parts.items()
    )
