"""Names of the hub out of huggingface_hub's own cache, without a network."""

import pathlib
import subprocess
import sys

VECTORS = pathlib.Path(__file__).resolve().parent.parent / "vectors" / "lora"
PROGRAM = """
import onebitmerge as obm
assert len(obm.TaskVector("org/base-bf16", "org/plain@v1")) == 19
try:
    obm.Checkpoint("org/absent")
except FileNotFoundError as error:
    assert "org/absent: no such file or folder, and huggingface_hub cannot get it" in str(error), error
else:
    raise AssertionError
"""


def cached(cache, name, ref):
    folder = cache / "hub" / f"models--org--{name}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / ref).write_text("0" * 40)
    (folder / "snapshots").mkdir()
    (folder / "snapshots" / ("0" * 40)).symlink_to(VECTORS / name)


def test_cache(tmp_path, monkeypatch):
    cached(tmp_path, "base-bf16", "main")
    cached(tmp_path, "plain", "v1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    subprocess.run([sys.executable, "-c", PROGRAM], check=True)
