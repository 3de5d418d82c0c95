"""The README's moving figure, from one recorded run: `python studies/readme.py --picture` writes it.

An SVG that moves by CSS, so that it is small, sharp, and stands still for readers who want no motion. Its greys are
as far from white as from black, as it does not know on what it is shown.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

from masa_lib import DATA, ROOT
from masa_lib.analysis import awareness, compare, figures
from masa_lib.runs.folder import Run

PLACE = ROOT / "docs" / "pictures" / "effect.svg"
#: the run that is shown, and the one whose accuracy stands beside its own
PICTURED, GHOST = "beliefs/masa-read-s0", "efficiency/grpo-s0"
#: colour, left upper corner and side of the dots' panel; left edge, upper edge and width of the other, in pixels
COLOR, BOX, SIDE, RIGHT = figures.PURPLE, (56, 44), 320, (460, 44, 400)
#: seconds that the first state rests, that the first move takes and each later one, and that the last state rests
REST, SLOW, QUICK, END = 1.5, 3.0, 0.55, 4.0


def frames() -> tuple[pd.DataFrame, pd.DataFrame]:
    """Of PICTURED: where each held-out problem lies at each evaluation, and what the evaluation says of all.

    Returns:
        Columns step, problem_id, x (predicted pass rate), y (true); columns step, accuracy, computed (tokens), r.
    """
    run = Run.open(DATA / "runs" / PICTURED)
    curve = recorded_curve(PICTURED)
    tables = {step: awareness.problem_measures(run.evaluation_table(step)) for step in curve["step"]}
    dots = pd.concat([table[["problem_id"]].assign(step=step, x=table["predicted_pass_rate"], y=table["pass_rate"])
                      for step, table in tables.items()])
    r = [awareness.correlation(table["predicted_pass_rate"], table["pass_rate"]) for table in tables.values()]
    return dots, curve.assign(r=r)


def recorded_curve(name: str) -> pd.DataFrame:
    """The held-out accuracy of one recorded run, and the tokens that it had computed by then."""
    return compare.compare_runs(DATA / "runs" / name).curves[["step", "accuracy", "computed"]]


def moment(steps: Sequence[int]) -> list[float]:
    """When each evaluation is shown, in percent of a loop: the first rests, the first move is slow, the last rests."""
    at = [REST, *(REST + SLOW + QUICK * number for number in range(len(steps) - 1))]
    return [round(100 * second / (at[-1] + END), 2) for second in at]


def keyframes(name: str, at: Sequence[float], states: Sequence[str]) -> str:
    """A CSS animation through states, the first and the last of which rest."""
    stops = "".join(f"{time:g}%{{{state}}}" for time, state in zip(at, states, strict=True))
    return f"@keyframes {name}{{0%{{{states[0]}}}{stops}100%{{{states[-1]}}}}}"


def animation() -> str:
    """The README's figure: the dots of predicted against true leave their column, beside them the accuracy rises."""
    dots, curve = frames()
    at, seconds = moment(list(curve["step"])), REST + SLOW + QUICK * (len(curve) - 2) + END
    moves, marks = moving_dots(dots, at)
    said, labels = captions(curve, at)
    drawn, line = accuracy_line(curve, recorded_curve(GHOST), at)
    style = (f"text{{font:15px system-ui,sans-serif;fill:{figures.GREY}}}.big text{{font-size:19px;font-weight:600}}"
             f"circle,.line{{animation:{seconds:g}s linear infinite}}.at{{opacity:0;animation:{seconds:g}s step-end "
             f"infinite}}.at:last-of-type{{opacity:1}}.d circle{{fill:{COLOR};opacity:.7}}path{{fill:none;"
             f"stroke:{figures.GREY}}}.line{{stroke:{COLOR};stroke-width:3}}"
             "@media(prefers-reduced-motion:reduce){*{animation:none!important}}")  # then the last state stands still
    title = "Predicted against true pass rate, and accuracy, while masa-read trains"
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 880 400" role="img"><title>{title}</title><style>'
            f'{style}{moves}{said}{drawn}</style>{axes()}<g class="d">{marks}</g>{labels}{line}</svg>\n')


