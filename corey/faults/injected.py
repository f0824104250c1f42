"""The faults, each injected several times, with what the runner reported and kept."""

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import nbformat
import psutil

from corey.faults.project import NAME, Project, kill, project, wait_for
from corey.paths import ROOT

IN_A_RUN = {  # fault: the state it must get and a part of the reason
    "cell exception": ("failed", "ZeroDivisionError: on demand"),
    "os._exit in a cell": ("killed", "the kernel exited with 0"),
    "SIGKILL of the kernel": ("killed", "SIGKILL"),
    "out of memory": ("failed", "MemoryError"),
    "timeout of a cell": ("timeout", "timed out"),
    "sys.exit(0) in a cell": ("failed", "ended the kernel or raised"),
    "corrupt checkpoint": ("failed", "safetensors cannot read"),
}
TMPFS = "mount -t tmpfs -o size={size} tmpfs {folder} && exec {command}"


def in_runs(times: int) -> list[dict]:
    """Faults inside a notebook, all in one grid beside runs without a fault, which must all be done."""
    with project() as tiny:
        _break_checkpoint(tiny)
        tiny.set_grid([*IN_A_RUN, "none"], times)
        code = tiny.run("--cell-timeout", "20")
        found = []
        for fault, (state, reason) in IN_A_RUN.items():
            good = [_as_wanted(tiny, fault, repeat, state, reason) for repeat in range(times)]
            found.append(
                _row(fault, "in the notebook", times, sum(good), f"{state}: {reason}", "partial notebook, log")
            )
        beside = tiny.states("none").count("done")
        found.append(_row("none, beside all of these", "", times, beside if code == 1 else 0, "done", "everything"))
        return found


def _as_wanted(tiny: Project, fault: str, repeat: int, state: str, reason: str) -> bool:
    """The status says what happened, the partial notebook is kept and does not call later cells completed."""
    folder = tiny.folder_of(fault, repeat)
    status = next(each for each in tiny.statuses() if each["run"] == folder.name)
    partial = nbformat.read(folder / "notebook.failed.ipynb", as_version=4)
    last = partial.cells[-1]
    told = status["state"] == state and reason in status["reason"] and not (folder / "notebook.ipynb").exists()
    return told and last.execution_count is None and last.metadata.papermill.status == "pending"


def full_disk_in_run(times: int) -> list[dict]:
    """A run fills its disk, a tmpfs of 32 MiB for the scratch folder."""
    fault = "full disk under a run"
    with project() as tiny:
        tiny.set_grid([fault], times)
        code = tiny.run(command=_mounted(tiny, "scratch", "32m", "--devices", "cpu"))
        good = sum(_as_wanted(tiny, fault, repeat, "failed", "No space left") for repeat in range(times))
        reported = "failed: OSError: No space left on device"
        return [_row(fault, "tmpfs of 32 MiB", times, good if code == 1 else 0, reported, "partial notebook, log")]


def full_disk_in_runner(times: int) -> list[dict]:
    """The disk of the runner is full, again and again: it says so, and the grid is whole once there is room."""
    with project() as tiny:
        tiny.set_grid(["none"], 1)
        full = [tiny.run(command=_mounted(tiny, "build", "12k")) in (1, 2) for _ in range(times)]
        told = min(sum(full), tiny.output().count("No space left"))
        whole = tiny.run() == 0 and tiny.states("none") == ["done"]
        reported = "broken off or refused: No space left on device"
        return [
            _row(
                "full disk under the runner",
                "tmpfs of 12 KiB",
                times,
                told * whole,
                reported,
                "done once there was room",
            )
        ]


def read_only(times: int) -> list[dict]:
    """The folder for output cannot be written: refused before any run begins."""
    good = 0
    for _ in range(times):
        with project() as tiny:
            tiny.set_grid(["none"], 1)
            build = tiny.folder / "build"
            build.mkdir()
            script = f"mount --bind {build} {build} && mount -o remount,ro,bind {build} && exec {_shell(tiny)}"
            code = tiny.run(command=["unshare", "-rm", "sh", "-c", script])
            good += code == 2 and "Read-only file system" in tiny.output() and not tiny.events()
    reported = "refused: Read-only file system"
    return [_row("read-only output", "bind mount", times, good, reported, "no run had begun")]


def missing_kernel(times: int) -> list[dict]:
    """The kernel cannot start, because its launcher in the notebooks' folder is broken."""
    with project() as tiny:
        tiny.set_grid(["none"], times)
        (tiny.folder / "notebooks" / "ipykernel_launcher.py").write_text("raise ModuleNotFoundError('ipykernel')\n")
        code = tiny.run()
        told = [each for each in tiny.statuses() if each["state"] in ("failed", "killed") and each["attempts"] == 1]
        good = sum("Kernel died" in each["reason"] for each in told) if code == 1 and not tiny.events() else 0
        reported = "failed: Kernel died before replying to kernel_info"
        return [_row("missing kernel", "launcher that raises", times, good, reported, "log")]


