"""The pictures of the reward lab: one figure of five panels, and the page of one group.

The figure is built once (`blank`) and filled by what changes at a move (`fill`), so that a live figure gets new numbers
and not a new drawing. What changes is `y` alone (of the heatmap `z`, and hover texts): a batch of plotly's live figure
deletes a property from all traces that it does not set, if it sets it for one. Texts from models are escaped wherever
they get into HTML. No computation of rewards.
"""

from __future__ import annotations

import functools
import html
import re
import textwrap
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from masa_lib.analysis.figures import BLUE, CLEAR, GREEN, GREY, ORANGE, PURPLE, SKY, SYMBOLS, TEMPLATE, VERMILLION
from masa_lib.config import Config
from masa_lib.lessons.widgets.reward_scenes import Recorded, Scene
from masa_lib.method import rewards
from masa_lib.method.streams import predictions_of, solutions_of
from masa_lib.tasks.predictions import PASS_RATE_STEPS, MetaPrediction

PARTS = {"reward_difficulty": ("difficulty", ORANGE), "reward_length": ("length", SKY),
         "reward_notion": ("notion", PURPLE)}
#: predictions by what they promise: first and last eighth, colour
PROMISES = {"low": (0, 2, BLUE), "middle": (3, 5, ORANGE), "high": (6, 8, VERMILLION)}
PAID = {"drives": "what training<br>follows", "recorded": "recorded<br>predictions", "random": "random<br>constant",
        "best constant": "best<br>constant", "best answer": "best answer<br>for each"}
TITLES = ("Reward against true pass rate", "Places won or lost, mean", "Groups without a signal",
          "Advantages in the group", "What this reward pays for")
WIDTH, HEIGHT = 600, 545  # pixels; a live figure that fits its page takes its width only at the first move
THIN = 10  # predictions; the mean of fewer is not shown
EIGHTHS = np.arange(PASS_RATE_STEPS + 1)
_LOSER_TO_WINNER = [[0, VERMILLION], [0.5, "#e8e8e8"], [1, BLUE]]


def blank(recorded: Recorded, points: int = 300) -> go.Figure:
    """The figure without numbers: places, axes and hover texts that no setting changes.

    Args:
        recorded: the groups.
        points: predictions drawn in the first panel, at most (a random sample; its lines are means of all).
    """
    figure = make_subplots(3, 2, subplot_titles=TITLES, specs=[[{}, {}], [{}, {}], [{"colspan": 2}, None]],
                           vertical_spacing=0.14, horizontal_spacing=0.11)
    for name, rows in _sample(recorded, points).items():
        first, last, color = PROMISES[name]
        symbol = SYMBOLS[list(PROMISES).index(name)]
        figure.add_scatter(x=_jittered(rows), mode="markers", marker={"size": 4, "opacity": 0.35, "color": color},
                           marker_symbol=symbol, text=[_hover(text) for text in rows["text"]], showlegend=False,
                           hovertemplate="%{text}<br>reward %{y:.3f}<extra></extra>", row=1, col=1)
        figure.add_scatter(x=EIGHTHS / 8, mode="lines+markers", line={"color": color, "width": 2.5},
                           name=f"says {first} to {last}", row=1, col=1,
                           marker={"size": 7, "symbol": symbol},
                           hovertemplate=f"predicts {first} to {last} of 8: mean reward %{{y:.3f}}<extra></extra>")
    for true, predicted in np.argwhere(_thin(recorded)):  # grey, and no trace: a move sets what traces share
        figure.add_shape(x0=predicted - 0.47, x1=predicted + 0.47, y0=true - 0.45, y1=true + 0.45, row=1, col=2,
                         fillcolor=GREY, opacity=0.4, line_width=0, layer="below")
    figure.add_heatmap(customdata=_cells(recorded).reshape(len(EIGHTHS), -1), colorscale=_LOSER_TO_WINNER, zmid=0,
                       showscale=False, xgap=1, ygap=1, texttemplate="%{z:+.1f}", textfont_size=8, row=1, col=2,
                       hovertemplate="predicted %{x} of 8, true %{y} of 8:<br>%{z:+.1f} places, %{customdata:.0f} "
                                     "predictions<extra></extra>")
    groups = (recorded.groups["pass_rate"] * PASS_RATE_STEPS).round().value_counts().reindex(EIGHTHS, fill_value=0)
    figure.add_bar(x=EIGHTHS, marker_color=GREY, showlegend=False, customdata=groups, row=2, col=1,
                   hovertemplate="%{x} of 8 right: %{y:.0%} of %{customdata:.0f} groups<extra></extra>")
    for color in (BLUE, VERMILLION):  # above and below 0
        figure.add_bar(x0=1, hovertemplate="%{hovertext}<extra></extra>", showlegend=False, marker_color=color, row=2,
                       col=2)
    for name, color in PARTS.values():
        figure.add_bar(x=list(PAID.values()), name=name, marker_color=color, row=3, col=1,
                       hovertemplate=f"%{{x}}: %{{y:.3f}} for the {name}<extra></extra>")
    return _dress(figure)


