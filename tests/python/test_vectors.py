"""The shared vectors (tests/vectors/README.md has the formats) through the Python interface."""

import collections
import json
import pathlib

import numpy as np
import pytest

import onebitmerge as obm
import plain

VECTORS = pathlib.Path(__file__).resolve().parents[1] / "vectors"
MATRIX = "model.layers.0.mlp.up_proj.weight"


def blocks(name, *starts):
    """Lists of split lines from a line that begins with one of `starts` to `end`."""
    out, current = [], None
    for line in (VECTORS / name).read_text().splitlines():
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        if words[0] in starts:
            current = [words]
        elif words[0] == "end":
            out.append(current)
        else:
            current.append(words)
    return out


def numbers(words):
    return np.array([float.fromhex(w) for w in words], np.float64)


def label(block):
    return block[0][1]


# ---- onebit.txt ----

@pytest.mark.parametrize("block", blocks("onebit.txt", "case"), ids=label)
def test_onebit(block, tmp_path):
    fields = {line[0]: line[1:] for line in block}
    rows, cols = map(int, fields["shape"])
    scale = fields["scale"][0]
    base = plain.write_folder(tmp_path / "base", {MATRIX: numbers(fields["base"]).reshape(rows, cols)})
    expert = plain.write_folder(tmp_path / "expert", {MATRIX: numbers(fields["expert"]).reshape(rows, cols)})
    given = {"t": obm.Expert(expert, policy="linear", scale=scale, planes=int(fields["planes"][0]))}
    if fields["base"] == fields["expert"] and "error" in fields:
        # A tensor equal to the base's is stored as `same` without looking at its values.
        tensor, = obm.compress(base, given, tmp_path / "p").tensors("t")
        assert tensor["mode"] == "same" and tensor["planes"] == []
        return
    if "error" in fields:
        assert fields["error"][0] == "VALUE"
        with pytest.raises(obm.NonFiniteError, match=rf"{MATRIX}.*\b{fields['error'][1]}\b"):
            obm.compress(base, given, tmp_path / "p")
        assert not (tmp_path / "p").exists()
        return
    tensor, = obm.compress(base, given, tmp_path / "p").tensors("t")
    assert len(tensor["planes"]) == int(fields["stored"][0])
    alphas = {int(line[1]): numbers(line[2:]) for line in block if line[0] == "alpha"}
    signs = {int(line[1]): bytes.fromhex(line[2]) for line in block if line[0] == "sign"}
    value = np.zeros((rows, cols), np.float32)
    for plane, (got_signs, got_scales) in enumerate(tensor["planes"]):
        assert np.array_equal(got_scales.astype(np.float64), alphas[plane])
        assert got_signs.tobytes() == signs[plane]
        value = value + (plain.spread(got_scales, rows, cols, scale) * plain.unpack_signs(got_signs, cols)).astype(np.float32)
    if "value" in fields:
        assert np.array_equal(value.ravel().astype(np.float64), numbers(fields["value"]))


# ---- merge.txt ----

def tensor_of(dtype, words, shape, tmp_path, name):
    """A Tensor of that dtype: NumPy has no bf16, so it comes out of a file."""
    path = tmp_path / f"{name}.safetensors"
    plain.write_safetensors(path, {"x": numbers(words).reshape(shape)}, dtype.upper())
    return obm.Checkpoint(path)["x"]


@pytest.mark.parametrize("block", blocks("merge.txt", "case"), ids=label)
def test_merge(block, tmp_path):
    fields = {line[0]: line[1:] for line in block}
    shape = tuple(map(int, fields["shape"]))
    models = [tensor_of(line[1], line[2:], shape, tmp_path, f"m{i}") for i, line in enumerate(block) if line[0] == "model"]
    base = tensor_of(fields["base"][0], fields["base"][1:], shape, tmp_path, "base") if "base" in fields else None
    per_model, params = collections.defaultdict(dict), {}
    for line in block:
        if line[0] == "param" and line[2] == "-1":
            params[line[1]] = float.fromhex(line[3])
        elif line[0] == "param":
            per_model[line[1]][int(line[2])] = float.fromhex(line[3])
    params.update({name: [values[i] for i in range(len(values))] for name, values in per_model.items()})
    got = obm.merge_tensors(fields["method"][0], models, base, params, profile=fields["profile"][0], seed=int(fields["seed"][0]))
    assert got.dtype == np.float32 and got.shape == shape
    want = numbers(fields["merged"][1:])
    if fields["merged"][0] == "exact":
        assert np.array_equal(got.ravel().astype(np.float64), want)
    else:
        assert np.abs(got.ravel() - want).max() <= float.fromhex(fields["merged"][0])


