"""MASA (Meta-Awareness via Self-Alignment, arXiv 2510.03259): a model learns to predict its own solutions.

Rooms, from the bottom up: tasks, models, engines, method, gates, runs, analysis, training, recipes, scaleout, lessons.
`masa_lib.method` is to be read first, and then one step of `masa_lib.training.trainer`. Importing the package itself
loads none of them.
"""

import os
from pathlib import Path

__version__ = "0.1.0"

_HERE = Path(__file__).resolve().parent
_INSTALLED = (_HERE / "data").is_dir()  # which an installation puts there, and no checkout has
#: the pocket model, recorded runs, the paper's numbers
DATA = (_HERE if _INSTALLED else _HERE.parent) / "data"
#: where notebooks and what they keep lie: the checkout, or the folder in which an installed package is used
ROOT = Path.cwd() if _INSTALLED else _HERE.parent

# Before torch is imported: threads that spin while they wait make a busy machine ten times slower, not two.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# GPU memory in segments that grow leaves no gaps too small for the next batch; who sets either name decides.
if "PYTORCH_ALLOC_CONF" not in os.environ:
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
