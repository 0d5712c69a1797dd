"""Asking the scorers: each picture once, written down first, whole groups, at the same time. `pytest tests/test_judge.py`"""

import threading

import pytest
import torch

from ddpo.deal import Row
from ddpo.journal import Journal
from ddpo.judge import Judge
from ddpo.prompts import Prompt
from rewards import Part, RewardError, Rubric

ROWS = [Row(g, m, Prompt(f"prompt {g}", {"group": g})) for g in range(3) for m in range(4)]
IMAGES = torch.randint(0, 256, (12, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


class Scorer:
    """Scores a corner pixel; remembers the batches, the prompts and the thread that asked."""

    def __init__(self, name="corner", breaks_at=None, **facts):
        self.name, self.breaks_at, self.batches, self.threads = name, breaks_at, [], set()
        vars(self).update(facts)

    def __call__(self, images, prompts, metadata):
        assert [f"prompt {m['group']}" for m in metadata] == list(prompts)
        self.batches.append(list(prompts))
        self.threads.add(threading.current_thread().name)
        if self.breaks_at is not None and len(self.batches) > self.breaks_at:
            raise ConnectionError("the judge went home")
        return images[:, 0, 0, 0]


def judge_of(folder, *scorers, batch_size=5, watched=()) -> Judge:
    rubrics = (Rubric.of([Part(s) for s in scorers]), Rubric.of([Part(s) for s in watched]))
    return Judge(*rubrics, Journal(folder), torch.device("cpu"), batch_size)


def heard(judge, images=IMAGES):
    hearing = judge.hear(ROWS, iteration=0, salt=0, group_size=4)
    for batch in images.split(5):
        hearing.add(batch)
    return hearing.scores()


WANTED = (IMAGES[:, 0, 0, 0].float() / 255).double()


def test_scores_come_in_the_order_of_the_pictures_whoever_gives_them(tmp_path):
    scorers = Scorer("a"), Scorer("b", groupwise=True), Scorer("c", elsewhere=True)
    scores = heard(judge_of(tmp_path, *scorers))
    assert list(scores) == ["a", "b", "c"] and all(torch.equal(s, WANTED) for s in scores.values())
    assert [len(b) for b in scorers[0].batches] == [len(b) for b in scorers[2].batches] == [5, 5, 2]
    assert [set(b) for b in scorers[1].batches] == [{"prompt 0"}, {"prompt 1"}, {"prompt 2"}]  # whole groups, one at a time
    assert scorers[0].threads == {"MainThread"} and scorers[2].threads == {"scorers_0"}


def test_what_computes_elsewhere_is_asked_while_pictures_are_drawn(tmp_path):
    asked = threading.Event()

    class Remote(Scorer):
        def __call__(self, images, prompts, metadata):
            asked.set()
            return super().__call__(images, prompts, metadata)

    hearing = judge_of(tmp_path, Remote(elsewhere=True)).hear(ROWS, 0, 0, 4)
    hearing.add(IMAGES[:5])
    assert asked.wait(10)  # before the second batch is there
    for batch in IMAGES[5:].split(5):
        hearing.add(batch)
    assert torch.equal(hearing.scores()["corner"], WANTED)


@pytest.mark.parametrize("elsewhere", [False, True])
def test_no_scorer_is_asked_twice_and_all_scores_so_far_are_kept(tmp_path, elsewhere):
    first, breaks = Scorer("first"), Scorer("breaks", breaks_at=1, elsewhere=elsewhere)
    with pytest.raises(
        RewardError, match=r"the judge went home(.|\n)*Stopped before the update of iteration 1; \d+ of its 24"
    ) as told:
        heard(judge_of(tmp_path, first, breaks))
    lines = (tmp_path / "rewards.jsonl").read_text().splitlines()
    kept = 5 if elsewhere else 5 + 5 + 5
    assert len(lines) == kept and f"{kept} of its 24 scores are kept" in str(told.value)
    again = Scorer("first"), Scorer("breaks", elsewhere=elsewhere)
    scores = heard(judge_of(tmp_path, *again))
    assert all(torch.equal(s, WANTED) for s in scores.values())
    assert sum(map(len, again[0].batches)) == (12 if elsewhere else 2) and sum(map(len, again[1].batches)) == 7
    third = Scorer("first"), Scorer("breaks")
    heard(judge_of(tmp_path, *third))
    assert third[0].batches == third[1].batches == []


def test_a_group_with_a_gap_in_the_journal_is_judged_whole(tmp_path):
    heard(judge_of(tmp_path, Scorer("b", groupwise=True)))
    path = tmp_path / "rewards.jsonl"
    path.write_text("".join(path.read_text().splitlines(True)[:6]))
    again = Scorer("b", groupwise=True)
    heard(judge_of(tmp_path, again))
    assert again.batches == [["prompt 1"] * 4, ["prompt 2"] * 4]


def test_the_probe_asks_everyone_in_whole_prompts(tmp_path):
    trained, watched = Scorer("a"), Scorer("b", groupwise=True)
    judge = judge_of(tmp_path, trained, watched=[watched])
    scores = judge.probe(IMAGES, [row.prompt for row in ROWS], 4)
    assert all(torch.equal(s, WANTED) for s in scores.values()) and list(scores) == ["a", "b"]
    assert [len(b) for b in watched.batches] == [4, 4, 4] and not (tmp_path / "rewards.jsonl").read_text()


def test_the_introduction_says_how_much_a_scorer_contradicts_itself(tmp_path):
    class Moody(Scorer):
        deterministic = False

        def __call__(self, images, prompts, metadata):
            return super().__call__(images, prompts, metadata) + 0.5 * (len(self.batches) > 3)

    judge = judge_of(tmp_path, Scorer("sure"), Moody("moody"))
    prompts = [row.prompt for row in ROWS]
    sure, moody = judge.introduction(IMAGES, prompts, 4, judge.probe(IMAGES, prompts, 4))
    assert "sure" in sure and "differs by 0" in sure and "noisy" not in sure
    assert "differs by 0.5" in moody and "noisy" in moody


def test_too_few_scores_stop_the_run_and_rewards_without_gradient_are_said(tmp_path):
    judge = judge_of(tmp_path, Scorer())
    texts = [row.prompt.text for row in ROWS]
    flat, some = torch.zeros(12, dtype=torch.float64), torch.arange(12.0, dtype=torch.float64)
    assert judge.check(some, texts) is None
    some[:2] = torch.nan
    with pytest.raises(RewardError, match=r"17% of this iteration's pictures could not be scored.*max_missing=0.1"):
        judge.check(some, texts)
    assert "teaches nothing" in judge.check(flat, texts)
    assert judge.check(torch.arange(12.0, dtype=torch.float64), texts) is None
