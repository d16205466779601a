"""Against mergekit 0.1.5, live: its merge methods on tensors, and whole merges of tiny random LLaMAs.

f32 inputs hold no equal magnitudes, so values are compared; bf16 deltas tie in masses and mergekit keeps whichever its
unstable sort puts first, so there counts and kept magnitudes are compared instead.
"""
import json
import math

import numpy as np
import pytest

import torch  # noqa: E402
import transformers  # noqa: E402
import mergekit  # noqa: E402,F401
import onebitmerge as obm  # noqa: E402

from mergekit.config import MergeConfiguration  # noqa: E402
from mergekit.merge import run_merge  # noqa: E402
from mergekit.merge_methods import registry  # noqa: E402
from mergekit.merge_methods.base import PerInputValues, TensorGroup  # noqa: E402
from mergekit.options import MergeOptions  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

WEIGHTS = [0.5, 0.3, 0.7]
LAYERS = 4


# ---- tensors ----

def their_group(method, base, models, weight, density, **shared):
    ids = [f"m{i}" for i in range(len(models))]
    group = TensorGroup.from_tensors([base, *models], ids=["base", *ids], base_index=0)
    spec = {"int8_mask": False, "lambda": 1.0, "normalize": method == "ties", "rescale": False, **shared}
    per_model = {"weight": weight, "density": density}
    spec.update({name: PerInputValues(list(zip(ids, values))) for name, values in per_model.items()})
    return registry.get(method).merge_group(group, **spec)


@pytest.mark.parametrize("method, weight, density, shared", [
    ("ties", WEIGHTS, [0.2] * 3, {}),
    ("ties", WEIGHTS, [0.2, 0.5, 0.9], {"normalize": False}),
    ("ties", [0.5, -0.3, 0.7], [0.5] * 3, {"normalize": False}),
    ("ties", [0.5, -0.3, 0.7], [0.5] * 3, {"int8_mask": True}),
    ("ties", WEIGHTS, [0.3] * 3, {"rescale": True, "lambda": 0.6}),
    ("ties", WEIGHTS, [1e-9] * 3, {}),
    ("ties", WEIGHTS, [0.0, 1.0, 0.5], {}),
    ("task_arithmetic", WEIGHTS, [1.0] * 3, {"lambda": 0.8}),
    ("task_arithmetic", WEIGHTS, [1.0] * 3, {"normalize": True}),
    ("task_arithmetic", [1.0, -1.0, 0.0], [1.0] * 3, {"normalize": True}),
])
def test_tensors(method, weight, density, shared):
    generator = torch.Generator().manual_seed(3)
    base = torch.randn(173, 211, generator=generator)
    models = [base + 0.1 * torch.randn(base.shape, generator=generator) for _ in weight]
    for i, x in enumerate(models):   # distinct magnitudes, so that trims agree to the element
        assert method != "ties" or not 0 < density[i] < 1 or (x - base).abs().unique().numel() > 0.9 * base.numel()
    want = their_group(method, base, models, weight, density, **shared).numpy()
    params = {"weight": weight, **({"density": density} if method == "ties" else {}), **shared}   # in mergekit task_arithmetic takes one, to no effect
    got = np.asarray(obm.merge_tensors(method, [x.numpy() for x in models], base.numpy(), params))
    differs = np.abs(got - want) > 1e-5
    # An f32 delta may still tie at the threshold: one element of each model may be another one.
    assert differs.sum() <= 2 * len(weight), f"{differs.sum()} elements differ by up to {np.abs(got - want).max()}"


