"""MASA for TRL's stock `GRPOTrainer`: what a gate admits as a data set, and the reward function of both streams.

TRL repeats every row of its data set `num_generations` times, samples, and takes each reward relative to the mean of
its row's. Here a problem is two neighbouring rows, one that asks for its solutions and one for predictions; so G and M
have to be equal. With `scale_rewards="none"` TRL's advantage is the reward less that mean. Our advantages have the mean
0, so they are what the reward function pays, times what turns TRL's mean over tokens (or sequences) into ours; then the
loss is that of `masa train`. The reward function also tells the gate how its problems went, a step later than
elsewhere, as TRL draws the next rows before it samples. What this trainer has no place for (beliefs that are read,
caps, gates that look at solutions) is refused; `worker` has one.
"""

from __future__ import annotations

import math
import os
import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from masa_lib import config as configs
from masa_lib import scaleout
from masa_lib.config import Config, ConfigError
from masa_lib.engines import Completion
from masa_lib.gates import registry
from masa_lib.method import gather, gating, objective, prompts, rollouts
from masa_lib.method.gather import Selection
from masa_lib.method.gating import Candidate
from masa_lib.method.rollouts import Ask
from masa_lib.tasks.problems import ProblemPool
from masa_lib.training.metrics import batch_metrics

try:
    from accelerate.utils import broadcast_object_list, gather_object
    from datasets import IterableDataset
    from trl import GRPOConfig
except ImportError as error:
    raise ConfigError(f"A training on TRL needs the package trl ({error}); `pip install -e '.[scaleout]'` in "
                      "masa_lib's folder brings it.") from error

#: what the reward function has to know of a rollout; columns of the data set
COLUMNS = ("stream", "group", "member", "problem_id", "problem", "answer", "level", "admitted", "weight", "cap",
           "capped")
#: settings that GRPOTrainer has no place for, and the value that is taken
ONLY = {"update.updates_per_step": 1, "update.meta_entropy": 0.0, "model.lora_rank": 0,
        "sampling.shared_beginning": False}


def check(config: Config) -> None:
    """Refuse what GRPOTrainer has no place for.

    Raises:
        ConfigError: names the setting.
    """
    scaleout.check(config, ONLY, "GRPOTrainer")
    sampling = config.sampling
    if configs.reads(config):
        raise ConfigError("GRPOTrainer learns from what it samples and cannot learn a belief that is read; take "
                          "prediction.mode=sampled, or AsyncGRPOTrainer with masa_lib.scaleout.worker.")
    if config.method == "masa-efficient" and config.cap.multiplier:
        raise ConfigError(f"cap.multiplier is {config.cap.multiplier}; GRPOTrainer has one cap for all rollouts. "
                          "Set it to 0.")
    if configs.samples_predictions(config) and sampling.solutions != sampling.predictions:
        raise ConfigError(f"sampling.solutions is {sampling.solutions} and sampling.predictions "
                          f"{sampling.predictions}; GRPOTrainer's groups are all of one size. Set one of them.")


def arguments(config: Config, out: str | Path, pieces: int = 1, **others: Any) -> GRPOConfig:
    """TRL's settings for a config: a step is one generation and one update.

    Args:
        config: of the run; its schedule is TRL's of the same name, whose first step of a warm-up has the rate 0.
        out: TRL's own folder.
        pieces: micro-batches that each process makes of its share of a step.
        others: settings of `GRPOConfig`, which win.

    Raises:
        ConfigError: a step's rollouts cannot be shared out equally.
    """
    update, sampling, processes = config.update, config.sampling, int(os.environ.get("WORLD_SIZE", "1"))
    rows = sampling.problems * (1 + configs.samples_predictions(config)) * sampling.solutions
    if rows % (processes * pieces):
        raise ConfigError(f"A step has {rows} rollouts, which {processes} processes with {pieces} micro-batches cannot "
                          "share equally. Set sampling.problems.")
    warm = update.schedule == "constant" and update.warmup_steps
    return GRPOConfig(**{
        "output_dir": str(out), "seed": config.seed, "max_steps": config.steps,
        "per_device_train_batch_size": rows // processes // pieces, "gradient_accumulation_steps": pieces,
        "steps_per_generation": pieces, "num_generations": sampling.solutions, "shuffle_dataset": False,
        "temperature": sampling.temperature, "top_k": 0, "top_p": 1.0,
        "max_completion_length": max(sampling.solution_tokens, sampling.meta_tokens),
        "beta": 0.0, "scale_rewards": "none", "loss_type": "dapo" if update.loss_mean == "token" else "grpo",
        "epsilon": update.clip_low, "epsilon_high": update.clip_high, "delta": update.dual_clip or None,
        "learning_rate": update.learning_rate, "weight_decay": update.weight_decay,
        "lr_scheduler_type": "constant_with_warmup" if warm else update.schedule, "warmup_steps": update.warmup_steps,
        "max_grad_norm": update.gradient_clip, "use_cpu": config.model.device == "cpu",
        "bf16": config.model.precision == "bfloat16", "gradient_checkpointing": config.model.gradient_checkpointing,
        "disable_dropout": True, "save_strategy": "no", "report_to": [], **others})


