"""Plain reference of 1-bit planes; writes tests/vectors/onebit.txt (format: tests/vectors/README.md).

Knows nothing of the library: f32 is emulated by rounding through struct, sums follow the order that core/delta/onebit.c
states.  Run:  python3 tests/reference/onebit_reference.py > tests/vectors/onebit.txt
"""
import math
import random
import struct
import sys

BLOCK = 4096
LANES = 16


def f32(x):
    if math.isfinite(x) and abs(x) >= 2.0 ** 128 * (1 - 2.0 ** -25):
        return math.copysign(math.inf, x)
    return struct.unpack("<f", struct.pack("<f", x))[0]


def block_sum(values):
    lanes = [0.0] * LANES
    for i, x in enumerate(values):
        lanes[i % LANES] += abs(x)
    for step in (8, 4, 2, 1):
        for j in range(step):
            lanes[j] += lanes[j + step]
    return lanes[0]


def tree_sum(parts):
    if len(parts) <= 2:
        return sum(parts) if parts else 0.0
    half = len(parts) // 2
    return tree_sum(parts[:half]) + tree_sum(parts[half:])


def segment_sum(values):
    return tree_sum([block_sum(values[i:i + BLOCK]) for i in range(0, len(values), BLOCK)])


def segments(cols, scale):
    width = int(scale.split(":")[1]) if scale.startswith("group:") else cols
    return [(a, min(a + width, cols)) for a in range(0, cols, width)]


def alphas_of(rows, cols, scale):
    if scale == "matrix":
        return [f32(tree_sum([segment_sum(r) for r in rows]) / (len(rows) * cols))]
    return [f32(segment_sum(r[a:b]) / (b - a)) for r in rows for a, b in segments(cols, scale)]


def alpha_at(alphas, scale, cols, row, col):
    if scale == "matrix":
        return alphas[0]
    parts = segments(cols, scale)
    return alphas[row * len(parts) + next(i for i, (a, b) in enumerate(parts) if a <= col < b)]


def pack_signs(row):
    out = bytearray((len(row) + 63) // 64 * 8)
    for i, x in enumerate(row):
        if x >= 0:
            out[i // 8] |= 1 << i % 8
    return bytes(out)


def compress(base, expert, rows, cols, scale, planes):
    d = [f32(e - b) for e, b in zip(expert, base)]
    for i, x in enumerate(d):
        if not math.isfinite(x):
            return i, None
    residual = [d[r * cols:(r + 1) * cols] for r in range(rows)]
    value = [0.0] * (rows * cols)
    stored = []
    for _ in range(planes):
        alphas = alphas_of(residual, cols, scale)
        if not any(alphas):
            break
        stored.append((alphas, b"".join(pack_signs(r) for r in residual)))
        for r in range(rows):
            for c in range(cols):
                signed = alpha_at(alphas, scale, cols, r, c) * (1.0 if residual[r][c] >= 0 else -1.0)
                value[r * cols + c] = f32(value[r * cols + c] + signed)
                residual[r][c] = f32(residual[r][c] - signed)
    return stored, value


def show(x):
    if math.isnan(x):
        return "nan"
    if math.isinf(x):
        return "inf" if x > 0 else "-inf"
    if x == 0:
        return "-0" if math.copysign(1, x) < 0 else "0"
    mantissa, exponent = x.hex().split("p")
    if "." in mantissa:
        mantissa = mantissa.rstrip("0").rstrip(".")
    return mantissa + "p" + exponent


def line(*words):
    print(" ".join(str(w) for w in words))


def emit(name, rows, cols, scale, planes, base, expert, with_value=True):
    base, expert = [f32(x) for x in base], [f32(x) for x in expert]
    result, value = compress(base, expert, rows, cols, scale, planes)
    line("case", name)
    line("shape", rows, cols)
    line("scale", scale)
    line("planes", planes)
    line("base", *map(show, base))
    line("expert", *map(show, expert))
    if value is None:
        line("error", "VALUE", result)
    else:
        line("stored", len(result))
        for p, (alphas, signs) in enumerate(result):
            line("alpha", p, *map(show, alphas))
            line("sign", p, signs.hex())
        if with_value:
            line("value", *map(show, value))
    line("end")


def matrix(rng, n, spread=1.0, bits=10):
    """Values of few bits, so that the file stays small; sums still round."""
    return [f32(round(rng.gauss(0, spread) * 2 ** bits) / 2 ** bits) for _ in range(n)]


def main():
    rng = random.Random(1)
    print("# 1-bit planes; written by tests/reference/onebit_reference.py, format in README.md")
    emit("sign-of-zero", 1, 4, "matrix", 1, [1, 1, 1, 0.0], [1, 2, 0, -0.0])
    emit("one-element", 1, 1, "row", 1, [0.25], [-0.5])
    for scale in ("matrix", "row", "group:64"):
        for planes in (1, 3):
            n = 5 * 133
            emit("random-%s-%d" % (scale.replace(":", ""), planes), 5, 133, scale, planes, matrix(rng, n), matrix(rng, n))
    emit("cols-64", 3, 64, "row", 2, matrix(rng, 192), matrix(rng, 192))
    emit("cols-65", 3, 65, "group:128", 2, matrix(rng, 195), matrix(rng, 195))
    emit("groups-uneven", 2, 300, "group:128", 2, matrix(rng, 600), matrix(rng, 600))
    emit("equal", 2, 3, "matrix", 2, [1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6])
    emit("a-row-of-zeros", 2, 3, "row", 2, [0] * 6, [0, 0, 0, 1, -2, 4])
    emit("second-plane-vanishes", 2, 4, "matrix", 4, [0] * 8, [0.5, -0.5, 0.5, 0.5, -0.5, -0.5, 0.5, -0.5])
    emit("third-plane-vanishes", 1, 4, "row", 4, [0] * 4, [1, 3, -1, -3])
    emit("alpha-underflows", 1, 4, "matrix", 1, [0] * 4, [2.0 ** -149, 0, 0, 0])
    emit("subnormal", 1, 2, "matrix", 2, [0] * 2, [2.0 ** -149, -3 * 2.0 ** -149])
    emit("huge", 1, 3, "matrix", 2, [0] * 3, [3e38, -3e38, 1e30])
    emit("rounding", 2, 33, "row", 2, matrix(rng, 66, 1e-3, 40), matrix(rng, 66, 1e3, 8))
    for name, rows, cols, scale in (("wide-row", 1, 2 * BLOCK + 77, "row"), ("wide-matrix", 2, BLOCK + 77, "matrix"),
                                    ("wide-group", 1, BLOCK + 300, "group:4160")):
        n = rows * cols
        emit(name, rows, cols, scale, 1, [0] * n, matrix(rng, n, 1, 7), False)
    emit("nan", 2, 3, "row", 1, [0] * 6, [1, 2, 3, 4, math.nan, math.inf])
    emit("inf", 2, 3, "matrix", 2, [0] * 6, [1, 2, -math.inf, 4, 5, 6])
    emit("inf-minus-inf", 1, 2, "matrix", 1, [1, math.inf], [1, math.inf])
    emit("overflow", 1, 2, "matrix", 1, [0, -3e38], [0, 3e38])


if __name__ == "__main__":
    sys.exit(main())
