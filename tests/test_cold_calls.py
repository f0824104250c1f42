"""One call on a CPU; on a GPU many, on copies that no cache can hold."""

import pytest
import torch

from corey.chunk_study import published_inputs
from corey.cold_calls import cold_calls, in_turn, input_sets
from corey.cold_timing import CALLS, COLD_BYTES


def test_on_a_cpu_there_is_one_set_and_one_call_of_it():
    inputs = published_inputs(1, 4, 200, 3, seed=0)
    (only,) = input_sets(inputs)
    assert only is inputs
    assert in_turn(cold_calls(lambda each: each["u"].shape, [only])) == [(1, 4, 200)]


@pytest.mark.gpu
def test_on_a_gpu_equal_copies_fill_more_than_the_cache():
    inputs = published_inputs(1, 1024, 4096, 16, seed=0, dtype=torch.float16, device="cuda")
    sets = input_sets(inputs)
    assert len(sets) * (inputs["u"].nbytes + inputs["delta"].nbytes) > COLD_BYTES
    assert torch.equal(sets[-1]["u"], inputs["u"]) and sets[-1]["u"].data_ptr() != inputs["u"].data_ptr()
    assert len(cold_calls(lambda each: None, sets)) == CALLS
    assert len(cold_calls(lambda each: None, sets, launches=8)) == CALLS // 8
    assert len(cold_calls(lambda each: None, sets, launches=100)) == 1


@pytest.mark.gpu
def test_a_long_call_is_not_repeated():
    inputs = {"u": torch.empty(1, 1 << 12, 1 << 13, dtype=torch.float16, device="cuda")}
    assert len(input_sets(inputs)) == len(cold_calls(lambda each: None, [inputs])) == 1
