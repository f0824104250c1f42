"""The rows of notebook 02 against the paper's printed numbers and against what a rotation must do."""

import pytest
import torch
from byte_ids import byte_tokens
from transformers import MambaConfig, MambaForCausalLM

from corey import hadamard_study as study

PROMPTS = [("narrativeqa", 0, byte_tokens("The mill was quiet. Petra kept the key. " * 3))]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=264, hidden_size=16, num_hidden_layers=2, state_size=4, conv_kernel=4, expand=2)
    return MambaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def synthetic():
    return study.synthetic_rows(7)


def test_the_shared_average_prints_the_papers_figure(synthetic):
    by_length = synthetic.groupby("seqlen")[["shared_before", "shared_after"]].mean()
    assert by_length.shared_before.tolist() == pytest.approx(
        [0.4923, 0.3625, 0.3915, 0.4385, 0.3669, 0.2948, 0.3176], abs=6e-5
    )
    assert by_length.shared_after.tolist() == pytest.approx(
        [0.5339, 0.4136, 0.4442, 0.4853, 0.4171, 0.3522, 0.3747], abs=6e-5
    )
    gain = synthetic.shared_after - synthetic.shared_before
    assert (gain.mean(), gain.min(), gain.max()) == pytest.approx((0.0510, 0.0315, 0.0719), abs=6e-5)


def test_each_draw_gains_what_the_reference_gains(synthetic):
    assert synthetic.gain.agg(["mean", "std", "min", "max"]).tolist() == pytest.approx(
        [0.418, 0.051, 0.277, 0.503], abs=6e-4
    )
    assert synthetic.groupby("seqlen").outliers_before.mean().tolist() == pytest.approx(
        [0.00069, 0.00065, 0.00064, 0.00071, 0.00078, 0.00084, 0.00085], abs=6e-6
    )
    assert synthetic.projection_error.max() < 1e-11


def test_the_mixing_fit_prints_the_papers_distances(synthetic):
    assert synthetic.groupby("seqlen").l1_fit.mean().tolist() == pytest.approx(
        [0.0698, 0.0781, 0.0733, 0.0679, 0.0718, 0.0592, 0.0681], abs=6e-5
    )
    assert (synthetic.l1_fit < 0.10).sum() == 34 and (synthetic.l1_fit < 0.05).sum() == 0


def test_no_mixing_is_closer_and_none_can_be_exact(synthetic):
    assert (synthetic.l1_unmixed < synthetic.l1_fit).all()
    assert not synthetic.majorised.any() and (synthetic.shared_bins_gain_nats < 0).all()


def test_the_two_routines_differ_in_norm_on_the_same_values():
    rows = study.routine_rows([64], num_vectors=16, draws=1, seed=0).set_index(["distribution", "routine"])
    assert rows.norm_ratio["normal", "orthonormal"] == pytest.approx(1, abs=1e-12)
    assert rows.norm_ratio["normal", "published"] == pytest.approx(0.27, abs=0.04)
    assert rows.gain_nats["mean 3", "orthonormal"] < -1 < 1 < rows.gain_nats["8 channels x 50", "orthonormal"]


def test_every_layer_signal_and_variant_is_measured_once(model):
    rows = study.activation_rows(model, PROMPTS)
    keys = ["layer", "signal", "centred", "pooling", "routine"]
    assert len(rows) == 2 * 2 * 2 * 2 * 2 and not rows.duplicated(keys).any()
    orthonormal = rows[rows.routine == "orthonormal"]
    assert (orthonormal.norm_ratio - 1).abs().max() < 1e-5
    _, signal, branch = study.captured_signals(model, PROMPTS[0][2])[0]
    assert signal == "in_proj branch" and branch.shape == (PROMPTS[0][2].shape[1], 32)


def test_the_bound_holds_and_is_met_by_a_spike_and_a_constant(model):
    rows = study.bound_rows(model, PROMPTS)
    assert rows.largest_share.max() <= 1 + 1e-9
    shares = rows.groupby("vectors").largest_share.max()
    assert shares[["one spike", "constant"]].tolist() == pytest.approx([1, 1]) and shares["normal"] < 0.5
    assert {"layer 0", "layer 1"} <= set(rows.vectors)
    overflow = study.overflow_rows(torch.randn(200, 24) ** 3, [0.5, 1.0, 2.0, 4.0, 8.0])
    assert (overflow.after <= overflow.bound).all() and overflow.before.is_monotonic_decreasing


def test_random_mixing_never_loses_entropy():
    assert study.mixing_rows(50, seed=0).gain_nats.min() > 0


def test_quantisation_rows_compare_plain_and_rotated(model):
    rows = study.quantisation_rows(model, PROMPTS, settings=((16, 16), (4, 4)))
    errors = rows.set_index(["setting", "rotated"]).logit_error
    assert max(errors["W16A16", False], errors["W16A16", True]) < 1e-3 < errors["W4A4", True]
    assert rows.same_top.between(0, 1).all()


@pytest.mark.gpu
def test_a_gpu_measures_on_a_model_what_a_cpu_measures(model):
    rows = {}
    for device in ("cpu", "cuda"):
        model.to(device)
        rows[device] = [
            study.activation_rows(model, PROMPTS, device).gain_nats,
            study.bound_rows(model, PROMPTS, device).largest_after,
            study.quantisation_rows(model, PROMPTS, settings=((8, 8),), device=device).extra_nats,
        ]
    model.to("cpu")
    for on_cpu, on_gpu, tolerance in zip(rows["cpu"], rows["cuda"], (2e-2, 1e-4, 1e-2)):
        assert (on_cpu - on_gpu).abs().max() < tolerance
    overflow = study.overflow_rows(torch.randn(50, 24, device="cuda"), [1.0, 2.0])
    assert (overflow.after <= overflow.bound).all()
