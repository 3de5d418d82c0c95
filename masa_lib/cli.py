"""The commands: arguments in, one call into the rooms, text out. Each stands under its own options.

A config is complete and valid before the first heavy import, so that a wrong value costs no waiting. Every error that
the rooms raise themselves is a sentence and is shown as one; anything else is a defect and keeps its traceback.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from masa_lib import ROOT, __version__, config
from masa_lib.errors import MasaError, check_system
from masa_lib.models import tiers

EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED, EXIT_PIPE = 1, 2, 130, 141
#: options that are short names of settings, and those of commands that only measure
SHORT = {"model": "model.name", "problems": "problems.source", "method": "method", "steps": "steps", "seed": "seed",
         "engine": "sampling.engine"}
#: names files of one's own, see `extend`
EXTEND = "MASA_EXTEND"
MEASURED = ("model", "problems", "seed", "engine")
SIGNALS = ("SIGINT, SIGTERM or SIGHUP drops rollouts, lets updates finish and writes a checkpoint (exit code 130, 143 "
           "or 129); a second one drops updates, too (75).")
#: by name: the function, its help, its options, those of SHORT that it has (None: no settings at all), its defaults
COMMANDS: dict[str, tuple[Callable[..., None], str, Sequence[tuple], Sequence[str] | None, dict[str, Any]]] = {}


def command(name: str, about: str, *options: tuple, short: Sequence[str] | None = None, **defaults: Any) -> Callable:
    """Enter the function below as a command; the default `interrupted` says how to go on, `epilog` ends its help."""
    def enter(run: Callable[..., None]) -> Callable[..., None]:
        COMMANDS[name] = run, about, options, short, defaults
        return run

    return enter


def option(*names: str, about: str = "", **how: Any) -> tuple[tuple[str, ...], dict[str, Any]]:
    """An option as `add_argument` takes it; what is called RUN, FILE or FOLDER is a path."""
    path = {"type": Path} if how.get("metavar", "").endswith(("RUN", "FILE", "FOLDER")) else {}
    return names, {"help": about} | path | how


RUN = option("run", metavar="RUN")
JSON = option("--json", action="store_true", about="print one JSON object")
BESIDE = option("--out", metavar="FOLDER", about="default: runs/MODEL-COMMAND")
CHECKPOINT = option("--checkpoint", choices=("last", "best"), default="last", about=(
    "the run's newest checkpoint, or that of the highest held-out accuracy (default: last)"))
CONFIG = (option("--config", metavar="FILE", about="settings as TOML; the options here override it"),
          option("--set", metavar="KEY=VALUE", nargs="+", action="extend", default=[], about="any other setting"))


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one sentence."""

    def error(self, message: str) -> NoReturn:
        """Leave with exit code 2."""
        self.exit(EXIT_USAGE, f"masa: {message}; `{self.prog} --help` lists what there is.\n")


def build_parser() -> Parser:
    """All commands and their options."""
    parser = Parser(prog="masa", description="Train a model to predict its own solutions, and measure it.",
                    allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"masa_lib {__version__}")
    added, defaults = parser.add_subparsers(metavar="COMMAND", required=True), tiers.config()
    about = {key: known.doc + (f" ({', '.join(known.choices)})" if known.choices else "")
             for key, known in config.settings().items()}
    every = "\n".join(["settings and their defaults for the pocket model (another tier has defaults of its own):",
                       *(f"  {key}={config.get(defaults, key)}: {text}" for key, text in about.items())])
    for name, (run, does, options, short, more) in COMMANDS.items():
        epilog = f"{more.get('epilog', '')}\n\n{every if short == tuple(SHORT) else ''}".strip()
        one = added.add_parser(name, help=does, description=does, epilog=epilog, allow_abbrev=False,
                               formatter_class=argparse.RawDescriptionHelpFormatter)
        one.set_defaults(**{"interrupted": lambda options: ""} | more, run_command=run)
        for key in short or ():
            one.add_argument(f"--{key}", metavar=key.upper(),
                             help=f"{about[SHORT[key]]} (default: {config.get(defaults, SHORT[key])})")
        for names, how in [*(() if short is None else CONFIG), *options]:
            one.add_argument(*names, **how)
    return parser


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
        extend()
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


