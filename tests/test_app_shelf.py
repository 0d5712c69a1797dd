"""What the app reads of run folders, whole and damaged. Run: pytest tests/test_app_shelf.py"""

import fcntl
import json
import os
import subprocess
import sys

import pytest

from ddpo.app import asked, charts, pictures, reading, view
from ddpo.app.runs import table
from ddpo.app.shelf import Shelf
from ddpo.app.view import View
from ddpo.durable import is_locked, run_lock
from tests.app_runs import EVIL, evaluation, make

FILES = ["run.json", "config.yaml", "metrics.jsonl", "samples/index.jsonl"]


@pytest.fixture
def run(tmp_path):
    make(tmp_path / "runs" / "a")
    return tmp_path / "runs" / "a"


def drawn(folder):
    """Every part of the page, of a run as it lies there: (the text of all, the opened run)."""
    shelf = Shelf(folder.parent)
    opened = shelf.open(folder.name)
    found = View().within(opened)
    parts = [view.overview(opened), view.pair(opened, found), view.gallery(opened, found), charts.curves(opened, 0)]
    parts += [view.beside(opened, [opened], found), charts.together([opened, opened]), table(shelf.rows(), folder.name, shelf)]
    text = "".join(parts)
    text.encode()  # whatever is in the files, the page can be sent
    return text, opened


# --- the shelf


def test_a_name_is_looked_up_and_is_never_a_path(run):
    shelf = Shelf(run.parent)
    assert shelf.names() == ["a"] and shelf.folder("a") == run
    make(run.parent.parent / "secret")
    for name in ("../secret", "a/../a", str(run), "", ".", "a\0", "a/"):
        with pytest.raises(ValueError, match="there is no run"):
            shelf.open(name)


def test_runs_come_newest_first_by_what_they_say_else_by_their_time(tmp_path):
    for name, started in (("old", "2024-01-01T00:00:00+00:00"), ("new", "2026-06-01T12:00:00+02:00"), ("mid", "2025-01-01")):
        make(tmp_path / name, started=started)
    make(tmp_path / "unsaid", started=None)
    os.utime(tmp_path / "unsaid", (1_760_000_000, 1_760_000_000))  # October 2025
    (tmp_path / "notes").mkdir()
    (tmp_path / "file").write_text("")
    assert Shelf(tmp_path).names() == ["new", "unsaid", "mid", "old"]
    assert Shelf(tmp_path / "none").names() == []


def test_the_table_says_what_was_measured_last(run):
    (row,) = Shelf(run.parent).rows()
    assert (row.objective, row.algorithm, row.model, row.status, row.seconds) == ("jpeg", "ddpo:DDPO", "toy", "finished", 41.0)
    assert row.result.scorer == "jpeg" and row.result.change == "+0.400 [+0.350, +0.450]" and row.iteration == 4


def test_the_table_reads_the_end_of_a_long_file_and_only_once(tmp_path, monkeypatch):
    folder = make(tmp_path / "long")
    lines = [{"iteration": k, "reward/mean": 0.1, "reward/jpeg/mean": 0.1, "pad": "x" * 400} for k in range(5, 3000)]
    lines[100] |= evaluation({"jpeg": (0.1, 0.3)})
    with open(folder / "metrics.jsonl", "a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    (row,) = Shelf(tmp_path).rows()  # the evaluation lies a megabyte before the end
    assert row.iteration == 2999 and row.result.base == 0.1
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"iteration": 3000} | evaluation({"jpeg": (0.1, 0.4)})) + "\n")
    read, shelf = [], Shelf(tmp_path)
    monkeypatch.setattr(reading, "_newest", lambda found, old=reading._newest: read.append(sum(map(len, found))) or old(found))
    assert shelf.rows()[0].result.tuned == 0.4
    assert 0 < sum(read) <= reading.TAIL, "the whole file was read for its last line"
    del read[:]
    shelf.rows()
    assert not read, "nothing has changed, and it was read again"


