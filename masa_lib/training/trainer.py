"""The training loop: predict, gate, solve, score, learn, remember; one step is one turn of the paper's Algorithm 1.

A trainer is an iterator: between two steps a notebook can draw, stop, or swap the config. All randomness of a step
comes from the run's seed and the step's number, so a run killed anywhere goes on from its last checkpoint and ends with
the same numbers: on the CPU bit for bit, on CUDA as far as `model.deterministic` gets torch to repeat itself. Drawing
and deciding which model to use are done elsewhere.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import os
import pickle
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import torch
from tqdm.auto import tqdm

from masa_lib import config as configs
from masa_lib import (
    crash_safe_files as files,
)
from masa_lib.analysis import health
from masa_lib.config import Config, UpdateConfig
from masa_lib.engines import Engine, context_of, engine_of, logprobs, self_check
from masa_lib.errors import brief
from masa_lib.gates import priors, registry
from masa_lib.method import beliefs, gather, gating, objective, prompts, rollouts
from masa_lib.models import loading
from masa_lib.runs import live_control
from masa_lib.runs.folder import CheckpointError, Run, RunError
from masa_lib.runs.stopping import Stop, Stopped
from masa_lib.tasks.problems import Problem, ProblemPool, held_out, make_room
from masa_lib.training import evaluation, expert, safeguards
from masa_lib.training.metrics import batch_metrics, belief_metrics
from masa_lib.training.tensorboard import open_board

#: keep the seeds of training steps, of evaluations and of what the oracle measures apart
SEED_TAG, ORACLE_TAG = 104729, 49979687
#: what a step renews of the running mean of the solutions' gradient norm
NORM_RENEWED = 0.1


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
        loading.prepare(config)
        self.pool = ProblemPool(config.problems, config.seed)
        self.held_out = held_out(config.problems, max(config.evaluation.final_problems, config.evaluation.problems))
        self.model, self.tokenizer = loading.load(config.model, checkpoint)
        self.engine = engine_of(config, self.model, self.tokenizer)
        self._fused = self.model.device.type == "cuda"
        self.optimizer = torch.optim.AdamW(loading.trainable(self.model), lr=config.update.learning_rate,
                                           fused=self._fused)
        self.step = self.cursor = 0  # finished steps; problems drawn
        self._oracle_tokens = self._anchor_tokens = 0  # of a step: no cost; counted
        self._solution_norm = 0.0  # running mean of the norm of the solutions' gradient
        self._memory: dict[str, Any] = {}  # of the gates, by method
        self._experts, self._budget = expert.Store(), safeguards.TokenBudget()
        self._health = health.Watch(config.model.precision)
        self._evaluated, self._saved = -1, 0  # the last evaluated step, the last checkpoint
        self._moving = False  # whether a step has begun to move the weights and is not over
        self.stop, self.board = Stop(), None
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
            table, metrics = self.train_step()
            self._record(table, metrics)
        return StepResult(self.step, metrics, table, self._finish())

    def catch_up(self) -> None:
        """Make up for an evaluation that is due and not done: before the first step, or after a stop dropped it."""
        if evaluation.due(self._config, self.step) and self._evaluated != self.step:
            if self.run:
                self._config = self.run.config_at(max(self.step, 1))
            self.evaluate()

    def train_step(self) -> tuple[pd.DataFrame, dict[str, Any]]:
        """One turn: predictions, gate, solutions, rewards, one GRPO update over both streams, behaviour cloning."""
        config, clock = self._config, Clock()
        self._oracle_tokens = self._anchor_tokens = 0
        engine = gather.CountingEngine(self.engine)
        gate = self._gate(clock, engine)
        sample = partial(rollouts.sample, engine=engine, tokenizer=self.tokenizer, config=config,
                         seed=[config.seed, SEED_TAG, self.step], temperature=config.sampling.temperature)
        believe = partial(rollouts.believe, engine=engine, tokenizer=self.tokenizer, config=config, sample=sample)
        with loading.precision(config.model, self.model.device):
            found = gather.collect(gate, self.pool, self.cursor, sample, config, self.step + 1, believe)
            clock.lap("generate")
            rollouts.score(found.table, config)
            gated = gather.learn(gate, found)
            clock.lap("grade")
            self._moving = True
            update = self._update(found.table, gate is not None and gate.refills, found.candidates)
            cloning = self._clone(found.table)
            clock.lap("update")
        self.step, self._moving = self.step + 1, False
        self.cursor += len(found.candidates)
        if gate:
            self._memory[config.method] = gate.state()
        found.table.insert(0, "step", self.step)
        metrics = {"step": self.step, "method": config.method, **batch_metrics(found.table),
                   **belief_metrics(found.table, [candidate.belief for candidate in found.candidates]),
                   **gated, **update, **cloning, "tokens_prefill": engine.prefill, "tokens_decode": engine.decode,
                   "tokens_read": engine.read_tokens, "seconds_read": engine.read_seconds,
                   "tokens_oracle": self._oracle_tokens, "tokens_anchor": self._anchor_tokens,
                   **clock.seconds(), "memory_mb": memory_mb()}
        if self.run and (read := gather.belief_record(found)):
            self.run.append_beliefs({"step": self.step, **read})
        return found.table, metrics

    def _gate(self, clock: Clock, engine: Engine) -> gating.Gate | None:
        """The gate of the settings in force, with what its method remembers."""
        gate = registry.make_gate(self._config, self.pool, partial(self._solve, clock), self._memory)
        if isinstance(gate, priors.Probe):
            gate.hidden = partial(self._hidden, engine)
        return gate

    def _hidden(self, engine: gather.CountingEngine, problems: Sequence[Problem]) -> np.ndarray:
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
                self.held_out, self.engine, self.tokenizer, self._config, self.step))
        if found is None:
            return None
        summary, table = found
        if self.run:
            self.run.write_evaluation(self.step, summary, table)
        if self.board:
            self.board.add("evaluation", summary)
        self._evaluated = self.step
        return summary

    def _update(self, table: pd.DataFrame, signal_only: bool,
                candidates: Sequence[gating.Candidate] = ()) -> dict[str, float]:
        """The step's optimiser updates, each over its share of the problems; see `_samples` for `signal_only`."""
        config = self._config.update
        bonus = objective.entropy_bonus(table[table["stream"] == "meta"], config)
        weighs = "on" if objective.weighs_sampler(self._config) else "off"
        config = dataclasses.replace(config, meta_entropy=bonus, sampler_weight=weighs)
        doubled = config.released_updates and configs.samples_predictions(self._config)
        count = config.updates_per_step * (2 if doubled else 1)
        shares = [part for _, part in table.groupby(table["group"] % count)]
        parts = [_samples(part, config, signal_only) for part in shares]
        old = None
        if len(parts) > 1:
            everything = [sample for part in parts for sample in part]
            old = self._budget.spend(lambda budget: logprobs.reference_logps(
                self.model, everything, dataclasses.replace(config, token_budget=budget),
                self._config.sampling.temperature), everything, config.token_budget)
        rate = learning_rate(self._config, self.step + 1)
        for group in self.optimizer.param_groups:
            group |= {"lr": rate, "weight_decay": config.weight_decay, "betas": (config.beta1, config.beta2)}
        sums, norms, told = [], [], []
        for share, samples in zip(shares, parts, strict=True):
            sums.append(self._gradients(samples, config, old))
            # Parameters no sample reached get a gradient of 0: an update without a signal is an update all the same.
            for parameter in loading.trainable(self.model):
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            told.append(self._learn_beliefs(share, candidates))
            norms.append(safeguards.clip_gradients(loading.trainable(self.model), config.gradient_clip, sum(
                (sums[-1]["loss_solution"], sums[-1]["loss_meta"], told[-1]["loss_belief"] or 0.0))))
            safeguards.move(self.optimizer)
            torch.clear_autocast_cache()  # it holds the old weights in bfloat16 until the step's context ends
        self.engine.sync()
        total = pd.DataFrame(sums).sum()
        tokens = total["tokens"] or math.nan
        norm, read = torch.stack(norms).mean().item(), sum(row["tokens_belief"] for row in told)
        return {"loss": (total["loss_solution"] + total["loss_meta"]) / len(parts),
                "loss_solution": total["loss_solution"] / len(parts), "loss_meta": total["loss_meta"] / len(parts),
                "clip_share": total["clipped"] / tokens, "entropy": total["entropy"] / tokens,
                "logp_gap": total["gap"] / tokens, "gradient_norm": norm, "learning_rate": rate,
                "updates": len(parts), "tokens_update": int(total["computed"]) + read, "tokens_belief": read,
                "token_budget": self._budget.within(config.token_budget),
                **pd.DataFrame(told)[["loss_belief", "belief_gradient"]].astype(float).mean()}

    def _gradients(self, samples: list[logprobs.Sample], config: UpdateConfig,
                   old: dict[int, torch.Tensor] | None) -> dict[str, float]:
        """The gradient of an update in the parameters, and the sums of `grpo.accumulate_gradients`."""
        def passes(budget: int) -> dict[str, float]:
            self.optimizer.zero_grad(set_to_none=False)
            return objective.accumulate_gradients(self.model, samples, dataclasses.replace(config, token_budget=budget),
                                             self._config.sampling.temperature, old)

        return self._budget.spend(passes, samples, config.token_budget)

    def _learn_beliefs(self, table: pd.DataFrame, candidates: Sequence[gating.Candidate]) -> dict[str, float]:
        """Add the gradient of the beliefs about the rolled-out problems to that of their solutions.

        Untrained beliefs would drown the solutions (their gradient is a hundred times as long), so it is shortened to
        the running mean of the solutions' norm, and then weighted.
        """
        settings, went = self._config.prediction, rollouts.outcomes(table)
        if not configs.reads(self._config) or went.empty or not settings.weight:
            return {"loss_belief": None, "belief_gradient": None, "tokens_belief": 0}
        read = [candidates[group].belief for group in went.index]
        samples = [logprobs.BeliefSample(belief.prompt + belief.suffix, *row)
                   for belief, row in zip(read, went.itertuples(index=False), strict=True)]
        choices = beliefs.question(self.tokenizer, self._config.prompt).choices
        gradients, loss = self._budget.spend(
            lambda budget: objective.belief_gradients(self.model, samples, choices, settings.score, budget), samples,
            self._config.update.token_budget)
        solutions = [parameter.grad for parameter in loading.trainable(self.model)]
        if norm := torch.nn.utils.get_total_norm(solutions).item():
            self._solution_norm += (norm - self._solution_norm) * (NORM_RENEWED if self._solution_norm else 1.0)
        length = torch.nn.utils.get_total_norm(gradients).item()
        scale = settings.weight * min(1.0, self._solution_norm / length if length else 1.0)
        torch._foreach_add_(solutions, gradients, alpha=scale)
        return {"loss_belief": loss, "belief_gradient": length,
                "tokens_belief": sum(sample.length for sample in samples)}

    def _clone(self, table: pd.DataFrame) -> dict[str, float]:
        """Collect the step's expert predictions, and clone them once there are enough."""
        settings, experts = self._config.cloning, self._experts
        for _, group in table.groupby("group") if settings.store else ():
            experts.add(group, self.tokenizer, settings)
        if not experts.full(settings):
            return {"loss_cloning": math.nan, "tokens_cloning": 0}
        found = expert.clone(self.model, experts.samples(), self._config, self._budget)
        experts.clear()
        self.engine.sync()
        return found

    def _record(self, table: pd.DataFrame, metrics: dict[str, Any]) -> None:
        """Write a step down."""
        last = self.step == self._config.steps
        if self.run:
            every = self._config.record.rollouts_every
            if every and (last or self.step == 1 or self.step % every == 0):
                self.run.write_rollouts(self.step, table.drop(columns=rollouts.TOKEN_COLUMNS))
            self.run.append_metrics(metrics)
        self._health.observe(metrics)
        if self.board:
            self.board.add("train", metrics)

    def _finish(self) -> dict[str, Any] | None:
        """What is due after a step: an evaluation, which is returned, and a checkpoint."""
        config, last = self._config, self.step == self._config.steps
        evaluated = self.evaluate() if evaluation.due(config, self.step) else None
        best = evaluated and config.record.keep_best and self.run and self.run.best_step() == self.step
        if last or best or self.step % config.record.checkpoint_every == 0:
            self.save_checkpoint()
        return evaluated

    def save_checkpoint(self) -> None:
        """Write the current step into the run as a checkpoint, unless it is the last one written."""
        if self.run and self.step > self._saved:
            self.run.save_checkpoint(self.step, self._save)
            self._saved = self.step

    def _save(self, folder: Path) -> None:
        loading.save_checkpoint(self.model, self.tokenizer, folder)
        with (folder / "optimizer.pt").open("wb") as file:
            torch.save(self.optimizer.state_dict(), file)
        state = {"step": self.step, "cursor": self.cursor, "gates": self._memory, "experts": self._experts.state(),
                 "token_budget": self._budget.most, "solution_norm": self._solution_norm}
        (folder / "state.json").write_text(json.dumps(state), encoding="utf8")

    def save_model(self) -> None:
        """Write the trained model into the run, as a folder that `from_pretrained` loads."""
        precision = loading.final_precision(self._config)
        if self.run and precision != "none":
            self.run.save_model(lambda folder: loading.save(self.model, self.tokenizer, folder, precision))

    def _restore(self, folder: Path) -> None:
        state = read_state(folder)
        self.step, self.cursor, self._memory = state["step"], state["cursor"], state["gates"]
        self._budget.most, self._solution_norm = state["token_budget"], state["solution_norm"]
        try:
            self._experts.restore(state["experts"])
            registry.make_gate(self._config, self.pool, partial(self._solve, Clock()), self._memory)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise CheckpointError(f"what its state.json keeps of gates and experts cannot be used ({error})") from error
        self._saved = self.step
        if self.run is None or self.step in set(self.run.evaluations()["step"]):
            self._evaluated = self.step
        restore_optimizer(self.optimizer, folder)


