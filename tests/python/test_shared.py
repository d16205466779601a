"""Packs whose experts are masks of shared vectors: vectors, masks and what they stand for by NumPy, from the formulas of the
TALL-masks and EMR-Merging papers and core/FORMAT.md."""

import json
import pathlib
import shutil

import numpy as np
import pytest

import onebitmerge as obm
import plain

Q, UP, NORM = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.up_proj.weight", "model.norm.weight"
DOWN, EMBEDDING = "model.layers.0.mlp.down_proj.weight", "model.embed_tokens.weight"
SHAPES = {EMBEDDING: (11, 70), Q: (7, 70), UP: (13, 70), DOWN: (70, 4200), NORM: (70,)}
TASKS = ["a", "b", "c"]


def config(rows=11):
    return {"model_type": "llama", "num_hidden_layers": 1, "vocab_size": rows, "tie_word_embeddings": True}


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """a and b: all but DOWN of b changes; c: an adapter of q and up."""
    root, r = tmp_path_factory.mktemp("shared"), np.random.default_rng(3)
    base = {name: r.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}
    plain.write_folder(root / "base", base, "BF16", config())
    for name in "ab":
        noise = {n: (x + .02 * r.normal(size=x.shape)).astype(np.float32) for n, x in base.items()}
        if name == "b":
            noise[DOWN] = base[DOWN]
            noise[EMBEDDING] = np.concatenate([noise[EMBEDDING], r.normal(size=(2, 70)).astype(np.float32)])
        plain.write_folder(root / name, noise, "BF16", config(len(noise[EMBEDDING])))
    factors = {f"base_model.model.{m[:-7]}.lora_{side}.weight": r.normal(size=shape).astype(np.float32)
               for m, out, into in ((Q, 7, 70), (UP, 13, 70)) for side, shape in (("A", (1, into)), ("B", (out, 1)))}
    (root / "c").mkdir()
    plain.write_safetensors(root / "c" / "adapter_model.safetensors", factors)
    (root / "c" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 0.03125, "target_modules": ["q_proj", "up_proj"]}))
    return root


@pytest.fixture(scope="module")
def deltas(family):
    """{task: {name: f32}} of what is a matrix of the experts' policies and differs."""
    base = plain.load(family / "base")
    out = {task: {n: plain.load(family / task)[n] - base[n] for n in (Q, UP, DOWN)} for task in "ab"}
    del out["b"][DOWN]
    f = plain.load(family / "c" / "adapter_model.safetensors")
    out["c"] = {n: (0.03125 * (f[f"base_model.model.{n[:-7]}.lora_B.weight"].astype(np.float64) @
                               f[f"base_model.model.{n[:-7]}.lora_A.weight"].astype(np.float64))).astype(np.float32) for n in (Q, UP)}
    return out


def reference(deltas, method, dtype, lam=0.4):
    """{name: shared}, {task: {name: mask}}, {task: scaling}; shared as it is stored."""
    shared, masks, scalings = {}, {task: {} for task in deltas}, {}
    for name in (Q, UP, DOWN):
        ds = [d[name] for d in deltas.values() if name in d]
        total = np.zeros_like(ds[0])
        for d in ds:
            total = total + d
        if method == "emr":
            sign = np.sign(total)
            best = np.max([np.where(np.sign(d) == sign, np.abs(d), 0) for d in ds], axis=0)
            total = sign * best
        shared[name] = plain.rounded(total, dtype)
    for task, d in deltas.items():
        for name in d:
            x, s = d[name].astype(np.float64), shared[name].astype(np.float64)
            masks[task][name] = x * s > 0 if method == "emr" else np.abs(x) > lam * np.abs(s - x)
        own, kept = (sum(np.abs(v).sum(dtype=np.float64) for v in vs)
                     for vs in (d.values(), [shared[n] * masks[task][n] for n in d]))
        scalings[task] = own / kept if method == "emr" else 1.0
    return shared, masks, scalings


def compress(family, out, **options):
    return obm.compress(family / "base", {task: family / task for task in TASKS}, out, **options)


