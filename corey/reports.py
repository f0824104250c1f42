"""One HTML report of what was run here: verdicts, every executed notebook, figures, provenance; `make reports`.

build/reports/index.html is the first page. The folder holds all it links to and may be sent to someone: a page fetches
nothing, and its formulas are MathML, which browsers set themselves.
"""

import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import nbformat
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from latex2mathml.converter import convert
from nbconvert import HTMLExporter

from corey import claims, figures, paths, results
from corey.plots.ledger import COLOURS
from corey.progress import progress

FORMULA = re.compile(r"(`+).*?\1|(\$\$?)(?!\s)(.+?)(?<!\s)\2", re.DOTALL)  # code, in which a $ is a $, or a formula
SCRIPT = re.compile(r'<script src="https?:[^>]*>\s*</script>')  # MathJax and RequireJS of nbconvert's template
WIDGET = "application/vnd.jupyter.widget-view+json"
NOT_RUN, FAILED, DONE = "not run here yet", "failed: as far as it came", "ran to its end"


def build() -> Path:
    """Write build/reports anew from build/notebooks, figures/ and the rows; returns the path of its index.

    A notebook that was not run, or whose last run failed, is listed as such. Raises FileNotFoundError where none was
    run. A report that is interrupted leaves the one before as it was.
    """
    runs = [_run(source.stem) for source in sorted(paths.NOTEBOOKS.glob("*.ipynb"))]
    if not any(run["path"] for run in runs):
        raise FileNotFoundError(f"no executed notebook in {_executed()}: make figures runs them")
    with tempfile.TemporaryDirectory(dir=paths.BUILD, prefix=".reports-") as scratch:
        folder = Path(scratch) / "reports"
        (folder / "figures").mkdir(parents=True)
        for run in progress([run for run in runs if run["path"]], "notebooks"):
            (folder / run["page"]).write_text(page(run["path"]))
        for path in figures.drawn():
            shutil.copy(path, folder / "figures")
            shutil.copy(path.with_suffix(".pdf"), folder / "figures")
        (folder / "index.html").write_text(_index(runs))
        shutil.rmtree(paths.BUILD / "reports", ignore_errors=True)
        folder.rename(paths.BUILD / "reports")
    return paths.BUILD / "reports" / "index.html"


def page(path: Path) -> str:
    """One executed notebook as HTML. What only a kernel can move, controls and bars, is left out; figures stay."""
    notebook = nbformat.read(path, as_version=4)
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if WIDGET not in output.get("data", {})]
        elif cell.cell_type == "markdown":
            cell.source = FORMULA.sub(_mathml, cell.source)
    html, _ = HTMLExporter(template_name="lab").from_notebook_node(
        notebook, resources={"metadata": {"name": path.stem.removesuffix(".failed")}}
    )
    html = SCRIPT.sub("", html)
    for source in paths.NOTEBOOKS.glob("*.ipynb"):  # links between notebooks become links between pages
        html = html.replace(f'href="{source.name}"', f'href="{source.stem}.html"')
    return html


def _mathml(found: re.Match) -> str:
    code, dollars, formula = found.groups()
    if code:
        return found[0]
    mathml = convert(formula, display="block" if dollars == "$$" else "inline")
    return mathml.replace("<mi>ln</mi><mi>", '<mi>ln</mi><mspace width="0.17em"/><mi>')  # as TeX does


def _executed() -> Path:
    return paths.BUILD / "notebooks"


def _run(name: str) -> dict:
    """The last run of a notebook: the executed one, or the one that failed since."""
    done, failed = (_executed() / f"{name}{suffix}.ipynb" for suffix in ("", ".failed"))
    path = failed if failed.exists() else done if done.exists() else None
    told = {} if path is None else nbformat.read(path, as_version=4).metadata.get("papermill", {})
    return {
        "name": name,
        "path": path,
        "page": f"{name}.html" if path else "",
        "state": {None: NOT_RUN, failed: FAILED, done: DONE}[path],
        "executed": (told.get("start_time") or "")[:16].replace("T", " "),
        "seconds": f"{told['duration']:.0f}" if told.get("duration") else "",
        "parameters": ", ".join(f"{key} = {value}" for key, value in told.get("parameters", {}).items()),
    }


def _index(runs: list[dict]) -> str:
    ledger = claims.table("all")
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template("report.html").render(
        built=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        machine=results.machine(),
        counts={verdict: int((ledger.verdict == verdict).sum()) for verdict in claims.VERDICTS},
        meaning=claims.MEANING,
        doubt=claims.doubt,
        colours=COLOURS,
        claims=ledger.to_dict("records"),
        pages={run["name"] for run in runs if run["path"]},
        notebooks=runs,
        figures=[
            {"stem": path.stem, "claims": list(ledger.id[ledger.figure == path.stem])} for path in figures.drawn()
        ],
        sets=list(_sets()),
    )


def _sets() -> Iterator[dict]:
    for source in ("live", "committed"):
        for name in results.names(source):
            record = results.read_provenance(name, source)
            code = record["code"]
            yield {
                "name": name,
                "source": source,
                "rows": record["rows"],
                "device": "; ".join(sorted(set(results.read_rows(name, source).device))),
                "commit": code["commit"][:12] + ("*" if code["dirty"] else ""),
                "time": record["time_utc"][:16].replace("T", " "),
                "torch": record["versions"]["torch"],
            }


def main() -> int:
    try:
        print(f"written: {build()}")
    except FileNotFoundError as error:
        print(f"refused: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
