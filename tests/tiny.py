"""Tiny random models of many architectures, each with what makes it unlike a plain transformer switched on."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

#: a setting of COMMON that a config does not take
LEFT_OUT = object()
#: what all configs are given, under the names that most know
COMMON: dict[str, Any] = {
    "vocab_size": 180, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "intermediate_size": 48, "max_position_embeddings": 128, "pad_token_id": None, "bos_token_id": None,
    "eos_token_id": None, "dtype": "float32"}
MOE: dict[str, Any] = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
WINDOW: dict[str, Any] = {"sliding_window": 8}
GPT: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "n_inner": 48}
LINEAR: dict[str, Any] = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
                          "linear_value_head_dim": 8, "linear_conv_kernel_dim": 4}
STATES: dict[str, Any] = {"mamba_d_state": 8, "mamba_d_conv": 4, "mamba_expand": 2, "mamba_n_heads": 4,
                          "mamba_d_head": 16, "mamba_d_ssm": 64, "mamba_chunk_size": 8, "use_mamba_kernels": False}
LATENT: dict[str, Any] = {"q_lora_rank": None, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
                          "v_head_dim": 8, "num_key_value_heads": 4}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    # plain attention
    "qwen2": {}, "qwen3": {}, "llama": {}, "smollm3": {}, "olmo2": {}, "stablelm": {}, "phi": {}, "phi3": {},
    "glm4": {}, "exaone4": WINDOW, "gpt_neox": {}, "starcoder2": WINDOW, "nemotron": {}, "persimmon": {},
    "ernie4_5": {}, "seed_oss": {}, "hunyuan_v1_dense": {}, "helium": {}, "apertus": {},
    # old ones: learned or linear positions, dropout
    "gpt2": GPT, "gptj": GPT | {"rotary_dim": 4}, "gpt_bigcode": GPT, "codegen": GPT | {"rotary_dim": 4},
    "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 8},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32}, "bloom": {"n_layer": 2, "n_head": 4},
    "falcon": {"alibi": False, "head_dim": LEFT_OUT},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 128},
    # scaled or capped logits
    "gemma": {}, "gemma2": WINDOW | {"final_logit_softcapping": 0.5, "query_pre_attn_scalar": 8},
    "granite": {"logits_scaling": 8.0}, "cohere": {"logit_scale": 0.25}, "cohere2": WINDOW | {"logit_scale": 0.25},
    # windows
    "gemma3_text": WINDOW | {"layer_types": ["sliding_attention", "full_attention"]},
    "mistral": WINDOW, "ministral": WINDOW, "olmo3": WINDOW,
    "gpt_oss": WINDOW | MOE, "llama4_text": MOE | {"attention_chunk_size": 8, "intermediate_size_mlp": 48,
                                                   "interleave_moe_layer_step": 1},
    # experts
    "qwen3_moe": MOE | {"decoder_sparse_step": 1}, "qwen2_moe": MOE | {"shared_expert_intermediate_size": 24},
    "mixtral": MOE | WINDOW, "olmoe": MOE, "granitemoe": MOE | {"logits_scaling": 8.0}, "phimoe": MOE,
    "deepseek_v3": LATENT | MOE | {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    "deepseek_v2": LATENT | MOE | {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    "glm4_moe": MOE | {"n_routed_experts": 4, "n_group": 1, "topk_group": 1},
    # memories of another kind
    "mamba": {"state_size": 8}, "mamba2": {"state_size": 8, "num_heads": 4, "head_dim": 16, "n_groups": 1,
                                           "chunk_size": 8},
    "falcon_mamba": {"state_size": 8}, "rwkv": {"attention_hidden_size": 32},
    "lfm2": {"layer_types": ["conv", "full_attention"]}, "falcon_h1": STATES,
    "qwen3_next": MOE | LINEAR | {"layer_types": ["linear_attention", "full_attention"],
                                  "shared_expert_intermediate_size": 24},
    "qwen3_5_text": LINEAR | {"layer_types": ["linear_attention", "full_attention"]},
    "jamba": MOE | STATES | {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
                             "expert_layer_offset": 1, "mamba_dt_rank": 4},
    "bamba": STATES | {"attn_layer_indices": [1]}, "granitemoehybrid": MOE | STATES | {
        "layer_types": ["mamba", "attention"], "shared_intermediate_size": 24},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "attention_window_size": 8, "lru_width": 32,
                        "num_hidden_layers": 2},
}


def make(kind: str, **changes: Any) -> Any:
    """The model of an architecture, random but with weights of a size that makes its logits differ.

    `changes` are further settings of its config.
    """
    torch.manual_seed(0)
    settings = COMMON | ARCHITECTURES[kind] | changes
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(
        kind, **{name: value for name, value in settings.items() if value is not LEFT_OUT}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()
