"""What calls from outside meet first: unknown keywords, and the line that a warning is about."""

import functools
import sys
import warnings

from . import _core


def keywords(function, elsewhere=None):
    """Unknown ones are answered as the core's functions do it: with the known ones, and what was probably meant; those in
    `elsewhere` with the place where they belong."""
    code = function.__code__
    known = code.co_varnames[:code.co_argcount + code.co_kwonlyargcount]

    @functools.wraps(function)
    def call(*args, **given):
        for name in given:
            if name in (elsewhere or ()):
                raise TypeError(f"unknown keyword \"{name}\": {elsewhere[name]}")
            if name not in known:
                _core._unknown_keyword(name, tuple(n for n in known if n != "self"))
        return function(*args, **given)
    return call


def warn(message):
    """A RuntimeWarning of the core at the line, outside of this package, whose call led to it."""
    level, frame = 1, sys._getframe()
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] == "onebitmerge":
        level, frame = level + 1, frame.f_back
    warnings.warn(message, RuntimeWarning, stacklevel=level)


def router_said(router, text, message):
    """What is wrong with a router's answer, behind its name and what it was asked."""
    code = getattr(router, "__code__", None)
    name = getattr(router, "__qualname__", None) or type(router).__qualname__
    where = f" ({code.co_filename}, line {code.co_firstlineno})" if code else ""
    text = " ".join(text.split())
    return f"router {name}{where}, asked about \"{text if len(text) <= 60 else text[:57] + '...'}\": {message}"
