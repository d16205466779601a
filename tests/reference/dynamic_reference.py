"""Plain reference of the dynamic merge; writes tests/vectors/dynamic.txt (format: tests/vectors/README.md).

Knows nothing of the library: every element is merged on its own, in f64 (Python's float) and in the order of the experts,
and rounded to f32 once.  Planes are those of onebit_reference.py.
Run:  python3 tests/reference/dynamic_reference.py > tests/vectors/dynamic.txt
"""
import random
import sys

from onebit_reference import alpha_at, compress, f32, line, matrix, show

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
POLICIES = {"linear": LINEAR, "attention": LINEAR[:4], "mlp": LINEAR[4:], "full": ()}


class Expert:
    def __init__(self, task, policy, scale, planes, tensors):
        self.task, self.policy, self.scale, self.planes, self.tensors = task, policy, scale, planes, tensors

    def is_full(self, family, name):
        one_bit = any(part in name for part in POLICIES[self.policy])
        return not one_bit and self.tensors[name] != family.base[name]

    def delta(self, family, name):
        rows, cols = max(1, family.shapes[name][0]), family.shapes[name][1]
        base, own = family.base[name], self.tensors[name]
        if own == base or self.is_full(family, name):
            return [f32(e - b) for e, b in zip(own, base)]
        stored, _ = compress(base, own, rows, cols, self.scale, self.planes)
        d = [0.0] * (rows * cols)
        for alphas, signs in stored:
            width = len(signs) // rows
            for i in range(rows * cols):
                r, c = divmod(i, cols)
                alpha = alpha_at(alphas, self.scale, cols, r, c)
                d[i] += alpha if signs[r * width + c // 8] >> c % 8 & 1 else -alpha
        return d


class Family:
    def __init__(self, name, shapes, base, experts):
        self.name, self.shapes, self.base, self.experts = name, shapes, base, experts
        self.deltas = [{t: e.delta(self, t) for t in shapes} for e in experts]

    def emit(self):
        line("family", self.name)
        for t, (rows, cols) in self.shapes.items():
            line("tensor", t, rows, cols)
            line("base", *map(show, self.base[t]))
        for e in self.experts:
            line("expert", e.task, e.policy, e.scale, e.planes)
            for t in self.shapes:
                line("own", t, *map(show, e.tensors[t]))
        line("end")


def ties(values):
    """Elect by the sum, mean of those that agree; a zero sum yields 0."""
    total = 0.0
    for v in values:
        total += v
    agreeing = [v for v in values if v * total > 0]
    mean = 0.0
    for v in agreeing:
        mean += v
    return mean / len(agreeing) if agreeing else 0.0


def trim(vector, density):
    """vector: {tensor: values}, trimmed together; equal magnitudes go by the lowest index."""
    places = [(name, i) for name in sorted(vector) for i in range(len(vector[name]))]
    order = sorted(range(len(places)), key=lambda p: (-abs(f32(vector[places[p][0]][places[p][1]])), p))
    for p in order[max(1, int(density * len(places))):]:
        name, i = places[p]
        vector[name][i] = 0.0


def remainder(family, k, j, reading, profile, density):
    """What expert j adds to the remainder of a route to expert k."""
    out, full = {}, {}
    for t in family.shapes:
        d = family.deltas[j][t]
        if reading == "recomputed":
            d = [a - b for a, b in zip(d, family.deltas[k][t])]
        out[t] = list(d)
        if family.experts[j].is_full(family, t) or (reading == "recomputed" and family.experts[k].is_full(family, t)):
            full[t] = out[t]
    if density < 1 and full:
        for scope in [full] if profile == "paper" else [{t: v} for t, v in full.items()]:
            trim(scope, density)
    return out


def is_own(family, t, lam, reading, weights):
    """The expert's tensor as it is: a hard route to a full tensor into which nothing of the others comes."""
    hot = [k for k, w in enumerate(weights) if w]
    if len(hot) != 1 or weights[hot[0]] != 1 or not family.experts[hot[0]].is_full(family, t):
        return None
    others = [j for j in range(len(weights)) if j != hot[0]]
    quiet = reading == "onto_base" and not any(any(family.deltas[j][t]) for j in others)
    return family.experts[hot[0]].tensors[t] if lam == 0 or not others or quiet else None


def merge(family, lam, reading, profile, density, weights):
    sums = {t: [0.0] * len(v) for t, v in family.base.items()}
    for k, w in enumerate(weights):
        if w == 0:
            continue
        others = [remainder(family, k, j, reading, profile, density) for j in range(len(weights)) if j != k]
        for t in sums:
            for i in range(len(sums[t])):
                d = family.deltas[k][t][i]
                if lam != 0:
                    d += lam * ties([o[t][i] for o in others])
                sums[t][i] += w * d
    out = {}
    for t in sums:
        own = is_own(family, t, lam, reading, weights)
        out[t] = own or [f32(b + s) for b, s in zip(family.base[t], sums[t])]
    return out


def emit_merge(family, lam, reading, profile, density, weights):
    result = merge(family, lam, reading, profile, density, weights)
    line("merge", family.name)
    line("settings", show(float(lam)), reading, profile, show(float(density)))
    line("route", *(show(float(w)) for w in weights))
    for t in family.shapes:
        line("value", t, *map(show, result[t]))
    line("end")


def near(rng, base, size):
    """A fine-tune: few bits, so that magnitudes repeat and trims meet equal ones."""
    return {t: [f32(x + size * round(rng.gauss(0, 4)) / 1024) for x in v] for t, v in base.items()}


def of_size(rng, base, size):
    """|d| is `size` everywhere: scales that are equal, or sums of each other."""
    return {t: [f32(x + rng.choice((-1, 1)) * size) for x in v] for t, v in base.items()}


def mixed(rng):
    shapes = {"model.embed_tokens.weight": (7, 12), "model.layers.0.mlp.up_proj.weight": (4, 70),
              "model.layers.0.self_attn.q_proj.weight": (3, 130), "model.norm.weight": (0, 24)}
    base = {t: matrix(rng, max(1, r) * c, 0.5, 8) for t, (r, c) in shapes.items()}
    chat, math, code = (near(rng, base, s) for s in (1, 1, 2))
    code["model.norm.weight"] = list(base["model.norm.weight"])
    return Family("mixed", shapes, base, [Expert("chat", "mlp", "matrix", 1, chat), Expert("math", "attention", "row", 2, math),
                                          Expert("code", "linear", "group:64", 1, code)])


def equal_scales(rng, name, sizes):
    shapes = {"model.layers.0.self_attn.v_proj.weight": (4, 24), "model.norm.weight": (0, 6)}
    base = {t: matrix(rng, max(1, r) * c, 0.5, 8) for t, (r, c) in shapes.items()}
    tasks = ("chat", "math", "code", "law")
    return Family(name, shapes, base, [Expert(t, "linear", "matrix", 1, of_size(rng, base, s)) for t, s in zip(tasks, sizes)])


def main():
    rng = random.Random(2)
    print("# Dynamic merges; written by tests/reference/dynamic_reference.py, format in README.md")
    family = mixed(rng)
    family.emit()
    routes = ((1, 0, 0), (0, 1, 0), (0, 0, 1), (0.5, 0.25, 0), (0.75, 0.5, 1.5), (0, 0, 0.5), (0, 0, 0))
    for weights in routes:
        emit_merge(family, 0.3, "onto_base", "mergekit", 1, weights)
    for weights in routes[:4]:
        emit_merge(family, 0.3, "onto_base", "mergekit", 0.4, weights)
        emit_merge(family, 1, "onto_base", "paper", 0.2, weights)
        emit_merge(family, 0.5, "recomputed", "paper", 0.3, weights)
    emit_merge(family, 0.5, "recomputed", "mergekit", 0.3, routes[4])
    emit_merge(family, 0, "onto_base", "paper", 0.2, routes[2])
    emit_merge(family, 0, "recomputed", "paper", 0.2, routes[4])
    cases = (("a-equals-b", (0.25, 0.125, 0.125)), ("a-equals-b-plus-c", (0.0625, 0.375, 0.25, 0.125)),
             ("ai-plus-aj-is-2ak", (0.25, 0.125, 0.375)), ("two", (0.25, 0.125)), ("alone", (0.25,)))
    for name, sizes in cases:
        family = equal_scales(rng, name, sizes)
        family.emit()
        for reading in ("onto_base", "recomputed"):
            for k in range(len(sizes)):
                emit_merge(family, 0.5, reading, "mergekit", 1, [float(j == k) for j in range(len(sizes))])
        emit_merge(family, 1, "onto_base", "paper", 0.5, [0.5 + 0.25 * k for k in range(len(sizes))])


if __name__ == "__main__":
    sys.exit(main())
