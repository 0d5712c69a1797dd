"""Drawing with a run's model: the same noise for base and tuned, what a LoRA scale means, what stops the work; grids; the panel."""

import dataclasses
import io
import json
import shutil

import pytest
import torch
from PIL import Image

from ddpo import checkpoint, cli, components, sheet
from ddpo.app.device import Stopped, Task
from ddpo.config import ConfigError, dump, load
from ddpo.diffusion import DDIM
from ddpo.durable import FileError
from ddpo.evaluate import Probe
from ddpo.experiment import ModelError, identity
from ddpo.export import save_lora
from ddpo.offer import BUILT_IN, Offer
from ddpo.panel import Panel, about
from ddpo.prompts import Prompt
from ddpo.recipe import Recipe
from ddpo.rollout import collect
from ddpo.scorers import _built_in
from ddpo.sections import Evaluating
from ddpo.shots import GRIDS, MOST_CELLS, Grid, Shot
from ddpo.studio import Studio
from tests.command import CONFIG
from tests.test_rollout import policy_of, stir

SHOT = Shot("a cat", 3, 4, 2.0, 1.0, 2)


def save_run(folder, model, config=CONFIG):
    """A run folder as training leaves it: checkpoints of iterations 1 and 2, and the last one's LoRA exported."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(config.format(model=model))
    recipe = load(folder / "config.yaml", [], Recipe).recipe
    (folder / "config.yaml").write_text(dump(recipe))
    policy = policy_of(model, 2.0)
    for step in (1, 2):
        tensors = {"lora": dict(stir(policy, seed=step).weights), "optimizer": {}}
        checkpoint.save(folder / "checkpoints", step, tensors, {}, identity(recipe))
    save_lora(policy, folder, folder.name)
    (folder / "metrics.jsonl").write_text('{"iteration": 1}\n{"iteration": 2}\n')
    (folder / "run.json").write_text(json.dumps({"name": folder.name, "status": "finished"}))
    return folder


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    return save_run(tmp_path_factory.mktemp("runs") / "tuned", tiny)


@pytest.fixture(scope="module")
def studio(run):
    return Studio.open(run)


def vary(**changes):
    return dataclasses.replace(SHOT, **changes)


def pixels(studio, *shots):
    return studio.draw(shots).int()


def test_base_and_tuned_are_what_the_runs_evaluation_draws(run, studio, tiny):
    """The base policy is a new one; the tuned one has the checkpoint's weights."""
    probe = Probe([Prompt("a cat"), Prompt("two dogs")], Evaluating(2, 2), SHOT.num_steps, studio.settings.run.seed)
    shots = [Shot(p.text, s, SHOT.num_steps, 2.0, 1.0, 2) for p, s in probe.rows]
    policy = policy_of(tiny, 2.0)
    assert torch.equal(studio.draw([shot.base for shot in shots]), probe.draw(policy, probe.rows, 8, lambda rows: None))
    policy.load(checkpoint.load(run / "checkpoints" / "step-00000002", _identity(run)).tensors["lora"])
    tuned = studio.draw(shots)
    assert torch.equal(tuned, probe.draw(policy, probe.rows, 8, lambda rows: None))
    assert not torch.equal(tuned, studio.draw([shot.base for shot in shots]))


def _identity(run):
    return identity(load(run / "config.yaml", [], Recipe).recipe)


def test_iteration_0_and_scale_0_are_the_base_model(studio):
    assert torch.equal(studio.draw([vary(iteration=0)]), studio.draw([SHOT.base]))
    assert (pixels(studio, vary(scale=0.0)) - pixels(studio, SHOT.base)).abs().max() <= 1
    assert not torch.equal(studio.draw([vary(iteration=1)]), studio.draw([SHOT]))


