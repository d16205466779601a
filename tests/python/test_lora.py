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


def dense(case, base, out):
    """The adapter merged into a folder of F32 tensors: base + d, rounded once."""
    source, d = obm.Checkpoint(VECTORS / base), obm.Checkpoint(VECTORS / case / "expected.safetensors")
    header, blobs, at = {}, [], 0
    for name in d:
        start = source[name if name in source else "model.embed_tokens.weight"]
        wide = obm.merge_tensors("linear", [start], params={"weight": 1.0}).reshape(start.shape)
        blob = (wide + np.asarray(d[name])).astype("<f4").tobytes()
        header[name] = {"dtype": "F32", "shape": list(start.shape), "data_offsets": [at, at + len(blob)]}
        at += len(blob)
        blobs.append(blob)
    text = json.dumps(header).encode()
    out.mkdir()
    (out / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"".join(blobs))
    (out / "config.json").write_text(json.dumps({"model_type": "llama", "tie_word_embeddings": False}))
    return out


@pytest.mark.parametrize("method, parameters", [("ties", {"weight": 0.7, "density": 0.5}), ("task_arithmetic", {"weight": 1.5}),
                                                ("linear", {"weight": 0.5})])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merge(method, parameters, dtype, tmp_path):
    """MODEL+ADAPTER, and an adapter alone on the recipe's base, are the merged model of F32."""
    base, cases = VECTORS / "base-bf16", ["plain", "patterns", "embedding"]
    written = [dense(case, "base-bf16", tmp_path / case) for case in cases]
    merged = {}
    for kind, refs in {"dense": written, "sum": [f"{base}+{VECTORS / c}" for c in cases], "alone": [VECTORS / c for c in cases]}.items():
        recipe = {"merge_method": method, "base_model": str(base), "models": [{"model": str(r), "parameters": parameters} for r in refs], "out_dtype": dtype}
        if method == "linear":
            recipe["models"].append({"model": str(base), "parameters": {"weight": 0.25}})
        obm.merge(recipe, tmp_path / ("out-" + kind))
        out = obm.Checkpoint(tmp_path / ("out-" + kind))
        merged[kind] = {name: out.sha256(name) for name in out}
    assert merged["dense"] == merged["sum"] == merged["alone"]
    assert merged["dense"] != {name: obm.Checkpoint(base).sha256(name) for name in obm.Checkpoint(base)}


def test_merge_tied(tmp_path):
    """An adapter on the embedding of a tied model: the merged model has a head of its own, the old embedding."""
    recipe = {"merge_method": "linear", "models": [{"model": f"{VECTORS / 'base-tied'}+{VECTORS / 'tied-embedding'}", "parameters": {"weight": 1}}]}
    obm.merge(recipe, tmp_path / "out")
    out, base = obm.Checkpoint(tmp_path / "out"), obm.Checkpoint(VECTORS / "base-tied")
    assert out.config["tie_word_embeddings"] is False
    assert out.sha256("lm_head.weight") == base.sha256("model.embed_tokens.weight") != out.sha256("model.embed_tokens.weight")


def test_merge_refused(tmp_path):
    base, adapter = VECTORS / "base-bf16", VECTORS / "plain"

    def merge(*refs, **more):
        obm.merge({"merge_method": "linear", "models": [{"model": str(r), "parameters": {"weight": 1}} for r in refs], **more}, tmp_path / "out")

    with pytest.raises(obm.ArgumentError, match="is a LoRA adapter: write MODEL"):
        merge(adapter)
    with pytest.raises(obm.ArgumentError, match="expected MODEL or MODEL.ADAPTER"):
        merge(f"{base}+{adapter}+{adapter}")
    with pytest.raises(obm.ArgumentError, match="expected a PEFT LoRA folder behind the .* has no adapter_config.json"):
        merge(f"{base}+{base}")
    with pytest.raises(obm.ArgumentError, match="not the model below another"):
        merge(f"{adapter}+{adapter}")
    with pytest.raises(obm.ArgumentError, match="is a LoRA adapter: write MODEL"):
        merge(adapter, base_model=str(adapter))
    assert not (tmp_path / "out").exists()


def test_merge_resume_knows_the_adapter(tmp_path):
    adapter = tmp_path / "adapter"
    shutil.copytree(VECTORS / "plain", adapter)
    recipe = {"merge_method": "linear", "models": [{"model": f"{VECTORS / 'base-bf16'}+{adapter}", "parameters": {"weight": 1}}]}

    def stop(what, done, total):
        if done > total / 2:
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        obm.merge(recipe, tmp_path / "out", resume=True, shard_bytes=600, progress=stop)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 9}))
    with pytest.raises(obm.MismatchError, match="adapter 0"):
        obm.merge(recipe, tmp_path / "out", resume=True, shard_bytes=600)
    (adapter / "adapter_config.json").write_text((VECTORS / "plain" / "adapter_config.json").read_text())
    obm.merge(recipe, tmp_path / "out", resume=True, shard_bytes=600)
    obm.merge(recipe, tmp_path / "once", shard_bytes=600)
    resumed, once = obm.Checkpoint(tmp_path / "out"), obm.Checkpoint(tmp_path / "once")
    assert {n: resumed.sha256(n) for n in resumed} == {n: once.sha256(n) for n in once}
