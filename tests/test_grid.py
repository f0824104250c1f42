"""A grid crosses lists, knows again what is done, and tells the truth about the rest."""

import json
import signal
import time

import nbformat
import pandas as pd
import pytest
from distributed import Client, get_worker

from corey import grid, grid_points, grid_worker, paths, supervisor
from corey.faults import hostile
from corey.faults.injected import start_box, start_scheduler
from corey.faults.kills import KillPoints, overlaps
from corey.faults.project import NAME, kill, project, wait_for
from corey.run_folder import RunFolder
from corey.supervisor import Outcome


@pytest.fixture
def tiny(monkeypatch):
    """A project whose notebook fails on demand; this process sees it as well."""
    with project() as made:
        monkeypatch.setattr(paths, "NOTEBOOKS", made.folder / "notebooks")
        monkeypatch.setattr(paths, "GRIDS", made.folder / "notebooks" / "grids")
        monkeypatch.setenv("COREY_SCRATCH", made.environment["COREY_SCRATCH"])
        yield made


def write_grid(text):
    (paths.GRIDS / f"{NAME}.yaml").write_text(text)


def test_lists_are_crossed_over_the_preset_in_the_order_of_the_file(tiny):
    write_grid("laptop: {work_s: 0.5}\npaper: {}\ngrid: {smoke: {fault: [a, b], repeat: [1, 2]}}")
    points = grid_points.expand(NAME, "smoke")
    assert [crossed for _, crossed in points] == [
        {"fault": "a", "repeat": 1},
        {"fault": "a", "repeat": 2},
        {"fault": "b", "repeat": 1},
        {"fault": "b", "repeat": 2},
    ]
    assert points[0][0] == {"work_s": 0.5, "fault": "a", "repeat": 1}


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("laptop: {}", "grid of 90_tiny: got None"),
        ("laptop: {}\ngrid: {smoke: {}}", "grid of 90_tiny"),
        ("laptop: {}\ngrid: {smoke: {repeat: []}}", "repeat: got list"),
        ("laptop: {}\ngrid: {smoke: {repeat: [1, 1]}}", "the same run twice"),
        ("laptop: {}\ngrid: {smoke: {repeat: [a]}}", "parameter repeat: got str"),
        ("laptop: {}\ngrid: {smoke: {reapet: [1]}}", "got 'reapet'"),
        ("grid: {smoke: {repeat: [1]}}", "preset: got 'laptop'"),
    ],
)
def test_a_grid_that_cannot_be_meant_is_refused(text, error, tiny):
    write_grid(text)
    with pytest.raises((TypeError, ValueError), match=error):
        grid_points.expand(NAME, "smoke")


def identity(parameters):
    return grid_points.identity(NAME, parameters, grid_points.surroundings(NAME))


def test_an_identity_changes_with_all_that_a_number_depends_on_and_nothing_else(tiny):
    data = tiny.folder / "model" / "weights"
    data.parent.mkdir()
    data.write_bytes(b"1")
    parameters = {"repeat": 1, "journal": str(data.parent)}
    first = identity(parameters)
    assert identity(dict(reversed(parameters.items()))) == first
    assert identity(parameters | {"repeat": 2}) != first
    data.write_bytes(b"2")
    assert identity(parameters) != first
    data.write_bytes(b"1")
    assert identity(parameters) == first
    path = paths.NOTEBOOKS / f"{NAME}.ipynb"
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[-1].source += "  # changed"
    nbformat.write(notebook, path)
    assert identity(parameters) != first


@pytest.fixture
def folder(tmp_path):
    made = RunFolder(tmp_path, "0123456789abcdef", {"seed": 1}, {})
    made.keep(Outcome("done", "", files={"notebook.ipynb": b"{}", "figures/x.png": b"png"}))
    return made


def test_a_run_is_done_only_while_its_files_are_what_its_status_says(folder):
    assert folder.done() and folder.status()["state"] == "done"
    (folder.path / "figures" / "x.png").write_bytes(b"PNG")
    assert not folder.done()


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"state": "done"}', b'{"state": "done", "files": {"../x": ""}}']
)
def test_a_status_that_is_torn_or_made_up_is_not_done(content, folder):
    (folder.path / "status.json").write_bytes(content)
    assert not folder.done()


