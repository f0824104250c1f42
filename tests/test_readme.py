"""The first page tells the truth: its table is computed, its commands and links exist, its code runs."""

import re

import pytest

from corey import claims, kernel_speed, results
from corey.paths import ROOT

README = (ROOT / "README.md").read_text()


def test_the_claims_table_is_what_the_committed_rows_say():
    written = re.search(r"<!-- claims: [^>]* -->\n(.*?)\n?<!-- /claims -->", README, re.DOTALL).group(1)
    assert written == claims.markdown(claims.table("committed")).strip()


def test_the_speed_of_the_scan_is_that_of_the_committed_rows():
    ratio = results.read_rows("03_chunk_sweep_baselines", "committed").set_index("form").ratio
    told = [int(times) for times in re.findall(r"(\d+) times as\s+fast", README)]
    assert told == [round(ratio["mamba-minimal, token loop"]), round(ratio["transformers, PyTorch path"])]


def test_the_speed_table_is_what_the_committed_rows_say():
    written = re.search(r"<!-- speed: [^>]* -->\n(.*?)\n?<!-- /speed -->", README, re.DOTALL).group(1)
    assert written == kernel_speed.markdown(results.read_rows("kernel_speed_scan", "committed"))


def test_every_make_command_is_a_target():
    targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE).group(1).split()
    commands = set(re.findall(r"^make (\w+)|`make (\w+)|&& make (\w+)", README, re.MULTILINE))
    assert {name for names in commands for name in names if name} <= set(targets)


@pytest.mark.parametrize("name", sorted(set(re.findall(r"\]\((?!https?:)([^)#]+)\)", README))))
def test_a_link_leads_somewhere(name):
    assert (ROOT / name).exists()


@pytest.mark.parametrize("folder", re.findall(r"^\| `(\w+/)` \|", README, re.MULTILINE))
def test_a_folder_of_the_layout_exists(folder):
    assert folder == "build/" or (ROOT / folder).is_dir()


def test_the_five_lines_of_the_scan_run():
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL).group(1)
    names: dict = {}
    exec(code, names)
    assert names["y"].shape == (1, 1024, 4096)
    assert names["state"].shape == (1, 1024, 16)


def test_the_edit_of_a_kernel_runs(capsys):
    code = next(each for each in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "live.edit" in each)
    exec(code, {})
    assert float(re.search(r"tensor\((.*)\)", capsys.readouterr().out).group(1)) > 1
