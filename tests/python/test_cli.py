"""The command line: keys of the JSON lines, exit codes, what is refused, and that --dry-run writes nothing."""

import argparse
import fcntl
import gc
import hashlib
import io
import json
import os
import pathlib
import pty
import re
import resource
import shutil
import signal
import subprocess
import sys
import termios
import time

import numpy as np
import pytest

import onebitmerge as obm
import plain
from onebitmerge import cli
from onebitmerge.lua_router import LuaRouter

PROMPT = "What is 17 plus 5?"


def in_shell(*argv, **options):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    return subprocess.run([sys.executable, "-m", "onebitmerge", *map(str, argv)], capture_output=True, text=True, env=env, timeout=120, **options)


# ---- doctor, inspect ----

def test_doctor(run, lines):
    record, = lines("doctor")
    assert {"version", "isa", "isa_available", "blas", "topology", "compiler", "threads", "cores", "nodes", "memory_total", "memory_free",
            "prefill_bf16", "z12_auto", "python", "lua", "missing"} == set(record)
    assert record["version"] == obm.__version__ and record["isa"] in record["isa_available"].split(",")
    code, out, _ = run("doctor")
    assert code == 0 and "ISA in use" in out and "BLAS" in out


def test_inspect(run, lines, models):
    rows = lines("inspect", models / "base", models / "math", models / "code")
    assert {r["kind"] for r in rows} == {"class", "delta", "pair", "z12"}
    assert {r["class"] for r in rows if r["kind"] == "class"} == {"attention", "mlp", "embedding", "norm"}
    mlp = next(r for r in rows if r["kind"] == "delta" and r["class"] == "mlp" and r["expert"].endswith("math"))
    assert 0.02 < mlp["relative_norm"] < 0.04 and {"zero_share", "onebit_error_matrix", "onebit_error_row", "params"} <= set(mlp)
    norm = next(r for r in rows if r["kind"] == "delta" and r["class"] == "norm")
    assert norm["onebit_error_row"] is None   # no delta, no error: null, not NaN
    pair = next(r for r in rows if r["kind"] == "pair" and r["class"] == "mlp")
    assert len(pair["experts"]) == 2 and {"cosine", "sign_agreement"} <= set(pair)
    code, out, err = run("inspect", models / "base", models / "math")
    assert code == 0 and "attention" in out and "||d||" in out and "z12 (bf16 in 12 bits): 0.00 % of the weights" in out and err == ""