def rebuild(pack, task):
    """d of an expert's masked matrices in f32, by FORMAT.md, from the files alone."""
    folder = pathlib.Path(pack.path)
    manifest = json.loads((folder / "pack.json").read_text())
    shared = plain.load(folder / manifest["shared"]["file"])
    expert = next(e for e in manifest["experts"] if e["name"] == task)
    stored = plain.read_safetensors(folder / expert["file"])
    out = {}
    for name, record in expert["tensors"].items():
        if record["mode"] == "mask":
            rows, cols = shared[name].shape
            bits = np.frombuffer(stored[name + ".mask"][2], np.uint8).reshape(stored[name + ".mask"][1])
            kept = plain.unpack_signs(bits, cols) > 0
            out[name] = np.where(kept, np.float32(record["scaling"]) * shared[name], np.float32(0))
    return out


@pytest.fixture(scope="module", params=["tall", "emr"])
def pack(request, family, tmp_path_factory):
    return compress(family, tmp_path_factory.mktemp("pack") / "p", shared=request.param)


@pytest.mark.parametrize("method, dtype, lam", [("tall", None, 0), ("tall", "f32", 0.25), ("tall", "f16", 0), ("emr", None, 0), ("emr", "f32", 0)])
def test_vectors_masks_and_scalings(family, deltas, tmp_path, method, dtype, lam):
    pack = compress(family, tmp_path / "p", shared=method, shared_dtype=dtype, tall_lambda=lam)
    stored = (dtype or "bf16").upper()
    shared, masks, scalings = reference(deltas, method, stored, lam or 0.4)
    manifest = json.loads((tmp_path / "p" / "pack.json").read_text())
    found = plain.read_safetensors(tmp_path / "p" / manifest["shared"]["file"])
    assert manifest["version"] == 2 and sorted(found) == sorted(shared)
    for name, x in shared.items():
        assert found[name][0] == stored and np.array_equal(plain.widen(*found[name]), x), name
    for task in TASKS:
        modes = {t["name"]: t for t in pack.tensors(task)}
        assert {n for n, t in modes.items() if t["mode"] == "mask"} == set(masks[task])
        for name, mask in masks[task].items():
            bits, scaling = modes[name]["mask"]
            assert np.array_equal(plain.unpack_signs(bits, mask.shape[1]) > 0, mask), (task, name)
            assert scaling == pytest.approx(scalings[task], rel=2**-23)
            assert modes[name]["bytes"] == bits.nbytes == mask.shape[0] * 8 * -(-mask.shape[1] // 64)
    assert modes[DOWN]["mode"] == "same" and modes[NORM]["mode"] == "same" and modes[Q]["planes"] == []
    assert pack.shared == {"method": method, "lambda": (lam or 0.4) if method == "tall" else 0, "tensors": 3,
                           "bytes": sum(x.size for x in shared.values()) * (4 if stored == "F32" else 2)}
    pack.verify()
    assert obm.Pack(tmp_path / "p").shared == pack.shared


def test_hard_routes_are_the_experts(pack, family, tmp_path):
    base = plain.load(family / "base")
    assert pack.settings["lambda"] == 0
    for task in TASKS:
        want = {n: base[n] + d for n, d in rebuild(pack, task).items()}
        for name in (Q, UP, DOWN):
            assert np.array_equal(pack.materialise(task, name), want.get(name, base[name])), (task, name)
        pack.export(task, tmp_path / task, dtype="f32")
        exported = plain.load(tmp_path / task)
        assert all(np.array_equal(exported[n], x) for n, x in want.items())
        member = f"{pack.path}:{task}"
        obm.merge({"merge_method": "passthrough", "models": [{"model": member}], "dtype": "float32"}, tmp_path / f"merged-{task}")
        merged = plain.load(tmp_path / f"merged-{task}")
        assert all(np.array_equal(merged[n], x) for n, x in want.items())
        v = obm.TaskVector(family / "base", member)
        assert np.array_equal(np.asarray(v[Q]), rebuild(pack, task)[Q])
    assert len(exported[EMBEDDING]) == 11 and len(plain.load(tmp_path / "b")[EMBEDDING]) == 13


@pytest.mark.parametrize("reading", ["onto_base", "recomputed"])
@pytest.mark.parametrize("density", [1, 0.3])
def test_the_others_are_merged_in(pack, family, tmp_path, reading, density):
    own = obm.Pack(shutil.copytree(pack.path, tmp_path / "own"), family / "base")
    own.set(lambda_=0.7, reading=reading, density=density)
    base = plain.load(family / "base")
    rebuilt = [rebuild(own, task) for task in TASKS]
    for route in ("a", {"a": .25, "c": .5}):
        weights = [1, 0, 0] if route == "a" else [.25, 0, .5]
        for name in (Q, DOWN):
            ds = [d[name].astype(np.float64) if name in d else np.zeros(SHAPES[name]) for d in rebuilt]

            def trim(x, k, j):
                present = name in rebuilt[j] or (reading == "recomputed" and name in rebuilt[k])
                return plain.trim_top(x.astype(np.float32), density).astype(np.float64) if density < 1 and present else x

            want = base[name] + plain.merged_delta(ds, weights, 0.7, reading, trim)
            assert np.allclose(own.materialise(route, name), want, rtol=2**-23, atol=1e-9), (route, name)
    assert {r["hard"] for r in own.runs() if r["name"] in (Q, UP)} == {"overlay"}


@pytest.mark.parametrize("method", ["linear", "ties", "model_stock", "iso_c"])
def test_experts_are_inputs_of_merges(pack, family, tmp_path, method):
    """PACK:task against a dense folder of what FORMAT.md says, with an adapter beside them; b's extra rows would need a tokenizer."""
    base = plain.load(family / "base")
    records = {e["name"]: e["tensors"] for e in json.loads((pathlib.Path(pack.path) / "pack.json").read_text())["experts"]}
    parameters = {"linear": {"weight": 0.25}, "ties": {"weight": 1, "density": 0.5}}.get(method, {})
    folders = {}
    for task in "ac":
        d, own = rebuild(pack, task), plain.load(family / "a") if task == "a" else {}
        assert all(r["mode"] == "same" or n in d or (n in own and r["mode"] == "full") for n, r in records[task].items())
        folders[task] = plain.write_folder(tmp_path / task, {n: x + d[n] if n in d else own.get(n, x) for n, x in base.items()}, config=config())
    results = []
    for form in ("dense", "pack"):
        refs = [str(folders[t]) if form == "dense" else f"{pack.path}:{t}" for t in "ac"] + [str(family / "c")]
        obm.merge({"merge_method": method, "base_model": str(family / "base"), "parameters": parameters, "dtype": "float32",
                   "models": [{"model": ref} for ref in refs]}, tmp_path / form)
        results.append(plain.load(tmp_path / form))
    assert results[0].keys() == results[1].keys() == SHAPES.keys()
    for name in SHAPES:
        assert np.array_equal(results[0][name], results[1][name]), name


def test_other_modes_beside_masks(family, deltas, tmp_path):
    """What an expert does not give as a mask is in no sum; 1-bit planes stay as they were."""
    experts = {"a": family / "a", "b": obm.Expert(family / "b", policy="mlp", scale="matrix", map={Q: "1bit", EMBEDDING: "mask"}),
               "c": obm.Expert(family / "c", map={UP: "drop"})}
    pack = obm.compress(family / "base", experts, tmp_path / "p", shared="tall", shared_dtype="f32")
    assert [pack.policy(t) for t in TASKS] == ["linear, mask", f"mlp, mask, scale matrix, planes 1, map {Q}=1bit {EMBEDDING}=mask",
                                               f"linear, mask, map {UP}=drop"]
    shared = plain.load(next((tmp_path / "p").glob("shared-*")))
    assert np.array_equal(shared[Q], deltas["a"][Q] + deltas["c"][Q]) and np.array_equal(shared[UP], deltas["a"][UP] + deltas["b"][UP])
    modes = {t["name"]: t for t in pack.tensors("b")}
    assert modes[Q]["mode"] == "1bit" and np.array_equal(plain.unpack_signs(modes[Q]["planes"][0][0], 70) > 0, deltas["b"][Q] >= 0)
    rows = plain.load(family / "b")[EMBEDDING]
    d = rows[:11] - plain.load(family / "base")[EMBEDDING]
    assert np.array_equal(pack.materialise("b", EMBEDDING), np.concatenate([plain.load(family / "base")[EMBEDDING] + d, rows[11:]]))
    plane = obm.compress(family / "base", {"b": obm.Expert(family / "b", policy="attention", scale="matrix")}, tmp_path / "q")
    assert np.array_equal(plane.materialise("b", Q), pack.materialise("b", Q))


@pytest.mark.parametrize("method", ["tall", "emr"])
def test_thread_counts_write_the_same_bytes(family, tmp_path, threads, method):
    for n in (1, 2, 3):
        threads(n)
        compress(family, tmp_path / str(n), shared=method)
    files = [{p.name: p.read_bytes() for p in (tmp_path / n).iterdir() if p.name != "pack.json"} for n in "123"]
    assert files[0] == files[1] == files[2] and len(files[0]) == 4


def test_dry_run(family, tmp_path):
    plan = compress(family, tmp_path / "p", shared="tall", dry_run=True)
    assert list(tmp_path.iterdir()) == []
    pack = compress(family, tmp_path / "p", shared="tall")
    written = sum(b["bytes_pack"] for t in TASKS for b in pack.bytes(t).values()) + pack.shared["bytes"]
    # b's DOWN and the norms, which turn out to be the base's, are known only once they are read
    assert written <= plan["bytes_written"] <= written + 70 * 8 * 66 + 3 * 140 + 3 * 70 * 13 * 2
    assert plan["bytes_read"] > 0 and plan["peak_memory"] > 0


def test_add_and_remove(pack, family, tmp_path):
    own = obm.Pack(shutil.copytree(pack.path, tmp_path / "own"), family / "base")
    with pytest.raises(obm.UnsupportedError, match="shares one vector among its experts"):
        own.add("d", family / "a")
    want = own.materialise("c", Q)
    own.remove("a")
    assert own.tasks == obm.Pack(own.path, family / "base").tasks == ["b", "c"]
    assert np.array_equal(own.materialise("c", Q), want) and own.shared == pack.shared
    own.verify()
    assert len(list((tmp_path / "own").glob("shared-*"))) == 1 and not list((tmp_path / "own").glob("a-*"))


@pytest.mark.parametrize("options, message", [
    ({"shared": "sum"}, "unknown shared vector \"sum\": tall or emr"),
    ({"shared": "emr", "tall_lambda": 0.4}, "tall_lambda belongs to shared \"tall\""),
    ({"shared": "tall", "tall_lambda": -1}, "tall_lambda is -1"),
    ({"shared": "tall", "tall_lambda": float("nan")}, "tall_lambda is nan"),
    ({"shared_dtype": "f32"}, "shared_dtype belongs to shared"),
    ({"shared": "emr", "shared_dtype": "f64"}, "shared_dtype f64"),
])
def test_options_that_are_refused(family, tmp_path, options, message):
    with pytest.raises(obm.ArgumentError, match=message):
        compress(family, tmp_path / "p", **options)
    assert list(tmp_path.iterdir()) == []


def test_experts_that_are_refused(family, tmp_path):
    def run(experts, **options):
        return obm.compress(family / "base", experts, tmp_path / "p", **{"shared": "tall", **options})

    with pytest.raises(obm.ArgumentError, match=r"map rule \*q_proj\*=mask: the pack has no shared vector"):
        run({"a": obm.Expert(family / "a", map={"*q_proj*": "mask"})}, shared=None)
    with pytest.raises(obm.ArgumentError, match="only matrices can be mask"):
        run({"a": obm.Expert(family / "a", map={NORM: "mask"})})
    with pytest.raises(obm.ArgumentError, match="no expert's policy makes a matrix that differs a mask"):
        run({"a": obm.Expert(family / "a", policy="full")})
    bad = plain.load(family / "a")
    bad[UP][3, 5] = np.inf
    plain.write_folder(tmp_path / "bad", bad, config=config())
    with pytest.raises(obm.NonFiniteError, match=f"expert worse: tensor {UP}: NaN or Inf.*{3 * 70 + 5}"):
        run({"a": family / "a", "worse": tmp_path / "bad"})
    bad[UP][3, 5] = 1e5
    plain.write_safetensors(tmp_path / "bad" / "model.safetensors", bad)
    with pytest.raises(obm.NonFiniteError, match=f"tensor {UP}: the shared vector overflows F16 at index {3 * 70 + 5}"):
        run({"a": family / "a", "worse": tmp_path / "bad"}, shared_dtype="f16")
    assert [p.name for p in tmp_path.iterdir()] == ["bad"]


def test_a_changed_byte_is_found(pack, family, tmp_path):
    folder = shutil.copytree(pack.path, tmp_path / "own")
    file, = folder.glob("shared-*")
    blob = bytearray(file.read_bytes())
    blob[-5] ^= 4
    file.write_bytes(blob)
    with pytest.raises(obm.FormatError, match=file.name):
        obm.Pack(folder, family / "base").verify()
    file.write_bytes(blob[:-1])
    with pytest.raises(obm.FormatError, match=file.name):
        obm.Pack(folder, family / "base")
    file.unlink()
    with pytest.raises(OSError, match=file.name):
        obm.Pack(folder, family / "base")


def set_record(**values):
    return lambda m: m["experts"][0]["tensors"][Q].update(values)


@pytest.mark.parametrize("change, message", [
    (lambda m: m.update(version=1), f"expert a: tensor .* is a mask, and the pack has no shared vectors"),
    (lambda m: m.update(version=3), "version 3 of the format; this build reads versions 1 and 2"),
    (lambda m: m.pop("shared"), "\"shared\": expected an object, found nothing"),
    (lambda m: m.update(shared=[]), "\"shared\": expected an object"),
    (lambda m: m["shared"].update(method="sum"), "\"method\" is \"sum\""),
    (lambda m: m["shared"].pop("tensors"), "\"tensors\": expected an object"),
    (lambda m: m["shared"].update(file="../x.safetensors"), "\"file\""),
    (lambda m: m["shared"]["tensors"].pop(Q), "3 tensors, pack.json accounts for 2"),
    (lambda m: m["shared"]["tensors"][Q].update(shape=[7, 71]), f"tensor {Q} is BF16"),
    (lambda m: m["shared"]["tensors"].update({NORM: {"shape": [70], "dtype": "F32"}}), f"tensor {NORM} is missing"),
    (set_record(scaling=-1.0), "scaling of its mask"),
    (set_record(scaling=1e300), "scaling of its mask"),
    (set_record(scaling="1"), "\"scaling\": expected a number"),
    (set_record(mode="1bit", planes=1, scale="row"), f"tensor {Q}.sign.0 is missing"),
    (lambda m: m["experts"][0]["tensors"][NORM].update(mode="mask", scaling=1), "cannot be a mask: it is no float matrix"),
    (lambda m: m["experts"][0]["tensors"][EMBEDDING].update(mode="mask", scaling=1), f"tensor {EMBEDDING} is missing"),
    (set_record(mode="same"), "pack.json accounts for"),
])
def test_manifests_that_are_refused(pack, family, tmp_path, change, message):
    folder = shutil.copytree(pack.path, tmp_path / "own")
    manifest = json.loads((folder / "pack.json").read_text())
    change(manifest)
    (folder / "pack.json").write_text(json.dumps(manifest))
    with pytest.raises(obm.Error, match=message):
        obm.Pack(folder, family / "base")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, models, experts):
    return obm.compress(models / "base", experts, tmp_path_factory.mktemp("trained") / "p", shared="tall")


