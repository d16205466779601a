"""tune: what is tried, that it is what eval measures, the rule of choice, what is stored, and that a pack is changed at the end or not at all."""

import hashlib
import json
import os
import shutil
import types

import pytest

import onebitmerge as obm
from onebitmerge import cli, tuning
from onebitmerge.evaluate import evaluate, wilson

KEYS = {"task", "route", "n", "metric", "value", "low", "high", "lambda", "reading", "policy", "scale", "bytes", "mean", "chosen"}


def contents(folder):
    return {name: hashlib.sha256(open(os.path.join(folder, name), "rb").read()).hexdigest() for name in os.listdir(folder)}


def beside(pack):
    return sorted(os.listdir(os.path.dirname(pack.path)))


@pytest.fixture
def items(data):
    return [data.test[task][0] for task in ("chat", "math", "code")]


@pytest.fixture
def judged(monkeypatch):
    """Two tasks of n items whose hits a function of the candidate's pack gives, in place of running models."""
    def install(hits, n=10):
        def fake(model, items, routes, **options):
            rows = []
            for task, k in zip(("a", "b"), hits(model.pack)):
                low, high = wilson(k, n)
                rows.append({"task": task, "route": "auto", "n": n, "metric": "accuracy", "value": k / n, "low": low, "high": high})
            return rows
        monkeypatch.setattr(tuning, "evaluate", fake)
        monkeypatch.setattr(tuning, "Model", lambda folder, base, **options: types.SimpleNamespace(pack=obm.Pack(folder, base=base)))
    return install


def test_rows_are_what_eval_measures(own_pack, pack_path, models, items, tmp_path):
    """Each candidate again by hand: a pack with its experts and settings, evaluate; and the rule in plain words."""
    before = beside(own_pack)
    found = obm.tune(own_pack, items, lambdas=[.5], readings=["recomputed"], policies=["mlp"], route="task", max_tokens=8)
    assert beside(own_pack) == before
    assert [(c.lambda_, c.reading, c.policy, c.scale) for c in found.candidates] == [
        (x, r, p, None) for p in (None, "mlp") for x, r in ((0, "onto_base"), (.5, "recomputed"))]
    obm.compress(models / "base", {task: (models / task, "mlp") for task in own_pack.tasks}, tmp_path / "mlp")
    routed = [{**item, "route": item["task"]} for item in items]
    by_hand = {None: shutil.copytree(pack_path, tmp_path / "linear"), "mlp": tmp_path / "mlp"}
    for c in found.candidates:
        obm.Pack(by_hand[c.policy]).set(lambda_=c.lambda_, reading=c.reading)
        rows = evaluate(obm.Model(by_hand[c.policy]), routed, max_tokens=8)
        assert c.rows == [{**row, "route": "task"} for row in rows]
    assert all(set(row) == KEYS and row["n"] == 1 for row in found.rows) and len(found.rows) == 12
    best = max(found.candidates, key=lambda c: (round(sum(r["value"] for r in c.rows), 9), -c.lambda_, -c.bytes))
    assert found.choice is best and [c for c in found.candidates if c.chosen] == [best]
    assert (own_pack.settings["lambda"], own_pack.settings["reading"]) == (best.lambda_, best.reading)
    assert repr(found).count("\n") == 5 and "optimistic" in repr(found) and "(n 1), 95 % interval" in repr(found)


def test_the_choice_is_stored(own_pack, items, judged):
    """Experts and settings of the winner, in the pack that is open and in the one on disk; router and other settings stay."""
    own_pack.set(density=.5)
    before = beside(own_pack)
    judged(lambda pack: (9, 9) if pack.settings["lambda"] == .25 and "scale matrix" in pack.policy("math") else (8, 9))
    found = obm.tune(own_pack.path, items, lambdas=[.25], readings=["recomputed"], policies=["mlp"], scales=["row", "matrix"])
    assert (found.choice.lambda_, found.choice.policy, found.choice.scale) == (.25, "mlp", "matrix")
    assert len(found.candidates) == 6 and beside(own_pack) == before
    pack = obm.Pack(own_pack.path)
    assert pack.settings == {"lambda": .25, "reading": "recomputed", "profile": "mergekit", "density": .5}
    assert {pack.policy(task) for task in pack.tasks} == {"mlp, scale matrix, planes 1"}
    assert pack.router_report().tasks == pack.tasks
    pack.verify()
    assert sum(b["bytes_pack"] for task in pack.tasks for b in pack.bytes(task).values()) == found.choice.bytes
    assert len(os.listdir(pack.path)) == 5 and obm.Model(pack.path).route("What is 17 plus 5?")[0] == {"math": 1.0}


