"""Votes: the laws of their statistics, their file, which pair comes next, their export: `pytest tests/test_votes.py`."""

import csv
import itertools
import json
import random
from collections import Counter

import numpy as np
import pytest

from ddpo import cli, offline, tally, votes
from ddpo.ballot import Duel, choose, duels, iterations
from ddpo.runs import Sample
from ddpo.tally import Share
from ddpo.votes import Stage, Vote
from rewards import _pairs, _preferences
from tests.polling import run_folder

STAGES = (Stage(0), Stage(4))


def a_vote(answer="a", left=0, prompt="two owls", number=0, **others) -> Vote:
    named = {"image_0": f"samples/iteration_0000/{number:04d}.webp", "image_1": f"samples/iteration_0004/{number:04d}.webp"}
    shown = {"iteration_0": 0, "seed_0": 0, "iteration_1": 4, "seed_1": 0, "rater": "r", "seconds": 1.0}
    return Vote(prompt=prompt, answer=answer, left=left, **(named | shown | others))


def pairs_of(number: int) -> list[Duel]:
    samples = [(Sample(0, f"p{i}", 0, {}, f"0/{i}"), Sample(4, f"p{i}", 0, {}, f"4/{i}")) for i in range(number)]
    return [Duel(STAGES, two, (two[0].path, two[1].path)) for two in samples]


# ----------------------------------------------------------------------------------------------------------------------
# Statistics


def test_the_interval_covers_the_truth_in_95_of_100_cases():
    wins = np.random.default_rng(0).binomial(1000, 0.7, 2000)
    covered = np.mean([low <= 0.7 <= high for low, high in (Share(float(k), 1000).interval for k in wins)])
    assert 0.935 < covered < 0.965


def test_ties_as_halves_make_the_interval_no_narrower():
    chance = np.random.default_rng(1)
    wins = chance.multinomial(400, [0.5, 0.3, 0.2], 2000) @ [1, 0.5, 0]  # a win rate of 0.65
    covered = np.mean([low <= 0.65 <= high for low, high in (Share(float(k), 400).interval for k in wins)])
    assert covered > 0.95


@pytest.mark.parametrize(("wins", "number"), [(0, 1), (1, 1), (0, 10), (8, 10), (700, 1000)])
def test_wilson_is_that_of_the_rewards(wins, number):
    assert Share(wins, number).interval == pytest.approx(_pairs.wilson(wins, number), abs=1e-9)


def test_how_many_more_is_the_first_number_that_settles_it():
    for wins, number in [(1, 1), (6, 10), (11.5, 20), (4, 10), (52, 100), (71, 100)]:
        rate = wins / number
        settled = [n for n in range(number, 12_000) if Share(rate * n, n).settled]
        assert Share(wins, number).more == settled[0] - number
    assert Share(5, 10).more is None and Share(1005, 2000).more is None
    assert (
        tally.tally(STAGES, [a_vote("tie")]).outlook == "Not settled, and at this rate it will not be within 10,000 more votes."
    )


def test_a_stream_of_1000_votes_covers_the_preference_and_balances_the_sides(tmp_path):
    """A rater who prefers the tuned picture in 70 % of cases, wherever it stands, through the real choice and the real file."""
    pairs, chance, cast = pairs_of(60), random.Random(1), []
    for _ in range(1000):
        duel, left = choose(pairs, cast, "rater")
        likes_tuned = chance.random() < 0.7
        cast.append(duel.vote("a" if likes_tuned == (left == 1) else "b", left, "rater", 1.0))
        votes.add(tmp_path, cast[-1])
    found = tally.tally(STAGES, votes.read(tmp_path).standing)
    low, high = found.overall.interval
    assert found.overall.number == 1000 and low <= 0.7 <= high and high - low < 0.06
    assert sum(v.left for v in cast[:60]) == 30  # of a first round half
    by_pair = [Counter(v.left for v in cast if v.images == pair.images) for pair in pairs]
    assert all(abs(sides[0] - sides[1]) <= 1 and sum(sides.values()) in (16, 17) for sides in by_pair)
    assert found.bias == "" and found.left.interval[0] < 0.5 < found.left.interval[1]


