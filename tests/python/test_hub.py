"""Names of the Hugging Face hub: resolved by huggingface_hub, faked here; nothing touches a network."""

import pathlib
import shutil
import sys
import types

import pytest

import onebitmerge as obm

VECTORS = pathlib.Path(__file__).resolve().parent.parent / "vectors" / "lora"


@pytest.fixture
def hub(monkeypatch):
    """snapshot_download of a folder of repositories; records what was asked for."""
    asked = []

    def snapshot_download(repo_id, *, revision=None, allow_patterns=None):
        asked.append((repo_id, revision))
        folder = VECTORS / repo_id.partition("/")[2]
        if not folder.is_dir():
            raise RuntimeError(f"404: {repo_id}")
        assert "*.safetensors" in allow_patterns
        return str(folder)

    module = types.ModuleType("huggingface_hub")
    module.snapshot_download = snapshot_download
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    return asked


def test_names(hub, tmp_path):
    assert obm.Checkpoint("org/base-bf16").path == str(VECTORS / "base-bf16")
    vector = obm.TaskVector("org/base-bf16", "org/plain@v1.0")
    assert len(vector) == 19 and hub == [("org/base-bf16", None)] * 2 + [("org/plain", "v1.0")]
    pack = obm.compress("org/base-bf16", {"a": "org/plain", "b": VECTORS / "patterns"}, out=tmp_path / "p")
    assert pack.base.path == str(VECTORS / "base-bf16")
    obm.Pack(tmp_path / "p", base="org/base-bf16").verify()
    plan = obm.merge({"merge_method": "linear", "models": [{"model": "org/base-bf16@main+org/plain@v2", "parameters": {"weight": 1}}]}, tmp_path / "m")
    assert plan["tensors"] == 19 and hub[-2:] == [("org/base-bf16", "main"), ("org/plain", "v2")]


def test_local_paths_come_first(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(VECTORS / "base-f32", "org/base-bf16")
    assert obm.Checkpoint("org/base-bf16")["model.norm.weight"].dtype == obm.Checkpoint(VECTORS / "base-f32")["model.norm.weight"].dtype
    for path in ("./org/none", str(tmp_path / "org"), "a/b/c", "none", "-a/b", "a/b@c@d"):
        with pytest.raises((OSError, obm.FormatError)):
            obm.Checkpoint(path)
    assert hub == []


def test_not_found(hub):
    with pytest.raises(FileNotFoundError, match="org/nothing: no such file or folder, and huggingface_hub cannot get it: 404: org/nothing"):
        obm.Checkpoint("org/nothing")
    with pytest.raises(FileNotFoundError, match="org/nothing"):
        obm.Model("org/nothing")


def test_without_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(FileNotFoundError, match=r"org/name: no such file or folder; .* pip install onebitmerge\[hub\]"):
        obm.Checkpoint("org/name")
