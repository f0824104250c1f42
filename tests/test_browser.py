"""A reader in JupyterLab: the notebook opens with its kernel, runs, and its figure follows a slider."""

import base64
import hashlib
import os
import shlex
import subprocess
import sys

import browser
import pytest
import yaml

from corey.paths import ROOT

pytest.importorskip("playwright", reason="playwright is not installed: make browser")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(browser.chromium_path() is None, reason="there is no Chromium on the PATH"),
]
FIGURE = "img[src^='data:image/png']"


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    project = browser.copy_of_the_project(tmp_path_factory.mktemp("project"))
    with browser.jupyterlab(project, tmp_path_factory.mktemp("home")) as address, browser.chromium() as page:
        yield project, address, page


def errors(notebook):
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", ())]
    return [f"{each['ename']}: {each['evalue']}" for each in outputs if each["output_type"] == "error"]


def strip_as_the_hook_does(path):
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    _, *options = shlex.split(next(hook["entry"] for hook in hooks if hook["id"] == "nbstripout"))
    subprocess.run([sys.executable, "-m", "nbstripout", *options, path], check=True)


@pytest.mark.parametrize("name", ["09_claims", "05_cost_model"])  # in an order of its own
def test_a_notebook_runs_without_a_word_on_stderr_and_the_hook_cleans_what_is_saved(lab, name):
    project, address, page = lab
    saved = project / "notebooks" / f"{name}.ipynb"
    strip_as_the_hook_does(saved)
    clean = saved.read_bytes()
    browser.open_notebook(page, address, name)
    notebook = browser.run_all(page, limit_s=60)
    assert errors(notebook) == []
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", ())]
    assert [output["text"] for output in outputs if output.get("name") == "stderr"] == []
    page.evaluate("() => jupyterapp.shell.currentWidget.context.save()")
    assert saved.read_bytes() != clean
    strip_as_the_hook_does(saved)
    assert saved.read_bytes() == clean


def test_the_quickstart_runs_and_its_figure_follows_a_slider_and_a_menu(lab, tmp_path):
    project, address, page = lab
    browser.open_notebook(page, address, "00_quickstart")
    assert errors(browser.run_all(page, limit_s=180)) == []
    assert (project / "figures" / "quickstart.png").exists()

    figure = page.locator(FIGURE)
    assert figure.count() == 1

    def drawn():
        return hashlib.sha256(base64.b64decode(figure.get_attribute("src").partition(",")[2])).hexdigest()

    def wait_for_another(than):
        page.wait_for_function(f'old => document.querySelector("{FIGURE}").src !== old', arg=than, timeout=60e3)

    seen = {drawn()}
    before = figure.get_attribute("src")
    slider = page.locator(".widget-hslider", has_text="bins").locator(".noUi-handle")
    slider.scroll_into_view_if_needed()
    slider.focus()
    slider.press("ArrowLeft")  # from 256 bins to 128
    wait_for_another(before)
    seen.add(drawn())
    assert page.locator(".widget-hslider", has_text="bins").locator(".widget-readout").inner_text() == "128"

    before = figure.get_attribute("src")
    page.locator(".widget-dropdown", has_text="distribution").locator("select").select_option("sparse2")
    wait_for_another(before)
    seen.add(drawn())
    assert len(seen) == 3
    page.screenshot(path=tmp_path / "quickstart.png")
    assert errors(page.evaluate("() => jupyterapp.shell.currentWidget.content.model.toJSON()")) == []


def test_the_report_opens_with_verdicts_figures_and_a_notebook(lab, tmp_path):
    project, _, page = lab
    environment = os.environ | {"PYTHONPATH": str(project)}
    for command in (["corey.run", "09_claims"], ["corey.reports"]):
        subprocess.run([sys.executable, "-m", *command], env=environment, cwd=project, check=True, capture_output=True)
    broken = []
    page.on("pageerror", lambda error: broken.append(str(error)))
    page.goto((project / "build" / "reports" / "index.html").as_uri())
    assert page.locator("#verdicts ~ table >> nth=0 >> tr").count() == 51  # fifty claims below the header
    page.locator("figure img").last.scroll_into_view_if_needed()
    page.wait_for_function("() => [...document.querySelectorAll('figure img')].at(-1).naturalWidth > 1000")
    page.screenshot(path=tmp_path / "report.png")
    assert broken == []
    page.get_by_role("cell", name="09_claims", exact=True).get_by_role("link").click()
    assert page.get_by_role("heading", name="09 The ledger").is_visible()
    assert page.locator(f"{FIGURE} >> visible=true").count() == 1
