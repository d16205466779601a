"""Experts of a pack as inputs of merges, as PACK:task: what they are is rebuilt here from the pack's files by core/FORMAT.md."""

import json
import pathlib
import shutil

import numpy as np
import pytest

import onebitmerge as obm
import plain

Q, UP, NORM = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.up_proj.weight", "model.norm.weight"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def tensors(seed, rows=11, tied=True, scale=0.02, base=None):
    """Odd sizes on purpose; an expert is its base and noise."""
    r = np.random.default_rng(seed)
    shapes = {EMBEDDING: (rows, 7), Q: (7, 7), UP: (13, 70), "model.layers.1.self_attn.q_proj.weight": (7, 7),
              "model.layers.1.mlp.up_proj.weight": (13, 70), NORM: (7,)}
    if not tied:
        shapes[HEAD] = (rows, 7)
    if base is None:
        return {name: r.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    out = {}
    for name, shape in shapes.items():
        start = base[name if name in base else EMBEDDING]
        out[name] = r.normal(size=shape).astype(np.float32)
        out[name][:len(start)] = start + scale * out[name][:len(start)]
    return out


def config(rows=11, tied=True):
    return {"model_type": "llama", "num_hidden_layers": 2, "vocab_size": rows, "tie_word_embeddings": tied}


def rebuild(pack, task, base):
    """theta_base + d~ of one expert, in f32, and its tensors that are kept as they are."""
    manifest = json.loads((pack / "pack.json").read_text())
    expert = next(e for e in manifest["experts"] if e["name"] == task)
    stored = {name: plain.widen(*t) if t[0] != "U8" else np.frombuffer(t[2], np.uint8).reshape(t[1])
              for name, t in plain.read_safetensors(pack / expert["file"]).items()}
    out = {}
    for name, record in expert["tensors"].items():
        start = base[name if name in base else EMBEDDING]
        value = start.astype(np.float64)
        if record["mode"] == "full" and "lora" in record:
            lora = record["lora"]
            value = value + (lora["scaling"] * (stored[name + ".lora_B"].astype(np.float64) @ stored[name + ".lora_A"].astype(np.float64))).astype(np.float32)
        elif record["mode"] == "full":
            value = stored[name]
        elif record["mode"] == "1bit":
            rows, cols = start.shape
            for plane in range(record["planes"]):
                scales = plain.spread(stored[f"{name}.scale.{plane}"].reshape(-1), rows, cols, record["scale"])
                value = value + scales * plain.unpack_signs(stored[f"{name}.sign.{plane}"], cols)
        value = value.astype(np.float32)
        out[name] = np.concatenate([value, stored[name + ".extra"]]) if name + ".extra" in stored else value
    return out


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """A tied base; a (1 bit per row), b (two planes in groups, one dropped), c untied, all of one pack; d: an adapter."""
    root = tmp_path_factory.mktemp("family")
    base = tensors(1)
    plain.write_folder(root / "base", base, config=config())
    for name, seed in {"a": 2, "b": 3}.items():
        plain.write_folder(root / name, tensors(seed, base=base), config=config())
    plain.write_folder(root / "c", tensors(4, tied=False, base=base), config=config(tied=False))
    r = np.random.default_rng(5)
    factors = {f"base_model.model.{m}.lora_{side}.weight": r.normal(size=shape).astype(np.float32)
               for m, out, into in ((Q[:-7], 7, 7), (UP[:-7], 13, 70)) for side, shape in (("A", (1, into)), ("B", (out, 1)))}
    (root / "d").mkdir()
    plain.write_safetensors(root / "d" / "adapter_model.safetensors", factors)
    (root / "d" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 0.125, "target_modules": ["q_proj"]}))
    experts = {"a": root / "a", "b": obm.Expert(root / "b", scale="group:64", planes=2, map={"*.1.mlp.*": "drop", NORM: "drop"}),
               "c": obm.Expert(root / "c", policy="mlp", scale="matrix"), "d": obm.Expert(root / "d", policy="full")}
    pack = obm.compress(root / "base", experts, out=root / "my.pack")
    pack.set(lambda_=0)
    for task in experts:
        whole = rebuild(root / "my.pack", task, base)
        plain.write_folder(root / f"dense-{task}", whole, config=config(tied=HEAD not in whole))
    shutil.copytree(root / "dense-d", root / "dense-e")   # for a model that a recipe has a second time, in another form
    return root


def merged(recipe, out):
    obm.merge(recipe, out)
    ckpt = obm.Checkpoint(out)
    return {name: (ckpt[name].dtype, ckpt[name].shape, ckpt.sha256(name)) for name in ckpt}


