"""How things end: the interpreter with live objects, a child after a fork, streams that are dropped half way, and every long
call that Ctrl-C or an exception from a callback stops."""

import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

import onebitmerge as obm


class Stop(Exception):
    pass


def python(code, *args):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    return subprocess.run([sys.executable, "-X", "dev", "-c", code, *map(str, args)], capture_output=True, text=True, timeout=120, env=env)


# ---- the interpreter ----

LIVE = """
import sys, onebitmerge as obm
base, math, pack = sys.argv[1:]
model, plain, p = obm.Model(pack), obm.Model(base), obm.Pack(pack)
def router(request, model=model): return "math"
model.generate("hello", router=router, max_tokens=1)
stream = model.stream("Tom has 3 apples", router=router, max_tokens=50, ignore_eos=True)
next(stream)
vector = obm.TaskVector(base, math)
lazy, checkpoint = vector["model.norm.weight"], obm.Checkpoint(base)
tensor, tokenizer = checkpoint["model.norm.weight"], plain.tokenizer
class Holder:
    def __init__(self): self.kept = [model, plain, p, stream, vector, lazy, checkpoint, tensor, tokenizer, self]
    def __del__(self): sys.modules
holder = Holder()
print("alive")
"""


@pytest.mark.parametrize("end", ["", "sys.exit(3)", "raise SystemExit(3)", "import os, signal; os.kill(os.getpid(), signal.SIGINT)"])
def test_interpreter_ends_with_live_objects(models, pack_path, end):
    done = python(LIVE + end, models / "base", models / "math", pack_path)
    assert "alive" in done.stdout
    assert done.returncode in ((0,) if not end else (3,) if "3" in end else (1, 130, -signal.SIGINT)), (done.returncode, done.stderr)
    assert "Fatal" not in done.stderr and "Exception ignored" not in done.stderr


DAEMON = """
import sys, threading, onebitmerge as obm
model = obm.Model(sys.argv[1])
started = threading.Event()
def work():
    while True:
        model.generate("hello", max_tokens=100, ignore_eos=True, progress=lambda *a: started.set())
threading.Thread(target=work, daemon=True).start()
started.wait(60)
print("ends")
"""


def test_interpreter_ends_while_a_daemon_thread_generates(models):
    done = python(DAEMON, models / "base")
    assert done.stdout == "ends\n" and done.returncode == 0, (done.returncode, done.stderr)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_fork_in_every_kind_of_work(pack_path, models, tmp_path):
    """A child uses packs, planes, task vectors, merges and the router that the parent has used, and exits as Python does."""
    pack, model = obm.Pack(pack_path), obm.Model(pack_path)
    name = "model.layers.0.mlp.up_proj.weight"
    vector = obm.TaskVector(models / "base", models / "math")
    want = [model.generate("17 plus 5", route="math", max_tokens=4), model.route("17 plus 5")[0], pack.materialise("math", name).tobytes(),
            np.asarray(vector[name]).tobytes()]
    time.sleep(1)  # the workers have started: ASan's allocator, unlike glibc's, does not survive a fork while a thread starts
    child = os.fork()
    if child == 0:
        code = 1
        try:
            signal.alarm(60)
            got = [model.generate("17 plus 5", route="math", max_tokens=4), model.route("17 plus 5")[0], pack.materialise("math", name).tobytes(),
                   np.asarray(vector[name]).tobytes()]
            pack.export("math", tmp_path / "child")
            code = 0 if got == want else 2
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    assert len(obm.Checkpoint(tmp_path / "child")) > 10
    assert model.generate("17 plus 5", route="math", max_tokens=4) == want[0]


# ---- streams ----

def test_streams_dropped_half_way(pack_path):
    model = obm.Model(pack_path)
    want = model.generate("17 plus 5", route="math", max_tokens=4)
    for _ in range(20):
        stream = model.stream("17 plus 5", route="math", max_tokens=50, ignore_eos=True)
        next(stream)
        del stream
    stream = model.stream("17 plus 5", route="math", max_tokens=50, ignore_eos=True)
    next(stream)
    with pytest.raises(obm.BusyError):
        model.generate("hello", max_tokens=1)
    del model
    assert isinstance(next(stream), str)   # the stream keeps its model
    stream.close()
    assert obm.Model(pack_path).generate("17 plus 5", route="math", max_tokens=4) == want


