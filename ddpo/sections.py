"""A run's settings: the sections of a config file. Components bring their own options; here is what the loop itself asks."""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt, Interval, Le
from pydantic import AfterValidator

from ddpo.config import Component, In


def _name(text: str) -> str:
    if not text.strip(". ") or {"/", "\\", "\0"} & set(text):
        raise ValueError("should be a folder's name, to stand under runs/ (for a path use run.output)")
    return text


def _path(text: str) -> str:
    if not text.strip() or "\0" in text:
        raise ValueError("should be the path of a folder")
    return text


@dataclass(frozen=True)
class Run:
    """Config section `run`.

    Args:
        name: of the run folder under runs/; None is the config's own name and the time.
        output: the run folder itself, instead. Running the same command again with it resumes.
        seed: of all randomness.
        iterations: rounds of acting and learning.
        eval_every: iterations between evaluations; there is one before the first and one after the last.
        save_every: iterations between checkpoints; there is one after each evaluation too. What is killed loses so many at most.
        on_alarm: of what `health` finds grave. "stop" ends the run with exit code 4 and keeps everything; "rollback" goes on
            from the checkpoint with the best lower bound of the rewards not trained on, with other noise and half the
            learning rate, twice at most; "warn" says so and goes on.
        threads: of each process on a CPU; None shares out all cores. Fewer where something else works beside it.
        timeout: minutes that a process waits for another one before all end; more than the slowest scorer takes for its share.
    """

    name: Annotated[str, AfterValidator(_name)] | None = None
    output: Annotated[str, AfterValidator(_path)] | None = None
    seed: Annotated[int, Ge(0)] = 0
    iterations: Annotated[int, Ge(1)] = 100
    eval_every: Annotated[int, Ge(1)] = 10
    save_every: Annotated[int, Ge(1)] = 1
    on_alarm: Literal["stop", "rollback", "warn"] = "stop"
    threads: Annotated[int, Ge(1)] | None = None
    timeout: Annotated[float, Ge(0.01), Le(1440)] = 10.0


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """Config section `prompts`: each a .txt or .jsonl file or the name of a built-in list.

    Args:
        train: None where `rollout.pictures` brings prompts of its own.
        held_out: to evaluate on.
    """

    train: str | None = None
    held_out: str


@dataclass(frozen=True)
class Acting:
    """Config section `rollout`: how pictures are made.

    Args:
        solver: the sampler.
        num_steps: denoising steps a picture.
        guidance: scale of classifier-free guidance, in acting and in learning; 1 is none.
        prompts: prompt groups an iteration, over all processes.
        group_size: pictures a group.
        batch_size: pictures that go through the network at a time, on each process.
        pictures: a .jsonl file of scored pictures or of votes (ddpo/offline.py) to learn from: nothing is drawn but in evaluations,
            and the rewards judge these only. A group of it is `group_size` of a prompt's pictures, of votes 2.
        window: which of the solver's stochastic steps add noise, and are learned from; None is all. Others follow the ODE.
        choice: which prompts an iteration is about; None takes each once, then each again in another order.
        credit: how the reward is shared out among the steps; None gives all of them the picture's own.
    """

    solver: Annotated[Component, In("ddpo", among=("diffusion",), members=("__call__", "stochastic"))]
    num_steps: Annotated[int, Ge(1), Le(1000)] = 50
    guidance: Annotated[float, Ge(0)] = 5.0
    prompts: Annotated[int, Ge(1)] = 8
    group_size: Annotated[int, Ge(1)] = 8
    batch_size: Annotated[int, Ge(1)] = 8
    window: Annotated[Component, In("ddpo", among=("window",), members=("first",))] | None = None
    choice: Annotated[Component, In("ddpo", among=("deal",), members=("__call__", "learn"))] | None = None
    credit: Annotated[Component, In("ddpo", among=("credit",), members=("__call__",))] | None = None
    pictures: str | None = None

    @property
    def images(self) -> int:
        """Pictures an iteration."""
        return self.prompts * self.group_size


