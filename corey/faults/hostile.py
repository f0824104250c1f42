"""Hostile inputs: each tries to run code, to write outside its folder, or to exhaust the runner. None may succeed.

An attempt succeeds when the canary file appears, when a file outside the project's folders changes, or when what it
hands over is accepted.
"""

import json
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import nbformat
import pandas as pd
import torch

from corey import devices, grid, grid_points, paths, results, run
from corey.faults.project import NAME, Project, project
from corey.mamba_weights import load_mamba
from corey.run_folder import RunFolder
from corey.supervisor import Outcome, Task, supervise

Attempt = tuple[str, str, Callable[[], object]]  # kind, what is handed over, the try


def try_all() -> pd.DataFrame:
    """Every attempt with what refused it; `succeeded` is what must be false everywhere."""
    with project() as tiny:
        before = {name: getattr(paths, name) for name in ("NOTEBOOKS", "GRIDS", "BUILD")}
        paths.NOTEBOOKS, paths.BUILD = tiny.folder / "notebooks", tiny.folder / "build"
        paths.GRIDS = paths.NOTEBOOKS / "grids"
        try:
            return pd.DataFrame([_try(tiny, *attempt) for attempt in _attempts(tiny)])
        finally:
            for name, path in before.items():
                setattr(paths, name, path)


def _try(tiny: Project, kind: str, given: str, attempt: Callable[[], object]) -> dict:
    tiny.set_grid(["none"], 1)
    try:
        attempt()
        refused_by = ""
    except (OSError, TypeError, ValueError, RuntimeError) as refusal:
        refused_by = type(refusal).__name__
    escaped = [path.name for path in _outside(tiny) if path.exists()]
    shutil.rmtree(tiny.folder / "build", ignore_errors=True)
    return {"kind": kind, "given": given, "refused_by": refused_by, "succeeded": bool(escaped or not refused_by)}


def _outside(tiny: Project) -> list[Path]:
    """Files that only an attempt that succeeded makes."""
    return [tiny.folder / "canary", tiny.folder / "escaped.ipynb", tiny.folder.parent / "escaped.ipynb"]


def _attempts(tiny: Project) -> Iterator[Attempt]:
    yield from _names(tiny)
    yield from _parameters(tiny)
    yield from _outputs(tiny)
    yield from _grids(tiny)
    yield from _files(tiny)
    yield from _outcomes(tiny)
    yield from _rows(tiny)


def _names(tiny: Project) -> Iterator[Attempt]:
    (tiny.folder / "outside.ipynb").write_text((tiny.folder / "notebooks" / f"{NAME}.ipynb").read_text())
    (tiny.folder / "notebooks" / "91_link.ipynb").symlink_to(tiny.folder / "outside.ipynb")
    names = [
        "../outside",
        "/etc/passwd",
        "a/b",
        "..",
        "https://host/x",
        "s3://bucket/x",
        "{fault}",
        "91_link",
        "x\x00y",
    ]
    for name in names:
        yield "name of a notebook", name.replace("\x00", "\\0"), lambda name=name: run.run_notebook(name, {})
        yield "name of a grid", name.replace("\x00", "\\0"), lambda name=name: grid.run_grid(name, wanted="cpu")


def _parameters(tiny: Project) -> Iterator[Attempt]:
    canary = tiny.folder / "canary"
    code = f"open({str(canary)!r}, 'w')"
    names = [
        f"x=1;{code}#",
        f"fault = {code}\nx",
        f"x: {code}",
        "import",
        "",
        "fault ",
        "fault.x",
        "__class__",
        "fáult",
    ]
    for name in names:
        shown = name.replace(str(canary), "canary").replace("\n", "\\n")
        yield "parameter that is code", shown, lambda name=name: run.run_notebook(NAME, {name: 1})
    for value in ({"a": 1}, object(), b"bytes", [1, 2], True, float("nan")):
        yield (
            "value of a parameter",
            type(value).__name__,
            lambda value=value: run.run_notebook(NAME, {"repeat": value}),
        )


