"""The app's pictures in the README: `python -m tests.e2e.pictures runs/demo` writes docs/app-*.png. Needs Chromium, and a finished run.

The page is served as users have it, from the folder that the run is in; five votes are cast in a copy of the run.
"""

import shutil
import sys
import tempfile
from pathlib import Path

from tests.e2e.pages import chromium, served, visit

DOCS = Path(__file__).parents[2] / "docs"


def main(run: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(run, Path(folder) / "demo")
        (Path(folder) / "demo" / "preferences.jsonl").unlink(missing_ok=True)
        with served(Path(folder)) as url, chromium() as browser:
            page = visit(browser, f"{url}?run=demo", [], 1440)
            page.locator("#curves figure").first.wait_for()
            page.wait_for_timeout(1500)
            page.screenshot(path=DOCS / "app-compare.png")
            page.get_by_role("tab", name="Generate").click()
            page.locator("#prompt textarea").fill("two lions on a blue background")
            page.locator("#draw").click()
            page.locator("#verdicts table").wait_for()
            page.wait_for_timeout(1500)
            page.screenshot(path=DOCS / "app-generate.png")
            page.get_by_role("tab", name="Vote").click()
            for i, key in enumerate(("ArrowLeft", "ArrowRight", "ArrowDown", "ArrowRight", "ArrowRight"), 1):
                page.locator('[data-is="left"][src]').wait_for()
                page.wait_for_timeout(500)
                page.keyboard.press(key)
                page.locator(f'[data-is="overall"]:has-text("of {i} votes")').wait_for()
            page.wait_for_timeout(500)
            page.screenshot(path=DOCS / "app-vote.png", full_page=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
