"""Reading a checkpoint: a training's state and its optimiser's moments, from files that may be anybody's.

`Trainer` writes them; nothing in them is executed, and what does not fit is one sentence.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from masa_lib import crash_safe_files as files
from masa_lib.errors import brief
from masa_lib.models import tensors
from masa_lib.runs.checkpoints import CheckpointError


def read_state(folder: Path, step: int | None = None) -> dict[str, Any]:
    """What a checkpoint's `state.json` holds: finished `step`, `cursor` in the problems, memory of gates.

    Raises:
        CheckpointError: it is not what `Trainer` writes, or not that of `step`.
    """
    try:
        found = files.read_json(folder / "state.json")
        state = {"gates": {}, "token_budget": None, "solution_norm": 0.0} | found
        numbers = [state["step"], state["cursor"], 0 if state["token_budget"] is None else state["token_budget"]]
        if (any(type(number) is not int or not 0 <= number < 2**53 for number in numbers)
                or not isinstance(state["gates"], dict)
                or not 0.0 <= state["solution_norm"] < math.inf):
            raise ValueError(f"it holds {brief(found)}")
        if step not in (None, state["step"]):
            raise ValueError(f"it is of step {state['step']}")
    except (OSError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(f"its state.json is not that of a training ({error})") from error
    return state


def read_moments(folder: Path, shapes: Sequence[torch.Size], device: torch.device | str) -> dict[int, Any]:
    """AdamW's moments of a checkpoint by the number of the parameter; nothing in the file is executed.

    Args:
        folder: of the checkpoint.
        shapes: of the trained parameters, in their order.
        device: of the moments.

    Raises:
        CheckpointError: the file is of another optimiser or model, or cannot be read.
    """
    try:
        found = torch.load(folder / "optimizer.pt", map_location=device, weights_only=True)
        state = found["state"]
        fits = set(state) == set(range(len(shapes))) and all(
            set(entry) == {"step", "exp_avg", "exp_avg_sq"} and float(entry["step"]) >= 1
            and all(entry[name].shape == shapes[number] for name in ("exp_avg", "exp_avg_sq"))
            for number, entry in state.items())
        broken = fits and any(tensors.not_finite(entry) for entry in state.values())
    except (MemoryError, torch.OutOfMemoryError):
        raise  # says nothing of the file
    except pickle.UnpicklingError as error:  # its own sentence tells how to execute what the file holds
        raise CheckpointError("its optimizer.pt cannot be read: it holds something else than tensors") from error
    except Exception as error:  # of the unpickler, or of what a stranger's file holds: types without a common base
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise CheckpointError(f"its optimizer.pt cannot be read ({reason})") from error
    if not fits:
        raise CheckpointError("its optimizer.pt is of another optimiser or of another model")
    if broken:
        raise CheckpointError("its optimizer.pt holds NaN or infinity")
    return state


def restore_optimizer(optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Take up a checkpoint's moments; learning rate and the like stay those of the config and of this machine."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments = read_moments(folder, [parameter.shape for parameter in parameters], parameters[0].device)
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
