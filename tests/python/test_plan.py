"""Placement plans: the planner itself is tested by tests/c/test_placement.c; here what people and scripts get."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

import onebitmerge as obm
from onebitmerge import cli

TOPOLOGIES = pathlib.Path(__file__).parents[1] / "vectors" / "topologies"
ROLES = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj", "gate": "mlp.gate_proj",
         "up": "mlp.up_proj", "down": "mlp.down_proj"}


def test_shard(models):
    p = obm.plan(models / "base", topology=TOPOLOGIES / "two-sockets.xml", numa="shard")
    ckpt = obm.Checkpoint(models / "base")
    layers = ckpt.config["num_hidden_layers"]
    assert (p["numa"], p["asked"], p["threads"], p["home"]) == ("shard", "shard", 8, 0)
    assert [w["cpu"] for w in p["workers"]] == list(range(0, 16, 2))   # one thread of each core
    assert [w["node"] for w in p["workers"]] == [0] * 4 + [1] * 4
    total = 0
    for m in p["matrices"]:
        name = f"model.layers.0.{ROLES[m['role']]}.weight" if m["role"] in ROLES else "model.embed_tokens.weight" if ckpt.tied else "lm_head.weight"
        t = ckpt[name]
        assert m["name"].replace("{}", "0") == name
        assert (m["rows"], m["cols"]) == t.shape and m["layers"] == (layers if m["role"] in ROLES else 1)
        assert m["bytes"] == t.nbytes * m["layers"]
        total += m["bytes"]
        for ranges in (m["nodes"], m["workers"]):
            assert [a for a, _ in ranges] == [0] + [b for _, b in ranges[:-1]] and ranges[-1][1] == m["rows"]
            assert all(a % 64 == 0 or a == m["rows"] for a, _ in ranges)
        assert m["workers"][3][1] == m["nodes"][0][1]
    assert p["weight_bytes_per_token"] == total == sum(n["weight_bytes"] for n in p["nodes"])
    assert p["remote_weight_bytes_per_token"] == 0
    assert p["remote_bytes_per_token"] == p["remote_activation_bytes_per_token"] == sum(n["remote_bytes"] for n in p["nodes"]) > 0


def test_this_machine(models):
    p = obm.plan(models / "base")
    assert p["threads"] == obm.info()["threads"] <= obm.info()["cores"]   # fewer under a quota
    if obm.info()["nodes"] == 1:
        assert (p["numa"], p["reason"], p["remote_bytes_per_token"]) == ("off", "one NUMA node", 0)


def test_modes(models):
    def plan(**options):
        return obm.plan(models / "base", topology="numa:2 core:4 pu:2", **options)
    total = plan()["weight_bytes_per_token"]
    assert plan()["numa"] == "isolate" and "so small a model" in plan()["reason"]
    assert plan(threads=2)["reason"] == "one node has cores for all threads"
    assert abs(plan(numa="interleave")["remote_weight_bytes_per_token"] - total / 2) <= 1
    assert plan(numa="interleave")["matrices"][0]["nodes"] is None
    assert [n["weight_bytes"] for n in plan(numa="replicate")["nodes"]] == [total, total]
    assert plan(numa="replicate")["matrices"][0]["nodes"][1] == [0, plan()["matrices"][0]["rows"]]
    one = plan(numa="replicate", threads=1)   # nobody reads on the second node
    assert [n["weight_bytes"] for n in one["nodes"]] == [total, 0]
    assert all(m["nodes"] == [[0, m["rows"]], [0, 0]] for m in one["matrices"])
    assert [n["kv_heads"] for n in one["nodes"]] == [[0, 2], [2, 2]]
    off = plan(numa="off")
    assert off["remote_weight_bytes_per_token"] * 2 == total and off["nodes"][0]["weight_bytes"] == total
    assert plan(kv="f16")["nodes"][0]["kv_bytes"] * 2 == plan()["nodes"][0]["kv_bytes"]
    assert 0.74 < plan(z12=True)["weight_bytes_per_token"] / total < 0.85


def test_pack_has_planes(models, tmp_path):
    obm.compress(models / "base", {"math": models / "math", "code": models / "code"}, tmp_path / "p")
    plain, packed = (obm.plan(path, topology="numa:2 core:2 pu:1", numa="shard") for path in (models / "base", tmp_path / "p"))
    q = packed["matrices"][0]
    assert q["bytes"] - plain["matrices"][0]["bytes"] == q["layers"] * q["rows"] * 2 * ((q["cols"] + 63) // 64 * 8)
    assert all(n["plane_bytes"] > 0 for n in packed["nodes"]) and not any(n["plane_bytes"] for n in plain["nodes"])


def test_errors(models, tmp_path):
    with pytest.raises(obm.ArgumentError, match='numa: expected auto, shard, .* found "both"'):
        obm.plan(models / "base", numa="both")
    with pytest.raises(obm.ArgumentError, match="threads: expected 0 .* found -1"):
        obm.plan(models / "base", threads=-1)
    with pytest.raises(obm.ArgumentError, match='found "numa:2 core:many"'):
        obm.plan(models / "base", topology="numa:2 core:many")
    with pytest.raises(OSError, match="missing.xml"):
        obm.plan(models / "base", topology=tmp_path / "missing.xml")
    with pytest.raises(obm.FormatError, match="hwloc's XML"):
        obm.plan(models / "base", topology=models / "base" / "config.json")
    with pytest.raises(OSError):
        obm.plan(tmp_path / "nothing")


def test_command_line(models, capsys):
    args = ["plan", str(models / "base"), "--topology", str(TOPOLOGIES / "uneven.xml"), "--numa", "shard"]
    assert cli.main([*args, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == obm.plan(models / "base", topology=TOPOLOGIES / "uneven.xml", numa="shard")
    assert cli.main([*args, "--threads", "3"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("numa shard: as asked\n") and "0 B of them from another node's memory" in out
    for text in ("numa:2 core:", "numa:2 core:4"):
        assert cli.main(["plan", str(models / "base"), "--topology", text]) == 1
        assert "topology: expected" in (err := capsys.readouterr().err) and "comes last" in err


def test_modes_of_a_context(models, threads):
    """On one node every mode is the system's; the same bits come out of all."""
    ids = [5, 9, 17, 300, 2, 40] * 12
    expected = obm.Model(models / "base").logits(ids).tobytes()
    for mode in ("auto", "shard", "isolate", "interleave", "off"):
        threads(2, numa=mode)
        model = obm.Model(models / "base")
        assert model.logits(ids).tobytes() == expected
        if obm.info()["nodes"] == 1:
            assert model.verify_placement() == {"numa": "off", "bound": False, "remote_bytes": None}
    with pytest.raises(obm.ArgumentError, match='numa: expected auto, .* found "both"'):
        threads(0, numa="both")


