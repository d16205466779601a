"""Runs every program of README.md in a folder where models/ is examples/models and route.* are the router's prompts; checks its table of models."""

import fnmatch
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "tests"   # made by tests/run.sh before it runs these tests


def blocks(language):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.M | re.S)


@pytest.fixture
def folder(tmp_path, data, models):
    (tmp_path / "models").symlink_to(models)
    (tmp_path / "route.jsonl").write_text("".join(json.dumps(item) + "\n" for item in data.router))
    program, = (b for b in blocks("sh") if "route.tsv" in b)
    run(["sh", "-ec", program], tmp_path)
    (tmp_path / "recipe.yml").write_text(blocks("yaml")[0])
    return tmp_path


def side_by_side(column):
    """The table "What one types": the code of one column, row by row."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = re.search(r"^\| to \| Python \| Lua \|\n(?:\|.*\n)+", text, flags=re.M)[0]
    rows = [re.findall(r"(?:`[^`]*`|[^|`])+", line) for line in table.splitlines()[2:]]
    assert len(rows) >= 10 and all(len(row) == 3 for row in rows)
    return [re.search(r"`([^`]*)`", row[column])[1] for row in rows]


def run(argv, folder, **env):
    done = subprocess.run(list(map(str, argv)), cwd=folder, env={**os.environ, **env}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{argv[0]}: {done.stdout}\n{done.stderr}"
    return done.stdout


def python_path():
    return os.pathsep.join(p for p in sys.path if p)


def test_python(folder):
    program = folder / "program.py"
    program.write_text("\n".join(blocks("python")), encoding="utf-8")
    out = run([sys.executable, program], folder, PYTHONPATH=python_path())
    assert "Answer: 22" in out and "{'math': 1.0}" in out


def test_python_of_the_table(folder):
    """In the order of the rows, with what the text above says of the names; items as tune takes them."""
    head = ["import json", "import onebitmerge as obm", "items = [json.loads(line) for line in open('route.jsonl')][:60]",
            "texts, labels = [item['messages'][0]['content'] for item in items if item['task'] != 'chat'], [item['task'] for item in items if item['task'] != 'chat']",
            "prompt = [{'role': 'user', 'content': 'What is 17 plus 5?'}]", "items = [{'messages': prompt, 'answer': 'Answer: 22', 'task': 'math'}]"]
    out = run([sys.executable, "-c", "\n".join([*head, *(f"print({line})" if " = " not in line.split("(")[0] else line for line in side_by_side(1)),
                                               "print(weights, answer, report.accuracy)"])], folder, PYTHONPATH=python_path())
    assert "'math'" in out and "Answer: 22" in out and "'ties'" in out
    check_outputs(folder)


def check_outputs(folder):
    assert (folder / "static" / "config.json").exists() and (folder / "dense" / "config.json").exists() and (folder / "lora" / "adapter_config.json").exists()


def test_lua_of_the_table(folder):
    head = ["local obm = require 'onebitmerge'", "local texts, labels = {}, {}", "for line in io.lines('route.tsv') do",
            "  local label, text = line:match('^(%w+)\t(.*)$')",
            "  if label ~= 'chat' and #texts < 60 then labels[#labels + 1], texts[#texts + 1] = label, text end", "end",
            "local prompt = { { role = 'user', content = 'What is 17 plus 5?' } }", "local pack, report, model, weights, probabilities, answer"]
    lines = [line if re.match(r"[\w, ]+ = |for ", line) else f"print(assert({line}))" for line in side_by_side(2)]
    out = run(["lua5.4", "-e", "\n".join([*head, *lines, "print(next(weights), answer, report.accuracy, next(probabilities))"])], folder, **lua_folders())
    assert "math" in out and "Answer: 22" in out and "ties\n" in out
    check_outputs(folder)


def lua_folders():
    """lua/ of the sources and the compiled module that tests/run.sh builds."""
    if not (BUILD / "lua").is_dir():
        pytest.fail(f"{BUILD / 'lua'} is missing: tests/run.sh builds the Lua module before these tests")
    built = BUILD / "lua"
    return {"LUA_PATH": f"{ROOT}/lua/?.lua;{built}/?.lua;{built}/?/init.lua;;", "LUA_CPATH": f"{built}/?.so;;"}


def test_lua(folder):
    environment = lua_folders()
    program = folder / "program.lua"
    program.write_text("\n".join(blocks("lua")), encoding="utf-8")
    out = run(["lua5.4", program], folder, **environment)
    assert "Answer: 22" in out and "math" in out


def static_library(tmp_path_factory):
    found = sorted(BUILD.rglob("libonebitmerge*.a"))
    if found:
        return found[0].parent, BUILD
    build = tmp_path_factory.mktemp("build")
    run(["cmake", "-S", ROOT, "-B", build, "-DCMAKE_BUILD_TYPE=Release"], ROOT)
    run(["cmake", "--build", build, "-j2"], ROOT)
    return sorted(build.rglob("libonebitmerge*.a"))[0].parent, build


def test_c(folder, tmp_path_factory):
    program, = blocks("c")
    (folder / "program.c").write_text(program, encoding="utf-8")
    library, build = static_library(tmp_path_factory)
    project = f"""cmake_minimum_required(VERSION 3.16)
