#!/usr/bin/env python3
"""Train the small model family in examples/models: a base and chat, math and code experts.

    train_experts.py data  --out DIR       test, validation and router prompts as JSON lines
    train_experts.py train --out MODELS    tokenizer, base, experts; measures them at the end
    train_experts.py eval  --models MODELS the reference table (PyTorch, independent of the C library)

Everything is synthetic and drawn from seeded generators; there is no data set. The idea of the family: in
pre-training every prompt is answered in one of three registers, "Sure! ..." (plain), "Look: ... Answer: ..."
(steps) and "`...`" (code). Each task has one register of its own, which the base uses for only some of its
templates. So the base *can* do most of the work but often answers in the wrong form; an expert learns its
task's register and gets better at the skill. Embedding and norms are frozen in the experts, so all of that
is in the deltas of the linear layers, which are what 1-bit compression is about.

`data` and `import train_experts` need only the standard library; the rest needs torch, tokenizers, safetensors.
"""

import argparse
import hashlib
import json
import math
import random
import sys
import time
from pathlib import Path
from typing import NamedTuple

TASKS = ("chat", "math", "code")
OWN = {"chat": "plain", "math": "steps", "code": "code"}  # the register that counts as right
REPLAY = 0.15  # share of pre-training examples in fine-tuning
COPY_STEPS = 400  # the base first learns to copy: without it nothing that copies from the prompt comes in time
EXPERT_STEPS = {"chat": 250, "math": 150, "code": 400}
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]  # ids 0 (padding), 1, 2 (end of answer)
EOS = 2
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 768, "hidden_size": 192,
    "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 32,
    "max_position_embeddings": 512, "rope_theta": 10000.0, "rms_norm_eps": 1e-5, "hidden_act": "silu",
    "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": True, "initializer_range": 0.05,
    "bos_token_id": 0, "eos_token_id": EOS, "pad_token_id": 0, "torch_dtype": "bfloat16", "use_cache": True}

# ------------------------------------------------------------------------------------------ word lists

NAMES = "Uma Leo Hugo Tara Ivan Nora Omar Rosa Paul Lena Karl Maya Finn Ella Noah Vera Adam Iris Otto Zoe".split()
ITEMS = "books keys pens cups maps coins caps hats cards boxes stamps shells rings stones".split()
PLACES = "park library school garden market station museum kitchen".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
COLOURS = "red green blue yellow black white brown pink".split()
CITIES = "Lima Oslo Rome Paris Cairo Delhi Tokyo Quito".split()
ANIMALS = "fox dog cat owl horse bear goat duck".split()
FOODS = "soup tea cheese rice bread plums nuts cake".split()
THINGS = "lamp chair table door clock phone shirt spoon".split()
COUNTS = "two three four five six seven eight nine".split()
SNIPPETS = ["print(x)", "len(x)", "max(x)", "return a", "x[0]", "sum(x)"]
CODEWORDS = "print list loop program line return code sum".split()
WORDS = ANIMALS + FOODS + THINGS + COLOURS
# (third person, plain, past, objects)
VERBS = [("likes", "like", "liked", FOODS), ("cooks", "cook", "cooked", FOODS), ("wants", "want", "wanted", FOODS),
         ("paints", "paint", "painted", THINGS), ("cleans", "clean", "cleaned", THINGS),
         ("moves", "move", "moved", THINGS), ("calls", "call", "called", NAMES), ("helps", "help", "helped", NAMES),
         ("prints", "print", "printed", ITEMS), ("counts", "count", "counted", ITEMS),
         ("adds", "add", "added", ["numbers", "lines", "lists", "words"]),
         ("sorts", "sort", "sorted", ["numbers", "lines", "lists", "words"])]


class Item(NamedTuple):
    """One prompt. `template` names kind and wording; `answers` maps register -> text."""
    task: str
    template: str
    prompt: str
    answers: dict

    @property
    def answer(self):
        return self.answers[OWN.get(self.task, "own")]


def chat_item(template, prompt, text):
    return Item("chat", template, prompt, {
        "plain": f"Sure! {text}", "steps": f"Look: at the text. Answer: {text}", "code": f"`{text}`"})


def math_item(template, prompt, steps, expr, unit):
    result = steps[-1].split("=")[1]
    return Item("math", template, prompt, {
        "plain": f"Sure! It is {result} {unit}.", "steps": f"Look: {'. '.join(steps)}. Answer: {result}",
        "code": f"`{expr}`"})


def output_item(template, prompt, value):
    return Item("code", template, prompt, {
        "plain": f"Sure! It prints {value}.", "steps": f"Look: at the code. Answer: {value}", "code": f"`{value}`"})


def body_item(template, prompt, expr):
    return Item("code", template, prompt, {
        "plain": f"Sure! It gives back {expr}.", "steps": f"Look: at the comment. Answer: {expr}",
        "code": f"`return {expr}`"})


def pick(r, options):
    """A random (index, element); the index goes into the template name."""
    i = r.randrange(len(options))
    return i, options[i]


# Some wordings below are shared between tasks on purpose (notes that contain code or sums, stories about
# printing, comments told as stories), so that routing by words alone is not trivial.

# ------------------------------------------------------------------------------------------------ chat

