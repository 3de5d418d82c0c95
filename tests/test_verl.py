"""The recipe for verl: its rows and scores with our own functions, its estimator in verl's registry where verl is."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from small import small

from masa_lib import config as configs
from masa_lib.engines import make_engine
from masa_lib.method import rollouts
from masa_lib.models import loading
from masa_lib.tasks.problems import ProblemPool

EXAMPLES = str(Path(__file__).resolve().parent.parent / "examples")
CONFIG = small({"sampling.problems": 4, "sampling.predictions": 3, "reward.notion_weight": 0.0})


@pytest.fixture(autouse=True)
def examples(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    configs.save(CONFIG, tmp_path / "config.toml")
    monkeypatch.setenv("MASA_CONFIG", str(tmp_path / "config.toml"))


@pytest.fixture(scope="module")
def sampled() -> pd.DataFrame:
    """The rollouts of four problems, scored."""
    model, tokenizer = loading.load(CONFIG.model)
    found = rollouts.collect(ProblemPool(CONFIG.problems, 0).take(0, 4), make_engine("transformers", model, tokenizer,
                             batch=64), tokenizer, CONFIG, solutions=4, predictions=3, seed=[0], temperature=1.0)
    found.loc[found.index[found["stream"] == "meta"][0], ["predicted_pass_rate", "predicted_length", "notions"]] = None
    rollouts.score(found, CONFIG)
    return found


def test_a_problem_is_two_rows_and_a_prediction_one_number(tmp_path: Path) -> None:
    from verl_masa import rows

    problems = ProblemPool(CONFIG.problems, 0).take(0, 2)
    rows.table(problems, CONFIG).to_parquet(tmp_path / "train.parquet")
    found = pd.read_parquet(tmp_path / "train.parquet")
    assert [row["stream"] for row in found["extra_info"]] == ["solution", "meta"] * 2
    assert [row["problem_id"] for row in found["extra_info"]] == [problem.id for problem in problems for _ in range(2)]
    solution, meta = found.iloc[0], found.iloc[1]
    right = rf"\boxed{{{solution['reward_model']['ground_truth']}}}"

    def score(row: pd.Series, text: str) -> float:
        return rows.compute_score(row["data_source"], text, row["reward_model"]["ground_truth"], row["extra_info"])

    assert score(solution, right) == 1.0 and score(solution, r"\boxed{no}") == 0.0
    said = score(meta, '{"math_notion": [], "pass_rate": 5, "solution_length": 999983}')
    assert (said % rows.STEP, said // rows.STEP) == (5, 999983) and said == float(np.float32(said))
    assert score(meta, "no idea") == rows.UNREAD


def encoded(table: pd.DataFrame) -> tuple[torch.Tensor, torch.Tensor, np.ndarray, list[dict[str, Any]]]:
    """A table as verl has it: scores on the last token, the mask, uids, and what is known of each row."""
    from verl_masa import rows

    mask_BT = torch.tensor([[int(place < length) for place in range(table["length"].max())]
                            for length in table["length"]])
    said = table["predicted_pass_rate"].astype(float) + rows.STEP * table["predicted_length"].astype(float)
    scores = table["correct"].astype(float).where(table["stream"] == "solution", said.fillna(rows.UNREAD))
    rewards_BT = torch.zeros(mask_BT.shape)
    rewards_BT[torch.arange(len(table)), mask_BT.sum(1) - 1] = torch.tensor(scores.to_numpy(), dtype=torch.float32)
    uids = np.array([f"{row.stream}-{row.group}" for row in table.itertuples()], dtype=object)
    known = table[["problem_id", "problem", "stream"]].to_dict("records")
    return rewards_BT, mask_BT, uids, known


def test_the_estimator_in_verls_registry_gives_our_advantages(sampled: pd.DataFrame) -> None:
    if importlib.util.find_spec("verl") is None:
        pytest.skip("verl is not installed: pip install --no-deps verl==0.9.1, in an environment of its own")
    from verl.trainer.ppo.core_algos import get_adv_estimator_fn
    from verl_masa import advantage

    table = sampled.sample(frac=1, random_state=0).reset_index(drop=True)  # verl balances rows over processes
    rewards_BT, mask_BT, uids, known = encoded(table)
    advantage.ROWS.update(zip(uids, known, strict=True))
    found_BT, returns_BT = get_adv_estimator_fn("masa")(
        token_level_rewards=rewards_BT, response_mask=mask_BT, config=None, index=uids)
    expected_BT = torch.tensor(table["advantage"].to_numpy(), dtype=torch.float32)[:, None] * mask_BT
    torch.testing.assert_close(found_BT, expected_BT)
    assert returns_BT is found_BT and table["advantage"].ne(0).any()


def test_verl_computes_a_batchs_advantages_with_it(sampled: pd.DataFrame) -> None:
    if importlib.util.find_spec("verl") is None or importlib.util.find_spec("ray") is None:
        pytest.skip("verl and ray are not installed")
    from verl import DataProto
    from verl.trainer.ppo.ray_trainer import compute_advantage
    from verl_masa import advantage

    rewards_BT, mask_BT, uids, known = encoded(sampled)
    advantage.ROWS.update(zip(uids, known, strict=True))
    batch = DataProto.from_dict({"token_level_rewards": rewards_BT, "response_mask": mask_BT},
                                non_tensors={"uid": uids})
    found = compute_advantage(batch, "masa", config=None).batch["advantages"]
    assert found[:, 0].tolist() == pytest.approx(sampled["advantage"].tolist(), rel=1e-6)


def test_the_sampler_is_a_replay_buffer_of_verl_and_tells_the_estimator_the_rows() -> None:
    if importlib.util.find_spec("verl") is None or importlib.util.find_spec("transfer_queue") is None:
        pytest.skip("verl and TransferQueue are not installed")
    from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer
    from verl.utils.import_utils import load_extern_object
    from verl_masa import advantage, sampler

    assert load_extern_object("pkg://verl_masa.sampler", "PairedRows") is sampler.PairedRows
    assert issubclass(sampler.PairedRows, ReplayBuffer)
    sampler.remember(["a-b_0_0", "a-b_1_0", "c_0_0"], [{"problem_id": "x"}, {"problem_id": "x"}, {"problem_id": "y"}])
    assert advantage.ROWS == {"a-b": {"problem_id": "x"}, "c": {"problem_id": "y"}}


def test_the_page_names_what_is_there() -> None:
    page = (Path(EXAMPLES).parent / "docs" / "verl.md").read_text(encoding="utf8")
    for name in ("rows.py", "advantage.py", "sampler.py"):
        assert name in page and (Path(EXAMPLES) / "verl_masa" / name).exists()
    command = (Path(EXAMPLES) / "verl_masa" / "train.sh").read_text(encoding="utf8")
    assert "algorithm.adv_estimator=masa" in command and "train.sh" in page


def test_verl_has_the_settings_that_the_command_sets() -> None:
    if importlib.util.find_spec("verl") is None or importlib.util.find_spec("hydra") is None:
        pytest.skip("verl and hydra are not installed")
    from hydra import compose, initialize_config_module

    command = (Path(EXAMPLES) / "verl_masa" / "train.sh").read_text(encoding="utf8")
    settings = re.findall(r"(?<= )([a-z_0-9]+(?:\.[a-z_0-9]+)+=[\w:/.-]+)", command.partition("main_ppo")[2])
    assert len(settings) == 13
    with initialize_config_module("verl.trainer.config", version_base=None):
        found = compose("ppo_trainer", overrides=settings)
    assert found.algorithm.adv_estimator == "masa" and found.data.shuffle is False
