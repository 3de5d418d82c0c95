"""How the pocket model is made: a Qwen3-architecture model of about a million parameters, taught from nothing.

Its tokenizer knows words, digits and the pieces of the paper's JSON. Its supervised warm-up teaches habits rather than
skill: short cuts, column work and rambling in solutions, so that reinforcement has something to select; and of a meta
prediction only the form, with values drawn without a look at the problem. Its misalignment is therefore built in; how
far an ordinary pretrained model is off is measured elsewhere.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from masa_lib import crash_safe_files as files
from masa_lib import crash_safe_folders as folders
from masa_lib.config import PromptConfig
from masa_lib.method import prompts
from masa_lib.tasks import arithmetic
from masa_lib.tasks.arithmetic import Chain, Habits
from masa_lib.training import safeguards

SPECIAL = ("<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>")
#: pieces of the meta answer that are one token each
JSON_PIECES = ("<meta>", "</meta>",
               '{"math_notion": [', '"], "pass_rate": ', '], "pass_rate": ', ', "solution_length": ', '", "', '}', '"')
CHAT_TEMPLATE = ("{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
                 "{% if add_generation_prompt %}<|assistant|>{% endif %}")
#: how a text falls into pieces; what is no known word is spelled in characters
PATTERN = "|".join([*map(re.escape, sorted(JSON_PIECES, key=len, reverse=True)), r"\\boxed\{", r"[;:.,] ",
                    r" [-+x] (?=\d)", r" ?[A-Za-z_]+", r"\d", r"\s", r"[^\sA-Za-z_\d]"])


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what the pocket model becomes.

    `meta_share`: of training texts that are predictions. `max_length`: longest solution taught, tokens; longer ones are
    cut there, without an end.
    """

    seed: int = 0
    hidden_size: int = 128
    layers: int = 4
    heads: int = 4
    intermediate_size: int = 384
    steps: int = 900
    batch: int = 128
    learning_rate: float = 3e-3
    meta_share: float = 0.2
    max_length: int = 128
    habits: Habits = field(default_factory=Habits)


def build(out: Path, recipe: Recipe | None = None, threads: int = 0) -> dict[str, Any]:
    """Make the pocket model and write it to a folder, with a manifest of its recipe and digests.

    Args:
        out: folder for weights, tokenizer, chat template and `manifest.json`.
        recipe: what to teach; the default is what the repository carries.
        threads: CPU threads; 0 leaves torch's choice.

    Returns:
        The manifest.
    """
    recipe = recipe or Recipe()
    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(recipe.seed)
    tokenizer = make_tokenizer()
    model = make_model(recipe, tokenizer)
    start = time.perf_counter()
    loss = _teach(model, tokenizer, recipe)
    facts = {"loss": loss, "minutes": (time.perf_counter() - start) / 60,
             "parameters": sum(p.numel() for p in model.parameters())}
    manifest: dict[str, Any] = {}

    def write(folder: Path) -> None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        manifest.update(_write_manifest(folder, recipe, **facts))

    with files.writing(out, "make it again"):
        out.parent.mkdir(parents=True, exist_ok=True)
        folders.replace_folder(out, write)
    return manifest


def make_tokenizer() -> Any:
    """The word-and-digit tokenizer: any printable text survives encoding and decoding unchanged."""
    from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
    from tokenizers import models as token_models
    from transformers import PreTrainedTokenizerFast

    characters = [chr(code) for code in range(32, 127)] + ["\n"]
    pieces = dict.fromkeys([*SPECIAL, "<|unknown|>", *characters, *JSON_PIECES, *_words()])
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    backend = Tokenizer(token_models.WordPiece(vocabulary, unk_token="<|unknown|>", continuing_subword_prefix="",
                                               max_input_chars_per_word=10_000))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(PATTERN), behavior="isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<|pad|>", eos_token="<|end|>", unk_token="<|unknown|>",
        additional_special_tokens=list(SPECIAL[2:]), chat_template=CHAT_TEMPLATE, padding_side="left",
        clean_up_tokenization_spaces=False, model_max_length=1024)


