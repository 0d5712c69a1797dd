"""Makes the built-in model from nothing: `python -m ddpo.menagerie.pretrain --work build/menagerie`.

Three stages, each resumable (run the same command again), in bfloat16 on a CPU or a GPU:

    vae   AutoencoderKL        64x64x3 <-> 16x16x4
    clip  open_clip ResNet     contrastive on captions; a quarter of its pictures went through the VAE, as samples will have
    unet  UNet and CLIP text encoder together, epsilon-prediction on SD's scaled-linear schedule

The result is a diffusers StableDiffusionPipeline folder and an open_clip folder in half precision, at most 24 MB.
With `--flow`, a model of the other kind from the first one's VAE and text encoder, StableDiffusion3Pipeline, at most 12 MB:

    flow  SD3's transformer and its two CLIP text encoders, by rectified flow

`python -m ddpo.menagerie.quality` measures them.
"""

import argparse
import itertools
import random
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTextModel

from ddpo.menagerie import architecture, scenes
from ddpo.menagerie.fit import SEED, Fit

STEPS = {"vae": 3_800, "clip": 1_500, "unet": 10_000, "flow": 8_000}
PICTURES = 48_000


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
    unet, text_encoder = architecture.unet(), architecture.text_encoder()
    unet.compile()
    text_encoder.compile()
    fit = Fit("unet", nn.ModuleList([unet, text_encoder]), steps, 1.5e-3, work, device)
    batch = Captioned(pool, vae, device)
    abar = architecture.scheduler().alphas_cumprod.to(device)

    def loss(g: torch.Generator) -> Tensor:
        x0, ids = batch(64, g)
        t = (_stratified(64, g) * 1000).long().to(device)
        a = abar[t].view(-1, 1, 1, 1)
        eps = torch.randn(x0.shape, generator=g).to(device)
        with torch.autocast(device, torch.bfloat16):
            out = unet(a.sqrt() * x0 + (1 - a).sqrt() * eps, t, text_encoder(ids).last_hidden_state).sample
        snr = a.flatten() / (1 - a.flatten())
        return (_squared(out.float() - eps) * snr.clamp(max=5) / snr).mean()

    fit.run(loss)
    return unet, text_encoder


def train_flow(
    pool: Pool, folder: Path, steps: int, work: Path, device: str
) -> tuple[AutoencoderKL, nn.Module, nn.Module, nn.Module]:
    """The flow model's (VAE, transformer, text encoder, text encoder), from the SD model in `folder`."""
    vae = AutoencoderKL.from_pretrained(folder / "vae", dtype=torch.float32, use_safetensors=True).eval().to(device)
    transformer, texts = architecture.transformer(), architecture.flow_text_encoders()
    known = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32, use_safetensors=True)
    texts[0].text_model.load_state_dict(known.state_dict())
    nn.init.eye_(texts[0].text_projection.weight)
    for module in (transformer, *texts):
        module.compile()
    fit = Fit("flow", nn.ModuleList([transformer, *texts]), steps, 1.5e-3, work, device)
    batch = Captioned(pool, vae, device)

    def loss(g: torch.Generator) -> Tensor:
        x0, ids = batch(64, g)
        t = _stratified(64, g).to(device)
        eps, s = torch.randn(x0.shape, generator=g).to(device), t.view(-1, 1, 1, 1)
        with torch.autocast(device, torch.bfloat16):
            seen = [text(ids, output_hidden_states=True) for text in texts]
            words, pooled = (torch.cat(v, -1) for v in ([o.hidden_states[-2] for o in seen], [o.text_embeds for o in seen]))
            out = transformer((1 - s) * x0 + s * eps, words, pooled, 1000 * t).sample
        return _squared(out.float() - (eps - x0)).mean()

    fit.run(loss)
    return vae, transformer, *texts


class Captioned:
    """The pool's latents, and captions of which one in ten is empty (guidance needs it) and one in twelve names no colour."""

    def __init__(self, pool: Pool, vae: AutoencoderKL, device: str):
        tokenizer, self.pool, self.device = architecture.tokenizer(), pool, device
        self.latents = _encode(vae, pool, torch.arange(len(pool.scenes)), device) * vae.config.scaling_factor
        self.full = tokenizer([s.caption for s in pool.scenes], **architecture.PADDING).input_ids
        self.plain = tokenizer([s.subject for s in pool.scenes], **architecture.PADDING).input_ids
        self.empty = tokenizer([""], **architecture.PADDING).input_ids

    def __call__(self, n: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
        """(n, 4, 16, 16) latents and (n, tokens) ids."""
        rows, kind = self.pool.rows(n, g), torch.rand(n, 1, generator=g)
        ids = torch.where(kind < 0.1, self.empty, torch.where(kind < 0.18, self.plain[rows], self.full[rows]))
        return self.latents[rows], ids.to(self.device)


def _stratified(n: int, g: torch.Generator) -> Tensor:
    """(n,) in [0, 1), one from each of n equal stretches."""
    return (torch.arange(n) + torch.rand(n, generator=g)) / n


def _squared(error: Tensor) -> Tensor:
    """(B,) mean square error, coarse errors counted extra. Without this the flat background, which is one number in 256,
    would be learned last: SD's schedule keeps some signal at the last step, and black pictures come out gray."""
    fine = error.square().mean((1, 2, 3))
    return fine + sum(n * n / 64 * F.avg_pool2d(error, n).square().mean((1, 2, 3)) for n in (4, 16))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/menagerie"), help="checkpoints and pictures, to resume from")
    parser.add_argument("--out", type=Path, help="where the finished model goes, instead of into the package")
    parser.add_argument("--flow", action="store_true", help="make the flow model, from the finished other one")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies every stage's steps")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    steps = {name: max(1, round(n * args.scale)) for name, n in STEPS.items()}
    torch.manual_seed(SEED)  # the networks' first weights
    pool = Pool(PICTURES, args.work, args.device)
    # On a CPU the fused attention's backward pass costs more, at 64 tokens, than attention written out.
    with sdpa_kernel(SDPBackend.MATH) if args.device == "cpu" else nullcontext():
        if args.flow:
            out = args.out or architecture.FLOW_WEIGHTS
            architecture.save_flow(out, *train_flow(pool, architecture.WEIGHTS, steps["flow"], args.work, args.device))
        else:
            out = args.out or architecture.WEIGHTS
            vae = train_vae(pool, steps["vae"], args.work, args.device)
            clip = train_clip(pool, vae, steps["clip"], args.work, args.device)
            architecture.save(out, vae, *train_unet(pool, vae, steps["unet"], args.work, args.device), clip)
    print(f"{out}: {sum(f.stat().st_size for f in out.rglob('*')) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
