"""Tiny random language models of a vocabulary that a tokenizer fills, with what they are built of differently."""

import torch
import transformers as T
from torch import nn

SIZE = {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
SHARED = {**SIZE, "num_key_value_heads": 2, "max_position_embeddings": 64}
HEADS = {**SHARED, "head_dim": 4}
GPT = {"vocab_size": 300, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64}
ENDS = {"bos_token_id": 0, "eos_token_id": 0}
TABLE = {"vocab_size": 300, "max_position_embeddings": 64, **ENDS}

CONFIGS = {
    "gpt2": lambda: T.GPT2Config(**GPT, **ENDS),
    "gptj": lambda: T.GPTJConfig(**GPT, rotary_dim=4, **ENDS),
    "gpt_neox": lambda: T.GPTNeoXConfig(**SIZE, max_position_embeddings=64, **ENDS),
    "bloom": lambda: T.BloomConfig(vocab_size=300, hidden_size=16, n_layer=2, n_head=4, **ENDS),
    "mpt": lambda: T.MptConfig(vocab_size=300, d_model=16, n_layers=2, n_heads=4, max_seq_len=64),
    "falcon": lambda: T.FalconConfig(vocab_size=300, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, **ENDS),
    "opt": lambda: T.OPTConfig(hidden_size=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=16, **TABLE),
    "xglm": lambda: T.XGLMConfig(d_model=16, ffn_dim=24, num_layers=2, attention_heads=4, **TABLE),
    "llama": lambda: T.LlamaConfig(**SHARED, **ENDS),
    "mixtral": lambda: T.MixtralConfig(**SHARED, num_local_experts=4, **ENDS),
    "qwen3": lambda: T.Qwen3Config(**HEADS, **ENDS),
    "gemma": lambda: T.GemmaConfig(**HEADS, **ENDS),
    "gemma2": lambda: T.Gemma2Config(**HEADS, final_logit_softcapping=None, **ENDS),
    "gemma3": lambda: T.Gemma3TextConfig(**HEADS, **ENDS),
    "phi": lambda: T.PhiConfig(**SHARED, **ENDS),
    "olmo": lambda: T.OlmoConfig(**SHARED, **ENDS),
    "olmo2": lambda: T.Olmo2Config(**SHARED, **ENDS),
    "cohere": lambda: T.CohereConfig(**SHARED, **ENDS),
    "granite": lambda: T.GraniteConfig(**SHARED, embedding_multiplier=12.0, residual_multiplier=0.2, logits_scaling=8.0, **ENDS),
    "starcoder2": lambda: T.Starcoder2Config(**SHARED, **ENDS),
    "nemotron": lambda: T.NemotronConfig(**SHARED, **ENDS),
    "stablelm": lambda: T.StableLmConfig(**SHARED, **ENDS),
    "glm4": lambda: T.Glm4Config(**HEADS, pad_token_id=0, **ENDS),
    "gpt1": lambda: T.OpenAIGPTConfig(**GPT),
    "rwkv": lambda: T.RwkvConfig(vocab_size=300, hidden_size=16, num_hidden_layers=2, attention_hidden_size=16),
}


def random_model(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = T.AutoModelForCausalLM.from_config(CONFIGS[name]()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3) if parameter.dim() > 1 else parameter.uniform_(0.3, 1)
    return model
