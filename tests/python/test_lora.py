"""LoRA folders as experts, against tests/vectors/lora (tests/reference/lora_reference.py)."""

import json
import pathlib
import shutil

import numpy as np
import pytest

import onebitmerge as obm

VECTORS = pathlib.Path(__file__).resolve().parent.parent / "vectors" / "lora"
CASES = [line.split() for line in (VECTORS / "cases.txt").read_text().splitlines()]


@pytest.mark.parametrize("case, base", CASES)
def test_task_vector(case, base):
    expected = obm.Checkpoint(VECTORS / case / "expected.safetensors")
    vector = obm.TaskVector(VECTORS / base, VECTORS / case)
    assert sorted(vector) == sorted(expected)
    for name in expected:
        assert np.array_equal(np.asarray(vector[name]), np.asarray(expected[name])), name
    touched = sum(np.asarray(expected[name]).any() for name in expected)
    assert touched and sum(s["params"] for s in vector.stats().values()) == sum(np.asarray(expected[n]).size for n in expected)


def test_checkpoint():
    adapter = obm.Checkpoint(VECTORS / "plain")
    assert adapter.adapter and adapter.config is None and not obm.Checkpoint(VECTORS / "base-f32").adapter
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in adapter
    assert adapter["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"].shape == (3, 8)


def test_pack(tmp_path):
    experts = {"a": obm.Expert(VECTORS / "plain", policy="full"), "b": VECTORS / "patterns"}
    pack = obm.compress(VECTORS / "base-bf16", experts, out=tmp_path / "p")
    name = "model.layers.0.self_attn.q_proj.weight"
    kept = {t["name"]: t for t in pack.tensors("a")}
    assert kept[name]["mode"] == "full" and kept[name]["rank"] == 3 and kept[name]["bytes"] == 4 * 3 * 16
    assert kept["model.norm.weight"]["mode"] == "same" and kept["model.norm.weight"]["rank"] == 0
    assert {t["mode"] for t in pack.tensors("b")} == {"1bit", "same"}
    factors = pack.bytes("a")["attention"]
    assert factors["bytes_pack"] == factors["bytes_adapter"] == 4 * (2 * 3 * 16 + 2 * 3 * 12) < factors["bytes_expert"]
    assert pack.bytes("b")["mlp"]["bytes_adapter"] == 2 * (2 * 20 + 3 * 20)
    assert "a was made from LoRA factors of" in repr(pack)
    more = obm.Pack(tmp_path / "p")
    more.add("c", obm.Expert(VECTORS / "embedding", policy="full"))
    assert {t["name"] for t in more.tensors("c") if t["rank"]} == {"model.embed_tokens.weight", "model.layers.0.self_attn.o_proj.weight"}
    more.verify()


@pytest.mark.parametrize("case, base", CASES)
def test_export(case, base, tmp_path):
    """The expert's own hard route with lambda 0 is base + d."""
    pack = obm.compress(VECTORS / base, {"a": obm.Expert(VECTORS / case, policy="full")}, out=tmp_path / "p")
    pack.export("a", tmp_path / "out", dtype="f32")
    out, d = obm.Checkpoint(tmp_path / "out"), obm.Checkpoint(VECTORS / case / "expected.safetensors")
    source = obm.Checkpoint(VECTORS / base)
    assert sorted(out) == sorted(d)
    for name in out:
        start = source[name if name in source else "model.embed_tokens.weight"]
        want = obm.merge_tensors("linear", [start], params={"weight": 1.0}).reshape(start.shape) + np.asarray(d[name])
        assert np.allclose(np.asarray(out[name]), want, rtol=0, atol=3e-7), name
    if case.startswith("tied"):
        assert out.config["tie_word_embeddings"] is (case == "tied-untouched")


def test_refused(tmp_path):
    folder = tmp_path / "adapter"
    shutil.copytree(VECTORS / "plain", folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))
    with pytest.raises(obm.UnsupportedError, match="use_dora: DoRA is not supported"):
        obm.TaskVector(VECTORS / "base-bf16", folder)
    with pytest.raises(obm.ArgumentError, match="is a LoRA adapter .*not a base"):
        obm.TaskVector(VECTORS / "plain", VECTORS / "base-bf16")
    with pytest.raises(obm.ArgumentError, match="not a model to run"):
        obm.Model(VECTORS / "plain")
    with pytest.raises(obm.NotFoundError, match="mlp.gate_proj"):
        obm.TaskVector(VECTORS / "base-in-out", VECTORS / "wide")
