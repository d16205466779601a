"""Writes tests/vectors/merge.txt: merges of small tensors, computed in plain Python from the papers' formulas.

    python3 tests/reference/merge_reference.py > tests/vectors/merge.txt

Every f32 operation is done in double and rounded once, which equals the f32 operation for + - * /.  The trim sorts, the
library counts; neither imports the other.
"""

import math
import random
import struct

MASK64 = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15


# ---- numbers ----

def f32(x):
    return struct.unpack("<f", struct.pack("<f", x))[0]


def bits32(x):
    return struct.unpack("<I", struct.pack("<f", x))[0]


def bf16(x):
    """Nearest bf16, ties to even."""
    u = bits32(x)
    u = (u + 0x7FFF + ((u >> 16) & 1)) & 0xFFFF0000
    return struct.unpack("<f", struct.pack("<I", u))[0]


def f16(x):
    return struct.unpack("<e", struct.pack("<e", x))[0]


ROUND = {"f32": f32, "bf16": bf16, "f16": f16}


def word(x):
    """C99 hexadecimal float, without trailing zeros."""
    mantissa, exponent = float(x).hex().split("p")
    if "." in mantissa:
        mantissa = mantissa.rstrip("0").rstrip(".")
    return ("-0" if math.copysign(1, x) < 0 else "0") if x == 0 else f"{mantissa}p{exponent}"


# ---- random masks: the algorithm stated in core/merge/random.c ----

def mix(z):
    z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & MASK64
    z = ((z ^ z >> 27) * 0x94D049BB133111EB) & MASK64
    return z ^ z >> 31


def random_key(seed, name, model):
    h = 0xCBF29CE484222325
    for byte in name.encode():
        h = ((h ^ byte) * 0x100000001B3) & MASK64
    return mix((mix(mix((seed + GOLDEN) & MASK64) ^ h) + (model + 1) * GOLDEN) & MASK64)


def kept_at_random(seed, name, model, element, density):
    draw = mix((random_key(seed, name, model) + (element + 1) * GOLDEN) & MASK64)
    return (draw >> 11) * 2.0**-53 < density


# ---- the methods ----

DEFAULTS = {
    "linear": dict(normalize=1),
    "task_arithmetic": dict(normalize=0, rescale=0),
    "ties": dict(normalize=1, rescale=0),
    "dare_linear": dict(normalize=0, rescale=1),
    "dare_ties": dict(normalize=0, rescale=1),
}


def trim(d, density):
    """Exactly max(1, int(density * n)) largest magnitudes, the lowest index first among equals."""
    if density >= 1:
        return list(d)
    if density <= 0:
        return [0.0] * len(d)
    order = sorted(range(len(d)), key=lambda j: (-abs(d[j]), j))
    keep = set(order[: max(1, int(density * len(d)))])
    return [x if j in keep else 0.0 for j, x in enumerate(d)]


def drop(d, density, seed, name, model):
    if density >= 1:
        return list(d)
    return [x if kept_at_random(seed, name, model, j, density) else 0.0 for j, x in enumerate(d)]


def rescale(before, after, method, density, p):
    if not p.get("rescale") or method == "task_arithmetic":
        return after
    if method.startswith("dare") and not p.get("rescale_l1"):
        factor = f32(1 / density) if 0 < density < 1 else 1.0
    else:
        a, b = math.fsum(map(abs, before)), math.fsum(map(abs, after))
        factor = 1.0 if a < 1e-7 or b < 1e-7 else f32(a / b)
    return [f32(x * factor) for x in after]


def sparsify(method, d, density, seed, name, model, p):
    if method == "ties":
        masked = trim(d, density)
    elif method.startswith("dare"):
        masked = drop(d, density, seed, name, model)
    else:
        masked = list(d)
    return rescale(d, masked, method, density, p)


def sum32(values):
    total = 0.0
    for v in values:
        total = f32(total + v)
    return total


def sign(x):
    return (x > 0) - (x < 0)


