"""The place where a belief is read, in the words of every tier's tokenizer and of others that cut text differently.

What counts: behind the forced beginning stands the token that the tokenizer itself puts there when a whole prediction
is encoded. Where a tokenizer cannot be had, one is built that cuts text as it does and has the merges at stake.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, pre_tokenizers
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Digits, Metaspace, Split
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from masa_lib.config import PromptConfig
from masa_lib.method import beliefs, prompts
from masa_lib.method.beliefs import ANSWERS, BeliefError
from masa_lib.models import loading, tiers

WORDINGS = ("compact", "paper")
#: how the tokenizers of Qwen (2 to 3) and of Llama 3 cut a text into pieces: digits alone, or by three
_CUT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+")


def built(cut: Any, merges: list[tuple[str, str]], space: str = "\u0120") -> PreTrainedTokenizerFast:
    """A byte-level tokenizer that cuts texts so, knows every byte, and joins these pairs."""
    words = sorted({*ByteLevel.alphabet(), space}) + [left + right for left, right in merges]
    backend = Tokenizer(BPE({word: number for number, word in enumerate(words)}, merges))
    backend.pre_tokenizer, backend.decoder = cut, ByteLevelDecoder()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def split(digits: str) -> pre_tokenizers.PreTokenizer:
    """Pieces as Qwen or Llama 3 cut them, as bytes."""
    return pre_tokenizers.Sequence([Split(Regex(_CUT % digits), "isolated"),
                                    ByteLevel(add_prefix_space=False, use_regex=False)])


#: the merges at stake: two digits, and a space (as bytes are written: \u0120) with a digit
_PAIRS = [("4", "0"), ("1", "0"), *(("\u0120", digit) for digit in ANSWERS)]
BUILT = {
    "Qwen": built(split(""), _PAIRS), "Llama 3": built(split("{1,3}"), _PAIRS),
    "GPT-2, spaces go with digits": built(ByteLevel(add_prefix_space=False), _PAIRS),
    "SmolLM2": built(pre_tokenizers.Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]),
                     _PAIRS),
    "Llama 2, spaces are a word": built(pre_tokenizers.Sequence([Metaspace(prepend_scheme="first", split=False),
                                                                 Digits(individual_digits=True)]), [], "\u2581")}


def check(tokenizer: Any, wording: str) -> beliefs.Question:
    asked = beliefs.question(tokenizer, PromptConfig(wording=wording))
    beginning = beliefs._BEGINNING[wording]
    for answer, choice in zip(ANSWERS, asked.choices, strict=True):
        whole = tokenizer.encode(f'{beginning}{answer}, "solution_length": 140}}', add_special_tokens=False)
        assert tuple(whole[:len(asked.suffix) + 1]) == (*asked.suffix, choice)
        assert tokenizer.decode([choice]).strip() == answer
    return asked


@pytest.mark.parametrize("wording", WORDINGS)
@pytest.mark.parametrize("name", BUILT)
def test_a_belief_is_read_where_a_written_prediction_has_its_pass_rate(name, wording):
    asked = check(BUILT[name], wording)
    carried = BUILT[name].convert_ids_to_tokens(asked.choices[0]) == "\u01200"
    assert carried == name.startswith("GPT-2")


@pytest.mark.parametrize("wording", WORDINGS)
@pytest.mark.parametrize("name", ["pocket", "smollm2"])
def test_the_tiers_tokenizers_have_the_nine_answers_also_behind_a_chat(name, wording):
    place = Path(loading.folder(name))
    tokenizer = AutoTokenizer.from_pretrained(place)
    asked = check(tokenizer, wording)
    config = tiers.config({"model.name": name, "prompt.wording": wording}).prompt
    messages = prompts.solution_messages("What is 3 + 4?", config)
    chat = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    for answer, choice in zip(ANSWERS, asked.choices, strict=True):
        whole = tokenizer.encode(chat + beliefs._BEGINNING[wording] + answer, add_special_tokens=False)
        assert whole == [*prompts.encode(tokenizer, messages), *asked.suffix, choice]


def test_a_tokenizer_that_has_a_token_for_some_answers_alone_is_refused_with_a_sentence():
    some = built(ByteLevel(add_prefix_space=False), [("\u0120", digit) for digit in ANSWERS[:8]])
    with pytest.raises(BeliefError, match=r"pass rate 8 is not one token of its own\. Train with"):
        beliefs.question(some, PromptConfig())