def test_inspect_names_layers_that_no_model_runs(run, models, tmp_path):
    (tmp_path / "model.safetensors").symlink_to(models / "base" / "model.safetensors")
    config = json.loads((models / "base" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    code, _, err = run("inspect", tmp_path)
    assert code == 0 and err.startswith("onebitmerge: warning: ") and "lie beyond the 3 layers (num_hidden_layers) of config.json" in err


def test_inspect_tensors(run, lines, models):
    raw = plain.read_safetensors(models / "base" / "model.safetensors")
    for model in (models / "base", models / "base" / "model.safetensors"):
        rows = lines("inspect", model, "--checksums")
        assert {r["name"]: (r["dtype"], tuple(r["shape"]), r["sha256"]) for r in rows} == {
            name: (dtype, shape, hashlib.sha256(data).hexdigest()) for name, (dtype, shape, data) in raw.items()}
    assert [set(r) for r in lines("inspect", models / "base", "--tensors")] == [{"name", "dtype", "shape"}] * len(raw)
    assert run("inspect", models / "base", models / "chat", "--tensors")[1].count("%") == len(raw)


# ---- packs ----

def compress_args(models, out):
    return ["compress", models / "base", f"chat={models / 'chat'}", f"math={models / 'math'}:attention", "-o", out]


def test_compress(lines, run, models, tmp_path, fails):
    out = tmp_path / "p"
    plan, = lines(*compress_args(models, out), "--dry-run")
    assert "writes at most " in run(*compress_args(models, out), "--dry-run")[1]
    assert plan["dry_run"] is True and {"tensors", "tiles", "bytes_read", "bytes_written", "peak_memory", "seconds"} <= set(plan)
    assert list(tmp_path.iterdir()) == []
    rows = lines(*compress_args(models, out))
    assert {r["expert"] for r in rows[:-1]} == {"chat", "math"}
    assert {"class", "tensors", "params", "bytes_expert", "bytes_pack", "policy"} <= set(rows[0])
    assert rows[-1]["settings"]["lambda"] == 0.3 and "pack / K full experts" in rows[-1]
    pack = obm.Pack(out)
    assert pack.tasks == ["chat", "math"] and pack.policy("math").startswith("attention")
    before = sorted((p.name, p.stat().st_mtime_ns) for p in out.iterdir())
    assert fails(*compress_args(models, out), match="exists").rstrip().endswith("; --force replaces it")
    assert fails("pack", "add", out, f"chat={models / 'chat'}", match="has an expert chat").rstrip().endswith("; --force replaces it")
    (tmp_path / "file").write_text("mine")
    assert "--force" not in fails(*compress_args(models, tmp_path / "file"), match="is no folder")
    with pytest.raises(FileExistsError, match="; overwrite=True replaces it"):   # what the command line says is its own
        obm.Pack(out).add("chat", models / "chat")
    assert sorted((p.name, p.stat().st_mtime_ns) for p in out.iterdir()) == before
    assert run(*compress_args(models, out), "--force", "--scale", "matrix", "--planes", 2, "--map", "*.o_proj.weight=drop")[0] == 0
    pack = obm.Pack(out)
    assert "scale matrix, planes 2" in pack.policy("chat")
    assert {t["mode"] for t in pack.tensors("chat") if "o_proj" in t["name"]} == {"drop"}


@pytest.mark.parametrize("argv", [["chat"], ["=x"], ["chat=a", "chat=b"], ["chat=a", "--map", "x=2bit"], ["chat=a", "--policy", "x"], ["chat=a", "--threads", "-1"],
                                  ["chat=a", "--scale", "foo"], ["chat=a", "--scale", "group:65"], ["chat=a", "--scale", "group:"],
                                  ["chat=a", "--shared", "emr", "--scale", "row"], ["chat=a", "--shared", "tall", "--planes", "2"],
                                  ["chat=a", "--shared", "tall", "--tall-lambda", "-1"]])
def test_compress_wrong_use(fails, models, tmp_path, argv):
    fails("compress", models / "base", *argv, "-o", tmp_path / "p", code=2)
    assert list(tmp_path.iterdir()) == []


def test_compress_misspelt_policy(fails, models, tmp_path):
    fails("compress", models / "base", f"chat={models / 'chat'}:lineer", "-o", tmp_path / "p", code=2, match='no policy "lineer", did you mean linear?')
    fails("compress", models / "base", f"chat={models / 'chat'}:x", "-o", tmp_path / "p", code=2, match='no policy "x": linear, attention, mlp, paper, full')
    fails("compress", models / "base", f"chat={tmp_path / 'gone'}:x", "-o", tmp_path / "p", match="gone:x")


def test_pack_show(run, lines, pack_path):
    rows = lines("pack", "show", pack_path)
    assert [r["expert"] for r in rows[:-1:4]] == ["chat", "math", "code"]
    scales = lines("pack", "show", pack_path, "--scales")
    assert len(scales) == 3 * 28 and {"expert", "name", "alpha"} <= set(scales[0])
    pack = obm.Pack(pack_path)
    tensor = next(t for t in pack.tensors("chat") if t["name"] == scales[0]["name"])
    assert np.allclose(scales[0]["alpha"], tensor["planes"][0][1], rtol=1e-7)
    code, out, _ = run("pack", "show", pack_path)
    assert code == 0 and "held-out accuracy" in out and "linear, scale row" in out
    assert run("pack", "show", pack_path, "--scales")[0] == 0


def test_pack_show_runs(run, lines, own_pack, models, tmp_path):
    assert {"base": 0, "planes": 16, "overlay": 0, "hard_masks": 3, "soft_masks": 3} == lines("pack", "show", own_pack.path)[-1]["runs"]["attention"]
    runs = {r["name"]: r for r in lines("pack", "show", own_pack.path, "--runs")}
    assert runs["model.layers.0.mlp.up_proj.weight"] == {
        "name": "model.layers.0.mlp.up_proj.weight", "class": "mlp", "planes": 3, "hard": "planes", "soft": "planes", "hard_masks": 3,
        "soft_masks": 3, "overlays": 0}
    assert (runs["model.norm.weight"]["hard"], runs["model.norm.weight"]["overlays"]) == ("base", 0)
    own_pack.set(lambda_=0)
    assert {r["hard_masks"] for r in obm.Pack(own_pack.path).runs() if r["planes"]} == {1}
    code, out, _ = run("pack", "show", own_pack.path)
    assert code == 0 and "on planes" in out
    mixed = obm.compress(models / "base", {"math": models / "math", "code": (models / "code", "mlp")}, tmp_path / "mixed.pack")
    query = next(r for r in mixed.runs() if r["name"] == "model.layers.0.self_attn.q_proj.weight")
    assert (query["planes"], query["hard"], query["overlays"], query["hard_masks"]) == (1, "overlay", 2, 0)
    assert "2 of 2" in run("pack", "show", mixed.path, "--runs")[1]
    many = obm.compress(models / "base", {t: obm.Expert(models / t, planes=3, map={"*.0.mlp.down_proj.weight": "full"} if t == "math" else None)
                                          for t in ("chat", "math", "code")}, tmp_path / "many.pack")
    why = {r["name"]: r.get("why") for r in lines("pack", "show", many.path, "--runs")}
    assert why["model.layers.0.mlp.down_proj.weight"] == "full in math"
    assert why["model.layers.1.mlp.down_proj.weight"] == "more than 8 masks" and why["model.norm.weight"] is None
    assert "full in math" in run("pack", "show", many.path, "--runs")[1]


def test_pack_verify(run, lines, own_pack, fails, models, tmp_path):
    assert lines("pack", "verify", own_pack.path) == [{"pack": own_pack.path, "verified": True}]
    assert run("pack", "verify", own_pack.path, "--base", models / "base")[0] == 0
    fails("pack", "verify", own_pack.path, "--base", models / "math", match="tensor")
    file, = (tmp_path / "own.pack").glob("code-*")
    blob = bytearray(file.read_bytes())
    blob[-1] ^= 1
    file.write_bytes(blob)
    fails("pack", "verify", own_pack.path, match=file.name)


def test_pack_changes(run, lines, own_pack, models, fails):
    path = own_pack.path
    assert lines("pack", "set", path, "--lambda", ".7", "--reading", "recomputed", "--profile", "paper", "--density", ".5") == [
        {"lambda": .7, "reading": "recomputed", "profile": "paper", "density": .5}]
    assert obm.Pack(path).settings["lambda"] == .7
    lines("pack", "set", path, "--lambda", ".1", "--dry-run")
    assert obm.Pack(path).settings["lambda"] == .7
    assert lines("pack", "remove", path, "code", "--dry-run")[0]["bytes_freed"] > 100_000
    assert obm.Pack(path).tasks == ["chat", "math", "code"]
    lines("pack", "remove", path, "code")
    assert obm.Pack(path).tasks == ["chat", "math"]
    assert lines("pack", "add", path, f"code={models / 'code'}:mlp", "--dry-run")[0]["dry_run"] is True
    assert obm.Pack(path).tasks == ["chat", "math"]
    lines("pack", "add", path, f"code={models / 'code'}:mlp")
    assert obm.Pack(path).policy("code").startswith("mlp")
    fails("pack", "remove", path, "poetry", match="poetry")
    for wrong in (["--lambda", "-1"], ["--lambda", "nan"], ["--lambda", "inf"], ["--density", "0"], ["--density", "1.5"]):
        fails("pack", "set", path, *wrong, code=2, match=f"argument {wrong[0]}: expected a number")


# ---- routers ----

def test_router_train(lines, run, own_pack, data):
    record, = lines("router", "train", own_pack.path, "--data", data.folder / "router_train.jsonl", "--layer", 1, "--holdout", .3)
    assert set(record) == {"accuracy", "calibration_error", "tasks", "confusion", "layer", "n_train", "n_held_out"}
    assert record["layer"] == 1 and record["n_held_out"] == 90 and record["accuracy"] > 0.9
    assert obm.Pack(own_pack.path).router_report().layer == 1
    code, out, _ = run("router", "train", own_pack.path, "--data", data.folder / "router_train.jsonl")
    assert code == 0 and "true \\ routed" in out


def test_route(lines, run, pack_path, jsonl, data, fails):
    rows = lines("route", pack_path, PROMPT, "def f(x):")
    assert [set(r) for r in rows] == [{"index", "text", "task", "weights"}] * 2
    assert [r["index"] for r in rows] == [0, 1] and rows[0]["text"] == PROMPT and rows[0]["task"] == "math"
    assert sum(rows[0]["weights"].values()) == pytest.approx(1)
    items = [item for task in ("chat", "math", "code") for item in data.test[task][:5]]
    rows = lines("route", pack_path, "--file", jsonl(*items))
    assert [r["task"] for r in rows] == [i["task"] for i in items]
    assert rows[0]["text"] == items[0]["messages"][0]["content"]
    assert run("route", pack_path, PROMPT)[1].startswith("math\t")
    fails("route", pack_path, code=2, match="either")


def test_python_routers(lines, fails, pack_path, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def pick(request):\n    return 'code' if 'def ' in request.text else {'chat': .25, 'math': .75}\n"
                    "def broken(request):\n    raise KeyError('from my router')\n")
    rows = lines("route", pack_path, "--router", f"{file}:pick", "def f", "hello")
    assert [(r["task"], r["weights"]) for r in rows] == [("code", {"code": 1}), ("math", {"chat": .25, "math": .75})]
    row, = lines("generate", pack_path, "-p", "def f", "--router", f"{file}:pick", "--max-tokens", 2)
    assert row["route"] == "code"
    file.write_text(file.read_text() + "def wrong(request):\n    return parse(request.text)\ndef parse(text):\n    return int(text)\n")
    for call in (["generate", pack_path, "-p"], ["route", pack_path]):
        assert "mine.py, line 4: KeyError: 'from my router'" in fails(*call, "x", "--router", f"{file}:broken")
        assert "mine.py, line 8: invalid literal" in fails(*call, "x", "--router", f"{file}:wrong")
    fails("route", pack_path, "x", "--router", f"{file}:nothing", match="nothing")
    fails("route", pack_path, "x", "--router", tmp_path / "none.py:f", match="none.py")
    fails("route", pack_path, "x", "--router", "nonsense", code=2)


def test_lua_routers(lines, fails, pack_path, tmp_path, model):
    file = tmp_path / "mine.lua"
    file.write_text("""return function(request)
  print("for people")
  if request.text:find("def ") then return "code" end
  if request.text == "first" then return 1 end
  if request.text == "builtin" then return request.builtin end
  if request.text == "bad" then error("from my router") end
  if request.text == "features" then return { chat = #request:features(1) / 192, math = #request.tokens } end
  local best, most = nil, -1
  for task, p in pairs(request.probabilities) do if p > most then best, most = task, p end end
  return best
end""")
    rows = lines("route", pack_path, "--router", file, "def f", "first", "builtin", "features", PROMPT)
    tokens = len(model.tokenizer.encode("features"))
    assert [r["weights"] for r in rows] == [{"code": 1}, {"chat": 1}, model.route("builtin")[0], {"chat": 1, "math": tokens}, {"math": 1}]
    fails("route", pack_path, "--router", file, "bad", match="from my router")
    forks = subprocess.run([sys.executable, "-c", "import os, sys\nfrom onebitmerge.lua_router import LuaRouter\nrouter = LuaRouter(sys.argv[1])\n"
                            "if not os.fork(): sys.exit(0)\nassert os.wait()[1] == 0 and router.process.poll() is None", file], timeout=60)
    assert forks.returncode == 0   # a child's end is not the parent's
    router = LuaRouter(str(file))
    process = router.process
    del router   # the interpreter and its pipes end with it
    gc.collect()
    assert process.returncode is not None and process.stdin.closed and process.stdout.closed
    (tmp_path / "broken.lua").write_text("return 3")
    fails("route", pack_path, "--router", tmp_path / "broken.lua", "x", match="must return a function")
    fails("route", pack_path, "--router", tmp_path / "none.lua", "x", match="none.lua")


# ---- running ----

def test_generate(run, lines, pack_path, model, jsonl, fails, models, tmp_path):
    row, = lines("generate", pack_path, "--chat", "-p", PROMPT, "--max-tokens", 40)
    want = model.generate(PROMPT, chat=True, max_tokens=40)
    assert row == {"index": 0, "text": str(want), "ids": want.ids, "route": "math", "finish_reason": "stop"}
    assert lines("generate", pack_path, "--chat", "--template", "chatml", "-p", PROMPT, "--max-tokens", 40) == [row]
    code, out, err = run("generate", pack_path, "--chat", "--template", "alpaca", "-p", PROMPT)
    assert code == 1 and not out and 'no built-in chat template is called "alpaca" (llama2, mistral' in err
    code, out, err = run("generate", pack_path, "--chat", "-p", PROMPT, "--max-tokens", 40)
    assert (code, out) == (0, want + "\n")
    shutil.copytree(models / "base", tmp_path / "untold")
    (tmp_path / "untold" / "tokenizer_config.json").write_text("{}")
    assert fails("generate", tmp_path / "untold", "--chat", "-p", PROMPT, match="no chat template").endswith(" (--template NAME)\n")
    file = jsonl({"messages": [{"role": "user", "content": PROMPT}]}, {"prompt": "hello", "route": "chat=.7,math=.3"},
                 {"ids": model.tokenizer.encode("hello"), "route": "code"}, {"prompt": "hello"})
    rows = lines("generate", pack_path, "--file", file, "--max-tokens", 8, "--batch", 2, "--route", "chat")
    assert [r["index"] for r in rows] == [0, 1, 2, 3]
    assert [r["route"] for r in rows] == ["chat", "chat=0.7,math=0.3", "code", "chat"]
    assert rows[1]["text"] == model.generate("hello", route={"chat": .7, "math": .3}, max_tokens=8)
    assert lines("generate", pack_path, "--file", file, "--max-tokens", 8, "--threads", 1, "--route", "chat") == rows
    plain_rows = lines("generate", models / "math", "-p", PROMPT, "--chat", "--max-tokens", 40, "--stop", " Answer")
    assert plain_rows[0]["route"] is None and "Answer" not in plain_rows[0]["text"]
    fails("generate", models / "math", "-p", "x", "--route", "chat", match="plain model")
    fails("generate", pack_path, "-p", "x", "--route", "poetry", match="poetry")
    fails("generate", pack_path, code=2, match="either")
    fails("generate", pack_path, "--file", jsonl({"prompt": "x"}, {"prompt": "x", "rout": "math"}), match='item 1: unknown key "rout", did you mean "route"')
    fails("generate", models / "math", "-p", "x", "--base", "y", code=2, match="--base")


@pytest.mark.parametrize("key", ["max_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "stop", "chat", "template",
                                 "router", "route_every", "batch"])
def test_options_are_no_keys_of_items(fails, pack_path, jsonl, key):
    fails("generate", pack_path, "--file", jsonl({"prompt": "x", key: 2}), match=f"in.jsonl, line 1, item 0: {key} is given for all items, with --{key.replace('_', '-')}")


def test_keys_that_only_look_misspelt(lines, fails, pack_path, jsonl, monkeypatch):
    """Beside the key that they look like, they are something else; standard input has a name."""
    item = {"prompt": "hello", "prompt_id": 7, "route": "math", "routes": ["x"]}
    argv = ["generate", pack_path, "--max-tokens", 4, "--file"]
    assert lines(*argv, jsonl(item)) == lines(*argv, jsonl({"prompt": "hello", "route": "math"}))
    monkeypatch.setattr(sys, "stdin", io.StringIO('{"promt": "hello"}\n'))
    fails(*argv, "-", match='standard input, line 1, item 0: unknown key "promt", did you mean "prompt"?')


def test_generate_samples_by_the_seed(lines, pack_path):
    argv = ["generate", pack_path, "--chat", "-p", "hello", "--route", "chat", "--temperature", 3, "--top-k", 100, "--max-tokens", 12]
    first = lines(*argv, "--seed", 5)
    assert lines(*argv, "--seed", 5) == first != lines(*argv, "--seed", 6)


def test_generate_routes_again(lines, run, pack_path, tmp_path, fails):
    file = tmp_path / "router.py"
    file.write_text("def decide(request):\n    return 'code' if 'Look' in request.text else 'math'\n")
    argv = ["generate", pack_path, "--chat", "-p", PROMPT, "--max-tokens", 12, "--router", f"{file}:decide"]
    assert "routes" not in lines(*argv)[0]
    row, = lines(*argv, "--route-every", 6)
    assert row["routes"][0] == {"token": 0, "route": "math"} and row["route"] == row["routes"][-1]["route"]
    jsonl = tmp_path / "prompts.jsonl"
    jsonl.write_text(json.dumps({"prompt": PROMPT}) + "\n")
    text = run("generate", pack_path, "--chat", "--file", jsonl, "--max-tokens", 12, "--router", f"{file}:decide", "--route-every", 6)[1]
    assert text.startswith("[0] " + ", ".join(["math", *(f"{r['route']} from token {r['token']}" for r in row["routes"][1:])]) + "\n")
    assert row["routes"][1:] == [{"token": 6, "route": "code"}]
    fails("generate", pack_path, "-p", "x", "--route", "math", "--route-every", 2, code=2, match="nothing to decide")


def test_score(lines, run, pack_path, base_model, model, models, jsonl, fails):
    p, c = model.tokenizer.encode(PROMPT), model.tokenizer.encode(" 22")
    file = jsonl({"prompt": PROMPT, "continuation": " 22"}, {"ids": p, "continuation_ids": c}, {"text": PROMPT})
    rows = lines("score", models / "base", "--file", file)
    assert [set(r) for r in rows] == [{"index", "logprob", "token_logprobs", "is_greedy", "perplexity", "route"}] * 3
    want = base_model.score(PROMPT, " 22")
    assert rows[0]["logprob"] == rows[1]["logprob"] == want.logprob and rows[0]["route"] is None
    assert rows[2]["perplexity"] == base_model.score(PROMPT).perplexity
    rows = lines("score", pack_path, "--file", jsonl({"prompt": PROMPT, "continuation": " 22"}, {"prompt": PROMPT, "continuation": " 22", "route": "chat"}))
    assert [r["route"] for r in rows] == ["math", "chat"]
    assert rows[1]["logprob"] == model.score(PROMPT, " 22", route="chat").logprob
    assert run("score", pack_path, "--file", file, "--route", "math")[1].count("route math") == 1   # an item's own route wins
    fails("score", pack_path, "--file", jsonl({"prompt": PROMPT, "ids": p, "continuation_ids": c}),
          match="in.jsonl, line 1, item 0: expected ids and continuation_ids; found prompt besides")
    fails("score", pack_path, "--file", jsonl({"prompt": "x"}), match='in.jsonl, line 1, item 0: expected "continuation"; found prompt')


def test_logits(lines, run, pack_path, base_model, model, models, jsonl, tmp_path, fails):
    ids = model.tokenizer.encode(PROMPT)
    out = tmp_path / "x.npz"
    file = jsonl({"ids": ids}, {"ids": ids[:3]})
    assert lines("logits", models / "base", "--file", file, "-o", out, "--dry-run")[0]["bytes_written"] == 2 * 768 * 4
    assert not out.exists()
    assert lines("logits", models / "base", "--file", file, "-o", out) == [{"output": str(out), "arrays": 2}]
    with np.load(out) as arrays:
        assert arrays.files == ["logits_0", "logits_1"] and arrays["logits_0"].dtype == np.float32
        assert np.array_equal(arrays["logits_0"], base_model.logits(ids, all=False))
        assert np.array_equal(arrays["logits_1"], base_model.logits(ids[:3], all=False))
    fails("logits", models / "base", "--file", file, "-o", out, match="exists")
    for dry in ([], ["--dry-run"]):
        fails("logits", models / "base", "--file", file, "-o", out.parent, "--force", *dry, match="is a folder, expected a file or nothing")
    assert run("logits", pack_path, "--file", jsonl({"ids": ids, "route": "code"}, {"ids": ids}), "-o", out, "--force", "--all", "--decode", "--kv", "f16")[0] == 0
    with np.load(out) as arrays:
        assert np.array_equal(arrays["logits_0"], model.logits(ids, route="code", decode=True, kv="f16"))
        assert np.array_equal(arrays["logits_1"], model.logits(ids, route=model.route(ids)[0], decode=True, kv="f16"))
    assert sorted(p.name for p in tmp_path.glob("*.npz*")) == ["x.npz"]


def test_tokenize(lines, run, models, model, jsonl, fails):
    ids = model.tokenizer.encode("a<|im_end|>")
    rows = lines("tokenize", models / "base", "--file", jsonl({"text": "a<|im_end|>"}, {"ids": ids}))
    assert rows == [{"index": 0, "ids": ids, "pieces": [model.tokenizer.piece(i) for i in ids]}, {"index": 1, "text": "a<|im_end|>"}]
    assert lines("tokenize", models / "base", "--file", jsonl({"ids": ids}), "--skip-special") == [{"index": 0, "text": "a"}]
    assert run("tokenize", models / "base", "--file", jsonl({"text": "a"}))[1].split() == [str(i) for i in model.tokenizer.encode("a")]
    assert [r["ids"] for r in lines("tokenize", models / "base", "a", "--special", "b c", "-p", "d")] == [
        model.tokenizer.encode(text, special=True) for text in ("a", "b c", "d")]
    fails("tokenize", models / "base", code=2, match="give either texts or --file")
    fails("tokenize", models / "base", "--file", jsonl({"ids": [9999]}), match="9999")


# ---- merge, export, eval ----

@pytest.mark.parametrize("verb", ["compress", "merge", "export"])
def test_a_disk_that_takes_no_more(models, pack_path, tmp_path, verb):
    """A limit of file sizes stands for it: one line, and nothing of the output is left."""
    recipe = tmp_path / "r.yml"
    recipe.write_text(f"merge_method: task_arithmetic\nbase_model: {models}/base\nmodels: [{{model: {models}/math, parameters: {{weight: 1}}}}]\n")
    argv = {"compress": [models / "base", f"math={models / 'math'}", "--policy", "full"], "merge": [recipe],
            "export": [pack_path, "--route", "math"]}[verb]
    limit = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (300000, 300000)); from onebitmerge import cli; sys.exit(cli.main())"
    done = subprocess.run([sys.executable, "-c", limit, verb, *map(str, argv), "-o", str(tmp_path / "out"), "--quiet"], capture_output=True, text=True)
    assert done.returncode == 1 and "File too large" in done.stderr and len(done.stderr.splitlines()) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["r.yml"]


def test_merge(lines, fails, models, tmp_path, run):
    recipe = tmp_path / "r.yml"
    recipe.write_text(f"merge_method: task_arithmetic\nbase_model: {models}/base\ndtype: float32\nmodels:\n  - model: {models}/math\n    parameters: {{weight: 1}}\n")
    out = tmp_path / "out"
    assert lines("merge", recipe, "-o", out, "--dry-run")[0]["dry_run"] is True and not out.exists()
    planned, = lines("merge", recipe, "-o", out, "--dry-run", "--out-shard-size", "1MB")
    told = run("merge", recipe, "-o", out, "--dry-run", "--out-shard-size", "1MB")[1].splitlines()
    record, = lines("merge", recipe, "-o", out, "--out-shard-size", "1MB", "--memory", "100MB")
    files = sorted(p.name for p in out.glob("*.safetensors"))
    assert [f["file"] for f in planned["documents"][0]["files"]] == files
    assert [line.split(": ")[0] for line in told[1:]] == [str(out / name) for name in files]
    assert record["output"] == str(out) and record["tensors"] == 38
    fails("merge", recipe, "-o", out, "--dry-run", match="holds a model, and overwriting was not asked for; --force replaces it")
    assert lines("merge", recipe, "-o", out, "--dry-run", "--force")[0]["exists"] is True
    assert len(list(out.glob("*.safetensors"))) > 3
    name = "model.layers.0.mlp.up_proj.weight"
    assert np.abs(obm.Checkpoint(out)[name].numpy() - obm.Checkpoint(models / "math")[name].numpy()).max() < 1e-6
    fails("merge", recipe, "-o", out, match="--force")
    fails("merge", recipe, "-o", out, "--resume", match="the finished merge there is another: shard size differs")
    assert run("merge", recipe, "-o", tmp_path / "resumed", "--resume")[0] == 0
    code, told, said = run("merge", recipe, "-o", tmp_path / "resumed", "--resume")
    assert code == 0 and "38 tensors" in told
    assert said == f"onebitmerge: warning: {tmp_path / 'resumed'}: this merge is finished already (size and checksum of every file verified); nothing was written\n"
    assert not (tmp_path / "resumed" / "onebitmerge-unfinished.json").exists()
    assert run("merge", recipe, "-o", out, "--force", "--profile", "paper")[0] == 0
    recipe.write_text(recipe.read_text().replace("merge_method", "merge_metod"))
    fails("merge", recipe, "-o", tmp_path / "other", match="merge_method")
    fails("merge", tmp_path / "none.yml", "-o", tmp_path / "other", match="none.yml")
    fails("merge", recipe, "-o", out, "--out-shard-size", "lots", code=2)
    assert not (tmp_path / "other").exists()


def test_export(lines, fails, pack_path, tmp_path, run):
    out = tmp_path / "out"
    assert lines("export", pack_path, "--route", "math", "-o", out, "--dry-run")[0]["dry_run"] is True and not out.exists()
    record, = lines("export", pack_path, "--route", "math", "-o", out)
    assert record["route"] == "math" and record["output"] == str(out) and 0 < record["lost_share"] < .1
    fails("export", pack_path, "--route", "math", "-o", out, match="--force")
    code, text, _ = run("export", pack_path, "--route", "chat=.5,math=.5", "-o", out, "--force", "--dtype", "f32")
    assert code == 0 and "lost to rounding" in text
    assert {t for t, _, _ in plain.read_safetensors(out / "model.safetensors").values()} == {"F32"}


def test_eval(lines, run, pack_path, models, data, jsonl, fails):
    items = [item for task in ("math", "code") for item in data.test[task][:10]]
    rows = lines("eval", pack_path, "--task", jsonl(*items), "--route", "auto", "--route", "math", "--max-tokens", 64)
    assert [set(r) for r in rows] == [{"task", "route", "n", "metric", "value", "low", "high"}] * 4
    assert [(r["task"], r["route"], r["n"]) for r in rows] == [(t, r, 10) for r in ("auto", "math") for t in ("math", "code")]
    assert rows[0]["value"] >= .7 and rows[1]["value"] >= .6 > rows[3]["value"]
    for r in rows:   # Wilson's interval, from the formula
        z, n, p = 1.959964, r["n"], r["value"]
        centre, half = (p + z * z / 2 / n) / (1 + z * z / n), z / (1 + z * z / n) * np.sqrt(p * (1 - p) / n + z * z / 4 / n / n)
        assert (r["low"], r["high"]) == pytest.approx((max(0, centre - half), min(1, centre + half)))
    choices = [{"prompt": "What is 3 plus 4?\n", "choices": [" Look: 3+4=7.", "qqqqqq"], "correct": 0, "task": "pick"},
               {"prompt": "What is 3 plus 4?\n", "choices": ["zzzz", "Look: 3+4=7."], "correct": 0, "task": "pick"}]
    row, = lines("eval", models / "math", "--task", jsonl(*choices))
    assert row["value"] == .5 and row["route"] is None
    assert "Wilson" in run("eval", pack_path, "--task", jsonl(*choices))[1]
    fails("eval", pack_path, "--task", jsonl({"prompt": "x"}), match="answer")
    fails("eval", pack_path, "--task", jsonl(), match="no items")


def test_materialise(lines, pack_path, model, models, data, jsonl, tmp_path):
    """Both ways of running give the same keys and text; the logits show that there are two."""
    ids = model.tokenizer.encode(PROMPT)
    other = obm.Model(pack_path, materialise=True)
    file = jsonl({"ids": ids, "route": "math"})
    argv = ["generate", pack_path, "--chat", "-p", PROMPT, "--max-tokens", 40]
    assert lines(*argv, "--materialise") == lines(*argv)
    for way, m in (([], model), (["--materialise"], other)):
        out = tmp_path / f"{len(way)}.npz"
        lines("logits", pack_path, "--file", file, "-o", out, *way)
        with np.load(out) as arrays:
            assert np.array_equal(arrays["logits_0"], m.logits(ids, all=False, route="math"))
        row, = lines("score", pack_path, "--file", jsonl({"prompt": PROMPT, "continuation": " 22"}, name="score.jsonl"), "--route", "math", *way)
        assert row["logprob"] == m.score(PROMPT, " 22", route="math").logprob
    assert not np.array_equal(model.logits(ids, route="math"), other.logits(ids, route="math"))
    items = jsonl(*data.test["math"][:8], name="items.jsonl")
    assert lines("eval", pack_path, "--task", items, "--materialise") == lines("eval", pack_path, "--task", items)
    assert lines("score", models / "base", "--file", jsonl({"text": PROMPT}), "--materialise")   # dense already: nothing changes


def test_z12(lines, pack_path, monkeypatch):
    """The same text, and of a model that is held in fewer bytes."""
    opened, make = [], obm.Model

    def model(*args, **kwargs):
        opened.append(make(*args, **kwargs))
        return opened[-1]
    monkeypatch.setattr(obm, "Model", model)
    argv = ["generate", pack_path, "--chat", "-p", PROMPT, "--max-tokens", 40]
    assert lines(*argv, "--z12", "on") == lines(*argv)
    packed, plain_one = opened
    assert packed.info["z12_plain"] > 0 == plain_one.info["z12_plain"]


# ---- input, errors, exit codes ----

def test_stdin(lines, fails, models, model, monkeypatch):
    for text, end in (("What is 17 plus 5?", ""), ("What is 17 plus 5?", "\n"), ("é\n\n", "\n"), ("-", "\n")):   # as it is, but for its last newline
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO((text + end).encode())))
        row, = lines("generate", models / "base", "-p", "-", "--max-tokens", 2)
        assert row["ids"] == obm.Model(models / "base").generate(text, max_tokens=2).ids
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\xff")))
    fails("generate", models / "base", "-p", "-", match="standard input: not UTF-8 at byte 1")
    monkeypatch.setattr(sys, "stdin", None)   # closed by whoever started it
    fails("generate", models / "base", "-p", "-", match="standard input is closed")
    monkeypatch.setattr(sys, "stdin", io.StringIO('{"text": "a"}\n\n{"text": "é"}\n'))
    assert [r["ids"] for r in lines("tokenize", models / "base", "--file", "-")] == [model.tokenizer.encode(t) for t in ("a", "é")]


