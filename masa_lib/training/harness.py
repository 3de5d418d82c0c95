"""Sets not for our own hands: a model is handed to EleutherAI's lm-evaluation-harness, and its right answers counted.

The harness asks in its own words and grades by its own rules; of what it says, one number between 0 and 1 an answer is
kept and all else is dropped. A pass asks every problem once, so that a stopped evaluation goes on with the next pass.
What the counts come to, beside the published ones, is in `analysis.paper_sets`.
Code that a model has written is executed by nothing here, and by the harness only where `run_code` says so; what
EvalPlus found out by executing it elsewhere is read from its file.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from masa_lib import crash_safe_files as files
from masa_lib.analysis.paper_sets import EVALPLUS, PUBLISHED, score
from masa_lib.config import Config
from masa_lib.errors import MasaError, brief
from masa_lib.models import loading
from masa_lib.models.tiers import resolve
from masa_lib.runs.folder import Run
from masa_lib.tasks.data_sets import Harness
from masa_lib.training import export

#: keeps the seeds of these evaluations apart from those of trainings
SEED_TAG = 9241
#: most answers of one pass, and bytes of a file of EvalPlus, that are read
MOST, LARGEST_FILE = 1_000_000, 2**29


class HarnessError(MasaError, RuntimeError):
    """The harness is not there, has no such task, or failed; the message says what to do."""


def chosen(names: Sequence[str], run_code: bool = False) -> dict[str, Harness]:
    """What to measure, by set.

    Args:
        names: sets of the paper, by our name or the paper's, or tasks by the harness's name; none: every set of the
            paper that the harness has and that executes no code (with `run_code` those, too).
        run_code: allow what executes code that the model has written.

    Raises:
        HarnessError: the harness lacks a set, or it would execute code.
    """
    printed = {entry.paper: name for name, entry in PUBLISHED.items()}
    found = {name: PUBLISHED[name].harness if name in PUBLISHED else Harness({name: ""})
             for name in (printed.get(name, name) for name in names)}
    found = found or {name: entry.harness for name, entry in PUBLISHED.items()
                      if entry.harness and (run_code or not entry.harness.runs_code)}
    coding = {task for entry in PUBLISHED.values() if entry.harness and entry.harness.runs_code
              for task in entry.harness.tasks}
    for name, harness in found.items():
        if harness is None:
            raise HarnessError(f"lm-evaluation-harness has no task of {PUBLISHED[name].paper}{_elsewhere(name)}.")
        if not run_code and coding & set(harness.tasks):
            raise HarnessError(f"{name} executes code that the model has written, with the rights of this user. Add "
                               "--run-code in a container that may be lost.")
    return found


def _elsewhere(name: str) -> str:
    if PUBLISHED[name].hub:
        return f"; `masa eval --problems {name}` measures it"
    return "; what EvalPlus itself has found is read by --evalplus" if name == EVALPLUS else (
        ", and nothing here measures it")


def measure(config: Config, out: Path, sets: Mapping[str, Harness], *, run: Run | None = None, which: str = "last",
            own: Path | None = None, run_code: bool = False) -> list[dict[str, Any]]:
    """Have the harness ask a model, and record each pass in `out` as soon as it is over.

    Args:
        config: model and engine; `evaluation.final_samples` passes, `evaluation.temperature`, at most
            `evaluation.final_problems` of a task and `sampling.solution_tokens` an answer.
        out: a folder; passes that it holds of the same model and settings are not repeated.
        sets: as `chosen` gives them.
        run: whose weights are handed over, merged and rounded as `masa export` does it; None: the config's model.
        which: `last` or `best` of its checkpoints.
        own: a folder of tasks in the harness's YAML, beside its own.
        run_code: let the harness execute what the model has written.

    Returns:
        A row a set, see `paper_sets.score`.

    Raises:
        HarnessError: see there.
    """
    asked, samples = _asked(config, _weights(config, run, which)), config.evaluation.final_samples
    measures = {task: name for harness in sets.values() for task, name in harness.tasks.items()}
    with files.writing(out, "give the same command again"):
        out.mkdir(parents=True, exist_ok=True)
    missing = {task: left for task in measures if (left := _left(out, task, asked, samples))}
    if missing:
        with _harness_errors(), _handed_over(config, run, which, out) as folder:
            _ask(config, folder, out, missing, asked, measures, own, run_code)
    return [score(name, harness, [passes(out, task, asked, samples) for task in harness.tasks], config)
            for name, harness in sets.items()]


def _weights(config: Config, run: Run | None, which: str) -> str:
    """What tells the weights from all others, and names no folder of this computer."""
    if run:
        return f"{run.path.resolve().name}, step {run.weights(which)[0]}"
    found = sorted(Path(loading.folder(config.model.name)).glob("*.safetensors"))
    return " ".join(files.digest(file)[:16] for file in found)


def _asked(config: Config, weights: str) -> dict[str, Any]:
    """What two passes have in common that are counted together."""
    return {"model": Path(resolve(config.model.name)).name, "weights": weights, "engine": _engine(config),
            "precision": config.model.precision, "temperature": config.evaluation.temperature,
            "tokens": config.sampling.solution_tokens, "problems": config.evaluation.final_problems,
            "seed": config.seed, "harness": _version()}


def _version() -> str:
    """The harness's release.

    Raises:
        HarnessError: it is not installed.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise HarnessError("lm-evaluation-harness is not installed. It comes with the extra `harness`: `pip install -e "
                           "'.[harness]'` in the repository.")
    from importlib.metadata import version

    return version("lm-eval")


