"""Ours beside TRL's GRPOTrainer: samples/s, tokens/s, seconds by phase and peak memory, as ratios, in one run.

Both train GRPO on the same model, problems, group size, caps, precision, threads and number of updates; both sample
with transformers in the process that trains. Every side runs in a process of its own, the two in turn, so that both
meet the same load of the machine; the first step of each warms up and is left out. TRL is taken at the best of a
stated grid: micro-batches of 1, 1/2, 1/4 ... of a step, each with `generate` and with continuous batching. Memory is
compared at equal micro-batch tokens: ours gets the tokens of TRL's best micro-batch as its budget. What the machine
can do at best (matrix products a second, bytes a second) is measured in the same run, and each phase of ours is set
against the time that it would take at that (`masa_lib.models.step_cost`); a profile of ours says how much of it is
matrix products and attention, which no other code around them makes faster. `--vocabulary` gives the model more words,
which it says now and then: what a big vocabulary costs. Nothing else should run on the machine meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch

from masa_lib.analysis import text_tables
from masa_lib.config import Config
from masa_lib.models import loading, step_cost, tensors, tiers
from masa_lib.runs.provenance import environment
from masa_lib.training.clock import memory_mb
from masa_lib.training.trainer import Trainer

PHASES = ("generate", "grade", "update")
#: names of the profiler's events, on the CPU and on a GPU
KERNELS = {"matrix products": r"aten::(mm|addmm|bmm|baddbmm)$|gemm|cutlass",
           "attention": r"aten::_(scaled_dot_product|flash|efficient)|flash_|fmha"}
#: a size at which a side takes seconds
SMOKE = {"sampling.problems": 2, "sampling.solutions": 4, "sampling.solution_tokens": 32, "problems.pool": 24,
         "problems.levels": "1-4", "update.token_budget": 512, "model.threads": 1}


def config_of(options: argparse.Namespace) -> Config:
    """The config of both sides: GRPO at the tier's settings, then `--smoke`, then `--set`."""
    changes = {"model.name": options.model, "method": "grpo", "steps": options.updates + 1,
               "update.schedule": "constant", "evaluation.every": 0,
               "evaluation.problems": 4, "evaluation.final_problems": 4, **(SMOKE if options.smoke else {})}
    return tiers.config(changes | dict(entry.split("=", 1) for entry in options.set))


def resident_mb() -> float:
    """What this process holds now."""
    return torch.cuda.memory_allocated() / 2**20 if torch.cuda.is_available() else psutil.Process().memory_info(
        ).rss / 2**20


def ours(config: Config) -> dict[str, Any]:
    """Our trainer: the updates after the first, summed up."""
    trainer = Trainer(config)
    before, rows = resident_mb(), [trainer.train_step()[1] for _ in range(config.steps)]
    count = config.sampling.problems * config.sampling.solutions
    signal = statistics.mean(1 - row["zero_variance_solution"] for row in rows[1:])
    return summary([{"samples": count, "tokens": row["tokens_solution"], "prefill": row["tokens_prefill"],
                     "updated": row["tokens_update"],
                     **{phase: row[f"seconds_{phase}"] for phase in PHASES}} for row in rows[1:]],
                   before) | {"signal": signal}


def profile(config: Config) -> dict[str, float]:
    """Shares of our updates' time on the device that are matrix products and attention, the first update left out."""
    trainer = Trainer(config)
    trainer.train_step()
    on_gpu = torch.cuda.is_available() and config.model.device != "cpu"
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CUDA if on_gpu else activity.CPU]) as profiler:
        for _ in range(config.steps - 1):
            trainer.train_step()
    key = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    spent = {event.key: getattr(event, key) for event in profiler.key_averages()}
    return {kind: sum(value for name, value in spent.items() if re.search(pattern, name)) / sum(spent.values())
            for kind, pattern in KERNELS.items()}