def test_a_crash_while_outputs_are_written_leaves_a_run_that_is_not_done(folder, monkeypatch):
    def crash(path, content):
        raise OSError("no space left")

    monkeypatch.setattr("corey.run_folder.write_atomically", crash)
    with pytest.raises(OSError):
        folder.keep(Outcome("done", "", files={"notebook.ipynb": b"{2}"}))
    assert not folder.done()


def test_a_run_that_has_ended_stays_so_when_dask_begins_it_again(tmp_path):
    made = RunFolder(tmp_path, "0123456789abcdef", {}, {})
    collector = grid._Collector(None, {made.run: made})
    began = (0, {"run": made.run, "device": "cpu:0"})
    with Client(processes=False, n_workers=1, dashboard_address=None) as client:
        collector._note(began)
        assert made.status()["state"] == "running"
        ended = client.submit(Outcome, "done", "")
        ended.result()
        collector._keep(ended, supervisor.Task(made.run, "", NAME, {}, {}, 1, 1))
    collector._note(began)
    assert made.done()


def test_no_run_waits_with_a_busy_worker_while_another_has_nothing_to_do(tmp_path, monkeypatch):
    def sleep(task):
        time.sleep(task.parameters["work_s"])
        return Outcome("done", "", device=get_worker().address)

    monkeypatch.setattr(grid, "run_task", sleep)
    tasks = [
        supervisor.Task(f"{number:016x}", "0123456789abcdef", NAME, {"work_s": work_s}, {}, 9, 9)
        for number, work_s in enumerate((4, 5.5, 3, 3))
    ]
    folders = {task.run: RunFolder(tmp_path, task.run, {}, {}) for task in tasks}
    with Client(processes=False, n_workers=2, threads_per_worker=1, dashboard_address=None) as client:
        grid._Collector(client, folders).collect(tasks)
    where = [folder.status()["device"] for folder in folders.values()]
    assert where[0] != where[1] and where[2] != where[3]


def test_rows_without_provenance_make_a_run_a_failed_one(folder):
    kept = folder.keep(Outcome("done", "", files={"notebook.ipynb": b"{}", "results/x.csv": b"device\ncpu\n"}))
    assert kept.state == folder.status()["state"] == "failed"
    assert "no provenance" in folder.status()["reason"]


@pytest.mark.parametrize(
    ("state", "reason", "exception", "wanted"),
    [
        ("failed", "cell 2 raised RuntimeError: CUDA driver initialization failed", "RuntimeError", True),
        ("failed", "cell 2 raised ConnectionResetError: x", "ConnectionResetError", True),
        ("failed", "cell 2 raised AssertionError: CUDA initialization took 3 s", "AssertionError", False),
        ("failed", "cell 2 raised ValueError: got nan", "ValueError", False),
        ("killed", "DeadKernelError: the kernel SIGKILL", "DeadKernelError", False),
        ("timeout", "ConnectionError: x", "ConnectionError", False),
    ],
)
def test_only_faults_that_may_pass_are_tried_again(state, reason, exception, wanted):
    assert Outcome(state, reason, exception=exception).transient() is wanted


def test_a_notebook_sees_no_secret_of_the_environment():
    told = {"PATH": "/bin", "HF_HOME": "/x", "HF_TOKEN": "x", "AWS_SECRET_ACCESS_KEY": "x", "COREY_BUILD": "/b"}
    assert set(supervisor.passed_on(told)) == {"PATH", "HF_HOME", "COREY_BUILD"}


def test_a_box_with_other_code_refuses_a_run(tiny):
    code = grid_points.surroundings(NAME)["code"] | {"kernels_sha256": "0" * 64}
    task = supervisor.Task("0123456789abcdef", "g", NAME, {}, code, 60, 60)
    outcome = supervisor.supervise(task, "cpu:0")
    assert outcome.state == "failed" and "kernels_sha256: got other code" in outcome.reason


