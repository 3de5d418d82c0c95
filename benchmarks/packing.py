"""What packing an update's sequences saves: tokens of padding and of repeated prompts, and seconds, in one process.

Takes the groups with a signal of a step that a run has recorded: prompts as they were, completions of their lengths
with random words. They are computed `--repeats` times in turn, packed and as padded whole sequences, after one turn
that warms up; the ratio is the median of the turns', by the processor's time, which other programs on the machine add
little to. The shares of padding are those of all recorded steps, had each been padded: `whole`, and with prompts
computed once, in two batches, `shared`. `--json` prints one object.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from masa_lib.analysis import text_tables
from masa_lib.config import Config
from masa_lib.engines.logprobs import Sample, micro_batches
from masa_lib.method import objective, prompts
from masa_lib.models import architecture, loading
from masa_lib.runs.folder import Run
from masa_lib.runs.provenance import environment


def recorded(run: Run, tokenizer: Any, step: int) -> list[Sample]:
    """The sequences of a step's update."""
    table, config, words = run.rollouts([step]), run.config, torch.Generator().manual_seed(step)
    found = []
    for row in table[table["advantage"].fillna(0).ne(0)].itertuples():
        asked = prompts.solution_messages(row.problem, config.prompt) if row.stream == "solution" else \
            prompts.meta_messages(row.problem, config.prompt, config.sampling.solution_tokens)
        ids = torch.randint(len(tokenizer), (int(row.length),), generator=words).tolist()
        found.append(Sample(tuple(prompts.encode(tokenizer, asked)), tuple(ids), (0.0,) * len(ids), row.advantage, 1e-3,
                            row.stream))
    return found


def tokens(samples: Sequence[Sample], budget: int) -> dict[str, int]:
    """Tokens that go through the model: packed, and padded in two batches (shared prompts) or one (whole)."""
    found = dict.fromkeys(("packed", "shared", "repeated", "whole"), 0)
    for batch in micro_batches(samples, budget):
        asked, fed = {sample.prompt for sample in batch}, [len(sample.completion) - 1 for sample in batch]
        found["packed"] += sum(map(len, asked)) + sum(fed)
        found["shared"] += len(asked) * max(map(len, asked)) + len(fed) * max(fed)
        found["repeated"] += sum(sample.length - 1 for sample in batch)
        found["whole"] += len(batch) * max(sample.length - 1 for sample in batch)
    return found


def seconds(model: Any, samples: Sequence[Sample], config: Config) -> float:
    """Of one update's gradients, on the processor."""
    model.zero_grad()
    start = time.process_time()
    objective.accumulate_gradients(model, samples, config.update, 1.0)
    return time.process_time() - start


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Everything as one table: options, versions, tokens, shares of padding, seconds of each turn, their ratio."""
    source = Run.open(options.run)
    config = source.config
    torch.set_num_threads(options.threads)
    model, tokenizer = loading.load(dataclasses.replace(config.model, weights=""))  # any weights take as long
    steps = source.rollout_steps()
    updates = [found for step in steps if (found := recorded(source, tokenizer, step))]
    each = [tokens(samples, config.update.token_budget) for samples in updates]
    total = {name: sum(counts[name] for counts in each) for name in each[0]}
    chosen, turns = updates[len(updates) // 2][:options.samples], []
    for _ in range(options.repeats + 1 if options.repeats else 0):
        packed = seconds(model, chosen, config)
        with mock.patch.object(architecture, "packs", lambda model: False):
            turns.append({"packed": packed, "whole": seconds(model, chosen, config)})
    told = environment(config, "python benchmarks/packing.py " + " ".join(sys.argv[1:]))
    given = {name: getattr(options, name) for name in ("run", "samples", "repeats", "threads")}
    return {"options": given, "environment": told, "tokens": total, "sequences": len(chosen),
            "padding_shared": 1 - total["packed"] / total["shared"],
            "padding_whole": 1 - total["repeated"] / total["whole"], "turns": turns[1:],
            "ratio": statistics.median(one["whole"] / one["packed"] for one in turns[1:]) if turns else None}


def table(records: Sequence[dict[str, Any]]) -> str:
    """Recorded outputs as Markdown, for docs/scaling.md."""
    return text_tables.markdown([["run", "padding, whole", "padding, shared", "ratio"], *(
        ["/".join(Path(record["options"]["run"]).parts[-2:]), f"{record['padding_whole']:.0%}",
         f"{record['padding_shared']:.0%}", f"{record['ratio']:.1f}" if record["ratio"] else "not measured"]
        for record in records)])


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", help="a run's folder, such as data/runs/baseline/masa-s0")
    parser.add_argument("--samples", type=int, help="sequences of the update that are computed; default: all")
    parser.add_argument("--repeats", type=int, default=5, help="0: count tokens alone")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--table", nargs="+", type=Path, metavar="FILE", help="print recorded outputs instead")
    options = parser.parse_args()
    if options.table:
        print(table([json.loads(path.read_text(encoding="utf8")) for path in options.table]))
        return
    if not options.run:
        parser.error("name a run's folder")
    found = run(options)
    if options.json:
        print(json.dumps(found, indent=1))
        return
    print(f"{found['tokens']['packed']} tokens packed; padding {found['padding_shared']:.0%} with shared prompts, "
          f"{found['padding_whole']:.0%} of whole sequences; whole over packed, seconds: {found['ratio']:.2f}")


if __name__ == "__main__":
    main()
