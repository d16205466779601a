"""Merge methods written in Python, against formulas in NumPy over whole tensors."""

import gc
import hashlib
import os
import pathlib
import re
import signal
import time

import numpy as np
import pytest

import onebitmerge as obm
import plain

LORA = pathlib.Path(__file__).resolve().parent.parent / "vectors" / "lora"
RNG = np.random.default_rng(5)


@pytest.fixture
def registered():
    names = []

    def register(name, *args, **kwargs):
        obm.register_method(name, *args, **kwargs)
        names.append(name)
    yield register
    for name in {*names} & {m["name"] for m in obm.methods()}:
        obm.register_method(name, None)


@pytest.fixture
def recipe(models):
    return {"base_model": str(models / "base"), "dtype": "float32",
            "models": [{"model": str(models / name)} for name in ("chat", "math", "code")]}


def sha(folder):
    return hashlib.sha256((pathlib.Path(folder) / "model.safetensors").read_bytes()).hexdigest()


def largest(tile):
    """Per element the weighted task vector of the largest magnitude, the first of equals."""
    d = tile.vectors * tile.parameters["weight"][:, None]
    return d[np.argmax(np.abs(d), 0), np.arange(len(tile))] * np.float32(tile.parameters["gain"])


LARGEST = {"weight": {"default": 1, "scope": "model", "min": 0, "max": 4, "doc": "factor of this model"}, "gain": .5}


def test_a_folder_against_numpy(registered, recipe, models, tmp_path):
    """Weights by model, a gradient over the layers, filters: each tensor gets its own values."""
    registered("largest", largest, LARGEST, doc="the largest wins")
    weights = {"chat": 1, "math": 2, "code": .5}
    for model in recipe["models"]:
        model["parameters"] = {"weight": weights[os.path.basename(model["model"])]}
    recipe["parameters"] = {"gain": [{"filter": "mlp", "value": [0, 1]}, {"value": .25}]}
    obm.merge({**recipe, "merge_method": "largest"}, tmp_path / "out")
    got, base = plain.load(tmp_path / "out"), plain.load(models / "base")
    experts = {name: plain.load(models / name) for name in weights}
    layers = 1 + max(int(m[1]) for name in base if (m := re.search(r"layers\.(\d+)\.", name)))
    for name, x in base.items():
        d = np.stack([(experts[e][name] - x) * np.float32(w) for e, w in weights.items()])
        best = np.take_along_axis(d, np.abs(d).argmax(0)[None], 0)[0]
        layer = re.search(r"layers\.(\d+)\.mlp", name)
        gain = np.float32(int(layer[1]) / (layers - 1) if layer else .25)
        assert np.array_equal(got[name], x + best * gain), name
    card = (tmp_path / "out" / "README.md").read_text()
    assert "largest (the largest wins; test_custom_methods.largest)" in card


def test_tiles_and_threads_change_nothing(registered, recipe, tmp_path):
    registered("largest", largest, LARGEST)
    recipe["merge_method"] = "largest"
    with pytest.raises(obm.ArgumentError, match="needs at least") as refused:
        obm.merge(recipe, tmp_path / "none", memory=1)
    least = int(re.search(r"\((\d+) bytes\)", str(refused.value))[1])
    obm.merge(recipe, tmp_path / "a")
    want = sha(tmp_path / "a")
    try:
        for threads, memory in ((1, least), (3, least), (3, 0)):
            obm.set_threads(threads)
            obm.merge(recipe, tmp_path / "b", memory=memory and memory + 2_000_000 * threads, overwrite=True)
            assert sha(tmp_path / "b") == want
    finally:
        obm.set_threads(0)


def test_tiles_of_a_tensor():
    """Tiles follow each other without gaps, end with the tensor, and cut what is large."""
    base = RNG.standard_normal((3, 300_001)).astype(np.float32)
    models = [base + RNG.standard_normal(base.shape).astype(np.float32) for _ in range(2)]
    seen = []

    def method(tile):
        assert tile.vectors.dtype == tile.base.dtype == np.float32 and tile.vectors.shape == (2, len(tile)) and tile.shape == base.shape
        assert np.array_equal(tile.base, base.reshape(-1)[tile.begin:tile.begin + len(tile)])
        assert not tile.out.any()
        seen.append((tile.begin, len(tile)))
        tile.out += tile.vectors[0] * tile.vectors[1]
        tile.vectors[:] = tile.base[:] = np.nan
        return tile.out
    got = obm.merge_tensors(method, models, base)
    assert np.array_equal(got, base + (models[0] - base) * (models[1] - base))
    assert len(seen) > 1 and sum(n for _, n in seen) == base.size
    assert all(at + n == then for (at, n), (then, _) in zip(seen, seen[1:]))


