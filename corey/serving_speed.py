"""End to end: `python -m corey.serving_speed`, corey.mamba against transformers on the stock kernels, on your GPU.

Both have the same random weights in the published shapes. Their calls start from an idle device and are timed against
each other in the same rounds, host included. Rows go to the sets serving_speed (times, memory), serving_speed_logits
(distance to float32), serving_speed_bits (chunks and policies), serving_speed_policies (what a policy costs) and
serving_speed_kernels (GPU time by part, beside its floor).
"""

import argparse
import gc
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import partial

import pandas as pd
import torch
from torch import Tensor

from corey import benchmark, peer, results
from corey.clocks import from_idle
from corey.cold_timing import Limits, measure_limits
from corey.kernel_times import kernel_times, parts_of_client, parts_of_prefill
from corey.mamba import Mamba, MambaConfig
from corey.mamba_session import Session
from corey.mamba_weights import SHAPES, mamba_of, random_tensors
from corey.prefill_floors import measure_gemm_rate, prefill_floors
from corey.serving_policies import bit_rows, price_rows

DTYPE = torch.bfloat16
ROUNDS, GENERATE_ROUNDS, POLICY_ROUNDS = 30, 10, 60
LOGIT_TOKENS = 976  # of the prompt whose logits are compared at every position


@dataclass(frozen=True)
class Task:
    """One request: a prompt of so many tokens, and as many greedy tokens after it, none for the prefill alone."""

    model: str
    prompt_tokens: int
    new_tokens: int = 0

    def __str__(self) -> str:
        what = (
            f"generate {self.prompt_tokens} + {self.new_tokens}" if self.new_tokens else f"prefill {self.prompt_tokens}"
        )
        return f"{what} tokens, {self.model}"


TASKS = (Task("370m", 4096), Task("370m", 16384), Task("370m", 976, 32), Task("1.4b", 4096))


def prompt(config: MambaConfig, tokens: int, *, seed: int, device) -> Tensor:
    """(1, tokens) int64 of random ids."""
    return torch.randint(config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(seed)).to(device)


# ---- times and memory ------------------------------------------------------------------------------------------------


def time_task(task: Task, client: torch.nn.Module, model: Mamba, *, rounds: int, seed: int) -> dict:
    """One row: medians of both in us, how many times faster with its 95 % interval, and the peak memory of both.

    The weights are shared, so each peak holds them once; the peer's is taken before the session exists.
    """
    ids = prompt(model.config, task.prompt_tokens, seed=seed, device=model.device)
    if task.new_tokens:
        theirs = partial(peer.generate, client, ids, task.new_tokens)
    else:
        theirs = partial(peer.prefill, client, ids)
    peaks = _peaks(theirs, model.device, "peer_peak")
    session = Session(model)
    ours = partial(session.generate, ids, task.new_tokens) if task.new_tokens else partial(session.prefill, ids)
    peaks |= _peaks(lambda: [ours() for _ in range(3)], model.device, "peak")  # eagerly, captured, replayed
    calls = {"corey": from_idle(ours, model.device), "peer": from_idle(theirs, model.device)}
    times = benchmark.paired(calls, rounds=rounds, warmup=2, seed=seed, device=model.device)
    median = times.groupby("name").latency_us.median()
    ratio = benchmark.ratio_interval(times, "peer", "corey")
    speedup = {"speedup": ratio["ratio"], "speedup_low": ratio["low"], "speedup_high": ratio["high"]}
    row = asdict(task) | {"latency_us": median["corey"], "peer_us": median["peer"]} | speedup | peaks
    return row | {"n_rounds": rounds, "dtype": str(model.dtype), "device": str(model.device)}


def _peaks(call: Callable[[], object], device: torch.device, name: str) -> dict:
    """Bytes that torch held for tensors at the peak of a call, weights included, and that it held of the device."""
    columns = f"{name}_allocated_bytes", f"{name}_reserved_bytes"
    if device.type == "cpu":
        call()
        return dict.fromkeys(columns, float("nan"))
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return dict(zip(columns, (torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device))))


# ---- logits ----------------------------------------------------------------------------------------------------------


