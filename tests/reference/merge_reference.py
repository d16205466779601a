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
    "della": dict(normalize=1, rescale=1),
    "della_linear": dict(normalize=0, rescale=1),
    "breadcrumbs": dict(normalize=0, rescale=0),
    "breadcrumbs_ties": dict(normalize=0, rescale=0),
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


def crumbs(d, density, gamma):
    """int(density * n) elements behind the int(gamma * n) largest, or behind fewer; the lowest index first among equals."""
    if density >= 1:
        return list(d)
    n = len(d)
    keep = int(density * n)
    top = min(int(gamma * n), n - keep)
    order = sorted(range(n), key=lambda j: (-abs(d[j]), j))
    kept = set(order[top : top + keep])
    return [x if j in kept else 0.0 for j, x in enumerate(d)]


def drop_by_rank(d, density, epsilon, shape, seed, name, model, inverse):
    """The chance to stay runs from density - epsilon to density + epsilon over the ranks of a row."""
    if density >= 1:
        return list(d)
    if density <= 0:
        return [0.0] * len(d)
    out, cols = [], shape[-1]
    for start in range(0, len(d), cols):
        row = d[start : start + cols]
        order = sorted(range(cols), key=lambda j: (abs(row[j]), j))
        rank = {j: r for r, j in enumerate(order)}
        for j, x in enumerate(row):
            keep = density if cols == 1 else density - epsilon + 2 * epsilon * (rank[j] / (cols - 1))
            stays = kept_at_random(seed, name, model, start + j, keep)
            out.append(0.0 if not stays else f32(x * f32(1 / keep)) if inverse else x)
    return out


def rescale(before, after, method, density, p):
    if not p.get("rescale") or method == "task_arithmetic" or p.get("inverse"):
        return after
    if method.startswith("dare") and not p.get("rescale_l1"):
        factor = f32(1 / density) if 0 < density < 1 else 1.0
    else:
        a, b = math.fsum(map(abs, before)), math.fsum(map(abs, after))
        factor = 1.0 if a < 1e-7 or b < 1e-7 else f32(a / b)
    return [f32(x * factor) for x in after]


def of_model(p, name, i, default):
    value = p.get(name, default)
    return value[i] if isinstance(value, list) else value


def sparsify(method, d, density, seed, name, model, p):
    if method == "ties":
        masked = trim(d, density)
    elif method.startswith("dare"):
        masked = drop(d, density, seed, name, model)
    elif method.startswith("della"):
        masked = drop_by_rank(d, density, of_model(p, "epsilon", model, 0.15), p["shape"], seed, name, model, p["inverse"])
    elif method.startswith("breadcrumbs"):
        masked = crumbs(d, density, of_model(p, "gamma", model, 0.01))
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


# ---- methods that look at whole vectors, or at an element across the models ----

def norm(v):
    return math.sqrt(math.fsum(x * x for x in v))


def inner(v, w):
    return math.fsum(x * y for x, y in zip(v, w))


def combine(factors, vectors):
    return [math.fsum(f * v[j] for f, v in zip(factors, vectors)) for j in range(len(vectors[0]))]


def arc(v, w, t, least, line):
    a, b = (norm(x) for x in (v, w))
    cosine = max(-1.0, min(1.0, inner(v, w) / (least(a) * least(b))))
    if line(cosine):
        return combine([1 - t, t], [v, w])
    angle = math.acos(cosine)
    return combine([math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)], [v, w])


def split(v, shape, kind):
    """Vectors of a tensor as lists of indices."""
    n = len(v)
    if kind == "tensor":
        return [list(range(n))]
    if kind == "row":
        return [list(range(i, i + shape[-1])) for i in range(0, n, shape[-1])]
    cols = n // shape[0]
    return [list(range(i, n, cols)) for i in range(cols)]


def by_vector(indices, inputs, f):
    out = [0.0] * len(inputs[0])
    for index in indices:
        for j, x in zip(index, f([[v[j] for j in index] for v in inputs])):
            out[j] = x
    return out


def slerp(base, models, p, shape, paper):
    return arc(base, models[0], p["t"], lambda a: a if a > 1e-8 else 1.0, lambda c: abs(c) > 0.9995)


def nuslerp(base, models, p, shape, paper):
    w = p["weight"]
    t = 0.5 if abs(sum(w)) < 1e-6 else w[1] / sum(w)
    kind = "tensor" if p.get("nuslerp_flatten", 1) else "column" if p.get("nuslerp_row_wise", 0) else "row"
    vectors = differences(base, models) if base else models
    merged = by_vector(split(models[0], shape, kind), vectors,
                       lambda vs: arc(*vs, t, lambda a: max(a, 1e-7), lambda c: 1 - c * c <= 1e-16))
    return add(base, merged) if base else merged


def differences(base, models):
    return [[f32(x - b) for x, b in zip(m, base)] for m in models]


def add(base, d):
    return [b + x for b, x in zip(base, d)]


def multislerp(base, models, p, shape, paper):
    """Tangents at the mean direction, averaged and mapped back: nothing of the library's shorter form."""
    eps, w = p.get("eps", 1e-8), p["weight"]
    vectors = differences(base, models) if base else models
    if p.get("normalize_weights", 1):
        w = [x / sum(w) for x in w]
    units = [[x / (norm(v) + eps) for x in v] for v in vectors]
    mean = combine(w, units)
    if norm(mean) < eps:
        merged = combine(w, vectors)
    else:
        mean = [x / norm(mean) for x in mean]
        tangents = [combine([1, -inner(u, mean)], [u, mean]) for u in units]
        tangent = combine(w, tangents)
        size = norm(tangent) + eps
        on_sphere = combine([math.cos(size), math.sin(size) / size], [mean, tangent])
        merged = combine([sum(a * norm(v) for a, v in zip(w, vectors))], [on_sphere])
    return add(base, merged) if base else merged