def merge(case):
    method, paper = case["method"], case["profile"] == "paper"
    base, models, dtype = case["base"], case["models"], case["dtype"]
    p = dict(DEFAULTS[method], **case["params"])
    n, count = len(models), len(models[0])
    weight = [f32(w) for w in p.get("weight", [1.0] * n)]
    density = p.get("density", [1.0] * n)

    if method == "linear":
        total = sum32(weight) if p["normalize"] else 1.0
        return [f32(sum32(f32(weight[i] * models[i][j]) for i in range(n)) / total) for j in range(count)]

    work = f32 if paper else ROUND[dtype]
    deltas = [[work(f32(x - b)) for x, b in zip(m, base)] for m in models]
    deltas = [sparsify(method, d, density[i], case["seed"], "", i, p) for i, d in enumerate(deltas)]
    consensus = method.endswith("ties")
    votes = [[d if paper else f32(weight[i] * d) for d in deltas[i]] for i in range(n)]
    sums = [sum32(votes[i][j] for i in range(n)) for j in range(count)]
    zero = 1
    if paper and sum(map(sign, sums)) < 0:
        zero = -1

    out = []
    for j in range(count):
        elected = sign(sums[j]) or zero
        agree = [i for i in range(n) if not consensus or sign(votes[i][j]) == elected]
        mixed = sum32(f32(weight[i] * deltas[i][j]) for i in agree)
        divisor = sum32(weight[i] for i in agree)
        if (consensus and divisor == 0) or (not consensus and abs(divisor) < 1e-8):
            divisor = 1.0
        if p["normalize"]:
            mixed = f32(mixed / divisor)
        mixed = f32(mixed * f32(p.get("lambda", 1.0)))
        out.append(f32(base[j] + mixed))
    return out


# ---- cases ----

def tensors(seed, shape, n, dtype, steps):
    """Base and models; with `steps` everything is a multiple of 1/8 and deltas are few, so that magnitudes tie."""
    rng = random.Random(seed)
    count = math.prod(shape)
    base = [rng.gauss(0, 1) for _ in range(count)]
    if steps:
        base = [round(b * 8) / 8 for b in base]
        models = [[b + rng.randint(-steps, steps) / 8 for b in base] for _ in range(n)]
    else:
        models = [[b + rng.gauss(0, 0.3) for b in base] for _ in range(n)]
    return [ROUND[dtype](b) for b in base], [[ROUND[dtype](x) for x in m] for m in models]


def case(name, method, shape=(4, 6), n=3, dtype="f32", profile="mergekit", seed=0, steps=None, tolerance="exact", data=1, **params):
    base, models = tensors(data, shape, n, dtype, steps)
    return dict(name=name, method=method, shape=shape, dtype=dtype, profile=profile, seed=seed, tolerance=tolerance, params=params,
                base=None if method == "linear" else base, models=models)


