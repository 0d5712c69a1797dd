"""Prompt files, good and hostile, and the built-in lists: `pytest tests/test_prompts.py`."""

import gzip
import hashlib
import json
import os
import re

import pytest

from ddpo import prompts
from ddpo.menagerie import scenes
from ddpo.prompts import Prompt, PromptError

GOOD = {
    "plain.txt": (b"a cat\ntwo owls\n", ["a cat", "two owls"]),
    "no last newline.txt": (b"a cat\ntwo owls", ["a cat", "two owls"]),
    "blanks and comments.txt": (b"# animals\n\n  a cat  \n   \n#two owls\ntwo owls\n", ["a cat", "two owls"]),
    "mark.txt": (b"\xef\xbb\xbfa cat\ntwo owls\n", ["a cat", "two owls"]),
    "windows.txt": (b"\xef\xbb\xbf# animals\r\na cat\r\n\r\ntwo owls\r\n", ["a cat", "two owls"]),
    "duplicates.txt": (b"a cat\na cat\n", ["a cat", "a cat"]),
    "scripts.txt": ("猫\nनमस्ते\n👩‍👧 in the snow\n".encode(), ["猫", "नमस्ते", "👩‍👧 in the snow"]),
    "data.txt": (b"<script>{0}</script>\n../../etc %s $(rm)\n", ["<script>{0}</script>", "../../etc %s $(rm)"]),
    "CAPITALS.TXT": (b"A Cat\n", ["A Cat"]),
    "plain.jsonl": (b'{"prompt": "a cat"}\r\n\n{"prompt": "two owls"}\n', ["a cat", "two owls"]),
}
BAD = {
    "empty.txt": (b"", ": there is no prompt"),
    "only comments.txt": (b"# nothing\n\n   \n", ": there is no prompt"),
    "latin.txt": ("a cat\nun café\n".encode("latin-1"), ":2: not UTF-8"),
    "utf16.txt": ("a cat\n".encode("utf-16"), ":1: not UTF-8"),
    "utf16 unmarked.txt": ("a cat\n".encode("utf-16-le"), r":1: control character '\x00'"),
    "nul.txt": (b"a cat\na \x00 dog\n", r":2: control character '\x00'"),
    "escape.txt": (b"a cat\n\ntwo \x1b[31m owls\n", r":3: control character '\x1b'"),
    "old mac.txt": (b"a cat\rtwo owls\r", r":1: control character '\r'"),
    "separator.txt": ("a cat\u2028two owls".encode(), r":1: control character '\u2028'"),
    "long line.txt": (b"a cat\n" + b"x" * 10_000_000, ":2: the line is longer than 65536 bytes"),
    "long comment.txt": (b"#" + b"x" * 100_000, ":1: the line is longer than 65536 bytes"),
    "packed.txt": (gzip.compress(b"a cat\n", mtime=0), ":1: not UTF-8"),
    "cut off.jsonl": (
        b'{"prompt": "a cat"}\n' * 730 + b'{"prompt": "a c',
        ":731: not JSON (Unterminated string starting, character 12)",
    ),
    "list.jsonl": (b'["a cat"]\n', ":1: each line must be a JSON object"),
    "no prompt.jsonl": (b'{"text": "a cat"}\n', ":1: each line must be a JSON object"),
    "number.jsonl": (b'{"prompt": 3}\n', ":1: each line must be a JSON object"),
    "blank prompt.jsonl": (b'{"prompt": "  "}\n', ":1: the prompt is empty"),
    "surrogate.jsonl": (rb'{"prompt": "a \ud800 cat"}', r":1: control character '\ud800'"),
    "two lines.jsonl": (rb'{"prompt": "a cat\ntwo owls"}', r":1: control character '\n'"),
    "nan.jsonl": (b'{"prompt": "a cat", "weight": NaN}\n', ":1: NaN is not JSON"),
    "deep.jsonl": (b'{"prompt": "a cat", "x": ' + b"[" * 60_000, ":1: "),
    "huge number.jsonl": (b'{"prompt": "a cat", "x": ' + b"9" * 60_000 + b"}", ":1: "),
}


@pytest.mark.parametrize("name", GOOD)
def test_good_files(tmp_path, name):
    data, texts = GOOD[name]
    path = tmp_path / name
    path.write_bytes(data)
    assert prompts.load(str(path)) == [Prompt(text) for text in texts]
    assert prompts.digest(str(path)) == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused_by_name_and_line(tmp_path, name):
    data, message = BAD[name]
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(PromptError, match="^" + re.escape(f"{path}{message}")) as caught:
        prompts.load(str(path))
    assert len(str(caught.value)) < 1000


