"""Merge settings and compression of a pack, chosen on validation data.

Every candidate is measured as `evaluate` measures, in a folder beside the pack, whose files it links.  The pack itself changes once,
at the end and in one step, or not at all.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import json
import math
import os
import re
from typing import TYPE_CHECKING, Any, Mapping, Sequence

from . import _calls, _results   # what is slow to import waits for tune(): the command line starts without it
from . import items as lines
from ._core import ArgumentError, Checkpoint, MismatchError, Model, NotFoundError, Pack, UnsupportedError
from ._records import Expert
from .evaluate import LAMBDAS, READINGS, evaluate, kind_of

if TYPE_CHECKING:
    from fractions import Fraction

AS_IT_IS = (None, None)


@dataclasses.dataclass
class Candidate:
    """What is tried: settings, and how the experts are compressed (None: as they are in the pack)."""
    lambda_: float
    reading: str
    policy: str | None
    scale: str | None
    bytes: int = 0   # of the experts; of a dry run at most, where they would be compressed anew
    rows: list[dict] = dataclasses.field(default_factory=list)   # evaluate's, one per task
    chosen: bool = False

    def exact_mean(self) -> Fraction:
        """Over tasks.  Equal shares are equal here, which sums of rounded ones need not be."""
        from fractions import Fraction
        return sum(Fraction(round(r["value"] * r["n"]), r["n"]) for r in self.rows) / len(self.rows)

    def keys(self) -> dict[str, Any]:
        return {"lambda": self.lambda_, "reading": self.reading, "policy": self.policy, "scale": self.scale, "bytes": self.bytes}

    def records(self) -> list[dict[str, Any]]:
        return [{**row, **self.keys(), "mean": float(self.exact_mean()), "chosen": self.chosen} for row in self.rows]


@dataclasses.dataclass(repr=False)
class Tuning:
    """What tune found; choice is the candidate that the pack has now."""
    candidates: list[Candidate]
    choice: Candidate | None   # None: of a dry run

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One per candidate and task: evaluate's keys, and lambda, reading, policy, scale, bytes, mean, chosen."""
        return [record for c in self.candidates for record in c.records()]

    def __repr__(self):
        return table(self.candidates) + (f"\n{RULE}" if self.choice else "\nnothing was run or written")


RULE = ("* the best mean over tasks (of equals the smaller lambda, then the smaller pack). Its figures are optimistic: they are on the data it "
        "was chosen on. lambda 0 is routing alone.")


def table(candidates):
    """One line per candidate; tasks as columns once they are measured."""
    tasks = [f"{r['task']} (n {r['n']}), 95 % interval" for r in candidates[0].rows]
    rows = []
    for c in candidates:
        cells = [f"{_results.percent(r['value'])}  {_results.percent(r['low'])} .. {_results.percent(r['high'])}" for r in c.rows]
        rows.append(["*" if c.chosen else "", f"{c.lambda_:g}", c.reading, c.policy or "as it is", c.scale or "as it is",
                      f"{'' if c.rows or (c.policy, c.scale) == AS_IT_IS else 'at most '}{_results.size(c.bytes)}", *cells, *([_results.percent(float(c.exact_mean()))] if c.rows else [])])
    return _results.table(["", "lambda", "reading", "policy", "scale", "experts", *tasks, *(["mean"] if tasks else [])], rows)


# ---- what is tried ----


def several(given):
    """One value will do for a list of one."""
    return [given] if isinstance(given, (str, int, float)) else given


def grid(pack, lambdas, readings):
    """(lambda, reading) pairs.  Where lambda is 0, and with one expert, there is nothing to read or to scale."""
    here = pack.settings["reading"]
    for x in lambdas:
        if not (isinstance(x, (int, float)) and math.isfinite(x) and x >= 0):
            raise ArgumentError(f"lambdas: expected numbers of 0 or more, found {x!r}")
    for r in readings or ():
        if r not in READINGS:
            raise ArgumentError(f"readings: expected {' or '.join(READINGS)}, found {r!r}")
    if not readings:   # of two experts the recomputed remainder is the other expert's own task vector
        readings = sorted(READINGS, key=lambda r: r != here) if len(pack.tasks) > 2 else [here]
    others = sorted({float(x) for x in lambdas if x > 0}) if len(pack.tasks) > 1 else []
    return [(0.0, here)] + [(x, r) for x in others for r in dict.fromkeys(readings)]


