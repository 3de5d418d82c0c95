"""Where the time and the memory of a training go: seconds by phase, tokens/s, peak memory against the plan, MFU.

Trains a few steps of each method with each engine, every pair in a process of its own (its peak memory is its own, and
vLLM wants a process for itself). On a GPU the model computes in bfloat16 and micro-batches are as large as the memory
plan allows; on the CPU the same runs in float32, with `--small` in seconds. The first step warms up and is left out.

MFU (model FLOPs utilisation, PaLM 2204.02311) of the update: 6 FLOPs a weight and token and 12 a layer, width and
attended position, over the update's seconds and the hardware's peak. What is computed twice counts once.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import torch

from masa_lib import config as configs
from masa_lib import crash_safe_files as files
from masa_lib.config import Config
from masa_lib.models import memory, tiers
from masa_lib.runs.provenance import environment
from masa_lib.training.clock import memory_mb
from masa_lib.training.trainer import Trainer

#: dense bfloat16 FLOPs a second by the makers' data sheets (SXM); other hardware is measured
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}
#: what a GPU gets to do, and what any laptop does in seconds
GPU = {"model.precision": "bfloat16", "sampling.problems": 64, "sampling.solutions": 16, "sampling.predictions": 8,
       "sampling.batch": 1024, "update.logprob_chunk": 8192}
SMALL = {"sampling.problems": 4, "sampling.solutions": 4, "sampling.predictions": 4, "sampling.solution_tokens": 64,
         "sampling.meta_tokens": 64, "sampling.batch": 16, "update.token_budget": 512, "problems.pool": 24}
SHOWN = ("seconds_generate", "seconds_grade", "seconds_update", "seconds_total", "seconds_sync", "generate_tokens_s",
         "update_tokens_s", "memory_gb", "plan_gb", "mfu")


def config_of(method: str, engine: str, arguments: argparse.Namespace) -> Config:
    """The config of one pair: the tier's, sized for the hardware, then `--set`."""
    changes: dict[str, Any] = {"model.name": arguments.model, "method": method, "sampling.engine": engine}
    if torch.cuda.is_available():
        changes |= GPU
    if arguments.small:
        changes |= SMALL
    config = tiers.config(changes | dict(entry.split("=", 1) for entry in arguments.set))
    if torch.cuda.is_available() and not any(entry.startswith("update.token_budget=") for entry in arguments.set):
        there = torch.cuda.get_device_properties(0).total_memory / memory.GB
        budgets = [configs.replace(config, {"update.token_budget": 2**power}) for power in range(19, 12, -1)]
        config = next((larger for larger in budgets if memory.fits(larger, there)), config)
    return config


def update_flops(table: pd.DataFrame, tokens: int, sizes: tiers.Architecture) -> float:
    """FLOPs of forward and backward pass over the sequences of a step that carry a gradient; shared prompts once."""
    kept = table[table["advantage"] != 0]
    completion, prompt = kept["tokens"].map(len), kept["prompt_ids"].map(len)
    shared = kept["prompt_ids"].drop_duplicates().map(len)
    attended = (completion * prompt + completion * (completion + 1) / 2).sum() + (shared * (shared + 1) / 2).sum()
    return 6.0 * sizes.matrices * tokens + 12.0 * sizes.layers * sizes.heads * sizes.head_dim * float(attended)


