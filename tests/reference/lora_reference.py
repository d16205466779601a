"""Writes tests/vectors/lora: small bases, PEFT adapters of every kind that is read, and the task vectors that they stand for,
computed here in plain Python: d = scaling * B A, sums in f64 in the order of the rank, rounded once to f32.

    python3 tests/reference/lora_reference.py
"""

import json
import math
import pathlib
import random
import re
import struct

OUT = pathlib.Path(__file__).resolve().parent.parent / "vectors" / "lora"
HIDDEN, INNER, KV, VOCAB = 8, 12, 4, 11
PREFIX = "base_model.model."


def f32(x):
    return struct.unpack("<f", struct.pack("<f", x))[0]


def narrow(x, dtype):
    """(bytes, the value that they hold)"""
    if dtype == "F32":
        return struct.pack("<f", x), f32(x)
    if dtype == "F16":
        raw = struct.pack("<e", x)
        return raw, struct.unpack("<e", raw)[0]
    bits = struct.unpack("<I", struct.pack("<f", x))[0]
    bits = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16   # nearest, ties to even
    return struct.pack("<H", bits), struct.unpack("<f", struct.pack("<I", bits << 16))[0]


class Tensor:
    def __init__(self, shape, values, dtype="F32"):
        pairs = [narrow(v, dtype) for v in values]
        self.shape, self.dtype = list(shape), dtype
        self.raw = b"".join(p[0] for p in pairs)
        self.values = [p[1] for p in pairs]


def drawn(rng, shape, dtype="F32", size=1.0):
    return Tensor(shape, [rng.gauss(0, size) for _ in range(math.prod(shape))], dtype)


def write(path, tensors):
    header, at = {}, 0
    for name, t in tensors.items():
        header[name] = {"dtype": t.dtype, "shape": t.shape, "data_offsets": [at, at + len(t.raw)]}
        at += len(t.raw)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(t.raw for t in tensors.values()))