@pytest.mark.parametrize("text, match", [("{]\n", "line 1: not JSON"), ('{"text": "a"}\n[1]\n', "line 2: expected an object, found a list"), ('{"x": 1}\n', "expected one of text")])
def test_bad_lines_are_named(fails, models, tmp_path, text, match):
    (tmp_path / "in.jsonl").write_text(text)
    assert "in.jsonl" in fails("tokenize", models / "base", "--file", tmp_path / "in.jsonl", match=match) or "item" in match or "one of" in match


def test_exit_codes(fails, run, tmp_path, models):
    assert run("--version") == (0, f"onebitmerge {obm.__version__}\n", "")
    code, out, _ = run("--help")
    assert code == 0 and all(verb in out for verb in ("doctor", "inspect", "compress", "pack", "router", "route", "generate", "score", "logits",
                                                      "tokenize", "merge", "export", "eval", "tune"))
    fails(code=2)
    fails("nonsense", code=2)
    fails("inspect", code=2)
    fails("doctor", "more", code=2)
    fails("route", "pack", "text", "--nonsense", code=2, match="onebitmerge route: error: unrecognized arguments: --nonsense\n")
    fails("generate", "pack", "-p", "x", "--maxtokens=3", code=2, match="unrecognized arguments: --maxtokens=3, did you mean --max-tokens?")
    fails("generate", "pack", "What is 2 + 2?", code=2, match="unrecognized arguments: What is 2 + 2?; a prompt goes behind -p")
    fails("mrge", "r.yml", "-o", "out", code=2, match='no VERB "mrge", did you mean merge? (choose from doctor, plan,')
    fails("pack", "shwo", "pack", code=2, match='no ACTION "shwo", did you mean show? (choose from show, verify, add, remove, set)')
    fails("merge", "r.yml", "-o", "out", "--profile", "papr", code=2, match='argument --profile: no choice "papr", did you mean paper?')
    fails("frobnicate", code=2, match="invalid choice: 'frobnicate'")
    fails("pack", "show", "pack", "--run5", code=2, match="onebitmerge pack show: error: unrecognized arguments: --run5, did you mean --runs?")
    fails("inspect", tmp_path / "nowhere", match="nowhere")
    fails("tokenize", models / "base", "--file", tmp_path / "none.jsonl", match="none.jsonl: No such file")