SHAPES = [(61, 83), (83,), (1, 7), (7, 1), (5, 3, 4)]
OWN = [   # method, models, takes the base, parameters of the models, of the merge
    ("slerp", 1, True, {}, {"t": 0.3}),
    ("slerp", 1, True, {}, {"t": 1.2}),
    ("nuslerp", 2, True, {"weight": [0.4, 0.9]}, {}),
    ("nuslerp", 2, False, {"weight": [0.4, 0.9]}, {}),
    ("nuslerp", 2, True, {"weight": [0.4, 0.9]}, {"nuslerp_flatten": False}),
    ("nuslerp", 2, True, {"weight": [0.4, 0.9]}, {"nuslerp_flatten": False, "nuslerp_row_wise": True}),
    ("multislerp", 3, True, {"weight": WEIGHTS}, {}),
    ("multislerp", 3, False, {"weight": WEIGHTS}, {"normalize_weights": False}),
    ("karcher", 3, False, {}, {}),
    ("model_stock", 3, True, {}, {}),
    ("model_stock", 2, True, {}, {"filter_wise": True}),
    ("sce", 3, True, {}, {}),
    ("sce", 3, True, {}, {"select_topk": 0.3}),
    ("ram", 3, True, {}, {"epsilon": 0.05}),
    ("ramplus_tl", 3, True, {}, {"epsilon": 0.05, "r": 0.3, "alpha": 5.0}),
    ("nearswap", 1, True, {}, {"t": 0.02}),
    ("arcee_fusion", 1, True, {}, {}),
    ("passthrough", 1, False, {"scale": [0.7]}, {}),
    ("breadcrumbs", 3, True, {"weight": WEIGHTS, "density": [0.5] * 3, "gamma": [0.1, 0.01, 0.0]}, {"rescale": True}),
    ("breadcrumbs", 3, True, {"weight": WEIGHTS, "density": [0.95] * 3, "gamma": [0.1] * 3}, {"lambda": 0.7}),
    ("breadcrumbs_ties", 3, True, {"weight": WEIGHTS, "density": [0.5, 0.2, 1.0], "gamma": [0.1] * 3}, {"normalize": True}),
]
DEFAULTS = {"nuslerp": {"nuslerp_flatten": True, "nuslerp_row_wise": False}, "multislerp": {"normalize_weights": True, "eps": 1e-8},
            "karcher": {"max_iter": 10, "tol": 1e-5}, "model_stock": {"filter_wise": False}, "sce": {"int8_mask": False, "select_topk": 1.0},
            **dict.fromkeys(("breadcrumbs", "breadcrumbs_ties"), {"int8_mask": False, "lambda": 1.0, "normalize": False, "rescale": False})}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("method, n, has_base, per_model, shared", OWN, ids=lambda v: v if isinstance(v, str) else None)
def test_every_method(method, n, has_base, per_model, shared, shape):
    """Theirs in f64, so that their rounding does not count: what differs by more than a few units of f32 is a selection or an
    elected sign that f32 decides otherwise, one element per model at most."""
    generator = torch.Generator().manual_seed(math.prod(shape))
    base = torch.randn(shape, generator=generator).float()
    models = [base + 0.1 * torch.randn(shape, generator=generator) for _ in range(n)]
    ids = [f"m{i}" for i in range(n)]
    wide = [x.double() for x in ([base] if has_base else []) + models]
    group = TensorGroup.from_tensors(wide, ids=["base"] * has_base + ids, base_index=0 if has_base else None)
    spec = {**DEFAULTS.get(method, {}), **shared}
    spec.update({name: PerInputValues(list(zip(ids, values))) for name, values in per_model.items()})
    if method == "slerp":   # mergekit has it for batches of tensors
        from mergekit.merge_methods.slerp import slerp
        want = slerp(torch.tensor([shared["t"]]), wide[0][None], wide[1][None])[0].numpy()
    else:
        want = registry.get(method).merge_group(group, **spec).numpy()
    got = np.asarray(obm.merge_tensors(method, [x.numpy() for x in models], base.numpy() if has_base else None, {**per_model, **shared}))
    assert got.shape == shape
    differs = (np.abs(got - want) > 4e-6 * np.maximum(1, np.abs(want))).sum()
    assert differs <= (n if method in ("sce", "arcee_fusion", "breadcrumbs", "breadcrumbs_ties") else 0), \
        f"{differs} elements differ by up to {np.abs(got - want).max()}"