def test_what_is_not_varied_stays(own_pack, models, items, judged):
    """Planes, maps and scales of each expert."""
    own_pack.remove("chat")
    own_pack.add("chat", obm.Expert(models / "chat", policy="mlp", scale="group:64", planes=2, map={"*.0.mlp.*": "full", "*norm*": "drop"}))
    judged(lambda pack: (5, 6) if pack.policy("math").startswith("attention") else (5, 5))
    obm.tune(own_pack, items, policies=["attention"], route="task", lambdas=[])
    assert own_pack.policy("chat") == "attention, scale group:64, planes 2, map *.0.mlp.*=full *norm*=drop"
    assert own_pack.policy("math") == "attention, scale row, planes 1"


def test_equals(own_pack, items, judged):
    """Equal shares are equal however they add up: the smaller lambda, then the smaller pack, then the first."""
    judged(lambda pack: (1, 2) if pack.settings["lambda"] < .2 else (2, 1), n=3)
    found = obm.tune(own_pack, items, lambdas=[.3], readings=["onto_base"], scales=["matrix"])
    assert (found.choice.lambda_, found.choice.reading, found.choice.scale) == (0, "onto_base", "matrix")
    assert own_pack.settings["lambda"] == 0 and own_pack.policy("code") == "linear, scale matrix, planes 1"
    judged(lambda pack: (0, 0) if pack.settings["lambda"] == 0 else (3, 3), n=3)
    found = obm.tune(own_pack, items, lambdas=[1, .3], readings=["onto_base"])
    assert (found.choice.lambda_, found.choice.reading, found.choice.policy) == (.3, "onto_base", None)


def test_two_experts_and_one(own_pack, items, judged):
    """What has no meaning is not tried: the recomputed remainder of two is the other expert, one has none."""
    judged(lambda pack: (1, 1))
    own_pack.remove("chat")
    found = obm.tune(own_pack, items[1:], route="task", dry_run=True)
    assert [(c.lambda_, c.reading) for c in found.candidates] == [(x, "onto_base") for x in (0, .1, .3, .5, 1)]
    own_pack.remove("code")
    found = obm.tune(own_pack, items[1:2], route="task")
    assert [c.lambda_ for c in found.candidates] == [0]


def test_a_stopped_call_changes_nothing(own_pack, items, monkeypatch):
    """Ctrl-C in the middle of the second compression's models."""
    seen = []

    def interrupted(model, *args, **options):
        seen.append(model.pack.policy("math"))
        if seen[-1].startswith("mlp"):
            raise KeyboardInterrupt
        return [{"task": "a", "route": "auto", "n": 1, "metric": "accuracy", "value": 1.0, "low": 0.2, "high": 1.0}]
    monkeypatch.setattr(tuning, "evaluate", interrupted)
    before, around = contents(own_pack.path), beside(own_pack)
    with pytest.raises(KeyboardInterrupt):
        obm.tune(own_pack, items, lambdas=[.5], policies=["mlp"])
    assert len(seen) == 4 and contents(own_pack.path) == before and beside(own_pack) == around
    own_pack.verify()