def recipe(family, method, refs, base=True, **more):
    models = [{"model": ref, "parameters": {"weight": 0.5 + 0.25 * i}} for i, ref in enumerate(refs)]
    return {"merge_method": method, **({"base_model": str(family / "base")} if base else {}), "models": models, **more}


def test_what_an_expert_is(family):
    pack = obm.Pack(family / "my.pack")
    for task in pack.tasks:
        pack.export(task, family / f"out-{task}", dtype="f32")
        assert plain.load(family / f"out-{task}").keys() == plain.load(family / f"dense-{task}").keys()
        for name, value in plain.load(family / f"dense-{task}").items():
            assert np.array_equal(plain.load(family / f"out-{task}")[name], value), (task, name)


METHODS = {m["name"]: m for m in obm.methods()}
GIVEN = {"weight": 0.25, "density": 0.6, "gamma": 0.05, "epsilon": 0.1, "select_topk": 0.4, "metric": 0.5, "t": 0.3, "scale": 0.8}


@pytest.mark.parametrize("method", METHODS)
def test_merges_are_those_of_dense_folders(family, tmp_path, method):
    """Packs' experts, checkpoints, an adapter alone and one on a model, as many at a time as the method takes; where c is among
    them, the result is untied."""
    m = METHODS[method]
    known = {p["name"]: p for p in m["params"]}
    parameters = {name: value for name, value in GIVEN.items() if name in known}
    base, most = m["needs_base"] or m["max_models"] != 1, m["max_models"] or 5
    sum_ = f"{family / 'base'}+{family / 'd'}"
    forms = {"dense": [str(family / f"dense-{t}") for t in "abcde"],
             "pack": [f"{family / 'my.pack'}:{t}" for t in "abc"] + [str(family / "d") if base else sum_, sum_]}
    groups = {1: [[0], [1], [2], [3], [4]], 2: [[0, 2], [1, 3], [4, 0]], 5: [[0, 1, 2, 3, 4], [0, 1, 3]]}[most]
    for n, group in enumerate(groups):
        results = []
        for form, refs in forms.items():
            r = recipe(family, method, [refs[i] for i in group], base=base, parameters=parameters)
            if known.get("weight", {}).get("scope") != "model":
                for model in r["models"]:
                    del model["parameters"]
            results.append(merged(r, tmp_path / f"{form}-{n}"))
        assert results[0] == results[1] and (HEAD in results[0]) == (2 in group)
        assert obm.Checkpoint(tmp_path / f"pack-{n}").config["tie_word_embeddings"] is (2 not in group)


@pytest.mark.parametrize("method, refs", [("slerp", "ab"), ("nuslerp", "bd"), ("passthrough", "b"), ("linear", "ad")])
def test_without_a_base(family, tmp_path, method, refs):
    """The pack knows its base."""
    given = {"slerp": {"t": 0.25}}.get(method, {})
    base = {"base_model": "{}"} if method == "slerp" else {}
    results = []
    for form in ("{root}/dense-{t}", "{root}/my.pack:{t}"):
        names = [form.format(root=family, t=t) for t in refs]
        r = recipe(family, method, names, base=False, parameters=given)
        if base:
            r["base_model"] = names[0]
        if method in ("slerp", "passthrough"):
            for m in r["models"]:
                del m["parameters"]
        results.append(merged(r, tmp_path / form.partition("/")[2][:5].strip("-.")))
    assert results[0] == results[1]


def test_slices_sums_and_relative_paths(family, tmp_path):
    def slices(a, b):
        return {"merge_method": "passthrough", "slices": [{"sources": [{"model": a, "layer_range": [0, 2]}]}, {"sources": [{"model": b, "layer_range": [1, 2]}]}]}
    dense = merged(slices(str(family / "dense-a"), str(family / "dense-b")), tmp_path / "dense")
    file = tmp_path / "recipe.yml"
    file.write_text(json.dumps(slices("my.pack:a", "base+my.pack:b")))
    obm.merge(file, tmp_path / "pack", directory=family)
    ckpt = obm.Checkpoint(tmp_path / "pack")
    assert {name: (ckpt[name].dtype, ckpt[name].shape, ckpt.sha256(name)) for name in ckpt} == dense
    assert ckpt.config["num_hidden_layers"] == 3