def test_a_run_that_says_running_is_stopped_once_nobody_holds_its_lock(tmp_path):
    folder = make(tmp_path / "r", status="running")
    shelf = Shelf(tmp_path)
    assert shelf.rows()[0].status == "stopped"
    with run_lock(folder):
        assert is_locked(folder) and shelf.rows()[0].status == shelf.open("r").status == "running"
    assert not is_locked(folder) and shelf.rows()[0].status == shelf.open("r").status == "stopped"
    assert "accelerate launch" in drawn(folder)[0]


def test_looking_at_a_lock_never_refuses_the_run_that_takes_it(tmp_path, monkeypatch):
    with run_lock(tmp_path):
        pass
    with open(tmp_path / ".lock") as looker:
        fcntl.flock(looker, fcntl.LOCK_SH)  # caught in the act of looking, and done by the next moment
        monkeypatch.setattr("ddpo.durable.time.sleep", lambda _: fcntl.flock(looker, fcntl.LOCK_UN))
        with run_lock(tmp_path):
            assert is_locked(tmp_path)


# --- damage


@pytest.mark.parametrize("name", FILES)
def test_every_cut_of_every_file_opens_with_a_note(run, name):
    path = run / name
    whole = path.read_bytes()
    for cut in sorted({0, 1, len(whole) // 3, len(whole) // 2, len(whole) - 9, len(whole) - 1}):
        path.write_bytes(whole[:cut])
        text, opened = drawn(run)
        named = path.name == "config.yaml" or cut == 0 or any(path.name in note for note in opened.notes)
        whole_json = path.name == "run.json" and cut == len(whole)  # without its newline it is still whole
        assert named or whole_json, f"{name} cut at {cut}: {opened.notes}"
        assert all(note.split(":")[0].split(" is ")[0] in text for note in opened.notes)
    path.unlink()
    assert any(f"{path.name} is missing" in note for note in drawn(run)[1].notes)


DAMAGES = [
    b"{", b"", b"[1]", b"\xff\xfe", b"\0\0\0", b'"x"', b"[" * 100_000, b'{"iteration": 1e400}', b'{"iteration": -1}',
    b'{"iteration": 10000000000000000000000000}', b'{"iteration": true}', b"9" * 5000, b'{"iteration": "3", "prompt": 5}',
    b'{"iteration": 2, "reward/mean": "high", "prompt": "a", "seed": 0, "path": 7, "scores": []}',
]  # fmt: skip


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples/index.jsonl"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_line_is_named_and_the_rest_is_shown(run, name, damage):
    path = run / name
    first, second, *rest = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([first, damage, second, *rest]))
    text, opened = drawn(run)
    assert f"{path.name}: line 2 is damaged" in "".join(opened.notes) and f"{path.name}: line 2 is damaged" in text
    assert len(opened.metrics) == 5 and len(opened.samples) == 24


@pytest.mark.parametrize(
    "facts",
    [b"[]", b"{", b"null", b'{"name": 5, "status": [], "started": "soon", "rewards": "jpeg", "algorithm": {}, "model": 3}',
     b'{"rewards": [1, {"a": 2}, null], "status": "\\ud800", "prompts": [], "versions": "x", "ended": 4}'],
)  # fmt: skip
def test_a_run_json_of_any_shape_opens(run, facts):
    (run / "run.json").write_bytes(facts)
    _, opened = drawn(run)
    assert any("run.json" in note for note in opened.notes) and len(opened.metrics) == 5


def test_a_run_of_a_newer_version_opens_with_what_is_known(run):
    facts = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(facts | {"format": 9, "lineage": {"a": [1]}}))
    for name in ("metrics.jsonl", "samples/index.jsonl"):
        lines = [
            json.loads(line) | {"new": {"deep": [1]}, "text": "x", "list": [1]}
            for line in (run / name).read_text().splitlines()
        ]
        (run / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    _, opened = drawn(run)
    assert opened.notes == [] and len(opened.metrics) == 5 and len(opened.samples) == 24


def test_pipes_links_folders_and_what_may_not_be_read_are_not_opened(run):
    (run / "metrics.jsonl").unlink()
    os.mkfifo(run / "metrics.jsonl")  # reading it would wait for ever
    (run / "samples" / "index.jsonl").unlink()
    (run / "samples" / "index.jsonl").symlink_to("/etc/passwd")
    (run / "config.yaml").unlink()
    (run / "config.yaml").mkdir()
    text, opened = drawn(run)
    assert len(opened.notes) == 3 and "root:" not in text


def test_pictures_are_shown_only_from_within_the_run_and_only_whole(run):
    (run.parent / "outside.webp").write_bytes((run / "samples/iteration_0004/0000.webp").read_bytes())
    index = run / "samples" / "index.jsonl"
    moved = index.read_text().replace("samples/iteration_0004/0001.webp", "../outside.webp")
    index.write_text(moved.replace("samples/iteration_0004/0002.webp", "/etc/passwd"))
    (run / "samples/iteration_0004/0003.webp").write_bytes(b"RIFF\x10\0\0\0WEBP")
    (run / "samples/iteration_0004/0004.webp").unlink()
    (run / "samples/iteration_0004/0005.webp").write_bytes(b"GIF89a" + bytes(100))
    opened = Shelf(run.parent).open("a")
    shown = [opened.by_place[place][4] for place in opened.places]
    for read in (pictures.whole, pictures.thumb):
        assert [read(run, sample) is not None for sample in shown] == [True, *[False] * 5, True, True]
    assert "picture missing or unreadable" in view.pair(opened, View(iteration=4, prompt="a cat", seed=1).within(opened))


def test_text_from_outside_stays_text(run):
    facts = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(facts | {"rewards": [EVIL], "algorithm": EVIL, "model": EVIL, "status": EVIL}))
    index = run / "samples" / "index.jsonl"
    index.write_text(index.read_text().replace("a cat", "\\ud800<b>").replace('"jpeg"', json.dumps(EVIL)))
    text, opened = drawn(run)
    assert "<img src=x" not in text and "<b>\ufffd" not in text and "?&lt;b&gt;" in text
    assert EVIL in opened.scorers