def test_two_fake_devices_run_a_grid_and_its_faults_and_only_the_rest_again(tiny):
    """What `make grid DEVICES=cpu,cpu` does, with a notebook of a second."""
    tiny.set_grid(["rows", "cell exception", "os._exit in a cell", "transient"], 2)
    assert tiny.run() == 1
    states = {fault: tiny.states(fault) for fault in ("rows", "cell exception", "os._exit in a cell", "transient")}
    assert states == {
        "rows": ["done"] * 2,
        "cell exception": ["failed"] * 2,
        "os._exit in a cell": ["killed"] * 2,
        "transient": ["done"] * 2,
    }
    assert {event["device"] for event in tiny.events()} == {"cpu:0", "cpu:1"} and not overlaps(tiny.events())
    assert (tiny.folder_of("cell exception", 0) / "notebook.failed.ipynb").exists()
    wait_for(lambda: not tiny.all_processes(), 20)
    begun = len(tiny.events())
    tiny.set_grid(["rows", "transient"], 2)
    assert tiny.run() == 0
    assert len(tiny.events()) == begun  # all skipped
    rows = pd.read_csv(tiny.root() / "rows" / f"{NAME}_grid.csv")
    assert list(rows.columns) == ["run", "grid_fault", "grid_repeat", "repeat", "device"]
    assert rows.repeat.tolist() == rows.grid_repeat.tolist() == [0, 1]
    record = json.loads((tiny.root() / "rows" / f"{NAME}_grid.json").read_text())
    assert set(record["runs"]) == set(rows.run) and record["notebook"] == NAME


def test_a_runner_that_is_terminated_keeps_partial_notebooks_and_leaves_no_process(tiny):
    tiny.set_grid(["none"], 3, work_s=60)
    runner = tiny.start()
    wait_for(lambda: len(tiny.events()) == 2)
    runner.send_signal(signal.SIGTERM)
    assert runner.wait(60) == 143
    assert sorted(tiny.states("none")) == ["killed", "killed", "queued"]
    partial = [repeat for repeat in range(3) if tiny.begun(repeat)]
    assert all((tiny.folder_of("none", each) / "notebook.failed.ipynb").exists() for each in partial)
    wait_for(lambda: not tiny.all_processes(), 20)


def test_a_grid_goes_on_on_another_box_and_says_when_the_scheduler_is_gone(tiny):
    tiny.set_grid(["none"], 3, work_s=3)
    scheduler, address = start_scheduler(tiny, "scheduler.json")
    box = start_box(tiny, address, "cpu", scratch=tiny.folder / "lost")
    runner = tiny.start("--scheduler", address)
    wait_for(tiny.events)
    kill(box)
    for process in tiny.all_processes(str(tiny.folder / "lost")):
        kill(process)
    start_box(tiny, address, "cpu")
    wait_for(lambda: "done" in tiny.states("none"))
    kill(scheduler)
    assert runner.wait(60) == 1
    assert "done" in tiny.states("none") and "lost with" in tiny.output()


def test_random_kills_leave_nothing_torn_lost_or_run_twice():
    table = KillPoints(seed=3).make(4)
    assert table.kills["all"] >= 4
    assert table.loc["all", ["torn", "lost", "run_twice", "beyond"]].sum() == 0


def test_an_overlap_on_a_device_is_noticed():
    def event(kind, pid, device="cpu:0"):
        return {"event": kind, "pid": pid, "device": device}

    assert overlaps([event("begin", 1), event("begin", 2, "cpu:1"), event("end", 1), event("end", 2, "cpu:1")]) == 0
    assert overlaps([event("begin", 1), event("begin", 2), event("end", 1), event("end", 2)]) == 1


def test_no_hostile_input_succeeds():
    table = hostile.try_all()
    assert len(table) >= 40
    assert table[table.succeeded].empty


def test_a_hostile_input_that_is_accepted_is_noticed(tiny):
    assert hostile._try(tiny, "name", "accepted", lambda: None)["succeeded"]

    def escape():
        (tiny.folder / "canary").touch()
        raise ValueError("refused, but too late")

    assert hostile._try(tiny, "name", "escaped", escape)["succeeded"]


def test_two_runners_do_not_write_one_grid(tiny):
    tiny.set_grid(["none"], 1, work_s=60)
    first = tiny.start()
    wait_for(tiny.events)
    assert tiny.run() == 2
    assert "another runner at work" in tiny.output()
    first.terminate()
    first.wait(60)


def test_a_worker_of_a_batch_system_takes_the_one_device_it_sees(monkeypatch):
    monkeypatch.delenv("COREY_DEVICE", raising=False)
    monkeypatch.setattr("corey.devices.visible", lambda: ["GPU-1"])
    assert grid_worker.own_device() == "GPU-1"
    monkeypatch.setattr("corey.devices.visible", lambda: ["GPU-1", "GPU-2"])
    with pytest.raises(ValueError, match="devices of a worker"):
        grid_worker.own_device()
