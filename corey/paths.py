"""Where things live; no other module builds a path by hand."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KERNELS = ROOT / "kernels"  # CUDA C++ sources
NOTEBOOKS = ROOT / "notebooks"  # clean notebooks
GRIDS = NOTEBOOKS / "grids"  # each notebook's parameter sets
RESULTS = ROOT / "data" / "results"  # committed rows and their provenance
SAMPLES = ROOT / "data" / "samples"  # made LongBench-style rows
CHECKPOINTS = ROOT / "data" / "checkpoints"  # the small trained model
CLAIMS = ROOT / "data" / "claims.yaml"  # the ledger
FIGURES = ROOT / "figures"  # what `make figures` draws
BUILD = ROOT / "build"  # ignored: executed notebooks, live rows, reports
LIVE_RESULTS = BUILD / "results"  # rows measured on this machine
