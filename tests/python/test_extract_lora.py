"""Adapters out of fine-tunes against NumPy's singular value decomposition, read back by the LoRA reader.

Factors are rounded to f32: B A is off by about rank * 2^-24 of what each direction adds, hence 1e-6 of the largest singular value."""

import json
import os
import pathlib

import numpy as np
import pytest

import onebitmerge as obm
import plain
from onebitmerge import cli

VECTORS = pathlib.Path(__file__).resolve().parent.parent / "vectors" / "lora"
LAYER = "model.layers.0."
SHAPES = {LAYER + "self_attn.q_proj.weight": (12, 12), LAYER + "self_attn.k_proj.weight": (5, 12), LAYER + "mlp.up_proj.weight": (31, 12),
          LAYER + "mlp.down_proj.weight": (12, 31), LAYER + "self_attn.o_proj.weight": (12, 12)}
OTHERS = {"model.embed_tokens.weight": (7, 12), LAYER + "input_layernorm.weight": (12,), "model.norm.weight": (12,)}
SAME = {LAYER + "self_attn.o_proj.weight", "model.norm.weight"}   # where the fine-tune does not differ


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root, rng = tmp_path_factory.mktemp("extract"), np.random.default_rng(11)
    base = {name: rng.normal(size=shape).astype(np.float32) for name, shape in {**SHAPES, **OTHERS}.items()}
    tuned = {name: x if name in SAME else (x + .1 * rng.normal(size=x.shape)).astype(np.float32) for name, x in base.items()}
    plain.write_folder(root / "base", base)
    plain.write_folder(root / "tuned", tuned)
    return root, {name: tuned[name].astype(np.float64) - base[name] for name in base}


def extract(folders, out, **given):
    with pytest.warns(match="2 tensors differ and are not in the adapter"):
        return {m["name"]: m for m in obm.extract_lora(folders[0] / "base", folders[0] / "tuned", out, **given)}


def read(folders, out):
    vector = obm.TaskVector(folders[0] / "base", out)
    return {name: np.asarray(vector[name]).astype(np.float64) for name in vector}


@pytest.mark.parametrize("rank", [1, 4, 12, 100])
def test_rank(folders, tmp_path, rank):
    rows = extract(folders, tmp_path / "a", rank=rank)
    got, (_, d) = read(folders, tmp_path / "a"), folders
    assert set(rows) == {n for n in d if n not in SAME}
    for name, shape in SHAPES.items():
        if name in SAME:
            assert not got[name].any()
            continue
        u, s, vt = np.linalg.svd(d[name], full_matrices=False)
        r = min(rank, *shape)
        assert np.abs(got[name] - (u[:, :r] * s[:r]) @ vt[:r]).max() < 1e-6 * s[0]
        row = rows[name]
        assert (row["rows"], row["cols"], row["rank"]) == (*shape, r)
        assert np.isclose(row["norm"], np.linalg.norm(d[name]), rtol=1e-12) and np.isclose(row["energy"], (s[:r]**2).sum() / (s**2).sum(), rtol=1e-12)
        if rank >= min(shape):
            assert np.abs(got[name] - d[name]).max() < 1e-6 * s[0] and row["energy"] == 1
    for name in OTHERS:
        assert not got[name].any() and (name in SAME or (rows[name]["rank"], rows[name]["energy"]) == (0, 0))


@pytest.mark.parametrize("energy", [.3, .9, 1])
def test_energy(folders, tmp_path, energy):
    rows, (_, d) = extract(folders, tmp_path / "a", energy=energy), folders
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    for name in SHAPES.keys() - SAME:
        s = np.linalg.svd(d[name], compute_uv=False)
        share = np.cumsum(s**2) / (s**2).sum()
        assert rows[name]["rank"] == (int(np.argmax(share >= energy)) + 1 if energy < 1 else len(s))
        module = name.removesuffix(".weight")
        assert config["rank_pattern"].get(module, config["r"]) == config["alpha_pattern"].get(module, config["lora_alpha"]) == rows[name]["rank"]
    assert sorted(config["target_modules"]) == sorted(n.removesuffix(".weight") for n in SHAPES.keys() - SAME)


def test_dtypes_and_names(folders, tmp_path):
    extract(folders, tmp_path / "a", rank=3, dtype="bf16", base_name="org/base")
    stored = plain.read_safetensors(tmp_path / "a" / "adapter_model.safetensors")
    assert {dtype for dtype, _, _ in stored.values()} == {"BF16"}
    assert stored["base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"][1] == (3, 12)
    assert stored["base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"][1] == (31, 3)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/base" and config["peft_type"] == "LORA"
    exact, rounded = extract(folders, tmp_path / "b", rank=3) and read(folders, tmp_path / "b"), read(folders, tmp_path / "a")
    for name in SHAPES:
        assert np.abs(exact[name] - rounded[name]).max() <= 2**-7 * np.abs(exact[name]).max() * 2   # two factors, 2^-9 each, 3 terms


def test_an_adapter_comes_back(tmp_path):
    """A LoRA expert has its own rank, whatever is asked for."""
    rows = obm.extract_lora(VECTORS / "base-f32", VECTORS / "plain", tmp_path / "a", rank=64)
    assert {r["rank"] for r in rows} == {3}
    ours, theirs = obm.TaskVector(VECTORS / "base-f32", tmp_path / "a"), obm.TaskVector(VECTORS / "base-f32", VECTORS / "plain")
    for name in theirs:
        want = np.asarray(theirs[name])
        assert np.abs(np.asarray(ours[name]) - want).max() <= 2e-6 * max(np.abs(want).max(), 1e-30)