def test_a_scale_multiplies_the_update_and_one_changes_no_bit(tiny):
    policy, x, t = stir(policy_of(tiny)), torch.randn(2, 4, 8, 8), torch.tensor([500, 21])

    def belief():
        with torch.no_grad():
            return policy(x, t, policy.family.encode(["a cat", "a dog"])).eps

    whole = belief()
    with policy.scaled(1.0):
        assert torch.equal(belief(), whole)
    with policy.scaled(0.0):
        nothing = belief()
    with policy.acting_as("reference"):
        torch.testing.assert_close(nothing, belief(), atol=1e-6, rtol=1e-5)
    with policy.scaled(0.7):
        scaled = belief()
    assert torch.equal(belief(), whole)
    with torch.no_grad():
        for name, weight in policy.weights.items():
            weight.mul_(0.7 if ".lora_B." in name else 1.0)
    torch.testing.assert_close(scaled, belief(), atol=1e-5, rtol=1e-4)


def test_what_goes_wrong_while_drawing_leaves_the_model_as_it_was(studio):
    before, guidance = studio.draw([SHOT]), studio.policy.guidance
    calls = []

    def stop(done, total):
        calls.append((done, total))
        if done == 2:
            raise Stopped

    with pytest.raises(Stopped):
        studio.draw([vary(scale=0.3, guidance=5.0, iteration=1)], stop)
    assert calls == [(1, 4), (2, 4)] and studio.policy.guidance == guidance
    assert torch.equal(studio.draw([SHOT]), before)


def test_a_picture_depends_on_its_shot_alone(studio):
    shots = [vary(seed=s, scale=c) for s in range(5) for c in (1.0, 0.5)] + [SHOT.base]
    whole = pixels(studio, *shots)
    assert (torch.cat([pixels(studio, shot) for shot in shots]) - whole).abs().max() <= 1
    assert (pixels(studio, *shots[::-1]).flip(0) - whole).abs().max() <= 1
    assert len({tuple(image.flatten().tolist()) for image in whole}) == len(shots)


def test_progress_counts_every_denoising_step(studio):
    told = []
    studio.draw([SHOT.base, SHOT, vary(num_steps=3)], lambda done, total: told.append((done, total)))
    assert told == [(i, 11) for i in range(1, 12)]


def test_where_the_checkpoints_are_gone_the_exported_lora_serves(run, tmp_path, studio):
    shutil.copytree(run, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / "checkpoints")
    copy = Studio.open(tmp_path / "copy", studio)
    assert copy.policy is studio.policy  # the same model, loaded once
    assert torch.equal(copy.draw([SHOT]), studio.draw([SHOT])) and Offer.of(copy.folder).iterations == [0, 2]
    with pytest.raises(ValueError, match=r"no LoRA of iteration 1; it holds 0, 2"):
        copy.draw([vary(iteration=1)])


def test_another_model_takes_the_place_of_the_last(run, tmp_path):
    shutil.copytree(run, tmp_path / "other")
    config = (run / "config.yaml").read_text().replace("gradient_checkpointing: false", "gradient_checkpointing: true")
    (tmp_path / "other" / "config.yaml").write_text(config)
    last = Studio.open(run)
    assert Studio.open(tmp_path / "other", last).policy and not hasattr(last, "policy")


def test_a_run_whose_prompts_and_scorers_are_gone_can_still_be_drawn_with(run, tmp_path, studio):
    shutil.copytree(run, tmp_path / "copy")
    config = (
        (run / "config.yaml").read_text().replace("menagerie-held-out", "gone.txt").replace("jpeg:Compressibility", "gone.py:X")
    )
    (tmp_path / "copy" / "config.yaml").write_text(config)
    copy = Studio.open(tmp_path / "copy")
    assert torch.equal(copy.draw([SHOT]), studio.draw([SHOT])) and copy.metadata() == {}
    [opinion] = Panel().ask(Offer.of(copy.folder).scorers["gone.py:X"], torch.rand(1, 3, 16, 16), ["a cat"], [{}])
    assert opinion.score is None and "there is no file gone.py" in opinion.trouble


