"""The snippets of docs/trl.md run as they stand there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from small import small

from masa_lib.models import loading
from masa_lib.runs.folder import Run

PAGE = Path(__file__).resolve().parent.parent / "docs" / "trl.md"
SNIPPETS = re.findall(r"<!-- run -->\n```python\n(.*?)```", PAGE.read_text(encoding="utf8"), re.DOTALL)
SETTINGS = {"steps": 1, "sampling.problems": 2, "evaluation.final_problems": 1, "evaluation.final_samples": 1,
            "evaluation.predictions": 0}


@pytest.mark.parametrize("snippet", SNIPPETS, ids=["asynchronous", "synchronous"])
def test_a_snippet_of_the_page_on_trl_trains(snippet: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = small(SETTINGS)
    for part in loading.load(config.model):
        part.save_pretrained("start")
    names = {"config": config}
    exec(compile(snippet, str(PAGE), "exec"), names)
    assert names["trainer"].state.global_step == 1
    if "rollouts" in names:
        assert Run.open("out/masa").status["state"] == "finished"