def _outputs(tiny: Project) -> Iterator[Attempt]:
    link = tiny.folder / "linked.ipynb"
    link.symlink_to(tiny.folder / "notebooks" / "escaped.ipynb")
    inside = tiny.folder / "notebooks" / "escaped.ipynb"
    for out in ("http://host/x.ipynb", "https://host/x.ipynb", "s3://b/x.ipynb", "gs://b/x.ipynb", "abs://b/x.ipynb"):
        yield "output that is a URL", out, lambda out=out: run.run_notebook(NAME, {}, out=out)
    template = tiny.folder / "build" / "{fault}.ipynb"
    for out in (template, inside, link, tiny.folder / "x.py"):
        yield "output elsewhere", out.name, lambda out=out: run.run_notebook(NAME, {"fault": "../../escaped"}, out=out)


def _grids(tiny: Project) -> Iterator[Attempt]:
    canary = tiny.folder / "canary"
    bomb = "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"{name}: &{name} [{','.join(['*' + before] * 10)}]\n" for before, name in zip("abcdefgh", "bcdefghi")
    )
    laptop = "laptop: {}\npaper: {}\n"
    ranges = "[" + ", ".join(map(str, range(200))) + "]"
    texts = {
        "YAML that calls": f"laptop: !!python/object/apply:os.system ['touch {canary}']",
        "YAML that makes objects": "laptop: !!python/object/new:subprocess.Popen [[touch, x]]",
        "YAML that imports": "laptop: !!python/module:antigravity",
        "aliases that grow": bomb + laptop + "grid: {smoke: {repeat: *i}}",
        "deep nesting": "[" * 20_000,
        "2 MiB of settings": "#" * (2 << 20),
        "40,000 runs": laptop + f"grid: {{smoke: {{repeat: {ranges}, work_s: {ranges}}}}}",
        "a parameter that is code": laptop + f'grid: {{smoke: {{\'x=1;open("{canary}","w")#\': [1]}}}}',
        "a list for a mapping": "[1, 2]",
        "no list": laptop + "grid: {smoke: {repeat: 1}}",
    }
    for given, text in texts.items():

        def attempt(text: str = text) -> object:
            (paths.GRIDS / f"{NAME}.yaml").write_text(text)
            return grid_points.expand(NAME, "smoke")

        yield "grid", given, attempt
    for address in ("http://host:1", "file:///etc/passwd", "tcp://host", "inproc://x", "tcp://h:1;touch canary"):
        yield "scheduler", address, lambda address=address: grid.run_grid(NAME, scheduler=address)
    for wanted in ("0;touch canary", "cpu,0", "../../x", "GPU-../../x", "cpu:0"):
        yield "devices", wanted, lambda wanted=wanted: devices.environment(devices.visible(wanted)[0])


