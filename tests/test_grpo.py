"""Advantages, log-probs and the loss against their plain definitions."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from masa_lib import config as configs
from masa_lib.config import Config, UpdateConfig
from masa_lib.engines import logprobs
from masa_lib.method import objective
from masa_lib.method.advantages import advantages, zero_variance
from masa_lib.recipes import pocket

CONFIG = UpdateConfig()


@pytest.fixture(scope="module")
def model():
    """An untrained model of the pocket model's shape."""
    torch.manual_seed(0)
    recipe = dataclasses.replace(pocket.Recipe(), hidden_size=32, layers=2)
    return pocket.make_model(recipe, pocket.make_tokenizer()).eval()


def make_samples(model, rewards_PG: torch.Tensor, config: UpdateConfig = CONFIG) -> list[logprobs.Sample]:
    """Random sequences of various lengths with the advantages of the rewards; every other group is a meta group."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 12, (rewards_PG.numel(),), generator=generator).tolist()
    streams = [("solution", "meta")[p % 2] for p in range(len(rewards_PG)) for _ in range(rewards_PG.shape[1])]
    weights = objective.token_weights(lengths, streams, config)
    found = advantages(rewards_PG).flatten().tolist()
    samples = []
    for length, stream, weight, advantage in zip(lengths, streams, weights, found, strict=True):
        ids = torch.randint(0, 64, (5 + length,), generator=generator).tolist()
        samples.append(logprobs.Sample(tuple(ids[:5]), tuple(ids[5:]), (0.0,) * length, advantage, weight, stream))
    return samples


def gradient(model, samples, config=CONFIG, temperature=1.0, old=None) -> torch.Tensor:
    model.zero_grad()
    objective.accumulate_gradients(model, samples, config, temperature, old)
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def naive_gradient(model, samples, config=CONFIG, temperature=1.0) -> torch.Tensor:
    """One sequence at a time, full logits, the formula as it stands in the paper."""
    model.zero_grad()
    for sample in samples:
        ids = torch.tensor([sample.prompt + sample.completion])
        logps = (model(input_ids=ids).logits[0, len(sample.prompt) - 1:-1] / temperature).log_softmax(-1)
        chosen = logps.gather(1, torch.tensor(sample.completion)[:, None])[:, 0]
        ratio = torch.exp(chosen - chosen.detach())
        bounded = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
        objective = torch.minimum(ratio * sample.advantage, bounded * sample.advantage)
        if sample.stream == "meta":
            objective = objective - config.meta_entropy * (logps.exp() * logps).sum(-1)
        (-sample.weight * objective).sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@given(st.lists(st.lists(st.floats(0, 1, width=32), min_size=4, max_size=4), min_size=1, max_size=5))
@settings(max_examples=50, deadline=None)
def test_advantages_have_mean_zero_and_vanish_exactly_without_variance(rows):
    rewards_PG = torch.tensor(rows, dtype=torch.float64)
    found = advantages(rewards_PG)
    flat = zero_variance(rewards_PG)
    assert torch.allclose(found.mean(1), torch.zeros(len(rows), dtype=torch.float64), atol=1e-6)
    assert (found[flat] == 0).all()
    wide = rewards_PG.std(1) > 0.01
    assert all(abs(float(row.std()) - 1) < 1e-3 for row in found[wide])


def test_advantages_without_normalisation_are_the_centred_rewards():
    found = advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0]]), normalise_std=False)
    assert found.tolist() == [[0.75, -0.25, -0.25, -0.25]]


def test_gradient_is_the_naive_one_and_groups_without_variance_may_stay_out(model):
    rewards_PG = torch.tensor([[1.0, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1], [0.2, 0.4, 0.4, 0.9]])
    samples = make_samples(model, rewards_PG)
    kept = [sample for sample in samples if sample.advantage != 0]
    assert len(kept) == 8
    expected = naive_gradient(model, samples)
    assert expected.abs().max() > 1e-3
    assert torch.allclose(gradient(model, kept), expected, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("bonus", [0.0, 0.5])
def test_bonus_and_temperature_have_the_naive_gradient(model, bonus, temperature):
    samples = make_samples(model, torch.rand(4, 4, generator=torch.Generator().manual_seed(0)))
    config = dataclasses.replace(CONFIG, meta_entropy=bonus)
    expected = naive_gradient(model, samples, config, temperature)
    if bonus:
        assert (expected - naive_gradient(model, samples, temperature=temperature)).abs().max() > 1e-3
    assert torch.allclose(gradient(model, samples, config, temperature), expected, atol=1e-6)


@pytest.mark.parametrize("budget, chunk", [(1, 1), (40, 7), (10_000, 10_000)])
def test_micro_batches_and_chunks_do_not_change_the_gradient(model, budget, chunk):
    samples = make_samples(model, torch.rand(6, 4, generator=torch.Generator().manual_seed(0)))
    config = dataclasses.replace(CONFIG, token_budget=budget, logprob_chunk=chunk)
    assert torch.allclose(gradient(model, samples, config), gradient(model, samples), atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probs_and_entropy_are_those_of_the_full_logits(model, temperature):
    sample = make_samples(model, torch.tensor([[0.0, 1.0]]))[0]
    logps, entropy = logprobs.completion_logps(model, [sample], temperature, 3)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([sample.prompt + sample.completion])).logits[0, 4:-1] / temperature
    full = logits.log_softmax(-1)
    assert torch.allclose(logps, full.gather(1, torch.tensor(sample.completion)[:, None])[:, 0], atol=1e-5)
    assert torch.allclose(entropy, -(full.exp() * full).sum(-1), atol=1e-5)


def test_a_stream_is_divided_by_its_own_tokens_or_by_the_batchs():
    lengths, streams = [3, 1, 6], ["solution", "solution", "meta"]
    def weights(**changes):
        return objective.token_weights(lengths, streams, dataclasses.replace(CONFIG, **changes))

    assert weights() == pytest.approx([1 / 4, 1 / 4, 1 / 6])
    assert weights(meta_weight=0.5) == pytest.approx([1 / 4, 1 / 4, 1 / 12])
    assert weights(denominator="batch") == pytest.approx([1 / 10] * 3)
    assert weights(loss_mean="sequence") == pytest.approx([1 / 6, 1 / 2, 1 / 6])
    assert weights(loss_mean="sequence", denominator="batch") == pytest.approx([1 / 9, 1 / 3, 1 / 18])


def test_the_clip_stops_gains_but_not_losses_and_the_dual_clip_bounds_losses():
    ratio = torch.tensor([1.5, 0.5, 1.5, 0.5, 20.0])
    advantage = torch.tensor([1.0, 1.0, -1.0, -1.0, -1.0])
    loss, clipped = objective.clipped_loss(ratio.log(), torch.zeros(5), advantage, CONFIG)
    assert loss.tolist() == pytest.approx([-1.28, -0.5, 1.5, 0.8, 20.0])
    assert clipped.tolist() == [True, False, False, True, False]
    loss, _ = objective.clipped_loss(ratio.log(), torch.zeros(5), advantage, dataclasses.replace(CONFIG, dual_clip=3.0))
    assert loss.tolist() == pytest.approx([-1.28, -0.5, 1.5, 0.8, 3.0])


def test_old_log_probs_make_the_clip_act(model):
    samples = make_samples(model, torch.tensor([[0.0, 1.0, 1.0, 0.0]]))
    old = logprobs.reference_logps(model, samples, CONFIG, 1.0)
    fresh = gradient(model, samples, old=old)
    assert torch.allclose(fresh, gradient(model, samples), atol=1e-6)
    moved = {key: logps - 1.0 for key, logps in old.items()}  # every ratio is e
    model.zero_grad()
    assert objective.accumulate_gradients(model, samples, CONFIG, 1.0, moved)["clipped"] > 0


MEMORY = """
import sys, torch
from transformers import Qwen3Config, Qwen3ForCausalLM
from masa_lib.engines import logprobs
from masa_lib.models import loading
loading.tune_heap()
torch.manual_seed(0)
model = Qwen3ForCausalLM(Qwen3Config(vocab_size=50_000, hidden_size=32, num_hidden_layers=1, num_attention_heads=1,
                                     num_key_value_heads=1, head_dim=32, intermediate_size=32))
