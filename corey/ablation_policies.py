"""The policies of the scheduler ablation by name, and the forms that take a policy's cost apart.

published  statistic, decision on the host, and the chunk decided on
forced     statistic and decision likewise, but every scan gets the reference's chunk
unread     the statistic alone, which the host never reads, and the reference's chunk
replayed   the chunks of a recording; nothing is computed
"""

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from corey.mamba import ChunkPolicy, Mamba
from corey.schedulers import PUBLISHED_RANGES, Scheduler, get_scheduler, static

REFERENCE_CHUNK = 512  # the best static chunk of the published ablation, to which its percentages refer
REFERENCE, CONTROL = f"static-{REFERENCE_CHUNK}", f"static-{REFERENCE_CHUNK} again"
OPERATOR = "operator's rule"  # no policy: the scan decides
EVERY_FOURTH = "hist-every-4th"  # the histogram in layers 0, 4, 8, ..., the reference's chunk in the others
ON_THE_WAY = "device-hist-on-the-way"  # of every 8th token, counted by the convolution over a fixed range
FOURTH_ON_THE_WAY = "device-hist-every-4th"  # the same in layers 0, 4, 8, ..., the reference's chunk in the others
FIXED_RANGE = (-4.0, 4.0)
SHUFFLED = "hist-shuffled"  # the chunks of hist, dealt out to the layers at random; nothing is computed
ADAPTIVE = (
    "hist", "device-hist", "sampled-hist", "token-hist", "cheap-proxy", "variance-proxy", "kurtosis-proxy",
    "guarded-hist", "guarded-sampled-hist", EVERY_FOURTH, ON_THE_WAY, FOURTH_ON_THE_WAY,
)  # fmt: skip
TABLE = {"default_chunk": REFERENCE_CHUNK, "rules": [{"chunk": 128, "max_seq_len": 255}]}  # short prompts to 128


def build_policies(
    chunk_sizes: Iterable[int], *, stride: int, seed: int, device_type: str
) -> dict[str, ChunkPolicy | None]:
    """The policies of the published ablation, with its range of 128 to 2048, and this project's, by name.

    stride: tokens between those that the sampled statistics read. The oracle and the shuffled chunks are not among
    them, since they take a measurement and a recording.
    """
    c_min, c_max, h_ref = PUBLISHED_RANGES["ablation"]
    rule = {"c_min": c_min, "c_max": c_max, "h_ref": h_ref}
    parameters = {
        "shape": {},
        "table": {"rules": TABLE},
        "random": {"c_min": c_min, "c_max": c_max, "seed": seed},
        **dict.fromkeys(
            ("no-entropy", "hist", "cheap-proxy", "variance-proxy", "kurtosis-proxy", "guarded-hist"), rule
        ),
        **dict.fromkeys(("sampled-hist", "token-hist", "guarded-sampled-hist"), rule | {"stride": stride}),
        "table-always-reads": {"rules": TABLE, "stride": stride},
    }
    built = {name: get_scheduler(name, **given) for name, given in parameters.items()}
    if device_type == "cuda":
        light = rule | {"range": FIXED_RANGE, "stride": stride}
        fourth = light | {"every": 4, "otherwise": REFERENCE_CHUNK}
        for name, given in {"device-hist": rule, ON_THE_WAY: light, FOURTH_ON_THE_WAY: fourth}.items():
            built[name] = replace(get_scheduler("device-hist", **given), name=name)
    statics = {f"static-{size}": static(size) for size in sorted({*chunk_sizes, REFERENCE_CHUNK})}
    own = {CONTROL: static(REFERENCE_CHUNK), OPERATOR: None, EVERY_FOURTH: _every_fourth(built["hist"])}
    return statics | own | built


def scan_inputs(model: Mamba, ids: Tensor) -> list[Tensor]:
    """What a policy is asked about in a prefill: u (B, D, L) of every layer, which no chunk changes."""
    found = []

    def watch(u: Tensor, layer: int) -> None:
        found.append(u)

    with torch.inference_mode():
        model(ids, last_only=True, chunk_policy=watch)
    return found


def record(policy: ChunkPolicy, inputs: Iterable[Tensor]) -> tuple[int, ...]:
    """The chunk that a policy gives each layer, by `scan_inputs`."""
    return tuple(int(policy(u, layer=layer)) for layer, u in enumerate(inputs))


@dataclass(frozen=True)
class Recorded:
    """The policy that gives layer i chunks[i]. Equal chunks are equal policies: a session keeps one graph for them."""

    chunks: tuple[int | None, ...]

    def __call__(self, u: Tensor, layer: int) -> int | None:
        return self.chunks[layer]


def shuffled(chunks: Sequence[int], seed: int) -> ChunkPolicy:
    """The policy that deals chunks out to the layers at random."""
    return Recorded(tuple(random.Random(seed).sample(chunks, len(chunks))))


def split_forms(policy: Scheduler, chunks: Sequence[int]) -> dict[str, ChunkPolicy]:
    """The forms of a policy besides the published one; a policy without a statistic has none to leave unread."""
    every = 4 if policy.name == EVERY_FOURTH else 1

    def forced(u: Tensor, layer: int) -> int:
        policy(u, layer=layer)
        return REFERENCE_CHUNK

    def unread(u: Tensor, layer: int) -> int:
        if layer % every == 0:
            policy.statistic(u)
        return REFERENCE_CHUNK

    forms = {"forced": forced, "replayed": Recorded(tuple(chunks))}
    if policy.on_the_way is not None:  # the convolution counts and decides at once
        return {"replayed": forms["replayed"]}
    return forms if policy.statistic is None else forms | {"unread": unread}


def all_forms(
    policies: Mapping[str, ChunkPolicy | None], recorded: Mapping[str, Sequence[int]], split: Iterable[str], engine: str
) -> dict[tuple[str, str], ChunkPolicy | None]:
    """What one engine times, by scheduler and form: "calls" everything, "graph" what the host does not wait for.

    recorded: the chunks of each policy in `split`, by layer.
    """
    forms = {(name, "published"): policy for name, policy in policies.items()}
    for name in split:
        forms |= {(name, form): each for form, each in split_forms(policies[name], recorded[name]).items()}
    by_host = {
        (name, form)
        for name, form in forms
        if form in ("published", "forced")
        and getattr(policies[name], "statistic", None)
        and not name.startswith("device-hist")
    }
    return {key: policy for key, policy in forms.items() if engine == "calls" or key not in by_host}


def _every_fourth(scheduler: Scheduler) -> Scheduler:
    def choose(u: Tensor, layer: int) -> int:
        return scheduler(u, layer=layer) if layer % 4 == 0 else REFERENCE_CHUNK

    return replace(scheduler, name=EVERY_FOURTH, choose=choose)