def test_metadata_is_all_but_the_prompt(tmp_path):
    path = tmp_path / "prompts.jsonl"
    records = [{"prompt": "two owls", "count": 2, "tags": ["bird", None]}, {"id": 1, "prompt": " a cat"}]
    path.write_text("\n".join(map(json.dumps, records)))
    assert prompts.load(str(path)) == [Prompt("two owls", {"count": 2, "tags": ["bird", None]}), Prompt(" a cat", {"id": 1})]


def test_too_many_prompts(tmp_path, monkeypatch):
    monkeypatch.setattr(prompts, "MAX_PROMPTS", 3)
    path = tmp_path / "prompts.txt"
    path.write_text("# animals\n" + "a cat\n" * 3)
    assert len(prompts.load(str(path))) == 3
    path.write_text("# animals\n" + "a cat\n" * 5)
    with pytest.raises(PromptError, match="txt:5: more than 3 prompts"):
        prompts.load(str(path))


def test_what_is_no_regular_file_is_never_opened(tmp_path):
    pipe, link, folder, large = (tmp_path / f"{name}.txt" for name in ("pipe", "link", "folder", "large"))
    os.mkfifo(pipe)
    link.symlink_to("/dev/zero")
    folder.mkdir()
    with large.open("wb") as file:
        file.truncate(prompts.MAX_BYTES + 1)
    refusals = {
        pipe: "not a regular file",
        link: "not a regular file",
        folder: "not a regular file",
        large: "at most 100000000",
    }
    for path, message in refusals.items():
        for read in (prompts.load, prompts.digest):
            with pytest.raises(PromptError, match=message):
                read(str(path))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("animal", "did you mean 'animals'.*Built in: activities, .*menagerie-train"),
        ("../prompt_lists/animals", "neither a .txt or .jsonl file nor a built-in list"),
        ("prompts.csv", "neither a .txt or .jsonl file"),
        ("", "neither a .txt or .jsonl file"),
        ("/nowhere/prompts.txt", "there is no such file; .*built-in list: activities"),
        ("a\0b.txt", "null"),
        ("x" * 5000 + ".txt", "too long"),
    ],
)
def test_wrong_names(source, message):
    with pytest.raises(PromptError, match=message):
        prompts.load(source)


def texts(name: str) -> list[str]:
    return [p.text for p in prompts.load(name)]


def test_built_in_lists_are_whole_and_say_what_they_are():
    sizes = {name: len(set(texts(name))) for name in prompts.built_in()}
    assert sizes == {
        "activities": 135, "activities-held-out": 90, "animals": 45, "animals-held-out": 30, "imagenet-animals": 398,
        "menagerie-train": 1207, "menagerie-held-out": 173, "menagerie-no-colour": 86, "menagerie-no-colour-held-out": 52,
    }  # fmt: skip
    for name in sizes:
        first, *rest = (prompts.LISTS / f"{name}.txt").read_text().splitlines()
        assert first.startswith("# ") and rest == texts(name)


def test_menagerie_lists_are_the_worlds_captions():
    every = scenes.all_scenes()
    assert texts("menagerie-train") == [s.caption for s in every if not s.held_out]
    assert texts("menagerie-held-out") == [s.caption for s in every if s.held_out]
    subjects = list(dict.fromkeys(s.subject for s in every))
    held = {text for text in subjects if hashlib.sha256(text.encode()).digest()[0] % 3 == 0}
    assert texts("menagerie-no-colour") == [text for text in subjects if text not in held]
    assert texts("menagerie-no-colour-held-out") == [text for text in subjects if text in held]


def test_held_out_lists_share_nothing_with_training():
    for name in ("animals", "activities", "menagerie-train", "menagerie-no-colour"):
        assert not set(texts(name)) & set(texts(name.removesuffix("-train") + "-held-out"))


def test_activities_are_the_animals_at_three_activities():
    for suffix in ("", "-held-out"):
        articles = [f"{scenes.article(a)} {a}" for a in texts("animals" + suffix)]
        assert texts("activities" + suffix) == [
            f"{a} {x}" for a in articles for x in ("riding a bike", "playing chess", "washing dishes")
        ]
    assert "an ant playing chess" in texts("activities")
