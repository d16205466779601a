"""Holds the public header, both bindings, their type stubs and the README against each other.

Every OBM_API function must be called by both bindings, or be named in skip.txt with a reason.  Every name that Python offers
must stand in __init__.pyi, and must be offered by Lua under the same name (skip.txt again for the exceptions); every Lua name
must stand in onebitmerge.d.lua.  Versions must agree.  Prints what differs; exit code 1 if anything does.
"""

import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
problems = []


def read(*parts):
    return ROOT.joinpath(*parts).read_text(encoding="utf-8")


def sources(folder):
    return "\n".join(p.read_text(encoding="utf-8") for p in sorted((ROOT / folder).glob("*.c")))


def skipped():
    """Lines of skip.txt: `kind name: reason`."""
    out = {}
    for number, line in enumerate(read("tests/parity/skip.txt").splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        match = re.fullmatch(r"(\S+) (\S+): (.+)", line)
        if not match:
            problems.append(f"skip.txt, line {number}: expected `kind name: reason`")
            continue
        out[match[1], match[2]] = match[3]
    return out


SKIP = skipped()
used = set()


def differs(kind, name, message):
    if (kind, name) in SKIP:
        used.add((kind, name))
    else:
        problems.append(message)


def header_functions():
    text = re.sub(r"/\*.*?\*/", "", read("core/include/onebitmerge.h"), flags=re.S)
    return re.findall(r"OBM_API[^;(]*?\b(obm_\w+)\s*\(", text)


def check_bindings_cover_header():
    python, lua = sources("python"), sources("lua")
    for name in header_functions():
        for kind, text in (("python", python), ("lua", lua)):
            if not re.search(rf"\b{name}\b", text):
                differs(kind, name, f"{name} is in the header but the {kind} binding does not call it")


def python_members():
    """{type: names} out of the PyMethodDef and PyGetSetDef tables; module functions under ''."""
    members = {}
    for path in sorted((ROOT / "python").glob("*.c")):
        for table, body in re.findall(r"static Py(?:MethodDef|GetSetDef) (\w+?)_(?:methods|getset)\[\] = \{(.*?)\n?\s*\{NULL", path.read_text(encoding="utf-8"), flags=re.S):
            names = [n for n in re.findall(r"\{\"(\w+)\",", body) if not n.startswith("_")]
            members.setdefault("" if table == "module" else table, set()).update(names)
    return members


def lua_members():
    """{type: names} out of the luaL_Reg tables, plus what init.lua adds to the module (obm.name = / function obm.name)."""
    members = {}
    for path in sorted((ROOT / "lua").glob("*.c")):
        for table, body in re.findall(r"luaL_Reg (\w+?)_(?:methods|functions|fields)\[\] = \{(.*?)\{NULL", path.read_text(encoding="utf-8"), flags=re.S):
            names = [n for n in re.findall(r"\{\"(\w+)\",", body) if not n.startswith("_")]
            members.setdefault("" if table == "module" else table, set()).update(names)
    for name in re.findall(r"^(?:function )?M\.(\w+)", read("lua/init.lua"), flags=re.M):
        members.setdefault("", set()).add(name)
    return members


def check_python_against_lua():
    python, lua = python_members(), lua_members()
    for kind in python:
        if kind and kind not in lua:
            differs("type", kind, f"Python has the type {kind}, Lua has not")
            continue
        for name in sorted(python[kind] - lua.get(kind, set())):
            label = f"{kind}.{name}" if kind else name
            differs("lua-name", label, f"Python offers {label}, Lua does not")
        for name in sorted(lua.get(kind, set()) - python[kind]):
            label = f"{kind}.{name}" if kind else name
            differs("python-name", label, f"Lua offers {label}, Python does not")


def check_stubs():
    pyi, d_lua = read("python/onebitmerge/__init__.pyi"), read("lua/onebitmerge.d.lua")
    for kind, names in python_members().items():
        for name in names:
            if not re.search(rf"\bdef {name}\(", pyi):
                differs("pyi", name, f"{kind or 'module'}: {name} is not in __init__.pyi")
    for kind, names in lua_members().items():
        for name in names:
            if not re.search(rf"[.:]{name}\(|@field {name}\b", d_lua):
                differs("d.lua", name, f"{kind or 'module'}: {name} is not in onebitmerge.d.lua")
    exported = re.search(r"__all__ = \[(.*?)\]", read("python/onebitmerge/__init__.py"), flags=re.S)[1]
    for name in re.findall(r'"(\w+)"', exported):
        if not re.search(rf"\b(class|def) {name}\b|^{name}:", pyi, flags=re.M):
            differs("pyi", name, f"__all__ has {name}, __init__.pyi has not")


def check_methods_documented():
    """Every merge method of the registry is named in the README."""
    readme = read("README.md")
    for path in sorted((ROOT / "core/merge").glob("*.c")):
        for name in re.findall(r"\.info = \{\"(\w+)\"", path.read_text(encoding="utf-8")):
            if f"`{name}`" not in readme:
                problems.append(f"merge method {name} is not in README.md")


def check_version():
    header = read("core/include/onebitmerge.h")
    version = ".".join(re.search(rf"OBM_VERSION_{part} (\d+)", header)[1] for part in ("MAJOR", "MINOR", "PATCH"))
    changelog = re.search(r"^## (\d+\.\d+\.\d+|Unreleased)", read("CHANGELOG.md"), flags=re.M)
    if not changelog or f"## {version}" not in read("CHANGELOG.md"):
        problems.append(f"CHANGELOG.md has no section for {version}")


check_bindings_cover_header()
check_python_against_lua()
check_stubs()
check_methods_documented()
check_version()
for key in SKIP:
    if key not in used:
        problems.append(f"skip.txt: `{key[0]} {key[1]}` excuses nothing any more")
for problem in problems:
    print(problem)
print(f"{len(header_functions())} functions in the header, {len(problems)} problems")
sys.exit(bool(problems))
