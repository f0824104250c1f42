"""Rows keep their values and their provenance, and anything torn, edited or unexplained is refused."""

import json
import os
import subprocess

import numpy as np
import pandas as pd
import pytest
import torch

from corey import paths, results

GPU_A, GPU_B = "NVIDIA H200", "NVIDIA A100-SXM4-80GB"


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "LIVE_RESULTS", tmp_path / "live")
    monkeypatch.setattr(paths, "RESULTS", tmp_path / "committed")


def row(**values):
    return {"chunk_size": 128, "latency_us": 1.5, "device": "cpu"} | values


def evidence(**values):
    return {"claim": "C01", "quantity": "speedup", "value": 4.4, "device": "cpu"} | values


@pytest.fixture
def notebook(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "NOTEBOOKS", tmp_path)
    cells = [{"cell_type": "code", "source": ["seed: int = 7"], "outputs": []}]
    path = tmp_path / "03_try.ipynb"
    path.write_text(json.dumps({"cells": cells}))
    return path


def test_rows_come_back_bit_for_bit():
    values = [0.1 + 0.2, 1e-300, np.float32(1 / 3), float("nan"), float("inf"), -0.0]
    texts = ["None", "NA", "nan", "a,b", 'say "x"\n', "é"]
    results.write_rows(
        [row(latency_us=value, task=text) for value, text in zip(values, texts)], "03_try", parameters={}
    )
    table = results.read_rows("03_try")
    np.testing.assert_array_equal(table["latency_us"], np.array(values, dtype=float))
    assert table["task"].tolist() == texts
    assert (table["source"] == "live").all()
    assert table["chunk_size"].dtype == np.int64


def test_the_provenance_says_where_the_rows_come_from(notebook):
    results.write_rows([row()], "03_try", parameters={"seed": 7, "chunk_sizes": [1, 2]}, notebook="03_try")
    record = results.read_provenance("03_try")
    assert record["parameters"] == {"seed": 7, "chunk_sizes": [1, 2]} and record["seeds"] == {"seed": 7}
    assert record["rows"] == 1 and record["columns"] == ["chunk_size", "latency_us", "device"]
    assert record["versions"]["torch"] == torch.__version__ and record["versions"]["python"].startswith("3.")
    assert {"cpu", "cores", "gpu"} <= set(record["machine"]) and record["time_utc"].endswith("+00:00")
    assert {"commit", "dirty", "corey_sha256", "kernels_sha256", "notebook_sha256"} <= set(record["code"])


def test_the_notebook_hash_follows_its_cells_and_not_its_outputs(notebook):
    before = results.source_hashes("03_try")["notebook_sha256"]
    content = json.loads(notebook.read_text())
    content["cells"][0]["outputs"] = [{"text": "1"}]
    notebook.write_text(json.dumps(content))
    assert results.source_hashes("03_try")["notebook_sha256"] == before
    content["cells"][0]["source"] = ["seed: int = 8"]
    notebook.write_text(json.dumps(content))
    assert results.source_hashes("03_try")["notebook_sha256"] != before


def test_an_edited_row_is_refused():
    path = results.write_rows([row()], "03_try", parameters={})
    path.write_text(path.read_text().replace("1.5", "1.4"))
    with pytest.raises(ValueError, match="checksum"):
        results.read_rows("03_try")


def test_rows_without_provenance_are_refused():
    path = results.write_rows([row()], "03_try", parameters={})
    path.with_suffix(".json").unlink()
    with pytest.raises(ValueError, match="provenance"):
        results.read_rows("03_try")


def test_a_crash_between_the_two_files_leaves_a_set_that_is_refused(monkeypatch):
    results.write_rows([row()], "03_try", parameters={})
    replace = os.replace

    def crash_at_json(source, target):
        if str(target).endswith(".json"):
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", crash_at_json)
    with pytest.raises(KeyboardInterrupt):
        results.write_rows([row(latency_us=2.0)], "03_try", parameters={})
    with pytest.raises(ValueError, match="checksum"):
        results.read_rows("03_try")
    assert sorted(each.name for each in paths.LIVE_RESULTS.iterdir()) == ["03_try.csv", "03_try.json"]


def test_two_gpu_models_in_one_set_are_refused_on_writing_and_on_reading(monkeypatch):
    mixed = [row(device=GPU_A), row(device=GPU_B)]
    with pytest.raises(ValueError, match="one GPU model"):
        results.write_rows(mixed, "03_try", parameters={})
    with monkeypatch.context() as patch:
        patch.setattr(results, "_check_devices", lambda *_: None)
        results.write_rows(mixed, "03_try", parameters={})
    with pytest.raises(ValueError, match="one GPU model"):
        results.read_rows("03_try")


def test_a_cpu_beside_a_gpu_is_one_set():
    results.write_rows([row(device=GPU_A), row(device="cpu")], "03_try", parameters={})
    assert results.read_rows("03_try")["device"].map(results.is_cpu).tolist() == [False, True]


