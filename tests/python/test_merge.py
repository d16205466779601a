"""Recipes to folders, and tensors to tensors, against NumPy formulas (float32 tensors, float64 sums)."""

import errno
import json
import math
import os
import signal
import subprocess
import sys
import types
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest

import onebitmerge as obm
import plain
from onebitmerge import cli

WEIGHTS = {"chat": .5, "math": .3, "code": .7}


@pytest.fixture(scope="module")
def tensors(models):
    return {name: plain.load(models / name) for name in ("base", *WEIGHTS)}


@pytest.fixture
def recipe(models):
    def make(method, **parameters):
        return {"merge_method": method, "base_model": str(models / "base"), "dtype": "float32", "parameters": parameters,
                "models": [{"model": str(models / name), "parameters": {"weight": w}} for name, w in WEIGHTS.items()]}
    return make


def in_bf16(d):
    """mergekit forms differences in the recipe's dtype."""
    return plain.rounded(d.astype(np.float32), "BF16")


def formula(method, t, name, **p):
    base, models, w = t["base"][name], [t[m][name] for m in WEIGHTS], list(WEIGHTS.values())
    if method == "linear":
        total = sum(wi * m.astype(np.float64) for wi, m in zip(w, models))
        return total / sum(w) if p.get("normalize", True) else total
    d = [(in_bf16(m - base) if p.get("bf16") else m - base).astype(np.float64) for m in models]
    if method == "task_arithmetic":
        return base + p.get("lambda", 1) * sum(wi * di for wi, di in zip(w, d))
    if method == "ties":   # trim, elect by the weighted sum (0 counts as +), mean of the agreeing by their weights
        d = [plain.trim_top(di, p["density"]) for di in d]
        total = sum(wi * di for wi, di in zip(w, d))
        sign = np.where(total >= 0, 1, -1)
        agrees = [np.sign(di) == sign for di in d]
        kept = sum(wi * di * a for wi, di, a in zip(w, d, agrees))
        share = sum(wi * a for wi, a in zip(w, agrees))
        mass = sum(wi * np.abs(di) for wi, di in zip(w, d))
        clear = (np.abs(total) > 1e-6 * mass) | (mass == 0)   # else rounding decides the sign
        return np.where(clear, base + kept / np.where(share > 1e-8, share, 1), np.nan)
    raise AssertionError(method)


@pytest.mark.parametrize("method, parameters", [("linear", {}), ("linear", {"normalize": False}), ("task_arithmetic", {}),
                                                ("task_arithmetic", {"lambda": .4}), ("ties", {"density": .3}), ("ties", {"density": 1.0})])
def test_recipes(tensors, recipe, tmp_path, method, parameters):
    given = recipe(method, **parameters)
    if method == "linear":
        del given["base_model"]
    plan = obm.merge(given, tmp_path / "out")
    got = plain.load(tmp_path / "out")
    assert set(got) == set(tensors["base"]) and plan["tensors"] == len(got)
    for name, x in got.items():
        want = formula(method, tensors, name, **parameters)
        assert np.nanmax(np.abs(x - want)) < 2e-6 and np.isnan(want).mean() < .01, name


def test_the_folder_is_a_model(models, recipe, tmp_path, data):
    obm.merge(recipe("task_arithmetic", **{"lambda": .5}), tmp_path / "out")
    out = tmp_path / "out"
    config = json.loads((out / "config.json").read_text())
    assert config["torch_dtype"] == "float32" and config["hidden_size"] == 192
    assert (out / "tokenizer.json").read_bytes() == (models / "base" / "tokenizer.json").read_bytes()
    assert "task_arithmetic" in (out / "README.md").read_text()
    m = obm.Model(out)
    items = [item for task in WEIGHTS for item in data.test[task][:10]]
    hits = sum(data.matches(t, i) for t, i in zip(m.generate([i["messages"] for i in items], max_tokens=64), items))
    assert hits >= 15


def test_dtype_of_the_output(tensors, recipe, tmp_path):
    obm.merge({**recipe("task_arithmetic"), "dtype": "bfloat16"}, tmp_path / "out")
    stored = plain.read_safetensors(tmp_path / "out" / "model.safetensors")
    assert {dtype for dtype, _, _ in stored.values()} == {"BF16"}
    name = "model.layers.0.mlp.up_proj.weight"
    want = plain.rounded(formula("task_arithmetic", tensors, name, bf16=True).astype(np.float32), "BF16")
    assert (plain.widen(*stored[name]) != want).mean() < 1e-3   # an f32 sum in another order may sit on a rounding edge


