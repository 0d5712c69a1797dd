"""The built-in model and its world."""

import random

import pytest
import torch

from ddpo.menagerie import architecture, pretrain, quality, scenes
from rewards.scene import Colour, Count


def test_captions_are_english():
    captions = {s.caption for s in scenes.all_scenes()}
    assert len(captions) == 46 * 10 * 3
    for expected in (
        "an owl on an orange background",
        "two mice on a black background",
        "three butterflies on a pink background",
    ):
        assert expected in captions


def test_held_out_combinations_are_a_fixed_eighth_and_never_drawn_for_training():
    every = scenes.all_scenes()
    assert 0.10 < sum(s.held_out for s in every) / len(every) < 0.15
    rng = random.Random(0)
    assert not any(scenes.sample(rng).held_out for _ in range(2000))
    assert all(scenes.sample(rng, held_out=True).held_out for _ in range(50))


def test_a_picture_depends_on_its_random_state_alone():
    scene = scenes.Scene("cat", "blue", 2)
    a, b, c = (scenes.to_tensor([scenes.draw(scene, random.Random(seed))]) for seed in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c) and a.shape == (1, 3, 64, 64)


def test_every_word_of_the_world_is_one_token_and_the_end_of_text_has_the_highest_number():
    words = architecture.tokenizer()
    for scene in scenes.all_scenes():
        assert len(words(scene.caption).input_ids) == len(scene.caption.split()) + 2
    assert words.eos_token_id == len(words) - 1
    spelt = words("Zürich, 12 % émeu").input_ids
    assert spelt.count(words.eos_token_id) == 1  # nothing is unknown


BUILT_IN = pytest.mark.parametrize(
    "folder, most, named", [(architecture.WEIGHTS, 24e6, 0.8), (architecture.FLOW_WEIGHTS, 12e6, 0.65)]
)


@BUILT_IN
def test_the_shipped_weights_are_small_plain_files(folder, most, named):
    files = [f for f in folder.rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) <= most
    assert {f.suffix for f in files} <= {".safetensors", ".json", ".md"}


@BUILT_IN
def test_the_shipped_model_draws_what_it_is_asked_for(folder, most, named):
    """A fifth of the quality table's pictures, with room for their noise: the table itself is `ddpo.menagerie.quality`."""
    pipe, shown = quality.pipeline(folder), quality.held_out(60, (1, 2, 3))
    clip = architecture.WEIGHTS / "clip"
    assert quality.psnr(pipe, quality.real(shown)) > 27
    assert quality.names_the_animal(quality.real(shown), shown, clip) > 0.9
    one = quality.held_out(40, (1,))
    drawn = quality.drawn(pipe, one)
    assert quality.share(Colour(), drawn, one) > 0.9
    assert quality.share(Count(), drawn, one) > 0.85
    assert quality.names_the_animal(drawn, one, clip) > named
    rivals = [scenes.Scene(s.animal, "red" if s.colour != "red" else "blue", 1) for s in one]
    assert quality.share(Colour(), drawn, rivals) < 0.3


def test_an_interrupted_stage_ends_as_an_uninterrupted_one(tmp_path):
    def fit(folder, stop=None):
        torch.manual_seed(0)
        module = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
        stage = pretrain.Fit("stage", module, 300, 1e-2, folder, "cpu")

        def loss(g):
            if stop is not None and stage.optimizer.state and _steps(stage) == stop:
                raise KeyboardInterrupt
            return (module(torch.randn(8, 4, generator=g)) - 1).square().mean()

        stage.run(loss)
        return torch.cat([v.flatten().float() for v in module.state_dict().values()])

    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    whole = fit(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "parts", stop=250)
    assert torch.equal(fit(tmp_path / "parts"), whole)


def _steps(stage):
    return int(next(iter(stage.optimizer.state.values()))["step"].item())
