"""Every setting of a run, in frozen dataclasses that pydantic checks: its type, default, meaning and limits, once.

The command line's `--set`, its help, the config files and the panels' controls all read this table. Nothing here loads
a model, or a file other than the config's own.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import tomllib
from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, NamedTuple, get_args

import pydantic
import tomli_w
from pydantic.dataclasses import dataclass
from pydantic_core import core_schema

from masa_lib.errors import MasaError, brief

#: how to train, by name; what chooses the problems of a method is entered in `masa_lib.gates.registry`
METHODS = {
    "grpo": "the reference: every problem is rolled out, and nothing is predicted",
    "masa": "every problem is rolled out, and predictions are learned beside the solutions",
    "masa-efficient": "sampled predictions choose problems and stop solutions, once they are good",
    "dapo": "groups without a signal are replaced by others until the batch is full",
    "mopps": "problems whose remembered pass rate, drawn from a Beta posterior, is nearest to a half",
    "greso": "problems whose last groups had no signal are skipped by chance",
    "level-table": "privileged: by the share of groups with a signal at a problem's level",
    "oracle": "privileged: by the true pass rate",
    "masa-read": "the belief about the pass rate is read in one forward pass, learned, and chooses from the first step",
    "history": "the rule of masa-read without a belief: by what is remembered of a problem alone",
    "probe": "that rule with a ridge regression on the policy's hidden states",
    "anchor": "that rule with the base model's own pass rates, measured before the first step",
    "random": "as few problems a step as masa-read, chosen by nothing"}
#: who samples, by name; how an engine is made is entered in `masa_lib.engines.registry`
ENGINES = {"transformers": "in this process, sequences padded", "paged": "in this process, paged keys and values",
           "vllm": "vLLM, with a copy of the weights"}
#: who else can be told a run's metrics
TRACKERS = ("tensorboard", "trackio", "wandb")
#: the methods that predict: by a meta stream, or by a belief that is read
PREDICTING = ("masa", "masa-efficient", "masa-read")
#: the methods that choose by a belief about the pass rate, and their control; `belief.` has their settings
CHOOSING = ("masa-read", "history", "probe", "anchor", "random")
#: what a run keeps from its first step to its last: it was loaded or drawn before the first
FIXED = ("seed", "model.", "problems.", "sampling.engine", "sampling.batch", "sampling.gpu_memory",
         "sampling.vllm", "sampling.end_tokens", "evaluation.problems", "evaluation.final_problems")
#: settings of earlier versions, which records still name, and the value of each that is built in now
REMOVED = {"update.beta1": 0.9, "update.beta2": 0.999, "update.released_updates": False, "update.entropy_floor": 0.5,
           "update.sampler_cap": 3.0, "gate.precision": 0.9, "gate.prior": 4.0, "gate.guard": True,
           "cap.guard": True, "cap.stopped": "wrong", "cap.uncapped": 0.1, "cloning.store": 0, "cloning.threshold": 0.2,
           "cloning.updates": 5, "cloning.learning_rate": 1e-5, "rivals.target": 0.5, "rivals.decay": 0.5,
           "rivals.explore": 0.5, "rivals.skipped": 0.25, "rivals.samples": 16, "rivals.refresh": 20, "gate.std": 0.1,
           "model.lora_alpha": 32.0, "record.tensorboard": "auto"}
#: what other values of them mean today
INSTEAD = {"gate.guard": {False: {"gate.lost": 1.0}}, "cap.guard": {False: {"cap.cut": 1.0}},
           "record.tensorboard": {"off": {}, "on": {"record.trackers": "tensorboard"}}}


class ConfigError(MasaError, ValueError):
    """A setting is unknown or out of range; the message names the value, what is allowed and where to set it."""


def option(default: Any, doc: str, **limits: float) -> Any:
    """One setting: its default, what it means, and its limits (`ge` <= value <= `le`, value > `gt`)."""
    return pydantic.Field(default, description=doc, **limits)


@dataclasses.dataclass(frozen=True)
class OneOf:
    """Marks a setting that takes a name of a table, which may grow while a program runs."""

    table: Mapping[str, str]

    def __get_pydantic_core_schema__(self, source: Any, handler: pydantic.GetCoreSchemaHandler) -> Any:
        """A text that is then looked up."""
        return core_schema.no_info_after_validator_function(self._known, handler(source))

    def _known(self, name: str) -> str:
        if name not in self.table:
            raise ValueError("no such name")
        return name


def arguments(text: str, key: str) -> dict[str, Any]:
    """What a setting of the form `name=value name=value` names; a value is JSON's, else a word.

    Raises:
        ConfigError: some part of the setting `key` is not of that form.
    """
    found: dict[str, Any] = {}
    for part in text.split():
        name, _, value = part.partition("=")
        if not name.isidentifier() or not value:
            raise ConfigError(f"{key} holds {brief(part)}; it takes name=value, with spaces between.")
        try:
            found[name] = json.loads(value)
        except (ValueError, RecursionError):
            found[name] = value
    return found


#: a part of a whole
Share = Annotated[float, pydantic.Field(ge=0, le=1)]
section = dataclass(frozen=True, config=pydantic.ConfigDict(strict=True, allow_inf_nan=False, extra="forbid"))


@section
class ModelConfig:
    """Which model is trained, and in which precision."""

    name: str = option("pocket", "a tier's name, a Hugging Face id or a folder")
    weights: str = option("", "a folder with other weights of this model to begin with, such as `masa warmup` makes")
    precision: Literal["float32", "bfloat16"] = option(
        "float32", "of the computation and of frozen weights; trained weights stay float32")
    device: Literal["auto", "cpu", "cuda"] = option(
        "auto", "auto takes CUDA where there is one; an Apple GPU (mps) lacks the float64 that an update adds up in")
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2", "flash_attention_3"] = option(
        "auto", "how the model attends (transformers' attn_implementation); auto: as transformers chooses")
    template: str = option("", "arguments of the chat template, as enable_thinking=false, with spaces between")
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass: less memory, slower")
    lora_rank: int = option(0, "train low-rank adapters of this rank on all linear layers, with about ten times the "
                            "learning rate; 0: train all weights", ge=0)
    deterministic: bool = option(False, "only those algorithms of torch that give the same bits again, slower; the "
                                 "CPU's do so anyway, and on CUDA a resumed run differs without them")
    threads: int = option(0, "CPU threads of torch; 0 leaves torch's own choice", ge=0)

    @pydantic.model_validator(mode="after")
    def _names_arguments(self) -> ModelConfig:
        arguments(self.template, "model.template")
        return self


@section
class ProblemsConfig:
    """Which problems are trained on and which are held out."""

    source: str = option("pocket", "pocket, reasoning-gym:<task,task>, a data set's short name, or a local file")
    evaluation_source: str = option("", "held-out problems; empty: the evaluation split of `source`")
    pool: int = option(960, "problems in the training pool, which come back; 0: a fresh stream without end", ge=0)
    seed: int = option(0, "of the pool and the held-out problems (the run's seed orders them)", ge=0)
    levels: str = option("", "first and last level, as 2-9; empty: all, of pocket those of its reach (1-12; 13 to 18 "
                         "are beyond it)")


@section
class PromptConfig:
    """The wording of the two prompts."""

    wording: Literal["paper", "compact"] = option(
        "compact", "paper: the published prompts; compact: problem first, a few words")
    min_length: int = option(1, "smallest solution length that the meta prompt names, tokens", ge=1)
    max_length: int = option(0, "largest solution length that it names, tokens; 0: sampling.solution_tokens", ge=0)

    @pydantic.model_validator(mode="after")
    def _in_order(self) -> PromptConfig:
        if 0 < self.max_length < self.min_length:
            raise ConfigError(f"prompt.max_length is {self.max_length}, below prompt.min_length ({self.min_length}).")
        return self


@section
class SamplingConfig:
    """How rollouts are sampled."""

    engine: Annotated[str, OneOf(ENGINES)] = option("transformers", "who samples")
    gpu_memory: float = option(0.4, "share of the GPU's memory for vLLM, of the free memory for paged keys and values",
                               gt=0, le=0.95)
    problems: int = option(16, "problems a step", ge=1)
    solutions: int = option(8, "G: solution rollouts of a problem", ge=2)
    predictions: int = option(8, "M: meta rollouts of a problem (masa)", ge=2)
    shared_beginning: bool = option(False, "the M predictions of a problem share the first one's text up to its pass "
                                    "rate, and what follows is sampled M times: cheaper, but notions are not taught")
    temperature: float = option(1.0, "of both streams", gt=0, le=10)
    solution_tokens: int = option(128, "longest solution, tokens, end token included", ge=1)
    meta_tokens: int = option(48, "longest meta answer, tokens, end token included", ge=1)
    batch: int = option(512, "sequences decoded together, at most", ge=1)
    end_tokens: str = option("", "tokens or their ids, with spaces between, that end an answer beside those of model, "
                             "tokenizer and chat template")
    cut: Literal["read", "wrong"] = option("read", "a text cut at its cap: read as far as it goes, or wrong")
    vllm: str = option("", "options of vLLM, as max_num_batched_tokens=8192, with spaces between")

    @pydantic.model_validator(mode="after")
    def _names_options(self) -> SamplingConfig:
        arguments(self.vllm, "sampling.vllm")
        return self


@section
class PredictionConfig:
    """How a model predicts its pass rate, and how a belief that is read is learned."""

    mode: Literal["sampled", "read"] = option(
        "sampled", "masa: sampled, M predictions are written and rewarded; read, the probabilities of the nine pass "
        "rates are read and learned by what happened (masa-read always reads)")
    score: Literal["log", "brier"] = option(
        "log", "what a belief is paid: log, the log of the chance that it gave to what happened; brier, the expected "
        "quadratic score, which kills doubt")
    weight: float = option(1.0, "of the belief's gradient, which is first shortened to the running mean of the norm "
                           "of the solutions'; 0: the belief is not learned", ge=0)
    think: bool = option(False, "the model writes a prediction up to its pass rate before the belief is read")


@section
class BeliefConfig:
    """Which problems masa-read rolls out, and history, probe, anchor and random, which differ in the belief alone."""

    places: float = option(0.6, "problems rolled out, as a share of sampling.problems: more of them have a signal, so "
                           "fewer do", gt=0, le=1)
    candidates: float = option(3.0, "problems of which the belief is read, as a multiple of those rolled out: the "
                               "more of them, the more of these have a signal", ge=1)
    recheck: Share = option(0.02, "of the candidates left out, what is rolled out all the same, by lot: what is left "
                            "out is long, and one group in five steps tells over a run what the gate misses")
    decay: Share = option(0.5, "of a problem's counted solutions, what survives a visit: the policy moves on")
    history: Share = option(0.25, "what a solution of an earlier visit counts for beside the belief, which was "
                            "learned from it, too; 0: no history")


@section
class RewardConfig:
    """The rewards of a group; `mode = released` pays predictions as the authors' code and ignores the other choices.

    Of that code's solution reward it takes one thing, the slack of 100 between plain numbers. What it does not
    reproduce: answers without a box (`So the answer is 42.`, or the last number in the text), the stripping of units
    and words, and a comparison that gives up after a second by the wall clock, so that grades depend on the machine.
    """

    mode: Literal["ours", "released"] = option(
        "ours", "ours or released: parser and meta rewards; solutions are graded by us")
    pass_rate_weight: float = option(1.0, "weight of the difficulty reward in the meta reward", ge=0)
    length_weight: float = option(1.0, "weight of the length reward in the meta reward", ge=0)
    notion_weight: float = option(1.0, "weight of the notion reward in the meta reward", ge=0)
    difficulty_mode: Literal["kernel", "brier"] = option("kernel", "kernel: b^|error|; brier: 1 - error^2")
    difficulty_base: float = option(0.01, "b of the kernel", gt=0, le=1)
    strict_length: bool = option(False, "the window's ends do not count, as released")
    length_slack: Share = option(0.0, "share by which the length window is widened on both sides")
    notion_mode: Literal["count", "rate"] = option(
        "count", "count: more correct than wrong rollouts; rate: larger share of them")
    exclude_problem_notions: bool = option(True, "notions that stand in the problem do not count")


@section
class UpdateConfig:
    """The GRPO update, by AdamW with the moments' usual decay (0.9 and 0.999)."""

    learning_rate: float = option(1e-4, "of AdamW, after warm-up", gt=0, le=1)
    warmup_steps: int = option(10, "steps over which the learning rate rises linearly from 0", ge=0)
    schedule: Literal["constant", "linear", "cosine"] = option(
        "constant", "after warm-up; linear and cosine reach 0 after the last step")
    weight_decay: float = option(0.0, "of AdamW", ge=0)
    gradient_clip: float = option(1.0, "largest gradient norm", gt=0)
    clip_low: Share = option(0.2, "the ratio is clipped below 1 - clip_low")
    clip_high: float = option(0.28, "the ratio is clipped above 1 + clip_high", ge=0)
    dual_clip: float = option(0.0, "bound c > 1 on the loss of a negative advantage; 0: none (released: 10)", ge=0)
    updates_per_step: int = option(1, "optimiser updates a step (released: 2 for masa and 1 for grpo)", ge=1)
    denominator: Literal["stream", "batch"] = option(
        "stream", "tokens a loss is divided by: each stream's own, or the whole batch's")
    loss_mean: Literal["token", "sequence"] = option(
        "token", "token: mean over tokens; sequence: mean of each sequence's mean")
    meta_weight: float = option(1.0, "factor on the meta stream's loss", ge=0)
    meta_entropy: float = option(0.0, "bonus on the entropy (nats) of the meta tokens of groups with a signal, in "
                                 "steps in which it is low: against predictions that collapse to a constant", ge=0)
    normalise_std: bool = option(True, "divide advantages by the group's standard deviation (sample, plus 1e-6)")
    normalise_meta: Literal["reward", "parts", "none", "contrast"] = option(
        "reward", "advantages of the meta stream: of the weighted reward over its std; of its parts, each over its own "
        "std, then weighted; of the weighted reward without a std; of the parts, but the pass rate's only for what "
        "tells problems apart")
    sampler_weight: Literal["auto", "on", "off"] = option(
        "auto", "a token weighs its probability under the learner over that under the sampler, within bounds; auto: "
        "where the two compute in other precisions (vLLM in bfloat16); never in a training on TRL")
    token_budget: int = option(8192, "tokens of one micro-batch, as if its sequences were padded", ge=1)
    logprob_chunk: int = option(2048, "completion tokens whose logits exist at once", ge=1)

    @pydantic.model_validator(mode="after")
    def _bounds(self) -> UpdateConfig:
        if 0 < self.dual_clip <= 1:
            raise ConfigError(f"update.dual_clip is {self.dual_clip}; it must be 0 (none) or above 1.")
        return self


