"""A training on TRL, from the config to the run's folder: the same files as `masa_lib.training.trainer` writes.

The main process alone writes and holds the run's lock. A checkpoint is the same on both engines, so a run may change
from one to the other, or to another number of processes, whenever it is resumed. Every process is stopped after the
same step. Settings cannot change while it runs, and what TRL has no place for is refused before anything is loaded.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from masa_lib import config as configs
from masa_lib.config import Config, ConfigError
from masa_lib.crash_safe_files import RunError
from masa_lib.engines import Engine, context_of, engine_of
from masa_lib.errors import MasaError
from masa_lib.method import prompts, rollouts
from masa_lib.models import loading, tensors
from masa_lib.runs.folder import CONFIG, Run
from masa_lib.runs.stopping import Stop
from masa_lib.tasks.problems import ProblemPool, held_out, make_room
from masa_lib.training import evaluation, metrics, safeguards
from masa_lib.training.checkpoint import read_moments, read_state
from masa_lib.training.clock import memory_mb
from masa_lib.training.recorder import Recorder, check_stop, status

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # the rollout function is; a test watches over it

try:
    from accelerate.utils import broadcast_object_list, gather_object
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_model_state_dict,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )
    from tqdm.auto import tqdm
    from transformers import TrainerCallback
    from transformers.trainer_callback import PrinterCallback

    from masa_lib.scaleout.engine import SharedEngine, TrlEngine
    from masa_lib.scaleout.groups import GroupReward, data_set, layout
    from masa_lib.scaleout.trainer import MasaGRPOTrainer, Rollouts, arguments, loss_weights
except ImportError as error:
    raise ConfigError(f"A training on TRL needs the package trl ({error}); `pip install -e '.[scaleout]'` in "
                      "masa_lib's folder brings it.") from error

#: settings that a training on TRL takes at one value only
ONLY = {"update.updates_per_step": 1, "model.lora_rank": 0,
        "sampling.shared_beginning": False, "prediction.mode": "sampled"}
#: what a step's metrics say of beliefs, which have no place here
NOTHING_READ = {"tokens_read": 0, "seconds_read": 0.0, "tokens_anchor": 0, "tokens_belief": 0, "loss_belief": math.nan,
                "belief_gradient": math.nan}
#: who carries messages between processes, as their errors name themselves
BACKENDS = ("gloo", "NCCL")
#: problems whose prompts are looked at to guess the longest
PROMPTS_SEEN = 64
#: whole state dicts in the memory of the CPU, from whatever wraps model and optimiser
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def check(config: Config) -> None:
    """Refuse what TRL has no place for.

    Raises:
        ConfigError: names the setting.
    """
    for key, value in ONLY.items():
        if configs.get(config, key) != value:
            raise ConfigError(f"{key} is {configs.get(config, key)}; a training on TRL takes {value} only. Set it, or "
                              "train without --backend trl.")
    if config.update.sampler_weight == "on":
        raise ConfigError("update.sampler_weight is on; a training on TRL has no such weight. Set it to auto or off.")
    if sharded() and config.sampling.engine == "paged":
        raise ConfigError("sampling.engine is paged; where weights are sharded (FSDP), TRL's paged sampling turns the "
                          "trained weights themselves into bfloat16. Set sampling.engine=transformers or vllm.")
    if config.method in configs.CHOOSING:
        raise ConfigError(f"The method {config.method} chooses by a belief, which a training on TRL has no place for "
                          "yet; train without --backend trl, or with --method masa-efficient.")


def sharded() -> bool:
    """Whether accelerate shards the weights between the processes."""
    return os.environ.get("ACCELERATE_USE_FSDP") == "true"


def train(config: Config, out: str | Path, command: str) -> Run:
    """Train in a new run folder; see `masa_lib.training.drive.train`."""
    check(config)
    session = Session(config, Path(out))
    if session.main:
        Run.create(out, config, command)
    return session.drive()


def resume(path: str | Path) -> Run:
    """Go on with a run of either engine from its last checkpoint; see `masa_lib.training.drive.resume`."""
    run = Run.open(path)
    run.check_writable()
    status = run.status
    found = run.resume_point(lambda step, folder: (read_state(folder, step)["step"], folder))
    if status["state"] == "finished" and status["step"] >= run.config_at(status["step"] + 1).steps:
        return run
    if status["state"] == "finished" and not found:
        raise RunError(f"The finished run {path} has no checkpoints left to go on from; train in another folder.")
    step, folder = found if found else (-1, None)
    config = run.config_at(max(step, 0) + 1)
    check(config)
    return Session(config, Path(path), folder).drive(rewind=step)


class ScaleoutError(MasaError, RuntimeError):
    """A training on several processes cannot go on; the message says what to do."""


class Session:
    """One life of a run on this process and its siblings.

    Args:
        config: of the run.
        out: its folder.
        checkpoint: the folder of a checkpoint to go on from.
    """

    def __init__(self, config: Config, out: Path, checkpoint: Path | None = None) -> None:
        self.config, self.out, self.checkpoint = config, out, checkpoint
        self.sharded = sharded()
        loading.prepare(config)
        pool = ProblemPool(config.problems, config.seed)
        self.held_out = held_out(config.problems, max(config.evaluation.final_problems, config.evaluation.problems))
        loading.pick_device(config.model)  # a GPU that torch cannot use is said, or refused
        # TRL moves the model to the process's device.
        model, self.tokenizer = loading.load(dataclasses.replace(config.model, device="cpu"), checkpoint)
        self.names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        self.rollouts = Rollouts(config, pool, None, self.tokenizer)
        run = Run.open(out) if (Path(out) / CONFIG).exists() else None
        prompts.fix_date(self.tokenizer, run.started if run else datetime.datetime.now(datetime.UTC).date())
        fits = prompts.room(self.tokenizer, context_of(None, model), run.config if run else config)
        self.held_out = make_room(pool, self.held_out, fits)
        self._restore_place()
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        plan = layout(config, processes, self._longest_prompt(pool))
        args = arguments(config, plan, processes, max(config.steps - self.rollouts.step, 1), out, self.sharded)
        ends = loading.end_tokens(model, self.tokenizer, config.sampling.end_tokens)
        self.trainer = MasaGRPOTrainer(
            config, GroupReward(config, self.tokenizer, ends),
            done=self.rollouts.step, model=model, args=args, processing_class=self.tokenizer,
            train_dataset=data_set(config, pool, plan, first=self.rollouts.step + 1, cursor=self.rollouts.cursor),
            rollout_func=self.rollouts)
        self.trainer.remove_callback(PrinterCallback)
        self.main = self.trainer.accelerator.is_main_process
        self.rollouts.engine = SharedEngine(self._engine())

    def _restore_place(self) -> None:
        if self.checkpoint:
            state = read_state(self.checkpoint)
            self.rollouts.step, self.rollouts.cursor = state["step"], state["cursor"]
            self.rollouts.memory = state["gates"]

    def _engine(self) -> Engine:
        """This process's sampler: ours on whole weights, TRL's where they are sharded."""
        if self.sharded:
            return TrlEngine(self.trainer, self.trainer.reward.end_tokens)
        return engine_of(self.config, self.trainer.model, self.tokenizer)

    def _longest_prompt(self, pool: ProblemPool) -> int:
        asks = rollouts.whole_groups(pool.take(0, PROMPTS_SEEN), self.config, solutions=1, predictions=0)
        texts = [ask.problem.text for ask in asks]
        wanted = [prompts.solution_messages(text, self.config.prompt) for text in texts] + [
            prompts.meta_messages(text, self.config.prompt, self.config.sampling.solution_tokens) for text in texts]
        return max(len(prompts.encode(self.tokenizer, messages)) for messages in wanted)

    # A life of the run.

    def drive(self, rewind: int | None = None) -> Run:
        """Train to the end.

        Args:
            rewind: the step of the checkpoint that is gone on from (-1: none); None for a new run.

        Raises:
            Stopped: SIGINT, SIGTERM or SIGHUP ended it, on every process after the same step.
        """
        self.trainer.accelerator.wait_for_everyone()  # the main process has made the run by now
        run, stop = Run.open(self.out), Stop()
        with run.lock() if self.main else contextlib.nullcontext():
            if self.main and rewind is not None:
                run.begin_again(max(rewind, 0))
                run.rewind(rewind)
            with self._status(run), stop:
                recorder = StepEnd(self, run, stop)
                self.trainer.add_callback(recorder)
                if self.rollouts.step < self.config.steps:
                    self.trainer.train()
                recorder.close()
                check_stop(recorder.stopped, self.rollouts.step)
                self.save_model(run)
        return run

    @contextlib.contextmanager
    def _status(self, run: Run) -> Iterator[None]:
        """What the run's status says meanwhile and afterwards; the main process alone writes it."""
        if not self.main:
            yield
            return
        try:
            with status(run):
                yield
        except RuntimeError as error:
            if any(name in str(error) for name in BACKENDS):
                raise ScaleoutError("Another process of this training ended or cannot be reached; its own output says "
                                    "why. `resume` goes on from the last checkpoint.") from error
            raise

    def evaluate(self) -> tuple[dict[str, Any], pd.DataFrame]:
        """The summary and the table of an evaluation at the current step, on all processes."""
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        was_training = model.training
        model.eval()
        self.rollouts.engine.sync()
        with loading.precision(self.config.model, self.trainer.accelerator.device):
            found = evaluation.evaluate_step(self.held_out, self.rollouts.engine, self.tokenizer, self.config,
                                             self.rollouts.step)
        model.train(was_training)
        return found

    def _weights(self) -> dict[str, torch.Tensor]:
        """The trained parameters, whole, in the memory of the CPU; every process has to call."""
        whole = get_model_state_dict(self.trainer.model_wrapped, options=WHOLE)
        return {name: whole[name] for name in self.names} if self.main else {}

    def save_checkpoint(self, run: Run) -> None:
        """A checkpoint as `masa_lib.training.trainer` writes it; every process has to call."""
        weights = self._weights()
        moments = get_optimizer_state_dict(self.trainer.model_wrapped, self._optimizer(), options=WHOLE)
        if not self.main:
            return
        group = {key: value for key, value in moments["param_groups"][0].items() if key != "params"}
        plain = {"state": {number: moments["state"][name] for number, name in enumerate(self.names)},
                 "param_groups": [group | {"params": list(range(len(self.names)))}]}
        state = {"step": self.rollouts.step, "cursor": self.rollouts.cursor, "gates": self.rollouts.memory}

        def write(folder: Path) -> None:
            tensors.save(self._model(), self.tokenizer, folder, weights=weights)
            with (folder / "optimizer.pt").open("wb") as file:
                torch.save(plain, file)
            (folder / "state.json").write_text(json.dumps(state), encoding="utf8")

        run.save_checkpoint(self.rollouts.step, write)

    def restore_optimizer(self) -> None:
        """Take up the moments of the checkpoint; learning rate and the like stay those of the config."""
        if not self.checkpoint:
            return
        optimizer, state = self._optimizer(), {}
        if self.main:
            shapes = [parameter.shape for parameter in tensors.trainable(self._model())]
            moments = read_moments(self.checkpoint, shapes, "cpu")
            group = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
            state = {"state": {name: moments[number] for number, name in enumerate(self.names)},
                     "param_groups": [group | {"params": self.names}]}
        several = self.trainer.accelerator.num_processes > 1
        set_optimizer_state_dict(self.trainer.model_wrapped, optimizer, state, options=StateDictOptions(
            full_state_dict=True, broadcast_from_rank0=several))

    def save_model(self, run: Run) -> None:
        """The trained model, as a folder that `from_pretrained` loads; every process has to call."""
        precision, weights = tensors.final_precision(self.config), self._weights()
        if self.main and precision != "none":
            run.save_model(lambda folder: tensors.save(self._model(), self.tokenizer, folder, precision, weights))

    def _model(self) -> Any:
        return self.trainer.accelerator.unwrap_model(self.trainer.model)

    def _optimizer(self) -> torch.optim.Optimizer:
        return getattr(self.trainer.optimizer, "optimizer", self.trainer.optimizer)