def _engine(config: Config) -> str:
    return "vllm" if config.sampling.engine == "vllm" else "hf"


def _left(out: Path, task: str, asked: Mapping[str, Any], samples: int) -> list[int]:
    """The passes of a task that are not recorded yet; likelihoods are the same in each, and are asked for once."""
    done = passes(out, task, asked, samples)
    return [] if any(row["once"] for row in done) else sorted(set(range(samples)) - {row["pass"] for row in done})


@contextlib.contextmanager
def _handed_over(config: Config, run: Run | None, which: str, out: Path) -> Iterator[str]:
    """A folder, or an id of the hub, that transformers loads as it is."""
    if run is None:
        yield loading.folder(config.model.name)
        return
    with tempfile.TemporaryDirectory(prefix="model-", dir=out) as place:
        export.export(run.path, Path(place) / "model", which)
        yield str(Path(place) / "model")


@contextlib.contextmanager
def _harness_errors() -> Iterator[None]:
    """Turn what the harness, its tasks and the hub raise, which has no common base, into a sentence."""
    try:
        with contextlib.redirect_stdout(sys.stderr):  # standard output is for the result
            yield
    except MasaError:
        raise
    except Exception as error:
        raise HarnessError(f"lm-evaluation-harness failed ({type(error).__name__}: {brief(str(error))}). Passes that "
                           "were over are kept: put that right, and give the same command again.") from error


def _ask(config: Config, folder: str, out: Path, missing: Mapping[str, Sequence[int]], asked: Mapping[str, Any],
         measures: Mapping[str, str], own: Path | None, run_code: bool) -> None:
    """The passes that are missing, one by one, each of all tasks that lack it."""
    if run_code:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"  # the harness's second lock
    from lm_eval import simple_evaluate

    loading.prepare(config)
    manager = _tasks(list(missing), own)
    tasks = {task: _prepared(manager, task, config) for task in missing}
    model = _model(config, folder, min(map(min, missing.values())))
    once = {task for task in missing if tasks[task].get_config("output_type") != "generate_until"}
    for number in tqdm(sorted(set().union(*missing.values())), desc="passes", unit="pass", leave=False):
        due = [task for task, left in missing.items() if number in (left[:1] if task in once else left)]
        if not due:
            continue
        seed = _seed(config, number)
        found = simple_evaluate(
            model, tasks=[tasks[task] for task in due], task_manager=manager, limit=config.evaluation.final_problems,
            bootstrap_iters=0, apply_chat_template=True, random_seed=seed, numpy_random_seed=seed,
            torch_random_seed=seed, confirm_run_unsafe_code=run_code)
        for task in due:
            measure, right = answers(found["samples"][task], measures[task], task)
            files.append_line(out / f"{_file(task)}.jsonl", {
                "task": task, "pass": number, "once": task in once, "measure": measure, "right": right, "asked": asked})


def _prepared(manager: Any, name: str, config: Config) -> Any:
    """A task that samples as our own evaluations do: a pass holds one answer, and every word can be drawn.

    What a model's generation_config.json restricts (top_k, top_p) is not restricted.
    """
    found = manager.load([name])["tasks"]
    if name not in found:
        raise HarnessError(f"{name} is a group of lm-evaluation-harness; name its tasks: "
                           f"{', '.join(sorted(found)[:8])}, ...")
    task = found[name]
    task.set_config("repeats", 1)
    if task.get_config("output_type") == "generate_until":
        task.set_config("generation_kwargs", {
            "do_sample": True, "temperature": config.evaluation.temperature, "top_p": 1.0, "top_k": 0,
            "max_gen_toks": config.sampling.solution_tokens}, update=True)
    return task


