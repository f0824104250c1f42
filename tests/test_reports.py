"""The report holds what was run and says what was not; a part of it that is missing or interrupted shows."""

import re

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from corey import claims, figures, paths, reports, results

PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNk+A8AAQUBAScY42YAAAAASUVORK5CYII="


@pytest.fixture
def build(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "BUILD", tmp_path)
    (tmp_path / "notebooks").mkdir()
    return tmp_path


def executed(build, name, suffix="", text="said while it ran"):
    outputs = [
        new_output("stream", text=text),
        new_output("display_data", {"text/plain": "HBox(children=())", reports.WIDGET: {"model_id": "1"}}),
        new_output("display_data", {"text/plain": "<Figure>", "image/png": PNG}),
    ]
    cells = [new_markdown_cell("See [the sweep](03_chunk_sweep.ipynb)."), new_code_cell("1", outputs=outputs)]
    told = {"start_time": "2026-11-24T18:56:01.5", "duration": 12.3, "parameters": {"seed": 7}}
    notebook = new_notebook(cells=cells, metadata={"papermill": told, "widgets": {"state": {}}})
    nbformat.write(notebook, build / "notebooks" / f"{name}{suffix}.ipynb")


def row_of(index, name):
    return re.search(rf"<tr><td>(?:<a [^>]*>)?{name}.*?</tr>", index, re.DOTALL).group(0)


def test_the_index_has_every_claim_notebook_figure_and_row_set(build):
    executed(build, "05_cost_model")
    index = reports.build().read_text()
    for claim in claims.load():
        assert f'<tr id="{claim["id"]}">' in index
    ledger = claims.table("all")
    assert index.count('<td class="verdict" style') == len(ledger)
    assert index.count(", not resolved</td>") == (~ledger.resolved).sum() > 0
    assert claims.MEANING in index.replace("Not resolved:", "not resolved:")
    for name in results.names("committed"):
        assert f"<td>{name}</td><td>committed</td>" in index
    for path in figures.drawn():
        assert f'src="figures/{path.name}"' in index
        for kind in (".png", ".pdf"):
            assert (build / "reports" / "figures" / path.with_suffix(kind).name).exists()
    assert 'href="05_cost_model.html"' in row_of(index, "05_cost_model")
    assert "seed = 7" in row_of(index, "05_cost_model") and ">12<" in row_of(index, "05_cost_model")
    assert reports.NOT_RUN in row_of(index, "00_quickstart") and "href" not in row_of(index, "00_quickstart")


def test_every_link_of_the_index_leads_somewhere(build):
    executed(build, "05_cost_model")
    index = reports.build()
    links = re.findall(r'(?:href|src)="([^"#]+)"', index.read_text())
    assert links and [link for link in links if not (index.parent / link).exists()] == []


def test_a_page_keeps_figures_and_text_and_drops_what_only_a_kernel_can_move(build):
    executed(build, "05_cost_model")
    page = reports.page(build / "notebooks" / "05_cost_model.ipynb")
    assert "said while it ran" in page and PNG in page.replace("\n", "")
    assert "HBox" not in page and "html-manager" not in page
    assert 'href="03_chunk_sweep.html"' in page


def test_formulas_are_set_and_nothing_is_fetched(build):
    source = "With $H_0 = \\ln K$ and\n\n$$\\frac{a}{b}$$\n\nbut `$HOME` or `$1`, for $5 and more."
    path = build / "notebooks" / "05_cost_model.ipynb"
    nbformat.write(new_notebook(cells=[new_markdown_cell(source)]), path)
    page = reports.page(path)
    assert page.count('display="inline"') == 1 and page.count('display="block"') == 1 and "<mfrac>" in page
    assert "<code>$HOME</code> or <code>$1</code>, for $5 and more." in page
    assert re.findall(r'<(?:script|link|img)[^>]*(?:src|href)="(?:https?:)?//', page) == []


def test_a_run_that_failed_since_is_shown_as_far_as_it_came(build):
    executed(build, "05_cost_model")
    executed(build, "05_cost_model", ".failed", text="stopped here")
    index = reports.build()
    assert reports.FAILED in row_of(index.read_text(), "05_cost_model")
    assert "stopped here" in (index.parent / "05_cost_model.html").read_text()


def test_without_a_run_there_is_no_report_and_the_command_is_named(build, capsys):
    assert reports.main() == 2
    assert "make figures" in capsys.readouterr().err
    assert not (build / "reports").exists()


def test_an_interrupted_report_leaves_the_one_before(build, monkeypatch):
    executed(build, "05_cost_model")
    before = reports.build().read_text()

    def interrupt(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(reports, "page", interrupt)
    with pytest.raises(KeyboardInterrupt):
        reports.build()
    assert (build / "reports" / "index.html").read_text() == before
    assert sorted(path.name for path in build.iterdir()) == ["notebooks", "reports"]