def read_state(folder: Path, step: int | None = None) -> dict[str, Any]:
    """What a checkpoint's `state.json` holds: finished `step`, `cursor` in the problems, memory of gates and experts.

    Raises:
        CheckpointError: it is not what `Trainer` writes, or not that of `step`.
    """
    try:
        found = files.read_json(folder / "state.json")
        state = {"gates": {}, "experts": [], "token_budget": None, "solution_norm": 0.0} | found
        numbers = [state["step"], state["cursor"], 0 if state["token_budget"] is None else state["token_budget"]]
        if (any(type(number) is not int or not 0 <= number < 2**53 for number in numbers)
                or not isinstance(state["experts"], list) or not isinstance(state["gates"], dict)
                or not 0.0 <= state["solution_norm"] < math.inf):
            raise ValueError(f"it holds {brief(found)}")
        if step not in (None, state["step"]):
            raise ValueError(f"it is of step {state['step']}")
    except (OSError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(f"its state.json is not that of a training ({error})") from error
    return state


def read_moments(folder: Path, shapes: Sequence[torch.Size], device: torch.device | str) -> dict[int, Any]:
    """AdamW's moments of a checkpoint by the number of the parameter; nothing in the file is executed.

    Args:
        folder: of the checkpoint.
        shapes: of the trained parameters, in their order.
        device: of the moments.

    Raises:
        CheckpointError: the file is of another optimiser or model, or cannot be read.
    """
    try:
        found = torch.load(folder / "optimizer.pt", map_location=device, weights_only=True)
        state = found["state"]
        fits = set(state) == set(range(len(shapes))) and all(
            set(entry) == {"step", "exp_avg", "exp_avg_sq"} and float(entry["step"]) >= 1
            and all(entry[name].shape == shapes[number] for name in ("exp_avg", "exp_avg_sq"))
            for number, entry in state.items())
        broken = fits and any(loading.not_finite(entry) for entry in state.values())
    except (MemoryError, torch.OutOfMemoryError):
        raise  # says nothing of the file
    except pickle.UnpicklingError as error:  # its own sentence tells how to execute what the file holds
        raise CheckpointError("its optimizer.pt cannot be read: it holds something else than tensors") from error
    except Exception as error:  # of the unpickler, or of what a stranger's file holds: types without a common base
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise CheckpointError(f"its optimizer.pt cannot be read ({reason})") from error
    if not fits:
        raise CheckpointError("its optimizer.pt is of another optimiser or of another model")
    if broken:
        raise CheckpointError("its optimizer.pt holds NaN or infinity")
    return state


def restore_optimizer(optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Take up a checkpoint's moments; learning rate and the like stay those of the config and of this machine."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments = read_moments(folder, [parameter.shape for parameter in parameters], parameters[0].device)
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})


