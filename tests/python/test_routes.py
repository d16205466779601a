"""Routes: words and weights, and what is materialised against a NumPy version of the dynamic-merge rule.

The rule runs on the signs and scales of the pack (test_pack.py holds those against the checkpoints), in float64 with one
rounding at the end, so materialised tensors have to agree to the bit.
"""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import onebitmerge as obm
import plain

TASKS = ["chat", "math", "code"]
MATRICES = ["model.layers.0.self_attn.q_proj.weight", "model.layers.3.mlp.down_proj.weight"]


def deltas_of(pack, experts, base, name):
    """d~ of every task in float64: planes added up, or the expert's own tensor minus the base's (in float32)."""
    out = []
    for task in pack.tasks:
        t = next(t for t in pack.tensors(task) if t["name"] == name)
        d = np.zeros(base[name].shape)
        if t["mode"] == "full":
            d = (experts[task][name] - base[name]).astype(np.float64)
        for signs, scales in t["planes"]:
            d = d + plain.spread(scales, *base[name].shape, "row") * plain.unpack_signs(signs, t["cols"])
        out.append(d)
    return out


@pytest.fixture(scope="module")
def tensors(models):
    return {name: plain.load(models / name) for name in ("base", *TASKS)}


# ---- words ----

@pytest.mark.parametrize("route, weights", [
    ("chat", {"chat": 1}), ("math", {"math": 1}), (2, {"code": 1}), ("2", {"code": 1}), ("base", {}), ("chat=.7,math=.3", {"chat": .7, "math": .3}),
    ({"code": 2}, {"code": 2}), ([.5, 0, .25], {"chat": .5, "code": .25}), (np.array([0, 1, 0]), {"math": 1}), ({}, {}), ({"math": np.float32(.5)}, {"math": .5}),
])
def test_parse(pack, route, weights):
    assert pack.parse_route(route) == weights


@pytest.mark.parametrize("route, text", [("math", "math"), ({"chat": .7, "math": .3}, "chat=0.7,math=0.3"), ({}, "base"), ([0, 0, 1], "code"),
                                         ({"math": .5}, "math=0.5")])
def test_format(pack, route, text):
    assert pack.format_route(route) == text


@given(st.lists(st.floats(0, 4, allow_subnormal=False), min_size=3, max_size=3))
@settings(max_examples=200, deadline=None)
def test_format_and_parse_round_trip(pack, weights):
    assert pack.parse_route(pack.format_route(weights)) == {task: w for task, w in zip(TASKS, weights) if w}


@pytest.mark.parametrize("route, error, message", [
    ("poetry", obm.NotFoundError, "poetry.*chat.*math.*code"), ({"poetry": 1}, obm.NotFoundError, "poetry"),
    ("chat=-1", obm.ArgumentError, "chat"), ("chat=x", obm.ArgumentError, "x"), ("chat=nan", obm.ArgumentError, "chat"),
    (3, obm.ArgumentError, "0..2"), (-1, obm.ArgumentError, "-1"), ([1, 0], ValueError, "2 weights for 3 tasks"), (None, TypeError, "route"), (1.5, TypeError, "route"),
])
def test_refused(pack, route, error, message):
    with pytest.raises(error, match=message):
        pack.parse_route(route)


@pytest.mark.parametrize("weights", [{"chat": -0.5}, {"chat": float("nan")}, [float("inf"), 0, 0]])
def test_weights_have_to_be_numbers(pack, weights):
    with pytest.raises(obm.ArgumentError, match="chat"):
        pack.materialise(weights, MATRICES[0])


# ---- materialised ----

ROUTES = ["chat", "math", "code", "base", {"chat": .7, "math": .3}, {"chat": .25, "math": .5, "code": .25}, {"code": 1.5}]


