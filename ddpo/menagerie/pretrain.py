"""Makes the built-in model from nothing: `python -m ddpo.menagerie.pretrain --work build/menagerie`.

Three stages, each resumable (run the same command again), in bfloat16 on a CPU or a GPU:

    vae   AutoencoderKL        64x64x3 <-> 16x16x4
    clip  open_clip ResNet     contrastive on captions; a quarter of its pictures went through the VAE, as samples will have
    unet  UNet and CLIP text encoder together, epsilon-prediction on SD's scaled-linear schedule

The result is a diffusers StableDiffusionPipeline folder and an open_clip folder in half precision, at most 24 MB.
`python -m ddpo.menagerie.quality` measures it.
"""

import argparse
import itertools
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ddpo.menagerie import architecture, scenes
from ddpo.noise import generator

SEED = 1
STEPS = {"vae": 3_800, "clip": 1_500, "unet": 10_000}
PICTURES = 48_000


class Fit:
    """One stage: AdamW with warm-up and cosine decay, an average of the weights, and checkpoints to resume from.

    The randomness of step i belongs to (SEED, stage, i), so an interrupted stage ends as an uninterrupted one would.
    """

    def __init__(self, name: str, module: nn.Module, steps: int, lr: float, work: Path, device: str):
        self.name, self.module, self.steps, self.lr, self.device = name, module, steps, lr, device
        self.path = work / f"{name}.safetensors"
        module.to(device).train()
        self.params = dict(module.named_parameters())
        self.average = {k: p.detach().clone() for k, p in self.params.items()}
        self.optimizer = torch.optim.AdamW(self.params.values(), lr, betas=(0.9, 0.99), weight_decay=0.01)
        self.step = self._resume()

    def run(self, loss: Callable[[torch.Generator], Tensor]) -> None:
        """Train to the end and leave the averaged weights in the module."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns) as progress:
            task = progress.add_task(self.name, total=self.steps, completed=self.step)
            smooth = None
            for step in range(self.step, self.steps):
                value = self._update(step, loss(generator(SEED, self.name, step)))
                smooth = value if smooth is None else 0.98 * smooth + 0.02 * value
                progress.update(task, advance=1, description=f"{self.name} loss {smooth:.4f}")
                if (step + 1) % 100 == 0:
                    if not progress.console.is_terminal:
                        print(f"{self.name} {step + 1}/{self.steps} loss {smooth:.4f}", flush=True)
                    self._save(step + 1)
        with torch.no_grad():
            for k, p in self.params.items():
                p.copy_(self.average[k])
        self.module.eval().requires_grad_(False)

    def _update(self, step: int, loss: Tensor) -> float:
        warm, left = min(1.0, (step + 1) / 200), 0.5 * (1 + torch.cos(torch.tensor(torch.pi * step / self.steps)).item())
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * warm * max(left, 0.01)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.params.values(), 1.0)
        self.optimizer.step()
        decay = min(0.998, (step + 1) / (step + 10))
        torch._foreach_lerp_(list(self.average.values()), [p.detach() for p in self.params.values()], 1 - decay)
        return loss.item()

    def _save(self, step: int) -> None:
        tensors = {f"now/{k}": p.detach() for k, p in self.params.items()} | {f"mean/{k}": v for k, v in self.average.items()}
        tensors |= {f"buffer/{k}": v for k, v in self.module.named_buffers()}  # batch norm's statistics
        for k, p in self.params.items():
            tensors |= {f"adam/{k}/{field}": v for field, v in self.optimizer.state[p].items()}
        partial = self.path.with_suffix(".partial")
        save_file({k: v.contiguous() for k, v in tensors.items()}, partial, {"step": str(step)})
        partial.replace(self.path)

    def _resume(self) -> int:
        if not self.path.exists():
            return 0
        tensors = load_file(self.path, self.device)
        with torch.no_grad():
            for k, v in self.module.named_buffers():
                v.copy_(tensors[f"buffer/{k}"])
            for k, p in self.params.items():
                p.copy_(tensors[f"now/{k}"])
                self.average[k].copy_(tensors[f"mean/{k}"])
                self.optimizer.state[p] = {f: tensors[f"adam/{k}/{f}"] for f in ("step", "exp_avg", "exp_avg_sq")}
        return int(next(iter(self.optimizer.state.values()))["step"].item())


class Pool:
    """Pictures of training scenes and their captions, drawn once."""

    def __init__(self, size: int, work: Path, device: str):
        self.device = device
        rng = random.Random(SEED)
        self.scenes = [scenes.sample(rng) for _ in range(size)]
        path = work / f"pictures-{size}.safetensors"
        if not path.exists():
            with ProcessPoolExecutor() as workers:
                drawn = workers.map(_draw, self.scenes, itertools.count(), chunksize=500)
                save_file({"pictures": scenes.to_tensor(list(drawn))}, path)
        self.pictures = load_file(path)["pictures"]
        self.by_scene: dict[scenes.Scene, list[int]] = {}
        for i, scene in enumerate(self.scenes):
            self.by_scene.setdefault(scene, []).append(i)

    def images(self, rows: Tensor) -> Tensor:
        """(B, 3, 64, 64) in [-1, 1]."""
        return self.pictures[rows].to(self.device).float() / 127.5 - 1

    def rows(self, n: int, g: torch.Generator) -> Tensor:
        return torch.randint(len(self.scenes), (n,), generator=g)

    def confusable_rows(self, n: int, g: torch.Generator) -> Tensor:
        """Pictures of few animals on few colours: a batch in which colour and number tell captions apart as well."""
        animals = {list(scenes.ANIMALS)[i] for i in torch.randperm(len(scenes.ANIMALS), generator=g)[:8]}
        colours = {list(scenes.PALETTE)[i] for i in torch.randperm(len(scenes.PALETTE), generator=g)[:4]}
        alike = [s for s in self.by_scene if s.animal in animals and s.colour in colours]
        chosen = [self.by_scene[alike[i]] for i in torch.randint(len(alike), (n,), generator=g)]
        picks = torch.rand(n, generator=g)
        return torch.tensor([rows[int(p * len(rows))] for rows, p in zip(chosen, picks, strict=True)])


def _draw(scene: scenes.Scene, index: int) -> Image.Image:
    return scenes.draw(scene, random.Random(f"{SEED}/{index}"))


def train_vae(pool: Pool, steps: int, work: Path, device: str) -> AutoencoderKL:
    vae = architecture.vae().to(memory_format=torch.channels_last)
    vae.encoder.compile()
    vae.decoder.compile()
    fit = Fit("vae", vae, steps, 2e-3, work, device)

    def loss(g: torch.Generator) -> Tensor:
        x = pool.images(pool.rows(32, g)).to(memory_format=torch.channels_last)
        with torch.autocast(device, torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=g).to(device)
            y = vae.decode(posterior.mean + posterior.std * noise).sample
        y = y.float()
        edges = F.l1_loss(y.diff(dim=3), x.diff(dim=3)) + F.l1_loss(y.diff(dim=2), x.diff(dim=2))
        return F.l1_loss(y, x) + 2 * F.mse_loss(y, x) + edges + 2e-5 * posterior.kl().float().mean() / 1024

    fit.run(loss)
    latents = _encode(vae, pool, torch.arange(2_000), device)
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    return vae


@torch.no_grad()
def _encode(vae: AutoencoderKL, pool: Pool, rows: Tensor, device: str) -> Tensor:
    """(B, 4, 16, 16) posterior means, unscaled."""
    with torch.autocast(device, torch.bfloat16):
        return torch.cat([vae.encode(pool.images(r)).latent_dist.mean.float() for r in rows.split(256)])


def train_clip(pool: Pool, vae: AutoencoderKL, steps: int, work: Path, device: str) -> nn.Module:
    model, tokenizer = architecture.clip().to(memory_format=torch.channels_last), architecture.tokenizer()
    fit = Fit("clip", model, steps, 1e-3, work, device)

    def views(g: torch.Generator) -> Iterator[Tensor]:
        """Pictures as they are and as the VAE draws them, a little noisy, so that a sample's flaws do not distract."""
        rows = pool.confusable_rows(128, g) if torch.rand((), generator=g) < 0.5 else pool.rows(128, g)
        yield rows
        x = pool.images(rows)
        with torch.no_grad(), torch.autocast(device, torch.bfloat16):
            latents = vae.encode(x[::4]).latent_dist.mean
            latents = latents + 0.1 * latents.std() * torch.randn(latents.shape, generator=g).to(device)
            x[::4] = vae.decode(latents).sample.float().clamp(-1, 1)
        yield (
            x + 0.1 * torch.rand((128, 1, 1, 1), generator=g).to(device) * torch.randn(x.shape, generator=g).to(device)
        ).clamp(-1, 1)

    def loss(g: torch.Generator) -> Tensor:
        rows, x = views(g)
        captions = [pool.scenes[i].caption for i in rows]
        with torch.autocast(device, torch.bfloat16):
            image, text, scale = model(x, tokenizer(captions, **architecture.PADDING).input_ids.to(device))
        logits = scale.float() * image.float() @ text.float().T
        same = torch.tensor([[float(a == b) for b in captions] for a in captions], device=device)
        target = same / same.sum(1, keepdim=True)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    fit.run(loss)
    return model


