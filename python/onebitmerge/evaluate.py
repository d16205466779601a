"""Accuracy of a model or a pack on JSON-lines items, per task and route, with 95 % intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping

from onebitmerge import items

TYPE_CHECKING = False   # typing's own
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import Any

# What tune tries; here, where the command line finds them without loading it.
LAMBDAS = (0.0, 0.1, 0.3, 0.5, 1.0)
READINGS = ("onto_base", "recomputed")


def wilson(hits: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson score interval of a share (Wilson 1927); unlike the normal one it stays inside 0..1 and works at 0 and n hits."""
    if n == 0:
        return 0.0, 1.0
    p, zz = hits / n, z * z
    centre, half = p + zz / (2 * n), z * math.sqrt(p * (1 - p) / n + zz / (4 * n * n))
    return max(0.0, (centre - half) / (1 + zz / n)), min(1.0, (centre + half) / (1 + zz / n))


def prompt_of(item: dict, index: int = 0) -> Any:
    """What the model is asked: ids, messages, or the text."""
    return items.need(item, index, *items.PROMPT)


def is_right(text: str, item: dict) -> bool:
    """match "exact" (default): the stripped text is the answer, or one of a list; "end": it ends with the answer."""
    answers = item["answer"] if isinstance(item["answer"], list) else [item["answer"]]
    text, match = text.strip(), item.get("match", "exact")
    if match == "exact":
        return any(text == a.strip() for a in answers)
    if match == "end":
        return any(text.endswith(a.strip()) for a in answers)
    raise ValueError(f"unknown match \"{match}\" (known: exact, end)")


def generation_hits(model, members: Sequence[dict], route, **options) -> list[bool]:
    given = {} if model.pack is None else {"route": [item.get("route", route) for item in members]}
    with items.located(members):
        texts = model.generate([prompt_of(item) for item in members], **given, **options)
    return [is_right(text, item) for text, item in zip(texts, members)]


def choice_hits(model, members: Sequence[dict], route, progress=None) -> list[bool]:
    """The choice with the highest log-likelihood counts; every choice of an item runs on the route of its prompt."""
    rows, sources = [], []
    for item in members:
        prompt, r = prompt_of(item), item.get("route", route)
        if model.pack is not None and (r is None or r == "auto"):
            with items.located([item]):
                r = model.route(prompt)[0]
        rows += [(prompt, choice, r) for choice in item["choices"]]
        sources += [item] * len(item["choices"])
    with items.located(sources):
        scores = iter(model.score_items(rows, progress=progress))
    hits = []
    for item in members:
        logprobs = [next(scores).logprob for _ in item["choices"]]
        hits.append(logprobs.index(max(logprobs)) == item["correct"])
    return hits


def kind_of(item: dict, index: int) -> str:
    """Which kind the item is, if it has what that needs."""
    if not isinstance(item, Mapping):
        items.wrong(item, index, f"expected an object, found {items.kind(item)}")
    prompt_of(item, index)
    for key in {"task", "match"} & set(item):
        items.need(item, index, key)
    if "choices" not in item and "answer" not in item:
        items.wrong(item, index, f"expected \"answer\", or \"choices\" and \"correct\"; found {', '.join(sorted(item))}")
    items.need(item, index, "choices", "answer")
    return "choice" if "choices" in item else "exact"


def check(model, item: dict, index: int, routes: Sequence[Any]) -> str:
    """Whether the model can run it too; which kind it is."""
    kind = kind_of(item, index)
    items.check_vocabulary(item, index, model.info["vocab"], "ids")
    for route in [item["route"]] if "route" in item else routes:
        items.check_route(model, item, index, route)
    return kind


def evaluate(model, given: Iterable[dict], routes: Sequence[Any] = (None,), *, max_tokens=0, chat=False, batch=0, stop=None,
             template=None, progress=None) -> list[dict]:
    """Rows of task, route, n, metric, value, low, high.  Items: prompt|messages with answer, or with choices and correct.

    An item's own "route" wins over `routes`; the label "auto" means the pack's router.
    """
    groups: dict[tuple[str, str], list[dict]] = {}
    for i, item in enumerate(given):
        kind = check(model, item, i, routes)
        groups.setdefault((item.get("task", "all"), kind), []).append(items.numbered(item, i))
    if not groups:
        raise items.ItemError("no items")
    options = {"max_tokens": max_tokens, "chat": chat, "batch": batch, "stop": stop, "template": template}
    if any(kind == "exact" for _, kind in groups):
        items.check_options(model, **options)
    rows = []
    for route in routes:
        for (task, kind), members in groups.items():
            if kind == "choice":
                hits = choice_hits(model, members, route, progress)
            else:
                hits = generation_hits(model, members, route, **options, progress=progress)
            low, high = wilson(sum(hits), len(hits))
            label = None if model.pack is None else route if isinstance(route, str) else "auto" if route is None else model.pack.format_route(route)
            rows.append({"task": task, "route": label, "n": len(hits), "metric": "accuracy", "value": sum(hits) / len(hits), "low": low, "high": high})
    return rows
