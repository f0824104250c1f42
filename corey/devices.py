"""Devices of this box for batch runs: their names, a lock for each, and the end of what an earlier holder left behind.

A run holds its device through flock on a file that its process inherits, so the lock lasts as long as either lives. The
file says who holds it. Every process of a run carries the run's token in $COREY_TOKEN: when a holder is gone, whoever
takes the device next first ends all processes with that token, which are kernels that outlived it.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import re
import shutil
import stat
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from corey._check import bad_value

TOKEN = "COREY_TOKEN"
_DEVICE = re.compile(r"cpu:\d{1,4}|(GPU|MIG)-[0-9A-Za-z/-]{1,80}")


@dataclasses.dataclass(frozen=True)
class Holder:
    """Who holds a device: a process, by its id and its time of birth, and the token of its run."""

    pid: int
    born: float
    token: str

    def alive(self) -> bool:
        """Whether that very process still runs; a later one with the same id was born at another time."""
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(self.pid)
            return abs(process.create_time() - self.born) < 0.1 and process.status() != psutil.STATUS_ZOMBIE
        return False


def scratch_folder() -> Path:
    """Locks and runs in flight: $COREY_SCRATCH, else /tmp/corey-<uid>, which nobody else can write."""
    told = os.environ.get("COREY_SCRATCH")
    folder = Path(told) if told else Path(f"/tmp/corey-{os.getuid()}")
    if not folder.is_absolute():
        raise bad_value("COREY_SCRATCH", repr(told), "an absolute path")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.lstat()
    if not told and (not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022):
        raise PermissionError(f"{folder}: got a folder that others can change, want this user's; set COREY_SCRATCH")
    return folder


def visible(wanted: str = "") -> list[str]:
    """The devices that `wanted` names, else all visible GPUs, else one CPU: `["GPU-8a6f..."]`, `["cpu:0", "cpu:1"]`.

    `wanted` is a comma-separated list of GPU indices (nvidia-smi's), UUIDs, or "cpu" once for each run at a time.
    Without it $CUDA_VISIBLE_DEVICES chooses among the GPUs, as for any program.
    """
    tokens = [token.strip() for token in wanted.split(",")] if wanted else []
    if tokens and all(token == "cpu" for token in tokens):
        return [f"cpu:{number}" for number in range(len(tokens))]
    gpus, every = _gpus()
    told = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not tokens and told is not None:
        tokens = [token.strip() for token in told.split(",") if token.strip()]
    elif not tokens:
        tokens = every
    found = [gpus.get(token) for token in tokens]
    if None in found or len(set(found)) != len(found):
        known = ", ".join(gpus) or "none"
        raise bad_value("devices", repr(wanted or told), f"'cpu,cpu' or different GPUs of this box (there are {known})")
    return found or ["cpu:0"]


def check(device: str) -> str:
    """The device, once it is known to be a name that `visible` gives."""
    if not isinstance(device, str) or not _DEVICE.fullmatch(device):
        raise bad_value("device", repr(device), "'cpu:0' and the like or the UUID of a GPU")
    return device


def environment(device: str) -> dict[str, str]:
    """What makes `device` the only one that CUDA shows to a process."""
    gpu = "" if check(device).startswith("cpu:") else device
    return {"CUDA_VISIBLE_DEVICES": gpu, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}


@contextlib.contextmanager
def hold(device: str, token: str) -> Iterator[int]:
    """Wait for a device, end what its last holder left, and keep it; gives the descriptor that a child must inherit."""
    name = re.sub(r"[^\w-]", "-", check(device))
    descriptor = os.open(scratch_folder() / f"{name}.lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        while not _try_lock(descriptor):
            holder = _holder(descriptor)
            if holder and not holder.alive():
                reap(holder.token)
            time.sleep(0.1)
        before = _holder(descriptor)
        if before:
            reap(before.token)
        mine = Holder(os.getpid(), psutil.Process().create_time(), token)
        _write(descriptor, json.dumps(dataclasses.asdict(mine)))
        yield descriptor
        reap(token)
        _write(descriptor, "")
    finally:
        os.close(descriptor)


def reap(token: str) -> int:
    """End every process of a run and remove its scratch folder; returns how many processes there were."""
    ended = 0
    while found := [each for each in psutil.process_iter() if each.pid != os.getpid() and _carries(each, token)]:
        for process in found:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        _, stuck = psutil.wait_procs(found, timeout=30)  # looked for again: one of them may have been about to fork
        if stuck:
            raise RuntimeError(f"processes {[each.pid for each in stuck]} of run {token} outlive SIGKILL")
        ended += len(found)
    shutil.rmtree(scratch_folder() / f"run-{token}", ignore_errors=True)
    return ended


def _carries(process: psutil.Process, token: str) -> bool:
    with contextlib.suppress(psutil.Error, OSError):
        return process.status() != psutil.STATUS_ZOMBIE and process.environ().get(TOKEN) == token
    return False


def _try_lock(descriptor: int) -> bool:
    with contextlib.suppress(BlockingIOError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


def _holder(descriptor: int) -> Holder | None:
    with contextlib.suppress(ValueError, TypeError):  # empty, or torn by a crash: nobody
        found = Holder(**json.loads(os.pread(descriptor, 4096, 0)))
        if re.fullmatch(r"[0-9a-f]{8,32}", found.token):
            return found
    return None


def _write(descriptor: int, text: str) -> None:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, text.encode(), 0)


def _gpus() -> tuple[dict[str, str], list[str]]:
    """UUIDs of GPUs and MIG slices by what may be said for them, and those that a batch uses unasked."""
    if shutil.which("nvidia-smi") is None:
        return {}, []
    done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60)
    if done.returncode != 0:
        raise RuntimeError(f"nvidia-smi -L failed: {done.stdout}{done.stderr}")
    indexed = dict(re.findall(r"^GPU (\d+): .*\(UUID: (GPU-[0-9a-f-]+)\)", done.stdout, re.MULTILINE))
    slices = re.findall(r"\(UUID: (MIG-[0-9A-Za-z/-]+)\)", done.stdout)
    return indexed | {uuid: uuid for uuid in [*indexed.values(), *slices]}, slices or list(indexed.values())