@pytest.mark.parametrize("method", ["della", "della_linear"])
@pytest.mark.parametrize("shape", [(61, 83), (5003,)], ids=str)
def test_della_keeps_as_often_by_rank(method, shape):
    """Other random numbers than torch's, the same law: how often each rank of a row stays over many seeds, and the L1 norm."""
    generator = torch.Generator().manual_seed(1)
    base = torch.zeros(shape)
    model = torch.randn(shape, generator=generator)
    runs, kept = 60, [torch.zeros(shape), torch.zeros(shape)]
    params = {"weight": [1.0], "density": [0.5], "epsilon": [0.3]}
    for seed in range(runs):
        torch.manual_seed(seed)
        group = TensorGroup.from_tensors([base, model], ids=["base", "m0"], base_index=0)
        spec = {"int8_mask": False, "lambda": 1.0, "normalize": False, "rescale": True}
        spec.update({k: PerInputValues([("m0", v[0])]) for k, v in params.items()})
        results = (registry.get(method).merge_group(group, **spec),
                   torch.from_numpy(np.asarray(obm.merge_tensors(method, [model.numpy()], base.numpy(), {**params, "normalize": False}, seed=seed))))
        for count, merged in zip(kept, results):
            count += merged != 0
            assert math.isclose(merged.abs().sum(), model.abs().sum(), rel_tol=1e-4)
    order = model.reshape(-1, shape[-1]).abs().argsort(dim=1)
    rates = [count.reshape(-1, shape[-1]).gather(1, order).reshape(-1, shape[-1]).mean(dim=0) / runs for count in kept]
    rows = model.numel() // shape[-1]
    law = 0.2 + 0.6 * torch.arange(shape[-1]) / (shape[-1] - 1)
    for rate in rates:
        assert ((rate - law).abs() < 6 * (law * (1 - law) / (rows * runs)).sqrt()).all()


# ---- folders ----

def tiny_model(seed, path, dtype=torch.float32, tied=False, around=None, noise=0.02):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=LAYERS, num_attention_heads=4,
                                      num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=tied)
    model = transformers.LlamaForCausalLM(config)
    if around is not None:
        with torch.no_grad():
            ours = dict(model.named_parameters())
            for name, parameter in transformers.LlamaForCausalLM.from_pretrained(around, dtype=torch.float32).named_parameters():
                if name in ours:
                    ours[name].copy_(parameter + noise * torch.randn_like(parameter))
    model.to(dtype).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    made = {}

    def make(dtype, tied=(False, False, False)):
        key = (dtype, tied)
        if key not in made:
            root = tmp_path_factory.mktemp("models")
            base = tiny_model(0, root / "base", dtype, tied[0])
            made[key] = [base] + [tiny_model(i, root / f"m{i}", dtype, tied[i], around=base) for i in (1, 2)]
        return made[key]

    return make


def theirs(recipe, out):
    run_merge(MergeConfiguration.model_validate(recipe), str(out), MergeOptions(copy_tokenizer=False, quiet=True, random_seed=1))
    return load_file(out / "model.safetensors")


def ours(recipe, out, **kwargs):
    obm.merge(recipe, out, **kwargs)
    return load_file(out / "model.safetensors")


def recipe_for(method, models, first, second, **rest):
    base, one, two = models
    with_base = {} if method == "linear" else {"base_model": base}
    return {"merge_method": method, **with_base, "models": [{"model": one, "parameters": first}, {"model": two, "parameters": second}], **rest}