def moving_dots(dots: pd.DataFrame, at: Sequence[float]) -> tuple[str, str]:
    """The movements and the circles of the problems; equal ones lie a little apart."""
    apart = np.random.default_rng(0).normal(0, 2.2, (dots["problem_id"].nunique(), 2))
    moves, marks = [], []
    for number, (_, rows) in enumerate(dots.groupby("problem_id", sort=True)):
        x, y = BOX[0] + SIDE * rows["x"] + apart[number, 0], BOX[1] + SIDE * (1 - rows["y"]) + apart[number, 1]
        states = [f"transform:translate({left:.1f}px,{top:.1f}px)" for left, top in zip(x, y, strict=True)]
        moves.append(keyframes(f"p{number}", at, states))
        marks.append(f'<circle r="4.2" style="{states[-1]};animation-name:p{number}"/>')
    return "".join(moves), "".join(marks)


def captions(curve: pd.DataFrame, at: Sequence[float]) -> tuple[str, str]:
    """What stands above both panels at each evaluation: its step and r, the accuracy."""
    rules, labels = [], []
    for number, row in enumerate(curve.itertuples()):
        shown = [f"opacity:{int(number == other)}" for other in range(len(curve))]
        rules.append(keyframes(f"t{number}", at, shown))
        said = f"after {row.step} steps" if row.step else "before training"
        labels.append(f'<g class="at big" style="animation-name:t{number}"><text x="{BOX[0]}" y="26">{said}: r = '
                      f'{row.r:.2f}</text><text x="{RIGHT[0]}" y="26">accuracy {row.accuracy:.2f}</text></g>')
    return "".join(rules), f"<g>{''.join(labels)}</g>"


def accuracy_line(curve: pd.DataFrame, ghost: pd.DataFrame, at: Sequence[float]) -> tuple[str, str]:
    """The accuracy by tokens computed, drawn as it grows, over the whole line of another run."""
    most, top = max(curve["computed"].max(), ghost["computed"].max()), 0.1 * math.ceil(10 * ghost["accuracy"].max())

    def places(of: pd.DataFrame) -> list[tuple[float, float]]:
        x, y = RIGHT[0] + RIGHT[2] * of["computed"] / most, BOX[1] + SIDE * (1 - of["accuracy"] / top)
        return list(zip(x, y, strict=True))

    path, other = places(curve), places(ghost)
    steps = np.cumsum([0, *(math.dist(one, two) for one, two in itertools.pairwise(path))])
    rules = (keyframes("grow", at, [f"stroke-dashoffset:{1 - far:.4f}" for far in steps / steps[-1]])
             + keyframes("head", at, [f"transform:translate({x:.1f}px,{y:.1f}px)" for x, y in path]))
    joined = ["L".join(f"{x:.1f} {y:.1f}" for x, y in points) for points in (other, path)]
    return rules, (
        f'<path d="M{joined[0]}" stroke-dasharray="5 4" stroke-width="2"/>'
        f'<path class="line" pathLength="1" stroke-dasharray="1" style="animation-name:grow" d="M{joined[1]}"/>'
        f'<circle r="5" fill="{COLOR}" style="transform:translate({path[-1][0]:.1f}px,{path[-1][1]:.1f}px);'
        f'animation-name:head"/><text x="{RIGHT[0] - 8}" y="{BOX[1] + 5}" text-anchor="end">{top:.1f}</text>'
        f'<text x="{RIGHT[0] + RIGHT[2]}" y="{BOX[1] + SIDE + 20}" text-anchor="end">{most / 1e6:.1f} million</text>')


def axes() -> str:
    """Frames, titles and the diagonal of both panels."""
    (left, top), (start, _, wide), bottom = BOX, RIGHT, BOX[1] + SIDE
    return (f'<path d="M{left} {top}V{bottom}H{left + SIDE}M{start} {top}V{bottom}H{start + wide}"/>'
            f'<path d="M{left} {bottom}L{left + SIDE} {top}" stroke-dasharray="2 4"/>'
            + "".join(f'<text x="{x}" y="{y}" text-anchor="{anchor}">{said}</text>' for x, y, anchor, said in (
                (left, bottom + 20, "middle", "0"), (left + SIDE, bottom + 20, "middle", "1"),
                (left - 8, top + 5, "end", "1"), (left - 8, bottom + 1, "end", "0"),
                (start, bottom + 20, "middle", "0"), (start - 8, bottom + 1, "end", "0"),
                (left + SIDE / 2, bottom + 20, "middle", "predicted pass rate"),
                (start + wide / 2 - 30, bottom + 20, "middle", "tokens computed")))
            + f'<text transform="translate({left - 22} {top + SIDE / 2}) rotate(-90)" text-anchor="middle">true pass '
            f'rate</text><text x="{start + wide}" y="26" text-anchor="end">masa-read, and dashed: grpo</text>')
