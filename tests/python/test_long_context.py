"""Prompts of thousands of tokens against attention as it is published, with all keys of a query at once."""

import numpy as np
import pytest

import onebitmerge as obm
import plain

TOKENS, VOCAB, HIDDEN, HEADS, KV_HEADS, DIM, WIDE, THETA, EPS = 2500, 50, 48, 4, 2, 16, 64, 10000.0, 1e-5
SHARP = ("self_attn.q_proj", "self_attn.k_proj")   # large enough for scores that single keys stand out by
# Ends of tiles of 64, of chunks of a prompt, of windows, and anything between.
POSITIONS = np.unique(np.concatenate([[0, 1, 63, 64, 999, 1000, 1001, 2047, 2048, TOKENS - 1],
                                      np.random.default_rng(3).integers(0, TOKENS, 16)]))


def config(kind, window):
    more = {"sliding_window": window} if kind == "mistral" else {}
    return {"model_type": kind, "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": WIDE, "num_hidden_layers": 2,
            "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": DIM, "max_position_embeddings": 32768,
            "rms_norm_eps": EPS, "rope_theta": THETA, "hidden_act": "silu", "tie_word_embeddings": True, **more}


def weights(rng):
    shapes = {"self_attn.q_proj": (HEADS * DIM, HIDDEN), "self_attn.k_proj": (KV_HEADS * DIM, HIDDEN), "self_attn.v_proj": (KV_HEADS * DIM, HIDDEN),
              "self_attn.o_proj": (HIDDEN, HEADS * DIM), "mlp.gate_proj": (WIDE, HIDDEN), "mlp.up_proj": (WIDE, HIDDEN),
              "mlp.down_proj": (HIDDEN, WIDE)}
    t = {"model.embed_tokens.weight": rng.normal(0, 1, (VOCAB, HIDDEN)), "model.norm.weight": np.ones(HIDDEN)}
    for layer in range(2):
        for name, shape in shapes.items():
            t[f"model.layers.{layer}.{name}.weight"] = rng.normal(0, (2 if name in SHARP else 1) / np.sqrt(shape[1]), shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            t[f"model.layers.{layer}.{name}.weight"] = rng.uniform(0.5, 1.5, HIDDEN)
    return {name: x.astype(np.float32) for name, x in t.items()}


def norm(x, w):
    return x / np.sqrt((x * x).mean(axis=1, keepdims=True) + EPS) * w


def rope(x, positions):   # (n, heads, dim): halves rotated, angle p / theta^(2j/dim)
    angle = positions[:, None] / THETA ** (np.arange(0, DIM, 2) / DIM)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    a, b = x[..., :DIM // 2], x[..., DIM // 2:]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def layer_at(w, h, at, window):
    """Rows `at` of a layer's result in float64; h: (TOKENS, HIDDEN), what all tokens bring."""
    x = norm(h, w["input_layernorm"])
    q, k, v = ((y @ w[f"self_attn.{p}_proj"].T).reshape(len(y), -1, DIM) for p, y in (("q", x[at]), ("k", x), ("v", x)))
    q, k = rope(q, at), rope(k, np.arange(len(x)))
    behind = at[:, None] - np.arange(len(x))
    seen = (behind >= 0) & (behind < window)
    mixed = np.zeros_like(q)
    for head in range(HEADS):
        group = head * KV_HEADS // HEADS
        s = np.where(seen, q[:, head] @ k[:, group].T / np.sqrt(DIM), -np.inf)
        mixed[:, head] = np.exp(plain.log_softmax(s)) @ v[:, group]
    h = h[at] + mixed.reshape(len(at), -1) @ w["self_attn.o_proj"].T
    x = norm(h, w["post_attention_layernorm"])
    gate = x @ w["mlp.gate_proj"].T
    return h + (gate / (1 + np.exp(-gate)) * (x @ w["mlp.up_proj"].T)) @ w["mlp.down_proj"].T


@pytest.mark.parametrize("kind, window", [("llama", TOKENS), ("mistral", 1000)])
def test_long_prompts(tmp_path, kind, window):
    rng = np.random.default_rng(1)
    t = weights(rng)
    ids = rng.integers(0, VOCAB, TOKENS).tolist()
    model = obm.Model(plain.write_folder(tmp_path / "m", t, config=config(kind, window)))
    h = t["model.embed_tokens.weight"][ids].astype(np.float64)
    for layer in range(2):   # of what the layer really got, so that few queries are enough
        w = {name.split(".", 3)[3].removesuffix(".weight"): x.astype(np.float64) for name, x in t.items() if f".layers.{layer}." in name}
        want, h = layer_at(w, h, POSITIONS, window), model.hidden(ids, layer + 1).astype(np.float64)
        assert np.abs(h[POSITIONS] - want).max() < 1e-4 * np.abs(want).max()
    want = norm(h[-1:], t["model.norm.weight"]) @ t["model.embed_tokens.weight"].T.astype(np.float64)
    assert np.abs(model.logits(ids, all=False) - want[0]).max() < 1e-4 * np.abs(want).max()
    half = np.abs(model.logits(ids, all=False, kv="f16") - want[0]).max() / want.std()   # keys and values off by 2^-11 of themselves
    assert 0 < half < 2e-2
