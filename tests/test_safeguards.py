"""Memory that runs out in an update, and numbers that are not finite: no run is ruined, and none in silence."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small import small, timeless

from masa_lib.engines import logprobs
from masa_lib.errors import is_out_of_memory
from masa_lib.models import loading
from masa_lib.recipes import warmup
from masa_lib.runs.folder import Run
from masa_lib.training import drive, safeguards
from masa_lib.training.safeguards import TokenBudget, UpdateError
from masa_lib.training.trainer import Trainer

WHOLE = {"update.token_budget": 10**6, "steps": 2, "sampling.problems": 4, "sampling.solution_tokens": 40,
         "evaluation.final_problems": 1, "evaluation.final_samples": 1, "evaluation.predictions": 0}


def weights(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def short_of_memory(model: torch.nn.Module, most: int, error: Callable[[], Exception], where: str = "forward") -> list:
    """Let the model's passes with a gradient over more than so many places fail; gives the sizes of those."""
    failed: list[int] = []

    def fail(states: torch.Tensor, counts: bool) -> None:
        if counts and states.shape[:2].numel() > most:
            failed.append(states.shape[:2].numel())
            raise error()

    def watch(module: torch.nn.Module, given: tuple, states: torch.Tensor) -> None:
        if states.requires_grad:
            states.register_hook(lambda gradient: fail(states, True))

    layer = model.model.layers[1]
    if where == "forward":
        layer.register_forward_pre_hook(lambda module, given: fail(given[0], torch.is_grad_enabled()))
    else:  # in the middle of the backward pass, when the layers above have their gradients
        layer.register_forward_hook(watch)
    return failed


SHORTAGES = {"of torch": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
             "of Python": MemoryError}


@pytest.mark.parametrize(("kind", "where"), [("of torch", "backward"), ("of Python", "forward")])
def test_out_of_memory_in_an_update_halves_the_micro_batch_and_leaves_its_gradient(
        kind: str, where: str, caplog: pytest.LogCaptureFixture) -> None:
    plain, short = Trainer(small(WHOLE)), Trainer(small(WHOLE))
    failed = short_of_memory(short.model, 300, SHORTAGES[kind], where)
    with caplog.at_level(logging.WARNING, "masa"):
        (_, row), (_, expected) = short.train_step(), plain.train_step()
    assert failed and row["token_budget"] < expected["token_budget"] == 10**6
    assert [f"at most {row['token_budget']} tokens instead of" in said for said in caplog.messages] == [True]
    one, other = (torch.cat([p.grad.flatten() for p in trained.model.parameters()]) for trained in (short, plain))
    assert (one - other).norm() < 1e-3 * other.norm()
    smaller = Trainer(small(WHOLE | {"update.token_budget": row["token_budget"]}))
    assert timeless(smaller.train_step()[1]) == timeless(row) and torch.equal(weights(smaller.model),
                                                                              weights(short.model))
    failed.clear()
    assert short.train_step()[1]["token_budget"] <= row["token_budget"]  # it is where the next step begins


def test_the_halved_budget_is_kept_over_a_resume(tmp_path: Path) -> None:
    config = small(WHOLE | {"record.checkpoint_every": 1})
    begun = Trainer(config, Run.create(tmp_path / "run", config, "masa train"))
    short_of_memory(begun.model, 300, MemoryError)
    budget = next(begun).metrics["token_budget"]
    assert drive.resume(tmp_path / "run").metrics()["token_budget"].tolist() == [budget, budget]


def test_the_log_probs_before_the_first_of_several_updates_are_computed_within_the_memory_too() -> None:
    changes = WHOLE | {"steps": 1, "update.updates_per_step": 2}
    short = Trainer(small(changes))
    whole = logprobs.reference_logps
    sizes = []

    def reference(model, samples, config, temperature):
        sizes.append(config.token_budget)
        if config.token_budget > 4000:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return whole(model, samples, config, temperature)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logprobs, "reference_logps", reference)
        _, row = short.train_step()
    assert len(sizes) > 1 and row["token_budget"] == sizes[-1] <= 4000
    assert timeless(row) == timeless(Trainer(small(changes | {"update.token_budget": sizes[-1]})).train_step()[1])


def test_one_sequence_that_is_too_much_is_a_sentence_and_other_errors_stay_what_they_are(tmp_path: Path) -> None:
    config = small(WHOLE)
    begun = Trainer(config)
    short_of_memory(begun.model, 0, MemoryError)
    with pytest.raises(UpdateError, match=r"one sequence at a time, of \d+ tokens at most \(MemoryError\); set "):
        begun.train_step()
    other = Trainer(config)
    short_of_memory(other.model, 0, lambda: RuntimeError("CUDA error: an illegal memory access was encountered"))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        other.train_step()


