"""What the package offers, with the C core loaded; __init__ imports it at the first use."""

import importlib as _importlib
import json as _json
import os as _os
from collections.abc import Mapping as _Mapping
from functools import partial as _partial

from . import _calls, _core, _hub, _methods, _results
from ._core import (ArgumentError, BusyError, Checkpoint, DtypeError, Error, FormatError, MismatchError, Model, NonFiniteError,
                    NotFoundError, Pack, ShapeError, TaskVector, Tensor, Tokenizer, UnsupportedError, __version__, class_of,
                    extract_lora, info, merge_tensors, methods, plan, set_threads)
from ._methods import Tile, register_method
from ._results import Completion

# Modules that take longer to import than the C core wait for the first use of what they have.
_LATE = {"Expert": "_records", "RouterReport": "_records", "Score": "_records", "Tuning": "tuning", "tune": "tuning"}


def __getattr__(name):
    if name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = getattr(_importlib.import_module(f"onebitmerge.{_LATE[name]}"), name)
    return globals()[name]


def _late(name):
    return lambda *given: __getattr__(name)(*given)


for _name, _hook in {"Completion": Completion.make, "Score": _late("Score"), "RouterReport": _late("RouterReport"), "experts": _results.experts,
                     "pack_repr": _results.pack_repr, "pack_html": _results.pack_html, "render_template": _results.render_template,
                     "progress_bar": _results.progress_bar, "resolve": _hub.resolve, "merge_tile": _methods.merge_tile,
                     "method_entry": _methods.method_entry, "warn": _calls.warn,
                     "router_said": _calls.router_said}.items():
    _core._register(_name, _hook)


def _of_each_expert(name):
    given = "(path, policy) or " if name == "policy" else ""
    return f"each expert has its own, {given}Expert(path, {name}=...) in place of its path"


@_partial(_calls.keywords, elsewhere={name: _of_each_expert(name) for name in ("policy", "scale", "planes", "map")})
def compress(base, experts, out, *, profile=None, overwrite=False, dry_run=False, progress=None, shared=None, tall_lambda=0,
             shared_dtype=None):
    """Compress experts of a base into the pack folder `out` (streaming) and open it.

    base: a path or a Checkpoint.  experts: {name: path | (path, policy) | Expert}.  profile: "paper" takes the paper's policy,
    lambda and trim.  dry_run: return the plan (tensors, bytes, memory, seconds) and write nothing; an output that
    exists is refused as it is without, unless overwrite is set.
    shared: "tall" or "emr" stores one vector per matrix for all experts, in shared_dtype (the base's; "f32", "bf16", "f16"), and
    a bit mask per expert instead of 1-bit planes; tall_lambda (0.4) is the threshold of TALL's masks.
    """
    base = base.path if isinstance(base, Checkpoint) else base
    return _core.compress(base, experts, out, profile, overwrite, dry_run, progress, shared, tall_lambda, shared_dtype)


def _plain(value, where=""):
    """As JSON has it.  NumPy's scalars and arrays know their Python values; what else is a number (Decimal, Fraction) says so."""
    if isinstance(value, _Mapping):
        return {key: _plain(v, f"{where}.{key}" if where else f"{key}") for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v, f"{where}[{i}]") for i, v in enumerate(value)]
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if isinstance(value, _os.PathLike):
        return _plain(_os.fspath(value), where)
    for name in ("tolist", "__index__", "__float__"):
        plain = getattr(value, name)() if hasattr(value, name) else value
        if type(plain) is not type(value):   # a longdouble's tolist gives itself
            return _plain(plain, where)
    raise TypeError(f"recipe: {where}: expected text, a path, a number, true or false, a list or a mapping, found {type(value).__name__}")


@_calls.keywords
def merge(recipe, out, *, directory=None, profile=None, seed=None, shard_bytes=0, memory=0, overwrite=False, dry_run=False,
          progress=None, resume=False, method=None):
    """Merge by a recipe into the Hugging Face folder `out`; returns the plan as a dict, for a dry run with `documents` and their files.

    recipe: a dict with mergekit's keys, or the path of a YAML or JSON file; relative paths in a file start at its folder.  Models are
    folders, MODEL+ADAPTER, or experts of packs, PACK:task.
    resume: keep the finished shards of a killed merge of the same recipe, options and inputs; and keep one's own when stopped.
    A merge that is finished already is verified and left as it is, with a RuntimeWarning that says so.
    dry_run: the plan alone; what the merge would refuse (an output that exists, without overwrite) is refused, too.
    method: a name or a callable (tile) in place of the recipe's merge_method, which in a dict may be a callable too; see
    register_method.
    """
    if isinstance(recipe, (str, _os.PathLike)):
        with open(recipe, encoding="utf-8") as file:
            text = file.read()
        directory = directory if directory is not None else _os.path.dirname(_os.path.abspath(recipe))
    elif not isinstance(recipe, _Mapping):
        several = " (several documents come from a file)" if isinstance(recipe, (list, tuple)) else ""
        raise TypeError(f"recipe: expected a path or a mapping, found {type(recipe).__name__}{several}")
    else:
        if callable(recipe.get("merge_method")):
            recipe, method = dict(recipe), recipe["merge_method"] if method is None else method
            del recipe["merge_method"]
        text = _json.dumps(_plain(recipe))
    return _core.merge(text, out, profile, directory, seed, shard_bytes, memory, overwrite, dry_run, progress, resume, method)
