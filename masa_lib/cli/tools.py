"""Commands around a training: models, plan, problems, pocket, lab."""

from __future__ import annotations

import argparse
import importlib.util
import os
import shlex
import sys
from pathlib import Path

from masa_lib import ROOT
from masa_lib.cli.parsing import SHORT, command, config_from, option, table
from masa_lib.errors import MasaError
from masa_lib.models import tiers


@command("models", "list the model tiers and their defaults")
def _models(options: argparse.Namespace) -> None:
    print(table(tiers.table()))


def _gigabytes(text: str) -> float:
    """`80GB`, `80 GB` or `80` as a number; argparse turns the errors into a sentence."""
    size = float(text.upper().removesuffix("GB"))
    if not 0 < size < 10**6:
        raise ValueError
    return size


_gigabytes.__name__ = "size"  # argparse names it in its sentence


@command("plan", "the memory that a training needs, before anything is loaded",
         option("--gpu", metavar="SIZE", type=_gigabytes, default=0.0,
                about="of the GPU, as 80GB (default: what this computer has)"),
         option("--table", action="store_true", about="all tiers on GPUs of several sizes, as Markdown"),
         option("--hours", action="store_true", about="how long it takes on some GPUs and what it writes, estimated"),
         short=tuple(SHORT))
def _plan(options: argparse.Namespace) -> None:
    from masa_lib.models import memory, time_plan

    if options.table:
        print(memory.table())
        return
    settings = config_from(options)
    try:
        print(time_plan.text(settings) if options.hours else memory.text(settings, options.gpu))
    except memory.PlanError:
        if tiers.parameters(settings.model.name):
            print(tiers.explain(settings, bool(options.gpu) or None))
        raise


@command("problems", "list the problem sources, or show examples of one",
         option("source", metavar="SOURCE", nargs="?", about="show examples of this one"),
         option("--count", type=int, default=5, about="how many examples (default: 5)"),
         option("--split", choices=("train", "evaluation"), default="train", about="default: train"))
def _problems(options: argparse.Namespace) -> None:
    from masa_lib.tasks import problems

    if options.source is None:
        print(table(problems.sources()))
        return
    for problem in problems.load_problems(options.source, options.split, options.count):
        print(f"{problem.id} (level {problem.level})\n{problem.text}\n  answer: {problem.answer}\n")


@command("pocket", "make the bundled model from nothing (under an hour)",
         option("action", choices=("build",), metavar="build"),
         option("--out", metavar="FOLDER", default=Path("runs/pocket"), about="default: runs/pocket"),
         option("--seed", type=int, default=0))
def _pocket_build(options: argparse.Namespace) -> None:
    from masa_lib.recipes import pocket

    pocket.build(options.out, pocket.Recipe(seed=options.seed))
    print(f"Made: {options.out}. `masa train --model {shlex.quote(str(options.out))}` trains it.")


@command("lab", "open the notebooks in JupyterLab; other options are passed on to it", passes_on=True)
def _lab(options: argparse.Namespace) -> None:
    if importlib.util.find_spec("jupyterlab") is None:
        raise MasaError("JupyterLab is not installed. It comes with the extra `lab`: `make install`, or "
                        "`pip install -e '.[lab]'` in the repository; elsewhere open the notebooks with what there is.")
    # The root, as the notebooks show pictures from docs, beside their own folder.
    there = (ROOT / "notebooks").exists()
    place = [str(ROOT), "--LabApp.default_url=/lab/tree/notebooks/00_start_here.ipynb"] if there else []
    if not there:
        print("The notebooks do not come with the installed package: clone the repository, and give this command "
              "in its folder.", file=sys.stderr)
    sys.stdout.flush()
    # In the place of this process, so that a signal that is meant to end it ends JupyterLab.
    os.execv(sys.executable, [sys.executable, "-m", "jupyterlab", *options.rest, *place])
