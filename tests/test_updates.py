"""Why updates confound: Adam's steps are as long whatever a gradient's size; outcomes are compared seed by seed."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from masa_lib.analysis.compare import Comparison
from masa_lib.config import UpdateConfig
from masa_lib.lessons import updates
from masa_lib.method import objective


@pytest.mark.parametrize(("name", "optimiser"), [("adam", torch.optim.Adam), ("plain", torch.optim.SGD)])
def test_the_walk_is_that_of_the_optimiser_in_torch(name: str, optimiser: type[torch.optim.Optimizer]) -> None:
    gradients = np.random.default_rng(0).normal(size=(7, 5))
    weights = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    steps = optimiser([weights], lr=1e-3)
    for gradient in gradients:
        weights.grad = torch.tensor(gradient)
        steps.step()
    assert updates.travelled(gradients, name) == pytest.approx(weights.detach().norm().item(), rel=1e-6)


def test_two_half_updates_walk_as_one_by_plain_descent_and_twice_as_far_by_adam() -> None:
    clean = updates.walks(noise=0.0)
    assert list(clean["updates"]) == [20, 40, 20]
    assert clean.loc["halves", "plain"] == pytest.approx(1.0)
    assert clean.loc["halves", "adam"] == pytest.approx(2.0, rel=1e-6)
    assert 1.2 < updates.walks(noise=2.0).loc["halves", "adam"] < 2.0  # noise of the halves cancels in part


def test_a_smaller_loss_is_a_shorter_walk_by_plain_descent_alone() -> None:
    diluted = updates.walks(share=0.6).loc["diluted"]
    assert diluted["plain"] == pytest.approx(0.6)
    assert diluted["adam"] == pytest.approx(1.0, rel=1e-4)


def test_a_mean_over_both_streams_dilutes_a_solutions_token_by_the_solutions_share_of_the_tokens() -> None:
    lengths, streams = [30, 50, 20], ["solution", "solution", "meta"]
    own, released = (objective.token_weights(lengths, streams, UpdateConfig(denominator=denominator))
                     for denominator in ("stream", "batch"))
    assert released[0] / own[0] == pytest.approx(80 / 100)


def study(arms: dict[str, list[float]]) -> Comparison:
    """A comparison of three evaluations, the last a value a seed, the others 0; the curves' problems are harder."""
    rows = [{"arm": arm, "seed": seed, "step": step, "accuracy": end / 2 if step == 2 else 0.0}
            for arm, ends in arms.items() for seed, end in enumerate(ends) for step in range(3)]
    runs = [{"arm": arm, "seed": seed, "accuracy_after": end, "steps": 2, "planned": 2}
            for arm, ends in arms.items() for seed, end in enumerate(ends)]
    empty = pd.DataFrame()
    return Comparison({}, pd.DataFrame(runs), pd.DataFrame(rows), empty, empty)


def test_contrasts_pair_the_seeds_of_both_arms_by_their_final_evaluation() -> None:
    found = updates.contrasts(study({"grpo": [0.5, 0.6, 0.7, 0.8], "masa": [0.4, 0.5, 0.6, 0.7],
                                     "grpo-two": [0.6, 0.8, 0.7], "masa-two": [0.7, 0.8, 0.9]}))
    assert list(found.index) == list(updates.CONTRASTS)
    assert found["seeds"].to_dict() == {name: 4 if name == "both one" else 3 for name in updates.CONTRASTS}
    assert found["points"].tolist() == pytest.approx([20, -10, 10, 10, 30])
    released, both_one = found.loc["released: masa two, grpo one"], found.loc["both one"]
    assert (released["shown"], both_one["shown"]) == ("higher", "lower")
    assert found.loc["second update alone, grpo", "shown"] == "not shown to differ"


def test_the_mean_over_the_training_counts_all_evaluations() -> None:
    found = updates.contrasts(study({"grpo": [0.6, 0.6], "masa": [1.2, 1.8]}), "mean")
    assert found["points"].tolist() == pytest.approx([15.0])


def test_a_run_that_goes_on_is_left_out() -> None:
    begun = study({"grpo": [0.6, 0.6], "masa": [0.7, 0.1]})
    begun.runs.loc[begun.runs.index[-1], "steps"] = 1
    for measure in ("end", "mean"):
        assert updates.contrasts(begun, measure).loc["both one", "seeds"] == 1
    assert updates.contrasts(begun).loc["both one", "points"] == pytest.approx(10.0)


def test_one_seed_shows_nothing() -> None:
    assert updates.shown({"low": math.nan, "high": math.nan}) == "not shown to differ"


def test_without_the_second_study_the_first_is_compared_alone(tmp_path: Path) -> None:
    found = updates.comparison(two=tmp_path / "nothing")
    assert set(found.runs["arm"]) == {"grpo", "masa"}
    assert list(updates.contrasts(found).index) == ["both one"]
    above = found.summary["methods"]["masa"]["accuracy_above_grpo"]  # of notebook 07
    assert updates.contrasts(found).loc["both one", ["points", "low", "high"]].tolist() == pytest.approx(
        [100 * above[end] for end in ("mean", "low", "high")])
    spent = updates.costs(found)
    assert list(spent.columns) == ["updates", "tokens written", "prompts read", "tokens through the update", "seconds"]
    assert spent.loc["masa", "tokens written"] > spent.loc["grpo", "tokens written"]
    assert spent["seconds"].isna().all()  # two at a time were trained, so seconds say nothing
