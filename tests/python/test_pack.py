"""Packs: what is written, what is refused, and that a stopped or failed run leaves nothing."""

import json
import math
import os
import pathlib
import shutil
import signal
import threading
import time
import warnings

import numpy as np
import pytest

import onebitmerge as obm
import plain

TASKS = ["chat", "math", "code"]


def contents(folder):
    """{name: bytes} of a pack without the paths to its base, which depend on where the pack lies."""
    files = {p.name: p.read_bytes() for p in folder.iterdir()}
    described = json.loads(files.pop("pack.json"))
    described["base"].pop("path")
    described["base"].pop("absolute")
    return files, described


@pytest.fixture(scope="module")
def tensors(models):
    return {name: plain.load(models / name) for name in ("base", *TASKS)}


def test_opens_again(pack, pack_path, models):
    assert pack.tasks == TASKS
    assert pack.path == str(pack_path)
    assert pack.base.path.endswith("base")
    assert pack.base_bytes == sum(len(data) for _, _, data in plain.read_safetensors(models / "base" / "model.safetensors").values())
    assert pack.settings == {"lambda": 0.3, "reading": "onto_base", "profile": "mergekit", "density": 1.0}
    assert [pack.policy(task) for task in TASKS] == ["linear, scale row, planes 1"] * 3
    pack.verify()


def test_signs_and_alphas(pack, tensors):
    for task in TASKS:
        by_mode = {}
        for t in pack.tensors(task):
            by_mode.setdefault(t["mode"], []).append(t["name"])
            d = tensors[task][t["name"]] - tensors["base"][t["name"]]
            if t["mode"] == "same":
                assert not d.any() and t["planes"] == [] and t["bytes"] == 0
                continue
            assert t["mode"] == "1bit" and (t["rows"], t["cols"]) == d.shape
            (signs, scales), = t["planes"]
            assert signs.shape == (t["rows"], 8 * math.ceil(t["cols"] / 64)) and signs.dtype == np.uint8
            assert np.array_equal(plain.unpack_signs(signs, t["cols"]), np.where(d >= 0, 1, -1))
            assert scales.dtype == np.float32
            assert np.allclose(scales, np.abs(d).mean(axis=1, dtype=np.float64), rtol=1e-7, atol=0)
            assert t["bytes"] == signs.nbytes + scales.nbytes
        assert len(by_mode["1bit"]) == 4 * 7