ids = torch.randint(0, 50_000, (16, 129))
def peak():  # of this program; getrusage would count the one that started it, too
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
before = peak()
if sys.argv[1] == "full":
    logps = model(input_ids=ids).logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])
else:
    samples = [logprobs.Sample(tuple(row[:1]), tuple(row[1:]), (), 1.0, 1.0) for row in ids.tolist()]
    logps, _ = logprobs.completion_logps(model, samples, 1.0, 128)
logps.sum().backward()
print(peak() - before)
"""


@pytest.mark.slow
def test_peak_memory_stays_far_below_that_of_full_logits_with_a_large_vocabulary():
    peak = {way: int(subprocess.run([sys.executable, "-c", MEMORY, way], capture_output=True, text=True,
                                    check=True).stdout) for way in ("full", "chunks")}
    assert peak["full"] > 400_000  # kilobytes: 2048 x 50,000 numbers of four bytes
    assert peak["chunks"] < peak["full"] / 3


def test_tokens_weigh_their_probability_under_the_learner_over_that_under_the_sampler_up_to_the_cap(
        model, monkeypatch):
    samples = make_samples(model, torch.tensor([[1.0, 0.0, 0.0]]))
    with torch.no_grad():
        own = logprobs.reference_logps(model, samples, CONFIG, 1.0)
    apart = {id(sample): torch.linspace(-1.0, 2.0, len(sample.completion)) for sample in samples}
    told = [dataclasses.replace(sample, sampler_logps=tuple((own[id(sample)] - apart[id(sample)]).tolist()))
            for sample in samples]
    weighed = dataclasses.replace(CONFIG, sampler_weight="on")
    monkeypatch.setattr(objective, "SAMPLER_CAP", 2.0)
    expected = torch.zeros(())
    for sample in samples:
        logps, _ = logprobs.completion_logps(model, [sample], 1.0, 64)
        ratio = torch.exp(logps - logps.detach())
        expected = expected - (sample.weight * sample.advantage * ratio * apart[id(sample)].exp().clamp(max=2.0)).sum()
    model.zero_grad()
    expected.backward()
    wanted = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    assert torch.allclose(gradient(model, told, weighed), wanted, atol=1e-6)
    plain = gradient(model, samples)
    assert torch.equal(gradient(model, told), plain) and not torch.allclose(wanted, plain, atol=1e-3)
    untold = [dataclasses.replace(sample, sampler_logps=(math.nan,) * len(sample.completion)) for sample in samples]
    assert torch.equal(gradient(model, untold, weighed), plain)


@pytest.mark.parametrize("changes, weighs", [
    ({}, False), ({"sampling.engine": "vllm"}, False), ({"model.precision": "bfloat16"}, False),
    ({"sampling.engine": "vllm", "model.precision": "bfloat16"}, True), ({"update.sampler_weight": "on"}, True),
    ({"sampling.engine": "vllm", "model.precision": "bfloat16", "update.sampler_weight": "off"}, False)])
def test_the_samplers_weight_acts_by_default_where_it_computes_in_another_precision(changes, weighs):
    assert objective.weighs_sampler(configs.replace(Config(), changes)) == weighs