RECIPES = {
    "linear": ("linear", {"weight": 0.7}, {"weight": 0.5}, {}),
    "linear-sum": ("linear", {"weight": 0.7}, {"weight": -0.5}, {"parameters": {"normalize": False}}),
    "linear-gradient": ("linear", {"weight": [0, 1, 0.25]}, {"weight": [1, 0.5]}, {}),
    "task_arithmetic": ("task_arithmetic", {"weight": 0.7}, {"weight": 0.5}, {"parameters": {"lambda": 0.9}}),
    "ties": ("ties", {"weight": 0.7, "density": 0.3}, {"weight": 0.5, "density": 0.6}, {}),
    "ties-global": ("ties", {}, {"weight": 0.5}, {"parameters": {"weight": 1, "density": [0.9, 0.1], "normalize": False}}),
    "ties-filters": ("ties", {"weight": [{"filter": "mlp", "value": [0.1, 1]}, {"filter": "norm", "value": 0.5}, {"value": 1}]},
                     {"weight": [{"filter": "self_attn", "value": 0.3}], "density": [{"filter": "up_proj", "value": 0.2}, {"filter": "*", "value": 0.8}]},
                     {"parameters": {"weight": 0.9, "density": 0.5}}),
    "ties-normalize-gradient": ("ties", {"weight": 0.7}, {"weight": 0.5}, {"parameters": {"normalize": [True, False], "density": 0.4}}),
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes(models, tmp_path, name):
    method, first, second, rest = RECIPES[name]
    recipe = recipe_for(method, models(torch.float32), first, second, **rest)
    want, got = theirs(recipe, tmp_path / "theirs"), ours(recipe, tmp_path / "ours")
    assert got.keys() == want.keys()
    for key in want:
        assert got[key].dtype == want[key].dtype
        differs = ((got[key] - want[key]).abs() > 1e-5).sum().item()
        assert differs <= 4, f"{key}: {differs} elements differ by up to {(got[key] - want[key]).abs().max()}"


FOLDERS = {
    "slerp": ({}, {}, {"t": [{"filter": "self_attn", "value": [0, 0.5, 1]}, {"filter": "mlp", "value": [1, 0.5, 0]}, {"value": 0.5}]}),
    "nuslerp": ({"weight": [0.2, 0.9]}, {"weight": 0.5}, {}),
    "multislerp": ({"weight": 0.3}, {"weight": 0.5}, {}),
    "karcher": ({}, {}, {"max_iter": 5}),
    "breadcrumbs": ({"weight": 0.7, "density": 0.5, "gamma": 0.02}, {"weight": 0.5}, {"density": 0.8}),
    "breadcrumbs_ties": ({"weight": 0.7, "density": 0.5, "gamma": 0.02}, {"weight": [0.5, 0.1]}, {}),
    "model_stock": ({}, {}, {"filter_wise": True}),
    "sce": ({}, {}, {"select_topk": 0.4}),
    "ram": ({}, {}, {"epsilon": 0.01}),
    "ramplus_tl": ({}, {}, {"epsilon": 0.01}),
    "nearswap": ({}, {}, {"t": 0.01}),
    "passthrough": ({"scale": [{"filter": "o_proj", "value": 0}, {"value": 1}]}, {}, {}),
}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("method", FOLDERS)
def test_recipes_of_every_method(models, tmp_path, method, tied):
    base, one, two = models(torch.float32, (tied,) * 3)
    first, second, shared = FOLDERS[method]
    listed = [{"model": one, "parameters": first}]
    if method in ("slerp", "nearswap"):
        listed.insert(0, {"model": base})
    elif method != "passthrough":
        listed.append({"model": two, "parameters": second})
    recipe = {"merge_method": method, "models": listed, "parameters": shared, "dtype": "float32"}
    if method not in ("karcher", "passthrough"):
        recipe["base_model"] = base
    want, got = theirs(recipe, tmp_path / "theirs"), ours(recipe, tmp_path / "ours")
    if tied:   # mergekit writes a head that transformers does not read
        want.pop("lm_head.weight", None)
    assert got.keys() == want.keys()
    for key in want:
        differs = ((got[key] - want[key]).abs() > 1e-5).sum().item()
        assert differs <= 4, f"{key}: {differs} elements differ by up to {(got[key] - want[key]).abs().max()}"


@pytest.mark.parametrize("dtypes", [{"dtype": "float32", "out_dtype": "bfloat16"}, {"dtype": "float32"}, {"dtype": "bfloat16"}, {"out_dtype": "float16"}, {}],
                         ids=lambda d: "-".join(f"{k}={v}" for k, v in d.items()) or "none")
def test_dtypes(models, tmp_path, dtypes):
    """mergekit rounds after every operation in the working dtype, ours once at the end: a few units in the last place apart."""
    recipe = recipe_for("task_arithmetic", models(torch.bfloat16), {"weight": 0.7}, {"weight": 0.5}, **dtypes)
    want, got = theirs(recipe, tmp_path / "theirs"), ours(recipe, tmp_path / "ours")
    work = dtypes.get("dtype", "bfloat16")
    for key in want:
        assert got[key].dtype == want[key].dtype
        bound = 2.0**-7 if work == "bfloat16" else 2.0**-8
        assert ((got[key].float() - want[key].float()).abs() <= bound * want[key].float().abs().clamp(min=2.0**-4)).all(), key
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    written = next(iter(got.values())).dtype
    assert config.get("dtype", config.get("torch_dtype")) == str(written).removeprefix("torch.")


def test_bf16_trim_is_tie_aware(models, tmp_path):
    base, one, _ = models(torch.bfloat16)
    recipe = {"merge_method": "ties", "base_model": base, "models": [{"model": one}], "parameters": {"weight": 1, "density": 0.3}}
    want, got = theirs(recipe, tmp_path / "theirs"), ours(recipe, tmp_path / "ours")
    before, expert = load_file(base + "/model.safetensors"), load_file(one + "/model.safetensors")
    for key in want:
        magnitude = (expert[key] - before[key]).abs().float()
        kept = [magnitude[merged[key] != before[key]].sort().values for merged in (want, got)]
        assert len(kept[0]) == len(kept[1]) == max(1, int(0.3 * magnitude.numel())), key
        assert torch.equal(kept[0], kept[1]), key


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare(models, tmp_path, method):
    """Other random numbers than torch's, the same law: keep rate, and the L1 norm that mergekit matches."""
    base, one, _ = models(torch.float32)
    recipe = {"merge_method": method, "base_model": base, "models": [{"model": one}], "parameters": {"weight": 1, "density": 0.4}}
    want = theirs(recipe, tmp_path / "theirs")
    recipe["parameters"]["rescale_l1"] = True
    got, again, other = (ours(recipe, tmp_path / str(i), seed=seed) for i, seed in enumerate((5, 5, 6)))
    before, expert = load_file(base + "/model.safetensors"), load_file(one + "/model.safetensors")
    assert all(torch.equal(got[key], again[key]) for key in got)
    assert any(not torch.equal(got[key], other[key]) for key in got)
    total = kept = 0
    for key in want:
        delta = expert[key] - before[key]
        total += delta.numel()
        kept += (got[key] != before[key]).sum().item()
        for merged in (want[key], got[key]):
            assert math.isclose((merged - before[key]).abs().sum(), delta.abs().sum(), rel_tol=1e-4), key
    assert abs(kept - 0.4 * total) < 5 * math.sqrt(total * 0.4 * 0.6)


@pytest.mark.parametrize("tied", [(True, True, True), (True, False, True), (False, False, False)], ids=["tied", "mixed", "untied"])
def test_result_loads_as_merged(models, tmp_path, tied):
    """What transformers holds after loading is what was merged, also where only some inputs have a head of their own."""
    base, one, two = models(torch.float32, tied)
    obm.merge(recipe_for("linear", (base, one, two), {"weight": 1}, {"weight": 3}), tmp_path / "out")
    states = [transformers.LlamaForCausalLM.from_pretrained(path, dtype=torch.float32).state_dict() for path in (one, two, tmp_path / "out")]
    for key, value in states[2].items():
        assert torch.allclose(value, (states[0][key] + 3 * states[1][key]) / 4, atol=1e-6), key
    if not all(tied[1:]):
        assert not torch.equal(states[2]["lm_head.weight"], states[2]["model.embed_tokens.weight"])


def test_text_recipe(models, tmp_path):
    """The file that mergekit-yaml takes."""
    base, one, two = models(torch.float32)
    text = f"""# a comment
models:
  - model: {base}
  - model: {one}
    parameters: {{density: [1, 0.7, 0.1], weight: 1.0}}
  - model: {two}
    parameters:
      density: 0.33
      weight:
        - filter: mlp
          value: 0.5
        - value: 5e-1
merge_method: ties
base_model: {base}
parameters:
  normalize: true
  int8_mask: yes
dtype: float32
"""
    import yaml
    (tmp_path / "recipe.yml").write_text(text)
    want = theirs(yaml.safe_load(text), tmp_path / "theirs")
    obm.merge(tmp_path / "recipe.yml", tmp_path / "ours")
    got = load_file(tmp_path / "ours" / "model.safetensors")
    for key in want:
        assert ((got[key] - want[key]).abs() > 1e-5).sum() <= 4, key


# ---- slices and modules ----

def source(model, first, end, **parameters):
    return {"model": model, "layer_range": [first, end], **({"parameters": parameters} if parameters else {})}


SLICED = {   # from the models base, one, two
    "stack": lambda b, x, y: {"merge_method": "passthrough", "slices": [
        {"sources": [source(x, 0, 3)]}, {"sources": [source(y, 1, 4, scale=[{"filter": "o_proj", "value": 0}, {"value": 1}])]},
        {"sources": [source(x, 3, 4)]}]},
    "linear": lambda b, x, y: {"merge_method": "linear", "parameters": {"weight": [{"filter": "layers.2.", "value": 3}, {"value": 1}]}, "slices": [
        {"sources": [source(x, 0, 2, weight=[0.2, 0.8]), source(y, 2, 4)]},
        {"sources": [source(x, 1, 4), source(y, 0, 3, weight=[0.1, 0.5, 2])], "parameters": {"normalize": False}}]},
    "ties": lambda b, x, y: {"merge_method": "ties", "base_model": b, "parameters": {"weight": 0.5, "density": [1, 0.3]}, "slices": [
        {"sources": [source(b, 0, 2), source(x, 0, 2, density=0.6), source(y, 0, 2)]},
        {"sources": [source(y, 1, 4), source(b, 1, 4)], "parameters": {"lambda": 0.7}}]},
    "slerp": lambda b, x, y: {"merge_method": "slerp", "base_model": x, "parameters": {
        "t": [{"filter": "self_attn", "value": [0, 0.5, 1]}, {"filter": "mlp", "value": [1, 0]}, {"value": 0.5}]}, "slices": [
            {"sources": [source(x, 0, 4), source(y, 0, 4)]}]},
    "own base": lambda b, x, y: {"merge_method": "task_arithmetic", "base_model": b, "parameters": {"weight": 0.5}, "slices": [
        {"sources": [source(b, 0, 2), source(x, 0, 2)]}, {"base_model": y, "sources": [source(x, 2, 4), source(y, 2, 4)]}]},
    "module": lambda b, x, y: {"merge_method": "linear", "parameters": {"weight": 3}, "modules": {"default": {
        "parameters": {"weight": [0.2, 0.8]}, "models": [{"model": x}, {"model": y, "parameters": {"weight": 0.4}}]}}},
    "module of slices": lambda b, x, y: {"merge_method": "passthrough", "modules": {"default": {"parameters": {"scale": 0.5}, "slices": [
        {"sources": [source(x, 1, 3)]}, {"sources": [source(y, 0, 1)], "parameters": {"scale": 2}}]}}},
}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", SLICED)
def test_slices(models, tmp_path, name, tied):
    recipe = {**SLICED[name](*models(torch.float32, (tied,) * 3)), "dtype": "float32"}
    want, got = theirs(recipe, tmp_path / "theirs"), ours(recipe, tmp_path / "ours")
    if tied:
        want.pop("lm_head.weight", None)
    assert got.keys() == want.keys()
    for key in want:
        differs = ((got[key] - want[key]).abs() > 1e-5).sum().item()
        assert differs <= 4, f"{key}: {differs} elements differ by up to {(got[key] - want[key]).abs().max()}"
    configs = [json.loads((tmp_path / who / "config.json").read_text()) for who in ("theirs", "ours")]
    assert configs[0]["num_hidden_layers"] == configs[1]["num_hidden_layers"]
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32).state_dict()
    assert all(torch.equal(loaded[key], got[key]) for key in got)


