"""JupyterLab in headless Chromium: a server of its own, with nothing of the user's, and what a reader does in it."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

from corey.paths import ROOT

TOKEN = "read-only-on-this-machine"
SETTINGS = {  # of JupyterLab: cells stay in the page when they scroll out of sight, and nothing is fetched
    "notebook-extension/tracker": '{"windowingMode": "none"}',
    "apputils-extension/notification": '{"fetchNews": "false", "checkForUpdates": false}',
}


def copy_of_the_project(folder: Path) -> Path:
    """What notebooks need, so that a run writes neither rows nor figures into the checkout."""
    for name in ("corey", "kernels", "notebooks", "data"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    return folder


@contextmanager
def jupyterlab(project: Path, home: Path):
    """Serve the project's notebooks; yields the address. The server and its kernels end with the block."""
    for name, setting in SETTINGS.items():
        path = home / "config" / "lab" / "user-settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(setting)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = {f"JUPYTER_{each}_DIR": str(home / each.lower()) for each in ("CONFIG", "DATA", "RUNTIME")}
    environment = os.environ | own | {"HOME": str(home), "IPYTHONDIR": str(home), "PYTHONPATH": str(project)}
    options = (
        "--no-browser",
        "--allow-root",
        "--expose-app-in-browser",
        f"--port={port}",
        "--ServerApp.port_retries=0",
    )
    command = [sys.executable, "-m", "jupyterlab", *options, f"--IdentityProvider.token={TOKEN}"]
    with (home / "server.log").open("w") as log:
        server = subprocess.Popen(
            [*command, f"--ServerApp.root_dir={project / 'notebooks'}"], env=environment, stdout=log, stderr=log
        )
        try:
            _wait(server, f"http://127.0.0.1:{port}/api?token={TOKEN}", home / "server.log")
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
            server.wait(30)


def _wait(server, address, log, limit_s=60):
    for _ in range(10 * limit_s):
        try:
            return urllib.request.urlopen(address, timeout=2)
        except OSError:
            if server.poll() is not None:
                break
            time.sleep(0.1)
    raise RuntimeError(f"JupyterLab did not answer at {address}:\n{log.read_text()}")


def chromium_path() -> str | None:
    """Chromium or Chrome on the PATH."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@contextmanager
def chromium(**size):
    """A page of a headless browser."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium_path(), args=["--no-sandbox"])
        try:
            yield browser.new_page(viewport=size or {"width": 1400, "height": 1000})
        finally:
            browser.close()


def open_notebook(page, address, name):
    """Open notebooks/<name>.ipynb as its link does, and wait for its kernel."""
    page.goto(f"{address}/lab/tree/{name}.ipynb?token={TOKEN}&reset")
    page.wait_for_function(
        "() => window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel", timeout=60e3
    )
    page.wait_for_function("() => jupyterapp.shell.currentWidget.sessionContext.session.kernel.status === 'idle'")


def run_all(page, limit_s):
    """Run > Run All Cells; waits until every code cell has run, or one has failed, and returns the notebook."""
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    page.wait_for_function(
        """() => {
            const notebook = jupyterapp.shell.currentWidget.content.model.toJSON();
            const cells = notebook.cells.filter(c => c.cell_type === 'code');
            const failed = cells.some(c => c.outputs.some(o => o.output_type === 'error'));
            return failed || cells.every(c => c.execution_count !== null);
        }""",
        timeout=1000 * limit_s,
    )
    page.wait_for_function(
        "() => jupyterapp.shell.currentWidget.sessionContext.session.kernel.status === 'idle'", timeout=30e3
    )
    return page.evaluate("() => jupyterapp.shell.currentWidget.content.model.toJSON()")
