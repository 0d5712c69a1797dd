"""The Vote tab: through the app's public endpoints, and its parts: `pytest tests/test_app_vote.py`."""

import base64
import io
import json
import subprocess
import sys

import gradio_client
import pytest
from gradio_client.exceptions import AppError
from PIL import Image

from ddpo import votes
from ddpo.app import feedback, frame
from ddpo.app.booth import TOKENS, Booth
from ddpo.app.feedback import HEAD, Launcher, clip_of, derived, train_reward
from ddpo.app.shelf import Shelf
from ddpo.config import load
from ddpo.recipe import Recipe
from tests.polling import menagerie_folder, run_folder

PAIR = {"token", "prompt", "left", "right"}


@pytest.fixture
def shelf(tmp_path):
    run_folder(tmp_path / "one", 4)
    return Shelf(tmp_path)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """(client, the shelf's folder)"""
    root = tmp_path_factory.mktemp("runs")
    run_folder(root / "one", 4)
    page = frame.build(Shelf(root))
    _, url, _ = page.launch(prevent_thread_lock=True, quiet=True, ssr_mode=False, server_name="127.0.0.1")
    yield gradio_client.Client(url, verbose=False), root
    page.close()


def pixels(uri):
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGB").tobytes()


# ----------------------------------------------------------------------------------------------------------------------
# Endpoints


def test_a_program_votes(served):
    client, root = served
    before = len(votes.read(root / "one").standing)
    pair = client.predict("one", "program", api_name="/next_pair")
    assert set(pair) == PAIR and pair["prompt"].startswith("prompt ")
    told = client.predict("one", pair["token"], "b", api_name="/vote")
    standing = votes.read(root / "one").standing
    vote = standing[-1]
    assert len(standing) == before + 1 and (vote.answer, vote.rater, vote.prompt) == ("b", "program", pair["prompt"])
    assert told["preferred"] == "right" and {told["left"]["is"], told["right"]["is"]} == {"base", "iteration 4"}
    stood = (told["left"]["is"] == "iteration 4") == (vote.left == 1)
    shown = [(root / "one" / vote.images[i]) for i in (vote.left, 1 - vote.left)]
    assert stood and [pixels(pair[s]) for s in ("left", "right")] == [Image.open(p).convert("RGB").tobytes() for p in shown]
    tuned = "left" if vote.left == 1 else "right"
    assert told[tuned]["scores"] == {"clip": 1.0}


def test_a_token_is_good_once(served):
    client, root = served
    pair = client.predict("one", "once", api_name="/next_pair")
    client.predict("one", pair["token"], "a", api_name="/vote")
    before = (root / "one" / votes.FILE).read_bytes()
    with pytest.raises(AppError, match="answered before"):
        client.predict("one", pair["token"], "b", api_name="/vote")
    assert (root / "one" / votes.FILE).read_bytes() == before


@pytest.mark.parametrize(
    ("run", "rater", "first", "second"),
    [("none", "r", "0", ""), ("../one", "r", "0", ""), ("", "r", "0", ""), ("one", "", "0", ""), ("one", "a b", "0", ""),
     ("one", "r" * 65, "0", ""), ("one", "r", "../x@0", ""), ("one", "r", "0", "-1"), ("one", "r", "0", "9"), ("one", "r", "0\x00", ""),
     ("one", "r", "none@4", "4"), (None, "r", "0", ""), (3, [], {}, 1e300)],
)  # fmt: skip
def test_what_is_not_right_is_told_and_nothing_is_written(shelf, run, rater, first, second):
    with pytest.raises(ValueError) as caught:
        Booth(shelf).deal(run, rater, first, second)
    assert 10 < len(str(caught.value)) < 300
    assert not (shelf.root / "one" / votes.FILE).exists()


@pytest.mark.parametrize("answer", ["", "A", "left", None, 1, ["a"]])
def test_only_the_four_answers_count(shelf, answer):
    booth = Booth(shelf)
    pair = booth.deal("one", "r")
    with pytest.raises(ValueError, match="one of a, b, tie, both_bad"):
        booth.answer("one", pair["token"], answer)
    booth.answer("one", pair["token"], "tie")  # the token is still good


def test_a_token_belongs_to_its_run(shelf):
    run_folder(shelf.root / "two", 2)
    booth = Booth(shelf)
    pair = booth.deal("one", "r")
    with pytest.raises(ValueError, match="answered before"):
        booth.answer("two", pair["token"], "a")
    assert not (shelf.root / "two" / votes.FILE).exists()


# ----------------------------------------------------------------------------------------------------------------------
# The booth


