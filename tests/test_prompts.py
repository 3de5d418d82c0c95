"""The wording of the two prompts."""

from __future__ import annotations

import copy
import datetime

import pytest
from small import small

from masa_lib.config import PromptConfig
from masa_lib.method import prompts
from masa_lib.models import loading
from masa_lib.recipes import pocket

PAPER, COMPACT = PromptConfig(wording="paper"), PromptConfig(wording="compact")
PROBLEM = "Start with 40. Subtract 7. Braces {} and {problem} stay."


@pytest.fixture(scope="module")
def tokenizer():
    return pocket.make_tokenizer()


def test_paper_wording_of_the_solution_prompt() -> None:
    assert prompts.solution_messages(PROBLEM, PAPER) == [{"role": "user", "content": (
        PROBLEM + " Let's think step by step and output the final answer within \\boxed{}.")}]


@pytest.mark.parametrize("config", [PAPER, COMPACT])
def test_both_wordings_ask_for_a_boxed_answer_and_hold_the_problem_unchanged(config: PromptConfig) -> None:
    (message,) = prompts.solution_messages(PROBLEM, config)
    assert message["role"] == "user"
    assert message["content"].startswith(PROBLEM) and "\\boxed{}" in message["content"]


@pytest.mark.parametrize("config", [PAPER, COMPACT])
def test_a_hint_stands_between_problem_and_instruction(config: PromptConfig) -> None:
    plain = prompts.solution_messages(PROBLEM, config)[0]["content"]
    hinted = prompts.solution_messages(PROBLEM, config, ("borrow", "sign change"))[0]["content"]
    hint = " The problem could be solved using the following math notions: borrow, sign change."
    assert hinted == PROBLEM + hint + plain.removeprefix(PROBLEM)


@pytest.mark.parametrize("config", [PAPER, COMPACT])
def test_the_meta_prompt_names_its_keys_and_their_bounds(config: PromptConfig) -> None:
    content = prompts.meta_messages(PROBLEM, config, 321)[-1]["content"]
    assert PROBLEM in content
    assert all(key in content for key in ("math_notion", "pass_rate", "solution_length", "JSON", "0 to 8", "1 to 321"))
    bounds = PromptConfig(wording=config.wording, min_length=17, max_length=99)
    assert "17 to 99" in prompts.meta_messages(PROBLEM, bounds, 321)[-1]["content"]


def test_the_paper_meta_prompt_has_a_system_message_and_asks_for_reasoning_in_meta_tags() -> None:
    system, user = prompts.meta_messages(PROBLEM, PAPER, 100)
    assert system == {"role": "system", "content": "You are a helpful assistant."}
    assert user["role"] == "user" and "<meta>" in user["content"] and "</meta>" in user["content"]


def test_in_compact_wording_both_streams_share_the_problem_as_their_prefix(tokenizer) -> None:
    solve = prompts.encode(tokenizer, prompts.solution_messages(PROBLEM, COMPACT))
    predict = prompts.encode(tokenizer, prompts.meta_messages(PROBLEM, COMPACT, 100))
    shared = next(n for n, pair in enumerate(zip(solve, predict, strict=False)) if pair[0] != pair[1])
    assert PROBLEM in tokenizer.decode(solve[:shared])


def test_encoding_ends_where_the_model_is_to_answer(tokenizer) -> None:
    ids = prompts.encode(tokenizer, prompts.meta_messages("1 + 1", PAPER, 9))
    assert all(type(number) is int for number in ids)
    text = tokenizer.decode(ids)
    assert text.startswith("<|system|>You are a helpful assistant.<|end|><|user|>Before")
    assert text.endswith("Problem: 1 + 1<|end|><|assistant|>")


def with_template(tokenizer, template):
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    return changed


TURNS = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}<|assistant|>"
REFUSING = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + TURNS
DEAF = "{% for m in messages if m.role != 'system' %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}<|assistant|>"


@pytest.mark.parametrize("template", [REFUSING, DEAF])
def test_where_a_template_has_no_system_message_its_text_begins_the_users(tokenizer, template: str) -> None:
    messages = prompts.meta_messages(PROBLEM, PAPER, 100)
    text = prompts.write(with_template(tokenizer, template), messages)
    assert text.startswith("<|user|>You are a helpful assistant.\n\nBefore the problem below") and PROBLEM in text
    plain = prompts.solution_messages(PROBLEM, PAPER)
    assert prompts.write(with_template(tokenizer, template), plain) == prompts.write(tokenizer, plain)


@pytest.mark.parametrize("names", [("default", "tool_use"), ("tool_use", "default"), ("tool_use", "chat"), ("rag",)])
def test_of_several_templates_the_one_for_plain_chats_is_taken(tokenizer, names: tuple[str, ...], tmp_path) -> None:
    wanted = "default" if "default" in names else names[-1]
    several = with_template(tokenizer, {name: f"{name}: {TURNS}" for name in names})
    several.save_pretrained(tmp_path)
    loaded = type(tokenizer).from_pretrained(tmp_path)
    for found in (several, loaded):
        found.chat_template = loading.with_default(found.chat_template)
        text = prompts.write(found, prompts.solution_messages("1 + 1?", COMPACT))
        assert text.startswith(f"{wanted}: <|user|>1 + 1?")


@pytest.mark.parametrize(("template", "says"), [
    ("{{ raise_exception('No.') }}", "No."), ("{% for m in messages %}{{ m.content.text }}{% endfor %}", "leaves out"),
    ("{% for m in messages %}{{ m.content", "end of template"),
    ("{{ messages[0] + 1 }}", "unsupported operand"), ("{% if tools|length > 0 %}{% endif %}", "has no len")])
def test_a_template_that_cannot_ask_a_question_is_one_sentence(tokenizer, template: str, says: str) -> None:
    with pytest.raises(prompts.PromptError, match=f"chat template cannot write a chat.*{says}"):
        prompts.encode(with_template(tokenizer, template), prompts.meta_messages(PROBLEM, PAPER, 9))


def test_a_template_that_writes_the_date_writes_the_fixed_one(tokenizer) -> None:
    dated = with_template(tokenizer, "{{ strftime_now('%d %b %Y') }}" + TURNS)
    messages = prompts.solution_messages("1 + 1?", COMPACT)
    assert prompts.write(dated, messages).startswith(datetime.datetime.now().strftime("%d %b %Y"))
    prompts.fix_date(dated, datetime.date(2025, 3, 9))
    assert prompts.write(dated, messages).startswith("09 Mar 2025<|user|>")


@pytest.mark.parametrize("config", [PAPER, COMPACT])
@pytest.mark.parametrize("method", ["grpo", "masa"])
def test_there_is_room_for_a_problem_whose_prompts_and_caps_fill_the_context_and_no_more(
        tokenizer, config: PromptConfig, method: str) -> None:
    settings = small({"method": method, "evaluation.predictions": 0, "prompt.wording": config.wording})
    caps = settings.sampling
    for text in ("", "1" * 40, "7 x " * 90):
        wanted = [(prompts.solution_messages(text, config), caps.solution_tokens)]
        if method == "masa":
            wanted.append((prompts.meta_messages(text, config, caps.solution_tokens), caps.meta_tokens))
        needed = max(len(prompts.encode(tokenizer, messages)) + cap for messages, cap in wanted)
        assert prompts.room(tokenizer, needed, settings)(text)
        assert not prompts.room(tokenizer, needed - 1, settings)(text)
