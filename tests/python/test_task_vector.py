"""TaskVector against NumPy: differences in float32, norms and 1-bit errors in float64."""

import numpy as np
import pytest

import onebitmerge as obm
import plain


@pytest.fixture(scope="module")
def tensors(models):
    return {name: plain.load(models / name) for name in ("base", "chat", "math", "code")}


@pytest.fixture(scope="module")
def math_vector(models):
    return obm.TaskVector(models / "base", models / "math")


def classes(names):
    kinds = {"q_proj": "attention", "k_proj": "attention", "v_proj": "attention", "o_proj": "attention", "gate_proj": "mlp",
             "up_proj": "mlp", "down_proj": "mlp", "embed_tokens": "embedding", "norm": "norm", "layernorm": "norm"}
    return {name: next(cls for part, cls in kinds.items() if name.split(".")[-2].endswith(part)) for name in names}


def test_values(math_vector, tensors):
    assert math_vector.keys() == sorted(tensors["base"])
    assert list(math_vector) == math_vector.keys() and len(math_vector) == len(tensors["base"])
    for name in math_vector:
        got = np.asarray(math_vector[name])
        assert got.dtype == np.float32
        assert np.array_equal(got, tensors["math"][name] - tensors["base"][name])


def test_results_are_writable_and_own_their_memory(math_vector):
    array = math_vector["model.norm.weight"].numpy()
    array[0] = 7
    assert math_vector["model.norm.weight"].numpy()[0] != 7


def test_checkpoints_and_paths_are_the_same(models, math_vector):
    base = obm.Checkpoint(models / "base")
    v = obm.TaskVector(base, obm.Checkpoint(models / "math"))
    del base
    name = "model.layers.0.mlp.up_proj.weight"
    assert np.array_equal(v[name].numpy(), math_vector[name].numpy())
    assert "math" in repr(v)


def one_bit_error(d, axis):
    alpha = np.abs(d).mean(axis=axis, keepdims=True)
    return ((d - alpha * np.where(d >= 0, 1, -1)) ** 2).sum()


def expected_stats(base, expert, names):
    d = [(expert[n] - base[n]).astype(np.float64) for n in names]
    params, zeros = sum(x.size for x in d), sum(int((x == 0).sum()) for x in d)
    delta, norm = sum((x * x).sum() for x in d), sum((base[n].astype(np.float64) ** 2).sum() for n in names)
    out = {"tensors": len(d), "params": params, "zeros": zeros, "base_norm": np.sqrt(norm), "delta_norm": np.sqrt(delta),
           "relative_norm": np.sqrt(delta / norm), "zero_share": zeros / params}
    for key, axis in (("onebit_error_matrix", None), ("onebit_error_row", -1)):
        out[key] = np.sqrt(sum(one_bit_error(x, axis) for x in d) / delta) if delta else np.nan
    return out


def test_stats_by_class(math_vector, tensors):
    kinds = classes(tensors["base"])
    got = math_vector.stats()
    assert set(got) == set(kinds.values())
    for cls, stats in got.items():
        want = expected_stats(tensors["base"], tensors["math"], [n for n, c in kinds.items() if c == cls])
        assert set(stats) == set(want)
        for key, value in want.items():
            assert stats[key] == pytest.approx(value, rel=1e-6, nan_ok=True), (cls, key)
    assert 0.01 < got["attention"]["relative_norm"] < 0.05   # the family's deltas are 1 to 5 % of the weights


def test_stats_of_one_tensor(math_vector, tensors):
    name = "model.layers.2.self_attn.k_proj.weight"
    want = expected_stats(tensors["base"], tensors["math"], [name])
    assert math_vector.tensor_stats(name) == pytest.approx(want, rel=1e-6)


def test_compare(models, math_vector, tensors):
    other = obm.TaskVector(models / "base", models / "code")
    kinds = classes(tensors["base"])
    got = math_vector.compare(other)
    for cls in ("attention", "mlp"):
        names = [n for n, c in kinds.items() if c == cls]
        a, b = (np.concatenate([(tensors[e][n] - tensors["base"][n]).ravel() for n in names]).astype(np.float64) for e in ("math", "code"))
        assert got[cls]["params"] == a.size
        assert got[cls]["cosine"] == pytest.approx(a @ b / np.sqrt((a @ a) * (b @ b)), rel=1e-6)
        assert got[cls]["sign_agreement"] == pytest.approx(((a >= 0) == (b >= 0)).mean(), abs=1e-12)
    assert math_vector.compare(math_vector)["mlp"] == pytest.approx({"params": got["mlp"]["params"], "cosine": 1, "sign_agreement": 1})


def test_thread_counts_agree_to_the_bit(models, threads):
    seen = []
    for n in (1, 2, 5):
        threads(n)
        seen.append(obm.TaskVector(models / "base", models / "chat").stats())
    assert repr(seen[0]) == repr(seen[1]) == repr(seen[2])


def small_pair(tmp_path, base, expert):
    return plain.write_folder(tmp_path / "b", base), plain.write_folder(tmp_path / "e", expert)


def test_shapes_that_differ_are_named(tmp_path):
    name = "model.layers.0.mlp.up_proj.weight"
    pair = small_pair(tmp_path, {name: np.ones((4, 8))}, {name: np.ones((4, 9))})
    with pytest.raises(obm.ShapeError, match=rf"{name}.*\(4, 9\).*\(4, 8\)"):
        obm.TaskVector(*pair)


def test_missing_tensors_are_named(tmp_path):
    one, two = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight"
    pair = small_pair(tmp_path, {one: np.ones((4, 8)), two: np.ones((8, 4))}, {one: np.ones((4, 8))})
    with pytest.raises(obm.NotFoundError, match=two):
        obm.TaskVector(*pair)


def test_extra_vocabulary_is_not_an_error(tmp_path):
    name = "model.embed_tokens.weight"
    base, more = np.arange(12.).reshape(4, 3), np.arange(18.).reshape(6, 3) + 1
    v = obm.TaskVector(*small_pair(tmp_path, {name: base}, {name: more}))
    assert np.array_equal(v[name].numpy(), np.ones((4, 3)))


def test_nan_is_named(tmp_path):
    name = "model.layers.0.mlp.up_proj.weight"
    bad = np.ones((4, 8))
    bad[1, 3] = np.nan
    v = obm.TaskVector(*small_pair(tmp_path, {name: np.zeros((4, 8))}, {name: bad}))
    with pytest.raises(obm.NonFiniteError, match=f"{name}.*11"):
        v[name]
    with pytest.raises(obm.NonFiniteError, match=name):
        v.stats()


def test_progress(math_vector):
    calls = []
    math_vector.stats(progress=lambda what, done, total: calls.append((what, done, total)))
    assert calls and calls[-1][1] == calls[-1][2]
    with pytest.raises(TypeError, match="progress"):
        math_vector.stats(progress=3)
    with pytest.raises(KeyError, match="mine"):
        math_vector.stats(progress=lambda *_: {}["mine"])
