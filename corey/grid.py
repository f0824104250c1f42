"""Run a notebook's grid of parameters: `python -m corey.grid run 03_chunk_sweep --devices cpu,cpu`.

Dask `distributed` hands the runs to workers: one for each device of this box, or those of a scheduler that is named.
This process alone writes what comes back, as soon as it comes: each run into build/grid/<notebook>/<identity>/, then
all rows into build/grid/<notebook>/rows. Runs that are done are skipped, so the same command continues a grid that was
interrupted. It exits with 0 only when every run is done, with 1 when one is not, and with 2 when it refused to begin.
"""

import argparse
import contextlib
import dataclasses
import fcntl
import logging
import math
import os
import secrets
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import dask
import pandas as pd
from distributed import Client, KilledWorker, Nanny, Scheduler, SpecCluster, as_completed

from corey import devices, paths
from corey._check import bad_value
from corey.grid_points import expand, identity, surroundings
from corey.grid_worker import TOPIC, check_address, join, nanny_options, run_task
from corey.run_folder import RunFolder
from corey.supervisor import GRACE_S, Outcome, Task, stop

CELL_TIMEOUT_S, RUN_TIMEOUT_S = 3600, 7200
HEAL_S = 2.0  # between looks at whether all workers are there
JOIN_TIMEOUT_S = 60  # for a worker to join the scheduler that was named
DASK = {
    "distributed.scheduler.allowed-failures": 9,  # deaths that a run survives of workers where it ran, or only waited
    "distributed.scheduler.worker-saturation": 1.0,  # most runs wait with the scheduler, not with one worker
    "distributed.scheduler.http.routes": [],
    "distributed.worker.http.routes": [],
    "distributed.nanny.http.routes": [],
    "distributed.comm.timeouts.connect": "10s",
    "distributed.deploy.lost-worker-timeout": "20s",  # after which one that did not come back is started anew
}


@dataclasses.dataclass(frozen=True)
class GridResult:
    """Every run with its state, the result sets written from those that are done, and what kept rows from being so."""

    table: pd.DataFrame
    rows: list[Path]
    refused: list[str]

    @property
    def complete(self) -> bool:
        return bool((self.table.state == "done").all()) and not self.refused


def run_grid(
    name: str,
    section: str = "smoke",
    *,
    scheduler: str = "",
    wanted: str = "",
    cell_timeout_s: int = CELL_TIMEOUT_S,
    run_timeout_s: int = RUN_TIMEOUT_S,
) -> GridResult:
    """Run a section of the grid of notebooks/grids/<name>.yaml, on this box or on the workers of a Dask scheduler.

    `scheduler` is an address such as tcp://head:8786; without one, workers are started here for the devices `wanted`
    (see corey.devices.visible). Raises ValueError, TypeError or OSError before any run begins.
    """
    for argument, value in (("cell_timeout_s", cell_timeout_s), ("run_timeout_s", run_timeout_s)):
        if not isinstance(value, int) or value <= 0:
            raise bad_value(argument, repr(value), "a positive number of whole seconds")
    if scheduler:
        check_address(scheduler)
    found = None if scheduler else devices.visible(wanted)
    points = expand(name, section)
    if found and found[0].startswith("cpu:") and any(each.get("device") == "cuda" for each, _ in points):
        raise bad_value("devices", ", ".join(found), f"GPUs, for runs of {name} with device = cuda")
    around = surroundings(name)
    root = paths.BUILD / "grid" / name
    root.mkdir(parents=True, exist_ok=True)
    with _only_writer(root):
        folders = [
            RunFolder(root, identity(name, parameters, around), parameters, crossed) for parameters, crossed in points
        ]
        left = [folder for folder in folders if not folder.done()]
        for folder in left:
            folder.mark("queued")
        grid = secrets.token_hex(8)
        limits = {"cell_timeout_s": cell_timeout_s, "run_timeout_s": run_timeout_s}
        tasks = [Task(each.run, grid, name, each.parameters, around["code"], **limits) for each in left]
        if tasks:
            devices.scratch_folder()  # refused now, if it is not this user's own
            with dask.config.set(DASK), _cluster(scheduler, found) as client, _broken_by_errors():
                _Collector(client, {folder.run: folder for folder in left}).collect(tasks)
        with _broken_by_errors():
            written, refused = _gather(folders, root / "rows", name, section)
    return GridResult(_table(folders, {folder.run for folder in left}), written, refused)


