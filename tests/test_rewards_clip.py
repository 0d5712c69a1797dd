"""CLIP and the aesthetic predictor against float64 transcriptions: `pytest tests/test_rewards_clip.py`.

The networks are tiny and random: what is tested is what is done with the weights, not the weights.
"""

import json
import pickle
import shlex
import sys
from dataclasses import asdict
from pathlib import Path

import open_clip
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

import rewards
from rewards.aesthetic import Aesthetic
from rewards.clip import Clip, preprocess

PROMPTS = ["a cat", "two owls on a red background", "a fox"]
IMAGES = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
EMPTY: list[dict] = [{}, {}, {}]
TINY = {
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


def clip_folder(folder: Path, **changes: object) -> Path:
    """A tiny random CLIP as open_clip keeps one on disk."""
    folder.mkdir()
    config = TINY | {"embed_dim": 24} | changes
    torch.manual_seed(0)
    weights = open_clip.CLIP(**config).state_dict()
    save_file({k: v.contiguous() for k, v in weights.items()}, folder / "open_clip_model.safetensors")
    preprocess_cfg = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.25], "interpolation": "bicubic", "resize_mode": "shortest"}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess_cfg}))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return clip_folder(tmp_path_factory.mktemp("clip") / "tiny")


def exact(folder: Path, **changes: object) -> tuple[Tensor, Tensor]:
    """Unit vectors of IMAGES and PROMPTS in float64, by the architecture alone."""
    config = json.loads((folder / "open_clip_config.json").read_text())
    model = open_clip.CLIP(**config["model_cfg"] | changes)
    model.load_state_dict(load_file(folder / "open_clip_model.safetensors"))
    model.double().eval()
    mean, std = (torch.tensor(config["preprocess_cfg"][k], dtype=torch.float64)[:, None, None] for k in ("mean", "std"))
    with torch.no_grad():
        image = model.encode_image((IMAGES.double() - mean) / std)
        text = model.encode_text(open_clip.SimpleTokenizer(context_length=16)(PROMPTS))
    return image / image.square().sum(1, keepdim=True).sqrt(), text / text.square().sum(1, keepdim=True).sqrt()


def test_clip_is_the_cosine_of_image_and_text(folder):
    image, text = exact(folder)
    wanted = (image * text).sum(1)
    clip = Clip(f"local-dir:{folder}")
    assert wanted.std() > 0.01
    assert torch.allclose(clip(IMAGES, PROMPTS, EMPTY).double(), wanted, atol=1e-6)
    against_one = Clip(f"local-dir:{folder}", prompt=PROMPTS[1])(IMAGES, PROMPTS, EMPTY)
    assert torch.allclose(against_one.double(), image @ text[1], atol=1e-6)
    rewards.check(clip)


def test_clip_scores_in_float32_inside_autocast(folder):
    clip = Clip(f"local-dir:{folder}")
    outside = clip(IMAGES, PROMPTS, EMPTY)
    clip.to("cpu")  # forgets its texts
    with torch.autocast("cpu", torch.bfloat16):
        inside = clip(IMAGES, PROMPTS, EMPTY)
    assert inside.dtype == torch.float32 and torch.equal(inside, outside)


def test_clip_is_differentiable_even_if_first_used_in_inference_mode(tmp_path):
    clip = Clip(f"local-dir:{clip_folder(tmp_path / 'clip')}")
    with torch.inference_mode():
        clip(IMAGES, PROMPTS, EMPTY)
    images = F.interpolate(IMAGES, (48, 40)).requires_grad_()
    clip(images, PROMPTS, EMPTY).sum().backward()
    assert images.grad.abs().sum() > 0
    assert all(p.grad is None for p in clip.tower.load().parameters())


def test_clip_uses_quickgelu_where_the_weights_were_trained_with_it(folder, monkeypatch):
    """OpenAI's were; open_clip's architecture of the same name is not, and it only warns."""
    weights = {"file": str(folder / "open_clip_model.safetensors"), "quick_gelu": True}
    config = json.loads((folder / "open_clip_config.json").read_text())
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny", config["model_cfg"])
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny", {"openai": weights | config["preprocess_cfg"]})
    wanted, other = ((i * t).sum(1) for i, t in (exact(folder, quick_gelu=True), exact(folder)))
    score = Clip("tiny")(IMAGES, PROMPTS, EMPTY).double()
    assert torch.allclose(score, wanted, atol=1e-6) and not torch.allclose(score, other, atol=1e-6)


@pytest.mark.parametrize(
    ("model", "pretrained", "message"),
    [
        ("ViT-L/14", "openai", "did you mean 'ViT-L-14'"),
        ("ViT-L-14", "opnai", "did you mean 'openai'"),
        ("ViT-L-14", None, "neither a tag of ViT-L-14 nor a file"),
        ("local-dir:/nowhere", None, "no open_clip_config.json"),
    ],
)
def test_clip_refuses_a_wrong_name_before_it_loads(model, pretrained, message):
    with pytest.raises(ValueError, match=message):
        Clip(model, pretrained)


