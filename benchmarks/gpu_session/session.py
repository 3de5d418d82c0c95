"""One short session on a GPU: is the method right there, and how fast is it? `run.sh` says how to start it.

Each stage is a process of its own with a limit in seconds, so that a crash or a poisoned CUDA context ends one stage
and not the session; what is measured is written to `session.jsonl` at once. Weights of real sizes are random: nothing
is downloaded. With `--dry` the same code runs on the CPU in small, which a test does.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from masa_lib import config as configs
from masa_lib.config import Config, ModelConfig
from masa_lib.engines import Completion, Request
from masa_lib.engines.logprobs import Sample, completion_logps
from masa_lib.engines.registry import make_engine
from masa_lib.method import objective
from masa_lib.method.prompts import encode, solution_messages
from masa_lib.models import loading, memory, tensors, tiers
from masa_lib.tasks.problems import ProblemPool
from masa_lib.training.trainer import Trainer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from memory import make_requests, make_samples

#: dense bfloat16 FLOPs a second of an H100 or H200 (SXM), data sheet
PEAK = 989e12
#: seconds that each stage may take
LIMITS = {"ceilings": 30, "parity": 75, "gradients": 45, "training": 130, "resume": 90, "qwen3-0.6b": 60,
          "qwen3-1.7b": 75, "qwen3-8b": 60}
#: method, engine and precision of the short trainings
TRAININGS = (("grpo", "transformers", "float32"), ("masa", "transformers", "bfloat16"),
             ("masa-efficient", "paged", "bfloat16"), ("masa-read", "transformers", "bfloat16"))
#: of an update: layers recomputed, sequences, tokens of a prompt and of a completion
UPDATES = ((True, 1, 256, 8192), (True, 8, 256, 1792), (False, 8, 256, 768))


@dataclass(frozen=True)
class Session:
    """Where the stages measure and write: `out` a folder; `dry` on the CPU, in small."""

    out: Path
    dry: bool

    @property
    def device(self) -> torch.device:
        """The one that is measured."""
        return torch.device("cpu" if self.dry else "cuda")

    def tell(self, what: str, **facts: Any) -> None:
        """Write what was found, and print it."""
        with (self.out / "session.jsonl").open("a", encoding="utf8") as file:
            file.write(json.dumps({"what": what, **facts}, default=str) + "\n")
        print(what, *(f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}"
                      for key, value in facts.items()), flush=True)

    @contextlib.contextmanager
    def clock(self, found: dict[str, Any], name: str) -> Iterator[None]:
        """Put seconds, and on a GPU peak GB, of what runs inside into `found`."""
        if not self.dry:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        yield
        if not self.dry:
            torch.cuda.synchronize()
            found[f"{name}_gb"] = torch.cuda.max_memory_allocated() / memory.GB
        found[f"{name}_s"] = time.perf_counter() - start

    def attempt(self, what: str, job: Callable[[], None]) -> None:
        """Do a job; its error is a finding, as the next measurement is worth more than a clean end."""
        try:
            job()
        except Exception as error:
            said = (str(error).strip().splitlines() or [""])[0][:300]
            self.tell(what, error=f"{type(error).__name__}: {said}")
            if not self.dry:
                torch.cuda.empty_cache()


def ceilings(session: Session) -> None:
    """The best rates of this card: a matrix product in bfloat16, a copy."""
    size, found = 512 if session.dry else 8192, {}
    square = torch.randn(size, size, device=session.device, dtype=torch.bfloat16)
    for _ in range(3):
        square @ square
    with session.clock(found, "product"):
        for _ in range(10):
            square @ square
    source = torch.zeros(2**22 if session.dry else 2**30, device=session.device)
    target = source.clone()
    with session.clock(found, "copy"):
        for _ in range(10):
            target.copy_(source)
    name = "cpu" if session.dry else torch.cuda.get_device_name()
    session.tell("ceilings", torch=torch.__version__, device=name, bf16_tflops=20 * size**3 / found["product_s"] / 1e12,
                 copy_tb_s=20 * source.nbytes / found["copy_s"] / 1e12)


def pocket(precision: str, device: torch.device) -> tuple[ModelConfig, Any, Any]:
    """The pocket model with noise on its weights, the same on every device: no two logits are equal by its training."""
    config = ModelConfig(name="pocket", device=device.type, precision=precision)
    model, tokenizer = loading.load(config)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_((0.02 * torch.randn(parameter.shape)).to(parameter.device))
    return config, model, tokenizer


def gap(config: ModelConfig, model: Any, asked: list[Request], answers: list[Completion]) -> dict[str, float]:
    """How far the engine's log-probs are from those of the learner's forward pass, nats."""
    samples = [Sample(request.prompt, answer.tokens, answer.logps, 1.0, 1.0)
               for request, answer in zip(asked, answers, strict=True)]
    with torch.no_grad(), loading.precision(config, model.device):
        learner = torch.cat([completion_logps(model, [sample], 1.0, 16)[0].cpu() for sample in samples])
    apart = (learner - torch.tensor([logp for answer in answers for logp in answer.logps])).abs()
    return {"mean_gap": float(apart.mean()), "max_gap": float(apart.max())}


@contextlib.contextmanager
def after_one_step(model: Any, request: Request) -> Iterator[None]:
    """The model one plain gradient step further; its weights are put back afterwards."""
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    ids = torch.tensor([request.prompt], device=model.device)
    model(input_ids=ids, labels=ids).loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.sub_(0.3 * parameter.grad / parameter.grad.norm().clamp(min=1))
            parameter.grad = None
    yield
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(before[name])


def parity(session: Session) -> None:
    """Engines against the learner's forward pass and against the CPU, before and after an update."""
    problems = ProblemPool(tiers.config({"model.name": "pocket"}).problems, 0).take(0, 12)
    _, twin, tokenizer = pocket("float32", torch.device("cpu"))
    asked = [Request(tuple(encode(tokenizer, solution_messages(problem.text, Config().prompt))), 40 + place,
                     12 * turn + place) for place, problem in enumerate(problems)
             for turn in range(1 if session.dry else 4)]
    truth = make_engine("transformers", twin, tokenizer, batch=64).generate(asked)
    engines = ["transformers", "paged", *(["vllm"] if importlib.util.find_spec("vllm") and not session.dry else [])]
    for precision in ("float32", "bfloat16"):
        config, model, _ = pocket(precision, session.device)
        for name in engines:
            engine = partial(make_engine, name, model, tokenizer, batch=64, precision=precision)
            session.attempt(f"parity {name} {precision}", partial(
                _parity, session, f"parity {name} {precision}", engine, config, model, asked, truth))


