"""Run one notebook strictly: `python -m corey.run 03_chunk_sweep --preset laptop --set seed=8`.

papermill does the running. This wrapper adds what a batch needs to trust it: parameters are checked against the typed
parameters cell before a kernel starts, the kernel is the interpreter that runs this module, and a run counts as done,
and its output gets its final name, only when every code cell was executed. A failed run leaves <name>.failed.ipynb,
says which cell failed and exits with 1; a refused command exits with 2.
"""

import argparse
import copy
import dataclasses
import keyword
import logging
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import nbformat
import papermill
import yaml
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager

from corey import paths
from corey._check import bad_type, bad_value

SCALARS = {"int": int, "float": (int, float), "str": str, "bool": bool}
PRESETS = ("laptop", "paper")


@dataclasses.dataclass(frozen=True)
class RunResult:
    """A finished run: the executed notebook, the parameters it was given and its wall time."""

    notebook: str
    out: Path
    parameters: dict
    duration_s: float


class NotebookFailed(RuntimeError):
    """A run that did not execute every cell; `partial` is the notebook as far as it came."""

    def __init__(self, reason: str, partial: Path):
        super().__init__(f"{reason}; what was executed is in {partial}")
        self.reason, self.partial = reason, partial


class _ThisInterpreter(AsyncKernelManager):
    """A kernel of sys.executable, whatever kernel specifications the user or the machine has installed."""

    @property
    def kernel_spec(self) -> KernelSpec:
        return KernelSpec(
            argv=[sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
            display_name="Python 3",
            language="python",
        )


def run_notebook(name: str, parameters: Mapping, *, out: Path | None = None) -> RunResult:
    """Run notebooks/<name>.ipynb with these parameters into `out`, build/notebooks/<name>.ipynb by default.

    Raises, before any kernel starts, FileNotFoundError for no such notebook and ValueError or TypeError for parameters
    that its parameters cell does not declare with that type; NotebookFailed when not every code cell was executed.
    """
    notebook = nbformat.read(find(name), as_version=4)
    parameters = check_parameters(notebook, parameters)
    out = _output(name, out)
    out.parent.mkdir(parents=True, exist_ok=True)
    handle, scratch = tempfile.mkstemp(dir=out.parent, prefix=f".{out.stem}.", suffix=".ipynb")
    os.close(handle)
    os.chmod(scratch, 0o644)
    start = time.monotonic()
    try:
        _execute(notebook, Path(scratch), parameters)
    except BaseException as error:
        partial = _keep_partial(Path(scratch), out, _reason(error))
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
            raise bad_type(f"parameter {name}", value, f"{known[name]} (value {value!r})")
    return dict(parameters)


def preset(name: str, section: str) -> dict:
    """The parameters that notebooks/grids/<name>.yaml lists under `laptop` or `paper`."""
    find(name)
    path = paths.GRIDS / f"{name}.yaml"
    content = yaml.safe_load(path.read_text())
    if not isinstance(content, dict) or not isinstance(content.get(section), dict):
        raise bad_value("preset", repr(section), f"a section of {path.name} that maps names to values")
    return content[section]


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
    out = Path(out).resolve()
    if out.is_relative_to(paths.NOTEBOOKS.resolve()):
        raise bad_value("out", repr(str(out)), "a path outside notebooks/, which hold the clean sources")
    return out


def _execute(notebook: nbformat.NotebookNode, scratch: Path, parameters: dict) -> None:
    interactive = sys.stdout.isatty()
    done = papermill.execute_notebook(
        notebook,
        scratch,
        parameters,
        kernel_name="python3",
        language="python",
        kernel_manager_class=_ThisInterpreter,
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
    return f"{type(error).__name__}: {error}"


def _failed(out: Path) -> Path:
    return out.with_name(f"{out.stem}.failed.ipynb")


def _keep_partial(scratch: Path, out: Path, reason: str) -> Path:
    """Rename the scratch notebook to <name>.failed.ipynb, with metadata that say so.

    papermill marks every cell completed after a kernel died; here a cell without execution count is pending again.
    """
    content = scratch.read_text()
    if content:
        notebook = nbformat.reads(content, as_version=4)
        notebook.metadata["corey"] = {"status": "failed", "reason": reason}
        notebook.metadata.get("papermill", {})["exception"] = True
        for cell in notebook.cells:
            if cell.cell_type == "code" and cell.execution_count is None and "papermill" in cell.metadata:
                cell.metadata.papermill["status"] = "pending"
        nbformat.write(notebook, scratch)
    os.replace(scratch, _failed(out))
    return _failed(out)


def _setting(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"got {text!r}, want name=value with the value in YAML")
    return name, value


def _collect(options: argparse.Namespace) -> dict:
    parameters = preset(options.name, options.preset) if options.preset else {}
    if options.parameters:
        content = yaml.safe_load(options.parameters.read_text())
        if not isinstance(content, dict):
            raise bad_type("--parameters", content, "a YAML mapping of names to values")
        parameters |= content
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
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO if not sys.stdout.isatty() else logging.WARNING, format="%(message)s")
    try:
        done = run_notebook(options.name, _collect(options), out=options.out)
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
