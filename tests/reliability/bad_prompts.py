"""Twenty prompt files, good and bad, and what each must say. `python -m tests.reliability.show` prints them."""

import gzip
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

CAT = b'{"prompt": "a cat"}\n'


@dataclass(frozen=True)
class File:
    """A prompt file.

    Args:
        path: its name, in the working directory.
        content: what it holds, or what puts it there; None is nothing.
        said: parts of the refusal; none where it is accepted.
        texts: the prompts where it is accepted.
    """

    path: str
    content: bytes | Callable[[], object] | None
    said: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()

    def place(self) -> None:
        """Put it into the working directory."""
        if callable(self.content):
            self.content()
        elif self.content is not None:
            Path(self.path).write_bytes(self.content)


PROMPTS = {
    "missing": File("p.txt", None, ("prompts 'p.txt'", "there is no such file in ", "a built-in list: activities")),
    "empty": File(
        "p.txt",
        b"",
        (
            "p.txt: there is no prompt in it",
            "write one a line",
        ),
    ),
    "only blanks and comments": File(
        "p.txt", b"# animals\n\n   \n", ("p.txt: there is no prompt in it, only blank lines and comments",)
    ),
    "a byte order mark": File("p.txt", b"\xef\xbb\xbfa cat\n", texts=("a cat",)),
    "from Windows": File("p.txt", b"a cat\r\n\r\ntwo owls\r\n", texts=("a cat", "two owls")),
    "Latin-1": File("p.txt", "a cat\nun caf\xe9\n".encode("latin-1"), ("p.txt:2: not UTF-8", "save the file as UTF-8")),
    "UTF-16": File("p.txt", "a cat\n".encode("utf-16"), ("p.txt:1: not UTF-8", "save the file as UTF-8")),
    "a NUL": File("p.txt", b"a cat\na \0 dog\n", (r"p.txt:2: control character '\x00' in the prompt 'a \x00 dog'; remove it",)),
    "a lone surrogate": File(
        "p.jsonl", CAT + rb'{"prompt": "a \ud800 dog"}', (r"p.jsonl:2: control character '\ud800'", "remove it")
    ),
    "a line of 10 MB": File(
        "p.txt",
        b"a cat\n" + b"x" * 10_000_000,
        (
            "p.txt:2: the line is longer than 65536 bytes",
            "shorten it",
        ),
    ),
    "10,000 lines": File("p.txt", b"a cat\n" * 10_000, texts=("a cat",) * 10_000),
    "a directory": File(
        "p.txt", lambda: os.mkdir("p.txt"), ("prompts 'p.txt': not a regular file (d", "give a .txt or .jsonl file")
    ),
    "a pipe": File(
        "p.txt", lambda: os.mkfifo("p.txt"), ("prompts 'p.txt': not a regular file (p", "give a .txt or .jsonl file")
    ),
    "an endless device": File("p.txt", lambda: os.symlink("/dev/zero", "p.txt"), ("prompts 'p.txt': not a regular file (c",)),
    "packed": File("p.txt", gzip.compress(b"a cat\n", mtime=0), ("p.txt:1: not UTF-8", "unpack it")),
    "a bad line 731": File(
        "p.jsonl", CAT * 730 + b'{"prompt": "a c', ("p.jsonl:731: not JSON (", "mend the line or take it out")
    ),
    "duplicates": File("p.txt", b"a cat\na cat\n", texts=("a cat", "a cat")),
    "no object": File(
        "p.jsonl",
        CAT + b'["a cat"]\n',
        ('p.jsonl:2: each line must be a JSON object with a text "prompt"', 'such as {"prompt"'),
    ),
    "terminal escapes": File("p.txt", b"a cat\n\x1b[31mtwo owls\n", (r"p.txt:2: control character '\x1b'", "remove it")),
    "code and markup": File(
        "p.jsonl",
        json.dumps({"prompt": "<script>alert(1)</script> {0.__class__} %s $(id) [red]../../etc", "x": "\x1b[2J"}).encode(),
        texts=("<script>alert(1)</script> {0.__class__} %s $(id) [red]../../etc",),
    ),
}
