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