@section
class GateConfig:
    """Which problems masa-efficient leaves out once its predictions are good; baselines use what their docs name."""

    start: int = option(0, "k: gate, cap and hint act after this step; 0: once nine in ten problems that the gate "
                        "would have left out had no signal", ge=0)
    rule: Literal["signal", "v1", "v2", "posterior"] = option(
        "signal", "signal: dropped where the predicted chance of a mixed group is low; v1: where the predictions "
        "agree; v2: where they agree on 0 or 1; posterior: the prediction is the prior of a Beta distribution of the "
        "pass rate, and of gate.candidates times the places those nearest to a half are taken")
    threshold: Share = option(0.4, "of the rules signal and posterior: least chance of right and wrong solutions in a "
                              "group")
    predictions: int = option(0, "M once the gate acts; 0: sampling.predictions", ge=0)
    places: float = option(1.0, "problems rolled out in a step in which a gate acts, as a share of sampling.problems: "
                           "more of them have a signal, so fewer do", gt=0, le=1)
    candidates: float = option(3.0, "most problems drawn a step, as a multiple of sampling.problems", ge=1)
    recheck: Share = option(0.1, "of the dropped problems, what is rolled out all the same, by chance (masa-efficient, "
                            "level-table)")
    window: int = option(20, "steps over which precision, recall, lost signal and cut solutions are measured", ge=1)
    lost: Share = option(0.2, "the gate acts only while it loses at most this share of the signal; 1: always")


