"""The main job on the example models: experts -> pack -> route -> merged model -> text, with honest numbers.

    python3 examples/quickstart.py [--fast]

Compresses the three experts to one bit per weight, trains the router, and compares base, experts, static merges, routing and
1bit-Merging on test prompts.  Every hyper-parameter is chosen on validation prompts, none on test prompts.
"""

import argparse
import contextlib
import json
import pathlib
import struct
import sys
import tempfile
import time

import numpy as np

import onebitmerge as obm
from onebitmerge import _results
from onebitmerge.evaluate import is_right, wilson

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import train_experts  # noqa: E402  (the generators of prompts; needs no torch)

TASKS = ("chat", "math", "code")
SETS = (*TASKS, "mixed")
MODELS = HERE / "models"
LAMBDAS = (0.1, 0.3, 0.5, 1.0)
BATCH = 32


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def answers(model, items, **options):
    return model.generate([item["messages"] for item in items], max_tokens=40, batch=BATCH, **options)


def hits(model, items, **options):
    return [is_right(text, item) for text, item in zip(answers(model, items, **options), items)]


def every(sets):
    return [item for name in sets for item in sets[name]]


def tally(texts, sets):
    """{set: (hits, n)} of the answers to every item."""
    names = [name for name in sets for _ in sets[name]]
    right = [is_right(text, item) for text, item in zip(texts, every(sets))]
    return {name: (sum(r for r, n in zip(right, names) if n == name), len(sets[name])) for name in sets}


def accuracy(model, sets, **options):
    """{set: (hits, n)}; all sets go through the model in one batch."""
    return tally(answers(model, every(sets), **options), sets)


def both_ways(table, name, pack, test, **options):
    """On the sign planes, and with dense weights for every route: two rows, and whether each answer is the same text."""
    texts = {}
    for way, label in ((False, name), (True, f"{name}, materialised")):
        texts[way] = answers(obm.Model(pack, materialise=way), every(test), **options)
        table.add(label, tally(texts[way], test))
    differ = sum(a != b for a, b in zip(texts[False], texts[True]))
    table.notes.append(f"{name}: {differ or 'none'} of {len(texts[True])} answers differ")


def mean(result):
    return sum(h / n for h, n in result.values()) / len(result)


class Table:
    """One row per method: accuracy per set in percent, with the 95 % Wilson interval."""

    def __init__(self):
        self.rows, self.notes = [], []
        self.start = time.monotonic()

    def add(self, name, result):
        cells = []
        for s in SETS:
            h, n = result[s]
            low, high = wilson(h, n)
            cells.append(f"{100 * h / n:.1f} ({100 * low:.0f}-{100 * high:.0f})")
        self.rows.append([name, *cells, f"{100 * mean(result):.1f}"])
        print(f"  {time.monotonic() - self.start:5.0f} s  {name}", file=sys.stderr, flush=True)

    def __str__(self):
        return _results.table(["accuracy in % (95 % interval)", *SETS, "mean of 4"], self.rows)


def write_safetensors(path, tensors):
    """float32 arrays as a .safetensors file: 8 bytes of header length, JSON, data."""
    header, offset = {}, 0
    for name, a in tensors.items():
        header[name] = {"dtype": "F32", "shape": list(a.shape), "data_offsets": [offset, offset + a.nbytes]}
        offset += a.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for a in tensors.values():
            file.write(a.tobytes())


def random_signs(pack, out):
    """A control: the pack's own alphas with signs by a coin.  If it does as well as the real signs, the signs carry nothing."""
    rng = np.random.default_rng(0)
    paths = {}
    for task in pack.tasks:
        tensors = {name: np.asarray(pack.base[name]).astype(np.float32) for name in pack.base}
        for t in pack.tensors(task):
            for _, alpha in t["planes"]:
                tensors[t["name"]] += alpha[:, None] * rng.choice(np.float32([-1, 1]), size=tensors[t["name"]].shape)
        paths[task] = out / f"random-{task}.safetensors"
        write_safetensors(paths[task], tensors)
    return obm.compress(MODELS / "base", paths, out / "random.pack")


def choose(name, candidates, evaluate):
    """The candidate with the best mean validation accuracy; the first of equals."""
    scores = {c: mean(evaluate(c)) for c in candidates}
    best = max(scores, key=scores.get)
    print(f"validation, {name}: " + ", ".join(f"{c:g}: {100 * s:.1f} %" for c, s in scores.items()) + f" -> {best:g}")
    return best


def static_merges(table, out, valid, test):
    models = [{"model": str(MODELS / t), "parameters": {"weight": 1.0}} for t in TASKS]

    def merged(method, lam, parameters):
        recipe = {"merge_method": method, "base_model": str(MODELS / "base"), "models": models, "dtype": "float32",
                  "parameters": {"lambda": lam, **parameters}}
        obm.merge(recipe, out / "merged", seed=0, overwrite=True, profile="mergekit")
        return obm.Model(out / "merged")

    for label, method, parameters in (("task arithmetic", "task_arithmetic", {"normalize": False}),
                                      ("TIES, density 0.5", "ties", {"density": 0.5, "normalize": True}),
                                      ("DARE-TIES, density 0.5", "dare_ties", {"density": 0.5, "normalize": False})):
        lam = choose(f"lambda of {label}", LAMBDAS, lambda x: accuracy(merged(method, x, parameters), valid))
        table.add(f"{label}, lambda {lam:g}", accuracy(merged(method, lam, parameters), test))


