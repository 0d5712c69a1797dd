"""The exported LoRA, in plain diffusers, draws what the policy drew."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from diffusers import DDIMScheduler, StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file

from ddpo import checkpoint
from ddpo.diffusion import DDIM
from ddpo.export import save_lora
from ddpo.finish import export_run
from ddpo.models.flux import Flux
from ddpo.models.sd import StableDiffusion
from ddpo.models.sd3 import StableDiffusion3
from ddpo.models.sdxl import StableDiffusionXL
from ddpo.noise import normal
from ddpo.policy import LoRA, Policy
from ddpo.rollout import collect
from tests.test_report import finished
from tests.test_rollout import ADDRESSES, PROMPTS, stir

ROOT = Path(__file__).parent.parent
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2", "proj_in", "ff.net.0.proj"]


@pytest.mark.parametrize("file", ["pytorch_lora_weights.safetensors", "mine.safetensors"])
@pytest.mark.parametrize("alpha", [None, 9.0])
def test_plain_diffusers_draws_the_tuned_policys_pictures(tiny, tmp_path, file, alpha):
    policy = stir(Policy(StableDiffusion(str(tiny), dtype="float32"), LoRA(4, alpha, TARGETS), 3.0))
    save_lora(policy, tmp_path, "mine")
    ours = collect(policy, PROMPTS, ADDRESSES, DDIM(0.0), 6, 4, False).images.float()
    with policy.acting_as("reference"):
        base = collect(policy, PROMPTS, ADDRESSES, DDIM(0.0), 6, 4, False).images.float()

    pipe = StableDiffusionPipeline.from_pretrained(tiny, safety_checker=None, dtype=torch.float32)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(tmp_path / "lora", weight_name=file)
    start = normal([(*a, "start") for a in ADDRESSES], (4, 8, 8))
    theirs = 255 * pipe(PROMPTS, latents=start, num_inference_steps=6, guidance_scale=3.0, output_type="pt").images
    assert (ours - theirs).abs().max() <= 2
    assert (ours - base).abs().max() > 10  # the LoRA does something: the test could tell


def test_the_comfyui_file_has_the_true_alpha_and_its_names(tiny, tmp_path):
    policy = stir(Policy(StableDiffusion(str(tiny), dtype="float32"), LoRA(4, 9.0, TARGETS)))
    save_lora(policy, tmp_path, "mine")
    layers = load_file(tmp_path / "lora" / "mine.safetensors")
    stems = {k.rsplit(".lora_", 1)[0].removesuffix(".alpha") for k in layers}
    assert all(s.startswith("lora_unet_") and "." not in s for s in stems)
    assert "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0" in stems
    for stem in stems:
        assert layers[f"{stem}.alpha"] == 9.0 and layers[f"{stem}.lora_down.weight"].shape[0] == 4
    with safe_open(tmp_path / "lora" / "mine.safetensors", "pt") as file:
        assert file.metadata()["ss_network_alpha"] == "9.0"
    with safe_open(tmp_path / "lora" / "pytorch_lora_weights.safetensors", "pt") as file:
        assert json.loads(file.metadata()["lora_adapter_metadata"])["unet.lora_alpha"] == 9.0


def header(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


@pytest.fixture
def run_folder(tiny, tmp_path):
    """Two checkpoints, of iterations 2 and 4, and the policy as it was at each. Its prompts and scorers are not on this machine."""
    folder = finished(tmp_path / "run", prompt="a private prompt {}")
    model = {"name": "sd", "path": str(tiny), "dtype": "float32"}
    settings = {
        "model": model, "lora": {"rank": 4, "alpha": 9.0}, "prompts": {"held_out": "gone.txt"}, "optimizer": {"lr": 1e-3, "updates": 2},
        "rewards": [{"name": "gone.py:Gone"}],
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    facts = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(facts | {"model": str(tiny)}))
    policy, kept = Policy(StableDiffusion(str(tiny), dtype="float32"), LoRA(4, 9.0)), {}
    for step in (2, 4):
        stir(policy, step / 10)
        kept[step] = {k: v.clone() for k, v in policy.lora_layers().items()}
        tensors = {"lora": {k: w.detach() for k, w in policy.weights.items()}}
        checkpoint.save(folder / "checkpoints", step, tensors, {}, {"anything": 1})
    (folder / "checkpoints" / "best").write_text("step-00000002\n")
    return folder, kept


@pytest.mark.parametrize(("which", "step"), [("latest", 4), ("best", 2), ("2", 2)])
def test_a_checkpoint_is_exported_with_its_own_numbers(run_folder, tmp_path, which, step):
    folder, kept = run_folder
    before = sorted(p.relative_to(folder) for p in folder.rglob("*"))
    lora = export_run(folder, which, tmp_path / "out")
    layers = load_file(lora)
    names = {".lora_A.": ".lora.down.", ".lora_B.": ".lora.up."}
    for key, value in kept[step].items():
        for old, new in names.items():
            key = key.replace(old, new)
        assert torch.equal(layers[f"unet.{key}"], value)
    assert (
        header(lora)["ddpo.iteration"] == str(step)
        and f"After {step} iterations" in (tmp_path / "out" / "README.md").read_text()
    )
    assert (tmp_path / "out" / "report.html").is_file() and bool(list((tmp_path / "out" / "images").glob("*.png"))) == (
        step == 4
    )
    assert sorted(p.relative_to(folder) for p in folder.rglob("*")) == before


def test_a_checkpoint_that_is_not_there_and_a_config_that_is_not_its_own_are_told(run_folder, tmp_path):
    folder, _ = run_folder
    for wrong in ("3", "../../etc", "checkpoints"):
        with pytest.raises(FileNotFoundError, match="use latest, best, or one of these iterations: 2, 4"):
            export_run(folder, wrong, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match=r"no config\.yaml"):
        export_run(tmp_path, "latest", tmp_path / "out")
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("rank: 4", "rank: 8"))
    with pytest.raises(ValueError, match="another model or lora section"):
        export_run(folder, "latest", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_headers_say_where_the_files_are_from_and_keep_prompts_and_paths_out(run_folder, tiny, tmp_path):
    ours = export_run(*(run_folder[0], "latest"), tmp_path / "out")
    theirs = ours.parent / "owls.safetensors"
    for path in (ours, theirs):
        told, content = header(path), path.read_bytes()
        assert told["modelspec.sai_model_spec"] == "1.0.1" and told["modelspec.architecture"] == "latent-diffusion/lora"
        assert told["modelspec.title"] == "owls" and told["modelspec.resolution"] == "16x16"
        tensors = content[8 + int.from_bytes(content[:8], "little") :]
        assert told["modelspec.hash_sha256"] == "0x" + hashlib.sha256(tensors).hexdigest()
        assert json.loads(told["ddpo.scores"])["scene"] == [0.5, 0.6]
        assert b"private" not in content and str(tiny).encode() not in content and b"train.txt" not in content
    told = header(theirs)
    assert (
        told["ss_network_dim"] == "4"
        and told["ss_network_alpha"] == "9.0"
        and told["ss_steps"] == "8"
        and told["ss_seed"] == "3"
    )
    assert told["sshs_model_hash"] == told["modelspec.hash_sha256"][2:] and float(told["ss_training_started_at"]) > 1.7e9
    assert not any(key.startswith("ss") for key in header(ours))


def test_a_runs_name_is_never_a_path(tiny, tmp_path):
    policy = stir(Policy(StableDiffusion(str(tiny), dtype="float32"), LoRA(4)))
    save_lora(policy, tmp_path / "x", "../../name of mine")
    assert [p.name for p in sorted((tmp_path / "x" / "lora").iterdir())] == [
        "_.._name_of_mine.safetensors",
        "pytorch_lora_weights.safetensors",
    ]


@pytest.mark.parametrize(
    ("family", "sizes", "expected"),
    [
        (StableDiffusion, {"cross_attention_dim": 768}, "stable-diffusion-v1"),
        (StableDiffusion, {"cross_attention_dim": 1024}, "stable-diffusion-v2-512"),
        (StableDiffusion, {"cross_attention_dim": 128}, "latent-diffusion"),
        (StableDiffusionXL, {"cross_attention_dim": 2048}, "stable-diffusion-xl-v1-base"),
        (StableDiffusion3, {"num_layers": 24, "dual_attention_layers": ()}, "stable-diffusion-3-m"),
        (StableDiffusion3, {"num_layers": 24, "dual_attention_layers": (0, 1)}, "stable-diffusion-3-5-medium"),
        (StableDiffusion3, {"num_layers": 38, "dual_attention_layers": ()}, "stable-diffusion-3-5-large"),
        (Flux, {"guidance_embeds": True}, "flux-1-dev"),
        (Flux, {"guidance_embeds": False}, "flux-1-schnell"),
    ],
)
def test_each_family_has_its_architectures_name(family, sizes, expected):
    model = SimpleNamespace(network=SimpleNamespace(config=SimpleNamespace(**sizes)), interpret=None)
    assert family.architecture.fget(model) == expected


OFFLINE = """
import sys
def hook(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        print("connected:", event, args, file=sys.stderr)
        raise SystemExit(9)
sys.addaudithook(hook)
from ddpo import cli
sys.exit(cli.main(["export", sys.argv[1]]) or cli.main(["report", sys.argv[1]]))
"""


@pytest.mark.slow
def test_export_card_and_report_connect_nowhere(run_folder):
    folder, _ = run_folder
    online = {k: v for k, v in os.environ.items() if not k.endswith("_OFFLINE")} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", OFFLINE, str(folder)], env=online, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "connected" not in done.stderr and "Traceback" not in done.stderr
    assert {"README.md", "report.html", "lora", "images"} <= {p.name for p in folder.iterdir()}
