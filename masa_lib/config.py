"""Every setting of a run, in frozen dataclasses: one documented field a line, units in the doc.

A field carries its own doc and limits, so that validation, the command line's `--set` and the documentation read the
same table. Nothing here loads a model or a file other than the config's own.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import tomllib
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomli_w

from masa_lib.errors import MasaError, brief


class ConfigError(MasaError, ValueError):
    """A setting is unknown or out of range; the message names the value, what is allowed and where to set it."""


def option(default: Any, doc: str, *, low: float | None = None, high: float | None = None,
           above: float | None = None, choices: tuple[str, ...] = ()) -> Any:
    """One field: its default, what it means, and the values allowed (`low` <= value <= `high`, value > `above`)."""
    return dataclasses.field(default=default, metadata={
        "doc": doc, "low": low, "high": high, "above": above, "choices": choices})


METHODS = ("grpo", "masa", "masa-efficient", "dapo", "mopps", "greso", "level-table", "oracle", "masa-read", "history",
           "probe", "anchor", "random")
#: the methods that predict: by a meta stream, or by a belief that is read
PREDICTING = ("masa", "masa-efficient", "masa-read")
#: the methods that choose by a belief about the pass rate, and their control; `belief.` has their settings
CHOOSING = ("masa-read", "history", "probe", "anchor", "random")
#: the methods that roll out every problem, and those that choose by what `gate.` and `rivals.` set
UNGATED, RIVALS = ("grpo", "masa"), ("dapo", "mopps", "greso", "level-table", "oracle")
#: what a run keeps from its first step to its last: it was loaded or drawn before the first
FIXED = ("seed", "model.", "problems.", "sampling.engine", "sampling.batch", "sampling.gpu_memory",
         "sampling.end_tokens", "evaluation.problems",
         "evaluation.final_problems")

#: settings that may name a folder or a file of this computer
PATHS = ("model.name", "model.weights", "problems.source", "problems.evaluation_source")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Which model is trained, and in which precision."""

    name: str = option("pocket", "a tier's name, a Hugging Face id or a folder")
    weights: str = option("", "a folder with other weights of this model to begin with, such as `masa warmup` makes")
    precision: str = option("float32", "of the computation and of frozen weights; trained weights stay float32",
                            choices=("float32", "bfloat16"))
    device: str = option("auto", "auto takes CUDA where there is one", choices=("auto", "cpu", "cuda"))
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass: less memory, slower")
    lora_rank: int = option(0, "train low-rank adapters of this rank on all linear layers, with about ten times the "
                            "learning rate; 0: train all weights", low=0)
    lora_alpha: float = option(32.0, "the adapters' product counts lora_alpha / lora_rank", above=0.0)
    deterministic: bool = option(False, "only those algorithms of torch that give the same bits again, slower; the "
                                 "CPU's do so anyway, and on CUDA a resumed run differs without them")
    threads: int = option(0, "CPU threads of torch; 0 leaves torch's own choice", low=0)


@dataclasses.dataclass(frozen=True)
class ProblemsConfig:
    """Which problems are trained on and which are held out."""

    source: str = option("pocket", "pocket, reasoning-gym:<task,task>, a data set's short name, or a local file")
    evaluation_source: str = option("", "held-out problems; empty: the evaluation split of `source`")
    pool: int = option(960, "problems in the training pool, which come back; 0: a fresh stream without end", low=0)
    seed: int = option(0, "of the pool and the held-out problems (the run's seed orders them)", low=0)
    levels: str = option("", "first and last level, as 2-9; empty: all, of pocket those of its reach "
                         "(1-12; 13 to 18 are beyond it)")


