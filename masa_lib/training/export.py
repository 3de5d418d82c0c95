"""Folders that can be pushed to a hub as they are: a run's model with its model card, a packed study as a data set.

The cards state what was recorded and nothing else; what was not measured is not in them. Paths are shortened to their
last part.
"""

from __future__ import annotations

import html
import json
import math
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import DatasetCard, DatasetCardData, ModelCard, ModelCardData

from masa_lib import config as configs
from masa_lib import crash_safe_files as files
from masa_lib import crash_safe_folders as folders
from masa_lib.analysis import text_tables
from masa_lib.config import Config
from masa_lib.errors import MasaError, brief
from masa_lib.models import loading, tensors
from masa_lib.models.tiers import resolve
from masa_lib.runs.folder import ENVIRONMENT, Run, is_run
from masa_lib.runs.packed import CONFIGS, TABLES, PackedStudy
from masa_lib.runs.provenance import shared, shared_command, shared_name

CARD = """---
{{ card_data }}
---

# {{ title }}

{{ base }} after step {{ step }} of a training with masa_lib by the method `{{ method }}`. Models trained with `masa`
([2510.03259](https://arxiv.org/abs/2510.03259)) also predict their own solutions: how often they are right, how long
they are, and which notions they use.

## How to load

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER")
model = AutoModelForCausalLM.from_pretrained("FOLDER")
```

Weights are safetensors in {{ dtype }}{{ adapters }}. Solutions end in `\\boxed{}`; the wording of the prompts is
`{{ wording }}`.

## Facts of the run

{{ facts }}

## Held-out evaluation

{{ evaluations }}

Accuracy is the mean over problems with its 95 % interval; r and MAE compare predicted and true pass rates of the
problems.

## Settings that differ from the defaults

```toml
{{ settings }}
{{ changes }}```

## Licence

These weights are derived from {{ base }}: its licence holds for them, too.
"""

DATA_CARD = """---
{{ card_data }}
---

# Recorded trainings: {{ title }}

{{ runs }} runs of masa_lib. In each table the column `run` names the run and `step` the training step (0: before the
first one):

{{ tables }}

`configs.toml` has the settings of each run. Some columns are of some runs alone, and empty elsewhere.
"""
#: what the rows of the tables of a packed study are
ROWS = {"metrics": "a training step", "evaluations": "an evaluation on held-out problems",
        "problems": "a problem of an evaluation",
        "rollouts": "a rollout (a solution or a prediction) of a recorded step",
        "beliefs": "a problem of which a pass rate was believed before it was rolled out or left out",
        "readings": "a held-out problem of which a pass rate was believed between two evaluations"}

#: what the hub calls a model, and the most characters of a text that the card quotes
HUB_ID, LONGEST = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII), 400


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
    run, out = Run.open(path), _new_folder(out)
    step, weights = run.weights(which)
    config = run.config_at(step)
    dtype = tensors.final_precision(config)
    dtype = "float32" if dtype == "none" else dtype
    model, tokenizer = loading.load(configs.replace(config, {"model.device": "cpu"}).model, weights)
    text = card(run, step, config, dtype)

    def write(folder: Path) -> None:
        tensors.save(model, tokenizer, folder, dtype)
        (folder / "README.md").write_text(text, encoding="utf8")

    _write(out, write)
    return step


def card(run: Run, step: int, config: Config, dtype: str) -> str:
    """The model card of a run's step, in Markdown."""
    where, default = resolve(config.model.name), configs.Config()
    base, known = shared_name(where), shared(run.config)
    differing = [key for key in configs.settings() if configs.get(run.config, key) != configs.get(default, key)]
    changes = [f"# from step {change['step']} on\n{_toml(change['changes'])}\n" for change in run.changes()
               if change["step"] <= step]
    named = {"base_model": base} if HUB_ID.fullmatch(base) and not Path(where).exists() else {}
    data = ModelCardData(library_name="transformers", pipeline_tag="text-generation", tags=["masa_lib", config.method],
                         **named)
    return ModelCard.from_template(
        data, template_str=CARD, method=config.method, step=step, dtype=dtype, base=_code(base),
        wording=config.prompt.wording, title=_plain(f"{Path(base).name} {config.method} s{config.seed}"),
        adapters=" (low-rank adapters merged in)" if config.model.lora_rank else "",
        facts="\n".join(f"- {name}: {fact}" for name, fact in _facts(run, step, config).items()),
        evaluations=_evaluations(run, step), changes="".join(changes),
        settings=_toml({key: configs.get(known, key) for key in differing})).content


def is_packed_study(path: str | Path) -> bool:
    """Whether a folder holds packed runs, and is no run itself."""
    return not is_run(path) and bool(PackedStudy(path).runs)


