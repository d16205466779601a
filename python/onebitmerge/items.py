"""Items of JSON-lines files: reading them, and saying which one of them is wrong, where and how."""

from __future__ import annotations

import contextlib
import json
import re
import sys

from ._core import ArgumentError, Error

ROLES = "{\"role\", \"content\"}"
PROMPT = ("ids", "messages", "prompt", "text")
RIVALS = ("prompt", "messages", "ids")   # where one stands, no other can


class ItemError(ArgumentError):
    """One clear line."""


class Item(dict):
    """An object of a JSON-lines file; `where` names file and line, `index` counts the file's items from 0."""
    where = ""
    index = None


def name_of(path):
    return "standard input" if path == "-" else path


def kind(value):
    """A JSON value's kind, with an article."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return {str: "a string", list: "a list", tuple: "a list", dict: "an object", int: "a number", float: "a number"}.get(type(value), type(value).__name__)


def place(item, index):
    """Where an item is, for messages; nothing for one that was typed in the shell."""
    own = item.index if isinstance(item, Item) else None   # a str has an index too
    if index is None or (isinstance(item, Item) and own is None):
        return ""
    return f"{getattr(item, 'where', '')}item {index if own is None else own}: "


def numbered(item, index):
    """The item with its place among all; one of a file, or of the shell, knows it already."""
    if not isinstance(item, Item):
        item = Item(item)
        item.index = index
    return item


def wrong(item, index, what):
    raise ItemError(place(item, index) + what)


# ---- reading ----


def unique(pairs):
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [k for k, _ in pairs]
        raise ItemError(f"key \"{next(k for k in keys if keys.count(k) > 1)}\" is there twice")
    return found


def parse_line(line, number):
    """The line's value; None: an empty line.  A message says what is wrong with it, not where it is."""
    try:
        text = line if isinstance(line, str) else line.decode("utf-8-sig" if number == 1 else "utf-8")
        return json.loads(text.rstrip(), object_pairs_hook=unique) if text.strip() else None
    except UnicodeDecodeError as e:
        raise ItemError(f"not UTF-8 at byte {e.start}") from None
    except json.JSONDecodeError as e:
        raise ItemError(f"not JSON at column {e.colno} ({e.msg[:1].lower() + e.msg[1:]}); expected one object in each line") from None
    except RecursionError:
        raise ItemError("not JSON: nested too deeply") from None
    except ItemError:
        raise
    except ValueError:   # of int()
        raise ItemError("not JSON: a number of too many digits") from None


def read_lines(path):
    """JSON lines of a file or stdin; messages name the line."""
    name = name_of(path)
    # Bytes, so that the encoding is UTF-8 whatever the locale says and a bad line can be named; a BOM is let pass.
    stream = contextlib.nullcontext(getattr(sys.stdin, "buffer", sys.stdin)) if path == "-" else open(path, "rb")
    items = []
    with stream as file:
        for number, line in enumerate(file, 1):
            try:
                value = parse_line(line, number)
            except ValueError as e:
                raise ItemError(f"{name}, line {number}: {e}") from None
            if value is None and not line.strip():
                continue
            if not isinstance(value, dict):
                raise ItemError(f"{name}, line {number}: expected an object, found {kind(value)}")
            items.append(Item(value))
            items[-1].where, items[-1].index = f"{name}, line {number}, ", len(items) - 1
    if not items:
        raise ItemError(f"{name}: no items: expected JSON lines, an object in each, found none")
    return items


# ---- checking ----


def check_text(item, index, key, value):
    if not isinstance(value, str):
        wrong(item, index, f"{key}: expected a string, found {kind(value)}")
    if "\0" in value:
        wrong(item, index, f"{key}: holds a NUL character")
    if any("\ud800" <= c <= "\udfff" for c in value):
        wrong(item, index, f"{key}: holds one half of a surrogate pair, which is no character")


def check_messages(item, index, key, value):
    if not isinstance(value, list) or not value:
        wrong(item, index, f"{key}: expected a list of {ROLES}, found {'an empty list' if value == [] else kind(value)}")
    for i, message in enumerate(value):
        at = f"{key}[{i}]"
        if not isinstance(message, dict):
            wrong(item, index, f"{at}: expected {ROLES}, found {kind(message)}")
        for part in ("role", "content"):
            if part not in message:
                wrong(item, index, f"{at}: expected {ROLES}, found no \"{part}\"")
            if part == "content" and isinstance(message[part], list):
                wrong(item, index, f"{at}.content: expected a string, found a list (content in parts, like images, is not supported)")
            check_text(item, index, f"{at}.{part}", message[part])


