"""Plain NumPy versions of what the tests compare with, written from the formulas and file formats, not from the library."""

import json
import pathlib
import struct

import numpy as np

DTYPES = {"F32": "<f4", "F16": "<f2", "F64": "<f8", "U8": "u1", "I32": "<i4", "I64": "<i8", "BF16": "<u2"}


# ---- safetensors: 8 bytes of header length, a JSON header, the bytes ----

def read_safetensors(path):
    """{name: (dtype, shape, bytes)}"""
    blob = pathlib.Path(path).read_bytes()
    size = struct.unpack("<Q", blob[:8])[0]
    header = json.loads(blob[8:8 + size])
    header.pop("__metadata__", None)
    body = blob[8 + size:]
    return {name: (t["dtype"], tuple(t["shape"]), body[t["data_offsets"][0]:t["data_offsets"][1]]) for name, t in header.items()}


def widen(dtype, shape, data):
    """Bytes of a float tensor as float32: bf16 is the upper half of an f32."""
    raw = np.frombuffer(data, DTYPES[dtype])
    if dtype == "BF16":
        return (raw.astype(np.uint32) << 16).view(np.float32).reshape(shape)
    return raw.astype(np.float32).reshape(shape)


def load(path):
    """All tensors of a checkpoint folder or file as float32."""
    path = pathlib.Path(path)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    return {name: widen(*tensor) for file in files for name, tensor in read_safetensors(file).items()}


def to_bf16(x):
    """Round to nearest, ties to even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def rounded(x, dtype):
    """float32 -> dtype -> float32."""
    if dtype == "BF16":
        return (to_bf16(x).astype(np.uint32) << 16).view(np.float32).reshape(x.shape)
    return x.astype(DTYPES[dtype]).astype(np.float32)


def write_safetensors(path, tensors, dtype="F32"):
    header, body = {}, b""
    for name, x in tensors.items():
        x = np.asarray(x, np.float32)
        data = to_bf16(x).tobytes() if dtype == "BF16" else x.astype(DTYPES[dtype]).tobytes()
        header[name] = {"dtype": dtype, "shape": list(x.shape), "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    pathlib.Path(path).write_bytes(struct.pack("<Q", len(text)) + text + body)


def write_folder(folder, tensors, dtype="F32", config=None):
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config or {"model_type": "llama", "tie_word_embeddings": True}))
    write_safetensors(folder / "model.safetensors", tensors, dtype)
    return folder


# ---- planes ----

def unpack_signs(signs, cols):
    """(rows, row bytes) packed, least significant bit first -> (rows, cols) of +1 and -1."""
    bits = np.unpackbits(np.asarray(signs), axis=1, bitorder="little")
    assert not bits[:, cols:].any(), "padding bits must be zero"
    return np.where(bits[:, :cols], 1.0, -1.0)


def spread(alphas, rows, cols, scale):
    """Scales as a (rows, cols) array: one for the matrix, one per row, or one per row and group of columns."""
    alphas = np.asarray(alphas, np.float64)
    if scale == "matrix":
        return np.full((rows, cols), alphas[0])
    if scale == "row":
        return np.repeat(alphas[:, None], cols, axis=1)
    width = int(scale.split(":")[1])
    groups = -(-cols // width)
    return np.repeat(alphas.reshape(rows, groups), width, axis=1)[:, :cols]


# ---- the dynamic merge ----

def ties(values):
    """Elect the sign of the sum; mean of the values that have it; 0 where the sum is 0."""
    total = np.zeros_like(values[0])
    for v in values:
        total = total + v
    kept, count = np.zeros_like(total), np.zeros_like(total)
    for v in values:
        agrees = (total != 0) & (np.sign(v) == np.sign(total))
        kept = kept + np.where(agrees, v, 0)
        count = count + agrees
    return kept / np.maximum(count, 1)


def merged_delta(deltas, weights, lam, reading, trim=lambda x, k, j: x):
    """sum_k w_k (d_k + lambda TIES of the others); deltas in pack order, f64.  trim(x, k, j): vector j as seen from k."""
    out = np.zeros_like(deltas[0])
    for k, w in enumerate(weights):
        if w == 0:
            continue
        others = [trim(d - deltas[k] if reading == "recomputed" else d, k, j) for j, d in enumerate(deltas) if j != k]
        out = out + w * (deltas[k] + (lam * ties(others) if lam and others else 0))
    return out


def trim_top(x, density):
    """Keep the max(1, floor(density n)) greatest magnitudes; of equal ones those with the lowest index."""
    flat = x.reshape(-1)
    k = max(1, int(np.floor(density * flat.size)))
    keep = np.argsort(-np.abs(flat), kind="stable")[:k]
    out = np.zeros_like(flat)
    out[keep] = flat[keep]
    return out.reshape(x.shape)


def log_softmax(logits):
    x = np.asarray(logits, np.float64)
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))