def _parity(session: Session, what: str, make: Callable[[], Any], config: ModelConfig, model: Any,
            asked: list[Request], truth: list[Completion]) -> None:
    engine = make()
    with loading.precision(config, model.device):
        first, again = engine.generate(asked), engine.generate(asked)
        alone = [engine.generate([request])[0].tokens for request in asked[:4]]
    facts = gap(config, model, asked, first)
    with after_one_step(model, asked[0]):
        engine.sync()
        stale = gap(config, model, asked, first)["mean_gap"]
        with loading.precision(config, model.device):
            fresh = engine.generate(asked)
        after = gap(config, model, asked, fresh)["mean_gap"]
    engine.sync()
    session.tell(what, **facts, after_update=after, stale_would_be=stale, repeats=first == again,
                 alone_same=sum(a == b.tokens for a, b in zip(alone, first, strict=False)),
                 same_as_cpu=sum(a.tokens == b.tokens for a, b in zip(first, truth, strict=True)), of=len(asked))


def gradients(session: Session) -> None:
    """Gradients on the device against float64 on the CPU; the shared-prompt path against whole sequences."""
    samples = [Sample(sample.prompt, sample.completion[:20 + place], sample.sampler_logps[:20 + place],
                      (-1.0) ** place, sample.weight) for place, sample in enumerate(make_samples(3, 6, 24, 40, 192))]
    exact = _gradient(samples, "float32", torch.device("cpu"), torch.float64)
    for precision in ("float32", "bfloat16"):
        for whole in (False, True):
            def job(precision: str = precision, whole: bool = whole) -> None:
                first, again = (_gradient(samples, precision, session.device, whole=whole) for _ in range(2))
                session.tell(f"gradients {precision} {'whole' if whole else 'shared'}",
                             repeats=torch.equal(first, again),
                             relative_error=float((first - exact).norm() / exact.norm()))

            session.attempt("gradients", job)


def _gradient(samples: list[Sample], precision: str, device: torch.device, dtype: torch.dtype = torch.float32,
              whole: bool = False) -> torch.Tensor:
    config, model, _ = pocket(precision, device)
    model = model.to(dtype)
    if whole:  # recomputed layers have no shared cache
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    with loading.precision(config, device):
        objective.accumulate_gradients(model, samples, Config().update, 1.0)
    return torch.cat([parameter.grad.flatten().double().cpu() for parameter in model.parameters()])