def test_what_cannot_be_loaded_is_told(run, tmp_path):
    for name in ("model", "rank", "torn", "none"):
        shutil.copytree(run, tmp_path / name)
    config = (run / "config.yaml").read_text()
    model = load(run / "config.yaml", [], Recipe).recipe.model.options["path"]
    (tmp_path / "model" / "config.yaml").write_text(config.replace(model, "some/where"))
    with pytest.raises(ModelError, match=r"'some/where' cannot be loaded: .*[^.]\. Bring .*`hf download some/where`"):
        Studio.open(tmp_path / "model")
    (tmp_path / "rank" / "config.yaml").write_text(config.replace("rank: 4", "rank: 2"))
    with pytest.raises(FileError, match=r"was made with lora.rank=4, and config.yaml says lora.rank=2"):
        Studio.open(tmp_path / "rank").draw([SHOT])
    shutil.rmtree(tmp_path / "rank" / "checkpoints")
    with pytest.raises(FileError, match="does not fit its model"):
        Studio.open(tmp_path / "rank").draw([SHOT])
    lora = tmp_path / "torn" / "checkpoints" / "step-00000002" / "lora.safetensors"
    lora.write_bytes(lora.read_bytes()[:-1])
    with pytest.raises(FileError, match="not a whole checkpoint"):
        Studio.open(tmp_path / "torn").draw([SHOT])
    (tmp_path / "none" / "config.yaml").unlink()
    with pytest.raises(ConfigError):
        Studio.open(tmp_path / "none")


WRONG = {
    "prompt": ["", " ", "x" * 2001, "a\x00b", "a\ud800", "a\nb", ["a"], None, 5],
    "seed": [-1, 2**31, 1.5, 1e300, float("nan"), "1", True, None, [1], 10**400],
    "num_steps": [0, 201, 10**9, "8", None],
    "guidance": [-0.1, 30.5, float("nan"), float("inf"), "1", True, None],
    "scale": [-0.1, 1.6, float("nan"), None],
    "iteration": [-1, 10**9, 1.5, "best", None],
}


@pytest.mark.parametrize("field", WRONG)
def test_a_wrong_setting_is_refused_and_the_range_named(field):
    for value in WRONG[field]:
        with pytest.raises(ValueError, match=r"must be a|at most 2,000|is empty|control character") as caught:
            vary(**{field: value})
        str(caught.value).encode()  # it can be shown
    assert vary(seed=5.0).seed == 5 and type(vary(seed=5.0).seed) is int


def test_a_grid_is_rows_of_columns_and_has_at_most_64_pictures():
    grid = Grid.of(SHOT, "LoRA scale x iteration", "0, 0.5,1", "1\n2")
    assert [(s.scale, s.iteration) for s in grid.shots] == [(0, 1), (0.5, 1), (1, 1), (0, 2), (0.5, 2), (1, 2)]
    assert [s.seed for s in Grid.of(SHOT, "prompt x seed", "a\nb", "0-2, 7").shots] == [0, 0, 1, 1, 2, 2, 7, 7]
    assert len(Grid.of(SHOT, "prompt x seed", "a\nb", "0-31").shots) == MOST_CELLS
    for name, across, down, message in (
        ("prompt x seed", "a\nb\nc", "0-21", "3 x 22 = 66 pictures; a grid has at most 64"),
        ("prompt x seed", "a", "0-2147483647", "seed has more than 64 values"),
        ("prompt x seed", "a", "", "seed has no value: write whole numbers"),
        ("prompt x seed", "a", "one", "'one' is no whole number"),
        ("prompt x seed", "a", "1" * 5000, "is no whole number"),
        ("guidance x LoRA scale", "1, 2x", "1", "'2x' is no number"),
        ("guidance x LoRA scale", "1", "2", "the LoRA scale must be a number from 0 to 1.5, not 2.0"),
        ("steps x seed", "1", "2", "choose one of LoRA scale x iteration"),
        (["prompt x seed"], "1", "2", "there is no grid"),
        ("prompt x seed", None, "2", "must be a text"),
    ):
        with pytest.raises(ValueError, match=message):
            Grid.of(SHOT, name, across, down)


@pytest.mark.parametrize("name", GRIDS)
def test_a_sheet_shows_every_picture_and_carries_no_metadata(name):
    written = {
        "prompt": "an owl\n" + "a very long prompt " * 20,
        "seed": "0-2",
        "guidance": "1, 2",
        "scale": "0, 1",
        "iteration": "0, 2",
    }
    x, y = GRIDS[name]
    grid = Grid.of(SHOT, name, written[x.field], written[y.field])
    colours = [(255 - i, 3 * i, 99) for i in range(len(grid.shots))]
    scores = {"clip": [0.5] * len(colours), "broken": [None] * len(colours)}
    picture = Image.open(io.BytesIO(sheet.png(grid, [Image.new("RGB", (64, 64), c) for c in colours], scores)))
    assert set(colours) <= set(picture.getdata()) and picture.info == {}
    lines = sheet.table(grid.shots, scores).splitlines()
    assert lines[0] == "prompt,seed,num_steps,guidance,scale,iteration,clip,broken" and len(lines) == 1 + len(colours)
    assert all(line.endswith(",0.5,") for line in lines[1:])


