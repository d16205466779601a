"""Merge methods written in Python: their descriptions, and the tiles that they get."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from . import _calls, _core   # NumPy and inspect are imported where they are needed: the command line starts without them

TYPE_CHECKING = False   # typing's own
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any


class Tile:
    """A part of one tensor, as a merge method sees it: called for tile after tile, in the order of the elements.

    vectors: (models, n) float32, the task vectors, or the weights for a method without a base; base: (n,) or None; out: (n,)
    zeros.  These are the core's own memory, free to overwrite.  tensor and shape: its name and the whole tensor's shape; the
    tile is its elements begin to begin + n, row-major.  parameters: {name: float or bool; for one per model an array (models,) of
    float32, narrowed from the recipe's f64, or of bool}.
    """

    __slots__ = ("tensor", "shape", "begin", "vectors", "base", "out", "parameters")

    def __init__(self, buffer, tensor, shape, begin, count, n_models, has_base, parameters):
        import numpy as np
        flat = np.asarray(buffer)
        end = n_models * count
        self.tensor, self.shape, self.begin = tensor, shape, begin
        self.vectors = flat[:end].reshape(n_models, count)
        self.base = flat[end:end + count] if has_base else None
        self.out = flat[len(flat) - count:]
        self.parameters = {name: _array(value) if isinstance(value, list) else value for name, value in parameters.items()}

    def __len__(self):
        return len(self.out)

    def __repr__(self):
        return f"Tile({self.tensor!r}, {self.begin} to {self.begin + len(self)} of {self.shape}, {len(self.vectors)} models)"


def _array(values):
    import numpy as np
    return np.array(values, np.bool_ if values and isinstance(values[0], bool) else np.float32)


def merge_tile(function, method, buffer, tensor, *rest):
    """Calls a method for one tile; what it returns goes into the tile's `out`, unless it is that."""
    import numpy as np
    tile = Tile(buffer, tensor, *rest)
    result = function(tile)
    if result is tile.out:
        return
    where = f"{tensor or 'the tensor'}: the method {method} gave"
    if result is None:   # a return that was forgotten would leave the base as it is, without a word
        raise _core.DtypeError(f"{where} nothing, expected a tensor of F32 and shape ({len(tile)})")
    result = np.asarray(result)
    if result.dtype != np.float32:
        raise _core.DtypeError(f"{where} {result.dtype}, expected float32")
    if result.shape != tile.out.shape:
        raise _core.ShapeError(f"{where} shape ({', '.join(map(str, result.shape))}), expected ({len(tile)})")
    tile.out[:] = result


def _parameter(name, given):
    """A default alone is a parameter of the whole merge; a mapping has the keys that methods() prints."""
    spec = dict(given) if isinstance(given, Mapping) else {"default": given}
    required = bool(spec.pop("required", False))
    is_bool = spec.pop("type", "bool" if isinstance(spec.get("default"), bool) else "number") == "bool"
    scope = spec.pop("scope", "global")
    if scope not in ("global", "model"):
        raise _core.ArgumentError(f"parameter {name}: scope: expected global or model, found {scope!r}")
    low, high = float(spec.pop("min", 0 if is_bool else -math.inf)), float(spec.pop("max", 1 if is_bool else math.inf))
    entry = (name, str(spec.pop("doc", "")), scope == "model", required, float(spec.pop("default", min(max(0., low), high))), low, high,
             is_bool)
    spec.pop("name", None)
    if spec:
        raise _core.ArgumentError(f"parameter {name}: unknown key {next(iter(spec))!r} "
                                  "(known: default, min, max, scope, required, type, doc)")
    return entry


def _first_line(function):
    import inspect
    return (inspect.getdoc(function) or "a method of the caller's own").strip().split("\n")[0]


def entry(name: str, function: Callable[[Tile], Any], parameters: Mapping[str, Any] | None = None, scope: str = "element",
          base: bool = True, doc: str | None = None, min_models: int = 1, max_models: int = 0):
    """The tuple of which the core makes a method (python/method.c); the arguments are register_method's."""
    if not callable(function):
        raise TypeError(f"a merge method is a callable (tile), found {type(function).__name__}")
    if scope not in ("element", "tensor"):
        raise _core.ArgumentError(f"{name}: scope: expected element or tensor, found {scope!r}")
    source = f"{getattr(function, '__module__', None) or '?'}.{getattr(function, '__qualname__', type(function).__qualname__)}"
    return (name, function, tuple(_parameter(key, value) for key, value in (parameters or {}).items()), scope == "tensor", base,
            _first_line(function) if doc is None else doc, source, min_models, max_models)


def method_entry(function):
    """A callable by itself: no parameters, element by element, under its own name if that can be one."""
    name = getattr(function, "__name__", "")
    taken = {m["name"] for m in _core.methods()}
    return entry(name if re.fullmatch(r"\w{1,63}", name, re.ASCII) and name not in taken else "custom", function)


@_calls.keywords
def register_method(name, function, parameters=None, *, scope="element", base=True, doc=None, min_models=1, max_models=0):
    """Make a merge method of a callable: `merge_method: name` in recipes, `merge(method=name)`, `merge_tensors(name, ...)`.

    function(tile) gets a Tile and returns the merged task vector (n,) as float32, which may be tile.out; the base is added
    to it.  parameters: {name: default}, or {name: {"default", "min", "max", "scope": "global" | "model", "required",
    "type": "number" | "bool", "doc"}}.  scope: "element" (tiles of any size, on which the result must not depend) or "tensor" (a
    tensor at once).  base=False: it merges the weights themselves.  function None forgets the method.

    Errors: ArgumentError (a name that is not a word or is a built-in method's; a parameter's name, range, key or scope; scope),
    NotFoundError (None for a name that is not registered), TypeError (function is not callable).
    """
    if function is None:
        _core.register_method(name, None)
    else:
        _core.register_method(*entry(name, function, parameters, scope, base, doc, min_models, max_models))