def extend(more: Sequence[Path] = ()) -> None:
    """Run the files that MASA_EXTEND names, which enter gates and the like (docs/extending.md), and these.

    Processes that this one starts run them, too.
    """
    files = [*map(Path, filter(None, os.environ.get(EXTEND, "").split(os.pathsep))), *more]
    if files:
        os.environ[EXTEND] = os.pathsep.join(dict.fromkeys(str(file.resolve()) for file in files))
    for file in map(Path.resolve, files):
        found = importlib.util.spec_from_file_location(str(file), file)
        if not file.is_file() or found is None:
            raise config.ConfigError(f"{file} cannot be run: name a Python file of yours with --with or {EXTEND}.")
        if found.name not in sys.modules:
            sys.modules[found.name] = importlib.util.module_from_spec(found)
            found.loader.exec_module(sys.modules[found.name])


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
         option("--out", metavar="FOLDER", about="keep the table there, one row a problem"), JSON, short=MEASURED,
         epilog="How many: --set evaluation.final_problems=... evaluation.final_samples=... evaluation.predictions=... "
                "(`masa train --help` has the other settings).")
def _eval(options: argparse.Namespace) -> None:
    base, weights, run, step = _of_run(options)
    if options.problems:  # all of a file is measured on, unless it is the one that the run was trained on
        options.set = [f"problems.evaluation_source={options.problems}", *options.set]
        options.problems = None
    settings = config_from(options, base)
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
    print(files.line(summary).decode().strip() if options.json else _measures(summary))


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
    print(_measures({key: value for key, value in summary.items() if isinstance(value, float)}))
    print(f"Probed: {out}. {out / 'probe.html'} is the picture.")


@command("warmup", "teach a model the form of both answers, from its own solutions",
         option("--count", metavar="N", type=int, default=128, about="training problems (default: 128)"), BESIDE,
         short=MEASURED)
def _warmup(options: argparse.Namespace) -> None:
    settings, out = _settings_and_out(options, "warmup")
    from masa_lib.recipes import warmup

    made = warmup.build(settings, out, warmup.Recipe(problems=options.count), options.command)
    print(_measures(made["check"]))
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


@command("compare", "compare runs: accuracy, tokens, seconds, meta-awareness",
         option("runs", metavar="RUN|FOLDER", nargs="+", about="runs, or a folder of runs"),
         option("--json", action="store_true", about="print one JSON object; no page unless --out names it"),
         option("--out", metavar="FILE", about="the page of plots (default: report.html in FOLDER)"))
def _compare(options: argparse.Namespace) -> None:
    from masa_lib.analysis import report

    html = options.out
    if html is None and not options.json:
        html = _page(options.runs)
    print(report.compare(options.runs, html, options.json))


def _page(runs: Sequence[Path]) -> Path:
    """Where the page of a comparison goes: into the folder that is compared, beside a packed run, else here."""
    if len(runs) > 1:
        return Path("report.html")
    return runs[0] / "report.html" if runs[0].is_dir() else runs[0].with_name(f"{runs[0].name}-report.html")


@command("doctor", "why is my reward flat: what a run's records say, and what to do", RUN, JSON)
def _doctor(options: argparse.Namespace) -> None:
    import json

    from masa_lib.analysis import doctor
    from masa_lib.runs.folder import Run

    run = Run.open(options.run)
    print(json.dumps(doctor.rows(run), ensure_ascii=False) if options.json else doctor.text(run))


