"""Commands that look at runs and train many of them: compare, doctor, study, bench, pack, replay."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from masa_lib import config
from masa_lib.cli.parsing import JSON, RUN, SIGNALS, command, extend, option, settings_of


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
        print(study.smoke(chosen, settings_of(options.changes)))
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

    whole = bench.plan(options.names, options.seeds, max(1, options.jobs), options.out, settings_of(options.changes))
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
