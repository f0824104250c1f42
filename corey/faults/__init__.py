"""Faults injected into the batch runner, and what it reported and kept: `python -m corey.faults` (make faults)."""
