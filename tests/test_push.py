"""`ddpo push` uploads what it lists, nothing else, and only when told to. A stand-in takes the hub's place.
Run: pytest tests/test_push.py"""

import subprocess
import sys
from fnmatch import fnmatch

import pytest

from ddpo import cli
from ddpo.push import push


class Hub:
    def __init__(self):
        self.calls = []

    def create_repo(self, repo_id, **options):
        self.calls.append(("create", repo_id, options))

    def upload_folder(self, **options):
        self.calls.append(("upload", options))


@pytest.fixture
def folder(tmp_path):
    for name in (
        "README.md", "report.html", "config.yaml", "images/pair-1-base.png", "lora/a.safetensors", "run.json", "metrics.jsonl",
        "rewards.jsonl", "preferences.jsonl", "train.log", "checkpoints/step-00000001/lora.safetensors", "samples/x.webp",
        "wandb/id", "trackio/ddpo.db", "tb/events", "lora/note.txt", "secret.txt", "images/sub/deep.png",
    ):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x" * 1000)
    (tmp_path / "images" / "link.png").symlink_to(tmp_path / "secret.txt")
    return tmp_path


SENT = ["README.md", "config.yaml", "images/pair-1-base.png", "lora/a.safetensors", "report.html"]


def test_what_is_listed_is_what_is_sent(folder, capsys):
    hub = Hub()
    assert push(folder, "me/owls", private=True, sure=False, api=hub, ask=lambda _: "yes") == 0
    (_, repo, made), (_, sent) = hub.calls
    assert repo == "me/owls" and made["private"] is True and made["exist_ok"] is True and sent["repo_id"] == "me/owls"
    every = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]
    assert sorted(name for name in every if any(fnmatch(name, p) for p in sent["allow_patterns"])) == SENT
    shown = capsys.readouterr().out
    assert (
        all(name in shown for name in SENT) and "5,000  bytes in all" in shown and "private" in shown and "secret" not in shown
    )


@pytest.mark.parametrize("answer", ["", "n", "no", "maybe", EOFError])
def test_without_a_yes_nothing_is_made_or_sent(folder, answer, capsys):
    def ask(_):
        if answer is EOFError:
            raise EOFError
        return answer

    hub = Hub()
    assert push(folder, "me/owls", private=False, sure=False, api=hub, ask=ask) == 1
    assert hub.calls == [] and "nothing was uploaded" in capsys.readouterr().out


def test_yes_asks_nothing(folder):
    hub = Hub()
    assert push(folder, "me/owls", private=False, sure=True, api=hub, ask=lambda _: pytest.fail("it asked")) == 0
    assert len(hub.calls) == 2


def test_a_wrong_name_an_empty_folder_and_a_hub_that_refuses_are_told(folder, tmp_path, capsys):
    class Refusing(Hub):
        def create_repo(self, repo_id, **options):
            raise OSError("no route to host")

    for repo in ("owls", "a/b/c", "../x", "me/ owls", ""):
        with pytest.raises(ValueError, match="write user/name"):
            push(folder, repo, False, True, api=Hub())
    with pytest.raises(ValueError, match="hf auth login"):
        push(folder, "me/owls", False, True, api=Refusing())
    (folder / "README.md").unlink()
    assert cli.main(["push", str(folder), "me/owls", "--yes"]) == 2 and "ddpo export" in capsys.readouterr().err


def test_nothing_of_the_hub_is_imported_before_it_is_needed():
    program = "import sys, ddpo.push; sys.exit('huggingface_hub' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
