"""Put the notebooks back after play: `python site/reset.py`. It says what it will do, does it, and loses nothing.

Notebooks that differ from the committed ones are copied to `kept/<day-time>/` and restored; what lies in `runs/` is
moved there. Notebooks of one's own, the runs of `make run` and everything outside these two folders stay. While
something trains nothing is touched. The standard library alone is needed.
"""

from __future__ import annotations

import datetime
import fcntl
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
#: in `runs/`: what `make run` wrote
STAYS = ("laptop",)


@dataclass(frozen=True)
class Plan:
    """What a reset of a repository will do; `kept` is the folder that takes copies and runs."""

    root: Path
    kept: Path
    changed: list[Path]
    runs: list[Path]
    checkpoints: list[Path]

    def __str__(self) -> str:
        kept = self.kept.relative_to(self.root)
        said = [*(f"copy {path} to {kept}/ and restore it" for path in self.changed),
                *(f"move {path} to {kept}/" for path in self.runs),
                *(f"delete {path} (JupyterLab's own copies)" for path in self.checkpoints)]
        return "\n".join(f"* {line}" for line in said) or "Nothing to do: the notebooks are as they were committed."

    def carry_out(self) -> None:
        """Do it: first the copies, so that what is restored is safe."""
        for path in self.changed:
            if (self.root / path).exists():
                self._place(path)
                shutil.copy2(self.root / path, self.kept / path)
        if self.changed:
            git(self.root, "restore", "--source=HEAD", "--worktree", "--", *map(str, self.changed))
        for path in self.runs:
            self._place(path)
            shutil.move(self.root / path, self.kept / path)
        for path in self.checkpoints:
            shutil.rmtree(self.root / path)

    def _place(self, path: Path) -> None:
        (self.kept / path).parent.mkdir(parents=True, exist_ok=True)


def git(root: Path, *command: str) -> str:
    """What git says; SystemExit with a sentence where it refuses or is missing."""
    try:
        return subprocess.run(["git", *command], cwd=root, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        why = (getattr(error, "stderr", "") or str(error)).strip().splitlines()[0]
        raise SystemExit(f"The notebooks cannot be restored, as git does not work here ({why}). Nothing was changed; "
                         "fresh ones are in a new clone of the repository.") from error


def plan(root: Path, now: datetime.datetime) -> Plan:
    """What a reset would do at this moment; SystemExit where something trains in `runs/`."""
    names = git(root, "diff", "--name-only", "-z", "--relative", "HEAD", "--", "notebooks/*.ipynb").split("\0")
    runs = [path for path in sorted((root / "runs").glob("*")) if path.name not in STAYS]
    if busy := [lock.parent for path in runs for lock in path.rglob(".lock") if is_held(lock)]:
        raise SystemExit(f"{busy[0].relative_to(root)} is still being trained. Stop it first, in its panel or by "
                         "Ctrl-C; nothing was changed.")
    checkpoints = sorted((root / "notebooks").rglob(".ipynb_checkpoints"))
    return Plan(root, root / "kept" / now.strftime("%Y-%m-%d-%H%M%S"), [Path(name) for name in names if name],
                *([path.relative_to(root) for path in paths] for paths in (runs, checkpoints)))


def is_held(lock: Path) -> bool:
    """Whether a process holds the lock of a run."""
    with lock.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


if __name__ == "__main__":
    wanted = plan(Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else ROOT, datetime.datetime.now())
    print(wanted, flush=True)
    wanted.carry_out()
    if wanted.kept.exists():
        print(f"Done. What you had is in {wanted.kept.relative_to(wanted.root)}/.")
