"""Bad arguments of the scan raise ValueError or TypeError that begins with the argument's name."""

import numpy as np
import pytest
import torch
from scan_inputs import OPTIONS, make_inputs

from corey import selective_scan, selective_scan_ref
from corey.scan import scan_carried_ref, scan_reset_ref

BATCH, DIM, LENGTH, STATES = 2, 6, 20, 3


def good(**changes):
    return make_inputs(BATCH, DIM, LENGTH, STATES, options=OPTIONS) | changes


def normal(*shape, dtype=torch.float32):
    return torch.randn(*shape).to(dtype)


# argument, exception, what is passed for it
CASES = {
    "u is an array": ("u", TypeError, np.zeros((BATCH, DIM, LENGTH), np.float32)),
    "u is None": ("u", TypeError, None),
    "u of rank 2": ("u", ValueError, normal(DIM, LENGTH)),
    "u of rank 4": ("u", ValueError, normal(1, BATCH, DIM, LENGTH)),
    "u float64": ("u", ValueError, normal(BATCH, DIM, LENGTH, dtype=torch.float64)),
    "u integer": ("u", ValueError, torch.ones(BATCH, DIM, LENGTH, dtype=torch.int64)),
    "u bool": ("u", ValueError, torch.ones(BATCH, DIM, LENGTH, dtype=torch.bool)),
    "u complex": ("u", ValueError, normal(BATCH, DIM, LENGTH, dtype=torch.complex64)),
    "u float8": ("u", ValueError, normal(BATCH, DIM, LENGTH, dtype=torch.float8_e4m3fn)),
    "u sparse": ("u", ValueError, normal(BATCH, DIM, LENGTH).to_sparse()),
    "delta a float": ("delta", TypeError, 0.1),
    "delta one token short": ("delta", ValueError, normal(BATCH, DIM, LENGTH - 1)),
    "delta one row": ("delta", ValueError, normal(1, DIM, LENGTH)),
    "delta token-major by mistake": ("delta", ValueError, normal(BATCH, LENGTH, DIM)),
    "delta float64": ("delta", ValueError, normal(BATCH, DIM, LENGTH, dtype=torch.float64)),
    "delta on another device": ("delta", ValueError, normal(BATCH, DIM, LENGTH).to("meta")),
    "A a list": ("A", TypeError, [[-1.0]]),
    "A of rank 1": ("A", ValueError, normal(DIM)),
    "A of rank 3": ("A", ValueError, normal(1, DIM, STATES)),
    "A transposed": ("A", ValueError, normal(STATES, DIM)),
    "A without states": ("A", ValueError, normal(DIM, 0)),
    "A with 257 states": ("A", ValueError, normal(DIM, 257)),
    "A complex": ("A", ValueError, normal(DIM, STATES, dtype=torch.complex64)),
    "A bfloat16": ("A", ValueError, normal(DIM, STATES, dtype=torch.bfloat16)),
    "A on another device": ("A", ValueError, normal(DIM, STATES).to("meta")),
    "B of rank 1": ("B", ValueError, normal(STATES)),
    "B of rank 5": ("B", ValueError, normal(1, BATCH, 1, STATES, LENGTH)),
    "B token-major by mistake": ("B", ValueError, normal(BATCH, LENGTH, STATES)),
    "B one token long": ("B", ValueError, normal(BATCH, STATES, LENGTH + 1)),
    "B one state short": ("B", ValueError, normal(BATCH, STATES - 1, LENGTH)),
    "B constant of a wrong dim": ("B", ValueError, normal(DIM + 1, STATES)),
    "B with groups that do not divide": ("B", ValueError, normal(BATCH, 4, STATES, LENGTH)),
    "B with no groups": ("B", ValueError, normal(BATCH, 0, STATES, LENGTH)),
    "B float64": ("B", ValueError, normal(BATCH, STATES, LENGTH, dtype=torch.float64)),
    "B complex": ("B", ValueError, normal(BATCH, STATES, LENGTH, dtype=torch.complex64)),
    "C a string": ("C", TypeError, "C"),
    "C one token short of B": ("C", ValueError, normal(BATCH, STATES, LENGTH - 1)),
    "C with groups that do not divide": ("C", ValueError, normal(BATCH, 5, STATES, LENGTH)),
    "C of another batch": ("C", ValueError, normal(BATCH + 1, STATES, LENGTH)),
    "D a float": ("D", TypeError, 1.0),
    "D of rank 2": ("D", ValueError, normal(DIM, 1)),
    "D of another dim": ("D", ValueError, normal(DIM + 1)),
    "D half": ("D", ValueError, normal(DIM, dtype=torch.float16)),
    "z of another length": ("z", ValueError, normal(BATCH, DIM, LENGTH + 1)),
    "z integer": ("z", ValueError, torch.ones(BATCH, DIM, LENGTH, dtype=torch.int32)),
    "z a bool": ("z", TypeError, True),
    "delta_bias per token": ("delta_bias", ValueError, normal(DIM, LENGTH)),
    "delta_bias of one channel": ("delta_bias", ValueError, normal(1)),
    "delta_bias float64": ("delta_bias", ValueError, normal(DIM, dtype=torch.float64)),
    "initial_state without batch": ("initial_state", ValueError, normal(DIM, STATES)),
    "initial_state transposed": ("initial_state", ValueError, normal(BATCH, STATES, DIM)),
    "initial_state bfloat16": ("initial_state", ValueError, normal(BATCH, DIM, STATES, dtype=torch.bfloat16)),
    "initial_state sparse": ("initial_state", ValueError, normal(BATCH, DIM, STATES).to_sparse()),
    "initial_state on another device": ("initial_state", ValueError, normal(BATCH, DIM, STATES).to("meta")),
    "delta_softplus an int": ("delta_softplus", TypeError, 1),
    "delta_softplus None": ("delta_softplus", TypeError, None),
    "return_last_state a string": ("return_last_state", TypeError, "yes"),
    "chunk_size zero": ("chunk_size", ValueError, 0),
    "chunk_size negative": ("chunk_size", ValueError, -128),
    "chunk_size one": ("chunk_size", ValueError, 1),
    "chunk_size between tiles": ("chunk_size", ValueError, 200),
    "chunk_size float": ("chunk_size", TypeError, 128.0),
    "chunk_size True": ("chunk_size", TypeError, True),
    "chunk_size string": ("chunk_size", TypeError, "128"),
    "chunk_size numpy float": ("chunk_size", TypeError, np.float32(128)),
    "chunk_size tensor": ("chunk_size", TypeError, torch.tensor(128, dtype=torch.int32)),
    "chunk_size tuple": ("chunk_size", TypeError, (128,)),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_bad_argument_is_refused_by_name(case):
    name, exception, value = case
    with pytest.raises(exception, match=rf"^{name}: got "):
        selective_scan(**good(**{name: value}))


def test_good_arguments_are_accepted():
    selective_scan(**good())


def test_message_says_what_it_got_and_what_it_wants():
    with pytest.raises(ValueError, match=r"^chunk_size: got 100, want a positive multiple of the 128-token tile$"):
        selective_scan(**good(chunk_size=100))
    with pytest.raises(ValueError, match=r"^B: got shape \(2, 3, 21\), want \(B, N, L\) = \(2, 3, 20\)$"):
        selective_scan(**good(B=normal(2, 3, 21)))


def test_B_and_C_of_different_groups_are_refused():
    with pytest.raises(ValueError, match=r"^C: got 3 groups, want the 2 groups of B$"):
        selective_scan(**good(B=normal(BATCH, 2, STATES, LENGTH), C=normal(BATCH, 3, STATES, LENGTH)))


@pytest.mark.parametrize("name", ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state"))
def test_the_operator_itself_refuses_what_would_read_out_of_bounds(name):
    inputs = good()
    inputs[name] = inputs[name][..., :-1]
    names = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "delta_softplus", "initial_state")
    blamed = {"u": "delta", "A": "B"}.get(name, name)  # u and A set the sizes that the others are held to
    with pytest.raises(ValueError, match=rf"^{blamed}: got shape"):
        torch.ops.corey.selective_scan(*(inputs[n] for n in names), None)


def test_the_operator_itself_refuses_a_chunk_between_tiles():
    names = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "delta_softplus", "initial_state")
    with pytest.raises(ValueError, match=r"^chunk_size: got 100"):
        torch.ops.corey.selective_scan(*(good()[n] for n in names), 100)