def test_in_a_process(models, tmp_path):
    done = in_shell("inspect", models / "base", "--json")
    assert done.returncode == 0 and done.stderr == "" and all(json.loads(line) for line in done.stdout.splitlines())
    done = in_shell("inspect", tmp_path / "nowhere")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    done = in_shell("tokenize", models / "base", "--file", "-", "--json", input='{"text": "a"}\n')
    assert done.returncode == 0 and json.loads(done.stdout)["index"] == 0


def test_interrupt_is_130(models, tmp_path):
    prompts = tmp_path / "many.jsonl"
    prompts.write_text('{"prompt": "hello", "route": "base"}\n' * 20000)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    process = subprocess.Popen([sys.executable, "-m", "onebitmerge", "generate", str(models / "base"), "--json", "--chat", "--file", "-"],
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env, text=True)
    process.stdin.write('{"prompt": "hello"}\n' * 5000)
    process.stdin.close()
    assert json.loads(process.stdout.readline())["index"] == 0   # it runs
    begun = time.monotonic()
    process.send_signal(signal.SIGINT)
    process.stdout.read()
    assert process.wait(60) == 130
    assert time.monotonic() - begun < 15
    assert process.stderr.read() == "onebitmerge: interrupted\n"


def start_long_merge(models, folder, *more, **options):
    """A merge of matrices on which LAPACK has some work, once it writes."""
    recipe = folder / "r.yml"
    one = f"merge_method: tsvm\nbase_model: {models}/base\nmodels: [{{model: {models}/math}}, {{model: {models}/code}}]\n"
    recipe.write_text(one + "".join(f"---\nname: m{i}\n{one}" for i in range(60)))
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    argv = ["merge", str(recipe), "-o", str(folder / "out"), "--out-shard-size", "100kB", *more]
    process = subprocess.Popen([sys.executable, "-m", "onebitmerge", *argv], env=env, **options)
    until = time.monotonic() + 60
    while not list(folder.rglob("*.safetensors.tmp-*")) and time.monotonic() < until:
        time.sleep(.01)
    return process


