"""The other half of an engine's contract: what it reads is what a plain forward pass says of the next token."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_engine import ENGINES, PROMPTS, generate, make_policy, mean_gap, requests, update
from transformers import MistralConfig, MistralForCausalLM

from masa_lib.config import ModelConfig
from masa_lib.engines import EngineError, Reading, Request, make_engine
from masa_lib.engines.counting import CountingEngine
from masa_lib.engines.in_process import TransformersEngine
from masa_lib.models import loading

SUFFIX = (44, 45, 46)
CHOICES = (48, 49, 50, 51, 52, 53, 54, 55, 56)
#: largest gap of a probability that rounding may cause
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}


@pytest.fixture(scope="module", params=ENGINES)
def policy(request):
    """The bundled model in float32."""
    return make_policy(request.param, "pocket", "float32", 0.02)


def read(policy: SimpleNamespace, prompts, suffix=SUFFIX, choices=CHOICES) -> Reading:
    """Read as the trainer does: under its autocast."""
    with loading.precision(policy.config, policy.model.device):
        return policy.engine.read(prompts, suffix, choices)


def plain(policy: SimpleNamespace, prompts, suffix=SUFFIX, choices=CHOICES) -> np.ndarray:
    """Log-probs of the choices by one forward pass a prompt, without padding and cache, in float32."""
    rows = []
    with torch.no_grad():
        for prompt in prompts:
            logits = policy.model(input_ids=torch.tensor([prompt + suffix]), use_cache=False).logits[0, -1]
            rows.append(logits.float().log_softmax(-1)[list(choices)].numpy())
    return np.stack(rows)


def check(policy: SimpleNamespace, prompts, suffix=SUFFIX) -> None:
    tolerance = TOLERANCE[policy.config.precision]
    reading, expected = read(policy, prompts, suffix), plain(policy, prompts, suffix)
    assert reading.logps.dtype == reading.outside.dtype == np.float32
    assert reading.logps.shape == (len(prompts), len(CHOICES))
    np.testing.assert_allclose(np.exp(reading.logps), np.exp(expected), atol=tolerance)
    if policy.config.precision == "float32":
        np.testing.assert_allclose(reading.logps, expected, atol=tolerance)
    np.testing.assert_allclose(reading.outside, 1 - np.exp(expected).sum(1), atol=tolerance)


@pytest.mark.parametrize("suffix", [SUFFIX, ()])
def test_a_reading_is_that_of_a_plain_forward_pass_before_and_after_an_update(policy, suffix):
    check(policy, PROMPTS, suffix)
    before = read(policy, PROMPTS, suffix)
    update(policy, rate=0.3)
    assert np.abs(read(policy, PROMPTS, suffix).logps - before.logps).max() > 1e-2  # stale weights would be seen
    check(policy, PROMPTS, suffix)


def test_more_prompts_than_a_batch_of_all_lengths_and_some_twice(policy):
    prompts = [(2, *range(40, 41 + 7 * number % 90), 3) for number in range(150)]
    check(policy, prompts)
    assert len(set(prompts)) < len(prompts)


@pytest.mark.parametrize("precision, name", [("bfloat16", "pocket")])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_reading_in_bfloat16_is_near_the_forward_pass_in_float32(engine, precision, name):
    check(make_policy(engine, name, precision, 0.02), PROMPTS)


def test_the_mass_outside_the_choices_and_what_is_read_add_up(policy):
    everything = read(policy, PROMPTS, choices=range(policy.model.config.vocab_size)[:100])
    some = read(policy, PROMPTS)
    np.testing.assert_allclose(np.exp(some.logps).sum(1) + some.outside, 1, atol=1e-5)
    assert (everything.outside < some.outside).all()


def test_sampling_after_a_reading_gives_the_same_answers_and_computes_less(policy):
    asked, others = requests(24), ((2, 60, 61, 3), (2, *range(50, 120), 3))
    policy.engine.sync()
    expected = generate(policy, asked)
    full = policy.engine.prefill_tokens
    read(policy, [*others, *PROMPTS[1:], PROMPTS[1]])  # two of the three prompts, among others
    found = generate(policy, asked)
    assert [answer.tokens for answer in found] == [answer.tokens for answer in expected]
    gaps = [np.abs(np.subtract(a.logps, b.logps)).max() for a, b in zip(found, expected, strict=True)]
    assert max(gaps) < 1e-4
    computed = {"transformers": len(PROMPTS[0]), "paged": full}
    assert policy.engine.prefill_tokens == computed.get(policy.name, full - 64)  # vLLM keeps whole blocks of 32


def test_kept_prompts_serve_every_call_until_the_weights_change():
    policy = make_policy("transformers", "pocket", "float32", 0.02)
    asked = requests(12)
    read(policy, PROMPTS)
    first = generate(policy, asked)
    assert generate(policy, asked) == first
    assert policy.engine.prefill_tokens == 0
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.mul_(1.1)  # without telling the engine
    assert mean_gap(policy, asked, generate(policy, asked)) < 1e-3
    assert policy.engine.prefill_tokens == sum(map(len, PROMPTS))


def test_prompts_kept_in_one_precision_do_not_serve_another():
    policy = make_policy("transformers", "pocket", "bfloat16", 0.02)
    read(policy, PROMPTS)
    policy.engine.generate(requests(3))  # without autocast
    assert policy.engine.prefill_tokens == sum(map(len, PROMPTS))


def test_a_beginning_that_all_prompts_share_is_computed_once(policy):
    beginning = (2, *range(30, 99))
    prompts = [(*beginning, *range(60, 61 + 9 * number)) for number in range(4)]
    policy.engine.sync()
    check(policy, prompts)
    rests = sum(len(prompt) + len(SUFFIX) - len(beginning) for prompt in prompts)
    assert policy.engine.prefill_tokens <= rests + len(beginning) + 3 * 32  # vLLM shares whole blocks of 32
    asked = [Request(prompt, 12, seed) for seed, prompt in enumerate(prompts)]
    for _ in range(2):  # from what is kept, then anew
        assert mean_gap(policy, asked, generate(policy, asked)) < 1e-5
        policy.engine.sync()


def test_a_reading_in_turns_keeps_a_batch_of_prompts():
    policy = make_policy("transformers", "pocket", "float32", 0.02)
    policy.engine = make_engine("transformers", policy.model, policy.tokenizer, batch=2)
    check(policy, PROMPTS)
    generate(policy, requests(3))
    assert policy.engine.prefill_tokens == min(map(len, PROMPTS))  # the longest two were kept


def test_read_tokens_are_counted_once_a_prompt_with_the_forced_beginning(policy):
    engine = CountingEngine(policy.engine)
    for _ in range(2):
        engine.read([PROMPTS[0], PROMPTS[1], PROMPTS[0]], SUFFIX, CHOICES)
    assert engine.read_tokens == 2 * (len(PROMPTS[0]) + len(PROMPTS[1]) + 2 * len(SUFFIX))
    assert engine.prefill == engine.decode == 0


@pytest.mark.parametrize("prompts, choices, message", [
    ([], CHOICES, "no prompts"), ([PROMPTS[0], ()], CHOICES, "Prompt 1 .* empty"),
    ([(5,) * 1021], CHOICES, r"1021 prompt \+ 3 forced \+ 1 read tokens, but the model's context is 1024"),
    (PROMPTS, (), "at least one"), (PROMPTS, (48, 48), "all different"), (PROMPTS, (-1, 3), "from 0 to"),
    (PROMPTS, (48, 10**6), "from 0 to")])
def test_what_cannot_be_read_is_refused_with_a_sentence(policy, prompts, choices, message):
    with pytest.raises(EngineError, match=message):
        read(policy, prompts, choices=choices)


def test_the_longest_prompt_that_fits_is_read(policy):
    reading = read(policy, [(5,) * 1020])
    np.testing.assert_allclose(reading.logps, plain(policy, [(5,) * 1020]), atol=1e-4)


@pytest.mark.parametrize("sizes, computed", [
    ((40, 25, 20), 40 + 25 + 20 + 3 * 3), ((20, 24, 18), 17 + 3 + 7 + 1 + 3 * 3)])
def test_a_sliding_window_sees_what_it_should_whether_a_beginning_is_shared_or_not(sizes, computed):
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(
        vocab_size=130, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=99, initializer_range=0.5, sliding_window=28)).eval()
    policy = SimpleNamespace(config=ModelConfig(device="cpu"), model=model, engine=TransformersEngine(model, [1]))
    prompts = [tuple(range(40, 40 + size)) for size in sizes]
    check(policy, prompts)
    assert policy.engine.prefill_tokens == computed
    asked = [Request(prompt, 20, seed) for seed, prompt in enumerate(prompts)]
    assert mean_gap(policy, asked, generate(policy, asked)) < 1e-5
    assert policy.engine.prefill_tokens == 0
