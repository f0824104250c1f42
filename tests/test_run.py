"""The runner tells the truth about a run, whatever the notebook does."""

import json
import os
import subprocess
import sys
import time

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from corey import paths, run

PARAMETERS = """seed: int = 7  # seed
rate: float = 0.5  # a float
task: str = "qasper"  # a string
fast: bool = True  # a flag
chunk_sizes: list[int] = [128, 256]  # a list"""


@pytest.fixture(autouse=True)
def project(tmp_path, monkeypatch):
    """A project of its own, so that no test runs or writes the real one."""
    for name in ("NOTEBOOKS", "BUILD"):
        monkeypatch.setattr(paths, name, tmp_path / name.lower())
        (tmp_path / name.lower()).mkdir()
    monkeypatch.setattr(paths, "GRIDS", tmp_path / "notebooks" / "grids")
    paths.GRIDS.mkdir()
    return tmp_path


def notebook(*sources, name="03_try"):
    cells = [new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}), *map(new_code_cell, sources)]
    path = paths.NOTEBOOKS / f"{name}.ipynb"
    nbformat.write(new_notebook(cells=[new_markdown_cell("text"), *cells]), path)
    return path


def output(name):
    return paths.BUILD / "notebooks" / f"{name}.ipynb"


def fail(*sources):
    notebook(*sources)
    with pytest.raises(run.NotebookFailed) as caught:
        run.run_notebook("03_try", {})
    assert not output("03_try").exists()
    assert caught.value.partial == output("03_try.failed")
    assert [each.name for each in output("03_try").parent.iterdir()] == ["03_try.failed.ipynb"]  # no scratch file left
    return nbformat.read(caught.value.partial, as_version=4), caught.value.reason


