"""`accelerate launch -m masa_lib.scaleout train ...`: the command `masa`, on TRL, in each of the processes."""

import os
import sys

from masa_lib import cli

if __name__ == "__main__":
    if os.environ.get("RANK", "0") != "0":
        os.environ["TQDM_DISABLE"] = "1"
        sys.stdout = open(os.devnull, "w", encoding="utf8")  # noqa: SIM115 (until the process ends)
    sys.exit(cli.main([*sys.argv[1:], "--backend", "trl"]))
