"""On a CPU both clocks time the call itself; on a GPU one holds the host and the other does not."""

import numpy as np
import pytest
import torch

from corey.clocks import from_idle, median_interval, on_device


def test_on_a_cpu_a_call_is_timed_as_it_is():
    def call():
        return 7

    assert from_idle(call, "cpu") is call and on_device(call, torch.device("cpu")) is call


def test_the_interval_is_around_the_median_and_the_same_every_time():
    values = np.random.default_rng(1).exponential(size=200)
    first, again = (median_interval(values, np.random.default_rng(0)) for _ in range(2))
    assert first == again and first[0] == np.median(values) and first[1] < first[0] < first[2]


@pytest.mark.gpu
def test_a_replay_writes_what_the_call_writes_and_idle_waits_for_the_device():
    x, out = torch.ones(4, device="cuda"), torch.zeros(4, device="cuda")
    replay = on_device(lambda: out.add_(x), "cuda")
    out.zero_()
    replay()
    assert out.tolist() == [1.0] * 4
    assert from_idle(lambda: out.sum(), "cuda")().item() == 4.0
