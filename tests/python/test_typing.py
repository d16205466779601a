"""__init__.pyi and the package offer the same names with the same parameters."""

import ast
import inspect
import pathlib

import onebitmerge as obm
import pytest
from onebitmerge import _core, tuning

ROOT = pathlib.Path(__file__).resolve().parents[2]
STUB = ast.parse((ROOT / "python" / "onebitmerge" / "__init__.pyi").read_text(encoding="utf-8"))
# Runtime objects that the package does not export: what they are reached through.
HIDDEN = {"Request": _core.Request, "Stream": _core.Stream, "Candidate": tuning.Candidate}
TYPES_ONLY = {"PlannedFile", "MergeDocument", "MergePlan", "Plan", "PlacementPlan", "ExportReport", "LoraMatrix"}   # TypedDicts: plain dicts at runtime


def public(name):
    return not name.startswith("_")


CLASSES = {node.name: node for node in STUB.body if isinstance(node, ast.ClassDef) and public(node.name)}
FUNCTIONS = {node.name: node for node in STUB.body if isinstance(node, ast.FunctionDef) and public(node.name)}


def members(node):
    names = set()
    for item in node.body:
        if isinstance(item, ast.FunctionDef):
            names.add(item.name)
        elif isinstance(item, ast.AnnAssign):
            names.add(item.target.id)
    return {name for name in names if public(name)}


def test_module():
    offered = {name for name in obm.__all__ if public(name)}
    assert offered == (set(CLASSES) - set(HIDDEN) - TYPES_ONLY) | set(FUNCTIONS)
    assert all(hasattr(obm, name) for name in obm.__all__)
    assert obm.__version__


@pytest.mark.parametrize("name", sorted(set(CLASSES) - TYPES_ONLY))
def test_class(name):
    cls = HIDDEN.get(name) or getattr(obm, name)
    typed, real = members(CLASSES[name]), {n for n in vars(cls) if public(n)}
    if issubclass(cls, Exception):
        bases = [base.id for base in CLASSES[name].bases]
        assert [base.__name__ for base in cls.__bases__] == bases
        return
    if name == "Score":   # a NamedTuple
        assert list(cls._fields) == [i.target.id for i in CLASSES[name].body]
        return
    annotated = set(getattr(cls, "__annotations__", {}))
    made = {"make"} if name == "Completion" else set()   # a constructor for the core
    assert typed == (real | {n for n in annotated if public(n)}) - made


def parameters(node):
    return [a.arg for a in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs] if a.arg != "self"]


@pytest.mark.parametrize("name", ["compress", "merge", "tune"])
def test_python_functions(name):
    assert parameters(FUNCTIONS[name]) == list(inspect.signature(getattr(obm, name)).parameters)


@pytest.mark.parametrize("name", ["Expert", "RouterReport"])
def test_dataclasses(name):
    fields = [f for f in inspect.signature(getattr(obm, name)).parameters]
    assert fields == [i.target.id for i in CLASSES[name].body if isinstance(i, ast.AnnAssign)]


def methods_of_core():
    for name, node in CLASSES.items():
        cls = HIDDEN.get(name) or getattr(obm, name, None)
        if cls is None or cls.__module__ in ("onebitmerge._results", "onebitmerge._records", "onebitmerge.tuning") or issubclass(cls, Exception):
            continue
        for item in node.body:
            if isinstance(item, ast.FunctionDef) and public(item.name) and not item.decorator_list:
                yield cls, item


@pytest.mark.parametrize("cls, node", [pytest.param(c, n, id=f"{c.__name__}.{n.name}") for c, n in methods_of_core()])
def test_docstrings_show_the_parameters(cls, node):
    """C functions have no signature; the first line of their docstrings has, and names them as the stubs do."""
    doc = getattr(cls, node.name).__doc__.splitlines()[0]
    assert doc.startswith(f"{node.name}(")
    depth, end = 0, 0
    for end, c in enumerate(doc):
        depth += (c == "(") - (c == ")")
        if c == ")" and depth == 0:
            break
    shown = [part.split("=")[0].strip() for part in doc[len(node.name) + 1:end].split(",")]
    assert [p for p in shown if p not in ("", "*")] == [p if not (node.name == "stream" and p == "prompts") else "prompt" for p in parameters(node)]


def test_the_package_is_typed():
    assert (pathlib.Path(obm.__file__).parent / "py.typed").exists() or (ROOT / "python" / "onebitmerge" / "py.typed").exists()
