"""Ctrl-C in every long call, what is left of the objects afterwards, threads, and fork."""

import math
import os
import signal
import threading
import time
from collections import deque
from functools import partial
from itertools import repeat, starmap

import numpy as np
import pytest

import onebitmerge as obm
import plain


@pytest.fixture
def interrupted():
    """Runs a long call, sends SIGINT to this process while it runs, expects KeyboardInterrupt soon (the bound is for a busy machine)."""
    def run(call, after=.15):
        sent = []

        def send():
            sent.append(time.monotonic())
            os.kill(os.getpid(), signal.SIGINT)

        timer = threading.Timer(after, send)
        timer.start()
        try:
            with pytest.raises(KeyboardInterrupt):
                call()
                assert not sent, "the call ended although it was interrupted"
                pytest.fail("the call was over before it could be interrupted")
            assert time.monotonic() - sent[0] < 15
        finally:
            timer.cancel()
            timer.join()
    return run


def test_generate(interrupted, models):
    m = obm.Model(models / "math")
    want = m.generate("hello", chat=True, max_tokens=8)
    interrupted(lambda: m.generate(["hello"] * 4000, max_tokens=200, ignore_eos=True))
    assert m.generate("hello", chat=True, max_tokens=8) == want


def test_one_long_generation(interrupted, models):
    m = obm.Model(models / "math")

    def forever():
        while True:
            m.generate("hello", max_tokens=480, ignore_eos=True)

    interrupted(forever)
    assert m.logits([1]).shape == (1, 768)


def test_stream(interrupted, models):
    m = obm.Model(models / "math")

    def forever():
        while True:
            for _ in m.stream("hello", max_tokens=480, ignore_eos=True):
                pass

    interrupted(forever)
    assert m.generate("hello", max_tokens=2).finish_reason


def test_score_and_embed(interrupted, models):
    m = obm.Model(models / "math")
    text = "Uma has 17 books, buys 12 and loses 4. " * 10
    interrupted(lambda: m.score_items([(text, "5", None)] * 5000))
    interrupted(lambda: m.embed([text] * 20000, layer=4))
    assert np.isfinite(m.score(text, "5").logprob)


def test_train_router(interrupted, models, experts, tmp_path, data):
    pack = obm.compress(models / "base", experts, tmp_path / "p")
    texts, labels = [i["messages"] for i in data.router], [i["task"] for i in data.router]
    before = (tmp_path / "p" / "pack.json").read_bytes()
    interrupted(lambda: pack.train_router(texts * 40, labels * 40, layer=4))
    assert (tmp_path / "p" / "pack.json").read_bytes() == before
    assert [f.name for f in (tmp_path / "p").glob("router-*")] == []
    assert pack.train_router(texts, labels).accuracy > 0.9


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A base and an expert of 48 MB each."""
    folder = tmp_path_factory.mktemp("large")
    x = np.random.default_rng(0).standard_normal((1024, 1024)).astype(np.float32)
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(24)]
    return (plain.write_folder(folder / "base", {n: x for n in names}, "BF16"), plain.write_folder(folder / "expert", {n: x + .01 for n in names}, "BF16"))


def test_compress(interrupted, large, tmp_path):
    base, expert = large

    def forever():
        while True:
            obm.compress(base, {"a": obm.Expert(expert, planes=8), "b": obm.Expert(expert, planes=8)}, tmp_path / "p", overwrite=True)

    obm.compress(base, {"a": expert}, tmp_path / "p")
    interrupted(forever)
    obm.Pack(tmp_path / "p").verify()   # the old pack or a new one, whole


def test_merge(interrupted, large, tmp_path):
    base, expert = large
    recipe = {"merge_method": "dare_ties", "base_model": str(base), "models": [{"model": str(expert), "parameters": {"weight": .5, "density": .5}}]}

    def forever():
        while True:
            obm.merge(recipe, tmp_path / "out", overwrite=True)

    interrupted(forever)
    assert not list(tmp_path.glob("out/*tmp*"))
    obm.merge(recipe, tmp_path / "out", overwrite=True)
    assert len(obm.Checkpoint(tmp_path / "out")) == 24


def test_verify_and_stats(interrupted, large, tmp_path):
    base, expert = large
    pack = obm.compress(base, {"a": expert}, tmp_path / "p")
    vector = obm.TaskVector(base, expert)

    def forever(call):
        while True:
            call()

    interrupted(lambda: forever(pack.verify))
    interrupted(lambda: forever(vector.stats))
    pack.verify()


def test_calls_without_a_progress_callback(models, tmp_path):
    """They look at signals too: the handler runs while they work, not once they are over."""
    name, rng = "model.layers.0.mlp.up_proj.weight", np.random.default_rng(0)
    x = rng.standard_normal((2048, 2048)).astype(np.float32)
    base = obm.Checkpoint(plain.write_folder(tmp_path / "base", {name: np.vstack([x] * 2)}, "BF16"))
    vector = obm.TaskVector(base, plain.write_folder(tmp_path / "expert", {name: np.vstack([x + .01] * 2)}, "BF16"))
    full = obm.Expert(tmp_path / "expert", policy="full")
    pack = obm.compress(tmp_path / "base", {"a": full, "b": tmp_path / "expert"}, tmp_path / "p")
    model, ids = obm.Model(models / "base"), list(range(480))
    calls = {"read": partial(vector.__getitem__, name), "sha256": partial(base.sha256, name),
             "materialise": partial(pack.materialise, {"a": .5, "b": .5}, name),
             "merge_tensors": partial(obm.merge_tensors, "ties", [x, x], base=x, params={"density": .3, "weight": 1}),
             "logits": partial(model.logits, ids, decode=True)}
    late = {}
    try:
        for what, call in calls.items():
            def stop(*_):
                late[what] = time.monotonic() - due
                raise KeyboardInterrupt
            signal.signal(signal.SIGALRM, stop)
            call()
            begin = time.monotonic()
            call()
            took = time.monotonic() - begin
            # 40 s or 4 calls with no Python code in between, where the interpreter would see the signal in the calls' stead.
            calls_in_c = starmap(call, repeat((), max(4, math.ceil(40 / took))))
            due = time.monotonic() + .02
            signal.setitimer(signal.ITIMER_REAL, .02)
            with pytest.raises(KeyboardInterrupt):
                deque(calls_in_c, maxlen=0)
            assert late[what] < max(10, took / 2), (what, late, took)   # for a busy machine; the bound proper is test_stop.c's
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
    assert np.isfinite(model.logits([1])).all()


def test_opening_a_model(own_pack, models):
    seen = []
    obm.Model(own_pack, progress=lambda *a: seen.append(a))
    assert seen[-1][0] == "open" and seen[-1][1] == seen[-1][2] > 1
    with pytest.raises(ZeroDivisionError):
        obm.Model(own_pack, progress=lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        obm.Model(models / "base", progress=lambda *_: 1 / 0)
    with pytest.raises(TypeError, match="progress must be"):
        obm.Model(own_pack, progress=3)
    own_pack.remove("code")   # nothing of the failed ones holds the pack


def test_the_lock_is_released(models):
    """Another thread's Python code runs while a model generates."""
    m = obm.Model(models / "base")
    ticks, stop = [], threading.Event()

    def tick():
        while not stop.is_set():
            ticks.append(time.monotonic())
            time.sleep(.002)

    thread = threading.Thread(target=tick)
    thread.start()
    begin = time.monotonic()
    m.generate(["hello"] * 64, max_tokens=100, ignore_eos=True)
    took = time.monotonic() - begin
    stop.set()
    thread.join()
    assert sum(begin <= t <= begin + took for t in ticks) > 5