def test_documents(models, tmp_path):
    """The file that mergekit-multi takes: in any order, the output of one the input of another."""
    from click.testing import CliRunner
    from mergekit.scripts.multimerge import main
    base, one, two = models(torch.float32)
    text = f"""
merge_method: task_arithmetic
base_model: {base}
models: [{{model: stacked, parameters: {{weight: 0.3}}}}, {{model: {two}, parameters: {{weight: [0, 1]}}}}]
dtype: float32
---
name: stacked
merge_method: passthrough
slices:
- sources: [{{model: mixed, layer_range: [0, 3]}}]
- sources: [{{model: {one}, layer_range: [0, 1]}}]
---
name: mixed
merge_method: linear
models: [{{model: {{model: {{path: {one}}}}}, parameters: {{weight: 1}}}}, {{model: {two}, parameters: {{weight: 2}}}}]
"""
    (tmp_path / "recipe.yml").write_text(text)
    result = CliRunner().invoke(main, [str(tmp_path / "recipe.yml"), "-I", str(tmp_path / "parts"), "--out-path", str(tmp_path / "theirs"), "--quiet"])
    assert result.exit_code == 0, result.output
    obm.merge(tmp_path / "recipe.yml", tmp_path / "ours")
    want, got = (load_file(tmp_path / who / "model.safetensors") for who in ("theirs", "ours"))
    assert got.keys() == want.keys()
    assert all(torch.allclose(got[key], want[key], atol=1e-5) for key in want)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ours", "parts", "recipe.yml", "theirs"]


