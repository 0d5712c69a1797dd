"""The app as its users have it: `app.py` in a process of its own, and Chromium at its page."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SLOW = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")]
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync"]


@contextmanager
def served(runs: Path) -> Iterator[str]:
    """The page's address, with what `python app.py --runs RUNS` serves behind it."""
    command = [sys.executable, "app.py", "--runs", str(runs), "--port", "0"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        yield re.search(r"http://\S+", process.stdout.readline())[0]
    finally:
        process.terminate()
        process.wait(30)


@contextmanager
def chromium():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield browser
        browser.close()


def visit(browser, url, complaints, width, scheme="light"):
    """A page whose every complaint, and every request that leaves this machine, is written down."""
    page = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme).new_page()
    page.set_default_timeout(60_000)
    page.on("console", lambda m: complaints.append(m.text) if m.type == "error" else None)
    left = (
        "AbortError: signal is aborted without reason"  # gradio's client, of a request under way when the page is loaded again
    )
    page.on("pageerror", lambda e: complaints.append(str(e)) if not str(e).startswith(left) else None)
    page.on("dialog", lambda d: complaints.append(f"a script of the data ran: {d.message}"))
    home = url.split("/")[2]
    page.on("request", lambda r: complaints.append(r.url) if r.url.startswith("http") and r.url.split("/")[2] != home else None)
    page.goto(url)
    return page


def keep(page, name):
    """A picture of the page into the folder that SCREENSHOTS names, for a person to look at."""
    if folder := os.environ.get("SCREENSHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)
