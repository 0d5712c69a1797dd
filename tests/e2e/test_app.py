"""From a run to votes on it, as a user goes: train, browse, draw, vote. Run: pytest -m slow tests/e2e/test_app.py

SCREENSHOTS=DIR keeps pictures of every station in that folder, for a person to look at.
"""

import os
import subprocess
import sys

import pytest
from playwright import sync_api as playwright

from tests.e2e.pages import ROOT, SLOW, chromium, keep, served, visit

pytestmark = SLOW
SMALL = [
    "run.iterations=2", "run.eval_every=1", "rollout.prompts=2", "rollout.group_size=4", "rollout.batch_size=8", "optimizer.updates=1",
    "optimizer.micro_batch=8", "evaluation.prompts=8", "run.on_alarm=warn",
]  # fmt: skip


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    command = [sys.executable, "-m", "ddpo.train", "configs/demo.yaml", f"run.output={root / 'demo'}", *SMALL]
    subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True, capture_output=True)
    with served(root) as url:
        yield url


@pytest.mark.parametrize(("width", "scheme"), [(1440, "light"), (390, "dark")])
def test_a_user_opens_a_run_compares_draws_and_votes(url, width, scheme):
    complaints, expect = [], playwright.expect
    expect.set_options(timeout=60_000)
    with chromium() as browser:
        page = visit(browser, url, complaints, width, scheme)
        page.get_by_role("button", name="demo").click()
        expect(page.locator("#overview h2")).to_have_text("demo")
        handle = page.get_by_role("slider", name="Share of the base picture")
        handle.focus()
        before = handle.get_attribute("aria-valuenow")
        page.keyboard.press("ArrowLeft")
        assert handle.get_attribute("aria-valuenow") != before
        page.locator(".scrub input").focus()
        page.keyboard.press("ArrowLeft")
        expect(page.locator(".pair")).to_have_attribute("data-iteration", "1")
        page.get_by_role("radio", name="Biggest gains").check()
        expect(page.locator(".gallery article").first).to_be_visible()
        keep(page, f"compare-{width}")

        page.get_by_role("tab", name="Generate").click()
        page.locator("#prompt textarea").fill("two cats on a blue background")
        page.locator("#draw").click()
        page.locator("#drawn img").first.wait_for()
        expect(page.locator("#verdicts")).to_contain_text("clip")
        keep(page, f"generate-{width}")

        page.get_by_role("tab", name="Vote").click()
        overall = page.locator('[data-is="overall"]')
        seen = [overall.inner_text()]
        already = 5 if width == 390 else 0  # the votes of the wide screen are there
        for i, key in enumerate(("ArrowLeft", "ArrowRight", "ArrowDown", "x", "ArrowRight"), already + 1):
            page.locator('[data-is="left"][src]').wait_for()
            page.wait_for_timeout(400)  # a press right after a pair appeared is a bounce
            page.keyboard.press(key)
            expect(overall).to_contain_text(f"of {i} vote")
            seen.append(overall.inner_text())
        assert len(set(seen)) > 3, "the interval moves"
        keep(page, f"vote-{width}")
        page.wait_for_timeout(2000)  # the next pairs have come: gradio complains of what a reload cuts off
        page.reload()
        page.locator("#overview h2").wait_for()  # the address names the run, so the page opens at Compare when it has arrived
        page.get_by_role("tab", name="Vote").click()
        expect(overall).to_have_text(seen[-1])

        page.get_by_role("tab", name="Score").click()
        keep(page, f"score-{width}")
        assert page.evaluate("document.documentElement.scrollWidth") <= width, "nothing hangs over the edge"
    assert complaints == []