@section
class CapConfig:
    """Where masa-efficient stops a solution, and what the predicted notions are used for."""

    multiplier: float = option(2.0, "a solution is stopped at this multiple of the predicted length; 0: never", ge=0)
    aggregate: Literal["max", "mean", "median"] = option("max", "how the M predicted lengths become one")
    cut: Share = option(0.05, "the cap acts only while it cuts at most this share of the right solutions; 1: always")
    hint: Literal["none", "training", "evaluation", "both"] = option(
        "none", "write the predicted notions behind the problem: in training, in evaluations, in both")


@section
class RivalsConfig:
    """Settings of the other gates; `gate.candidates` is theirs, too."""

    refill: bool = option(True, "greso: groups without a signal do not fill the batch, as published (and as in dapo)")
    threshold: Share = option(0.4, "level-table, oracle: least chance of a group with a signal")


@section
class EvaluationConfig:
    """Held-out evaluation; its tokens are not counted as training cost."""

    every: int = option(10, "steps between evaluations of the learning curve; 0: none", ge=0)
    problems: int = option(240, "held-out problems of the learning curve", ge=1)
    samples: int = option(4, "solutions a problem of the learning curve", ge=1)
    final_problems: int = option(320, "held-out problems of the first and last evaluation", ge=1)
    final_samples: int = option(32, "solutions a problem of the first and last evaluation", ge=1)
    predictions: int = option(8, "meta rollouts a problem of the first and last evaluation; 0: none", ge=0)
    read_every: int = option(0, "steps between two looks at the beliefs about the problems of the learning curve, "
                             "which solve and write nothing (methods that read); 0: none", ge=0)
    temperature: float = option(1.0, "of the evaluation's sampling", gt=0, le=10)


