"""Data flows one way: corey, notebooks, rows, figures. Each rule is first shown to catch a breach of it."""

import ast
import re

import nbformat
import pandas as pd
import pytest
import yaml
from nbformat.v4 import new_code_cell, new_notebook

from corey import grid_points, paths, run

MODULES = sorted((paths.ROOT / "corey").rglob("*.py"))
NOTEBOOKS = sorted(paths.NOTEBOOKS.glob("*.ipynb"))
WRITES_ROWS = {"to_csv", "to_parquet", "to_json", "to_excel", "to_pickle"}
WRITES_FIGURES = {"savefig", "imsave", "print_figure"}
WRITES_FILES = {"open", "write_text", "write_bytes", "write_atomically"}


def imports(source):
    """Every dotted name that a source imports, `from a import b` as a.b."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module or ''}.{alias.name}".strip(".") for alias in node.names}
    return found


def names(source):
    """Every plain or attribute name that a source uses."""
    nodes = list(ast.walk(ast.parse(source)))
    return {node.id for node in nodes if isinstance(node, ast.Name)} | {
        node.attr for node in nodes if isinstance(node, ast.Attribute)
    }


def module_problems(relative, source):
    """What one module of corey does that the flow forbids; `relative` is its path inside corey/."""
    used, imported = names(source), imports(source)
    problems = [f"imports {name}" for name in imported if name.split(".")[0] == "notebooks"]
    if relative not in ("run.py", "results.py", "reports.py", "_sources.py", "paths.py", "faults/hostile.py"):
        problems += [f"uses {name}" for name in used & {"NOTEBOOKS", "GRIDS"}]
    if relative != "results.py":
        problems += [f"writes rows: {name}" for name in used & (WRITES_ROWS | {"LIVE_RESULTS", "RESULTS"})]
    if relative != "figures.py":
        problems += [f"writes figures: {name}" for name in used & (WRITES_FIGURES | {"FIGURES"})]
    if relative.startswith("plots/"):
        measuring = ("corey.benchmark", "corey.results", "corey.scan", "time", "timeit")
        problems += [f"plotting imports {name}" for name in imported if name.startswith(measuring)]
    return [problem for problem in problems if relative != "paths.py"]


def cell_problems(cell):
    problems = []
    if cell.outputs or cell.execution_count is not None:
        problems.append("has outputs")
    shell = [line for line in cell.source.splitlines() if line.lstrip().startswith(("!", "%"))]
    if shell:
        return [*problems, f"shell or magic line: {shell[0]}"]
    for node in ast.walk(ast.parse(cell.source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.end_lineno - node.lineno + 1 > 5:
            problems.append(f"{node.name} is longer than five lines")
        if isinstance(node, ast.ClassDef):
            problems.append(f"class {node.name}")
    forbidden = names(cell.source) & (WRITES_ROWS | WRITES_FIGURES | WRITES_FILES)
    return problems + [f"writes by {name}" for name in sorted(forbidden)]


def parameters_problems(notebook):
    cells = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    if len(cells) != 1:
        return [f"{len(cells)} cells tagged parameters"]
    lines, statements = cells[0].source.splitlines(), ast.parse(cells[0].source).body
    untyped = [each for each in statements if not isinstance(each, ast.AnnAssign)]
    mute = [each for each in statements if not re.search(r"  # \S", lines[each.end_lineno - 1])]
    if untyped or mute:
        return [f"untyped or without comment: {lines[each.lineno - 1]}" for each in untyped + mute]
    defaults = {each.target.id: ast.literal_eval(each.value) for each in statements}
    if set(defaults) != set(run.declared(notebook)):
        return [f"papermill sees {sorted(run.declared(notebook))}, the cell has {sorted(defaults)}"]
    run.check_parameters(notebook, defaults)
    return []


def notebook_problems(notebook):
    problems = [] if "papermill" not in notebook.metadata else ["papermill metadata"]
    if notebook.metadata.get("kernelspec", {}).get("name") != "python3":
        problems.append("kernelspec is not python3")
    for number, cell in enumerate(notebook.cells, start=1):
        if cell.cell_type == "code":
            problems += [f"cell {number}: {problem}" for problem in cell_problems(cell)]
    return problems or parameters_problems(notebook)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(paths.ROOT)))
def test_a_module_keeps_to_the_flow(path):
    assert module_problems(path.relative_to(paths.ROOT / "corey").as_posix(), path.read_text()) == []


@pytest.mark.parametrize(
    ("relative", "source"),
    [
        ("scan.py", "from notebooks import x"),
        ("scan.py", "from corey import paths\npaths.NOTEBOOKS"),
        ("scan.py", "table.to_csv('x')"),
        ("scan.py", "from corey.paths import RESULTS\nRESULTS"),
        ("plots/sweep.py", "fig.savefig('x')"),
        ("plots/sweep.py", "from corey.benchmark import paired"),
        ("plots/sweep.py", "from corey import benchmark"),
        ("plots/sweep.py", "import time"),
    ],
)
def test_a_module_that_breaks_the_flow_is_caught(relative, source):
    assert module_problems(relative, source)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_clean_typed_and_thin(path):
    assert notebook_problems(nbformat.read(path, as_version=4)) == []


def sample(*sources, parameters="seed: int = 7  # seed", name="python3"):
    cells = [new_code_cell(parameters, metadata={"tags": ["parameters"]}), *map(new_code_cell, sources)]
    return new_notebook(cells=cells, metadata={"kernelspec": {"name": name, "display_name": "Python 3"}})


def test_a_good_notebook_has_no_problems():
    assert notebook_problems(sample("def f(x):\n    a = x\n    b = a\n    c = b\n    return c")) == []


@pytest.mark.parametrize(
    "notebook",
    [
        sample("!ls"),
        sample("%%bash\nls"),
        sample("def f(x):\n    a = x\n    b = a\n    c = b\n    d = c\n    return d"),
        sample("class A: pass"),
        sample("rows.to_csv('x.csv')"),
        sample("fig.savefig('x.png')"),
        sample("open('x', 'w')"),
        sample(name="venv"),
        sample(parameters="seed = 7  # seed"),
        sample(parameters="seed: int = 7"),
        sample(parameters="seed: int | None = 7  # papermill does not see this"),
        new_notebook(cells=[new_code_cell("1")], metadata={"kernelspec": {"name": "python3", "display_name": "x"}}),
    ],
    ids=["shell", "bash", "long", "class", "rows", "figure", "file", "kernel", "untyped", "mute", "union", "no cell"],
)
def test_a_notebook_that_breaks_a_rule_is_caught(notebook):
    assert notebook_problems(notebook)


def test_outputs_left_in_a_notebook_are_caught():
    notebook = sample("1")
    notebook.cells[1].execution_count = 1
    assert notebook_problems(notebook)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_presets_of_a_notebook_are_parameters_that_it_takes(path):
    notebook = nbformat.read(path, as_version=4)
    sections = yaml.safe_load((paths.GRIDS / f"{path.stem}.yaml").read_text())
    assert set(sections) >= set(run.PRESETS)
    for section in run.PRESETS:
        run.check_parameters(notebook, run.preset(path.stem, section))


@pytest.mark.parametrize("path", [path for path in NOTEBOOKS if path.stem != "09_claims"], ids=lambda path: path.stem)
def test_the_grids_of_a_notebook_are_parameters_that_it_takes(path):
    for section in grid_points.BASES:
        assert len(grid_points.expand(path.stem, section)) > 1


def test_every_committed_column_is_in_the_data_dictionary():
    listed = set(re.findall(r"^\| `(\w+)` \|", (paths.ROOT / "data" / "README.md").read_text(), flags=re.M))
    used = {column: path.name for path in paths.RESULTS.glob("*.csv*") for column in pd.read_csv(path, nrows=0).columns}
    assert {column: name for column, name in used.items() if column not in listed} == {}
