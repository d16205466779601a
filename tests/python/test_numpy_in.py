"""What merge_tensors takes: NumPy arrays without copies, DLPack, Tensors; and what it says about the rest."""

import numpy as np
import pytest

import onebitmerge as obm
import plain


@pytest.fixture
def arrays():
    r = np.random.default_rng(0)
    return [r.standard_normal((6, 10)).astype(np.float32) for _ in range(3)]


def mean(arrays):
    return np.mean([a.astype(np.float64) for a in arrays], axis=0)


def test_f32(arrays):
    before = [a.copy() for a in arrays]
    got = obm.merge_tensors("linear", arrays, params={"weight": [1, 1, 1]})
    assert got.dtype == np.float32 and got.shape == (6, 10) and got.flags.writeable
    assert np.abs(got - mean(arrays)).max() < 1e-6
    assert all(np.array_equal(a, b) for a, b in zip(arrays, before))


def test_f16_and_mixed(arrays):
    short = [a.astype(np.float16) for a in arrays]
    assert np.abs(obm.merge_tensors("linear", short, params={"weight": 1}) - mean(short)).max() < 1e-6
    mixed = [arrays[0], short[1]]
    assert np.abs(obm.merge_tensors("linear", mixed, params={"weight": [1, 1]}) - mean(mixed)).max() < 1e-6


def test_other_shapes():
    for shape in [(), (1,), (7,), (2, 3, 4)]:
        a = np.arange(np.prod(shape, dtype=int), dtype=np.float32).reshape(shape)
        assert np.array_equal(obm.merge_tensors("linear", [a, a], params={"weight": 1}), a)


@pytest.mark.parametrize("view", [lambda a: a[:, ::2], lambda a: a.T, lambda a: a[::-1]])
def test_what_is_not_contiguous_is_refused(arrays, view):
    with pytest.raises(ValueError, match="not contiguous; use np.ascontiguousarray"):
        obm.merge_tensors("linear", [view(a) for a in arrays], params={"weight": 1})


def test_tensors_of_checkpoints(models):
    name = "model.layers.0.mlp.up_proj.weight"
    base, a, b = (obm.Checkpoint(models / m)[name] for m in ("base", "chat", "math"))
    got = obm.merge_tensors("task_arithmetic", [a, b], base, {"weight": [1, .5]})
    def delta(x):
        return plain.rounded(x.numpy() - base.numpy(), "BF16").astype(np.float64)
    assert np.abs(got - (base.numpy() + delta(a) + .5 * delta(b))).max() < 1e-6


class Wrapped:
    """DLPack and nothing else, in the old or the new form."""

    def __init__(self, array, version):
        self.array, self.version = array, version

    def __dlpack__(self, **options):
        return self.array.__dlpack__(max_version=self.version)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


@pytest.mark.parametrize("version", [None, (1, 0)])
def test_dlpack(arrays, version):
    wrapped = [Wrapped(a, version) for a in arrays]
    assert np.array_equal(obm.merge_tensors("linear", wrapped, params={"weight": 1}), obm.merge_tensors("linear", arrays, params={"weight": 1}))
    with pytest.raises(ValueError, match="not contiguous"):
        obm.merge_tensors("linear", [Wrapped(arrays[0].T, version)] * 2, params={"weight": 1})


def test_dlpack_of_our_own_tensors(models):
    t = obm.Checkpoint(models / "chat")["model.norm.weight"]   # bf16
    got = obm.merge_tensors("linear", [Wrapped(t, None), Wrapped(t, (1, 0))], params={"weight": 1})
    assert np.array_equal(got, t.numpy())


@pytest.mark.parametrize("wrong, error, message", [
    ("text", TypeError, "array"), (3, TypeError, "array"), (np.array([1 + 2j]), ValueError, "element type"),
    (np.array([1, 2], np.int32), obm.DtypeError, "I32"), (np.zeros((1,) * 9, np.float32), ValueError, "8 dimensions"),
    (np.array([1., 2.], ">f4"), ValueError, "element type"),
])
def test_what_is_no_tensor(wrong, error, message):
    with pytest.raises(error, match=message):
        obm.merge_tensors("linear", [wrong, wrong], params={"weight": 1})


def test_wrong_use(arrays):
    with pytest.raises(obm.NotFoundError, match="nothing.*linear"):
        obm.merge_tensors("nothing", arrays)
    with pytest.raises(obm.ShapeError, match="6.*5"):
        obm.merge_tensors("linear", [arrays[0], arrays[0][:5]], params={"weight": 1})
    with pytest.raises(obm.Error, match="wait"):
        obm.merge_tensors("linear", arrays, params={"wait": 1})
    with pytest.raises(obm.ArgumentError):
        obm.merge_tensors("linear", [])
    with pytest.raises(obm.ArgumentError, match="base"):
        obm.merge_tensors("ties", arrays)
    with pytest.raises(TypeError):
        obm.merge_tensors("linear", arrays, params={"weight": ["a", 1, 1]})
    with pytest.raises(obm.ArgumentError, match="profile"):
        obm.merge_tensors("linear", arrays, profile="x")
    bad = arrays[0].copy()
    bad[2, 3] = np.inf
    with pytest.raises(obm.NonFiniteError, match="23"):
        obm.merge_tensors("linear", [bad, arrays[1]], params={"weight": 1})