@pytest.mark.parametrize(("key", "side"), [("a", "left"), ("b", "right")])
def test_who_always_presses_one_side_is_told(key, side):
    pairs, cast = pairs_of(20), []
    for _ in range(20):
        duel, left = choose(pairs, cast, "rater")
        cast.append(duel.vote(key, left, "rater", 1.0))
    found = tally.tally(STAGES, cast)
    assert f"The {side} picture is favoured" in found.bias and found.bias in str(found)
    assert found.overall.rate == 0.5  # balanced sides keep the bias out of the win rate


def test_statistics_by_hand():
    cast = [a_vote("a", 1, "x"), a_vote("b", 1, "x"), a_vote("tie", 0, "y"), a_vote("both_bad", 0, "y"), a_vote("b", 0, "y")]
    found = tally.tally(STAGES, [*cast, a_vote("a", iteration_1=8)])
    assert found.overall == Share(3.0, 5) and found.prompts == {"x": Share(1.0, 2), "y": Share(2.0, 3)}
    assert (found.left, found.ties, found.both_bad) == (Share(1, 3), 1, 1)
    assert tally.tally(STAGES, []).outlook == "No votes yet."
    two_seeds = tally.tally((Stage(4), Stage(4)), [a_vote(iteration_0=4)])
    assert two_seeds.overall is None and two_seeds.left == Share(1, 1)


# ----------------------------------------------------------------------------------------------------------------------
# Which pair comes next


