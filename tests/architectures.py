"""Tiny random configurations of transformers' causal language models, for every test that goes over architectures."""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

VOCABULARY = 31
_SIZE = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
_LLAMA = _SIZE | {"num_key_value_heads": 2, "max_position_embeddings": 32, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
_HEAD = _LLAMA | {"head_dim": 4}
_GPT2 = {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32, "bos_token_id": 0, "eos_token_id": 0}
_MPT = {"vocab_size": VOCABULARY, "d_model": 16, "n_layers": 2, "n_heads": 4, "max_seq_len": 32}
_BERT = _SIZE | {"max_position_embeddings": 32, "is_decoder": True, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
_MAMBA2 = {"num_heads": 4, "head_dim": 8, "n_groups": 1, "state_size": 4, "chunk_size": 4}
_DECODER = {"vocab_size": VOCABULARY, "d_model": 16, "max_position_embeddings": 32}
_MLA = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 4}
_DBRX = {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2}
_ZAMBA = {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2, "mamba_d_state": 4, "mamba_dt_rank": 4}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
_ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "first_k_dense_replace": 1, "n_shared_experts": 1}

_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "arcee": ("Arcee", _HEAD),
    "apertus": ("Apertus", _LLAMA),
    "bamba": ("Bamba", _LLAMA | {"mamba_n_heads": 8, "mamba_d_head": 4, "mamba_d_state": 4, "attn_layer_indices": [1]}),
    "bart": ("Bart", _DECODER | {"decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 24, "encoder_layers": 1}),
    "bert": ("Bert", _BERT),
    "bert_generation": ("BertGeneration", _BERT),
    "biogpt": ("BioGpt", _SIZE | {"max_position_embeddings": 32}),
    "bitnet": ("BitNet", _LLAMA),
    "bloom": ("Bloom", {"vocab_size": VOCABULARY, "hidden_size": 16, "n_layer": 2, "n_head": 4}),
    "codegen": ("CodeGen", _GPT2 | {"rotary_dim": 4}),
    "cohere": ("Cohere", _LLAMA),
    "cohere2": ("Cohere2", _LLAMA | {"sliding_window": 4}),
    "ctrl": ("CTRL", {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32, "dff": 24}),
    "dbrx": (
        "Dbrx",
        _MPT
        | {
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
            "ffn_config": _DBRX,
        },
    ),
    "deepseek_v2": ("DeepseekV2", _LLAMA | _MLA | _ROUTED | {"num_key_value_heads": 4, "topk_group": 1, "n_group": 1}),
    "deepseek_v3": ("DeepseekV3", _LLAMA | _MLA | _ROUTED | {"num_key_value_heads": 4, "topk_group": 1, "n_group": 1}),
    "diffllama": ("DiffLlama", _LLAMA),
    "electra": ("Electra", _BERT | {"embedding_size": 16}),
    "ernie4_5": ("Ernie4_5", _HEAD),
    "exaone4": ("Exaone4", _LLAMA | {"sliding_window": 4, "sliding_window_pattern": 2}),
    "falcon": ("Falcon", _SIZE | {"bos_token_id": 0, "eos_token_id": 0}),
    "falcon_heads": ("Falcon", _SIZE | {"multi_query": False, "bos_token_id": 0, "eos_token_id": 0}),
    "falcon_new": ("Falcon", _SIZE | {"new_decoder_architecture": True, "num_kv_heads": 2, "bos_token_id": 0, "eos_token_id": 0}),
    "falcon_h1": ("FalconH1", _HEAD | {"mamba_n_heads": 4, "mamba_d_head": 4, "mamba_d_ssm": 16, "mamba_d_state": 4}),
    "falcon_mamba": ("FalconMamba", {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}),
    "gemma": ("Gemma", _HEAD),
    "gemma2": ("Gemma2", _HEAD),
    "gemma3": ("Gemma3Text", _HEAD),
    "glm": ("Glm", _HEAD),
    "glm4": ("Glm4", _HEAD),
    "glm4_moe": ("Glm4Moe", _HEAD | _ROUTED),
    "gpt2": ("GPT2", _GPT2),
    "gpt_bigcode": ("GPTBigCode", _GPT2),
    "gpt_bigcode_24": ("GPTBigCode", _GPT2 | {"n_embd": 48}),
    "gpt_bigcode_heads": ("GPTBigCode", _GPT2 | {"multi_query": False}),
    "gpt_neo": (
        "GPTNeo",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 16,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 4,
            "max_position_embeddings": 32,
        },
    ),
    "gpt_neox": ("GPTNeoX", _SIZE | {"max_position_embeddings": 32}),
    "gpt_neox_japanese": (
        "GPTNeoXJapanese",
        {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 32},
    ),
    "gpt_oss": ("GptOss", _HEAD | {"num_local_experts": 4}),
    "gptj": ("GPTJ", _GPT2 | {"rotary_dim": 4}),
    "granite": ("Granite", _LLAMA),
    "granitemoe": ("GraniteMoe", _LLAMA | {"num_local_experts": 4}),
    "granitemoeshared": ("GraniteMoeShared", _LLAMA | {"num_local_experts": 4, "shared_intermediate_size": 8}),
    "helium": ("Helium", _HEAD),
    "hunyuan": ("HunYuanDenseV1", _HEAD),
    "jamba": ("Jamba", _LLAMA | {"num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4, "mamba_dt_rank": 4}),
    "jetmoe": ("JetMoe", _LLAMA | {"kv_channels": 4, "num_local_experts": 4, "num_key_value_heads": 2}),
    "lfm2": ("Lfm2", _LLAMA),
    "llama": ("Llama", _LLAMA),
    "llama4": ("Llama4Text", _HEAD | {"intermediate_size_mlp": 24, "num_local_experts": 4}),
    "mamba": ("Mamba", {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}),
    "mamba2": ("Mamba2", {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, **_MAMBA2}),
    "minimax": ("MiniMax", _HEAD | {"num_local_experts": 2, "layer_types": ["linear_attention", "full_attention"], "block_size": 8}),
    "ministral": ("Ministral", _HEAD),
    "mistral": ("Mistral", _LLAMA | {"sliding_window": 4}),
    "mixtral": ("Mixtral", _LLAMA | {"num_local_experts": 4}),
    "mpt": ("Mpt", _MPT),
    "nemotron": ("Nemotron", _LLAMA),
    "olmo": ("Olmo", _LLAMA),
    "olmo2": ("Olmo2", _LLAMA),
    "olmo3": ("Olmo3", _LLAMA | {"sliding_window": 4}),
    "olmoe": ("Olmoe", _LLAMA | {"num_experts": 4, "num_experts_per_tok": 2}),
    "openai_gpt": ("OpenAIGPT", {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32}),
    "opt": (
        "OPT",
        _SIZE | {"ffn_dim": 24, "max_position_embeddings": 32, "word_embed_proj_dim": 16, "bos_token_id": 0, "eos_token_id": 0},
    ),
    "persimmon": ("Persimmon", _SIZE | {"max_position_embeddings": 32, "bos_token_id": 0, "eos_token_id": 0}),
    "phi": ("Phi", _LLAMA),
    "phi3": ("Phi3", _LLAMA),
    "phimoe": ("Phimoe", _LLAMA | {"num_local_experts": 4}),
    "qwen2": ("Qwen2", _LLAMA),
    "qwen2_moe": ("Qwen2Moe", _LLAMA | _EXPERTS | {"shared_expert_intermediate_size": 8}),
    "qwen3": ("Qwen3", _HEAD),
    "qwen3_moe": ("Qwen3Moe", _HEAD | _EXPERTS),
    "recurrent_gemma": ("RecurrentGemma", _HEAD | {"lru_width": 16, "attention_window_size": 8, "conv1d_width": 2}),
    "roberta": ("Roberta", _BERT),
    "rwkv": ("Rwkv", {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "attention_hidden_size": 16}),
    "seed_oss": ("SeedOss", _HEAD),
    "smollm3": ("SmolLM3", _LLAMA),
    "stablelm": ("StableLm", _LLAMA),
    "starcoder2": ("Starcoder2", _LLAMA),
    "xglm": ("XGLM", {"vocab_size": VOCABULARY, "d_model": 16, "ffn_dim": 24, "num_layers": 2, "attention_heads": 4}),
    "xlnet": ("XLNet", {"vocab_size": VOCABULARY, "d_model": 16, "n_layer": 2, "n_head": 4, "d_inner": 24}),
    "zamba": (
        "Zamba",
        _LLAMA
        | {
            "attention_hidden_size": 32,
            "num_hidden_layers": 4,
            "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
            "mamba_d_state": 4,
            "mamba_dt_rank": 4,
            "n_mamba_heads": 2,
        },
    ),
}
"""Name → what comes before `Config` in its class's name, and the fields."""


def names() -> list[str]:
    """The architectures that the installed transformers has; none of them is imported for it."""
    available = set(dir(transformers))
    return [name for name, (family, _) in _FAMILIES.items() if f"{family}Config" in available]


def config(name: str) -> PretrainedConfig:
    """A tiny configuration of an architecture."""
    family, fields = _FAMILIES[name]
    kind: Callable[..., PretrainedConfig] = getattr(transformers, f"{family}Config")
    return kind(**fields)


def random_model(config: PretrainedConfig, *, scale: float = 0.2) -> nn.Module:
    """A causal language model in evaluation mode, its matrices normal around 0 and its vectors between 0.5 and 1."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, scale) if parameter.dim() > 1 else parameter.uniform_(0.5, 1)
    return model
