"""What notebook 03 measures and replays: the published chunked-scan benchmark beside forms that keep the recurrence."""

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from scipy import stats
from torch import Tensor

from corey import benchmark
from corey._check import bad_value
from corey.entropy import histogram_entropy
from corey.published import read_published
from corey.scan import TILE, scan_carried_ref, scan_reset_ref, selective_scan, selective_scan_ref
from corey.schedulers import PUBLISHED_RANGES, ChunkRule

FORMS = ("reset", "carried", "one_launch")
DISTRIBUTIONS = ("uniform", "normal", "laplace", "sparse10", "sparse2")
MEMORIES = {"forgetful": 1.0, "long": 2e-3}  # size of a time step; the slowest state lasts about 1 / step tokens


def published_inputs(
    batch: int, d_inner: int, seqlen: int, d_state: int, *, seed: int, dtype=torch.float32, device="cpu"
) -> dict:
    """Arguments of the scan as the paper's kernel benchmarks draw them, with two repairs.

    u (B, D, L) is normal and delta (B, D, L) uniform, in `dtype`; B and C are (D, N) constants, A (D, N) and D (D,)
    float32; softplus on delta. The paper leaves A, B, C and D without a seed and draws A from a normal, so that half of
    the states grow until they overflow. Here all are seeded and A is minus the absolute value of that normal.
    """
    generator = torch.Generator().manual_seed(seed)
    return {
        "u": torch.randn(batch, d_inner, seqlen, generator=generator).to(device, dtype),
        "delta": torch.rand(batch, d_inner, seqlen, generator=generator).to(device, dtype),
        "A": -torch.randn(d_inner, d_state, generator=generator).abs().to(device),
        "B": torch.randn(d_inner, d_state, generator=generator).to(device),
        "C": torch.randn(d_inner, d_state, generator=generator).to(device),
        "D": torch.randn(d_inner, generator=generator).to(device),
        "delta_softplus": True,
    }


def mamba_inputs(
    batch: int,
    d_inner: int,
    seqlen: int,
    d_state: int,
    *,
    step: float = 0.02,
    seed: int,
    dtype=torch.float32,
    device="cpu",
) -> dict:
    """Arguments of the scan with Mamba's own structure: B and C (B, N, L) depend on the token and A = -1 .. -N.

    Time steps scatter around `step` by a factor of e^0.3, so state n lasts about 1 / (n step) tokens. There is no skip
    D, which would pass u on beside the recurrence and hide a part of its error.
    """
    if step <= 0:
        raise bad_value("step", step, "a positive time step")
    generator = torch.Generator().manual_seed(seed)
    scatter = torch.exp(0.3 * torch.randn(batch, d_inner, seqlen, generator=generator))
    return {
        "u": torch.randn(batch, d_inner, seqlen, generator=generator).to(device, dtype),
        "delta": (step * scatter).to(device, dtype),
        "A": -torch.arange(1.0, d_state + 1).repeat(d_inner, 1).to(device),
        "B": torch.randn(batch, d_state, seqlen, generator=generator).to(device, dtype),
        "C": torch.randn(batch, d_state, seqlen, generator=generator).to(device, dtype),
    }


def draw(distribution: str, shape: Sequence[int], *, seed: int) -> Tensor:
    """float32 values of one of the paper's five `DISTRIBUTIONS`, seeded by `seed` alone.

    U[0, 1], N(0, 1), Laplace(0, 1), N(0, 1) on a tenth of the places, and N(0, 25) on a fiftieth, else zero.
    """
    generator = torch.Generator().manual_seed(seed)
    if distribution == "uniform":
        return torch.rand(*shape, generator=generator)
    if distribution == "normal":
        return torch.randn(*shape, generator=generator)
    if distribution == "laplace":
        sign = torch.randint(0, 2, shape, generator=generator) * 2.0 - 1.0
        return sign * torch.empty(shape).exponential_(generator=generator)
    if distribution in ("sparse10", "sparse2"):
        share, deviation = {"sparse10": (0.10, 1.0), "sparse2": (0.02, 5.0)}[distribution]
        kept = torch.rand(*shape, generator=generator) < share
        return torch.where(kept, deviation * torch.randn(*shape, generator=generator), 0.0)
    raise bad_value("distribution", repr(distribution), f"one of {', '.join(DISTRIBUTIONS)}")


# ---- the sweep -------------------------------------------------------------------------------------------------------