def train(config: Config, out: str | Path, command: str) -> Run:
    """Train in a new run folder, with a progress bar.

    Raises:
        Stopped: SIGINT, SIGTERM or SIGHUP ended it; `resume` continues.
        RunError: the folder already holds a run.
        ModelError, ProblemError: model or problems cannot be loaded.
    """
    # Problems and model come first, so that a wrong name leaves no half-made run behind.
    trainer = Trainer(config)
    trainer.run = Run.create(out, config, command)
    prompts.fix_date(trainer.tokenizer, trainer.run.started)  # the day may have changed while the model was loaded
    with trainer.run.lock():
        return _drive(trainer)


def resume(path: str | Path) -> Run:
    """Go on with a run from its last checkpoint; what it wrote after that is written again, on the CPU bit for bit.

    Raises:
        Stopped: SIGINT, SIGTERM or SIGHUP ended it; `resume` continues.
        RunError: no run there, another process is at it, or a finished run is to get longer without its checkpoints.
    """
    run = Run.open(path)
    with run.lock():
        status = run.status
        finished = status["state"] == "finished"
        if finished and status["step"] >= run.config_at(status["step"] + 1).steps:
            return run
        run.check_files()
        found = run.resume_point(lambda step, folder: read_state(folder, step) and Trainer(
            run.config_at(step), run, folder))
        if finished and not found:
            raise RunError(f"The finished run {path} has no checkpoints left to go on from; train in another folder.")
        trainer = found or Trainer(run.config_at(0), run)
        run.begin_again(trainer.step)
        run.rewind(found.step if found else -1)
        return _drive(trainer)


