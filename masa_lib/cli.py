"""The commands: arguments in, one call into the rooms, text out.

A config is complete and valid before the first heavy import, so that a wrong value costs no waiting. Every error that
the rooms raise themselves is a sentence and is shown as one; anything else is a defect and keeps its traceback.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from masa_lib import ROOT, __version__, config
from masa_lib.errors import MasaError, check_system
from masa_lib.models import tiers

RAW = {"formatter_class": argparse.RawDescriptionHelpFormatter}
EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED, EXIT_PIPE = 1, 2, 130, 141
#: options that are short names of settings
SHORT = {"model": "model.name", "problems": "problems.source", "method": "method", "steps": "steps", "seed": "seed",
         "engine": "sampling.engine"}


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one sentence."""

    def error(self, message: str) -> NoReturn:
        """Leave with exit code 2."""
        self.exit(EXIT_USAGE, f"masa: {message}; `{self.prog} --help` lists what there is.\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal of ASCII alone gets \xd7 for what it cannot show
            stream.reconfigure(errors="backslashreplace")
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = build_parser()
    options, options.rest = parser.parse_known_args(arguments)
    if options.rest and options.run_command is not _lab:
        parser.error(f"{' '.join(options.rest)} is not an option here")
    options.command = shlex.join(["masa", *arguments])
    try:
        check_system()
        options.run_command(options)
        sys.stdout.flush()
    except BrokenPipeError:  # `masa models | head`: who reads has seen enough, and Python is not to complain at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_PIPE
    except KeyboardInterrupt as stopped:
        print(f"\n{str(stopped) or 'Stopped.'} {options.interrupted(options)}".rstrip(), file=sys.stderr)
        return getattr(stopped, "exit_code", EXIT_INTERRUPTED)
    except MasaError as error:
        print(f"masa: {error}", file=sys.stderr)
        return EXIT_USAGE if isinstance(error, config.ConfigError) else EXIT_FAILED
    return 0


def build_parser() -> Parser:
    """All commands and their options."""
    parser = Parser(prog="masa", description="Train a model to predict its own solutions, and measure it.",
                    allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"masa_lib {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, run: Any, about: str, parent: Any = commands, **more: Any) -> Parser:
        added = parent.add_parser(name, help=about, description=about, allow_abbrev=False, **more)
        added.set_defaults(run_command=run, interrupted=lambda options: "")
        return added

    _add_training(command)
    _add_measuring(command)
    _add_studies(command)
    compare = command("compare", _compare, "compare runs: accuracy, tokens, seconds, meta-awareness")
    compare.add_argument("runs", metavar="RUN|FOLDER", nargs="+", type=Path, help="runs, or a folder of runs")
    compare.add_argument("--json", action="store_true", help="print one JSON object; no page unless --out names it")
    compare.add_argument("--out", metavar="FILE", type=Path, help="the page of plots (default: report.html in FOLDER)")
    command("models", _models, "list the model tiers and their defaults")
    planned = command("plan", _plan, "the memory that a training needs, before anything is loaded")
    _add_config_options(planned, SHORT)
    planned.add_argument("--gpu", metavar="SIZE", type=_gigabytes, default=0.0,
                         help="of the GPU, as 80GB (default: what this computer has)")
    planned.add_argument("--table", action="store_true", help="all tiers on GPUs of several sizes, as Markdown")
    problems = command("problems", _problems, "list the problem sources, or show examples of one")
    problems.add_argument("source", metavar="SOURCE", nargs="?", help="show examples of this one")
    problems.add_argument("--count", type=int, default=5, help="how many examples (default: 5)")
    problems.add_argument("--split", choices=("train", "evaluation"), default="train", help="default: train")
    pocket = command("pocket", _pocket_build, "the bundled model").add_subparsers(metavar="ACTION", required=True)
    build = command("build", _pocket_build, "make the pocket model from nothing (under an hour)", pocket)
    build.add_argument("--out", metavar="FOLDER", type=Path, default=Path("runs/pocket"), help="default: runs/pocket")
    build.add_argument("--seed", type=int, default=0)
    command("lab", _lab, "open the notebooks in JupyterLab; other options are passed on to it")
    return parser


def _add_training(command: Callable[..., Parser]) -> None:
    codes = ("SIGINT, SIGTERM or SIGHUP lets the running step finish and checkpoints it (exit code 130, 143 or 129); a "
             "second one drops the step (75).")
    train = command("train", _train, "train a model", epilog=f"{codes}\n\n{_settings_help()}", **RAW)
    _add_config_options(train, SHORT)
    train.add_argument("--out", metavar="FOLDER", type=Path, help="the run (default: runs/MODEL-METHOD-sSEED)")
    _add_backend(train)
    train.add_argument("--ignore-plan", action="store_true", help="begin although the memory plan does not fit")
    train.set_defaults(interrupted=lambda options: _how_to_resume(options.out))
    resume = command("resume", _resume, "continue a run that was stopped", epilog=codes, **RAW)
    resume.add_argument("run", metavar="RUN", type=Path)
    _add_backend(resume)
    resume.set_defaults(interrupted=lambda options: _how_to_resume(options.run))


def _add_backend(parser: Parser) -> None:
    parser.add_argument("--backend", choices=("own", "trl"), default="own",
                        help="trl: on TRL and accelerate, also for several processes (docs/scaling.md)")


def _add_measuring(command: Callable[..., Parser]) -> None:
    which = "the run's newest checkpoint, or that of the highest held-out accuracy"
    evaluate = command("eval", _eval, "measure a model, or a run's checkpoint, on held-out problems",
                       epilog="How many: --set evaluation.final_problems=... evaluation.final_samples=... "
                       "evaluation.predictions=... ; the other settings stand in `masa train --help`.", **RAW)
    _add_config_options(evaluate, ("model", "problems", "seed", "engine"))
    evaluate.add_argument("--run", metavar="RUN", type=Path, help="take the config and the weights of a run")
    evaluate.add_argument("--checkpoint", choices=("last", "best"), default="last", help=f"{which} (default: last)")
    evaluate.add_argument("--out", metavar="FOLDER", type=Path, help="keep the table there, one row a problem")
    evaluate.add_argument("--json", action="store_true", help="print one JSON object")
    probe = command("probe", _probe, "ask what an untrained model believes of its own solutions, and what is true")
    warmup = command("warmup", _warmup, "teach a model the form of both answers, from its own solutions")
    for added, default, about in ((probe, 200, "held-out problems"), (warmup, 128, "training problems")):
        _add_config_options(added, ("model", "problems", "seed", "engine"))
        added.add_argument("--count", metavar="N", type=int, default=default, help=f"{about} (default: {default})")
        added.add_argument("--out", metavar="FOLDER", type=Path, help="default: runs/MODEL-COMMAND")
    export = command("export", _export, "write a run's model as a Hugging Face folder with a model card")
    export.add_argument("run", metavar="RUN", type=Path)
    export.add_argument("--out", metavar="FOLDER", type=Path, required=True, help="a new or empty folder")
    export.add_argument("--checkpoint", choices=("last", "best"), default="last", help=f"{which} (default: last)")


def _add_studies(command: Callable[..., Parser]) -> None:
    study = command("study", _study, "train a grid of arms and seeds; what is finished is left alone", **RAW,
                    epilog="SIGINT, SIGTERM or SIGHUP lets the running steps finish and checkpoints them (exit code "
                    "130, 143 or 129); a second one drops them (75).")
    study.add_argument("file", metavar="FILE", type=Path, help="the study, as studies/baseline.toml")
    study.add_argument("--only", metavar="ARM", nargs="+", default=[], help="these arms alone")
    study.add_argument("--seeds", metavar="0-3", help="these seeds alone, of those that the study has")
    study.add_argument("--jobs", metavar="N", type=int, help="runs at a time (default: what the study says)")
    study.add_argument("--commit", action="store_true", help="commit each finished record to git")
    instead = study.add_mutually_exclusive_group()
    instead.add_argument("--dry-run", action="store_true", help="only show how far every run is")
    instead.add_argument("--smoke", action="store_true", help="only try a few tiny steps of every arm, elsewhere")
    study.add_argument("--set", metavar="KEY=VALUE", dest="changes", nargs="+", action="extend", default=[],
                       help="of --smoke: other settings, such as model.name=pocket")
    study.set_defaults(interrupted=lambda options: "The same command goes on.")
    replay = command("replay", _replay, "what gates and caps would have saved in a recorded run")
    replay.add_argument("run", metavar="RUN", type=Path)
    replay.add_argument("--out", metavar="FILE", type=Path, help="also write a page of plots")
    replay.add_argument("--json", action="store_true", help="print one JSON object")


def _add_config_options(parser: Parser, short: Iterable[str]) -> None:
    table, defaults = config.settings(), tiers.config()
    for name in short:
        field = table[SHORT[name]]
        choices = ", ".join(field.choices)
        parser.add_argument(f"--{name}", metavar=name.upper(), help=f"{field.doc}"
                            f"{': ' + choices if choices else ''} (default: {config.get(defaults, SHORT[name])})")
    parser.add_argument("--config", metavar="FILE", type=Path, help="settings as TOML; the options here override it")
    parser.add_argument("--set", metavar="KEY=VALUE", nargs="+", action="extend", default=[], help="any other setting")


def _settings_help() -> str:
    """Every setting, for `masa train --help`."""
    defaults = tiers.config()
    lines = []
    for key, field in config.settings().items():
        about = field.doc + (f" ({', '.join(field.choices)})" if field.choices else "")
        lines.append(f"  {key}={config.get(defaults, key)}: {about}")
    title = "settings and their defaults for the pocket model (another tier has defaults of its own):\n"
    return title + "\n".join(lines).replace("%", "%%")


def config_from(options: argparse.Namespace, base: config.Config | None = None) -> config.Config:
    """The config that the options describe: `base` or the model tier's defaults, file, short options, `--set`.

    Raises:
        ConfigError: before anything is loaded, for an unknown key or a value that is not allowed.
    """
    changes: dict[str, Any] = config.read(options.config) if options.config else {}
    changes |= {key: getattr(options, name) for name, key in SHORT.items() if getattr(options, name, None) is not None}
    changes |= _set(options.set)
    cuda = True if getattr(options, "gpu", 0) else None
    return config.replace(base, changes) if base and not options.config else tiers.config(changes, cuda)


def _set(entries: Sequence[str]) -> dict[str, str]:
    """What `--set` names, by dotted key."""
    for entry in entries:
        if "=" not in entry:
            raise config.ConfigError(f"--set takes KEY=VALUE, not {entry!r}.")
    return {key.strip(): value.strip() for key, _, value in (entry.partition("=") for entry in entries)}


def _train(options: argparse.Namespace) -> None:
    settings = config_from(options)
    model = Path(settings.model.name).name or "model"
    options.out = options.out or Path("runs") / f"{model}-{settings.method}-s{settings.seed}"
    if (options.out / "config.toml").exists():
        raise config.ConfigError(f"{options.out} holds a run already: `masa resume {shlex.quote(str(options.out))}` "
                                 "continues it, and --out names another place.")
    _check_plan(settings, options)
    run = _trainer(options).train(settings, options.out, options.command)
    print(f"Trained: {run.path}. `masa compare {shlex.quote(str(run.path))}` shows what came of it.")


def _check_plan(settings: config.Config, options: argparse.Namespace) -> None:
    """Print the memory plan; several processes share what it counts as one's, and are not judged by it.

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
    if not (fits or options.ignore_plan or int(os.environ.get("WORLD_SIZE", "1")) > 1):
        raise memory.PlanError("The training is not begun, as it does not fit by its memory plan: change what the plan "
                             "says, or try it all the same with --ignore-plan.")


def _resume(options: argparse.Namespace) -> None:
    run = _trainer(options).resume(options.run)
    print(f"Finished: {run.path}. `masa compare {shlex.quote(str(run.path))}` shows what came of it.")


def _trainer(options: argparse.Namespace) -> Any:
    """The module that trains."""
    if options.backend == "trl":
        from masa_lib.scaleout import run

        return run
    from masa_lib.training import drive

    return drive


def _how_to_resume(run: Path | None) -> str:
    if run is None or not (run / "config.toml").exists():
        return "The run had not begun, so there is nothing to resume."
    return f"`masa resume {shlex.quote(str(run))}` continues from the last checkpoint."


def _eval(options: argparse.Namespace) -> None:
    base = weights = run = None
    if options.run:
        from masa_lib.runs.folder import Run

        run = Run.open(options.run)
        step, weights = run.weights(options.checkpoint)
        base = run.config_at(step)
    if options.problems:  # all of a file is measured on, unless it is the one that the run was trained on
        options.set = [f"problems.evaluation_source={options.problems}", *options.set]
        options.problems = None
    settings = config_from(options, base)
    from masa_lib import crash_safe_files as files
    from masa_lib.training import evaluation

    summary, table = evaluation.evaluate_model(settings, weights, run)
    if run:
        summary = {"run": run.path.name, "weights": weights.name, **summary, "step": step}
    else:
        del summary["step"]  # of no training
    if options.out:
        with files.writing(options.out, "evaluate again, or choose another folder with --out"):
            options.out.mkdir(parents=True, exist_ok=True)
            files.write_table(options.out / "evaluation.parquet", table)
    print(files.line(summary).decode().strip() if options.json
          else _table([{"measure": key, "value": value} for key, value in summary.items()]))


def _probe(options: argparse.Namespace) -> None:
    settings, out = _settings_and_out(options, "probe")
    from masa_lib.lessons import probe

    summary = probe.build(settings, options.count, out, options.command)
    print(_table([{"measure": key, "value": value} for key, value in summary.items() if isinstance(value, float)]))
    print(f"Probed: {out}. {out / 'probe.html'} is the picture.")


def _warmup(options: argparse.Namespace) -> None:
    settings, out = _settings_and_out(options, "warmup")
    from masa_lib.recipes import warmup

    made = warmup.build(settings, out, warmup.Recipe(problems=options.count), options.command)
    print(_table([{"measure": key, "value": value} for key, value in made["check"].items()]))
    print(f"Made: {out}. `masa train --config {shlex.quote(str(out / 'settings.toml'))}` trains it.")


def _settings_and_out(options: argparse.Namespace, name: str) -> tuple[config.Config, Path]:
    settings = config_from(options)
    return settings, options.out or Path("runs") / f"{Path(settings.model.name).name or 'model'}-{name}"


def _export(options: argparse.Namespace) -> None:
    from masa_lib.training import export

    step = export.export(options.run, options.out, options.checkpoint)
    print(f"Exported: {options.out} holds the model of step {step} and README.md, its model card.")


def _compare(options: argparse.Namespace) -> None:
    from masa_lib.analysis import report

    html = options.out
    if html is None and not options.json:
        html = (options.runs[0] if len(options.runs) == 1 else Path()) / "report.html"
    print(report.compare(options.runs, html, options.json))


def _study(options: argparse.Namespace) -> None:
    from masa_lib.analysis import study

    if options.changes and not options.smoke:
        raise config.ConfigError("--set goes with --smoke alone; what a study trains stands in its file.")
    chosen = study.load(options.file).select(options.only, options.seeds, options.jobs)
    if options.smoke:
        print(study.smoke(chosen, _set(options.changes)))
        return
    if not options.dry_run:
        study.train(chosen, options.commit)
    print(study.overview(chosen))


def _replay(options: argparse.Namespace) -> None:
    from masa_lib.lessons import replay

    print(replay.replay(options.run, options.out, options.json))


def _models(options: argparse.Namespace) -> None:
    print(_table(tiers.table()))


def _plan(options: argparse.Namespace) -> None:
    from masa_lib.models import memory

    if options.table:
        print(memory.table())
        return
    settings = config_from(options)
    try:
        print(memory.text(settings, options.gpu))
    except memory.PlanError:
        if tiers.parameters(settings.model.name):
            print(tiers.explain(settings, bool(options.gpu) or None))
        raise


def _gigabytes(text: str) -> float:
    """`80GB`, `80 GB` or `80` as a number; argparse turns the errors into a sentence."""
    size = float(text.upper().removesuffix("GB"))
    if not 0 < size < 10**6:
        raise ValueError
    return size


_gigabytes.__name__ = "size"  # argparse names it in its sentence


def _problems(options: argparse.Namespace) -> None:
    from masa_lib.tasks import problems

    if options.source is None:
        print(_table(problems.sources()))
        return
    for problem in problems.load_problems(options.source, options.split, options.count):
        print(f"{problem.id} (level {problem.level})\n{problem.text}\n  answer: {problem.answer}\n")


def _pocket_build(options: argparse.Namespace) -> None:
    from masa_lib.recipes import pocket

    pocket.build(options.out, pocket.Recipe(seed=options.seed))
    print(f"Made: {options.out}. `masa train --model {shlex.quote(str(options.out))}` trains it.")


def _lab(options: argparse.Namespace) -> None:
    # The root, as the notebooks show pictures from docs, beside their own folder.
    there = (ROOT / "notebooks").exists()
    place = [str(ROOT), "--LabApp.default_url=/lab/tree/notebooks/00_start_here.ipynb"] if there else []
    sys.stdout.flush()
    # In the place of this process, so that a signal that is meant to end it ends JupyterLab.
    os.execv(sys.executable, [sys.executable, "-m", "jupyterlab", *options.rest, *place])


def _table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows with the same keys as aligned text."""
    def show(value: Any) -> str:
        if isinstance(value, list | tuple):
            return ", ".join(map(str, value))
        return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)

    cells = [list(rows[0]), *(list(map(show, row.values())) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
                     for row in cells)


if __name__ == "__main__":
    sys.exit(main())