# --- what is looked at


def test_prompts_are_ranked_by_gain_and_filtered_by_words(run):
    opened = Shelf(run.parent).open("a")
    look = View(scorer="jpeg").within(opened)
    gains = [g for _, g in view.ranked(opened, look)]
    assert gains == sorted(gains, reverse=True) and gains[0] == pytest.approx(0.3) and gains[-1] == pytest.approx(-0.4)
    losses = [g for _, g in view.ranked(opened, View(order=view.ORDERS[1], scorer="jpeg").within(opened))]
    assert losses == sorted(losses)
    assert [p for p, _ in view.ranked(opened, View(order=view.ORDERS[2]).within(opened))] == opened.places
    assert {p for (p, _), _ in view.ranked(opened, View(query="HORSE red").within(opened))} == {"a red horse"}
    by_clip = view.ranked(opened, View(scorer="clip", iteration=4).within(opened))
    assert by_clip[-1] == ((EVIL, 1), None), "what was not scored comes last"
    assert look.prompt == "a cat" and look.seed == 0 and look.iteration == 4


def test_rounding_is_no_loss(run):
    index = run / "samples" / "index.jsonl"
    index.write_text(
        index.read_text().replace('"jpeg": 0.5,', '"jpeg": 0.30000000000000004,').replace('"jpeg": 0.8,', '"jpeg": 0.3,')
    )
    opened = Shelf(run.parent).open("a")
    assert opened.gain(("a cat", 0), 4, "jpeg") == 0.0


