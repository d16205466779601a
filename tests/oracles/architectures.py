"""Tiny random models of every architecture, built by transformers: the cases of the oracle tests."""

import torch
import transformers as t

TOKENS = 90  # over a tile of 64 positions, and longer than every window
COMMON = dict(num_hidden_layers=2, max_position_embeddings=256, bos_token_id=1, eos_token_id=None, pad_token_id=0)
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}


def model(name, **kw):
    """Class and configuration, by the stem of transformers' class names."""
    config = getattr(t, f"{name}Config") if name != "Gemma3" else t.Gemma3TextConfig
    return getattr(t, f"{name}ForCausalLM"), config, {**COMMON, **kw}


def longrope(pairs, original):
    return {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1 + 0.1 * i for i in range(pairs)],
            "long_factor": [2 + 0.7 * i for i in range(pairs)], "original_max_position_embeddings": original}


S = dict(vocab_size=97, hidden_size=36, intermediate_size=51, num_attention_heads=6, num_key_value_heads=3)
VISION = t.SiglipVisionConfig(hidden_size=8, intermediate_size=9, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4)
ALTERNATE = ["sliding_attention", "full_attention"]

CASES = {
    "llama-tied": model("Llama", vocab_size=97, hidden_size=48, intermediate_size=77, num_attention_heads=4, tie_word_embeddings=True),
    "llama-untied-gqa2": model("Llama", vocab_size=131, hidden_size=40, intermediate_size=131, num_attention_heads=4, num_key_value_heads=2),
    "llama-gqa4-head-dim": model("Llama", vocab_size=97, hidden_size=40, intermediate_size=51, num_attention_heads=4, num_key_value_heads=1,
                                 head_dim=16, rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
    "llama-biases": model("Llama", **{**S, "num_attention_heads": 3}, attention_bias=True, mlp_bias=True),
    "llama3-rope": model("Llama", vocab_size=97, hidden_size=64, intermediate_size=51, num_attention_heads=8, num_key_value_heads=2,
                         rope_parameters=LLAMA3, tie_word_embeddings=True),
    "linear-rope": model("Llama", **S, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5}),
    "dynamic-rope": model("Llama", **{**S, "head_dim": 10, "max_position_embeddings": 64},
                          rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 3.0}),
    "dynamic-rope-short": model("Llama", **{**S, "max_position_embeddings": 128}, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 3.0}),
    "yarn-rope": model("Llama", **{**S, "head_dim": 16}, rope_parameters=YARN),
    "yarn-rope-betas": model("Qwen2", **{**S, "head_dim": 16}, rope_parameters={**YARN, "beta_fast": 20.0, "beta_slow": 2.0, "truncate": False}),
    "yarn-rope-mscale": model("Llama", **{**S, "head_dim": 12}, rope_parameters={**YARN, "mscale": 0.7, "mscale_all_dim": 0.4}),
    "yarn-rope-factor": model("Llama", **{**S, "head_dim": 12}, rope_parameters={**YARN, "attention_factor": 1.3}),
    "longrope-long": model("Llama", **{**S, "head_dim": 12}, rope_parameters=longrope(6, 64)),
    "longrope-short": model("Llama", **{**S, "head_dim": 12}, rope_parameters=longrope(6, 128)),
    "mistral-window": model("Mistral", **{**S, "num_attention_heads": 4, "num_key_value_heads": 2}, head_dim=14, sliding_window=9),
    "mistral-no-window": model("Mistral", **S, sliding_window=None, tie_word_embeddings=True),
    "smollm3": model("SmolLM3", **S, num_hidden_layers=5, tie_word_embeddings=True),
    "smollm3-window": model("SmolLM3", **S, num_hidden_layers=3, no_rope_layers=[0, 1, 0], use_sliding_window=True, sliding_window=11),
    "qwen2": model("Qwen2", **S),
    "qwen2-window": model("Qwen2", **S, num_hidden_layers=3, use_sliding_window=True, sliding_window=7, max_window_layers=1, tie_word_embeddings=True),
    "qwen2-layer-types": model("Qwen2", **S, num_hidden_layers=3, use_sliding_window=True, sliding_window=7,
                               layer_types=["sliding_attention", "full_attention", "sliding_attention"]),
    "qwen3": model("Qwen3", **S, head_dim=14, tie_word_embeddings=True),
    "qwen3-bias-window": model("Qwen3", **S, head_dim=10, attention_bias=True, use_sliding_window=True, sliding_window=13, layer_types=ALTERNATE),
    "gemma2": model("Gemma2", **S, head_dim=14, sliding_window=11, query_pre_attn_scalar=20, num_hidden_layers=3,
                    attn_logit_softcapping=3.0, final_logit_softcapping=5.0),
    "gemma2-no-caps": model("Gemma2", **S, head_dim=8, sliding_window=11, attn_logit_softcapping=None, final_logit_softcapping=None),
    "gemma3": model("Gemma3", **S, head_dim=14, sliding_window=9, query_pre_attn_scalar=10, num_hidden_layers=3, sliding_window_pattern=3),
    "gemma3-linear": model("Gemma3", **S, head_dim=12, sliding_window=9, layer_types=ALTERNATE, rope_parameters={
        "full_attention": {"rope_type": "linear", "rope_theta": 50000.0, "factor": 8.0}, "sliding_attention": {"rope_type": "default", "rope_theta": 500.0}}),
    "gemma3-vision": (t.Gemma3ForConditionalGeneration, t.Gemma3Config, dict(
        text_config={**COMMON, **S, "head_dim": 14, "sliding_window": 9, "query_pre_attn_scalar": 10, "num_hidden_layers": 3,
                     "sliding_window_pattern": 3},
        vision_config=VISION, mm_tokens_per_image=4, boi_token_index=94, eoi_token_index=95, image_token_index=96, eos_token_id=None)),
    "phi3": model("Phi3", **{**S, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 40}, sliding_window=13),
    "phi3-longrope": model("Phi3", **{**S, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64},
                           original_max_position_embeddings=64, rope_parameters={**longrope(6, 64), "partial_rotary_factor": 0.75}),
    "phi3-short": model("Phi3", **{**S, "num_attention_heads": 3, "num_key_value_heads": 3}, tie_word_embeddings=True,
                        original_max_position_embeddings=128, rope_parameters=longrope(6, 128)),
    "granite": model("Granite", **S, embedding_multiplier=1.7, residual_multiplier=0.6, attention_multiplier=0.3, logits_scaling=0.8),
    "granite-defaults": model("Granite", **S, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "olmo2": model("Olmo2", **S),
    "olmo2-bias": model("Olmo2", **{**S, "num_key_value_heads": 6}, attention_bias=True, tie_word_embeddings=True),
}


def randomise(reference, seed):
    """Weights at which the logits spread (standard deviation 2 to 4) and every part of the model shows in them."""
    generator = torch.Generator().manual_seed(seed)
    ones = not type(reference).__name__.startswith("Gemma")  # whose norms add 1 to their weights
    with torch.no_grad():
        for name, p in reference.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(ones + 0.2 * noise if "norm" in name else 0.25 * noise)
        config = reference.config.get_text_config()
        ids = torch.randint(3, config.vocab_size, (TOKENS,), generator=generator)
        cap, config.final_logit_softcapping = getattr(config, "final_logit_softcapping", None), None
        spread = reference(ids[None]).logits.std()
        config.final_logit_softcapping = cap
        reference.get_input_embeddings().weight.mul_(3 / spread if config.tie_word_embeddings else 1)
        if not config.tie_word_embeddings:
            reference.get_output_embeddings().weight.mul_(3 / spread)
    return ids


def build(name):
    """Model in f32 and the ids to run."""
    cls, config, values = CASES[name]
    config = config(**values)
    config._attn_implementation = "eager"
    reference = cls(config).float().eval()
    return reference, randomise(reference, len(name))
