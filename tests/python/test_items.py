"""Items of JSON-lines files and prompts of calls that are not what they should be: file, line, item, expected and found."""

import io
import json
import sys

import pytest

import onebitmerge as obm

ROLES = '{"role", "content"}'
PROMPTS = [
    ({"messages": "text"}, f"messages: expected a list of {ROLES}, found a string"),
    ({"messages": {"role": "user", "content": "x"}}, f"messages: expected a list of {ROLES}, found an object"),
    ({"messages": []}, f"messages: expected a list of {ROLES}, found an empty list"),
    ({"messages": ["x"]}, f"messages[0]: expected {ROLES}, found a string"),
    ({"messages": [{"role": "user"}]}, f'messages[0]: expected {ROLES}, found no "content"'),
    ({"messages": [{"content": "x"}]}, f'messages[0]: expected {ROLES}, found no "role"'),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content: expected a string, found null"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}]}, "messages[0].content: expected a string, found a list (content in parts"),
    ({"ids": []}, "ids: expected a list of token ids, found an empty list"),
    ({"ids": "5"}, "ids: expected a list of token ids, found a string"),
    ({"ids": [5, 1.5]}, "ids[1]: expected a token id, a whole number from 0 on, found 1.5"),
    ({"ids": [-1]}, "ids[0]: expected a token id, a whole number from 0 on, found -1"),
    ({"ids": [True]}, "ids[0]: expected a token id, a whole number from 0 on, found true"),
    ({"ids": [5, 768]}, "ids[1]: expected a token id below 768, found 768"),
    ({"prompt": 5}, "prompt: expected a string, found a number"),
    ({"prompt": "a\0b"}, "prompt: holds a NUL character"),
    ({"prompt": "\ud800"}, "prompt: holds one half of a surrogate pair"),
    ({"prompt": ""}, "the prompt is empty: expected at least one token, and the tokenizer puts none (no BOS) in front"),
    ({"prompt": "x 1" * 400}, "tokens are more than the 512 positions of the model (max_position_embeddings)"),
    ({"prompt": "x", "route": "poetry"}, "route: no task named poetry; this pack has chat, math, code"),
    ({"prompt": "x", "route": True}, "route: expected a task, an index or weights, found true"),
    ({}, "expected one of ids, messages, prompt, text; found nothing"),
]


@pytest.mark.parametrize("item, said", PROMPTS)
def test_prompts(fails, pack_path, jsonl, item, said):
    """The second of three, in a batch and alone."""
    good = {"prompt": "hello", "route": "base"}
    item = {"route": "base", **item} if item else item
    for command in (["generate", pack_path, "--max-tokens", 1], ["eval", pack_path, "--max-tokens", 1]):
        name = "--file" if command[0] == "generate" else "--task"
        rows = [{**row, **({"answer": "x"} if name == "--task" and row else {})} for row in (good, item, good)]
        said_here = said.replace("found nothing", "found answer") if not item and rows[1] else said
        fails(*command, name, jsonl(*rows), match="in.jsonl, line 2, item 1: ")
        assert said_here in fails(*command, name, jsonl(rows[1]), match="in.jsonl, line 1, item 0: ")


@pytest.mark.parametrize("verb, item, said", [
    ("score", {"prompt": "x"}, 'expected "continuation"; found prompt'),
    ("score", {"ids": [5]}, "expected one of continuation, continuation_ids; found ids"),
    ("score", {"ids": [5], "prompt": "x", "continuation": "y"}, "expected one of prompt, messages, ids; found prompt and ids"),
    ("generate", {"prompt": "x", "messages": [{"role": "user", "content": "x"}]}, "expected one of ids, messages, prompt; found prompt and messages"),
    ("router", {"prompt": "x", "messages": [], "task": "math"}, "expected one of messages, prompt; found prompt and messages"),
    ("eval", {"prompt": "x", "choices": ["a", "b"]}, "correct is missing: expected the index of one of 2 choices"),
    ("score", {"prompt": "x", "continuation": 5}, "continuation: expected a string, found a number"),
    ("score", {"ids": [5], "continuation_ids": []}, "continuation_ids: expected a list of token ids, found an empty list"),
    ("score", {"ids": [5], "continuation_ids": [768]}, "continuation_ids[0]: expected a token id below 768, found 768"),
    ("score", {"prompt": "x", "continuation": ""}, "the continuation has no tokens to score"),
    ("score", {"prompt": "", "continuation": "a"}, "the prompt is empty: nothing comes before the only token to score"),
    ("score", {"text": ["x"]}, "text: expected a string, found a list"),
    ("score", {"messages": "x", "continuation": "y"}, f"messages: expected a list of {ROLES}, found a string"),
    ("logits", {"prompt": "x"}, 'expected "ids"; found prompt'),
    ("logits", {"ids": [768]}, "ids[0]: expected a token id below 768, found 768"),
    ("logits", {"ids": [5] * 513}, "513 tokens are more than the 512 positions of the model"),
    ("route", {"text": 5}, "text: expected a string, found a number"),
    ("route", {"messages": []}, f"messages: expected a list of {ROLES}, found an empty list"),
    ("tokenize", {"text": None}, "text: expected a string, found null"),
    ("tokenize", {"ids": ["5"]}, "ids[0]: expected a token id, a whole number from 0 on, found a string"),
    ("tokenize", {"ids": [768]}, "id 768 is out of range: the tokenizer has ids 0 to 767"),
    ("router", {"text": "x"}, 'expected "task"; found text'),
    ("router", {"text": "x", "task": 1}, "task: expected a string, found a number"),
    ("router", {"text": "x", "task": "poetry"}, 'task: expected one of chat, math, code, found "poetry"'),
    ("eval", {"prompt": "x"}, 'expected "answer", or "choices" and "correct"; found prompt'),
    ("eval", {"prompt": "x", "answer": []}, "answer: expected a string or a list of strings, found an empty list"),
    ("eval", {"prompt": "x", "answer": "y", "match": "all"}, 'match: expected "exact" or "end", found "all"'),
    ("eval", {"prompt": "x", "choices": [], "correct": 0}, "choices: expected a list of strings, found an empty list"),
    ("eval", {"prompt": "x", "choices": ["a", "b"], "correct": 2}, "correct: expected the index of one of 2 choices, found 2"),
    ("eval", {"prompt": "x", "choices": ["a", ""], "correct": 0}, "the continuation has no tokens to score"),
])
def test_other_verbs(fails, pack_path, jsonl, tmp_path, verb, item, said):
    command = {"score": ["score", pack_path, "--file"], "generate": ["generate", pack_path, "--file"], "logits": ["logits", pack_path, "-o", tmp_path / "x.npz", "--file"],
               "route": ["route", pack_path, "--file"], "tokenize": ["tokenize", pack_path, "--file"],
               "router": ["router", "train", pack_path, "--data"], "eval": ["eval", pack_path, "--max-tokens", 1, "--task"]}[verb]
    item = {**item, "route": "base"} if verb in ("score", "logits", "eval") else item
    assert (said if " and " in said else said.split("; found")[0]) in fails(*command, jsonl(item), match="in.jsonl, line 1, item 0: ")


@pytest.mark.parametrize("command", [["generate", "--file"], ["score", "--file"], ["logits", "-o", "x.npz", "--file"], ["route", "--file"],
                                     ["tokenize", "--file"], ["router", "train", "--data"], ["eval", "--task"]])
def test_no_items(fails, pack_path, tmp_path, monkeypatch, command):
    """An empty file, one of empty lines, an empty pipe."""
    empty = tmp_path / "empty.jsonl"
    verb = command[:2] if command[0] == "router" else command[:1]
    for text in ("", "\n  \n"):
        empty.write_text(text)
        fails(*verb, pack_path, *command[len(verb):], empty, match="empty.jsonl: no items: expected JSON lines, an object in each, found none")
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    fails(*verb, pack_path, *command[len(verb):], "-", match="standard input: no items")


@pytest.mark.parametrize("line, said", [
    ('{"prompt": "x"', "not JSON at column 15 ("), ('{"prompt": "x", "prompt": "y"}', 'key "prompt" is there twice'), ("[" * 100000, "nested too deeply"),
    ('{"n": ' + "1" * 5000 + "}", "a number of too many digits"), ("5", "expected an object, found a number"), ("null", "expected an object, found null"),
])
def test_lines(fails, pack_path, tmp_path, line, said):
    file = tmp_path / "in.jsonl"
    file.write_text('{"prompt": "x"}\n' + line + "\n")
    fails("generate", pack_path, "--file", file, match="in.jsonl, line 2: ")
    assert said in fails("generate", pack_path, "--file", file)


def test_tokenize_takes_back_what_it_gave(lines, models, jsonl):
    row, = lines("tokenize", models / "base", "--file", jsonl({"text": ""}))
    assert row["ids"] == [] and lines("tokenize", models / "base", "--file", jsonl(row)) == [{"index": 0, "text": ""}]


def test_calls(model):
    """The same mistakes in Python's calls."""
    for prompt, said in [({"messages": "text"}, "messages: expected a list of"), ({"messages": []}, "found an empty"),
                         ([{"role": "user", "content": ["x"]}], "\"content\" of a message: expected a str"), ([{"role": "user"}], "missing: content"),
                         ({"ids": "5"}, "ids must be a sequence of integers"), ({}, "a prompt is a str")]:
        with pytest.raises(TypeError, match=said):
            model.generate(prompt, route="base", max_tokens=1)
    for prompt, said in [({"ids": []}, "expected at least one token id, found none"), ("", "the prompt is empty: expected at least one token"),
                         (["x", ""], "^prompt 1: the prompt is empty"), (["x", {"ids": [768]}], "^prompt 1: token id 768 at index 0"),
                         ({"ids": [5] * 513}, "513 tokens are more than the 512 positions of the model")]:
        with pytest.raises(obm.ArgumentError, match=said):
            model.generate(prompt, route="base", max_tokens=1)


def test_evaluate(model):
    from onebitmerge.evaluate import evaluate

    for items, said in [([], "no items"), ([3], "^item 0: expected an object, found a number"), ("abc", "^item 0: expected an object, found a string"),
                        ([{"prompt": "x", "answer": "y", "task": ["z"]}], "^item 0: task: expected a string, found a list"),
                        ([{"prompt": "x", "answer": "y"}, {"messages": "x", "answer": "y"}], "^item 1: messages: expected a list"),
                        ([{"prompt": "x", "answer": "y"}, {"prompt": "", "answer": "y"}], "^item 1: the prompt is empty")]:
        with pytest.raises(obm.ArgumentError, match=said):
            evaluate(model, items, ["base"], max_tokens=1)
    json.dumps(evaluate(model, ({"prompt": p, "answer": "y"} for p in "ab"), ["base"], max_tokens=1))


def test_evaluate_counts_all_items(model):
    """Not those of a task or of a kind, nor choices."""
    from onebitmerge.evaluate import evaluate

    good, choice = {"prompt": "x", "answer": "y"}, {"prompt": "x", "choices": ["a", "b"], "correct": 0}
    bad, bad_choice = {**good, "prompt": "", "task": "b"}, {**choice, "choices": ["a", "b", ""]}
    for items, at in [([good, choice, {**good, "task": "b"}, choice, bad], 4), ([good, choice, choice, bad_choice], 3),
                      ([choice, good, {**choice, "prompt": ""}], 2), ([good, bad], 1)]:
        before = [dict(item) for item in items]
        with pytest.raises(ValueError, match=f"^item {at}: the (prompt|continuation) "):
            evaluate(model, items, ["base"], max_tokens=1)
        assert items == before


def test_options_are_no_items_mistake(fails, model, pack_path, jsonl):
    """Whether there is one item or two."""
    from onebitmerge.evaluate import evaluate

    item = {"prompt": "x", "answer": "y", "route": "base"}
    for items in ([item], [item, item]):
        for verb in (["eval", pack_path, "--task", jsonl(*items)], ["generate", pack_path, "--file", jsonl(*items)]):
            assert fails(*verb, "--chat", "--template", "foo").startswith('onebitmerge: no built-in chat template is called "foo"')
        for options, said in [({"batch": -1}, "max_tokens, top_k, batch and"), ({"max_tokens": -1}, "max_tokens, "), ({"template": "foo"}, "no built-in")]:
            with pytest.raises((ValueError, OverflowError, obm.Error), match=f"^{said}") as raised:
                evaluate(model, items, **options)
            assert type(raised.value).__name__ != "ItemError"