def test_refusals(own_pack, models, items, tmp_path):
    before, around = contents(own_pack.path), beside(own_pack)
    for given, error, match in [
            ({"lambdas": [-1]}, obm.ArgumentError, "lambdas: expected numbers of 0 or more, found -1"),
            ({"readings": ["both"]}, obm.ArgumentError, "readings: expected onto_base or recomputed, found 'both'"),
            ({"policies": ["most"]}, obm.ArgumentError, "unknown policy \"most\""),
            ({"scales": ["group:3"]}, obm.ArgumentError, "group"),
            ({"route": "math"}, obm.ArgumentError, "route: expected auto or task, found 'math'"),
            ({"policies": ["mlp"], "experts": {"law": tmp_path}}, obm.NotFoundError, "has no expert law"),
            ({"policies": ["mlp"], "experts": {"math": tmp_path / "gone"}}, OSError, "gone")]:
        with pytest.raises(error, match=match):
            obm.tune(own_pack, items, **given)
    with pytest.raises(obm.ArgumentError, match="no items"):
        obm.tune(own_pack, [])
    with pytest.raises(obm.ArgumentError, match="^item 0: expected an object, found a number"):
        obm.tune(own_pack, [3])
    with pytest.raises(ValueError, match="expected \"answer\", or"):
        obm.tune(own_pack, [{"prompt": "x"}])
    with pytest.raises(ValueError, match="item 0: task: expected one of chat, math, code to be its route, found \"law\""):
        obm.tune(own_pack, [{"prompt": "x", "answer": "y", "task": "law"}], route="task")
    with pytest.raises(obm.BusyError, match="belongs to an open model"):
        obm.tune(obm.Model(own_pack.path).pack, items)
    assert contents(own_pack.path) == before and beside(own_pack) == around
    manifest = os.path.join(own_pack.path, "pack.json")
    with open(manifest, encoding="utf-8") as file:
        changed = json.load(file)
    changed["experts"][1]["source"] = "/nowhere/math"
    changed["router"] = None
    with open(manifest, "w", encoding="utf-8") as file:
        json.dump(changed, file)
    with pytest.raises(FileNotFoundError, match="expert math: .*/nowhere/math is not there; name it"):
        obm.tune(own_pack.path, items, policies=["mlp"], route="task")
    found = obm.tune(own_pack.path, items, policies=["mlp"], route="task", experts={"math": models / "math"}, dry_run=True)
    assert len(found.candidates) == 18 and found.choice is None and found.rows == []
    with pytest.raises(obm.NotFoundError, match="has no router: .* trains one"):
        obm.tune(own_pack.path, items)


def with_source(pack, task, source):
    """The pack with another path in its manifest."""
    manifest = os.path.join(pack.path, "pack.json")
    with open(manifest, encoding="utf-8") as file:
        changed = json.load(file)
    next(e for e in changed["experts"] if e["name"] == task)["source"] = source
    with open(manifest, "w", encoding="utf-8") as file:
        json.dump(changed, file)
    return obm.Pack(pack.path)


def test_other_checkpoints_are_refused(own_pack, models, items, judged, tmp_path, monkeypatch):
    """What lies at a path may be another than the one that was compressed."""
    judged(lambda pack: (5, 5 + pack.policy("math").startswith("mlp")))
    shutil.copytree(models / "code", tmp_path / "math")
    monkeypatch.chdir(tmp_path)
    pack = with_source(own_pack, "math", "math")   # as seen from another folder
    before, around = contents(pack.path), beside(pack)
    for given, folder in [({}, "math"), ({"experts": {"math": models / "chat"}}, str(models / "chat"))]:
        with pytest.raises(obm.MismatchError, match=f"^expert math: {folder} is not the checkpoint .*--expert math=FOLDER"):
            obm.tune(pack, items, policies=["mlp"], route="task", **given)
        assert contents(pack.path) == before and beside(pack) == around
    obm.tune(pack, items, policies=["mlp"], route="task", lambdas=[], experts={"math": models / "math"})
    assert pack.policy("math") == "mlp, scale row, planes 1"


def test_other_scaling_of_an_adapter_is_refused(models, items, judged, tmp_path):
    """Its file is the same, its record is not."""
    obm.extract_lora(models / "base", models / "math", tmp_path / "lora", rank=4)
    judged(lambda pack: (5, 5 + pack.policy("math").startswith("attention")))
    pack = obm.compress(models / "base", {"math": obm.Expert(tmp_path / "lora", policy="full")}, tmp_path / "pack")
    config = tmp_path / "lora" / "adapter_config.json"
    text, changed = config.read_text(), json.loads(config.read_text())
    changed["lora_alpha"] *= 2
    config.write_text(json.dumps(changed))
    with pytest.raises(obm.MismatchError, match="expert math: .*lora is not the checkpoint"):
        obm.tune(pack, items[1:2], policies=["attention"], route="task")
    config.write_text(text)
    obm.tune(pack, items[1:2], policies=["attention"], route="task")
    assert pack.policy("math") == "attention, scale row, planes 1"


def test_policy_texts():
    """Parsed as they were written, or not at all."""
    head = "linear, scale group:64, planes 2"
    parts = {"policy": "linear", "scale": "group:64", "planes": 2}
    for rules in (None, {"*.q_proj.*": "full"}, {"a b": "drop", "c=d *": "1bit", "x, map y": "full", "*=full": "drop"}):
        text = head + (", map " + " ".join(f"{glob}={mode}" for glob, mode in rules.items()) if rules else "")
        assert tuning.policy_parts(text) == {**parts, "map": rules}
    for text in ("", "linear", "linear, mask", "linear, scale row, planes x", head + ", map ", head + ", map a=most", head + ", map a=full ",
                 head + ", map a=full b", head + ", map a=full a=drop", head + ", more"):
        with pytest.raises(obm.UnsupportedError, match="does not say how to compress it anew"):
            tuning.policy_parts(text)


