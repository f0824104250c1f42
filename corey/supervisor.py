"""One run of a grid on this box: a process of its own on a device of its own, and the truth about how it ended.

`supervise` is what a Dask worker calls. It never raises for what a run does: it returns an outcome with the files to
keep as bytes, so that boxes need no shared filesystem and the runner of the grid is the only one that writes them.
"""

import contextlib
import dataclasses
import json
import os
import re
import secrets
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

from corey import devices
from corey._files import MAX_BYTES, parse_json, read_limited
from corey._sources import source_hashes
from corey.paths import ROOT

RETRIES = 2  # of a transient fault, so at most three attempts
GRACE_S = 15.0  # between SIGTERM, on which a run keeps its partial notebook, and SIGKILL
LOG_BYTES = 1 << 16
NO_SPACE_BYTES = 1 << 16
_TRANSIENT = re.compile(
    r"CUDA (driver )?initialization|CUDA-capable device\(s\) is/are busy|cudaErrorDevicesUnavailable"
    r"|^(Connection(Reset|Refused|Aborted)?Error|ConnectError|ConnectTimeout|ReadTimeout|ProxyError|gaierror)\b"
    r"|Temporary failure in name resolution"
)
_PASSED_ON = re.compile(  # the environment of a notebook: no secret gets in because nobody thought of it
    r"PATH|HOME|USER|LOGNAME|SHELL|LANG|LC_\w+|TZ|LD_LIBRARY_PATH|PYTHON\w+|VIRTUAL_ENV|CONDA_\w+|XDG_\w+|COREY_\w+"
    r"|NVIDIA_\w+|CUDA_\w+|NCCL_\w+|TORCH\w*|TRITON_\w+|OMP_\w+|MKL_\w+|OPENBLAS_\w+|NUMBA_\w+|MPL\w+"
    r"|HF_(HOME|HUB_\w+|DATASETS_\w+)|TRANSFORMERS_\w+|(https?|no|all)_proxy|(HTTPS?|NO|ALL)_PROXY|SSL_CERT_\w+"
)
_KEPT = re.compile(r"(notebook|notebook\.failed)\.ipynb|log\.txt|(results|figures)/[A-Za-z0-9][\w.-]*")


@dataclasses.dataclass(frozen=True)
class Task:
    """One run: its identity and that of its grid, notebook, parameters, hashes of the code it must meet, limits."""

    run: str
    grid: str
    notebook: str
    parameters: dict
    code: dict
    cell_timeout_s: int
    run_timeout_s: int


@dataclasses.dataclass
class Outcome:
    """How a run ended: done, failed, timeout or killed; where, on which device, how long, and the files to keep."""

    state: str
    reason: str
    host: str = ""
    device: str = ""
    attempts: int = 1
    duration_s: float = 0.0
    files: dict[str, bytes] = dataclasses.field(default_factory=dict)
    exception: str = ""

    def transient(self) -> bool:
        """Whether trying again may help: CUDA that did not start, or the network. Never a failed assertion."""
        found = _TRANSIENT.search(self.exception) or _TRANSIENT.search(self.reason)
        return self.state == "failed" and self.exception != "AssertionError" and found is not None


_stopped: set[str] = set()  # grids whose runs are to end


def stop(grid: str) -> None:
    """End the runs of a grid on this box as SIGTERM does, with their partial notebooks kept."""
    _stopped.add(grid)


def supervise(task: Task, device: str, began=lambda **where: None) -> Outcome:
    """Run `task` on `device` once that is free, again where a fault was transient; `began` is told of every attempt."""
    token, host = secrets.token_hex(8), socket.gethostname()
    with devices.hold(device, token) as lock:
        for attempt in range(1, RETRIES + 2):
            if attempt > 1:
                time.sleep(attempt)
            began(host=host, device=device, pid=os.getpid(), attempt=attempt)
            start = time.monotonic()
            outcome = _attempt(task, device, token, lock)
            outcome.host, outcome.device, outcome.attempts = host, device, attempt
            outcome.duration_s = time.monotonic() - start
            if not outcome.transient():
                break
            devices.reap(token)
    return outcome


def passed_on(environment: dict[str, str]) -> dict[str, str]:
    """The variables that a notebook gets to see."""
    return {key: value for key, value in environment.items() if _PASSED_ON.fullmatch(key)}


def kept(name: str) -> bool:
    """Whether a file that a run left is one to keep: its notebook, its log, rows and figures, at their places."""
    return isinstance(name, str) and _KEPT.fullmatch(name) is not None


