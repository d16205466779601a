"""Checkpoint and Tensor against a reader of safetensors written here, and hashlib."""

import gc
import hashlib
import json
import struct

import numpy as np
import pytest

import onebitmerge as obm
import plain


@pytest.fixture(scope="module")
def base(models):
    return obm.Checkpoint(models / "base")


@pytest.fixture(scope="module")
def raw(models):
    return plain.read_safetensors(models / "base" / "model.safetensors")


@pytest.fixture
def small(tmp_path):
    """One file with a tensor of every dtype."""
    tensors = {}
    for dtype, shape in {"F32": (3, 5), "F16": (2, 7), "F64": (4,), "U8": (6,), "I64": (2, 2), "BF16": (3, 3)}.items():
        n = int(np.prod(shape))
        raw = np.arange(n) + 1 if dtype in ("U8", "I64") else np.linspace(-2, 3, n).astype(np.float32)
        raw = plain.to_bf16(raw) if dtype == "BF16" else raw
        tensors[f"t.{dtype}"] = (dtype, shape, raw.astype(plain.DTYPES[dtype]).tobytes())
    header, body = {}, b""
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    text = json.dumps(header).encode()
    path = tmp_path / "small.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)
    return path, tensors


def test_is_a_mapping(base, raw):
    assert base.keys() == sorted(raw)
    assert list(base) == base.keys()
    assert len(base) == len(raw)
    assert base.keys()[0] in base
    assert "model.nothing" not in base
    assert 3 not in base
    with pytest.raises(TypeError):
        base[3]


def test_what_it_says_of_itself(base, models):
    assert base.config == json.loads((models / "base" / "config.json").read_text())
    assert base.path == str(models / "base")
    assert base.tied is True
    assert repr(base) == f'Checkpoint("{models / "base"}", {len(base)} tensors)'


def test_views_are_the_bytes_of_the_file(base, raw):
    for name, (dtype, shape, data) in raw.items():
        t = base[name]
        assert (t.dtype, t.shape, t.nbytes, len(t)) == (dtype, shape, len(data), shape[0])
        assert np.array_equal(np.asarray(t), plain.widen(dtype, shape, data))
        assert base.sha256(name) == hashlib.sha256(data).hexdigest()


def test_every_bf16_value_widens_exactly(tmp_path):
    bits = np.arange(65536, dtype=np.uint32)
    header = json.dumps({"x": {"dtype": "BF16", "shape": [256, 256], "data_offsets": [0, 131072]}}).encode()
    path = tmp_path / "all.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bits.astype("<u2").tobytes())
    got = obm.Checkpoint(path)["x"].numpy()
    assert got.dtype == np.float32
    want = (bits << 16).view(np.float32).reshape(256, 256)
    numbers = ~np.isnan(want)
    assert np.array_equal(np.isnan(got), ~numbers)
    assert np.array_equal(got.view(np.uint32)[numbers], want.view(np.uint32)[numbers])


def test_every_dtype_comes_out_as_it_is(small):
    path, tensors = small
    checkpoint = obm.Checkpoint(path)
    assert checkpoint.config is None
    for name, (dtype, shape, data) in tensors.items():
        array = checkpoint[name].numpy()
        assert array.shape == shape
        if dtype == "BF16":
            assert np.array_equal(array, plain.widen(dtype, shape, data))
        else:
            assert array.dtype == np.dtype(plain.DTYPES[dtype])
            assert array.tobytes() == data


def test_no_copy_and_read_only(small):
    t = obm.Checkpoint(small[0])["t.F32"]
    a, b = np.asarray(t), np.asarray(t)
    assert np.shares_memory(a, b)
    assert not a.flags.writeable
    with pytest.raises(ValueError):
        a[0, 0] = 1
    view = memoryview(t)
    assert view.readonly and view.format == "f" and view.shape == (3, 5) and view.strides == (20, 4)
    with pytest.raises(TypeError):
        view[0, 0] = 1.0


def test_array_takes_dtype_and_copy(small):
    t = obm.Checkpoint(small[0])["t.F32"]
    assert np.asarray(t, dtype=np.float64).dtype == np.float64
    copy = np.array(t)
    copy[0, 0] = 5
    assert np.asarray(t)[0, 0] != 5
    fresh = t.__array__(copy=True)
    fresh[0, 0] = 5
    assert not np.shares_memory(fresh, np.asarray(t))
    assert np.shares_memory(t.__array__("float32", copy=False), np.asarray(t))
    with pytest.raises(ValueError, match="needs a copy"):
        t.__array__("float64", copy=False)