class GridBroken(RuntimeError):
    """The runner itself could not go on after runs began; what was written by then stays and is skipped next time."""


class _Collector:
    """The one writer: it notes which runs begin and writes what each leaves when it ends."""

    def __init__(self, client: Client, folders: Mapping[str, RunFolder]):
        self.client, self.folders = client, folders
        self.began: set[str] = set()
        self.ended: set[str] = set()
        self.writing = threading.Lock()

    def collect(self, tasks: list[Task]) -> None:
        """Hand out the tasks and write their outcomes as they come; a signal ends the runs and keeps what they have."""
        self.client.subscribe_topic(TOPIC, self._note)
        futures = {self.client.submit(run_task, task, key=_key(task)): task for task in tasks}
        try:
            self._take(futures, list(futures))
        except SystemExit:
            waiting = [future for future, task in futures.items() if task.run not in self.began]
            self.client.cancel(waiting)
            self.client.run(stop, tasks[0].grid)
            late = [future for future in futures if future not in waiting]
            self._take(futures, late, timeout_s=GRACE_S + 5)
            for task in futures.values():
                if task.run in self.began:
                    self.folders[task.run].mark("killed", reason="the runner was stopped; no word from the run's box")
            raise

    def _take(self, futures: dict, wanted: list, timeout_s: float = math.inf) -> None:
        coming, deadline, healed = as_completed(wanted), time.monotonic() + timeout_s, 0.0
        while coming.count() and time.monotonic() < deadline:
            if coming.has_ready():
                future = next(coming)
                self._keep(future, futures.pop(future))
            elif time.monotonic() > healed + HEAL_S:
                self._heal()
                healed = time.monotonic()
            else:
                time.sleep(0.05)

    def _keep(self, future, task: Task) -> None:
        if future.cancelled() and task.run not in self.began:
            return  # still queued
        outcome = _outcome(future)
        future.release()  # or Dask would run it again if the worker that holds the result died now
        with self.writing:
            self.ended.add(task.run)
            kept = self.folders[task.run].keep(outcome)
        print(f"{kept.state}: {task.run} {kept.device} {kept.duration_s:.1f} s {kept.reason}", flush=True)

    def _heal(self) -> None:
        """Start workers anew whose Nanny gave up, as one does when its worker is killed while it starts."""
        if self.client.cluster is not None:
            self.client.cluster.scale(len(self.client.cluster.worker_spec))

    def _note(self, event: tuple) -> None:
        """A run began. This runs in the thread of Dask's loop. What has ended stays so: Dask may begin it once more."""
        where = dict(event[1])
        folder = self.folders.get(where.pop("run", None))
        with self.writing:
            if folder is None or folder.run in self.ended:
                return
            self.began.add(folder.run)
            with contextlib.suppress(OSError):  # a full disk, which the outcome that follows will meet and report
                folder.mark("running", **where)


def _key(task: Task) -> str:
    """What Dask calls a run. It takes the part before the hashes for the kind of a task and learns how long a kind
    takes; a run of a kind of its own counts as 0.5 s, and waits with a busy worker while others have nothing to do."""
    return f"run-{task.run}-{task.grid}"


@contextlib.contextmanager
def _broken_by_errors() -> Iterator[None]:
    try:
        yield
    except (OSError, TypeError, ValueError) as error:
        raise GridBroken(f"{type(error).__name__}: {error}") from error


def _outcome(future) -> Outcome:
    """What a worker returned, or what Dask says of a run that no worker could finish."""
    if future.status == "finished":
        with contextlib.suppress(Exception):  # the worker or the scheduler may go while the outcome is fetched
            return future.result(timeout=JOIN_TIMEOUT_S)
        return Outcome("killed", "lost with its worker or scheduler after it had ended; run the grid again")
    if future.cancelled():
        return Outcome("killed", "lost with the scheduler; run the grid again")
    error = future.exception()
    if isinstance(error, KilledWorker):
        return Outcome("killed", f"its worker died {error.allowed_failures + 1} times, while it ran there or waited")
    return Outcome("failed", f"{type(error).__name__}: {error}")