def test_bf16(family, tmp_path):
    """Planes have the precision of f32, whatever the base has."""
    base = tensors(1)
    plain.write_folder(tmp_path / "base", base, "BF16", config())
    base = plain.load(tmp_path / "base")
    plain.write_folder(tmp_path / "a", tensors(2, base=base), "BF16", config())
    obm.compress(tmp_path / "base", {"a": obm.Expert(tmp_path / "a", planes=3)}, out=tmp_path / "p")
    plain.write_folder(tmp_path / "dense", rebuild(tmp_path / "p", "a", base), config=config())
    for dtype in ({}, {"dtype": "float32", "out_dtype": "float32"}):
        r = [{"merge_method": "ties", "base_model": str(tmp_path / "base"), **dtype,
              "models": [{"model": str(ref), "parameters": {"weight": 1, "density": 0.5}}]} for ref in (tmp_path / "dense", f"{tmp_path / 'p'}:a")]
        one, two = merged(r[0], tmp_path / f"one{len(dtype)}"), merged(r[1], tmp_path / f"two{len(dtype)}")
        for name in one:
            if dtype or name in (Q, UP):   # full tensors are the expert's own, of bf16 here and of f32 there
                assert one[name] == two[name]


def test_task_vectors(family):
    base = plain.load(family / "base")
    vector = obm.TaskVector(family / "base", f"{family / 'my.pack'}:a")
    q = np.asarray(vector[Q])
    assert np.allclose(q, plain.load(family / "dense-a")[Q] - base[Q], atol=1e-6)
    assert all(len(np.unique(np.abs(row))) == 1 for row in q)
    assert vector.tensor_stats(Q)["onebit_error_row"] == 0
    assert not np.asarray(obm.TaskVector(family / "base", f"{family / 'my.pack'}:b")[NORM]).any()
    full, small = obm.TaskVector(family / "base", family / "a"), vector.compare(obm.TaskVector(family / "base", family / "a"))
    assert small["attention"]["sign_agreement"] == 1 and len(full) == len(vector)


def test_extract_lora(family, tmp_path):
    rows = obm.extract_lora(family / "base", f"{family / 'my.pack'}:d", tmp_path / "lora", rank=1)
    assert {m["name"] for m in rows if m["rank"]} == {Q, UP} and all(m["energy"] > 0.9999 for m in rows if m["rank"])


def token(text, index, special=True):
    return {"id": index, "content": text, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": special}


def with_tokenizer(folder, *added):
    words = {chr(97 + i): i for i in range(10)}
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE", "vocab": words, "merges": []},
                                                       "added_tokens": [token(t, 10 + i) for i, t in enumerate(added)]}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": added[-1]}))


@pytest.fixture
def wide(tmp_path):
    """A base with a tokenizer, and an expert that has two tokens and rows more."""
    base = tensors(1)
    plain.write_folder(tmp_path / "base", base, config=config())
    plain.write_folder(tmp_path / "a", tensors(2, rows=13, base=base), config=config(13))
    with_tokenizer(tmp_path / "base", "<e>")
    with_tokenizer(tmp_path / "a", "<e>", "<x>", "<y>")
    (tmp_path / "a" / "generation_config.json").write_text('{"eos_token_id": 12}')
    obm.compress(tmp_path / "base", {"a": obm.Expert(tmp_path / "a", map={EMBEDDING: "1bit"})}, out=tmp_path / "p")
    plain.write_folder(tmp_path / "dense", rebuild(tmp_path / "p", "a", base), config=config(13))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(tmp_path / "a" / name, tmp_path / "dense")
    return tmp_path


@pytest.mark.parametrize("source", ["union", "base", "expert"])
def test_vocabularies(wide, source):
    results, texts = [], []
    for ref in (str(wide / "dense"), f"{wide / 'p'}:a"):
        out = wide / f"out-{len(results)}"
        results.append(merged({"merge_method": "task_arithmetic", "base_model": str(wide / "base"),
                               "tokenizer_source": ref if source == "expert" else source,
                               "models": [{"model": ref, "parameters": {"weight": 0.5}}]}, out))
        texts.append({n: (out / n).read_text() for n in ("tokenizer.json", "tokenizer_config.json", "config.json")})
    assert results[0] == results[1] and texts[0] == texts[1]
    assert results[0][EMBEDDING][1] == (11 if source == "base" else 13, 7)


def test_an_expert_that_gives_the_config(wide):
    """Its rows, tokenizer and eos go with it where it comes first; all else is the base's."""
    results = [merged({"merge_method": "passthrough", "models": [{"model": ref}]}, wide / f"out-{i}")
               for i, ref in enumerate((str(wide / "dense"), f"{wide / 'p'}:a"))]
    assert results[0] == results[1]
    made = obm.Checkpoint(wide / "out-1").config
    assert made["vocab_size"] == 13 and made["eos_token_id"] == 12
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (wide / "out-1" / name).read_text() == (wide / "a" / name).read_text()


