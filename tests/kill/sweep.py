"""Kills every verb that writes, fills its disk, takes away its right to write, and runs it twice at once: what is there
afterwards is the old state or the new one, and the same command succeeds and leaves nothing behind.

    LD_PRELOAD=faults.so python tests/kill/sweep.py [--short] [--seed N] [--only NAME]

Each run is a fork of this process that dies before the n-th change it makes to a file under the destination (faults.c), or at
a random time.  This process itself never starts the library, whose threads a fork would lose.
"""

import argparse
import ctypes
import io
import json
import os
import pathlib
import random
import shutil
import signal
import sys
import tempfile
import time

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
from onebitmerge import cli  # noqa: E402

ROOT = pathlib.Path(__file__).resolve().parents[2]
MODELS = ROOT / "examples" / "models"
faults = ctypes.CDLL(None)
faults.faults_arm.argtypes = [ctypes.c_char_p, ctypes.c_long, ctypes.c_long]
faults.faults_calls.restype = faults.faults_written.restype = ctypes.c_long


class Run:
    """A command in a fork: exit code (negative: the signal), what it said, calls counted, bytes written, seconds."""

    def __init__(self, argv, under="", kill_at=0, disk=-1, kill_after=None, read_only=False, reserve=True, wait=True):
        read, write = os.pipe()
        self.begin = time.monotonic()
        self.pid = pid = os.fork()
        if pid == 0:
            try:
                os.close(read)
                sys.stdout = sys.stderr = said = io.StringIO()
                faults.faults_arm(os.fsencode(str(under)), kill_at, disk)
                if read_only:
                    faults.faults_read_only()
                if not reserve:
                    faults.faults_no_reserve()
                code = argv() if callable(argv) else cli.main([str(a) for a in argv])
                calls, written = faults.faults_calls(), faults.faults_written()
                faults.faults_arm(b"", 0, -1)
                os.write(write, json.dumps([code, said.getvalue()[:2000], calls, written]).encode())
            except BaseException as e:
                os.write(write, json.dumps([99, repr(e), 0, 0]).encode())
            finally:
                os._exit(0)
        os.close(write)
        if kill_after is not None:
            time.sleep(kill_after)
            os.kill(pid, signal.SIGKILL)
        self.read = read
        if wait:
            self.wait()

    def wait(self):
        with os.fdopen(self.read, "rb") as pipe:
            answer = pipe.read()
        _, status = os.waitpid(self.pid, 0)
        self.seconds = time.monotonic() - self.begin
        if os.WIFSIGNALED(status):
            self.code, self.said, self.calls, self.written = -os.WTERMSIG(status), "", 0, 0
        else:
            self.code, self.said, self.calls, self.written = json.loads(answer)


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()} if folder.exists() else {}


def model_of(files):
    """What a reader of a model folder sees: the one file, else each tensor's shard, whatever the shard's name; and all but the card."""
    if "model.safetensors" in files:
        weights = {"": files["model.safetensors"]}
    elif "model.safetensors.index.json" in files:
        shards = json.loads(files["model.safetensors.index.json"])["weight_map"]
        assert set(shards.values()) <= set(files), f"the index names files that are not there: {set(shards.values()) - set(files)}"
        weights = {tensor: files[shard] for tensor, shard in shards.items()}
    else:
        return None
    small = {n for n in files if n.endswith((".json", ".jinja", ".txt")) and not n.startswith(("model.", "onebitmerge-"))}
    return weights, {n: files[n] for n in small}


def pack_of(files):
    if "pack.json" not in files:
        return None
    manifest = json.loads(files["pack.json"])
    names = {e["file"] for e in manifest["experts"]} | ({manifest["router"]["file"]} if manifest["router"] else set())
    assert names <= set(files), f"pack.json names files that are not there: {names - set(files)}"
    return {n: files[n] for n in names | {"pack.json"}}


def adapter_of(files):
    """peft opens a folder by its adapter_config.json."""
    if "adapter_config.json" not in files:
        return None
    assert "adapter_model.safetensors" in files, f"an adapter without weights: {sorted(files)}"
    return files["adapter_config.json"], files["adapter_model.safetensors"]