# ---- vocabularies ----

def save_tokenizer(path, words, added, template=None):
    """A tokenizer of single words, and added tokens behind them; ids as listed."""
    import tokenizers
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    inner.add_tokens([tokenizers.AddedToken(token, special=token.startswith("<"), normalized=False) for token in added])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=inner)
    fast.chat_template = template
    fast.save_pretrained(path)


def with_vocabulary(root, name, seed, words, added, rows=None, tied=False, template=None):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(vocab_size=rows or len(words) + len(added), hidden_size=48, intermediate_size=80, num_hidden_layers=2,
                                      num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=tied)
    transformers.LlamaForCausalLM(config).save_pretrained(root / name)
    save_tokenizer(root / name, words, added, template)
    return str(root / name)


TEMPLATES = ["{{ 'a template' }}{{ messages[0] }}", "{{ 'another one' }}{{ messages }}"]


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def vocabularies(request, tmp_path_factory):
    root, words, tied = tmp_path_factory.mktemp("vocabularies"), [f"w{i}" for i in range(20)], request.param
    return [with_vocabulary(root, "base", 0, words, ["<s>", "</s>"], tied=tied, template=TEMPLATES[0]),
            with_vocabulary(root, "one", 1, words, ["<s>", "</s>", "<extra>", "both"], tied=tied, template=TEMPLATES[1]),
            with_vocabulary(root, "two", 2, words[:3] + ["new", "newer"] + words[5:][::-1], ["<s>", "</s>", "both"], rows=25, tied=tied,
                            template=TEMPLATES[1])]


