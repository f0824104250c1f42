"""What notebook 03 measures and replays: the published chunked-scan benchmark beside forms that keep the recurrence.

On a GPU every form is timed by both of `corey.clocks`: from an idle device, as the published benchmark was, and as the
replay of a graph, which has no host in it and reads its inputs from memory.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from corey import benchmark
from corey._check import bad_value
from corey.clocks import from_idle, median_interval, on_device
from corey.cold_calls import cold_calls, in_turn, input_sets
from corey.published import read_published
from corey.scan import TILE, scan_carried_ref, scan_reset_ref, selective_scan, selective_scan_ref
from corey.schedulers import PUBLISHED_RANGES, ChunkRule

HOST_LOOPS = ("reset", "carried")
FORMS = (*HOST_LOOPS, "one_launch")
DISTRIBUTIONS = ("uniform", "normal", "laplace", "sparse10", "sparse2")
MEMORIES = {"forgetful": 1.0, "long": 2e-3}  # size of a time step; the slowest state lasts about 1 / step tokens
HEAD_START_BYTES = 1 << 30  # overwriting them takes a GPU longer than its host needs to launch a graph of many nodes


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
    """A call without arguments: "reset" and "carried" loop on the host, "one_launch" hands the chunk to the scan, and
    "default" leaves it to the scan.

    A chunk of at least L tokens makes one call in every form, and is the unsliced scan.
    """
    if form not in (*FORMS, "default"):
        raise bad_value("form", repr(form), f"one of {', '.join(FORMS)} and default")
    return partial(_scan, form, chunk_size, inputs)


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
    return -(-seqlen // chunk_size) if form in HOST_LOOPS else 1


def sweep(inputs: Mapping, chunk_sizes: Iterable[int], *, rounds: int, seed: int) -> pd.DataFrame:
    """Paired timings of every form at every chunk: the rows of `benchmark.paired` with form, chunk_size and n_launches.

    "default" is one call with the chunk left to the scan, under chunk_size L: the unsliced scan as anyone would call
    it. Every form is timed from an idle device; on a GPU its replay is timed too, as form "<form>_graph", with the
    time of one pass out of the several that a graph holds.
    """
    device, seqlen = inputs["u"].device, inputs["u"].shape[2]
    functions, columns, passes = {}, {}, {}
    sets = input_sets(inputs)
    for form, size in [*legal_forms(chunk_sizes), ("default", seqlen)]:
        launches, name = num_launches(form, size, seqlen), f"{form}_{size}"
        functions[name] = from_idle(scan_form(form, inputs, size), device)
        columns[name], passes[name] = (form, size, launches), 1
        if device.type == "cuda":
            calls, name = cold_calls(partial(_scan, form, size), sets, launches), f"{form}_graph_{size}"
            functions[name] = on_device(partial(in_turn, calls), device)
            columns[name], passes[name] = (f"{form}_graph", size, launches), len(calls)
    flush_bytes = HEAD_START_BYTES if device.type == "cuda" else None
    rows = benchmark.paired(functions, rounds=rounds, seed=seed, device=device, flush_bytes=flush_bytes)
    rows["latency_us"] /= rows.name.map(passes)
    rows[["form", "chunk_size", "n_launches"]] = [columns[name] for name in rows.name]
    return rows


def summarise(rows: pd.DataFrame, *, seed: int = 0) -> pd.DataFrame:
    """Median latency of each name with its 95 % bootstrap interval over rounds: median_us, low_us, high_us, n.

    In the order of `legal_forms` where the rows have forms: the largest chunk first.
    """
    generator = np.random.default_rng(seed)
    keys = [column for column in ("name", "form", "chunk_size", "n_launches") if column in rows]
    found = [
        (*key, *median_interval(group.latency_us, generator), len(group))
        for key, group in rows.groupby(keys, sort=False)
    ]
    table = pd.DataFrame(found, columns=[*keys, "median_us", "low_us", "high_us", "n"])
    return table.sort_values(["chunk_size", "name"], ascending=False, ignore_index=True) if "form" in table else table


def launch_fits(summary: pd.DataFrame) -> pd.DataFrame:
    """The launch-cost line of each host loop, and of its graph replay, in a table of `summarise`."""
    forms = [form for loop in HOST_LOOPS for form in (loop, f"{loop}_graph") if form in set(summary.form)]
    tables = {form: summary[summary.form == form] for form in forms}
    return pd.DataFrame(
        {"form": form} | benchmark.launch_cost_fit(rows.n_launches, rows.median_us) for form, rows in tables.items()
    )


def launch_cost_parts(rows: pd.DataFrame, *, seed: int = 0) -> pd.DataFrame:
    """Where the time of each host loop goes, from a sweep on a GPU: form, chunk_size, n_launches, part, and
    latency_us with its 95 % interval low_us, high_us.

    "scan" is the replay of one unsliced call; "cut" what the loop's replay takes beyond that: launches on the device,
    slices too short to fill it, and the concatenation; "host" what the loop takes beyond its own replay. Differences
    are taken within rounds.
    """
    if "default_graph" not in set(rows.form):
        raise bad_value("rows", "no graph replays", "a sweep on a GPU")
    generator = np.random.default_rng(seed)
    latency = rows.pivot(index="round", columns="name", values="latency_us")
    scan = latency[rows[rows.form == "default_graph"].name.iloc[0]]
    loops = rows[rows.form.isin(HOST_LOOPS)].drop_duplicates("name").sort_values("n_launches")
    return pd.DataFrame(
        {"form": loop.form, "chunk_size": loop.chunk_size, "n_launches": loop.n_launches, "part": part}
        | dict(zip(("latency_us", "low_us", "high_us"), median_interval(values, generator)))
        for loop in loops.itertuples()
        for replay in (latency[f"{loop.form}_graph_{loop.chunk_size}"],)
        for part, values in (("scan", scan), ("cut", replay - scan), ("host", latency[loop.name] - replay))
    )


def triplet_rows(cases: Iterable[str], shape: tuple[int, int, int], *, rounds: int, seed: int, device) -> pd.DataFrame:
    """The published triplet at other dtypes and lengths: how much faster than chunk 64 the loop is at 256 and at 512,
    and one unsliced call.

    cases: "dtype L" such as "bfloat16 4096". shape: (B, D, N). Columns: dtype, seqlen, chunk_size (L for the one call),
    ratio with its 95 % interval low and high, n.
    """
    found = []
    for dtype, seqlen in (case.split() for case in cases):
        batch, d_inner, d_state = shape
        length, kind = int(seqlen), {"dtype": getattr(torch, dtype), "device": device}
        inputs = published_inputs(batch, d_inner, length, d_state, seed=seed, **kind)
        calls = {str(size): scan_form("reset", inputs, size) for size in (64, 256, 512)}
        calls[seqlen] = scan_form("default", inputs, length)
        functions = {name: from_idle(call, device) for name, call in calls.items()}
        rows = benchmark.paired(functions, rounds=rounds, seed=seed, device=device)
        for name in list(calls)[1:]:
            row = {"dtype": dtype, "seqlen": length, "chunk_size": int(name)}
            found.append(row | benchmark.ratio_interval(rows, "64", name))
    return pd.DataFrame(found)


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
        one = benchmark.ratio_interval(rows, f"reset_{chunk}", f"default_{unsliced}")
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


def _scan(form: str, chunk_size: int, inputs: Mapping) -> Tensor:
    if form == "default":
        return selective_scan(**inputs)
    function = {"reset": scan_reset_ref, "carried": scan_carried_ref, "one_launch": selective_scan}[form]
    return function(**inputs, chunk_size=chunk_size)