def _files(tiny: Project) -> Iterator[Attempt]:
    path = tiny.folder / "notebooks" / "92_bad.ipynb"
    huge = b'{"cells": [' + b" " * (65 << 20) + b'], "nbformat": 4, "nbformat_minor": 5, "metadata": {}}'
    contents = {"65 MiB of JSON": huge, "deep JSON": b"[" * 200_000, "cut short": b'{"cells": [', "a list": b"[]"}
    contents |= {"not UTF-8": b"\xff\xfe{}", "no cells": b'{"nbformat": 4}', "text": b"print(1)"}
    for given, content in contents.items():

        def attempt(content: bytes = content) -> object:
            path.write_bytes(content)
            return run.run_notebook("92_bad", {})

        yield "notebook", given, attempt

    def pickled(name: str) -> object:
        folder = tiny.folder / f"checkpoint-{name}"
        if not folder.exists():
            shutil.copytree(paths.CHECKPOINTS / "corey-mini", folder)
            (folder / "model.safetensors").unlink()
            (folder / name).write_bytes(pickle.dumps(_Canary(tiny.folder / "canary")))
        return load_mamba(str(folder))

    for name in ("pytorch_model.bin", "model.safetensors", "model.pt"):
        yield "pickle for a checkpoint", name, lambda name=name: pickled(name)

    def indexed() -> object:
        folder = shutil.copytree(paths.CHECKPOINTS / "corey-mini", tiny.folder / "checkpoint-index")
        index = {"weight_map": {"x": "../checkpoint-model.pt/model.pt"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        return load_mamba(str(folder))

    yield "pickle for a checkpoint", "an index that leads out", indexed


class _Canary:
    """Unpickling this writes the canary."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def _outcomes(tiny: Project) -> Iterator[Attempt]:
    """What a worker that is not honest might send, and what a notebook might leave for the worker to collect."""
    for name in (
        "../../escaped.ipynb",
        "/tmp/escaped.ipynb",
        "results/../../../x",
        "status.json",
        "results/.x",
        "x.py",
    ):

        def attempt(name: str = name) -> None:
            kept = _folder(tiny).keep(Outcome("done", "", files={name: b"x"}))
            if kept.state != "done":
                raise ValueError(kept.reason)

        yield "file from a worker", name, attempt

    def linked() -> None:
        root = tiny.folder / "build" / "grid" / NAME
        root.mkdir(parents=True)
        (root / "0123456789abcdef").symlink_to(tiny.folder)
        _folder(tiny).keep(Outcome("done", "", files={"notebook.ipynb": b"x"}))

    yield "folder of a run", "a link that leads out", linked

    def huge_status() -> None:
        folder = _folder(tiny)
        folder.path.mkdir(parents=True)
        (folder.path / "status.json").write_bytes(b'{"state": "done", "files": {}, "x": "' + b"x" * (2 << 20) + b'"}')
        if not folder.done():
            raise ValueError("not taken for a run that is done")

    yield "status", "2 MiB of JSON that says done", huge_status

    def escaping() -> None:
        source = f"import os; os.makedirs(os.environ['COREY_RUN_DIR'] + '/results'); os.symlink('/etc/passwd', {'{}'})"
        target = "os.environ['COREY_RUN_DIR'] + '/results/x.csv'"
        cells = [nbformat.v4.new_code_cell("seed: int = 1", metadata={"tags": ["parameters"]})]
        cells += [nbformat.v4.new_code_cell(source.format(target))]
        nbformat.write(nbformat.v4.new_notebook(cells=cells), paths.NOTEBOOKS / "93_link.ipynb")
        task = Task("0123456789abcdef", "g", "93_link", {}, grid_points.surroundings("93_link")["code"], 60, 60)
        outcome = _in_this_project(tiny, task)
        if outcome.state != "done" and "results/x.csv" not in outcome.files:
            raise ValueError(outcome.reason)

    yield "rows of a run", "a link to /etc/passwd", escaping


def _in_this_project(tiny: Project, task: Task) -> Outcome:
    import os
    from unittest import mock

    with mock.patch.dict(os.environ, tiny.environment):
        return supervise(task, "cpu:0")


def _folder(tiny: Project) -> RunFolder:
    return RunFolder(tiny.folder / "build" / "grid" / NAME, "0123456789abcdef", {}, {})


def _rows(tiny: Project) -> Iterator[Attempt]:
    for name in ("../escaped", "/etc/passwd", "a/b", "A", ""):
        given = name or "no name"
        yield "name of rows", given, lambda name=name: results.read_rows(name)
        yield "name to publish", given, lambda name=name: results.publish(name, tiny.folder)
    csv = b"device\ncpu\n"
    records = {"no provenance": None, "a list": b"[]", "deep JSON": b"[" * 200_000, "half a record": b'{"name": "x"}'}
    records |= {"65 MiB of JSON": b'{"x": "' + b"x" * (65 << 20) + b'"}', "cut short": b'{"name"'}
    for given, record in records.items():

        def attempt(record: bytes | None = record) -> object:
            (tiny.folder / "x.csv").write_bytes(csv)
            (tiny.folder / "x.json").unlink(missing_ok=True)
            if record is not None:
                (tiny.folder / "x.json").write_bytes(record)
            return results.publish("x", tiny.folder)

        yield "rows to publish", given, attempt
    yield (
        "devices of rows",
        "two GPU models",
        lambda: results.write_rows([{"device": "NVIDIA H200"}, {"device": "NVIDIA H100"}], "x", parameters={}),
    )
    yield (
        "cell of rows",
        "a tensor",
        lambda: results.write_rows([{"device": "cpu", "x": torch.zeros(2)}], "x", parameters={}),
    )