def test_one_value_and_a_path_will_do(own_pack, items, tmp_path):
    path = tmp_path / "tune.jsonl"
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    lists = obm.tune(own_pack, items, lambdas=[.5], readings=["recomputed"], policies=["mlp"], scales=["matrix"], dry_run=True)
    for data in (path, str(path)):
        one = obm.tune(own_pack, data, lambdas=.5, readings="recomputed", policies="mlp", scales="matrix", dry_run=True)
        assert [c.keys() for c in one.candidates] == [c.keys() for c in lists.candidates]
    assert [c.lambda_ for c in obm.tune(own_pack, path, lambdas=0, dry_run=True).candidates] == [0]
    path.write_text('{"prompt": "x"}\n')
    with pytest.raises(obm.Error, match="tune.jsonl, line 1, item 0: expected \"answer\", or"):
        obm.tune(own_pack, path)
    with pytest.raises(FileNotFoundError):
        obm.tune(own_pack, tmp_path / "gone")


def test_command_line(own_pack, items, models, tmp_path, capsys):
    path = tmp_path / "validation.jsonl"
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    before = contents(own_pack.path)
    args = ["tune", own_pack.path, "--data", str(path), "--lambdas", "0.3", "--readings", "onto_base", "--quiet"]
    assert cli.main([*args, "--dry-run", "--json", "--policies", "attention,mlp", "--expert", f"math={models / 'math'}"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(r["dry_run"], r["lambda"], r["policy"]) for r in rows] == [(True, x, p) for p in (None, "attention", "mlp") for x in (0, .3)]
    assert cli.main([*args, "--dry-run", "--scales", "matrix"]) == 0
    for wrong in ("foo", "row,group:65", ""):
        with pytest.raises(SystemExit, match="^2$"):
            cli.main([*args, "--scales", wrong])
    assert "at most" in capsys.readouterr().out and contents(own_pack.path) == before
    assert cli.main([*args, "--json", "--max-tokens", "4"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 6 and all(set(row) == KEYS for row in rows)
    chosen = [row["lambda"] for row in rows if row["chosen"]]
    assert len(chosen) == 3 and obm.Pack(own_pack.path).settings["lambda"] == chosen[0]
    assert cli.main([*args, "--max-tokens", "4"]) == 0
    out = capsys.readouterr().out
    assert "optimistic" in out and out.splitlines()[-1].endswith("; stored") and sum(line.startswith("*  ") for line in out.splitlines()) == 1
    assert cli.main([*args, "--expert", "math"]) == 2
    for wrong in (["--lambdas", "0,x"], ["--lambdas=-1"], ["--policies", "most"], ["--readings", ""], ["--route", "math"]):
        with pytest.raises(SystemExit) as stopped:
            cli.main([*args, *wrong])
        assert stopped.value.code == 2


def test_packs_of_masks(own_pack, models, items, judged, tmp_path):
    """They are tuned as they are; and adopted, back and forth, with their shared vectors and without them."""
    experts = {task: models / task for task in own_pack.tasks}
    masks, before = obm.compress(models / "base", experts, tmp_path / "masks", shared="tall"), contents(own_pack.path)
    shutil.copytree(own_pack.path, tmp_path / "planes")
    with pytest.raises(obm.UnsupportedError, match="shares one vector among its experts"):
        obm.tune(masks, items, policies=["mlp"], route="task")
    judged(lambda pack: (5, 5 + (pack.settings["lambda"] == .75)))
    obm.tune(masks, items, lambdas=[.75], readings=["onto_base"], route="task")
    masks.verify()
    own_pack.adopt(masks.path)
    assert own_pack.shared["method"] == "tall" and own_pack.settings["lambda"] == .75
    weighed, = {c.bytes for c in obm.tune(own_pack, items, lambdas=0, route="task", dry_run=True).candidates}
    assert weighed == own_pack.shared["bytes"] + sum(b["bytes_pack"] for t in own_pack.tasks for b in own_pack.bytes(t).values())
    own_pack.verify()
    assert obm.Pack(own_pack.path).router_report().tasks == own_pack.tasks and len(os.listdir(own_pack.path)) == 6
    own_pack.adopt(tmp_path / "planes")
    assert own_pack.shared is None and contents(own_pack.path) == before
    own_pack.verify()
