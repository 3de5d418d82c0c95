"""Takes `data/` along into the installed package; all else stands in pyproject.toml."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

#: what git does not keep, either
LEFT = shutil.ignore_patterns("checkpoints", "tensorboard", "*report.html", ".*")


class BuildWithData(build_py):
    """Copies `data/` to `masa_lib/data`, where `masa_lib.DATA` finds it; an editable installation needs no copy."""

    def run(self) -> None:
        """Build the package, and put the data into it."""
        super().run()
        target = Path(self.build_lib) / "masa_lib" / "data"
        if not self.editable_mode:
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree("data", target, ignore=LEFT)


setup(cmdclass={"build_py": BuildWithData})