def _drive(trainer: Trainer) -> Run:
    """Train to the end; the caller holds the run's lock."""
    run, stop = trainer.run, trainer.stop
    run.set_status("running")
    try:
        with stop:
            trainer.board = open_board(run)
            trainer.catch_up()  # before the bar, which then counts the seconds of steps alone
            with tqdm(total=trainer.config.steps, initial=trainer.step, desc=str(run.path), unit="step") as bar:
                for result in trainer:
                    bar.update()
                    shown = {key: result.metrics[key] for key in ("accuracy", "reward_meta")}
                    bar.set_postfix({key: f"{value:.2f}" for key, value in shown.items() if math.isfinite(value)})
            if stop.signal:
                trainer.save_checkpoint()
                done = f"after step {trainer.step}, which is checkpointed" if trainer.step else "before the first step"
                raise Stopped(f"Stopped {done}.", 128 + stop.signal)
            trainer.save_model()
    except BaseException as error:
        # torch.save answers an interruption with an error of its own.
        stopped = next((cause for cause in (error, error.__context__) if isinstance(cause, KeyboardInterrupt)), None)
        run.set_status("stopped" if stopped else "failed", str(stopped or error))
        if stopped:
            raise stopped from None
        raise
    finally:
        if trainer.board:
            trainer.board.close()
    run.set_status("finished")
    return run


