"""What is sampled and learned from is the model's own probability, or the model is refused: one tiny model a kind."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tiny import ARCHITECTURES, make

from masa_lib.config import Config, ModelConfig
from masa_lib.engines import Completion, Request, logprobs, packing, self_check
from masa_lib.engines.in_process import TransformersEngine
from masa_lib.models import architecture, tensors
from masa_lib.models.tensors import ModelError
from masa_lib.recipes import pocket

#: its state is read wrongly in transformers' own generation, too
REFUSED = ("rwkv",)
#: with adapters: the routers of the first two give several tensors, which an adapter cannot; peft refuses the others
REFUSED_ADAPTED, NO_ADAPTERS = ("phimoe", "llama4_text"), ("mamba", "mamba2", "falcon_mamba", "falcon_h1")
#: one of each kind of difficulty; the others are slow tests
FAST = ("qwen3", "gpt2", "gemma2", "gemma3_text", "gpt_oss", "lfm2", "rwkv")
KINDS = [pytest.param(kind, marks=() if kind in FAST else pytest.mark.slow) for kind in ARCHITECTURES]
#: unequal, on both sides of the models' windows of 8 tokens; the first is shared
PROMPTS = ((5, 6, 7), (5, 6, 7), tuple(range(20, 34)), tuple(range(30, 41)))


def adapted(model: Any) -> Any:
    """The model with adapters that are no longer zero."""
    tensors.add_adapters(model, ModelConfig(lora_rank=2), None)
    with torch.no_grad():
        for weight in tensors.trainable(model):
            weight.normal_(0, 0.3)
    return model.eval()


def sampled(model: Any) -> list[logprobs.Sample]:
    engine = TransformersEngine(model, [0], batch=3)
    asked = [Request(prompt, 6 + seed, seed) for seed, prompt in enumerate(PROMPTS)]
    return [logprobs.Sample(request.prompt, answer.tokens, answer.logps, 1.0, 1.0)
            for request, answer in zip(asked, engine.generate(asked), strict=True)]


def learned(model: Any, samples: Sequence[logprobs.Sample]) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs of the update and the gradient of a weighted sum of them, in chunks of four tokens."""
    model.zero_grad()
    logps, _ = logprobs.completion_logps(model, samples, 1.0, 4)
    (logps * torch.arange(len(logps))).sum().backward()
    return logps.detach(), gradient(model)


def gradient(model: Any) -> torch.Tensor:
    return torch.cat([torch.zeros(w.numel()) if w.grad is None else w.grad.flatten() for w in tensors.trainable(model)])


def naive(model: Any, samples: Sequence[logprobs.Sample]) -> tuple[torch.Tensor, torch.Tensor]:
    """The same from one plain forward pass a sequence."""
    model.zero_grad()
    parts = []
    for sample in samples:
        logits = model(input_ids=torch.tensor([sample.prompt + sample.completion]), use_cache=False).logits
        logps = logits[0, len(sample.prompt) - 1:-1].log_softmax(-1)
        parts.append(logps.gather(1, torch.tensor(sample.completion)[:, None])[:, 0])
    logps = torch.cat(parts)
    (logps * torch.arange(len(logps))).sum().backward()
    return logps.detach(), gradient(model)


def check(model: Any, engine: Any = None) -> None:
    self_check.check(model, pocket.make_tokenizer(), engine or TransformersEngine(model, [0]), Config())


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
@pytest.mark.parametrize("kind", KINDS)
def test_log_probs_and_gradients_are_the_models_own_or_it_is_refused(kind: str, lora: bool) -> None:
    if lora and kind in NO_ADAPTERS:
        with pytest.raises(ValueError, match="incompatible with Mamba"):  # `models.load` makes it a ModelError
            adapted(make(kind))
        return
    model = adapted(make(kind)) if lora else make(kind)
    if kind in REFUSED or (lora and kind in REFUSED_ADAPTED):
        with pytest.raises(ModelError, match=rf"{kind}.*cannot be trained"):
            check(model)
        return
    check(model)
    samples = sampled(model)
    own, slope = naive(model, samples)
    assert (torch.tensor([logp for sample in samples for logp in sample.sampler_logps]) - own).abs().max() < 1e-4
    for recomputed in (False, True):
        if recomputed:
            architecture.checkpoint_layers(model)
        logps, found = learned(model, samples)
        assert (logps - own).abs().max() < 1e-4
        assert (found - slope).norm() < 1e-3 * slope.norm()
    assert not model.training