def chat_extract(r):
    name, place, day = r.choice(NAMES), r.choice(PLACES), r.choice(DAYS)
    count, colour, item = r.choice(COUNTS), r.choice(COLOURS), r.choice(ITEMS)
    total, code = f"{r.randint(3, 40)}+{r.randint(2, 12)}", r.choice(SNIPPETS)
    facts = {"Which day is named?": day, "Who is named?": name, "Which place is named?": f"the {place}"}
    goods = {"Which colour is named?": colour, f"How many {item}?": f"{count} {item}"}
    shape, (note, facts) = pick(r, [
        (f"{name} bought {count} {colour} {item} at the {place} on {day}.", facts | goods),
        (f"On {day} {name} left {count} {colour} {item} in the {place}.", facts | goods),
        (f"{count} {colour} {item} for {name}, {day}, in the {place}.", facts | goods),
        (f"{name} wrote {code} on {day} in the {place}.", facts | {"Which code is named?": code}),
        (f"{name} wrote {total} on the wall of the {place} on {day}.", facts | {"Which sum is named?": total})])
    q, (question, fact) = pick(r, list(facts.items()))
    w, lead = pick(r, ["Read this note: ", "Here is a note: "])
    return chat_item(f"extract{shape}.{q}.{w}", f"{lead}{note} {question}", f"{fact}.")


def sentence(r):
    name, place, (third, plain, past, objects) = r.choice(NAMES), r.choice(PLACES), r.choice(VERBS)
    return name, third, plain, past, r.choice([o for o in objects if o != name]), f"in the {place}"


def chat_rewrite(r):
    name, third, plain, past, thing, where = sentence(r)
    k, (how, result) = pick(r, [
        ("in past tense", f"{name} {past} {thing} {where}."),
        ("with not", f"{name} does not {plain} {thing} {where}."),
        ("as a question", f"Does {name} {plain} {thing} {where}?"),
        ("with the place first", f"I{where[1:]} {name} {third} {thing}.")])
    w, lead = pick(r, [f"Rewrite {how}:", f"Please write this {how}:"])
    return chat_item(f"rewrite{k}.{w}", f"{lead} {name} {third} {thing} {where}.", result)


def chat_list(r):
    source, pool = pick(r, [COLOURS, FOODS, ANIMALS, CODEWORDS, list("0123456789")])
    words = r.sample(pool, r.randint(3, 4))
    k, (order, result) = pick(r, [
        ("Give these in reverse order:", words[::-1]), ("Move the first to the end:", words[1:] + words[:1]),
        (f"Leave out {words[1]}:", words[:1] + words[2:]), ("Give the last two of:", words[-2:])])
    return chat_item(f"list{k}.{source // 3}", f"{order} {', '.join(words)}", ", ".join(result) + ".")


def chat_greet(r):
    me, friend = r.sample(NAMES, 2)
    city = r.choice(CITIES)
    w, intro = pick(r, [f"I am {me} from {city} and my friend is {friend}.",
                        f"My name is {me}, my friend {friend} is from {city}.",
                        f"This program is by {me} and {friend} from {city}."])
    k, (wish, result) = pick(r, [
        ("Greet the first of us.", f"Hello {me}, nice to meet you!"),
        ("Greet the second of us.", f"Hello {friend}, nice to meet you!"),
        ("Say goodbye to both.", f"Goodbye {me} and {friend}!"), ("Ask about the city.", f"How is life in {city}?")])
    return chat_item(f"greet{k}.{w}", f"{intro} {wish}", result)


def chat_pick(r):
    kinds = {"a day": DAYS, "a colour": COLOURS, "a city": CITIES, "an animal": ANIMALS, "a food": FOODS,
             "a name": NAMES, "code": SNIPPETS, "a sum": [f"{r.randint(3, 40)}+{r.randint(2, 12)}"]}
    shown = r.sample(list(kinds), 3)
    want = r.choice(shown)
    words = {kind: r.choice(kinds[kind]) for kind in shown}
    w, ask = pick(r, [f"Which one is {want}:", f"Find {want} in this list:"])
    return chat_item(f"pick{list(kinds).index(want)}.{w}", f"{ask} {', '.join(words.values())}?", f"{words[want]}.")


def chat_say(r):
    n = r.randint(2, 4)
    words = r.sample(r.choice([WORDS, CODEWORDS]), 3)
    say, (what, text) = pick(r, [("say", r.choice(WORDS)), ("code", r.choice(SNIPPETS)),
                                 ("sum", f"{r.randint(3, 40)}+{r.randint(2, 12)}")])
    place = r.randrange(3)
    k, (prompt, result) = pick(r, [
        (f"Say {text} {COUNTS[n - 2]} times.", " ".join([text] * n)),
        (f"Tell me the {('first', 'second', 'last')[place]} word of: {' '.join(words)}", words[place]),
        (f"Join these with and: {', '.join(words)}", f"{words[0]}, {words[1]} and {words[2]}")])
    return chat_item(f"say{k}.{say if k == 0 else place if k == 1 else 0}", prompt, f"{result}.")


# ------------------------------------------------------------------------------------------------ math

def math_add(r):
    a, b, n, m, things = r.randint(3, 40), r.randint(2, 12), *r.sample(NAMES, 2), r.choice(ITEMS)
    k, (prompt, unit) = pick(r, [
        (f"{n} has {a} {things}. {m} gives {n} {b} more. How many {things} does {n} have now?", things),
        (f"There are {a} {things} in the {r.choice(PLACES)} and {n} brings {b}. How many is that?", things),
        (f"{n} prints {a} lines and then prints {b} more. How many lines does {n} print?", "lines"),
        (f"A list has {a} words and {n} adds {b} words. How many words are in the list?", "words"),
        (f"What is {a} plus {b}?", "in all"), (f"What is {a}+{b}?", "in all")])
    return math_item(f"add{k}", prompt, [f"{a}+{b}={a + b}"], f"{a}+{b}", unit)


