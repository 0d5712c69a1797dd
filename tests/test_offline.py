"""Learning from pictures that exist: what a file may say, how pictures become latents, and the whole of a run.

pytest tests/test_offline.py
"""

import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from ddpo import offline, train
from ddpo.config import ConfigError
from ddpo.deal import Deal, Shuffled
from ddpo.diffusion import DDIM
from ddpo.experiment import identity, read
from ddpo.models.sd import StableDiffusion
from ddpo.models.sd3 import StableDiffusion3
from ddpo.models.sdxl import StableDiffusionXL
from ddpo.offline import PictureError
from ddpo.plan import plan
from ddpo.policy import LoRA, Policy
from ddpo.rollout import collect
from tests.command import CONFIG, check_same, finish
from tests.test_rollout import policy_of
from tests.tiny import save_sd3, save_sdxl

ANIMALS = ["cat", "owl", "fox", "bee"]
SCORED = [
    {"prompt": f"a {animal} on a red background", "path": f"pictures/{animal}{i}.png", "score": float(i)}
    for animal in ANIMALS
    for i in range(3)
]
VOTES = [
    {"prompt": f"a {animal} on a red background", "chosen": f"pictures/{animal}{i}.png", "rejected": f"pictures/{animal}2.png"}
    for animal in ANIMALS
    for i in range(2)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twelve pictures, of two sizes."""
    folder = tmp_path_factory.mktemp("offline")
    (folder / "pictures").mkdir()
    draw = torch.Generator().manual_seed(0)
    for record in SCORED:
        corners = torch.randint(256, (2, 2, 3), generator=draw, dtype=torch.uint8)
        size = (16, 16) if record["score"] else (24, 16)
        Image.fromarray(corners.numpy()).resize(size, Image.Resampling.BILINEAR).save(folder / record["path"])
    return folder


def written(folder, records, name="list.jsonl"):
    path = folder / name
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return str(path)


# ----------------------------------------------------------------------------------------------------------------------
# Files


def test_pictures_of_one_prompt_are_a_group_and_so_is_each_vote(folder):
    groups = offline.read(written(folder, ["# a comment", *SCORED[::-1]]))
    assert [len(g.pictures) for g in groups] == [3] * 4 and groups[0].text == SCORED[-1]["prompt"]
    assert [p.score for p in groups[0].pictures] == [2, 1, 0]
    assert groups[0].pictures[0].path == folder / "pictures/bee2.png" and groups[0].pictures[0].place.endswith("list.jsonl:2")
    two = {"prompt": "a cat", "image_0": "pictures/cat0.png", "image_1": "pictures/cat1.png", "label_0": 0, "label_1": 1}
    tie = VOTES[0] | {"tie": True}
    groups = offline.read(written(folder, [VOTES[0], tie, VOTES[0] | {"tie": False}, two, two | {"label_0": 1}]))
    assert [[p.path.name for p in g.pictures] for g in groups] == [["cat0.png", "cat2.png"]] * 2 + [["cat1.png", "cat0.png"]]
    assert all([p.score for p in g.pictures] == [1, 0] for g in groups)


CAT = SCORED[0]
BAD = {
    "no score": ({"prompt": "a", "path": CAT["path"]}, "there is no 'score'"),
    "neither": ({"prompt": "a", "picture": "x"}, "neither a scored picture nor a vote"),
    "no prompt": ({"path": CAT["path"], "score": 1}, 'a text "prompt"'),
    "no JSON": ("{", "list.jsonl:2: "),
    "a score that is not finite": ('{"prompt": "a", "path": "pictures/cat0.png", "score": 1e999}', "'score' is inf"),
    "NaN": ('{"prompt": "a", "path": "pictures/cat0.png", "score": NaN}', "NaN is not JSON"),
    "no number": (CAT | {"score": "good"}, "'score' is good; it should be a finite number"),
    "true": (CAT | {"score": True}, "'score' is True"),
    "a huge number": ('{"prompt": "a", "path": "pictures/cat0.png", "score": 1' + "0" * 400 + "}", "finite number"),
    "null": (CAT | {"score": None}, "'score' is None"),
    "no text": (CAT | {"path": 3}, "path is 3"),
    "a missing picture": (CAT | {"path": "pictures/dog.png"}, "pictures/dog.png; paths are relative to this file"),
    "a folder": (CAT | {"path": "pictures"}, "pictures is not a file"),
    "no picture": (CAT | {"path": "list.jsonl"}, "list.jsonl is not a PNG, JPEG or WebP picture"),
    "a vote among scores": (VOTES[0], "this is a vote, and the lines before are scored pictures"),
    "one picture": ({"prompt": "an ant", "path": CAT["path"], "score": 1}, "'an ant' has this picture only"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_line_is_told_with_its_place_and_the_fix(name, folder):
    line, expected = BAD[name]
    source = written(folder, [SCORED[0], line, *SCORED[1:]])
    with pytest.raises(PictureError) as caught:
        offline.read(source)
    assert str(caught.value).startswith(f"{source}:2: ") and expected in str(caught.value), str(caught.value)


def test_bad_votes_and_whole_files(folder):
    for line, expected in [
        (VOTES[0] | {"rejected": VOTES[0]["chosen"]}, "is both pictures of this vote"),
        ({"prompt": "a", "chosen": "x.png"}, "there is no 'rejected'"),
        (VOTES[0] | {"tie": "yes"}, "'tie' is 'yes'; it should be true or false"),
        ({"prompt": "a", "image_0": "a.png", "image_1": "b.png", "label_0": 1}, "there is no 'label_1'"),
        (VOTES[0] | {"tie": True}, "every vote in it is a tie"),
    ]:
        with pytest.raises(PictureError, match=expected):
            offline.read(written(folder, [line]))
    with pytest.raises(PictureError) as caught:
        offline.read(written(folder, [CAT | {"path": f"{i}.png"} for i in range(12)]))
    lines = str(caught.value).splitlines()
    assert len(lines) == 11 and "list.jsonl:10: " in lines[9] and lines[10] == "and 2 more"
    with pytest.raises(PictureError, match=r"listed in a \.jsonl file"):
        offline.read("menagerie-train")
    with pytest.raises(PictureError, match="there is no such file"):
        offline.read(str(folder / "nowhere.jsonl"))


# ----------------------------------------------------------------------------------------------------------------------
# Pictures


def test_encoding_is_what_decoding_undoes():
    family = StableDiffusion("menagerie", dtype="float32")
    policy = Policy(family, LoRA(1))
    picture = collect(policy, ["a cat on a red background"], [(0,)], DDIM(0.0), 6, 1, False).images.float() / 255
    latents = family.encode_images(picture)
    assert latents.shape == (1, *family.latent_shape) and latents.dtype == torch.float32
    assert (family.decode(latents) - picture).square().mean() < 0.02 * picture.var()
    assert torch.equal(latents, family.encode_images(picture))  # the mean of what the encoder says, not a draw
    assert family.image_size == (64, 64)


def test_every_familys_scale_and_shift_are_undone(tiny, tmp_path):
    families = [
        StableDiffusion(str(tiny), dtype="float32"),
        StableDiffusionXL(str(save_sdxl(tmp_path / "xl", latents_mean=[0.5] * 4, latents_std=[2.0] * 4)), dtype="float32"),
        StableDiffusion3(str(save_sd3(tmp_path / "sd3", t5=False)), dtype="float32", text_encoder_3=False),
    ]
    pictures = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    for family in families:
        vae, config = family.vae, family.vae.config
        with torch.no_grad():
            raw = vae.encode(2 * pictures - 1).latent_dist.mean
            mean, std = (config.latents_mean or [0] * 4)[0], (config.latents_std or [1] * 4)[0]  # as diffusers' pipelines do it
            wanted = (raw - (config.shift_factor or 0.0) - mean) * config.scaling_factor / std
            torch.testing.assert_close(family.encode_images(pictures), wanted, atol=1e-5, rtol=1e-4)
            assert family.image_size == (16, 16)


def deal(groups, processes=1):
    return Deal(groups, Shuffled(), 4, 2, 2, processes, 0)


def test_pictures_stand_where_drawn_ones_would_on_any_number_of_processes(folder, tiny):
    policy = policy_of(tiny)
    groups = offline.read(written(folder, SCORED))

    def rollout(rows, iteration=0):
        return offline.rollout(policy, rows, (0, 0, iteration), DDIM(1.0), 4, 3, lambda n: None)

    rows = deal(groups).rows(0, 0, 0)
    whole, scores = rollout(rows), offline.scores(rows, (0, 0, 0))
    assert whole.latents.shape == (8, 1, 4, 8, 8) and whole.stochastic == [] and len(whole.groups()) == 4
    for i, row in enumerate(rows):
        assert whole.prompts[i] == row.prompt.text
        own = next(p for p in row.prompt.pictures if p.score == scores[i])
        picture = Image.open(own.path)
        if picture.size == (24, 16):  # its middle
            picture = picture.crop((4, 0, 20, 16))
        pixels = torch.from_numpy(offline.to_tensor(picture).mul(255).round().byte().numpy())
        assert (whole.images[i].float() - pixels.float()).abs().max() <= 1
    assert all(scores[i] != scores[i + 1] for i in range(0, 8, 2))  # a group's pictures differ
    parts = [rollout(deal(groups, 2).rows(0, 0, process)) for process in range(2)]
    order = [rows.index(row) for process in range(2) for row in deal(groups, 2).rows(0, 0, process)]
    torch.testing.assert_close(torch.cat([p.latents for p in parts]), whole.latents[order], atol=1e-5, rtol=1e-4)
    assert parts[0].addresses + parts[1].addresses == [whole.addresses[i] for i in order]
    seen = {(row.prompt.text, s) for it in range(12) for row in rows for s in [offline.scores([row], (0, 0, it)).item()]}
    assert len(seen) == 12  # in time all of a large group come


def test_a_picture_that_is_damaged_is_told_with_its_place(folder, tiny):
    whole = (folder / CAT["path"]).read_bytes()
    (folder / "pictures/half.png").write_bytes(whole[: len(whole) // 2])
    groups = offline.read(written(folder, [CAT | {"path": "pictures/half.png"}, *SCORED[1:3]], "half.jsonl"))
    with pytest.raises(PictureError, match=r"half.jsonl:1: .*half.png: not a whole PNG.*mend the picture"):
        offline.rollout(
            policy_of(tiny), Deal(groups, Shuffled(), 1, 3, 1, 1, 0).rows(0, 0, 0), (0,), DDIM(0.0), 2, 3, lambda n: None
        )


# ----------------------------------------------------------------------------------------------------------------------
# Runs


@pytest.fixture(scope="module")
def config(folder, tiny):
    """A config of votes."""
    path = folder / "run.yaml"
    path.write_text(CONFIG.format(model=tiny))
    return path


def words(source, *more):
    return [
        "prompts.train=null", f"rollout.pictures={source}", "rollout.group_size=2", "rollout.batch_size=4", "optimizer.micro_batch=4",
        "algorithm={name: 'dpo:DiffusionDPO', beta: 50}", "run.eval_every=2", *more,
    ]  # fmt: skip


MISTAKES = {
    "prompts": (["prompts.train=menagerie-train"], "prompts.train: is not used"),
    "a trajectory": (
        ["algorithm={name: 'ddpo:DDPO'}"],
        "rollout.pictures: ddpo:DDPO learns from how its own pictures are drawn",
    ),
    "a group too large": (["rollout.group_size=4"], "votes.jsonl:1 is of a prompt with 2 pictures: use 2, or add pictures"),
    "no file": (["rollout.pictures=nowhere.jsonl"], "rollout.pictures: prompts 'nowhere.jsonl'"),
    "nothing": (["rollout.pictures=null"], "prompts.train: missing; name prompts"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_answered_before_anything_loads(name, folder, config):
    source = written(folder, VOTES, "votes.jsonl")
    given, expected = MISTAKES[name]
    with pytest.raises(ConfigError) as caught:
        read(str(config), words(source, *given), 1)
    assert expected in str(caught.value), str(caught.value)


def test_a_run_is_known_by_the_content_of_the_file_and_costs_no_drawing(folder, config):
    one, same = written(folder, VOTES, "votes.jsonl"), written(folder, VOTES, "same.jsonl")
    other = written(folder, VOTES[1:], "other.jsonl")
    recipes = [read(str(config), words(source), 1).recipe for source in (one, same, other)]
    assert identity(recipes[0]) == identity(recipes[1]) != identity(recipes[2])
    read(str(config), words(one, f"prompts.train={one}"), 1)
    shown = plan(recipes[0])
    assert "0 to act; " in shown and "8 to train on" in shown


def trained(config, output, *given):
    assert train.main([str(config), *given, f"run.output={output}"]) == 0
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return load_file(output / "lora" / "pytorch_lora_weights.safetensors"), [
        {k: v for k, v in line.items() if "seconds" not in k} for line in lines
    ]


def test_votes_are_learned_from_and_a_resumed_run_ends_bit_identical(folder, config, tmp_path):
    given = [*words(written(folder, VOTES, "votes.jsonl")), "run.eval_every=1"]
    whole, log = trained(config, tmp_path / "whole", *given, "run.iterations=3")
    trained(config, tmp_path / "parts", *given, "run.iterations=1")
    again, log_again = trained(config, tmp_path / "parts", *given, "run.iterations=3")
    check_same(whole, again)
    assert log == log_again and [line["iteration"] for line in log] == [0, 1, 2, 3]
    assert all(line["reward/mean"] == 0.5 for line in log[1:])  # of two pictures one was chosen
    assert "eval/compressibility/delta" in log[-1] and log[-1]["dpo/margin"] != 0
    assert (tmp_path / "whole" / "rewards.jsonl").read_text() == ""  # nothing was drawn, so nothing was scored


@pytest.mark.parametrize("algorithm", ["forward:RAFT", "forward:NFT"])
def test_forward_process_algorithms_learn_from_scored_pictures(algorithm, folder, config, tmp_path):
    source = written(folder, SCORED)
    more = ["algorithm={name: '" + algorithm + "'}", "run.iterations=1", "evaluation.prompts=1", "evaluation.seeds=1"]
    lora, log = trained(config, tmp_path, *words(source, *more))
    assert any(v.any() for k, v in lora.items() if ".up." in k)
    assert 0 <= log[1]["reward/mean"] <= 2 and log[1]["images"] == 8 and log[1]["kl/step_nats"] > 0


@pytest.mark.slow
def test_two_processes_agree_with_one(folder, config, tmp_path):
    # A pair at a time on one as on two: a batch of another shape has another kernel, and Adam makes much of its rounding.
    given = words(written(folder, SCORED), "optimizer.micro_batch=2")
    one = finish(config, tmp_path / "one", (sys.executable,), *given)
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    two = finish(config, tmp_path / "two", launcher, *given)
    change = {k: v for k, v in one.items() if ".up." in k}
    apart = sum((two[k] - v).square().sum() for k, v in change.items()) / sum(v.square().sum() for v in change.values())
    assert apart.sqrt() <= 1e-4, f"relative difference {apart.sqrt():.2g}"
    assert Path(tmp_path / "two" / "run.json").is_file()
