"""Where things live; no other module builds a path by hand.

Three variables of the environment move what a run reads and writes, for all processes under it: COREY_NOTEBOOKS the
notebooks, COREY_BUILD what is built, and COREY_RUN_DIR the live rows and figures of one run of a grid (corey.grid).
"""

import os
from pathlib import Path


def _folder(variable: str, default: Path) -> Path:
    told = os.environ.get(variable)
    if told is None:
        return default
    if not Path(told).is_absolute():
        raise ValueError(f"{variable}: got {told!r}, want an absolute path")
    return Path(told)


ROOT = Path(__file__).resolve().parents[1]
KERNELS = ROOT / "kernels"  # CUDA C++ sources
NOTEBOOKS = _folder("COREY_NOTEBOOKS", ROOT / "notebooks")  # clean notebooks
GRIDS = NOTEBOOKS / "grids"  # each notebook's parameter sets
RESULTS = ROOT / "data" / "results"  # committed rows and their provenance
SAMPLES = ROOT / "data" / "samples"  # made LongBench-style rows
CHECKPOINTS = ROOT / "data" / "checkpoints"  # the small trained model
CLAIMS = ROOT / "data" / "claims.yaml"  # the ledger
BUILD = _folder("COREY_BUILD", ROOT / "build")  # ignored: executed notebooks, live rows, reports
FIGURES = _folder("COREY_RUN_DIR", ROOT) / "figures"  # what `make figures` draws
LIVE_RESULTS = _folder("COREY_RUN_DIR", BUILD) / "results"  # rows measured on this machine
