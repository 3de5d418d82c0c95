from __future__ import annotations

import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from small import small, timeless

from masa_lib import cli
from masa_lib import config as configs
from masa_lib.config import Config, ConfigError
from masa_lib.engines import Request, make_engine
from masa_lib.method import rewards, rollouts
from masa_lib.models import loading
from masa_lib.runs.folder import Run
from masa_lib.scaleout import groups
from masa_lib.scaleout import run as scaleout
from masa_lib.scaleout.engine import TrlEngine
from masa_lib.tasks.problems import ProblemPool
from masa_lib.training import drive
from masa_lib.training.safeguards import UpdateError

ROOT = Path(__file__).resolve().parent.parent
#: 5 problems with 8 rollouts on two processes: the third problem's group is split; two micro-batches
SETTINGS: dict[str, Any] = {
    "sampling.problems": 5, "sampling.solution_tokens": 40, "sampling.meta_tokens": 48, "update.token_budget": 1024,
    "update.meta_entropy": 0.03,
    "evaluation.final_problems": 4, "evaluation.final_samples": 2, "record.checkpoint_every": 1}
#: a gate that acts from the second step on, whatever it measures
GATE: dict[str, Any] = {"gate.start": 1, "gate.lost": 1.0, "cap.cut": 1.0,
                        "cap.multiplier": 0.6, "cap.aggregate": "mean",
                        "cap.hint": "training", "gate.threshold": 0.6, "sampling.problems": 3, "gate.recheck": 0.5}
METHODS = {"grpo": {}, "masa": {"update.normalise_meta": "contrast"}, "masa-efficient": GATE}
#: what TRL cannot tell, or counts in its own way
THEIRS = ("logp_gap", "entropy", "tokens_update", "tokens_prefill")


def settings(method: str, **changes: Any) -> Config:
    return small(SETTINGS | METHODS[method] | {"method": method} | changes)


def assert_same_training(found: Run, expected: Run, weights: float = 1e-3) -> None:
    """The same rollouts, rewards, metrics and evaluations, and weights that moved the same way."""
    assert found.status["state"] == expected.status["state"] == "finished"
    order = ["step", "group", "stream", "member"]
    tables = [run.rollouts().sort_values(order, ignore_index=True) for run in (found, expected)]
    pd.testing.assert_frame_equal(*tables, rtol=1e-6)
    for read in (Run.metrics, lambda run: run.evaluations().tail(1)):
        rows = [read(run).to_dict("records") for run in (found, expected)]
        for one, other in zip(*rows, strict=True):
            assert one.keys() == other.keys()
            assert one.get("method") == other.get("method")
            for key in timeless(other).keys() - {*THEIRS, "method"}:
                assert one[key] == pytest.approx(other[key], rel=1e-4, abs=1e-6, nan_ok=True), (one["step"], key)
    begun, _ = loading.load(found.config.model)
    before = dict(begun.named_parameters())
    theirs, ours = (loading.load(run.config.model, run.latest_checkpoint()[1])[0].state_dict()
                    for run in (found, expected))
    moved = sum((ours[name] - before[name]).square().sum().item() for name in before)
    apart = sum((ours[name] - theirs[name]).square().sum().item() for name in before)
    assert moved > 0 and (apart / moved) ** 0.5 < weights


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """The same runs on our own engine."""
    folder = tmp_path_factory.mktemp("own")
    return {method: drive.train(settings(method), folder / method, "masa train") for method in METHODS}


