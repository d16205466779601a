#!/usr/bin/env python3
"""Who may include whom.  Prints every include that breaks the table and exits 1.  Usage: check_includes.py [ROOT]"""
import pathlib
import re
import sys

PUBLIC = "core/include/onebitmerge.h"
KERNELS = "kernels/kernels.h"

# Folder -> our headers that it may include: exact files, or folders when they end with a slash.
OURS = {
    "core": [PUBLIC, KERNELS, "core/"],
    "kernels": ["kernels/"],
    "lua": [PUBLIC, "lua/"],
    "python": [PUBLIC, "python/"],
    "examples": [PUBLIC, "examples/"],
    "tests/c": [PUBLIC, KERNELS, "core/", "tests/c/"],       # internals have tests of their own
    "tests/fuzz": [PUBLIC, "core/", "tests/fuzz/", "tests/c/"],
    "tests/bench": [PUBLIC, KERNELS, "core/", "tests/bench/"],   # route switches, single layers, and bounds beside figures
    "tests": [PUBLIC, KERNELS, "tests/"],
}

# Header of a library -> the only file (or folder) that may include it, among those that the second column governs.
CORE = ("core/", "kernels/")
EVERYWHERE = ("",)
ONE_PLACE = {
    "jansson.h": (["core/io/json.c"], CORE),
    "xxhash.h": (["core/io/hash.c"], CORE),
    "xxh_x86dispatch.h": (["core/io/hash.c"], CORE),
    "hwloc.h": (["core/sys/topology.c"], CORE),
    "cblas.h": (["core/sys/blas.c"], CORE),
    "lapacke.h": (["core/sys/blas.c"], CORE),
    "pthread.h": (["core/sys/threads.c"], CORE),
    "pcre2.h": (["core/text/regex.c"], CORE),
    "utf8proc.h": (["core/text/unicode.c"], CORE),
    "yaml.h": (["core/merge/yaml.c"], CORE),
    "immintrin.h": (["kernels/"], EVERYWHERE),
    "arm_neon.h": (["kernels/"], EVERYWHERE),
    "Python.h": (["python/", "tests/hosts/"], EVERYWHERE),
    "lua.h": (["lua/"], EVERYWHERE),
    "lauxlib.h": (["lua/", "tests/hosts/"], EVERYWHERE),
    "lualib.h": (["lua/", "tests/hosts/"], EVERYWHERE),
}

# kernels/ stands on libc and the compiler alone.
KERNEL_SYSTEM = {"stdint.h", "stddef.h", "stdbool.h", "stdatomic.h", "string.h", "math.h", "float.h", "immintrin.h",
                 "arm_neon.h", "cpuid.h"}

INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', re.M)
INCLUDE_FOLDERS = ["core/include", "core", "kernels"]


def resolve(root, source, name):
    """The file of this project that NAME means in SOURCE, relative to the root; None for a system header."""
    for folder in [source.parent] + [root / f for f in INCLUDE_FOLDERS]:
        path = (folder / name).resolve()
        if path.is_file() and root in path.parents:
            return path.relative_to(root).as_posix()
    return None


def allowed(path, places):
    return any(path == p or (p.endswith("/") and path.startswith(p)) for p in places)


def rule_for(path):
    return max((f for f in OURS if path.startswith(f + "/")), key=len, default=None)


def problems_of(root, source):
    path = source.relative_to(root).as_posix()
    folder = rule_for(path)
    for bracket, name in INCLUDE.findall(source.read_text(encoding="utf-8")):
        ours = resolve(root, source, name)
        if ours is not None:
            if not allowed(ours, OURS[folder]):
                yield f"{path}: includes {ours}; {folder}/ may include {', '.join(OURS[folder])}"
            continue
        if bracket == '"':
            yield f'{path}: "{name}" is not a file of this project'
        if folder == "kernels" and name not in KERNEL_SYSTEM:
            yield f"{path}: includes <{name}>; kernels/ may use {', '.join(sorted(KERNEL_SYSTEM))}"
        places, governed = ONE_PLACE.get(name, ([], ()))
        if name.startswith("hwloc/"):
            places, governed = ONE_PLACE["hwloc.h"]
        if path.startswith(governed) and not allowed(path, places):
            yield f"{path}: includes <{name}>, which belongs to {', '.join(places)} alone"


def main():
    root = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else pathlib.Path(__file__).parents[2]).resolve()
    sources = [p for top in {f.split("/")[0] for f in OURS} for p in (root / top).rglob("*.[ch]")]
    sources = [p for p in sources if rule_for(p.relative_to(root).as_posix()) and "build" not in p.relative_to(root).parts]
    problems = [line for source in sorted(sources) for line in problems_of(root, source)]
    print("\n".join(problems) if problems else f"includes: {len(sources)} files in order")
    return 1 if problems or not sources else 0


if __name__ == "__main__":
    sys.exit(main())
