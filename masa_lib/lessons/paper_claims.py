"""The paper's claims beside what its own tables and figures give.

`data/paper/` holds the printed numbers and, claim by claim, a verdict. Here those that follow from printed numbers are
computed again, so that a reader can check the check. A verdict says whether the paper agrees with itself, nothing more:
deliberately no judgement on whether a claim is true of models, and none of our own results.
"""

from __future__ import annotations

import html
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from masa_lib.analysis.compare import PAPER

VERDICTS = ("consistent", "inconsistent", "not derivable")
#: the five numbers that every review repeats: a short name, and the claim
HEADLINES = {"AIME25": "Pass@1 gain on AIME25 (8B)",
             "six sets": "average Pass@1 gain over six math benchmarks (8B)",
             "GPQA": "gain on GPQA-Diamond",
             "thirteen": "overall accuracy gain across 13 out-of-domain benchmarks",
             "speed-up": "speed-up to reach the baseline performance"}
# What the panels of Figure 4 draw accuracy against.
_COSTS = {"a": "seen_tasks", "b": "generated_tokens_million", "c": "train_time_min"}


def table(version: str, folder: Path = PAPER) -> pd.DataFrame:
    """The claims of a version, v1 or v2, indexed by claim."""
    found = pd.read_csv(folder / "claims.csv", keep_default_na=False)
    return found[found["where_printed"].str.startswith(version)].set_index("claim")


def scores(version: str, name: str, base_model: str, metric: str = "pass@1", folder: Path = PAPER) -> pd.DataFrame:
    """Printed scores of a table: a row a benchmark (averages left out), a column a method; percent.

    Args:
        version: v1 or v2.
        name: such as `Table 1`.
        base_model: as in results.csv.
        metric: as in results.csv.
        folder: of the published numbers.
    """
    rows = pd.read_csv(folder / "results.csv").query("version == @version and table == @name and metric == @metric and "
                                                     "base_model == @base_model")
    rows = rows[rows["benchmark"].notna() & ~rows["benchmark"].astype(str).str.startswith("Average")]
    labels = rows["method"] + rows["variant"].map(lambda variant: f", {variant}" if isinstance(variant, str) else "")
    found = rows.assign(method=labels).pivot(index="benchmark", columns="method", values="value")
    return found.loc[rows["benchmark"].unique(), labels.unique()].rename_axis(columns=None)


def gain(new: float, old: float) -> float:
    """The relative gain, percent: what most of the paper's gains are."""
    return 100 * (new / old - 1)


def budget_curve(panel: str, folder: Path = PAPER) -> pd.DataFrame:
    """Figure 4 of v1: columns method, cost and accuracy (0 to 1, smoothed by the authors).

    Args:
        panel: a (cost is tasks seen), b (generated tokens, million) or c (training time, minutes).
        folder: of the published numbers.
    """
    columns = {_COSTS[panel]: "cost", "accuracy_smoothed": "accuracy"}
    return pd.read_csv(folder / "figures" / f"fig4{panel}.csv").rename(columns=columns)[["method", *columns.values()]]


def speed_up(curve: pd.DataFrame) -> float:
    """Cost at GRPO's last point over the cost at which MASA-efficient first has that accuracy (straight lines)."""
    last, rival = curve[curve["method"] == "GRPO"].iloc[-1], curve[curve["method"] == "MASA-efficient"]
    cost, accuracy = rival["cost"].to_numpy(), rival["accuracy"].to_numpy()
    after = int(np.argmax(accuracy >= last["accuracy"]))
    share = (last["accuracy"] - accuracy[after - 1]) / (accuracy[after] - accuracy[after - 1])
    return float(last["cost"] / (cost[after - 1] + share * (cost[after] - cost[after - 1])))


def share_below(curve: pd.DataFrame, points: int = 10_001) -> float:
    """Share of the common range of costs, percent, on which MASA-efficient lies below GRPO (straight lines)."""
    lines = [curve[curve["method"] == method] for method in ("GRPO", "MASA-efficient")]
    ends = [(line["cost"].min(), line["cost"].max()) for line in lines]
    costs = np.linspace(max(low for low, _ in ends), min(high for _, high in ends), points)
    grpo, rival = (np.interp(costs, line["cost"], line["accuracy"]) for line in lines)
    return float(100 * (rival < grpo).mean())


def recompute(version: str, folder: Path = PAPER) -> pd.Series:
    """Claims of a version whose number follows from few printed ones, computed again: percent, or a ratio."""
    return pd.Series((_first if version == "v1" else _second)(folder), name="recomputed")