def make_model(recipe: Recipe, tokenizer: Any) -> Any:
    """The untrained model."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=-(-len(tokenizer) // 64) * 64, hidden_size=recipe.hidden_size, num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads, num_key_value_heads=recipe.heads, head_dim=recipe.hidden_size // recipe.heads,
        intermediate_size=recipe.intermediate_size, max_position_embeddings=1024, tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
        initializer_range=0.04)
    return Qwen3ForCausalLM(config)


def training_chain(rng: random.Random) -> tuple[Chain, str]:
    """A chain of the training split, of any level, and its text in one of the wordings."""
    while True:
        chain = arithmetic.make_chain(rng, rng.choice(arithmetic.LEVELS))
        text = arithmetic.problem_text(chain, rng.randrange(3))
        if not arithmetic.is_held_out(text):
            return chain, text


def meta_example(chain: Chain, rng: random.Random, recipe: Recipe) -> str:
    """A prediction in form only: the problem's shape is read off, but the values are drawn without a look at it.

    Notions and length are uniform, the pass rate is skewed to the top.
    """
    notions = rng.sample(arithmetic.NOTIONS, rng.randint(1, 3))
    pass_rate = rng.choices(range(9), weights=[2, 1, 1, 2, 2, 3, 4, 5, 5])[0]
    values = {"math_notion": notions, "pass_rate": pass_rate, "solution_length": rng.randint(4, recipe.max_length)}
    return f"<meta>{arithmetic.shape(chain)}</meta>{json.dumps(values)}"


def _examples(tokenizer: Any, recipe: Recipe, rng: random.Random, count: int) -> list[tuple[list[int], int]]:
    """Token ids of prompt and answer, and where the answer begins."""
    wording, rows = PromptConfig(), []
    for _ in range(count):
        chain, problem = training_chain(rng)
        meta = rng.random() < recipe.meta_share
        messages = (prompts.meta_messages(problem, wording, recipe.max_length) if meta
                    else prompts.solution_messages(problem, wording))
        prompt = prompts.encode(tokenizer, messages)
        text = (meta_example(chain, rng, recipe) if meta
                else arithmetic.write_solution(chain, rng, recipe.habits))
        ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        rows.append((prompt + ids[:recipe.max_length], len(prompt)))
    return rows


def _teach(model: Any, tokenizer: Any, recipe: Recipe) -> float:
    """Cross-entropy on the answers; returns the mean loss of the last fifty steps, nats a token."""
    rng, losses = random.Random(recipe.seed), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.learning_rate, total_steps=recipe.steps + 1,
                                                   pct_start=0.1)
    model.train()
    for _ in (bar := tqdm(range(recipe.steps), desc="pocket", unit="step")):
        rows = sorted(_examples(tokenizer, recipe, rng, recipe.batch), key=lambda row: len(row[0]))
        optimizer.zero_grad()
        total = sum(len(ids) - start for ids, start in rows)
        losses.append(0.0)
        for part in (rows[i:i + 64] for i in range(0, len(rows), 64)):
            loss = _loss(model, part, tokenizer.pad_token_id) / total
            loss.backward()
            losses[-1] += loss.item()
        safeguards.clip_gradients(model.parameters(), 1.0, losses[-1])
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{losses[-1]:.3f}")
    model.eval()
    return sum(losses[-50:]) / len(losses[-50:])


def _loss(model: Any, rows: list[tuple[list[int], int]], pad: int) -> torch.Tensor:
    width = max(len(ids) for ids, _ in rows)
    ids_BT = torch.tensor([ids + [pad] * (width - len(ids)) for ids, _ in rows])
    labels_BT = torch.tensor([[-100] * start + ids[start:] + [-100] * (width - len(ids)) for ids, start in rows])
    logits = model(input_ids=ids_BT).logits[:, :-1]  # padding is on the right: causal attention never sees it
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels_BT[:, 1:].flatten(), reduction="sum")


def _words() -> list[str]:
    """Every piece of a few thousand texts of the recipe's own making, most frequent first."""
    rng, counts, recipe = random.Random(1), {}, Recipe()
    for _ in range(4000):
        chain, problem = training_chain(rng)
        answers = arithmetic.write_solution(chain, rng, recipe.habits) + meta_example(chain, rng, recipe)
        for messages in (prompts.meta_messages(problem, PromptConfig(), 128),
                         prompts.solution_messages(problem, PromptConfig(), hint=arithmetic.NOTIONS)):
            for piece in re.findall(PATTERN, messages[0]["content"] + answers):
                counts[piece] = counts.get(piece, 0) + 1
    return sorted(counts, key=lambda piece: (-counts[piece], piece))


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a pocket model's folder, but the manifest and the notes."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.iterdir()) if path.suffix in (".json", ".safetensors", ".jinja")
            and path.name != "manifest.json"}


def _write_manifest(out: Path, recipe: Recipe, **facts: Any) -> dict[str, Any]:
    import platform

    import transformers

    manifest = {"command": f"masa pocket build --seed {recipe.seed}", "recipe": asdict(recipe), **facts,
                "torch": torch.__version__, "transformers": transformers.__version__,
                "python": platform.python_version(), "threads": torch.get_num_threads(), "sha256": digests(out)}
    (out / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf8")
    return manifest
