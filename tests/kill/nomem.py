"""Out of memory, seen from Python: allocations of the library fail one after the other, and what comes is MemoryError, or the
result where the memory was not needed; objects stay usable and packs whole.

    LD_PRELOAD=nomem.so python tests/kill/nomem.py [--short] [--seed N]
"""

import argparse
import ctypes
import pathlib
import random
import tempfile
import time

import onebitmerge as obm

MODELS = pathlib.Path(__file__).resolve().parents[2] / "examples" / "models"
shim = ctypes.CDLL(None)
shim.nomem_arm.argtypes = [ctypes.c_long]
shim.nomem_calls.restype = ctypes.c_long


def cases(work):
    base, pack_path = MODELS / "base", work / "p.pack"
    experts = {task: MODELS / task for task in ("chat", "math", "code")}
    texts = ["Hello there", "What is 17 plus 5?", "def f(x):"] * 4
    recipe = {"merge_method": "ties", "base_model": str(base), "models": [{"model": str(MODELS / m), "parameters": {"weight": 1, "density": .5}}
                                                                         for m in ("chat", "math")]}
    pack = obm.compress(base, experts, pack_path)
    pack.train_router(texts, ["chat", "math", "code"] * 4)
    model = obm.Model(pack_path)
    vector = obm.TaskVector(base, MODELS / "math")
    return pack, {
        "open a model": lambda: obm.Model(pack_path),
        "open a pack": lambda: obm.Pack(pack_path).tensors("math"),
        "generate": lambda: obm.Model(pack_path).generate(["Hello", "17 plus 5"], max_tokens=4),
        "stream": lambda: list(model.stream("Hello", max_tokens=4, route="math=.5,code=.5")),
        "route": lambda: model.route("Hello", router=lambda request: {"chat": float(request.features()[0] != 0)}),
        "score": lambda: model.score("Hello", " there", route="math"),
        "logits": lambda: model.logits([5, 6, 7], route="math"),
        "tokenize": lambda: model.tokenizer.decode(model.tokenizer.encode("Hello, w\u00f6rld 123")),
        "statistics": lambda: (vector.stats(), vector.compare(vector)),
        "materialise": lambda: pack.materialise("math=.5,code=.5", "model.embed_tokens.weight"),
        "export": lambda: pack.export("math", work / "dense", overwrite=True),
        "merge": lambda: obm.merge(recipe, work / "merged", overwrite=True),
        "train": lambda: obm.Pack(pack_path).train_router(texts, ["chat", "math", "code"] * 4),
        "compress": lambda: obm.compress(base, {"math": MODELS / "math"}, work / "q.pack", overwrite=True),
    }


def sweep(name, call, rng, tries):
    call()
    assert shim.nomem_arm(0), "the shim is not preloaded"
    call()
    total = shim.nomem_calls()
    failed = 0
    for at in sorted(rng.sample(range(1, total + 1), min(tries, total))):
        shim.nomem_arm(at)
        try:
            call()
        except MemoryError:
            failed += 1
        except Exception as e:
            raise AssertionError(f"{name}: allocation {at} of {total}: {e!r}") from e
        finally:
            shim.nomem_arm(0)
    call()
    print(f"{name}: {min(tries, total)} of {total} allocations, {failed} times MemoryError", flush=True)
    assert failed > 0, name


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    args = parser.parse_args()
    print(f"seed {args.seed}", flush=True)
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory(prefix="obm-nomem-") as folder:
        pack, calls = cases(pathlib.Path(folder))
        for name, call in calls.items():
            sweep(name, call, rng, 8 if args.short else 60)
        obm.Pack(pathlib.Path(folder) / "p.pack").verify()
        obm.Pack(pathlib.Path(folder) / "q.pack").verify()


if __name__ == "__main__":
    main()
