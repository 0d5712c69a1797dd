"""Damaged, foreign, old and hostile checkpoints, at the real trainer: it uses the one before and says so, or says what is wrong.

pytest tests/reliability/test_checkpoints.py

Elsewhere: what the reader refuses, file by file, no pickle and nothing outside the folder (tests/test_manifest.py, C2, C3); the
number decides and not the clock, the order of fsync and rename, kills and full disks at every point of the writer
(tests/test_checkpoint.py, C6, K2, K6, D3); resuming to the bit (tests/test_trainer.py, tests/reliability/test_kills.py).
"""

import random
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch

from ddpo import checkpoint, state
from ddpo.checkpoint import CheckpointError, CorruptCheckpoint, MismatchedCheckpoint
from ddpo.experiment import identity, read
from ddpo.policy import LoRA
from ddpo.progress import Display
from tests.command import CONFIG
from tests.test_manifest import accelerates, empty, plant, reseal, with_header
from tests.test_trainer import trainer_of, weights

V1 = Path(__file__).parent.parent / "fixtures" / "checkpoint" / "v1"  # made by make_fixture.py beside it
IDENTITY = {"model": "tiny"}


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    """A run of three iterations with its three checkpoints, and the weights that it ended with."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    trainer = trainer_of(folder, tiny)
    trainer.run()
    return folder, weights(trainer)


@pytest.fixture
def run(trained, tmp_path):
    """A copy of it, and its newest checkpoint."""
    folder = shutil.copytree(trained[0], tmp_path / "run")
    return folder, folder / "checkpoints" / "step-00000003"


class Told(Display):
    """Keeps what it was told to say."""

    def __init__(self):
        super().__init__(False, None)
        self.lines = []

    def say(self, text):
        self.lines.append(text)


def damage(path: Path, rng: random.Random) -> str:
    """One damage somewhere in a checkpoint; returns what it was."""
    file = rng.choice(sorted(path.iterdir()))
    data = bytearray(file.read_bytes())
    at = rng.randrange(len(data))
    kind = rng.choice(["bit flip", "truncation", "zeroed block", "extra byte", "deleted file"])
    if kind == "deleted file":
        file.unlink()
    elif kind == "truncation":
        file.write_bytes(data[:at])
    elif kind == "extra byte":
        file.write_bytes(data[:at] + rng.choice([b" ", b"\0", b"\n"]) + data[at:])
    elif kind == "zeroed block":
        file.write_bytes(data[:at] + bytes(len(data[at : at + 512])) + data[at + 512 :])
        kind = kind if any(data[at : at + 512]) else ""
    else:
        data[at] ^= 1 << rng.randrange(8)
        file.write_bytes(data)
    return kind and f"{kind} in {file.name} at {at}"


def test_300_damages_are_noticed_and_the_one_before_is_used(trained, tmp_path):
    whole, rng, noticed = trained[0] / "checkpoints", random.Random(0), 0
    while noticed < 300:
        root = shutil.copytree(whole, tmp_path / "damaged")
        newest = root / "step-00000003"
        if what := damage(newest, rng):  # zeros over zeros are none
            warned: list[str] = []
            assert checkpoint.latest(root, warned.append) == root / "step-00000002", what
            assert len(warned) == 1 and "skipping a damaged checkpoint" in warned[0] and str(newest) in warned[0], what
            assert "\n" not in warned[0], what
            with pytest.raises(CorruptCheckpoint, match="step-00000003"):  # named, it is that one or none
                checkpoint.load(newest, IDENTITY)
            noticed += 1
        shutil.rmtree(root)


def test_a_run_goes_on_from_the_one_before_says_which_it_skipped_and_ends_the_same(trained, run, tiny):
    folder, newest = run
    data = bytearray((newest / "optimizer.safetensors").read_bytes())
    data[-1] ^= 1
    (newest / "optimizer.safetensors").write_bytes(data)
    trainer = trainer_of(folder, tiny, display=(told := Told()))
    trainer.run()
    assert torch.equal(weights(trainer), trained[1])
    assert told.lines[0].startswith(f"skipping a damaged checkpoint: {newest}/optimizer.safetensors: its size or sha256")
    assert told.lines[1] == f"resuming after iteration 2 from {folder}/checkpoints/step-00000002"


@pytest.mark.parametrize("make", [empty, accelerates])
def test_a_foreign_folder_under_the_next_number_is_passed_over(run, tiny, make):
    folder, newest = run
    foreign = shutil.copytree(newest, newest.with_name("step-00000009"))
    make(foreign)
    trainer_of(folder, tiny, display=(told := Told())).run()
    assert "step-00000009" in told.lines[0] and told.lines[1].endswith("step-00000003")


def test_a_format_of_the_future_stops_the_run_and_is_left_alone(run, tiny):
    folder, newest = run
    reseal(newest, lambda body: body.update(format=2))
    before = (newest / "manifest.json").read_bytes()
    with pytest.raises(MismatchedCheckpoint, match=r"step-00000003.*format 2, this program reads 1; install a newer ddpo"):
        trainer_of(folder, tiny).run()
    assert (newest / "manifest.json").read_bytes() == before


def test_a_checkpoint_of_the_first_format_loads_and_trains(tiny, tmp_path):
    """Committed, at most 50 kB: whatever the format is one day, this one is still read."""
    assert sum(file.stat().st_size for file in V1.rglob("*") if file.is_file()) <= 50_000
    root = tmp_path / "checkpoints"
    shutil.copytree(V1 / "step-00000001", root / "step-00000001")
    saved = checkpoint.load(root / "step-00000001", IDENTITY)
    trainer = trainer_of(tmp_path, tiny, iterations=2, lora=LoRA(1, targets=["to_q"]), display=(told := Told()))
    state.resume(trainer)
    assert told.lines == [f"resuming after iteration 1 from {root / 'step-00000001'}"]
    assert torch.equal(weights(trainer), torch.cat([saved.tensors["lora"][name].flatten() for name in trainer.policy.weights]))
    trainer.run()
    assert trainer.iteration == 2 and checkpoint.verify(root / "step-00000002")["format"] == 1


SETTINGS = {  # words -> the field, both values
    "model.dtype=bfloat16": ("model.dtype: checkpoint 'float32', now 'bfloat16'", "model.dtype=float32"),
    "lora.rank=8": ("lora.rank: checkpoint 4, now 8", "lora.rank=4"),
    "rollout.solver.eta=0.5": ("rollout.solver.eta: checkpoint 1.0, now 0.5", "rollout.solver.eta=1.0"),
    "rollout.num_steps=5": ("rollout.num_steps: checkpoint 4, now 5", "rollout.num_steps=4"),
    "run.seed=7": ("run.seed: checkpoint 0, now 7", "run.seed=0"),
    "rewards.1.weight=0.5": ("rewards.1.weight: checkpoint 0.1, now 0.5", "rewards.1.weight=0.1"),
    "prompts.train=animals": ("prompts.train: checkpoint '", "set them back, or"),
}


def test_other_settings_are_listed_each_with_both_values_and_what_sets_them_back(tiny, tmp_path):
    (tmp_path / "c.yaml").write_text(CONFIG.format(model=tiny))

    def settings(*words: str) -> dict:
        return identity(read(str(tmp_path / "c.yaml"), list(words), 1).recipe)

    path = checkpoint.save(tmp_path / "checkpoints", 1, {}, {}, settings())
    for word, (field, back) in SETTINGS.items():
        with pytest.raises(MismatchedCheckpoint) as refused:
            checkpoint.load(path, settings(word))
        said = str(refused.value)
        assert field in said and back in said and "or choose another run.output=DIR" in said and "\n" not in said, said
        assert said.count("checkpoint ") == 1, said
    with pytest.raises(MismatchedCheckpoint) as refused:
        checkpoint.load(path, settings("lora.rank=8", "run.seed=7"))
    assert "lora.rank: checkpoint 4, now 8; run.seed: checkpoint 0, now 7 (set them back: lora.rank=4 run.seed=0, or" in str(
        refused.value
    )
    restored = settings("lora.rank=8", "lora.rank=4", "run.seed=7", "run.seed=0", "model.dtype=float32")
    assert checkpoint.load(path, restored).step == 1


def reshape(named: dict, name: str) -> None:
    named[name] = named[name][:1].clone()  # copy_ would spread it over the whole weight


def double(named: dict, name: str) -> None:
    named[name] = named[name].double()


def lose(named: dict, name: str) -> None:
    del named[name]


def add(named: dict, name: str) -> None:
    named["a.stranger"] = named[name].clone()


WRONG = {
    "another shape": (
        reshape,
        r"lora: \S+ is torch.float32 \[1, \d+\], and the model's is torch.float32 \[\d+, \d+\]; resume with",
    ),
    "another precision": (double, r"lora: \S+ is torch.float64 \[\d+, \d+\], and the model's is torch.float32"),
    "a tensor too few": (lose, r"lora: \S+ is absent, and the model's is torch.float32"),
    "a tensor too many": (add, r"lora: a\.stranger is torch.float32 \[\d+, \d+\], and the model's is absent"),
}


@pytest.mark.parametrize("name", WRONG)
def test_weights_that_do_not_fit_are_refused_by_name(run, tiny, name):
    """Whole to the digest, so that only the tensors themselves can tell."""
    folder, newest = run
    change, said = WRONG[name]
    named = safetensors.torch.load_file(newest / "lora.safetensors")
    change(named, next(key for key in named if "lora_A" in key))
    plant(newest, safetensors.torch.save(named))
    with pytest.raises(MismatchedCheckpoint, match=said):
        trainer_of(folder, tiny).run()


def test_a_weight_that_is_no_number_is_refused_by_name(run, tiny):
    folder, newest = run
    named = safetensors.torch.load_file(newest / "lora.safetensors")
    name = sorted(named)[0]
    named[name].view(-1)[0] = torch.nan
    plant(newest, safetensors.torch.save(named))
    with pytest.raises(CorruptCheckpoint, match=f"holds NaN or infinity in {name}; use another checkpoint"):
        trainer_of(folder, tiny).run()


@pytest.mark.parametrize("stem", ["optimizer", "lora"])
def test_a_file_that_the_manifest_does_not_list_is_missed(run, tiny, stem):
    folder, newest = run
    reseal(newest, lambda body: body["files"].pop(f"{stem}.safetensors") and None)
    with pytest.raises(MismatchedCheckpoint, match=stem):
        trainer_of(folder, tiny).run()


@pytest.mark.parametrize("change", [{"optimizer": {}}, {"optimizer": 3}, {"baseline": None}])
def test_a_state_of_another_shape_is_told(run, tiny, change):
    folder, newest = run
    reseal(newest, lambda body: body | {"state": body["state"] | change})
    with pytest.raises(MismatchedCheckpoint, match=r"its state is not what this ddpo writes \(.*choose another run.output=DIR"):
        trainer_of(folder, tiny).run()


def test_a_million_tensors_are_refused_before_the_file_is_opened(run, monkeypatch):
    """safetensors itself takes seconds for them."""
    opened: list[Path] = []
    monkeypatch.setattr(safetensors.torch, "load_file", opened.append)
    listed = ",".join(f'"{i}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for i in range(1_000_000))
    plant(run[1], with_header(f"{{{listed}}}".encode()))
    with pytest.raises(CorruptCheckpoint, match=r"lora\.safetensors: its header is no table of at most 100000 tensors"):
        checkpoint.load(run[1], IDENTITY)
    assert opened == []


def test_every_refusal_is_of_one_kind():
    """So that one `except` in the command tells all of them without a traceback."""
    assert issubclass(CorruptCheckpoint, CheckpointError) and issubclass(MismatchedCheckpoint, CheckpointError)