def check_ids(item, index, key, value):
    if not isinstance(value, list) or not value:
        wrong(item, index, f"{key}: expected a list of token ids, found {'an empty list' if value == [] else kind(value)}")
    for i, token in enumerate(value):
        if isinstance(token, bool) or not isinstance(token, int) or token < 0:
            found = kind(token) if isinstance(token, (bool, str, list, dict)) or token is None else token
            wrong(item, index, f"{key}[{i}]: expected a token id, a whole number from 0 on, found {found}")


def check_answer(item, index, key, value):
    if not isinstance(value, list):
        return check_text(item, index, key, value)
    for i, text in enumerate(value):
        check_text(item, index, f"{key}[{i}]", text)
    return None if value else wrong(item, index, f"{key}: expected a string or a list of strings, found an empty list")


def check_choices(item, index, key, value):
    if not isinstance(value, list) or not value:
        wrong(item, index, f"{key}: expected a list of strings, found {'an empty list' if value == [] else kind(value)}")
    check_answer(item, index, key, value)
    if "correct" not in item:
        wrong(item, index, f"correct is missing: expected the index of one of {len(value)} choices")
    correct = item["correct"]
    if isinstance(correct, bool) or correct not in range(len(value)):
        wrong(item, index, f"correct: expected the index of one of {len(value)} choices, found {json.dumps(correct)}")


def check_match(item, index, key, value):
    if value not in ("exact", "end"):
        wrong(item, index, f"{key}: expected \"exact\" or \"end\", found {json.dumps(value)}")


CHECKS = {"ids": check_ids, "continuation_ids": check_ids, "messages": check_messages, "prompt": check_text, "text": check_text,
          "continuation": check_text, "task": check_text, "answer": check_answer, "choices": check_choices, "match": check_match}


def need(item, index, *keys):
    """The first of the keys that the item has, checked."""
    rivals = [key for key in RIVALS if key in keys and key in item]
    if len(rivals) > 1:
        wrong(item, index, f"expected one of {', '.join(key for key in keys if key in RIVALS)}; found {' and '.join(rivals)}")
    for key in keys:
        if key in item:
            CHECKS[key](item, index, key, item[key])
            return item[key]
    expected = f"\"{keys[0]}\"" if len(keys) == 1 else f"one of {', '.join(keys)}"
    raise ItemError(f"{place(item, index)}expected {expected}; found {', '.join(sorted(item)) or 'nothing'}")


def check_vocabulary(item, index, vocab, *keys):
    for key in keys:
        for i, token in enumerate(item.get(key) or ()):
            if token >= vocab:
                wrong(item, index, f"{key}[{i}]: expected a token id below {vocab}, found {token}")


def check_keys(item, index, options):
    """Items may carry what evaluations need besides; what looks like a key that is misspelt, or an option, is an error."""
    for key in sorted(set(item) - {"ids", "messages", "prompt", "text", "route", "task", "answer", "match"}):
        if key in options:
            wrong(item, index, f"{key} is given for all items, with --{key.replace('_', '-')}")
        import difflib
        near = difflib.get_close_matches(key, ("messages", "prompt", "route"), 1, .8)
        if near and near[0] not in item:
            wrong(item, index, f"unknown key \"{key}\", did you mean \"{near[0]}\"?")


def check_route(model, item, index, route):
    """A route that the model's pack does not have is the item's mistake."""
    if model.pack is None:
        if route not in (None, "auto"):
            wrong(item, None if "route" not in item else index, "a route was given, but this is a plain model: only packs have routes")
    elif route not in (None, "auto"):
        if isinstance(route, bool) or not isinstance(route, (str, int, dict, list)):
            wrong(item, index, f"route: expected a task, an index or weights, found {kind(route)}")
        try:
            model.pack.format_route(route)
        except (Error, ValueError, TypeError) as e:
            wrong(item, None if "route" not in item else index, f"{e}")


def check_options(model, **options):
    """What is wrong with the options of generate is no item's mistake: it shows before there are any."""
    model.generate([], **options)


@contextlib.contextmanager
def located(items, begin=0):
    """What the library says of "prompt 3" or "item 3" of a call is said of that item of the file; so is what it finds wrong with
    the only one's arguments, which check_options has left to the prompt."""
    try:
        yield
    except (Error, ValueError) as e:
        found = re.match(r"(?:prompt|item) (\d+): ", str(e))
        if isinstance(e, ItemError) or not (found or (len(items) == 1 and isinstance(e, (ArgumentError, ValueError)))):
            raise
        i = int(found[1]) if found else 0
        raise ItemError(place(items[i], begin + i) + str(e)[found.end() if found else 0:]) from e
