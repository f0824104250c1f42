"""Chunk policies: every published one over the maps of `corey.chunk_rules`, and one that reads the shape alone.

A scheduler is called `scheduler(u, layer=None) -> chunk_size` with u (B, D, L), the post-convolution input of the scan.
`get_scheduler(name, **params)` builds one; `SCHEDULERS` lists the names. Each says what it `reads` and what it costs.
All answer with an int, except `device-hist` and `guarded-device-hist` on CUDA: a 0-dim int32 tensor on the device,
which the scan takes as it is.
"""

import json
import math
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from corey._check import bad_type, bad_value, check_count
from corey._scan_way import default_chunk
from corey.chunk_rules import ChunkRule, GuardedRule, device_chunk, guard, powers_of_two, shape_chunk
from corey.conv import OutputHistogram
from corey.entropy import cheap_proxy, histogram_entropy, kurtosis_proxy, variance_proxy

PUBLISHED_RANGES = {
    "kernel_legacy": (32, 512, 8.0),  # 8 is log2 256, a ceiling in bits that the kernel benchmarks divide nats by
    "kernel": (32, 512, math.log(256)),
    "routed": (128, 512, math.log(256)),
    "ablation": (128, 2048, math.log(256)),
}
"""(c_min, c_max, h_ref) of each published experiment, for `ChunkRule(*PUBLISHED_RANGES[name])`."""


@dataclass(frozen=True)
class Scheduler:
    """One policy. `statistic` is the number in nats that its map sees, None where it reads no tensor value.

    on_the_way: a `corey.conv.OutputHistogram` that makes the same choice on CUDA while the convolution writes u, for
    callers that run that convolution themselves, as `corey.mamba` does; None where there is none.
    every: it is made in the layers 0, every, 2 every, ..., and the others are to be asked as without it.
    """

    name: str
    reads: str
    cost: str
    choose: Callable[[Tensor, int | None], int | Tensor]
    statistic: Callable[[Tensor], Tensor] | None = None
    on_the_way: object = None
    every: int = 1

    def __call__(self, u: Tensor, layer: int | None = None) -> int | Tensor:
        """Chunk in tokens for one layer's scan input `u` (B, D, L); a tensor only where the module's docstring says."""
        if not isinstance(u, Tensor):
            raise bad_type("u", u, "a torch.Tensor")
        if u.ndim != 3:
            raise bad_value("u", f"shape {tuple(u.shape)}", "(B, D, L)")
        return self.choose(u, layer)


def get_scheduler(name: str, **params) -> Scheduler:
    """Builds the policy `name`, one of `SCHEDULERS`; `params` are those of its builder in this module.

    Every policy with a map takes c_min=128, c_max=512, h_ref=None (ln num_bins), rounding="round", num_bins=256.
    """
    if name not in SCHEDULERS:
        raise bad_value("name", repr(name), f"one of {', '.join(SCHEDULERS)}")
    return SCHEDULERS[name](**params)


def static(chunk_size: int = 512) -> Scheduler:
    """The same chunk for every layer and input."""
    check_count("chunk_size", chunk_size, 1)
    return Scheduler(f"static-{chunk_size}", "nothing", "nothing", lambda u, layer: chunk_size)


def oracle(sweep: Iterable[Mapping]) -> Scheduler:
    """The chunk with the lowest mean latency in `sweep`, for each shape in it; another shape raises.

    `sweep` holds mappings with batch, d_inner, seqlen, chunk_size and latency_us. An oracle that is judged on the runs
    it was chosen from looks better than it is: fit on one half of `split_runs` and judge on the other.
    """
    best = fit_oracle(sweep)

    def choose(u: Tensor, layer: int | None) -> int:
        if tuple(u.shape) not in best:
            raise bad_value("u", f"shape {tuple(u.shape)}", f"a shape of the sweep: {sorted(best)}")
        return best[tuple(u.shape)]

    return Scheduler("oracle", "the shape, and a sweep timed beforehand", "a look-up; the sweep once", choose)


def fit_oracle(sweep: Iterable[Mapping]) -> dict[tuple[int, int, int], int]:
    """(batch, d_inner, seqlen) -> the chunk with the lowest mean latency_us; the smaller chunk wins a tie."""
    latencies: dict[tuple[int, int, int], dict[int, list[float]]] = {}
    for row in sweep:
        shape = (row["batch"], row["d_inner"], row["seqlen"])
        latencies.setdefault(shape, {}).setdefault(row["chunk_size"], []).append(row["latency_us"])
    if not latencies:
        raise bad_value("sweep", "no rows", "at least one timed run")
    return {
        shape: min(chunks, key=lambda c: (sum(chunks[c]) / len(chunks[c]), c)) for shape, chunks in latencies.items()
    }


