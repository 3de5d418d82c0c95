"""docs/extending.md holds what it promises: its blocks run as they stand, and what they add trains and is drawn."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from small import small

from masa_lib import config
from masa_lib.analysis import report
from masa_lib.analysis.compare import compare_runs
from masa_lib.engines import registry as engines
from masa_lib.gates import registry as gates
from masa_lib.method import rewards, rollouts
from masa_lib.tasks import problems
from masa_lib.training import drive

ROOT = Path(__file__).resolve().parent.parent
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "extending.md").read_text(encoding="utf8"), re.DOTALL)


@pytest.fixture(scope="module")
def extended() -> None:
    """The blocks in order, each in a module of its own; afterwards the tables are as before."""
    tables = (rewards.PARTS, rollouts.COLUMNS, gates.GATES, config.METHODS, engines.MAKERS, config.ENGINES,
              problems.GENERATORS)
    before, figures = [dict(table) for table in tables], list(report.FIGURES)
    for number, block in enumerate(BLOCKS):
        exec(compile(block, f"docs/extending.md, block {number}", "exec"), {"__name__": f"block_{number}"})
    yield
    for table, entries in zip(tables, before, strict=True):
        table.clear()
        table.update(entries)
    report.FIGURES[:] = figures


def test_before_they_are_run_their_names_are_refused() -> None:
    with pytest.raises(config.ConfigError, match="method is 'longest'; it takes one of grpo"):
        config.replace(config.Config(), {"method": "longest"})


def test_each_of_the_five_takes_less_than_thirty_lines() -> None:
    assert len(BLOCKS) == 5 and max(block.count("\n") for block in BLOCKS) < 30


def test_what_they_add_trains_and_is_recorded_and_drawn(extended: None, tmp_path: Path) -> None:
    changes = {"problems.source": "squares", "problems.pool": 8, "problems.levels": "1-2", "sampling.engine": "halves",
               "steps": 2, "record.rollouts_every": 1, "evaluation.problems": 4, "evaluation.final_problems": 4}
    run = drive.train(small(changes | {"method": "masa"}), tmp_path / "study" / "masa-s0", "masa train")
    table = run.rollouts()
    paid = table["reward_brevity"].dropna()
    assert len(paid) and paid.isin([0, 1]).all() and table["problem"].str.contains(r"^\d+ \* \d+ = \?$").all()
    longest = drive.train(small(changes | {"method": "longest"}), tmp_path / "study" / "longest-s0", "masa train")
    assert longest.metrics()["candidates"].gt(small(changes).sampling.problems).all()
    drawn = report.sections(compare_runs([run.path.parent]))
    assert any(sentence.startswith("The largest norm is") for _, said in drawn for sentence in said)
