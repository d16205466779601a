"""Bases held in 12 bits per weight: the same bits as without, in every way a model runs, on fewer bytes."""

import json
import re

import numpy as np
import pytest

import onebitmerge as obm
from plain import load, write_folder


def write_model(folder, tensors, source):
    """A copy of a model folder with other tensors, as bf16."""
    write_folder(folder, tensors, "BF16", json.loads((source / "config.json").read_text()))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((source / name).read_bytes())
    return folder


def misalign(path):
    """One more space behind the header: every tensor of the file lies at an odd place."""
    blob = path.read_bytes()
    end = 8 + int.from_bytes(blob[:8], "little")
    path.write_bytes((end - 7).to_bytes(8, "little") + blob[8:end] + b" " + blob[end:])


@pytest.fixture(scope="module")
def both(models):
    return obm.Model(models / "base"), obm.Model(models / "base", z12=True)


def test_same_bits(both):
    plain, packed = both
    ids = [5, 9, 17, 300, 2, 40] * 30
    for n in (1, 7, 64, 65, 180):
        assert np.array_equal(plain.logits(ids[:n]), packed.logits(ids[:n]))
    assert np.array_equal(plain.logits(ids[:70], all=True), packed.logits(ids[:70], all=True))


def test_same_text_alone_and_in_a_batch(both):
    plain, packed = both
    prompts = ["What is 17 plus 5?", "Hello", "def add(a, b):", "The capital", "x = "]
    alone = [str(packed.generate(p, max_tokens=12)) for p in prompts]
    assert alone == [str(plain.generate(p, max_tokens=12)) for p in prompts]
    assert [str(c) for c in packed.generate(prompts, max_tokens=12)] == alone


def test_account(both):
    """There is room for both: the mapping stays, for prompts and batches."""
    plain, packed = both
    info = packed.info
    assert 0.75 < info["z12_bytes"] / info["z12_plain"] < 0.80   # the embedding is tied: it is the head's matrix, and all others are packed
    assert packed.memory["base"] == plain.memory["base"] + info["z12_bytes"]
    assert info["z12_to_come"] == plain.info["z12_to_come"] == 0


def test_pack_on_planes(models, tmp_path):
    experts = {"math": models / "math", "code": models / "code"}
    obm.compress(models / "base", experts, tmp_path / "p")
    plain, packed = obm.Model(tmp_path / "p"), obm.Model(tmp_path / "p", z12=True)
    assert packed.info["z12_plain"] > 0 == plain.info["z12_plain"]
    for route in ("math", {"math": 0.4, "code": 0.6}, "base"):
        assert np.array_equal(plain.logits([5, 9, 17, 300], route=route), packed.logits([5, 9, 17, 300], route=route))
        assert str(plain.generate("17 plus 5", route=route, max_tokens=8)) == str(packed.generate("17 plus 5", route=route, max_tokens=8))
    dense = obm.Model(tmp_path / "p", z12=True, materialise=True)
    assert np.array_equal(dense.logits([5, 9], route="math"), obm.Model(tmp_path / "p", materialise=True).logits([5, 9], route="math"))


def test_matrices_with_many_escapes_stay(models, tmp_path):
    """Rows of 192 columns with 23 outliers on average have more high bytes than a table holds, with 6 few of them do."""
    rng, tensors = np.random.default_rng(3), load(models / "base")
    for name, x in tensors.items():
        if "up_proj" in name:
            hit = rng.random(x.shape) < (0.12 if ".0." in name else 0.03)
            outliers = rng.integers(0x0100, 0x3e00, x.shape, dtype=np.uint16)
            tensors[name] = np.where(hit, (outliers.astype(np.uint32) << 16).view(np.float32), x)
    folder = write_model(tmp_path / "m", tensors, models / "base")
    plain, packed = obm.Model(folder), obm.Model(folder, z12=True)
    assert np.array_equal(plain.logits([5, 9, 17] * 30, all=True), packed.logits([5, 9, 17] * 30, all=True))
    matrices = sum(x.size * 2 for name, x in tensors.items() if x.ndim == 2)
    assert packed.info["z12_plain"] == matrices - tensors["model.layers.0.mlp.up_proj.weight"].size * 2