def test_what_is_kept_of_a_tile_stays():
    """The arrays are the core's memory; those that the function keeps are not written again."""
    base = RNG.standard_normal(600_000).astype(np.float32)
    kept = []
    got = obm.merge_tensors(lambda tile: kept.append((tile.begin, tile.vectors[0][::7])) or tile.vectors[0], [base + 1], base)
    gc.collect()
    d = (base + 1) - base
    assert np.array_equal(got, base + d)
    for begin, part in kept:
        assert np.array_equal(part, d[begin:][:7 * len(part):7])


def test_scope_tensor(registered):
    """A whole tensor at once: the share of its norm decides."""
    def by_norm(tile):
        assert (tile.begin, len(tile)) == (0, base.size)
        norms = np.sqrt((tile.vectors.astype(np.float64) ** 2).sum(1))
        return ((norms / norms.sum()).astype(np.float32)[:, None] * tile.vectors).sum(0)
    registered("by_norm", by_norm, scope="tensor")
    base = RNG.standard_normal((700, 501)).astype(np.float32)
    d = [RNG.standard_normal(base.shape).astype(np.float32) * s for s in (1, 3)]
    got = obm.merge_tensors("by_norm", [base + x for x in d], base)
    d = [(base + x) - base for x in d]
    norms = [np.linalg.norm(x.astype(np.float64)) for x in d]
    want = base + sum(np.float32(n / sum(norms)) * x for n, x in zip(norms, d))
    assert np.array_equal(got, want)


def test_without_a_base(registered, models, tmp_path):
    registered("median", lambda tile: np.median(tile.vectors, 0), base=False, min_models=3)
    names = ("chat", "math", "code")
    obm.merge({"merge_method": "median", "models": [{"model": str(models / n)} for n in names], "dtype": "float32"}, tmp_path / "out")
    got, experts = plain.load(tmp_path / "out"), [plain.load(models / n) for n in names]
    for name, x in got.items():
        assert np.array_equal(x, np.sort(np.stack([e[name] for e in experts]), 0)[1]), name
    with pytest.raises(obm.ArgumentError, match="median takes at least 3 models, found 2"):
        obm.merge_tensors("median", [np.ones(2, np.float32)] * 2)


def test_a_lora_folder(tmp_path):
    """An adapter on the recipe's base is a model like others."""
    recipe = {"base_model": str(LORA / "base-f32"), "models": [{"model": str(LORA / "plain")}, {"model": str(LORA / "patterns")}], "dtype": "float32"}
    obm.merge({**recipe, "merge_method": lambda tile: tile.vectors[0] - tile.vectors[1]}, tmp_path / "out")
    got, base = plain.load(tmp_path / "out"), plain.load(LORA / "base-f32")
    d = [plain.read_safetensors(LORA / name / "expected.safetensors") for name in ("plain", "patterns")]
    for name, x in base.items():
        a, b = ((x + (plain.widen(*each[name]) if name in each else 0)) - x for each in d)
        assert np.array_equal(got[name], x + (a - b)), name


def test_names(registered, recipe, tmp_path):
    """In a file, as `method`, and as a callable; the last registration counts, a forgotten one is unknown."""
    registered("mine", lambda tile: tile.vectors[0] * 0)
    obm.register_method("mine", lambda tile: tile.vectors[2])
    (tmp_path / "r.yml").write_text("merge_method: mine\nbase_model: {base_model}\ndtype: float32\nmodels:\n".format(**recipe)
                                    + "".join(f"  - model: {m['model']}\n" for m in recipe["models"]))
    obm.merge(tmp_path / "r.yml", tmp_path / "a")
    obm.merge({**recipe, "merge_method": "ties"}, tmp_path / "b", method="mine")
    obm.merge(recipe, tmp_path / "c", method=lambda tile: tile.vectors[2])
    assert sha(tmp_path / "a") == sha(tmp_path / "b") == sha(tmp_path / "c")
    assert next(m for m in obm.methods() if m["name"] == "mine")["needs_base"] is True
    obm.register_method("mine", None)
    assert "mine" not in {m["name"] for m in obm.methods()}
    with pytest.raises(obm.ArgumentError, match="mine"):
        obm.merge(tmp_path / "r.yml", tmp_path / "d")
    with pytest.raises(obm.NotFoundError, match="mine"):
        obm.register_method("mine", None)


