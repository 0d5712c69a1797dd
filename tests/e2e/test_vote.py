"""Voting in a real browser: `pytest -m slow tests/e2e/test_vote.py`. Needs Debian's chromium."""

import pytest

from ddpo import votes
from tests.e2e.pages import SLOW, chromium, served, visit
from tests.polling import run_folder

pytestmark = SLOW


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    """(the page's address, the folder of its runs)"""
    root = tmp_path_factory.mktemp("runs")
    with served(root) as url:
        yield url, root


@pytest.fixture
def page(app, request):
    """(browser page at the Vote tab, the run's folder, what the console and the network said)"""
    url, root = app
    name, wrong = request.node.name[:40], []
    folder = run_folder(root / name, 6)
    with chromium() as browser:
        tab = visit(browser, f"{url}?run={name}", wrong, 1440)
        to_vote(tab)
        yield tab, folder, wrong


def to_vote(tab):
    tab.locator("#overview h2").wait_for()  # the address names a run, so the page opens at Compare when it has arrived
    tab.get_by_role("tab", name="Vote").click()


def read(tab, name):
    return tab.locator(f'[data-is="{name}"]').inner_text()


def cast(tab, key, total):
    """Wait until a pair may be answered, press, and wait until it is counted."""
    tab.wait_for_selector('[data-is="left"][src]')
    tab.wait_for_timeout(400)  # a press right after a pair appeared is a bounce
    tab.keyboard.press(key)
    tab.wait_for_function(f"document.querySelector('[data-is=overall]').textContent.includes('of {total} votes')")


def test_five_votes_by_keyboard_are_counted_and_found_again(page):
    tab, folder, wrong = page
    seen = []
    for total, key in enumerate(("ArrowLeft", "ArrowRight", "ArrowDown", "x", "ArrowRight"), 1):
        cast(tab, key, total)
        seen.append(read(tab, "overall"))
    assert len(set(seen)) >= 4  # the interval moves
    assert [v.answer for v in votes.read(folder).standing] == ["a", "b", "tie", "both_bad", "b"]
    assert tab.locator('[data-is="reveal"]').is_visible() and {"base", "iteration 4"} <= set(
        tab.locator(".behind b").all_inner_texts()
    )
    tab.wait_for_timeout(2000)  # the next pairs have come: gradio complains of what a reload cuts off
    tab.reload()
    to_vote(tab)
    tab.wait_for_function("document.querySelector('[data-is=overall]')?.textContent.includes('of 5 votes')")
    assert read(tab, "overall") == seen[-1]
    assert wrong == []


def test_undo_withdraws_and_shows_the_pair_again(page):
    tab, folder, _ = page
    cast(tab, "ArrowLeft", 1)
    tab.wait_for_timeout(400)
    prompt, picture = votes.read(folder).standing[0].prompt, tab.locator('[data-is="left"]')
    tab.keyboard.press("u")
    tab.wait_for_function("document.querySelector('[data-is=message]').textContent.includes('withdrawn')")
    assert (
        votes.read(folder).standing == [] and read(tab, "prompt") == prompt and picture.get_attribute("src").startswith("data:")
    )
    cast(tab, "ArrowRight", 1)
    assert votes.read(folder).standing[0].prompt == prompt


def test_a_double_press_counts_once(page):
    tab, folder, _ = page
    cast(tab, "ArrowLeft", 1)
    tab.wait_for_timeout(400)
    for _ in range(3):
        tab.keyboard.press("ArrowLeft")
    tab.wait_for_function("document.querySelector('[data-is=overall]').textContent.includes('of 2 votes')")
    tab.wait_for_timeout(1000)
    assert len(votes.read(folder).standing) == 2


def test_before_the_vote_the_html_does_not_tell_the_sides_apart(page):
    tab, _, _ = page
    tab.wait_for_selector('[data-is="left"][src]')
    tab.wait_for_timeout(500)
    left, right = (tab.locator(f'.pair button[data-answer="{answer}"]').evaluate("e => e.outerHTML") for answer in "ab")
    alike = [html.split('src="data:image/webp;base64,')[0] + html.split('"')[-1] for html in (left, right)]
    assert alike[0].replace("left", "right").replace('data-answer="a"', 'data-answer="b"') == alike[1]
    panel = tab.locator("#vote .vote").evaluate(
        "e => { const c = e.cloneNode(true); c.querySelector('.count').remove(); return c.innerHTML }"
    )
    outside = "".join(part.split('"', 1)[-1] for part in panel.split('src="data:image/webp;base64,'))
    assert not [word for word in ("iteration", "base", "tuned", "samples", ".webp", "seed", "clip") if word in outside]


def test_prompts_are_escaped(page):
    tab, _, _ = page
    tab.wait_for_selector('[data-is="left"][src]')
    assert "<b>&\"'" in read(tab, "prompt") and tab.locator('[data-is="prompt"] b').count() == 0


def test_touch_on_a_narrow_screen(page):
    tab, folder, _ = page
    tab.set_viewport_size({"width": 390, "height": 844})
    tab.wait_for_selector('[data-is="left"][src]')
    tab.wait_for_timeout(400)
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390
    boxes = [button.bounding_box() for button in tab.locator(".answers button").all()]
    assert all(box["width"] >= 48 and box["height"] >= 48 for box in boxes)
    tab.locator('.pair [data-answer="b"]').click()
    tab.wait_for_function("document.querySelector('[data-is=overall]').textContent.includes('of 1 votes')")
    assert votes.read(folder).standing[0].answer == "b"


def test_a_reward_without_votes_is_refused_with_the_reason(page):
    tab, _, _ = page
    tab.wait_for_selector('[data-is="left"][src]')
    tab.get_by_text("Learn from these votes").click()
    tab.locator("#vote-train").click()
    tab.get_by_text("there are no votes yet").wait_for()