def karcher(base, models, p, shape, paper):
    tol, n = p.get("tol", 1e-5), len(models)
    units = [[x / norm(v) for x in v] for v in models if norm(v) > tol]
    size = sum(map(norm, models)) / n
    if not units:
        return [0.0] * len(models[0])
    mean = combine([1 / len(units)] * len(units), units)
    mean = units[0] if norm(mean) < tol else [x / norm(mean) for x in mean]
    for _ in range(int(p.get("max_iter", 10))):
        tangent = [0.0] * len(mean)
        for u in units:
            cosine = max(-1.0, min(1.0, inner(mean, u)))
            angle = math.acos(cosine)
            if angle >= tol and math.sin(angle) != 0:
                step = angle / math.sin(angle) / len(units)
                tangent = combine([1, step, -step * cosine], [tangent, u, mean])
        length = norm(tangent)
        if length < tol:
            break
        mean = combine([math.cos(length), math.sin(length) / length], [mean, tangent])
        mean = [x / norm(mean) for x in mean]
    return [size * x for x in mean]


def model_stock(base, models, p, shape, paper):
    def part(vectors):
        first, *rest = vectors
        ds, n, cosines = differences(first, rest), len(rest), []
        for i in range(n):
            for j in range(i):
                product = max(norm(ds[i]) * norm(ds[j]), 0 if paper else 1e-6)
                cosines.append(max(-1.0, min(1.0, inner(ds[i], ds[j]) / product)) if product else 0.0)
        cosine = sum(cosines) / len(cosines)
        divisor = 1 + (n - 1) * cosine
        t = 0.0 if abs(divisor) < 1e-6 else n * cosine / divisor
        return combine([t / n] * n + [1 - t], rest + [first])
    return by_vector(split(base, shape, "row" if p.get("filter_wise") else "tensor"), [base, *models], part)


def varm(base, models, p, shape, paper):
    ds = differences(base, models)
    squares = [inner(d, d) for d in ds]
    weight = [s / sum(squares) if sum(squares) else 1 / len(ds) for s in squares]
    return add(base, combine([p.get("lambda", 1.0) * w for w in weight], ds))


def sce(base, models, p, shape, paper):
    ds, n, count = differences(base, models), len(models), len(base)
    topk = p.get("select_topk", 1.0)
    keep = set(range(count))
    if topk < 1:
        def variance(j):
            xs = [d[j] for d in ds]
            mean = math.fsum(xs) / n
            return 0.0 if len(set(xs)) == 1 else math.fsum((x - mean) ** 2 for x in xs) / n
        spread = [variance(j) for j in range(count)]
        order = sorted((j for j in range(count) if spread[j]), key=lambda j: (-f32(spread[j]), j))
        keep = set(order[: int(topk * len(order))])
    masked = [[x if j in keep else 0.0 for j, x in enumerate(d)] for d in ds]
    squares = [math.fsum(x * x for x in d) / count for d in masked]
    even = sum(squares) == 0 if paper else sum(squares) < 1e-6
    weight = [1 / n if even else s / sum(squares) for s in squares]
    used = ds if p.get("select_weights_only") else masked
    out = []
    for j in range(count):
        elected = 1 if sum(d[j] for d in used) >= 0 else -1
        agree = [i for i in range(n) if sign(used[i][j]) == elected]
        mass = sum(weight[i] for i in agree)
        divisor = (mass or 1.0) if paper else max(mass, 1e-6)
        out.append(base[j] + sum(weight[i] * used[i][j] for i in agree) / divisor)
    return out


def ram(base, models, p, shape, paper, plus=False):
    ds, epsilon = differences(base, models), f32(p.get("epsilon", 1e-5))
    ds = [[x if abs(x) > epsilon else 0.0 for x in d] for d in ds]
    count = [sum(d[j] != 0 for d in ds) for j in range(len(base))]
    factor = [1.0] * len(ds)
    if plus:
        for i, d in enumerate(ds):
            shared, unique = (sum(x != 0 and pick(c) for x, c in zip(d, count)) for pick in (lambda c: c > 1, lambda c: c == 1))
            share = shared / max(unique, p.get("epsilon", 1e-5)) if shared else 0.0
            factor[i] = 1 + p.get("r", 0.1) * min(share, p.get("alpha", 0.2))
    out = []
    for j, b in enumerate(base):
        if count[j] > 1:
            out.append(b + sum(d[j] for d in ds) / count[j])
        else:
            out.append(b + sum(f * d[j] for f, d in zip(factor, ds)))
    return out


def ramplus_tl(*args):
    return ram(*args, plus=True)


def nearswap(base, models, p, shape, paper):
    out = []
    for b, x in zip(base, models[0]):
        weight = min(max(p["t"] / max(abs(b - x), 1e-6), 0.0), 1.0)
        out.append(weight * x + (1 - weight) * b)
    return out


def arcee_fusion(base, models, p, shape, paper):
    x = models[0]

    def softmax(row):
        e = [math.exp(v - max(row)) for v in row]
        return [v / math.fsum(e) + 1e-8 for v in e]
    importance = [0.0] * len(x)
    for index in split(x, shape, "row"):
        ps, qs = (softmax([v[j] for j in index]) for v in (x, base))
        kl = max(0.0, math.fsum(a * math.log(a / b) for a, b in zip(ps, qs)))
        for j in index:
            importance[j] = f32(abs(f32(x[j] - base[j])) * kl)
    ranked = sorted(importance)
    q1, q2, q3 = (ranked[int(q * (len(ranked) - 1))] for q in (0.25, 0.5, 0.75))
    threshold = f32(q2 + f32(1.5 * f32(q3 - q1)))
    return [v if i >= threshold else b for v, b, i in zip(x, base, importance)]


def passthrough(base, models, p, shape, paper):
    return [of_model(p, "scale", 0, 1.0) * x for x in models[0]]


