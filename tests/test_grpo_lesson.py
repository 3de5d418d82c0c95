"""The numbers that notebook 03 checks its reader against, computed again by TRL's GRPO trainer and by our functions."""

from __future__ import annotations

import json
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from masa_lib.config import Config, UpdateConfig
from masa_lib.lessons import exercises
from masa_lib.method import objective
from masa_lib.method.advantages import advantages
from masa_lib.models import loading

BOOK = Path(__file__).resolve().parent.parent / "notebooks" / "03_grpo_from_scratch.ipynb"
FROM_TRL = ("advantages", "token losses", "pulls", "token mean", "sequence mean", "first update", "flat group",
            "dual clip")


def right(exercise: str) -> torch.Tensor:
    return torch.tensor(exercises.EXERCISES[exercise].right)


@pytest.fixture(scope="module")
def lesson() -> types.SimpleNamespace:
    """The five tokens, as the notebook's own cell defines them."""
    cells = json.loads(BOOK.read_text(encoding="utf8"))["cells"]
    found: dict[str, Any] = {"torch": torch}
    exec("".join(next(cell for cell in cells if cell["id"] == "five-tokens")["source"]), found)
    return types.SimpleNamespace(**found)


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory, lesson: types.SimpleNamespace) -> Any:
    """TRL's trainer over the pocket model, paying the lesson's rewards, with the lesson's clip range."""
    trl = pytest.importorskip("trl", reason="TRL is not installed: pip install -e '.[scaleout]'")
    from datasets import Dataset

    model, tokenizer = loading.load(Config().model)
    settings = trl.GRPOConfig(
        output_dir=str(tmp_path_factory.mktemp("trl")), per_device_train_batch_size=4, num_generations=4,
        max_completion_length=2, beta=0.0, epsilon=UpdateConfig().clip_low, epsilon_high=UpdateConfig().clip_high,
        loss_type="bnpo", report_to="none", use_cpu=True, bf16=False)
    asked = Dataset.from_list([{"prompt": [{"role": "user", "content": "Start with 8. Add 8."}]}] * 4)
    made = trl.GRPOTrainer(model=model, reward_funcs=lambda completions, **_: lesson.rewards_G.tolist(), args=settings,
                           train_dataset=asked, processing_class=tokenizer)
    made.model.eval()  # no division by the number of accumulated batches
    return made


def trl_loss(trainer: Any, lesson: types.SimpleNamespace, logps_N: torch.Tensor, *, old: bool = True,
             only: int | None = None, flat: int = 0) -> torch.Tensor:
    """TRL's loss of the lesson's tokens; of one of them, or with so many one-token sequences of advantage 0 added."""
    lengths = torch.cat([lesson.lengths_G, torch.ones(flat, dtype=torch.long)])
    mask_BT = torch.arange(2) < lengths[:, None]

    def padded(values_N: torch.Tensor) -> torch.Tensor:
        return torch.zeros(mask_BT.shape).masked_scatter(mask_BT, torch.cat([values_N, torch.zeros(flat)]))

    kept = mask_BT.long() if only is None else padded(torch.eye(5)[only]).long()
    inputs = {"prompt_ids": torch.zeros(len(lengths), 1, dtype=torch.long),
              "prompt_mask": torch.ones(len(lengths), 1, dtype=torch.long), "completion_ids": torch.zeros_like(kept),
              "completion_mask": kept, "advantages": torch.cat([right("advantages"), torch.zeros(flat)])}
    if old:
        inputs["old_per_token_logps"] = padded(lesson.old_logps_N)
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (padded(logps_N), torch.zeros(mask_BT.shape), None)
    return trainer._compute_loss(trainer.model, inputs)


def test_the_constants_are_those_of_trl(trainer: Any, lesson: types.SimpleNamespace) -> None:
    def slope(loss_type: str = "bnpo", **how: Any) -> tuple[torch.Tensor, torch.Tensor]:
        trainer.loss_type = loss_type
        logps_N = lesson.logps_N.clone().requires_grad_()
        loss = trl_loss(trainer, lesson, logps_N, **how)
        return loss.detach(), torch.autograd.grad(loss, logps_N)[0]

    asked = trainer._generate_and_score_completions([{"prompt": trainer.train_dataset[0]["prompt"]}] * 4)
    found = {"advantages": asked["advantages"], "token mean": slope()[0], "sequence mean": slope("grpo")[0],
             "token losses": torch.stack([slope(only=token)[0] for token in range(5)]), "pulls": 5 * slope()[1],
             "first update": slope(old=False)[1], "flat group": slope(flat=5)[0]}
    trainer.args.delta = 10.0
    found["dual clip"] = slope(only=4)[0]
    trainer.args.delta = None
    assert set(found) == set(FROM_TRL)
    for exercise, value in found.items():
        assert exercises.check(exercise, value) == f"{exercise}: right."


def test_our_functions_give_the_same_constants(lesson: types.SimpleNamespace) -> None:
    config = UpdateConfig()
    assert torch.allclose(advantages(lesson.rewards_G[None])[0], right("advantages"), atol=1e-5)
    assert torch.allclose((lesson.logps_N - lesson.old_logps_N).exp(), right("ratios"), atol=1e-5)
    advantages_N = right("advantages").repeat_interleave(lesson.lengths_G)
    logps_N = lesson.logps_N.clone().requires_grad_()
    loss_N, _ = objective.clipped_loss(logps_N, lesson.old_logps_N, advantages_N, config)
    assert torch.allclose(loss_N, right("token losses"), atol=1e-5)
    assert torch.allclose(torch.autograd.grad(loss_N.sum(), logps_N)[0], right("pulls"), atol=1e-5)
    assert loss_N.mean().item() == pytest.approx(right("token mean").item())


def test_the_cell_of_five_tokens_has_five(lesson: types.SimpleNamespace) -> None:
    assert int(lesson.lengths_G.sum()) == len(lesson.logps_N) == len(lesson.old_logps_N) == 5


@pytest.mark.parametrize("exercise", exercises.EXERCISES)
def test_the_right_answer_is_right_and_every_known_mistake_gets_its_hint(exercise: str) -> None:
    wanted = exercises.EXERCISES[exercise]
    assert exercises.check(exercise, torch.tensor(wanted.numbers())) == f"{exercise}: right."
    for numbers, said in wanted.mistakes:
        assert exercises.check(exercise, list(numbers)) == f"{exercise}: not yet. {said}"


@pytest.mark.parametrize("answer, said", [
    (None, "no answer yet"), (..., "no answer yet"), ("half", "numbers are wanted"), (1.5, "4 numbers are wanted"),
    ([[1.5, -0.5], [-0.5, -0.5]], "right."), ([9, 9, 9, 9], "Look at the formula again")])
def test_any_answer_gets_a_sentence(answer: Any, said: str) -> None:
    assert said in exercises.check("advantages", answer)