@contextlib.contextmanager
def _cluster(scheduler: str, found: list[str] | None) -> Iterator[Client]:
    """A client of the scheduler that is named, or of one in this process, on localhost only, with a worker a device."""
    if scheduler:
        with Client(scheduler, timeout=10) as client:
            client.wait_for_workers(1, timeout=JOIN_TIMEOUT_S)
            yield client
        return
    workers = {device: {"cls": Nanny, "options": nanny_options(device) | {"host": "127.0.0.1"}} for device in found}
    own = {"cls": Scheduler, "options": {"host": "127.0.0.1", "port": 0, "dashboard_address": "127.0.0.1:0"}}
    with SpecCluster(workers, own, silence_logs=logging.ERROR) as cluster, Client(cluster) as client:
        yield client


@contextlib.contextmanager
def _only_writer(root: Path) -> Iterator[None]:
    descriptor = os.open(root / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise bad_value(f"grid {root.name}", "another runner at work on it", "one at a time") from error
    finally:
        os.close(descriptor)


def _gather(folders: list[RunFolder], into: Path, name: str, section: str) -> tuple[list[Path], list[str]]:
    """The rows of all runs that are done, one set for each that the notebook writes."""
    shutil.rmtree(into, ignore_errors=True)
    sets: dict[str, dict] = {}
    for folder in folders:
        if folder.done():
            for each in sorted(path.stem for path in (folder.path / "results").glob("*.csv")):
                sets.setdefault(each, {})[folder.run] = (folder.path / "results", folder.crossed)
    written, refused = [], []
    if not sets:
        return written, refused
    from corey import results  # torch comes with it, which takes seconds

    for each, runs in sets.items():
        try:
            written.append(results.gather(runs, each, into, parameters={"grid": section}, notebook=name))
        except ValueError as error:
            refused.append(f"rows of {each}: {error}")
    return written, refused


def _table(folders: list[RunFolder], fresh: set[str]) -> pd.DataFrame:
    rows = []
    for folder in folders:
        status = folder.status()
        told = {"state": status.get("state"), "device": status.get("device", ""), "seconds": status.get("duration_s")}
        when = "now" if folder.run in fresh else "before"
        rows.append({"run": folder.run, **folder.crossed, **told, "when": when, "reason": status.get("reason", "")})
    return pd.DataFrame(rows)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m corey.grid", description="Run a notebook's grid of parameters.")
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="run what of the grid is not done yet")
    run.add_argument("name", help="stem of a notebook, such as 03_chunk_sweep")
    run.add_argument("--section", default="smoke", help="smoke or paper, of `grid` in notebooks/grids/NAME.yaml")
    run.add_argument("--scheduler", default="", help="a running one, such as tcp://head:8786; one in here by default")
    run.add_argument("--cell-timeout", type=int, default=CELL_TIMEOUT_S, metavar="SECONDS")
    run.add_argument("--run-timeout", type=int, default=RUN_TIMEOUT_S, metavar="SECONDS")
    worker = commands.add_parser("worker", help="join this box to a scheduler, one worker a device")
    worker.add_argument("scheduler", help="such as tcp://head:8786")
    for command in (run, worker):
        command.add_argument(
            "--devices", default="", help="'cpu,cpu', GPU indices or UUIDs; all visible GPUs by default"
        )
    options = parser.parse_args(arguments)
    try:
        if options.command == "worker":
            join(options.scheduler, options.devices)
            return 0
        limits = {"cell_timeout_s": options.cell_timeout, "run_timeout_s": options.run_timeout}
        done = run_grid(options.name, options.section, scheduler=options.scheduler, wanted=options.devices, **limits)
    except (OSError, TypeError, ValueError) as refusal:
        print(f"refused: {refusal}", file=sys.stderr)
        return 2
    except RuntimeError as broken:  # GridBroken, or Dask's own
        print(f"broken off: {broken}; run the grid again to continue it", file=sys.stderr)
        return 1
    print(done.table.to_string(index=False, float_format="{:.1f}".format))
    for path in done.rows:
        print(f"rows: {path}")
    for reason in done.refused:
        print(f"refused: {reason}", file=sys.stderr)
    print(f"{(done.table.state == 'done').sum()} of {len(done.table)} runs are done")
    return 0 if done.complete else 1


def _exit(number: int, _frame) -> None:
    sys.exit(128 + number)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _exit)
    signal.signal(signal.SIGINT, _exit)
    sys.exit(main())
