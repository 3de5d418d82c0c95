"""The model that a reader chose in notebook 00, for the notebooks after it.

The choice is a name in a file, `runs/model.txt`. Deliberately no loading and no look at whether it fits:
`masa_lib.models` do that. Automatic checks (`MASA_SMOKE=1`) neither change the choice nor follow it.
"""

from __future__ import annotations

from pathlib import Path

from masa_lib import ROOT
from masa_lib import crash_safe_files as files
from masa_lib.lessons.environment import SMOKE
from masa_lib.models import memory, tiers

DEFAULT = "pocket"
PLACE = ROOT / "runs" / "model.txt"


def choose(name: str) -> str:
    """Keep a model for all notebooks.

    Args:
        name: a tier's name, a Hugging Face id, or a folder (kept with its full path).

    Returns:
        The name as it is kept.

    Raises:
        HubError: there is no such model; the choice before it stands.
    """
    kept = name.strip()
    if tiers.find(kept) is None:  # a tier needs no network to be chosen
        tiers.reach(kept)
        if Path(kept).is_dir():
            kept = str(Path(kept).resolve())
    if not SMOKE:
        PLACE.parent.mkdir(exist_ok=True)
        files.replace(PLACE, lambda temporary: temporary.write_text(kept, encoding="utf8"))
    return kept


def chosen() -> str:
    """The model that was chosen last; before any choice the pocket model."""
    return PLACE.read_text(encoding="utf8") if PLACE.is_file() and not SMOKE else DEFAULT


def gpu_memory() -> float:
    """GB of this computer's GPU; 0 where there is none, and in automatic checks, which train on none."""
    import torch

    if SMOKE or not torch.cuda.is_available():
        return 0.0
    return torch.cuda.get_device_properties(0).total_memory / memory.GB  # pragma: no cover