def test_a_panel_tells_each_scorer_apart():
    panel, images = Panel(), torch.rand(2, 3, 16, 16)
    said = {
        name: panel.ask(entry, images, ["a cat", "a dog"], [{}, {}])
        for name, entry in {
            "fine": {"name": "pixels:Brightness"},
            "typo": {"name": "pixels:Brightnes"},
            "option": {"name": "pixels:Brightness", "colour": "red"},
            "group": {"name": "diversity:PixelDiversity"},
            "weights": {"name": "clip", "model": "local-dir:nowhere"},
        }.items()
    }
    luma = (images * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1).mean((1, 2))
    assert [o.score for o in said["fine"]] == pytest.approx(luma.tolist())
    assert all(o.score is None for name in ("typo", "option", "group", "weights") for o in said[name])
    for name, words in (("typo", "Brightness"), ("option", "colour"), ("group", "compares"), ("weights", "nowhere")):
        assert words in said[name][0].trouble
    assert about({"name": "pixels:Brightness"})[0] == "0 (black) to 1 (white), luma"


def test_the_scorers_that_need_no_download_are_all_of_them():
    free = [
        name
        for name, factory in _built_in()
        if factory.card.size == "nothing" and not factory.card.extra and getattr(factory, "groupwise", False) is False
        and all(p.default for p in components.parameters(factory).values())
    ]  # fmt: skip
    assert sorted(free) == sorted(name for name in BUILT_IN if name != "clip, built-in")


def test_work_ends_at_its_next_step_once_nobody_waits_for_it():
    from concurrent.futures import ThreadPoolExecutor
    from threading import Event

    first, go, steps = Event(), Event(), []

    def work(tell):
        for step in range(100):
            tell(str(step))
            steps.append(step)
            first.set()
            go.wait()

    with ThreadPoolExecutor(1) as pool:
        task = Task(pool, work)
        assert next(iter(task)) == "0" and first.wait(5)
        task.stop()
        go.set()
        with pytest.raises(Stopped):
            task.result()
        assert steps == [0]
        assert Task(pool, lambda tell: 5).result() == 5


def test_the_command_draws_pairs(run, studio, tmp_path, capsys):
    out = tmp_path / "pairs.png"
    words = [
        "generate",
        str(run),
        "-p",
        "a cat",
        "--seeds",
        "2",
        "--scale",
        "0.5",
        "--iteration",
        "1",
        "--steps",
        "3",
        "-o",
        str(out),
    ]
    assert cli.main(words) == 0
    shots = [Shot("a cat", seed, 3, 2.0, 0.5, 1) for seed in (0, 1)]
    rows = [torch.cat(list(studio.draw(part)), 2) for part in ([s.base for s in shots], shots)]
    with Image.open(out) as picture:
        assert picture.tobytes() == torch.cat(rows, 1).permute(1, 2, 0).numpy().tobytes() and picture.info == {}
    for wrong, message in (
        (["--scale", "2"], "0 to 1.5"),
        (["--iteration", "7"], "it holds 0, 1, 2"),
        (["--seeds", "0"], "at least 1"),
    ):
        assert cli.main([*words, *wrong]) == 2 and message in capsys.readouterr().err


def test_the_solver_of_a_studio_is_the_evaluations(studio):
    """Not the run's own, which may add noise: a picture is its noise at the start and nothing else."""
    with studio._acting(2.0, 1.0, 2):
        address = (studio.settings.run.seed, "probe", "a cat", 3)
        expected = collect(studio.policy, ["a cat"], [address], DDIM(0.0), 4, 1, False).images
    assert torch.equal(studio.draw([SHOT]), expected)
