"""Tokens a second of the engines, side by side, and what the weight sync of vLLM costs.

All sample the same number of sequences from the same prompts, to the cap and with the same seeds where seeds are taken.
Prints one line each and the ratios that matter: our vLLM engine to bare `llm.generate` (aim: at least 0.9), to plain
`model.generate` (aim: at least 1.5), and a weight sync to a training step (aim: below 0.1). `--json` prints one JSON
object. Every part runs in this one process, one after the other, so that they share the machine alike; each is
measured `--repeats` times in turn and the fastest counts.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from masa_lib.config import Config
from masa_lib.engines import Request, make_engine
from masa_lib.method import prompts
from masa_lib.models import loading, tiers
from masa_lib.runs.provenance import environment
from masa_lib.tasks.problems import ProblemPool
from masa_lib.training.trainer import Trainer


def make_requests(config: Config, tokenizer: Any, sequences: int, members: int, tokens: int) -> list[Request]:
    """Groups of `members` requests over the prompts of real problems, all with the same cap."""
    problems = ProblemPool(config.problems, config.seed).take(0, -(-sequences // members))
    asked = [tuple(prompts.encode(tokenizer, prompts.solution_messages(problem.text, config.prompt)))
             for problem in problems]
    return [Request(asked[number // members], tokens, number) for number in range(sequences)]


def sampling_by(worker: Any, forward: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """Give vLLM another way to draw tokens (its own by default); returns the one it had."""
    sampler = worker.model_runner.sampler.topk_topp_sampler
    before, sampler.forward = sampler.forward, forward or type(sampler)(sampler.logprobs_mode).forward
    return before


def bare_vllm(llm: Any, requests: Sequence[Request], ends: Sequence[int]) -> int:
    """Tokens from `llm.generate` as vLLM draws them by itself, without seeds and log-probs."""
    from vllm import SamplingParams

    llm.reset_prefix_cache()
    (ours,) = llm.collective_rpc(sampling_by)
    outputs = llm.generate(
        [{"prompt_token_ids": list(request.prompt)} for request in requests],
        [SamplingParams(temperature=1.0, max_tokens=request.max_tokens, detokenize=False, ignore_eos=True,
                        stop_token_ids=ends) for request in requests], use_tqdm=False)
    llm.collective_rpc(sampling_by, args=(ours,))
    return sum(len(output.outputs[0].token_ids) for output in outputs)


def plain_generate(model: Any, requests: Sequence[Request], ends: Sequence[int]) -> int:
    """Tokens from `model.generate`: one batch, padded on the left, until the last sequence ends; no autocast."""
    width = max(len(request.prompt) for request in requests)
    ids = torch.full((len(requests), width), ends[0])
    mask = torch.zeros_like(ids)
    for row, request in enumerate(requests):
        ids[row, width - len(request.prompt):] = torch.tensor(request.prompt)
        mask[row, width - len(request.prompt):] = 1
    with torch.inference_mode(), torch.autocast(model.device.type, enabled=False):
        out = model.generate(input_ids=ids.to(model.device), attention_mask=mask.to(model.device), do_sample=True,
                             temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=requests[0].max_tokens,
                             eos_token_id=list(ends), pad_token_id=ends[0])[:, width:].cpu()
    ended = torch.isin(out, torch.tensor(ends)).cumsum(dim=1)
    return int(((ended == 0) | ((ended == 1) & torch.isin(out, torch.tensor(ends)))).sum())


def measure(parts: dict[str, Callable[[], int]], repeats: int) -> dict[str, dict[str, float]]:
    """Tokens, seconds and tokens a second of each part: the fastest of several turns, after one that warms up."""
    found: dict[str, dict[str, float]] = {}
    for turn in range(repeats + 1):
        for name, part in parts.items():
            start = time.perf_counter()
            tokens = part()
            seconds = time.perf_counter() - start
            rate = tokens / seconds
            if turn and rate > found.get(name, {"tokens_per_second": 0.0})["tokens_per_second"]:
                found[name] = {"tokens": tokens, "seconds": seconds, "tokens_per_second": rate}
    return found


def sync_share(trainer: Trainer, repeats: int) -> dict[str, float]:
    """Seconds of a weight sync and of a training step (which has one in it), the fastest of each, and their ratio."""
    steps = [trainer.train_step()[1]["seconds_total"] for _ in range(repeats)]
    syncs = []
    for _ in range(repeats):
        start = time.perf_counter()
        trainer.engine.sync()
        syncs.append(time.perf_counter() - start)
    return {"sync_seconds": min(syncs), "step_seconds": min(steps), "sync_share": min(syncs) / min(steps)}


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Everything as one table: options, versions, tokens a second of each part, ratios."""
    names = options.engines.split(",")
    with_vllm = "vllm" in names
    config = tiers.config({
        "method": "masa", "model.name": options.model, "model.precision": options.precision,
        "model.threads": options.threads, "sampling.engine": "vllm" if with_vllm else "transformers",
        "sampling.batch": options.sequences, "sampling.problems": max(options.sequences // (2 * options.members), 1),
        "sampling.solutions": options.members, "sampling.predictions": options.members,
        "sampling.solution_tokens": options.tokens, "sampling.meta_tokens": options.tokens})
    trainer = Trainer(config)
    model, tokenizer = trainer.model, trainer.tokenizer
    ends = sorted(loading.end_tokens(model, tokenizer))
    requests = make_requests(config, tokenizer, options.sequences, options.members, options.tokens)
    parts: dict[str, Callable[[], int]] = {}
    for name in names:
        if name == "bare":
            parts[name] = lambda: bare_vllm(trainer.engine.llm, requests, ends)
        elif name == "generate":
            plain = copy.deepcopy(model).to(getattr(torch, options.precision))
            parts[name] = lambda plain=plain: plain_generate(plain, requests, ends)
        else:
            engine = trainer.engine if name == config.sampling.engine else make_engine(
                name, model, tokenizer, batch=options.sequences)
            parts[name] = lambda engine=engine: sum(len(answer.tokens) for answer in engine.generate(requests))
    with loading.precision(config.model, model.device):
        speed = measure(parts, options.repeats)
    rates = {name: part["tokens_per_second"] for name, part in speed.items()}
    told = environment(config, "python benchmarks/engines.py " + " ".join(sys.argv[1:]))
    result = {**vars(options), "threads": torch.get_num_threads(), "environment": told, "parts": speed}
    if with_vllm:
        result |= {f"vllm_to_{name}": rates["vllm"] / rate for name, rate in rates.items() if name != "vllm"}
        result |= sync_share(trainer, options.repeats)
    return result


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2", help="tier, hub id or folder")
    parser.add_argument("--precision", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--members", type=int, default=8, help="sequences of one prompt")
    parser.add_argument("--tokens", type=int, default=128, help="cap of every sequence")
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0: its own choice")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--engines", default="vllm,bare,generate,transformers,paged", help="what to measure")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    result = run(options)
    if options.json:
        print(json.dumps(result))
        return
    for name, part in result["parts"].items():
        print(f"{name:14} {part['tokens_per_second']:9.0f} tokens/s   {part['seconds']:8.2f} s")
    for key, value in result.items():
        if key.startswith(("vllm_to", "sync", "step")):
            print(f"{key:24} {value:.3f}")


if __name__ == "__main__":
    main()
