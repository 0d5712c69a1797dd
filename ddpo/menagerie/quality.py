"""How good a built-in model is: `python -m ddpo.menagerie.quality` measures it and prints the table that ships with it.

With `--flow`, the flow model. Held-out scenes only: combinations of animal, colour and number that neither the model nor its
CLIP has seen. Samples are drawn by plain diffusers: DDIM, or the flow's Euler steps, 20 of them, guidance 3.
"""

import argparse
import random
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline
from torch import Tensor

from ddpo.menagerie import architecture, scenes
from ddpo.noise import normal
from rewards.clip import tower
from rewards.scene import Colour, Count

STEPS, GUIDANCE, BATCH = 20, 3.0, 50


def pipeline(folder: Path) -> DiffusionPipeline:
    """Plain diffusers' pipeline of a built-in model."""
    absent = [k for k, v in DiffusionPipeline.load_config(folder).items() if v == [None, None] and k.endswith("_3")]
    pipe = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32, use_safetensors=True, **dict.fromkeys(absent))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def held_out(images: int, counts: tuple[int, ...]) -> list[scenes.Scene]:
    """The held-out combinations with these numbers of animals, over and over until there are enough."""
    every = [s for s in scenes.all_scenes() if s.held_out and s.count in counts]
    random.Random(0).shuffle(every)
    return [every[i % len(every)] for i in range(images)]


def real(chosen: list[scenes.Scene]) -> Tensor:
    """(N, 3, 64, 64) in [0, 1]: the scenes as the world draws them."""
    return scenes.to_tensor([scenes.draw(s, random.Random(f"quality/{i}")) for i, s in enumerate(chosen)]).float() / 255


@torch.no_grad()
def drawn(pipe: DiffusionPipeline, chosen: list[scenes.Scene]) -> Tensor:
    """(N, 3, 64, 64) in [0, 1]: the scenes as the model draws them from their captions."""
    # The flow model has no T5; by default diffusers would give it zeros in the place of T5's tokens.
    without_t5 = {"max_sequence_length": 0} if isinstance(pipe, StableDiffusion3Pipeline) else {}
    images = []
    for start in range(0, len(chosen), BATCH):
        part = chosen[start : start + BATCH]
        noise = normal([("quality", start + i) for i in range(len(part))], (4, 16, 16), pipe.device)
        with torch.autocast(pipe.device.type, torch.bfloat16):
            out = pipe(
                [s.caption for s in part], latents=noise, num_inference_steps=STEPS, guidance_scale=GUIDANCE, output_type="pt",
                **without_t5,
            )  # fmt: skip
        images.append(out.images.float().cpu())
    return torch.cat(images)


@torch.no_grad()
def psnr(pipe: DiffusionPipeline, images: Tensor) -> float:
    """Mean peak signal-to-noise ratio of pictures that went through the VAE, in dB."""
    values = []
    for x in images.to(pipe.device).split(BATCH):
        y = pipe.vae.decode(pipe.vae.encode(2 * x - 1).latent_dist.mean).sample / 2 + 0.5
        values.append(-10 * ((y.clamp(0, 1) - x) ** 2).mean((1, 2, 3)).log10())
    return torch.cat(values).mean().item()


def share(rule: Callable, images: Tensor, chosen: list[scenes.Scene]) -> float:
    """How often a rule finds what the caption says."""
    scores = rule(images, [s.caption for s in chosen], [{}] * len(chosen))
    return sum(scores) / len(scores)


@torch.no_grad()
def names_the_animal(images: Tensor, chosen: list[scenes.Scene], clip: Path) -> float:
    """How often CLIP prefers the caption with the right animal to the 45 with another one."""
    model = tower(f"local-dir:{clip}", None)
    right = 0
    for image, scene in zip(model.images(images), chosen, strict=True):
        rivals = [scenes.Scene(animal, scene.colour, scene.count).caption for animal in scenes.ANIMALS]
        right += list(scenes.ANIMALS)[int((model.texts(rivals) @ image).argmax())] == scene.animal
    return right / len(chosen)


def table(folder: Path, images: int, device: str) -> str:
    """The quality table, Markdown, `images` pictures a figure."""
    pipe = pipeline(folder).to(device)
    clip = architecture.WEIGHTS / "clip"
    mixed, one, two, three = (held_out(images, counts) for counts in ((1, 2, 3), (1,), (2,), (3,)))
    shown = real(mixed)
    samples = {n: drawn(pipe, chosen) for n, chosen in ((1, one), (2, two), (3, three))}
    rows = [
        ("VAE reconstruction PSNR", f"{psnr(pipe, shown):.1f} dB", "", "27 dB"),
        (
            "background colour right",
            f"{share(Colour(), shown, mixed):.1%}",
            f"{share(Colour(), samples[1], one):.1%}",
            "99 % / 90 %",
        ),
        (
            "number right, one animal asked for",
            f"{share(Count(), real(one), one):.1%}",
            f"{share(Count(), samples[1], one):.1%}",
            "97 % / 85 %",
        ),
        ("number right, two asked for", f"{share(Count(), real(two), two):.1%}", f"{share(Count(), samples[2], two):.1%}", ""),
        (
            "number right, three asked for",
            f"{share(Count(), real(three), three):.1%}",
            f"{share(Count(), samples[3], three):.1%}",
            "",
        ),
        (
            "CLIP picks the animal out of 46",
            f"{names_the_animal(shown, mixed, clip):.1%}",
            f"{names_the_animal(samples[1], one, clip):.1%}",
            "95 % / 60 %",
        ),
    ]
    head = f"Held-out scenes, {images} pictures a figure; samples: {type(pipe.scheduler).__name__}, {STEPS} steps, guidance "
    head += f"{GUIDANCE:g}.\n\n"
    head += "| measured | real scenes | samples | at least |\n|---|---|---|---|\n"
    return head + "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flow", action="store_true", help="the flow model")
    parser.add_argument("--weights", type=Path, help="another folder than the package's")
    parser.add_argument("--images", type=int, default=1000, help="pictures a figure")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--write", action="store_true", help="keep the table beside the weights, as QUALITY.md")
    args = parser.parse_args()
    folder = args.weights or (architecture.FLOW_WEIGHTS if args.flow else architecture.WEIGHTS)
    text = table(folder, args.images, args.device)
    print(text)
    if args.write:
        title, flag = ("The built-in flow model", " --flow") if args.flow else ("The built-in model", "")
        (folder / "QUALITY.md").write_text(f"# {title}\n\n`python -m ddpo.menagerie.quality{flag}`\n\n{text}")


if __name__ == "__main__":
    main()