class Case:
    def __init__(self, name, place, argv, view, old=None, again=None, replaces=False):
        self.name, self.place, self.argv, self.view, self.old = name, place, argv, view, old
        self.again = again or (lambda complete: argv + (["--force"] if complete else []))
        self.replaces = replaces     # a model by another: between the two there may be none

    def prepare(self):
        shutil.rmtree(self.place, ignore_errors=True)
        if self.old:
            shutil.copytree(self.old, self.place)

    def measure(self):
        self.prepare()
        self.before = contents(self.place)
        run = Run(self.argv, self.place)
        assert run.code == 0, f"{self.name}: {run.said}"
        self.after = contents(self.place)
        self.calls, self.written, self.seconds = run.calls, run.written, run.seconds
        assert self.calls > 3 and self.written > 100, f"{self.name}: the faults are not preloaded"

    def check_state(self, what):
        seen = self.view(contents(self.place))
        states = [self.view(self.before), self.view(self.after)] + ([None] if self.replaces else [])
        assert seen in states, f"{what}: neither the old state nor the new one: {sorted(contents(self.place))}"
        if seen is not None and self.view is pack_of:
            run = Run(["pack", "verify", self.place])
            assert run.code == 0, f"{what}: {run.said}"
        return seen == self.view(self.after)

    def check_rerun(self, complete, what):
        argv = self.again(complete)
        run = Run(argv)
        assert run.code == 0, f"{what}: the next run failed: {run.said}"
        files = contents(self.place)
        assert self.view(files) == self.view(self.after) or (complete and self.view is model_of), f"{what}: another result"
        assert len(files) == len(self.after) and not any(".tmp-" in n or "unfinished" in n for n in files), \
            f"{what}: left over: {sorted(set(files) - set(self.after))}"

    def kill(self, **how):
        what = f"{self.name}, killed {how}"
        self.prepare()
        run = Run(self.argv, self.place, **how)
        assert run.code in (0, -signal.SIGKILL), f"{what}: {run.code} {run.said}"
        self.check_rerun(self.check_state(what), what)

    def fill_disk(self, disk, reserve):
        """reserve: blocks for whole files are asked for first; else it is some write that finds none."""
        what = f"{self.name}, disk full after {disk} of {self.written} bytes{'' if reserve else ', on a file system that reserves none'}"
        self.prepare()
        run = Run(self.argv, self.place, disk=disk, reserve=reserve)
        assert run.code == 1 and "No space left on device" in run.said and run.said.count("\n") == 1, f"{what}: {run.code} {run.said}"
        assert contents(self.place) == self.before and self.place.exists() == bool(self.old), \
            f"{what}: not the old state: {sorted(contents(self.place))}"


    def refuse_changes(self):
        what = f"{self.name}, read-only"
        self.prepare()
        run = Run(self.argv, self.place, read_only=True)
        assert run.code == 1 and "Read-only file system" in run.said and run.said.count("\n") == 1, f"{what}: {run.code} {run.said}"
        assert contents(self.place) == self.before and self.place.exists() == bool(self.old), f"{what}: changed"

    def race(self):
        """Two processes at once: one at least succeeds, and the other too, or it says in a line why not."""
        what = f"{self.name}, twice at once"
        self.prepare()
        runs = [Run(self.argv, self.place, wait=False) for _ in range(2)]
        for run in runs:
            run.wait()
        codes = sorted(run.code for run in runs)
        assert codes in ([0, 0], [0, 1]), f"{what}: {codes} {[run.said for run in runs]}"
        for run in runs:
            assert run.code == 0 or run.said.splitlines()[-1].startswith("onebitmerge: "), f"{what}: {run.said}"
        assert self.check_state(what), f"{what}: not the new state"
        files = contents(self.place)
        assert len(files) == len(self.after) and not any(".tmp-" in n or "unfinished" in n for n in files), f"{what}: left over: {sorted(files)}"


def write_inputs(work):
    recipe = {"merge_method": "ties", "base_model": str(MODELS / "base"), "parameters": {"density": 0.5},
              "models": [{"model": str(MODELS / m), "parameters": {"weight": 1}} for m in ("chat", "math")]}
    (work / "recipe.yml").write_text(json.dumps(recipe))
    other = {**recipe, "merge_method": "task_arithmetic", "parameters": {}, "dtype": "float32"}
    (work / "other.yml").write_text(json.dumps(other))
    models = [{"model": str(MODELS / m), "parameters": {"weight": 1}} for m in ("chat", "math")]
    part = {"name": "first", "merge_method": "task_arithmetic", "base_model": str(MODELS / "base"), "models": models}
    last = {"merge_method": "linear", "models": [{"model": "first"}, {"model": str(MODELS / "code")}], "parameters": {"weight": 1}}
    (work / "documents.yml").write_text(json.dumps(part) + "\n---\n" + json.dumps(last))
    sources = [{"sources": [{"model": m["model"], "layer_range": [0, 3]}]} for m in models]
    (work / "slices.yml").write_text(json.dumps({"merge_method": "passthrough", "slices": sources, "tokenizer": {"source": "union", "pad_to_multiple_of": 16}}))
    items = [{"text": t % i, "task": task} for i in range(12)
             for t, task in (("Hello number %d, how are you?", "chat"), ("What is %d plus 5?", "math"))]
    (work / "route.jsonl").write_text("".join(json.dumps(i) + "\n" for i in items))


