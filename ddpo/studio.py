"""Draws with a run's model, at any of its iterations, beside the base model and from the same noise."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ddpo import manifest, prompts
from ddpo.config import Component, In, dump, load
from ddpo.diffusion import DDIM
from ddpo.evaluate import probe_address
from ddpo.experiment import ModelError, flat
from ddpo.manifest import CorruptCheckpoint, MismatchedCheckpoint
from ddpo.offer import EXPORTED, exported, saved
from ddpo.policy import LoRA, Policy
from ddpo.prompts import PromptError
from ddpo.rollout import collect
from ddpo.sections import Acting, Evaluating, Run
from ddpo.shots import Shot

KEPT = 8  # iterations whose LoRA stays in memory

Advance = Callable[[int, int], None]  # told how many denoising steps are done, of how many; what it raises ends the work


@dataclass(frozen=True)
class Settings:
    """A run's config, as far as drawing needs it right: its prompt files and scorers may be gone or on another machine."""

    model: Annotated[Component, In("ddpo.models")]
    rollout: Acting
    run: Run
    lora: LoRA
    evaluation: Evaluating
    prompts: dict[str, Any] = field(default_factory=dict)


class Studio:
    """A run's model in memory. Use `open`. Drawing with one from several threads at a time is not safe.

    Args:
        policy: with the run's model and the shape of its LoRA; whatever is loaded into it is replaced.
    """

    def __init__(self, folder: Path, settings: Settings, policy: Policy):
        self.folder, self.settings, self.policy = folder, settings, policy
        self._loras: dict[int, dict[str, Tensor]] = {}  # by iteration, on the CPU, the latest used last

    @classmethod
    def open(cls, folder: Path, last: "Studio | None" = None) -> "Studio":
        """Load a run's model, on the accelerator if there is one.

        Args:
            last: a studio that is no longer needed; its network serves again where model and LoRA are the same, and is let go of where not.

        Raises:
            ConfigError: the run's config.yaml is missing or damaged, or names what is not installed.
            ModelError: the model cannot be loaded; says what to do.
        """
        settings = load(folder / "config.yaml", [], Settings, partly=True).recipe
        if last and (last.settings.model, last.settings.lora) == (settings.model, settings.lora):
            return cls(folder, settings, last.policy)
        if last:
            del last.policy  # before the next one comes: the device may not hold both
        return cls(folder, settings, _policy(settings))

    def shot(
        self, prompt: str, seed: int, num_steps: int | None = None, guidance: float | None = None,
        scale: float = 1.0, iteration: int | None = None,
    ) -> Shot:  # fmt: skip
        """What is left out is as in the run's evaluations, and the iteration is the last. Raises ValueError as Shot does."""
        steps = self.settings.evaluation.num_steps or self.settings.rollout.num_steps
        return Shot(
            prompt, seed, steps if num_steps is None else num_steps,
            self.settings.rollout.guidance if guidance is None else guidance, scale,
            saved(self.folder)[-1] if iteration is None else iteration,
        )  # fmt: skip

    def draw(self, shots: Sequence[Shot], advance: Advance = lambda done, total: None) -> Tensor:
        """(N, 3, H, W) uint8 on the CPU: each shot's picture by the deterministic sampler (DDIM, eta 0).

        Shots of one prompt and seed begin with the same noise, which is that of the run's evaluations: with their steps,
        guidance and scale 1 the pictures are theirs. A picture depends on its shot alone (in float32, up to the last bits).

        Raises:
            ValueError: an iteration of which there is no LoRA.
            FileError: its checkpoint is damaged, or was made with another model.
        """
        alike: dict[tuple[int, float, float, int], list[int]] = {}
        for i, shot in enumerate(shots):
            alike.setdefault((shot.num_steps, shot.guidance, shot.scale, shot.iteration), []).append(i)
        size = self.settings.rollout.batch_size
        batches = [(how, rows[i : i + size]) for how, rows in alike.items() for i in range(0, len(rows), size)]
        pictures: dict[int, Tensor] = {}
        done, total = 0, sum(steps for (steps, *_), _ in batches)

        def step(_: int) -> None:
            nonlocal done
            done += 1
            advance(done, total)

        for (num_steps, guidance, scale, iteration), rows in batches:
            texts = [shots[i].prompt for i in rows]
            addresses = [probe_address(self.settings.run.seed, shots[i].prompt, shots[i].seed) for i in rows]
            with self._acting(guidance, scale, iteration):
                drawn = collect(self.policy, texts, addresses, DDIM(0.0), num_steps, size, False, step)
            pictures.update(zip(rows, drawn.images, strict=True))
        return torch.stack([pictures[i] for i in range(len(shots))])

    def metadata(self) -> dict[str, dict]:
        """{prompt: what the run's held-out prompt file says of it}, for scorers that want to know; none where that is gone."""
        try:
            return {p.text: p.metadata for p in prompts.load(self.settings.prompts.get("held_out", ""))}
        except (PromptError, OSError):
            return {}

    @contextmanager
    def _acting(self, guidance: float, scale: float, iteration: int) -> Iterator[None]:
        """Be the run's model after this iteration, and afterwards as before."""
        if iteration:
            self.policy.load(self._lora(iteration))
        before, self.policy.guidance = self.policy.guidance, guidance
        try:
            with self.policy.acting_as("now" if iteration else "reference"), self.policy.scaled(scale):
                yield
        finally:
            self.policy.guidance = before

    def _lora(self, iteration: int) -> dict[str, Tensor]:
        """An iteration's trainable weights by name, from its checkpoint or from the exported file."""
        found = self._loras.pop(iteration, None)
        if found is None:
            found = self._read(iteration)
            _demand_fitting(found, self.policy, self.folder)
        self._loras[iteration] = found
        while len(self._loras) > KEPT:
            del self._loras[next(iter(self._loras))]
        return found

    def _read(self, iteration: int) -> dict[str, Tensor]:
        checkpoint = self.folder / "checkpoints" / f"step-{iteration:08d}"
        if checkpoint.is_dir():
            self._demand_same_model(checkpoint)
            return load_file(checkpoint / "lora.safetensors")
        if iteration == exported(self.folder):
            return _exported(self.folder / EXPORTED, self.policy)
        kept = ", ".join(map(str, saved(self.folder)))
        raise ValueError(
            f"{self.folder.name} holds no LoRA of iteration {iteration}; it holds {kept}, where 0 is the base model"
        )

    def _demand_same_model(self, checkpoint: Path) -> None:
        """Every byte is there, and it is this config's model: a refused resumption may have left another's config here."""
        then = manifest.verify(checkpoint)["identity"]
        said = yaml.safe_load(dump(self.settings))
        now = flat({section: said[section] for section in ("model", "lora")})
        if other := [key for key, value in now.items() if key in then and then[key] != value]:
            raise MismatchedCheckpoint(
                f"{checkpoint} was made with {', '.join(f'{k}={then[k]!r}' for k in other)}, and config.yaml says "
                f"{', '.join(f'{k}={now[k]!r}' for k in other)}: set config.yaml back"
            )