def test_rows_that_do_not_fit(wide):
    with pytest.raises(obm.ShapeError, match=r"embed_tokens.weight: shape \(11, 7\) in .*base, \(13, 7\) in .*p:a: .*tokenizer_source"):
        obm.merge({"merge_method": "task_arithmetic", "base_model": str(wide / "base"),
                   "models": [{"model": f"{wide / 'p'}:a", "parameters": {"weight": 1}}]}, wide / "out")
    with pytest.raises(obm.ArgumentError, match="tokenizer: .*p:a is not among the models"):
        obm.merge({"merge_method": "passthrough", "models": [{"model": str(wide / "base")}], "tokenizer_source": f"{wide / 'p'}:a"}, wide / "out")


def test_resume_sees_another_pack(family, tmp_path):
    r = recipe(family, "task_arithmetic", [f"{family / 'my.pack'}:a"])

    def stop(what, done, total):
        if done > total // 2:
            raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        obm.merge(r, tmp_path / "out", resume=True, shard_bytes=4000, progress=stop)
    with pytest.raises(obm.MismatchError):
        obm.merge(recipe(family, "task_arithmetic", [f"{family / 'my.pack'}:b"]), tmp_path / "out", resume=True, shard_bytes=4000)
    obm.merge(r, tmp_path / "out", resume=True, shard_bytes=4000)
    assert merged(r, tmp_path / "again") == {n: (t.dtype, t.shape, obm.Checkpoint(tmp_path / "out").sha256(n))
                                             for n in obm.Checkpoint(tmp_path / "out") for t in [obm.Checkpoint(tmp_path / "out")[n]]}


@pytest.mark.parametrize("ref, error, message", [
    ("my.pack", obm.ArgumentError, "my.pack is a pack: name one of its experts as .*my.pack:a .it has a, b, c, d"),
    ("my.pack:z", obm.NotFoundError, 'my.pack has no expert "z": it has a, b, c, d'),
    ("a:b", obm.FormatError, "a is no pack: it has no pack.json"),
    ("gone:b", OSError, "gone:b"),
])
def test_references_that_are_refused(family, tmp_path, ref, error, message):
    with pytest.raises(error, match=message):
        obm.merge(recipe(family, "task_arithmetic", [str(family / ref)]), tmp_path / "out")
    with pytest.raises(error, match=message):
        obm.TaskVector(family / "base", family / ref)
    with pytest.raises(error, match=message):
        obm.compress(family / "base", {"x": family / ref}, tmp_path / "p")


def test_uses_that_are_refused(family, tmp_path):
    ref = f"{family / 'my.pack'}:a"
    with pytest.raises(obm.ArgumentError, match="my.pack:a is an expert of a pack: it can be an expert, not a base"):
        obm.TaskVector(ref, family / "a")
    with pytest.raises(obm.ArgumentError, match="expert x: .*my.pack:a is compressed already: name the checkpoint"):
        obm.compress(family / "base", {"x": ref}, tmp_path / "p")
    assert not (tmp_path / "p").exists()
    with pytest.raises(obm.UnsupportedError, match="my.pack:a goes with the base of its pack"):
        (tmp_path / "two.yml").write_text("---\n".join(json.dumps(r) + "\n" for r in (
            recipe(family, "task_arithmetic", [str(family / "a")], name="first"),
            {"merge_method": "task_arithmetic", "base_model": "first", "models": [{"model": ref, "parameters": {"weight": 1}}]})))
        obm.merge(tmp_path / "two.yml", tmp_path / "out")


def test_another_base(family, tmp_path):
    shutil.copytree(family / "base", tmp_path / "copy")
    changed = tensors(1)
    changed[UP][3, 4] += 1
    plain.write_folder(tmp_path / "other", changed, config=config())
    ref = f"{family / 'my.pack'}:a"
    same = recipe(family, "task_arithmetic", [ref])
    assert merged(same, tmp_path / "one") == merged({**same, "base_model": str(tmp_path / "copy")}, tmp_path / "two")
    message = f"other is not the base that pack .*my.pack was made from: tensor {UP} has other contents"
    with pytest.raises(obm.MismatchError, match=message):
        obm.merge({**same, "base_model": str(tmp_path / "other")}, tmp_path / "out")
    with pytest.raises(obm.MismatchError, match=message):
        obm.TaskVector(tmp_path / "other", ref)
    assert not pathlib.Path(tmp_path / "out").exists()
