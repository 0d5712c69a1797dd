"""What a user meets: mistakes answered before anything loads, the plan, the run folder, and no network."""

import contextlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from ddpo import cli, train
from ddpo.config import ConfigError
from ddpo.experiment import identity, read
from ddpo.plan import plan
from ddpo.rewarding import rubrics
from tests.command import CONFIG, ENVIRONMENT

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "configs").glob("*.yaml"))
MISTAKES = {
    "a misspelt option": (["algorithm.clipp=1"], "did you mean 'clip'?"),
    "a prompt file that is not there": (["prompts.train=prompts/nowhere.txt"], "prompts/nowhere.txt"),
    "groups of one": (["rollout.group_size=1"], "rollout.group_size: is 1; advantage:GroupRelative compares"),
    "groups of one for an algorithm that compares": (
        [
            "algorithm={name: grpo:GRPO}",
            "advantage={name: 'advantage:PerPrompt'}",
            "rollout.group_size=1",
            "rollout.batch_size=1",
            "optimizer.micro_batch=1",
        ],
        "rollout.group_size: is 1; grpo:GRPO compares",
    ),
    "a deterministic solver": (["rollout.solver.eta=0"], "rollout.solver"),
    "groups that updates do not divide": (["rollout.prompts=9"], "use 10"),
    "pictures that batches do not divide": (["rollout.batch_size=24"], "rollout.batch_size: is 24"),
    "pictures that micro-batches do not divide": (["optimizer.micro_batch=12"], "optimizer.micro_batch: is 12"),
    "advantages without the reward's unit": (
        ["algorithm={name: ram}", "rollout.solver.eta=0"],
        "advantage: ram weighs rewards against a temperature, and advantage:GroupRelative changes their unit",
    ),
    "several updates on policy": (["algorithm={name: 'ddpo:ScoreFunction'}"], "optimizer.updates"),
    "a step size below zero": (["optimizer.lr=-1"], "optimizer.lr"),
    "an unknown reward": (["rewards.0.name=jpg"], "did you mean 'jpeg'?"),
    "no reward": (["rewards=[]"], "rewards: there is none"),
    "a floor under what is only watched": (
        ["held_out_rewards.1.floor=1"],
        "held_out_rewards.1.floor: only watched; move it to rewards",
    ),
    "a CLIP that does not exist": (
        ["held_out_rewards.0.model=local-dir:nowhere"],
        "held_out_rewards.0: CLIP model 'local-dir:nowhere'",
    ),
    "a file that does not exist": (["rewards.0.name=nowhere.py:Mine"], "there is no file nowhere.py"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_answered_with_the_fix(name):
    words, expected = MISTAKES[name]
    with pytest.raises(ConfigError) as caught:
        read(str(ROOT / "configs" / "menagerie_compressibility.yaml"), words, 1)
    assert expected in str(caught.value), str(caught.value)


def test_a_batch_that_the_processes_do_not_divide_is_refused():
    path = str(ROOT / "configs" / "menagerie_compressibility.yaml")
    read(path, [], 2)
    with pytest.raises(ConfigError, match=r"rollout.prompts: is 8; .* 2 x 3 = 6.*use 12"):
        read(path, [], 3)


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_is_valid_and_says_what_it_was_seen_to_do(path, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    own = [f"rewards.0.examples={tmp_path}"] if path.stem == "menagerie_examples" else []  # the user's own pictures
    read(str(path), own, 1)
    head = "".join(line for line in path.read_text().splitlines(True) if line.startswith("#"))
    assert f"configs/{path.name}" in head and ("UNTESTED" in head or "Measured" in head)


@pytest.mark.parametrize(
    "name", ["demo", "sd15_compressibility_10gb", pytest.param("sdxl_compressibility_24gb", marks=pytest.mark.slow)]
)
def test_a_recipe_can_be_planned_without_weights(name, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert train.main([f"configs/{name}.yaml", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "pictures" in shown and "GB a process" in shown and "TFLOP" in shown


def test_a_watched_scorer_never_takes_the_place_of_a_trained_one():
    words = ["rewards=[{name: 'scene:Count'}]", "held_out_rewards=[{name: 'scene:Count'}, {name: 'scene:Colour'}]"]
    recipe = read(str(ROOT / "configs" / "menagerie_compressibility.yaml"), words, 1).recipe
    trained, watched = rubrics(recipe.rewards, recipe.held_out_rewards, recipe.objective)
    assert list(trained.parts) == ["count"] and list(watched.parts) == ["count_2", "colour"]


def test_entries_that_ask_for_the_same_scorer_share_it():
    words = [
        "rewards=[{name: clip, model: menagerie, weight: 2, floor: 1}]",
        "held_out_rewards=[{name: clip, model: menagerie}, {name: clip, model: menagerie, negative: a dog}]",
    ]
    recipe = read(str(ROOT / "configs" / "menagerie_compressibility.yaml"), words, 1).recipe
    trained, watched = rubrics(recipe.rewards, recipe.held_out_rewards, recipe.objective)
    first, (second, third) = trained.parts["clip"], watched.parts.values()
    assert first.reward is second.reward is not third.reward and first.reward.tower is third.reward.tower
    assert (first.weight, first.floor, second.weight, second.floor) == (2, 1, 1, None)


def test_how_a_scorer_is_run_may_change_between_a_run_and_its_resumption():
    def settings(*words):
        return identity(read(str(ROOT / "configs" / "menagerie_compressibility.yaml"), list(words), 1).recipe)

    assert settings("rewards.0.timeout=5", "rewards.0.isolate=true", "rewards.0.device=cpu") == settings()
    assert settings("rewards.0.weight=2") != settings() != settings("rewards.0.quality=90")


OWN = """
class Clear:
    def __init__(self, power: float = 1.0):
        self.power = power

    def __call__(self, images, prompts, metadata):
        return images.mean((1, 2, 3)) ** self.power

def dark(images, prompts, metadata, power: float = 1.0):
    return -images.mean((1, 2, 3)) ** power
"""


def test_a_class_or_a_function_of_ones_own_is_a_reward_in_its_own_process(tmp_path):
    file = tmp_path / "own.py"
    file.write_text(OWN)
    given = torch.rand(2, 3, 8, 8), ["a", "b"], [{}, {}]
    words = [f"rewards=[{{name: '{file}:Clear'}}, {{name: '{file}:dark', power: 2}}, {{name: '{file}:dark', isolate: false}}]"]
    recipe = read(str(ROOT / "configs" / "menagerie_compressibility.yaml"), words, 1).recipe
    rubric, _ = rubrics(recipe.rewards, [], recipe.objective)
    assert [type(p.reward).__name__ for p in rubric.parts.values()] == ["Isolated", "Isolated", "partial"]
    try:
        scores = rubric.load().score(*given)
    finally:
        rubric.close()
    mean = given[0].mean((1, 2, 3)).double()
    assert list(scores) == ["clear", "dark", "dark_2"]
    for name, wanted in (("clear", mean), ("dark", -(mean**2)), ("dark_2", -mean)):
        assert torch.allclose(scores[name], wanted)
    with pytest.raises(ConfigError, match="powr: unknown key; did you mean 'power'"):
        read(str(ROOT / "configs" / "menagerie_compressibility.yaml"), [words[0].replace("power", "powr")], 1)


def test_the_plan_counts_what_will_be_done():
    recipe = read(str(ROOT / "configs" / "sd15_compressibility.yaml"), [], 1).recipe
    text = plan(recipe)
    assert (
        "256 prompt groups x 1 = 256 pictures" in text
        and "4, each of 64 pictures" in text
        and "25,600 pictures" in text
        and "400 updates" in text
        and "25,600 to act; 25,600 forward" in text
    )
    few = read(str(ROOT / "configs" / "sd15_compressibility.yaml"), ["rollout.solver.min_sigma=0.9"], 1).recipe
    assert "25,600 to act; 10,752 forward" in plan(few)  # 21 of 50 steps start above that noise level


def test_a_model_of_another_family_is_told_before_it_is_planned(tiny, capsys):
    words = [str(ROOT / "configs" / "menagerie_compressibility.yaml"), "--dry-run", "model.name=sdxl", f"model.path={tiny}"]
    assert train.main(words) == 2
    assert "set model.name=sd" in capsys.readouterr().err


def test_a_misspelt_key_under_accelerate_launch_ends_with_code_2_and_loads_nothing():
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "-m", "ddpo.train"]
    config = ROOT / "configs" / "menagerie_compressibility.yaml"
    ended = subprocess.run(
        [*command, str(config), "algorithm.clipp=1"], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert ended.returncode != 0 and "did you mean 'clip'?" in ended.stderr and "loading" not in ended.stdout
    names = ("diffusers", "peft", "accelerate", "open_clip")
    check = "from ddpo import experiment; experiment.read('configs/demo.yaml', [], 1)"
    heavy = f"import sys; {check}; print([m for m in {names} if m in sys.modules])"
    seen = subprocess.run([sys.executable, "-c", heavy], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert seen.stdout.strip() == "[]"


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """A run folder made by the real command, which was watched for connections."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    config = folder.parent / "run.yaml"
    config.write_text(CONFIG.format(model=tiny))
    watched = (
        "import sys\n"
        "def hook(event, args):\n"
        "    if event in ('socket.connect', 'socket.getaddrinfo', 'pickle.find_class'): print('WATCHED', event, args, flush=True)\n"
        "sys.addaudithook(hook)\n"
        "from ddpo.train import main\n"
        f"sys.exit(main([{str(config)!r}, 'run.iterations=2', 'run.output={folder}']))"
    )
    ended = subprocess.run(
        [sys.executable, "-c", watched], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return folder, ended.stdout


@pytest.mark.slow
def test_a_run_opens_no_connection_and_no_pickle(finished):
    _, output = finished
    assert "WATCHED" not in output, [line for line in output.splitlines() if "WATCHED" in line]


def test_the_run_folder_holds_what_was_promised(finished):
    folder, output = finished
    for name in (
        "run.json", "config.yaml", "metrics.jsonl", "rewards.jsonl", "train.log", "samples/index.jsonl", "README.md", "report.html",
        "lora/pytorch_lora_weights.safetensors", f"lora/{folder.name}.safetensors", "checkpoints/latest", "checkpoints/best",
    ):  # fmt: skip
        assert (folder / name).is_file(), name
    run = json.loads((folder / "run.json").read_text())
    assert run["status"] == "finished" and run["seed"] == 0 and run["versions"]["torch"]
    assert len(run["prompts"]["train"]["sha256"]) == 64
    assert str(folder / "report.html") in output.replace("\n", "") or "report.html" in output
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    for key in ("images", "seconds/rollout", "seconds/reward", "seconds/update", "seconds/eval", "reward/compressibility/mean",
                "advantage/zero_std_fraction", "ratio/mean", "ratio/max", "clip_fraction", "kl/step_nats", "grad_norm", "lr",
                "eval/compressibility/delta_low", "eval/win_rate", "eval/diversity/tuned"):  # fmt: skip
        assert key in last, key


@pytest.mark.slow
def test_a_scorer_that_dies_for_good_stops_the_run_whole_and_the_same_command_goes_on(tiny, tmp_path):
    config, note, folder = tmp_path / "run.yaml", tmp_path / "note", tmp_path / "run"
    config.write_text(CONFIG.format(model=tiny))
    reward = f"[{{name: 'tests.misbehaving:dies_when_spent', note: '{note}'}}]"
    command = [sys.executable, "-m", "ddpo.train", str(config), f"rewards={reward}", f"run.output={folder}", "run.iterations=1"]

    def run() -> subprocess.CompletedProcess:
        env = ENVIRONMENT | {"TMPDIR": str(tmp_path)}  # by which the scorer's process is known
        return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)

    note.write_text("3")  # the probe, its second look, and the first of two batches
    ended = run()
    assert ended.returncode == 1 and "Traceback" not in ended.stderr, ended.stderr
    assert "reward 'dies_when_spent' failed 3 times, last: its process died, with exit code 1" in ended.stderr
    assert "Stopped before the update of iteration 1; 8 of its 16 scores are kept." in ended.stderr
    kept = (folder / "rewards.jsonl").read_text()
    assert len(kept.splitlines()) == 8 and "To go on after mending it" in ended.stdout.replace("\n", " ")
    assert json.loads((folder / "run.json").read_text())["status"] == "failed"
    note.unlink()
    ended = run()
    assert ended.returncode == 0, ended.stderr
    lines = (folder / "rewards.jsonl").read_text()
    assert lines.startswith(kept) and len(lines.splitlines()) == 16
    assert _processes_with(f"TMPDIR={tmp_path}") == []


def _processes_with(variable: str) -> list[str]:
    found = []
    for environ in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            found += [environ.parent.name] if variable.encode() in environ.read_bytes().split(b"\0") else []
    return found


def test_the_resolved_config_reproduces_the_recipe(finished):
    folder, _ = finished
    again = read(str(folder / "config.yaml"), [], 1).recipe
    assert again.run.iterations == 2 and again.algorithm.options["kl"] == 0.01


def test_base_and_tuned_pictures_can_be_drawn_from_the_folder(finished, tmp_path, capsys):
    folder, _ = finished
    out = tmp_path / "pairs.png"
    assert cli.main(["generate", str(folder), "-p", "a cat on a red background", "--seeds", "3", "-o", str(out)]) == 0
    assert Image.open(out).size == (3 * 16, 2 * 16)
    assert cli.main(["report", str(tmp_path / "nothing")]) == 2
    assert "nothing" in capsys.readouterr().err
