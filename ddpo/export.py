"""The tuned LoRA as files that other programs load.

diffusers reads alpha from the file's metadata and takes it for the rank where there is none; ComfyUI and kohya's tools
read it from `.alpha` tensors. Both files carry the true one. Their headers say where they come from: ModelSpec 1.0.1
(https://github.com/Stability-AI/ModelSpec), kohya's ss_*, and what of the run has no other name under ddpo.*. Prompts are
not in them, nor paths: these files travel.
"""

import hashlib
import json
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from ddpo.figures import comparisons
from ddpo.policy import Policy
from ddpo.runs import Run, file_name

KOHYA_BASES = {  # kohya's names for ModelSpec's architectures
    "stable-diffusion-v1": "sd_v1", "stable-diffusion-v2-512": "sd_v2", "stable-diffusion-v2-768-v": "sd_v2_v",
    "stable-diffusion-xl-v1-base": "sdxl_base_v1-0", "flux-1-dev": "flux1", "flux-1-schnell": "flux1",
}  # fmt: skip


def diffusers_layers(policy: Policy) -> dict[str, Tensor]:
    """{"unet.<module>.lora.down.weight": ...}: diffusers' own names for a UNet's LoRA."""
    names = {".lora_A.": ".lora.down.", ".lora_B.": ".lora.up."}
    return {f"{policy.family.lora_prefix}.{_renamed(k, names)}": v for k, v in policy.lora_layers().items()}


def comfyui_layers(policy: Policy) -> dict[str, Tensor]:
    """{"lora_unet_<module with underscores>.lora_down.weight": ..., ".alpha": ...}: kohya's names, which ComfyUI maps.

    For transformers the prefix is "lora_transformer_", which ComfyUI maps for Stable Diffusion 3 and FLUX (comfy/lora.py).
    """
    layers: dict[str, Tensor] = {}
    for key, weight in policy.lora_layers().items():
        module, _, part = key.partition(".lora_")
        stem = f"lora_{policy.family.lora_prefix}_{module.replace('.', '_')}"
        layers[f"{stem}.lora_{'down' if part.startswith('A') else 'up'}.weight"] = weight
        layers[f"{stem}.alpha"] = torch.tensor(float(policy.lora_config.lora_alpha))
    return layers


def _renamed(name: str, table: dict[str, str]) -> str:
    for old, new in table.items():
        name = name.replace(old, new)
    return name


def save_lora(policy: Policy, folder: Path, name: str, facts: Mapping[str, str] | None = None) -> Path:
    """Write both files under folder/lora; returns the one for diffusers.

    Args:
        name: of the LoRA; of it, what a file name can hold names the file for ComfyUI.
        facts: more entries of the headers, as `described` gives them; those under ss_ are for the file with kohya's names.
    """
    target, facts = folder / "lora", facts or {}
    target.mkdir(parents=True, exist_ok=True)
    adapter = {f"{policy.family.lora_prefix}.{k}": v for k, v in policy.lora_metadata().items()}
    ours = target / "pytorch_lora_weights.safetensors"
    layers = diffusers_layers(policy)
    general = {key: value for key, value in facts.items() if not key.startswith("ss_")}
    described = {"format": "pt", "lora_adapter_metadata": json.dumps(adapter, sort_keys=True), **general}
    save_file(layers, ours, described | {"modelspec.hash_sha256": f"0x{_hashes(layers, {})[0]}"})
    kohya = {
        "format": "pt", "ss_network_module": "networks.lora", "ss_network_dim": str(policy.lora_config.r),
        "ss_network_alpha": str(policy.lora_config.lora_alpha), "ss_output_name": name, **facts,
    }  # fmt: skip
    layers = comfyui_layers(policy)
    whole, legacy = _hashes(layers, {key: value for key, value in kohya.items() if key.startswith("ss_")})
    kohya |= {"modelspec.hash_sha256": f"0x{whole}", "sshs_model_hash": whole, "sshs_legacy_hash": legacy}
    save_file(layers, target / f"{file_name(name)}.safetensors", kohya)
    return ours


def described(run: Run, policy: Policy, iteration: int) -> dict[str, str]:
    """Entries of the headers that say what the LoRA is of, how it was made and what it scored. All are text.

    Args:
        iteration: after which the policy is as it is.
    """
    facts, settings = run.facts, yaml.safe_load(run.config) or {}
    entries = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{policy.family.architecture}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": run.name,
        "modelspec.description": f"tuned by reinforcement learning for {', '.join(run.trained)}",
        "modelspec.resolution": "{1}x{0}".format(*policy.family.image_size),
        "modelspec.date": facts.get("ended") or facts.get("started"),
        "modelspec.tags": "reinforcement-learning,ddpo",
        "ddpo.version": (facts.get("versions") or {}).get("ddpo"),
        "ddpo.base_model": run.base,
        "ddpo.revision": facts.get("revision"),
        "ddpo.algorithm": facts.get("algorithm"),
        "ddpo.rewards": facts.get("rewards"),
        "ddpo.held_out_rewards": facts.get("held_out_rewards"),
        "ddpo.iteration": iteration,
        "ddpo.seed": facts.get("seed"),
        "ddpo.prompts_sha256": ((facts.get("prompts") or {}).get("train") or {}).get("sha256"),
        "ddpo.scores": _scores(run, iteration),
        **_kohya(run, policy, iteration, settings),
    }
    return {key: _text(value) for key, value in entries.items() if value is not None}


def _scores(run: Run, iteration: int) -> dict[str, list[float]] | None:
    """{scorer: [base, tuned]} of this iteration's evaluation."""
    found = {
        c.scorer: [c.base, c.tuned] for m in run.evaluations if m["iteration"] == iteration for c in comparisons(m) if c.whole
    }
    return found or None


def _kohya(run: Run, policy: Policy, iteration: int, settings: dict[str, Any]) -> dict[str, Any]:
    learning, dtype = settings.get("optimizer") or {}, policy.family.dtype
    updates = (learning.get("updates") or 1) * (learning.get("epochs") or 1)
    precision = {torch.bfloat16: "bf16", torch.float16: "fp16"}
    return {
        "ss_base_model_version": KOHYA_BASES.get(policy.family.architecture),
        "ss_v2": str(policy.family.architecture.startswith("stable-diffusion-v2")),
        "ss_sd_model_name": run.base,
        "ss_steps": iteration * updates,
        "ss_epoch": iteration,
        "ss_seed": run.facts.get("seed"),
        "ss_learning_rate": learning.get("lr"),
        "ss_mixed_precision": precision.get(dtype, "no"),
        "ss_resolution": str(tuple(reversed(policy.family.image_size))),
        "ss_training_started_at": _seconds(run.facts.get("started")),
        "ss_training_finished_at": _seconds(run.facts.get("ended")),
        "ss_training_comment": "reinforcement learning with ddpo",
    }


def _seconds(time: str | None) -> float | None:
    """A time of run.json as kohya writes it, in seconds since 1970."""
    return None if time is None else datetime.fromisoformat(time).timestamp()


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _hashes(layers: dict[str, Tensor], header: dict[str, str]) -> tuple[str, str]:
    """sha256 of a file's tensors, as ModelSpec and A1111 know it, and A1111's older one, of 64 KiB from the first MiB on."""
    content = safetensors.torch.save(layers, header)
    tensors = 8 + int.from_bytes(content[:8], "little")
    return hashlib.sha256(content[tensors:]).hexdigest(), hashlib.sha256(content[0x100000:0x110000]).hexdigest()[:8]
