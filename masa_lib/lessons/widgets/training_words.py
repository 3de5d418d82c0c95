"""What the training panel says of a run: its state, how far its running step is, and why its reward may be flat.

Pure functions to HTML; texts from files are escaped.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

from masa_lib.analysis import health
from masa_lib.analysis.doctor import Finding
from masa_lib.lessons.widgets.training_records import Records
from masa_lib.lessons.widgets.training_view import LONGEST
from masa_lib.runs import live_control
from masa_lib.runs.progress import Progress

#: finished steps whose mean time says how long the others take
PACE = 5
#: seconds of rollouts after which their pace is said
SETTLED = 1.0


def status_html(state: str, records: Records, now: Progress | None = None, waited: float = 0.0, why: str = "") -> str:
    """The state of a run and what it does just now.

    Args:
        state: as `live_control.state` says it.
        records: of the run; nothing where it is still to begin.
        now: how far its rollouts are, where its process tells.
        waited: seconds since it began to load.
        why: what its status says of its end.
    """
    metrics, steps = records.metrics, records.config.steps
    done, alive = finished(records), state in live_control.ALIVE
    parts = []
    if done or not alive:
        pace = metrics["seconds_total"].tail(PACE).mean() if "seconds_total" in metrics else math.nan
        speed = "" if math.isnan(pace) else f", {pace:.1f} s a step"
        left = f", {duration((steps - done) * pace)} left" if alive and done < steps and speed else ""
        parts = [f"step {done} of {steps}{speed}{left}.", why,
                 *health.troubles(metrics, records.config.model.precision)]
    if alive and (doing := within(records, now)):
        parts.append(doing)
    elif alive and not done:
        parts.append(f"{_first(state, records)}, {duration(waited)}.")
    said = " ".join(filter(None, parts))[:LONGEST]
    return f"<b>{html.escape(state)}</b>: {html.escape(said)}"


def finished(records: Records) -> int:
    """Finished steps, of those that are recorded."""
    return int(records.metrics["step"].max()) if len(records.metrics) else 0


def within(records: Records, now: Progress | None) -> str:
    """How far the rollouts of the running step, or of an evaluation, are; empty where none run."""
    if now is None:
        return ""
    if now.evaluates:
        what, runs = "Held-out problems are solved", not now.over
    else:
        what, runs = f"Step {now.step}", now.step > finished(records)
    if not runs:
        return ""
    if now.over:
        return f"{what} is graded and learned from."
    said = f"{what}: {now.done:,} of {'' if now.evaluates else 'at most '}{now.total:,} rollouts"  # a gate may stop
    if now.seconds >= SETTLED:
        said += f", {now.tokens / now.seconds:,.0f} tokens/s"
    return said + (f", {duration(now.left)} left." if math.isfinite(now.left) else ".")


def _first(state: str, records: Records) -> str:
    """What goes on before the first step is finished, where its process does not tell."""
    if state == "starting":
        return "model and problems are loaded"
    if records.evaluations.empty:
        return "held-out problems are solved before the first step"
    return f"the first of {records.config.steps} steps"


def duration(seconds: float) -> str:
    """Seconds for people: `40 s`, `12 min`, `3.5 h`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def findings_html(found: Sequence[Finding], step: int) -> str:
    """What `masa doctor` found after a step: first what may keep the reward flat and what to do, then what is in order.

    Args:
        found: by `doctor.examine`.
        step: the last one that was looked at.
    """
    ill, well = ([one for one in found if bool(one.advice) == wanted] for wanted in (True, False))
    head = (f"After step {step}, {len(ill)} of {len(found)} want something done:" if ill else
            f"After step {step}, nothing explains a flat reward.")
    rows = "".join(f"<li><b>{html.escape(one.what)}</b>: {html.escape(one.measured)}. {html.escape(one.advice)}</li>"
                   for one in ill)
    rest = html.escape("; ".join(f"{one.what}: {one.measured}" for one in well))
    return (f"<div role='status' style='line-height:1.4'>{head}<ul style='margin:0'>{rows}</ul>"
            + (f"In order: {rest}." if rest else "") + "</div>")