def test_a_base_that_is_missing(registered, recipe, tmp_path):
    del recipe["base_model"]
    words = r'^recipe: custom gets task vectors, so it needs a "base_model", .*registered with base = false \(register_method; .*gets the weights'
    with pytest.raises(obm.ArgumentError, match=words):
        obm.merge(recipe, tmp_path / "out", method=lambda tile: tile.vectors[0])
    registered("first", lambda tile: tile.vectors[0], base=False)
    obm.merge(recipe, tmp_path / "out", method="first")


def test_what_is_raised_comes_back(recipe, tmp_path):
    error = RuntimeError("enough")

    def method(tile):
        if "layers.1" in tile.tensor:
            raise error
        return tile.vectors[0]
    with pytest.raises(RuntimeError) as caught:
        obm.merge(recipe, tmp_path / "out", method=method)
    assert caught.value is error and not (tmp_path / "out").exists()


def test_control_c_inside(recipe, tmp_path):
    def method(tile):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        obm.merge(recipe, tmp_path / "out", method=method)
    assert time.monotonic() - start < 15 and not (tmp_path / "out").exists()


@pytest.mark.parametrize("answer, error, message", [
    (lambda tile: tile.vectors[0].astype(np.float64), obm.DtypeError, r"model\.embed_tokens\.weight: the method m gave float64, expected float32"),
    (lambda tile: None, obm.DtypeError, r"^model\.embed_tokens\.weight: the method m gave nothing, expected a tensor of F32 and shape \(\d+\)$"),
    (lambda tile: tile.vectors, obm.ShapeError, r"gave shape \(3, \d+\), expected \(\d+\)"),
    (lambda tile: "text", obm.DtypeError, "expected float32"),
    (lambda tile: np.full(len(tile), np.inf, np.float32), obm.NonFiniteError, r"model\.embed_tokens\.weight: the method m gave NaN or Inf at index 0"),
])
def test_wrong_answers(registered, recipe, tmp_path, answer, error, message):
    registered("m", answer)
    with pytest.raises(error, match=message):
        obm.merge(recipe, tmp_path / "out", method="m")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("call, error, message", [
    (lambda f: obm.register_method("ties", f), obm.ArgumentError, "ties is a built-in method"),
    (lambda f: obm.register_method("a b", f), obm.ArgumentError, "found \"a b\""),
    (lambda f: obm.register_method("m", 3), TypeError, "callable"),
    (lambda f: obm.register_method("m", f, scope="model"), obm.ArgumentError, "expected element or tensor"),
    (lambda f: obm.register_method("m", f, {"x": {"defalt": 1}}), obm.ArgumentError, "x: unknown key 'defalt'"),
    (lambda f: obm.register_method("m", f, {"x": {"default": 2, "max": 1}}), obm.ArgumentError, "expected a default in"),
    (lambda f: obm.merge_tensors(3, [np.ones(2, np.float32)]), TypeError, "expected a name or a callable"),
    (lambda f: obm.merge_tensors(f, [np.ones(2, np.float32)]), obm.ArgumentError, "needs a base"),
    (lambda f: obm.merge_tensors(f, [np.ones(2, np.float32)], np.ones(2, np.float32), {"gain": 1}), obm.NotFoundError, "no parameter \"gain\""),
])
def test_wrong_use(call, error, message):
    with pytest.raises(error, match=message):
        call(lambda tile: None)


def test_parameters(registered):
    """Ranges are checked, booleans are booleans, what is required is asked for."""
    seen = {}
    registered("m", lambda tile: seen.update(tile.parameters) or tile.out, {**LARGEST, "flag": True, "flags": {"default": False, "scope": "model"},
                                                                "needed": {"required": True}})
    x = np.ones(3, np.float32)
    obm.merge_tensors("m", [x, x], x, {"weight": [1, 3], "flags": [True, False], "needed": 7})
    assert seen["gain"] == .5 and seen["flag"] is True and seen["needed"] == 7
    assert seen["weight"].tolist() == [1, 3] and seen["weight"].dtype == np.float32 and seen["flags"].tolist() == [True, False]
    with pytest.raises(obm.ArgumentError, match=r"weight: expected a number in \[0, 4\], found 5"):
        obm.merge_tensors("m", [x, x], x, {"weight": 5, "needed": 1})
    with pytest.raises(obm.ArgumentError, match="needs the parameter needed"):
        obm.merge_tensors("m", [x, x], x)