def _attempt(task: Task, device: str, token: str, lock: int) -> Outcome:
    differs = [key for key, value in source_hashes(task.notebook).items() if task.code.get(key) != value]
    if differs:
        return Outcome(
            "failed", f"{', '.join(differs)}: got other code on this box, want the runner's; update its checkout"
        )
    folder = devices.scratch_folder() / f"run-{token}"
    try:
        (folder / "tmp").mkdir(parents=True, mode=0o700)
        (folder / "parameters.yaml").write_text(json.dumps(task.parameters))  # JSON is YAML
        code, ended_for = _run(task, device, token, lock, folder)
        outcome = _judge(code, folder)
        if ended_for and outcome.state != "done":
            outcome.state, outcome.reason = ended_for
        return _with_files(outcome, folder)
    except OSError as error:
        return Outcome("failed", f"{type(error).__name__}: {error}", exception=type(error).__name__)


def _run(task: Task, device: str, token: str, lock: int, folder: Path) -> tuple[int, tuple[str, str] | None]:
    """Exit code of corey.run in a process of its own and, if it was made to end, the state and reason for that."""
    command = [sys.executable, "-m", "corey.run", task.notebook, "--tied", "--cell-timeout", str(task.cell_timeout_s)]
    command += ["--parameters", str(folder / "parameters.yaml"), "--out", str(folder / "notebook.ipynb")]
    environment = passed_on(dict(os.environ)) | devices.environment(device)
    environment |= {devices.TOKEN: token, "COREY_DEVICE": device, "COREY_RUN_DIR": str(folder)}
    environment |= {"TMPDIR": str(folder / "tmp"), "PYTHONPATH": str(ROOT)}  # the kernel's corey is this one
    with open(folder / "log.txt", "wb") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment, pass_fds=[lock], cwd=ROOT
        )
    with process.stdin:  # the run is tied to this end of the pipe
        ended_for = _wait(process, task)
    return process.returncode, ended_for


def _wait(process: subprocess.Popen, task: Task) -> tuple[str, str] | None:
    """Wait for the end; past the limit, or when the grid is stopped, ask for it and then force it."""
    deadline = time.monotonic() + task.run_timeout_s
    while time.monotonic() < deadline and task.grid not in _stopped:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(min(0.2, max(0.0, deadline - time.monotonic())))
            return None
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE_S)
    process.kill()
    process.wait()
    if task.grid in _stopped:
        return "killed", "the runner of the grid was stopped"
    return "timeout", f"the run took longer than {task.run_timeout_s} s"


def _judge(code: int, folder: Path) -> Outcome:
    """What an exit code and the notebook that was left say together."""
    if code == 0 and (folder / "notebook.ipynb").is_file():
        return Outcome("done", "")
    if code == 1 and (folder / "notebook.failed.ipynb").is_file():
        with contextlib.suppress(ValueError, KeyError):
            told = parse_json(read_limited(folder / "notebook.failed.ipynb"), folder)["metadata"]["corey"]
            return Outcome(told["status"], told["reason"], exception=told["exception"])
    if code < 0 or code == 128 + signal.SIGTERM:
        return Outcome(
            "killed", f"the run's process was ended by {signal.Signals(-code if code < 0 else code - 128).name}"
        )
    if shutil.disk_usage(folder).free < NO_SPACE_BYTES:
        return Outcome("failed", f"No space left on device: {folder}")
    lines = _tail(folder / "log.txt").decode(errors="replace").strip().splitlines()
    return Outcome("failed", lines[-1] if lines else f"exit code {code}")


def _with_files(outcome: Outcome, folder: Path) -> Outcome:
    """The outcome with the files to keep; a link or a file too large makes the run a failed one."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not kept(name):
            continue
        if not stat.S_ISREG(path.lstat().st_mode) or path.resolve() != folder.resolve() / name:
            outcome.state, outcome.reason = "failed", f"{name}: got a link or no plain file, want a file of the run"
        elif name == "log.txt":
            outcome.files[name] = _tail(path)
        elif path.stat().st_size > MAX_BYTES:
            outcome.state, outcome.reason = (
                "failed",
                f"{name}: got {path.stat().st_size} bytes, want at most {MAX_BYTES}",
            )
        else:
            outcome.files[name] = path.read_bytes()
    return outcome


def _tail(path: Path) -> bytes:
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - LOG_BYTES))
        return file.read()
