"""Rewards are written down before they are used, and are found again whatever happened in between.

pytest tests/test_journal.py
"""

import json
import os
import resource
import signal

import pytest

from ddpo.journal import Journal, JournalError, Key, image_hash


def key(member: int, iteration: int = 0, image: bytes = b"pixels") -> Key:
    return Key(iteration, 0, 1, member, image_hash(image))


def fill(journal: Journal, members: range, score: float = 0.5) -> None:
    journal.add([(key(m), f"prompt {m}", {"scene": score + m}) for m in members])


def test_what_was_added_is_read_back_exactly(tmp_path):
    scores = {"scene": 1 / 3, "gold": None, "größe": -1e-300}
    Journal(tmp_path / "run").add([(key(0), "a cat,\n\u2028 größe \ud800", scores)])
    again = Journal(tmp_path / "run")
    assert again.get(key(0)) == scores
    assert (
        again.get(key(1)) is None
        and again.get(key(0, image=b"other pixels")) is None
        and again.get(key(0, iteration=1)) is None
    )


def test_one_readable_object_a_line(tmp_path):
    fill(Journal(tmp_path), range(2))
    lines = (tmp_path / "rewards.jsonl").read_text().splitlines()
    assert len(lines) == 2
    expected = {"iteration": 0, "salt": 0, "group": 1, "member": 1, "image": image_hash(b"pixels")}
    assert json.loads(lines[1]) == expected | {"prompt": "prompt 1", "scores": {"scene": 1.5}}


def test_the_hash_is_the_digest_of_the_pixels():
    assert image_hash(b"abc") == "ba7816bf8f01cfea"


def test_the_answer_is_on_the_disk_before_add_returns(tmp_path, monkeypatch):
    journal = Journal(tmp_path)
    synced: list[int] = []
    fsync = os.fsync

    def recorded(descriptor: int) -> None:
        synced.append(os.fstat(descriptor).st_size)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", recorded)
    fill(journal, range(3))
    assert synced == [journal.path.stat().st_size] and synced[0] > 0


@pytest.mark.parametrize("tail", [b'{"iteration": 0, "sal', b"\x00\x00\x00", b'{"whole": "but without its end"}'])
def test_a_torn_tail_is_cut_off_and_the_next_line_is_whole(tmp_path, tail):
    fill(Journal(tmp_path), range(3))
    whole = (tmp_path / "rewards.jsonl").read_bytes()
    (tmp_path / "rewards.jsonl").write_bytes(whole + tail)
    journal = Journal(tmp_path)
    assert (tmp_path / "rewards.jsonl").read_bytes() == whole
    fill(journal, range(3, 4))
    assert [Journal(tmp_path).get(key(m)) for m in range(4)] == [{"scene": 0.5 + m} for m in range(4)]


def test_every_cut_leaves_a_journal_that_opens(tmp_path):
    fill(Journal(tmp_path), range(2))
    whole = (tmp_path / "rewards.jsonl").read_bytes()
    for length in range(len(whole)):
        (tmp_path / "rewards.jsonl").write_bytes(whole[:length])
        found = [Journal(tmp_path).get(key(m)) is not None for m in range(2)]
        assert sum(found) == whole[:length].count(b"\n") and found == sorted(found, reverse=True)


def test_another_number_of_processes_finds_everything(tmp_path):
    for rank in range(3):
        fill(Journal(tmp_path, rank), range(rank, 6, 3))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["rewards-rank1.jsonl", "rewards-rank2.jsonl", "rewards.jsonl"]
    for rank in range(2):
        assert all(Journal(tmp_path, rank).get(key(m)) == {"scene": 0.5 + m} for m in range(6))


def test_a_torn_tail_of_another_process_is_passed_over_and_left_alone(tmp_path):
    fill(Journal(tmp_path, 1), range(2))
    other = tmp_path / "rewards-rank1.jsonl"
    torn = other.read_bytes() + b'{"iteration": 0, "sa'
    other.write_bytes(torn)
    assert Journal(tmp_path, 0).get(key(1)) == {"scene": 1.5}
    assert other.read_bytes() == torn


def test_scorers_add_up_and_the_last_word_counts(tmp_path):
    journal = Journal(tmp_path)
    journal.add([(key(0), "p", {"scene": 1.0}), (key(1), "p", {"scene": 2.0})])
    journal.add([(key(0), "p", {"aesthetic": 5.0})])
    journal.add([(key(1), "p", {"scene": None})])
    for reader in (journal, Journal(tmp_path)):
        assert reader.get(key(0)) == {"scene": 1.0, "aesthetic": 5.0} and reader.get(key(1)) == {"scene": None}
    journal.get(key(0)).clear()
    assert journal.get(key(0)) == {"scene": 1.0, "aesthetic": 5.0}, "the reader's copy is not the journal"


GOOD = {"iteration": 0, "salt": 0, "group": 0, "member": 0, "image": "00", "prompt": "p", "scores": {"scene": 1.0}}
BAD = [
    b"not json",
    b"",
    b"\xff\xfe",
    b"[]",
    b"7",
    b"[" * 200_000,
    json.dumps(GOOD | {"iteration": "0"}).encode(),
    json.dumps(GOOD | {"scores": [1.0]}).encode(),
    json.dumps(GOOD | {"scores": {"scene": "high"}}).encode(),
    json.dumps(GOOD | {"scores": {"scene": float("nan")}}).encode(),
    json.dumps(GOOD | {"scores": {"scene": 10**400}}).encode(),
    json.dumps({k: v for k, v in GOOD.items() if k != "image"}).encode(),
]


@pytest.mark.parametrize("bad", BAD, ids=range(len(BAD)))
def test_a_bad_line_in_the_middle_is_named(tmp_path, bad):
    good = json.dumps(GOOD).encode()
    (tmp_path / "rewards-rank2.jsonl").write_bytes(good + b"\n" + bad + b"\n" + good + b"\n")
    with pytest.raises(JournalError, match=r"rewards-rank2\.jsonl, line 2: not a reward record .*remove this line"):
        Journal(tmp_path)


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_a_score_that_is_not_a_number_is_refused_before_anything_is_written(tmp_path, bad):
    journal = Journal(tmp_path)
    with pytest.raises(ValueError, match=r"scene gave .* for 'a cat'"):
        journal.add([(key(0), "a dog", {"scene": 1.0}), (key(1), "a cat", {"scene": bad})])
    assert journal.path.read_bytes() == b"" and journal.get(key(0)) is None


def test_a_disk_that_refuses_is_told_and_leaves_whole_lines(tmp_path):
    """In a child, whose files may not grow past a limit in the middle of the second batch."""
    journal = Journal(tmp_path)
    fill(journal, range(3))
    whole = journal.path.read_bytes()
    if (pid := os.fork()) == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 50, resource.RLIM_INFINITY))
        try:
            fill(journal, range(3, 6))
        except JournalError as error:
            told = "rewards.jsonl cannot be read or written" in str(error) and "run the same command again" in str(error)
            os._exit(0 if told and journal.get(key(3)) is None else 2)
        os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0
    assert journal.path.read_bytes() == whole


def test_a_folder_that_cannot_be_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(JournalError, match="cannot be read or written"):
        Journal(tmp_path / "file")