def test_bf16_has_no_buffer(small):
    t = obm.Checkpoint(small[0])["t.BF16"]
    with pytest.raises(BufferError, match="BF16.*np.asarray"):
        memoryview(t)
    with pytest.raises(ValueError, match="BF16 tensor needs a copy"):
        t.__array__(copy=False)


@pytest.mark.parametrize("dtype", ["F32", "F16", "F64", "U8", "I64"])
def test_dlpack_to_numpy(small, dtype):
    t = obm.Checkpoint(small[0])[f"t.{dtype}"]
    assert t.__dlpack_device__() == (1, 0)
    array = np.from_dlpack(t)
    assert array.dtype == np.dtype(plain.DTYPES[dtype])
    assert array.tobytes() == small[1][f"t.{dtype}"][2]
    if np.shares_memory(array, t.numpy()):
        assert not array.flags.writeable


def test_dlpack_capsules_that_nobody_takes(small):
    t = obm.Checkpoint(small[0])["t.F32"]
    for version in (None, (0, 8), (1, 0), (2, 5)):
        capsule = t.__dlpack__(max_version=version)
        assert ("dltensor_versioned" in repr(capsule)) == (version is not None and version[0] >= 1)
        del capsule
    with pytest.raises(BufferError, match="without a stream"):
        t.__dlpack__(stream=1)


def test_a_tensor_outlives_its_checkpoint(models, raw):
    t = obm.Checkpoint(models / "base")["model.norm.weight"]
    array = obm.Checkpoint(models / "math")["model.norm.weight"].numpy()
    gc.collect()
    want = plain.widen(*raw["model.norm.weight"])
    assert np.array_equal(np.asarray(t), want)
    assert np.array_equal(array, want)


def test_an_array_outlives_everything(small):
    def array():
        return np.asarray(obm.Checkpoint(small[0])["t.F32"])

    def shared():
        return np.from_dlpack(obm.Checkpoint(small[0])["t.F32"])

    first, second = array(), shared()
    gc.collect()
    assert first.tobytes() == second.tobytes() == small[1]["t.F32"][2]


def test_shards(tmp_path):
    r = np.random.default_rng(0)
    parts = [{f"model.layers.{i}.mlp.up_proj.weight": r.standard_normal((4, 8))} for i in range(3)]
    folder = tmp_path / "sharded"
    folder.mkdir()
    for i, part in enumerate(parts):
        plain.write_safetensors(folder / f"part-{i}.safetensors", part)
    index = {"weight_map": {name: f"part-{i}.safetensors" for i, part in enumerate(parts) for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text("{}")
    checkpoint = obm.Checkpoint(folder)
    assert len(checkpoint) == 3
    for part in parts:
        for name, x in part.items():
            assert np.array_equal(checkpoint[name].numpy(), x.astype(np.float32))


def test_a_missing_tensor_is_named(base):
    with pytest.raises(obm.NotFoundError, match="model.nothing") as caught:
        base["model.nothing"]
    assert isinstance(caught.value, LookupError) and isinstance(caught.value, obm.Error)
    with pytest.raises(obm.NotFoundError):
        base.sha256("model.nothing")


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        obm.Checkpoint(tmp_path / "nowhere")


@pytest.mark.parametrize("blob, found", [
    (b"", "empty|8|bytes"),
    (struct.pack("<Q", 1 << 60) + b"{}", "header"),
    (struct.pack("<Q", 9) + b"not JSON!", "header"),
    (struct.pack("<Q", 64) + json.dumps({"x": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}).ljust(64).encode(), "x"),
])
def test_a_broken_file_is_named(tmp_path, blob, found):
    path = tmp_path / "broken.safetensors"
    path.write_bytes(blob)
    with pytest.raises(obm.FormatError, match=f"broken.safetensors.*({found})") as caught:
        obm.Checkpoint(path)
    assert isinstance(caught.value, ValueError)
    assert "\n" not in str(caught.value)


def test_tensors_cannot_be_made():
    with pytest.raises(TypeError):
        obm.Tensor()
