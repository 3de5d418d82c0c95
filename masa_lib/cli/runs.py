"""Commands that train and measure a model: train, resume, eval, chat, probe, warmup, export."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any

from masa_lib import config
from masa_lib.cli.parsing import (
    CHECKPOINT,
    JSON,
    MEASURED,
    RUN,
    SHORT,
    SIGNALS,
    command,
    config_from,
    measures,
    option,
)
from masa_lib.models import tiers

BESIDE = option("--out", metavar="FOLDER", about="default: runs/MODEL-COMMAND")


@command("train", "train a model", option("--out", metavar="FOLDER", about="default: runs/MODEL-METHOD-sSEED"),
         option("--ignore-plan", action="store_true", about="begin although the memory plan does not fit"),
         short=tuple(SHORT), epilog=SIGNALS, interrupted=lambda options: _how_to_resume(options.out))
def _train(options: argparse.Namespace) -> None:
    settings = config_from(options)
    model = Path(settings.model.name).name or "model"
    options.out = options.out or Path("runs") / f"{model}-{settings.method}-s{settings.seed}"
    from masa_lib.runs.folder import is_run

    if is_run(options.out):
        raise config.ConfigError(f"{options.out} holds a run already: `masa resume {shlex.quote(str(options.out))}` "
                                 "continues it, and --out names another place.")
    _check_plan(settings, options)
    from masa_lib.training import drive

    run = drive.train(settings, options.out, options.command)
    print(f"Trained: {run.path}. `masa compare {shlex.quote(str(run.path))}` shows what came of it.")


def _check_plan(settings: config.Config, options: argparse.Namespace) -> None:
    """Print the memory plan.

    Raises:
        PlanError: it does not fit.
    """
    from masa_lib.models import memory

    try:
        said, fits = memory.judge(settings)
    except memory.PlanError as error:
        guessed = tiers.explain(settings) if tiers.parameters(settings.model.name) else ""
        said, fits = "\n".join(filter(None, (guessed, f"No memory plan: {error}"))), True
    print(said, flush=True)
    if not (fits or options.ignore_plan):
        raise memory.PlanError("The training is not begun, as it does not fit by its memory plan: change what the plan "
                             "says, or try it all the same with --ignore-plan.")


@command("resume", "continue a run that was stopped", RUN, epilog=SIGNALS,
         interrupted=lambda options: _how_to_resume(options.run))
def _resume(options: argparse.Namespace) -> None:
    from masa_lib.training import drive

    run = drive.resume(options.run)
    print(f"Finished: {run.path}. `masa compare {shlex.quote(str(run.path))}` shows what came of it.")


def _how_to_resume(run: Path | None) -> str:
    if run is None or not (run / "config.toml").exists():
        return "The run had not begun, so there is nothing to resume."
    return f"`masa resume {shlex.quote(str(run))}` continues from the last checkpoint."


@command("eval", "measure a model, or a run's checkpoint, on held-out problems",
         option("--run", metavar="RUN", about="take the config and the weights of a run"), CHECKPOINT,
         option("--out", metavar="FOLDER", about="keep the table there, one row a problem"), JSON,
         option("--harness", metavar="SET", nargs="*", about="have lm-evaluation-harness ask and grade: sets of the "
                "paper, or tasks of its own (default: what it has of the paper)"),
         option("--tasks", metavar="FOLDER", about="of --harness: tasks of yours; what they name is executed"),
         option("--run-code", action="store_true", about="of --harness: execute code that the model has written"),
         option("--evalplus", metavar="FILE", nargs="+", about="read what EvalPlus has found: its *_eval_results.json"),
         short=MEASURED,
         interrupted=lambda options: "" if options.harness is None else "Passes that were over are kept.",
         epilog="How many: --set evaluation.final_problems=... evaluation.final_samples=... evaluation.predictions=... "
                "(`masa train --help` has the other settings).")
def _eval(options: argparse.Namespace) -> None:
    base, weights, run, step = _of_run(options)
    if options.problems:  # all of a file is measured on, unless it is the one that the run was trained on
        options.set = [f"problems.evaluation_source={options.problems}", *options.set]
        options.problems = None
    settings = config_from(options, base)
    if options.harness is not None or options.evalplus:
        _eval_harness(options, settings, run)
        return
    from masa_lib import crash_safe_files as files
    from masa_lib.runs import parquet
    from masa_lib.training import evaluation

    summary, table = evaluation.evaluate_model(settings, weights, run)
    if run:
        summary = {"run": run.path.name, "weights": weights.name, **summary, "step": step}
    else:
        del summary["step"]  # of no training
    if options.out:
        with files.writing(options.out, "evaluate again, or choose another folder with --out"):
            options.out.mkdir(parents=True, exist_ok=True)
            parquet.write(options.out / "evaluation.parquet", table)
    print(files.line(summary).decode().strip() if options.json else measures(summary))


def _eval_harness(options: argparse.Namespace, settings: config.Config, run: Any) -> None:
    from masa_lib import crash_safe_files as files
    from masa_lib.analysis import paper_sets
    from masa_lib.training import harness

    default = run.path / "harness" if run else Path("runs") / f"{Path(settings.model.name).name}-harness"
    out = options.out or default
    rows = [] if options.harness is None else harness.measure(
        settings, out, harness.chosen(options.harness, options.run_code), run=run, which=options.checkpoint,
        own=options.tasks, run_code=options.run_code)
    rows += [harness.evalplus(settings, out, options.evalplus)] if options.evalplus else []
    print(files.line({"sets": rows}).decode().strip() if options.json else paper_sets.text(rows, options.harness != []))


@command("chat", "ask a trained model to predict, then to solve, problem by problem",
         option("run", metavar="RUN", nargs="?", type=Path, about="a run; without it the model of the settings"),
         CHECKPOINT, option("--solutions", metavar="N", type=int, default=8, about="of each problem (default: 8)"),
         short=("model", "method", "seed", "engine"))
def _chat(options: argparse.Namespace) -> None:
    base, weights, run, _ = _of_run(options)
    settings = config_from(options, base)
    from masa_lib.lessons import chat

    for said in chat.chat(settings, weights, run, max(1, options.solutions)):
        print(said)


@command("probe", "ask what an untrained model believes of its own solutions, and what is true",
         option("--count", metavar="N", type=int, default=200, about="held-out problems (default: 200)"), BESIDE,
         short=MEASURED)
def _probe(options: argparse.Namespace) -> None:
    settings, out = _settings_and_out(options, "probe")
    from masa_lib.lessons import probe

    summary = probe.build(settings, options.count, out, options.command)
    print(measures({key: value for key, value in summary.items() if isinstance(value, float)}))
    print(f"Probed: {out}. {out / 'probe.html'} is the picture.")


@command("warmup", "teach a model the form of both answers, from its own solutions",
         option("--count", metavar="N", type=int, default=128, about="training problems (default: 128)"), BESIDE,
         short=MEASURED)
def _warmup(options: argparse.Namespace) -> None:
    settings, out = _settings_and_out(options, "warmup")
    from masa_lib.recipes import warmup

    made = warmup.build(settings, out, warmup.Recipe(problems=options.count), options.command)
    print(measures(made["check"]))
    print(f"Made: {out}. `masa train --config {shlex.quote(str(out / 'settings.toml'))}` trains it.")


def _of_run(options: argparse.Namespace) -> tuple[config.Config | None, Path | None, Any, int]:
    """The config of a run's checkpoint, its weights, the run and the step; None where no run is given."""
    if not options.run:
        return None, None, None, 0
    from masa_lib.runs.folder import Run

    run = Run.open(options.run)
    step, weights = run.weights(options.checkpoint)
    return run.config_at(step), weights, run, step


def _settings_and_out(options: argparse.Namespace, name: str) -> tuple[config.Config, Path]:
    settings = config_from(options)
    return settings, options.out or Path("runs") / f"{Path(settings.model.name).name or 'model'}-{name}"


@command("export", "write a run's model, or a packed study's tables, as a folder for a hub, with its card",
         option("run", metavar="RUN|FOLDER", type=Path), CHECKPOINT,
         option("--out", metavar="FOLDER", required=True, about="a new or empty folder"))
def _export(options: argparse.Namespace) -> None:
    from masa_lib.training import export

    if export.is_packed_study(options.run):
        runs = export.export_study(options.run, options.out)
        print(f"Exported: {options.out} holds the tables of {runs} runs and README.md, their data set card.")
        return
    step = export.export(options.run, options.out, options.checkpoint)
    print(f"Exported: {options.out} holds the model of step {step} and README.md, its model card.")