def scan_form(form: str, inputs: Mapping, chunk_size: int) -> Callable[[], Tensor]:
    """A call without arguments: "reset" and "carried" loop on the host, "one_launch" hands the chunk to the scan.

    A chunk of at least L tokens makes one call in every form, and is the unsliced scan.
    """
    if form not in FORMS:
        raise bad_value("form", repr(form), f"one of {', '.join(FORMS)}")
    function = {"reset": scan_reset_ref, "carried": scan_carried_ref, "one_launch": selective_scan}[form]
    return lambda: function(**inputs, chunk_size=chunk_size)


def legal_forms(chunk_sizes: Iterable[int]) -> list[tuple[str, int]]:
    """Every form at every chunk; the scan itself takes whole tiles of 128 tokens only, so smaller ones leave it out."""
    return [
        (form, size)
        for size in sorted(chunk_sizes, reverse=True)
        for form in FORMS
        if form != "one_launch" or size % TILE == 0
    ]


def num_launches(form: str, chunk_size: int, seqlen: int) -> int:
    """Calls of the scan that a form makes for one sequence."""
    return 1 if form == "one_launch" else -(-seqlen // chunk_size)


def sweep(inputs: Mapping, chunk_sizes: Iterable[int], *, rounds: int, seed: int) -> pd.DataFrame:
    """Paired timings of every form at every chunk: the rows of `benchmark.paired` with form, chunk_size and n_launches.

    Give L itself as the largest chunk to have the unsliced call in the sweep.
    """
    forms = legal_forms(chunk_sizes)
    functions = {f"{form}_{size}": scan_form(form, inputs, size) for form, size in forms}
    rows = benchmark.paired(functions, rounds=rounds, seed=seed, device=inputs["u"].device)
    columns = {f"{form}_{size}": (form, size, num_launches(form, size, inputs["u"].shape[2])) for form, size in forms}
    rows[["form", "chunk_size", "n_launches"]] = [columns[name] for name in rows.name]
    return rows


def summarise(rows: pd.DataFrame, *, seed: int = 0, resamples: int = 2000) -> pd.DataFrame:
    """Median latency of each name with its 95 % bootstrap interval over rounds: median_us, low_us, high_us, n.

    In the order of `legal_forms` where the rows have forms: the largest chunk first.
    """
    generator = np.random.default_rng(seed)
    found = []
    keys = [column for column in ("name", "form", "chunk_size", "n_launches") if column in rows]
    for key, group in rows.groupby(keys, sort=False):
        values = group.latency_us.to_numpy()
        medians = np.median(generator.choice(values, (resamples, len(values))), axis=1)
        low, high = np.quantile(medians, [0.025, 0.975])
        found.append((*key, np.median(values), low, high, len(values)))
    table = pd.DataFrame(found, columns=[*keys, "median_us", "low_us", "high_us", "n"])
    return table.sort_values(["chunk_size", "name"], ascending=False, ignore_index=True) if "form" in table else table


def launch_fits(summary: pd.DataFrame) -> pd.DataFrame:
    """The launch-cost line of each host loop in a table of `summarise`."""
    fits = []
    for form in ("reset", "carried"):
        rows = summary[summary.form == form]
        fits.append({"form": form} | benchmark.launch_cost_fit(rows.n_launches, rows.median_us))
    return pd.DataFrame(fits)


def rule_regrets(rows: pd.DataFrame, entropies: Mapping[str, float], *, unsliced: int) -> pd.DataFrame:
    """The chunk that the ln K rule gives each entropy, and what it costs in the published loop of a measured sweep.

    `over_512` is against the paper's oracle and `over_unsliced`, with its 95 % interval, against one call of `unsliced`
    tokens; both are ratios of latency.
    """
    rule = ChunkRule(*PUBLISHED_RANGES["kernel"])
    found = []
    for name, entropy in entropies.items():
        chunk = rule(entropy)
        oracle = 1.0 if chunk == 512 else benchmark.ratio_interval(rows, f"reset_{chunk}", "reset_512")["ratio"]
        one = benchmark.ratio_interval(rows, f"reset_{chunk}", f"reset_{unsliced}")
        row = {"distribution": name, "entropy_nats": entropy, "chunk_size": chunk, "over_512": oracle}
        found.append(row | {"over_unsliced": one["ratio"], "low": one["low"], "high": one["high"]})
    return pd.DataFrame(found)


def best_reset_chunk(rows: pd.DataFrame, largest: int) -> int:
    """The chunk, of those up to `largest`, that a static oracle of the published loop would keep.

    It is the largest chunk that no other beats beyond doubt, that is, with a 95 % interval of the ratio above 1.
    """
    sizes = sorted(rows[(rows.form == "reset") & (rows.chunk_size <= largest)].chunk_size.unique(), reverse=True)
    for size in sizes:
        others = [other for other in sizes if other != size]
        ratios = [benchmark.ratio_interval(rows, f"reset_{size}", f"reset_{other}") for other in others]
        if all(found["low"] <= 1 for found in ratios):
            return int(size)
    raise bad_value("rows", "chunks that all beat one another", "timings of one sweep")


def published_launch_fits() -> pd.DataFrame:
    """The same line through the published tables. The unsliced call, which the paper does not have, is left out."""
    chunk_sweep, triplet = read_published("chunk_sweep"), read_published("triplet")
    loops = [("RTX 3070, fp16, L = 4096", chunk_sweep[chunk_sweep.n_launches > 1])]
    sliced = triplet[(triplet.gpu == "H800") & triplet.n_launches.notna()]
    loops += [(f"H800, {dtype}, L = {seqlen}", rows) for (dtype, seqlen), rows in sliced.groupby(["dtype", "seqlen"])]
    return pd.DataFrame(
        {"device": device} | benchmark.launch_cost_fit(rows.n_launches, 1e3 * rows.latency_ms) for device, rows in loops
    )


# ---- errors ----------------------------------------------------------------------------------------------------------


def error_rows(inputs: Mapping, chunk_sizes: Iterable[int]) -> pd.DataFrame:
    """Relative L2 error of every form and chunk against float64, and whether its bits are those of the plain scan."""
    doubled = {name: value.double() if isinstance(value, Tensor) else value for name, value in inputs.items()}
    truth = selective_scan_ref(**doubled)
    plain = selective_scan(**inputs)
    rows = []
    for form, size in legal_forms(chunk_sizes):
        y = scan_form(form, inputs, size)()
        error = float((y.double() - truth).norm() / truth.norm())
        rows.append(
            {"form": form, "chunk_size": size, "relative_error": error, "bitwise_equal": bool(torch.equal(y, plain))}
        )
    return pd.DataFrame(rows)


# ---- published tables through the rule -------------------------------------------------------------------------------


def replay_perturbation(entropies: Mapping[str, float]) -> pd.DataFrame:
    """The published chunk of each distribution beside the rule's for an entropy measured here, with both ceilings."""
    rows = read_published("perturbation")
    rows["measured_nats"] = rows.distribution.map(entropies)
    for column, name in (("replayed_legacy", "kernel_legacy"), ("replayed_log_k", "kernel")):
        rows[column] = [ChunkRule(*PUBLISHED_RANGES[name])(value) for value in rows.measured_nats]
    return rows


def replay_href() -> pd.DataFrame:
    """The published ablation of H_ref through the rule, and its latency looked up in the published chunk sweep."""
    rows = read_published("href")
    rows["replayed_chunk"] = [ChunkRule(32, 512, h_ref)(entropy) for h_ref, entropy in zip(rows.h_ref, rows.entropy)]
    latency_ms = read_published("chunk_sweep").set_index("chunk_size").latency_ms
    rows["replayed_ms"] = rows.replayed_chunk.map(latency_ms)
    return rows


def replay_triplet() -> pd.DataFrame:
    """Each published triplet: the chunk of either ceiling for normal values, and the ratios that the paper divides."""
    chosen = {name: ChunkRule(*PUBLISHED_RANGES[name])(4.604) for name in ("kernel_legacy", "kernel")}
    keys = ["gpu", "dtype", "seqlen"]
    rows = read_published("triplet").pivot(index=keys, columns="row", values="latency_ms").reset_index()
    return rows.assign(
        chunk_legacy=chosen["kernel_legacy"],
        chunk_log_k=chosen["kernel"],
        legacy_over_static_64=rows.static_64 / rows.legacy_256,
        log_k_over_static_64=rows.static_64 / rows.static_512,
        legacy_over_static_512=rows.legacy_256 / rows.static_512,
    ).rename_axis(columns=None)


# ---- is latency data-dependent? --------------------------------------------------------------------------------------


def distribution_timings(inputs: Mapping, chunk_size: int, *, rounds: int, seed: int) -> pd.DataFrame:
    """Paired timings of the one-launch scan at one chunk with u from each distribution.

    "control" is a second normal tensor: what it differs from "normal" by is noise, so it shows what the test can see.
    """
    u = inputs["u"]
    tensors = {name: draw(name, u.shape, seed=seed).to(u.device, u.dtype) for name in DISTRIBUTIONS}
    tensors["control"] = draw("normal", u.shape, seed=seed + 1).to(u.device, u.dtype)
    functions = {name: scan_form("one_launch", {**inputs, "u": x}, chunk_size) for name, x in tensors.items()}
    return benchmark.paired(functions, rounds=rounds, seed=seed, device=u.device)


def distribution_ratios(rows: pd.DataFrame, margin: float) -> pd.DataFrame:
    """Latency of each distribution over that of "normal": ratio with its 90 % interval, and two verdicts.

    `equivalent`: the interval lies inside [1 / (1 + margin), 1 + margin]. `differs`: it lies wholly outside. Where
    neither holds the measurement is too noisy for the margin.
    """
    found = []
    for name in ("control", *(each for each in DISTRIBUTIONS if each != "normal")):
        row = {"distribution": name} | benchmark.equivalent_within(rows, name, "normal", margin)
        found.append(row | {"differs": row["low"] > 1 + margin or row["high"] < 1 / (1 + margin)})
    return pd.DataFrame(found)


# ---- does entropy predict the best chunk? ----------------------------------------------------------------------------


def best_chunk_rows(
    inputs: Mapping, tensors: Mapping[str, Tensor], chunk_sizes: Iterable[int], *, rounds: int, seed: int
) -> pd.DataFrame:
    """For each tensor as u: its entropy and the `fastest_chunk` of the one-launch scan.

    All tensors and chunks share the rounds, so that drift of the machine falls on every entropy alike.
    """
    functions = {
        f"{name} {size}": scan_form("one_launch", {**inputs, "u": u}, size)
        for name, u in tensors.items()
        for size in chunk_sizes
    }
    timed = benchmark.paired(functions, rounds=rounds, warmup=1, seed=seed, device=inputs["u"].device)
    timed[["tensor", "name"]] = timed.name.str.rsplit(" ", n=1, expand=True)
    found = {name: fastest_chunk(rows) for name, rows in timed.groupby("tensor")}
    return pd.DataFrame(
        {"tensor": name, "entropy_nats": float(histogram_entropy(u))} | found[name] for name, u in tensors.items()
    )


def fastest_chunk(timed: pd.DataFrame) -> dict:
    """The chunk with the lowest median in rows of `benchmark.paired` whose names are chunks.

    Returns best_chunk over all rounds, best_chunk_even and best_chunk_odd over each half of them, and spread, the
    slowest median over the fastest. The halves say how far a best chunk repeats itself, which bounds what could
    predict it.
    """
    medians = timed.groupby("name").latency_us.median()
    halves = timed.groupby([timed["round"] % 2, "name"]).latency_us.median()
    return {
        "best_chunk": int(medians.idxmin()),
        "best_chunk_even": int(halves[0].idxmin()),
        "best_chunk_odd": int(halves[1].idxmin()),
        "spread": float(medians.max() / medians.min()),
    }


def spearman_permutation(x: Sequence[float], y: Sequence[float], *, resamples: int = 9999, seed: int = 0) -> dict:
    """Spearman's correlation with a two-sided permutation test: dict(rho, p_value, n); rho is 0 if y is constant."""
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    if x.ndim != 1 or x.shape != y.shape or len(x) < 5:
        raise bad_value("y", f"shapes {x.shape} and {y.shape}", "two sequences of one length, at least 5")
    if np.ptp(x) == 0:
        raise bad_value("x", "one value throughout", "at least two different values")
    if np.ptp(y) == 0:
        return {"rho": 0.0, "p_value": 1.0, "n": len(x)}  # one best chunk for all: nothing to predict
    ranks_x, ranks_y = stats.zscore(stats.rankdata(x)), stats.zscore(stats.rankdata(y)) / len(y)
    found = stats.permutation_test(
        (ranks_x,),
        lambda permuted: permuted @ ranks_y,  # Spearman's rho: Pearson's of the ranks
        permutation_type="pairings",
        n_resamples=resamples,
        alternative="two-sided",
        rng=np.random.default_rng(seed),
    )
    return {"rho": float(found.statistic), "p_value": float(found.pvalue), "n": len(x)}