def training(session: Session) -> None:
    """A few steps of each method: the reward must rise, the sampler's log-probs stay the learner's."""
    for method, engine, precision in TRAININGS:
        changes = {"model.name": "pocket", "method": method, "sampling.engine": engine, "model.precision": precision,
                   "model.device": session.device.type, "gate.start": 2, **(
                       {"sampling.problems": 4, "model.threads": 1} if session.dry else {})}

        def job(changes: dict[str, Any] = changes) -> None:
            trainer = Trainer(tiers.config(changes))
            rows = [trainer.train_step()[1] for _ in range(2 if session.dry else 16)]
            late = rows[-5:]
            session.tell("training " + " ".join((changes["method"], changes["sampling.engine"],
                                                 changes["model.precision"])),
                         **{key: [round(float(row[key]), 4) for row in rows] for key in ("accuracy", "logp_gap")},
                         **{key: sum(row[key] for row in late) / len(late) for key in
                            ("seconds_read", "seconds_generate", "seconds_grade", "seconds_update")})

        session.attempt(f"training {method}", job)


def resume(session: Session) -> None:
    """Kill a run, resume it, compare it with one that nobody disturbed: the first step that differs, 0 for none."""
    steps = 4 if session.dry else 12
    sets = ["--model", "pocket", "--steps", str(steps), "--set", "evaluation.every=0", "evaluation.final_problems=8",
            "evaluation.final_samples=2", "record.checkpoint_every=2", f"model.device={session.device.type}",
            *(["sampling.problems=4", "model.threads=1"] if session.dry else [])]
    with tempfile.TemporaryDirectory() as place:
        runs = {name: Path(place) / name for name in ("whole", "killed")}
        for name, folder in runs.items():
            process = _masa("train", "--out", str(folder), *sets)
            while name == "killed" and process.poll() is None and len(_rows(folder)) <= steps // 2:
                time.sleep(0.05)
            if name == "killed":
                process.send_signal(signal.SIGKILL)
            process.communicate()
        again = _masa("resume", str(runs["killed"]))
        said = again.communicate()[1]
        rows = {name: _rows(folder) for name, folder in runs.items()}
    keys = ("accuracy", "loss", "gradient_norm", "tokens_solution", "logp_gap")
    differs = next((a["step"] for a, b in zip(rows["whole"], rows["killed"], strict=False)
                    if any(a[key] != b[key] for key in keys)), 0)
    session.tell("resume", code=again.returncode, said=said[-200:], steps=len(rows["killed"]),
                 first_step_that_differs=differs, **{name: [row["gradient_norm"] for row in found]
                                                     for name, found in rows.items()})


def _masa(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-m", "masa_lib.cli", *arguments], stdout=subprocess.DEVNULL,
                            stderr=subprocess.PIPE, text=True)


def _rows(run: Path) -> list[dict[str, Any]]:
    file = run / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text(encoding="utf8").splitlines()] if file.exists() else []


def real(name: str, lora: int, session: Session) -> None:
    """A tier's sizes with random weights: update against the memory plan, engines, optimiser, a final save."""
    model, found = random_model(name, lora, session), {}
    optimizer = torch.optim.AdamW(tensors.trainable(model), lr=1e-9, fused=not session.dry)
    for parameter in tensors.trainable(model):
        parameter.grad = torch.zeros_like(parameter)
    with session.clock(found, "adamw"):
        optimizer.step()
    session.tell(f"{name} optimiser", **found)
    for recompute, count, prompt, length in UPDATES:
        count, length = (2, 32) if session.dry else (count, length)
        what = f"{name} update {'recomputed' if recompute else 'kept'} {count}x{length}"
        session.attempt(what, partial(_update, what, session, model, name, lora, recompute, count, prompt, length))
    model.gradient_checkpointing_disable()
    model.eval()
    for engine in ("transformers", "paged"):
        session.attempt(f"{name} engine {engine}", partial(_decode, session, model, name, engine))
    held = {}
    with session.clock(held, "bf16_copy"):
        kept = {key: value.to(torch.bfloat16) for key, value in tensors.policy_weights(model)}
    session.tell(f"{name} save", **held, tensors=len(kept))


