"""The runs of a grid: which parameters, and the identity that makes a finished one known again."""

import hashlib
import itertools
import json
from pathlib import Path

from corey import run
from corey._check import bad_type, bad_value
from corey._sources import source_hashes, versions
from corey.paths import ROOT

BASES = {"smoke": "laptop", "paper": "paper"}  # the preset whose parameters a section of the grid starts from
MAX_RUNS = 10_000
DATA = ("data/checkpoints", "data/samples", "data/published")  # what notebooks read beside their parameters


def expand(name: str, section: str) -> list[tuple[dict, dict]]:
    """For every run of a grid all its parameters and, of these, the crossed ones; in the order of the file.

    notebooks/grids/<name>.yaml holds `grid: {smoke: {seqlen: [1024, 4096], seed: [7, 8]}}`. Lists are crossed, one
    run for each combination; all other parameters are those of the preset `laptop` (smoke) or `paper` (paper).
    """
    if section not in BASES:
        raise bad_value("section", repr(section), " or ".join(BASES))
    sections = run.settings(name).get("grid")
    crossed = sections.get(section) if isinstance(sections, dict) else None
    if not isinstance(crossed, dict) or not crossed:
        raise bad_value(f"grid of {name}", repr(crossed), f"a section `{section}` that maps parameters to lists")
    for parameter, values in crossed.items():
        if not isinstance(values, list) or not values:
            raise bad_type(f"grid of {name}, {parameter}", values, "a list of values to cross, one entry at least")
    count = 1
    for values in crossed.values():
        count *= len(values)
    if count > MAX_RUNS:
        raise bad_value(f"grid of {name}", f"{count} runs", f"at most {MAX_RUNS}")
    notebook, base = run.read_notebook(run.find(name)), run.preset(name, BASES[section])
    points = [dict(zip(crossed, values)) for values in itertools.product(*crossed.values())]
    varied = [parameter for parameter, values in crossed.items() if len(values) > 1]
    found = [(run.check_parameters(notebook, base | point), {key: point[key] for key in varied}) for point in points]
    if len({json.dumps(parameters, sort_keys=True) for parameters, _ in found}) != len(found):
        raise bad_value(f"grid of {name}", "the same run twice", "different values in every list")
    return found


def surroundings(name: str) -> dict:
    """All that a number depends on beside parameters: sources as they are on disk, data, and installed versions."""
    return {"code": source_hashes(name), "data": _hash_of([ROOT / each for each in DATA]), "versions": versions()}


def identity(name: str, parameters: dict, around: dict) -> str:
    """Sixteen hexadecimal digits that stand for this run: of notebook, parameters, their files and the surroundings."""
    paths = [Path(value) for value in _strings(parameters) if "/" in value and Path(value).exists()]
    whole = {"notebook": name, "parameters": parameters, "around": around, "files": _hash_of(paths)}
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:16]


def _hash_of(roots: list[Path]) -> str:
    """SHA-256 over names and contents of files and of all files in folders."""
    total = hashlib.sha256()
    for root in roots:
        files = sorted(each for each in root.rglob("*") if each.is_file()) if root.is_dir() else [root]
        for path in files:
            with open(path, "rb") as file:
                total.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()


def _strings(parameters: dict) -> list[str]:
    flat = itertools.chain.from_iterable(each if isinstance(each, list) else [each] for each in parameters.values())
    return [value for value in flat if isinstance(value, str)]