@section
class RecordConfig:
    """What a run writes."""

    checkpoint_every: int = option(25, "steps between checkpoints; 0: one only where a signal ends the training", ge=0)
    checkpoint_minutes: float = option(20.0, "minutes after which one is written all the same, behind a step", gt=0)
    checkpoints_kept: int = option(2, "newest checkpoints kept", ge=1)
    keep_best: bool = option(True, "also keep a checkpoint of the step with the highest held-out accuracy")
    trackers: str = option("", f"who else is told the metrics, of {', '.join(TRACKERS)}, with spaces between; their "
                           "packages have to be installed")
    final_model: Literal["bfloat16", "float32", "none"] = option(
        "bfloat16", "precision of the trained model written to the run's folder model; adapters are merged in float32, "
        "as bfloat16 rounds them away")
    rollouts_every: int = option(10, "steps between recorded steps of whole groups; 0: none", ge=0)

    @pydantic.model_validator(mode="after")
    def _known_trackers(self) -> RecordConfig:
        if wrong := set(self.trackers.split()).difference(TRACKERS):
            raise ConfigError(f"record.trackers names {brief(min(wrong))}; it takes names of {', '.join(TRACKERS)} "
                              "with spaces between, or nothing.")
        return self


@section
class Config:
    """One run."""

    method: Annotated[str, OneOf(METHODS)] = option("masa-read", "how to train")
    steps: int = option(150, "training steps", ge=1)
    seed: int = option(0, "of everything random in the run", ge=0, le=2**32 - 1)
    model: ModelConfig = ModelConfig()
    problems: ProblemsConfig = ProblemsConfig()
    prompt: PromptConfig = PromptConfig()
    sampling: SamplingConfig = SamplingConfig()
    prediction: PredictionConfig = PredictionConfig()
    belief: BeliefConfig = BeliefConfig()
    reward: RewardConfig = RewardConfig()
    update: UpdateConfig = UpdateConfig()
    gate: GateConfig = GateConfig()
    cap: CapConfig = CapConfig()
    rivals: RivalsConfig = RivalsConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    record: RecordConfig = RecordConfig()

    @pydantic.model_validator(mode="after")
    def _pays_predictions(self) -> Config:
        weights = self.reward.pass_rate_weight + self.reward.length_weight + self.reward.notion_weight
        if self.method in PREDICTING and weights <= 0:
            raise ConfigError("All three meta reward weights are 0; set at least one of reward.pass_rate_weight, "
                              "reward.length_weight and reward.notion_weight above 0.")
        return self


