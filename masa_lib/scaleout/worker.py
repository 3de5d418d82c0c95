"""MASA for TRL's `AsyncGRPOTrainer`: the worker that hands it rollouts with their advantages.

The worker is our own trainer without its learner: problems, gate, caps, both streams, rewards, advantages, evaluation
and records are those of `masa train`. In the learner's place a step's sequences go into TRL's queue, and the step ends
when TRL has sent the weights that it made of them.

TRL's loss is the mean of the clipped loss over a micro-batch's tokens, linear in a positive factor on the advantage:
`advantage x weight x tokens x micro-batches` makes it ours exactly, whatever mean is meant. A belief that is read is
learned from, too. Its loss moves the nine log-probs by its derivatives, so nine sequences that end in one answer each,
with these derivatives as advantages, have its gradient; they share all but the last token, and TRL computes what is
shared once.

TRL's loader asks for a micro-batch more than it trains on. So every update begins with one that teaches nothing, which
was handed over behind the update before.
"""

from __future__ import annotations

import contextlib
import math
import os
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from masa_lib import config as configs
from masa_lib import scaleout
from masa_lib.config import Config, ConfigError
from masa_lib.engines.logprobs import Sample
from masa_lib.errors import MasaError
from masa_lib.gates import registry
from masa_lib.method import beliefs, gating, objective, prompts, rollouts
from masa_lib.method.gating import Candidate
from masa_lib.runs.folder import Run
from masa_lib.runs.stopping import Stopped
from masa_lib.training.learner import learning_rate, samples_of
from masa_lib.training.recorder import status
from masa_lib.training.trainer import Trainer

try:
    from trl.experimental.async_grpo import AsyncGRPOConfig
    from trl.experimental.async_grpo.async_rollout_worker import RolloutSample
except ImportError as error:
    raise ConfigError(f"The worker for TRL needs the package trl ({error}); `pip install -e '.[scaleout]'` in "
                      "masa_lib's folder brings it.") from error

#: settings that TRL's loss has no place for, and the value that is taken
ONLY = {"update.dual_clip": 0.0, "update.meta_entropy": 0.0, "update.updates_per_step": 1, "model.lora_rank": 0}
#: what our learner measures and this one cannot
UNMEASURED = ("clip_share", "entropy", "logp_gap", "gradient_norm", "belief_gradient")
#: seconds without a sign of life from the worker after which TRL gives up: longer than a step samples
PATIENCE = 3600.0


class WorkerError(MasaError, RuntimeError):
    """The worker cannot go on; the message says why."""


def check(config: Config) -> None:
    """Refuse what TRL's loss has no place for.

    Raises:
        ConfigError: names the setting.
    """
    scaleout.check(config, ONLY, "AsyncGRPOTrainer")
    if config.update.sampler_weight == "on":
        raise ConfigError("update.sampler_weight is on; TRL weighs tokens by its own ratio. Set it to auto or off.")
    if configs.reads(config) and config.sampling.temperature != 1:
        raise ConfigError(f"sampling.temperature is {config.sampling.temperature}; TRL learns a belief at the "
                          "temperature of the sampling, so it must be 1 where predictions are read. Set it.")


def places(config: Config) -> int:
    """The most sequences that a step can hand over."""
    groups, sampling, gated = config.sampling.problems, config.sampling, config.method in registry.GATES
    predictions = sampling.predictions if configs.samples_predictions(config) else 0
    if gated:
        groups = int(gating.limits(config).candidates * groups)
        predictions = max(predictions, config.gate.predictions) if predictions else 0
    read = len(beliefs.ANSWERS) if configs.reads(config) else 0
    return groups * (sampling.solutions + predictions + read)