def by_token(folder):
    """Rows of embedding and head by token, the rows behind, the other tensors, and the config."""
    tensors = load_file(folder / "model.safetensors")
    vocab = transformers.AutoTokenizer.from_pretrained(folder).get_vocab()
    tables = [tensors.pop(key) for key in ("model.embed_tokens.weight", "lm_head.weight") if key in tensors]
    rows = {token: [table[i] for table in tables] for token, i in vocab.items()}
    assert sorted(vocab.values()) == list(range(len(vocab)))
    return rows, [table[len(vocab):] for table in tables], tensors, json.loads((folder / "config.json").read_text())


LINEAR = {"merge_method": "linear", "parameters": {"weight": 0.5}}
VOCABULARIES = {   # from the models base, one, two
    "base": lambda b, x, y: {**LINEAR, "base_model": b, "models": [{"model": b}, {"model": x}, {"model": y}], "tokenizer_source": "base"},
    "union": lambda b, x, y: {**LINEAR, "base_model": b, "models": [{"model": b}, {"model": x}, {"model": y}], "tokenizer_source": "union"},
    "model": lambda b, x, y: {"merge_method": "task_arithmetic", "base_model": b, "models": [{"model": x}, {"model": y}],
                              "parameters": {"weight": [0.3, 0.8]}, "tokenizer_source": x},
    "ties": lambda b, x, y: {"merge_method": "ties", "base_model": b, "models": [{"model": x}, {"model": y}],
                             "parameters": {"weight": 0.5, "density": 0.4}, "tokenizer_source": "union"},
    "tokens": lambda b, x, y: {**LINEAR, "base_model": b, "models": [{"model": x}, {"model": y}], "tokenizer": {
        "source": "union", "pad_to_multiple_of": 16, "tokens": {
            "w3": {"source": x}, "w4": {"source": {"kind": "zero"}}, "<extra>": {"source": x, "force": True}, "w7": {"source": y, "force": True},
            "both": {"source": {"kind": "model_token", "model": x, "token": "w1"}, "force": True},
            "added": {"source": {"kind": "model_token", "model": y, "token_id": 6}}, "w9": {"source": {"kind": "zero"}, "force": True}}}},
    "slices": lambda b, x, y: {"merge_method": "passthrough", "base_model": y, "slices": [
        {"sources": [{"model": x, "layer_range": [0, 2]}]}, {"sources": [{"model": y, "layer_range": [1, 2]}]}],
        "tokenizer": {"source": "union", "pad_to_multiple_of": 7}},
}


