"""Calls of a scan on copies of its arguments in turn, so that on a GPU none finds its own in the cache."""

from collections.abc import Callable, Iterable, Mapping, Sequence

from torch import Tensor

from corey.cold_timing import CALLS, num_sets, rotated

LONG_VALUES = 1 << 25  # values of u from which on a call takes so long that what one replay adds does not count


def input_sets(inputs: Mapping) -> list[Mapping]:
    """The arguments of a scan and, on a GPU, so many copies that together they are larger than any cache."""
    if _one_call_does(inputs["u"]):
        return [inputs]
    count = num_sets(sum(inputs[name].nbytes for name in ("u", "delta", "z") if name in inputs))
    return [inputs, *(_copy(inputs) for _ in range(count - 1))]


def cold_calls(
    function: Callable[[Mapping], object], sets: Sequence[Mapping], launches: int = 1
) -> list[Callable[[], object]]:
    """Calls of `function` on one of `input_sets` after another, ready for `cold_timing.time_calls`.

    One call on a CPU and for a u of LONG_VALUES or more, else so many that, at `launches` of the scan in each, there
    are about `cold_timing.CALLS` launches.
    """
    count = 1 if _one_call_does(sets[0]["u"]) else max(1, CALLS // launches)
    return rotated(function, sets, count)[:count]


def in_turn(calls: Iterable[Callable[[], object]]) -> list:
    """What all the calls return: the function that a graph of them records."""
    return [call() for call in calls]


def _one_call_does(u: Tensor) -> bool:
    return u.device.type == "cpu" or u.numel() >= LONG_VALUES


def _copy(inputs: Mapping) -> dict:
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in inputs.items()}
