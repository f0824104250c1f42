"""A device has one holder at a time, and what a dead holder left is ended before the next one begins."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from corey import devices

HOLD = """
import sys, time
from corey import devices
with devices.hold("cpu:0", sys.argv[1]):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""
SMI = """#!/bin/sh
echo 'GPU 0: NVIDIA H200 (UUID: GPU-aaaa0000-1111-2222-3333-444444444444)'
echo 'GPU 1: NVIDIA H200 (UUID: GPU-bbbb0000-1111-2222-3333-444444444444)'
"""
A, B = "GPU-aaaa0000-1111-2222-3333-444444444444", "GPU-bbbb0000-1111-2222-3333-444444444444"


@pytest.fixture(autouse=True)
def scratch(tmp_path, monkeypatch):
    monkeypatch.setenv("COREY_SCRATCH", str(tmp_path / "scratch"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return tmp_path / "scratch"


@contextlib.contextmanager
def another_holder(token="aaaaaaaa", seconds=60.0):
    """Another process that holds cpu:0."""
    command = [sys.executable, "-c", HOLD, token, str(seconds)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def orphan(token):
    """A process that carries a run's token, as a kernel does that outlived its run."""
    process = subprocess.Popen(["sleep", "100"], env=os.environ | {devices.TOKEN: token})
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def test_a_device_is_held_by_one_process_at_a_time():
    with another_holder(seconds=2.0):
        start = time.monotonic()
        with devices.hold("cpu:1", "bbbbbbbb"):
            assert time.monotonic() - start < 1.5  # another device is free
        with devices.hold("cpu:0", "bbbbbbbb"):
            assert time.monotonic() - start > 0.5  # this one was waited for


def test_a_dead_holder_is_followed_and_its_orphans_are_ended(scratch):
    with another_holder("aaaaaaaa") as holder, orphan("aaaaaaaa") as left, orphan("cccccccc") as other:
        (scratch / "run-aaaaaaaa").mkdir()
        holder.send_signal(signal.SIGKILL)
        with devices.hold("cpu:0", "bbbbbbbb"):
            assert left.poll() is not None
            assert other.poll() is None  # a run of someone else
            assert not (scratch / "run-aaaaaaaa").exists()


def test_the_lock_lasts_as_long_as_a_child_that_inherits_it():
    with devices.hold("cpu:0", "aaaaaaaa") as lock:
        child = subprocess.Popen(["sleep", "100"], pass_fds=[lock])
    descriptor = os.open(devices.scratch_folder() / "cpu-0.lock", os.O_RDWR)
    assert not devices._try_lock(descriptor)
    child.kill()
    child.wait()
    assert devices._try_lock(descriptor)
    os.close(descriptor)


def test_a_process_that_got_the_same_id_later_is_not_the_holder():
    me = psutil.Process()
    assert devices.Holder(me.pid, me.create_time(), "aaaaaaaa").alive()
    assert not devices.Holder(me.pid, me.create_time() - 5, "aaaaaaaa").alive()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": 1}', '{"pid": 1, "born": 1, "token": "../x"}'])
def test_a_lock_file_that_is_torn_names_nobody(text, scratch):
    devices.scratch_folder()
    (scratch / "cpu-0.lock").write_text(text)
    with devices.hold("cpu:0", "aaaaaaaa"):
        assert json.loads((scratch / "cpu-0.lock").read_text())["token"] == "aaaaaaaa"


@pytest.fixture
def two_gpus(tmp_path, monkeypatch):
    """A program in the place of nvidia-smi that lists two GPUs as it does."""
    (tmp_path / "nvidia-smi").write_text(SMI)
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")


@pytest.mark.parametrize(
    ("wanted", "told", "found"),
    [
        ("", None, [A, B]),
        ("", "1", [B]),
        ("", f"{B},{A}", [B, A]),
        ("", "", ["cpu:0"]),
        ("0", None, [A]),
        ("0", "1", [A]),
        (B, None, [B]),
        ("cpu,cpu", None, ["cpu:0", "cpu:1"]),
    ],
)
def test_devices_are_the_gpus_that_are_visible_or_asked_for(wanted, told, found, two_gpus, monkeypatch):
    if told is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", told)
    assert devices.visible(wanted) == found


@pytest.mark.parametrize("wanted", ["2", "0,0", f"0,{A}", "cpu,0", "gpu", "0;ls"])
def test_devices_that_are_not_there_or_named_twice_are_refused(wanted, two_gpus):
    with pytest.raises(ValueError, match="devices: got"):
        devices.visible(wanted)


def test_a_run_sees_its_device_and_no_other():
    assert devices.environment(A) == {"CUDA_VISIBLE_DEVICES": A, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    assert devices.environment("cpu:1")["CUDA_VISIBLE_DEVICES"] == ""


def test_without_an_nvidia_smi_there_is_one_cpu(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert devices.visible() == ["cpu:0"]


def test_a_scratch_folder_of_someone_else_is_refused(tmp_path, monkeypatch):
    monkeypatch.delenv("COREY_SCRATCH")
    monkeypatch.setattr(os, "getuid", lambda: 987654321)  # a user who does not own what this one makes
    try:
        with pytest.raises(PermissionError, match="set COREY_SCRATCH"):
            devices.scratch_folder()
    finally:
        os.rmdir("/tmp/corey-987654321")