@pytest.mark.parametrize("number, text", [(signal.SIGTERM, "terminated"), (signal.SIGHUP, "the terminal went away"), (signal.SIGINT, "interrupted")])
@pytest.mark.parametrize("resume", (False, True))
def test_signals_clean_up(models, tmp_path, number, text, resume):
    """It leaves nothing, or with --resume what is finished."""
    process = start_long_merge(models, tmp_path, *["--resume"] * resume, stderr=subprocess.PIPE, text=True)
    process.send_signal(number)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == (130 if number == signal.SIGINT else -number)
    assert error == f"onebitmerge: {text}{'; the same command goes on with the shards that are finished' * resume}\n"
    if not resume:
        assert [p.name for p in tmp_path.iterdir()] == ["r.yml"]


@pytest.mark.parametrize("pause", (0, .02))
def test_signals_come_in_pairs(models, tmp_path, pause):
    """As systemd sends them."""
    process = start_long_merge(models, tmp_path, stderr=subprocess.PIPE, text=True)
    process.send_signal(signal.SIGTERM)
    time.sleep(pause)
    process.send_signal(signal.SIGHUP)
    error = process.communicate(timeout=60)[1]
    assert -process.returncode in (signal.SIGTERM, signal.SIGHUP) and "Traceback" not in error and error.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["r.yml"]