def test_unvoted_first_then_least_voted_and_what_is_shown_not_again():
    pairs, cast = pairs_of(5), []
    for turn in range(15):
        duel, left = choose(pairs, cast, "rater")
        cast.append(duel.vote("tie", left, "rater", 1.0))
        assert set(Counter(v.images for v in cast).values()) <= {turn // 5, turn // 5 + 1}
    shown = {p.images for p in pairs[:4]}
    assert choose(pairs, [], "rater", shown)[0] == pairs[4]
    assert choose(pairs[:1], [], "rater", shown)[0] == pairs[0]  # where there is no other


def test_raters_go_different_ways():
    pairs = pairs_of(40)

    def round_of(rater):
        cast = []
        for _ in pairs:
            duel, left = choose(pairs, cast, rater)
            cast.append(duel.vote("tie", left, rater, 1.0))
        return [v.prompt for v in cast], {v.prompt: v.left for v in cast}, [v.left for v in cast]

    (order, sides, stream), (other_order, other_sides, _) = round_of("one"), round_of("two")
    assert order != other_order and sides != other_sides and round_of("one")[0] == order
    assert sum(a == b for a, b in itertools.pairwise(stream)) > 5  # not by turns, which a rater would notice


def test_pairs_are_of_two_iterations_two_seeds_or_two_runs(tmp_path):
    one, two = run_folder(tmp_path / "one", 3), run_folder(tmp_path / "two", 2)
    assert iterations(one) == [0, 4]
    tuned = duels(one, STAGES, tmp_path.joinpath)
    assert len(tuned) == 6 and all(a.prompt == b.prompt and a.seed == b.seed for a, b in (d.samples for d in tuned))
    seeds = duels(one, (Stage(4), Stage(4)), tmp_path.joinpath)
    assert len(seeds) == 3 and all((a.seed, b.seed) == (0, 1) for a, b in (d.samples for d in seeds))
    runs = duels(one, (Stage(4), Stage(4, "two")), tmp_path.joinpath)
    assert len(runs) == 4 and runs[0].images[1].startswith("../two/samples/")
    assert (one / runs[0].images[1]).resolve().is_relative_to(two)
    with pytest.raises(ValueError, match="holds no pictures of iteration 5; choose another"):
        duels(one, (Stage(0), Stage(5)), tmp_path.joinpath)


def test_an_index_that_leads_out_of_its_folder_is_refused(tmp_path):
    folder = run_folder(tmp_path / "one", 1)
    index = folder / "samples" / "index.jsonl"
    index.write_text(index.read_text().replace("samples/iteration_0004/0000.webp", "samples/../../secret.webp"))
    with pytest.raises(ValueError, match="lies outside of it"):
        duels(folder, STAGES, tmp_path.joinpath)


# ----------------------------------------------------------------------------------------------------------------------
# The file


@pytest.mark.parametrize(
    ("answer", "left", "winner", "labels"),
    [("a", 0, 0, (1, 0)), ("a", 1, 1, (0, 1)), ("b", 0, 1, (0, 1)), ("b", 1, 0, (1, 0)), ("tie", 1, None, (0.5, 0.5)),
     ("both_bad", 0, None, (0, 0))],
)  # fmt: skip
def test_the_answer_is_by_side_and_the_labels_by_picture(answer, left, winner, labels):
    vote = a_vote(answer, left)
    assert vote.winner == winner and (vote.label_0, vote.label_1) == labels


def test_withdrawn_votes_do_not_stand_and_no_line_is_rewritten(tmp_path):
    cast = [a_vote(number=i) for i in range(3)]
    for vote in cast:
        votes.add(tmp_path, vote)
    before = (tmp_path / votes.FILE).read_bytes()
    votes.withdraw(tmp_path, cast[1])
    found = votes.read(tmp_path)
    assert found.standing == [cast[0], cast[2]] and found.withdrawn == 1 and found.notes == []
    assert (tmp_path / votes.FILE).read_bytes().startswith(before)


@pytest.mark.parametrize("damage", [b"{", b"[1]", b'"text"', b'{"prompt": "x"}', b"\xff\xfe", b"[" * 100_000, b"null"])
def test_damaged_lines_are_told_and_the_others_counted(tmp_path, damage):
    votes.add(tmp_path, a_vote())
    with open(tmp_path / votes.FILE, "ab") as file:
        file.write(damage + b"\n")
    votes.add(tmp_path, a_vote())
    with open(tmp_path / votes.FILE, "ab") as file:
        file.write(b'{"id": "torn')
    found = votes.read(tmp_path)
    assert len(found.standing) == 2 and len(found.notes) == 2
    assert "preferences.jsonl:2: not a vote" in found.notes[0] and "never finished" in found.notes[1]


def voted_folder(folder):
    """Five votes: three decided, of which one is withdrawn, a tie and a both bad."""
    run_folder(folder, 5, 1)
    shown = duels(folder, STAGES, folder.joinpath)
    cast = [d.vote(answer, 1, "r", 1.0) for d, answer in zip(shown, ("a", "b", "a", "tie", "both_bad"), strict=True)]
    for vote in cast:
        votes.add(folder, vote)
    votes.withdraw(folder, cast[2])
    return folder, cast


@pytest.mark.parametrize("exported", [False, True])
def test_votes_are_what_the_readers_of_votes_take(tmp_path, exported):
    """The learned reward and the algorithms that learn from pictures: both bad is no preference to the one, passed over by the other."""
    folder, cast = voted_folder(tmp_path / "run")
    path = folder / votes.FILE
    if exported:
        path = tmp_path / "elsewhere" / "deep" / "votes.jsonl"
        assert votes.export(votes.read(folder).standing, folder, path) == 4
    read, pictures = _preferences._read(path)
    assert [v.outcome for v in read] == [-1, 1, 0, 0] and len(pictures) == 8
    groups = offline.read(str(path))
    won = [(folder / image).resolve() for image in (cast[0].image_1, cast[1].image_0)]
    assert [g.pictures[0].path.resolve() for g in groups] == won and [g.text for g in groups] == [v.prompt for v in cast[:2]]


def test_csv_says_the_same_as_jsonl(tmp_path):
    folder, _ = voted_folder(tmp_path / "run")
    standing = votes.read(folder).standing
    for name in ("v.csv", "v.jsonl"):
        votes.export(standing, folder, tmp_path / name)
    rows = [json.loads(line) for line in (tmp_path / "v.jsonl").read_text().splitlines()]
    with open(tmp_path / "v.csv", newline="") as file:
        assert list(csv.DictReader(file)) == [{k: str(v) for k, v in row.items()} for row in rows]
    assert tuple(rows[0]) == votes.COLUMNS and rows[0]["image_0"].startswith("run/samples/")


def test_the_verb_prints_and_exports(tmp_path, capsys):
    folder, _ = voted_folder(tmp_path / "run")
    assert cli.main(["votes", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "4 votes, 1 withdrawn" in said and "iteration 4 against base" in said and "ties: 1, both bad: 1" in said
    assert cli.main(["votes", str(folder), "--export", str(tmp_path / "v.csv")]) == 0
    assert "4 written to" in capsys.readouterr().out
    assert cli.main(["votes", str(folder), "--export", str(tmp_path / "v.txt")]) == 2
    assert ".jsonl or .csv" in capsys.readouterr().err
    assert cli.main(["votes", str(tmp_path / "none")]) == 2
