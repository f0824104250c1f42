"""The tour: a setting shows what its parts say, whatever the input and the policy."""

import math

import matplotlib.pyplot as plt
import pytest
import torch

from corey import controls, figures, quickstart
from corey.entropy import histogram_entropy
from corey.plots.quickstart import plot_tour
from corey.scan import TILE
from corey.schedulers import ChunkRule

SMALL = {"d_inner": 16, "seqlen": 1024, "num_bins": 64, "rounds": 1}


def test_the_distribution_changes_u_and_nothing_else():
    first, *others = (quickstart.long_memory_inputs(8, 64, distribution=name) for name in quickstart.DISTRIBUTIONS)
    for other in others:
        assert not torch.equal(first["u"], other["u"])
        assert all(torch.equal(first[name], other[name]) for name in first if name != "u")


def test_a_setting_shows_what_its_parts_say():
    seen = quickstart.tour(**SMALL, distribution="laplace", policy="hist")
    u = quickstart.long_memory_inputs(16, 1024, distribution="laplace")["u"]
    assert seen.entropy_nats == histogram_entropy(u, 64).item()
    assert seen.chunk_size == ChunkRule(128, 512, math.log(64))(seen.entropy_nats)
    share = seen.histogram.probability
    assert share.sum() == pytest.approx(1) and len(share) == 64
    assert -(share[share > 0] * share[share > 0].map(math.log)).sum() == pytest.approx(seen.entropy_nats, abs=1e-4)
    assert seen.latency.chunk_size.tolist() == [128, 256, 512, 1024]
    assert (seen.latency.low_us <= seen.latency.median_us).all() and (seen.latency.median_us > 0).all()
    rows = quickstart.tour_rows(seen, "cpu").set_index(["quantity", "chunk_size"])
    assert rows.value["entropy_nats", seen.chunk_size] == seen.entropy_nats
    assert rows.value["scan_latency_us"].tolist() == seen.latency.median_us.tolist()
    assert rows.high["scan_latency_us"].tolist() == seen.latency.high_us.tolist()


def test_the_published_loop_is_wrong_after_its_first_cut_and_one_call_never():
    seen = quickstart.tour(**SMALL, distribution="normal", policy="no-entropy")
    assert seen.chunk_size == 256 and seen.relative_l2 > 0.1
    error = seen.errors.set_index("token").groupby("form").relative_error
    assert error.max()["one call"] == 0
    loop = error.get_group("published loop")
    assert (loop[loop.index < 256] == 0).all() and loop[loop.index > 256].iloc[0] > 0.1


def test_a_chunk_as_long_as_the_sequence_cuts_nothing():
    seen = quickstart.tour(**SMALL | {"seqlen": 256}, distribution="normal", policy="static")
    assert (seen.chunk_size, seen.relative_l2) == (512, 0)
    assert seen.latency.chunk_size.tolist() == [128, 256, 512]


@pytest.mark.parametrize("policy", quickstart.POLICIES)
@pytest.mark.parametrize("distribution", quickstart.DISTRIBUTIONS)
def test_every_policy_gives_a_legal_chunk_for_every_input(policy, distribution):
    u = quickstart.long_memory_inputs(8, 512, distribution=distribution)["u"]
    for num_bins in (16, 2048):
        chunk_size = int(quickstart.build_policy(policy, num_bins=num_bins)(u))
        assert chunk_size >= TILE and chunk_size % TILE == 0


@pytest.mark.parametrize("distribution, seqlen", [("sparse2", 512), ("uniform", 128)])
def test_a_figure_is_as_wide_as_the_page(distribution, seqlen):
    with plt.rc_context():
        figures.use_style()
        seen = quickstart.tour(**SMALL | {"seqlen": seqlen}, distribution=distribution, policy="hist")
        drawn = plot_tour(seen, "AMD EPYC, 2 threads")
        assert drawn.get_figwidth() == figures.WIDTH_FULL
        assert f"{seen.entropy_nats:.2f} nats" in drawn.axes[0].get_title(loc="left")
        assert f"chunk {seen.chunk_size}:" in drawn.axes[1].get_title(loc="left")
        plt.close(drawn)


def test_names_that_are_not_offered_are_refused():
    with pytest.raises(ValueError, match="distribution: got 'cauchy'"):
        quickstart.long_memory_inputs(8, 64, distribution="cauchy")
    with pytest.raises(ValueError, match="policy: got 'oracle'"):
        quickstart.build_policy("oracle", num_bins=64)


def test_a_slider_stops_at_the_value_it_starts_from():
    slider = controls.slider("tokens", [512, 1024], 768)
    assert (slider.options, slider.value, slider.continuous_update) == ((512, 768, 1024), 768, False)