def theirs(config: Config, pieces: int, continuous: bool) -> dict[str, Any]:
    """TRL's trainer on its own sampling, with our data set and reward function, which cost it milliseconds."""
    from transformers.trainer_callback import PrinterCallback
    from trl import GRPOTrainer

    from masa_lib.method import prompts
    from masa_lib.scaleout import grpo

    loading.prepare(config)
    policy, tokenizer = loading.load(config.model)
    count = config.sampling.problems * config.sampling.solutions
    args = grpo.arguments(config, Path(tempfile.gettempdir()), pieces, logging_steps=1, disable_tqdm=True,
                          use_transformers_continuous_batching=continuous)
    groups = grpo.MasaGroups(config, tokenizer, loading.end_tokens(policy, tokenizer))
    rows: list[dict[str, Any]] = []

    class Timed(GRPOTrainer):
        def _generate_and_score_completions(self, inputs: Any) -> Any:
            self.start = time.perf_counter()
            batch = super()._generate_and_score_completions(inputs)
            rows.append({"samples": count, "tokens": int(groups.table["length"].sum()), "generate": self.middle
                         - self.start, "grade": time.perf_counter() - self.middle, "begun": time.perf_counter(),
                         "updated": int(batch["prompt_mask"].sum() + batch["completion_mask"].sum()),
                         "prefill": int(batch["prompt_mask"].sum())})
            return batch

        def _generate(self, prompts: Any) -> Any:
            found = super()._generate(prompts)
            self.middle = time.perf_counter()
            return found

        def log(self, logs: Any, start_time: float | None = None) -> None:
            if "grad_norm" in logs:  # the update is over
                rows[-1]["update"] = time.perf_counter() - rows[-1].pop("begun")
            super().log(logs, start_time)

    trainer = Timed(policy, groups, args, groups.data_set(), processing_class=tokenizer)
    trainer.remove_callback(PrinterCallback)
    before = resident_mb()
    trainer.train()
    asked = groups.pool.take(0, config.steps * config.sampling.problems)
    width = max(len(prompts.encode(tokenizer, prompts.solution_messages(problem.text, config.prompt)))
                for problem in asked) + config.sampling.solution_tokens
    return summary(rows[1:], before) | {"micro_batch_tokens": count // pieces * width}


def summary(rows: list[dict[str, Any]], before: float) -> dict[str, Any]:
    """Totals over updates, and the peak above what the process held before the first."""
    total = {key: sum(row[key] for row in rows) for key in ("samples", "tokens", "prefill", "updated", *PHASES)}
    seconds = sum(total[phase] for phase in PHASES)
    return total | {"seconds": seconds, "samples_s": total["samples"] / seconds, "tokens_s": total["tokens"] / seconds,
                    "memory_mb": memory_mb() - before}


def grid(config: Config) -> list[dict[str, Any]]:
    """TRL's settings to try: micro-batches of a step's rows over 1, 2, 4 ..., not below four rows."""
    rows = config.sampling.problems * config.sampling.solutions
    pieces = [count for count in (1, 2, 4, 8, 16, 32) if rows % count == 0 and rows // count >= min(4, rows)]
    return [{"pieces": count, "continuous": continuous} for continuous in (False, True) for count in pieces]


def side(options: argparse.Namespace, changes: list[str], **settings: Any) -> dict[str, Any]:
    """Measure one side in a process of its own; `error` where it failed."""
    command = [sys.executable, __file__, "--model", options.model, "--updates", str(options.updates), "--side",
               json.dumps(settings), *(["--smoke"] if options.smoke else []), "--set", *options.set, *changes, "seed=0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False,
                          env=os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"})
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "no output"}
    return json.loads(done.stdout.strip().splitlines()[-1])


def machine(config: Config) -> dict[str, Any]:
    """What the hardware can do at best: products of large matrices, and a copy of a large tensor."""
    loading.prepare(config)
    device, kind = loading.pick_device(config.model), getattr(torch, config.model.precision)
    size = 8192 if device.type == "cuda" else 1024
    square = torch.randn(size, size, device=device, dtype=kind)
    large = torch.zeros(2**28 if device.type == "cuda" else 2**26, device=device)
    other = torch.empty_like(large)
    multiply = best_of(lambda: float((square @ square)[0, 0]))
    copy = best_of(lambda: float(other.copy_(large)[0]))
    return {"flops": 2 * size**3 / multiply, "bandwidth": 2 * large.numel() * 4 / copy}


def best_of(work: Any, times: int = 5) -> float:
    """Seconds of the fastest of several repetitions; `work` reads a number, which waits for the device."""
    work()
    found = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return min(found)


def enlarge(config: Config, words: int, folder: Path) -> list[str]:
    """The model with a larger vocabulary in a folder; the settings that name it."""
    model, tokenizer = loading.load(config.model)
    model.resize_token_embeddings(words, mean_resizing=False)
    with torch.no_grad():  # words that are never right, and seldom said
        model.get_input_embeddings().weight[len(tokenizer):] *= 0.01
    tensors.save(model, tokenizer, folder)
    return [f"model.weights={folder}"]


def compare(options: argparse.Namespace, changes: list[str], config: Config) -> dict[str, Any]:
    """Search the grid once, then measure the best of it and ours in turn."""
    tried = [{**settings, **side(options, changes, **settings)} for settings in grid(config)[:options.grid]]
    good = [row for row in tried if "error" not in row]
    if not good:
        raise SystemExit(f"TRL ran at no setting of the grid: {tried[0]['error']}")
    best = max(good, key=lambda row: row["samples_s"])
    chosen = {"pieces": best["pieces"], "continuous": best["continuous"]}
    equal = [*changes, f"update.token_budget={best['micro_batch_tokens']}"]
    found: dict[str, list[dict[str, Any]]] = {"trl": [], "ours": [], "ours, equal micro-batch": []}
    for _ in range(options.repeats):
        found["trl"].append(side(options, changes, **chosen))
        found["ours"].append(side(options, changes))
        found["ours, equal micro-batch"].append(side(options, equal))
    failed = [f"{name}: {row['error']}" for name, rows in found.items() for row in rows if "error" in row]
    if failed:
        raise SystemExit("A side failed. " + failed[0])
    shares = side(options, changes, profile=True)
    return {"grid": tried, "trl_setting": chosen, "sides": found, "profile": {} if "error" in shares else shares}


def ratios(found: dict[str, list[dict[str, Any]]]) -> dict[str, float]:
    """Ours over TRL's, each the median of its repetitions; of memory TRL's over ours."""
    def median(name: str, key: str) -> float:
        return statistics.median(row[key] / (row["samples"] if key in (*PHASES, "seconds") else 1)
                                 for row in found[name])

    table = {key: median("ours", key) / median("trl", key) for key in ("samples_s", "tokens_s")}
    table |= {f"speed_{phase}": median("trl", phase) / median("ours", phase) for phase in ("generate", "update")}
    return table | {"memory_saved": median("trl", "memory_mb") / median("ours, equal micro-batch", "memory_mb")}


def from_the_limit(config: Config, rows: list[dict[str, Any]], limit: dict[str, Any]) -> dict[str, float]:
    """Share of the machine's limit that ours reaches in each phase, the median of the repetitions."""
    sizes = tiers.TIERS[config.model.name].architecture if config.model.name in tiers.TIERS else None
    if sizes is None:
        return {}
    shares: dict[str, list[float]] = {"generate": [], "update": []}
    for row in rows:
        updates = config.steps - 1
        load = step_cost.Load(problems=1, solutions=row["samples"] // updates, length=row["tokens"] / row["samples"],
                         prompt=row["prefill"] / updates, batch=config.sampling.batch,
                         longest=config.sampling.solution_tokens)
        itemsize = getattr(torch, config.model.precision).itemsize
        sampled = step_cost.sampling(sizes, load, itemsize)
        learned = step_cost.update(sizes, row["updated"] / updates, load.prompt + load.length)
        for phase, work in (("generate", sampled), ("update", learned)):
            shares[phase].append(updates * work.seconds(limit["flops"], limit["bandwidth"]) / row[phase])
    return {phase: statistics.median(values) for phase, values in shares.items()}


def main() -> None:
    """Measure, print a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pocket", help="default: pocket")
    parser.add_argument("--updates", type=int, default=4, help="measured updates of a side (default: 4)")
    parser.add_argument("--repeats", type=int, default=3, help="of each side, in turn (default: 3)")
    parser.add_argument("--grid", type=int, metavar="N", help="try only the first N settings of TRL's grid")
    parser.add_argument("--vocabulary", type=int, default=0, help="words of an enlarged model (default: its own)")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--table", nargs="+", type=Path, metavar="FILE", help="print recorded ratios instead")
    parser.add_argument("--side", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.table:
        print(table([json.loads(path.read_text(encoding="utf8")) for path in options.table]))
        return
    config = config_of(options)
    if options.side is not None:
        print(json.dumps(theirs(config, **options.side) if "pieces" in options.side else
                         profile(config) if "profile" in options.side else ours(config)))
        return
    with tempfile.TemporaryDirectory() as folder:
        changes = enlarge(config, options.vocabulary, Path(folder)) if options.vocabulary else []
        record = compare(options, changes, config)
    limit = machine(config)
    record |= {"model": options.model, "vocabulary": options.vocabulary, "ratios": ratios(record["sides"]),
               "machine": limit, "share_of_limit": from_the_limit(config, record["sides"]["ours"], limit),
               "environment": environment(config, "python benchmarks/vs_trl.py " + " ".join(sys.argv[1:]))}
    print(json.dumps(record) if options.json else text(record))


def table(records: list[dict[str, Any]]) -> str:
    """Recorded runs in markdown: ratios, ours over TRL's, and the shares of the machine's limit that ours reaches."""
    rows = [["model", "words", "samples/s", "generate", "update", "memory", "with a signal", "limit, generate",
             "limit, update", "matrix products", "attention"]]
    for record in records:
        cells = [record["model"], str(record["vocabulary"] or "its own")]
        cells += [f"{record['ratios'][key]:.1f}x"
                  for key in ("samples_s", "speed_generate", "speed_update", "memory_saved")]
        cells.append(f"{statistics.median(row['signal'] for row in record['sides']['ours']):.0%}")
        cells += [f"{record['share_of_limit'][phase]:.0%}" for phase in ("generate", "update")]
        cells += [f"{record['profile'][kind]:.0%}" if record["profile"] else "-" for kind in KERNELS]
        rows.append(cells)
    return text_tables.markdown(rows)


def text(record: dict[str, Any]) -> str:
    """The record as a table."""
    setting = record["trl_setting"]
    lines = [f"TRL at its best: a step in {setting['pieces']} micro-batches, "
             f"{'continuous batching' if setting['continuous'] else 'generate'}",
             f"{'':<26}{'samples/s':>11}{'tokens/s':>11}" + "".join(f"{phase + ' s':>12}" for phase in PHASES)
             + f"{'memory MB':>12}"]
    for name, rows in record["sides"].items():
        numbers = [statistics.median(row[key] for row in rows) for key in ("samples_s", "tokens_s", *PHASES,
                                                                         "memory_mb")]
        lines.append(f"{name:<26}" + f"{numbers[0]:>11.1f}{numbers[1]:>11.0f}" + "".join(
            f"{number:>12.2f}" for number in numbers[2:5]) + f"{numbers[5]:>12.0f}")
    lines += [f"{name:<26}{value:>11.2f} x" for name, value in record["ratios"].items()]
    lines += [f"{name}: {share:.0%} of the machine's limit" for name, share in record["share_of_limit"].items()]
    lines += [f"{kind}: {share:.0%} of our time" for kind, share in record["profile"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
