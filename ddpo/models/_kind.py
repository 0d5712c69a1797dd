"""What a model is, and whether it belongs to a family: asked before any weights are read."""

import importlib
import inspect
import pkgutil
from pathlib import Path
from typing import Any

from torch import nn

from ddpo import models
from ddpo.models._files import read_index


def refuse_other_family(path: str | Path, revision: str | None, pipeline: str, local_files_only: bool = False) -> None:
    """Read the `model_index.json` of a diffusers folder or hub id.

    Args:
        pipeline: the diffusers class that the asking family is made for.

    Raises:
        ValueError: it is another class's; the message names the family to use, where there is one.
        UnusableModel: there is no such model (of a hub id with `local_files_only`: not on this machine).
    """
    found = read_index(path, revision, local_files_only)["_class_name"]
    if found != pipeline:
        family = family_of(found)
        advice = f"set model.name={family}" if family else "no family in ddpo.models takes it"
        raise ValueError(f"{path} is a {found}, not a {pipeline}: {advice}")


def family_of(pipeline: str) -> str | None:
    """The `model.name` of the family whose `pipeline` attribute is this diffusers class. The folder is the registry."""
    for info in pkgutil.iter_modules(models.__path__):
        if not info.name.startswith("_"):
            module = importlib.import_module(f"{models.__name__}.{info.name}")
            own = [kind for _, kind in inspect.getmembers(module, inspect.isclass) if kind.__module__ == module.__name__]
            if pipeline in [getattr(kind, "pipeline", None) for kind in own]:
                return info.name
    return None


def network_class(entry: Any) -> Any:
    """diffusers' or transformers' class of a network, by its entry in a `model_index.json`; None of what else is listed there."""
    library, name = entry if isinstance(entry, list) and len(entry) == 2 else (None, None)
    kind = getattr(importlib.import_module(library), str(name), None) if library in ("diffusers", "transformers") else None
    return kind if inspect.isclass(kind) and issubclass(kind, nn.Module) else None


def refuse_other_schedule(path: str, config: Any, *unknown: str) -> None:
    """Raises ValueError where a scheduler's config asks for what no flow here knows, or for one of these options."""
    if config["_class_name"] != "FlowMatchEulerDiscreteScheduler":
        raise ValueError(f"{path} is sampled by {config['_class_name']}; known is FlowMatchEulerDiscreteScheduler")
    for option in (*unknown, *OTHER_SCHEDULES):
        if config.get(option):
            raise ValueError(f"{path} has {option} in its scheduler's config, which this family does not know")


OTHER_SCHEDULES = (
    "shift_terminal", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "invert_sigmas", "stochastic_sampling",
)  # fmt: skip
