"""Models that are not there, not whole, not safe or not ours: told in one line with the fix, before weights are read.

pytest tests/reliability/test_models.py
"""

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from ddpo import experiment
from ddpo.config import ConfigError
from ddpo.models import _files
from ddpo.models._files import UnusableModel
from ddpo.models.sd import StableDiffusion
from tests.command import CONFIG, ENVIRONMENT, check_same

UNET, TEXT = "unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"


@pytest.fixture
def model(tiny, tmp_path):
    """A copy of a sound pipeline, to be spoilt."""
    return shutil.copytree(tiny, tmp_path / "model")


def edit(file: Path, change) -> None:
    data = json.loads(file.read_text())
    file.write_text(json.dumps(change(data) or data))


def pickled(model: Path, part: str = UNET) -> None:
    torch.save(load_file(model / part), (model / part).with_name("pytorch_model.bin"))
    (model / part).unlink()


def half(model: Path, part: str = UNET) -> None:
    data = (model / part).read_bytes()
    (model / part).write_bytes(data[: len(data) // 2])


def nothing(model: Path) -> None:
    shutil.rmtree(model)


def emptied(model: Path) -> None:
    shutil.rmtree(model)
    model.mkdir()


def single_file(model: Path) -> None:
    weights = (model / UNET).read_bytes()
    shutil.rmtree(model)
    model.write_bytes(weights)


# What is done to a pipeline -> parts of what is said, {} being its folder. All of it is found while the config is read.
AT_ONCE = {
    "missing": (nothing, "there is no folder {}", "mend the path, or write OWNER/NAME for a model of the hub"),
    "an empty folder": (emptied, "{} holds no model_index.json; give a folder that a diffusers pipeline's save_pretrained wrote"),
    "a single file": (single_file, "{} is a file; give a folder", "from_single_file(FILE).save_pretrained(FOLDER)"),
    "another family": (
        lambda m: edit(m / "model_index.json", lambda index: index.update(_class_name="FluxPipeline")),
        "{} is a FluxPipeline, not a StableDiffusionPipeline: set model.name=flux",
    ),
    "a family that nobody knows": (
        lambda m: edit(m / "model_index.json", lambda index: index.update(_class_name="VideoPipeline")),
        "{} is a VideoPipeline", "no family in ddpo.models takes it",
    ),
    "a pipeline of its own code": (
        lambda m: edit(m / "model_index.json", lambda index: index.update(_class_name=["mine", "Mine"])),
        "{}/model_index.json names no pipeline of diffusers' own",
    ),
    "an index that is none": (lambda m: (m / "model_index.json").write_text("{"), "{}/model_index.json is not JSON"),
    "an index that is a list": (lambda m: (m / "model_index.json").write_text("[]"), "{}/model_index.json names no pipeline"),
    "a part that is gone": (lambda m: shutil.rmtree(m / "tokenizer"), "{} lacks the folder tokenizer", "copy the model again"),
    "pickled weights only": (pickled, "{}/unet holds pytorch_model.bin and no .safetensors", "can run code", "save_pretrained it"),
    "pickled text encoder": (lambda m: pickled(m, TEXT), "{}/text_encoder holds pytorch_model.bin and no .safetensors"),
    "half a file": (half, "{}/" + UNET + " is damaged or cut short", "copy it again"),
    "half a text encoder": (lambda m: half(m, TEXT), "{}/" + TEXT + " is damaged or cut short"),
}  # fmt: skip


@pytest.mark.parametrize("name", AT_ONCE)
def test_what_is_wrong_with_a_folder_is_told_with_the_config(model, tiny, tmp_path, name):
    spoil, *said = AT_ONCE[name]
    spoil(model)
    (tmp_path / "c.yaml").write_text(CONFIG.format(model=model))
    with pytest.raises(ConfigError) as caught:
        experiment.read(str(tmp_path / "c.yaml"), [], 1)
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"{tmp_path}/c.yaml:2: model.path: "), line
    assert all(part.replace("{}", str(model)) in line for part in said) and len(line) < 700, line


def resized(model: Path, part: str, name: str) -> None:
    tensors = load_file(model / part)
    tensors[name] = tensors[name][:1].contiguous()
    save_file(tensors, model / part)


def lacking(model: Path, part: str, name: str) -> None:
    tensors = load_file(model / part)
    del tensors[name]
    save_file(tensors, model / part, metadata={"format": "pt"})


# The same, found when the networks are made.
AT_LOADING = {
    "a tensor of another shape": (lambda m: resized(m, UNET, "conv_in.weight"), "conv_in.weight expected shape torch.Size([8, 4, 3, 3])"),
    "a text of another shape": (
        lambda m: resized(m, TEXT, next(name for name in load_file(m / TEXT) if "position_embedding" in name)),
        "has another shape than its config.json",
    ),
    "a tensor too few": (
        lambda m: lacking(m, UNET, "conv_in.weight"), "{}/unet lacks conv_in.weight (1 tensors in all); copy the model again"
    ),
    "a text encoder's tensor too few": (
        lambda m: lacking(m, TEXT, next(name for name in load_file(m / TEXT) if "final_layer_norm.bias" in name)),
        "{}/text_encoder lacks ", "final_layer_norm.bias (1 tensors in all); copy the model again",
    ),
    "a VAE's tensor too few": (
        lambda m: lacking(m, VAE, "decoder.conv_out.bias"), "{}/vae lacks decoder.conv_out.bias (1 tensors in all)"
    ),
    "no weights": (lambda m: (m / UNET).unlink(), "diffusion_pytorch_model.safetensors", "copy it again"),
    "no config": (lambda m: (m / "unet/config.json").unlink(), "config.json", "copy it again"),
}  # fmt: skip


@pytest.mark.parametrize("name", AT_LOADING)
def test_what_only_the_networks_can_tell_is_told_in_one_line(model, name):
    spoil, *said = AT_LOADING[name]
    spoil(model)
    with pytest.raises(UnusableModel) as caught:
        StableDiffusion(str(model))
    line = str(caught.value)
    assert "\n" not in line and all(part.replace("{}", str(model)) in line for part in said), line


def test_files_with_the_names_of_their_time_are_whole(model):
    """Stable Diffusion 1.5's: the VAE's attention had other names, and the text encoder's tensors a name in front."""
    vae = AutoencoderKL(norm_num_groups=4, block_out_channels=(8,), latent_channels=4)  # with attention, as the default is
    vae.save_pretrained(model / "vae")
    whole = StableDiffusion(str(model), dtype="float32")
    then = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {re.sub("|".join(then), lambda now: then[now[0]], name): tensor for name, tensor in load_file(model / VAE).items()}
    text = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in load_file(model / TEXT).items()}
    assert any(".query." in name for name in old)
    for part, tensors in ((VAE, old), (TEXT, text)):
        save_file(tensors, model / part, metadata={"format": "pt"})
    for network, other in zip(StableDiffusion(str(model), dtype="float32").helpers, whole.helpers, strict=True):
        check_same(network.state_dict(), other.state_dict())