def test_a_view_is_kept_where_a_run_has_it_and_mended_where_not(run):
    opened = Shelf(run.parent).open("a")
    kept = View(prompt="two owls", seed=1, iteration=2, scorer="clip").within(opened)
    assert (kept.prompt, kept.seed, kept.iteration, kept.scorer) == ("two owls", 1, 2, "clip")
    mended = View(prompt="two owls", seed=9, iteration=3, scorer="x").within(opened)
    assert (mended.prompt, mended.seed, mended.iteration, mended.scorer) == ("two owls", 0, 4, "jpeg")


def test_the_scores_shown_are_those_of_the_two_pictures(run):
    opened = Shelf(run.parent).open("a")
    html = view.pair(opened, View(prompt="a cat", seed=1, iteration=2).within(opened))
    assert '<td>0.500</td><th scope="row">jpeg <span class="higher">+0.100</span></th><td>0.600</td>' in html
    worst = view.pair(opened, View(prompt=EVIL, seed=1, iteration=4).within(opened))
    assert '<span class="lower">-0.400</span>' in worst and 'clip <span class="">n/a</span>' in worst


def test_runs_beside_each_other_say_where_they_do_not_agree(run):
    make(run.parent / "b", iterations=(0, 2), base_colour=1)
    shelf = Shelf(run.parent)
    a, b = shelf.open("a"), shelf.open("b")
    look = View(prompt="a cat", seed=0).within(a)
    assert "Another iteration" in view.beside(a, [b], look) and "Its base picture differs" in view.beside(a, [b], look)
    assert 'class="doubt"></span>' in view.beside(a, [a], look) and "differs" not in view.beside(a, [a], look)
    index = run.parent / "b" / "samples" / "index.jsonl"
    index.write_text(index.read_text().replace("a cat", "a dog"))
    assert "never drew this prompt and seed; the two have 6 of 8 in common" in view.beside(a, [shelf.open("b")], look)


def test_alarms_and_the_iteration_looked_at_are_marked_in_the_charts(run):
    opened = Shelf(run.parent).open("a")
    html = charts.curves(opened, 2)
    assert html.count('<g class="alarm warn">') == html.count("<svg") == 5 and "clip fell while jpeg rose" in html
    assert html.count('data-iteration="2"') == 5, "each chart can be pressed at each sampled iteration"
    middle = charts.across(2, 0, 4)
    assert f'd="M0 8V156" transform="translate({middle:.1f})"' in html
    trained, watched = html.index("<b>jpeg</b>"), html.index("<b>clip</b>")
    assert trained < watched


def test_the_address_names_a_view_and_nonsense_is_passed_over():
    assert asked.link({"run": "a", "iteration": "8", "prompt": "x", "seed": "1"}) == View("a", 8, "x", 1)
    assert asked.link({"run": "a\0", "iteration": "-1", "prompt": "x" * 3000, "seed": "9" * 30}) == View()
    assert asked.link({"iteration": "²", "seed": "1e3"}) == View()


@pytest.mark.parametrize("value", [None, True, -1, 1.5, "1", [1], 2**31, float("inf"), float("nan"), {}])
def test_numbers_are_checked(value):
    with pytest.raises(ValueError, match=f"0 to {2**31 - 1}"):
        asked.whole(value, "the seed")


@pytest.mark.parametrize("value", [None, 5, ["a"], "a" * 2001, "a\0", "\ud800"])
def test_texts_are_checked(value):
    with pytest.raises(ValueError, match="the prompt"):
        asked.text(value, "the prompt")


def test_browsing_needs_no_torch(run):
    """Import of the page, its table, and a run opened: in a process of its own."""
    program = """if True:
        import sys; from pathlib import Path
        from ddpo.app import frame
        from ddpo.app.shelf import Shelf
        shelf = Shelf(Path(sys.argv[1])); frame.build(shelf); shelf.open("a")
        sys.exit(any(name in sys.modules for name in ("torch", "diffusers", "transformers", "peft", "open_clip")))
    """
    assert subprocess.run([sys.executable, "-c", program, str(run.parent)]).returncode == 0