def test_busy_in_another_thread(models):
    model = obm.Model(models / "base")
    inside, seen = threading.Event(), []

    def watch(what, done, total):
        inside.set()

    worker = threading.Thread(target=lambda: model.generate(["hello"] * 40, max_tokens=60, ignore_eos=True, progress=watch))
    worker.start()
    assert inside.wait(60)
    for call in (lambda: model.logits([1, 2]), lambda: model.generate("a", max_tokens=1), lambda: model.score("a", "b"), lambda: model.embed(["a"])):
        try:
            call()
        except obm.BusyError as e:
            seen.append(e)
    worker.join()
    assert seen
    assert model.logits([1, 2]).shape[0] == 2


# ---- what callbacks raise ----

def raiser(value):
    def callback(*args):
        raise value
    return callback


@pytest.mark.parametrize("value", [Stop("mine"), KeyboardInterrupt(), SystemExit(5), MemoryError("mine"), obm.BusyError("mine")],
                         ids=lambda v: type(v).__name__)
def test_what_callbacks_raise_comes_back(own_pack, models, experts, data, tmp_path, value):
    """The very object, from each call; and everything works afterwards."""
    path, pack, stop = tmp_path / "own.pack", own_pack, raiser(value)
    model = obm.Model(path)
    vector = obm.TaskVector(models / "base", models / "math")
    texts, labels = [i["messages"] for i in data.router], [i["task"] for i in data.router]
    recipe = {"merge_method": "linear", "models": [{"model": str(models / m), "parameters": {"weight": 1}} for m in ("chat", "math")]}
    calls = [
        lambda: model.generate("hello", progress=stop, max_tokens=400, ignore_eos=True),
        lambda: model.generate(["hello", "a"], router=stop, max_tokens=2),
        lambda: model.stream("hello", router=stop, max_tokens=2),
        lambda: list(model.stream("hello", route="chat", progress=stop, max_tokens=400, ignore_eos=True)),
        lambda: model.route("hello", router=stop),
        lambda: model.embed(["hello"], progress=stop),
        lambda: model.score_items([("a", "b", "math")], progress=stop),
        lambda: pack.verify(progress=stop),
        lambda: pack.export("math", tmp_path / "dense", progress=stop),
        lambda: pack.add("extra", models / "code", progress=stop),
        lambda: pack.train_router(texts, labels, progress=stop),
        lambda: obm.compress(models / "base", experts, tmp_path / "p", progress=stop),
        lambda: obm.merge(recipe, tmp_path / "merged", progress=stop),
        lambda: vector.stats(progress=stop),
        lambda: vector.compare(vector, progress=stop),
    ]
    before = (path / "pack.json").read_bytes()
    for i, call in enumerate(calls):
        with pytest.raises(type(value)) as raised:
            call()
        assert raised.value is value, i
    assert (path / "pack.json").read_bytes() == before
    assert not list(tmp_path.glob("dense*")) and not (tmp_path / "p").exists() and not list(tmp_path.glob("merged*"))
    assert model.generate("hello", route="chat", max_tokens=2)
    pack.verify()


# ---- Ctrl-C ----

@pytest.fixture
def interrupted():
    """Calls for ever, sends SIGINT in the middle; KeyboardInterrupt comes soon (the bound is for a machine that is busy)."""
    def run(call):
        sent = []

        def send():
            sent.append(time.monotonic())
            os.kill(os.getpid(), signal.SIGINT)

        timer = threading.Timer(.2, send)
        timer.start()
        try:
            with pytest.raises(KeyboardInterrupt):
                while True:
                    call()
            assert time.monotonic() - sent[0] < 15
        finally:
            timer.cancel()
            timer.join()
    return run


def test_ctrl_c_in_other_long_calls(interrupted, own_pack, models, tmp_path):
    path, pack, vector = tmp_path / "own.pack", own_pack, obm.TaskVector(models / "base", models / "math")
    model = obm.Model(path)
    other = obm.TaskVector(models / "base", models / "code")
    ids = list(range(5, 300))
    interrupted(lambda: model.logits(ids, route={"math": .5, "code": .5}))
    interrupted(lambda: model.hidden(ids, 4))
    interrupted(lambda: pack.export("math", tmp_path / "dense", overwrite=True))
    interrupted(lambda: vector.compare(other))
    interrupted(lambda: model.route("17 plus 5"))
    interrupted(lambda: obm.Model(path))
    interrupted(lambda: obm.Checkpoint(models / "base"))
    assert not [f for f in tmp_path.rglob("*") if ".tmp-" in f.name]
    pack.export("math", tmp_path / "dense", overwrite=True)
    assert model.logits(ids, route="math").shape[0] == len(ids)
    pack.verify()