def consensus(base, models, p, shape, paper):
    ds = differences(base, models)
    out = []
    for j, b in enumerate(base):
        total = sum32(d[j] for d in ds)
        owners = sum(abs(d[j]) > of_model(p, "mask_lambda", i, 0.4) * abs(total - d[j]) for i, d in enumerate(ds))
        out.append(b + (f32(p.get("lambda", 1.0)) * total if owners >= p.get("k", 2) else 0.0))
    return out


def emr(base, models, p, shape, paper):
    ds = differences(base, models)
    out = []
    for j, b in enumerate(base):
        elected = sign(sum32(d[j] for d in ds))
        largest = max([abs(d[j]) for d in ds if sign(d[j]) == elected != 0], default=0.0)
        out.append(b + f32(p.get("lambda", 1.0)) * elected * largest)
    return out


def pcb(base, models, p, shape, paper):
    """Straight from the two variants of the authors' code: pcb-merging.py (1) and pcb_ES.py (2)."""
    ds, n, count, variant = differences(base, models), len(models), len(base), p.get("variant", 2)
    quantile, ratio = ((p[k] if p.get(k, -1) >= 0 else v) for k, v in zip(("quantile", "ratio"), ((1e-4, 0.1) if variant == 1 else (0.01, 0.05))))

    def clamp(xs, low, high):
        ranked = sorted(xs)
        low, high = ranked[min(int(count * low), count - 1)], ranked[max(int(count * (1 - high) - 1), 0)]
        return [min(max(x, low), high) for x in xs]

    def minmax(xs):
        return [(x - min(xs)) / (max(xs) - min(xs)) if max(xs) > min(xs) else 0.0 for x in xs]

    sizes = [clamp([abs(x) for x in d], quantile, quantile) for d in ds]
    norms = [minmax(a) for a in sizes]
    signed = [[sign(x) * a for x, a in zip(d, norm)] for d, norm in zip(ds, norms)]
    scales = []
    for t in range(n):
        if variant == 1:
            between = [math.tanh(ds[t][j] * math.fsum(d[j] for d in ds)) for j in range(count)]
        else:
            between = [math.fsum(math.tanh(signed[t][j] * u[j]) for u in signed) for j in range(count)]
        balanced = [math.exp(n * a * a) * x for a, x in zip(norms[t], between)]
        scales.append(minmax(clamp(balanced, 1 - ratio, 0)))
    out = []
    for j, b in enumerate(base):
        moved = math.fsum(of_model(p, "weight", t, 1.0) * sign(ds[t][j]) * sizes[t][j] * scales[t][j] for t in range(n))
        out.append(b + moved / max(math.fsum(scale[j] for scale in scales), 1e-12))
    return out


def magnitude_prune(base, models, p, shape, paper):
    ds = [trim(d, of_model(p, "density", i, 1.0)) for i, d in enumerate(differences(base, models))]
    weight = [of_model(p, "weight", i, 1.0) for i in range(len(ds))]
    density = [of_model(p, "density", i, 1.0) for i in range(len(ds))]
    factor = [w / r if p.get("rescale", 1) and r > 0 else w for w, r in zip(weight, density)]
    divisor = sum(weight) if p.get("normalize") else 1.0
    return add(base, combine([p.get("lambda", 1.0) * f / divisor for f in factor], ds))


def localize_stitch(base, models, p, shape, paper):
    ds = [trim(d, of_model(p, "density", i, 0.1)) for i, d in enumerate(differences(base, models))]
    owners = [max(1, sum(d[j] != 0 for d in ds)) for j in range(len(base))]
    return add(base, [p.get("lambda", 1.0) * sum(d[j] for d in ds) / owners[j] for j in range(len(base))])


def mwa(base, models, p, shape, paper):
    power = p.get("penalty", 1) * (1 if p.get("higher_is_better") else -1)
    raised = [x ** power for x in p["metric"]]
    return combine([x / sum(raised) for x in raised], models)


# ---- the methods on matrices: lists of rows, singular values by Jacobi rotations ----

def transposed(a):
    return [list(row) for row in zip(*a)]


def product(a, b):
    columns = transposed(b)
    return [[math.fsum(x * y for x, y in zip(row, column)) for column in columns] for row in a]


def total(terms):
    return [[math.fsum(values) for values in zip(*rows)] for rows in zip(*terms)]


def scaled(factor, a):
    return [[factor * x for x in row] for row in a]


def frobenius(a):
    return math.sqrt(math.fsum(x * x for row in a for x in row))


def svd(a):
    """One-sided Jacobi (Hestenes): -> [(s, u, v)], s falling, only what is not practically 0."""
    if len(a) < len(a[0]):
        return [(s, u, v) for s, v, u in svd(transposed(a))]
    columns, v = transposed(a), [[float(i == j) for j in range(len(a[0]))] for i in range(len(a[0]))]
    for _ in range(60):
        off = 0.0
        for p in range(len(columns)):
            for q in range(p + 1, len(columns)):
                x, y = columns[p], columns[q]
                alpha, beta, gamma = inner(x, x), inner(y, y), inner(x, y)
                if abs(gamma) <= 1e-17 * math.sqrt(alpha * beta):
                    continue
                off = max(off, abs(gamma) / math.sqrt(alpha * beta))
                zeta = (beta - alpha) / (2 * gamma)
                t = math.copysign(1, zeta) / (abs(zeta) + math.hypot(1, zeta))
                c = 1 / math.hypot(1, t)
                for rows in (columns, v):
                    rows[p], rows[q] = ([c * a - c * t * b for a, b in zip(rows[p], rows[q])],
                                        [c * t * a + c * b for a, b in zip(rows[p], rows[q])])
        if off < 1e-15:
            break
    triples = sorted(((norm(x), x, y) for x, y in zip(columns, v)), key=lambda triple: -triple[0])
    return [(s, [z / s for z in x], y) for s, x, y in triples if s > 2**-20 * triples[0][0]]


def from_triples(triples, m, n):
    return [[math.fsum(s * u[i] * v[j] for s, u, v in triples) for j in range(n)] for i in range(m)]