def random_model(name: str, lora: int, session: Session) -> Any:
    """A tier's architecture with random weights; in the dry run of one layer and few words."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    sizes = tiers.TIERS[name].architecture
    torch.set_default_dtype(torch.bfloat16 if lora else torch.float32)
    with session.device:
        model = Qwen3ForCausalLM(Qwen3Config(
            vocab_size=512 if session.dry else sizes.vocab, hidden_size=sizes.hidden,
            intermediate_size=sizes.intermediate, num_attention_heads=sizes.heads,
            num_hidden_layers=1 if session.dry else sizes.layers, num_key_value_heads=sizes.kv_heads,
            head_dim=sizes.head_dim, tie_word_embeddings=sizes.tied, max_position_embeddings=32768))
    torch.set_default_dtype(torch.float32)
    if lora:
        tensors.add_adapters(model, ModelConfig(lora_rank=lora), None)
    return model.eval()


def _update(what: str, session: Session, model: Any, name: str, lora: int, recompute: bool, count: int, prompt: int,
            length: int) -> None:
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        model.gradient_checkpointing_disable()
    model.train(recompute)
    config = configs.replace(tiers.config({"model.name": name}), {
        "model.gradient_checkpointing": recompute, "model.lora_rank": lora, "model.precision": "bfloat16",
        "update.token_budget": count * (prompt + length), "sampling.solution_tokens": length,
        "sampling.meta_tokens": length})
    samples, facts = make_samples(1, count, prompt, length, model.config.vocab_size), {}
    for turn in ("first", "second"):
        with session.clock(facts, turn), loading.precision(config.model, session.device):
            sums = objective.accumulate_gradients(model, samples, config.update, 1.0)
        torch.clear_autocast_cache()
    sizes, tokens = tiers.TIERS[name].architecture, sums["computed"]
    attended = count * (prompt + length) ** 2 / 2
    flops = 6 * sizes.matrices * tokens + 12 * sizes.layers * sizes.heads * sizes.head_dim * attended
    planned = memory.plan(config, 80, prompt)
    session.tell(what, **facts, tokens_s=tokens / facts["second_s"], mfu=flops / facts["second_s"] / PEAK,
                 plan_gb=(sum(planned.always.values()) + sum(planned.update.values())) / memory.GB)


def _decode(session: Session, model: Any, name: str, engine: str) -> None:
    rows, length = (4, 8) if session.dry else (128, 64)
    from masa_lib.engines.in_process import TransformersEngine
    from masa_lib.engines.paged import PagedEngine

    made = (TransformersEngine if engine == "transformers" else PagedEngine)(model, frozenset(), batch=rows)
    asked, facts = make_requests(rows, 128, length, model.config.vocab_size), {}
    for turn in ("first", "second"):
        with session.clock(facts, turn), loading.precision(ModelConfig(precision="bfloat16"), session.device):
            made.generate(asked)
        torch.clear_autocast_cache()
    session.tell(f"{name} engine {engine} {rows}x{length}", **facts, tokens_s=rows * length / facts["second_s"],
                 ms_a_token=1e3 * facts["second_s"] / length)


STAGES: dict[str, Callable[[Session], None]] = {
    "ceilings": ceilings, "parity": parity, "gradients": gradients, "training": training, "resume": resume,
    "qwen3-0.6b": partial(real, "qwen3-0.6b", 0), "qwen3-1.7b": partial(real, "qwen3-1.7b", 0),
    "qwen3-8b": partial(real, "qwen3-8b", 32)}


def run(stage: str, session: Session) -> None:
    """One stage in a process of its own, ended at its limit; what went wrong is a line of the record."""
    command = [sys.executable, __file__, "--out", str(session.out), "--stage", stage, *["--dry"] * session.dry]
    limit = 10 * LIMITS[stage] if session.dry else LIMITS[stage]
    with (session.out / f"{stage}.err").open("w", encoding="utf8") as errors:
        try:
            code = subprocess.run(command, stderr=errors, timeout=limit, check=False).returncode
        except subprocess.TimeoutExpired:
            code = f"ended after {limit} s"
    if code:
        said = (session.out / f"{stage}.err").read_text(encoding="utf8").strip().splitlines()
        session.tell(f"{stage} failed", code=code, said=(said or [""])[-1][:300])


def main() -> int:
    """Run all stages, or the named ones; 1 where the record holds an error."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of session.jsonl and of each stage's messages")
    parser.add_argument("--dry", action="store_true", help="on the CPU, in small")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    session = Session(options.out, options.dry)
    if options.stage:
        STAGES[options.stage](session)
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    for stage in options.stages:
        run(stage, session)
    shutil.rmtree(options.out / "site", ignore_errors=True)
    rows = [json.loads(line) for line in (options.out / "session.jsonl").read_text(encoding="utf8").splitlines()]
    return int(any("error" in row or row["what"].endswith("failed") for row in rows))


if __name__ == "__main__":
    os.environ.setdefault("TQDM_DISABLE", "1")
    sys.exit(main())