def arguments(config: Config, out: str | Path, pieces: int = 1, **others: Any) -> AsyncGRPOConfig:
    """TRL's settings for a config: a step of ours is one update of TRL's.

    Args:
        config: of the run; its schedule is TRL's of the same name, whose first step of a warm-up has the rate 0.
        out: TRL's own folder.
        pieces: micro-batches that each process makes of its share of a step; an update has one more, see above.
        others: settings of `AsyncGRPOConfig`, which win.
    """
    update, processes = config.update, int(os.environ.get("WORLD_SIZE", "1"))
    warm = update.schedule == "constant" and update.warmup_steps
    return AsyncGRPOConfig(**{
        "output_dir": str(out), "seed": config.seed, "max_steps": config.steps, "token_budget": 0,
        "per_device_train_batch_size": math.ceil(places(config) / processes / pieces),
        "gradient_accumulation_steps": pieces + 1, "temperature": config.sampling.temperature,
        "learning_rate": update.learning_rate, "weight_decay": update.weight_decay,
        "lr_scheduler_type": "constant_with_warmup" if warm else update.schedule, "warmup_steps": update.warmup_steps,
        "max_grad_norm": update.gradient_clip,
        "epsilon": update.clip_low, "epsilon_high": update.clip_high, "use_cpu": config.model.device == "cpu",
        "bf16": config.model.precision == "bfloat16", "gradient_checkpointing": config.model.gradient_checkpointing,
        "heartbeat_stale_after_s": PATIENCE, "save_strategy": "no", "report_to": [],
        **others})


