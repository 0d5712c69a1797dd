"""A whole config file, and what in it cannot go together."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from ddpo import offline, prompts
from ddpo.config import Component, In
from ddpo.models._common import BUILT_IN
from ddpo.models._files import require_usable
from ddpo.models._kind import refuse_other_family
from ddpo.policy import LoRA
from ddpo.prompts import Prompt
from ddpo.rewarding import Objective, Scorer, lack_of_gradient, part
from ddpo.sections import Acting, Evaluating, Health, Learning, Prompts, Run


@dataclass(frozen=True)
class Recipe:
    """A whole config file."""

    model: Annotated[Component, In("ddpo.models", members=("denoise", "decode"))]
    prompts: Prompts
    rollout: Acting
    algorithm: Annotated[Component, In("ddpo.algorithms", members=("views", "loss"))]
    advantage: Annotated[Component, In("ddpo", among=("advantage",), members=("__call__", "smallest_group"))]
    rewards: list[Scorer]
    held_out_rewards: list[Scorer] = field(default_factory=list)
    run: Run = field(default_factory=Run)
    lora: LoRA = field(default_factory=LoRA)
    optimizer: Learning = field(default_factory=Learning)
    evaluation: Evaluating = field(default_factory=Evaluating)
    objective: Objective = field(default_factory=Objective)
    trackers: list[Annotated[Component, In("ddpo.trackers")]] = field(default_factory=list)
    health: Health = field(default_factory=Health)

    def problems(self) -> Iterator[tuple[str, str]]:
        """Options that are right by themselves and cannot go together."""
        yield from self._model()
        yield from self._pictures()
        for key in ("train", "held_out"):
            if (source := getattr(self.prompts, key)) is None:
                continue
            try:
                prompts.load(source)
            except (prompts.PromptError, OSError) as e:
                yield f"prompts.{key}", str(e)
        yield from self._algorithm()
        yield from self._credit()
        yield from self._scorers()

    def _model(self) -> Iterator[tuple[str, str]]:
        """What is wrong with a model's folder. A hub id is asked for when the model loads."""
        pipeline, path = getattr(self.model.factory, "pipeline", None), self.model.options.get("path")
        if pipeline is None or not isinstance(path, str):
            return
        try:
            require_usable(place := BUILT_IN.get(path, path), tuple(BUILT_IN))
            if Path(place).is_dir():
                refuse_other_family(place, None, pipeline)
        except (ValueError, OSError) as e:
            yield "model.path", str(e)

    def _algorithm(self) -> Iterator[tuple[str, str]]:
        """What the algorithm cannot learn from."""
        algorithm, solver, advantage = self.algorithm.build(), self.rollout.solver.build(), self.advantage.build()
        if refusal := algorithm.refusal(solver):
            yield "rollout.solver", refusal
        if self.rollout.window and not solver.stochastic:
            yield (
                "rollout.window",
                f"says where {solver} adds noise, and it adds none; set rollout.window=null, or take another solver",
            )
        if algorithm.memoryless and self.rollout.window:
            yield "rollout.window", f"{self.algorithm.name} needs the sampler's noise in every step; set rollout.window=null"
        if algorithm.memoryless and self.rollout.guidance != 1:
            yield (
                "rollout.guidance",
                f"is {self.rollout.guidance:g}; with guidance a path does not forget its start, which {self.algorithm.name} needs: "
                "set rollout.guidance=1",
            )
        for named, chosen in ((self.algorithm, algorithm), (self.advantage, advantage)):
            if self.rollout.group_size < chosen.smallest_group:
                yield (
                    "rollout.group_size",
                    f"is {self.rollout.group_size}; {named.name} compares pictures of one prompt and needs at least "
                    f"{chosen.smallest_group}: raise it, or use algorithm: {{name: ddpo:DDPO}} with "
                    "advantage: {name: advantage:PerPrompt}",
                )
                break
        if algorithm.needs_units and not advantage.in_units:
            yield (
                "advantage",
                f"{self.algorithm.name} weighs rewards against a temperature, and {self.advantage.name} changes their unit; use "
                '{name: "advantage:LeaveOneOut"}',
            )
        if algorithm.needs_units and self.objective.normalise != "none":
            yield (
                "objective.normalise",
                f"is {self.objective.normalise}, which changes the unit of the rewards, and {self.algorithm.name} weighs them against a "
                "temperature; set it to none",
            )
        if algorithm.last_steps > self.rollout.num_steps:
            yield "algorithm.steps", f"is {algorithm.last_steps}; it can be rollout.num_steps={self.rollout.num_steps} at most"
        if algorithm.on_policy and self.optimizer.updates * self.optimizer.epochs > 1:
            yield (
                "optimizer.updates",
                f"{self.algorithm.name} is right for the first update of a rollout only; set optimizer.updates=1 and "
                "optimizer.epochs=1, or use algorithm: {name: ddpo:DDPO}",
            )

    def _credit(self) -> Iterator[tuple[str, str]]:
        """What steps cannot be paid one by one for."""
        if self.rollout.credit is None:
            return
        if not self.algorithm.build().credits_steps:
            yield (
                "rollout.credit",
                f"{self.algorithm.name} gives a step no advantage of its own that rollout.credit could set; use algorithm: "
                "{name: ddpo:DDPO} or one of grpo, or set rollout.credit=null",
            )
        if self.advantage.build().state():  # gains of steps would pass for rewards of pictures in what it remembers
            yield (
                "advantage",
                f"{self.advantage.name} remembers rewards, and rollout.credit compares gains; use {{name: advantage:GroupRelative}}, "
                "or set rollout.credit=null",
            )
        if self.objective.normalise != "none":
            yield "objective.normalise", "gives each step's pictures a unit of their own; with rollout.credit set it to none"

    @property
    def source(self) -> str:
        """The file or list that the prompts to train on are from."""
        return self.rollout.pictures or self.prompts.train or ""

    def training_prompts(self) -> list[Prompt]:
        """What an iteration's groups are dealt from; of `rollout.pictures`, with their pictures."""
        return [*offline.read(self.source)] if self.rollout.pictures else prompts.load(self.source)

    def _pictures(self) -> Iterator[tuple[str, str]]:
        """What is wrong with learning from pictures, or with learning from none."""
        given, size, algorithm = self.rollout.pictures, self.rollout.group_size, self.algorithm.build()
        if given is None:
            if self.prompts.train is None:
                yield "prompts.train", "missing; name prompts to draw pictures of, or pictures to learn from (rollout.pictures)"
            return
        if self.prompts.train not in (None, given):
            yield "prompts.train", "is not used, for rollout.pictures brings its own prompts; set prompts.train=null"
        if algorithm.needs_trajectory or algorithm.needs_gradient:
            yield (
                "rollout.pictures",
                f"{self.algorithm.name} learns from how its own pictures are drawn, and these are drawn already; use "
                "algorithm: {name: dpo:DiffusionDPO} or one of forward (RWR, RAFT, NFT, AWM), or set rollout.pictures=null",
            )
        try:
            smallest = min(offline.read(given), key=lambda group: len(group.pictures))
        except (offline.PictureError, OSError) as e:
            yield "rollout.pictures", str(e)
            return
        if size > len(smallest.pictures):
            yield (
                "rollout.group_size",
                f"is {size}, and {smallest.pictures[0].place} is of a prompt with {len(smallest.pictures)} pictures: use "
                f"{len(smallest.pictures)}, or add pictures",
            )

    def _scorers(self) -> Iterator[tuple[str, str]]:
        """What scorers say of their options. Last, for some import their library to know."""
        if not self.rewards:
            yield "rewards", "there is none; name at least one, such as {name: jpeg:Compressibility}"
        for i, component in enumerate(self.held_out_rewards):
            if component.extra.floor is not None:
                yield (
                    f"held_out_rewards.{i}.floor",
                    "only watched; move it to rewards, where weight: 0 makes it a floor and no more",
                )
        graded = self.algorithm.build().needs_gradient
        if graded and self.objective.normalise != "none":
            yield "objective.normalise", f"{self.algorithm.name} follows the rewards' own gradient: set it to none"
        for key in ("rewards", "held_out_rewards"):
            for i, component in enumerate(getattr(self, key)):
                try:
                    reward = part(component).reward
                except (ValueError, OSError, ImportError) as e:
                    yield f"{key}.{i}", str(e)
                    continue
                if key == "rewards" and graded and (lack := lack_of_gradient(component, reward)):
                    learns = f"{self.algorithm.name} learns from the reward's gradient, and {component.name}"
                    yield f"{key}.{i}", f"{learns} {lack}, or use algorithm: {{name: ddpo:DDPO}}"

    def shares(self, processes: int) -> Iterator[tuple[str, str]]:
        """What does not divide: groups by updates and processes, and their pictures by batches."""
        parts = self.optimizer.updates * processes
        if self.rollout.prompts % parts:
            yield (
                "rollout.prompts",
                f"is {self.rollout.prompts}; it must be a multiple of optimizer.updates x processes = {self.optimizer.updates} x "
                f"{processes} = {parts}, because a prompt group stays on one process: use {-(-self.rollout.prompts // parts) * parts}",
            )
            return
        update = self.rollout.images // parts
        for key, size, rows in (
            ("rollout.batch_size", self.rollout.batch_size, self.rollout.images // processes),
            ("optimizer.micro_batch", self.optimizer.micro_batch, update),
        ):
            if size < rows and rows % size:
                fitting = [n for n in range(1, size + 1) if rows % n == 0]
                yield key, f"is {size}; each process has {rows} pictures for it, which it must divide: use {fitting[-1]}"