def llama(rng, dtype, tied=False, bias=False):
    t = {"model.embed_tokens.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,)}
    if not tied:
        t["lm_head.weight"] = (VOCAB, HIDDEN)
    for i in range(2):
        p = f"model.layers.{i}."
        t |= {p + "self_attn.q_proj.weight": (HIDDEN, HIDDEN), p + "self_attn.k_proj.weight": (KV, HIDDEN),
              p + "self_attn.v_proj.weight": (KV, HIDDEN), p + "self_attn.o_proj.weight": (HIDDEN, HIDDEN),
              p + "mlp.gate_proj.weight": (INNER, HIDDEN), p + "mlp.up_proj.weight": (INNER, HIDDEN),
              p + "mlp.down_proj.weight": (HIDDEN, INNER), p + "input_layernorm.weight": (HIDDEN,)}
        if bias:
            t[p + "self_attn.q_proj.bias"] = (HIDDEN,)
    return {name: drawn(rng, shape, dtype) for name, shape in sorted(t.items())}


def gpt2(rng, dtype):
    """Matrices as (in, out)."""
    return {"h.0.attn.c_attn.weight": drawn(rng, (HIDDEN, 3 * HIDDEN), dtype), "h.0.attn.c_proj.weight": drawn(rng, (HIDDEN, HIDDEN), dtype)}


def value_of(pattern, module, otherwise):
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return otherwise


def product(a, b, rank, scaling, rows, cols, transposed):
    """scaling * B A of A (rank, in), B (out, rank); transposed: (in, out)."""
    inner = len(a) // rank
    out = []
    for r in range(rows):
        for c in range(cols):
            o, i = (c, r) if transposed else (r, c)
            s = 0.0
            for k in range(rank):
                s += b[o * rank + k] * a[k * inner + i]
            out.append(f32(scaling * s))
    return out


class Case:
    def __init__(self, name, base, base_name, seed, dtype="F32", **config):
        self.name, self.base, self.base_name, self.dtype = name, base, base_name, dtype
        self.config = {"peft_type": "LORA", "r": 3, "lora_alpha": 8, "base_model_name_or_path": "nowhere", "bias": "none",
                       "fan_in_fan_out": False, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {},
                       "task_type": "CAUSAL_LM", "lora_dropout": 0.05, "inference_mode": True, "modules_to_save": None, **config}
        self.rng = random.Random(seed)
        self.adapter, self.d = {}, {}

    def factors(self, module, embedding=False):
        base = self.base[module + ".weight"] if module + ".weight" in self.base else self.base["model.embed_tokens.weight"]
        rank = value_of(self.config["rank_pattern"], module, self.config["r"])
        alpha = value_of(self.config["alpha_pattern"], module, self.config["lora_alpha"])
        scaling = alpha / (math.sqrt(rank) if self.config["use_rslora"] else rank)
        transposed = embedding or self.config["fan_in_fan_out"]
        rows, cols = base.shape
        inner, outer = (rows, cols) if transposed else (cols, rows)
        a, b = drawn(self.rng, (rank, inner), self.dtype, 0.2), drawn(self.rng, (outer, rank), self.dtype, 0.2)
        ends = (".lora_embedding_A", ".lora_embedding_B") if embedding else (".lora_A.weight", ".lora_B.weight")
        self.adapter[PREFIX + module + ends[0]], self.adapter[PREFIX + module + ends[1]] = a, b
        self.d[module + ".weight"] = product(a.values, b.values, rank, scaling, rows, cols, transposed)
        return self

    def whole(self, name, saved=None, dtype="F32"):
        base = self.base[name]
        t = drawn(self.rng, base.shape, dtype)
        self.adapter[PREFIX + (saved or name)] = t
        self.d[name] = [f32(e - b) for e, b in zip(t.values, base.values)]
        return self

    def unchanged(self, name, saved):
        self.adapter[PREFIX + saved] = self.base[name]
        return self

    def write(self):
        folder = OUT / self.name
        write(folder / "adapter_model.safetensors", dict(sorted(self.adapter.items())))
        (folder / "adapter_config.json").write_text(json.dumps(self.config, indent=1) + "\n")
        expected = {}
        names = set(self.base) | set(self.d)
        for name in sorted(names):
            base = self.base.get(name) or self.base["model.embed_tokens.weight"]
            expected[name] = Tensor(base.shape, self.d.get(name, [0.0] * len(base.values)))
        write(folder / "expected.safetensors", expected)
        return f"{self.name} {self.base_name}"


def main():
    rng = random.Random(20)
    bases = {"base-bf16": llama(rng, "BF16"), "base-f32": llama(rng, "F32", bias=True), "base-tied": llama(rng, "BF16", tied=True),
             "base-in-out": gpt2(rng, "F16")}
    for name, tensors in bases.items():
        write(OUT / name / "model.safetensors", tensors)
        (OUT / name / "config.json").write_text(json.dumps({"model_type": "gpt2" if name == "base-in-out" else "llama",
                                                            "tie_word_embeddings": name == "base-tied"}) + "\n")

    def on(base, name, **config):
        return Case(name, bases[base], base, name, **config)

    attention = [f"model.layers.{i}.self_attn.{m}_proj" for i in range(2) for m in "qv"]
    cases = [on("base-bf16", "plain"), on("base-f32", "rslora", use_rslora=True, dtype="BF16"),
             on("base-bf16", "patterns", dtype="F16", rank_pattern={"layers.1.self_attn.q_proj": 5, "down_proj": 2, r"^q_proj": 9},
                alpha_pattern={r"model.layers.\d+.mlp.[a-z]+_proj": 3.5, "v_proj": -1})]
    for case in cases:
        for module in attention:
            case.factors(module)
    cases[2].factors("model.layers.0.mlp.down_proj").factors("model.layers.1.mlp.up_proj")
    cases.append(on("base-f32", "wide", r=130).factors("model.layers.0.mlp.gate_proj"))
    cases.append(on("base-f32", "whole", bias="all", modules_to_save=["lm_head", "norm"]).factors("model.layers.0.self_attn.q_proj")
                 .whole("lm_head.weight", dtype="BF16").whole("model.norm.weight")
                 .whole("model.layers.0.self_attn.q_proj.bias", "model.layers.0.self_attn.q_proj.base_layer.bias")
                 .whole("model.layers.1.self_attn.q_proj.bias"))
    cases.append(on("base-bf16", "embedding").factors("model.embed_tokens", embedding=True)
                 .unchanged("model.embed_tokens.weight", "model.embed_tokens.base_layer.weight").factors("model.layers.0.self_attn.o_proj"))
    tied = on("base-tied", "tied-embedding").factors("model.embed_tokens", embedding=True)
    tied.d["lm_head.weight"] = [0.0] * (VOCAB * HIDDEN)
    cases += [tied, on("base-tied", "tied-head").factors("lm_head"), on("base-tied", "tied-untouched").factors("model.layers.1.mlp.up_proj"),
              on("base-in-out", "in-out", fan_in_fan_out=True).factors("h.0.attn.c_attn").factors("h.0.attn.c_proj")]
    (OUT / "cases.txt").write_text("".join(case.write() + "\n" for case in cases))


if __name__ == "__main__":
    main()
