"""What a chunk policy costs a prefill, and that none of them changes a bit of it.

Every priced policy answers with one chunk, a static policy's, whatever it reads: what is timed is its statistic, its
decision and the way of the chunk to the scan, and not the effect of another chunk.
"""

from collections.abc import Mapping
from functools import partial

import pandas as pd
import torch
from torch import Tensor

from corey import benchmark
from corey.ablation_policies import REFERENCE
from corey.equivalence import compare_logits
from corey.mamba import ChunkPolicy, Mamba
from corey.mamba_session import Session
from corey.schedulers import get_scheduler, static

CHUNK_SIZES = (128, 256, 512, 1024, 2048)
PRICED_AT = (256, 512)  # the paper's best static chunk, and half of it
EVERY_TOKENS, EVERY_LAYERS = 8, 4  # that the lighter forms of device-hist read
BOUNDS = (-1.0, 3.0)  # of the fixed range: nearly all that a convolution with SiLU gives
ENTROPY_LOW = 1e-3  # a reference entropy so low, in nats, that every input gets the largest chunk


def priced_policies(chunk_size: int, device="cpu") -> dict[str, ChunkPolicy]:
    """The policies by name: the static one, its control, and those that a session can capture; all take `chunk_size`.

    "on the device" computes nothing and hands the scan a chunk that lies there, which is the part of every device-hist
    that no statistic and no decision explains.
    """
    rule = {"c_max": chunk_size, "h_ref": ENTROPY_LOW}
    fixed = rule | {"range": BOUNDS}
    light = fixed | {"stride": EVERY_TOKENS}
    fourth = light | {"every": EVERY_LAYERS, "otherwise": chunk_size}
    guarding = {"c_min": chunk_size // 4, "fallback": chunk_size}  # two doublings apart, as delta asks
    there = torch.tensor(chunk_size, dtype=torch.int32, device=device)
    return {
        "static": static(chunk_size),
        "static again": lambda u, layer: chunk_size,
        "table": get_scheduler("table", rules={"default_chunk": chunk_size, "rules": []}),
        "on the device": lambda u, layer: there if u.is_cuda else chunk_size,
        "device-hist, own range": get_scheduler("device-hist", **rule),
        "device-hist, fixed range": get_scheduler("device-hist", **fixed),
        "device-hist, every 8th token": get_scheduler("device-hist", **light),
        "device-hist, every 8th token and 4th layer": get_scheduler("device-hist", **fourth),
        "guarded-device-hist": get_scheduler("guarded-device-hist", **guarding, **fixed),
        "guarded-device-hist, every 8th token and 4th layer": get_scheduler(
            "guarded-device-hist", **guarding, **fourth
        ),
    }


def captured(policies: Mapping[str, ChunkPolicy | None], model: Mamba, ids: Tensor) -> dict[str, partial]:
    """A prefill a policy, in a session of its own that has captured it where the model is on CUDA."""
    calls = {name: partial(Session(model, len(ids)).prefill, ids, chunk_policy=each) for name, each in policies.items()}
    for call in calls.values():
        call()  # the first is eager and the second is captured
        call()
    return calls


def price_rows(model: Mamba, ids: Tensor, *, rounds: int, seed: int) -> pd.DataFrame:
    """Share of the prefill's time that each policy takes, against the static one of its chunk, with 95 % intervals.

    Columns chunk_size, scheduler, latency_us, share, share_low, share_high, n_rounds.
    """
    found = []
    for chunk_size in PRICED_AT:
        calls = captured(priced_policies(chunk_size, model.device), model, ids)
        times = benchmark.paired(calls, rounds=rounds, seed=seed, device=model.device)
        medians = times.groupby("name").latency_us.median()
        for name in calls:
            row = {"chunk_size": chunk_size, "scheduler": name, "latency_us": medians[name], "n_rounds": rounds}
            if name != "static":
                ratio = benchmark.ratio_interval(times, name, "static")
                ends = {"share": "ratio", "share_low": "low", "share_high": "high"}
                row |= {column: 1 - 1 / ratio[end] for column, end in ends.items()}
            found.append(row)
    return pd.DataFrame(found)


def bit_rows(model: Mamba, ids: Tensor, *, new_tokens: int) -> pd.DataFrame:
    """Whether chunk sizes and policies give the bits of the reference: columns scheduler, logits_bitwise_equal,
    tokens_equal. Logits are those after the prompt, and `new_tokens` greedy tokens follow."""
    statics = {f"static-{size}": static(size) for size in CHUNK_SIZES}
    deciding = {
        "device-hist, 128 to 2048": get_scheduler("device-hist", c_max=2048),
        "device-hist, 128 to 2048, fixed range": get_scheduler("device-hist", c_max=2048, range=BOUNDS),
    }
    priced = {
        f"{name}, {chunk}": each
        for chunk in PRICED_AT
        for name, each in priced_policies(chunk, model.device).items()
        if not name.startswith("static")
    }
    policies = statics | priced | {"operator's rule": None} | deciding
    logits, tokens = {}, {}
    for name, policy in policies.items():
        session = Session(model, len(ids))
        first = session.prefill(ids, chunk_policy=policy)
        logits[name] = session.prefill(ids, chunk_policy=policy)  # from the graph, where there is one
        if not compare_logits(first[None], logits[name][None]).bitwise_equal:
            raise RuntimeError(f"{name}: got other logits from the graph than from the eager call, want the same bits")
        tokens[name] = session.decode(new_tokens)
    return pd.DataFrame(
        {
            "scheduler": name,
            "logits_bitwise_equal": compare_logits(logits[name][None], logits[REFERENCE][None]).bitwise_equal,
            "tokens_equal": torch.equal(tokens[name], tokens[REFERENCE]),
        }
        for name in policies
        if name != REFERENCE
    )