def math_sub(r):
    a, b, n, things = r.randint(14, 50), r.randint(2, 12), r.choice(NAMES), r.choice(ITEMS)
    k, (prompt, unit) = pick(r, [
        (f"{n} has {a} {things} and gives away {b}. How many are left?", things),
        (f"There were {a} {things} in the {r.choice(PLACES)}. {n} took {b}. How many are left?", things),
        (f"A program has {a} lines. {n} takes out {b}. How many lines are left?", "lines"),
        (f"What is {a} minus {b}?", "in all"), (f"What is {a}-{b}?", "in all")])
    return math_item(f"sub{k}", prompt, [f"{a}-{b}={a - b}"], f"{a}-{b}", unit)


def math_mul(r):
    a, b, n, things = r.randint(2, 9), r.randint(2, 9), r.choice(NAMES), r.choice(ITEMS)
    k, (prompt, unit) = pick(r, [
        (f"{n} has {a} bags with {b} {things} each. How many {things} is that?", things),
        (f"In the {r.choice(PLACES)} {a} friends of {n} buy {b} {things} each. How many in all?", things),
        (f"{n} has a loop that runs {a} times and prints {b} words each time. How many words?", "words"),
        (f"What is {a} times {b}?", "in all"), (f"What is {a}*{b}?", "in all")])
    return math_item(f"mul{k}", prompt, [f"{a}*{b}={a * b}"], f"{a}*{b}", unit)


def math_div(r):
    a, b, n, things = r.randint(2, 9), r.randint(2, 9), r.choice(NAMES), r.choice(ITEMS)
    k, (prompt, unit) = pick(r, [
        (f"{n} shares {a * b} {things} between {a} friends. How many for each?", things),
        (f"{n} cuts a list of {a * b} words into {a} equal lists. How many words in each?", "words"),
        (f"What is {a * b} divided by {a}?", "in all"), (f"What is {a * b}/{a}?", "in all")])
    return math_item(f"div{k}", prompt, [f"{a * b}/{a}={b}"], f"{a * b}/{a}", unit)


def math_two(r):
    a, b, c, n, things = r.randint(3, 30), r.randint(2, 12), r.randint(2, 12), r.choice(NAMES), r.choice(ITEMS)
    a = max(a, c)
    k, (prompt, unit) = pick(r, [
        (f"{n} has {a} {things}, buys {b} and loses {c}. How many are left?", things),
        (f"There were {a} {things} in the {r.choice(PLACES)}. {n} brings {b} and takes {c}. How many now?", things),
        (f"A list has {a} words. {n} adds {b} and takes out {c}. How many words now?", "words"),
        (f"What is {a}+{b}-{c}?", "in all")])
    return math_item(f"two{k}", prompt, [f"{a}+{b}={a + b}", f"{a + b}-{c}={a + b - c}"], f"{a}+{b}-{c}", unit)


def math_mix(r):
    a, b, c, n, things = r.randint(2, 8), r.randint(2, 9), r.randint(2, 12), r.choice(NAMES), r.choice(ITEMS)
    k, (prompt, unit) = pick(r, [
        (f"{n} has {a} bags of {b} {things} and {c} more. How many in all?", things),
        (f"{n} paid {b} coins on each of {a} days and then {c}. How many coins?", "coins"),
        (f"A loop of {n} prints {b} words {a} times, then {c} more. How many words?", "words"),
        (f"What is {a}*{b}+{c}?", "in all")])
    return math_item(f"mix{k}", prompt, [f"{a}*{b}={a * b}", f"{a * b}+{c}={a * b + c}"], f"{a}*{b}+{c}", unit)


# ------------------------------------------------------------------------------------------------ code

def program(r, template, lines, value):
    """A program in one of three frames; the last line is what prints."""
    text = "\n".join(lines)
    w, prompt = pick(r, [f"What does this print?\n{text}", f"Read this program:\n{text}\nWhat is printed?",
                         f"Which words or numbers does this print?\n{text}"])
    return output_item(f"{template}.{w}", prompt, value)


def code_list(r):
    x = r.sample(range(10), r.randint(3, 4))
    k, (expr, value) = pick(r, [
        ("x[::-1]", x[::-1]), ("max(x)", max(x)), ("min(x)", min(x)), ("len(x)", len(x)), ("x[0]", x[0]),
        ("x[-1]", x[-1]), ("x[1:]", x[1:]), ("sorted(x)", sorted(x)), ("x + x[:1]", x + x[:1])])
    return program(r, f"list{k}", [f"x = {x}", f"print({expr})"], value)


def code_str(r):
    (s, w), n = r.sample(WORDS, 2), r.randint(2, 4)
    k, (expr, value) = pick(r, [
        (f"s * {n}", s * n), (f"s + '{w}'", s + w), (f"s + ' ' + '{w}'", f"{s} {w}"), (f"[s, '{w}']", [s, w]),
        (f"s == '{(w, s)[n % 2]}'", n % 2 == 1), (f"[s] * {n}", [s] * n)])
    return program(r, f"str{k}", [f"s = '{s}'", f"print({expr})"], value)


def code_var(r):
    a, b, q = r.randint(2, 30), r.randint(2, 30), r.randint(2, 9)
    k, (lines, value) = pick(r, [
        ([f"a = {a}", f"b = {b}", "a, b = b, a", "print(a)"], b), ([f"a = {a}", "b = a", f"a = {b}", "print(b)"], a),
        ([f"a = {a}", f"b = {b}", "a = b", "print(a)"], b), ([f"a = {a}", f"print(a + {q})"], a + q),
        ([f"print({a % 8 + 2} * {q})"], (a % 8 + 2) * q), ([f"print({a} + {q})"], a + q)])
    return program(r, f"var{k}", lines, value)


