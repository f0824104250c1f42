"""What the code is that a number comes from: hashes of its sources on disk and the versions of what is installed."""

import hashlib
import importlib.metadata
import json
import platform
from pathlib import Path

from corey import paths

PACKAGES = ("torch", "numpy", "pandas", "numba", "scipy", "transformers", "lm-eval", "mamba-ssm", "cuda-core", "corey")


def source_hashes(notebook: str | None = None) -> dict:
    """SHA-256 of the module, of the kernels and of one notebook's cells (sources only, so outputs do not count)."""
    hashes = {
        "corey_sha256": _hash_files(sorted((paths.ROOT / "corey").rglob("*.py"))),
        "kernels_sha256": _hash_files(sorted(paths.KERNELS.glob("*.cu*"))),
    }
    if notebook is not None:
        cells = json.loads((paths.NOTEBOOKS / f"{notebook}.ipynb").read_text())["cells"]
        hashes["notebook_sha256"] = sha256("\0".join("".join(cell["source"]) for cell in cells).encode())
    return hashes


def versions() -> dict:
    """Versions of Python and of the packages that matter; None for one that is not installed."""
    return {"python": platform.python_version()} | {package: _version(package) for package in PACKAGES}


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _hash_files(files: list[Path]) -> str:
    return sha256("\n".join(f"{file.relative_to(paths.ROOT)} {sha256(file.read_bytes())}" for file in files).encode())


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