def test_nothing_in_a_pair_tells_the_sides_apart(shelf):
    booth = Booth(shelf)
    pair = booth.deal("one", "r")
    assert set(pair) == PAIR
    for word in ("iteration", "samples", "seed", "base", "tuned", "clip"):
        assert word not in pair["token"] and word not in pair["prompt"]
        assert all(
            word not in pair[side].removeprefix("data:image/webp;base64,") or len(pair[side]) > 5000
            for side in ("left", "right")
        )
    assert pair["left"].startswith("data:image/webp;base64,") and pair["right"].startswith("data:image/webp;base64,")


def test_prefetched_pairs_differ_and_a_round_sees_each_once(shelf):
    booth, held, seen = Booth(shelf), [], []
    for _ in range(8):
        while len(held) < min(3, 8 - len(seen)):
            held.append(booth.deal("one", "r"))
        assert len({pair["left"] for pair in held}) == len(held)
        seen.append(held.pop(0))
        booth.answer("one", seen[-1]["token"], "tie")
    assert len({v.images for v in votes.read(shelf.root / "one").standing}) == 8


def test_undo_withdraws_ones_own_last_vote_and_deals_its_pair_again(shelf):
    booth = Booth(shelf)
    first, other = booth.deal("one", "me"), booth.deal("one", "you")
    booth.answer("one", first["token"], "a")
    booth.answer("one", other["token"], "b")
    again = booth.undo("one", "me")
    assert {k: again[k] for k in PAIR - {"token"}} == {k: first[k] for k in PAIR - {"token"}} and again["token"] != first[
        "token"
    ]
    assert [v.rater for v in votes.read(shelf.root / "one").standing] == ["you"]
    booth.answer("one", again["token"], "b")
    assert booth.count("one")["total"] == 2
    with pytest.raises(ValueError, match="no vote of yours"):
        booth.undo("one", "nobody")


def test_seconds_begin_when_a_prefetched_pair_comes_into_view(shelf, monkeypatch):
    now = 100.0
    monkeypatch.setattr("ddpo.app.booth.time.monotonic", lambda: now)
    booth = Booth(shelf)
    pairs = [booth.deal("one", "r") for _ in range(2)]
    for pair, now in zip(pairs, (103.0, 105.0), strict=True):  # noqa: B007
        booth.answer("one", pair["token"], "a")
    assert [v.seconds for v in votes.read(shelf.root / "one").standing] == [3.0, 2.0]


def test_votes_are_not_lost_or_doubled_by_many_at_once(shelf):
    from concurrent.futures import ThreadPoolExecutor

    booth = Booth(shelf)
    pairs = [booth.deal("one", f"r{i}") for i in range(20)]

    def twice(pair):
        def once(_):
            try:
                return bool(booth.answer("one", pair["token"], "a"))
            except ValueError:
                return False

        return sum(map(once, range(2)))

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(twice, pairs)) == [1] * 20
    found = votes.read(shelf.root / "one")
    assert len(found.standing) == 20 and not found.notes


def test_outstanding_tokens_are_bounded(shelf, monkeypatch):
    monkeypatch.setattr("ddpo.app.booth.TOKENS", 5)
    booth = Booth(shelf)
    pairs = [booth.deal("one", "r") for _ in range(7)]
    assert len(booth._tickets) == 5 and TOKENS > 1000
    with pytest.raises(ValueError, match="take the next one"):
        booth.answer("one", pairs[0]["token"], "a")


def test_a_half_copied_folder_shows_what_it_has(shelf):
    for path in sorted((shelf.root / "one" / "samples" / "iteration_0004").glob("*.webp"))[1:]:
        path.write_bytes(b"RIFF")
    booth = Booth(shelf)
    assert [booth.deal("one", "r")["prompt"] for _ in range(3)] == ["prompt 0 <b>&\"'"] * 3
    for path in (shelf.root / "one" / "samples" / "iteration_0000").glob("*.webp"):
        path.unlink()
    with pytest.raises(ValueError, match="can be read; copy the run folder again"):
        booth.deal("one", "r")


def test_booth_and_feedback_load_neither_torch_nor_gradio():
    code = "import sys, ddpo.app.booth, ddpo.app.feedback, ddpo.tally; sys.exit(bool({'torch', 'gradio'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# ----------------------------------------------------------------------------------------------------------------------
# Votes -> reward -> run


@pytest.fixture(scope="module")
def voted(tmp_path_factory):
    """A shelf with a run whose bluer pictures won 92 votes, and the reward that was learned from them."""
    root = tmp_path_factory.mktemp("loop")
    folder, booth = menagerie_folder(root / "animals"), Booth(Shelf(root))
    (folder / "config.yaml").write_text(
        "model: {name: sd, path: menagerie}\nprompts: {train: menagerie-no-colour, held_out: menagerie-no-colour-held-out}\n"
        "rollout: {solver: {name: 'diffusion:DDIM', eta: 1.0}, num_steps: 8, guidance: 1.0}\nalgorithm: {name: 'ddpo:DDPO'}\n"
        "advantage: {name: 'advantage:GroupRelative'}\nrewards: [{name: clip, model: menagerie, weight: 2.0}]\n"
        "held_out_rewards: [{name: 'scene:Count'}]\nrun: {iterations: 1, output: elsewhere}\n"
    )
    for _ in range(92):
        pair = booth.deal("animals", "likes-blue")
        left, right = (
            pixels(pair[side])[2] - pixels(pair[side])[0] for side in ("left", "right")
        )  # blue less red, in a corner
        booth.answer("animals", pair["token"], "tie" if abs(left - right) < 30 else "a" if left > right else "b")
    (root / "report.txt").write_text(train_reward(folder))
    return Shelf(root)