def test_the_same_bytes_for_any_threads(folders, tmp_path):
    try:
        for n in (1, 3):
            obm.set_threads(n)
            extract(folders, tmp_path / str(n), rank=5)
    finally:
        obm.set_threads(0)
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "1" / file).read_bytes() == (tmp_path / "3" / file).read_bytes()


def test_plan(folders, tmp_path):
    plan = obm.extract_lora(folders[0] / "base", folders[0] / "tuned", tmp_path / "a", rank=2, dry_run=True)
    assert plan["tensors"] == 2 * len(SHAPES) and plan["bytes_written"] == sum(4 * 2 * sum(s) for s in SHAPES.values())
    assert plan["peak_memory"] > 8 * 31 * 12 and not list(tmp_path.iterdir())


def test_errors(folders, tmp_path):
    base, tuned = folders[0] / "base", folders[0] / "tuned"
    for given, text in [({}, "expected one of them, found neither"), ({"rank": 1, "energy": .5}, "found both"), ({"rank": -1}, "rank: expected 1 or more"),
                        ({"energy": 1.5}, r"energy: expected a number in \(0, 1\], found 1.5"), ({"rank": 1, "dtype": "int8"}, "dtype: expected f32, bf16 or f16")]:
        with pytest.raises(obm.ArgumentError, match=text):
            obm.extract_lora(base, tuned, tmp_path / "a", **given)
    with pytest.raises(obm.Error, match="do not differ in a linear weight: nothing to extract"):
        obm.extract_lora(base, base, tmp_path / "a", rank=1)
    with pytest.raises(obm.ArgumentError, match="is a LoRA adapter.*not a base"):
        obm.extract_lora(VECTORS / "plain", base, tmp_path / "a", rank=1)
    bad = plain.load(tuned)
    bad[LAYER + "mlp.down_proj.weight"][3, 4] = np.nan
    plain.write_folder(tmp_path / "bad", bad)
    with pytest.raises(obm.Error, match=r"model\.layers\.0\.mlp\.down_proj\.weight.* 97"):
        obm.extract_lora(base, tmp_path / "bad", tmp_path / "a", rank=1)
    with pytest.raises(ZeroDivisionError):
        obm.extract_lora(base, tuned, tmp_path / "a", rank=1, progress=lambda *_: 1 / 0)
    assert [p.name for p in tmp_path.iterdir()] == ["bad"]


def test_folders_in_the_way(folders, tmp_path):
    extract(folders, tmp_path / "a", rank=1)
    with pytest.raises(FileExistsError, match="holds an adapter"):
        obm.extract_lora(folders[0] / "base", folders[0] / "tuned", tmp_path / "a", rank=2)
    remains = ["adapter_model.safetensors.tmp-1-0", "adapter_config.json.tmp-1-7"]   # of a killed run
    for name in (*remains, "notes.tmp-1-0"):
        (tmp_path / "a" / name).write_bytes(b"x")
    assert extract(folders, tmp_path / "a", rank=2, overwrite=True)[LAYER + "mlp.up_proj.weight"]["rank"] == 2
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["adapter_config.json", "adapter_model.safetensors", "notes.tmp-1-0"]
    with pytest.raises(FileExistsError, match="and no adapter: it will not be replaced"):
        obm.extract_lora(folders[0] / "base", folders[0] / "tuned", folders[0] / "base", rank=2, overwrite=True)
    with pytest.raises(obm.ArgumentError, match="is an input, it cannot be the output"):
        obm.extract_lora(folders[0] / "base", tmp_path / "a", tmp_path / "a", rank=1, overwrite=True)


def test_killed_between_its_files(folders, tmp_path):
    """Weights beside a config that has no name yet are nobody's adapter; without it they are somebody's."""
    out = tmp_path / "a"
    extract(folders, out, rank=1)
    os.rename(out / "adapter_config.json", out / "adapter_config.json.tmp-1-0")
    assert extract(folders, out, rank=2)[LAYER + "mlp.up_proj.weight"]["rank"] == 2
    assert sorted(p.name for p in out.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    (out / "adapter_config.json").unlink()
    with pytest.raises(FileExistsError, match="holds an adapter"):
        obm.extract_lora(folders[0] / "base", folders[0] / "tuned", out, rank=2)


def test_command_line(folders, tmp_path, capsys):
    base, tuned = str(folders[0] / "base"), str(folders[0] / "tuned")
    assert cli.main(["extract-lora", base, tuned, str(tmp_path / "a"), "--rank", "2", "--json"]) == 0
    out, err = capsys.readouterr()
    assert "warning: 2 tensors differ and are not in the adapter" in err
    rows = [json.loads(line) for line in out.splitlines()]
    assert {"name", "rows", "cols", "rank", "norm", "energy"} == set(rows[0]) and {r["rank"] for r in rows} == {0, 2}
    assert cli.main(["extract-lora", base, tuned, "-o", str(tmp_path / "b"), "--energy", "0.5"]) == 0
    assert "not in the adapter" in capsys.readouterr().out
    assert cli.main(["extract-lora", base, tuned, "-o", str(tmp_path / "b"), "--rank", "1"]) == 1
    assert cli.main(["extract-lora", base, tuned, "--rank", "1"]) == 2
    with pytest.raises(SystemExit) as e:
        cli.main(["extract-lora", base, tuned, "x", "--rank", "1", "--energy", "0.5"])
    assert e.value.code == 2
    capsys.readouterr()
    assert cli.main(["extract-lora", base, tuned, str(tmp_path / "c"), "--rank", "1", "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["dry_run"] and not (tmp_path / "c").exists()
