"""What a run will do and need, said before any weights load: `--dry-run`."""

from dataclasses import replace
from typing import Any

import torch

from ddpo import estimate, prompts
from ddpo.models import Family
from ddpo.policy import Policy
from ddpo.recipe import Recipe
from ddpo.rollout import stochastic_steps


def plan(recipe: Recipe) -> str:
    """What a run will do, without loading any weights."""
    acting, learning, run = recipe.rollout, recipe.optimizer, recipe.run
    model: Any = recipe.model.factory
    family = replace(recipe.model, factory=model.outline).build()
    to_act = 0 if acting.pictures else acting.images * acting.num_steps
    passes = 1 if acting.guidance == 1 else 2
    update = acting.images // learning.updates
    stochastic = len(stochastic_steps(family.schedule, acting.solver.build(), acting.num_steps))
    if acting.window:
        stochastic = min(stochastic, acting.window.build().length)
    to_learn = acting.images * learning.epochs * recipe.algorithm.build().passes(stochastic)  # views of pictures
    lines = {
        "an iteration": f"{acting.prompts} prompt groups x {acting.group_size} = {acting.images} pictures, {acting.num_steps} steps each",
        "its updates": f"{learning.updates * learning.epochs}, each of {update} pictures "
        f"in micro-batches of {min(learning.micro_batch, update)}",
        "network passes": f"{to_act * passes:,} to act; {to_learn * passes:,} forward and backward to learn",
        "the run": f"{run.iterations} iterations, {run.iterations * acting.images:,} pictures, "
        f"{run.iterations * learning.updates * learning.epochs:,} updates",
        "evaluations": f"{1 + -(-run.iterations // run.eval_every)}, "
        f"each of {recipe.evaluation.prompts} x {recipe.evaluation.seeds} pictures",
        "prompts": f"{len(recipe.training_prompts())} to train on, {len(prompts.load(recipe.prompts.held_out))} held out",
    }
    return "\n".join(f"{name + ':':16} {text}" for name, text in (lines | _needs(recipe, family, to_act, to_learn)).items())


def _needs(recipe: Recipe, family: Family, to_act: int, to_learn: int) -> dict[str, str]:
    """Memory and time, estimated on an outline of the model."""
    acting, learning = recipe.rollout, recipe.optimizer
    policy, graded = Policy(family, recipe.lora, acting.guidance), recipe.algorithm.build().needs_gradient
    need = estimate.need(policy, acting.batch_size, learning.micro_batch, graded)
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    speed = estimate.speed(device, family.dtype)
    work = to_act * need.act_flops + to_learn * need.learn_flops
    hours = recipe.run.iterations * work / speed / 3600
    assumed = "" if not family.assumed else f" (by its published sizes: {family.source} is not on this machine)"
    return {
        "memory": f"about {need.memory / 1e9:.1f} GB a process{assumed}: {need.weights / 1e9:.1f} of weights, and {need.acting / 1e9:.1f} "
        f"while acting or {need.learning / 1e9:.1f} while learning; scorers come on top",
        "time": f"{work / 1e12:,.1f} TFLOP an iteration; all iterations would take {hours:,.2f} h at the {speed / 1e12:.2f} TFLOP/s that "
        f"matrix products reach on this {device.type} now, and longer as networks stay below that",
    }