def pseudo_inverse(a):
    return from_triples([(1 / s, v, u) for s, u, v in svd(a)], len(a[0]), len(a))


def orthogonalised(vectors):
    """The nearest orthonormal vectors (polar factor); none for a vector of zeros."""
    triples = svd(transposed(vectors))
    return transposed(from_triples([(1.0, u, v) for _, u, v in triples], len(vectors[0]), len(vectors)))


def on_matrices(by_matrix, by_vector):
    """A method whose task vectors are matrices; 1-D tensors go their own way."""
    def method(base, models, p, shape, paper):
        ds = [[f32(x - b) for x, b in zip(m, base)] for m in models]
        if len(shape) != 2:
            return add(base, by_vector(ds, p))
        rows = [[d[i : i + shape[1]] for i in range(0, len(d), shape[1])] for d in ds]
        return add(base, [x for row in by_matrix(rows, p, *shape) for x in row])
    return method


def mean_vector(ds, p):
    weight = [f32(w) for w in p.get("weight", [1.0] * len(ds))]
    return combine([f32(p.get("lambda", 1.0)) * w / len(ds) for w in weight], ds)


def least_interference(targets, sizes, start, p):
    """min over M of sum_t ||(M - T_t) T_t^T||^2 / size_t, from the loss itself: M X^T = Y with X the T_t / sqrt(size_t) below each
    other and Y the T_t T_t^T / sqrt(size_t) beside each other.  The singular values of X are the roots of the eigenvalues of the Gram
    matrix; what they do not reach stays at the start."""
    x = [row for t, size in zip(targets, sizes) if size for row in scaled(1 / size, t)]
    y = transposed([row for t, size in zip(targets, sizes) if size for row in scaled(1 / size, product(t, transposed(t)))])
    if not x:
        return start
    n, rank, ridge = len(x[0]), p.get("rank", 0.85), p.get("ridge", 0.0)
    mean = frobenius(x) ** 2 / n
    missing = total([y, scaled(-1, product(start, transposed(x)))])
    inverse = from_triples([(s / (s * s + ridge * mean), u, v) for s, u, v in svd(x)[: math.ceil(rank * n)]], len(x), n)
    return scaled(f32(p.get("lambda", 1.0)), total([start, product(missing, inverse)]))


def wudi(ds, p, m, n):
    return least_interference(ds, [frobenius(d) for d in ds], total(ds), p)