def test_files_and_dicts_agree(models, recipe, tmp_path):
    (tmp_path / "recipe.yml").write_text(f"""
merge_method: ties   # a comment
base_model: {models}/base
dtype: float32
models:
  - model: {models}/chat
    parameters: {{weight: 0.5, density: 0.3}}
  - {{model: {models}/math, parameters: {{weight: 0.3, density: 0.3}}}}
  - model: {models}/code
    parameters:
      weight: 0.7
      density: 0.3
""")
    obm.merge(tmp_path / "recipe.yml", tmp_path / "a")
    obm.merge(recipe("ties", density=.3), tmp_path / "b")
    (tmp_path / "recipe.json").write_text(json.dumps(recipe("ties", density=.3)))
    obm.merge(str(tmp_path / "recipe.json"), tmp_path / "c")
    a, b, c = (plain.read_safetensors(tmp_path / x / "model.safetensors") for x in "abc")
    assert a == b == c


def test_what_is_no_recipe(models, tmp_path):
    for given, found in [([{"merge_method": "linear"}], r"list \(several documents come from a file\)"), (3, "int$"), (None, "NoneType$")]:
        with pytest.raises(TypeError, match=f"^recipe: expected a path or a mapping, found {found}"):
            obm.merge(given, tmp_path / "out")


def test_relative_paths_start_at_the_recipe(models, tmp_path, monkeypatch):
    (tmp_path / "models").symlink_to(models)
    recipe = {"merge_method": "linear", "models": [{"model": f"models/{m}", "parameters": {"weight": 1}} for m in ("chat", "math")], "dtype": "float32"}
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    obm.merge(tmp_path / "recipe.json", tmp_path / "a")
    obm.merge(recipe, tmp_path / "b", directory=tmp_path)
    monkeypatch.chdir(tmp_path)
    obm.merge(recipe, "c")
    a, b, c = ((tmp_path / x / "model.safetensors").read_bytes() for x in "abc")
    assert a == b == c


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_seeds(tensors, recipe, tmp_path, method, threads):
    given = recipe(method, density=.5)
    seen = {}
    for name, seed, n in (("a", 1, 1), ("b", 1, 5), ("c", 2, 2)):
        threads(n)
        obm.merge(given, tmp_path / name, seed=seed)
        seen[name] = (tmp_path / name / "model.safetensors").read_bytes()
    assert seen["a"] == seen["b"] != seen["c"]


def test_dare_drops_and_rescales(models, tmp_path, tensors):
    """One model at weight 1: every delta is dropped or divided by the density, about half of each."""
    obm.merge({"merge_method": "dare_linear", "base_model": str(models / "base"), "dtype": "float32",
               "models": [{"model": str(models / "math"), "parameters": {"weight": 1, "density": .5}}]}, tmp_path / "out", seed=4)
    name = "model.layers.0.mlp.up_proj.weight"
    got = plain.load(tmp_path / "out")[name].astype(np.float64) - tensors["base"][name]
    d = (tensors["math"][name] - tensors["base"][name]).astype(np.float64)
    kept = np.abs(got - 2 * d) < 1e-6
    dropped = np.abs(got) < 1e-7
    assert (kept | dropped).all()
    n = (d != 0).sum()
    assert abs((dropped & (d != 0)).sum() - n / 2) < 5 * np.sqrt(n) / 2


def test_paper_profile_trims_the_model_as_a_whole(models, tmp_path, tensors):
    given = {"merge_method": "ties", "base_model": str(models / "base"), "dtype": "float32",
             "models": [{"model": str(models / "math"), "parameters": {"weight": 1, "density": .1}}]}
    obm.merge(given, tmp_path / "out", profile="paper")
    got = plain.load(tmp_path / "out")
    names = sorted(tensors["base"])
    d = np.concatenate([(tensors["math"][n] - tensors["base"][n]).ravel() for n in names])
    want = plain.trim_top(d, .1)
    at = 0
    for n in names:
        size = tensors["base"][n].size
        expected = tensors["base"][n] + want[at:at + size].reshape(tensors["base"][n].shape)
        assert np.abs(got[n] - expected).max() < 1e-6, n
        at += size


@pytest.mark.parametrize("keys, written, message", [
    ({"dtype": "float64"}, "F64", "widened on writing"), ({"out_dtype": "torch.float64"}, "F64", "widened on writing"),
    ({"dtype": "float64", "out_dtype": "float32"}, "F32", "dtype: float64: merged in float32$")])