@dataclass(frozen=True)
class Learning:
    """Config section `optimizer`: AdamW on the LoRA weights.

    Args:
        lr: learning rate.
        updates: optimizer steps an epoch; each takes an equal share of the iteration's groups.
        epochs: times that an iteration's pictures are gone through.
        micro_batch: rows of one backward pass, on each process; gradients add up to the whole update.
        max_grad_norm: gradients are scaled down to this norm.
        weight_decay: AdamW's.
        lr_decay: share of run.iterations, at the run's end, over which the learning rate falls evenly towards zero; 1 is from the
            beginning on, 0 not at all. Gradients' noise then averages out: for what is to settle (samplers), not for what climbs.
        eight_bit: keep Adam's moments in 8 bits (needs bitsandbytes and a GPU).
    """

    lr: Annotated[float, Gt(0)] = 3e-4
    updates: Annotated[int, Ge(1)] = 1
    epochs: Annotated[int, Ge(1)] = 1
    micro_batch: Annotated[int, Ge(1)] = 8
    max_grad_norm: Annotated[float, Gt(0)] = 1.0
    weight_decay: Annotated[float, Ge(0)] = 1e-4
    lr_decay: Annotated[float, Interval(ge=0, le=1)] = 0.0
    eight_bit: bool = False

    def rate(self, done: float) -> float:
        """The learning rate where this share of the run's iterations is done."""
        return self.lr * min(1.0, (1 - done) / self.lr_decay) if self.lr_decay else self.lr

    def build(self, weights: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        """Raises ImportError, with the fix, where eight_bit is asked for and bitsandbytes is not there."""
        if not self.eight_bit:
            return torch.optim.AdamW(weights, self.lr, weight_decay=self.weight_decay)
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError as e:
            raise ImportError("optimizer.eight_bit needs bitsandbytes: pip install 'ddpo[bnb]', or set it to false") from e
        return AdamW8bit(weights, self.lr, weight_decay=self.weight_decay)


@dataclass(frozen=True)
class Evaluating:
    """Config section `evaluation`: held-out prompts, drawn by the deterministic sampler that users will run.

    Args:
        prompts: how many, spread evenly over the held-out list.
        seeds: pictures a prompt; two at least, to measure diversity.
        num_steps: None is rollout.num_steps.
    """

    prompts: Annotated[int, Ge(1)] = 32
    seeds: Annotated[int, Ge(1)] = 2
    num_steps: Annotated[int, Ge(1)] | None = None


@dataclass(frozen=True)
class Health:
    """Config section `health`: when something is wrong with a run (ddpo/health.py has the rules; run.on_alarm says what then).

    Args:
        standard_errors: how far below the base model's an untrained reward, or the diversity, must be, at two evaluations running.
        diversity_warn, diversity_stop: the share of the base model's within-prompt diversity that must be left.
        blank: the share of black, white or flat held-out pictures, above the base model's, that stops the run.
        saturated: the share of pixel values at 0 or 255, above the base model's, that is warned of.
        kl_budget: nats a picture from the base model that stop the run, over the steps that add noise (of a sampler that adds none,
            over DDPM's); None only warns of a large distance.
        zero_spread: the share of prompts whose pictures all score alike that, three iterations running, stops the run.
        spike: robust standard deviations of the gradient's log-norm; an update beyond is skipped, three in ten stop the run.
    """

    standard_errors: Annotated[float, Gt(0)] = 3.0
    diversity_warn: Annotated[float, Interval(ge=0, le=1)] = 0.7
    diversity_stop: Annotated[float, Interval(ge=0, le=1)] = 0.5
    blank: Annotated[float, Ge(0), Le(1)] = 0.05
    saturated: Annotated[float, Ge(0), Le(1)] = 0.05
    kl_budget: Annotated[float, Gt(0)] | None = None
    zero_spread: Annotated[float, Ge(0), Le(1)] = 0.8
    spike: Annotated[float, Gt(0)] = 6.0
