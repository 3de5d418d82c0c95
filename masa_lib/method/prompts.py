"""The wording of what a model is asked: to solve a problem, or to predict how its own solutions will turn out.

Two wordings: `paper` follows the published prompts, `compact` puts the problem first, so that the solution prompt and
the meta prompt of a problem share their prefix. Nothing here samples or parses.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable
from functools import partial
from typing import Any

from jinja2 import TemplateError

from masa_lib.config import PREDICTING, Config, PromptConfig
from masa_lib.errors import MasaError

Messages = list[dict[str, str]]
#: more tokens a byte of text than any tokenizer makes
_TOKENS_A_BYTE = 2

SYSTEM = "You are a helpful assistant."
HINT = "The problem could be solved using the following math notions: {notions}."


class PromptError(MasaError, ValueError):
    """A tokenizer's chat template cannot be used; the message says why."""


def solution_messages(problem: str, config: PromptConfig, hint: tuple[str, ...] = ()) -> Messages:
    """The chat that asks for a solution.

    Args:
        problem: the problem's text.
        config: the wording.
        hint: predicted notions that are written behind the problem (arXiv 2510.03259, the efficient variant).
    """
    if hint:
        problem = f"{problem} {HINT.format(notions=', '.join(hint))}"
    if config.wording == "paper":
        return _user(f"{problem} Let's think step by step and output the final answer within \\boxed{{}}.")
    return _user(f"{problem}\nSolve step by step, answer in \\boxed{{}}.")


def meta_messages(problem: str, config: PromptConfig, max_length: int) -> Messages:
    """The chat that asks for a prediction.

    Args:
        problem: the problem's text.
        config: the wording and the smallest length it names.
        max_length: the largest solution length it names, tokens.
    """
    low, high = config.min_length, config.max_length or max_length
    if config.wording == "paper":
        system = {"role": "system", "content": SYSTEM}
        return [system, *_user(_PAPER_META.format(problem=problem, low=low, high=high))]
    return _user(f"{problem}\nPredict your solutions as JSON: math_notion, pass_rate (0 to 8), "
                 f"solution_length ({low} to {high}).")


def encode(tokenizer: Any, messages: Messages) -> list[int]:
    """Token ids of a chat, up to where the model is to answer.

    Where a template refuses or ignores a system message, its text begins the user's. A date that a template writes is
    that of `fix_date`.

    Raises:
        PromptError: the template cannot write this chat.
    """
    return tokenizer(write(tokenizer, messages), add_special_tokens=False)["input_ids"]


def write(tokenizer: Any, messages: Messages) -> str:
    """The text of a chat, as its template writes it; see `encode`."""
    system = "".join(message["content"] for message in messages if message["role"] == "system")
    try:
        text = _render(tokenizer, messages)
        if messages[-1]["content"].strip() not in text:
            raise TemplateError("it leaves out what the user says")
        if system in text:
            return text
    except (TemplateError, ArithmeticError, LookupError, TypeError, ValueError) as error:  # a template is a program
        if not system:
            raise PromptError(f"The tokenizer's chat template cannot write a chat of one user message: {error}. Save "
                              "another with the model (tokenizer.chat_template = ...).") from error
    first, *others = (message for message in messages if message["role"] != "system")
    return write(tokenizer, [first | {"content": f"{system}\n\n{first['content']}"}, *others])


def fix_date(tokenizer: Any, day: datetime.date) -> None:
    """Have templates that write the date write this one, whenever they do; before that it is the day's own."""
    tokenizer.masa_date = day


def room(tokenizer: Any, context: int, config: Config) -> Callable[[str], bool]:
    """A function that says whether a model's context has room for a problem of a text, in each stream that asks it.

    Args:
        tokenizer: of the model.
        context: its length, tokens.
        config: wording, caps, and which streams there are.
    """
    limits, hinted = config.sampling, config.cap.hint != "none"
    streams = [(solution_messages, context - limits.solution_tokens - hinted * 2 * limits.meta_tokens)]
    if config.method in PREDICTING or config.evaluation.predictions or hinted:
        streams.append((partial(meta_messages, max_length=limits.solution_tokens), context - limits.meta_tokens))
    least = [(wording, left, left - len(encode(tokenizer, wording("", config.prompt)))) for wording, left in streams]

    def fits(text: str) -> bool:
        """By its bytes alone if these are few: a token has at least one, and the quick way is for most problems."""
        return all(_TOKENS_A_BYTE * len(text.encode()) <= short
                   or len(encode(tokenizer, wording(text, config.prompt))) <= left for wording, left, short in least)

    return fits


def _render(tokenizer: Any, messages: Messages) -> str:
    day = getattr(tokenizer, "masa_date", None)
    dated = {"strftime_now": lambda form: datetime.datetime.combine(day, datetime.time()).strftime(form)} if day else {}
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True,
                                         tokenize=False, **dated)


def _user(content: str) -> Messages:
    return [{"role": "user", "content": content}]


_PAPER_META = """\
Before the problem below is solved, say what will happen when you solve it. Between <meta> and </meta>, reason about \
how you decide each of the following values. Then give one JSON object with these keys and nothing else:
- "math_notion": a list of strings, the mathematical notions that a right solution uses and the problem does not name;
- "pass_rate": a whole number from 0 to 8, how many of 8 attempts of yours would end in the right answer;
- "solution_length": a whole number from {low} to {high}, how many tokens a right solution of yours will take.

Problem: {problem}"""
