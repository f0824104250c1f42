"""A project of its own in a temporary folder: a tiny notebook that can fail on demand, its grid, and runners of it.

The notebook writes a line to a journal when it begins and one when it ends, so that what was really run is known
without asking the runner.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import nbformat
import psutil
import yaml
from nbformat.v4 import new_code_cell, new_notebook

from corey.paths import ROOT

NAME = "90_tiny"
PARAMETERS = """fault: str = "none"  # what goes wrong in the third cell
repeat: int = 0  # runs that differ in nothing else
work_s: float = 0.1  # how long the third cell takes"""
CELLS = (
    """import json, os, resource, signal, sys, time

journal = os.path.dirname(os.environ["COREY_NOTEBOOKS"]) + "/journal.jsonl"

def note(event):
    line = {"event": event, "repeat": repeat, "fault": fault, "device": os.environ["COREY_DEVICE"], "pid": os.getpid()}
    with open(journal, "a") as file:
        file.write(json.dumps(line) + "\\n")

note("begin")""",
    """time.sleep(work_s)
if fault == "cell exception":
    raise ZeroDivisionError("on demand")
if fault == "os._exit in a cell":
    os._exit(0)
if fault == "SIGKILL of the kernel":
    os.kill(os.getpid(), signal.SIGKILL)
if fault == "out of memory":
    resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
    bytearray(4 << 30)
if fault == "timeout of a cell":
    time.sleep(600)
if fault == "sys.exit(0) in a cell":
    sys.exit(0)
if fault == "full disk under a run":
    open(os.environ["COREY_RUN_DIR"] + "/filling", "wb").write(bytes(64 << 20))
if fault == "corrupt checkpoint":
    from corey.mamba_weights import load_mamba
    load_mamba(os.path.dirname(journal) + "/broken-checkpoint")
if fault == "rows":
    from corey import results
    parameters = {"repeat": repeat}
    results.write_rows([{"repeat": repeat, "device": "cpu"}], "90_tiny", parameters=parameters, notebook="90_tiny")
if fault == "transient" and not os.path.exists(f"{journal}.{repeat}"):
    open(f"{journal}.{repeat}", "w").close()
    raise ConnectionResetError("on demand")""",
    """note("end")""",
)


class Project:
    """Notebooks, build folder, scratch folder and journal of one experiment."""

    def __init__(self, folder: Path):
        self.folder, self.journal = folder, folder / "journal.jsonl"
        (folder / "notebooks" / "grids").mkdir(parents=True)
        self.environment = {key: value for key, value in os.environ.items() if not key.startswith("COREY_")}
        self.environment |= {"PYTHONPATH": str(ROOT), "COREY_NOTEBOOKS": str(folder / "notebooks")}
        self.environment |= {"COREY_BUILD": str(folder / "build"), "COREY_SCRATCH": str(folder / "scratch")}
        cells = [new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}), *map(new_code_cell, CELLS)]
        nbformat.write(new_notebook(cells=cells), folder / "notebooks" / f"{NAME}.ipynb")

    def set_grid(self, faults: list[str], repeats: int, *, work_s: float = 0.1) -> None:
        """The runs: every fault, `repeats` times."""
        smoke = {"fault": faults, "repeat": list(range(repeats))}
        preset = {"work_s": work_s}
        content = {"laptop": preset, "paper": preset, "grid": {"smoke": smoke}}
        (self.folder / "notebooks" / "grids" / f"{NAME}.yaml").write_text(yaml.safe_dump(content))

    def command(self, *arguments: str) -> list[str]:
        """The runner's command line, on two fake devices unless arguments say otherwise."""
        where = [] if "--scheduler" in arguments else ["--devices", "cpu,cpu"]
        return [sys.executable, "-m", "corey.grid", "run", NAME, *where, *arguments]

    def start(self, *arguments: str, command: list[str] | None = None, **more) -> subprocess.Popen:
        """Start a runner; its output goes to runner.txt."""
        with open(self.folder / "runner.txt", "ab") as output:
            return subprocess.Popen(
                command or self.command(*arguments),
                env=self.environment | more,
                stdout=output,
                stderr=output,
                cwd=ROOT,
                start_new_session=True,
            )

    def run(self, *arguments: str, command: list[str] | None = None, timeout_s: float = 900) -> int:
        """Run a runner to its end; its exit code."""
        return self.start(*arguments, command=command).wait(timeout_s)

    def output(self) -> str:
        """What the runners have printed."""
        return (self.folder / "runner.txt").read_text(errors="replace")

    def root(self) -> Path:
        """The grid's folder."""
        return self.folder / "build" / "grid" / NAME

    def statuses(self) -> list[dict]:
        """Every status.json; one that cannot be parsed is an error, for none may be torn."""
        found = []
        for path in sorted(self.root().glob("*/status.json")):
            with contextlib.suppress(FileNotFoundError):  # about to be replaced
                found.append(json.loads(path.read_bytes()))
        return found

    def states(self, fault: str) -> list[str]:
        """States of the runs with this fault, in order of `repeat`."""
        found = [each for each in self.statuses() if each["parameters"]["fault"] == fault]
        return [each["state"] for each in sorted(found, key=lambda each: each["parameters"]["repeat"])]

    def folder_of(self, fault: str, repeat: int) -> Path:
        """The folder of one run."""
        wanted = {"fault": fault, "repeat": repeat}
        return next(
            self.root() / each["run"] for each in self.statuses() if wanted.items() <= each["parameters"].items()
        )

    def events(self) -> list[dict]:
        """The journal's whole lines."""
        text = self.journal.read_text() if self.journal.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def begun(self, repeat: int) -> int:
        """How many times a run began."""
        return sum(each["event"] == "begin" and each["repeat"] == repeat for each in self.events())

    def processes(self, part: str) -> list[psutil.Process]:
        """This project's processes of one part: run (corey.run), kernel, or worker (of Dask)."""
        marks = {"run": "corey.run", "kernel": "ipykernel_launcher", "worker": "spawn_main"}
        return [each for each in self.all_processes() if marks[part] in " ".join(_command_line(each))]

    def all_processes(self, scratch: str = "") -> list[psutil.Process]:
        """All processes of this project, or those with the scratch folder of one box."""
        wanted = {"COREY_SCRATCH": scratch} if scratch else {"COREY_NOTEBOOKS": self.environment["COREY_NOTEBOOKS"]}
        return [each for each in psutil.process_iter() if _has(each, wanted)]

    def end(self) -> None:
        """End whatever is left of this project."""
        for process in self.all_processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


@contextlib.contextmanager
def project() -> Iterator[Project]:
    """A project that is gone afterwards, processes included. Its path is short, as sockets lie in it."""
    with tempfile.TemporaryDirectory(prefix="corey-faults-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        made = Project(Path(folder))
        try:
            yield made
        finally:
            made.end()


def wait_for(condition, timeout_s: float = 240) -> None:
    """Wait until `condition()` holds; TimeoutError when it does not in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout_s} s for {condition.__qualname__}")
        time.sleep(0.05)


def kill(process: psutil.Process | subprocess.Popen) -> bool:
    """SIGKILL; whether there was something to kill."""
    try:
        os.kill(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def _command_line(process: psutil.Process) -> list[str]:
    with contextlib.suppress(psutil.Error):
        return process.cmdline()
    return []


def _has(process: psutil.Process, wanted: dict[str, str]) -> bool:
    with contextlib.suppress(psutil.Error, OSError):
        return process.status() != psutil.STATUS_ZOMBIE and wanted.items() <= process.environ().items()
    return False
