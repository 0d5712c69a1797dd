"""What of a run is in a checkpoint, so that a resumed run goes on exactly where it was."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddpo import checkpoint, report
from ddpo.checkpoint import Tensors
from ddpo.durable import explained, replace

if TYPE_CHECKING:
    from ddpo.trainer import Trainer


def pack(trainer: Trainer) -> tuple[Tensors, dict[str, Any]]:
    """(tensors by file, the rest as JSON)."""
    learner = trainer.learner
    optimizer, scalars = checkpoint.pack_optimizer(learner.optimizer, list(trainer.policy.weights))
    multipliers, learned = trainer.task.rewards.state()
    state = {
        "iteration": trainer.iteration, "images": trainer.images, "salt": trainer.salt, "optimizer": scalars,
        "baseline": trainer.baseline.state(), "rewards": multipliers, "advantage": trainer.advantage.state(),
        "choice": trainer.deal.choice.state(), "scaler": learner.scaler.state_dict(), "seconds": trainer.clock.total(),
        "health": trainer.monitor.state(), "rollbacks": trainer.rollbacks,
        "processes": trainer.accelerator.num_processes,
        "batches": {"drawing": trainer.batch.size, "learning": learner.batch.size},
    }  # fmt: skip
    tensors = {"lora": {k: w.detach() for k, w in trainer.policy.weights.items()}, "optimizer": optimizer, "rewards": learned}
    tensors["selves"] = trainer.policy.selves()
    if learner.critic is not None:
        tensors["critic"], tensors["critic_optimizer"], state["critic"] = learner.critic.state()
    return tensors, state


def save(trainer: Trainer) -> None:
    """Write a checkpoint of this iteration; those that are best and safest stay beside the newest."""
    tensors, state = pack(trainer)
    root, best, pins = trainer.folder / "checkpoints", trainer.baseline.best, (trainer.baseline.best, trainer.baseline.safe)

    def write() -> None:
        checkpoint.save(root, trainer.iteration, tensors, state, trainer.identity, pin=pins)
        with explained(f"{root / 'best'} was not written, the checkpoint is"):
            replace(root / "best", f"{checkpoint.folder_of(root, best).name}\n".encode())

    trainer.meeting.on_main(write)


def resume(trainer: Trainer) -> None:
    """Go on from the newest whole checkpoint of the run's folder, if there is one."""
    root = trainer.folder / "checkpoints"
    trainer.meeting.on_main(lambda: checkpoint.sweep(root))
    found = checkpoint.latest(root, trainer.display.say)
    if found is not None:
        trainer.clock.resume(return_to(trainer, found))
        trainer.display.say(f"resuming after iteration {trainer.iteration} from {found}")
    else:
        trainer.meeting.on_main(lambda: report.cut(trainer.folder, -1))


def return_to(trainer: Trainer, path: Path, left: str = "") -> float:
    """Be as at this checkpoint. What metrics say of later iterations is cut off, and kept in a file of the name `left`, if any.

    Returns:
        the seconds that the run had taken.
    """
    seconds = unpack(trainer, path)
    trainer.meeting.on_main(lambda: report.cut(trainer.folder, trainer.iteration, left))
    return seconds


def unpack(trainer: Trainer, path: Path) -> float:
    """Put the trainer back to where it was at this checkpoint. Returns the seconds that the run had taken.

    Raises:
        ddpo.checkpoint.CheckpointError: it is damaged, of a run with other settings, or holds what this program cannot read.
    """
    saved = checkpoint.load(path, trainer.identity)
    with checkpoint.understood(path):
        return _take(trainer, saved)


def _take(trainer: Trainer, saved: checkpoint.Checkpoint) -> float:
    learner, state, tensors = trainer.learner, saved.state, saved.tensors
    trainer.iteration, trainer.images, trainer.salt = state["iteration"], state["images"], state["salt"]
    trainer.baseline.load_state(state["baseline"])
    trainer.task.rewards.load_state(state["rewards"], tensors["rewards"])
    trainer.policy.load(saved.like("lora", trainer.policy.weights))
    trainer.policy.load_selves(tensors["selves"])
    checkpoint.unpack_optimizer(learner.optimizer, list(trainer.policy.weights), tensors["optimizer"], state["optimizer"])
    if learner.critic is not None:
        learner.critic.load_state(tensors["critic"], tensors["critic_optimizer"], state["critic"])
    trainer.advantage.load_state(state["advantage"])
    trainer.deal.choice.load_state(state["choice"])
    learner.scaler.load_state_dict(state["scaler"])
    trainer.monitor.load_state(state["health"])
    trainer.rollbacks = state["rollbacks"]
    for batch, name in ((trainer.batch, "drawing"), (learner.batch, "learning")):
        batch.size = min(batch.size, state["batches"][name])
    before, now = state.get("processes"), trainer.accelerator.num_processes
    if before not in (None, now):
        trainer.display.say(
            f"{saved.path} was written by {before} process{'es' * (before > 1)}, now {now}: the same but for the last bits"
        )
    return state["seconds"]