class Setting(NamedTuple):
    """What is known of one setting: its type, default and meaning, its choices or limits (as `option` names them)."""

    kind: type
    default: Any
    doc: str
    choices: Collection[str]
    ge: float | None = None
    le: float | None = None
    gt: float | None = None

    @property
    def allowed(self) -> str:
        """What it takes, in words."""
        if self.choices:
            return "one of " + ", ".join(self.choices)
        words = {"at least": self.ge, "above": self.gt, "at most": self.le}
        name = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}[self.kind]
        return f"{name} {' and '.join(f'{word} {n:g}' for word, n in words.items() if n is not None)}".strip()

    def read(self, text: str) -> Any:
        """A text as the setting's type; the text itself where it is none, for pydantic to refuse."""
        try:
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()] if self.kind is bool \
                else self.kind(text)
        except (ValueError, KeyError):
            return text


@functools.cache
def settings() -> Mapping[str, Setting]:
    """Every setting by its dotted key, in the order of definition: `{"reward.difficulty_base": Setting(...), ...}`."""
    found = {}
    for name, field in Config.__pydantic_fields__.items():
        parts = getattr(field.annotation, "__pydantic_fields__", None)
        found |= {f"{name}.{key}": _setting(one) for key, one in parts.items()} if parts else {name: _setting(field)}
    return MappingProxyType(found)