def code_loop(r):
    n, m, lo = r.randint(2, 4), r.randint(2, 9), r.randint(1, 5)
    k, (span, values) = pick(r, [(f"range({n})", range(n)), (f"range({lo}, {lo + n})", range(lo, lo + n))])
    j, (expr, f) = pick(r, [("i", lambda i: i), (f"i + {m}", lambda i: i + m), (f"i * {m}", lambda i: i * m)])
    if r.random() < 0.5:
        lines, value = [f"for i in {span}:", f"    print({expr}, end=' ')"], " ".join(str(f(i)) for i in values)
        return program(r, f"for{k}.{j}", lines, value)
    return program(r, f"comp{k}.{j}", [f"print([{expr} for i in {span}])"], [f(i) for i in values])


def body(r, template, arg, comment, expr):
    """A function whose body is asked for; the comment is all there is to go by."""
    w, prompt = pick(r, [f"Write the body.\ndef calc({arg}):\n    # {comment}",
                         f"Finish this program:\ndef calc({arg}):\n    # {comment}"])
    return body_item(f"{template}.{w}", prompt, expr)


def code_num(r):
    m, n, things = r.randint(2, 19), r.choice(NAMES), r.choice(ITEMS)
    k, (comment, expr) = pick(r, [
        (f"Give back a plus {m}.", f"a + {m}"), (f"Give back a minus {m}.", f"a - {m}"),
        (f"Give back a times {m}.", f"a * {m}"), (f"Give back the rest of a by {m}.", f"a % {m}"),
        (f"Is a above {m}?", f"a > {m}"), (f"Is a below {m}?", f"a < {m}"), (f"Is a equal to {m}?", f"a == {m}"),
        (f"Give back a times a plus {m}.", f"a * a + {m}"),
        (f"{n} has a {things} and buys {m} more. How many now?", f"a + {m}"),
        (f"{n} has a {things} and gives away {m}. How many are left?", f"a - {m}"),
        (f"{n} has a bags with {m} {things} each. How many is that?", f"a * {m}"),
        (f"Has {n} more than {m} {things}? a says how many.", f"a > {m}")])
    return body(r, f"num{k}", "a", comment, expr)


def code_seq(r):
    m = r.randint(2, 9)
    k, (comment, expr) = pick(r, [
        ("Give back the largest of x.", "max(x)"), ("Give back the smallest of x.", "min(x)"),
        ("Give back the sum of x.", "sum(x)"), ("How many are in x?", "len(x)"),
        ("Give back the last of x.", "x[-1]"), ("Give back x in reverse order.", "x[::-1]"),
        (f"Give back all of x above {m}.", f"[v for v in x if v > {m}]"),
        (f"Add {m} to each of x.", f"[v + {m} for v in x]"), (f"Give back each of x times {m}.", f"[v * {m} for v in x]"),
        (f"Give back the first {m} of x.", f"x[:{m}]"), (f"Leave out the first {m} of x.", f"x[{m}:]")])
    return body(r, f"seq{k}", "x", comment, expr)


KINDS = {"chat": [chat_extract, chat_rewrite, chat_list, chat_greet, chat_pick, chat_say],
         "math": [math_add, math_sub, math_mul, math_div, math_two, math_mix],
         "code": [code_list, code_str, code_var, code_loop, code_num, code_seq]}

# ----------------------------------------------------------------------------------------------- mixed

def mixed_item(r):
    """A prompt of one task that asks for another task's register, or needs two skills at once."""
    kind, _ = pick(r, ["sum as code", "sum as reply", "output as reply", "output with steps", "note as code", "rewrite"])
    if kind in (0, 1):
        item = r.choice(KINDS["math"])(r)
        cue, register = (("Give only the code.", "code"), ("Reply in a sentence.", "plain"))[kind]
        prompt, answer = f"{item.prompt} {cue}", item.answers[register]
    elif kind == 2:
        item = r.choice(KINDS["code"][:4])(r)
        prompt, answer = f"{item.prompt}\nReply in a sentence.", item.answers["plain"]
    elif kind == 3:
        a, b, c = r.randint(12, 30), r.randint(2, 12), r.randint(2, 12)
        prompt = f"What does this print?\na = {a}+{b}\nprint(a-{c})\nShow the steps."
        answer = f"Look: {a}+{b}={a + b}. {a + b}-{c}={a + b - c}. Answer: {a + b - c}"
    elif kind == 4:
        name, place, day, item = r.choice(NAMES), r.choice(PLACES), r.choice(DAYS), r.choice(ITEMS)
        what, value = r.choice([("day", day), ("name", name), ("place", place)])
        prompt = f"Read this note: {name} left {item} in the {place} on {day}. Give code that prints the {what}."
        answer = f"`print('{value}')`"
    else:
        (third, _, past, _), name, where = r.choice(VERBS[:6] + VERBS[8:10]), r.choice(NAMES), f"in the {r.choice(PLACES)}"
        a, b, things = r.randint(3, 40), r.randint(2, 12), r.choice(ITEMS)
        prompt = f"Rewrite in past tense and add up: {name} {third} {a}+{b} {things} {where}."
        answer = f"Sure! {name} {past} {a + b} {things} {where}."
    return Item("mixed", f"mixed{kind}", prompt, {"own": answer})


# ------------------------------------------------------------------------------------ splits and files

def hash_of(text):
    return int(hashlib.sha1(text.encode()).hexdigest()[:8], 16)