def start(arguments: Sequence[str], folder: Path) -> list[subprocess.Popen[bytes]]:
    """The command in two processes of one group, as a launcher would start them; their outputs go to files."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(2):
        environment = os.environ | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
                                    "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PYTHONPATH": str(ROOT)}
        with (folder / f"{rank}.log").open("ab") as log:
            processes.append(subprocess.Popen([sys.executable, "-m", "masa_lib.scaleout", *arguments],
                                              env=environment, stdout=log, stderr=log))
    return processes


def await_first_checkpoint(out: Path, processes: Sequence[subprocess.Popen[bytes]]) -> None:
    limit = time.monotonic() + 200
    while not (out / "checkpoints" / "step-000001").exists():
        assert time.monotonic() < limit and all(process.poll() is None for process in processes)
        time.sleep(0.05)


def finish(processes: Sequence[subprocess.Popen[bytes]], folder: Path) -> None:
    codes = [process.wait(timeout=300) for process in processes]
    assert codes == [0, 0], "\n".join((folder / f"{rank}.log").read_text()[-3000:] for rank in range(2))


def config_file(folder: Path, config: Config) -> str:
    configs.save(config, folder / "config.toml")
    return str(folder / "config.toml")


@pytest.mark.parametrize("method", ["masa-efficient", *(
    pytest.param(method, marks=pytest.mark.slow) for method in METHODS if method != "masa-efficient")])
def test_two_processes_train_what_one_trains_on_our_engine(tmp_path: Path, own: dict[str, Run], method: str) -> None:
    out = tmp_path / "run"
    file = config_file(tmp_path, settings(method))
    finish(start(["train", "--config", file, "--out", str(out)], tmp_path), tmp_path)
    found = Run.open(out)
    assert_same_training(found, own[method])
    if method == "masa-efficient":
        acted = found.metrics().iloc[1:]
        assert acted["gate_on"].all() and acted["cap_on"].all() and (acted["dropped"] > 0).any()
        assert found.rollouts([2, 3])["capped"].any()
    assert (found.path / "model" / "config.json").exists()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="vLLM is built for Linux")
def test_two_processes_with_a_vllm_each_train_what_one_trains_on_our_engine(tmp_path: Path) -> None:
    config = settings("masa", **{"sampling.engine": "vllm", "steps": 2, "sampling.batch": 64})
    file = config_file(tmp_path, config)
    finish(start(["train", "--config", file, "--out", str(tmp_path / "run")], tmp_path), tmp_path)
    assert_same_training(Run.open(tmp_path / "run"), drive.train(config, tmp_path / "own", "masa train"))


@pytest.mark.slow
def test_a_training_that_lost_a_process_goes_on_where_it_was(tmp_path: Path, own: dict[str, Run]) -> None:
    out = tmp_path / "run"
    file = config_file(tmp_path, settings("masa-efficient"))
    processes = start(["train", "--config", file, "--out", str(out)], tmp_path)
    await_first_checkpoint(out, processes)
    processes[1].send_signal(signal.SIGKILL)
    assert processes[0].wait(timeout=120) != 0
    assert processes[1].wait(timeout=10) == -signal.SIGKILL
    assert Run.open(out).status["state"] != "finished"
    finish(start(["resume", str(out)], tmp_path), tmp_path)
    assert_same_training(Run.open(out), own["masa-efficient"])


def test_one_process_is_enough_and_either_engine_goes_on_with_the_other_ones_run(tmp_path: Path,
                                                                                own: dict[str, Run]) -> None:
    begun = scaleout.train(settings("masa", steps=1), tmp_path / "run", "masa train --backend trl")
    assert begun.status == {"state": "finished", "step": 1, "message": ""}
    longer = begun.path / "config.toml"
    longer.write_text(longer.read_text().replace("steps = 1\n", "steps = 2\n", 1))
    drive.resume(begun.path)
    longer.write_text(longer.read_text().replace("steps = 2\n", "steps = 3\n", 1))
    found = scaleout.resume(begun.path)
    assert [row["logp_gap"] == row["logp_gap"] for row in found.metrics().to_dict("records")] == [False, True, False]
    assert_same_training(found, own["masa"])


def test_a_gradient_that_is_not_finite_ends_it_before_the_optimiser_moves(tmp_path: Path,
                                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    load, held = loading.load, []

    def spoiled(*given: Any) -> tuple[Any, Any]:
        model, tokenizer = load(*given)
        model.model.norm.weight.register_hook(lambda gradient: gradient * math.nan)
        held.append(model)
        return model, tokenizer

    monkeypatch.setattr(loading, "load", spoiled)
    with pytest.raises(UpdateError, match="the norm of its gradient is nan"):
        scaleout.train(settings("grpo", steps=1), tmp_path / "run", "masa train --backend trl")
    run = Run.open(tmp_path / "run")
    assert run.status["state"] == "failed" and run.metrics().empty and run.latest_checkpoint() is None
    assert all(value.isfinite().all() for value in held[0].parameters())


def test_accelerate_launches_it(tmp_path: Path, own: dict[str, Run]) -> None:
    out, file = tmp_path / "run", config_file(tmp_path, settings("grpo"))
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "--mixed_precision", "no",
         "-m", "masa_lib.scaleout", "train", "--config", file, "--out", str(out)],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same_training(Run.open(out), own["grpo"])


def test_a_signal_stops_every_process_after_the_same_step(tmp_path: Path) -> None:
    out, file = tmp_path / "run", config_file(tmp_path, settings("grpo", steps=200))
    processes = start(["train", "--config", file, "--out", str(out)], tmp_path)
    await_first_checkpoint(out, processes)
    processes[1].send_signal(signal.SIGTERM)
    assert [process.wait(timeout=120) for process in processes] == [143, 143]
    run = Run.open(out)
    assert run.status["state"] == "stopped" and run.latest_checkpoint()[0] == run.metrics()["step"].max()


@pytest.mark.parametrize("key", ["update.updates_per_step=2", "sampling.shared_beginning=true",
                                 "model.lora_rank=4"])
def test_what_trl_has_no_place_for_is_refused_in_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                                           key: str) -> None:
    assert cli.main(["train", "--backend", "trl", "--set", key, "--out", str(tmp_path / "run")]) == cli.EXIT_USAGE
    said = capsys.readouterr().err
    assert key.partition("=")[0] in said and "a training on TRL takes" in said
    assert not (tmp_path / "run").exists()


def test_a_weight_that_trl_does_not_have_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"update\.sampler_weight is on"):
        scaleout.check(small({"update.sampler_weight": "on"}))
    scaleout.check(small())


def test_paged_sampling_of_sharded_weights_is_refused_as_it_would_round_them(monkeypatch: pytest.MonkeyPatch) -> None:
    config = small({"sampling.engine": "paged"})
    scaleout.check(config)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match=r"sampling\.engine is paged; .*into bfloat16"):
        scaleout.check(config)
    scaleout.check(small({"sampling.engine": "vllm"}))


def test_groups_without_a_common_divisor_are_refused() -> None:
    config = small({"sampling.solutions": 5, "sampling.predictions": 4})
    with pytest.raises(ConfigError, match="common divisor"):
        groups.layout(config, 2, 60)


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
@pytest.mark.parametrize("changes", [{}, {"sampling.solutions": 8, "sampling.predictions": 4, "sampling.problems": 7},
                                     {"method": "grpo"}, {"method": "dapo"}, METHODS["masa-efficient"]])
def test_places_are_enough_and_equal_on_every_process(changes: dict[str, Any], processes: int) -> None:
    config = small({"method": "masa-efficient" if "gate.start" in changes else "masa"} | changes)
    plan = groups.layout(config, processes, 60)
    meta = config.sampling.predictions if config.method in configs.PREDICTING else 0
    assert plan.places >= config.sampling.problems * (config.sampling.solutions + meta)
    assert plan.places % (processes * plan.pieces) == 0 and plan.places % plan.generations == 0
    assert config.sampling.solutions % plan.generations == 0 == meta % plan.generations


def test_a_problems_rows_are_neighbours_solutions_first() -> None:
    config = small({"sampling.solutions": 8, "sampling.predictions": 4})
    pool = ProblemPool(config.problems, 0)
    plan = groups.layout(config, 5, 60)
    rows = groups.data_set(config, pool, plan, first=2, cursor=6)
    per_step = plan.places // plan.generations
    assert len(rows) == 2 * per_step
    for step in range(2):
        found = rows[step * per_step:(step + 1) * per_step]
        expected = pool.take(6 * (step + 1), 6)
        assert found["stream"][:3] == ["solution", "solution", "meta"]
        assert found["problem_id"][:18] == [problem.id for problem in expected for _ in range(3)]
        assert set(found["stream"][18:]) <= {"blank"}


def test_data_set_and_reward_serve_trls_own_trainer_and_sampling(tmp_path: Path) -> None:
    from trl import GRPOTrainer

    from masa_lib.scaleout.trainer import arguments

    config = small({"steps": 1, "sampling.problems": 3, "sampling.solutions": 8})
    policy, tokenizer = loading.load(config.model)
    plan = groups.layout(config, 1, 60)
    reward = groups.GroupReward(config, tokenizer, loading.end_tokens(policy, tokenizer))
    trainer = GRPOTrainer(policy, reward, arguments(config, plan, 1, 1, tmp_path, False),
                          groups.data_set(config, ProblemPool(config.problems, 0), plan, first=1, cursor=0),
                          processing_class=tokenizer)
    trainer.train()
    table = reward.table
    assert table.groupby(["group", "stream"]).size().unstack().eq([4, 8]).all(axis=None)
    again = table.drop(columns=["reward", *rewards.PARTS, "advantage"])
    rollouts.score(again, config)
    pd.testing.assert_frame_equal(again[table.columns], table)
    assert table["parse_error"].dropna().eq("").any() and table["correct"].dropna().any()


def test_trl_samples_where_weights_are_sharded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = scaleout.Session(settings("masa", steps=1), tmp_path)
    engine = TrlEngine(session.trainer, session.trainer.reward.end_tokens)
    problems = ProblemPool(session.config.problems, 0).take(0, 2)
    asks = rollouts.whole_groups(problems, session.config, solutions=3, predictions=2)
    rows = [row for ask in asks for row in rollouts._rows(ask, session.tokenizer, session.config)]
    requests = [Request(row["prompt_ids"], cap, 1, 1.0) for row, cap in zip(rows, range(4, 4 + len(rows)), strict=True)]
    for completion, request in zip(engine.generate(requests), requests, strict=True):
        ended = completion.tokens[-1] in session.trainer.reward.end_tokens
        assert completion.finish == ("stop" if ended else "length")
        assert len(completion.tokens) == request.max_tokens or (ended and len(completion.tokens) < request.max_tokens)
    monkeypatch.setattr(session, "sharded", True)
    session.rollouts.engine.engine = session._engine()
    Run.create(tmp_path, session.config, "masa train")
    found = session.drive()
    assert found.status["state"] == "finished" and found.metrics()["gradient_norm"].gt(0).all()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="vLLM is built for Linux")
def test_trls_vllm_samples_at_the_requests_temperature_and_cap_up_to_our_end_tokens(tmp_path: Path) -> None:
    from trl.generation.vllm_generation import VLLMGeneration

    session = scaleout.Session(settings("masa", steps=1), tmp_path)
    trainer, ends = session.trainer, session.trainer.reward.end_tokens
    sampler = VLLMGeneration.__new__(VLLMGeneration)  # TRL's own way to sample, with a vLLM that runs on the CPU
    vars(sampler).update(
        mode="colocate", accelerator=trainer.accelerator, model=trainer.model, enable_sleep_mode=False,
        tensor_parallel_size=1, top_p=1.0, top_k=0, min_p=None, repetition_penalty=1.0, temperature=1.0,
        max_completion_length=99, logprobs=0, structured_outputs_regex=None, generation_kwargs={"detokenize": False},
        llm=make_engine("vllm", trainer.model, session.tokenizer, batch=64).llm)
    trainer.use_vllm, trainer.vllm_generation, trainer._last_loaded_step = True, sampler, trainer.state.global_step
    prompt = tuple(session.tokenizer("1 + 2")["input_ids"])
    cold, hot = (TrlEngine(trainer, ends).generate([Request(prompt, 4, seed, temperature) for seed in range(64)])
                 for temperature in (0.01, 2.0))
    assert len({answer.tokens for answer in cold}) < 4 < 10 < len({answer.tokens for answer in hot})
    assert all(len(answer.tokens) <= 4 and not ends & set(answer.tokens[:-1]) for answer in hot)


def test_the_fsdp_config_is_one_that_accelerate_reads() -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(ROOT / "configs" / "accelerate-fsdp-8gpu.yaml"))
    assert config.distributed_type.value == "FSDP" and config.num_processes == 8