def test_clip_refuses_a_folder_without_weights(tmp_path):
    folder = clip_folder(tmp_path / "clip")
    (folder / "open_clip_model.safetensors").unlink()
    with pytest.raises(RuntimeError, match="could not be loaded"):
        Clip(f"local-dir:{folder}").load()


@pytest.mark.parametrize("mode", ["shortest", "squash"])
@pytest.mark.parametrize("shape", [(320, 480), (501, 333), (100, 90), (224, 224)])
def test_preprocessing_equals_open_clips_own(shape, mode):
    config = PreprocessCfg(size=224, resize_mode=mode)
    smooth = F.interpolate(torch.rand(1, 3, 9, 9, generator=torch.Generator().manual_seed(2)), shape, mode="bicubic").clamp(
        0, 1
    )
    pixels = (smooth * 255).round().byte()
    wanted = image_transform_v2(config, is_train=False)(Image.fromarray(pixels[0].permute(1, 2, 0).numpy()))
    got = preprocess(pixels / 255, asdict(config))[0]
    assert got.shape == wanted.shape == (3, 224, 224)
    assert (got - wanted).abs().max() <= (0 if shape == (224, 224) else 2e-2)


@pytest.fixture(scope="module")
def head(tmp_path_factory) -> Path:
    """A random head under the published names."""
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("head") / "head.safetensors"
    widths = {0: (768, 1024), 2: (1024, 128), 4: (128, 64), 6: (64, 16), 7: (16, 1)}
    weights = {f"layers.{i}.weight": torch.randn(b, a) / a**0.5 for i, (a, b) in widths.items()}
    save_file(weights | {f"layers.{i}.bias": torch.randn(b) for i, (_, b) in widths.items()}, path)
    return path


@pytest.fixture(scope="module")
def wide_folder(tmp_path_factory) -> Path:
    return clip_folder(tmp_path_factory.mktemp("clip") / "wide", embed_dim=768)


def test_aesthetic_is_the_published_network_on_unit_vectors(head, wide_folder):
    x, weights = exact(wide_folder)[0], load_file(head)
    for i in (0, 2, 4, 6, 7):
        x = x @ weights[f"layers.{i}.weight"].double().T + weights[f"layers.{i}.bias"].double()
    aesthetic = Aesthetic(str(head), model=f"local-dir:{wide_folder}")
    assert x.std() > 1e-3
    assert torch.allclose(aesthetic(IMAGES, PROMPTS, EMPTY).double(), x[:, 0], atol=1e-5)
    rewards.check(aesthetic)


def test_aesthetic_says_how_to_convert_a_pickle(head, wide_folder, tmp_path, monkeypatch):
    published = tmp_path / "sac+logos+ava1-l14-linearMSE.pth"
    torch.save(load_file(head), published)
    with pytest.raises(ValueError, match="Convert it once") as caught:
        Aesthetic(str(published))
    _, _, code, *arguments = shlex.split(str(caught.value).splitlines()[1])
    monkeypatch.setattr(sys, "argv", ["-c", *arguments])
    exec(code, {})
    source = f"local-dir:{wide_folder}"
    converted, original = Aesthetic(arguments[1], source), Aesthetic(str(head), source)
    assert torch.equal(converted(IMAGES, PROMPTS, EMPTY), original(IMAGES, PROMPTS, EMPTY))


class Payload:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def test_aesthetic_runs_no_code_and_takes_no_other_head(head, folder, tmp_path):
    disguised, other = tmp_path / "disguised.safetensors", tmp_path / "other.safetensors"
    disguised.write_bytes(pickle.dumps(Payload(tmp_path / "marker")))
    save_file({k: v for k, v in load_file(head).items() if k != "layers.7.bias"}, other)
    for path, message in (
        (disguised, "not the published one"),
        (other, "layers.7.bias"),
        (tmp_path / "x.safetensors", "no such file"),
    ):
        with pytest.raises(ValueError, match=message):
            Aesthetic(str(path))
    assert not (tmp_path / "marker").exists()
    with pytest.raises(ValueError, match="embeddings of 24 numbers"):
        Aesthetic(str(head), f"local-dir:{folder}")(IMAGES, PROMPTS, EMPTY)


def test_scorers_of_one_clip_hold_it_once(head, folder, wide_folder):
    clip = Clip(f"local-dir:{wide_folder}")
    assert clip.tower is Aesthetic(str(head), f"local-dir:{wide_folder}").tower
    assert clip.tower is not Clip(f"local-dir:{folder}").tower