def learning_rate(config: Config, step: int) -> float:
    """The learning rate of a step (counted from 1): linear warm-up, then constant, linear or cosine to 0."""
    update = config.update
    if step <= update.warmup_steps:
        return update.learning_rate * step / update.warmup_steps
    left = 1 - (step - update.warmup_steps - 1) / max(config.steps - update.warmup_steps, 1)
    factor = {"constant": 1.0, "linear": left, "cosine": (1 - math.cos(math.pi * left)) / 2}[update.schedule]
    return update.learning_rate * factor


def _samples(table: pd.DataFrame, config: UpdateConfig, signal_only: bool) -> list[logprobs.Sample]:
    """The sequences of an update that carry a gradient; their weights count all that were scored.

    Args:
        table: the update's rollouts.
        config: how tokens are weighted.
        signal_only: groups without a signal do not count (dynamic sampling has drawn others for them).
    """
    counted = table[table["advantage"].ne(0) if signal_only else table["reward"].notna()]
    weights = objective.token_weights(counted["tokens"].map(len).tolist(), counted["stream"].tolist(), config)
    columns = zip(counted["prompt_ids"], counted["tokens"], counted["logps"], counted["advantage"], weights,
                  counted["stream"], strict=True)
    return [logprobs.Sample(*column) for column in columns if column[3] != 0.0]


def memory_mb() -> float:
    """Peak memory so far, MB: of the GPU where there is one, of this process otherwise."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20  # pragma: no cover
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def _others() -> float:
    """Seconds that the cores have worked for other processes than this one."""
    times = psutil.cpu_times()
    return times.user + times.nice + times.system - sum(os.times()[:4])


class Clock:
    """Seconds by phase, and the cores that other processes used meanwhile: seconds count where those are few."""

    def __init__(self) -> None:
        self._start = self._last = self._began = time.perf_counter()
        self._others = _others()
        self._laps: dict[str, float] = {}

    def lap(self, phase: str) -> None:
        """End a phase that began with the last one's end."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # pragma: no cover
        now = time.perf_counter()
        self._laps[f"seconds_{phase}"] = now - self._last
        self._last = now

    def leave_out(self, seconds: float) -> None:
        """Do not count so many seconds of the phase that runs."""
        self._start += seconds
        self._last += seconds

    def seconds(self) -> dict[str, float]:
        """Seconds of each phase and in all."""
        others = (_others() - self._others) / (time.perf_counter() - self._began)
        return {**self._laps, "seconds_total": self._last - self._start, "cores_others": max(others, 0.0)}
