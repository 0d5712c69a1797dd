"""How much of DDPO's gradient is signal, denoising step by denoising step, before the first update.

    python benchmarks/gradient_signal.py configs/menagerie_compressibility.yaml rollout.solver.min_sigma=0

Gradients are taken on independent batches of pictures; their mean pairwise cosine is 1 where all is signal and 0 where all is noise
(about signal / (signal + noise), in squares, while it is small). Steps are compared by norm, too: a step with a large norm and no
signal drowns the others in their sum.
"""

import argparse
import itertools

import torch
from torch import Tensor
from torch.nn import functional as F

from ddpo import experiment, prompts
from ddpo.diffusion import log_prob
from ddpo.noise import Address, permutation
from ddpo.policy import Policy
from ddpo.rewarding import rubrics
from ddpo.rollout import Rollout, collect


def gradients(policy: Policy, rollout: Rollout, size: int) -> dict[int, Tensor]:
    """For each stochastic step, the gradient of mean(advantage * log-probability), flat."""
    weights, out = list(policy.weights.values()), {}
    for step in rollout.stochastic:
        for chunk in rollout.chunks(size):
            view = chunk.transition(step)
            (view.advantage * log_prob(view.x_next, *view.replay(policy))).sum().div(len(rollout)).backward()
        out[step] = torch.cat([w.grad.flatten() for w in weights])
        for w in weights:
            w.grad = None
    return out


def agreement(vectors: list[Tensor]) -> float:
    pairs = [F.cosine_similarity(a, b, dim=0).item() for a, b in itertools.combinations(vectors, 2)]
    return sum(pairs) / len(pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--groups", type=int, default=16, help="prompt groups a batch")
    given = parser.parse_args()
    recipe = experiment.read(given.config, given.overrides, 1).recipe
    acting, (reward, _) = recipe.rollout, rubrics(recipe.rewards, [], recipe.objective)
    policy = Policy(recipe.model.build(), recipe.lora, acting.guidance)
    policy.to(torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu"))
    known = prompts.load(recipe.source)
    order = permutation(len(known), recipe.run.seed, "gradient_signal")
    per_batch: list[dict[int, Tensor]] = []
    for batch in range(given.batches):
        chosen = [known[order[(batch * given.groups + g) % len(known)]] for g in range(given.groups)]
        rows = [p for p in chosen for _ in range(acting.group_size)]
        addresses: list[Address] = [(recipe.run.seed, "gradient_signal", batch, i) for i in range(len(rows))]
        texts = [p.text for p in rows]
        rollout = collect(policy, texts, addresses, acting.solver.build(), acting.num_steps, acting.batch_size, True)
        scores = reward.total(reward.score(rollout.images.float() / 255, texts, [p.metadata for p in rows]))
        rollout.advantages = recipe.advantage.build()(scores, texts).to(policy.family.device)
        per_batch.append(gradients(policy, rollout, acting.batch_size))
    schedule = policy.family.schedule
    sigmas = schedule.level(schedule.times(acting.num_steps)).sigma
    print(
        f"{given.batches} batches of {given.groups} x {acting.group_size} pictures, {acting.num_steps} steps\nstep  sigma     norm  cosine"
    )
    for step in per_batch[0]:
        vectors = [b[step] for b in per_batch]
        norm = sum(v.norm().item() for v in vectors) / len(vectors)
        print(f"{step:4}  {sigmas[step]:.3f}  {norm:.5f}  {agreement(vectors):+.3f}")
    sums = [sum(b.values(), torch.zeros(())) for b in per_batch]
    print(f" sum         {sum(v.norm().item() for v in sums) / len(sums):.5f}  {agreement(sums):+.3f}")


if __name__ == "__main__":
    main()
