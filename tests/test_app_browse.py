"""The real app over small run folders, asked by name through gradio_client. Run: pytest tests/test_app_browse.py"""

import base64
import io
import json

import pytest
from gradio_client import Client
from PIL import Image

from ddpo.app import frame, looks
from ddpo.app.shelf import Shelf
from tests.app_runs import EVIL, make


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    make(folder / "first", started="2026-11-20T09:00:00+00:00")
    make(folder / "torn", started="2026-11-21T09:00:00+00:00")
    with open(folder / "torn" / "metrics.jsonl", "ab") as file:
        file.write(b'nonsense\n{"iteration": 5, "rew')
    return folder


@pytest.fixture(scope="module")
def client(root):
    page = frame.build(Shelf(root))
    page.launch(
        server_name="127.0.0.1", prevent_thread_lock=True, quiet=True, ssr_mode=False, theme=looks.theme(), css_paths=looks.CSS,
        footer_links=[],
    )  # fmt: skip
    found = Client(page.local_url, verbose=False)
    yield found
    found.close()
    page.close(verbose=False)


def test_the_public_endpoints_have_plain_names_and_no_others_are_told(client):
    assert set(client.view_api(return_format="dict")["named_endpoints"]) == {
        "/runs", "/run", "/pair", "/generate", "/grid", "/score", "/next_pair", "/vote"
    }  # fmt: skip


def test_the_page_tells_no_path_of_this_machine(client, root):
    assert str(root) not in json.dumps(client.config)


def test_runs_are_listed_newest_first(client):
    rows = client.predict(api_name="/runs")
    assert [row["name"] for row in rows] == ["torn", "first"]
    assert rows[1]["result"]["delta"] == pytest.approx(0.4) and rows[1]["status"] == "finished"


def test_a_run_is_told_with_what_is_damaged(client):
    whole, torn = (client.predict(name, api_name="/run") for name in ("first", "torn"))
    assert whole["notes"] == [] and whole["iterations"] == [0, 2, 4] and len(whole["pairs"]) == 8
    assert {c["scorer"]: c["verdict"] for c in whole["comparisons"]} == {"jpeg": "higher", "clip": "lower"}
    assert whole["alarms"] == [{"iteration": 3, "name": "hacking", "level": "warn", "text": "clip fell while jpeg rose"}]
    assert len(torn["notes"]) == 2 and "line 6" in torn["notes"][1] and torn["iterations"] == [0, 2, 4]


def test_a_pair_has_both_pictures_as_they_were_saved_and_every_verdict(client, root):
    pair = client.predict("first", 4, EVIL, 0, api_name="/pair")
    assert pair["scores"]["jpeg"] == {"base": 0.5, "tuned": pytest.approx(0.2), "difference": pytest.approx(-0.3)}
    for side, iteration in (("base", "0000"), ("tuned", "0004")):
        content = base64.b64decode(pair[side].removeprefix("data:image/webp;base64,"))
        assert content == (root / "first" / "samples" / f"iteration_{iteration}" / "0006.webp").read_bytes()
        assert Image.open(io.BytesIO(content)).size == (8, 8)


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (("../first", 4, "a cat", 0), "there is no run"),
        (("first", 3, "a cat", 0), r"sampled iterations: \[0, 2, 4\]"),
        (("first", 4, "a dog", 0), "8 prompts and seeds"),
        (("first", -1, "a cat", 0), "whole number"),
        (("first", 4, "a cat", 1e300), "whole number"),
        (("first", "4", "a cat", 0), "whole number"),
        (("first", 4, None, 0), "must be text"),
        (("first", 4, "a\0cat", 0), "NUL"),
        (("first", 4, "x" * 10_000, 0), "at most 2000"),
        ((["first"], 4, "a cat", 0), "must be text"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_with_what_is_allowed(client, asked, told):
    with pytest.raises(Exception, match=told):
        client.predict(*asked, api_name="/pair")


def test_a_run_that_goes_on_is_seen_to_go_on(client, root):
    folder = make(root / "growing", started="2026-11-22T09:00:00+00:00")
    before = client.predict("growing", api_name="/run")
    with open(folder / "samples" / "index.jsonl", "a") as file:
        line = {
            "iteration": 6,
            "prompt": "a cat",
            "seed": 0,
            "scores": {"jpeg": 0.9},
            "path": "samples/iteration_0004/0000.webp",
        }
        file.write(json.dumps(line) + "\n")
    after = client.predict("growing", api_name="/run")
    assert (before["iterations"], after["iterations"]) == ([0, 2, 4], [0, 2, 4, 6])
    assert client.predict(api_name="/runs")[0]["name"] == "growing"