def test_what_torch_raises_where_the_memory_of_the_cpu_is_short_is_known() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**58)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"))
    assert not is_out_of_memory(RuntimeError("the size of tensor a must match"))


def samples() -> tuple:
    """A model, and the sequences of two problems to imitate."""
    model, tokenizer = loading.load(small().model)
    ids = [tuple(tokenizer(text)["input_ids"]) for text in ("1 + 2", "3 + 4 + 5")]
    return model, [logprobs.Sample(prompt, prompt * 3, (), 0.0, 0.0) for prompt in ids for _ in range(3)]


def test_imitation_halves_the_micro_batch_too() -> None:
    found = []
    for memory in (None, 30):
        model, rows = samples()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        if memory:
            short_of_memory(model, memory, MemoryError)
        budget = TokenBudget()
        loss, _ = warmup.imitate(model, optimizer, rows, small().update, budget)
        assert (budget.most is not None) == bool(memory)
        found.append((loss, torch.cat([parameter.grad.flatten() for parameter in model.parameters()])))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    assert (found[0][1] - found[1][1]).norm() < 1e-4 * found[0][1].norm()


# Numbers that are not finite.

def spoil(model: torch.nn.Module, value: float) -> None:
    """Put a number into one gradient."""
    model.model.layers[2].mlp.up_proj.weight.register_hook(lambda gradient: gradient.index_fill(
        0, torch.tensor([3]), value))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_ends_the_run_before_the_optimiser_moves(value: float, tmp_path: Path) -> None:
    config = small(WHOLE | {"record.checkpoint_every": 1})
    run = Run.create(tmp_path / "run", config, "masa train")
    begun = Trainer(config, run)
    next(begun)
    states = begun.learner.optimizer.state
    before, moments = weights(begun.model), [state["exp_avg"].clone() for state in states.values()]
    spoil(begun.model, value)
    with pytest.raises(UpdateError, match=r"^The update was left out, .* gradient is (nan|inf), .*Lower "
                       r"update\.learning_rate or set model\.precision=float32") as caught:
        next(begun)
    assert "\n" not in str(caught.value)
    assert torch.equal(weights(begun.model), before) and begun.step == 1
    assert all(torch.equal(a, b["exp_avg"]) for a, b in zip(moments, states.values(), strict=True))
    assert run.metrics()["step"].tolist() == [1] and run.latest_checkpoint()[0] == 1


def test_the_status_of_a_run_that_meets_nan_is_failed_and_says_why(tmp_path: Path,
                                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    load = loading.load

    def spoiled(*given):
        model, tokenizer = load(*given)
        spoil(model, math.nan)
        return model, tokenizer

    monkeypatch.setattr(loading, "load", spoiled)
    with pytest.raises(UpdateError):
        drive.train(small(WHOLE), tmp_path / "run", "masa train")
    run = Run.open(tmp_path / "run")
    assert run.status["state"] == "failed" and "Lower update.learning_rate" in run.status["message"]
    assert not (run.path / "model").exists() and run.latest_checkpoint() is None


def test_a_loss_that_is_not_finite_is_refused_where_the_gradients_are() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.grad = torch.ones(2)
    assert safeguards.clip_gradients([parameter], 1.0, 0.5) == pytest.approx(2**0.5)
    for loss in (math.nan, math.inf):
        with pytest.raises(UpdateError, match=r"whole, but its loss is (nan|inf), where"):
            safeguards.clip_gradients([parameter], 1.0, loss)


def test_the_warm_up_refuses_it_too() -> None:
    config = small()
    model, rows = samples()
    before = weights(model)
    spoil(model, math.nan)
    with pytest.raises(UpdateError):
        warmup.teach(model, [rows], config, warmup.Recipe(epochs=1, batch=1), random.Random(0))
    assert torch.equal(weights(model), before)


def test_moments_that_find_no_memory_are_one_sentence_and_no_weight_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    weight.grad = torch.ones(3)
    optimizer = torch.optim.AdamW([weight])

    def full(*_: object, **__: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 12 bytes.")

    monkeypatch.setattr(torch, "zeros_like", full)
    with pytest.raises(safeguards.UpdateError, match="ran out of memory for its moments"):
        safeguards.move(optimizer)
    assert weight.tolist() == [1.0] * 3