def make_cases(work):
    place, pack, base = work / "place", work / "old.pack", MODELS / "base"
    write_inputs(work)
    two = [f"{m}={MODELS / m}" for m in ("chat", "math")]
    for argv in (["compress", base, *two, "-o", pack], ["router", "train", pack, "--data", work / "route.jsonl"],
                 ["merge", work / "other.yml", "-o", work / "old.model", "--out-shard-size", "1MB"],
                 ["extract-lora", base, MODELS / "code", "-o", work / "old.lora", "--rank", "3"]):
        run = Run(argv)
        assert run.code == 0, run.said
    merge = ["merge", work / "recipe.yml", "-o", place, "--out-shard-size", "500KB"]
    def merge_of(recipe):
        return ["merge", work / recipe, "-o", place, "--out-shard-size", "500KB"]

    def resumed(recipe):
        return lambda complete: [*merge_of(recipe), "--force" if complete else "--resume"]

    lora = ["extract-lora", base, MODELS / "math", "-o", place, "--rank", "4"]
    export = ["export", pack, "--route", "math", "-o", place]
    settle = ["pack", "set", place, "--lambda", "0.3"]   # what it is already: only the next change after a kill
    add, remove = ["pack", "add", place, f"code={MODELS / 'code'}"], ["pack", "remove", place, "math"]
    put, train = ["pack", "set", place, "--lambda", "0.7"], ["router", "train", place, "--data", work / "route.jsonl", "--layer", "1"]
    cases = [
        Case("compress", place, ["compress", base, *two, "-o", place], pack_of),
        Case("compress --force", place, ["compress", base, *two, "--scale", "matrix", "-o", place, "--force"], pack_of, old=pack),
        Case("compress --shared", place, ["compress", base, *two, "--shared", "emr", "-o", place], pack_of),
        Case("pack add", place, add, pack_of, old=pack, again=lambda complete: settle if complete else add),
        Case("pack remove", place, remove, pack_of, old=pack, again=lambda complete: settle if complete else remove),
        Case("pack set", place, put, pack_of, old=pack, again=lambda complete: put),
        Case("router train", place, train, pack_of, old=pack, again=lambda complete: train),
        Case("merge, resumed", place, merge, model_of, again=lambda complete: [*merge, "--force" if complete else "--resume"]),
        Case("merge, anew", place, merge, model_of),
        Case("merge --force, resumed", place, [*merge, "--force"], model_of, old=work / "old.model", replaces=True,
             again=lambda complete: [*merge, "--force", "--resume"]),
        Case("documents, resumed", place, merge_of("documents.yml"), model_of, again=resumed("documents.yml")),
        Case("slices and vocabulary, resumed", place, merge_of("slices.yml"), model_of, again=resumed("slices.yml")),
        Case("extract-lora", place, lora, adapter_of),
        Case("extract-lora --force", place, [*lora, "--force"], adapter_of, old=work / "old.lora", replaces=True, again=lambda complete: [*lora, "--force"]),
        Case("export", place, export, model_of),
        Case("export --force", place, [*export, "--force"], model_of, old=work / "old.model", replaces=True,
             again=lambda complete: [*export, "--force"]),
    ]
    return cases


def sweep(case, rng, short):
    case.measure()
    # The commit is at the end, where the renames are.
    late = list(range(max(1, case.calls - 40), case.calls + 1))
    early = list(range(1, late[0]))
    moments = rng.sample(late, min(len(late), 2)) if short else late + rng.sample(early, min(len(early), 15))
    timed = 1 if short else 8
    for n in sorted(moments):
        case.kill(kill_at=n)
    for _ in range(timed):
        case.kill(kill_after=rng.uniform(0, case.seconds))
    most = case.written * 9 // 10   # temporary names in a journal hold the pid, so the last bytes vary
    disks = [rng.randrange(most)] if short else [0, most, *(rng.randrange(most) for _ in range(3))]
    for disk in disks:
        for reserve in (True, False):
            case.fill_disk(disk, reserve)
    case.refuse_changes()
    races = 1 if short else 5
    for _ in range(races):
        case.race()
    print(f"{case.name}: {len(moments)} of {case.calls} changes, {timed} moments, {len(disks)} full disks, read-only, {races} races",
          flush=True)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--only", default="", help="cases whose names begin so")
    args = parser.parse_args()
    print(f"seed {args.seed}", flush=True)
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory(prefix="obm-kill-") as folder:
        for case in make_cases(pathlib.Path(folder)):
            if case.name.startswith(args.only):
                sweep(case, rng, args.short)


if __name__ == "__main__":
    main()
