#!/usr/bin/env python3
"""Small safetensors files, sound and hostile, by name.  Writes the first two kinds as the fuzzer's corpus; the oracle test
compares verdicts on all.

Usage: make_safetensors.py [FOLDER]        (default: tests/fuzz/corpus/safetensors)
"""
import json
import struct
import sys
from pathlib import Path


def pack(header, data=b""):
    """A file of this header (text, bytes, or what becomes JSON) and these bytes of data."""
    if not isinstance(header, (str, bytes)):
        header = json.dumps(header, separators=(",", ":"))
    if isinstance(header, str):
        header = header.encode()
    return struct.pack("<Q", len(header)) + header + data


def tensor(dtype, shape, begin, end):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def one(dtype, shape, begin, end, size, **more):
    return pack({"a": tensor(dtype, shape, begin, end), **more}, bytes(range(size)))


SOUND = {
    "empty": pack({}),
    "scalar": one("F32", [], 0, 4, 4),
    "matrix": one("BF16", [2, 3], 0, 12, 12, __metadata__={"format": "pt"}),
    "two": pack({"b": tensor("F16", [2], 8, 12), "a": tensor("F64", [1], 0, 8)}, bytes(12)),
    "zero_rows": one("I64", [0, 5], 0, 0, 0),
    "empty_between": pack({"a": tensor("U8", [2], 0, 2), "e": tensor("U8", [0], 2, 2), "b": tensor("U8", [1], 2, 3)}, bytes(3)),
    "padded": pack(json.dumps({"a": tensor("U8", [1], 0, 1)}) + " " * 5, b"\1"),
    "odd": pack(json.dumps({"a": tensor("F32", [1], 0, 4)}) + " " * (1 - len(json.dumps({"a": tensor("F32", [1], 0, 4)})) % 2),
                bytes(4)),
    "names": pack({"ä/..\n\u0001": tensor("BOOL", [1], 0, 1), "": tensor("I8", [1], 1, 2)}, bytes(2)),
    "float8": pack({"a": tensor("F8_E4M3", [1], 0, 1), "b": tensor("F8_E5M2", [1], 1, 2)}, bytes(2)),
}

HOSTILE = {
    "no_length": b"\2\0\0",
    "length_too_large": struct.pack("<Q", 1 << 63) + b"{}",
    "length_beyond_file": struct.pack("<Q", 3) + b"{}",
    "not_an_object": pack("[]"),
    "not_utf8": pack(b'{"\xff":1}'),
    "deep": pack('{"a":' + "[" * 150),
    "unknown_dtype": one("F99", [1], 0, 1, 1),
    "negative_dim": one("U8", [-1], 0, 1, 1),
    "fractional_dim": one("U8", [1.5], 0, 1, 1),
    "product_overflows": one("U8", [1 << 32, 1 << 32], 0, 0, 0),
    "begin_after_end": one("U8", [1], 1, 0, 1),
    "beyond_data": one("U8", [2], 0, 2, 1),
    "size_differs": one("F32", [1], 0, 2, 2),
    "hole": pack({"a": tensor("U8", [1], 0, 1), "b": tensor("U8", [1], 2, 3)}, bytes(3)),
    "overlap": pack({"a": tensor("U8", [2], 0, 2), "b": tensor("U8", [2], 1, 3)}, bytes(3)),
    "trailing_bytes": one("U8", [1], 0, 1, 2),
    "missing_shape": pack({"a": {"dtype": "U8", "data_offsets": [0, 1]}}, b"\0"),
    "metadata_number": pack({"__metadata__": {"a": 1}}),
}

# Refused here although the safetensors package (0.8) takes them: rules of the format that it does not check, limits of ours.
STRICTER = {
    "duplicate_name": pack('{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
                           b"\0"),
    "nine_dims": one("U8", [1] * 9, 0, 1, 1),
    "leading_space": pack(" {}"),
    "zero_times_huge": one("U8", [0, 1 << 62, 8], 0, 0, 0),
    "nul_in_name": pack({"a\0": tensor("U8", [1], 0, 1)}, b"\0"),
    "four_bits": one("F4", [2], 0, 1, 1),
    "record_as_array": pack('{"a":["U8",[1],[0,1]]}', b"\0"),
}


def main(folder):
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in {**SOUND, **HOSTILE}.items():
        (folder / name).write_bytes(data)
    print(f"{len(SOUND) + len(HOSTILE)} files in {folder}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent / "fuzz/corpus/safetensors")