@pytest.mark.parametrize("scale, planes", [("matrix", 1), ("group:64", 2), ("row", 3)])
def test_scales_and_planes(models, tmp_path, tensors, scale, planes):
    pack = obm.compress(models / "base", {"math": obm.Expert(models / "math", scale=scale, planes=planes)}, tmp_path / "p")
    for t in pack.tensors("math"):
        if t["mode"] != "1bit":
            continue
        residual = (tensors["math"][t["name"]] - tensors["base"][t["name"]]).astype(np.float64)
        assert len(t["planes"]) == planes
        for signs, scales in t["planes"]:
            d = plain.unpack_signs(signs, t["cols"])
            assert (d == np.where(residual >= 0, 1, -1)).mean() > 0.999   # a residual near 0 may round to the other side
            spread = plain.spread(scales, *d.shape, scale)
            sums = np.abs(residual).mean() if scale == "matrix" else None
            if scale == "row":
                sums = np.abs(residual).mean(axis=1, keepdims=True)
            if scale == "group:64":
                rows, cols = residual.shape
                sums = np.repeat(np.abs(residual).reshape(rows, cols // 64, 64).mean(axis=2), 64, axis=1)
            assert np.allclose(spread, sums, rtol=1e-6, atol=1e-12)
            residual = residual - spread * d
    assert f"scale {scale}, planes {planes}" in pack.policy("math")


def test_policies(models, tmp_path):
    pack = obm.compress(models / "base", {
        "chat": (models / "chat", "mlp"),
        "math": obm.Expert(models / "math", policy="attention"),
        "code": obm.Expert(models / "code", map={"*.layers.0.*.up_proj.weight": "full", "*.down_proj.weight": "drop"}),
    }, tmp_path / "p")

    def modes(task):
        return {t["name"]: t["mode"] for t in pack.tensors(task) if t["class"] in ("attention", "mlp")}

    assert {m for n, m in modes("chat").items() if ".mlp." in n} == {"1bit"}
    assert {m for n, m in modes("chat").items() if ".self_attn." in n} == {"full"}
    assert {m for n, m in modes("math").items() if ".mlp." in n} == {"full"}
    assert {m for n, m in modes("math").items() if ".self_attn." in n} == {"1bit"}
    code = modes("code")
    assert code["model.layers.0.mlp.up_proj.weight"] == "full" and code["model.layers.1.mlp.up_proj.weight"] == "1bit"
    assert {m for n, m in code.items() if n.endswith("down_proj.weight")} == {"drop"}


def test_paper_profile(models, experts, tmp_path):
    pack = obm.compress(models / "base", experts, tmp_path / "p", profile="paper")
    modes = {task: {t["class"]: t["mode"] for t in pack.tensors(task)} for task in TASKS}
    assert (modes["chat"]["mlp"], modes["chat"]["attention"]) == ("1bit", "full")
    assert (modes["math"]["mlp"], modes["math"]["attention"]) == (modes["code"]["mlp"], modes["code"]["attention"]) == ("full", "1bit")
    assert pack.settings["lambda"] == 1 and pack.settings["profile"] == "paper"
    assert all(len(t["planes"][0][1]) == 1 for t in pack.tensors("chat") if t["mode"] == "1bit")   # scale per matrix


def test_bytes_add_up(pack, pack_path):
    for task in TASKS:
        by_class = pack.bytes(task)
        listed = {}
        for t in pack.tensors(task):
            listed[t["class"]] = listed.get(t["class"], 0) + t["bytes"]
        assert {cls: b["bytes_pack"] for cls, b in by_class.items()} == listed
        file, = pack_path.glob(f"{task}-*.safetensors")
        assert sum(listed.values()) == sum(len(data) for _, _, data in plain.read_safetensors(file).values())
        assert by_class["mlp"]["bytes_expert"] == 2 * by_class["mlp"]["params"]   # bf16
    assert "pack / K full experts" in repr(pack) and "<table>" in pack._repr_html_()


def test_thread_counts_write_the_same_bytes(models, experts, tmp_path, threads):
    seen = []
    for n in (1, 2, 5):
        threads(n)
        out = tmp_path / f"p{n}"
        obm.compress(models / "base", {"chat": obm.Expert(experts["chat"], planes=2), "math": (experts["math"], "attention")}, out)
        seen.append(contents(out))
    assert seen[0] == seen[1] == seen[2]


def test_the_first_bad_value_is_named(tmp_path, threads):
    """Whatever the number of threads, and although a later tensor is found bad first."""
    rows = {"model.layers.0.mlp.up_proj.weight": 3072, "model.layers.1.mlp.up_proj.weight": 1024}
    first, second = rows
    base = {name: np.zeros((n, 1024), np.float32) for name, n in rows.items()}
    expert = {name: np.ones((n, 1024), np.float32) for name, n in rows.items()}
    expert[first][-1, 7] = expert[second][0, 7] = np.nan
    for folder, tensors in (("base", base), ("expert", expert)):
        plain.write_folder(tmp_path / folder, tensors, "BF16", config={"model_type": "llama"})
    for n in (1, 2, 5):
        threads(n)
        for _ in range(5):
            with pytest.raises(obm.NonFiniteError, match=f"tensor {first}: NaN or Inf .* at index {3071 * 1024 + 7} "):
                obm.compress(tmp_path / "base", {"a": tmp_path / "expert"}, tmp_path / "p")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "expert"]


def test_configs_that_compute_something_else_are_named(models, tmp_path):
    """The same weights under another RoPE: a pack, a task vector and a merge follow the base's config, and say so."""
    expert = tmp_path / "expert"
    shutil.copytree(models / "math", expert)
    config = json.loads((expert / "config.json").read_text())
    config.update(rope_theta=config.get("rope_theta", 10000.0) * 100, rms_norm_eps=float(config["rms_norm_eps"]), use_cache=False)
    (expert / "config.json").write_text(json.dumps(config))
    recipe = {"merge_method": "linear", "models": [{"model": str(models / "base"), "parameters": {"weight": 1}}, {"model": str(expert), "parameters": {"weight": 1}}]}
    for call in (lambda: obm.compress(models / "base", {"math": expert}, tmp_path / "p"), lambda: obm.TaskVector(models / "base", expert),
                 lambda: obm.merge(recipe, tmp_path / "m")):
        with pytest.warns(RuntimeWarning, match="expert/config.json: rope_theta: expected 10000, found 1000000: .* follows .*base/config.json") as seen:
            call()
        assert len(seen) == 1


def test_models_of_another_size_are_refused_without_more(models, tmp_path):
    """Their configs differ in many ways, none of which helps."""
    other = models.parents[1] / "tests" / "vectors" / "models" / "llama-tied"
    recipe = {"merge_method": "task_arithmetic", "base_model": str(other), "models": [{"model": str(models / "math"), "parameters": {"weight": 1}}]}
    for call in (lambda: obm.compress(other, {"math": models / "math"}, tmp_path / "p"), lambda: obm.TaskVector(other, models / "math"),
                 lambda: obm.merge(recipe, tmp_path / "m"), lambda: obm.merge(recipe, tmp_path / "m", dry_run=True)):
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            with pytest.raises(obm.Error, match="model.embed_tokens.weight: |model.layers.2.input_layernorm.weight .*is not in"):
                call()
        assert [str(w.message) for w in seen] == []


def test_outputs_below_a_file_are_refused_by_dry_runs_too(models, experts, pack, tmp_path):
    (tmp_path / "file.txt").write_text("mine")
    out = tmp_path / "file.txt" / "a" / "b"
    recipe = {"merge_method": "linear", "models": [{"model": str(models / "math"), "parameters": {"weight": 1}}]}
    for call in (lambda dry_run: obm.compress(models / "base", experts, out, dry_run=dry_run), lambda dry_run: pack.export("math", out, dry_run=dry_run),
                 lambda dry_run: obm.merge(recipe, out, dry_run=dry_run),
                 lambda dry_run: obm.extract_lora(models / "base", models / "math", out, rank=2, dry_run=dry_run)):
        for dry_run in (True, False):
            with pytest.raises(FileExistsError, match="b: .*file.txt is a file, expected a folder or nothing$"):
                call(dry_run)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file.txt"] and (tmp_path / "file.txt").read_text() == "mine"


def test_dry_run_writes_nothing(models, experts, tmp_path):
    plan = obm.compress(models / "base", experts, tmp_path / "p", dry_run=True)
    assert set(plan) == {"tensors", "tiles", "bytes_read", "bytes_written", "peak_memory", "seconds"}
    assert list(tmp_path.iterdir()) == []
    # Nothing but headers was read, so tensors that turn out equal to the base's count as stored.
    shapes = [(name, shape) for name, (_, shape, _) in plain.read_safetensors(models / "base" / "model.safetensors").items()]
    planes = sum(r * (8 * math.ceil(c / 64) + 4) for name, (r, c) in ((n, s) for n, s in shapes if "proj" in n))
    full = sum(2 * math.prod(s) for n, s in shapes if "proj" not in n)
    assert plan["bytes_written"] == 3 * (planes + full)
    assert plan["tensors"] == 3 * len(shapes)


def test_an_existing_output_is_kept(models, experts, tmp_path):
    out = tmp_path / "p"
    obm.compress(models / "base", experts, out)
    before = contents(out)
    with pytest.raises(FileExistsError, match="p exists already.*; overwrite=True replaces it"):
        obm.compress(models / "base", {"chat": experts["chat"]}, out)
    with pytest.raises(FileExistsError, match="expert chat already.*; overwrite=True replaces it"):
        obm.Pack(out).add("chat", experts["chat"])
    assert contents(out) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    for overwrite in (False, True):   # no hint where it would not help
        with pytest.raises(FileExistsError, match="mine exists and is not a pack: it will not be replaced$"):
            obm.compress(models / "base", {"chat": experts["chat"]}, tmp_path / "mine", overwrite=overwrite)
    obm.Pack(out).add("chat", (experts["chat"], "mlp"), overwrite=True)
    assert contents(out) != before
    assert obm.compress(models / "base", {"chat": experts["chat"]}, out, overwrite=True).tasks == ["chat"]


def test_another_base_is_named(pack_path, models, tmp_path):
    tensors = plain.load(models / "base")
    name = "model.layers.1.self_attn.q_proj.weight"
    tensors[name][0, 0] += 1
    other = plain.write_folder(tmp_path / "other", tensors, "BF16", json.loads((models / "base" / "config.json").read_text()))
    with pytest.raises(obm.MismatchError, match=name):
        obm.Pack(pack_path, base=other)
    assert obm.Pack(pack_path, base=models / "base").tasks == TASKS


@pytest.mark.parametrize("which", ["chat-*.safetensors", "router-*.safetensors"])
def test_verify_finds_a_changed_byte(own_pack, which):
    folder = pathlib.Path(own_pack.path)
    own_pack.verify()
    file, = folder.glob(which)
    blob = bytearray(file.read_bytes())
    blob[-5] ^= 4
    file.write_bytes(blob)
    with pytest.raises(obm.FormatError, match=file.name):
        obm.Pack(folder).verify()


def test_verify_hashes_the_whole_base(models, tmp_path):
    """A change between the sampled blocks passes the quick check at opening and is found by verify."""
    r = np.random.default_rng(5)
    name = "model.layers.0.mlp.up_proj.weight"
    x = r.standard_normal((1024, 1024)).astype(np.float32)
    base = plain.write_folder(tmp_path / "base", {name: x})
    expert = plain.write_folder(tmp_path / "expert", {name: x + r.standard_normal(x.shape).astype(np.float32) * 0.01})
    obm.compress(base, {"chat": expert}, tmp_path / "p")
    passed = 0
    for at in range(0, x.size, 99991):
        changed = x.copy()
        changed.reshape(-1)[at] += 1
        plain.write_safetensors(base / "model.safetensors", {name: changed})
        try:
            pack = obm.Pack(tmp_path / "p")
        except obm.MismatchError:
            continue
        passed += 1
        with pytest.raises(obm.MismatchError, match=name):
            pack.verify()
    assert passed


def test_add_and_remove(models, experts, tmp_path):
    pack = obm.compress(models / "base", {"chat": experts["chat"], "math": experts["math"]}, tmp_path / "p")
    pack.add("code", obm.Expert(experts["code"], policy="attention"))
    assert pack.tasks == obm.Pack(tmp_path / "p").tasks == TASKS
    assert pack.policy("code").startswith("attention")
    pack.remove("chat")
    assert pack.tasks == obm.Pack(tmp_path / "p").tasks == ["math", "code"]
    pack.verify()
    assert not list((tmp_path / "p").glob("chat-*"))
    with pytest.raises(obm.NotFoundError, match="no expert chat"):
        pack.remove("chat")
    with pytest.raises((obm.Error, OSError), match="math"):
        pack.add("math", experts["math"])


def test_remove_drops_the_router(own_pack):
    assert own_pack.router_report().accuracy > 0.9
    own_pack.remove("math")
    with pytest.raises(obm.NotFoundError, match="router"):
        own_pack.router_report()


def test_set(own_pack):
    own_pack.set(lambda_=0.5, reading="recomputed", profile="paper", density=0.25)
    want = {"lambda": 0.5, "reading": "recomputed", "profile": "paper", "density": 0.25}
    assert own_pack.settings == obm.Pack(own_pack.path).settings == want
    own_pack.set(lambda_=0)
    assert own_pack.settings == {**want, "lambda": 0}
    for wrong in ({"lambda_": -1}, {"lambda_": math.nan}, {"density": 0}, {"density": 1.5}, {"reading": "sideways"}, {"profile": "x"}):
        with pytest.raises(obm.ArgumentError):
            own_pack.set(**wrong)
    assert own_pack.settings == {**want, "lambda": 0}


def test_a_models_pack_is_not_changed(model):
    with pytest.raises(obm.BusyError, match="belongs to an open model"):
        model.pack.set(lambda_=0)


@pytest.mark.parametrize("given, error, message", [
    ({"a b": "chat"}, obm.ArgumentError, "a b"),
    ({"chat": "nowhere"}, OSError, "nowhere"),
    ({}, obm.ArgumentError, "expert"),
    (["chat"], TypeError, "dict"),
])
def test_experts_that_are_refused(models, tmp_path, given, error, message):
    if isinstance(given, dict):
        given = {name: models / folder for name, folder in given.items()}
    with pytest.raises(error, match=message):
        obm.compress(models / "base", given, tmp_path / "p")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("field, value, message", [("policy", "thorough", "thorough.*linear"), ("scale", "group:65", "group:65|64"),
                                                   ("planes", 99, "planes|99"), ("map", {"*": "2bit"}, "2bit.*1bit")])
def test_expert_fields_that_are_refused(models, tmp_path, field, value, message):
    with pytest.raises(obm.ArgumentError, match=message):
        obm.compress(models / "base", {"chat": obm.Expert(models / "chat", **{field: value})}, tmp_path / "p")
    assert list(tmp_path.iterdir()) == []


def test_progress_is_called(models, experts, tmp_path):
    calls = []
    obm.compress(models / "base", experts, tmp_path / "p", progress=lambda *call: calls.append(call))
    whats = [what for what, _, _ in calls]
    assert "compress" in whats
    for what in set(whats):
        mine = [call for call in calls if call[0] == what]
        assert [done for _, done, _ in mine] == sorted(done for _, done, _ in mine)
        assert mine[-1][1] == mine[-1][2] > 0


def test_what_progress_raises_comes_back(models, experts, tmp_path):
    class Mine(Exception):
        pass

    mine = Mine("enough")

    def stop(what, done, total):
        raise mine

    with pytest.raises(Mine) as caught:
        obm.compress(models / "base", experts, tmp_path / "p", progress=stop)
    assert caught.value is mine
    assert list(tmp_path.iterdir()) == []


def test_interrupt_leaves_nothing(tmp_path):
    """Ctrl-C in a compression that takes seconds: KeyboardInterrupt soon (the bound is for a busy machine), and no output."""
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(24)]
    x = np.zeros((1024, 1024), np.float32)
    base = plain.write_folder(tmp_path / "base", {name: x for name in names}, "BF16")
    expert = plain.write_folder(tmp_path / "expert", {name: x + 1 for name in names}, "BF16")
    sent = []

    def interrupt(what, done, total):
        if not sent:
            sent.append(time.monotonic())
            os.kill(os.getpid(), signal.SIGINT)

    assert threading.current_thread() is threading.main_thread()
    with pytest.raises(KeyboardInterrupt):
        obm.compress(base, {"chat": obm.Expert(expert, planes=8)}, tmp_path / "p", progress=interrupt)
    assert time.monotonic() - sent[0] < 15
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "expert"]


def test_what_came_out_of_a_pack_survives_its_change(models, tmp_path):
    pack = obm.compress(models / "base", {"chat": models / "chat", "math": models / "math"}, tmp_path / "p")
    base, planes = pack.base, [t["planes"] for t in pack.tensors("chat")]
    sums = [int(signs.sum()) for plane in planes for signs, _ in plane]
    pack.remove("chat")
    assert [int(signs.sum()) for plane in planes for signs, _ in plane] == sums
    name = next(iter(base))
    assert np.array_equal(np.asarray(base[name]), np.asarray(obm.Checkpoint(models / "base")[name]))