def test_models_run_on_masks(trained, data, tmp_path):
    """A route's logits are those of its exported folder; the router is trained on the pack."""
    report = trained.train_router([item["messages"] for item in data.router], [item["task"] for item in data.router])
    assert report.accuracy > 0.9
    model = obm.Model(trained.path)
    trained.export("math", tmp_path / "math", dtype="f32")
    dense = obm.Model(tmp_path / "math")
    ids = model.tokenizer.encode("Tom has 3 apples and")
    want = dense.logits(ids)   # a model may keep an overlay in bf16
    assert np.abs(model.logits(ids, route="math") - want).max() < .02 < .5 < np.abs(model.logits(ids, route="base") - want).max()
    item = data.test["math"][0]
    assert model.generate(item["messages"], max_tokens=8).route == {"math": 1.0}
    assert model.score("2 + 2 =", " 4", route={"math": .5, "code": .5}).logprob < 0


def test_masks_keep_the_skill(trained, data):
    """TALL keeps most of what an expert does (Wang et al., section 5): here at least half of its answers."""
    model = obm.Model(trained.path)
    items = data.test["code"][:20]
    said = model.generate([item["messages"] for item in items], route=["code"] * len(items), max_tokens=32, temperature=0)
    assert sum(data.matches(str(answer), item) for answer, item in zip(said, items)) >= 10