def test_published_rows_stand_beside_live_ones():
    results.write_rows([row(device=GPU_A)], "03_try", parameters={})
    results.publish("03_try")
    results.write_rows([row(device="cpu")], "03_try", parameters={})
    both = results.read_rows("03_try", "all")
    assert both["source"].tolist() == ["committed", "live"]
    assert both["device"].tolist() == [GPU_A, results.device_name("cpu")]
    assert results.names("committed") == ["03_try"]


def test_a_large_set_is_committed_packed_and_reads_the_same(monkeypatch):
    results.write_rows([row(), row(latency_us=0.1 + 0.2)], "03_try", parameters={})
    plain = results.publish("03_try")
    monkeypatch.setattr(results, "PACKED_FROM", 10)
    packed = results.publish("03_try")
    assert (plain.name, packed.name) == ("03_try.csv", "03_try.csv.gz") and packed.exists() and not plain.exists()
    assert results.names("committed") == ["03_try"]
    live, committed = (results.read_rows("03_try", each).drop(columns="source") for each in ("live", "committed"))
    pd.testing.assert_frame_equal(committed, live)
    assert results.read_provenance("03_try", "committed") == results.read_provenance("03_try")
    packed.write_bytes(packed.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"03_try\.csv\.gz"):
        results.read_rows("03_try", "committed")


def test_edited_rows_are_not_published():
    path = results.write_rows([row()], "03_try", parameters={})
    path.write_text("chunk_size,latency_us,device\n1,1,cpu\n")
    with pytest.raises(ValueError, match="checksum"):
        results.publish("03_try")
    assert not paths.RESULTS.exists()


def test_rows_that_do_not_exist_are_named():
    with pytest.raises(FileNotFoundError, match="03_try"):
        results.read_rows("03_try", "all")


@pytest.mark.parametrize(
    ("rows", "error"),
    [
        ([], ValueError),
        ([{"latency_us": 1.0}], ValueError),
        ([row(source="x")], ValueError),
        ([row(**{"latency us": 1.0})], ValueError),
        ([row(chunks=[1, 2])], TypeError),
        ([row(latency_us=torch.ones(2))], TypeError),
        ([row(device=None)], TypeError),
        ([row(device="")], TypeError),
    ],
    ids=["empty", "no device", "source", "column name", "list", "tensor", "no device name", "blank device"],
)
def test_untidy_rows_are_refused(rows, error):
    with pytest.raises(error):
        results.write_rows(rows, "03_try", parameters={})


@pytest.mark.parametrize("name", ["../03_try", "03 try", "", "03_Try", None])
def test_a_name_that_is_no_plain_stem_is_refused(name):
    with pytest.raises(ValueError, match="name"):
        results.write_rows([row()], name, parameters={})


@pytest.mark.parametrize("parameters", [{"x": float("nan")}, {"x": object()}, [1]], ids=["nan", "object", "list"])
def test_parameters_that_json_cannot_hold_are_refused(parameters):
    with pytest.raises((TypeError, ValueError)):
        results.write_rows([row()], "03_try", parameters=parameters)


def test_evidence_is_filed_under_the_number_of_its_notebook(notebook):
    rows = [evidence(low=4.0, high=5.0, n=30), evidence(quantity="holds", value=True)]
    assert results.write_evidence(rows, "03_try", parameters={}).name == "03_evidence.csv"
    table = results.read_rows("03_evidence")
    assert table["value"].tolist() == [4.4, 1.0]
    assert table["low"].isna().tolist() == [False, True]


@pytest.mark.parametrize(
    "rows",
    [
        [evidence(claim="C1")],
        [evidence(quantity="speed up")],
        [evidence(value=float("nan"))],
        [evidence(low=5.0, high=6.0)],
        [evidence(), evidence()],
        [evidence(verdict="holds")],
        [{"claim": "C01"}],
    ],
    ids=["claim", "quantity", "nan", "interval", "twice", "extra column", "missing column"],
)
def test_malformed_evidence_is_refused(rows, notebook):
    with pytest.raises(ValueError):
        results.write_evidence(rows, "03_try", parameters={})


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A small git repository in the place of the project's."""
    monkeypatch.delenv("COREY_COMMIT", raising=False)
    root = tmp_path / "project"
    (root / "corey").mkdir(parents=True)
    (root / "corey" / "scan.py").write_text("a = 1\n")
    (root / "README.md").write_text("text\n")
    monkeypatch.setattr(paths, "ROOT", root)
    return root


def commit(root):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    for arguments in (["init", "-q"], ["add", "."], [*identity, "commit", "-qm", "x"]):
        subprocess.run(["git", "-C", root, *arguments], check=True)


def test_only_changed_code_makes_rows_dirty(repository):
    commit(repository)
    assert len(results.git_state()["commit"]) == 40 and results.git_state()["dirty"] is False
    (repository / "README.md").write_text("more text\n")
    assert results.git_state()["dirty"] is False
    (repository / "corey" / "scan.py").write_text("a = 2\n")
    assert results.git_state()["dirty"] is True