def _tasks(names: Sequence[str], own: Path | None) -> Any:
    """The harness's list of tasks; its own 14,000 are looked through only where a name asks for them."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(own), include_defaults=False) if own else None
    if manager is None or not set(names) <= set(manager.all_tasks):
        manager = TaskManager(include_path=str(own) if own else None)
    if unknown := sorted(set(names) - set(manager.all_tasks)):
        raise HarnessError(f"lm-evaluation-harness has no task {unknown[0]!r}; `lm-eval ls tasks` lists them, and "
                           "those of your own come with --tasks FOLDER.")
    return manager


def _model(config: Config, folder: str, first: int) -> Any:
    from lm_eval.api.registry import get_model

    shared = {"pretrained": folder, "dtype": config.model.precision, "trust_remote_code": False}
    if _engine(config) == "vllm":  # its generator begins anew with each process, so with another seed
        return get_model("vllm")(**shared, seed=_seed(config, first), gpu_memory_utilization=config.sampling.gpu_memory)
    return get_model("hf")(**shared, device=str(loading.pick_device(config.model)), batch_size=config.sampling.batch)


def _seed(config: Config, number: int) -> int:
    return int(np.random.SeedSequence([config.seed, SEED_TAG, number]).generate_state(1)[0]) % 2**31


def answers(samples: Any, measure: str, task: str) -> tuple[str, list[float]]:
    """How right each answer of a pass is, 0 to 1, in the order of the problems.

    Args:
        samples: as the harness reports them: a stranger's, of which nothing is taken for granted.
        measure: measure and filter, as `exact_match,none`; empty: the first of the first answer.
        task: named in the error.

    Returns:
        The measure, and the numbers.

    Raises:
        HarnessError: there is no such measure, or it is no number between 0 and 1.
    """
    try:
        if not isinstance(samples, list) or not 0 < len(samples) <= MOST:
            raise ValueError("there are none, or too many")
        measure = measure or f"{samples[0]['metrics'][0]},{samples[0]['filter']}"
        name, _, kept = measure.partition(",")
        rows = sorted((row for row in samples if row["filter"] == kept), key=lambda row: int(row["doc_id"]))
        right = [float(row[name]) for row in rows]
        if not right or not all(0 <= value <= 1 for value in right):
            raise ValueError("some is no number between 0 and 1")
    except (LookupError, TypeError, ValueError) as error:
        raise HarnessError(f"What lm-evaluation-harness reports of {task} cannot be read as {measure or 'a measure'} "
                           f"({brief(str(error))}).") from error
    return measure, right


def passes(out: Path, task: str, asked: Mapping[str, Any], samples: int) -> list[dict[str, Any]]:
    """The first `samples` recorded passes of a task under these settings; what is not whole is asked again."""
    rows = [row for row in files.read_lines(out / f"{_file(task)}.jsonl") if row.get("asked") == asked and _whole(row)]
    rows = [row for row in rows if row["pass"] < samples and len(row["right"]) == len(rows[0]["right"])]
    return list({row["pass"]: row for row in rows}.values())


def _whole(row: Mapping[str, Any]) -> bool:
    right = row.get("right")
    return (type(row.get("pass")) is int and isinstance(row.get("once"), bool) and isinstance(right, list)
            and bool(right) and all(isinstance(value, int | float) and 0 <= value <= 1 for value in right))


def _file(task: str) -> str:
    """A task's name as that of a file; a stranger's may hold anything."""
    return "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in task).lstrip(".")[:120]


def evalplus(config: Config, out: Path, found: Sequence[Path]) -> dict[str, Any]:
    """What EvalPlus has found, recorded in `out`; an answer is right that passes the base and the further tests.

    Args:
        config: of the model.
        out: a folder.
        found: its files `*_eval_results.json`, of HumanEval+ and of MBPP+, whose problems are taken together.

    Returns:
        A row, see `paper_sets.score`.

    Raises:
        HarnessError: a file is not there, too large, or laid out otherwise.
    """
    parts = [_evalplus_passes(file) for file in found]
    with files.writing(out, "give the same command again"):
        out.mkdir(parents=True, exist_ok=True)
        files.append_line(out / f"{EVALPLUS}.jsonl", {
            "digests": [files.digest(file) for file in found],
            "right": [[row["right"] for row in rows] for rows in parts]})
    return score(EVALPLUS, Harness({}), parts, config)


def _evalplus_passes(file: Path) -> list[dict[str, Any]]:
    try:
        if file.stat().st_size > LARGEST_FILE:
            raise ValueError(f"it has more than {LARGEST_FILE} bytes")
        answered = [[_passed(row) for row in rows] for _, rows in sorted(files.read_json(file)["eval"].items())]
        if not answered or not answered[0] or len({len(rows) for rows in answered}) > 1:
            raise ValueError("its problems have no answers, or not equally many")
    except (OSError, LookupError, TypeError, AttributeError, ValueError) as error:
        raise HarnessError(f"{file} cannot be read as results of EvalPlus ({brief(str(error))}); name the file "
                           "*_eval_results.json that `evalplus.evaluate` has written.") from error
    return [{"right": [float(right) for right in once]} for once in zip(*answered, strict=True)]


def _passed(row: Mapping[str, Any]) -> bool:
    told = row["base_status"], row["plus_status"]
    if not all(isinstance(status, str) for status in told):
        raise ValueError("an answer was not put to both the base and the further tests")
    return told == ("pass", "pass")
