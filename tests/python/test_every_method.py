"""What holds for every method of the registry: tied models stay tied, tiles and threads change nothing, memory is as the option says."""

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

import onebitmerge as obm
import plain

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
SHAPES = {EMBEDDING: (149, 61), "model.layers.0.self_attn.q_proj.weight": (61, 61), "model.layers.0.self_attn.q_proj.bias": (61,),
          "model.layers.0.mlp.up_proj.weight": (131, 61), "model.norm.weight": (61,)}
REQUIRED = {"weight": .5, "t": .25, "metric": 1.5, "density": .4}
METHODS = {m["name"]: m for m in obm.methods()}
# The norm of all tensors, of which an untied model has one more.
OF_THE_WHOLE_MODEL = {"opcm"}


def recipe(root, method, **more):
    """The method on models 1, 2, 3 of a base, as many as it takes, as `more` says."""
    m = METHODS[method]
    known = {p["name"] for p in m["params"]}
    parameters = {name: value for name, value in REQUIRED.items() if name in known}
    given = {"merge_method": method, "models": [{"model": str(root / f"m{i}")} for i in range(1, 1 + min(3, m["max_models"] or 3))], "parameters": parameters}
    if m["needs_base"]:
        given["base_model"] = str(root / "base")
    return {**given, **more}


def hashes(folder):
    c = obm.Checkpoint(folder)
    return {name: (c[name].shape, c.sha256(name)) for name in c}


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    return family(tmp_path_factory.mktemp("tied"), True)


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    """The same models with a head of their own, which is their embedding."""
    return family(tmp_path_factory.mktemp("untied"), False)


def family(root, tied):
    rng = np.random.default_rng(11)
    base = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}
    for i, name in enumerate(("base", "m1", "m2", "m3")):
        tensors = {n: x if not i else (x + .1 * rng.standard_normal(x.shape)).astype(np.float32) for n, x in base.items()}
        if not tied:
            tensors[HEAD] = tensors[EMBEDDING]
        plain.write_folder(root / name, tensors, "BF16", {"model_type": "llama", "tie_word_embeddings": tied})
    return root


@pytest.mark.parametrize("method", METHODS)
def test_tied_models_stay_tied(tied, untied, tmp_path, method):
    """One table, merged as the embedding of untied models is."""
    scope = any(p["name"] == "scope" for p in METHODS[method]["params"])
    results = []
    for root in (tied, untied):
        given = recipe(root, method, dtype="float32")
        if scope:
            given["parameters"] = {**given["parameters"], "scope": "tensor"}
        obm.merge(given, tmp_path / root.name)
        results.append(hashes(tmp_path / root.name))
    assert results[0].keys() == SHAPES.keys() and results[1].keys() == {*SHAPES, HEAD}
    assert obm.Checkpoint(tmp_path / tied.name).config["tie_word_embeddings"] is True
    assert obm.Checkpoint(tmp_path / untied.name).config["tie_word_embeddings"] is False
    if method not in OF_THE_WHOLE_MODEL:
        del results[1][HEAD]
        assert results[0] == results[1]
    assert results[0][EMBEDDING] != hashes(tied / "base")[EMBEDDING]


def least_memory(given, out, **more):
    with pytest.raises(obm.ArgumentError, match="memory: this merge needs at least") as refused:
        obm.merge(given, out, memory=1, **more)
    assert not out.exists()
    return int(re.search(r"\((\d+) bytes\)", str(refused.value))[1])


@pytest.mark.parametrize("profile", ["mergekit", "paper"])
@pytest.mark.parametrize("method", METHODS)
def test_tiles_and_threads_change_nothing(tied, tmp_path, threads, method, profile):
    given, seen, tiles = recipe(tied, method), [], set()
    for n in (1, 3):
        threads(n)
        for memory in (least_memory(given, tmp_path / "none", profile=profile), 0):
            out = tmp_path / f"{n}-{memory}"
            tiles.add(obm.merge(given, out, profile=profile, seed=3, memory=memory)["tiles"])
            seen.append(hashes(out))
    assert seen[0] == seen[1] == seen[2] == seen[3]
    assert len(tiles) == 2   # a tile of one block, and one of the tensor


# Merges in a process of its own, which says by how much the peak of its memory, files' pages and all, is above what it had.
MEASURED = """
import json, sys
import onebitmerge as obm
recipe, out, memory = json.loads(sys.argv[1])
def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))
obm.set_threads(2)
obm.merge(recipe, out, memory=memory, dry_run=True)
open("/proc/self/clear_refs", "w").write("5")   # VmHWM starts anew
before = status("VmRSS")
obm.merge(recipe, out, memory=memory)
print(status("VmHWM") - before)
"""
COUNT = 12_000_000
AWKWARD = {"vector": (COUNT,), "row": (1, COUNT), "column": (COUNT // 240, 240), "embedding": (COUNT // 64, 64)}
MEASURES = 4_000_000   # what a process has besides: code that is read for the first time, stacks


@pytest.fixture(scope="module")
def awkward(tmp_path_factory):
    """Models of a single tensor of 24 MB, the same values in each shape."""
    rng, made = np.random.default_rng(2), {}
    values = {name: np.resize(rng.standard_normal(1_000_003).astype(np.float32), COUNT) for name in ("base", "m1", "m2", "m3")}

    def make(kind):
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind)
            for name, x in values.items():
                tensor = EMBEDDING if kind == "embedding" else "model.norm.weight"
                plain.write_folder(made[kind] / name, {tensor: x.reshape(AWKWARD[kind])}, "BF16")
        return made[kind]
    yield make
    for folder in made.values():
        shutil.rmtree(folder)


def grown(given, out, memory):
    done = subprocess.run([sys.executable, "-c", MEASURED, json.dumps([given, str(out), memory])], capture_output=True, text=True, timeout=600)
    shutil.rmtree(out, ignore_errors=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.parametrize("kind, method", [("vector", m) for m in METHODS] +
                         [(kind, m) for kind in ("row", "column", "embedding") for m in ("ties", "della", "arcee_fusion", "pcb", "opcm")])
def test_memory_is_as_the_option_says(awkward, tmp_path, kind, method):
    """With the least that is enough no more is resident, of the process's own and of the files together."""
    given = recipe(awkward(kind), method)
    least = least_memory(given, tmp_path / "none")
    assert grown(given, tmp_path / "out", least) < least + MEASURES


@pytest.mark.parametrize("method", ["wudi", "optmerge", "tsvm", "iso_c", "iso_cts", "opcm", "twin"])
def test_whole_matrices_are_refused_while_planning(tmp_path, method):
    """Copies of the largest matrix that do not fit the option; with what the message asks for the merge runs, and no more is resident."""
    rng = np.random.default_rng(4)
    for name in ("base", "m1", "m2", "m3"):
        plain.write_folder(tmp_path / name, {"model.layers.0.mlp.up_proj.weight": rng.standard_normal((400, 700))}, "BF16")
    given = recipe(tmp_path, method)
    least = least_memory(given, tmp_path / "none")
    for dry_run in (True, False):
        with pytest.raises(obm.ArgumentError, match="memory: this merge needs at least"):
            obm.merge(given, tmp_path / "out", memory=least - 1, dry_run=dry_run, progress=lambda *_: pytest.fail("something was read"))
    assert least > 8 * 400 * 700 and not (tmp_path / "out").exists()
    assert grown(given, tmp_path / "out", least) < least + 4 * MEASURES   # LAPACK's pages, which it touches for the first time
