"""The ground: dependencies agree, the import is light, the Makefile explains itself."""

import re
import subprocess
import sys
import tomllib

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from corey.paths import ROOT

CONDA_NAMES = {"torch": "pytorch-gpu", "nvidia-cuda-nvrtc": "cuda-nvrtc", "nvidia-cuda-runtime": "cuda-cudart-dev"}


def project_requirements() -> dict[str, Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    return {canonicalize_name(Requirement(line).name): Requirement(line) for line in lines}


def constraints() -> dict[str, str]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}


def conda_requirements() -> dict[str, Requirement]:
    dependencies = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    pip = next(entry["pip"] for entry in dependencies if isinstance(entry, dict))
    lines = [entry for entry in [*dependencies, *pip] if isinstance(entry, str) and not entry.startswith("-")]
    return {canonicalize_name(Requirement(line).name): Requirement(line) for line in lines}


@pytest.mark.parametrize("name", sorted(project_requirements()))
def test_pyproject_constraints_and_environment_agree_on(name):
    wanted = project_requirements()[name]
    assert wanted.specifier.contains(constraints()[name]), f"constraints.txt pins {name} outside {wanted}"
    assert str(conda_requirements()[CONDA_NAMES.get(name, name)].specifier) == str(wanted.specifier)


def test_environment_names_nothing_that_pyproject_does_not():
    known = {CONDA_NAMES.get(name, name) for name in project_requirements()} | {"python", "pip"}
    assert set(conda_requirements()) <= known


LIGHT = (
    "from corey import *; import sys; heavy = {heavy} & set(sys.modules);"
    "sys.exit(f'loads {{sorted(heavy)}}' if heavy else 0)"
)
HEAVY = {"numba", "pandas", "matplotlib", "transformers", "lm_eval", "yaml", "papermill", "scipy", "distributed"}


def import_corey_without(heavy: set[str]) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", LIGHT.format(heavy=heavy)], capture_output=True, text=True, cwd=ROOT)


def test_importing_corey_needs_torch_and_numpy_only():
    result = import_corey_without(HEAVY)
    assert result.returncode == 0, result.stderr


def test_the_test_of_the_light_import_can_fail():
    assert "numpy" in import_corey_without({"numpy"}).stderr


def make(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(["make", *arguments], capture_output=True, text=True, cwd=ROOT)


def test_make_alone_prints_every_target():
    targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE).group(1).split()
    listed = make().stdout
    assert [target for target in targets if f"make {target} " not in listed] == []


def test_make_refuses_a_notebook_that_does_not_exist():
    result = make("-n", "figures", "NB=42")
    assert result.returncode != 0
    assert "NB: got 42, want one of" in result.stderr


def test_no_file_is_over_a_megabyte_and_a_half_but_the_checkpoint():
    tracked = subprocess.run(["git", "ls-files", "-z"], capture_output=True, text=True, cwd=ROOT).stdout.split("\0")
    sizes = {name: (ROOT / name).stat().st_size for name in tracked if name and (ROOT / name).exists()}
    assert [n for n, size in sizes.items() if size > 1_500_000 and not n.startswith("data/checkpoints/")] == []