def test_tensors_that_are_copies(models, tmp_path):
    """Tensors at odd places of the file are copied when the model is opened; the tied embedding is read from such a copy."""
    folder = write_model(tmp_path / "m", load(models / "base"), models / "base")
    misalign(folder / "model.safetensors")
    want = obm.Model(models / "base").logits([5, 9, 17, 300])
    assert np.array_equal(obm.Model(folder).logits([5, 9, 17, 300]), want)
    assert np.array_equal(obm.Model(folder, z12=True).logits([5, 9, 17, 300]), want)


def test_f32_is_left_alone(models, tmp_path):
    obm.merge({"merge_method": "passthrough", "models": [{"model": str(models / "base")}], "dtype": "float32"}, tmp_path / "m")
    plain = obm.Model(tmp_path / "m", z12="auto")
    with pytest.warns(RuntimeWarning, match="no matrix of the base is bf16: none is held in 12 bits per weight"):
        packed = obm.Model(tmp_path / "m", z12=True)
    assert packed.info["z12_plain"] == 0 and packed.memory["base"] == plain.memory["base"]
    assert np.array_equal(plain.logits([5, 9]), packed.logits([5, 9]))


def escapes_of(bits):
    """Weights whose high byte is not among the 16 most frequent of their row."""
    return sum(row.size - np.sort(np.bincount(row >> 8, minlength=256))[-16:].sum() for row in bits)


def test_what_packing_would_give(models, tmp_path):
    rng = np.random.default_rng(5)
    bits = rng.integers(0, 0x7f80, (37, 70), dtype=np.uint16)
    bits[:20] = bits[:20] & 0x00ff | 0x3c00
    tensors = {"m.weight": (bits.astype(np.uint32) << 16).view(np.float32), "norm.weight": np.ones(70, np.float32)}
    write_folder(tmp_path / "m", tensors, "BF16")
    ckpt = obm.Checkpoint(tmp_path / "m")
    assert ckpt.z12("m.weight", rows=0) == {"weights": 37 * 70, "escapes": escapes_of(bits), "fits": False}
    assert ckpt.z12("m.weight", rows=100) == ckpt.z12("m.weight", rows=37) == ckpt.z12("m.weight", rows=0)
    assert ckpt.z12("m.weight", rows=5) == {"weights": 5 * 70, "escapes": escapes_of(bits[:35:7]), "fits": False}
    assert ckpt.z12("norm.weight") == {"weights": 0, "escapes": 0, "fits": False}
    with pytest.raises(obm.ArgumentError, match="rows: expected 0 .all. or more, found -1"):
        ckpt.z12("m.weight", rows=-1)
    with pytest.raises(obm.NotFoundError, match="none.weight"):
        ckpt.z12("none.weight")


def test_what_is_used_is_said(both):
    plain, packed = both
    assert plain.info["z12_plain"] == plain.info["z12_bytes"] == 0 and "z12" not in repr(plain)
    assert re.search(r", z12: \d+ MB of bf16 in \d+ MB\)$", repr(packed))


def test_names(models):
    for z12, is_packed in (("on", True), ("off", False), (False, False), ("auto", False)):   # small enough for the caches: auto leaves it
        assert (obm.Model(models / "base", z12=z12).info["z12_plain"] > 0) == is_packed
    with pytest.raises(obm.ArgumentError, match='z12: expected auto, on or off, found "yes"'):
        obm.Model(models / "base", z12="yes")
    for z12 in (1, np.True_, np.int64(1), 0, np.False_):
        assert (obm.Model(models / "base", z12=z12).info["z12_plain"] > 0) == bool(z12)
    for z12, found in ((2, "2"), (None, "None"), (np.ones(2), r"array\(\[1., 1.\]\)")):
        with pytest.raises(TypeError, match="z12: expected True, False or a str, found " + found):
            obm.Model(models / "base", z12=z12)
