"""What notebook 02 measures: the published rotation experiment part by part, and a trained model's activations."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from corey.activations import capture_activations
from corey.cost_model import published_draws
from corey.entropy import MovingEntropy, histogram_entropy, tier1_entropy
from corey.equivalence import sequence_nll
from corey.hadamard import faulty_transform_ref, fold_into_projection, hadamard_transform, outlier_fraction
from corey.progress import progress
from corey.quantise import quantised, relative_error
from corey.routing import route
from corey.sinkhorn import (
    TEMPERATURE_FACTORS,
    best_factor,
    majorises,
    mixing_error,
    mixing_matrix,
    share_entropy,
    shared_histograms,
)

NUM_BINS = 64  # of every histogram in the published rotation experiments
ROUTINES: dict[str, Callable[[Tensor], Tensor]] = {"published": faulty_transform_ref, "orthonormal": hadamard_transform}
DISTRIBUTIONS: dict[str, Callable[[np.random.Generator, tuple[int, int]], np.ndarray]] = {
    "normal": lambda rng, shape: rng.standard_normal(shape),
    "Laplace": lambda rng, shape: rng.laplace(size=shape),
    "Student t, 3": lambda rng, shape: rng.standard_t(3, shape),
    "8 channels x 50": lambda rng, shape: rng.standard_normal(shape) * np.where(np.arange(shape[1]) < 8, 50, 1),
    "mean 3": lambda rng, shape: rng.standard_normal(shape) + 3,
}


def synthetic_rows(seed: int = 7) -> pd.DataFrame:
    """The paper's 35 synthetic draws before and after rotation, one row each, in the published order.

    Columns: seqlen, repeat; entropy_before, entropy_after (Tier 1, 0 to 1) and gain; shared_before, shared_after, read
    off one moving average a length that takes both in turn, as published; own_before, own_after, from one average each;
    outliers_before, outliers_after beyond six standard deviations; projection_error, the largest |W' H x - W x|;
    l1_fit and factor of the published mixing fit; l1_held_out with the factor chosen on the other draws of the length;
    l1_unmixed, the distance with no mixing at all; majorised, whether any doubly stochastic mixing exists; and
    shared_bins_gain_nats, the gain of entropy in the common bins that the mixing is about.
    """
    draws = [_synthetic_row(draw) for draw in published_draws(seed)]
    rows = pd.DataFrame(row for row, _ in draws)
    pairs = [pair for _, pair in draws]
    rows = rows.join(pd.DataFrame(_fit_rows(list(rows.seqlen), pairs)))
    averages = [each for _, group in rows.groupby("seqlen") for each in _averages(group)]
    columns = ["shared_before", "shared_after", "own_before", "own_after"]
    return rows.join(pd.DataFrame(averages, columns=columns))


def routine_rows(widths: Sequence[int], *, num_vectors: int, draws: int, seed: int) -> pd.DataFrame:
    """Norm ratio and entropy gain (nats, own range) of the published and of the orthonormal routine.

    Columns: distribution, width, routine, draw, norm_ratio, gain_nats.
    """
    return pd.DataFrame(
        {"distribution": name, "width": width, "routine": routine, "draw": index, **_effect(x, transform)}
        for width in widths
        for index in range(draws)
        for name, make in DISTRIBUTIONS.items()
        for x in (torch.from_numpy(make(np.random.default_rng(seed + index), (num_vectors, width))),)
        for routine, transform in ROUTINES.items()
    )


def captured_signals(model: torch.nn.Module, token_ids: Tensor) -> list[tuple[int, str, Tensor]]:
    """(layer, "in_proj branch" or "scan input", (L, D) activations) of one prompt (1, L), layer by layer."""
    with route(model):
        kept = capture_activations(model, token_ids)
    branches = [(layer, "in_proj branch", branch[0].T) for layer, branch in enumerate(kept.x_branch)]
    return sorted(
        branches + [(layer, "scan input", u[0].T) for layer, u in enumerate(kept.u)], key=lambda each: each[:2]
    )


def activation_rows(model: torch.nn.Module, prompts: Iterable[tuple[str, int, Tensor]], device="cpu") -> pd.DataFrame:
    """Entropy gains of rotating a model's own activations along their channels, one row per prompt, layer and variant.

    signal: "in_proj branch" as published, or "scan input". centred: each channel's mean over tokens taken out first.
    pooling: one histogram of all values as published, or the mean over channels of one histogram each.

    Columns: task, prompt, layer, signal, centred, pooling, routine, entropy_nats before, gain_nats, norm_ratio.
    """
    return pd.DataFrame(
        {"task": task, "prompt": f"{task}-{index}", "layer": layer, "signal": signal} | row
        for task, index, ids in progress(prompts, "prompts")
        for layer, signal, x in captured_signals(model, ids.to(device))
        for row in _activation_rows(x)
    )


def bound_rows(model: torch.nn.Module, prompts: Iterable[tuple[str, int, Tensor]], device="cpu") -> pd.DataFrame:
    """Token vectors x of a model (scan inputs of at most eight layers) and made ones against the bound on max |Hx|.

    Columns: vectors (where they are from), l1_share (the bound |x|_1 / sqrt(d) over |x|_2, 1 where all entries are
    equally large), largest_share (max |Hx| over the bound), largest_before and largest_after (max |x| and max |Hx| over
    |x|_2).
    """
    sources = {"one spike": _spike(256), "8 spikes": _spike(256, 8), "constant": torch.ones(1, 256).double()}
    sources["normal"] = torch.randn(200, 256, generator=_generator(0), dtype=torch.float64)
    kept: dict[str, list[Tensor]] = {}
    for _, _, ids in prompts:
        scan_inputs = [x for _, signal, x in captured_signals(model, ids.to(device)) if signal == "scan input"]
        for layer in range(0, len(scan_inputs), math.ceil(len(scan_inputs) / 8)):
            x = scan_inputs[layer]  # (L, D)
            kept.setdefault(f"layer {layer}", []).append(x[:: max(1, len(x) // 100)].double().cpu())
    sources |= {name: torch.cat(parts) for name, parts in kept.items()}
    return pd.concat([_bounds(x).assign(vectors=name) for name, x in sources.items()], ignore_index=True)


def overflow_rows(x: Tensor, thresholds: Sequence[float]) -> pd.DataFrame:
    """How often max |Hx| exceeds a threshold, and how often the bound's |x|_1 > sqrt(d) threshold allows it.

    x: (n, d) vectors. Thresholds in units of the root mean square of x. Columns: threshold, before (max |x|), after,
    bound.
    """
    x = x.double().cpu()
    scale = float(x.square().mean().sqrt())
    z, width = hadamard_transform(x), 1 << (x.shape[-1] - 1).bit_length()
    return pd.DataFrame(
        {
            "threshold": threshold,
            "before": float((x.abs().amax(-1) > threshold * scale).double().mean()),
            "after": float((z.abs().amax(-1) > threshold * scale).double().mean()),
            "bound": float((x.abs().sum(-1) > math.sqrt(width) * threshold * scale).double().mean()),
        }
        for threshold in thresholds
    )


def mixing_rows(trials: int, *, seed: int, num_bins: int = NUM_BINS) -> pd.DataFrame:
    """Entropy gain of histograms mixed by random doubly stochastic matrices (sums of random permutations).

    Columns: trial, gain_nats.
    """
    rng = np.random.default_rng(seed)
    return pd.DataFrame(
        {"trial": trial, "gain_nats": share_entropy(_random_mixing(rng, num_bins) @ p) - share_entropy(p)}
        for trial, p in enumerate(rng.dirichlet(np.full(num_bins, 0.3), size=trials))
    )


def quantisation_rows(
    model: torch.nn.Module,
    prompts: Iterable[tuple[str, int, Tensor]],
    settings: Sequence[tuple[int, int]] = ((8, 8), (4, 8), (4, 4)),
    device="cpu",
) -> pd.DataFrame:
    """Logits of the model with in_proj and out_proj of every layer fake-quantised, plain and rotated, against its own.

    settings: (weight_bits, activation_bits). Columns: task, prompt, setting ("W8A8"), rotated, logit_error (relative,
    L2), same_top (share of positions with the same most likely token), extra_nats (rise of the negative log-likelihood
    per token).
    """
    return pd.DataFrame(
        {"task": task, "prompt": f"{task}-{index}"} | row
        for task, index, ids in progress(prompts, "prompts")
        for row in _quantisation_rows(model, ids.to(device), settings)
    )


def _synthetic_row(draw) -> tuple[dict, tuple[np.ndarray, np.ndarray]]:
    x, weight = torch.from_numpy(draw.activations), torch.from_numpy(draw.weight)
    z = hadamard_transform(x)
    before, after = tier1_entropy(draw.activations), tier1_entropy(z.numpy())
    row = {
        "seqlen": draw.seqlen,
        "repeat": draw.repeat,
        "entropy_before": before,
        "entropy_after": after,
        "gain": after - before,
        "outliers_before": outlier_fraction(x),
        "outliers_after": outlier_fraction(z),
        "projection_error": float((z @ fold_into_projection(weight).T - x @ weight.T).abs().max()),
    }
    return row, shared_histograms(draw.activations, z.numpy(), NUM_BINS)


def _averages(rows: pd.DataFrame) -> Iterator[tuple[float, float, float, float]]:
    shared, before, after = MovingEntropy(), MovingEntropy(), MovingEntropy()
    for row in rows.itertuples():
        mixed = shared.update(row.entropy_before), shared.update(row.entropy_after)
        yield *mixed, before.update(row.entropy_before), after.update(row.entropy_after)


def _fit_rows(seqlens: Sequence[int], pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> Iterator[dict]:
    matrices = {factor: mixing_matrix(NUM_BINS, factor) for factor in TEMPERATURE_FACTORS}
    for index, (p, q) in enumerate(pairs):
        others = [pair for place, pair in enumerate(pairs) if seqlens[place] == seqlens[index] and place != index]
        own, held_out = best_factor([(p, q)]), best_factor(others)
        yield {
            "factor": own,
            "l1_fit": mixing_error(p, q, matrices[own]),
            "l1_held_out": mixing_error(p, q, matrices[held_out]),
            "l1_unmixed": float(np.abs(p - q).sum()),
            "majorised": majorises(p, q),
            "shared_bins_gain_nats": share_entropy(q) - share_entropy(p),
        }


def _effect(x: Tensor, transform: Callable[[Tensor], Tensor]) -> dict:
    z = transform(x)
    gain = histogram_entropy(z, NUM_BINS) - histogram_entropy(x, NUM_BINS)
    return {"norm_ratio": float(z.norm() / x.norm()), "gain_nats": float(gain)}


def _activation_rows(x: Tensor) -> Iterator[dict]:
    for centred in (False, True):
        values = x - x.mean(0) if centred else x
        before = _entropies(values)
        for routine, transform in ROUTINES.items():
            z = transform(values)
            for pooling, after in _entropies(z).items():
                yield {
                    "centred": centred,
                    "pooling": pooling,
                    "routine": routine,
                    "entropy_nats": before[pooling],
                    "gain_nats": after - before[pooling],
                    "norm_ratio": float(z.norm() / values.norm()),
                }


def _entropies(x: Tensor) -> dict[str, float]:
    return {
        "pooled": float(histogram_entropy(x, NUM_BINS)),
        "by channel": float(histogram_entropy(x, NUM_BINS, dim=0).mean()),
    }


def _bounds(x: Tensor) -> pd.DataFrame:
    z = hadamard_transform(x)
    bound, norm = x.abs().sum(-1) / math.sqrt(z.shape[-1]), x.norm(dim=-1)
    return pd.DataFrame(
        {
            "l1_share": (bound / norm).tolist(),
            "largest_share": (z.abs().amax(-1) / bound).tolist(),
            "largest_before": (x.abs().amax(-1) / norm).tolist(),
            "largest_after": (z.abs().amax(-1) / norm).tolist(),
        }
    )


def _spike(width: int, count: int = 1) -> Tensor:
    x = torch.zeros(1, width, dtype=torch.float64)
    x[0, torch.randperm(width, generator=_generator(0))[:count]] = 1.0
    return x


def _random_mixing(rng: np.random.Generator, size: int) -> np.ndarray:
    shares = rng.dirichlet(np.ones(6))
    return sum(share * np.eye(size)[rng.permutation(size)] for share in shares)


def _quantisation_rows(model: torch.nn.Module, ids: Tensor, settings: Sequence[tuple[int, int]]) -> Iterator[dict]:
    exact = _logits(model, ids)
    nll, count = sequence_nll(exact, ids[0])
    for weight_bits, activation_bits in settings:
        for rotated in (False, True):
            with quantised(model, weight_bits=weight_bits, activation_bits=activation_bits, rotate=rotated):
                measured = _logits(model, ids)
            yield {
                "setting": f"W{weight_bits}A{activation_bits}",
                "rotated": rotated,
                "logit_error": relative_error(measured, exact),
                "same_top": float((measured.argmax(-1) == exact.argmax(-1)).double().mean()),
                "extra_nats": (sequence_nll(measured, ids[0])[0] - nll) / count,
            }


def _logits(model: torch.nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad(), route(model):
        return model(input_ids=ids, use_cache=False).logits[0]  # (L, V)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
