"""Every architecture as a family of a base and three experts: compressed, run on planes, materialised, exported, merged."""

import json
import pathlib

import numpy as np
import pytest

import onebitmerge as obm
import plain

VECTORS = pathlib.Path(__file__).resolve().parents[1] / "vectors" / "models"
NAMES = sorted(p.name for p in VECTORS.iterdir() if p.is_dir())
ROUTES = ("a", "b", "c", "a=.6,b=.3", {"a": .4, "b": .4, "c": .4})
# Kept full by a policy, a matrix becomes an overlay; a fused one is shared by its roles.
POLICIES = {"a": {}, "b": {"scale": "matrix"}, "c": {"scale": "group:64", "planes": 2}}
MIXED = {"a": {"policy": "attention"}, "b": {"policy": "mlp"}, "c": {"map": {"*.down_proj.weight": "full", "*.self_attn.[kq]*.weight": "full"}}}
# Activations on planes are 15-bit fixed point in tiles: 3e-5 of the largest of a vector, in two or three layers.
PLANES = 2e-3


def text_part(tensors):
    return {name: x for name, x in tensors.items() if not name.startswith(("vision_tower.", "multi_modal_projector."))}


def perturb(tensors, seed):
    rng = np.random.default_rng(seed)
    return {name: (x + rng.normal(0, 0.02, x.shape)).astype(np.float32) for name, x in tensors.items()}


class Family:
    def __init__(self, name, folder):
        self.base, self.folder = VECTORS / name, folder
        self.config = json.loads((self.base / "config.json").read_text())
        self.tensors = plain.load(self.base)
        self.experts = {}
        for seed, task in enumerate("abc"):
            self.experts[task] = perturb(self.tensors, seed)
            plain.write_folder(folder / task, self.experts[task], config=self.config)
        self.ids = plain.load(VECTORS / f"{name}-expected.safetensors")["ids"].astype(int).tolist()

    def pack(self, name, policies):
        return obm.compress(self.base, {t: obm.Expert(self.folder / t, **policies[t]) for t in "abc"}, self.folder / name)


@pytest.fixture(scope="module", params=NAMES)
def family(request, tmp_path_factory):
    return Family(request.param, tmp_path_factory.mktemp(request.param))


def distance(a, b):
    return np.abs(a - b).max() / b.std()


def test_every_matrix_of_a_layer_is_attention_or_mlp(family):
    for name, x in family.tensors.items():
        cls = obm.class_of(name, x.ndim)
        if name not in text_part(family.tensors):
            assert cls == "other"
        elif x.ndim == 2 and ".layers." in name:
            assert cls == ("attention" if "self_attn" in name else "mlp")
        else:
            assert cls in ("embedding", "head", "norm", "bias")


@pytest.mark.parametrize("policies", [POLICIES, MIXED], ids=["planes", "mixed"])
def test_packs_run_as_the_dense_model(family, tmp_path, policies):
    """On planes and materialised; by prefill and token by token."""
    pack = family.pack(f"pack-{len(str(policies))}", policies)
    runs, dense_way = obm.Model(pack), obm.Model(pack, materialise=True)
    assert runs.memory["planes"] > 0
    for i, route in enumerate(ROUTES):
        pack.export(route, tmp_path / str(i), dtype="f32")
        dense = obm.Model(tmp_path / str(i))
        expected = dense.logits(family.ids)
        assert distance(expected, runs.logits(family.ids, route="base")) > 10 * PLANES
        for decode in (False, True):
            assert distance(dense_way.logits(family.ids, route=route, decode=decode), expected) < 1e-4
            assert distance(runs.logits(family.ids, route=route, decode=decode), expected) < PLANES
        greedy = dense_way.generate({"ids": family.ids[:9]}, route=route, max_tokens=12, ignore_eos=True)
        assert greedy.ids == dense.generate({"ids": family.ids[:9]}, max_tokens=12, ignore_eos=True).ids


def test_overlays_of_a_fused_tensor_count_once(family):
    """A route that materialises everything holds each tensor that runs exactly once."""
    model = obm.Model(family.pack("once", POLICIES), materialise=True)
    model.logits(family.ids[:3], route="a")
    assert model.memory["overlays"] == sum(4 * x.size for x in text_part(family.tensors).values())


def test_merges_run(family):
    recipe = {"merge_method": "linear", "dtype": "float32",
              "models": [{"model": str(family.folder / t), "parameters": {"weight": 0.5}} for t in "ab"]}
    obm.merge(recipe, family.folder / "merged")
    merged = plain.load(family.folder / "merged")
    for name, x in merged.items():
        assert np.abs(x - (family.experts["a"][name] + family.experts["b"][name]) / 2).max() < 1e-6
    logits = obm.Model(family.folder / "merged").logits(family.ids)
    assert np.isfinite(logits).all() and distance(logits, obm.Model(family.base).logits(family.ids)) > 1e-3