class MasaGroups:
    """The groups of a training: `data_set()` is GRPOTrainer's `train_dataset`, the object itself its `reward_funcs`.

    Args:
        config: of the run.
        tokenizer: of the model.
        end_tokens: ids that end an answer.
        pool: of problems; None draws it as the config says.
        sample: what a gate that wants predictions before it decides has them sampled with: `rollouts.sample` with all
            but the groups to ask for. They cost tokens and are not learned from.

    Attributes:
        table: all rollouts of the last step, scored; the same on every process.
        gate: of the run; None where its method has none.
        step: steps whose rows were drawn.
        cursor: problems drawn.
    """

    __name__ = "masa"  # what TRL calls its metrics

    def __init__(self, config: Config, tokenizer: Any, end_tokens: frozenset[int], pool: ProblemPool | None = None,
                 sample: Callable[[Sequence[Ask]], pd.DataFrame] | None = None) -> None:
        check(config)
        self.config, self.tokenizer, self.end_tokens, self.sample = config, tokenizer, end_tokens, sample
        self.pool = pool or ProblemPool(config.problems, config.seed)
        self.gate = registry.make_gate(config, self.pool, self._refuse, None, self._refuse)
        if self.gate and self.gate.refills:
            self._refuse()
        self.table, self.step, self.cursor = pd.DataFrame(), 0, 0
        self._pending: deque[Selection] = deque()

    def _refuse(self, *asked: Any, **others: Any) -> Any:
        raise ConfigError(f"The method {self.config.method} looks at solutions or hidden states before it chooses, for "
                          "which GRPOTrainer has no place; take AsyncGRPOTrainer with masa_lib.scaleout.worker.")

    def data_set(self) -> IterableDataset:
        """The rows of the problems that the gate admits, for ever; TRL ends by its `max_steps`."""
        return IterableDataset.from_generator(_rows, gen_kwargs={"groups": _Kept(self)})

    def next_rows(self) -> list[dict[str, Any]]:
        """The rows of the next step; the main process chooses, and all of them get what it chose."""
        found = self._choose()
        found = broadcast_object_list([found])[0]
        self._pending.append(found)
        self.step += 1
        self.cursor += len(found.candidates)
        streams = ("solution", "meta") if configs.samples_predictions(self.config) else ("solution",)
        chosen = found.table.itertuples(index=False)
        return [self._row(stream, found.candidates[row.group], row) for row in chosen for stream in streams]

    def _choose(self) -> Selection:
        """As many problems as a step has places; `table` has the number, the weight and the admission of each.

        What the gate left out gets the places that it leaves free, or the share `recheck` of it up to half of them, by
        lot.
        """
        places, gate = self.config.sampling.problems, self.gate
        if gate is None:
            candidates = [Candidate(problem) for problem in self.pool.take(self.cursor, places)]
            verdicts = [True] * places
        else:
            gate.rng = random.Random(f"{self.config.seed}/{self.step + 1}")
            gate.begin(self.step + 1)
            candidates, verdicts = self._judge(places)
        admitted = [group for group, verdict in enumerate(verdicts) if verdict]
        left = [group for group, verdict in enumerate(verdicts) if verdict is False]
        share = gating.limits(self.config).recheck if gate and gate.rechecks else 0.0
        lots = min(sum(gate.rng.random() < share for _ in left), places // 2) if share else 0
        lots = min(max(lots, places - len(admitted)), len(left))
        taken = admitted[:places - lots]
        rows = [(group, True, 1.0) for group in taken]
        if lots:
            rows += [(group, False, len(left) / lots) for group in sorted(gate.rng.sample(left, lots))]
        spare = [group for group, verdict in enumerate(verdicts) if verdict is None]
        rows += [(group, True, 1.0) for group in spare[:places - len(rows)]]
        return Selection(pd.DataFrame(rows, columns=["group", "admitted", "weight"]), candidates, len(taken),
                         len(taken) + len(left))

    def _judge(self, places: int) -> tuple[list[Candidate], list[bool | None]]:
        """Candidates until so many are admitted or the budget is spent, and what the gate says of each."""
        gate, limits = self.gate, gating.limits(self.config)
        budget = max(int(limits.candidates * places), places)
        candidates: list[Candidate] = []
        verdicts: list[bool | None] = []
        while len(candidates) < (budget if verdicts.count(True) < places else places):
            wanted = places - verdicts.count(True)
            drawn = self.pool.take(self.cursor + len(candidates),
                                   min(max(gate.draw(wanted), 1), max(budget - len(candidates), 1)))
            new = self._predicted(drawn)
            candidates += new
            verdicts += gate.admit(new, wanted)
        return candidates, verdicts

    def _predicted(self, drawn: Sequence[Any]) -> list[Candidate]:
        """The candidates, with predictions where the gate wants them and somebody samples."""
        config = self.config
        asks = [Ask("meta", group, problem, (config.sampling.meta_tokens,) * config.sampling.predictions)
                for group, problem in enumerate(drawn) if self.gate.gate_on and self.gate.asks(problem)]
        if not asks or not configs.samples_predictions(config):
            return [Candidate(problem) for problem in drawn]
        if self.sample is None:
            raise ConfigError(f"The method {config.method} predicts before it chooses; give MasaGroups a `sample`.")
        return gather.read_candidates(drawn, self.sample(asks))

    def _row(self, stream: str, candidate: Candidate, chosen: Any) -> dict[str, Any]:
        problem, sampling = candidate.problem, self.config.sampling
        hint = candidate.notions if self.gate and self.gate.hint_on else ()
        messages = (prompts.meta_messages(problem.text, self.config.prompt, sampling.solution_tokens)
                    if stream == "meta" else prompts.solution_messages(problem.text, self.config.prompt, hint))
        cap = sampling.meta_tokens if stream == "meta" else sampling.solution_tokens
        values = (stream, chosen.group, 0, problem.id, problem.text, problem.answer, problem.level, chosen.admitted,
                  chosen.weight, cap, False)
        return {"prompt": messages, **dict(zip(COLUMNS, values, strict=True))}

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], completion_ids: Sequence[Sequence[int]],
                 log_metric: Callable[[str, float], None] | None = None, **columns: Any) -> list[float]:
        """What each rollout of this process is paid.

        A process sees only its slice of a step, and a prediction is scored against the solutions of its problem,
        wherever those were sampled. So the slices, decoded and graded, are gathered before anything is scored.
        """
        known = [{name: columns[name][row] for name in COLUMNS} for row in range(len(completion_ids))]
        cut = [self._completion(ids, row["cap"]) for ids, row in zip(completion_ids, known, strict=True)]
        parts = gather_object([rollouts.read(known, cut, self.tokenizer, self.config)])
        self.table = pd.concat(parts, ignore_index=True)
        self.table["member"] = self.table.groupby(["stream", "group"]).cumcount()  # a row is repeated as it is
        rollouts.score(self.table, self.config)
        self._learn(log_metric)
        from accelerate import PartialState

        before = sum(len(part) for part in parts[:PartialState().process_index])
        return payments(self.table, self.config)[before:before + len(known)]

    def _completion(self, ids: Sequence[int], cap: int) -> Completion:
        ended = len(ids) <= cap and ids[-1] in self.end_tokens
        return Completion(tuple(ids), (), "stop" if ended else "length")

    def _learn(self, log_metric: Callable[[str, float], None] | None) -> None:
        """Tell the gate how its problems went, and TRL what its log is to say."""
        found = self._pending.popleft() if self._pending else None
        said = batch_metrics(self.table)
        if found:
            said |= gather.learn(self.gate, Selection(self.table, found.candidates, found.admitted, found.judged))
        for name, value in said.items():
            if log_metric and math.isfinite(value):
                log_metric(f"masa/{name}", float(value))


def payments(table: pd.DataFrame, config: Config) -> list[float]:
    """Advantages, times what makes TRL's mean ours: over all tokens, or over all sequences of tokens.

    Args:
        table: a step's scored rollouts.
        config: how tokens are weighted.
    """
    lengths = table["tokens"].map(len)
    weights = objective.token_weights(lengths.tolist(), table["stream"].tolist(), config.update)
    whole = lengths.sum() if config.update.loss_mean == "token" else lengths * len(table)
    return (table["advantage"] * weights * whole).tolist()


class _Kept:
    """Keeps an object from being copied by `datasets`, which pickles a generator's arguments to name its cache."""

    def __init__(self, groups: MasaGroups) -> None:
        self.groups = groups

    def __deepcopy__(self, memory: Any) -> _Kept:
        return self

    def __reduce__(self) -> Any:
        return _Kept, (None,)


def _rows(groups: _Kept) -> Iterator[dict[str, Any]]:
    while True:
        yield from groups.groups.next_rows()