@pytest.mark.parametrize("name", VOCABULARIES)
def test_vocabularies(vocabularies, tmp_path, name):
    recipe = {**VOCABULARIES[name](*vocabularies), "dtype": "float32"}
    theirs(recipe, tmp_path / "theirs")
    obm.merge(recipe, tmp_path / "ours")
    (want, want_padding, want_rest, want_config), (got, padding, rest, config) = (by_token(tmp_path / who) for who in ("theirs", "ours"))
    assert got.keys() == want.keys()
    for token in want:
        for mine, other in zip(got[token], want[token]):
            assert torch.allclose(mine, other, atol=1e-6), token
    for mine, other in zip(padding, want_padding):
        assert torch.allclose(mine, other, atol=1e-6)
    assert rest.keys() == want_rest.keys()
    for key in rest:
        assert ((rest[key] - want_rest[key]).abs() > 1e-5).sum() <= 4, key
    assert config["vocab_size"] == want_config["vocab_size"]
    transformers.LlamaForCausalLM.from_pretrained(tmp_path / "ours")


@pytest.mark.parametrize("template", ["auto", "chatml", "{% for m in messages %}{{ m['content'] }}{% endfor %}"])
def test_chat_templates(vocabularies, tmp_path, template):
    base, one, two = vocabularies
    recipe = {**LINEAR, "base_model": base, "models": [{"model": base}, {"model": one}, {"model": two}], "tokenizer_source": "base",
              "chat_template": template}
    theirs(recipe, tmp_path / "theirs")
    obm.merge(recipe, tmp_path / "ours")
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "you"}]
    texts = [transformers.AutoTokenizer.from_pretrained(tmp_path / who).apply_chat_template(messages, tokenize=False) for who in ("theirs", "ours")]
    assert texts[0].strip() == texts[1].strip()