project(readme C)
set(OBM_INSTALL OFF)
add_executable(program program.c)
target_include_directories(program PRIVATE {ROOT}/core/include)
find_package(PkgConfig REQUIRED)
pkg_check_modules(DEPS REQUIRED openblas hwloc jansson libpcre2-8 libutf8proc yaml-0.1 libxxhash)
target_link_libraries(program PRIVATE {next(iter(sorted(library.glob("libonebitmerge*.a"))))} ${{DEPS_LDFLAGS}} pthread m)
"""
    (folder / "CMakeLists.txt").write_text(project)
    run(["cmake", "-S", ".", "-B", "made"], folder)
    run(["cmake", "--build", "made"], folder)
    assert run([folder / "made" / "program"], folder).endswith("Answer: 22")


def test_shell(folder, tmp_path):
    """The set-up commands (quickstart, tests) are run by CI; the others here, one after the other."""
    programs = [b for b in blocks("sh") if "quickstart.sh" not in b and "tests/run.sh" not in b]
    assert len(programs) >= 2
    command = shutil.which("onebitmerge", path=os.path.dirname(sys.executable)) or ""
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    if not command:   # the package is on sys.path without its script
        (bin_folder / "onebitmerge").write_text(f"#!/bin/sh\nexec {sys.executable} -m onebitmerge \"$@\"\n")
        (bin_folder / "onebitmerge").chmod(0o755)
    path = os.pathsep.join([str(bin_folder), os.path.dirname(sys.executable), os.environ["PATH"]])
    out = run(["sh", "-ec", "\n".join(programs)], folder, PATH=path, PYTHONPATH=python_path())
    assert "Answer: 22" in out and "held-out accuracy" in out
    assert (folder / "math-dense" / "model.safetensors").exists() and (folder / "merged" / "config.json").exists()


def test_every_architecture_names_its_tests():
    """Each row of core/model/arch.c is one of the table; what its last column names is there, and is of that model_type."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = re.search(r"^\| `model_type` .*?\n\n", text, flags=re.M | re.S)[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.strip().splitlines()[2:]]
    known = re.findall(r"\.model_type = \"(\w+)\"", (ROOT / "core/model/arch.c").read_text(encoding="utf-8"))
    assert [row[0].strip("`") for row in rows] == known
    folders = {p.parent.name: json.loads(p.read_text())["model_type"] for p in (ROOT / "tests/vectors/models").glob("*/config.json")}
    cases = re.findall(r"^    \"([\w-]+)\":", (ROOT / "tests/oracles/architectures.py").read_text(encoding="utf-8"), flags=re.M)
    for row in rows:
        vectors, oracles = (re.findall(r"`([^`]+)`", part) for part in row[3].split(";"))
        for pattern in vectors:
            assert {folders[name] for name in fnmatch.filter(folders, pattern)} == {row[0].strip("`")}, pattern
        assert vectors and oracles and all(fnmatch.filter(cases, pattern) for pattern in oracles), row