def test_from_the_shell(family, tmp_path, capsys):
    from onebitmerge import cli

    def run(*argv):
        assert cli.main([str(a) for a in argv]) == 0
        return capsys.readouterr().out

    argv = ["compress", family / "base", *(f"{t}={family / t}" for t in TASKS), "-o", tmp_path / "p"]
    shown = run(*argv, "--shared", "tall", "--tall-lambda", "0.3", "--shared-dtype", "f32")
    values = (7 + 13) * 70 + 70 * 4200
    assert f"shared by the masks of all experts (tall, lambda 0.3): 3 tensors, {4 * values / 1e6:.2f} MB" in shown
    last = json.loads(run("pack", "show", tmp_path / "p", "--json").splitlines()[-1])
    assert last["shared"] == {"method": "tall", "lambda": 0.3, "tensors": 3, "bytes": 4 * values}
    pack = obm.Pack(tmp_path / "p")
    stored = sum(b["bytes_pack"] for t in TASKS for b in pack.bytes(t).values()) + 4 * values
    full = sum(b["bytes_expert"] for t in TASKS for b in pack.bytes(t).values())
    assert last["pack / K full experts"] == pytest.approx(stored / full)
    assert last["(base + pack) / (base + K full deltas)"] == pytest.approx((pack.base_bytes + stored) / (pack.base_bytes + full))
    assert "a mask in a, b, c" in run("pack", "show", tmp_path / "p", "--runs")
    assert "tensors" in run(*argv[:-1], tmp_path / "q", "--shared", "emr", "--dry-run")
    assert "tensors" in run(*argv[:-1], tmp_path / "q", "--shared", "emr", "--scale", "row", "--map", "*up_proj*=1bit", "--dry-run")
    run(*argv[:-1], tmp_path / "emr", "--shared", "emr")
    rows = [json.loads(line) for line in run("pack", "show", tmp_path / "emr", "--scales", "--json").splitlines()]
    masks = {(t, m["name"]): m["mask"][1] for t in TASKS for m in obm.Pack(tmp_path / "emr").tensors(t) if m["mask"]}
    assert masks and {(r["expert"], r["name"]): r["scaling"] for r in rows} == masks and set(rows[0]) == {"expert", "name", "scaling"}
    shown = run("pack", "show", tmp_path / "emr", "--scales")
    assert len(shown.splitlines()) == 1 + len(masks) and f"{rows[0]['scaling']:.6g}" in shown
    for more in ([], ["--dry-run"]):
        assert cli.main(["pack", "add", str(tmp_path / "p"), f"d={family / 'a'}", *more]) == 1
        assert "shares one vector among its experts" in capsys.readouterr().err
