"""A person at the page, in Chromium: open a run, slide, scrub, sort. Run: pytest -m slow tests/e2e/test_browse.py

SCREENSHOTS=DIR keeps pictures of every station in that folder, for a person to look at.
"""

import pytest
from playwright import sync_api as playwright

from tests.app_runs import EVIL, make
from tests.e2e.pages import SLOW, chromium, keep, served, visit

pytestmark = SLOW


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    make(root / "older", started="2026-11-20T09:00:00+00:00", base_colour=1)
    make(root / "newer", started="2026-11-21T09:00:00+00:00")
    with served(root) as url:
        yield url


@pytest.fixture
def browser():
    with chromium() as found:
        yield found


@pytest.mark.parametrize(("width", "scheme"), [(1440, "light"), (390, "dark")])
def test_a_run_is_opened_slid_scrubbed_and_sorted(browser, url, width, scheme):
    complaints = []
    page = visit(browser, url, complaints, width, scheme)
    expect = playwright.expect
    expect.set_options(timeout=60_000)
    expect(page.locator("tr[data-run=newer]")).to_have_attribute("aria-current", "true")
    keep(page, f"runs-{width}")

    page.get_by_role("button", name="older").click()  # the row chooses the run and opens Compare
    expect(page.locator("#overview h2")).to_have_text("older")
    expect(page.locator(".pair .prompt")).to_have_text("a cat")
    expect(page.locator(".gallery article")).to_have_count(8)
    keep(page, f"compare-{width}")

    handle, stage = page.get_by_role("slider", name="Share of the base picture"), page.locator(".stage")
    stage.scroll_into_view_if_needed()
    box = stage.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 4, box["y"] + box["height"] / 2, steps=4)
    page.mouse.up()
    assert abs(int(handle.get_attribute("aria-valuenow")) - 25) <= 2
    handle.focus()
    page.keyboard.press("ArrowRight")
    assert abs(int(handle.get_attribute("aria-valuenow")) - 27) <= 2
    page.keyboard.press("End")
    assert handle.get_attribute("aria-valuetext") == "100 % base"

    page.keyboard.press(" ")  # flicker: the other picture at each press
    expect(page.locator("#pair .half.tuned")).to_be_visible()
    expect(page.locator("#pair .half.base")).to_be_hidden()
    page.get_by_role("button", name="Flicker").click()
    expect(page.locator("#pair .half.base")).to_be_visible()
    page.get_by_role("button", name="Side by side").click()
    page.get_by_role("button", name="Zoom in").click()
    place = "e => { const m = new DOMMatrix(getComputedStyle(e).transform); return [m.a, m.e, m.f].map(v => Math.round(v)) }"
    moved = [page.locator(f"#pair .half.{side} img").evaluate(place) for side in ("base", "tuned")]
    assert moved[0] == moved[1] and moved[0][0] == 2 and moved[0][1] < 0, "both pictures are zoomed alike"
    keep(page, f"sides-{width}")
    page.get_by_role("button", name="Zoom out").click()

    scrub = page.locator(".scrub input")
    expect(scrub).to_have_js_property("value", "2")
    scrub.focus()
    page.keyboard.press("ArrowLeft")  # the sampled iteration before the last
    expect(page.locator(".pair")).to_have_attribute("data-iteration", "2")
    expect(page.locator(".scores tbody tr").first).to_contain_text("+0.150")
    assert "iteration=2" in page.url and "prompt=a+cat" in page.url, "the address can be sent"
    page.locator("#curves figure").first.locator(".stripe[data-iteration='0']").click()
    expect(page.locator(".pair")).to_have_attribute("data-iteration", "0")
    expect(scrub).to_have_js_property("value", "0")

    page.get_by_role("radio", name="Biggest losses").check()
    expect(page.locator(".gallery article").first.locator(".prompt")).to_have_text(EVIL)
    page.locator(".gallery article").first.locator("button[data-iteration='4']").click()
    expect(page.locator(".pair .prompt")).to_have_text(EVIL)
    page.get_by_label("Only prompts with").fill("owls two")
    expect(page.locator(".gallery article")).to_have_count(2)

    page.reload()
    expect(page.locator("#overview h2")).to_have_text("older")
    expect(page.locator(".pair .prompt")).to_have_text(EVIL)
    keep(page, f"again-{width}")
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "nothing hangs over the edge"
    assert complaints == []


def test_several_runs_stand_beside_each_other(browser, url):
    complaints = []
    page = visit(browser, f"{url}?run=newer&iteration=2&prompt=two+owls&seed=1", complaints, 1440)
    expect = playwright.expect
    expect(page.locator(".pair")).to_have_attribute("data-iteration", "2", timeout=60_000)
    expect(page.locator(".pair .prompt")).to_have_text("two owls")
    page.get_by_label("Beside this run").click()
    page.get_by_role("option", name="older").click()
    expect(page.locator(".others figure")).to_have_count(3)
    expect(page.locator(".others")).to_contain_text("Its base picture differs")
    expect(page.locator("#together svg").first).to_be_visible()
    keep(page, "several")
    assert complaints == []