def _dress(figure: go.Figure) -> go.Figure:
    """Axes that never move, so that nothing jumps while a slider does."""
    rate = {"range": [-0.04, 1.04]}
    figure.update_layout(template=TEMPLATE, width=WIDTH, height=HEIGHT, barmode="relative", hovermode="closest",
                         margin={"l": 46, "r": 8, "t": 22, "b": 80}, font_size=11,
                         legend_font_size=10)
    figure.update_annotations(font_size=12)
    for update in (figure.update_xaxes, figure.update_yaxes):  # measuring labels is slow, and these never move
        update(automargin=False, ticklabeloverflow="allow", title_standoff=2, title_font_size=11)
    figure.update_xaxes(title_text="true pass rate", row=1, col=1, **rate)
    figure.update_yaxes(title_text="reward", row=1, col=1, **rate)
    figure.update_xaxes(title_text="predicted, of 8", dtick=1, showgrid=False, row=1, col=2)
    figure.update_yaxes(title_text="true, of 8", dtick=2, showgrid=False, row=1, col=2)
    figure.update_xaxes(title_text="true pass rate, of 8", dtick=1, row=2, col=1)
    figure.update_yaxes(title_text="share", row=2, col=1, **rate)
    figure.update_xaxes(title_text="prediction", dtick=1, row=2, col=2)
    figure.update_yaxes(title_text="advantage", range=[-2.7, 2.7], row=2, col=2)
    figure.update_yaxes(title_text="mean reward, share", range=[-0.1, 1.04], row=3, col=1)
    return figure


def fill(figure: go.Figure, recorded: Recorded, scene: Scene, group: int, points: int = 300) -> None:
    """Put a scene's numbers into a figure of `blank`, made with the same `points`; `group` is the one shown."""
    contents = [*_reward_lines(recorded, scene, points), _places(recorded, scene),
                {"y": scene.flat["share"].to_numpy()}, *_advantages(recorded, scene, group), *_payments(scene)]
    titles = [TITLES[0], TITLES[1], f"{TITLES[2]}: {scene.no_signal:.0%}", f"{TITLES[3]} {group}",
              f"{TITLES[4]} (a constant answer: {scene.hacked:.0%} of the way from random to best)"]
    for trace, content in zip(figure.data, contents, strict=True):
        trace.update(content)
    for annotation, title in zip(figure.layout.annotations, titles, strict=True):
        annotation.text = title


def picture(recorded: Recorded, scene: Scene, group: int, points: int = 90) -> go.Figure:
    """The filled figure, for a page without widgets: with few points, because they are saved."""
    figure = blank(recorded, points)
    fill(figure, recorded, scene, group, points)
    return figure


