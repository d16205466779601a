"""Writes tests/vectors/models/<name>/: tiny random models and the logits that transformers computes for them.

Needs torch and transformers; the result is committed, so running it again is only needed for a new case:

    python tests/reference/make_logits.py [NAME...]

Each folder holds config.json and model.safetensors (f32, < 60 kB); <name>-expected.safetensors beside it `ids` (T,) and `logits` (T, vocab).
T = 77 runs over a tile of 64 positions.
"""

import json
import pathlib
import sys

import torch
import transformers
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

OUT = pathlib.Path(__file__).resolve().parent.parent / "vectors" / "models"
TOKENS = 77
COMMON = dict(num_hidden_layers=2, max_position_embeddings=256, bos_token_id=1, eos_token_id=2, rms_norm_eps=1e-5)
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}

# Of the architectures beyond these two: small enough that all of them are a few files of a few kB.
TINY = dict(vocab_size=29, hidden_size=16, intermediate_size=17, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, **COMMON)


VISION = dict(hidden_size=8, intermediate_size=9, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4)


def tiny(name, config=None, **kw):
    return getattr(transformers, f"{name}ForCausalLM"), getattr(transformers, config or f"{name}Config")(**{**TINY, **kw})


# name -> model class, config, whether config.json is rewritten with the keys of transformers 4
CASES = {
    "llama-tied": (LlamaForCausalLM, LlamaConfig(
        vocab_size=67, hidden_size=24, intermediate_size=37, num_attention_heads=4, num_key_value_heads=2,
        tie_word_embeddings=True, **COMMON), False),
    "llama-untied-bias": (LlamaForCausalLM, LlamaConfig(
        vocab_size=61, hidden_size=18, intermediate_size=33, num_attention_heads=3, num_key_value_heads=3, attention_bias=True,
        mlp_bias=True, tie_word_embeddings=False, **COMMON), True),
    "llama3-rope": (LlamaForCausalLM, LlamaConfig(
        vocab_size=67, hidden_size=20, intermediate_size=41, num_attention_heads=4, num_key_value_heads=1, head_dim=8,
        rope_parameters=dict(LLAMA3), tie_word_embeddings=False, **COMMON), True),
    "llama3-rope-v5": (LlamaForCausalLM, LlamaConfig(
        vocab_size=67, hidden_size=20, intermediate_size=41, num_attention_heads=4, num_key_value_heads=2, head_dim=6,
        rope_parameters=dict(LLAMA3), tie_word_embeddings=True, **COMMON), False),
    "mistral-window": (MistralForCausalLM, MistralConfig(
        vocab_size=53, hidden_size=20, intermediate_size=35, num_attention_heads=4, num_key_value_heads=2, head_dim=10,
        sliding_window=5, tie_word_embeddings=False, **COMMON), False),
    "mistral-full": (MistralForCausalLM, MistralConfig(
        vocab_size=67, hidden_size=24, intermediate_size=31, num_attention_heads=4, num_key_value_heads=1,
        sliding_window=None, tie_word_embeddings=True, **COMMON), True),
    "smollm3": (*tiny("SmolLM3", num_hidden_layers=3, no_rope_layer_interval=2, tie_word_embeddings=True), False),
    "qwen2-window": (*tiny("Qwen2", use_sliding_window=True, sliding_window=5, max_window_layers=1), True),
    "qwen2-yarn": (*tiny("Qwen2", tie_word_embeddings=True, hidden_size=24, rope_parameters={
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}), True),
    "qwen3": (*tiny("Qwen3", head_dim=6, tie_word_embeddings=True), True),
    "gemma2": (*tiny("Gemma2", head_dim=6, sliding_window=5, query_pre_attn_scalar=9, attn_logit_softcapping=2.0,
                     final_logit_softcapping=4.0), True),
    "gemma3": (*tiny("Gemma3", "Gemma3TextConfig", num_hidden_layers=3, head_dim=6, sliding_window=5, sliding_window_pattern=2,
                     query_pre_attn_scalar=9), True),
    "gemma3-vision": (transformers.Gemma3ForConditionalGeneration, transformers.Gemma3Config(
        text_config=transformers.Gemma3TextConfig(**{**TINY, "num_hidden_layers": 3, "head_dim": 6, "sliding_window": 5,
                                                     "sliding_window_pattern": 2, "query_pre_attn_scalar": 9}),
        vision_config=transformers.SiglipVisionConfig(**VISION), mm_tokens_per_image=4, boi_token_index=26, eoi_token_index=27,
        image_token_index=28), True),
    "granite": (*tiny("Granite", embedding_multiplier=1.7, residual_multiplier=0.6, attention_multiplier=0.3, logits_scaling=0.8),
                False),
    "olmo2": (*tiny("Olmo2"), False),
    "phi3": (*tiny("Phi3", hidden_size=24, sliding_window=50, original_max_position_embeddings=64, rope_parameters={
        "rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.75, "short_factor": [1.0, 1.1],
        "long_factor": [1.5, 4.0], "original_max_position_embeddings": 64}), True),
}


def randomise(model, seed):
    """Weights large enough that every part of the model shows in the logits."""
    ones = not type(model).__name__.startswith("Gemma")  # whose norms add 1 to their weights
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(ones + 0.2 * noise if "norm" in name else 0.3 * noise)


def rewrite_as_v4(path):
    whole = json.loads(path.read_text())
    config = whole.get("text_config", whole)
    rope = config.pop("rope_parameters")
    if "full_attention" in rope:  # Gemma 3
        config["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        config["sliding_window_pattern"] = config.pop("_sliding_window_pattern")
        rope = rope["full_attention"]
    config.pop("layer_types", None)  # so that the rule of the architecture counts
    config["rope_theta"] = rope.pop("rope_theta")
    if "partial_rotary_factor" in rope:
        config["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
    config["rope_scaling"] = rope if rope["rope_type"] != "default" else None
    path.write_text(json.dumps(whole, indent=2, sort_keys=True) + "\n")


def main():
    torch.set_num_threads(1)
    for seed, (name, (cls, config, v4)) in enumerate(CASES.items()):
        if sys.argv[1:] and name not in sys.argv[1:]:
            continue
        config._attn_implementation = "eager"
        model = cls(config).float().eval()
        randomise(model, seed)
        folder = OUT / name
        model.save_pretrained(folder)
        ids = torch.randint(config.get_text_config().vocab_size, (TOKENS,), generator=torch.Generator().manual_seed(100 + seed))
        with torch.no_grad():
            logits = model(ids[None]).logits[0]
        save_file({"ids": ids.to(torch.int32), "logits": logits.contiguous()}, OUT / f"{name}-expected.safetensors")
        if v4:
            rewrite_as_v4(folder / "config.json")
        print(name, (folder / "model.safetensors").stat().st_size, "bytes, logits up to", float(logits.abs().max()))


if __name__ == "__main__":
    main()