def test_models_in_many_threads(models, experts):
    """One model each, one context for all: results are those of one thread."""
    want = {task: obm.Model(path).generate("hello", chat=True, max_tokens=16) for task, path in experts.items()}
    got = {}

    def work(task):
        m = obm.Model(experts[task])
        got[task] = [m.generate("hello", chat=True, max_tokens=16) for _ in range(4)]

    threads = [threading.Thread(target=work, args=(task,)) for task in experts]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert got == {task: [text] * 4 for task, text in want.items()}


def test_shared_packs_in_many_threads(pack):
    name = "model.layers.0.mlp.up_proj.weight"
    want = pack.materialise("math", name)
    wrong = []

    def work():
        for _ in range(5):
            if not np.array_equal(pack.materialise("math", name), want):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_a_pack_does_not_change_under_a_model_that_runs(own_pack):
    m, running, stop, ended = obm.Model(own_pack), threading.Event(), threading.Event(), []

    def watch(*_):
        running.set()
        if stop.is_set():
            raise StopIteration

    def run():
        with pytest.raises(StopIteration):
            m.generate(["hello"] * 400, route=["chat", "math", "code", {"chat": .5, "math": .5}] * 100, max_tokens=400, ignore_eos=True,
                       progress=watch)
        ended.append(1)

    thread = threading.Thread(target=run)
    thread.start()
    assert running.wait(20)
    for change in (lambda: own_pack.remove("code"), lambda: own_pack.set(lambda_=.5)):
        with pytest.raises(obm.BusyError, match="in use"):
            change()
    stop.set()
    thread.join()
    assert ended and own_pack.tasks == ["chat", "math", "code"]
    own_pack.remove("code")
    with pytest.raises(obm.ArgumentError, match="open it again"):
        m.generate("hello", route="chat")


def test_what_another_thread_does_to_a_stream(models):
    m = obm.Model(models / "base")
    inside, seen = threading.Event(), []

    def watch(what, done, total):
        inside.set()

    stream = m.stream("hello", max_tokens=400, ignore_eos=True, progress=watch)

    def meddle():
        inside.wait(20)
        for _ in range(200):
            for use in (lambda: stream.result, lambda: next(stream, None)):
                try:
                    use()
                except Exception as e:
                    seen.append(e)

    thread = threading.Thread(target=meddle)
    thread.start()
    try:
        for _ in stream:
            pass
    except obm.BusyError as e:
        seen.append(e)
    thread.join()
    assert {type(e) for e in seen} <= {obm.BusyError}, seen
    stream.close()
    assert m.generate("hello", max_tokens=2)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_fork(models):
    """The workers stay in the parent; a child works nevertheless, with objects from before the fork and new ones."""
    m = obm.Model(models / "base")
    want = m.logits([5, 6, 7])
    read, write = os.pipe()
    time.sleep(1)  # the workers have started: ASan's allocator, unlike glibc's, does not survive a fork while a thread starts
    child = os.fork()
    if child == 0:
        answer = b"x"
        try:
            signal.alarm(20)
            same = np.array_equal(m.logits([5, 6, 7]), want) and np.array_equal(obm.Model(models / "base").logits([5, 6, 7]), want)
            answer = b"1" if same and m.generate("hello", max_tokens=4) is not None else b"0"
        finally:
            os.write(write, answer)
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        assert pipe.read() == b"1"
    assert os.waitpid(child, 0)[1] == 0
    assert np.array_equal(m.logits([5, 6, 7]), want)


def test_progress_bars_are_tqdms(models, experts, tmp_path, capfd):
    obm.compress(models / "base", experts, tmp_path / "p", progress=True)
    assert "compress" in capfd.readouterr().err
