"""What is left of "the ratio is one before the first update" in half precision, beside the clip range.

    python benchmarks/ratio.py configs/menagerie_compressibility.yaml rollout.solver.min_sigma=0

Latents are float32 and are stored before they are scored, so that nothing is lost to rounding there (`pitfalls`: rounding after scoring
costs bfloat16 2.6e-3 at the last of 50 steps). What remains is kernels that differ by batch shape: pictures are drawn in batches of
rollout.batch_size and replayed in the same batches, then in batches of half and of one, as a trainer that did not recompute would.
"""

import argparse

import torch
from torch import Tensor

from ddpo import experiment, prompts
from ddpo.diffusion import log_prob
from ddpo.noise import Address
from ddpo.policy import Policy
from ddpo.rollout import Rollout, collect


@torch.no_grad()
def log_ratios(policy: Policy, rollout: Rollout, size: int) -> Tensor:
    """(N, stochastic steps)"""
    rows = []
    for chunk in rollout.chunks(size):
        views = [(chunk.transition(s), chunk.log_probs[:, s]) for s in rollout.stochastic]
        rows.append(torch.stack([log_prob(v.x_next, *v.replay(policy)) - then for v, then in views], 1))
    return torch.cat(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    given = parser.parse_args()
    print(
        "| network | replayed in batches of | largest abs. log ratio | at step | beyond the clip range |\n|---|---|---|---|---|"
    )
    for dtype in ("float32", "bfloat16", "float16"):
        recipe = experiment.read(given.config, [*given.overrides, f"model.dtype={dtype}"], 1).recipe
        acting, clip = recipe.rollout, recipe.algorithm.options["clip"]
        policy = Policy(recipe.model.build(), recipe.lora, acting.guidance)
        policy.to(torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu"))
        texts = [p.text for p in prompts.load(recipe.source)[: acting.batch_size]]
        addresses: list[Address] = [(recipe.run.seed, "ratio", i) for i in range(len(texts))]
        rollout = collect(policy, texts, addresses, acting.solver.build(), acting.num_steps, acting.batch_size, True)
        rollout.advantages = torch.zeros(len(texts), device=policy.family.device)
        for size in (acting.batch_size, acting.batch_size // 2, 1):
            found = log_ratios(policy, rollout, size).abs()
            worst = divmod(int(found.argmax()), found.shape[1])[1]
            print(
                f"| {dtype} | {size} | {found.max():.1e} | {rollout.stochastic[worst]} | {(found > clip).float().mean():.1%} of {clip:g} |"
            )


if __name__ == "__main__":
    main()
