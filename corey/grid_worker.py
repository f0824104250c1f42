"""A box of GPUs as Dask workers: one process a device, each with one thread, so that a device has one run at a time."""

import asyncio
import logging
import os
import re

from distributed import Nanny, get_worker

from corey import devices
from corey._check import bad_value
from corey.supervisor import Outcome, Task, supervise

TOPIC = "corey-runs"  # where workers tell the runner of a grid that a run began
DEVICE = "COREY_DEVICE"


def run_task(task: Task) -> Outcome:
    """What a worker does for one run of a grid."""
    worker = get_worker()
    return supervise(task, own_device(), lambda **where: worker.log_event(TOPIC, {"run": task.run, **where}))


def own_device() -> str:
    """The device of this worker: $COREY_DEVICE, else the only one that it sees, as a batch system arranges it."""
    if DEVICE in os.environ:
        return devices.check(os.environ[DEVICE])
    found = devices.visible()
    if len(found) != 1:
        raise bad_value("devices of a worker", found, "one; start it by `make worker`, or under CUDA_VISIBLE_DEVICES")
    return found[0]


def nanny_options(device: str) -> dict:
    """Options of the Nanny for a device. Runs are processes of their own, so a worker's memory needs no limit."""
    place = {"env": {DEVICE: device}, "local_directory": str(devices.scratch_folder() / "dask")}
    return place | {"nthreads": 1, "memory_limit": 0, "silence_logs": logging.ERROR}


def check_address(address: str) -> str:
    """The address of a scheduler; ValueError for what is none."""
    if not isinstance(address, str) or not re.fullmatch(r"(tcp|tls)://[\w.:\[\]-]+:\d+", address):
        raise bad_value("scheduler", repr(address), "an address such as tcp://head:8786")
    return address


def join(address: str, wanted: str = "") -> None:
    """Serve a scheduler with one worker for each device of this box until it goes away."""
    check_address(address)
    asyncio.run(_serve(address, devices.visible(wanted)))


async def _serve(address: str, found: list[str]) -> None:
    nannies = [Nanny(address, **nanny_options(device)) for device in found]
    await asyncio.gather(*nannies)
    print(f"serving {address} with {', '.join(found)}", flush=True)
    await asyncio.gather(*(nanny.finished() for nanny in nannies))