def test_adapters_are_part_of_what_is_compared() -> None:
    model = make("qwen3")
    samples = sampled(model)
    before, _ = naive(model, samples)
    assert (naive(adapted(model), samples)[0] - before).abs().max() > 0.01


@pytest.mark.parametrize("kind, fault", [
    ("gemma2", lambda model, hidden: model.get_output_embeddings()(hidden)),  # without the cap
    ("qwen3", lambda model, hidden: model.get_output_embeddings()(hidden) + torch.nan)])
def test_a_model_that_the_update_gets_wrong_is_refused_with_its_name_and_the_gap(kind, fault, monkeypatch) -> None:
    monkeypatch.setattr(architecture, "head_logits", fault)
    with pytest.raises(ModelError, match=rf"{kind}.*by the update are (nan|\d\.?\d*) nats a token from"):
        check(make(kind))


@pytest.mark.parametrize("row", range(3))
def test_log_probs_that_are_no_numbers_are_refused_in_whichever_prompt_they_are(row: int, monkeypatch) -> None:
    own, calls = self_check.plain_logps, []
    def plain_logps(model: Any, sample: logprobs.Sample) -> torch.Tensor:
        calls.append(sample)
        return own(model, sample) * (torch.nan if len(calls) == row + 1 else 1)

    monkeypatch.setattr(self_check, "plain_logps", plain_logps)
    with pytest.raises(ModelError, match=r"are nan nats a token from"):
        check(make("qwen3"))


def test_an_update_that_passes_over_a_window_is_refused(monkeypatch) -> None:
    seen = packing._seen
    monkeypatch.setattr(packing, "_seen", lambda queries, keys, window: seen(queries, keys, None))
    with pytest.raises(ModelError, match="by the update are"):
        check(make("gemma3_text"))


def test_an_engine_with_other_weights_than_the_policys_is_refused() -> None:
    model, stale = make("qwen3"), make("qwen3")
    with torch.no_grad():
        stale.get_output_embeddings().weight.mul_(1.1)
    with pytest.raises(ModelError, match=r"by sampling.engine=transformers are .* or sampling.engine"):
        check(model, TransformersEngine(stale, [0]))


def test_an_engine_that_fails_on_a_model_is_one_sentence() -> None:
    class Failing:
        def generate(self, requests: Sequence[Request]) -> list[Completion]:
            raise IndexError("list index out of range")

    with pytest.raises(ModelError, match=r"qwen3.*sampling.engine=transformers fails on it \(IndexError: 'list index"):
        check(make("qwen3"), Failing())


def test_prompts_of_the_check_are_unequal_and_longer_than_a_window_that_fits() -> None:
    tokenizer, config = pocket.make_tokenizer(), Config()
    def lengths(**changes: Any) -> list[int]:
        model = make("gemma3_text")
        for name, value in changes.items():
            setattr(model.config, name, value)
        return [len(request.prompt) for request in self_check._requests(model, tokenizer, None, config)]

    assert lengths() == [24, 6, 24]
    assert lengths(sliding_window=60) == [61, 15, 61]
    assert lengths(sliding_window=4096, max_position_embeddings=10_000)[0] == 24 + max(
        config.sampling.solution_tokens, config.sampling.meta_tokens)
    assert lengths(sliding_window=512)[0] == 128 - 8  # the context
    rotations = {"rope_type": "longrope", "original_max_position_embeddings": 40}
    assert lengths(rope_parameters=rotations)[0] == lengths(rope_parameters={"full_attention": rotations})[0] == 41


def test_rotations_that_change_beyond_a_length_are_met_by_the_check() -> None:
    with pytest.raises(ModelError, match=r"phi3.*cannot be trained"):
        check(make("phi3", original_max_position_embeddings=40, rope_parameters={
            "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}))


def test_layers_are_computed_again_by_copies_of_the_model_too() -> None:
    model = make("qwen3")
    architecture.checkpoint_layers(model)
    twin, calls = copy.deepcopy(model), []
    twin.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    learned(model, sampled(model))
    assert not calls
    learned(twin, sampled(model))
    assert len(calls) == 2


def test_a_model_without_layers_to_compute_again_is_refused() -> None:
    model = make("qwen3")
    model.supports_gradient_checkpointing = False
    with pytest.raises(architecture.ArchitectureError, match=r"'qwen3' does not support gradient checkpointing"):
        architecture.checkpoint_layers(model)
