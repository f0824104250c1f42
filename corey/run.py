"""Run one notebook strictly: `python -m corey.run 03_chunk_sweep --preset laptop --set seed=8`.

papermill does the running. This wrapper adds what a batch needs to trust it: parameters are checked against the typed
parameters cell before a kernel starts, the kernel is the interpreter that runs this module, and a run counts as done,
and its output gets its final name, only when every code cell was executed. A failed run leaves <name>.failed.ipynb,
says which cell failed and exits with 1; a refused command exits with 2. The kernel is reached through Unix sockets in a
private folder, never through TCP ports, which any user of the machine could read.
"""

import argparse
import copy
import dataclasses
import keyword
import logging
import os
import re
import reprlib
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import nbformat
import papermill
import yaml
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient.exceptions import CellTimeoutError, DeadKernelError
from papermill.iorw import LocalHandler, papermill_io
from traitlets import CaselessStrEnum, default

from corey import paths
from corey._check import bad_type, bad_value
from corey._files import MAX_SETTINGS_BYTES, parse_json, read_limited, write_atomically

SCALARS = {"int": int, "float": (int, float), "str": str, "bool": bool}
PRESETS = ("laptop", "paper")
SOCKET_PATH = 107  # bytes that Linux allows in the path of a Unix socket


@dataclasses.dataclass(frozen=True)
class RunResult:
    """A finished run: the executed notebook, the parameters it was given and its wall time."""

    notebook: str
    out: Path
    parameters: dict
    duration_s: float


class NotebookFailed(RuntimeError):
    """A run that did not execute every cell; `partial` is the notebook as far as it came, None on a full disk."""

    def __init__(self, reason: str, partial: Path | None):
        super().__init__(f"{reason}; " + (f"what was executed is in {partial}" if partial else "nothing could be kept"))
        self.reason, self.partial = reason, partial


class _WholeNotebooks(LocalHandler):
    """papermill writes the notebook after every cell; this keeps the last whole one when a write fails."""

    def write(self, buf: str, path: str) -> None:
        write_atomically(Path(path), buf.encode())


papermill_io.register("/", _WholeNotebooks())