def test_the_terminal_goes_away(models, tmp_path):
    """Nothing can be written to it then, and the end is the signal's all the same."""
    master, terminal = pty.openpty()

    def take_terminal():
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    process = start_long_merge(models, tmp_path, stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True, preexec_fn=take_terminal)
    os.close(terminal)
    os.close(master)
    assert process.wait(60) == -signal.SIGHUP
    assert [p.name for p in tmp_path.iterdir()] == ["r.yml"]


def test_signals_that_are_ignored(models):
    """nohup stays nohup."""
    code = ("import signal, sys; signal.signal(signal.SIGHUP, signal.SIG_IGN); from onebitmerge.__main__ import main; main(['doctor']); "
            "assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL, timeout=60, env=env)


@pytest.mark.parametrize("start", (["-m", "onebitmerge"], ["-c", "import sys; from onebitmerge.__main__ import main; sys.exit(main())"]))
def test_interrupt_while_it_loads(tmp_path, start):
    (tmp_path / "argparse.py").write_text("import time\nprint('loading', flush=True)\ntime.sleep(60)\n")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *(p for p in sys.path if p)])}
    process = subprocess.Popen([sys.executable, *start, "doctor"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env, text=True)
    assert process.stdout.readline() == "loading\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=20) == ("", "onebitmerge: interrupted\n")
    assert process.returncode == 130


def test_the_package_loads_late():
    code = ("import sys, onebitmerge; assert not {'onebitmerge._core', 'numpy'} & set(sys.modules), sys.modules; "
            "assert set(onebitmerge.__all__) <= set(dir(onebitmerge)) and not hasattr(onebitmerge, 'nothing'); "
            "assert 'onebitmerge._core' not in sys.modules; onebitmerge.Pack; assert 'onebitmerge._core' in sys.modules")
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)})