@pytest.mark.parametrize("reading", ["onto_base", "recomputed"])
@pytest.mark.parametrize("strength", [0, .3, 1])
def test_planes(own_pack, tensors, reading, strength):
    own_pack.set(lambda_=strength, reading=reading)
    for name in MATRICES:
        d = deltas_of(own_pack, tensors, tensors["base"], name)
        for route in ROUTES:
            weights = [own_pack.parse_route(route).get(task, 0) for task in TASKS]
            want = (tensors["base"][name] + plain.merged_delta(d, weights, strength, reading)).astype(np.float32)
            got = own_pack.materialise(route, name)
            assert got.dtype == np.float32 and got.shape == want.shape
            differs = (got != want).mean()
            assert differs < 1e-4, (route, differs)   # the sum of a soft route may be formed in another order
            assert np.abs(got - want).max() <= np.spacing(np.abs(want).max())


def test_lambda_0_is_the_routed_expert_alone(own_pack, tensors):
    own_pack.set(lambda_=0)
    name = MATRICES[1]
    d = deltas_of(own_pack, tensors, tensors["base"], name)
    assert np.array_equal(own_pack.materialise("math", name), (tensors["base"][name] + d[1]).astype(np.float32))


@pytest.mark.filterwarnings("ignore:pack .* reading recomputed with two experts:RuntimeWarning")
def test_recomputed_between_two_is_the_other(models, experts, tmp_path, tensors):
    """K = 2, lambda = 1: base + d_a + (d_b - d_a)."""
    pack = obm.compress(models / "base", {"math": experts["math"], "code": experts["code"]}, tmp_path / "p")
    pack.set(lambda_=1, reading="recomputed")
    for name in MATRICES:
        assert np.allclose(pack.materialise("math", name), tensors["base"][name] + deltas_of(pack, tensors, tensors["base"], name)[1], atol=1e-6)


@pytest.mark.parametrize("reading", ["onto_base", "recomputed"])
@pytest.mark.parametrize("profile, density", [("mergekit", 1), ("mergekit", .3), ("paper", .2), ("default", .5)])
def test_full_tensors_are_trimmed_by_the_profile(models, experts, tmp_path, tensors, profile, density, reading):
    """chat and code keep their MLP full; math is 1-bit everywhere.  1-bit matrices are never trimmed."""
    pack = obm.compress(models / "base", {"chat": (experts["chat"], "attention"), "math": experts["math"], "code": (experts["code"], "attention")},
                        tmp_path / "p")
    pack.set(lambda_=.3, profile=profile, density=density, reading=reading)
    modes = {task: {t["name"]: t["mode"] for t in pack.tensors(task)} for task in TASKS}
    name = "model.layers.1.mlp.up_proj.weight"
    deltas = {n: deltas_of(pack, tensors, tensors["base"], n) for n in ([name] if profile != "paper" else sorted(tensors["base"]))}

    def counts(n, k, j):
        return modes[TASKS[j]][n] == "full" or (reading == "recomputed" and modes[TASKS[k]][n] == "full")

    def vector(n, k, j):
        d = deltas[n][j] - deltas[n][k] if reading == "recomputed" else deltas[n][j]
        return d.astype(np.float32)

    def trim(x, k, j):
        if density == 1 or not counts(name, k, j):
            return x
        if profile != "paper":   # one threshold per tensor
            return np.where(plain.trim_top(vector(name, k, j), density) != 0, x, 0)
        parts = [n for n in sorted(deltas) if counts(n, k, j)]   # one threshold for the model, tensors in order of their names
        kept = plain.trim_top(np.concatenate([vector(n, k, j).ravel() for n in parts]), density)
        at = sum(deltas[n][j].size for n in parts[:parts.index(name)])
        return np.where(kept[at:at + x.size].reshape(x.shape) != 0, x, 0)

    for route in ("chat", "math", {"math": .5, "code": .5}):
        weights = [pack.parse_route(route).get(task, 0) for task in TASKS]
        want = (tensors["base"][name] + plain.merged_delta(deltas[name], weights, .3, reading, trim)).astype(np.float32)
        assert np.array_equal(pack.materialise(route, name), want), route


def test_thread_counts_agree_to_the_bit(pack_path, threads):
    seen = []
    for n in (1, 2, 5):
        threads(n)
        p = obm.Pack(pack_path)
        seen.append([p.materialise(r, name).tobytes() for r in ("math", {"chat": .5, "code": .5}) for name in MATRICES])
    assert seen[0] == seen[1] == seen[2]