class _ThisInterpreter(AsyncKernelManager):
    """A kernel of sys.executable, whatever kernel specifications the user or the machine has installed."""

    transport = CaselessStrEnum(["tcp", "ipc"], default_value="ipc")
    last_exit_code: int | None = None  # of the kernel that died last; negative for a signal

    @default("connection_file")
    def _in_a_private_folder(self) -> str:
        base = tempfile.gettempdir()
        longest = len(os.fsencode(f"{base}/corey-12345678/kernel-ipc-12345"))
        self._private = tempfile.TemporaryDirectory(prefix="corey-", dir=base if longest <= SOCKET_PATH else "/tmp")
        return f"{self._private.name}/kernel.json"

    def cleanup_ipc_files(self) -> None:
        super().cleanup_ipc_files()
        self._private.cleanup()

    async def _async_is_alive(self) -> bool:
        alive = await super()._async_is_alive()
        if not alive and self.has_kernel:
            type(self).last_exit_code = await self.provisioner.poll()
        return alive

    is_alive = _async_is_alive

    @property
    def kernel_spec(self) -> KernelSpec:
        return KernelSpec(
            argv=[sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
            display_name="Python 3",
            language="python",
        )


def run_notebook(
    name: str, parameters: Mapping, *, out: Path | None = None, cell_timeout_s: int | None = None
) -> RunResult:
    """Run notebooks/<name>.ipynb with these parameters into `out`, build/notebooks/<name>.ipynb by default.

    A cell that takes longer than `cell_timeout_s` seconds ends the run; None sets no limit.
    Raises, before any kernel starts, FileNotFoundError for no such notebook and ValueError or TypeError for parameters
    that its parameters cell does not declare with that type; NotebookFailed when not every code cell was executed.
    """
    notebook = read_notebook(find(name))
    parameters = check_parameters(notebook, parameters)
    if cell_timeout_s is not None and not (isinstance(cell_timeout_s, int) and cell_timeout_s > 0):
        raise bad_value("cell_timeout_s", repr(cell_timeout_s), "a positive number of whole seconds")
    out = _output(name, out)
    out.parent.mkdir(parents=True, exist_ok=True)
    handle, scratch = tempfile.mkstemp(dir=out.parent, prefix=f".{out.stem}.", suffix=".ipynb")
    os.close(handle)
    os.chmod(scratch, 0o644)
    start = time.monotonic()
    try:
        _execute(notebook, Path(scratch), parameters, cell_timeout_s)
    except BaseException as error:
        partial = _keep_partial(Path(scratch), notebook, out, error)
        if isinstance(error, Exception):
            raise NotebookFailed(f"{name}: {_reason(error)}", partial) from error
        raise
    os.replace(scratch, out)
    _failed(out).unlink(missing_ok=True)
    return RunResult(name, out, parameters, time.monotonic() - start)


def find(name: str) -> Path:
    """The path of a notebook, which must lie in notebooks/ itself."""
    if not isinstance(name, str) or not re.fullmatch(r"\w+", name):
        raise bad_value("name", repr(name), "the stem of a notebook in notebooks/, such as '03_chunk_sweep'")
    path = (paths.NOTEBOOKS / f"{name}.ipynb").resolve()
    if path.parent != paths.NOTEBOOKS.resolve():
        raise bad_value("name", repr(name), "a notebook that does not lead out of notebooks/")
    if not path.exists():
        known = ", ".join(sorted(each.stem for each in paths.NOTEBOOKS.glob("*.ipynb")))
        raise FileNotFoundError(f"no notebook {name!r} in notebooks/; there are {known or 'none'}")
    return path


def read_notebook(path: Path) -> nbformat.NotebookNode:
    """A notebook of format 4 and at most 64 MiB; ValueError naming the file for anything else."""
    content = read_limited(path)
    parse_json(content, path)
    try:
        return nbformat.reads(content.decode(), as_version=4)
    except Exception as error:  # nbformat lets KeyError and AttributeError of its converters through
        raise bad_value(
            str(path), f"no notebook ({type(error).__name__}: {error})", "a notebook of format 4"
        ) from error


def declared(notebook: nbformat.NotebookNode) -> dict[str, str]:
    """Names and annotations of a notebook's parameters cell."""
    plain = copy.deepcopy(notebook)
    plain.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return {name: each["inferred_type_name"] for name, each in papermill.inspect_notebook(plain).items()}


def check_parameters(notebook: nbformat.NotebookNode, parameters: Mapping) -> dict:
    """The parameters, once each has been found in the parameters cell and has the type of its annotation."""
    if not isinstance(parameters, Mapping):
        raise bad_type("parameters", parameters, "a mapping of names to values")
    known = declared(notebook)
    for name, value in parameters.items():
        if not isinstance(name, str) or not name.isidentifier() or keyword.iskeyword(name):
            raise bad_value("parameter", repr(name), "a Python identifier")
        if name not in known:
            raise bad_value("parameter", repr(name), f"one of {', '.join(known) or '(this notebook has none)'}")
        if not _has_type(value, known[name]):
            raise bad_type(f"parameter {name}", value, f"{known[name]} (value {reprlib.repr(value)})")
    return dict(parameters)


def preset(name: str, section: str) -> dict:
    """The parameters that notebooks/grids/<name>.yaml lists under `laptop` or `paper`."""
    content = settings(name)
    if not isinstance(content.get(section), dict):
        raise bad_value("preset", repr(section), f"a section of {name}.yaml that maps names to values")
    return content[section]


def settings(name: str) -> dict:
    """All of notebooks/grids/<name>.yaml: the sections `laptop` and `paper`, and the `grid` that corey.grid crosses."""
    find(name)
    return _read_mapping(paths.GRIDS / f"{name}.yaml", f"grids/{name}.yaml")


def _read_mapping(path: Path, argument: str) -> dict:
    try:
        content = yaml.safe_load(read_limited(path, MAX_SETTINGS_BYTES))
    except (yaml.YAMLError, RecursionError) as error:
        raise bad_value(argument, f"what is no YAML ({error})", "a mapping of names to values") from error
    if not isinstance(content, dict):
        raise bad_type(argument, content, "a mapping of names to values")
    return content


def _has_type(value: object, annotation: str) -> bool:
    element = re.fullmatch(r"list\[(.+)\]", annotation)
    if element:
        return isinstance(value, list) and all(_has_type(each, element[1]) for each in value)
    if annotation not in SCALARS:
        raise bad_value(
            "annotation", repr(annotation), f"{', '.join(SCALARS)} or a list of these, in the parameters cell"
        )
    return isinstance(value, SCALARS[annotation]) and (annotation == "bool" or not isinstance(value, bool))


def _output(name: str, out: Path | None) -> Path:
    if out is None:
        return paths.BUILD / "notebooks" / f"{name}.ipynb"
    if "://" in str(out) or Path(out).suffix != ".ipynb":
        raise bad_value("out", repr(str(out)), "a local path ending in .ipynb")
    if "{" in str(Path(out).resolve()):
        raise bad_value("out", repr(str(out)), "a path without braces, which papermill fills with parameters")
    out = Path(out).resolve()
    if out.is_relative_to(paths.NOTEBOOKS.resolve()):
        raise bad_value("out", repr(str(out)), "a path outside notebooks/, which hold the clean sources")
    return out


def _execute(notebook: nbformat.NotebookNode, scratch: Path, parameters: dict, cell_timeout_s: int | None) -> None:
    _ThisInterpreter.last_exit_code = None
    interactive = sys.stdout.isatty()
    done = papermill.execute_notebook(
        notebook,
        scratch,
        parameters,
        kernel_name="python3",
        language="python",
        kernel_manager_class=_ThisInterpreter,
        execution_timeout=cell_timeout_s,
        progress_bar=interactive,
        log_output=not interactive,
        cwd=paths.NOTEBOOKS,
    )
    for number, cell in enumerate(done.cells, start=1):
        if any(output.output_type == "error" for output in cell.get("outputs", ())):
            raise RuntimeError(f"cell {number} ended the kernel or raised")  # papermill lets SystemExit 0 pass
        if cell.cell_type == "code" and cell.source.strip() and cell.execution_count is None:
            raise RuntimeError(f"cell {number} was not executed")


def _reason(error: BaseException) -> str:
    if isinstance(error, papermill.PapermillExecutionError):
        return f"cell {error.cell_index + 1} raised {error.ename}: {error.evalue}"
    if isinstance(error, CellTimeoutError):
        return str(error).splitlines()[0]
    code = _ThisInterpreter.last_exit_code
    if isinstance(error, DeadKernelError) and code is not None:
        return f"DeadKernelError: the kernel {'exited with ' + str(code) if code >= 0 else signal.Signals(-code).name}"
    return f"{type(error).__name__}: {error}"


def _state(error: BaseException) -> str:
    """One of the final states of a run but done: failed, timeout or killed."""
    if isinstance(error, CellTimeoutError):
        return "timeout"
    return "killed" if isinstance(error, (DeadKernelError, SystemExit, KeyboardInterrupt)) else "failed"


def _failed(out: Path) -> Path:
    return out.with_name(f"{out.stem}.failed.ipynb")


def _keep_partial(scratch: Path, source: nbformat.NotebookNode, out: Path, error: BaseException) -> Path | None:
    """Rename the scratch notebook to <name>.failed.ipynb, with metadata that say so; `source` where it is still empty.

    papermill marks every cell completed after a kernel died; here a cell without execution count is pending again.
    """
    content = scratch.read_text()
    notebook = nbformat.reads(content, as_version=4) if content else copy.deepcopy(source)
    exception = error.ename if isinstance(error, papermill.PapermillExecutionError) else type(error).__name__
    notebook.metadata["corey"] = {"status": _state(error), "reason": _reason(error), "exception": exception}
    notebook.metadata.get("papermill", {})["exception"] = True
    for cell in notebook.cells:
        if cell.cell_type == "code" and cell.execution_count is None and "papermill" in cell.metadata:
            cell.metadata.papermill["status"] = "pending"
    try:
        write_atomically(scratch, nbformat.writes(notebook).encode())
    except OSError:  # a full disk: the last whole notebook stays, as papermill marked it
        if not content:
            scratch.unlink()
            return None
    os.replace(scratch, _failed(out))
    return _failed(out)


def _end_with_input() -> None:
    """Wait for the end of standard input, then end this process as SIGTERM does."""
    while os.read(0, 1):  # not sys.stdin, whose lock a waiting thread would hold while the interpreter shuts down
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def _setting(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"got {text!r}, want name=value with the value in YAML")
    return name, value


def _collect(options: argparse.Namespace) -> dict:
    parameters = preset(options.name, options.preset) if options.preset else {}
    if options.parameters:
        parameters |= _read_mapping(options.parameters, "--parameters")
    return parameters | {name: yaml.safe_load(value) for name, value in options.settings}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m corey.run", description="Run one notebook strictly.")
    parser.add_argument("name", help="stem of a notebook, such as 03_chunk_sweep")
    parser.add_argument("--preset", choices=PRESETS, help="parameters from notebooks/grids/NAME.yaml")
    parser.add_argument("--parameters", type=Path, metavar="FILE", help="parameters from a YAML file, over the preset")
    parser.add_argument(
        "--set", dest="settings", action="append", default=[], type=_setting, metavar="NAME=VALUE", help="one, in YAML"
    )
    parser.add_argument("--out", help="path of the executed notebook, build/notebooks/NAME.ipynb by default")
    parser.add_argument("--cell-timeout", type=int, metavar="SECONDS", help="end the run when a cell takes longer")
    parser.add_argument("--tied", action="store_true", help="end when standard input does, so with whoever started it")
    options = parser.parse_args(arguments)
    if options.tied:
        threading.Thread(target=_end_with_input, daemon=True).start()
    logging.basicConfig(level=logging.INFO if not sys.stdout.isatty() else logging.WARNING, format="%(message)s")
    try:
        done = run_notebook(options.name, _collect(options), out=options.out, cell_timeout_s=options.cell_timeout)
    except NotebookFailed as failure:
        print(f"failed: {failure}", file=sys.stderr)
        return 1
    except (OSError, TypeError, ValueError, yaml.YAMLError) as refusal:
        print(f"refused: {refusal}", file=sys.stderr)
        return 2
    print(f"done: {done.out} in {done.duration_s:.1f} s")
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # shut the kernel down and keep the partial notebook
    sys.exit(main())
