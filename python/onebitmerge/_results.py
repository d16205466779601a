"""What calls return, and how it looks in a terminal and in a notebook.  No arithmetic on tensors here: that is the core's."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Mapping

TYPE_CHECKING = False   # typing's own; as slow to import as dataclasses and html, which wait for their use: the command line starts here
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any


class Completion(str):
    """Generated text, with what made it.

    route: {task: weight}, or None for a plain model; ids: the generated ids; finish_reason: "stop" or "length";
    prompt_tokens: how many ids the prompt had.  With route_every, route is the last one and routes has all that were taken:
    (how many tokens were generated before it took over, route); else routes is None.
    """

    route: dict[str, float] | None
    ids: list[int]
    finish_reason: str
    prompt_tokens: int
    routes: list[tuple[int, dict[str, float]]] | None

    @classmethod
    def make(cls, text, ids, route, finish_reason, prompt_tokens, routes=None):
        self = cls(text)
        self.ids, self.route, self.finish_reason, self.prompt_tokens, self.routes = ids, route, finish_reason, prompt_tokens, routes
        return self


def experts(given: Mapping[str, Any]) -> list[tuple]:
    """{name: path | (path, policy) | Expert} -> the tuples that the core takes."""
    from ._records import Expert
    if not isinstance(given, Mapping):
        raise TypeError("experts is a dict of names to a path, (path, policy) or Expert")
    out = []
    for name, value in given.items():
        if isinstance(value, tuple):
            value = Expert(*value)
        elif not isinstance(value, Expert):
            value = Expert(value)
        out.append((name, value.path, value.policy, value.scale, value.planes, None if value.map is None else dict(value.map)))
    return out


def table(head: Sequence[str], rows: Sequence[Sequence[Any]], left: Sequence[int] = (0,)) -> str:
    """Plain text; the columns in `left` to the left, numbers and the like to the right."""
    cells = [[str(c) for c in row] for row in [head, *rows]]
    width = [max(len(row[i]) for row in cells) for i in range(len(head))]
    return "\n".join("  ".join(c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(row, width))).rstrip() for row in cells)


def percent(value):
    return "-" if value is None or not math.isfinite(value) else f"{100 * value:.2f} %"


def size(n: float) -> str:
    """Bytes for people: decimal units, as disks are sold."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if n < 1000 or unit == "TB":
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.2f} {unit}"
        n /= 1000
    raise AssertionError


def pack_rows(pack) -> list[list[str]]:
    rows = []
    for task in pack.tasks:
        modes: dict[str, set[str]] = {}
        for t in pack.tensors(task):
            modes.setdefault(t["class"], set()).add(t["mode"])
        for cls, b in pack.bytes(task).items():
            rows.append([task, cls, b["tensors"], " ".join(sorted(modes.get(cls, ()))), size(b["bytes_expert"]), size(b["bytes_pack"])])
    return rows


def pack_ratios(pack) -> dict[str, float]:
    """The two storage ratios; both are bytes over bytes, and neither means anything without its label.  Shared vectors count."""
    packed = sum(b["bytes_pack"] for t in pack.tasks for b in pack.bytes(t).values()) + (pack.shared or {"bytes": 0})["bytes"]
    full = sum(b["bytes_expert"] for t in pack.tasks for b in pack.bytes(t).values())
    base = pack.base_bytes
    return {"pack / K full experts": packed / full if full else float("nan"),
            "(base + pack) / (base + K full deltas)": (base + packed) / (base + full) if base + full else float("nan")}


def shared_lines(pack) -> list[str]:
    s = pack.shared
    if not s:
        return []
    method = f"{s['method']}, lambda {s['lambda']:g}" if s["lambda"] else s["method"]
    return [f"shared by the masks of all experts ({method}): {s['tensors']} tensors, {size(s['bytes'])}"]


def pack_repr(pack) -> str:
    lines = [f"Pack(\"{pack.path}\")", table(["expert", "class", "tensors", "stored", "expert bytes", "pack bytes"], pack_rows(pack))]
    lines += shared_lines(pack)
    for task in pack.tasks:
        if factors := sum(b["bytes_adapter"] for b in pack.bytes(task).values()):
            lines.append(f"{task} was made from LoRA factors of {size(factors)}")
    lines += [f"{task} brings its own {pack.text(task)}" for task in pack.tasks if pack.text(task)]
    lines += [f"{label}: {value:.4f}" for label, value in pack_ratios(pack).items()]
    s = pack.settings
    lines.append(f"lambda {s['lambda']:g}, reading {s['reading']}, profile {s['profile']}, density {s['density']:g}")
    return "\n".join(lines)


def run_rows(pack) -> list[dict[str, Any]]:
    """By class: tensors that hard routes run as overlays, on planes or as the base's, and the most masks that one of them takes."""
    by_class: dict[str, dict[str, Any]] = {}
    for r in pack.runs():
        row = by_class.setdefault(r["class"], {"class": r["class"], "base": 0, "planes": 0, "overlay": 0, "hard_masks": 0, "soft_masks": 0})
        row[r["hard"]] += 1
        for key in ("hard_masks", "soft_masks"):
            row[key] = max(row[key], r[key])
    return list(by_class.values())


def run_table(pack) -> str:
    return table(["running", "base's own", "on planes", "overlays", "masks, hard route", "masks, all tasks mixed"],
                 [list(row.values()) for row in run_rows(pack)])


def pack_html(pack) -> str:
    import html
    cells = "".join("<tr>" + "".join(f"<td>{html.escape(str(c))}</td>" for c in row) + "</tr>" for row in pack_rows(pack))
    ratios = "; ".join(shared_lines(pack) + [f"{html.escape(label)}: {value:.4f}" for label, value in pack_ratios(pack).items()] +
                       [f"{html.escape(task)} brings its own {pack.text(task)}" for task in pack.tasks if pack.text(task)])
    return ("<table><tr><th>expert</th><th>class</th><th>tensors</th><th>stored</th><th>expert bytes</th><th>pack bytes</th></tr>"
            f"{cells}</table><p>{ratios}</p>")


def render_template(tokenizer, messages, add_generation=True):
    """The model's own Jinja template, or None where jinja2 or the template is missing (the core's built-in ones take over)."""
    source = tokenizer.template
    if source is None:
        return None
    import datetime
    try:
        import jinja2
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        return None

    def raise_exception(message):
        raise jinja2.exceptions.TemplateError(message)

    # As transformers renders: sandboxed, trimmed blocks, loop controls.
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    env.filters["tojson"] = lambda value, **kwargs: json.dumps(value, ensure_ascii=False, **kwargs)   # Jinja's escapes HTML
    return env.from_string(source).render(messages=list(messages), add_generation_prompt=bool(add_generation),
                                          bos_token=tokenizer.bos or "", eos_token=tokenizer.eos or "")


_bars = threading.local()


def progress_bar(what, done, total):
    """What progress=True means: one tqdm bar per thread, made anew when `what` changes or the last one is full."""
    from tqdm.auto import tqdm

    bar = getattr(_bars, "bar", None)
    if bar is None or bar.desc != what or done < bar.n:
        if bar is not None:
            bar.close()
        bar = _bars.bar = tqdm(desc=what, total=total, unit_scale=True, leave=False)
        bar.desc = what
    bar.total = total
    bar.update(done - bar.n)
    if done >= total:
        bar.close()
        _bars.bar = None
