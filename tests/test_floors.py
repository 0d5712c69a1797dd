"""Which file may import what. If this fails, a wall of the house was broken: move the code, not the wall."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
FLOORS = [  # a room may import from the floors above its own line, never sideways
    {
        "rewards",
        "ddpo.diffusion",
        "ddpo.noise",
        "ddpo.advantage",
        "ddpo.prompts",
        "ddpo.config",
        "ddpo.meters",
        "ddpo.durable",
        "ddpo.figures",
        "ddpo.memory",
    },
    {"ddpo.models", "ddpo.menagerie", "ddpo.jsonl"},
    {"ddpo.policy", "ddpo.runs"},
    {"ddpo.rollout", "ddpo.deal", "ddpo.estimate", "ddpo.checkpoint", "ddpo.journal", "ddpo.sections", "ddpo.rewarding"},
    {
        "ddpo.algorithms",
        "ddpo.offline",
        "ddpo.window",
        "ddpo.evaluate",
        "ddpo.health",
        "ddpo.report",
        "ddpo.export",
        "ddpo.progress",
        "ddpo.trackers",
        "ddpo.votes",
    },
    {"ddpo.trainer"},
    {"ddpo.train", "ddpo.cli", "ddpo.experiment", "ddpo.app"},
]
PARTS_OF = {  # a room too large for one file
    "ddpo.schedule": "ddpo.diffusion", "ddpo.credit": "ddpo.advantage", "ddpo.wording": "ddpo.config",
    "ddpo.components": "ddpo.config", "ddpo.yaml_lines": "ddpo.config", "ddpo.manifest": "ddpo.checkpoint",
    "ddpo.page": "ddpo.report", "ddpo.learner": "ddpo.trainer", "ddpo.actor": "ddpo.trainer", "ddpo.plan": "ddpo.experiment",
    "ddpo.recipe": "ddpo.experiment",
    "ddpo.judge": "ddpo.trainer", "ddpo.views": "ddpo.rollout", "ddpo.scorers": "ddpo.cli", "ddpo.doctor": "ddpo.cli",
    "ddpo.critic": "ddpo.algorithms", "ddpo.card": "ddpo.report", "ddpo.finish": "ddpo.experiment", "ddpo.push": "ddpo.cli",
    "ddpo.updates": "ddpo.health", "ddpo.drift": "ddpo.evaluate", "ddpo.meeting": "ddpo.trainer", "ddpo.state": "ddpo.trainer",
    "ddpo.watch": "ddpo.trainer", "ddpo.studio": "ddpo.experiment", "ddpo.panel": "ddpo.experiment", "ddpo.shots": "ddpo.experiment",
    "ddpo.sheet": "ddpo.experiment", "ddpo.offer": "ddpo.experiment", "ddpo.tally": "ddpo.votes", "ddpo.ballot": "ddpo.votes",
}  # fmt: skip
SHARED = {
    ("ddpo.cli", "ddpo.train"), ("ddpo.cli", "ddpo.experiment"), ("ddpo.train", "ddpo.experiment"), ("ddpo.cli", "ddpo.app"),
    ("ddpo.app", "ddpo.experiment"),
}  # fmt: skip
ONLY_IN = {
    "diffusers": {"ddpo.models", "ddpo.menagerie"}, "peft": {"ddpo.policy"}, "accelerate": {"ddpo.trainer", "ddpo.experiment"},
    "rich": {"ddpo.progress", "ddpo.menagerie"}, "open_clip": {"rewards", "ddpo.menagerie"}, "gradio": {"ddpo.app"},
    "tensorboard": {"ddpo.trackers"}, "trackio": {"ddpo.trackers"}, "wandb": {"ddpo.trackers"},
}  # fmt: skip


def room(module):
    module = PARTS_OF.get(module, module)
    rooms = [r for floor in FLOORS for r in floor if module == r or module.startswith(r + ".")]
    return max(rooms, key=len, default=None)


def floor(module):
    return next((i for i, rooms in enumerate(FLOORS) if room(module) in rooms), None)


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{a.name}" for a in node.names if node.module == "ddpo")


def modules():
    for path in sorted([*ROOT.glob("ddpo/**/*.py"), *ROOT.glob("rewards/**/*.py")]):
        yield ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"), path


def test_every_file_has_a_room():
    assert [name for name, _ in modules() if name != "ddpo" and floor(name) is None] == []


def test_imports_go_down_only():
    broken = []
    for me, path in modules():
        if me == "ddpo":
            continue
        for name in imports(path):
            if floor(name) is None or room(name) == room(me) or (room(me), room(name)) in SHARED:
                continue
            if floor(name) >= floor(me):
                broken.append(f"{me} imports {name}")
    assert not broken


def test_heavy_libraries_stay_in_their_rooms():
    broken = []
    for me, path in modules():
        for name in imports(path):
            allowed = ONLY_IN.get(name.split(".")[0])
            if allowed is not None and room(me) not in allowed:
                broken.append(f"{me} imports {name}")
    assert not broken


def test_rewards_know_nothing_of_ddpo():
    assert not [me for me, path in modules() if me.startswith("rewards") for name in imports(path) if name.startswith("ddpo")]
