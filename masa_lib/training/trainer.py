"""The training loop: predict, gate, solve, score, learn, remember; one step is one turn of the paper's Algorithm 1.

A trainer is an iterator: between two steps a notebook can draw, stop, or swap the config. All randomness of a step
comes from the run's seed and the step's number, so a run killed anywhere goes on from its last checkpoint and ends with
the same numbers: on the CPU bit for bit, on CUDA as far as `model.deterministic` gets torch to repeat itself. Drawing
and deciding which model to use are done elsewhere.
"""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from masa_lib import config as configs
from masa_lib.config import Config
from masa_lib.crash_safe_files import RunError
from masa_lib.engines import Engine, context_of, load_policy, logprobs, self_check
from masa_lib.engines.counting import CountingEngine
from masa_lib.gates import registry
from masa_lib.method import gather, gating, prompts, rollouts
from masa_lib.models import loading, tensors
from masa_lib.runs import live_control
from masa_lib.runs.checkpoints import CheckpointError
from masa_lib.runs.folder import Run
from masa_lib.runs.stopping import Stop
from masa_lib.tasks.problem_rows import Problem
from masa_lib.tasks.problems import ProblemPool, held_out, make_room
from masa_lib.training import evaluation
from masa_lib.training.checkpoint import read_state, restore_optimizer
from masa_lib.training.clock import Clock, memory_mb, rollout_bar
from masa_lib.training.learner import Learner
from masa_lib.training.metrics import batch_metrics, belief_metrics
from masa_lib.training.recorder import Recorder, belief_record

#: keep the seeds of training steps, of evaluations and of what the oracle measures apart
SEED_TAG, ORACLE_TAG = 104729, 49979687


@dataclass(frozen=True)
class StepResult:
    """What a step gives: its number, its metrics, its rollouts, and the evaluation if one was due and not dropped."""

    step: int
    metrics: dict[str, Any]
    rollouts: pd.DataFrame
    evaluation: dict[str, Any] | None = None


