"""A selective scan whose chunk size changes time and never a bit, and the pieces to judge how to choose it.

The names below are imported when they are first used: torch takes seconds, and the runner of notebooks does without.
"""

import importlib

_HOMES = {
    "histogram_entropy": "corey.entropy",
    "hadamard_transform": "corey.hadamard",
    "selective_scan": "corey.scan",
    "selective_scan_ref": "corey.scan",
}
__all__ = ["hadamard_transform", "histogram_entropy", "selective_scan", "selective_scan_ref"]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'corey' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
