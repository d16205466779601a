"""Fixtures over examples/models: really trained checkpoints, their prompts, and a pack of them with a trained router.

What is shared by the session is only read; a test that changes a pack takes `own_pack`.
"""

import importlib.util
import json
import pathlib
import shutil
import signal
import types

import pytest

import onebitmerge as obm
from onebitmerge import cli

ROOT = pathlib.Path(__file__).resolve().parents[2]
TASKS = ("chat", "math", "code")


def load_source(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# A runner started in the background of a shell inherits an ignored SIGINT, and Python then installs no handler of its own.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def models():
    return ROOT / "examples" / "models"


@pytest.fixture(scope="session")
def experts(models):
    return {task: models / task for task in TASKS}


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """test[task], router and the folder of the JSON-lines files, as train_experts.py draws them."""
    folder = tmp_path_factory.mktemp("data")
    maker = load_source(ROOT / "examples" / "train_experts.py")
    maker.main(["data", "--out", str(folder), "--test", "100", "--valid", "4", "--router", "100"])

    def read(name):
        return [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").splitlines()]

    return types.SimpleNamespace(folder=folder, matches=maker.matches, router=read("router_train.jsonl"),
                                 test={task: read(f"test_{task}.jsonl") for task in TASKS})


@pytest.fixture(scope="session")
def pack_path(tmp_path_factory, models, experts, data):
    path = tmp_path_factory.mktemp("pack") / "family.pack"
    pack = obm.compress(models / "base", experts, out=path)
    pack.train_router([item["messages"] for item in data.router], [item["task"] for item in data.router])
    return path


@pytest.fixture(scope="session")
def pack(pack_path):
    return obm.Pack(pack_path)


@pytest.fixture(scope="session")
def model(pack_path):
    return obm.Model(pack_path)


@pytest.fixture(scope="session")
def base_model(models):
    return obm.Model(models / "base")


@pytest.fixture
def own_pack(pack_path, tmp_path):
    """A copy that the test may change."""
    return obm.Pack(shutil.copytree(pack_path, tmp_path / "own.pack"))


@pytest.fixture
def threads():
    """Sets the thread count of what is opened from now on; the default comes back afterwards."""
    yield obm.set_threads
    obm.set_threads(0)


# ---- the command line ----


@pytest.fixture
def run(capsys):
    """main(argv) -> (exit code, stdout, stderr)"""
    def call(*argv):
        capsys.readouterr()
        try:
            code = cli.main([str(a) for a in argv])
        except SystemExit as e:
            code = e.code
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return code, out, err
    return call


@pytest.fixture
def lines(run):
    """main(argv + --json), which has to succeed -> the records"""
    def call(*argv):
        code, out, err = run(*argv, "--json")
        assert code == 0, err
        return [json.loads(line) for line in out.splitlines()]
    return call


@pytest.fixture
def jsonl(tmp_path):
    def write(*items, name="in.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(item) + "\n" for item in items))
        return path
    return write


@pytest.fixture
def fails(run):
    """One clear line and the exit code"""
    def call(*argv, code=1, match=""):
        got, out, err = run(*argv)
        assert got == code, (got, out, err)
        assert match in err
        if code == 1:
            assert err.count("\n") == 1 and err.startswith("onebitmerge: "), err
        return err
    return call