def test_votes_become_a_reward_and_a_config(voted):
    folder, said = voted.folder("animals"), (voted.root / "report.txt").read_text()
    assert "held-out accuracy" in said and "CLIP menagerie" in said and str(voted.root) not in said
    used = [json.loads(line) for line in (folder / feedback.USED).read_text().splitlines()]
    assert len(used) == 92 and tuple(used[0]) == votes.COLUMNS
    config = derived(feedback._config(folder), "animals")
    assert [scorer["name"] for scorer in config["held_out_rewards"]] == ["clip", "scene:Count"]
    assert config["held_out_rewards"][0] == {"name": "clip", "model": "menagerie"}


def started(voted, name, monkeypatch, script):
    """Start a run whose process is a shell script in place of the trainer."""
    fake = voted.root / "python"
    fake.write_text(f"#!/bin/sh\ncd {voted.root}/{name}\n{script}\n")
    fake.chmod(0o755)
    monkeypatch.setattr(feedback.sys, "executable", str(fake))
    launcher = Launcher(voted)
    return launcher, launcher.start("animals", name)


def test_a_run_is_started_one_at_a_time_with_a_config_that_is_right(voted, monkeypatch):
    _, command = started(voted, "blue-1", monkeypatch, "echo '{}' > run.json")
    assert command.startswith("python -m ddpo.train ") and command.endswith("blue-1/request.yaml")
    recipe = load(voted.root / "blue-1" / "request.yaml", [], Recipe).recipe
    assert [c.name for c in recipe.rewards] == ["learned"] and recipe.run.output == str(voted.root / "blue-1")
    assert recipe.rewards[0].options["head"] == str(voted.root / "blue-1" / HEAD)
    assert recipe.prompts.train == "menagerie-no-colour" and "blue-1" in voted.names()


def test_another_run_waits_until_the_process_ends_even_for_another_app(voted, monkeypatch):
    launcher, _ = started(voted, "first", monkeypatch, "echo '{}' > run.json; while [ ! -e ../go ]; do sleep 0.05; done")
    try:
        for other in (launcher, Launcher(voted)):
            with pytest.raises(ValueError, match="still goes on"):
                other.start("animals", "second")
        assert not (voted.root / "second").exists()
    finally:
        (voted.root / "go").touch()
    assert launcher.wait() == 0
    again, _ = started(voted, "second", monkeypatch, "echo '{}' > run.json")
    assert again.wait() == 0


@pytest.mark.parametrize("name", ["", "../x", "a/b", "a b", ".", "a\x00", "x" * 65, "ä", None, 3, "a\n"])
def test_a_new_runs_name_is_plain(voted, name):
    with pytest.raises(ValueError, match="letters, digits, - and _"):
        Launcher(voted).start("animals", name)


def test_what_cannot_be_started_is_told(voted, monkeypatch, shelf):
    with pytest.raises(ValueError, match="there is a animals already"):
        Launcher(voted).start("animals", "animals")
    with pytest.raises(ValueError, match="train a reward from the votes first"):
        Launcher(shelf).start("one", "new")
    with pytest.raises(ValueError, match="stopped at once: the reason"):
        started(voted, "failed", monkeypatch, "echo the reason >&2; exit 2")
    with pytest.raises(ValueError, match="there are no votes yet"):
        train_reward(shelf.folder("one"))
    with pytest.raises(ValueError, match="pictures that existed"):
        derived({"rollout": {"pictures": "votes.jsonl"}}, "one")


def test_the_clip_is_the_runs_own(tmp_path):
    for config, wanted in {
        "rewards: [{name: jpeg}, {name: clip, model: ViT-H-14, pretrained: laion2b_s32b_b79k}]": (
            "ViT-H-14",
            "laion2b_s32b_b79k",
        ),
        "model: {name: sd, path: menagerie}": ("menagerie", None),
        "model: {name: sd, path: some/where}": ("ViT-L-14", "openai"),
    }.items():
        (tmp_path / "config.yaml").write_text(config)
        assert clip_of(tmp_path) == wanted
    (tmp_path / "config.yaml").write_text("[")
    with pytest.raises(ValueError, match="cannot be read"):
        clip_of(tmp_path)