def by_oracle(model, sets, tasks=TASKS):
    """The task's name is the route; the mixed prompts have no task of their own and go through the router."""
    return {s: (sum(hits(model, items, **({"route": s} if s in tasks else {}))), len(items)) for s, items in sets.items()}


def dynamic_merges(table, pack, out, data, valid, test):
    def at(lam, source=pack):
        source.set(lambda_=lam)
        return obm.Model(source)

    model = at(0.0)
    for task in TASKS:
        table.add(f"1-bit expert {task}", accuracy(model, test, route=task))
    table.add("oracle routing, lambda 0", by_oracle(model, test))
    both_ways(table, "trained router, lambda 0 (routing only)", pack, test)
    lam = choose("lambda of 1bit-Merging", (0.0, *LAMBDAS), lambda x: accuracy(at(x), valid))
    if lam == 0:
        print("Validation chose lambda 0: on these experts routing does all the work, merging the others adds nothing.")
    model = at(lam)
    both_ways(table, f"1bit-Merging, trained router, lambda {lam:g}", pack, test)
    table.add(f"1bit-Merging, oracle routing, lambda {lam:g}", by_oracle(model, test))
    # Every prompt has a route of its own here: dense weights for each of them would take longer than all the rest.
    soft = accuracy(model, test, router=lambda request: request.probabilities)
    table.add(f"soft routing by probability, lambda {lam:g}", soft)
    table.add("control: random signs, oracle, lambda 0", controlled(random_signs(pack, out), data, test))
    dropped = obm.compress(MODELS / "base", {t: obm.Expert(MODELS / t, map={"*_proj.weight": "drop"}) for t in TASKS}, out / "dropped.pack")
    table.add("control: linear deltas dropped, oracle, lambda 0", controlled(dropped, data, test))
    return model


def controlled(pack, data, test):
    pack.set(lambda_=0.0)
    train_router(pack, data)
    return by_oracle(obm.Model(pack), test)


def train_router(pack, data):
    items = read(data / "router_train.jsonl")
    return pack.train_router([i["messages"] for i in items], [i["task"] for i in items], layer=0)


def routed_right(pack, test):
    """How often the built-in router names the task, on test prompts whose wordings it has mostly not seen."""
    model = obm.Model(pack)
    right = [list(model.route(item["messages"])[0]) == [s] for s in TASKS for item in test[s]]
    low, high = wilson(sum(right), len(right))
    print(f"on test prompts: {100 * sum(right) / len(right):.1f} % of {len(right)} routed right (95 % interval {100 * low:.1f}-{100 * high:.1f})\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fast", action="store_true", help="40 test and 20 validation prompts per set instead of 200 and 60")
    fast = parser.parse_args().fast
    n_test, n_valid = (40, 20) if fast else (200, 60)

    info = obm.info()
    print(f"onebitmerge {info['version']}, {info['isa']}, {info['threads']} threads, {info['blas']}\n")
    with tempfile.TemporaryDirectory(prefix="onebitmerge-") as scratch:
        out = pathlib.Path(scratch)
        with contextlib.redirect_stdout(sys.stderr):
            train_experts.main(["data", "--out", str(out / "data"), "--test", str(n_test), "--valid", str(n_valid)])
        test = {s: read(out / "data" / f"test_{s}.jsonl") for s in SETS}
        valid = {s: read(out / "data" / f"valid_{s}.jsonl") for s in SETS}

        print("experts -> pack: one bit per weight of every linear layer, one scale per row (same: equal to the base's, nothing stored)")
        pack = obm.compress(MODELS / "base", {t: MODELS / t for t in TASKS}, out / "example.pack")
        print(pack, "\n")
        print("pack -> route")
        print(train_router(pack, out / "data"))
        routed_right(pack, test)

        print(f"route -> merged model -> text: greedy, {n_test} test prompts per set")
        table = Table()
        table.add("base", accuracy(obm.Model(MODELS / "base"), test))
        for task in TASKS:
            table.add(f"expert {task}", accuracy(obm.Model(MODELS / task), test))
        static_merges(table, out, valid, test)
        model = dynamic_merges(table, pack, out, out / "data", valid, test)
        print(f"\n{table}\n")
        print("Packs run on their sign planes; the rows that say materialised used dense weights for every route instead:")
        print("".join(f"  {note}\n" for note in table.notes))
        print("How to read it: compare the lambda 0 row (routing only) with 1bit-Merging for what merging the others adds, and with the\n"
              "two controls for what the signs carry; overlapping intervals are no difference.\n")
        if fast:
            print("--fast: small sets, wide intervals; the numbers in README.md are from a full run.\n")
        for s in TASKS:
            prompt = test[s][0]["messages"]
            answer = model.generate(prompt, max_tokens=40)
            print(f"[{', '.join(answer.route)}] {prompt[0]['content']!r} -> {str(answer)!r}")


if __name__ == "__main__":
    main()