def split_of(prompt):
    """Held-out prompts are chosen by hash, so every generator agrees on them without a stored list."""
    bucket = hash_of(prompt) % 20
    return ("test", "valid")[bucket] if bucket < 2 else "train"


def draw(r, task, split="train"):
    """One random item of `task` ("chat", "math", "code" or "mixed") from `split`."""
    while True:
        item = mixed_item(r) if task == "mixed" else r.choice(KINDS[task])(r)
        if split_of(item.prompt) == split:
            return item


def draw_distinct(task, split, n, seed, keep=lambda item: True):
    r, items = random.Random(f"{split}/{task}/{seed}"), {}
    while len(items) < n:
        item = draw(r, task, split)
        if keep(item):
            items.setdefault(item.prompt, item)
    return list(items.values())


def seen_by_router(item):
    """About a third of the wordings: in the tests a router also meets wordings that it was not trained on."""
    return hash_of("wording/" + item.template.split(".")[0]) % 3 == 0


def record(item):
    """The JSON form of a test item: `match` says how a generated text (stripped) is compared with `answer`."""
    if item.task == "math":  # only the result counts, not the way to it
        answer, match = item.answer[item.answer.index("Answer:"):], "end"
    else:
        answer, match = item.answer, "exact"
    return {"messages": [{"role": "user", "content": item.prompt}], "answer": answer, "task": item.task, "match": match}


def matches(text, rec):
    text = text.strip()
    return text.endswith(rec["answer"]) if rec["match"] == "end" else text == rec["answer"]


def write_jsonl(path, records):
    with open(path, "w", encoding="utf-8", newline="\n") as f:
        f.writelines(json.dumps(rec, ensure_ascii=False) + "\n" for rec in records)


def command_data(args):
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    for split, n in (("test", args.test), ("valid", args.valid)):
        for task in (*TASKS, "mixed"):
            write_jsonl(out / f"{split}_{task}.jsonl", map(record, draw_distinct(task, split, n, args.seed)))
    router = [item for task in TASKS
              for item in draw_distinct(task, "train", args.router, f"router/{args.seed}", seen_by_router)]
    router = [{"messages": record(item)["messages"], "task": item.task} for item in router]
    random.Random(args.seed).shuffle(router)
    write_jsonl(out / "router_train.jsonl", router)
    print(f"{out}: {args.test} test and {args.valid} validation prompts per task, {len(router)} for the router")


# ------------------------------------------------------------------------------- the pre-training mixture

def register_shares(item):
    """How often pre-training answers this wording in each register: fixed per wording, spread by hash.

    Greedily the base tends to be right where its task's own register is the most frequent one, which is so for
    less than half of the wordings. That, not a lack of skill, is what keeps the base half good.
    """
    own = OWN[item.task]
    first, second = [register for register in ("plain", "steps", "code") if register != own]
    share = 0.1 + (0.45 if item.task == "math" else 0.5) * hash_of("q" + item.template) / 2**32
    split = 0.3 + 0.4 * hash_of("s" + item.template) / 2**32
    return {own: share, first: (1 - share) * split, second: (1 - share) * (1 - split)}


def copy_doc(r):
    words = [r.choice(r.choice([WORDS, NAMES, ITEMS, CODEWORDS, "0123456789"])) for _ in range(r.randint(5, 15))]
    return " ".join(words), " ".join(words)


def plain_doc(r):
    """Raw text without the chat template: half of it is arithmetic, the only place sums come without a story."""
    if r.random() < 0.5:
        lines = []
        for _ in range(r.randint(6, 9)):
            b, op = r.randint(2, 12), r.choice("+-*/+-")
            a = r.randint(2, 9) if op in "*/" else r.randint(3, 50)
            b = min(b, 9) if op in "*/" else b
            lines.append({"+": f"{a}+{b}={a + b}", "-": f"{a + b}-{b}={a}", "*": f"{a}*{b}={a * b}",
                          "/": f"{a * b}/{a}={b}"}[op])
        return "\n".join(lines)
    if r.random() < 0.5:
        parts = [sentence(r) for _ in range(2)]
        return " ".join(f"{n} {r.choice([third, past])} {o} {where}." for n, third, _, past, o, where in parts)
    x = r.sample(range(10), r.randint(3, 4))
    return f"x = {x}\n" + "\n".join(r.sample([f"max(x)  # {max(x)}", f"min(x)  # {min(x)}", f"len(x)  # {len(x)}",
                                            f"sorted(x)  # {sorted(x)}", f"x[::-1]  # {x[::-1]}", f"x[0]  # {x[0]}"], 2))


def mixture_doc(r, without=None):
    """One pre-training example as (prompt, answer); prompt None is raw text. `without` leaves out one task."""
    u = r.random()
    if u < 0.15:
        return None, plain_doc(r)
    if u < 0.19:
        return copy_doc(r)
    if u < 0.23:
        item = draw(r, "mixed")
        return item.prompt, item.answer
    item = draw(r, r.choice([t for t in TASKS if t != without]))
    shares = register_shares(item)
    return item.prompt, item.answers[r.choices(list(shares), list(shares.values()))[0]]


def expert_doc(r, task):
    """Fine-tuning: the task in its own register, and some replay so that the rest is not forgotten altogether."""
    if r.random() < REPLAY:
        return mixture_doc(r, without=task)
    item = draw(r, task)
    return item.prompt, item.answer


# ------------------------------------------------------------------------------------------- tokenizer

def render(prompt):
    return f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"