REFERENCE_CASES = {name: case for name, case in CASES.items() if case[0] != "chunk_size" and "float64" not in name}
REFERENCE_CASES = {
    name: case for name, case in REFERENCE_CASES.items() if "half" not in name and "bfloat16" not in name
}


@pytest.mark.parametrize("case", REFERENCE_CASES.values(), ids=REFERENCE_CASES.keys())
def test_reference_refuses_the_same(case):
    name, exception, value = case
    with pytest.raises(exception, match=rf"^{name}: got "):
        selective_scan_ref(**good(**{name: value}))


@pytest.mark.parametrize("loop", (scan_reset_ref, scan_carried_ref))
@pytest.mark.parametrize("chunk_size", (0, -1, 2.0, True, "16", None))
def test_host_loops_refuse_chunks_that_are_no_positive_int(loop, chunk_size):
    inputs = make_inputs(BATCH, DIM, LENGTH, STATES)
    with pytest.raises((TypeError, ValueError), match=r"^chunk_size: got "):
        loop(**inputs, chunk_size=chunk_size)


@pytest.mark.parametrize("loop", (scan_reset_ref, scan_carried_ref))
def test_host_loops_refuse_tensors_that_slicing_would_hide(loop):
    inputs = make_inputs(BATCH, DIM, LENGTH, STATES)
    with pytest.raises(ValueError, match=r"^B: got shape"):
        loop(**inputs | {"B": normal(BATCH, STATES, LENGTH + 7)}, chunk_size=10)