def export_study(study: str | Path, out: str | Path) -> int:
    """Copy the tables of a packed study beside a data set card whose `configs` name them, as the hub's viewer wants.

    Args:
        study: the folder of the packed study.
        out: a folder that is empty or not there yet.

    Returns:
        How many runs it holds.

    Raises:
        ExportError: `out` is not empty.
    """
    study, out, runs = Path(study), _new_folder(out), PackedStudy(study).runs
    tables = [kind for kind in TABLES if (study / f"{kind}.parquet").exists()]
    data = DatasetCardData(tags=["masa_lib"], configs=[
        {"config_name": kind, "data_files": f"{kind}.parquet"} for kind in tables])
    text = DatasetCard.from_template(
        data, template_str=DATA_CARD, title=_plain(study.resolve().name), runs=len(runs),
        tables="\n".join(f"- `{kind}`: a row is {ROWS[kind]}" for kind in tables)).content

    def write(folder: Path) -> None:
        for name in (CONFIGS, *(f"{kind}.parquet" for kind in tables)):
            shutil.copy(study / name, folder / name)
        (folder / "README.md").write_text(text, encoding="utf8")

    _write(out, write)
    return len(runs)


def _new_folder(out: str | Path) -> Path:
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ExportError(f"{out} is not empty; choose a new folder with --out.")
    return out


def _write(out: Path, write: Callable[[Path], None]) -> None:
    with files.writing(out, "export again"):
        out.parent.mkdir(parents=True, exist_ok=True)
        folders.replace_folder(out, write)


def _toml(settings: Mapping[str, Any]) -> str:
    text = "\n".join(f"{key} = {json.dumps(value)}" for key, value in settings.items())
    return text.replace("<", "\\u003c").replace(">", "\\u003e")  # within texts alone, where TOML reads them as such


def _told(run: Run) -> dict[str, Any]:
    """What `environment.json` says."""
    try:
        found = run.environment
        hardware, git = {"gpus": [], "cpu": "", "torch_threads": 0} | found["hardware"], found["git"]
        if not isinstance(hardware["gpus"], list):
            raise TypeError(f"gpus are {brief(hardware['gpus'])}")
        return {"hardware": hardware, "commit": git["commit"], "dirty": git["dirty"] is True,
                "versions": dict(found["versions"]), "command": found["command"]}
    except (OSError, LookupError, TypeError, ValueError) as error:
        raise ExportError(f"The model card needs {ENVIRONMENT} of the run {run.path}, which cannot be used "
                          f"({brief(str(error))}); put the file back.") from error


def _plain(text: Any) -> str:
    """Anything as one line of Markdown that is only text: what would mark it up is written out."""
    line = re.sub(r"[\s\x00-\x1f\x7f]+", " ", _limited(text))
    return re.sub(r"([\\`*\[\]|~])", r"\\\1", html.escape(line, quote=False))


def _code(text: Any) -> str:
    """Anything as Markdown's code, which nothing in it can end."""
    line = re.sub(r"[`<>\s\x00-\x1f\x7f]+", " ", _limited(text)).strip()
    return f"`{line or ' '}`"


def _limited(text: Any) -> str:
    text = (text if isinstance(text, str) else brief(text)).encode("utf8", "replace").decode("utf8")
    return text if len(text) <= LONGEST else text[:LONGEST] + " ..."


def _facts(run: Run, step: int, config: Config) -> dict[str, Any]:
    told, names = _told(run), ("solution", "meta", "prefill", "update")
    steps = run.metrics().query("step <= @step").select_dtypes("number")
    steps = steps.reindex(columns=["seconds_total", *(f"tokens_{name}" for name in names)])
    tokens = {name: int(steps[f"tokens_{name}"].sum()) for name in names}
    hardware, command = told["hardware"], told["command"]
    return {
        "Base model": _code(shared_name(resolve(config.model.name))),
        "Method": config.method,
        "Problems": _code(shared_name(config.problems.source)),
        "Steps": f"{step} of {config.steps}",
        "Seed": f"{config.seed} (of the problems: {config.problems.seed})",
        "Tokens": ", ".join(f"{count:,} {name}" for name, count in tokens.items()),
        "Hours of training steps": f"{steps['seconds_total'].sum() / 3600:.2f}",
        "Hardware": ", ".join(map(_plain, hardware["gpus"] or [
            f"{hardware['cpu']} ({hardware['torch_threads']} threads)"])),
        "Versions": ", ".join(_plain(f"{name} {version}") for name, version in list(told["versions"].items())[:20]),
        "Commit": f"{_plain(told['commit'] or 'unknown')}{' with changes' if told['dirty'] else ''}",
        "Command": _code(shared_command(command) if isinstance(command, str) else command),
    }


def _evaluations(run: Run, step: int) -> str:
    """All evaluations up to a step, as a table."""
    rows = run.evaluations().query("step <= @step").select_dtypes("number").to_dict("records")
    cells = [[str(row["step"]), f"{_number(row.get('accuracy'))} ({_interval(row)})", _number(row.get("pass_rate_r")),
              _number(row.get("pass_rate_mae")), f"{row.get('problems', '-')} x {row.get('samples', '-')}"]
             for row in rows]
    head = ["step", "accuracy", "r of the pass rate", "MAE of the pass rate", "problems x samples"]
    return text_tables.markdown([head, *cells])


def _interval(row: dict[str, Any]) -> str:
    return f"{_number(row.get('accuracy_low'))} to {_number(row.get('accuracy_high'))}"


def _number(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.3f}"