def test_float64_is_float32_widened(recipe, tmp_path, keys, written, message):
    given = recipe("ties", density=.3)
    plan = obm.merge(given, tmp_path / "single")
    with pytest.warns(RuntimeWarning, match=message):
        wide = obm.merge({**given, **keys}, tmp_path / "wide", memory=80_000_000)
    assert wide["bytes_written"] == plan["bytes_written"] * (2 if written == "F64" else 1)
    single, double = (plain.read_safetensors(tmp_path / name / "model.safetensors") for name in ("single", "wide"))
    for name, (dtype, shape, data) in double.items():
        assert dtype == written and shape == single[name][1]
        assert np.array_equal(np.frombuffer(data, plain.DTYPES[dtype]), np.frombuffer(single[name][2], "<f4"))
    config = json.loads((tmp_path / "wide" / "config.json").read_text())
    assert (config.get("torch_dtype") or config["dtype"]) == {"F64": "float64", "F32": "float32"}[written]


def test_dry_run_writes_nothing(recipe, tmp_path):
    plan = obm.merge(recipe("ties", density=.3), tmp_path / "out", dry_run=True)
    assert set(plan) == {"tensors", "tiles", "bytes_read", "bytes_written", "peak_memory", "seconds", "documents"}
    assert list(tmp_path.iterdir()) == []
    assert plan["bytes_written"] == 4 * 1427136
    seconds = {m: obm.merge(recipe(m), tmp_path / "out", dry_run=True)["seconds"] for m in ("task_arithmetic", "pcb", "opcm")}
    assert min(seconds["pcb"], seconds["opcm"]) > 4 * seconds["task_arithmetic"]
    with pytest.raises(obm.Error, match=r"memory: this merge needs at least [\d.]+MB \(\d+ bytes\), found 1 bytes; [\d.]+MB of that are for pages") as error:
        obm.merge(recipe("ties", density=.3), tmp_path / "out", dry_run=True, memory=1)
    least = int(str(error.value).split("MB (")[1].split()[0])   # tiles of one block of 4096 elements
    assert least <= cli.parse_size(str(error.value).split("at least ")[1].split()[0]) < least + 1e5   # as --memory takes it
    plan = obm.merge(recipe("ties", density=.3), tmp_path / "out", dry_run=True, memory=least)
    base = obm.Checkpoint(recipe("ties")["base_model"])
    shapes = [base[name].shape for name in base]
    assert plan["peak_memory"] <= least and plan["tiles"] == sum(-(-math.prod(s) // 4096) for s in shapes) > plan["tensors"]


def test_models_of_other_shapes_are_told_apart(tmp_path):
    def folder(name, *shape):
        return str(plain.write_folder(tmp_path / name, {"model.embed_tokens.weight": np.ones(shape, np.float32)}))
    a, words, wide = folder("a", 4, 8), folder("words", 5, 8), folder("wide", 5, 16)
    for other, hint in ((words, "the vocabularies must be the same, or tokenizer_source says"), (wide, "models of another size, not fine-tunes of one base")):
        with pytest.raises(obm.ShapeError, match=hint):
            obm.merge({"merge_method": "task_arithmetic", "base_model": a, "models": [{"model": other, "parameters": {"weight": 1}}]}, tmp_path / "out")


def test_shards_and_overwrite(recipe, tmp_path):
    out = tmp_path / "out"
    obm.merge(recipe("task_arithmetic"), out, shard_bytes=1_000_000)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) >= 5
    assert index["metadata"]["total_size"] == 4 * 1427136
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    with pytest.raises(FileExistsError, match="out.*; overwrite=True replaces it"):
        obm.merge(recipe("ties"), out)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    obm.merge(recipe("ties"), out, overwrite=True)
    assert (out / "model.safetensors").exists() and not (out / "model.safetensors.index.json").exists()


def test_overwritten_shards_keep_their_names(recipe, tmp_path):
    """Whatever was there: a model of as many shards, of others, or files that no index names."""
    out, given = tmp_path / "out", {"shard_bytes": 1_000_000, "overwrite": True}
    obm.merge(recipe("ties"), tmp_path / "new", **given)
    for before in ("ties", "task_arithmetic", None):
        if before:
            obm.merge(recipe(before), out, **given)
        else:
            (out / "model.safetensors.index.json").unlink()
        reader = obm.Checkpoint(tmp_path / "new" if not before else out)   # maps the old files
        old = {name: reader.sha256(name) for name in reader}
        obm.merge(recipe("ties"), out, **given)
        assert contents(out) == contents(tmp_path / "new")
        assert {name: reader.sha256(name) for name in reader} == old


def test_dry_runs_refuse_what_runs_do(recipe, models, tmp_path):
    one = recipe("ties")["models"][0]["model"]
    out, file = tmp_path / "out", tmp_path / "file"
    obm.merge(recipe("ties"), out)
    file.write_text("mine")
    before = contents(out)
    for dry_run in (True, False):
        with pytest.raises(obm.ArgumentError, match="is an input of the merge, it cannot be the output"):
            obm.merge(recipe("ties"), one, overwrite=True, dry_run=dry_run)
        with pytest.raises(FileExistsError, match="is a file, expected a folder or nothing"):
            obm.merge(recipe("ties"), file, overwrite=True, dry_run=dry_run)
        with pytest.raises(FileExistsError, match="holds a model, .*; overwrite=True replaces it"):
            obm.merge(recipe("ties"), out, dry_run=dry_run)
        with pytest.raises(obm.MismatchError, match="the finished merge there is another: random seed differs"):
            obm.merge(recipe("ties"), out, resume=True, seed=1, dry_run=dry_run)
    assert obm.merge(recipe("ties"), out, overwrite=True, dry_run=True)["tensors"] > 0
    assert contents(out) == before and file.read_text() == "mine"
    pack = obm.compress(models / "base", {"chat": models / "chat"}, out=tmp_path / "p.pack")
    for dry_run in (True, False):
        with pytest.raises(FileExistsError, match="overwrite=True replaces it"):
            obm.compress(models / "base", {"chat": models / "chat"}, tmp_path / "p.pack", dry_run=dry_run)
        with pytest.raises(FileExistsError, match="overwrite=True replaces it"):
            pack.export("chat", out, dry_run=dry_run)
        with pytest.raises(obm.Error, match="is the folder of the base itself"):
            pack.export("chat", models / "base", dry_run=dry_run)


def test_ignored_density_warns(recipe, tmp_path):
    with pytest.warns(RuntimeWarning, match="recipe: parameters: task_arithmetic takes no density; ignored"):
        obm.merge(recipe("task_arithmetic", density=.5), tmp_path / "a")
    obm.merge(recipe("task_arithmetic"), tmp_path / "b")
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


def test_ranks_that_overflow():
    """sce ranks by variances: squares of differences, which f32 holds up to 1.8e19."""
    rng = np.random.default_rng(5)
    models, base = rng.standard_normal((3, 1000)).astype(np.float32), np.zeros(1000, np.float32)
    assert np.count_nonzero(obm.merge_tensors("sce", list(models * np.float32(1e18)), base, {"select_topk": .5})) == 500
    with pytest.raises(obm.NonFiniteError, match="the tensor: what sce ranks elements by overflows f32 at index [0-9]+: the differences there are too large"):
        obm.merge_tensors("sce", list(models * np.float32(1e21)), base, {"select_topk": .5})


# Prints the plan's peak memory and what the process took for itself, in bytes.
MEASURED = """
import json, sys, threading
import onebitmerge as obm
recipe, out = json.loads(sys.argv[1]), sys.argv[2]
def anonymous():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("RssAnon"))
obm.set_threads(2)
plan = obm.merge(recipe, out, dry_run=True)
before, peak, done = anonymous(), [0], threading.Event()
def watch():
    while not done.wait(0.001):
        peak[0] = max(peak[0], anonymous())
thread = threading.Thread(target=watch)
thread.start()
obm.merge(recipe, out)
done.set()
thread.join()
print(plan["peak_memory"], peak[0] - before)
"""


@pytest.mark.parametrize("method, rows, cols", [("linear", 2048, 2048), ("ties", 2048, 2048), ("della", 2048, 2048), ("pcb", 2048, 2048), ("tsvm", 512, 768)])
def test_peak_memory(tmp_path, method, rows, cols):
    """The plan is no less than half of the memory that is measured and no more than 3 times (looks, which may miss the peak), but for 2 MB."""
    rng = np.random.default_rng(1)
    names = ("base", "a", "b", "c")
    for name in names:
        values = rng.standard_normal((rows, cols)).astype(np.float32)
        plain.write_folder(tmp_path / name, {f"model.layers.{i}.mlp.up_proj.weight": values for i in range(4)}, "BF16")
    known = {p["name"] for m in obm.methods() if m["name"] == method for p in m["params"]}
    parameters = {key: value for key, value in (("weight", .5), ("density", .5)) if key in known}
    recipe = {"merge_method": method, "models": [{"model": str(tmp_path / n), "parameters": parameters} for n in names[1:]]}
    if method != "linear":
        recipe["base_model"] = str(tmp_path / "base")
    done = subprocess.run([sys.executable, "-c", MEASURED, json.dumps(recipe), str(tmp_path / "out")], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    planned, measured = map(int, done.stdout.split())
    assert measured < 2 * planned + 2e6 and planned < 3 * measured + 2e6, (planned, measured)


# Merges in a process that kills itself at the progress call of the given number of bytes.
KILLED = """
import json, os, signal, sys
import onebitmerge as obm
recipe, out, at, given = json.loads(sys.argv[1])
def progress(what, done, total):
    if done >= at: os.kill(os.getpid(), signal.SIGKILL)
obm.merge(recipe, out, progress=progress, **given)
"""


def merge_killed(recipe, out, at, **given):
    code = subprocess.run([sys.executable, "-c", KILLED, json.dumps([recipe, str(out), at, given])], stderr=subprocess.PIPE).returncode
    assert code == -signal.SIGKILL


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.mark.parametrize("method, parameters, profile", [("ties", {"density": .3}, "mergekit"), ("ties", {"density": .3}, "paper"),
                                                         ("dare_ties", {"density": .5}, "mergekit")])
def test_resume(recipe, tmp_path, method, parameters, profile, threads):
    given = {"shard_bytes": 1_000_000, "profile": profile, "seed": 5}
    obm.merge(recipe(method, **parameters), tmp_path / "whole", **given)
    out = tmp_path / "out"
    merge_killed(recipe(method, **parameters), out, 3_000_000, **given)
    for last in out.glob("model-00006-*.tmp-*"):   # it may have been quicker than the kill, and something must be left to do
        last.unlink()
    finished = {p.stat().st_ino for p in out.glob("*.safetensors.tmp-*")}
    assert (out / "onebitmerge-unfinished.json").exists() and not list(out.glob("*.safetensors")) and len(finished) >= 3
    before = contents(out)
    files, = (d["files"] for d in obm.merge(recipe(method, **parameters), out, resume=True, dry_run=True, **given)["documents"])
    there = [f["there"] for f in files]
    assert there[:2] == [True, True] and not there[-1] and len(finished) - 1 <= sum(there) <= len(finished)
    assert not any(f["there"] for f in obm.merge(recipe(method, **parameters), out, dry_run=True, **given)["documents"][0]["files"])
    assert contents(out) == before
    threads(2)   # neither threads nor memory are part of the job
    obm.merge(recipe(method, **parameters), out, resume=True, memory=300_000_000, **given)
    assert contents(out) == contents(tmp_path / "whole")
    assert len(finished & {p.stat().st_ino for p in out.iterdir()}) >= 2


FINISHED = "out: this merge is finished already .size and checksum of every file verified.; nothing was written"


@pytest.mark.parametrize("shard_bytes", (1_000_000, 0))
def test_resuming_what_is_finished(recipe, tmp_path, shard_bytes):
    """Verified and left alone, whoever asks for it; the card is anybody's to write in."""
    out, given = tmp_path / "out", {"shard_bytes": shard_bytes}
    plan = obm.merge(recipe("ties"), out, **given)
    (out / "README.md").write_text("ours\n")
    before, times = contents(out), {p.name: p.stat().st_mtime_ns for p in out.iterdir()}
    for overwrite in (False, True):
        with pytest.warns(RuntimeWarning, match=FINISHED):
            assert obm.merge(recipe("ties"), out, resume=True, overwrite=overwrite, **given) == plan
    files = obm.merge(recipe("ties"), out, resume=True, dry_run=True, **given)["documents"][0]["files"]
    assert files and all(f["there"] for f in files)
    assert contents(out) == before and times == {p.name: p.stat().st_mtime_ns for p in out.iterdir()}
    with pytest.raises(FileExistsError, match="holds a model, and overwriting was not asked for"):
        obm.merge(recipe("ties"), out, **given)
    for dry_run in (True, False):
        with pytest.raises(obm.MismatchError, match='the finished merge there is another: random seed differs, "0" then, "3" now'):
            obm.merge(recipe("ties"), out, resume=True, seed=3, dry_run=dry_run, **given)
    assert contents(out) == before


@pytest.mark.parametrize("name, at", [("model-00002-of-00006.safetensors", -1), ("config.json", 3), ("model.safetensors.index.json", -10),
                                      ("tokenizer.json", None)])
def test_resuming_what_is_finished_and_damaged(recipe, tmp_path, name, at):
    out, given = tmp_path / "out", {"shard_bytes": 1_000_000}
    obm.merge(recipe("ties"), out, **given)
    whole = contents(out)
    data = bytearray(whole[name])
    if at is None:
        data = data[:-1]
    else:
        data[at] ^= 1
    (out / name).write_bytes(data)
    for dry_run in (True, False):
        with pytest.raises(FileExistsError, match=f"out: {name} is damaged: it is not what the finished merge wrote.*overwrite=True replaces it"):
            obm.merge(recipe("ties"), out, resume=True, dry_run=dry_run, **given)
    assert contents(out) == {**whole, name: bytes(data)}
    if name != "model.safetensors.index.json":    # without it nothing says that this is a model of one's own
        (out / name).unlink()
        with pytest.raises(FileExistsError, match=f"out: {name}, which the finished merge wrote, is missing.*overwrite=True replaces it"):
            obm.merge(recipe("ties"), out, resume=True, **given)
    obm.merge(recipe("ties"), out, resume=True, overwrite=True, **given)
    assert contents(out) == whole


def test_resuming_finished_documents(models, tmp_path):
    """Of two results the first is there, the second computed again."""
    first = {"name": "first", "merge_method": "linear", "models": [{"model": f"{models}/{m}", "parameters": {"weight": 1}} for m in ("chat", "math")]}
    last = {**first, "name": "last", "models": [{"model": m, "parameters": {"weight": 1}} for m in ("first", f"{models}/code")]}
    (tmp_path / "r.yml").write_text(f"{json.dumps(first)}\n---\n{json.dumps(last)}")
    obm.merge(tmp_path / "r.yml", tmp_path / "out")
    whole = contents(tmp_path / "out/last")
    for p in (tmp_path / "out/last").iterdir():
        p.unlink()
    with pytest.warns(RuntimeWarning, match="first: this merge is finished already") as seen:
        obm.merge(tmp_path / "r.yml", tmp_path / "out", resume=True)
    assert len(seen) == 1 and contents(tmp_path / "out/last") == whole


def test_outputs_larger_than_the_disk(tmp_path):
    """Refused before a byte is read or written: the input is mostly holes."""
    names, each = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(40)], 100 << 30
    header = json.dumps({n: {"dtype": "BF16", "shape": [each // 2 // 4096, 4096], "data_offsets": [i * each, (i + 1) * each]} for i, n in enumerate(names)}).encode()
    (tmp_path / "in").mkdir()
    with open(tmp_path / "in" / "model.safetensors", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + len(names) * each)
    r = {"merge_method": "passthrough", "models": [{"model": str(tmp_path / "in")}]}
    for dry_run in (True, False):
        with pytest.raises(OSError, match=r"out: 4294967\.\d MB are to be written, \d+\.\d MB are free there: No space left on device") as caught:
            obm.merge(r, tmp_path / "out", dry_run=dry_run)
        assert caught.value.errno == errno.ENOSPC and not (tmp_path / "out").exists()


def test_without_resume_the_remains_go(recipe, tmp_path):
    given = {"shard_bytes": 1_000_000}
    out = tmp_path / "out"
    merge_killed(recipe("ties"), out, 3_000_000, **given)
    (out / "notes.txt").write_text("mine")
    obm.merge(recipe("task_arithmetic"), out)
    assert sorted(p.name for p in out.glob("*") if "token" not in p.name) == ["README.md", "config.json", "generation_config.json",
                                                                              "model.safetensors", "notes.txt", "onebitmerge-finished.json"]


@pytest.mark.parametrize("change, message", [
    (lambda r, g: r.update(merge_method="task_arithmetic"), 'recipe merge_method differs, "ties" then, "task_arithmetic" now'),
    (lambda r, g: r["parameters"].update(density=.4), r'recipe parameters\.density differs, 0\.3 then, 0\.4 now'),
    (lambda r, g: g.update(seed=3), 'random seed differs, "0" then, "3" now'),
    (lambda r, g: g.update(shard_bytes=2_000_000), 'shard size differs, "1000000" then, "2000000" now'),
    (lambda r, g: g.update(profile="paper"), 'profile differs, "mergekit" then, "paper" now'),
    (lambda r, g: r["models"][1]["parameters"].update(weight=.75), r"recipe models\[1\]\.parameters\.weight differs, [\d.]+ then, 0\.75 now"),
    (lambda r, g: r["models"].pop(), r"recipe models\[\d\] differs, {.*} then, nothing now"),
    (None, "input 1 .*chat differs"),
])
def test_resuming_another_merge_is_refused(recipe, models, tmp_path, change, message):
    chat, out = tmp_path / "chat", tmp_path / "out"
    chat.mkdir()
    for file in (models / "chat").iterdir():
        (chat / file.name).write_bytes(file.read_bytes())
    r, given = recipe("ties", density=.3), {"shard_bytes": 1_000_000}
    r["models"][0]["model"] = str(chat)
    merge_killed(r, out, 3_000_000, **given)
    before = contents(out)
    if change:
        change(r, given)
    else:   # another file in the place of the old one
        data = bytearray((chat / "model.safetensors").read_bytes())
        data[-1] ^= 1
        (chat / "new").write_bytes(data)
        os.replace(chat / "new", chat / "model.safetensors")
    with pytest.raises(obm.MismatchError, match=message):
        obm.merge(r, out, resume=True, dry_run=True, **given)
    anew = obm.merge(r, out, resume=True, overwrite=True, dry_run=True, **given)
    assert not any(f["there"] for f in anew["documents"][0]["files"])
    with pytest.raises(obm.Error, match=message) as caught:
        obm.merge(r, out, resume=True, **given)
    assert isinstance(caught.value, obm.MismatchError) and "--force" in str(caught.value) and contents(out) == before
    obm.merge(r, out, resume=True, overwrite=True, **given)
    obm.merge(r, tmp_path / "whole", **given)
    assert contents(out) == contents(tmp_path / "whole")


def test_stopped_with_resume(recipe, tmp_path):
    """Shards that are finished stay; the folder of a run without goes."""
    out = tmp_path / "out"

    def stop(what, done, total):
        if done >= 3_000_000:
            raise KeyboardInterrupt
    for resume in (False, True):
        with pytest.raises(KeyboardInterrupt):
            obm.merge(recipe("ties"), out, shard_bytes=1_000_000, resume=resume, progress=stop)
        assert out.exists() == resume
    obm.merge(recipe("ties"), out, shard_bytes=1_000_000, resume=True)
    obm.merge(recipe("ties"), tmp_path / "whole", shard_bytes=1_000_000)
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize("change, error, message", [
    ({"merge_metod": "ties"}, obm.ArgumentError, "merge_metod.*merge_method"),
    ({"merge_method": "tise"}, obm.ArgumentError, "tise.*ties"),
    ({"parameters": {"densty": .5}}, obm.ArgumentError, "densty.*density"),
    ({"parameters": {"density": 1.5}}, obm.ArgumentError, "density.*1.5"),
    ({"models": [{"model": "a", "weight": 1}, {"model": "b"}]}, obm.ArgumentError, "models.0.: unknown key \"weight\", it belongs under \"parameters\""),
    ({"dtyp": "f32", "parameters": {"densty": .5}}, obm.ArgumentError, "dtyp.*; parameters: ties has no parameter \"densty\""),
    ({"models": []}, obm.Error, "model"),
    ({"base_model": "nowhere"}, OSError, "nowhere"),
    ({"dtype": "int4"}, obm.Error, "int4"),
    ({"tokenizer": {"source": "unoin"}}, obm.NotFoundError, 'unoin has no tokenizer.json, did you mean "union"'),
    ({"parameters": {"density": {1}}}, TypeError, r"^recipe: parameters\.density: expected text, .*, found set$"),
    ({"models": [{"model": "a", "parameters": {"weight": [1, 1j]}}]}, TypeError,
     r"^recipe: models\[0\]\.parameters\.weight\[1\]: .*, found complex$"),
])
def test_recipes_that_are_refused(recipe, tmp_path, change, error, message):
    with pytest.raises(error, match=message) as caught:
        obm.merge({**recipe("ties"), **change}, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_numbers_of_other_kinds(recipe, tmp_path):
    """NumPy's, Decimal, Fraction; a gradient may be an array.  The card has them as plain numbers."""
    obm.merge(recipe("ties", density=.5, normalize=True, **{"lambda": [1.0, .5]}), tmp_path / "plain")
    given = recipe("ties", density=np.float32(.5), normalize=np.bool_(True), **{"lambda": np.array([1, .5])})
    for i, m in enumerate(given["models"]):
        m["parameters"]["weight"] = (Decimal, Fraction, np.longdouble)[i % 3](m["parameters"]["weight"])
    obm.merge(types.MappingProxyType({**given, "random_seed": np.int64(0)}), tmp_path / "other")
    assert (tmp_path / "plain/model.safetensors").read_bytes() == (tmp_path / "other/model.safetensors").read_bytes()


def test_broken_yaml_names_the_line(tmp_path):
    (tmp_path / "bad.yml").write_text("merge_method: ties\nmodels: [1, 2\n")
    with pytest.raises(obm.Error, match="line"):
        obm.merge(tmp_path / "bad.yml", tmp_path / "out")
    with pytest.raises(FileNotFoundError):
        obm.merge(tmp_path / "none.yml", tmp_path / "out")


def test_progress_and_what_it_raises(recipe, tmp_path):
    calls = []
    obm.merge(recipe("ties"), tmp_path / "a", progress=lambda *call: calls.append(call))
    assert calls and calls[-1][1] == calls[-1][2]
    with pytest.raises(ZeroDivisionError):
        obm.merge(recipe("ties"), tmp_path / "b", progress=lambda *call: 1 / 0)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_methods():
    methods = {m["name"]: m for m in obm.methods()}
    assert set(methods) == set("""linear task_arithmetic ties dare_linear dare_ties della della_linear breadcrumbs breadcrumbs_ties slerp
        nuslerp multislerp karcher model_stock sce ram ramplus_tl nearswap arcee_fusion passthrough varm consensus emr
        wudi optmerge tsvm iso_c iso_cts opcm twin pcb magnitude_prune localize_stitch mwa""".split())
    for m in methods.values():
        assert m["doc"] and m["source"] and isinstance(m["needs_base"], bool) and m["min_models"] >= 1
        for p in m["params"]:
            assert p["min"] <= p["default"] <= p["max"] or p["required"]
            assert p["scope"] in ("global", "model") and p["type"] in ("bool", "number") and p["doc"]
    assert not methods["linear"]["needs_base"] and methods["ties"]["needs_base"] and methods["slerp"]["max_models"] == 1


def test_slices_and_vocabulary_as_a_dict(models, tensors, tmp_path):
    """Layers renumbered and scaled, a token more, rows up to a multiple; and the result runs."""
    base, chat = str(models / "base"), str(models / "chat")
    recipe = {"merge_method": "passthrough", "base_model": base, "chat_template": "chatml",
              "slices": [{"sources": [{"model": base, "layer_range": [0, 2]}]},
                         {"sources": [{"model": chat, "layer_range": (1, 2), "parameters": {"scale": 0.5}}]}],
              "tokenizer": {"source": "union", "pad_to_multiple_of": 64, "tokens": {"<new>": {"source": {"kind": "zero"}}}}}
    plan = obm.merge(recipe, tmp_path / "out", dry_run=True)
    assert not (tmp_path / "out").exists() and plan["bytes_written"] > 0
    obm.merge(recipe, tmp_path / "out")
    got, config = plain.load(tmp_path / "out"), json.loads((tmp_path / "out" / "config.json").read_text())
    name = "{}.mlp.up_proj.weight".format
    assert np.array_equal(got[name("model.layers.1")], tensors["base"][name("model.layers.1")])
    assert np.array_equal(got[name("model.layers.2")], 0.5 * tensors["chat"][name("model.layers.1")])
    assert config["num_hidden_layers"] == 3 and name("model.layers.3") not in got
    embedding, before = got["model.embed_tokens.weight"], tensors["base"]["model.embed_tokens.weight"]
    assert config["vocab_size"] == len(embedding) and len(embedding) % 64 == 0
    new = {t["content"]: t["id"] for t in json.loads((tmp_path / "out" / "tokenizer.json").read_text())["added_tokens"]}["<new>"]
    assert not embedding[new].any() and np.array_equal(embedding[:new], before[:new])
    model = obm.Model(tmp_path / "out")
    assert model.tokenizer.encode("<new>") == [new] and model.generate("What is 17 plus 5?", max_tokens=2) is not None
    assert model.tokenizer.apply_template([{"role": "user", "content": "hi"}]).startswith("<|im_start|>")


def test_dry_run_tells_documents_and_shards(models, tmp_path):
    """Sums over documents, and the files as the merge then writes them."""
    one = {"merge_method": "passthrough", "models": [{"model": str(models / "base")}]}
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(json.dumps({**one, "models": [{"model": "side"}]}) + "\n---\n" + json.dumps({**one, "name": "side", "dtype": "float32"}))
    plan = obm.merge(recipe, tmp_path / "out", shard_bytes=1_000_000, dry_run=True)
    side, last = plan["documents"]
    assert [side["name"], last["name"]] == ["side", None] and [side["kept"], last["kept"]] == [False, True]
    assert last["output"] == str(tmp_path / "out") and os.path.basename(side["output"]) == "side"
    for key in ("tensors", "tiles", "bytes_read", "bytes_written"):
        assert plan[key] == side[key] + last[key]
    assert plan["peak_memory"] == max(side["peak_memory"], last["peak_memory"])
    assert not (tmp_path / "out").exists()
    obm.merge(recipe, tmp_path / "out", shard_bytes=1_000_000)
    written = {p.name: p.stat().st_size for p in (tmp_path / "out").glob("*.safetensors")}
    assert len(written) > 2 and {f["file"]: f["bytes"] for f in last["files"]} == written


def test_documents_that_nobody_uses(models, tmp_path):
    """A nameless result beside a document that it does not need; a run that fails leaves the parts of others alone."""
    one = {"merge_method": "passthrough", "models": [{"model": str(models / "base")}]}
    text = json.dumps(one) + "\n---\n" + json.dumps({**one, "name": "side"})
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(text)
    obm.merge(recipe, tmp_path / "out")
    assert len(obm.Checkpoint(tmp_path / "out")) == len(obm.Checkpoint(models / "base"))
    assert not (tmp_path / "out.onebitmerge-parts").exists()
    part = tmp_path / "new.onebitmerge-parts" / "side"
    part.mkdir(parents=True)
    (part / "model.safetensors").write_bytes(b"of a run at work")
    recipe.write_text(text.replace(str(models / "base"), str(tmp_path / "nowhere"), 1))
    with pytest.raises(OSError, match="nowhere"):
        obm.merge(recipe, tmp_path / "new")
    assert (part / "model.safetensors").read_bytes() == b"of a run at work"