def _policy(settings: Settings) -> Policy:
    source = settings.model.options.get("path", settings.model.name)
    try:
        policy = Policy(settings.model.build(), settings.lora, settings.rollout.guidance, settings.run.seed)
        policy.to(torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu"))
    except (OSError, ValueError, ImportError, RuntimeError) as e:  # RuntimeError: the device's memory does not hold it
        reason = (str(e).splitlines() or [type(e).__name__])[0].rstrip(".")
        raise ModelError(
            f"the model {source!r} cannot be loaded: {reason}. Bring its weights to this machine (`hf download {source}`), or mend "
            "model.path in the run's config.yaml. All that was drawn while training can be looked at without them."
        ) from e
    return policy


def _exported(path: Path, policy: Policy) -> dict[str, Tensor]:
    """The trainable weights by name, from what `export.save_lora` wrote for diffusers."""
    try:
        layers = load_file(path)
    except (OSError, SafetensorError) as e:
        raise CorruptCheckpoint(f"{path}: not a whole safetensors file ({e}); copy it again") from e
    names = {".lora_A.default.": ".lora.down.", ".lora_B.default.": ".lora.up."}
    found = {}
    for name in policy.weights:
        key = f"{policy.family.lora_prefix}.{name}"
        for ours, theirs in names.items():
            key = key.replace(ours, theirs)
        if key in layers:
            found[name] = layers[key]
    return found


def _demand_fitting(tensors: dict[str, Tensor], policy: Policy, folder: Path) -> None:
    wrong = [name for name, w in policy.weights.items() if name not in tensors or tensors[name].shape != w.shape]
    if wrong:
        raise MismatchedCheckpoint(
            f"{folder}: its LoRA does not fit its model: {len(wrong)} of {len(policy.weights)} weights are missing or of another "
            f"shape, such as {wrong[0]}; is config.yaml the one that it was trained with?"
        )


def generate_pairs(
    folder: Path, prompt: str, seeds: int, output: Path, num_steps: int | None = None, guidance: float | None = None,
    scale: float = 1.0, iteration: int | None = None,
) -> Path:  # fmt: skip
    """Draw a prompt with the base model (above) and with the run's LoRA (below), from the same noise, for seeds 0, 1, ...

    Raises ValueError, FileError or ModelError as `Studio` does, and OSError where the output cannot be written.
    """
    from PIL import Image

    if saved(folder) == [0]:
        raise ValueError(f"{folder} has no checkpoint yet: there is nothing to compare with the base model")
    if seeds < 1:
        raise ValueError(f"--seeds is {seeds}; it must be at least 1")
    studio = Studio.open(folder)
    tuned = [studio.shot(prompt, seed, num_steps, guidance, scale, iteration) for seed in range(seeds)]
    drawn = studio.draw([*(shot.base for shot in tuned), *tuned])
    rows = [torch.cat(list(part), 2) for part in drawn.split(seeds)]
    Image.fromarray(torch.cat(rows, 1).permute(1, 2, 0).numpy()).save(output)
    return output