def optmerge(ds, p, m, n):
    keep = max(1, min(m, n) // len(ds))
    targets = [from_triples(svd(d)[:keep], m, n) if frobenius(d) else d for d in ds]
    return least_interference(targets, [frobenius(d) for d in ds], scaled(1 / len(ds), total(ds)), p)


def weighted(ds, p):
    return [scaled(f32(w), d) for w, d in zip(p.get("weight", [1.0] * len(ds)), ds)]


def joined(triples, m, n, value=None):
    """Vectors made orthogonal across all triples; with their own values, or one for all."""
    us, vs = orthogonalised([u for _, u, _ in triples]), orthogonalised([v for _, _, v in triples])
    return from_triples([(s if value is None else value, u, v) for (s, _, _), u, v in zip(triples, us, vs)], m, n)


def tsvm(ds, p, m, n):
    each = min(m, n) // len(ds)
    lam = f32(p.get("lambda", 1.0))
    if each == 0:
        return scaled(lam / len(ds), total(weighted(ds, p)))
    return scaled(lam, joined([t for d in weighted(ds, p) for t in svd(d)[:each]], m, n))


def iso_c(ds, p, m, n):
    triples = svd(total(weighted(ds, p)))
    mean = math.fsum(s for s, _, _ in triples) / min(m, n)
    return scaled(f32(p.get("lambda", 1.0)) * mean, from_triples([(1.0, u, v) for _, u, v in triples], m, n))


def iso_cts(ds, p, m, n):
    k, ds = min(m, n), weighted(ds, p)
    each = round((k - int(p.get("common", 0.8) * k)) / len(ds))
    each -= each * len(ds) > k
    common = svd(total(ds))[: k - each * len(ds)]
    us = [u for _, u, _ in common]
    triples = []
    for d in ds:
        inside = product(transposed(us), product(us, d)) if us else scaled(0, d)
        triples += svd(total([d, scaled(-1, inside)]))[:each]
    triples += common
    mean = math.fsum(s for s, _, _ in triples) / len(triples)
    return scaled(f32(p.get("lambda", 1.0)), joined(triples, m, n, mean))


def opcm(ds, p, m, n):
    """The recursion as it is stated: the merged task vector has the mean norm of the experts so far after every step."""
    merged, factor, sizes = ds[0], 1.0, [frobenius(ds[0])]
    for d in ds[1:]:
        triples = svd(merged)
        values, running, cut = math.fsum(s for s, _, _ in triples), 0.0, 0
        for i, (s, _, _) in enumerate(triples):
            running += s
            if running / values > p.get("alpha", 0.5):
                cut = i
                break
        for i, (_, u, _) in enumerate(triples):
            for j, (_, _, v) in enumerate(triples):
                if i == j or (i < cut and j < cut):
                    part = inner(product([u], d)[0], v)
                    d = total([d, from_triples([(-part, u, v)], m, n)])
        sizes.append(frobenius(ds[len(sizes)]))
        merged = total([scaled(factor, merged), d])
        target = math.fsum(sizes) / len(sizes)
        factor = frobenius(merged) / target
        merged = scaled(1 / factor, merged)
    return scaled(f32(p.get("lambda", 1.0)), merged)


def opcm_vector(ds, p):
    summed = combine([1.0] * len(ds), ds)
    return combine([f32(p.get("lambda", 1.0)) * math.fsum(map(norm, ds)) / len(ds) / norm(summed)], [summed])


def shares(p, n):
    given = [f32(w) for w in p.get("weight", [1.0] * n)]
    return [w / math.fsum(given) for w in given] if p.get("normalize", 1) and any(given) else given


def twin(ds, p, m, n):
    shared = scaled(p.get("lambda", 0.3), total(ds))
    parts = [shared]
    for i, (d, share) in enumerate(zip(ds, shares(p, len(ds)))):
        own = total([d, scaled(-1, shared)])
        rank = int(of_model(p, "density", i, 0.1) * min(m, n))
        parts.append(scaled(share, from_triples(svd(own)[:rank], m, n)))
    return total(parts)


def twin_vector(ds, p):
    shared = combine([p.get("lambda", 0.3)] * len(ds), ds)
    share = shares(p, len(ds))
    return combine([1 - math.fsum(share)] + share, [shared] + ds)


MATRIX_METHODS = {"wudi": (wudi, mean_vector), "optmerge": (optmerge, mean_vector), "tsvm": (tsvm, mean_vector), "iso_c": (iso_c, mean_vector),
                  "iso_cts": (iso_cts, mean_vector), "opcm": (opcm, opcm_vector), "twin": (twin, twin_vector)}

OF_THEIR_OWN = {f.__name__: f for f in (slerp, nuslerp, multislerp, karcher, model_stock, varm, sce, ram, ramplus_tl, nearswap, arcee_fusion,
                                        passthrough, consensus, emr, pcb, magnitude_prune, localize_stitch, mwa)}
OF_THEIR_OWN.update((name, on_matrices(*pair)) for name, pair in MATRIX_METHODS.items())


def merge(case):
    method, paper = case["method"], case["profile"] == "paper"
    if method in OF_THEIR_OWN:
        return [f32(x) for x in OF_THEIR_OWN[method](case["base"], case["models"], case["params"], case["shape"], paper)]
    base, models, dtype = case["base"], case["models"], case["dtype"]
    p = dict(DEFAULTS[method], **case["params"], shape=case["shape"], inverse=paper and method.startswith("della"))
    n, count = len(models), len(models[0])
    weight = [f32(w) for w in p.get("weight", [1.0] * n)]
    density = p.get("density", [1.0] * n)

    if method == "linear":
        total = sum32(weight) if p["normalize"] else 1.0
        return [f32(sum32(f32(weight[i] * models[i][j]) for i in range(n)) / total) for j in range(count)]

    work = f32 if paper else ROUND[dtype]
    deltas = [[work(f32(x - b)) for x, b in zip(m, base)] for m in models]
    deltas = [sparsify(method, d, density[i], case["seed"], "", i, p) for i, d in enumerate(deltas)]
    elects = method.endswith("ties") or method == "della"
    votes = [[d if paper else f32(weight[i] * d) for d in deltas[i]] for i in range(n)]
    sums = [sum32(votes[i][j] for i in range(n)) for j in range(count)]
    zero = 1
    if paper and sum(map(sign, sums)) < 0:
        zero = -1

    out = []
    for j in range(count):
        elected = sign(sums[j]) or zero
        agree = [i for i in range(n) if not elects or sign(votes[i][j]) == elected]
        mixed = sum32(f32(weight[i] * deltas[i][j]) for i in agree)
        divisor = sum32(weight[i] for i in agree)
        if (elects and divisor == 0) or (not elects and abs(divisor) < 1e-8):
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


BASELESS = ("linear", "karcher", "passthrough", "mwa")
SINGLE = ("slerp", "nearswap", "arcee_fusion", "passthrough")


def case(name, method, shape=(4, 6), n=3, dtype="f32", profile="mergekit", seed=0, steps=None, tolerance="exact", data=1, base_too=None, **params):
    n = 1 if method in SINGLE else 2 if method == "nuslerp" else n
    base_too = method not in BASELESS if base_too is None else base_too
    base, models = tensors(data, shape, n, dtype, steps)
    return dict(name=name, method=method, shape=shape, dtype=dtype, profile=profile, seed=seed, tolerance=tolerance, params=params,
                base=base if base_too else None, models=models)


W = [0.5, 0.3, 0.7]
L1 = "0x1p-20"
# Values are of size 1 to 4, the library rounds factors and each step of a sum to f32: a few units in the last place.
ARC = "0x1p-19"
# Scores are ranked as f32 and divided by the differences of two of them.
RATIO = "0x1p-17"
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
    case("task_arithmetic/vector", "task_arithmetic", shape=(13,), n=2, weight=[0.9, -0.4], data=130, **{"lambda": 0.5}),
    case("task_arithmetic/bf16-odd", "task_arithmetic", shape=(7, 5), dtype="bf16", weight=W, normalize=1, data=138),
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
    case("dare_linear/odd", "dare_linear", shape=(5, 9), dtype="bf16", profile="paper", weight=W, density=[0.4] * 3, seed=16, data=139),
    case("dare_linear/vector", "dare_linear", shape=(43,), weight=W, density=[0.3, 0.6, 0.9], seed=11, normalize=1, data=131, **{"lambda": 0.7}),
    case("dare_ties/density-0.5", "dare_ties", shape=(8, 9), weight=W, density=[0.5] * 3, seed=1, data=13),
    case("dare_ties/normalised", "dare_ties", shape=(8, 9), weight=W, density=[0.3, 0.6, 1.0], seed=2, normalize=1, data=13),
    case("dare_ties/vector", "dare_ties", shape=(43,), weight=W, density=[0.3, 0.6, 0.9], seed=12, rescale=0, data=132, **{"lambda": 0.7}),
    case("dare_ties/rescale-l1", "dare_ties", shape=(7, 5), weight=W, density=[0.5] * 3, seed=13, rescale_l1=1, tolerance=L1, data=133),
    case("della/by-rank", "della", shape=(5, 9), weight=W, density=[0.5] * 3, seed=5, data=15, tolerance=L1),
    case("della/vector-no-rescale", "della", shape=(37,), weight=W, density=[0.3, 0.6, 1.0], epsilon=[0.2, 0.1, 0.3], rescale=0, seed=6, data=16),
    case("della/equal-magnitudes", "della", shape=(3, 2, 7), dtype="bf16", weight=W, density=[0.4] * 3, rescale=0, steps=2, seed=7, data=17),
    case("della/paper", "della", shape=(6, 7), profile="paper", weight=W, density=[0.5] * 3, epsilon=0.3, seed=8, data=18),
    case("della/not-normalised", "della", shape=(3, 11), weight=W, density=[0.5] * 3, normalize=0, rescale=0, seed=14, data=134, **{"lambda": 0.8}),
    case("della_linear/by-rank", "della_linear", shape=(5, 9), weight=W, density=[0.5, 0.0, 0.7], seed=5, data=15, tolerance=L1),
    case("della_linear/one-column", "della_linear", shape=(21, 1), weight=W, density=[0.5] * 3, rescale=0, seed=9, data=19),
    case("della_linear/paper", "della_linear", shape=(4, 11), profile="paper", weight=W, density=[0.5] * 3, seed=10, data=20, **{"lambda": 0.7}),
    case("della_linear/vector", "della_linear", shape=(37,), weight=W, density=[0.5, 0.3, 0.7], epsilon=[0.2, 0.1, 0.05], rescale=0, normalize=1,
         seed=15, data=135),
    case("breadcrumbs/outliers", "breadcrumbs", shape=(10, 10), weight=W, density=[0.5, 0.3, 0.9], gamma=0.05, data=21),
    case("breadcrumbs/gamma-gives-way", "breadcrumbs", shape=(7, 3), weight=W, density=[0.9] * 3, gamma=[0.2, 0.0, 0.1], data=22),
    case("breadcrumbs/equal-magnitudes", "breadcrumbs", shape=(83,), weight=W, density=[0.4] * 3, gamma=0.2, steps=3, data=23),
    case("breadcrumbs/none-left", "breadcrumbs", shape=(5,), weight=W, density=[0.1, 0.5, 1.0], gamma=0.4, data=24),
    case("breadcrumbs/rescaled", "breadcrumbs", shape=(9, 7), weight=W, density=[0.4] * 3, gamma=0.1, normalize=1, rescale=1, tolerance=L1, data=136,
         **{"lambda": 0.6}),
    case("breadcrumbs_ties/outliers", "breadcrumbs_ties", shape=(10, 10), weight=W, density=[0.5, 0.3, 0.9], gamma=0.05, normalize=1, data=21),
    case("breadcrumbs_ties/bf16", "breadcrumbs_ties", shape=(9, 11), dtype="bf16", weight=W, density=[0.4] * 3, gamma=0.1, data=25),
    case("breadcrumbs_ties/rescale", "breadcrumbs_ties", shape=(9, 11), weight=W, density=[0.4] * 3, gamma=0.1, rescale=1, tolerance=L1, data=26),
    case("breadcrumbs_ties/vector", "breadcrumbs_ties", shape=(83,), weight=W, density=[0.4, 0.7, 1.0], gamma=[0.1, 0.0, 0.2], data=137,
         **{"lambda": 0.6}),
    case("slerp/arc", "slerp", t=0.35, tolerance=ARC),
    case("slerp/vector", "slerp", shape=(13,), t=0.8, tolerance=ARC, data=31),
    case("slerp/parallel", "slerp", shape=(5, 3), dtype="bf16", t=0.25, steps=0, tolerance=ARC, data=32),
    case("slerp/outside", "slerp", shape=(3, 5), t=-0.4, tolerance=ARC, data=33),
    case("nuslerp/models", "nuslerp", weight=[0.5, 0.3], base_too=False, tolerance=ARC),
    case("nuslerp/deltas", "nuslerp", shape=(5, 7), weight=[0.5, 0.3], tolerance=ARC, data=34),
    case("nuslerp/rows", "nuslerp", shape=(5, 7), weight=[0.2, 0.3], nuslerp_flatten=0, tolerance=ARC, data=35),
    case("nuslerp/columns", "nuslerp", shape=(5, 7), weight=[0.2, 0.3], nuslerp_flatten=0, nuslerp_row_wise=1, tolerance=ARC, data=35),
    case("nuslerp/columns-3d", "nuslerp", shape=(5, 2, 3), weight=[0.2, 0.3], nuslerp_flatten=0, nuslerp_row_wise=1, base_too=False, tolerance=ARC, data=36),
    case("nuslerp/vector-by-columns", "nuslerp", shape=(9,), weight=[1.0, -1.0], nuslerp_flatten=0, nuslerp_row_wise=1, tolerance=ARC, data=37),
    case("nuslerp/equal-rows", "nuslerp", shape=(6, 2), weight=[0.2, 0.3], nuslerp_flatten=0, steps=1, tolerance=ARC, data=38),
    case("multislerp/models", "multislerp", weight=W, base_too=False, tolerance=ARC),
    case("multislerp/deltas", "multislerp", shape=(5, 7), weight=W, tolerance=ARC, data=39),
    case("multislerp/vector", "multislerp", shape=(11,), n=4, weight=[0.1, 0.7, 0.2, 0.4], normalize_weights=0, tolerance=ARC, data=40),
    case("multislerp/large-eps", "multislerp", shape=(3, 3), weight=W, eps=0.05, tolerance=ARC, data=41),
    case("karcher/models", "karcher", tolerance=ARC),
    case("karcher/vector", "karcher", shape=(7,), n=4, tolerance=ARC, data=42),
    case("karcher/two-steps", "karcher", shape=(3, 5), n=2, max_iter=2, tol=1e-9, tolerance=ARC, data=43),
    case("karcher/equal", "karcher", shape=(3, 5), n=3, steps=0, tolerance=ARC, data=44),
    case("model_stock/tensor", "model_stock", tolerance=ARC),
    case("model_stock/rows", "model_stock", shape=(5, 7), filter_wise=1, tolerance=ARC, data=45),
    case("model_stock/vector", "model_stock", shape=(7,), n=2, filter_wise=1, tolerance=ARC, data=46),
    case("model_stock/paper-some-equal", "model_stock", shape=(6, 2), profile="paper", filter_wise=1, steps=1, tolerance=ARC, data=47),
    case("varm/tensor", "varm", tolerance=ARC),
    case("varm/vector", "varm", shape=(7,), n=2, tolerance=ARC, data=48, **{"lambda": 0.5}),
    case("varm/all-equal", "varm", shape=(3, 3), steps=0, tolerance=ARC, data=49),
    case("sce/all", "sce", tolerance=ARC),
    case("sce/select", "sce", shape=(9, 11), select_topk=0.3, tolerance=ARC, data=50),
    case("sce/equal-variances", "sce", shape=(47,), n=2, select_topk=0.6, steps=2, tolerance=ARC, data=51),
    case("sce/weights-only-paper", "sce", shape=(9, 11), profile="paper", select_topk=0.3, select_weights_only=1, tolerance=ARC, data=52),
    case("sce/select-none", "sce", shape=(3, 3), select_topk=0.0, tolerance=ARC, data=53),
    case("sce/steps-paper", "sce", shape=(5, 9), n=2, profile="paper", steps=1, tolerance=ARC, data=54),
    case("ram/epsilon", "ram", epsilon=0.2, tolerance=ARC),
    case("ram/vector", "ram", shape=(31,), n=4, steps=1, tolerance=ARC, data=55),
    case("ram/odd-bf16", "ram", shape=(3, 7), dtype="bf16", steps=1, tolerance=ARC, data=56),
    case("ramplus_tl/epsilon", "ramplus_tl", epsilon=0.2, tolerance=ARC),
    case("ramplus_tl/vector", "ramplus_tl", shape=(31,), n=4, steps=1, r=0.3, alpha=5.0, tolerance=ARC, data=57),
    case("ramplus_tl/none-unique", "ramplus_tl", shape=(3, 5), n=2, alpha=1e9, r=1e-7, tolerance=ARC, data=58),
    case("nearswap/matrix", "nearswap", t=0.05),
    case("nearswap/vector", "nearswap", shape=(17,), t=0.3, data=59),
    case("nearswap/equal", "nearswap", shape=(3, 7), dtype="bf16", t=1e-4, steps=1, data=60),
    case("arcee_fusion/matrix", "arcee_fusion", shape=(9, 11), data=61),
    case("arcee_fusion/vector", "arcee_fusion", shape=(29,), data=62),
    case("arcee_fusion/equal", "arcee_fusion", shape=(5, 7), steps=0, data=63),
    case("arcee_fusion/columns", "arcee_fusion", shape=(2, 5, 3), dtype="bf16", data=64),
    case("passthrough/as-it-is", "passthrough", shape=(3, 7)),
    case("passthrough/scaled", "passthrough", shape=(7,), scale=0.3, data=65),
    case("passthrough/none", "passthrough", shape=(3, 3), dtype="f16", scale=0.0, data=66),
    case("consensus/two", "consensus", shape=(9, 11), data=67),
    case("consensus/vector", "consensus", shape=(19,), k=1, mask_lambda=[0.2, 0.6, 1.0], data=68, **{"lambda": 0.5}),
    case("consensus/equal", "consensus", shape=(5, 7), n=2, mask_lambda=1.0, steps=1, data=69),
    case("emr/matrix", "emr", shape=(9, 11), data=70),
    case("emr/vector", "emr", shape=(19,), n=2, data=71, **{"lambda": 0.5}),
    case("emr/equal", "emr", shape=(5, 7), dtype="bf16", steps=1, data=72),
    case("wudi/tall", "wudi", shape=(7, 5), rank=1.0, tolerance=ARC, data=80),
    case("wudi/default", "wudi", shape=(7, 5), tolerance=ARC, data=80),
    case("wudi/wide-rank-deficient", "wudi", shape=(3, 11), n=2, rank=1.0, tolerance=ARC, data=81, **{"lambda": 0.7}),
    case("wudi/ridge", "wudi", shape=(5, 7), ridge=0.3, rank=1.0, tolerance=ARC, data=82),
    case("wudi/rank-and-ridge", "wudi", shape=(6, 5), ridge=0.1, rank=0.5, tolerance=ARC, data=83),
    case("wudi/one-model", "wudi", shape=(4, 9), n=1, dtype="bf16", rank=1.0, tolerance=ARC, data=84),
    case("wudi/vector", "wudi", shape=(13,), tolerance=ARC, data=85),
    case("wudi/equal", "wudi", shape=(3, 5), steps=0, rank=1.0, tolerance=ARC, data=86),
    case("wudi/ridge-equal", "wudi", shape=(3, 5), ridge=0.5, steps=0, rank=1.0, tolerance=ARC, data=86),
    case("optmerge/tall", "optmerge", shape=(11, 6), rank=1.0, tolerance=ARC, data=87),
    case("optmerge/default", "optmerge", shape=(5, 9), n=2, tolerance=ARC, data=88),
    case("optmerge/wide", "optmerge", shape=(5, 9), n=2, rank=1.0, tolerance=ARC, data=88),
    case("optmerge/rank", "optmerge", shape=(7, 7), n=2, rank=0.3, tolerance=ARC, data=89, **{"lambda": 1.5}),
    case("optmerge/ridge", "optmerge", shape=(4, 6), n=4, ridge=0.2, rank=1.0, tolerance=ARC, data=90),
    case("optmerge/more-models-than-rows", "optmerge", shape=(2, 5), n=3, rank=1.0, tolerance=ARC, data=91),
    case("optmerge/vector", "optmerge", shape=(7,), n=2, tolerance=ARC, data=92),
    case("tsvm/tall", "tsvm", shape=(11, 7), weight=W, tolerance=ARC, data=93),
    case("tsvm/wide", "tsvm", shape=(5, 13), n=2, tolerance=ARC, data=94, **{"lambda": 0.5}),
    case("tsvm/one-model", "tsvm", shape=(6, 6), n=1, tolerance=ARC, data=95),
    case("tsvm/more-models-than-rows", "tsvm", shape=(2, 9), weight=W, tolerance=ARC, data=96),
    case("tsvm/bf16-column", "tsvm", shape=(9, 1), n=1, dtype="bf16", tolerance=ARC, data=97),
    case("tsvm/vector", "tsvm", shape=(5,), weight=W, tolerance=ARC, data=98),
    case("tsvm/3-d", "tsvm", shape=(2, 3, 4), tolerance=ARC, data=99),
    case("tsvm/equal", "tsvm", shape=(6, 4), n=2, steps=0, tolerance=ARC, data=100),
    case("iso_c/tall", "iso_c", shape=(9, 5), weight=W, tolerance=ARC, data=101),
    case("iso_c/wide", "iso_c", shape=(4, 11), n=2, tolerance=ARC, data=102, **{"lambda": 0.4}),
    case("iso_c/square-paper", "iso_c", shape=(7, 7), profile="paper", tolerance=ARC, data=103),
    case("iso_c/vector", "iso_c", shape=(19,), weight=W, tolerance=ARC, data=104),
    case("iso_c/equal", "iso_c", shape=(3, 4), steps=0, tolerance=ARC, data=105),
    case("iso_cts/tall", "iso_cts", shape=(13, 11), weight=W, tolerance=ARC, data=106),
    case("iso_cts/wide-half", "iso_cts", shape=(7, 12), n=2, common=0.5, tolerance=ARC, data=107),
    case("iso_cts/nothing-common", "iso_cts", shape=(6, 9), n=2, common=0.0, tolerance=ARC, data=108, **{"lambda": 0.3}),
    case("iso_cts/rounds-beyond", "iso_cts", shape=(3, 8), n=2, common=0.0, tolerance=ARC, data=109),
    case("iso_cts/all-common", "iso_cts", shape=(5, 7), common=1.0, tolerance=ARC, data=110),
    case("iso_cts/vector", "iso_cts", shape=(6,), n=4, tolerance=ARC, data=111),
    case("opcm/tall", "opcm", shape=(9, 7), tolerance=ARC, data=112),
    case("opcm/wide", "opcm", shape=(5, 11), n=4, alpha=0.8, tolerance=ARC, data=113),
    case("opcm/square-none", "opcm", shape=(6, 6), n=2, alpha=0.0, tolerance=ARC, data=114, **{"lambda": 0.5}),
    case("opcm/one-model", "opcm", shape=(4, 3), n=1, tolerance=ARC, data=115),
    case("opcm/vector-paper", "opcm", shape=(17,), profile="paper", tolerance=ARC, data=116),
    case("twin/tall", "twin", shape=(12, 11), weight=W, density=0.4, tolerance=ARC, data=117),
    case("twin/wide-per-model", "twin", shape=(7, 15), weight=[1.0, 0.0, 0.5], density=[0.3, 1.0, 1.0], normalize=0, tolerance=ARC, data=118,
         **{"lambda": 0.25}),
    case("twin/shared-alone", "twin", shape=(5, 5), n=2, weight=[0.0, 0.0], tolerance=ARC, data=119),
    case("twin/vector", "twin", shape=(9,), weight=W, tolerance=ARC, data=120),
    case("pcb/second", "pcb", shape=(11, 13), tolerance=RATIO, data=130),
    case("pcb/second-weighted", "pcb", shape=(37,), weight=[0.8, 1.2, -1.0], ratio=0.3, quantile=0.1, tolerance=RATIO, data=131),
    case("pcb/first", "pcb", shape=(9, 11), variant=1, tolerance=RATIO, data=132),
    case("pcb/first-negative-threshold", "pcb", shape=(9, 7), n=2, variant=1, ratio=0.9, tolerance=RATIO, data=133),
    case("pcb/everything", "pcb", shape=(5, 7), ratio=1.0, quantile=0.0, tolerance=RATIO, data=134),
    case("pcb/bf16-equal-magnitudes", "pcb", shape=(8, 9), dtype="bf16", steps=2, tolerance=RATIO, data=135),
    case("pcb/one-element", "pcb", shape=(1,), tolerance=RATIO, data=136),
    case("pcb/no-change", "pcb", shape=(3, 4), steps=0, tolerance=RATIO, data=137),
    case("magnitude_prune/matrix", "magnitude_prune", shape=(9, 11), weight=W, density=[0.2, 0.5, 0.9], tolerance=ARC, data=138),
    case("magnitude_prune/plain-vector", "magnitude_prune", shape=(19,), density=0.3, rescale=0, normalize=1, tolerance=ARC, data=139, **{"lambda": 0.5}),
    case("magnitude_prune/equal", "magnitude_prune", shape=(5, 7), dtype="bf16", density=0.4, steps=2, tolerance=ARC, data=140),
    case("localize_stitch/tenth", "localize_stitch", shape=(11, 13), tolerance=ARC, data=141),
    case("localize_stitch/overlaps", "localize_stitch", shape=(23,), density=[0.3, 0.6, 1.0], tolerance=ARC, data=142, **{"lambda": 0.7}),
    case("localize_stitch/equal", "localize_stitch", shape=(5, 7), dtype="bf16", density=0.5, steps=1, tolerance=ARC, data=143),
    case("mwa/losses", "mwa", metric=[1.9, 1.2, 2.3], penalty=2, tolerance=ARC, data=144),
    case("mwa/steps", "mwa", shape=(17,), metric=[100.0, 200.0, 400.0], higher_is_better=1, tolerance=ARC, data=145),
    case("mwa/uniform", "mwa", shape=(3, 5), dtype="f16", metric=[1.0, 5.0, 9.0], penalty=0, tolerance=ARC, data=146),
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