def test_without_git_the_commit_is_unknown_and_says_so(repository, monkeypatch):
    assert results.git_state()["commit"] == "unknown" and results.git_state()["why_unknown"]
    commit(repository)
    monkeypatch.setattr(results.shutil, "which", lambda _: None)
    assert results.git_state()["commit"] == "unknown"


def test_without_git_the_environment_may_name_the_commit_and_the_record_says_so(repository, monkeypatch):
    told = "0123456789" * 4
    monkeypatch.setenv("COREY_COMMIT", told)
    assert results.git_state() == {"commit": told, "dirty": False, "commit_from_environment": True}
    monkeypatch.setenv("COREY_COMMIT", f"{told}-dirty")
    assert results.git_state() == {"commit": told, "dirty": True, "commit_from_environment": True}
    for wrong in ("", "main", told[:12], f"{told}-clean", told.replace("0", "g")):
        monkeypatch.setenv("COREY_COMMIT", wrong)
        with pytest.raises(ValueError, match="COREY_COMMIT"):
            results.git_state()


def test_git_is_believed_before_the_environment(repository, monkeypatch):
    commit(repository)
    monkeypatch.setenv("COREY_COMMIT", "0" * 40)
    assert results.git_state()["commit"] != "0" * 40 and "commit_from_environment" not in results.git_state()


def test_the_commit_of_another_repository_around_this_one_is_not_taken(repository, monkeypatch):
    commit(repository)
    monkeypatch.setattr(paths, "ROOT", repository / "corey")
    assert results.git_state()["commit"] == "unknown"


def test_the_cpu_has_a_model_and_its_threads():
    assert results.is_cpu(results.device_name("cpu")) and not results.is_cpu(GPU_A)
    with pytest.raises(ValueError, match="device"):
        results.device_name("meta")


@pytest.mark.gpu
def test_the_gpu_has_its_name_and_driver():
    assert results.device_name("cuda") == torch.cuda.get_device_name()
    results.write_rows(pd.DataFrame([row(device="cuda:0")]), "03_try", parameters={})
    gpu = results.read_provenance("03_try")["machine"]["gpu"][0]
    assert gpu["name"] == results.device_name("cuda") and gpu["driver"] and gpu["cuda"] == torch.version.cuda


def run_of_a_grid(tmp_path, name, monkeypatch, **values):
    """Rows that a run left in a folder of its own."""
    folder = tmp_path / name
    monkeypatch.setattr(paths, "LIVE_RESULTS", folder)
    results.write_rows([row(**values)], "03_try_latency", parameters={"seed": 1})
    return folder


def test_rows_of_a_grid_come_together_with_the_provenance_of_every_run(tmp_path, monkeypatch):
    runs = {
        each: (run_of_a_grid(tmp_path, each, monkeypatch, latency_us=value), {"seed": value, "widths": [value]})
        for each, value in (("aa", 1), ("bb", 2))
    }
    path = results.gather(runs, "03_try_latency", tmp_path / "rows", parameters={"grid": "smoke"}, notebook=None)
    table, record = pd.read_csv(path), json.loads(path.with_suffix(".json").read_text())
    assert path.name == "03_try_latency_grid.csv"
    assert table.run.tolist() == ["aa", "bb"] and table.grid_seed.tolist() == table.latency_us.tolist() == [1, 2]
    assert table.grid_widths.tolist() == ["[1]", "[2]"]
    assert {"time_utc", "code", "machine"} <= set(record["runs"]["aa"]) and record["rows"] == 2
    assert results.publish("03_try_latency_grid", tmp_path / "rows").exists()


def test_rows_of_two_gpu_models_do_not_come_together(tmp_path, monkeypatch):
    runs = {each: (run_of_a_grid(tmp_path, each[-4:], monkeypatch, device=each), {}) for each in (GPU_A, GPU_B)}
    with pytest.raises(ValueError, match="want one GPU model"):
        results.gather(runs, "03_try_latency", tmp_path / "rows", parameters={}, notebook=None)
    assert not (tmp_path / "rows").exists()


@pytest.mark.parametrize("part", ["time_utc", "parameters", "code.commit", "versions.torch", "machine.gpu", "machine"])
def test_rows_whose_provenance_lacks_anything_are_refused(part):
    path = results.write_rows([row()], "03_try", parameters={}).with_suffix(".json")
    record = json.loads(path.read_text())
    *outer, key = part.split(".")
    del (record[outer[0]] if outer else record)[key]
    path.write_text(json.dumps(record))
    for refused in (lambda: results.read_rows("03_try"), lambda: results.publish("03_try")):
        with pytest.raises(ValueError, match=f"a record without {key}"):
            refused()


def test_rows_of_unknown_code_are_not_published(monkeypatch):
    monkeypatch.setattr(results, "git_state", lambda: {"commit": "unknown", "dirty": None})
    results.write_rows([row()], "03_try", parameters={})
    with pytest.raises(ValueError, match="commit of 03_try: got unknown"):
        results.publish("03_try")