def corrupt_input(times: int) -> list[dict]:
    """Notebook or grid cut short, over and over at other places: refused before any run begins."""
    good = 0
    for attempt in range(times):
        with project() as tiny:
            tiny.set_grid(["none"], 1)
            name = f"{NAME}.ipynb" if attempt % 2 == 0 else f"grids/{NAME}.yaml"
            path = tiny.folder / "notebooks" / name
            content = path.read_bytes()
            path.write_bytes(content[: len(content) * (attempt + 2) // (times + 4)] + b"\x00\xff")
            good += tiny.run() == 2 and "refused: " in tiny.output() and not tiny.events()
    return [_row("corrupt input", "notebook or YAML cut short", times, good, "refused", "no run had begun")]


def corrupt_state(times: int) -> list[dict]:
    """Files of a finished grid are torn or edited: those runs are done again, and only those."""
    with project() as tiny:
        tiny.set_grid(["none"], times + 1)
        tiny.run()
        folders = [tiny.folder_of("none", repeat) for repeat in range(times)]
        for repeat, folder in enumerate(folders):
            path = folder / ("status.json" if repeat % 2 else "notebook.ipynb")
            path.write_bytes(path.read_bytes()[: 40 + 31 * repeat])
        code = tiny.run()
        good = sum(tiny.begun(repeat) == 2 for repeat in range(times))
        whole = code == 0 and tiny.begun(times) == 1 and set(tiny.states("none")) == {"done"}
        reported = "done, after being run again"
        return [_row("corrupt state", "files cut short", times, good if whole else 0, reported, "the untouched run")]


def transient(times: int) -> list[dict]:
    """A connection is reset once in every run: tried again, and done."""
    with project() as tiny:
        tiny.set_grid(["transient"], times)
        code = tiny.run()
        good = sum(each["state"] == "done" and each["attempts"] == 2 for each in tiny.statuses())
        return [_row("transient fault", "ConnectionResetError once", times, good * (code == 0), "done, attempt 2", "")]


def runner_ended(times: int, signum: signal.Signals) -> list[dict]:
    """The runner gets a signal while runs are under way, and again when it continues; then the grid is finished."""
    good, wanted = 0, -signum if signum == signal.SIGKILL else 128 + signum
    with project() as tiny:
        tiny.set_grid(["none"], 3, work_s=15)
        for _ in range(times):
            before = len(tiny.events())
            runner = tiny.start()
            wait_for(lambda before=before: len(tiny.events()) > before)
            begun = {event["repeat"] for event in tiny.events()[before:]}
            runner.send_signal(signum)
            ended = runner.wait(60) == wanted and "done" not in tiny.states("none")
            partial = [(tiny.folder_of("none", each) / "notebook.failed.ipynb").exists() for each in begun]
            wait_for(lambda: not tiny.all_processes(), 60)  # no orphan: no worker, no run, no kernel
            good += ended and (signum == signal.SIGKILL or all(partial))
        whole = tiny.run() == 0 and tiny.states("none") == ["done"] * 3
    kept = "partial notebooks of the runs under way" if signum == signal.SIGTERM else "what was done"
    reported = "exit code 143; killed" if signum == signal.SIGTERM else "nothing; running until continued"
    return [_row(f"{signum.name} of the runner", "kill", times, good * whole, reported, kept)]


def worker_killed(times: int) -> list[dict]:
    """Workers are killed while their runs are under way: Dask starts them anew, and the runs are done."""
    killed = []  # runs whose worker was, each once
    with project() as tiny:

        def under_way():
            begun = [event for event in tiny.events() if event["event"] == "begin"]
            return [each for each in begun if each["repeat"] not in killed and psutil.pid_exists(each["pid"])]

        tiny.set_grid(["none"], times, work_s=8)
        runner = tiny.start()
        for _ in range(times):
            wait_for(under_way)
            run = under_way()[0]
            killed.append(run["repeat"])
            kill(_worker_of(run["pid"]))
        code = runner.wait(600)
        good = tiny.states("none").count("done") if code == 0 else 0
        return [_row("worker killed", "kill -9", times, good, "done, on another worker", "runs of the other device")]


def _worker_of(kernel: int) -> psutil.Process:
    """The Dask worker above a kernel, and above the process of its run."""
    return next(each for each in psutil.Process(kernel).parents() if "spawn_main" in " ".join(each.cmdline()))


def scheduler_killed(times: int) -> list[dict]:
    """The scheduler of a cluster is killed, and that of the next: the runner says which runs are lost."""
    good = 0
    with project() as tiny:
        tiny.set_grid(["none"], 2, work_s=8)
        for attempt in range(times):
            scheduler, address = start_scheduler(tiny, f"scheduler{attempt}.json")
            start_box(tiny, address, "cpu", scratch=tiny.folder / f"box{attempt}")
            before, told = len(tiny.events()), tiny.output().count("lost with the scheduler")
            runner = tiny.start("--scheduler", address)
            wait_for(lambda before=before: "begin" in {event["event"] for event in tiny.events()[before:]})
            kill(scheduler)
            good += runner.wait(180) == 1 and tiny.output().count("lost with the scheduler") > told
        whole = tiny.run() == 0 and tiny.states("none") == ["done"] * 2
    return [
        _row("scheduler killed", "kill -9", times, good * whole, "exit code 1; killed: lost", "runs that were done")
    ]


def box_lost(times: int) -> list[dict]:
    """A box of two workers goes at once, with its runs: another box takes them over."""
    good = 0
    with project() as tiny:
        _, address = start_scheduler(tiny, "scheduler.json")
        start_box(tiny, address, "cpu")
        for attempt in range(times):
            before = len(tiny.events())
            tiny.set_grid(["none"], 3 + attempt, work_s=3 + attempt / 100)
            box = start_box(tiny, address, "cpu,cpu", scratch=tiny.folder / f"box{attempt}")
            runner = tiny.start("--scheduler", address)
            wait_for(lambda before=before: len(tiny.events()) >= before + 3)
            _kill_box(tiny, box, tiny.folder / f"box{attempt}")
            good += runner.wait(300) == 0 and set(tiny.states("none")) == {"done"}
    return [_row("box lost", "kill -9 of all its processes", times, good, "done, on another box", "what had ended")]


def start_scheduler(tiny: Project, name: str) -> tuple[subprocess.Popen, str]:
    """A Dask scheduler of its own on this machine, and its address, which it writes to the file `name`."""
    told = tiny.folder / name
    command = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", "0"]
    process = tiny.start(command=[*command, "--no-dashboard", "--scheduler-file", str(told)])
    wait_for(lambda: told.exists() and told.read_text().rstrip().endswith("}"))
    return process, json.loads(told.read_text())["address"]


def start_box(tiny: Project, address: str, wanted: str, scratch: Path | None = None) -> subprocess.Popen:
    """Workers as `make worker` starts them; with a scratch folder of its own they are another box."""
    command = [sys.executable, "-m", "corey.grid", "worker", address, "--devices", wanted]
    before = tiny.output().count("serving ") if (tiny.folder / "runner.txt").exists() else 0
    process = tiny.start(command=command, **({"COREY_SCRATCH": str(scratch)} if scratch else {}))
    wait_for(lambda: tiny.output().count("serving ") > before)
    return process


def _kill_box(tiny: Project, box: subprocess.Popen, scratch: Path) -> None:
    kill(box)
    for process in tiny.all_processes(str(scratch)):
        kill(process)


def _mounted(tiny: Project, name: str, size: str, *arguments: str) -> list[str]:
    """The runner's command with one of the project's folders on a small tmpfs, in a mount namespace of its own."""
    folder = tiny.folder / name
    folder.mkdir(exist_ok=True)
    return ["unshare", "-rm", "sh", "-c", TMPFS.format(size=size, folder=folder, command=_shell(tiny, *arguments))]


def _shell(tiny: Project, *arguments: str) -> str:
    return " ".join(tiny.command(*arguments))  # no word of it has a character that a shell would read


def _break_checkpoint(tiny: Project) -> None:
    """corey-mini with the last half of its weights cut off."""
    folder = shutil.copytree(ROOT / "data" / "checkpoints" / "corey-mini", tiny.folder / "broken-checkpoint")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])


def _row(fault: str, injected: str, times: int, good: int, reported: str, kept: str) -> dict:
    return {
        "fault": fault,
        "injected": injected,
        "times": times,
        "as_wanted": int(good),
        "reported": reported,
        "kept": kept,
    }


FAULTS: dict[str, Callable[[int], list[dict]]] = {
    "in runs": in_runs,
    "full disk under a run": full_disk_in_run,
    "full disk under the runner": full_disk_in_runner,
    "read-only output": read_only,
    "missing kernel": missing_kernel,
    "corrupt input": corrupt_input,
    "corrupt state": corrupt_state,
    "transient fault": transient,
    "SIGTERM of the runner": lambda times: runner_ended(times, signal.SIGTERM),
    "SIGKILL of the runner": lambda times: runner_ended(times, signal.SIGKILL),
    "worker killed": worker_killed,
    "scheduler killed": scheduler_killed,
    "box lost": box_lost,
}