class StepEnd(TrainerCallback):
    """After each step: what the gate learns, metrics, rollouts, evaluation, checkpoint, and whether to stop.

    Args:
        session: this life of the run.
        run: its folder.
        stop: whether this process was asked to stop.

    Attributes:
        stopped: the signal that ended the training on any process, 0 for none.
    """

    def __init__(self, session: Session, run: Run, stop: Stop) -> None:
        self.session, self.run, self._stop, self.stopped = session, run, stop, 0
        self._saved = session.rollouts.step
        self._evaluated = set(run.evaluations()["step"])
        config = session.config
        self._bar = tqdm(total=config.steps, initial=session.rollouts.step, desc=str(run.path), unit="step",
                         disable=not session.main)
        self._recorder = Recorder(run, config.model.precision)
        if session.main:
            self._recorder.open()

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Restore the optimiser; evaluate what has not been."""
        self.session.restore_optimizer()
        self._evaluate_if_due()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """The gradients are clipped: end on all processes if on one they are not finite."""
        gradients = [value.grad for value in self.session.trainer.model_wrapped.parameters() if value.grad is not None]
        whole = all(bool(getattr(value, "_local_tensor", value).isfinite().all()) for value in gradients)
        if not all(gather_object([whole])):
            safeguards.check_finite(math.nan)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **others: Any) -> None:
        """A step is over: its loss is known."""
        if logs is None or "grad_norm" not in logs:  # the summary at the end of a training
            return
        session, config = self.session, self.session.config
        table, metrics = self._metrics(logs)
        step, last = session.rollouts.step, session.rollouts.step == config.steps
        if session.main:
            self._recorder.step(table, metrics, config)
            self._bar.update()
            self._bar.set_postfix({name: f"{metrics[name]:.2f}" for name in ("accuracy", "reward_meta")})
        best = self._evaluate_if_due() and config.record.keep_best and self._is_best(step)
        signals = gather_object([self._stop.signal])
        self.stopped = max(signals)
        if last or best or self.stopped or step % config.record.checkpoint_every == 0:
            session.save_checkpoint(self.run)
        control.should_training_stop = control.should_training_stop or bool(self.stopped)

    def _metrics(self, logs: dict[str, Any]) -> tuple[pd.DataFrame, dict[str, Any]]:
        session, config = self.session, self.session.config
        trainer, steps = session.trainer, session.rollouts
        table, refills = trainer.reward.table, trainer.refills
        terms = -loss_weights(table, config, refills) * table["advantage"] * table["length"]  # the ratio is 1
        solution = terms[table["stream"] == "solution"].sum()
        gated = steps.learn(table)
        steps.clock.lap("update")
        table = table.copy()
        table.insert(0, "step", steps.step)
        tokens = sum(gather_object([trainer.signal[1]]))
        return table, {
            "step": steps.step, "method": config.method, **metrics.batch_metrics(table), **gated,
            "loss": logs["loss"], "loss_solution": solution, "loss_meta": logs["loss"] - solution,
            "clip_share": logs["clip_ratio/region_mean"], "entropy": logs["entropy"], "logp_gap": math.nan,
            "gradient_norm": logs["grad_norm"], "learning_rate": logs["learning_rate"], "updates": 1,
            "tokens_update": tokens, "token_budget": config.update.token_budget,
            "tokens_prefill": steps.counting.prefill, "tokens_decode": steps.counting.decode,
            "tokens_oracle": steps.oracle_tokens, **NOTHING_READ, **steps.clock.seconds(), "memory_mb": memory_mb()}

    def _evaluate_if_due(self) -> bool:
        session, step = self.session, self.session.rollouts.step
        if not evaluation.due(session.config, step) or step in self._evaluated:
            return False
        summary, table = session.evaluate()
        if session.main:
            self._recorder.evaluation(step, summary, table)
        self._evaluated.add(step)
        return True

    def _is_best(self, step: int) -> bool:
        return broadcast_object_list([self.session.main and self.run.best_step() == step])[0]

    def close(self) -> None:
        """End the bar and the board."""
        self._bar.close()
        self._recorder.close()