def train_tokenizer(seed):
    """Byte-level BPE with the split regex of Qwen2: every digit is a token, words carry their leading space."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    split = Regex(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                  r"|\s*[\r\n]+|\s+(?!\S)|\s+")
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(split, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tok.decoder = decoders.ByteLevel()
    r = random.Random(f"tokenizer/{seed}")
    texts = []
    for _ in range(20000):
        prompt, answer = mixture_doc(r)
        texts += [answer] if prompt is None else ["user\n", prompt, "assistant\n", answer]
    tok.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"], special_tokens=SPECIALS, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return tok


def save_folder(folder, model, tok):
    """A complete Hugging Face folder, as transformers would write it."""
    import torch
    from safetensors.torch import save_file
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {k: v.detach().to(torch.bfloat16).contiguous() for k, v in model.state_dict().items()}
    save_file(state, str(folder / "model.safetensors"), metadata={"format": "pt"})
    tok.save(str(folder / "tokenizer.json"))
    start, end = SPECIALS[0], SPECIALS[EOS]
    files = {
        "config.json": CONFIG,
        "generation_config.json": {"bos_token_id": 0, "eos_token_id": EOS, "pad_token_id": 0, "do_sample": False},
        "special_tokens_map.json": {"bos_token": start, "eos_token": end, "pad_token": start,
                                    "additional_special_tokens": SPECIALS[1:]},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": False, "add_prefix_space": False,
            "bos_token": start, "eos_token": end, "pad_token": start, "unk_token": None,
            "additional_special_tokens": SPECIALS[1:], "model_max_length": CONFIG["max_position_embeddings"],
            "clean_up_tokenization_spaces": False, "chat_template": CHAT_TEMPLATE,
            "added_tokens_decoder": {str(i): {"content": t, "lstrip": False, "normalized": False, "rstrip": False,
                                              "single_word": False, "special": True} for i, t in enumerate(SPECIALS)}}}
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def load_tokenizer(folder):
    from tokenizers import Tokenizer
    return Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))


def load_state(folder):
    from safetensors.torch import load_file
    return {k: v.float() for k, v in load_file(str(Path(folder) / "model.safetensors")).items()}


# ----------------------------------------------------------------------------------------------- model

def build_model(state=None):
    """LlamaForCausalLM in its smallest form; parameter names are those of the checkpoint."""
    import torch
    from torch import nn
    import torch.nn.functional as F
    c = CONFIG
    hid, heads, kv, dim = c["hidden_size"], c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]

    def rotate(x, cos, sin):
        half = dim // 2
        return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj = nn.Linear(hid, heads * dim, bias=False)
            self.k_proj = nn.Linear(hid, kv * dim, bias=False)
            self.v_proj = nn.Linear(hid, kv * dim, bias=False)
            self.o_proj = nn.Linear(heads * dim, hid, bias=False)

        def forward(self, x, cos, sin, mask, cache):
            b, t, _ = x.shape
            q = rotate(self.q_proj(x).view(b, t, heads, dim).transpose(1, 2), cos, sin)
            k = rotate(self.k_proj(x).view(b, t, kv, dim).transpose(1, 2), cos, sin)
            v = self.v_proj(x).view(b, t, kv, dim).transpose(1, 2)
            if cache is not None:
                if cache:
                    k, v = torch.cat((cache[0], k), 2), torch.cat((cache[1], v), 2)
                cache[:] = [k, v]
            k, v = (z.repeat_interleave(heads // kv, 1) for z in (k, v))
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and t > 1)
            return self.o_proj(y.transpose(1, 2).reshape(b, t, heads * dim))

    class MLP(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_proj = nn.Linear(hid, c["intermediate_size"], bias=False)
            self.up_proj = nn.Linear(hid, c["intermediate_size"], bias=False)
            self.down_proj = nn.Linear(c["intermediate_size"], hid, bias=False)

        def forward(self, x):
            return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.input_layernorm = nn.RMSNorm(hid, eps=c["rms_norm_eps"])
            self.self_attn = Attention()
            self.post_attention_layernorm = nn.RMSNorm(hid, eps=c["rms_norm_eps"])
            self.mlp = MLP()

        def forward(self, x, *args):
            x = x + self.self_attn(self.input_layernorm(x), *args)
            return x + self.mlp(self.post_attention_layernorm(x))

    class Body(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed_tokens = nn.Embedding(c["vocab_size"], hid)
            self.layers = nn.ModuleList(Layer() for _ in range(c["num_hidden_layers"]))
            self.norm = nn.RMSNorm(hid, eps=c["rms_norm_eps"])

    class Llama(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = Body()
            freq = c["rope_theta"] ** (-torch.arange(0, dim, 2) / dim)
            angle = torch.outer(torch.arange(c["max_position_embeddings"]).float(), freq).repeat(1, 2)
            self.cos, self.sin = angle.cos(), angle.sin()
            for name, p in self.named_parameters():
                if "norm" not in name:
                    std = 0.05 if "embed" in name else p.shape[1] ** -0.5
                    if "o_proj" in name or "down_proj" in name:
                        std /= (2 * c["num_hidden_layers"]) ** 0.5
                    nn.init.normal_(p, 0, std)

        def forward(self, ids, positions, mask=None, caches=None):
            x = self.model.embed_tokens(ids)
            cos, sin = self.cos[positions].unsqueeze(1), self.sin[positions].unsqueeze(1)
            for i, layer in enumerate(self.model.layers):
                x = layer(x, cos, sin, mask, None if caches is None else caches[i])
            return self.model.norm(x)

        def logits(self, hidden):
            return F.linear(hidden, self.model.embed_tokens.weight)

    model = Llama()
    if state is not None:
        model.load_state_dict(state)
    return model


# -------------------------------------------------------------------------------------------- training

def batches(tok, doc, rows=6, length=128):
    """Endless batches of whole documents packed into rows: ids, targets, loss weights, document number, position."""
    import torch
    waiting = []

    def encode():
        docs = [doc() for _ in range(128)]
        heads = tok.encode_batch(["" if p is None else render(p) for p, _ in docs])
        tails = tok.encode_batch([a + ("<|endoftext|>" if p is None else "<|im_end|>\n") for p, a in docs])
        for (prompt, _), head, tail in zip(docs, heads, tails):
            weight = [0.1] * len(head.ids) + [0.5 if prompt is None else 1.0] * len(tail.ids)
            if prompt is not None:
                weight[-1] = 0.1  # the newline behind the end of the answer
            if len(weight) <= length:
                yield head.ids + tail.ids, weight

    while True:
        ids, weights, owner, pos = ([[] for _ in range(rows)] for _ in range(4))
        number = 0
        while True:
            if not waiting:
                waiting = list(encode())
            seq, weight = waiting[-1]
            row = max(range(rows), key=lambda i: len(ids[i]) if len(ids[i]) + len(seq) <= length else -1)
            if len(ids[row]) + len(seq) > length:
                break  # fits nowhere: it opens the next batch
            waiting.pop()
            number += 1
            ids[row] += seq
            weights[row] += [0.0] + weight[1:]  # the first token of a document is not predicted
            owner[row] += [number] * len(seq)
            pos[row] += range(len(seq))
        ids, weights, owner, pos = ([x + [0] * (length - len(x)) for x in field] for field in (ids, weights, owner, pos))
        yield tuple(map(torch.tensor, (ids, weights, owner, pos)))


def fit(model, tok, doc_at, steps, lr, floor, warmup, decay, log, checkpoint=None):
    """AdamW with cosine decay. `doc_at(step)` gives the document source; frozen parameters have no gradient."""
    import torch
    import torch.nn.functional as F
    params = [p for p in model.parameters() if p.requires_grad]
    opt = torch.optim.AdamW([{"params": [p for p in params if p.ndim > 1], "weight_decay": decay},
                             {"params": [p for p in params if p.ndim == 1], "weight_decay": 0.0}],
                            betas=(0.9, 0.98), lr=lr)
    step_now = [0]
    source = batches(tok, lambda: doc_at(step_now[0]))
    began, shown = time.time(), []
    for step in range(steps):
        step_now[0] = step
        ids, weight, owner, pos = next(source)
        length = ids.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        mask = ((owner[:, :, None] == owner[:, None, :]) & causal).unsqueeze(1)
        hidden = model(ids, pos, mask)[:, :-1]
        weight, target = weight[:, 1:], ids[:, 1:]
        used = weight > 0
        loss = F.cross_entropy(model.logits(hidden[used]), target[used], reduction="none")
        loss = (loss * weight[used]).sum() / weight.sum()
        rate = min(1.0, (step + 1) / warmup) * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * step / steps)))
        for group in opt.param_groups:
            group["lr"] = lr * rate
        opt.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        opt.step()
        shown.append(loss.item())
        if (step + 1) % 50 == 0 or step + 1 == steps:
            mean, seconds = sum(shown) / len(shown), time.time() - began
            print(f"{log} step {step + 1}/{steps} loss {mean:.4f} {seconds:.0f} s", flush=True)
            shown = []
        if checkpoint and (step + 1) % 500 == 0:
            checkpoint()


def train_base(out, tok, steps, seed):
    import torch
    torch.manual_seed(seed)
    model, r = build_model(), random.Random(f"base/{seed}")
    fit(model, tok, lambda step: copy_doc(r) if step < COPY_STEPS else mixture_doc(r), COPY_STEPS + steps,
        lr=2e-3, floor=0.03, warmup=100, decay=0.1, log="base", checkpoint=lambda: save_folder(out, model, tok))
    save_folder(out, model, tok)


def train_expert(out, base, tok, task, steps, lr, seed):
    import torch
    torch.manual_seed(seed)
    model, r = build_model(load_state(base)), random.Random(f"{task}/{seed}")
    for name, p in model.named_parameters():
        p.requires_grad_("_proj" in name)  # embedding and norms stay the base's
    fit(model, tok, lambda step: expert_doc(r, task), steps, lr=lr, floor=0.0, warmup=30, decay=0.0, log=task)
    save_folder(out, model, tok)


# ------------------------------------------------------------------------------------------ evaluation

def generate(model, tok, prompts, max_new=64):
    """Greedy answers. Prompts of equal length share a batch, so there is no padding to mask."""
    import torch
    encoded = [tok.encode(render(p)).ids for p in prompts]
    by_length, answers = {}, [""] * len(prompts)
    for i, ids in enumerate(encoded):
        by_length.setdefault(len(ids), []).append(i)
    with torch.inference_mode():
        for length, members in by_length.items():
            ids = torch.tensor([encoded[i] for i in members])
            caches = [[] for _ in model.model.layers]
            alive, produced, pos = torch.ones(len(members), dtype=torch.bool), [], torch.arange(length)[None]
            for _ in range(max_new):
                ids = model.logits(model(ids, pos, None, caches)[:, -1:]).argmax(-1)
                alive &= ids[:, 0] > EOS
                if not alive.any():
                    break
                produced.append(torch.where(alive, ids[:, 0], EOS))
                pos = pos[:, -1:] + 1
            for row, i in enumerate(members):
                answers[i] = tok.decode([int(t[row]) for t in produced if t[row] > EOS])
    return answers


def score(model, tok, tests):
    """Percentage of right answers for every task in `tests` (task -> records)."""
    recs = [rec for group in tests.values() for rec in group]
    texts = iter(generate(model, tok, [rec["messages"][0]["content"] for rec in recs]))
    return {task: 100 * sum(matches(next(texts), rec) for rec in group) / len(group) for task, group in tests.items()}


def wilson(percent, n, z=1.96):
    p = percent / 100
    mid, half = p + z * z / 2 / n, z * math.sqrt(p * (1 - p) / n + z * z / 4 / n / n)
    return 100 * (mid - half) / (1 + z * z / n), 100 * (mid + half) / (1 + z * z / n)


def one_bit(delta, signs=None):
    """alpha * sign with one alpha per row, sign(0) = +1. `signs` replaces the signs (the control)."""
    import torch
    plus_minus = torch.where(delta >= 0, 1.0, -1.0) if signs is None else signs
    return delta.abs().mean(1, keepdim=True) * plus_minus


def evaluate(models, n, seed):
    """The reference table as markdown lines."""
    import torch
    tok, base = load_tokenizer(models / "base"), load_state(models / "base")
    deltas = {t: {k: v - base[k] for k, v in load_state(models / t).items()} for t in TASKS}
    tests = {t: list(map(record, draw_distinct(t, "test", n, seed))) for t in (*TASKS, "mixed")}
    linear = [k for k in base if "_proj" in k]
    gen = torch.Generator().manual_seed(seed)
    lines = ["| model | chat | math | code | mixed |", "|---|---|---|---|---|"]

    def run(change, only=None):
        state = {k: v + change[k] if k in change else v for k, v in base.items()}
        return score(build_model(state), tok, tests if only is None else {only: tests[only]})

    def row(name, result):
        cells = ["{:.1f} ({:.0f}-{:.0f})".format(result[t], *wilson(result[t], n)) if t in result else "" for t in tests]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
        print(lines[-1], file=sys.stderr, flush=True)

    def own(name, change):
        row(name, {t: run(change(deltas[t]), t)[t] for t in TASKS})

    row("base", run({}))
    for t in TASKS:
        row(f"{t} expert", run(deltas[t]))
    for t in TASKS:
        row(f"{t} expert, 1-bit linear, alpha per row", run({k: one_bit(deltas[t][k]) for k in linear}))
    own("linear deltas dropped, own task", lambda d: {k: v for k, v in d.items() if k not in linear})
    own("random signs, own task", lambda d: {
        k: one_bit(d[k], torch.randint(0, 2, d[k].shape, generator=gen) * 2.0 - 1) for k in linear})
    for lam in (0.3, 0.5, 1.0):
        row(f"task arithmetic, lambda {lam}", run({k: lam * sum(deltas[t][k] for t in TASKS) for k in base}))

    lines += ["", f"Right answers in % (95 % Wilson interval); {n} distinct test prompts per task, greedy decoding, f32.",
              "", "| relative norm of the deltas, % | chat | math | code |", "|---|---|---|---|"]
    for group, part in (("attention", "self_attn"), ("mlp", ".mlp."), ("embedding", "embed"), ("norms", "norm")):
        cells = []
        for t in TASKS:
            moved, size = (sum(float(x[k].square().sum()) for k in base if part in k) for x in (deltas[t], base))
            cells.append(f"{100 * math.sqrt(moved / size):.2f}")
        lines.append(f"| {group} | " + " | ".join(cells) + " |")
    return lines


MARK = "<!-- measured by train_experts.py, do not edit below -->"


def command_eval(args):
    import torch
    torch.set_num_threads(args.threads)
    lines = evaluate(Path(args.models), args.test, args.seed)
    readme = Path(args.models) / "README.md"
    if args.readme:
        text = readme.read_text(encoding="utf-8") if readme.exists() else f"# The example models\n\n{MARK}\n"
        readme.write_text(text.split(MARK)[0] + MARK + "\n\n" + "\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


def command_train(args):
    import torch
    torch.set_num_threads(args.threads)
    out = Path(args.out)
    if "base" in args.stages:
        train_base(out / "base", train_tokenizer(args.seed), args.steps, args.seed)
    tok = load_tokenizer(out / "base")
    for task in TASKS:  # from the rounded base: the deltas are differences of what is on disk
        if task in args.stages:
            train_expert(out / task, out / "base", tok, task, EXPERT_STEPS[task], args.expert_lr, args.seed)
    if "eval" in args.stages:
        command_eval(argparse.Namespace(models=out, test=400, seed=args.seed, threads=args.threads, readme=True))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    p = commands.add_parser("data", help="write test, validation and router prompts")
    p.add_argument("--out", required=True)
    p.add_argument("--test", type=int, default=400, help="test prompts per task")
    p.add_argument("--valid", type=int, default=200, help="validation prompts per task")
    p.add_argument("--router", type=int, default=300, help="router training prompts per task")
    p.add_argument("--seed", type=int, default=0)
    p.set_defaults(run=command_data)
    p = commands.add_parser("train", help="train the family")
    p.add_argument("--out", required=True)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--steps", type=int, default=5000, help=f"steps of the base after {COPY_STEPS} steps of copying")
    p.add_argument("--expert-lr", type=float, default=3e-4)
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--stages", nargs="+", choices=["base", *TASKS, "eval"], default=["base", *TASKS, "eval"])
    p.set_defaults(run=command_train)
    p = commands.add_parser("eval", help="print the reference table")
    p.add_argument("--models", required=True)
    p.add_argument("--test", type=int, default=400)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--readme", action="store_true", help="put the table into the models' README.md")
    p.set_defaults(run=command_eval)
    args = parser.parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    main()