def test_no_code_of_a_model_is_run(model, tmp_path, monkeypatch):
    """Every file that could be asked for leaves a mark when it is imported; so would a pickle that is opened."""
    monkeypatch.setenv("DIFFUSERS_DISABLE_REMOTE_CODE", "1")
    mark = tmp_path / "mark"
    for folder in (model, model / "unet", model / "text_encoder"):
        (folder / "mine.py").write_text(f"open({str(mark)!r}, 'w')\nclass Mine: pass\n")
    edit(model / "unet" / "config.json", lambda c: c.update(auto_map={"AutoModel": "mine.Mine"}, trust_remote_code=True))
    edit(model / "text_encoder" / "config.json", lambda c: c.update(auto_map={"AutoModel": "mine.Mine"}))
    StableDiffusion(str(model))  # diffusers' own classes; the rest is not looked at
    edit(model / "model_index.json", lambda index: index.update(unet=["mine", "Mine"]))
    with pytest.raises(UnusableModel, match="wants to run code of its own; take a model whose parts are all of diffusers"):
        StableDiffusion(str(model))

    class Payload:
        def __reduce__(self):
            return open, (str(mark), "w")

    torch.save(Payload(), model / "unet" / "pytorch_model.bin")
    (model / UNET).unlink()
    with pytest.raises(UnusableModel, match=r"holds pytorch_model\.bin and no \.safetensors"):
        StableDiffusion(str(model))
    assert not mark.exists()