@pytest.fixture
def no_kernel(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a kernel was started")

    monkeypatch.setattr(run, "_execute", refuse)


def test_a_run_gets_its_parameters_and_this_interpreter_and_replaces_what_failed_before():
    notebook("import sys; print(sys.executable, seed, rate, repr(task), fast, chunk_sizes)")
    output("03_try").parent.mkdir()
    output("03_try.failed").write_text("{}")
    code = "'; import os; os._exit(1) #\"\n\\"
    done = run.run_notebook("03_try", {"seed": 8, "rate": 1, "task": code, "fast": False, "chunk_sizes": [512]})
    text = nbformat.read(done.out, as_version=4).cells[-1].outputs[0].text
    assert text == f"{sys.executable} 8 1 {code!r} False [512]\n"
    assert [each.name for each in done.out.parent.iterdir()] == ["03_try.ipynb"]


def test_a_cell_that_raises_fails_the_run_and_keeps_what_was_executed():
    partial, reason = fail("print('before')", "1 / 0", "print('after')")
    assert reason.endswith("raised ZeroDivisionError: division by zero")
    assert any(each.get("outputs") and each.outputs[0].get("text") == "before\n" for each in partial.cells)
    assert partial.metadata.corey.status == "failed"


@pytest.mark.parametrize(
    "sources", [("import sys; sys.exit(0)", "1"), ("import sys; sys.exit(0)",)], ids=["mid", "last"]
)
def test_sys_exit_zero_is_a_failure(sources):
    _, reason = fail(*sources)
    assert "ended the kernel" in reason


def test_a_killed_kernel_is_a_failure_and_the_cells_after_it_are_pending():
    partial, reason = fail("import os; os._exit(0)", "print('after')")
    assert "DeadKernelError" in reason
    assert partial.cells[-1].metadata.papermill.status == "pending"
    assert partial.metadata.papermill.exception is True


def test_a_cell_that_takes_too_long_ends_the_run():
    notebook("import time; time.sleep(60)", "print('after')")
    with pytest.raises(run.NotebookFailed, match="timed out while it was being executed, after 1 seconds"):
        run.run_notebook("03_try", {}, cell_timeout_s=1)
    partial = nbformat.read(output("03_try.failed"), as_version=4)
    assert partial.metadata.corey.status == "timeout"
    assert partial.cells[-1].metadata.papermill.status == "pending"


def test_a_kernel_that_was_killed_is_told_by_its_signal():
    partial, reason = fail("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    assert reason.endswith("DeadKernelError: the kernel SIGKILL")
    assert partial.metadata.corey.status == "killed"


def test_the_kernel_is_reached_through_private_sockets_only():
    notebook(
        "import json, os; from ipykernel.connect import get_connection_file; path = get_connection_file();"
        "told = json.load(open(path)); sockets = [each for each in os.listdir(os.path.dirname(path)) if 'ipc' in each];"
        "print(told['transport'], len(sockets), oct(os.stat(os.path.dirname(path)).st_mode & 0o777))"
    )
    done = run.run_notebook("03_try", {})
    assert nbformat.read(done.out, as_version=4).cells[-1].outputs[0].text == "ipc 5 0o700\n"


def test_sockets_find_a_short_folder_where_the_temporary_one_is_long(project, monkeypatch):
    long = project / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    notebook("print(1)")
    assert run.run_notebook("03_try", {}).out.exists()


def test_a_write_that_fails_leaves_the_last_whole_notebook(project, monkeypatch):
    path = project / "x.ipynb"
    run._WholeNotebooks().write("{}", str(path))
    monkeypatch.setattr("os.fsync", lambda handle: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run._WholeNotebooks().write('{"torn": ', str(path))
    assert path.read_text() == "{}" and [each.name for each in project.glob("*.ipynb*")] == ["x.ipynb"]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"[" * 100_000, b'{"nbformat": 4}', b"\xff\xfe"])
def test_a_notebook_that_is_none_is_refused(content, no_kernel):
    notebook().write_bytes(content)
    with pytest.raises(ValueError, match=r"03_try\.ipynb: got"):
        run.run_notebook("03_try", {})


def test_a_skipped_cell_is_a_failure():
    path = notebook("print('skipped')")
    content = nbformat.read(path, as_version=4)
    content.cells[-1].metadata.tags = ["skip-execution"]
    nbformat.write(content, path)
    with pytest.raises(run.NotebookFailed, match="cell 3 was not executed"):
        run.run_notebook("03_try", {})


@pytest.mark.parametrize(
    ("parameters", "error", "text"),
    [
        ({"sed": 8}, ValueError, "sed"),
        ({"seed": "8"}, TypeError, "parameter seed: got str"),
        ({"seed": True}, TypeError, "parameter seed: got bool"),
        ({"seed": 1.0}, TypeError, "parameter seed: got float"),
        ({"rate": "1e5"}, TypeError, "parameter rate: got str"),
        ({"fast": 1}, TypeError, "parameter fast: got int"),
        ({"chunk_sizes": "[1, 2]"}, TypeError, "parameter chunk_sizes: got str"),
        ({"chunk_sizes": [1, "2"]}, TypeError, "parameter chunk_sizes: got list"),
        ({"seed = 1\nimport os": 1}, ValueError, "a Python identifier"),
        ({"import": 1}, ValueError, "a Python identifier"),
        ({1: 1}, ValueError, "a Python identifier"),
        ([("seed", 1)], TypeError, "parameters: got list"),
    ],
    ids=lambda value: repr(value)[:30] if isinstance(value, (dict, list)) else None,
)
def test_wrong_parameters_are_refused_before_a_kernel_starts(parameters, error, text, no_kernel):
    notebook()
    with pytest.raises(error, match=text):
        run.run_notebook("03_try", parameters)


def test_a_parameter_without_annotation_is_refused(no_kernel):
    path = notebook()
    content = nbformat.read(path, as_version=4)
    content.cells[1].source = "seed = 7  # no type"
    nbformat.write(content, path)
    with pytest.raises(ValueError, match="annotation"):
        run.run_notebook("03_try", {"seed": 8})


@pytest.mark.parametrize("name", ["../03_try", "/etc/passwd", "a/b", "03_try.ipynb", "https://x/y", "", "{seed}"])
def test_a_name_that_leaves_the_notebooks_is_refused(name, no_kernel):
    notebook()
    with pytest.raises(ValueError, match="name"):
        run.run_notebook(name, {})


def test_a_link_out_of_the_notebooks_is_refused(project, no_kernel):
    outside = project / "outside.ipynb"
    nbformat.write(new_notebook(), outside)
    (paths.NOTEBOOKS / "03_link.ipynb").symlink_to(outside)
    with pytest.raises(ValueError, match="does not lead out"):
        run.run_notebook("03_link", {})


def test_a_missing_notebook_is_refused_with_those_there_are(no_kernel):
    notebook()
    with pytest.raises(FileNotFoundError, match="03_try"):
        run.run_notebook("04_missing", {})


@pytest.mark.parametrize("out", ["https://host/x.ipynb", "s3://bucket/x.ipynb", "x.txt", "{seed}.ipynb", "inside"])
def test_an_output_that_is_no_local_notebook_is_refused(out, no_kernel):
    notebook()
    with pytest.raises(ValueError, match="out: got"):
        run.run_notebook("03_try", {}, out=paths.NOTEBOOKS / "03_try.ipynb" if out == "inside" else out)


def test_the_command_line_merges_preset_file_and_settings(project, monkeypatch):
    notebook()
    (paths.GRIDS / "03_try.yaml").write_text("laptop: {seed: 1, rate: 0.1, fast: true}\npaper: {seed: 2}\n")
    (project / "more.yaml").write_text("rate: 0.2\nfast: false\n")
    seen = []
    monkeypatch.setattr(run, "_execute", lambda notebook, scratch, parameters, cell_timeout_s: seen.append(parameters))
    arguments = [
        "03_try",
        "--preset",
        "laptop",
        "--parameters",
        str(project / "more.yaml"),
        "--set",
        "chunk_sizes=[64]",
    ]
    assert run.main([*arguments, "--set", "rate=0.3"]) == 0
    assert seen == [{"seed": 1, "rate": 0.3, "fast": False, "chunk_sizes": [64]}]


@pytest.mark.parametrize(
    "arguments",
    [
        ["03_try", "--set", "sed=1"],
        ["03_try", "--set", "seed=[1"],
        ["03_try", "--set", "task=!!python/object/apply:os.getcwd []"],
        ["03_try", "--preset", "paper"],
        ["04_missing"],
    ],
    ids=["unknown", "broken yaml", "yaml object", "no grid", "no notebook"],
)
def test_the_command_line_refuses_with_exit_code_2(arguments, no_kernel, capsys):
    notebook()
    assert run.main(arguments) == 2
    assert capsys.readouterr().err.startswith("refused: ")


def elsewhere():
    """The start of a command that runs `python -m corey.run` on this test's project."""
    start = (
        "import pathlib, runpy, sys; from corey import paths;"
        "paths.NOTEBOOKS, paths.BUILD = map(pathlib.Path, sys.argv[1:3]); del sys.argv[1:3];"
        "runpy.run_module('corey.run', run_name='__main__')"
    )
    return [sys.executable, "-c", start, str(paths.NOTEBOOKS), str(paths.BUILD)]


def test_a_terminated_run_keeps_its_partial_notebook_and_leaves_no_kernel(project):
    marker = project / "kernel"
    notebook(f"import os, pathlib, time; pathlib.Path({str(marker)!r}).write_text(str(os.getpid())); time.sleep(100)")
    process = subprocess.Popen([*elsewhere(), "03_try"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (marker.exists() and marker.read_text()) and process.poll() is None:
        time.sleep(0.1)
    process.terminate()
    assert process.wait(timeout=20) == 143
    assert [each.name for each in output("03_try").parent.iterdir()] == ["03_try.failed.ipynb"]
    with pytest.raises(ProcessLookupError):
        os.kill(int(marker.read_text()), 0)


def test_a_tied_run_ends_with_whoever_started_it(project):
    marker = project / "kernel"
    notebook(f"import pathlib, time; pathlib.Path({str(marker)!r}).write_text('here'); time.sleep(100)")
    process = subprocess.Popen([*elsewhere(), "03_try", "--tied"], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL)
    while not marker.exists() and process.poll() is None:
        time.sleep(0.1)
    process.stdin.close()
    assert process.wait(timeout=20) == 143
    assert output("03_try.failed").exists()


def test_the_command_line_is_truthful_in_an_empty_home_with_a_foreign_kernelspec(project):
    """Users often have a `python3` kernel of another environment; a run must not use it."""
    spec = project / "home" / ".local" / "share" / "jupyter" / "kernels" / "python3"
    spec.mkdir(parents=True)
    (spec / "kernel.json").write_text(
        json.dumps({"argv": ["/bin/false"], "display_name": "other", "language": "python"})
    )
    notebook("import sys; sys.exit(3) if seed else print(sys.executable)")
    command = [*elsewhere(), "03_try", "--set"]
    environment = os.environ | {"HOME": str(project / "home"), "JUPYTER_PREFER_ENV_PATH": "0"}
    good = subprocess.run([*command, "seed=0"], env=environment, capture_output=True, text=True)
    assert good.returncode == 0, good.stderr
    assert sys.executable in good.stderr + good.stdout
    bad = subprocess.run([*command, "seed=1"], env=environment, capture_output=True, text=True)
    assert bad.returncode == 1
    assert "raised SystemExit: 3" in bad.stderr
