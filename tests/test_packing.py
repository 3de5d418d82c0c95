"""An update's sequences in one row: no padding, each prompt once, and the log-probs of padded whole sequences."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tiny import make
from torch.nn.functional import scaled_dot_product_attention
from transformers import modeling_flash_attention_utils as flash

from masa_lib.engines import logprobs
from masa_lib.engines.logprobs import Sample
from masa_lib.models import architecture

#: prompts of several lengths, one of them shared; completions of several lengths, one a single token
SIZES = ((5, 12), (5, 1), (9, 7), (3, 20), (5, 4))


def samples() -> list[Sample]:
    words = torch.Generator().manual_seed(0)
    prompts = {length: tuple(torch.randint(180, (length,), generator=words).tolist()) for length, _ in SIZES}
    return [Sample(prompts[prompt], tuple(torch.randint(180, (length,), generator=words).tolist()), (0.0,) * length,
                   1.0, 1.0) for prompt, length in SIZES]


def learned(model: Any, chosen: Sequence[Sample]) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs, and the gradient of a weighted sum of them."""
    model.zero_grad()
    logps, _ = logprobs.completion_logps(model, chosen, 1.0, 16)
    (logps * torch.arange(1, len(logps) + 1)).sum().backward()
    return logps.detach(), torch.cat([weight.grad.flatten() for weight in model.parameters()])


def whole(model: Any, chosen: Sequence[Sample], monkeypatch: pytest.MonkeyPatch) -> tuple[torch.Tensor, torch.Tensor]:
    """The same from padded whole sequences."""
    with monkeypatch.context() as patch:
        patch.setattr(architecture, "packs", lambda model: False)
        return learned(model, chosen)


def assert_equal(found: tuple[torch.Tensor, torch.Tensor], wanted: tuple[torch.Tensor, torch.Tensor]) -> None:
    assert (found[0] - wanted[0]).abs().max() < 1e-5
    assert (found[1] - wanted[1]).norm() < 1e-5 * wanted[1].norm()


@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gemma3_text", "gpt_oss"])
def test_log_probs_and_gradients_are_those_of_padded_sequences(kind: str, recomputed: bool, monkeypatch) -> None:
    model = make(kind)
    wanted = whole(model, samples(), monkeypatch)
    if recomputed:
        architecture.checkpoint_layers(model)
    before = model.config._attn_implementation
    assert architecture.packs(model)
    assert_equal(learned(model, samples()), wanted)
    assert model.config._attn_implementation is before


def test_completions_of_one_token_each_need_their_prompts_alone(monkeypatch) -> None:
    model, chosen = make("qwen3"), [sample for sample in samples() if len(sample.completion) == 1]
    assert_equal(learned(model, chosen), whole(model, chosen, monkeypatch))


@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
def test_no_token_of_padding_and_each_prompt_once_goes_through_the_layers(recomputed: bool) -> None:
    model, chosen, seen = make("qwen3"), samples(), []
    if recomputed:
        architecture.checkpoint_layers(model)
    model.model.layers[0].mlp.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[:2].numel()))
    learned(model, chosen)
    fed = sum(map(len, {sample.prompt for sample in chosen})) + sum(len(sample.completion) - 1 for sample in chosen)
    assert seen == [fed] * (1 + recomputed)
    assert logprobs.computed_tokens(model, chosen) == fed + len(chosen)


def test_sequences_of_a_prompt_stay_together_in_micro_batches_within_the_budget() -> None:
    chosen = [Sample((number % 3,) * 4, (1,) * (2 + 5 * number % 7), (), 1.0, 1.0) for number in range(12)]
    batches = list(logprobs.micro_batches(chosen, 48))
    assert sorted(map(id, chosen)) == sorted(id(sample) for batch in batches for sample in batch)
    assert all(len(batch) * max(sample.length for sample in batch) <= 48 for batch in batches)
    prompts = [sample.prompt for batch in batches for sample in batch]
    assert sum(one != other for one, other in itertools.pairwise(prompts)) == 2


def test_a_model_whose_attention_sees_chunks_computes_whole_sequences() -> None:
    assert not architecture.packs(make("llama4_text"))
    assert not architecture.packs(make("qwen3", attn_implementation="flex_attention"))


def varlen(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor,
           max_seqlen_q: int, max_seqlen_k: int, causal: bool, softmax_scale: float | None = None,
           window_size: tuple[int, int] = (-1, -1), **_: Any) -> torch.Tensor:
    """What `flash_attn_varlen_func` computes, on a CPU: the last query of a sequence sees its last key."""
    found = []
    for first, last, begin, end in zip(cu_seqlens_q[:-1], cu_seqlens_q[1:], cu_seqlens_k[:-1], cu_seqlens_k[1:],
                                       strict=True):
        assert causal and last - first <= max_seqlen_q and end - begin <= max_seqlen_k
        back = torch.arange(end - begin - (last - first), end - begin)[:, None] - torch.arange(end - begin)
        seen = (back >= 0) & (back <= window_size[0] if window_size[0] >= 0 else True)
        query, key, value = (part.transpose(0, 1) for part in (q[first:last], k[begin:end], v[begin:end]))
        found.append(scaled_dot_product_attention(query, key, value, seen, scale=softmax_scale, enable_gqa=True))
    return torch.cat(found, dim=1).transpose(0, 1)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3_text"])
def test_a_kernel_for_sequences_of_any_length_takes_them_without_padding(kind: str, monkeypatch) -> None:
    model = make(kind)
    wanted = whole(model, samples(), monkeypatch)
    process = lambda **given: {  # noqa: E731
        "max_seqlen_q": given["max_seqlen_q"], "max_seqlen_k": given["max_seqlen_k"], "causal": given["is_causal"],
        "softmax_scale": given["softmax_scale"],
        "window_size": (given["sliding_window"] - 1, 0) if given["sliding_window"] else (-1, -1)}
    asked = []
    monkeypatch.setattr(flash, "lazy_import_flash_attention", lambda name: (
        asked.append(name), ((None, varlen, None, None, None), process))[1])
    model.config._attn_implementation = "flash_attention_2"
    assert_equal(learned(model, samples()), wanted)
    assert set(asked) == {"flash_attention_2"}