@dataclasses.dataclass(frozen=True)
class PromptConfig:
    """The wording of the two prompts."""

    wording: str = option("compact", "paper: the published prompts; compact: problem first, a few words",
                          choices=("paper", "compact"))
    min_length: int = option(1, "smallest solution length that the meta prompt names, tokens", low=1)
    max_length: int = option(0, "largest solution length that it names, tokens; 0: sampling.solution_tokens", low=0)


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How rollouts are sampled."""

    engine: str = option("transformers", "who samples", choices=("transformers", "paged", "vllm"))
    gpu_memory: float = option(0.4, "share of the GPU's memory for vLLM, of the free memory for paged keys and values",
                               above=0.0, high=0.95)
    problems: int = option(16, "problems a step", low=1)
    solutions: int = option(8, "G: solution rollouts of a problem", low=2)
    predictions: int = option(8, "M: meta rollouts of a problem (masa)", low=2)
    shared_beginning: bool = option(False, "the M predictions of a problem share the first one's text up to its pass "
                                    "rate, and what follows is sampled M times: cheaper, but notions are not taught")
    temperature: float = option(1.0, "of both streams", above=0.0, high=10.0)
    solution_tokens: int = option(128, "longest solution, tokens, end token included", low=1)
    meta_tokens: int = option(48, "longest meta answer, tokens, end token included", low=1)
    batch: int = option(512, "sequences decoded together, at most", low=1)
    end_tokens: str = option("", "tokens or their ids, with spaces between, that end an answer beside those of model, "
                             "tokenizer and chat template")
    cut: str = option("read", "a text cut at its cap: read as far as it goes, or wrong", choices=("read", "wrong"))


@dataclasses.dataclass(frozen=True)
class PredictionConfig:
    """How a model predicts its pass rate, and how a belief that is read is learned."""

    mode: str = option("sampled", "masa: sampled, M predictions are written and rewarded; read, the probabilities of "
                       "the nine pass rates are read and learned by what happened (masa-read always reads)",
                       choices=("sampled", "read"))
    score: str = option("log", "what a belief is paid: log, the log of the chance that it gave to what happened; "
                        "brier, the expected quadratic score, which kills doubt", choices=("log", "brier"))
    weight: float = option(1.0, "of the belief's gradient, which is first shortened to the running mean of the "
                           "norm of the solutions'; 0: the belief is not learned", low=0.0)
    think: bool = option(False, "the model writes a prediction up to its pass rate before the belief is read")


@dataclasses.dataclass(frozen=True)
class BeliefConfig:
    """Which problems masa-read rolls out, and history, probe, anchor and random, which differ in the belief alone."""

    places: float = option(0.5, "problems rolled out, as a share of sampling.problems: twice as many of them have a "
                           "signal, so half of them do", above=0.0, high=1.0)
    candidates: float = option(3.0, "problems of which the belief is read, as a multiple of those rolled out: of three "
                               "times as many, six in ten groups had a signal, of twice as many five, for a "
                               "twentieth more tokens", low=1.0)
    recheck: float = option(0.02, "share of the candidates left out that is rolled out all the same, by lot: what is "
                            "left out is long, and one group in five steps tells over a run what the gate misses",
                            low=0.0, high=1.0)
    decay: float = option(0.5, "share of a problem's counted solutions that survives a visit: the policy moves on",
                          low=0.0, high=1.0)
    history: float = option(0.25, "what a solution of an earlier visit counts for beside the belief, which was learned "
                            "from it, too; 0: no history", low=0.0, high=1.0)


@dataclasses.dataclass(frozen=True)
class RewardConfig:
    """The rewards of a group; `mode = released` pays predictions as the authors' code and ignores the other choices.

    Of that code's solution reward it takes one thing, the slack of 100 between plain numbers. What it does not
    reproduce: answers without a box (`So the answer is 42.`, or the last number in the text), the stripping of units
    and words, and a comparison that gives up after a second by the wall clock, so that grades depend on the machine.
    """

    mode: str = option("ours", "ours or released: parser and meta rewards; solutions are graded by us",
                       choices=("ours", "released"))
    pass_rate_weight: float = option(1.0, "weight of the difficulty reward in the meta reward", low=0.0)
    length_weight: float = option(1.0, "weight of the length reward in the meta reward", low=0.0)
    notion_weight: float = option(1.0, "weight of the notion reward in the meta reward", low=0.0)
    difficulty_mode: str = option("kernel", "kernel: b^|error|; brier: 1 - error^2", choices=("kernel", "brier"))
    difficulty_base: float = option(0.01, "b of the kernel", above=0.0, high=1.0)
    strict_length: bool = option(False, "the window's ends do not count, as released")
    length_slack: float = option(0.0, "share by which the length window is widened on both sides", low=0.0, high=1.0)
    notion_mode: str = option("count", "count: more correct than wrong rollouts; rate: larger share of them",
                              choices=("count", "rate"))
    exclude_problem_notions: bool = option(True, "notions that stand in the problem do not count")


@dataclasses.dataclass(frozen=True)
class UpdateConfig:
    """The GRPO update."""

    learning_rate: float = option(1e-4, "of AdamW, after warm-up", above=0.0, high=1.0)
    warmup_steps: int = option(10, "steps over which the learning rate rises linearly from 0", low=0)
    schedule: str = option("constant", "after warm-up; linear and cosine reach 0 after the last step",
                           choices=("constant", "linear", "cosine"))
    weight_decay: float = option(0.0, "of AdamW", low=0.0)
    beta1: float = option(0.9, "of AdamW", low=0.0, high=0.9999)
    beta2: float = option(0.999, "of AdamW", low=0.0, high=0.99999)
    gradient_clip: float = option(1.0, "largest gradient norm", above=0.0)
    clip_low: float = option(0.2, "the ratio is clipped below 1 - clip_low", low=0.0, high=1.0)
    clip_high: float = option(0.28, "the ratio is clipped above 1 + clip_high", low=0.0)
    dual_clip: float = option(0.0, "bound c > 1 on the loss of a negative advantage; 0: none (released: 10)", low=0.0)
    updates_per_step: int = option(1, "optimiser updates a step, for every method", low=1)
    released_updates: bool = option(False, "as released: masa takes twice the updates of grpo (the confound)")
    denominator: str = option("stream", "tokens a loss is divided by: each stream's own, or the whole batch's",
                              choices=("stream", "batch"))
    loss_mean: str = option("token", "token: mean over tokens; sequence: mean of each sequence's mean",
                            choices=("token", "sequence"))
    meta_weight: float = option(1.0, "factor on the meta stream's loss", low=0.0)
    meta_entropy: float = option(0.0, "bonus on the entropy (nats) of the meta tokens of groups with a signal: "
                                 "against predictions that collapse to a constant", low=0.0)
    entropy_floor: float = option(0.5, "the bonus acts in steps whose meta tokens have less entropy, nats a token",
                                  low=0.0)
    normalise_std: bool = option(True, "divide advantages by the group's standard deviation (sample, plus 1e-6)")
    normalise_meta: str = option("reward", "advantages of the meta stream: of the weighted reward over its std; of its "
                                 "parts, each over its own std, then weighted; of the weighted reward without a std; "
                                 "of the parts, but the pass rate's only for what tells problems apart",
                                 choices=("reward", "parts", "none", "contrast"))
    sampler_weight: str = option("auto", "a token weighs its probability under the learner over that under the "
                                 "sampler, at most sampler_cap; auto: where the two compute in other precisions (vLLM "
                                 "in bfloat16); never in a training on TRL", choices=("auto", "on", "off"))
    sampler_cap: float = option(3.0, "see update.sampler_weight", above=0.0)
    token_budget: int = option(8192, "tokens (with padding) of one micro-batch", low=1)
    logprob_chunk: int = option(2048, "completion tokens whose logits exist at once", low=1)


@dataclasses.dataclass(frozen=True)
class GateConfig:
    """Which problems masa-efficient leaves out once its predictions are good; rivals use what their docs name."""

    start: int = option(0, "k: gate, cap and hint act after this step; 0: once the gate's precision, measured on the "
                        "steps before, is at least gate.precision", low=0)
    precision: float = option(0.9, "see gate.start", low=0.0, high=1.0)
    rule: str = option("signal", "signal: dropped where the predicted chance of a mixed group is low; v1: where the "
                       "predictions agree; v2: where they agree on 0 or 1; posterior: the prediction is the prior of a "
                       "Beta distribution of the pass rate, and of gate.candidates times the places those nearest to "
                       "rivals.target are taken", choices=("signal", "v1", "v2", "posterior"))
    threshold: float = option(0.4, "of the rules signal and posterior: least chance of a group with right "
                              "and wrong solutions", low=0.0, high=1.0)
    std: float = option(0.1, "of the rules v1 and v2: least standard deviation of the M predicted pass rates", low=0.0)
    prior: float = option(4.0, "rule posterior: how many solutions a prediction counts for", above=0.0)
    predictions: int = option(0, "M once the gate acts; 0: sampling.predictions", low=0)
    places: float = option(1.0, "problems rolled out in a step in which a gate acts, as a share of sampling.problems: "
                           "more of them have a signal, so fewer do", above=0.0, high=1.0)
    candidates: float = option(3.0, "most problems drawn a step, as a multiple of sampling.problems", low=1.0)
    recheck: float = option(0.1, "share of the dropped problems that is rolled out all the same, by chance "
                            "(masa-efficient, level-table)", low=0.0, high=1.0)
    window: int = option(20, "steps over which precision, recall, lost signal and cut solutions are measured", low=1)
    guard: bool = option(True, "the gate acts only while the share of signal that it loses is at most gate.lost")
    lost: float = option(0.2, "see gate.guard", low=0.0, high=1.0)


@dataclasses.dataclass(frozen=True)
class CapConfig:
    """Where masa-efficient stops a solution, and what the predicted notions are used for."""

    multiplier: float = option(2.0, "a solution is stopped at this multiple of the predicted length; 0: never", low=0.0)
    aggregate: str = option("max", "how the M predicted lengths become one", choices=("max", "mean", "median"))
    stopped: str = option("wrong", "a stopped solution is wrong, or left out of its group",
                          choices=("wrong", "left out"))
    uncapped: float = option(0.1, "share of the solutions that is not capped, by chance; none is of re-checks",
                             low=0.0, high=1.0)
    guard: bool = option(True, "the cap acts only while the share of right solutions that it cuts is at most cap.cut")
    cut: float = option(0.05, "see cap.guard; measured on the uncapped solutions", low=0.0, high=1.0)
    hint: str = option("none", "write the predicted notions behind the problem: in training, in evaluations, in both",
                       choices=("none", "training", "evaluation", "both"))


@dataclasses.dataclass(frozen=True)
class CloningConfig:
    """Behaviour cloning of expert predictions (the paper's first version); published: store 128, 5 updates."""

    store: int = option(0, "expert predictions collected before they are cloned; 0: no cloning", low=0)
    threshold: float = option(0.2, "least notion reward of an expert prediction", low=0.0, high=1.0)
    updates: int = option(5, "gradient updates on a full store", low=1)
    learning_rate: float = option(1e-5, "of these updates", above=0.0, high=1.0)


@dataclasses.dataclass(frozen=True)
class RivalsConfig:
    """Settings of the other gates; `gate.candidates` is theirs, too."""

    target: float = option(0.5, "mopps, and the rule posterior: pass rate sought", low=0.0, high=1.0)
    decay: float = option(0.5, "mopps, and the rule posterior: share of a problem's counts that survives a "
                          "visit", low=0.0, high=1.0)
    explore: float = option(0.5, "greso: chance at first to roll out a problem whose last group had no signal; it is "
                            "raised to the number of such visits in a row", low=0.0, high=1.0)
    skipped: float = option(0.25, "greso: share of groups without signal at which `explore` is held", low=0.0, high=1.0)
    refill: bool = option(True, "greso: groups without a signal do not fill the batch, as published (and as in dapo)")
    threshold: float = option(0.4, "level-table, oracle: least chance of a group with a signal", low=0.0, high=1.0)
    samples: int = option(16, "oracle: solutions by which it knows a problem's pass rate; no training cost", low=2)
    refresh: int = option(20, "oracle: steps between two measurements of the whole pool", low=1)


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Held-out evaluation; its tokens are not counted as training cost."""

    every: int = option(10, "steps between evaluations of the learning curve; 0: none", low=0)
    problems: int = option(240, "held-out problems of the learning curve", low=1)
    samples: int = option(4, "solutions a problem of the learning curve", low=1)
    final_problems: int = option(320, "held-out problems of the first and last evaluation", low=1)
    final_samples: int = option(32, "solutions a problem of the first and last evaluation", low=1)
    predictions: int = option(8, "meta rollouts a problem of the first and last evaluation; 0: none", low=0)
    temperature: float = option(1.0, "of the evaluation's sampling", above=0.0, high=10.0)


@dataclasses.dataclass(frozen=True)
class RecordConfig:
    """What a run writes."""

    checkpoint_every: int = option(25, "steps between checkpoints", low=1)
    checkpoints_kept: int = option(2, "newest checkpoints kept", low=1)
    keep_best: bool = option(True, "also keep a checkpoint of the step with the highest held-out accuracy")
    tensorboard: str = option("auto", "metrics as TensorBoard events in the run's folder tensorboard, too; auto: where "
                              "the package is installed", choices=("auto", "on", "off"))
    final_model: str = option("bfloat16", "precision of the trained model written to the run's folder model; adapters "
                              "are merged in float32, as bfloat16 rounds them away",
                              choices=("bfloat16", "float32", "none"))
    rollouts_every: int = option(10, "steps between recorded steps of whole groups; 0: none", low=0)


@dataclasses.dataclass(frozen=True)
class Config:
    """One run."""

    method: str = option("masa-read", "how to train", choices=METHODS)
    steps: int = option(150, "training steps", low=1)
    seed: int = option(0, "of everything random in the run", low=0, high=2**32 - 1)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    problems: ProblemsConfig = dataclasses.field(default_factory=ProblemsConfig)
    prompt: PromptConfig = dataclasses.field(default_factory=PromptConfig)
    sampling: SamplingConfig = dataclasses.field(default_factory=SamplingConfig)
    prediction: PredictionConfig = dataclasses.field(default_factory=PredictionConfig)
    belief: BeliefConfig = dataclasses.field(default_factory=BeliefConfig)
    reward: RewardConfig = dataclasses.field(default_factory=RewardConfig)
    update: UpdateConfig = dataclasses.field(default_factory=UpdateConfig)
    gate: GateConfig = dataclasses.field(default_factory=GateConfig)
    cap: CapConfig = dataclasses.field(default_factory=CapConfig)
    cloning: CloningConfig = dataclasses.field(default_factory=CloningConfig)
    rivals: RivalsConfig = dataclasses.field(default_factory=RivalsConfig)
    evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)
    record: RecordConfig = dataclasses.field(default_factory=RecordConfig)

    def __post_init__(self) -> None:
        validate(self)


def settings(section: Any = Config, prefix: str = "") -> dict[str, dataclasses.Field]:
    """Every setting by its dotted key, in the order of definition: `{"reward.difficulty_base": Field, ...}`."""
    hints = _hints(section if isinstance(section, type) else type(section))
    table: dict[str, dataclasses.Field] = {}
    for field in dataclasses.fields(section):
        if dataclasses.is_dataclass(hints[field.name]):
            table |= settings(hints[field.name], f"{prefix}{field.name}.")
        else:
            table[prefix + field.name] = field
    return table


@functools.cache  # slow, and a panel replaces settings at every move
def _hints(section: type) -> dict[str, Any]:
    return typing.get_type_hints(section)


def reads(config: Config) -> bool:
    """Whether the predictions are beliefs that are read."""
    return config.method == "masa-read" or (config.method == "masa" and config.prediction.mode == "read")


def samples_predictions(config: Config) -> bool:
    """Whether M predictions of each problem are sampled: the methods with a meta stream."""
    return config.method in PREDICTING and not reads(config)


def acts(config: Config, key: str) -> bool:
    """Whether a setting of rewards, gates, caps, beliefs or the meta stream does anything under the config's method."""
    section = key.partition(".")[0]
    if key == "reward.mode":  # solutions are graded by it, too
        return True
    if section == "reward" or key in ("update.meta_weight", "update.meta_entropy", "update.normalise_meta"):
        return samples_predictions(config)
    if section == "prediction":
        return reads(config)
    if section == "belief":
        return config.method in CHOOSING and (config.method != "random" or key == "belief.places")
    if key == "gate.window":
        return config.method not in UNGATED
    if section == "gate" and config.method in RIVALS:
        return key in ("gate.places", "gate.candidates") or (config.method, key) == ("level-table", "gate.recheck")
    return config.method == "masa-efficient" if section in ("gate", "cap") else True


def get(config: Config, key: str) -> Any:
    """The value of a dotted key."""
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def replace(config: Config, changes: Mapping[str, Any]) -> Config:
    """A copy with dotted keys changed; strings are read as the field's type.

    Raises:
        ConfigError: for an unknown key or a value that is not allowed.
    """
    table = settings()
    nested: dict[str, dict[str, Any]] = {}
    for key, value in changes.items():
        if key not in table:
            raise ConfigError(f"There is no setting {brief(key)}. {_nearest(key[:80], table)}")
        section, _, name = key.rpartition(".")
        nested.setdefault(section, {})[name] = _read(key, table[key], value)
    top = nested.pop("", {})
    for section, values in nested.items():
        top[section] = dataclasses.replace(getattr(config, section), **values)
    return dataclasses.replace(config, **top)


def check_live(changes: Mapping[str, Any]) -> None:
    """Refuse to change a setting between two steps that takes effect only before the first.

    Raises:
        ConfigError: names the setting.
    """
    for key in changes:
        if key.startswith(FIXED):
            raise ConfigError(f"{key} cannot change within a run: what it decides is loaded or drawn before the first "
                              "step. Start another run with it.")


def validate(config: Config) -> None:
    """Check every field against its limits, and the fields against each other.

    Raises:
        ConfigError: one sentence with the key, the value and what is allowed.
    """
    for key, field in settings().items():
        _check(key, field, get(config, key))
    reward = config.reward
    if config.method in PREDICTING and reward.pass_rate_weight + reward.length_weight + reward.notion_weight <= 0:
        raise ConfigError("All three meta reward weights are 0; set at least one of reward.pass_rate_weight, "
                          "reward.length_weight and reward.notion_weight above 0.")
    if config.update.dual_clip and config.update.dual_clip <= 1:
        raise ConfigError(f"update.dual_clip is {config.update.dual_clip}; it must be 0 (none) or above 1.")
    if 0 < config.prompt.max_length < config.prompt.min_length:
        raise ConfigError(f"prompt.max_length is {config.prompt.max_length}, below prompt.min_length "
                          f"({config.prompt.min_length}).")


def load(path: str | Path) -> Config:
    """Read a TOML config; what it does not name keeps its default.

    Raises:
        ConfigError: unreadable file, unknown key or forbidden value.
    """
    return replace(Config(), read(path))


def read(path: str | Path) -> dict[str, Any]:
    """What a TOML config names, by dotted key.

    Raises:
        ConfigError: unreadable file.
    """
    try:
        tree = tomllib.loads(Path(path).read_text(encoding="utf8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"The config {path} cannot be read: {error}") from error
    except RecursionError as error:
        raise ConfigError(f"The config {path} cannot be read: it nests too deep") from error
    return flatten(tree)


def from_dict(tree: Mapping[str, Any]) -> Config:
    """A config from nested dictionaries, as `to_dict` gives them."""
    return replace(Config(), flatten(tree))


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dictionaries as dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= {f"{key}.{name}": entry for name, entry in value.items()}
        else:
            flat[key] = value
    return flat


def to_dict(config: Config) -> dict[str, Any]:
    """Nested dictionaries of plain values."""
    return dataclasses.asdict(config)


def save(config: Config, path: str | Path) -> None:
    """Write the whole config as TOML."""
    Path(path).write_text(tomli_w.dumps(to_dict(config)), encoding="utf8")


def shared(config: Config) -> Config:
    """The config as others may see it: its paths by their last part, its addresses without credentials."""
    return replace(config, {key: shared_name(get(config, key)) for key in PATHS})


def shared_name(text: str) -> str:
    """A path as its last part, an address without user, password and query; a hub id, and all else, as it is."""
    if "://" in text:
        scheme, _, rest = text.partition("://")
        if scheme.lower() != "file":
            host, slash, place = re.split(r"[?#]", rest)[0].partition("/")
            return f"{scheme}://{host.rpartition('@')[2]}{slash}{place}"
    path = re.match(r"~|\.{0,2}[/\\]|[A-Za-z]:[/\\]|file:", text) or text.count("/") > 1 or _exists(text) or (
        "/" in text and re.search(r"[^!-~]|\.(?:jsonl?|csv|parquet|toml)$", text))  # which no hub id has
    if not path:
        return ",".join(map(shared_name, text.split(","))) if "," in text else text
    return re.sub(r"^.*[/\\](?=[^/\\])", "", text, flags=re.DOTALL)


def _exists(text: str) -> bool:
    try:
        return "/" in text and Path(text).exists()
    except (OSError, ValueError):
        return False


def _read(key: str, field: dataclasses.Field, value: Any) -> Any:
    kind = type(field.default)
    if isinstance(value, bool) or not isinstance(value, str):
        if kind is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**1000:
            return float(value)
        return value
    if kind is str:
        return value
    try:
        if kind is bool:
            return {"true": True, "1": True, "false": False, "0": False}[value.lower()]
        return kind(value)
    except (ValueError, KeyError):
        raise ConfigError(f"{key} is {brief(value)}; it takes {_allowed(field)}.") from None


def _check(key: str, field: dataclasses.Field, value: Any) -> None:
    kind, limits = type(field.default), field.metadata
    good = type(value) is kind or (kind is float and type(value) is int)
    if good and kind in (int, float):
        good = (abs(value) < (math.inf if kind is int else 2**1000)
                and (limits["low"] is None or value >= limits["low"])
                and (limits["high"] is None or value <= limits["high"])
                and (limits["above"] is None or value > limits["above"]))
    if good and limits["choices"]:
        good = value in limits["choices"]
    if not good:
        raise ConfigError(f"{key} is {brief(value)}; it takes {_allowed(field)} ({limits['doc']}). "
                          f"Set it with --set {key}=... or in the config file.")


def _allowed(field: dataclasses.Field) -> str:
    kind, limits = type(field.default), field.metadata
    if limits["choices"]:
        return "one of " + ", ".join(limits["choices"])
    words = {"low": "at least", "above": "above", "high": "at most"}
    bounds = [f"{word} {limits[name]:g}" for name, word in words.items() if limits[name] is not None]
    name = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}[kind]
    return " ".join([name, " and ".join(bounds)]).strip()


def _nearest(key: str, table: Mapping[str, Any]) -> str:
    import difflib

    tail = key.rpartition(".")[2]
    close = difflib.get_close_matches(key, table, n=3, cutoff=0.5) or [name for name in table if tail in name][:3]
    return ("Did you mean " + " or ".join(close) + "?") if close else "The keys are: " + ", ".join(table) + "."
