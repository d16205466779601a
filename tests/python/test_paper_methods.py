"""Methods whose statistics are taken over a whole model, and schedules of weights, against tests/reference/merge_reference.py."""

import importlib.util
import math
import pathlib

import numpy as np
import pytest

import onebitmerge as obm
import plain

ROOT = pathlib.Path(__file__).resolve().parents[1]
LORA = ROOT / "vectors" / "lora"
SHAPES = {"lm_head.weight": (6, 5), "model.embed_tokens.weight": (6, 5), "model.norm.weight": (5,)}
SHAPES.update((f"model.layers.{layer}.mlp.up_proj.weight", (9, 5)) for layer in range(5))

spec = importlib.util.spec_from_file_location("merge_reference", ROOT / "reference" / "merge_reference.py")
reference = importlib.util.module_from_spec(spec)
spec.loader.exec_module(reference)


@pytest.fixture
def family(tmp_path):
    """A base and two models of unequal spread from tensor to tensor, as folders and as dicts."""
    rng, tensors = np.random.default_rng(3), {}
    tensors["base"] = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}
    for model in ("a", "b"):
        tensors[model] = {name: x + (rng.standard_normal(x.shape) * rng.uniform(.1, 2)).astype(np.float32) for name, x in tensors["base"].items()}
    for name, t in tensors.items():
        plain.write_folder(tmp_path / name, t)
    return tmp_path, tensors


def flat(tensors):
    return [float(x) for name in sorted(SHAPES) for x in tensors[name].ravel()]


@pytest.mark.parametrize("method, parameters", [
    ("pcb", {}), ("pcb", {"variant": 1, "ratio": .3, "quantile": .05}), ("localize_stitch", {}), ("localize_stitch", {"density": .4, "lambda": .5}),
    ("magnitude_prune", {"density": .3}),
])
@pytest.mark.parametrize("scope", ["model", "tensor"])
def test_scopes(family, method, parameters, scope):
    folder, tensors = family
    recipe = {"merge_method": method, "base_model": str(folder / "base"), "dtype": "float32", "parameters": {**parameters, "scope": scope},
              "models": [{"model": str(folder / "a")}, {"model": str(folder / "b")}]}
    obm.merge(recipe, folder / "out")
    got = plain.load(folder / "out")
    function = getattr(reference, method)
    if scope == "model":
        base, *models = (flat(tensors[m]) for m in ("base", "a", "b"))
        assert np.abs(np.array(flat(got)) - function(base, models, parameters, (len(base),), False)).max() < 2e-5
        return
    for name, x in got.items():
        base, *models = ([float(v) for v in tensors[m][name].ravel()] for m in ("base", "a", "b"))
        assert np.abs(x.ravel() - function(base, models, parameters, x.shape, False)).max() < 2e-5, name


def test_a_model_takes_one_ratio(family):
    folder, _ = family
    recipe = {"merge_method": "pcb", "base_model": str(folder / "base"), "models": [{"model": str(folder / "a")}, {"model": str(folder / "b")}],
              "parameters": {"ratio": [.1, .4]}}
    with pytest.raises(obm.ArgumentError, match="one ratio"):
        obm.merge(recipe, folder / "out")
    obm.merge({**recipe, "parameters": {"ratio": [.1, .4], "scope": "tensor"}}, folder / "out")


@pytest.mark.parametrize("method", ["pcb", "localize_stitch", "magnitude_prune"])
def test_lora_folders(tmp_path, method):
    recipe = {"merge_method": method, "base_model": str(LORA / "base-f32"), "dtype": "float32", "parameters": {"scope": "tensor", "density": .5},
              "models": [{"model": str(LORA / "plain")}, {"model": str(LORA / "patterns")}]}
    if method == "pcb":
        recipe["parameters"] = {"scope": "tensor", "ratio": .5}
    obm.merge(recipe, tmp_path / "out")
    got, base = plain.load(tmp_path / "out"), plain.load(LORA / "base-f32")
    d = [plain.read_safetensors(LORA / name / "expected.safetensors") for name in ("plain", "patterns")]
    p = {key: value for key, value in recipe["parameters"].items() if key != "scope"}
    for name, x in base.items():
        models = [x + (plain.widen(*each[name]) if name in each else 0) for each in d]
        want = getattr(reference, method)([float(v) for v in x.ravel()], [[float(v) for v in m.ravel()] for m in models], p, x.shape, False)
        assert np.abs(got[name].ravel() - want).max() < 2e-5, name


def test_mwa(family):
    folder, tensors = family
    recipe = {"merge_method": "mwa", "dtype": "float32", "parameters": {"penalty": 3},
              "models": [{"model": str(folder / m), "parameters": {"metric": loss}} for m, loss in (("a", 1.1), ("b", 1.7))]}
    obm.merge(recipe, folder / "out")
    w = [math.exp(-3 * math.log(loss)) for loss in (1.1, 1.7)]
    for name, x in plain.load(folder / "out").items():
        assert np.abs(x - (w[0] * tensors["a"][name] + w[1] * tensors["b"][name]) / sum(w)).max() < 1e-6, name
    recipe["models"][1]["parameters"]["metric"] = 0
    with pytest.raises(obm.ArgumentError, match=f"metric of {folder}/b: expected a number above 0, found 0"):
        obm.merge(recipe, folder / "none")
    del recipe["models"][1]["parameters"]
    with pytest.raises(obm.ArgumentError, match="metric"):
        obm.merge(recipe, folder / "none")


def test_layer_swapping_is_a_schedule(family):
    """A list as long as the model is deep gives each layer its own weight; what is in no layer takes the first."""
    folder, tensors = family
    schedule = {"a": [1, .5, 0, 0, .5], "b": [0, .5, 1, 1, .5]}
    obm.merge({"merge_method": "linear", "dtype": "float32",
               "models": [{"model": str(folder / m), "parameters": {"weight": w}} for m, w in schedule.items()]}, folder / "out")
    for name, x in plain.load(folder / "out").items():
        layer = int(name.split(".")[2]) if "layers" in name else 0
        a, b = schedule["a"][layer], schedule["b"][layer]
        assert np.abs(x - (a * tensors["a"][name] + b * tensors["b"][name])).max() < 1e-6, name
