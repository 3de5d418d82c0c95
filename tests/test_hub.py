"""Whether a model can be had, said at once and truly; the hub is a server of ours on the loopback address."""

from __future__ import annotations

import contextlib
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from masa_lib import hub
from masa_lib.config import ModelConfig
from masa_lib.errors import MasaError
from masa_lib.models import loading, memory, tiers
from masa_lib.tasks.problem_rows import ProblemError
from masa_lib.tasks.problems import load_problems


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[str]]:
    """A hub that has `someone/there`, wants a token for `someone/gated`, and keeps a list of what it was asked."""
    paths: list[str] = []

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            paths.append(self.path)
            known = {"/someone/there": 200, "/someone/gated": 401, "/someone/ill": 500}
            self.send_response(known.get(self.path.partition("/resolve")[0], 404))
            self.end_headers()

        def log_message(self, *about: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE",
                        address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    yield paths
    with contextlib.suppress(OSError):
        server.shutdown()
        server.server_close()


def cached(folder: Path, name: str) -> None:
    """What the hub's cache looks like where it holds a model's config."""
    place = folder / f"models--{name.replace('/', '--')}"
    (place / "snapshots" / "abc").mkdir(parents=True)
    (place / "snapshots" / "abc" / "config.json").write_text("{}")
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("abc")


def test_the_hub_is_asked_once_for_a_model_that_is_no_folder(asked: list[str], tmp_path: Path) -> None:
    assert tiers.reach("someone/there")
    assert asked == ["/someone/there/resolve/main/config.json"]
    assert not tiers.reach(str(tmp_path)) and not tiers.reach("pocket") and len(asked) == 1


@pytest.mark.parametrize(("name", "says"), [
    ("someone/nowhere", "neither a tier .* nor a folder; the Hugging Face hub has no model of this name"),
    ("someone/gated", "only to those who agreed to its terms"), ("someone/ill", "answers with an error .500"),
    ("a/b/c", "no id of the Hugging Face hub"),
    ("qwen3-1.7b", r"'qwen3-1.7b' \(Qwen/Qwen3-1.7B-Base on the Hugging Face hub\) cannot be had: the Hugging Face")])
def test_why_a_model_cannot_be_had_is_one_true_sentence(asked: list[str], name: str, says: str) -> None:
    with pytest.raises(MasaError, match=says) as refused:
        loading.load(ModelConfig(name=name))
    assert "\n" not in str(refused.value) and len(asked) <= 1
    assert name != "qwen3-1.7b" or "neither" not in str(refused.value)


def test_a_hub_that_does_not_answer_is_not_asked_again_and_the_cache_serves(
        asked: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE",
                        "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}")
    for read in (memory.architecture, lambda name: loading.load(ModelConfig(name=name))):
        with pytest.raises(MasaError, match=r"the hub does not answer|does not answer .*cache does not hold it"):
            read("someone/there")
    cached(tmp_path, "someone/there")
    assert tiers.reach("someone/there") is False
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert tiers.reach("someone/there") is False
    with pytest.raises(hub.HubError, match="HF_HUB_OFFLINE forbids"):
        tiers.reach("someone/else")


def test_a_data_set_of_a_hub_that_does_not_answer_is_not_asked_for_again_and_again(
        asked: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE",
                        "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}")
    with pytest.raises(ProblemError, match=r"The data set gsm8k .* cannot be loaded from the hub or its cache"):
        load_problems("gsm8k", "train")
    assert "Retrying" not in caplog.text and huggingface_hub.constants.HF_HUB_OFFLINE is False