class MasaRolloutWorker:
    """Rollouts of MASA for `AsyncGRPOTrainer`, as its `rollout_worker` and as its `weight_transfer`.

    Args:
        config: of the run.
        args: TRL's settings, as `arguments` makes them; they say how a step is cut into micro-batches.
        out: a new run folder to record in, which `masa compare` reads; None records nothing.
        ahead: steps that are sampled while TRL still learns from the ones before; their weights are as many updates
            old. With 0 nothing overlaps, and the numbers are those of `masa train`.

    Attributes:
        rollout_buffer: the sequences; TRL takes them from here.
        metrics_queue: a step's metrics; TRL logs them.
        trainer: ours, from `start` on.
    """

    def __init__(self, config: Config, args: AsyncGRPOConfig, out: str | Path | None = None, ahead: int = 0) -> None:
        check(config)
        self._batch = args.per_device_train_batch_size * int(os.environ.get("WORLD_SIZE", "1"))
        self._pieces = args.gradient_accumulation_steps
        room = self._batch * (self._pieces - 1)
        if room < places(config):
            raise ConfigError(f"An update has room for {room} sequences and a step may have {places(config)}; raise "
                              "per_device_train_batch_size, see `worker.arguments`.")
        if args.token_budget != 0 or args.weight_sync_steps != 1 or args.max_staleness < ahead:
            raise ConfigError(f"token_budget is {args.token_budget}, weight_sync_steps {args.weight_sync_steps} and "
                              f"max_staleness {args.max_staleness}; steps of MASA need 0, 1 and {ahead} or more.")
        # No checkpoints: the optimiser is TRL's, and with it what there would be to go on from.
        self.config, self.out, self.ahead = configs.replace(config, {"record.checkpoint_every": 0}), out, ahead
        self.rollout_buffer, self.metrics_queue = queue.Queue(), queue.Queue()
        self.trainer: Trainer | None = None
        self._weights: dict[str, torch.Tensor] = {}
        self._version = self._used = self._first = 0  # of the newest weights, those in use, and the first ones in use
        self._changed, self._stopping, self._sign = threading.Condition(), False, time.monotonic()
        self._error: BaseException | None = None

    # TRL's protocol of a rollout worker.

    def start(self) -> None:
        """Load model, problems and engine, and begin with the first step."""
        run = Run.create(self.out, self.config, "AsyncGRPOTrainer") if self.out else None
        self.trainer = Trainer(self.config, run)
        self.trainer.learner = self
        if run:
            prompts.fix_date(self.trainer.tokenizer, run.started)
        self._first = self._version
        self._thread = threading.Thread(target=self._live, name="masa-rollouts", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End after the running step; a finished training's last evaluation is waited for.

        Raises:
            WorkerError: what went wrong behind the last update.
        """
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self.trainer:
            self._thread.join()
            if self._error and not isinstance(self._error, Stopped):
                raise WorkerError(f"The rollouts ended with an error: {self._error}") from self._error

    def update_model_version(self, model_version: int) -> None:
        """The weights that were sent last are those of this version."""
        with self._changed:
            self._version, self._sign = model_version, time.monotonic()
            self._changed.notify_all()

    def check_health(self, stale_after_s: float) -> None:
        """See that the worker still works.

        Raises:
            WorkerError: it ended, or gave no sign of life for so long.
        """
        if not self._thread.is_alive():
            raise WorkerError(f"The rollouts ended: {self._error or 'all steps were handed over'}.") from self._error
        if (quiet := time.monotonic() - self._sign) > stale_after_s:
            raise WorkerError(f"No step was finished for {quiet:.0f} seconds; raise heartbeat_stale_after_s if that is "
                              "what a step takes.")

    # TRL's protocol of a weight transfer; nothing is to be paused, as weights are taken up between two steps.

    def init_weight_transfer(self) -> None:
        """Nothing to do."""

    def pause(self) -> None:
        """Nothing to do."""

    def send_weights(self, iterator: Iterator[tuple[str, torch.Tensor]]) -> None:
        """Keep a copy of TRL's weights, whole ones also where it shards them."""
        self._weights = {name: value.detach().clone() for name, value in iterator}

    def resume(self) -> None:
        """Nothing to do."""

    def destroy(self) -> None:
        """Nothing to do."""

    # The life of the thread.

    def _live(self) -> None:
        try:
            self._take_up()
            self._hand_over([], 0)
            with contextlib.ExitStack() as life:
                if run := self.trainer.run:
                    life.enter_context(run.lock())
                    life.enter_context(status(run))
                    self.trainer.recorder.open()
                life.callback(self.trainer.recorder.close)
                self._steps()
                self.trainer.save_model()
        except BaseException as error:  # TRL's thread hears of it from check_health or stop
            self._error = error

    def _steps(self) -> None:
        for done in self.trainer:
            self.metrics_queue.put({f"masa/{name}": float(value) for name, value in done.metrics.items()
                                    if isinstance(value, int | float) and math.isfinite(value)})
        if self.trainer.stop.signal:  # asked for in the run's folder, see `live_control`
            raise Stopped(f"The run was stopped after step {self.trainer.step}.", 0)

    def _take_up(self) -> None:
        self._used = self._version  # first, as the weights may be replaced meanwhile: by newer ones, never by older
        with torch.no_grad():
            weights = self._weights
            for name, parameter in self.trainer.model.named_parameters():
                parameter.copy_(weights[name])
        self.trainer.engine.sync()

    def _wait_for(self, version: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._version >= version or self._stopping)
            if self._version < version:
                raise Stopped("TRL ended before the last step.", 0)

    def _hand_over(self, rows: Sequence[Sample], step: int) -> None:
        """Put a step's sequences into TRL's queue, and behind them what the next update begins with."""
        end = self.trainer.tokenizer.eos_token_id
        logp = float(self.trainer.engine.read([(end,)], (), (end,)).logps[0, 0])
        blank, parts = Sample((end,), (end,), (logp,), 0.0, 0.0), self._pieces - 1 if step else 0
        for sample in [*to_trl(rows, blank, self._batch, parts, self._pieces, self._used, step),
                       *to_trl([], blank, self._batch, 1, self._pieces, self._used + 1, step)]:
            sample.enqueued_at = time.time()
            self.rollout_buffer.put(sample)

    # The learner's place in our trainer.

    def update(self, table: pd.DataFrame, candidates: Sequence[Candidate], config: Config, step: int,
               signal_only: bool = False) -> dict[str, float]:
        """Hand a step over, and wait for the weights that come of it; see `masa_lib.training.learner.Learner`."""
        rows = samples_of(table, config.update, signal_only)
        read, loss = self._belief_samples(table, candidates)
        self._hand_over([*rows, *read], step)
        last = step == self.config.steps
        self._wait_for(self._first + step - (0 if last else self.ahead))
        self._take_up()
        terms = pd.DataFrame([(row.stream, -row.advantage * row.weight * len(row.completion)) for row in rows],
                             columns=["stream", "loss"]).groupby("stream")["loss"].sum()  # the ratio is 1
        return {"loss": terms.sum(), "loss_solution": terms.get("solution", 0.0), "loss_meta": terms.get("meta", 0.0),
                "loss_belief": loss, "learning_rate": learning_rate(config, step), "updates": 1,
                "tokens_update": sum(row.length for row in [*rows, *read]),
                "tokens_belief": sum(row.length for row in read[::len(beliefs.ANSWERS)]),
                "token_budget": config.update.token_budget, **dict.fromkeys(UNMEASURED, math.nan)}

    def _belief_samples(self, table: pd.DataFrame, candidates: Sequence[Candidate]) -> tuple[list[Sample], float]:
        """The beliefs about the rolled-out problems as sequences, and their loss, NaN where none was read."""
        went = rollouts.outcomes(table)
        if not configs.reads(self.config) or went.empty or not self.config.prediction.weight:
            return [], math.nan
        choices = beliefs.question(self.trainer.tokenizer, self.config.prompt).choices
        return belief_samples([candidates[group].belief for group in went.index], went["right"].tolist(),
                              went["solutions"].tolist(), choices, self.config)


def belief_samples(read: Sequence[beliefs.Belief], right: Sequence[int], solutions: Sequence[int],
                   choices: Sequence[int], config: Config) -> tuple[list[Sample], float]:
    """Sequences whose clipped loss has the gradient of the beliefs' loss, while the policy is the one that was read.

    A score moves the nine log-probs by its derivatives by the nine logits, whose sum is 0: under the log score the
    posterior minus the belief. The limit that our learner sets to this gradient (the norm of the solutions') has no
    place here, as TRL knows one gradient.

    Args:
        read: of the rolled-out problems.
        right: solutions of each that were right.
        solutions: of each.
        choices: ids of the nine answers.
        config: score and weight.

    Returns:
        Nine sequences a belief, one token long; and the loss, as `belief_gradients` gives it.
    """
    beliefs_PV = torch.tensor([belief.probabilities for belief in read], dtype=torch.float64)
    logits_PV = beliefs_PV.clamp_min(1e-300).log().requires_grad_()
    scores_P = objective.belief_scores(logits_PV, right, solutions, config.prediction.score)
    moves_PV, = torch.autograd.grad(scores_P.sum(), logits_PV)
    said_PV = logits_PV.detach() + torch.tensor([[math.log1p(-belief.outside)] for belief in read])
    weight = config.prediction.weight / len(read)
    return [Sample(belief.prompt + belief.suffix, (choice,), (logp,), move, weight, "belief")
            for belief, moves, logps in zip(read, moves_PV.tolist(), said_PV.tolist(), strict=True)
            for choice, move, logp in zip(choices, moves, logps, strict=True)], -scores_P.mean().item()


def to_trl(rows: Sequence[Sample], blank: Sample, batch: int, parts: int, pieces: int, version: int,
           step: int) -> Iterator[RolloutSample]:
    """Sequences as TRL's samples, in equal micro-batches.

    Args:
        rows: what has a gradient, at most `batch` times `parts`.
        blank: fills what is left, and teaches nothing.
        batch: sequences of a micro-batch.
        parts: micro-batches that are made.
        pieces: micro-batches of an update.
        version: of the weights that sampled them.
        step: makes the numbers of groups differ from those of other steps.
    """
    everything = [*rows, *[blank] * (batch * parts - len(rows))]
    number = {prompt: count for count, prompt in enumerate(dict.fromkeys(row.prompt for row in everything))}
    for first in range(0, len(everything), batch):
        part = everything[first:first + batch]
        tokens = sum(len(row.completion) for row in part)
        for row in part:
            yield RolloutSample(
                prompt=[], completion=[], input_ids=np.array(row.prompt + row.completion),
                completion_mask=np.array([0] * len(row.prompt) + [1] * len(row.completion)),
                old_log_probs=np.array([0.0] * len(row.prompt) + list(row.sampler_logps)),
                advantage=row.advantage * row.weight * tokens * pieces, model_version=version,
                group_id=step * batch * pieces + number[row.prompt], metrics={})
