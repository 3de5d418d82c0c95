"""What every test stands on: one thread, no network, examples that repeat.

The `slow` marker and the warnings that count as errors stand in pyproject.toml.
"""

import os
import signal
import sys
from pathlib import Path

# The scripts of site/ import each other.
sys.path.append(str(Path(__file__).resolve().parent.parent / "site"))

# Before torch is imported, here or in a process that a test starts: two cores, many processes, one thread each.
for name, value in {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
                    "HF_HUB_OFFLINE": "1", "PYTHONUTF8": "1"}.items():
    os.environ.setdefault(name, value)

# A suite that was started in the background ignores SIGINT and SIGHUP, and so would the commands that the tests stop.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

from hypothesis import HealthCheck, settings

# No deadline: how long an example takes says more about the machine than about the code.
settings.register_profile("suite", deadline=None, derandomize=True, max_examples=60,
                          suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")