def hub(path: str, **variables: str) -> subprocess.CompletedProcess:
    """A hub id, asked for in a process that was told nothing of being offline but by `variables`."""
    code = (
        f"from ddpo.models import _files\ntry: _files.read_index({path!r})\nexcept _files.UnusableModel as error: print(error)"
    )
    environment = {k: v for k, v in ENVIRONMENT.items() if k != "HF_HUB_OFFLINE" and "proxy" not in k.lower()}
    environment |= {"HF_HUB_DISABLE_TELEMETRY": "1"} | variables  # as ddpo.train sets it
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True, timeout=120
    )


def test_a_model_that_is_not_in_the_cache_is_told_with_the_command(tmp_path):
    told = hub("someone/nothing", HF_HUB_OFFLINE="1", HF_HUB_CACHE=str(tmp_path)).stdout
    assert told == (
        f"someone/nothing is not in the cache {tmp_path}, and HF_HUB_OFFLINE is set: run `hf download someone/nothing` where there is a "
        "network, or set model.path to a folder\n"
    )


@pytest.mark.slow  # ten seconds of waiting for an answer
def test_a_hub_that_cannot_be_reached_is_asked_once(tmp_path):
    """It takes a connection and never answers: a download would wait for it six times."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        asked: list[bytes] = []
        threading.Thread(target=_take, args=(server, asked), daemon=True).start()
        endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
        ended = hub("someone/nothing", HF_ENDPOINT=endpoint, HF_HUB_CACHE=str(tmp_path))
    assert (
        "is not in the cache" in ended.stdout and "the hub cannot be reached: run `hf download someone/nothing`" in ended.stdout
    )
    assert "Retrying" not in ended.stderr and [words[:7] for words in asked] == [b"HEAD / "]


def _take(server: socket.socket, asked: list[bytes]) -> None:
    kept = []  # open, and silent
    with contextlib.suppress(OSError):
        while True:
            kept.append(server.accept()[0])
            asked.append(kept[-1].recv(1000))


def test_what_the_hub_says_is_told_with_the_fix(monkeypatch):
    import httpx
    import huggingface_hub
    from huggingface_hub import errors

    monkeypatch.setattr(_files, "_hub_answers", lambda: True)
    said = {
        errors.RepositoryNotFoundError: "a/b is not on the hub, or private: mend the name, or run `hf auth login`",
        errors.GatedRepoError: "a/b wants its licence accepted first: do so at https://huggingface.co/a/b, then run `hf auth login`",
        errors.RevisionNotFoundError: "a/b has no revision 'v9'; mend model.revision, or leave it out",
        errors.RemoteEntryNotFoundError: "a/b holds no model_index.json; give a folder",
    }
    for kind, line in said.items():

        def refuse(*_: object, kind=kind, **__: object) -> str:
            raise kind("no", response=httpx.Response(404, request=httpx.Request("GET", "http://hub")))

        monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
        with pytest.raises(UnusableModel, match=re.escape(line)):
            _files.read_index("a/b", "v9")
    assert os.environ["HF_HUB_OFFLINE"] == "1", "no test asks the real hub"