@command("study", "train a grid of arms and seeds; what is finished is left alone",
         option("file", metavar="FILE", about="the study, as studies/baseline.toml"),
         option("--only", metavar="ARM", nargs="+", default=[], about="these arms alone"),
         option("--seeds", metavar="0-3", about="these seeds alone, of those that the study has"),
         option("--jobs", metavar="N", type=int, about="runs at a time (default: what the study says)"),
         option("--dry-run", action="store_true", about="only show how far every run is"),
         option("--smoke", action="store_true", about="only try a few tiny steps of every arm, elsewhere"),
         option("--set", metavar="KEY=VALUE", dest="changes", nargs="+", action="extend", default=[],
                about="of --smoke: other settings, such as model.name=pocket"),
         epilog=SIGNALS, interrupted=lambda options: "The same command goes on.")
def _study(options: argparse.Namespace) -> None:
    from masa_lib.analysis import study

    if options.dry_run and options.smoke:
        raise config.ConfigError("--dry-run only looks and --smoke trains; give one of them.")
    if options.changes and not options.smoke:
        raise config.ConfigError("--set goes with --smoke alone; what a study trains stands in its file.")
    chosen = study.load(options.file).select(options.only, options.seeds, options.jobs)
    if options.smoke:
        print(study.smoke(chosen, _set(options.changes)))
        return
    if not options.dry_run:
        study.train(chosen)
    print(study.overview(chosen))


@command("bench", "gates side by side, on one set of problems: what is recorded, and what it trains",
         option("what", choices=("gates",), metavar="gates"),
         option("names", metavar="GATE", nargs="*", about="default: all; grpo, random and oracle are always there"),
         option("--with", metavar="FILE", dest="more", nargs="+", action="extend", default=[],
                about="Python files with gates of yours"),
         option("--seeds", metavar="0-3", default="0-3", about="or how many (default: 0-3)"),
         option("--jobs", metavar="N", type=int, default=1,
                about="runs at a time (default: 1, by which seconds can be compared)"),
         option("--out", metavar="FOLDER", default=Path("runs/gates"), about="default: runs/gates"),
         option("--dry-run", action="store_true", about="only show what would be trained"),
         option("--smoke", action="store_true", about="only try a few tiny steps of each, elsewhere"),
         option("--set", metavar="KEY=VALUE", dest="changes", nargs="+", action="extend", default=[],
                about="settings of the gates that no study has an arm of, such as gate.places=0.6"),
         epilog=SIGNALS, interrupted=lambda options: "The same command goes on.")
def _bench(options: argparse.Namespace) -> None:
    extend(options.more)
    from masa_lib.analysis import bench, study

    whole = bench.plan(options.names, options.seeds, max(1, options.jobs), options.out, _set(options.changes))
    if options.smoke:
        print(bench.smoke(whole, {}))
    elif options.dry_run:
        left = bench.lacking(whole)
        print(study.overview(left) if left.arms else "Nothing: all is recorded.")
    else:
        print(bench.judge(whole))


@command("pack", "pack the finished runs of a study into a few files, which are then only read",
         option("study", metavar="FOLDER", about="of the study; the folders of its packed runs are removed"),
         option("--out", metavar="FOLDER", about="pack into another folder, and remove nothing"),
         option("--finished-only", action="store_true", about="leave unfinished runs as they are"),
         option("--without-models", action="store_true", about="do not keep the trained models"),
         epilog="Packing again takes in what was trained since.")
def _pack(options: argparse.Namespace) -> None:
    from masa_lib.runs import packing

    done, left = packing.pack(options.study, options.out, finished_only=options.finished_only,
                              models=not options.without_models)
    rest = f" Left as folders, unfinished: {', '.join(left)}." if left else ""
    print(f"Packed: {len(done)} runs, in {options.out or options.study}.{rest}")


@command("replay", "what gates and caps would have saved in a recorded run", RUN, JSON)
def _replay(options: argparse.Namespace) -> None:
    from masa_lib.lessons import replay_report

    print(replay_report.replay(options.run, options.json))


@command("models", "list the model tiers and their defaults")
def _models(options: argparse.Namespace) -> None:
    print(_table(tiers.table()))


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
        print(_table(problems.sources()))
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


@command("lab", "open the notebooks in JupyterLab; other options are passed on to it")
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


def _measures(values: dict[str, Any]) -> str:
    return _table([{"measure": key, "value": value} for key, value in values.items()])


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
