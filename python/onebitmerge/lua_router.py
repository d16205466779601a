"""--router FILE.lua: a Lua router run by the lua5.4 interpreter beside the command line."""

from __future__ import annotations

import os
import shutil
import subprocess
import weakref


class LuaRouterError(RuntimeError):
    """What the Lua function raised, with its own message."""


def end(process):
    process.kill()   # nothing in the child of a fork, which has no such child
    process.wait()
    process.stdout.close()
    try:
        process.stdin.close()
    except OSError:   # of what was still to be written
        pass


class LuaRouter:
    def __init__(self, path):
        if not os.path.isfile(path):
            raise FileNotFoundError(2, "no such file", path)
        lua = shutil.which("lua5.4") or shutil.which("lua")
        if lua is None:
            raise LuaRouterError("--router FILE.lua needs the lua5.4 interpreter (apt-get install lua5.4)")
        driver = os.path.join(os.path.dirname(os.path.abspath(__file__)), "lua_router.lua")
        self.process = subprocess.Popen([lua, driver, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        weakref.finalize(self, end, self.process)
        self.__qualname__ = path   # in what is said about its answers
        kind, rest = self._read()
        if kind != "ready":
            raise LuaRouterError(rest)

    def _write(self, text):
        data = text.encode()
        self.process.stdin.write(b"%d\n%s" % (len(data), data))
        self.process.stdin.flush()

    def _read(self):
        line = self.process.stdout.readline()
        if not line:
            raise LuaRouterError("the Lua router ended without an answer")
        kind, _, rest = self.process.stdout.read(int(line)).decode().partition(" ")
        return kind, rest

    def __call__(self, request):
        self._write(request.text)
        self._write(" ".join(map(str, request.tokens)))
        while True:
            kind, rest = self._read()
            if kind == "name":
                return rest
            if kind == "index":
                return int(rest) - 1
            if kind == "weights":
                return {name: float(weight) for name, weight in (line.rsplit(" ", 1) for line in rest.splitlines())}
            if kind == "features":
                self._write(" ".join(map(repr, map(float, request.features(int(rest))))))
            elif kind == "builtin":
                self._write(request.builtin)
            elif kind == "probabilities":
                self._write("".join(f"{name} {p!r}\n" for name, p in request.probabilities.items()))
            else:
                raise LuaRouterError(rest or kind)
