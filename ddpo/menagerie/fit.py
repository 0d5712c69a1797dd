"""A stage of making the built-in models: an optimizer, an average of the weights, and checkpoints to resume from."""

from collections.abc import Callable
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ddpo.noise import generator

SEED = 1


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
