"""What the commands have in common: their options, the config that these describe, and tables as text.

Each command stands under its own options (`command`). A config is complete and valid before the first heavy import, so
that a wrong value costs no waiting.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from masa_lib import __version__, config
from masa_lib.analysis import text_tables
from masa_lib.models import tiers

EXIT_USAGE = 2
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
    """Enter the function below as a command.

    Of its defaults, `interrupted` says how to go on, `epilog` ends its help, and with `passes_on` it takes any option.
    """
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
        one.set_defaults(**{"interrupted": lambda options: "", "passes_on": False} | more, run_command=run)
        for key in short or ():
            one.add_argument(f"--{key}", metavar=key.upper(),
                             help=f"{about[SHORT[key]]} (default: {config.get(defaults, SHORT[key])})")
        for names, how in [*(() if short is None else CONFIG), *options]:
            one.add_argument(*names, **how)
    return parser


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
    changes |= settings_of(options.set)
    cuda = True if getattr(options, "gpu", 0) else None
    return config.replace(base, changes) if base else tiers.config(changes, cuda)


def settings_of(entries: Sequence[str]) -> dict[str, str]:
    """What `--set` names, by dotted key."""
    for entry in entries:
        if "=" not in entry:
            raise config.ConfigError(f"--set takes KEY=VALUE, not {entry!r}.")
    return {key.strip(): value.strip() for key, _, value in (entry.partition("=") for entry in entries)}


def measures(values: dict[str, Any]) -> str:
    """Measures by name as aligned text."""
    return table([{"measure": key, "value": value} for key, value in values.items()])


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows with the same keys as aligned text."""
    def show(value: Any) -> str:
        if isinstance(value, list | tuple):
            return ", ".join(map(str, value))
        return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)

    return text_tables.aligned([list(rows[0]), *(list(map(show, row.values())) for row in rows)])