def test_nodes_that_are_not_there(models):
    """hwloc makes up two nodes: binding to them is refused and said, where pages are cannot be asked, the text is the same."""
    code = f"""
import onebitmerge as obm, sys
model = obm.Model({str(models / "base")!r})
print(model.generate("What is 17 plus 5?", max_tokens=8))
try:
    model.verify_placement()
except OSError as e:
    print(e)
"""
    text = str(obm.Model(models / "base").generate("What is 17 plus 5?", max_tokens=8))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          env={**os.environ, "HWLOC_SYNTHETIC": "numa:2 core:1 pu:1", "ONEBITMERGE_NUMA": "shard"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(text + "\n") and "does not say where pages are" in done.stdout
    assert "numa shard: memory cannot be bound to nodes here" in done.stderr and "threads cannot be bound" in done.stderr


@pytest.mark.parametrize("threads", [-1, 4097, 2**40])
def test_thread_counts(models, threads):
    message = rf"^threads: expected 0 \(one per core\) to 4096, found {threads}$"
    with pytest.raises(obm.ArgumentError, match=message):
        obm.set_threads(threads)
    with pytest.raises(obm.ArgumentError, match=message):
        obm.plan(models / "base", threads=threads)


def test_verify_on_the_command_line(models, capsys):
    args = ["plan", str(models / "base"), "--verify-placement"]
    assert cli.main([*args, "--json"]) == 0
    verified = json.loads(capsys.readouterr().out)["verified"]
    assert verified["numa"] in ("off", "shard", "isolate")
    assert cli.main(args) == 0
    if verified["numa"] == "off":
        assert "nothing is placed" in capsys.readouterr().out
    assert cli.main([*args, "--topology", "numa:2 core:1 pu:1"]) == 2
    obm.set_threads(0)