def train_unet(pool: Pool, vae: AutoencoderKL, steps: int, work: Path, device: str) -> tuple[nn.Module, nn.Module]:
    unet, text_encoder, tokenizer = architecture.unet(), architecture.text_encoder(), architecture.tokenizer()
    unet.compile()
    text_encoder.compile()
    fit = Fit("unet", nn.ModuleList([unet, text_encoder]), steps, 1.5e-3, work, device)
    latents = _encode(vae, pool, torch.arange(len(pool.scenes)), device) * vae.config.scaling_factor
    abar = architecture.scheduler().alphas_cumprod.to(device)
    full = tokenizer([s.caption for s in pool.scenes], **architecture.PADDING).input_ids
    plain = tokenizer([s.subject for s in pool.scenes], **architecture.PADDING).input_ids
    empty = tokenizer([""], **architecture.PADDING).input_ids

    def loss(g: torch.Generator) -> Tensor:
        rows = pool.rows(64, g)
        kind = torch.rand(64, 1, generator=g)  # one caption in ten is empty (guidance needs it), one in twelve names no colour
        ids = torch.where(kind < 0.1, empty, torch.where(kind < 0.18, plain[rows], full[rows])).to(device)
        t = ((torch.arange(64) + torch.rand(64, generator=g)) / 64 * 1000).long().to(device)  # stratified
        a, x0 = abar[t].view(-1, 1, 1, 1), latents[rows]
        eps = torch.randn(x0.shape, generator=g).to(device)
        with torch.autocast(device, torch.bfloat16):
            out = unet(a.sqrt() * x0 + (1 - a).sqrt() * eps, t, text_encoder(ids).last_hidden_state).sample
        error = out.float() - eps
        # Coarse errors count extra. Without this the flat background, which is one number in 256, would be learned last:
        # SD's schedule keeps some signal at the last step, and black pictures come out gray.
        fine = error.square().mean((1, 2, 3))
        coarse = [n * n / 64 * F.avg_pool2d(error, n).square().mean((1, 2, 3)) for n in (4, 16)]
        snr = a.flatten() / (1 - a.flatten())
        return ((fine + sum(coarse)) * snr.clamp(max=5) / snr).mean()

    fit.run(loss)
    return unet, text_encoder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/menagerie"), help="checkpoints and pictures, to resume from")
    parser.add_argument("--out", type=Path, default=architecture.WEIGHTS, help="where the finished model goes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies every stage's steps")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    steps = {name: max(1, round(n * args.scale)) for name, n in STEPS.items()}
    torch.manual_seed(SEED)  # the networks' first weights
    pool = Pool(PICTURES, args.work, args.device)
    # On a CPU the fused attention's backward pass costs more, at 64 tokens, than attention written out.
    with sdpa_kernel(SDPBackend.MATH) if args.device == "cpu" else nullcontext():
        vae = train_vae(pool, steps["vae"], args.work, args.device)
        clip = train_clip(pool, vae, steps["clip"], args.work, args.device)
        unet, text_encoder = train_unet(pool, vae, steps["unet"], args.work, args.device)
    architecture.save(args.out, vae, unet, text_encoder, clip)
    print(f"{args.out}: {sum(f.stat().st_size for f in args.out.rglob('*')) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