W = [0.5, 0.3, 0.7]
CASES = [
    case("linear/normalised", "linear", weight=W),
    case("linear/sum", "linear", weight=W, normalize=0),
    case("linear/bf16-odd", "linear", shape=(3, 5), dtype="bf16", weight=W, data=2),
    case("linear/negative-weight", "linear", shape=(7,), weight=[1.0, -0.25, 0.5], data=3),
    case("task_arithmetic/sum", "task_arithmetic", weight=W),
    case("task_arithmetic/normalised-lambda", "task_arithmetic", weight=W, normalize=1, **{"lambda": 0.8}),
    case("task_arithmetic/zero-weight-sum", "task_arithmetic", n=2, weight=[0.5, -0.5], normalize=1),
    case("task_arithmetic/bf16", "task_arithmetic", dtype="bf16", weight=W, data=4),
    case("task_arithmetic/f16-paper", "task_arithmetic", dtype="f16", profile="paper", weight=W, data=5),
    case("ties/density-0.2", "ties", weight=W, density=[0.2] * 3),
    case("ties/density-per-model", "ties", weight=W, density=[0.2, 0.5, 0.9]),
    case("ties/density-0", "ties", weight=W, density=[0.0] * 3),
    case("ties/density-1", "ties", weight=W),
    case("ties/least-one-kept", "ties", shape=(5,), weight=W, density=[0.1] * 3),
    case("ties/truncated-product", "ties", shape=(10, 10), weight=W, density=[0.29, 0.57, 0.58], data=6),
    case("ties/equal-magnitudes", "ties", shape=(6, 7), weight=W, density=[0.3, 0.4, 0.5], steps=2, data=7),
    case("ties/equal-magnitudes-bf16", "ties", shape=(6, 7), dtype="bf16", weight=W, density=[0.3, 0.4, 0.5], steps=2, data=8),
    case("ties/zero-sums", "ties", shape=(5, 9), n=2, weight=[1.0, 1.0], steps=1, data=9),
    case("ties/zero-sums-paper", "ties", shape=(5, 9), n=2, profile="paper", weight=[1.0, 1.0], steps=1, data=9),
    case("ties/zero-sums-paper-positive", "ties", shape=(3, 3), n=2, profile="paper", weight=[1.0, 1.0], steps=1, data=14),
    case("ties/negative-weight", "ties", weight=[0.5, -0.3, 0.7], density=[0.5] * 3, normalize=0),
    case("ties/negative-weight-normalised", "ties", weight=[0.5, -0.3, 0.7], density=[0.5] * 3),
    case("ties/lambda", "ties", weight=[1.0] * 3, density=[0.3] * 3, **{"lambda": 0.6}),
    case("ties/rescale", "ties", weight=[1.0] * 3, density=[0.3] * 3, rescale=1, tolerance="0x1p-20"),
    case("ties/bf16", "ties", shape=(9, 11), dtype="bf16", weight=W, density=[0.4] * 3, data=10),
    case("ties/bf16-paper", "ties", shape=(9, 11), dtype="bf16", profile="paper", weight=W, density=[0.4] * 3, data=10),
    case("ties/weights-outside-the-election", "ties", shape=(9, 11), profile="paper", weight=[3.0, 0.1, 0.1], density=[0.4] * 3, data=11),
    case("dare_linear/density-0.5", "dare_linear", shape=(8, 9), weight=W, density=[0.5] * 3, seed=42, data=12),
    case("dare_linear/no-rescale", "dare_linear", shape=(8, 9), weight=W, density=[0.5] * 3, seed=42, rescale=0, data=12),
    case("dare_linear/rescale-l1", "dare_linear", shape=(8, 9), weight=W, density=[0.5] * 3, seed=42, rescale_l1=1, tolerance="0x1p-20", data=12),
    case("dare_linear/bf16", "dare_linear", shape=(8, 9), dtype="bf16", weight=W, density=[0.1, 0.5, 0.9], seed=7, data=12),
    case("dare_ties/density-0.5", "dare_ties", shape=(8, 9), weight=W, density=[0.5] * 3, seed=1, data=13),
    case("dare_ties/normalised", "dare_ties", shape=(8, 9), weight=W, density=[0.3, 0.6, 1.0], seed=2, normalize=1, data=13),
    case("dare_ties/paper", "dare_ties", shape=(8, 9), profile="paper", weight=W, density=[0.5] * 3, seed=2**64 - 1, data=13),
]


def write(c):
    print("case", c["name"])
    print("method", c["method"])
    print("profile", c["profile"])
    print("seed", c["seed"])
    for name, value in c["params"].items():
        if isinstance(value, list):
            for i, v in enumerate(value):
                print("param", name, i, word(v))
        else:
            print("param", name, -1, word(value))
    print("shape", *c["shape"])
    if c["base"] is not None:
        print("base", c["dtype"], *map(word, c["base"]))
    for m in c["models"]:
        print("model", c["dtype"], *map(word, m))
    print("merged", c["tolerance"], *map(word, merge(c)))
    print("end")


def main():
    print("# Static merges of one tensor; written by tests/reference/merge_reference.py, the format is in README.md.")
    for c in CASES:
        write(c)


if __name__ == "__main__":
    main()