def split_runs(sweep: Iterable[Mapping], *, seed: int = 0) -> tuple[list[Mapping], list[Mapping]]:
    """Halves the timed runs by their `run` number, at random: (rows to choose on, rows to judge on)."""
    rows = list(sweep)
    runs = sorted({row["run"] for row in rows})
    if len(runs) < 2:
        raise bad_value("sweep", f"{len(runs)} run(s)", "at least two runs")
    chosen = set(random.Random(seed).sample(runs, len(runs) // 2))
    return [r for r in rows if r["run"] in chosen], [r for r in rows if r["run"] not in chosen]


def no_entropy(*, num_bins: int = 256, **rule) -> Scheduler:
    """The map at half its scale, H = 0.5 ln num_bins, whatever the input."""
    chunk_size = _rule(num_bins, **rule)(0.5 * math.log(num_bins))
    return Scheduler("no-entropy", "nothing", "nothing", lambda u, layer: chunk_size)


def random_choice(*, c_min: int = 128, c_max: int = 512, seed: int = 0) -> Scheduler:
    """A power of two drawn uniformly from [c_min, c_max] at every call; build a new one to start the draws again."""
    candidates = powers_of_two(c_min, c_max)
    draws = random.Random(seed)
    return Scheduler("random", "nothing", "one pseudo-random draw", lambda u, layer: draws.choice(candidates))


def hist(*, num_bins: int = 256, **rule) -> Scheduler:
    """Histogram entropy of all of u."""
    return _from_statistic(
        "hist", "all of u", "a pass over u and one host read", lambda u: histogram_entropy(u, num_bins), num_bins, rule
    )


def device_hist(
    *,
    num_bins: int = 256,
    range: tuple[float, float] | None = None,
    stride: int = 1,
    every: int = 1,
    otherwise: int = 512,
    **rule,
) -> Scheduler:
    """`hist` that never leaves the device: statistic and map run on CUDA and the chunk stays there, a 0-dim tensor.

    range: None for u's own range, two passes; a fixed pair (lo, hi) is one pass, or none at all after a convolution
    that counts on the way. stride: tokens between those that are counted. every: decides in the layers 0, every,
    2 every, ...; the others take the chunk `otherwise`. On CPU it is `hist` of these, an int.
    """
    return _device_hist("device-hist", _rule(num_bins, **rule), num_bins, range, stride, every, otherwise)


def guarded_device_hist(
    *,
    num_bins: int = 256,
    range: tuple[float, float] | None = None,
    stride: int = 1,
    every: int = 1,
    otherwise: int = 512,
    fallback: int = 512,
    delta: float = 2.0,
    **rule,
) -> Scheduler:
    """`device_hist` behind the guard, which is part of the map on the device: its parameters and a `GuardedRule`'s."""
    guarded_rule = GuardedRule(**asdict(_rule(num_bins, **rule)), fallback=fallback, delta=delta)
    return _device_hist("guarded-device-hist", guarded_rule, num_bins, range, stride, every, otherwise)


def sampled_hist(*, stride: int = 8, num_bins: int = 256, **rule) -> Scheduler:
    """Histogram entropy of every `stride`-th token."""
    check_count("stride", stride, 1)
    return _from_statistic(
        "sampled-hist",
        f"every {stride}-th token of u",
        f"a pass over 1/{stride} of u and one host read",
        lambda u: histogram_entropy(u[..., ::stride], num_bins),
        num_bins,
        rule,
    )


def token_hist(*, stride: int = 8, num_bins: int = 256, **rule) -> Scheduler:
    """Mean over every `stride`-th token of the entropy of that token's channels, each over the token's own range."""
    check_count("stride", stride, 1)
    return _from_statistic(
        "token-hist",
        f"every {stride}-th token of u, one histogram each",
        f"a pass over 1/{stride} of u, a table of tokens x {num_bins} counts and one host read",
        lambda u: histogram_entropy(u[..., ::stride], num_bins, dim=1).sum() / max(u[:, 0, ::stride].numel(), 1),
        num_bins,
        rule,
    )


def cheap(*, num_bins: int = 256, **rule) -> Scheduler:
    """`corey.entropy.cheap_proxy` in place of the entropy."""
    return _proxy("cheap-proxy", cheap_proxy, num_bins, rule)


def variance(*, num_bins: int = 256, **rule) -> Scheduler:
    """`corey.entropy.variance_proxy` in place of the entropy."""
    return _proxy("variance-proxy", variance_proxy, num_bins, rule)


def kurtosis(*, num_bins: int = 256, **rule) -> Scheduler:
    """`corey.entropy.kurtosis_proxy` in place of the entropy: heavy tails give large chunks, against the entropy."""
    return _proxy("kurtosis-proxy", kurtosis_proxy, num_bins, rule)


def guarded(inner: Callable[..., Scheduler]) -> Callable[..., Scheduler]:
    """The builder of `inner` behind `guard`; the statistic is paid for whether or not the fallback is taken."""

    def build(*, fallback: int = 512, delta: float = 2.0, **params) -> Scheduler:
        chosen = inner(**params)
        check_count("fallback", fallback, 1)
        return Scheduler(
            f"guarded-{chosen.name}",
            chosen.reads,
            chosen.cost,
            lambda u, layer: guard(chosen(u, layer), fallback, delta),
            chosen.statistic,
        )

    build.__doc__ = f"Guarded: {inner.__doc__}"
    return build


_TABLE_BOUNDS = tuple(f"{end}_{feature}" for feature in ("layer_idx", "seq_len", "entropy") for end in ("min", "max"))


def table(rules: Mapping | str | Path | None = None, *, num_bins: int = 256, stride: int = 1) -> Scheduler:
    """The first matching rule of a table, else its default chunk.

    `rules` is a mapping or the path of a JSON file, such as
    {"default_chunk": 512, "rules": [{"chunk": 128, "max_seq_len": 256}, {"chunk": 1024, "min_entropy": 4.0}]}.
    A rule may bound layer_idx, seq_len and entropy (nats) with min_ and max_, both ends included; a bound on the layer
    does not match where the layer is not known. The entropy is evaluated only where a rule that fits otherwise asks for
    it. None is the one table that the paper's code mentions: always 512.
    """
    return _table("table", rules, num_bins, stride, always=False)


def table_always_reads(rules: Mapping | str | Path | None = None, *, num_bins: int = 256, stride: int = 1) -> Scheduler:
    """`table` as the paper's code runs it: the histogram is evaluated at every call, also where no rule asks."""
    return _table("table-always-reads", rules, num_bins, stride, always=True)


def shape(*, processors: int | None = None, c_min: int = 128, c_max: int = 2048, fill: int = 4) -> Scheduler:
    """`shape_chunk` of u's shape; `processors` defaults to the device's multiprocessors, or the CPU's threads.

    For a CUDA tensor it is the chunk that the operator itself would take: one for the whole sequence where that keeps
    the GPU busy, which spares it a second exp a state and token. The arguments then count for nothing.
    """

    def choose(u: Tensor, layer: int | None) -> int:
        batch, d_inner, seqlen = u.shape
        if u.is_cuda and u.numel():
            return default_chunk(u)
        count = processors if processors is not None else _processors(u.device)
        return shape_chunk(batch, d_inner, seqlen, count, c_min=c_min, c_max=c_max, fill=fill)

    shape_chunk(1, 1, 1, processors if processors is not None else 1, c_min=c_min, c_max=c_max, fill=fill)
    return Scheduler("shape", "the shape of u and the processor count", "host arithmetic", choose)


SCHEDULERS: dict[str, Callable[..., Scheduler]] = {
    "static": static,
    "oracle": oracle,
    "no-entropy": no_entropy,
    "random": random_choice,
    "hist": hist,
    "device-hist": device_hist,
    "sampled-hist": sampled_hist,
    "token-hist": token_hist,
    "cheap-proxy": cheap,
    "variance-proxy": variance,
    "kurtosis-proxy": kurtosis,
    "guarded-hist": guarded(hist),
    "guarded-device-hist": guarded_device_hist,
    "guarded-sampled-hist": guarded(sampled_hist),
    "guarded-token-hist": guarded(token_hist),
    "guarded-cheap-proxy": guarded(cheap),
    "guarded-variance-proxy": guarded(variance),
    "guarded-kurtosis-proxy": guarded(kurtosis),
    "table": table,
    "table-always-reads": table_always_reads,
    "shape": shape,
}


def _rule(
    num_bins: int, c_min: int = 128, c_max: int = 512, h_ref: float | None = None, rounding: str = "round"
) -> ChunkRule:
    check_count("num_bins", num_bins, 2)
    return ChunkRule(c_min, c_max, math.log(num_bins) if h_ref is None else h_ref, rounding)


def _from_statistic(
    name: str, reads: str, cost: str, statistic: Callable[[Tensor], Tensor], num_bins: int, rule: dict
) -> Scheduler:
    chunk_rule = _rule(num_bins, **rule)
    return Scheduler(name, reads, cost, lambda u, layer: chunk_rule(float(statistic(u))), statistic)


def _device_hist(
    name: str,
    rule: ChunkRule,
    num_bins: int,
    range: tuple[float, float] | None,
    stride: int,
    every: int,
    otherwise: int,
) -> Scheduler:
    check_count("stride", stride, 1)
    check_count("every", every, 1)
    check_count("otherwise", otherwise, 1)
    share = "u" if stride == 1 else f"1/{stride} of u"
    passes = f"two passes over {share}" if range is None else f"one pass over {share}"
    reads = "all of u" if stride == 1 else f"every {stride}-th token of u"
    reads += "" if every == 1 else f" in every {every}-th layer"

    def statistic(u: Tensor) -> Tensor:
        return histogram_entropy(u[..., ::stride], num_bins, range)

    def choose(u: Tensor, layer: int | None) -> int | Tensor:
        if layer is not None and layer % every:
            return otherwise
        if u.is_cuda:
            return device_chunk(u[..., ::stride], rule, num_bins, range)
        return rule(float(statistic(u)))

    on_the_way = None if range is None else OutputHistogram(range, num_bins, rule, stride)
    return Scheduler(name, reads, f"{passes} and no host read", choose, statistic, on_the_way, every)


def _proxy(name: str, proxy: Callable[[Tensor, int], Tensor], num_bins: int, rule: dict) -> Scheduler:
    cost = "two or three reductions over u and one host read"
    return _from_statistic(name, "all of u", cost, lambda u: proxy(u, num_bins), num_bins, rule)


def _table(name: str, rules: Mapping | str | Path | None, num_bins: int, stride: int, *, always: bool) -> Scheduler:
    check_count("stride", stride, 1)
    check_count("num_bins", num_bins, 2)
    default_chunk, entries = _parse_table(rules)
    asks = any("min_entropy" in entry or "max_entropy" in entry for entry in entries)

    def statistic(u: Tensor) -> Tensor:
        return histogram_entropy(u[..., ::stride], num_bins)

    def choose(u: Tensor, layer: int | None) -> int:
        entropy = float(statistic(u)) if always else None
        for entry in entries:
            if not (_inside(entry, "layer_idx", layer) and _inside(entry, "seq_len", u.shape[-1])):
                continue
            if entropy is None and ("min_entropy" in entry or "max_entropy" in entry):
                entropy = float(statistic(u))
            if _inside(entry, "entropy", entropy):
                return entry["chunk"]
        return default_chunk

    reads_values = always or asks
    return Scheduler(
        name,
        "the length, the layer" + (" and u" if reads_values else ""),
        "a histogram and one host read at every call" if always else "a look-up" + (", at times a histogram" * asks),
        choose,
        statistic if reads_values else None,
    )


def _parse_table(rules: Mapping | str | Path | None) -> tuple[int, list[Mapping]]:
    if rules is None:
        rules = {"default_chunk": 512, "rules": []}
    if isinstance(rules, str | Path):
        rules = json.loads(Path(rules).read_text(encoding="utf-8"))
    if not isinstance(rules, Mapping) or set(rules) != {"default_chunk", "rules"}:
        raise bad_value("rules", rules, "{'default_chunk': int, 'rules': [...]}")
    check_count("default_chunk", rules["default_chunk"], 1)
    for entry in rules["rules"]:
        if unknown := set(entry) - {"name", "chunk", *_TABLE_BOUNDS}:
            raise bad_value("rules", f"unknown keys {sorted(unknown)}", f"name, chunk, {', '.join(_TABLE_BOUNDS)}")
        check_count("chunk", entry.get("chunk"), 1)
    return rules["default_chunk"], list(rules["rules"])


def _inside(entry: Mapping, feature: str, value: float | None) -> bool:
    low, high = entry.get(f"min_{feature}"), entry.get(f"max_{feature}")
    if low is None and high is None:
        return True
    return value is not None and (low is None or value >= low) and (high is None or value <= high)


def _processors(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return torch.get_num_threads()