def test_an_unknown_tensor(pack):
    with pytest.raises(obm.NotFoundError, match="model.nothing"):
        pack.materialise("math", "model.nothing")


# ---- export ----

@pytest.mark.parametrize("dtype", [None, "f32", "f16", "bf16"])
def test_export_is_what_is_materialised(pack, tmp_path, dtype, models):
    out = tmp_path / "dense"
    report = pack.export("math", out, dtype=dtype)
    stored = plain.read_safetensors(out / "model.safetensors")
    want_dtype = (dtype or "bf16").upper()
    assert set(stored) == set(pack.base.keys()) and {d for d, _, _ in stored.values()} == {want_dtype}
    changed = lost = 0
    for name, (kind, shape, data) in stored.items():
        merged = pack.materialise("math", name)
        base = pack.base[name].numpy()
        got = plain.widen(kind, shape, data)
        assert np.array_equal(got, plain.rounded(merged, want_dtype)), name
        moved = merged != base
        changed += int(moved.sum())
        lost += int((moved & (got == plain.rounded(base, want_dtype))).sum())
    assert report["changed"] == pytest.approx(changed, rel=0.02)   # the report counts d~ != 0, here only what f32 can see counts
    assert report["lost"] == pytest.approx(lost, rel=0.02, abs=report["changed"] - changed)
    if dtype == "f32":
        assert report["lost"] <= report["changed"] - changed
    assert report["tensors"] == len(stored)
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}[want_dtype]
    assert (out / "tokenizer.json").read_bytes() == (models / "base" / "tokenizer.json").read_bytes()
    assert "math" in (out / "README.md").read_text()


def test_a_routed_model_is_its_exported_folder(pack, model, models, tmp_path):
    """Materialised in memory a tensor is rounded to the base's dtype, unless that loses more than 1 % of its deltas."""
    tensors, kinds = {}, set()
    for name in pack.base.keys():
        base, merged = pack.base[name].numpy(), pack.materialise("math", name)
        moved, short = merged != base, plain.rounded(merged, "BF16")
        wide = moved.any() and (moved & (short == base)).sum() > 0.01 * moved.sum()
        kinds.add(bool(wide))
        tensors[name] = merged if wide else short
    folder = plain.write_folder(tmp_path / "dense", tensors, config=json.loads((models / "base" / "config.json").read_text()))
    ids = model.tokenizer.encode("What is 17 plus 5?")
    assert kinds == {True, False}
    dense = obm.Model(pack, materialise=True)
    assert np.abs(obm.Model(folder).logits(ids) - dense.logits(ids, route="math")).max() < 1e-4
    pack.export("math", tmp_path / "exported", dtype="f32")
    exported = obm.Model(tmp_path / "exported")
    assert exported.tokenizer.encode("What is 17 plus 5?") == ids
    assert np.abs(exported.logits(ids) - model.logits(ids, route="math")).max() < 0.05


def test_export_in_shards_and_dry(pack, tmp_path):
    plan = pack.export("math", tmp_path / "x", dry_run=True)
    assert list(tmp_path.iterdir()) == [] and plan["bytes_written"] > 2_000_000
    pack.export("math", tmp_path / "x", shard_bytes=500_000)
    index = json.loads((tmp_path / "x" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3 and set(index["weight_map"]) == set(pack.base.keys())
    with pytest.raises(FileExistsError, match="x"):
        pack.export("math", tmp_path / "x")
    pack.export("chat", tmp_path / "x", overwrite=True)
    name = MATRICES[0]
    assert np.array_equal(obm.Checkpoint(tmp_path / "x")[name].numpy(), plain.rounded(pack.materialise("chat", name), "BF16"))


def test_export_refuses(pack, tmp_path):
    with pytest.raises(obm.ArgumentError, match="f64"):
        pack.export("math", tmp_path / "x", dtype="f64")
    with pytest.raises(obm.NotFoundError, match="poetry"):
        pack.export("poetry", tmp_path / "x")
    with pytest.raises(ZeroDivisionError):
        pack.export("math", tmp_path / "x", progress=lambda *call: 1 / 0)
    assert list(tmp_path.iterdir()) == []