def test_little_address_space(models, tmp_path):
    """OpenBLAS would try forever to get its buffers.  Models do without it, decompositions do not."""
    def limit():
        resource.setrlimit(resource.RLIMIT_AS, (400_000 * 1024, 400_000 * 1024))

    assert in_shell("doctor", "--threads", "4", preexec_fn=limit).returncode == 0
    done = in_shell("generate", models / "base", "--threads", "4", "--chat", "-p", PROMPT, preexec_fn=limit)
    assert done.returncode == 0, done.stderr   # its products are our own
    recipe = tmp_path / "tsvm.yml"
    recipe.write_text(f"merge_method: tsvm\nbase_model: {models / 'base'}\n"
                      f"models: [{{model: {models / 'math'}}}, {{model: {models / 'code'}}}]\n")
    done = in_shell("merge", recipe, "-o", tmp_path / "merged", "--threads", "4", preexec_fn=limit)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "out of memory: OpenBLAS needs 144 MiB of address space for 1 threads" in done.stderr


def test_a_closed_pipe_is_no_error(models):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(f"{sys.executable} -m onebitmerge inspect {models}/base --checksums --json | head -n 1", shell=True, env=env,
                          capture_output=True, text=True, timeout=60)
    assert done.stderr == "" and json.loads(done.stdout)["name"] == "model.embed_tokens.weight"


def test_numbers_out_of_range_are_usage(models):
    for option in (["--max-tokens", "-1"], ["--top-p", "1.5"], ["--seed", "-1"], ["--batch", "-1"], ["--temperature", "-1"],
                   ["-p", "y"], ["--route", "a", "--route", "b"]):
        with pytest.raises(SystemExit) as caught:
            cli.main(["generate", str(models / "base"), "-p", "x", *option])
        assert caught.value.code == 2


def test_zero_is_the_default(lines, models, tmp_path):
    argv = ["generate", models / "base", "-p", "What is 17 plus 5?", "--chat"]
    zeros = ["--max-tokens", "0", "--batch", "0", "--top-p", "0", "--repetition-penalty", "0"]
    assert lines(*argv, *zeros) == lines(*argv, "--max-tokens", "256")
    recipe = tmp_path / "r.yml"
    recipe.write_text(f"merge_method: passthrough\nmodels: [{{model: {models}/math}}]\n")
    plans = [lines("merge", recipe, "-o", tmp_path / "out", "--dry-run", *sizes)[0]
             for sizes in ([], ["--memory", "0", "--out-shard-size", "0"], ["--memory", "2GB", "--out-shard-size", "5GB"])]
    assert plans[0] == plans[1] == plans[2]


@pytest.mark.parametrize("text, size", [("0", 0), ("17", 17), ("1.5k", 1500), ("5GB", 5 * 10**9), ("64MiB", 2**26), ("2gib", 2**31), ("1Ti", 2**40)])
def test_sizes(text, size):
    assert cli.parse_size(text) == size


@pytest.mark.parametrize("text", ("", "MB", "1.2.3M", "5X", "-1", "0.5", "1e30", "5iB", "1GM"))
def test_no_sizes(text):
    with pytest.raises(cli.argparse.ArgumentTypeError, match="is not a size"):
        cli.parse_size(text)


def test_the_model_behind_a_list(run, fails, models, pack_path, jsonl):
    """`--task FILE PACK`: argparse counts the pack to the list."""
    file = jsonl({"prompt": "a", "choices": ["b", "c"], "correct": 0})
    assert run("eval", "--task", file, models / "base")[1] == run("eval", models / "base", "--task", file)[1] != ""
    assert run("eval", "--task", file, file, pack_path, "--route", "math")[0] == 0
    fails("eval", "--task", file, models / "nowhere", match="nowhere")
    fails("eval", "--task", file, code=2, match="required: MODEL|PACK")
    assert run("tune", "--data", file, pack_path, "--dry-run", "--route", "task")[0] == 1   # which has no task of an item
    fails("tune", "--data", file, code=2, match="required: PACK")