def _setting(field: pydantic.fields.FieldInfo) -> Setting:
    tables = [limit.table for limit in field.metadata if isinstance(limit, OneOf)]
    limits = {key: value for limit in field.metadata if not isinstance(limit, OneOf)
              for key, value in dataclasses.asdict(limit).items()}
    choices = [*tables, get_args(field.annotation)][0]
    return Setting(type(field.default), field.default, field.description, choices, **limits)


def reads(config: Config) -> bool:
    """Whether the predictions are beliefs that are read."""
    return config.method == "masa-read" or (config.method == "masa" and config.prediction.mode == "read")


def samples_predictions(config: Config) -> bool:
    """Whether M predictions of each problem are sampled: the methods with a meta stream."""
    return config.method in PREDICTING and not reads(config)


def get(config: Config, key: str) -> Any:
    """The value of a dotted key."""
    return functools.reduce(getattr, key.split("."), config)


def replace(config: Config, changes: Mapping[str, Any]) -> Config:
    """A copy with dotted keys changed; texts are read as the setting's type.

    Raises:
        ConfigError: one sentence with the key, the value and what is allowed.
    """
    table, nested = settings(), {}
    for key, value in changes.items():
        if key not in table:
            raise ConfigError(f"There is no setting {brief(key)}. {_nearest(key[:80], table)}")
        part, _, name = key.rpartition(".")
        nested.setdefault(part, {})[name] = table[key].read(value) if isinstance(value, str) else value
    top = nested.pop("", {})
    top |= {part: _changed(getattr(config, part), values, f"{part}.") for part, values in nested.items()}
    return _changed(config, top)