def logits_row(
    config: MambaConfig, tensors: Mapping[str, Tensor], client: torch.nn.Module, model: Mamba, ids: Tensor
) -> dict:
    """Logits of both at every position of a prompt, against the same weights computed in float32.

    A position is decided where the gap between the two best float32 logits is more than twice the peer's error there,
    so that the peer's own best token is right. rms_error is relative to the spread of the float32 logits.
    """
    with torch.inference_mode():
        exact = mamba_of(config, {name: x.float() for name, x in tensors.items()}, dtype=torch.float32)
        truth = exact(ids)[0]  # (L, V)
        del exact
        ours, theirs = model(ids)[0], client(ids).logits[0].float()
        best = truth.topk(2).values  # (L, 2)
        decided = best[:, 0] - best[:, 1] > 2 * (theirs - truth).abs().amax(-1)  # (L,)
        equal = ours.argmax(-1) == theirs.argmax(-1)
        return {
            "prompt_tokens": ids.shape[1],
            "decided": int(decided.sum()),
            "decided_equal": int((decided & equal).sum()),
            "top_token_equal": int(equal.sum()),
            "rms_error": ((ours - truth).square().mean().sqrt() / truth.std()).item(),
            "peer_rms_error": ((theirs - truth).square().mean().sqrt() / truth.std()).item(),
        }


# ---- kernels ---------------------------------------------------------------------------------------------------------


def kernel_rows(client: torch.nn.Module, model: Mamba, ids: Tensor, limits: Limits, flops_per_s: float) -> pd.DataFrame:
    """GPU time of one prefill of each by part: columns client, part, launches, time_us, floor_us, bound.

    The kernels of corey are those of an eager prefill, which a graph replays.
    """
    floors = prefill_floors(model.config, *ids.shape, model.dtype.itemsize, limits, flops_per_s)
    session = Session(model, graphs=False)
    sides = {
        "corey": (partial(session.prefill, ids), parts_of_prefill),
        "transformers": (partial(peer.prefill, client, ids), parts_of_client),
    }
    found = []
    for name, (call, parts_of) in sides.items():
        call()
        times = kernel_times(call)
        by_part = times.assign(part=parts_of(times.name)).groupby("part").time_us.agg(["size", "sum"])
        for part, (launches, time_us) in by_part.sort_values("sum", ascending=False).iterrows():
            row = {"client": name, "part": part, "launches": int(launches), "time_us": time_us}
            if name == "corey" and part in floors:
                row |= asdict(floors[part])
            found.append(row)
    return pd.DataFrame(found)


# ---- tables ----------------------------------------------------------------------------------------------------------


def markdown(rows: pd.DataFrame) -> str:
    """The set serving_speed as a table."""
    lines = [
        "| | transformers on stock kernels, ms | corey, ms | times faster | peak memory, GiB: transformers, corey |",
        "|---|---|---|---|---|",
    ]
    for row in rows.itertuples():
        task = Task(row.model, row.prompt_tokens, row.new_tokens)
        lines.append(
            f"| {task} | {row.peer_us / 1e3:.1f} | {row.latency_us / 1e3:.2f} | {row.speedup:.1f} "
            f"[{row.speedup_low:.1f}, {row.speedup_high:.1f}] | {row.peer_peak_allocated_bytes / 2**30:.2f}, "
            f"{row.peak_allocated_bytes / 2**30:.2f} |"
        )
    return "\n".join(lines)


def policies_markdown(rows: pd.DataFrame) -> str:
    """The set serving_speed_policies as a table, in per cent of the prefill."""
    lines = ["| chunk | policy | prefill, ms | share of it, % |", "|---|---|---|---|"]
    for row in rows.itertuples():
        share = f"{row.share:.2%} [{row.share_low:.2%}, {row.share_high:.2%}]".replace("%", "")
        share = share if row.share == row.share else ""
        lines.append(f"| {row.chunk_size} | {row.scheduler} | {row.latency_us / 1e3:.3f} | {share} |")
    return "\n".join(lines)


def kernels_markdown(rows: pd.DataFrame) -> str:
    """The set serving_speed_kernels as a table, the parts of each client in order of their time and then their sum."""
    lines = ["| | part | launches | GPU time, ms | floor, ms | set by | over it |", "|---|---|---|---|---|---|---|"]
    for client, parts in rows.groupby("client", sort=False):
        for row in parts.itertuples():
            has_floor = row.floor_us == row.floor_us
            floor = (
                f"{row.floor_us / 1e3:.3f} | {row.bound} | {row.time_us / row.floor_us:.1f}" if has_floor else " | | "
            )
            lines.append(f"| {client} | {row.part} | {row.launches} | {row.time_us / 1e3:.3f} | {floor} |")
        total = f"{parts.floor_us.sum() / 1e3:.3f}" if parts.floor_us.notna().any() else ""
        lines.append(f"| {client} | all | {parts.launches.sum()} | {parts.time_us.sum() / 1e3:.3f} | {total} | | |")
    return "\n".join(lines)