@functools.lru_cache(maxsize=8)
def _sample(recorded: Recorded, points: int) -> dict[str, pd.DataFrame]:
    """The predictions that are drawn as points, by what they promise; always the same ones."""
    meta = recorded.rollouts.loc[recorded.table.index]
    predicted = pd.Series(recorded.table.counts["ours"].pass_rate_N, meta.index)
    found = {}
    for name, (first, last, _) in PROMISES.items():
        rows = meta[predicted.between(first, last)]
        found[name] = rows.sample(min(points // len(PROMISES), len(rows)), random_state=0)
    return found


def _jittered(rows: pd.DataFrame) -> np.ndarray:
    return (rows["pass_rate"] + np.random.default_rng(0).uniform(-0.03, 0.03, len(rows))).to_numpy("float32").round(3)


def _reward_lines(recorded: Recorded, scene: Scene, points: int) -> list[dict[str, Any]]:
    table, contents = scene.predictions, []
    eighths = (table["pass_rate"] * PASS_RATE_STEPS).round()
    for name, rows in _sample(recorded, points).items():
        first, last, _ = PROMISES[name]
        promised = table[table["predicted_pass_rate"].between(first, last)]
        means = promised["reward"].groupby(eighths).mean().reindex(EIGHTHS)
        contents += [{"y": table["reward"][rows.index].to_numpy("float32")}, {"y": means.to_numpy()}]
    return contents


@functools.lru_cache(maxsize=8)
def _cells(recorded: Recorded) -> np.ndarray:
    """Number of predictions by true pass rate and predicted one, both in eighths; one row after the other."""
    return np.bincount(_cell(recorded.table.pass_rate_N, recorded.table.counts["ours"].pass_rate_N), minlength=81)


def _cell(pass_rate: Any, predicted: Any) -> np.ndarray:
    cell = np.round(np.asarray(pass_rate) * PASS_RATE_STEPS) * len(EIGHTHS) + np.asarray(predicted)
    return cell[np.isfinite(cell)].astype(int)


def _thin(recorded: Recorded) -> np.ndarray:
    """The cells with too few predictions for a mean: true pass rate by predicted one, eighths."""
    count = _cells(recorded).reshape(len(EIGHTHS), -1)
    return (count > 0) & (count < THIN)


def _places(recorded: Recorded, scene: Scene) -> dict[str, Any]:
    table, count = scene.predictions.dropna(subset="predicted_pass_rate"), _cells(recorded)
    total = np.bincount(_cell(table["pass_rate"], table["predicted_pass_rate"]), table["gain"], minlength=len(count))
    mean = (total / np.maximum(count, 1)).round(1) + 0.0
    return {"z": np.where(count >= THIN, mean, None).reshape(len(EIGHTHS), -1)}


def _advantages(recorded: Recorded, scene: Scene, group: int) -> list[dict[str, Any]]:
    table = scene.predictions[scene.predictions["group"] == group]
    texts = recorded.rollouts.loc[table.index, "text"]
    hover = [f"{_hover(text)}<br>reward {row.reward:.3f}: difficulty {row.reward_difficulty:.3f}, length "
             f"{row.reward_length:.0f}, notion {row.reward_notion:.2f}<br>advantage {row.advantage:+.2f}"
             for text, row in zip(texts, table.itertuples(), strict=True)]
    values = table["advantage"].to_numpy()
    return [{"y": side, "hovertext": hover} for side in (values.clip(min=0), values.clip(max=0))]


def _payments(scene: Scene) -> list[dict[str, Any]]:
    rows = pd.concat([scene.drives.to_frame("drives").T, scene.payments]).loc[list(PAID)]
    return [{"y": rows[part].to_numpy()} for part in PARTS]


def _hover(text: str, width: int = 60, lines: int = 5) -> str:
    """A model's text as plotly's hover takes it: escaped, in short lines."""
    return "<br>".join(html.escape(line) for line in textwrap.wrap(text[:width * lines], width)) or "(empty)"


def group_page(recorded: Recorded, scene: Scene, config: Config, group: int) -> str:
    """One group as HTML: its solutions with the predicted notions marked, and its predictions with what they earn.

    A notion is underlined where it stands: solid where it pays under the setting, dotted where it does not.
    """
    rows = recorded.members(group)
    solved, about = solutions_of(rows), recorded.groups.loc[group]
    meta = predictions_of(rows).assign(**scene.predictions[["reward", *PARTS, "advantage"]])
    paid = _paid(recorded, config, solved, meta)
    pattern = _pattern(paid, config.reward.mode)
    solutions = [["right" if row.correct else "wrong", str(row.length), _marked(row.text, pattern, paid, config)]
                 for row in solved.itertuples()]
    predicted = [[str(number), html.escape(row.text), f"{row.reward:.3f}",
                  *(f"{getattr(row, part):.2f}" for part in PARTS), f"{row.advantage:+.2f}"]
                 for number, row in enumerate(meta.itertuples(), 1)]
    notions = ", ".join(f"<b>{html.escape(notion)}</b> {'pays' if pays else 'does not pay'}"
                        for notion, pays in paid.items())
    return (f"<div><b>{html.escape(about['problem'])}</b><br>Group {group}: seed {about['seed']}, step "
            f"{about['step']}, pass rate {about['pass_rate']:.3f}. Notions: {notions or 'none'}.</div>"
            + '<div style="display:flex;flex-wrap:wrap;gap:0 24px;align-items:flex-start">'
            + _html_table(["", "tokens", "solution"], solutions)
            + _html_table(["", "prediction", "reward", *(name for name, _ in PARTS.values()), "advantage"], predicted)
            + "</div>")


def _paid(recorded: Recorded, config: Config, solved: pd.DataFrame, meta: pd.DataFrame) -> dict[str, bool]:
    """The notions that the group's predictions name, and whether each alone would pay."""
    notions = list(dict.fromkeys(notion for said in meta["notions"].dropna() for notion in said))
    solutions = [rewards.Solution(row.text, row.length, bool(row.correct)) for row in solved.itertuples()]
    alone = [MetaPrediction((notion,), 0, 0) for notion in notions]
    problem = solved["problem"].iloc[0]
    found = rewards.meta_rewards(solutions, alone, problem, config.reward, recorded.meta_prompt(problem))
    return {notion: reward.parts["reward_notion"] > 0 for notion, reward in zip(notions, found, strict=True)}


def _pattern(notions: dict[str, bool], mode: str) -> re.Pattern[str] | None:
    """Finds the notions in a text as the rewards of this mode do."""
    prepared = sorted({rewards.MATCHING[mode].notion(notion) for notion in notions}, key=len, reverse=True)
    if mode == "ours":
        places = [r"(?<!\w)" + r"\s*".join(map(re.escape, words)) + r"(?!\w)"
                  for notion in prepared if (words := notion.split())]
    else:
        places = [re.escape(notion) for notion in prepared if notion]
    return re.compile("|".join(places), re.IGNORECASE if mode == "ours" else 0) if places else None


def _marked(text: str, pattern: re.Pattern[str] | None, paid: dict[str, bool], config: Config) -> str:
    """A text as HTML, its notions marked; every piece is escaped by itself."""
    prepare = rewards.MATCHING[config.reward.mode].notion
    pays = {prepare(notion) for notion, paying in paid.items() if paying}
    pieces, end = [], 0
    for match in pattern.finditer(text) if pattern else ():
        good = (prepare(match[0]) if config.reward.mode == "ours" else match[0]) in pays
        color, line = (GREEN, "solid") if good else (VERMILLION, "dotted")
        pieces += [html.escape(text[end:match.start()]), f'<mark style="background:{CLEAR};color:inherit;'
                   f'border-bottom:3px {line} {color}">{html.escape(match[0])}</mark>']
        end = match.end()
    return "".join([*pieces, html.escape(text[end:])])


def _html_table(heads: list[str], rows: list[list[str]]) -> str:
    cell = 'style="text-align:left;overflow-wrap:break-word;padding:2px 8px;vertical-align:top;background:transparent"'
    line = "".join(f"<th {cell}>{name}</th>" for name in heads)
    body = "".join("<tr>" + "".join(f"<td {cell}>{entry}</td>" for entry in row) + "</tr>" for row in rows)
    return f'<table style="border-collapse:collapse;margin:6px 0;flex:1 1 400px"><tr>{line}</tr>{body}</table>'
