"""What calls from outside meet first: unknown keywords, and warnings at the caller's line."""

import inspect
import json
import warnings

import pytest

import onebitmerge as obm


@pytest.mark.parametrize("call, wrong, meant", [
    (lambda m, t, **k: obm.merge({}, t, **k), "resum", "resume"),
    (lambda m, t, **k: obm.compress(m / "base", {}, t, **k), "overwrit", "overwrite"),
    (lambda m, t, **k: obm.tune(t, [], **k), "lamdas", "lambdas"),
    (lambda m, t, **k: obm.register_method("x", len, **k), "paramaters", "parameters"),
    (lambda m, t, **k: obm.Expert("x", **k), "polcy", "policy"),
    (lambda m, t, **k: obm.Model(m / "base", **k), "prefil", "prefill"),
    (lambda m, t, **k: obm.Model(m / "base").generate("x", **k), "max_token", "max_tokens"),
    (lambda m, t, **k: obm.Model(m / "base").logits([1], **k), "al", "all"),
    (lambda m, t, **k: obm.extract_lora(m / "base", m / "math", t, **k), "rnak", "rank"),
    (lambda m, t, **k: obm.plan(m / "base", **k), "numas", "numa"),
    (lambda m, t, **k: obm.set_threads(1, **k), "nume", "numa"),
])
def test_unknown_keywords(models, tmp_path, call, wrong, meant):
    """The known ones, and which was probably meant."""
    with pytest.raises(TypeError, match=rf'^unknown keyword "{wrong}" \(known: .*\b{meant}\b.*\), did you mean "{meant}"\?$'):
        call(models, tmp_path / "out", **{wrong: 1})
    with pytest.raises(TypeError, match=r'^unknown keyword "frobnicate" \(known: [\w, ]+\)$'):
        call(models, tmp_path / "out", frobnicate=1)


@pytest.mark.parametrize("name", ["policy", "scale", "planes", "map"])
def test_settings_of_experts_are_no_keywords(models, tmp_path, name):
    """As the command line has them for all at once."""
    with pytest.raises(TypeError, match=rf'^unknown keyword "{name}": each expert has its own, .*Expert\(path, {name}=\.\.\.\) in place of its path$'):
        obm.compress(models / "base", {"math": models / "math"}, tmp_path / "p", **{name: "mlp"})



def test_signatures_are_seen():
    assert list(inspect.signature(obm.merge).parameters)[:3] == ["recipe", "out", "directory"] and "recipe" in obm.merge.__doc__
    assert repr(obm.Expert("a", policy="mlp")) == "Expert(path='a', policy='mlp', scale=None, planes=0, map=None)"


def test_warnings_are_at_the_callers_line(models, tmp_path):
    recipe = {"merge_method": "linear", "models": [{"model": str(models / "math"), "parameters": {"weight": 1, "density": 1}}]}
    (tmp_path / "r.yml").write_text(json.dumps(recipe))
    calls = [lambda: obm.merge(recipe, tmp_path / "a"), lambda: obm.merge(str(tmp_path / "r.yml"), tmp_path / "b"),
             lambda: obm.compress(models / "base", {"x": obm.Expert(models / "math", map={"nothing": "full"})}, tmp_path / "p"),
             lambda: obm.Model(models / "base").generate("x" * 100, max_tokens=512, ignore_eos=True)]
    for call in calls:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            call()
        assert seen and {(w.category, w.filename, w.lineno in range(call.__code__.co_firstlineno, call.__code__.co_firstlineno + 2)) for w in seen} == \
            {(RuntimeWarning, __file__, True)}, [str(w) for w in seen]