class Trainer:
    """Train a model: `for step in trainer: ...`.

    Args:
        config: of the run.
        run: the folder to record in; None records nothing.
        checkpoint: the folder of a checkpoint to go on from.
    """

    def __init__(self, config: Config, run: Run | None = None, checkpoint: Path | None = None) -> None:
        """Load model, problems and engine; see the class."""
        self._config, self.run = config, run
        self.pool = ProblemPool(config.problems, config.seed)
        self.held_out = held_out(config.problems, max(config.evaluation.final_problems, config.evaluation.problems))
        self.model, self.tokenizer, self.engine = load_policy(config, checkpoint)
        self.learner = Learner(self.model, self.tokenizer, config.update)
        self.step = self.cursor = 0  # finished steps; problems drawn
        self._oracle_tokens = self._anchor_tokens = 0  # of a step: no cost; counted
        self._memory: dict[str, Any] = {}  # of the gates, by method
        self.recorder = Recorder(run, config.model.precision)
        self._evaluated, self._saved = -1, 0  # the last evaluated step, the last checkpoint
        self._saved_at = time.monotonic()
        self._moving = False  # whether a step has begun to move the weights and is not over
        self.stop = Stop()
        # As the run's first config sets it, whatever changed since: a resumed run draws what it would have drawn.
        fits = prompts.room(self.tokenizer, context_of(self.engine, self.model), run.config if run else config)
        self.held_out = make_room(self.pool, self.held_out, fits)
        prompts.fix_date(self.tokenizer, run.started if run else datetime.datetime.now(datetime.UTC).date())
        if checkpoint:
            self._restore(checkpoint)
        self_check.check(self.model, self.tokenizer, self.engine, config)

    @property
    def config(self) -> Config:
        """The settings in force; assigning others applies from the next step on and is recorded."""
        return self._config

    @config.setter
    def config(self, new: Config) -> None:
        """Refuses what cannot change within a run, and records the rest."""
        changes = {key: configs.get(new, key) for key in configs.settings()
                   if configs.get(new, key) != configs.get(self._config, key)}
        configs.check_live(changes)
        if changes and self.run:
            self.run.append_change(self.step + 1, changes)
        self._config = new

    def __iter__(self) -> Iterator[StepResult]:
        """Steps until the config's last one."""
        return self

    def __next__(self) -> StepResult:
        """Train one step; evaluate and record where it is due."""
        if self._moving:
            raise RunError(f"Step {self.step + 1} was cut short while it moved the weights, and cannot be done again "
                           "on these; go on from the last checkpoint (`masa resume`) or with a new trainer.")
        self.catch_up()
        if self.run:
            self._config = live_control.obey(self.run, self.step, self.stop)
        if self.step >= self._config.steps or self.stop.signal:
            raise StopIteration
        with self.stop.whole():
            done = self.train_step(self.stop.attempt)
            if done:
                self.recorder.step(*done, self._config)
        if done is None:
            raise StopIteration
        table, metrics = done
        return StepResult(self.step, metrics, table, self._finish())

    def catch_up(self) -> None:
        """Make up for an evaluation that is due and not done: before the first step, or after a stop dropped it."""
        if evaluation.due(self._config, self.step) and self._evaluated != self.step:
            if self.run:
                self._config = self.run.config_at(max(self.step, 1))
            self.evaluate()

    def train_step(self, attempt: Callable[[Callable[[], Any]], Any] | None = None
                   ) -> tuple[pd.DataFrame, dict[str, Any]] | None:
        """One turn: predictions, gate, solutions, rewards, one GRPO update over both streams.

        Args:
            attempt: samples the rollouts, or drops them and returns None (`Stop.attempt`); then nothing has happened,
                None is returned, and the step can be done again.
        """
        config, clock = self._config, Clock()
        self._oracle_tokens = self._anchor_tokens = 0
        engine = CountingEngine(self.engine)
        gate = self._gate(clock, engine)
        with loading.precision(config.model, self.model.device):
            with rollout_bar(config, self.step + 1, self.run) as bar:
                sample = partial(rollouts.sample, engine=engine, tokenizer=self.tokenizer, config=config,
                                 seed=[config.seed, SEED_TAG, self.step], temperature=config.sampling.temperature,
                                 progress=bar)
                believe = partial(rollouts.believe, engine=engine, tokenizer=self.tokenizer, config=config,
                                  sample=sample)
                collect = partial(gather.collect, gate, self.pool, self.cursor, sample, config, self.step + 1, believe)
                found = attempt(collect) if attempt else collect()
            if found is None:
                return None
            clock.lap("generate")
            rollouts.score(found.table, config)
            gated = gather.learn(gate, found)
            clock.lap("grade")
            self._moving = True
            update = self.learner.update(found.table, found.candidates, config, self.step + 1,
                                         gate is not None and gate.refills)
            self.engine.sync()
            clock.lap("update")
        self.step, self._moving = self.step + 1, False
        self.cursor += len(found.candidates)
        if gate:
            self._memory[config.method] = gate.state()
        found.table.insert(0, "step", self.step)
        metrics = {"step": self.step, "method": config.method, **batch_metrics(found.table),
                   **belief_metrics(found.table, [candidate.belief for candidate in found.candidates]),
                   **gated, **update, "tokens_prefill": engine.prefill, "tokens_decode": engine.decode,
                   "tokens_read": engine.read_tokens, "seconds_read": engine.read_seconds,
                   "tokens_oracle": self._oracle_tokens, "tokens_anchor": self._anchor_tokens,
                   **clock.seconds(), "memory_mb": memory_mb()}
        if self.run and (read := belief_record(found)):
            self.run.append_beliefs({"step": self.step, **read})
        return found.table, metrics

    def _gate(self, clock: Clock, engine: Engine) -> gating.Gate | None:
        """The gate of the settings in force, with what its method remembers."""
        return registry.make_gate(self._config, self.pool, partial(self._solve, clock), self._memory,
                                  partial(self._hidden, engine))

    def _hidden(self, engine: CountingEngine, problems: Sequence[Problem]) -> np.ndarray:
        """The policy's last hidden state at the end of each problem's prompt, PD; its tokens are counted as read."""
        asked = [tuple(prompts.encode(self.tokenizer, prompts.solution_messages(problem.text, self._config.prompt)))
                 for problem in problems]
        start = time.perf_counter()
        with torch.no_grad():
            states_PD = logprobs.last_states(self.model, asked).float().cpu().numpy()
        engine.read_seconds += time.perf_counter() - start
        engine.read_tokens += sum(map(len, asked))
        return states_PD

    def _solve(self, clock: Clock, problems: Sequence[Problem], samples: int, counted: bool = False) -> list[int]:
        """How many of so many solutions are right, for each problem.

        Neither tokens nor seconds of the training, unless they are `counted`.
        """
        start = time.perf_counter()
        right, tokens = rollouts.count_right(problems, samples, self.engine, self.tokenizer, self._config,
                                             [self._config.seed, ORACLE_TAG, self.step])
        if counted:
            self._anchor_tokens += tokens
        else:
            self._oracle_tokens += tokens
            clock.leave_out(time.perf_counter() - start)
        return right

    def evaluate(self) -> dict[str, Any] | None:
        """Evaluate at the current step and record it; the first and the last evaluation are the thorough ones.

        Returns:
            The summary; None where a stop dropped the evaluation, which the run's next life then repeats.
        """
        with loading.precision(self._config.model, self.model.device):
            found = self.stop.attempt(lambda: evaluation.evaluate_step(
                self.held_out, self.engine, self.tokenizer, self._config, self.step, self.run))
        if found is None:
            return None
        summary, table = found
        self.recorder.evaluation(self.step, summary, table)
        self._evaluated = self.step
        return summary

    def _finish(self) -> dict[str, Any] | None:
        """What is due after a step: an evaluation, which is returned, and a checkpoint."""
        config, last = self._config, self.step == self._config.steps
        if self.run and config.evaluation.read_every and self.step % config.evaluation.read_every == 0:
            self._read_held_out()
        evaluated = self.evaluate() if evaluation.due(config, self.step) else None
        best = evaluated and config.record.keep_best and self.run and self.run.best_step() == self.step
        late = time.monotonic() - self._saved_at > 60 * config.record.checkpoint_minutes
        every = config.record.checkpoint_every
        if every and (last or best or late or self.step % every == 0):
            self.save_checkpoint()
        return evaluated

    def _read_held_out(self) -> None:
        """Record the beliefs about held-out problems, where the method reads: no cost of the training."""
        if configs.reads(self._config):
            with loading.precision(self._config.model, self.model.device):
                self.run.append_reading(evaluation.read(self.held_out, self.engine, self.tokenizer, self._config,
                                                        self.step))

    def save_checkpoint(self) -> None:
        """Write the current step into the run as a checkpoint, unless it is the last one written."""
        if self.run and self.step > self._saved:
            self.run.save_checkpoint(self.step, self._save)
            self._saved, self._saved_at = self.step, time.monotonic()

    def _save(self, folder: Path) -> None:
        tensors.save_checkpoint(self.model, self.tokenizer, folder)
        with (folder / "optimizer.pt").open("wb") as file:
            torch.save(self.learner.optimizer.state_dict(), file)
        state = {"step": self.step, "cursor": self.cursor, "gates": self._memory,
                 "token_budget": self.learner.budget.most, "solution_norm": self.learner.solution_norm}
        (folder / "state.json").write_text(json.dumps(state), encoding="utf8")

    def save_model(self) -> None:
        """Write the trained model into the run, as a folder that `from_pretrained` loads."""
        precision = tensors.final_precision(self._config)
        if self.run and precision != "none":
            self.run.save_model(lambda folder: tensors.save(self.model, self.tokenizer, folder, precision))

    def _restore(self, folder: Path) -> None:
        state = read_state(folder)
        self.step, self.cursor, self._memory = state["step"], state["cursor"], state["gates"]
        self.learner.budget.most, self.learner.solution_norm = state["token_budget"], state["solution_norm"]
        try:
            registry.make_gate(self._config, self.pool, partial(self._solve, Clock()), self._memory)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise CheckpointError(f"what its state.json keeps of gates cannot be used ({error})") from error
        self._saved = self.step
        if self.run is None or self.step in set(self.run.evaluations()["step"]):
            self._evaluated = self.step
        restore_optimizer(self.learner.optimizer, folder)