def policy_parts(text):
    """"linear, scale row, planes 1, map GLOB=MODE ..." as the arguments of an Expert."""
    found = re.fullmatch(r"([^,]+), scale ([^,]+), planes (\d+)(?:, map (.+))?", text, re.DOTALL)
    if found:
        policy, scale, planes, rules = found.groups()
        # A glob may hold spaces and equals signs: a rule ends where a mode does.
        rules = re.findall(r"(.+?)=(1bit|full|drop|mask)(?: |\Z)", rules or "", re.DOTALL)
        again = f"{policy}, scale {scale}, planes {planes}" + (", map " if rules else "") + " ".join(f"{glob}={mode}" for glob, mode in rules)
        if again == text and len(dict(rules)) == len(rules):
            return {"policy": policy, "scale": scale, "planes": int(planes), "map": dict(rules) or None}
    raise UnsupportedError(f"its policy reads \"{text}\", which does not say how to compress it anew")


def records(folder):
    """{task: its record} of a pack's manifest."""
    with open(os.path.join(folder, "pack.json"), encoding="utf-8") as file:
        return {record["name"]: record for record in json.load(file)["experts"]}


def check_there(task, path):
    """A name of the hub is there once it is in the cache."""
    anew = f"expert {task}: to compress it anew its checkpoint is needed, and"
    if not path:
        raise FileNotFoundError(f"{anew} the pack does not say where it is; name it (--expert {task}=FOLDER)")
    try:
        Checkpoint(path)
    except FileNotFoundError as e:
        raise FileNotFoundError(f"{anew} {path} is not there; name it (--expert {task}=FOLDER): {e}") from None


def sources(pack, given):
    """{task: folder}: the given ones, else those that the pack was made of."""
    given = {name: os.fspath(path) for name, path in (given or {}).items()}
    for name in given:
        if name not in pack.tasks:
            raise NotFoundError(f"pack {pack.path} has no expert {name} (it has {', '.join(pack.tasks)})")
    recorded, found = records(pack.path), {}
    for task in pack.tasks:
        found[task] = given.get(task) or recorded[task].get("source")
        check_there(task, found[task])
    return found


def essence(record):
    """What an expert's record says of its content: all but what is for people."""
    tensors = {name: {key: value for key, value in tensor.items() if key != "adapter_bytes"} for name, tensor in record["tensors"].items()}
    return {**{key: value for key, value in record.items() if key != "source"}, "tensors": tensors}


def check_sources(pack, folders, room, progress):
    """A path is only what somebody once typed, seen from another folder perhaps, and what lies there may have changed since: compressed
    as the pack has it, it has to come out as the pack has it, to the bit."""
    import shutil
    from ._api import compress
    again = os.path.join(room, "as-it-is")
    compress(pack.base, experts_of(pack, folders, *AS_IT_IS), again, progress=progress)
    expected, found = records(pack.path), records(again)
    shutil.rmtree(again)
    for task in pack.tasks:
        if essence(found[task]) != essence(expected[task]):
            raise MismatchError(f"expert {task}: {folders[task]} is not the checkpoint that pack {pack.path} was made of (compressed with the same "
                                f"settings, {pack.policy(task)}, it comes out otherwise); name the right one (--expert {task}=FOLDER)")


def experts_of(pack, folders, policy, scale):
    """What is not varied stays as each expert has it."""
    out = {}
    for task in pack.tasks:
        try:
            parts = policy_parts(pack.policy(task))
        except UnsupportedError as e:
            raise UnsupportedError(f"expert {task}: {e}") from None
        parts.update({key: value for key, value in (("policy", policy), ("scale", scale)) if value})
        out[task] = Expert(folders[task], **parts)
    return out