TABLES = {
    "serving_speed": markdown,
    "serving_speed_policies": policies_markdown,
    "serving_speed_kernels": kernels_markdown,
}


# ---- the run ---------------------------------------------------------------------------------------------------------


def measure(
    tasks: Iterable[Task], *, rounds: int, generate_rounds: int, policy_rounds: int, logit_tokens: int, seed: int,
    limits: Limits, flops_per_s: float, shapes: Mapping[str, MambaConfig] = SHAPES, device="cuda",
    dtype: torch.dtype = DTYPE,
) -> dict[str, pd.DataFrame]:  # fmt: skip
    """The rows of every set by its name. Kernels and policies are taken for the first task's prompt and model."""
    tasks, device = list(tasks), torch.device(device)
    speed, logits, bits, sets = [], [], [], {}
    for name in dict.fromkeys(task.model for task in tasks):
        config, about = shapes[name], {"model": name, "device": str(device)}
        tensors = random_tensors(config, seed=seed, device=device, dtype=dtype)
        client, model = peer.build_client(config, tensors), mamba_of(config, tensors, dtype=dtype)
        draw = partial(prompt, config, seed=seed, device=device)
        if device.type == "cuda":
            peer.check_kernels(client, draw(16))
        mine = [task for task in tasks if task.model == name]
        for task in mine:
            count = generate_rounds if task.new_tokens else rounds
            speed.append(time_task(task, client, model, rounds=count, seed=seed))
            found = bit_rows(model, draw(task.prompt_tokens), new_tokens=8)
            bits.append(found.assign(**about, prompt_tokens=task.prompt_tokens))
        logits.append(about | logits_row(config, tensors, client, model, draw(logit_tokens)))
        if not sets:
            about |= {"prompt_tokens": mine[0].prompt_tokens}
            ids = draw(mine[0].prompt_tokens)
            sets["serving_speed_policies"] = price_rows(model, ids, rounds=policy_rounds, seed=seed).assign(**about)
            if device.type == "cuda":
                found = kernel_rows(client, model, ids, limits, flops_per_s)
                sets["serving_speed_kernels"] = found.assign(**about)
        del client, model, tensors
    return {
        "serving_speed": pd.DataFrame(speed),
        "serving_speed_logits": pd.DataFrame(logits),
        "serving_speed_bits": pd.concat(bits, ignore_index=True),
        **sets,
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m corey.serving_speed", description="Time prefill and generation.")
    parser.add_argument("--markdown", choices=TABLES, help="print the table of these committed rows; measures nothing")
    asked = parser.parse_args(arguments)
    if asked.markdown:
        print(TABLES[asked.markdown](results.read_rows(asked.markdown, "committed")))
        return 0
    if not torch.cuda.is_available():
        print("corey.serving_speed measures a GPU, and torch sees no CUDA device here", file=sys.stderr)
        return 1
    try:
        versions = peer.check_installed()
    except RuntimeError as error:
        print(f"corey.serving_speed: {error}", file=sys.stderr)
        return 1
    seed, limits, flops_per_s = 0, measure_limits(10), measure_gemm_rate(10)
    counts = {"rounds": ROUNDS, "generate_rounds": GENERATE_ROUNDS, "policy_rounds": POLICY_ROUNDS}
    counts |= {"logit_tokens": LOGIT_TOKENS, "seed": seed}
    print(f"{results.machine('cuda')}\npeer: {versions}; matrix products {flops_per_s / 1e12:.0f} TFLOP/s", flush=True)
    sets = measure(TASKS, **counts, limits=limits, flops_per_s=flops_per_s)
    parameters = counts | {"peer": versions, "flops_per_s": flops_per_s, "tasks": [str(each) for each in TASKS]}
    for name, rows in sets.items():
        results.write_rows(rows, name, parameters=parameters | asdict(limits))
        print(f"\n{name}\n{TABLES[name](rows) if name in TABLES else rows.to_string(index=False)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