# ---- dynamic.txt ----

def family_folders(block, folder):
    """Checkpoints of a family block -> (base, {task: Expert}, shapes)."""
    shapes, base, experts, own = {}, {}, {}, None
    for line in block[1:]:
        if line[0] == "tensor":
            rows, cols = int(line[2]), int(line[3])
            shapes[line[1]] = (rows, cols) if rows else (cols,)
            last = line[1]
        elif line[0] == "base":
            base[last] = numbers(line[1:]).reshape(shapes[last])
        elif line[0] == "expert":
            own = experts[line[1]] = {"how": line[2:], "tensors": {}}
        elif line[0] == "own":
            own["tensors"][line[1]] = numbers(line[2:]).reshape(shapes[line[1]])
    base_path = plain.write_folder(folder / "base", base)
    given = {}
    for task, e in experts.items():
        policy, scale, planes = e["how"]
        given[task] = obm.Expert(plain.write_folder(folder / task, e["tensors"]), policy=policy, scale=scale, planes=int(planes))
    return base_path, given, shapes


DYNAMIC = blocks("dynamic.txt", "family", "merge") if (VECTORS / "dynamic.txt").exists() else []


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    packs = {}
    for block in DYNAMIC:
        if block[0][0] == "family":
            folder = tmp_path_factory.mktemp(block[0][1])
            base, given, shapes = family_folders(block, folder)
            packs[block[0][1]] = obm.compress(base, given, folder / "p"), shapes
    return packs


@pytest.mark.parametrize("block", [b for b in DYNAMIC if b[0][0] == "merge"],
                         ids=lambda b: f"{b[0][1]}-{'-'.join(b[1][1:])}-{'_'.join(b[2][1:])}")
def test_dynamic(block, families):
    pack, shapes = families[block[0][1]]
    strength, reading, profile, density = block[1][1:]
    pack.set(lambda_=float.fromhex(strength), reading=reading, profile=profile, density=float.fromhex(density))
    route = list(numbers(block[2][1:]))
    values = [line for line in block if line[0] == "value"]
    assert values
    for line in values:
        got = pack.materialise(route, line[1])
        assert got.shape == shapes[line[1]]
        assert np.array_equal(got.ravel().astype(np.float64), numbers(line[2:])), line[1]


# ---- mergekit_golden.json ----

GOLDEN = json.loads((VECTORS / "mergekit_golden.json").read_text())


def golden_tensor(word):
    values = GOLDEN["base"] if word == "base" else GOLDEN["models"][int(word.lstrip("-m"))]
    return np.array(values, np.float32).reshape(GOLDEN["shape"]) * (-1 if word.startswith("-") else 1)


def golden_inputs(text):
    """"base:m0,-m1" or without a base "m0,m1" -> models, base or None."""
    base, _, models = text.rpartition(":")
    return [golden_tensor(word) for word in models.split(",")], golden_tensor(base) if base else None


def golden_params(words):
    """"w=.5,.3,.7 density=.5 normalize=false rescale=true(l1)" -> the parameters of merge_tensors."""
    params = {}
    for key, value in words.items():
        if value.startswith(("true", "false")):
            params[key] = int(value.startswith("true"))
        else:
            values = [float(v) for v in value.split(",")]
            params["weight" if key == "w" else key] = values[0] if len(values) == 1 else values
    return params


@pytest.mark.parametrize("case", GOLDEN["expected"])
def test_golden(case):
    method, *words = case.split()
    words = dict(word.split("=", 1) for word in words)
    models, base = golden_inputs(words.pop("inputs"))
    got = obm.merge_tensors(method, models, base, golden_params(words))
    assert np.abs(got.ravel() - np.array(GOLDEN["expected"][case])).max() < 2e-6   # mergekit's cosines are sums in f32