def pack_bytes(pack):
    """Of the experts, and of the vector that they share."""
    return sum(b["bytes_pack"] for task in pack.tasks for b in pack.bytes(task).values()) + (pack.shared or {"bytes": 0})["bytes"]


def with_routes(pack, items, route):
    """The items with what they run on: the router's answer, or their own task."""
    if route not in ("auto", "task"):
        raise ArgumentError(f"route: expected auto or task, found {route!r}")
    if route == "auto":
        if any("route" not in item for item in items):
            try:
                pack.router_report()
            except NotFoundError:
                raise NotFoundError(f"pack {pack.path} has no router: `onebitmerge router train PACK --data FILE` trains one (train_router in Python), "
                                "or take each item's own task (--route task)") from None
        return items
    routed = []
    for i, item in enumerate(items):
        if "route" not in item and item.get("task") not in pack.tasks:
            lines.wrong(item, i, f"task: expected one of {', '.join(pack.tasks)} to be its route, found {json.dumps(item.get('task'))}")
        routed.append(copy.copy(item))   # with where it is
        routed[-1].setdefault("route", item.get("task"))
    return routed


# ---- trying ----


def linked(pack, folder):
    """A pack of its own whose files are the pack's: no change of the one is a change of the other."""
    import shutil
    os.mkdir(folder)
    for name in os.listdir(pack.path):
        source, target = os.path.join(pack.path, name), os.path.join(folder, name)
        if not os.path.isfile(source):
            continue
        try:
            if name == "pack.json":
                raise OSError   # small, and there must be no doubt
            os.link(source, target)
        except OSError:
            shutil.copyfile(source, target)
    return folder


def measure(pack, folder, candidate, items, route, options, run):
    scratch = Pack(folder, base=pack.base.path)
    scratch.set(lambda_=candidate.lambda_, reading=candidate.reading)
    candidate.bytes = pack_bytes(scratch)
    del scratch
    model = Model(folder, base=pack.base.path, progress=options["progress"], **run)
    candidate.rows = evaluate(model, items, [None], **options)
    for row in candidate.rows:
        row["route"] = route


def rank(candidate):
    return candidate.exact_mean(), -candidate.lambda_, -candidate.bytes


def try_all(pack, variants, candidates, folders, room, items, route, options, run):
    """The best candidate and its folder; the others' folders are gone by then."""
    import shutil
    from ._api import compress
    best, best_folder = None, None
    for number, variant in enumerate(variants):
        folder = linked(pack, os.path.join(room, f"pack-{number}"))
        if variant != AS_IT_IS:
            fresh = os.path.join(room, f"experts-{number}")
            compress(pack.base, experts_of(pack, folders, *variant), fresh, progress=options["progress"])
            settings = pack.settings
            other = Pack(folder, base=pack.base.path)
            other.adopt(fresh)
            other.set(profile=settings["profile"], density=settings["density"])
            del other
            shutil.rmtree(fresh)
        for candidate in (c for c in candidates if (c.policy, c.scale) == variant):
            measure(pack, folder, candidate, items, route, options, run)
            if best is None or rank(candidate) > rank(best):
                if best_folder not in (None, folder):
                    shutil.rmtree(best_folder)
                best, best_folder = candidate, folder
        if best_folder != folder:
            shutil.rmtree(folder)
    return best, best_folder


def store(pack, choice, folder):
    """One commit: settings alone, or experts and settings together."""
    if (choice.policy, choice.scale) == AS_IT_IS:
        pack.set(lambda_=choice.lambda_, reading=choice.reading)
        return
    winner = Pack(folder, base=pack.base.path)
    winner.set(lambda_=choice.lambda_, reading=choice.reading)
    pack.adopt(folder)