def _changed(config: Any, values: Mapping[str, Any], prefix: str = "") -> Any:
    """A copy of a config or a section with fields changed; what pydantic refuses is said by its dotted key."""
    try:
        return dataclasses.replace(config, **values)
    except pydantic.ValidationError as refused:
        fault = refused.errors(include_url=False)[0]
    if not fault["loc"]:
        raise fault["ctx"]["error"]
    key = f"{prefix}{fault['loc'][0]}"
    known = settings()[key]
    raise ConfigError(f"{key} is {brief(fault['input'])}; it takes {known.allowed} ({known.doc}). "
                      f"Set it with --set {key}=... or in the config file.")


def current(changes: Mapping[str, Any]) -> dict[str, Any]:
    """What a record or a file names, in today's settings: those of REMOVED at what is built in are left out.

    Raises:
        ConfigError: one of them has a value that is no longer there.
    """
    found = {key: value for key, value in changes.items() if key not in REMOVED}
    for key in changes.keys() & REMOVED.keys():
        value, instead = changes[key], INSTEAD.get(key, {})
        if isinstance(value, bool | str) and value in instead:
            found |= instead[value]
        elif value != REMOVED[key]:
            raise ConfigError(f"{key} is {brief(value)}; that setting is gone, and {REMOVED[key]} is built in.")
    return found


def check_live(changes: Mapping[str, Any]) -> None:
    """Refuse to change a setting between two steps that takes effect only before the first.

    Raises:
        ConfigError: names the setting.
    """
    for key in changes:
        if key.startswith(FIXED):
            raise ConfigError(f"{key} cannot change within a run: what it decides is loaded or drawn before the first "
                              "step. Start another run with it.")


def load(path: str | Path) -> Config:
    """Read a TOML config; what it does not name keeps its default.

    Raises:
        ConfigError: unreadable file, unknown key or forbidden value.
    """
    return replace(Config(), read(path))


def read(path: str | Path) -> dict[str, Any]:
    """What a TOML config names, by dotted key, in today's settings.

    Raises:
        ConfigError: unreadable file, or a value that is no longer there.
    """
    return flatten(toml(path, "config"))


def toml(path: str | Path, kind: str) -> dict[str, Any]:
    """What a TOML file holds; a ConfigError that calls the file a `kind` where it cannot be read."""
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = "it nests too deep" if isinstance(error, RecursionError) else error
        raise ConfigError(f"The {kind} {path} cannot be read: {reason}") from error


def assignments(changes: Mapping[str, Any]) -> list[str]:
    """Dotted keys and values as `--set` takes them."""
    return [f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in changes.items()]


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dictionaries as dotted keys, in today's settings; see `current`."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        inside = isinstance(value, Mapping)
        flat |= {f"{key}.{name}": entry for name, entry in value.items()} if inside else {key: value}
    return current(flat)


def save(config: Config, path: str | Path) -> None:
    """Write the whole config as TOML."""
    Path(path).write_text(tomli_w.dumps(dataclasses.asdict(config)), encoding="utf8")


def _nearest(key: str, table: Mapping[str, Any]) -> str:
    import difflib

    if key in REMOVED:
        now = " or ".join({name: None for new in INSTEAD.get(key, {}).values() for name in new})
        said = f"{now} takes its place" if now else f"{REMOVED[key]} is built in"
        return f"It was one of an earlier version, and {said}."
    tail = key.rpartition(".")[2]
    close = difflib.get_close_matches(key, table, n=3, cutoff=0.5) or [name for name in table if tail in name][:3]
    return ("Did you mean " + " or ".join(close) + "?") if close else "The keys are: " + ", ".join(table) + "."
