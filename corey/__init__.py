"""A selective scan whose chunk size changes time and never a bit, and the pieces to judge how to choose it."""

from corey.entropy import histogram_entropy
from corey.hadamard import hadamard_transform
from corey.scan import selective_scan, selective_scan_ref

__all__ = ["hadamard_transform", "histogram_entropy", "selective_scan", "selective_scan_ref"]