def estimate(pack, candidates, folders):
    """Bytes of the experts as a dry run of compressing them has them: what turns out equal to the base's takes none in the end."""
    from ._api import compress
    sizes = {AS_IT_IS: pack_bytes(pack)}
    for c in candidates:
        variant = (c.policy, c.scale)
        if variant not in sizes:
            sizes[variant] = compress(pack.base, experts_of(pack, folders, *variant), pack.path, dry_run=True, overwrite=True)["bytes_written"]
        c.bytes = sizes[variant]


@_calls.keywords
def tune(pack: Any, data: Any, *, lambdas: float | Sequence[float] = LAMBDAS, readings: str | Sequence[str] | None = None,
         policies: str | Sequence[str] = (), scales: str | Sequence[str] = (), experts: Mapping[str, Any] | None = None, base: Any = None,
         route: str = "auto", max_tokens: int = 0, chat: bool = False, batch: int = 0, stop: Any = None, template: str | None = None,
         materialise: bool = False, z12: bool | str = "auto", dry_run: bool = False, progress: Any = None,
         prefill: str = "f32") -> Tuning:
    """Choose lambda, reading, policy and scale on validation data, and store the choice in the pack.

    pack: a Pack, or its path (base then says where the base lies).  data: items as evaluate takes them (prompt|messages, answer or
    choices, correct; task), or the path of JSON lines of them.  Candidates are lambdas (0, routing alone, always among them) times readings (default: both with
    more than two experts), on the pack as it is and, with policies or scales, on the experts compressed anew in each combination, from
    the checkpoints that the pack names or that experts, {name: folder}, does; one that does not give what the pack has, compressed
    as the pack has it, is refused (MismatchError; a dry run does not look).  route: "auto" (the router) or "task" (each item's own).
    The best mean over tasks is chosen; of equals the smaller lambda, then the smaller pack.  The router stays.  dry_run: candidates
    and bytes, nothing runs.  An interrupted call leaves the pack as it was.
    """
    import shutil
    import tempfile
    items = lines.read_lines(os.fspath(data)) if isinstance(data, (str, os.PathLike)) else list(data)
    lambdas, readings, policies, scales = map(several, (lambdas, readings, policies, scales))
    for i, item in enumerate(items):
        kind_of(item, i)
    if not items:
        raise ArgumentError("no items")
    if not isinstance(pack, Pack):
        pack = Pack(pack, base=base)
    with contextlib.suppress(ArgumentError):
        pack.set(lambda_=-1)   # changes nothing; a pack that an open model holds is BUSY here already, not after all the work
    items = with_routes(pack, items, route)
    variants = [AS_IT_IS] + [v for v in itertools.product(dict.fromkeys(policies or [None]), dict.fromkeys(scales or [None])) if v != AS_IT_IS]
    if pack.shared and len(variants) > 1:
        raise UnsupportedError(f"pack {pack.path} shares one vector among its experts: policies and scales are for planes")
    folders = sources(pack, experts) if len(variants) > 1 or experts else {}
    candidates = [Candidate(x, reading, *variant) for variant in variants for x, reading in grid(pack, lambdas, readings)]
    estimate(pack, candidates, folders)   # and what is wrong with a policy or a folder comes to light
    if dry_run:
        return Tuning(candidates, None)
    options = {"max_tokens": max_tokens, "chat": chat, "batch": batch, "stop": stop, "template": template, "progress": progress}
    path = os.path.abspath(pack.path)
    room = tempfile.mkdtemp(prefix=f"{os.path.basename(path)}.tune-", dir=os.path.dirname(path))
    try:
        if len(variants) > 1:
            check_sources(pack, folders, room, progress)
        choice, folder = try_all(pack, variants, candidates, folders, room, items, route, options, {"materialise": materialise, "z12": z12, "prefill": prefill})
        store(pack, choice, folder)
        choice.chosen = True
    finally:
        shutil.rmtree(room, ignore_errors=True)
    return Tuning(candidates, choice)
