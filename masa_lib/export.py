"""A run's model as a folder that others can load: weights, tokenizer, and a model card with the run's facts.

The card states what the run recorded and nothing else; what was not measured is not in it. Paths are shortened to their
last part.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from masa_lib import config as configs
from masa_lib import files, models
from masa_lib.config import Config
from masa_lib.errors import MasaError
from masa_lib.runs import ENVIRONMENT, Run
from masa_lib.tiers import resolve

CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [masa_lib, {method}]{base_model}
---

# {title}

{base} after step {step} of a training with masa_lib by the method `{method}`. Models trained with `masa`
([2510.03259](https://arxiv.org/abs/2510.03259)) also predict their own solutions: how often they are right, how long
they are, and which notions they use.

## How to load

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER")
model = AutoModelForCausalLM.from_pretrained("FOLDER")
```

Weights are safetensors in {dtype}{adapters}. Solutions end in `\\boxed{{}}`; the wording of the prompts is `{wording}`.

## Facts of the run

{facts}

## Held-out evaluation

{evaluations}

Accuracy is the mean over problems with its 95 % interval; r and MAE compare predicted and true pass rates of the
problems.

## Settings that differ from the defaults

```toml
{settings}
{changes}```

## Licence

These weights are derived from {base}: its licence holds for them, too.
"""


class ExportError(MasaError, RuntimeError):
    """A model cannot be exported; the message says what to do."""


def export(path: str | Path, out: str | Path, which: str = "last") -> int:
    """Write a run's model as a Hugging Face folder with a model card; LoRA is merged in, in float32.

    Args:
        path: of the run.
        out: a folder that is empty or not there yet.
        which: `last` or `best`, as `Run.weights` takes it.

    Returns:
        The step that the weights are of.

    Raises:
        RunError: no run there, or none of its weights is whole.
        ExportError: `out` is not empty.
        ModelError: the base model of the adapters cannot be loaded.
    """
    run, out = Run.open(path), Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ExportError(f"{out} is not empty; choose a new folder with --out.")
    step, weights = run.weights(which)
    config = run.config_at(step)
    dtype = models.final_precision(config)
    dtype = "float32" if dtype == "none" else dtype
    model, tokenizer = models.load(configs.replace(config, {"model.device": "cpu"}).model, weights)
    with files.writing(out, "export again"):
        out.mkdir(parents=True, exist_ok=True)
        models.save(model, tokenizer, out, dtype)
        (out / "README.md").write_text(card(run, step, config, dtype), encoding="utf8")
    return step


def card(run: Run, step: int, config: Config, dtype: str) -> str:
    """The model card of a run's step, in Markdown."""
    where, default = resolve(config.model.name), configs.Config()
    base = _short(where)
    differing = [key for key in configs.settings() if configs.get(run.config, key) != configs.get(default, key)]
    changes = [f"# from step {change['step']} on\n{_toml(change['changes'])}\n" for change in run.changes()
               if change["step"] <= step]
    return CARD.format(
        method=config.method, step=step, dtype=dtype, base=f"`{base}`", wording=config.prompt.wording,
        title=f"{Path(base).name} {config.method} s{config.seed}",
        base_model="" if Path(where).exists() else f"\nbase_model: {base}",
        adapters=" (low-rank adapters merged in)" if config.model.lora_rank else "",
        facts="\n".join(f"- {name}: {fact}" for name, fact in _facts(run, step, config).items()),
        evaluations=_evaluations(run, step), changes="".join(changes),
        settings=_toml({key: configs.get(run.config, key) for key in differing}))


def _toml(settings: Mapping[str, Any]) -> str:
    return "\n".join(f"{key} = {json.dumps(_short(value))}" for key, value in settings.items())


def _facts(run: Run, step: int, config: Config) -> dict[str, Any]:
    told = json.loads((run.path / ENVIRONMENT).read_text(encoding="utf8"))
    steps = run.metrics().query("step <= @step")
    git, hardware = told["git"], told["hardware"]
    tokens = {name: int(steps[f"tokens_{name}"].sum()) for name in ("solution", "meta", "prefill", "update")}
    return {
        "Base model": f"`{_short(resolve(config.model.name))}`",
        "Method": config.method,
        "Problems": f"`{_short(config.problems.source)}`",
        "Steps": f"{step} of {config.steps}",
        "Seed": f"{config.seed} (of the problems: {config.problems.seed})",
        "Tokens": ", ".join(f"{count:,} {name}" for name, count in tokens.items()),
        "Hours of training steps": f"{steps['seconds_total'].sum() / 3600:.2f}",
        "Hardware": ", ".join(hardware["gpus"] or [f"{hardware['cpu']} ({hardware['torch_threads']} threads)"]),
        "Versions": ", ".join(f"{name} {version}" for name, version in told["versions"].items()),
        "Commit": f"{git['commit'] or 'unknown'}{' with changes' if git['dirty'] else ''}",
        "Command": f"`{told['command']}`",
    }


def _evaluations(run: Run, step: int) -> str:
    """The first evaluation and the last one up to a step, as a table."""
    done = run.evaluations().query("step <= @step")
    rows = done.iloc[sorted({0, len(done) - 1})].to_dict("records") if len(done) else []
    cells = [[str(row["step"]), f"{row['accuracy']:.3f} ({_interval(row)})", _number(row.get("pass_rate_r")),
              _number(row.get("pass_rate_mae")), f"{row['problems']} x {row['samples']}"] for row in rows]
    head = ["step", "accuracy", "r of the pass rate", "MAE of the pass rate", "problems x samples"]
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *cells])


def _interval(row: dict[str, Any]) -> str:
    return f"{_number(row['accuracy_low'])} to {_number(row['accuracy_high'])}"


def _number(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.3f}"


def _short(value: Any) -> Any:
    """A path as its last part; anything else as it is."""
    return re.sub(r"^(~|\.{0,2}/).*/", "", value) if isinstance(value, str) else value