def test_what_to_do_is_said(fails, models, pack_path, own_pack, tmp_path, monkeypatch):
    monkeypatch.chdir(models)
    fails("inspect", "nowhere", match="cannot open nowhere (names of the Hugging Face hub have the form owner/name): No such file")
    monkeypatch.chdir(models.parent)
    fails("inspect", "models/chta", match="(and the folder models that is here has no chta)")
    recipe = tmp_path / "r.yml"
    recipe.write_text(f"merge_method: linear\nmodels: [{{model: {models}/base+{models}/chat, parameters: {{weight: 1}}}}]\n")
    fails("merge", recipe, "-o", tmp_path / "out", match="chat has no adapter_config.json")
    recipe.write_text(f"merge_method: passthrough\ndtype: float64\nmodels: [{{model: {models}/base}}]\n")
    cli.main(["merge", str(recipe), "-o", str(tmp_path / "wide")])
    fails("generate", tmp_path / "wide", "-p", "x", match="found F64: a merge converts it, of a recipe with merge_method: passthrough")
    recipe.write_text(f"merge_method: passthrough\ndtype: bfloat16\nmodels: [{{model: {tmp_path}/wide}}]\n")
    cli.main(["merge", str(recipe), "-o", str(tmp_path / "narrow")])
    fails("generate", tmp_path / "narrow", "-p", "x", "--route", "y", match="route")   # it opens
    own = own_pack.path
    file = next(p for p in pathlib.Path(own).glob("math-*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    fails("pack", "verify", own, match="the file is damaged or another; bring it back from a copy of the pack, or compress the pack anew")
    bare = tmp_path / "bare.pack"
    assert cli.main(["compress", str(models / "base"), f"math={models / 'math'}", "-o", str(bare)]) == 0
    fails("route", bare, "a text", match="`onebitmerge router train PACK --data FILE` trains one")
    fails("pack", "add", bare, f"math={models / 'math'}", "--dry-run", match="has an expert math already")
    fails("compress", models / "base", f"math={models / 'math'}", "-o", bare, "--dry-run", match="--force replaces it")
    fails("export", bare, "--route", "math", "-o", tmp_path / "wide", "--dry-run", match="--force replaces it")
    other = tmp_path / "other"   # whose pack.json is not of ours
    other.mkdir()
    (other / "pack.json").write_text('{"name": "other"}')
    fails("compress", models / "base", f"math={models / 'math'}", "-o", other, "--force", "--dry-run", match="is not a pack: it will not be replaced")


def test_json_lines_name_what_is_wrong(models, tmp_path, capsys):
    bad = tmp_path / "bad.jsonl"
    bad.write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    assert cli.main(["tokenize", str(models / "base"), "--file", str(bad)]) == 1
    assert "bad.jsonl, line 2: not UTF-8" in capsys.readouterr().err
    bad.write_bytes(b'\xef\xbb\xbf{"text": "a"}\n')   # a byte order mark is let pass
    assert cli.main(["tokenize", str(models / "base"), "--file", str(bad)]) == 0


def test_a_choice_that_is_not_there(models, tmp_path, capsys):
    items = tmp_path / "items.jsonl"
    items.write_text('{"prompt": "a", "choices": ["b", "c"], "correct": 7}\n')
    assert cli.main(["eval", str(models / "base"), "--task", str(items)]) == 1
    assert "index of one of 2 choices" in capsys.readouterr().err


# ---- what is not where it should be ----

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 2887904\n"


@pytest.fixture
def folder(models, tmp_path):
    """A copy of the base without some files and with others."""
    def make(*without, **put):
        path = tmp_path / "model"
        shutil.copytree(models / "base", path)
        for name in without:
            (path / name).unlink()
        for name, text in put.items():
            (path / name.replace("_", ".")).write_text(text)
        return path
    return make


@pytest.mark.parametrize("name", ["model_safetensors", "config_json", "tokenizer_json"])
def test_lfs_pointers(fails, folder, name):
    path = folder(**{name: LFS})
    fails("generate", path, "-p", "x", match=f"model/{name.replace('_', '.')}: found a Git LFS pointer of {len(LFS)} bytes in place of the file: fetch it")
    if name != "tokenizer_json":
        fails("inspect", path, match="found a Git LFS pointer")


def write_recipe(path, base, model):
    path.write_text(f"merge_method: task_arithmetic\nbase_model: {base}\nmodels:\n- model: {model}\n  parameters: {{weight: 1}}\n")
    return path


def test_pointers_are_not_carried_into_merges(fails, folder, models, tmp_path):
    recipe, out = write_recipe(tmp_path / "r.yml", folder(tokenizer_json=LFS), models / "math"), tmp_path / "out"
    fails("merge", recipe, "-o", out, match="model/tokenizer.json: found a Git LFS pointer")
    assert not list(out.glob("*.safetensors"))


def test_results_without_config(run, folder, models, tmp_path):
    base = folder("config.json")
    code, _, err = run("merge", write_recipe(tmp_path / "r.yml", base, models / "math"), "-o", tmp_path / "out")
    assert code == 0 and "model has no config.json, nor will the result: it is tensors, not a model that can be run" in err
    code, _, err = run("compress", base, f"math={models / 'math'}", "-o", tmp_path / "p")
    assert code == 0 and "model has no config.json: the pack cannot be run, nor can what is exported of it" in err


def test_other_tokenizers(fails, folder, jsonl, pack_path):
    path = folder("tokenizer.json", tokenizer_model="x")
    for call in (["generate", path, "-p", "x"], ["score", path, "--file", jsonl({"text": "x"})], ["tokenize", path, "--file", jsonl({"text": "x"})]):
        fails(*call, match="no tokenizer.json here")
        fails(*call, match="there is a tokenizer.model, which is not read: convert it in Python: from transformers import AutoTokenizer")
    fails("route", pack_path, "--base", path, "What is 2 + 2?", match="no tokenizer.json here, which routing a text needs; there is a tokenizer.model")


def test_folders_that_are_no_models(fails, folder, tmp_path):
    for name in ("up/a", "up/b", "empty"):
        (tmp_path / name).mkdir(parents=True)
    fails("generate", tmp_path / "up", "-p", "x", match="up: no weights here: expected model.safetensors, model.safetensors.index.json or other .safetensors files, found a/, b/")
    fails("inspect", tmp_path / "empty", match="found an empty folder")
    fails("generate", folder("config.json"), "-p", "x", match="no config.json here, so it cannot be run as a model: expected a Hugging Face folder")


def test_an_expert_runs_as_a_route(fails, pack_path):
    err = fails("generate", f"{pack_path}:math", "-p", "x", match=":math is an expert of a pack: it runs as a route of it")
    assert f"(generate {pack_path} --route math)" in err


def test_export_wants_one_route(fails, pack_path, tmp_path, run):
    for route in ("auto", ""):
        fails("export", pack_path, "--route", route, "-o", tmp_path / "x", code=2, match="export writes one route: a task (--route chat) or weights")
    assert "no changed weight was lost to rounding" in run("export", pack_path, "--route", "math", "--dtype", "f32", "-o", tmp_path / "x")[1]
    assert "no weight changed" in run("export", pack_path, "--route", "base", "-o", tmp_path / "y")[1]
    with pytest.raises(obm.NotFoundError, match="no task named auto .a router answers for a prompt; here is none.; this pack has chat, math, code"):
        obm.Pack(pack_path).export("auto", tmp_path / "z")


def test_texts_to_route(lines, pack_path):
    assert lines("route", pack_path, "-p", PROMPT) == lines("route", pack_path, PROMPT)
    assert [r["text"] for r in lines("route", pack_path, "a", "-p", "b", "-p", "c")] == ["a", "b", "c"]


def test_nothing_to_say(run, fails, models, pack_path, tmp_path):
    fails("generate", models / "base", "-p", "", match="the prompt is empty: expected at least one token, and the tokenizer puts none (no BOS) in front")
    shutil.copytree(models / "base", tmp_path / "same")
    table = run("inspect", models / "base", tmp_path / "same", models / "math")[1].rpartition("sign agreement\n")[2]
    assert [line.split()[1:] for line in table.splitlines()] == [["-", "-"]] * 4


# ---- help ----


def parsers(parser, name="onebitmerge"):
    yield name, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for verb, sub in action.choices.items():
                yield from parsers(sub, f"{name} {verb}")


def test_every_option_says_what_it_is():
    seen = dict(parsers(cli.make_parser()))
    assert len(seen) > 20
    silent = [f"{name} {action.option_strings[0]}" for name, parser in seen.items() for action in parser._actions
              if action.option_strings and action.dest not in ("help", "output") and not action.help]
    assert silent == []


def test_ctrl_c_ends_the_line_of_a_streamed_text(monkeypatch, capsys):
    class Model:
        pack, info = None, {"vocab": 768}

        def stream(self, prompt, **options):
            if prompt != "at once":
                yield "a text that"
            raise KeyboardInterrupt

    monkeypatch.setattr(cli, "open_model", lambda args: Model())
    for prompt, written in (("begun", "a text that\n"), ("at once", "")):
        with pytest.raises(KeyboardInterrupt):
            cli.main(["generate", "model", "-p", prompt])
        assert capsys.readouterr().out == written



def test_methods(run, lines, fails):
    every = lines("methods")
    assert [m["name"] for m in every] == [m["name"] for m in obm.methods()] and every[2]["params"] == lines("methods", "ties")[0]["params"]
    code, out, err = run("methods")
    assert code == 0 and [line.split()[0] for line in out.splitlines() if line[0] != " "] == [m["name"] for m in every]
    assert re.search(r"^ties +trim, elect signs, merge what agrees\n +weight, density=1, .*normalize=true", out, flags=re.M)
    assert max(len(line) for line in out.splitlines()) < 130
    code, out, err = run("methods", "ties", "slerp")
    assert out.startswith("ties: ") and "\nslerp: " in out and "arXiv" in out and re.search(r"^density +1 +0 \.\. 1 +each model  share of ", out, flags=re.M)
    fails("methods", "tis", code=2, match='no merge method "tis", did you mean ties?')
    fails("methods", "frobnicate", code=2, match='no merge method "frobnicate": linear, task_arithmetic, ')