def _first(folder: Path) -> dict[str, float]:
    def mean_gain(name: str, size: str) -> float:
        means = scores("v1", name, f"Qwen3-{size}-Base", folder=folder).mean()
        return gain(means["MASA"], means["GRPO"])

    math, other, dapo = (scores("v1", name, f"Qwen3-{size}-Base", folder=folder)
                         for name, size in (("Table 1", "8B"), ("Table 2", "14B"), ("Table 4", "8B")))
    efficient = scores("v1", "Table 3a", "Qwen3-8B-Base", folder=folder).mean()
    printed = pd.read_csv(folder / "results.csv")
    hours = printed[printed["metric"] == "train_hours"].set_index("method")["value"]
    solution, prediction = printed.loc[printed["table"] == "Table 3b", "value"]  # tokens
    gated = pd.read_csv(folder / "figures" / "fig5_gated.csv")["gated_proportion"]
    return {
        HEADLINES["AIME25"]: gain(*math.loc["AIME25", ["MASA", "GRPO"]]),
        HEADLINES["six sets"]: mean_gain("Table 1", "8B"),
        HEADLINES["GPQA"]: gain(*other.loc["GPQA-Diamond", ["MASA", "GRPO"]]),
        HEADLINES["thirteen"]: mean_gain("Table 2", "14B"),
        HEADLINES["speed-up"]: speed_up(budget_curve("c", folder)),
        "average Pass@1 gain over six math benchmarks (14B)": mean_gain("Table 1", "14B"),
        "train time reduction of MASA-efficient versus MASA": gain(hours["MASA-efficient"], hours["MASA"]),
        "average gap of MASA-efficient versus MASA over four benchmarks":
            gain(efficient["MASA-efficient, k=120"], efficient["MASA"]),
        "meta-prediction length relative to solution length": 100 * prediction / solution,
        "share of prompts removed by gating on average": 100 * gated.mean(),
        "mean gated proportion, figure legend": 100 * gated.mean(),
        "early in the process up to 80 % of prompts remain after gating": 100 * (1 - gated.iloc[0]),
        "tasks remaining after filtering from step 120 to 314": 100 * (1 - gated.mean()),
        "Pass@1 gain on AIME24 over DAPO (8B)": gain(*dapo.loc["AIME24", ["DAPO+MASA", "DAPO"]])}


def _second(folder: Path) -> dict[str, float]:
    math = {size: scores("v2", "Table 1", f"Qwen3-{size}-Base", folder=folder) for size in ("4B", "8B", "14B")}
    found = {f"average Pass@1 gain over six math benchmarks ({size})": gain(*table[["MAPR", "GRPO"]].mean())
             for size, table in math.items()}
    found |= {f"Pass@1 gain on {name} (4B)": gain(*math["4B"].loc[name, ["MAPR", "GRPO"]])
              for name in ("AIME25", "AMC23", "Minerva")}
    return found | {"a deviation of one unit (1/8) approximately halves the difficulty reward": 0.01 ** (1 / 8)}


def chosen(claims: pd.DataFrame, version: str = "", verdict: str = "", words: str = "") -> pd.DataFrame:
    """The claims of a version, with a verdict, that have all these words in one of their columns; "" chooses all.

    Args:
        claims: with the columns version and claim, as `everything` gives them.
        version: v1, v2 or "".
        verdict: one of VERDICTS or "".
        words: parted by blanks; large and small letters are alike.
    """
    kept = claims[claims["version"].isin([version] if version else claims["version"])
                  & claims["verdict"].isin([verdict] if verdict else VERDICTS)]
    texts = kept.astype(str).agg(" ".join, axis=1).str.lower()
    return kept[[all(word in text for word in words.lower().split()) for text in texts]]


def everything(folder: Path = PAPER) -> pd.DataFrame:
    """The claims of both versions, with the columns version and claim."""
    return pd.concat([table(version, folder).reset_index().assign(version=version) for version in ("v1", "v2")],
                     ignore_index=True)


# Widths for a table that shares its room equally, as JupyterLab's do; a word too long for its column is never broken.
_CELL = "text-align:left;vertical-align:top;padding:4px 8px;line-height:1.35;word-break:normal;overflow-wrap:normal"


def as_table(claims: pd.DataFrame) -> str:
    """Claims as an HTML table: what is printed can be read, verdict and recomputed number only when they are opened.

    Args:
        claims: with the columns claim, where_printed, printed_value, recomputed_value, how_recomputed and verdict.
    """
    heads = "".join(f"<th scope='col' style='{_CELL};width:{width}%'>{name}</th>" for name, width in (
        ("claim", 34), ("printed", 20), ("our answer", 46)))
    rows = [{name: html.escape(str(value)) for name, value in row._asdict().items()} for row in claims.itertuples()]
    lines = [f"<tr><td style='{_CELL}'>{row['claim']}<br><small>{row['where_printed']}</small></td>"
             f"<td style='{_CELL}'>{row['printed_value']}</td>"
             f"<td style='{_CELL}'><details><summary>open</summary><b>{row['verdict']}</b>. Recomputed: "
             f"{row['recomputed_value']}.<br><small>How: {row['how_recomputed']}.</small></details></td></tr>"
             for row in rows]
    return f"<table style='width:100%'><thead><tr>{heads}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def judged(mine: Mapping[str, str], claims: pd.DataFrame) -> pd.DataFrame:
    """Your verdicts beside those of claims.csv.

    Args:
        mine: a verdict, or an empty text, by claim.
        claims: as `table` gives them.

    Raises:
        ValueError: a verdict that there is not, or a claim that nobody made.
    """
    for claim, verdict in mine.items():
        if verdict not in ("", *VERDICTS):
            raise ValueError(f"{verdict!r} is no verdict; write one of {', '.join(VERDICTS)}, or nothing.")
        if claim not in claims.index:
            raise ValueError(f"There is no claim {claim!r} in claims.csv.")
    found = claims.loc[list(mine), ["printed_value", "recomputed_value", "verdict"]]
    return found.assign(yours=list(mine.values()), agree=[said == right if said else None for said, right in
                                                          zip(mine.values(), found["verdict"], strict=True)])