def peak_flops(device: torch.device) -> tuple[float, str]:
    """FLOPs a second that the hardware can do, and where the number comes from."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for card, peak in PEAKS.items():
            if card in name:
                return peak, f"{card}, bfloat16, data sheet"
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    size = 8192 if device.type == "cuda" else 512
    square, fastest = torch.randn(size, size, device=device, dtype=dtype), float("inf")
    for _ in range(5):
        start = time.perf_counter()
        (square @ square).sum().item()  # reading the sum waits for the device
        fastest = min(fastest, time.perf_counter() - start)
    return 2 * size**3 / fastest, f"measured, {str(dtype).removeprefix('torch.')} matrix product of {size}"


def measure(config: Config, steps: int) -> dict[str, Any]:
    """Train some steps and say what they took; means over all but the first."""
    before = 0 if torch.cuda.is_available() else psutil.Process().memory_info().rss
    trainer, sizes = Trainer(config), memory.architecture(config.model.name)
    rows, prompts = [], []
    for _ in range(steps):
        table, metrics = trainer.train_step()
        rows.append(metrics | {"flops": update_flops(table, metrics["tokens_update"], sizes)})
        prompts.append(table["prompt_ids"].map(len).max())
    start = time.perf_counter()
    trainer.engine.sync()
    sync = time.perf_counter() - start
    device = trainer.model.device
    peak, source = peak_flops(device)
    gpu = torch.cuda.get_device_properties(0).total_memory / memory.GB if device.type == "cuda" else 0
    mean = pd.DataFrame(rows[1:] or rows).mean(numeric_only=True)
    return {
        **{name: float(mean[name]) for name in mean.index if name.startswith(("seconds_", "tokens_"))},
        "seconds_sync": sync,
        "generate_tokens_s": float((mean["tokens_solution"] + mean["tokens_meta"]) / mean["seconds_generate"]),
        "update_tokens_s": float(mean["tokens_update"] / mean["seconds_update"]),
        "memory_gb": memory_mb() / 2**10 - before / memory.GB,
        "plan_gb": memory.plan(config, gpu, max(prompts)).peak / memory.GB,
        "mfu": float(mean["flops"] / mean["seconds_update"] / peak), "peak_tflops": peak / 1e12, "peak_source": source,
        "accuracy": [row["accuracy"] for row in rows], "logp_gap": float(mean["logp_gap"]),
        "settings": {key: configs.get(config, key) for key in sorted({*GPU, *SMALL})}}


def pair(method: str, engine: str, arguments: list[str]) -> dict[str, Any]:
    """Measure one pair in a process of its own."""
    done = subprocess.run([sys.executable, __file__, *arguments, "--pair", method, engine], capture_output=True,
                          text=True, check=False, env=os.environ | {"TQDM_DISABLE": "1"})
    if done.returncode:
        return {"method": method, "engine": engine, "error": (done.stderr.strip().splitlines() or ["no message"])[-1]}
    return {"method": method, "engine": engine, **json.loads(done.stdout.strip().splitlines()[-1])}


def show(record: dict[str, Any]) -> str:
    """The record as a table, one row a pair."""
    lines = [record["hardware"]["name"], f"{'method':8}{'engine':14}" + "".join(f"{name:>19}" for name in SHOWN)]
    for row in record["pairs"]:
        numbers = row.get("error") or "".join(f"{row[name] or 0:19.3f}" for name in SHOWN)
        lines.append(f"{row['method']:8}{row['engine']:14}{numbers}")
    return "\n".join(lines)


def main(given: list[str]) -> int:
    """Read the arguments, measure, save, print; 1 where a pair failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--methods", nargs="+", default=list(configs.METHODS), choices=configs.METHODS)
    engines = ["transformers", "paged", *(["vllm"] if importlib.util.find_spec("vllm") else [])]
    parser.add_argument("--engines", nargs="+", default=engines)
    parser.add_argument("--steps", type=int, default=4, help="of which the first warms up")
    parser.add_argument("--small", action="store_true", help="sizes that a CPU does in seconds")
    parser.add_argument("--set", metavar="KEY=VALUE", nargs="+", default=[], help="any other setting")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder of the record (default: runs/gpu)")
    parser.add_argument("--json", action="store_true", help="print the record instead of a table")
    parser.add_argument("--pair", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args(given)
    if arguments.pair:
        print(files.line(measure(config_of(*arguments.pair, arguments), arguments.steps)).decode())
        return 0
    told = environment(Config(), " ".join(["python", "benchmarks/gpu.py", *given]))
    name = ", ".join(told["hardware"]["gpus"]) or told["hardware"]["cpu"]
    pairs = [pair(method, engine, given) for engine in arguments.engines for method in arguments.methods]
    record = told | {"hardware": {"name": name, **told["hardware"]}, "model": Path(arguments.model).name,
                     "steps": arguments.steps, "pairs": pairs}
    arguments.out.mkdir(parents=True, exist_ok=True)
    file = arguments.out / (re.sub(r"[^a-z0-9]+", "-", f"{name} {record['model']}".lower()).strip("-") + ".json")
    file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf8")
    print(json.dumps(record) if arguments.json else f"{show(record)}\n{file}")
    return int(any("error" in row for row in record["pairs"]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
