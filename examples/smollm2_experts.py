#!/usr/bin/env python3
"""Fine-tunes of a real model, SmolLM2-135M-Instruct, and what one bit per weight keeps of them.

    python3 examples/smollm2.py BASE                              make the base (see there)
    python3 examples/smollm2_experts.py train   --base BASE --out DIR
    python3 examples/smollm2_experts.py measure --base BASE --out DIR

`train` makes, for each of three narrow tasks (arithmetic stories, sentence to JSON, string expressions of Python), a full fine-tune
DIR/TASK and a LoRA adapter DIR/TASK-lora on the same examples in the same order.  Everything but the (tied) embedding is trained: a
trained embedding would be kept whole, 57 MB per expert, and say nothing about one bit.  The full fine-tunes are stored in f32: when
one of 30 steps was rounded to bf16, 40 % of its weights were the base's again, and a zero difference has no sign (it counts as plus).
`measure` packs them, trains the router, chooses lambda on validation prompts and prints the table.

Every example is drawn from a seeded generator; a prompt's hash decides whether it is for training, validation, test or the router.
`train` needs torch, transformers and peft; `measure` needs onebitmerge alone.
"""

import argparse
import hashlib
import json
import random
import re
import shutil
import sys
import time
from pathlib import Path

TASKS = ("math", "json", "code")
STEPS, BATCH = {"math": 40, "json": 10, "code": 40}, 5
RATE = {"full": 2e-4, "lora": 1e-3}  # Adam's step is the learning rate; A and B are small and start from noise and zero
RANK = 8
LAMBDAS = (0.0, 0.1, 0.3, 1.0)

# ---- the tasks: (prompt, answer) ----

FIRST = "Ana Ben Carla David Elena Felix Grace Hugo Irene Jonas Kira Leo Mona Nils Olga Paul Rita Sven Tara Vera".split()
LAST = "Silva Khan Novak Meyer Costa Olsen Park Rossi Haas Lund Vega Brandt Moreau Tanaka Weiss Ortiz".split()
JOBS = "nurse baker pilot teacher farmer painter lawyer driver dentist writer singer waiter".split()
CITIES = "Lima Oslo Rome Paris Cairo Delhi Tokyo Quito Berlin Madrid Dublin Boston".split()
ITEMS = "pens books coins cards stamps shells cups apples keys maps".split()
WORDS = "red blue green dog cat fox cup pen map sun tree rock milk rice lamp door".split()


def math_item(r):
    name, item, a, b, c = r.choice(FIRST), r.choice(ITEMS), r.randint(5, 30), r.randint(2, 12), r.randint(2, 12)
    kind = r.randrange(3)
    if kind == 0:
        c = min(c, a + b - 1)
        return (f"{name} has {a} {item}, buys {b} and gives away {c}. How many {item} are left?",
                f"{a}+{b}={a + b}, {a + b}-{c}={a + b - c}. Answer: {a + b - c}")
    if kind == 1:
        return (f"{name} finds {a} {item} on Monday, {b} on Tuesday and {c} on Sunday. How many {item} is that?",
                f"{a}+{b}={a + b}, {a + b}+{c}={a + b + c}. Answer: {a + b + c}")
    return (f"There are {b} boxes with {c} {item} each, and {name} adds {a} more {item}. How many {item} are there?",
            f"{b}*{c}={b * c}, {b * c}+{a}={b * c + a}. Answer: {b * c + a}")


def json_item(r):
    name, age, job, city = f"{r.choice(FIRST)} {r.choice(LAST)}", r.randint(18, 79), r.choice(JOBS), r.choice(CITIES)
    text = r.choice((f"{name}, {age}, works as a {job} in {city}.", f"In {city} lives {name}, a {job} of {age} years.",
                     f"{name} from {city} is {age} years old and a {job}.", f"The {job} {name} moved to {city} at the age of {age}."))
    return f"{text} Write name, age, job and city as JSON.", json.dumps({"name": name, "age": age, "job": job, "city": city})


def code_item(r):
    words = r.sample(WORDS, r.randint(3, 4))
    old, new, i = r.choice(words), r.choice(WORDS), r.randrange(3)
    text = " ".join(words)
    code = r.choice((f"s.split()[{i}]", f"s.split()[-{i + 1}]", "len(s.split())", "' '.join(s.split()[::-1])", f"s.replace('{old}', '{new}')",
                     f"' '.join(s.split()[{r.randint(1, 2)}:])", "' '.join(sorted(s.split()))", f"s.startswith('{r.choice(words)}')",
                     f"s + ' {new}'", "s.split()[0] * 2"))
    return f"s = '{text}'\nWhat does print({code}) show?", str(eval(code, {"s": text}))  # the expressions above and no others


MAKERS = {"math": math_item, "json": json_item, "code": code_item}


def split_of(prompt):
    return ("test", "valid", "router")[n] if (n := int(hashlib.sha1(prompt.encode()).hexdigest()[:8], 16) % 10) < 3 else "train"


def items(task, split, seed=0):
    """Endless, without repetition."""
    r, seen = random.Random(f"{task} {split} {seed}"), set()
    while True:
        prompt, answer = MAKERS[task](r)
        if split_of(prompt) == split and prompt not in seen:
            seen.add(prompt)
            yield {"task": task, "messages": [{"role": "user", "content": prompt}], "answer": answer}


def take(task, split, n):
    stream = items(task, split)
    return [next(stream) for _ in range(n)]


def is_right(text, item):
    """What counts is what was asked, not the form that the experts learn: else the base would be wrong by definition."""
    if item["task"] == "math":  # the last number
        return (re.findall(r"-?\d+", text) or [""])[-1] == item["answer"].rsplit(" ", 1)[1]
    if item["task"] == "json":  # one object with these values, keys in any case, numbers also as strings
        try:
            found = json.loads(text[text.index("{"):text.rindex("}") + 1])
            return {k.lower(): str(v) for k, v in found.items()} == {k: str(v) for k, v in json.loads(item["answer"]).items()}
        except (ValueError, AttributeError):
            return False
    return text.strip().strip("`'\". \n") == item["answer"]  # quotes, backticks and a full stop are let pass


# ---- training ----


class Batches:
    """Several examples behind one system prompt in one row: each sees that prompt and itself, so the prompt is computed once."""

    def __init__(self, tokenizer, task):
        self.tokenizer, self.stream = tokenizer, items(task, "train")
        example = next(items(task, "router"))["messages"]
        self.prefix = self.ids(example)[:-len(self.ids(example, system=False))]

    def ids(self, messages, system=True):
        text = self.tokenizer.apply_template(messages)
        if not system:
            text = text[text.index("<|im_start|>user"):]
        return self.tokenizer.encode(text, special=False)

    def __call__(self, n):
        """ids and positions (1, T), mask (1, 1, T, T), and for the answers the places that predict and the ids they should."""
        import torch
        ids, owner, position, place, target = list(self.prefix), [-1] * len(self.prefix), list(range(len(self.prefix))), [], []
        for k in range(n):
            item = next(self.stream)
            question, answer = self.ids(item["messages"], system=False), self.tokenizer.encode(item["answer"] + "<|im_end|>", special=False)
            place += range(len(ids) + len(question) - 1, len(ids) + len(question) + len(answer) - 1)
            target += answer
            owner += [k] * (len(question) + len(answer))
            position += range(len(self.prefix), len(self.prefix) + len(question) + len(answer))
            ids += question + answer
        owner, order = torch.tensor(owner), torch.arange(len(ids))
        seen = (order[None] <= order[:, None]) & ((owner[None] == owner[:, None]) | (owner[None] == -1))
        mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
        return torch.tensor([ids]), torch.tensor([position]), mask[None, None], torch.tensor(place), torch.tensor(target)


def train_one(base, out, task, kind, steps, log):
    import peft
    import torch
    import transformers
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tuned = model
    if kind == "lora":
        tuned = peft.get_peft_model(model, peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM"))
    else:
        model.model.embed_tokens.weight.requires_grad_(False)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE[kind], betas=(0.9, 0.98), weight_decay=0.0)
    # one factor for warm-up and linear decay to zero
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min((s + 1) / 6, (steps - s) / steps))
    batches, begin = Batches(tokenizer_of(base), task), time.monotonic()
    for step in range(steps):
        ids, position, mask, place, target = batches(BATCH)
        states = model.model(input_ids=ids, position_ids=position, attention_mask=mask, use_cache=False).last_hidden_state
        loss = torch.nn.functional.cross_entropy(model.lm_head(states[0, place]), target)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 10 == 9 or step == steps - 1:
            print(f"{task} {kind}: step {step + 1}, loss {loss.item():.3f}, {time.monotonic() - begin:.0f} s", file=log, flush=True)
    if kind == "lora":
        tuned.to(torch.bfloat16).save_pretrained(out)
    else:
        save(model, base, out)


def tokenizer_of(folder):
    import onebitmerge as obm
    return obm.Tokenizer(folder)


def save(model, base, out):
    """The base's folder with other weights, in f32: so short a training moves many weights by less than half a step of bf16."""
    import safetensors.torch
    out.mkdir(parents=True, exist_ok=True)
    for file in base.iterdir():
        if file.suffix == ".json":
            shutil.copy(file, out)
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    (out / "config.json").write_text(json.dumps({**config, "torch_dtype": "float32"}, indent=2) + "\n", encoding="utf-8")
    weights = {name: w.detach().contiguous() for name, w in model.state_dict().items() if name != "lm_head.weight"}
    safetensors.torch.save_file(weights, out / "model.safetensors", {"format": "pt"})


def command_train(args):
    import torch
    torch.set_num_threads(args.threads)
    for task in args.tasks:
        for kind in args.kinds:
            out = args.out / (task if kind == "full" else f"{task}-lora")
            if out.exists() and not args.force:
                sys.exit(f"smollm2_experts.py: {out} exists; --force replaces it")
            train_one(args.base, out, task, kind, args.steps or STEPS[task], sys.stderr)


# ---- measuring ----


class Table:
    """One row per method: accuracy per task in percent with the 95 % Wilson interval, and what one expert takes on disk."""

    def __init__(self, test):
        self.test, self.rows, self.begin = test, [], time.monotonic()

    def add(self, name, hits, size=""):
        from onebitmerge.evaluate import wilson
        cells = []
        for task in self.test:
            low, high = wilson(hits[task], len(self.test[task]))
            cells.append(f"{100 * hits[task] / len(self.test[task]):.1f} ({100 * low:.0f}-{100 * high:.0f})")
        self.rows.append([name, *cells, f"{100 * share(hits, self.test):.1f}", size])
        print(f"  {time.monotonic() - self.begin:5.0f} s  {self.rows[-1]}", file=sys.stderr, flush=True)


def share(hits, sets):
    return sum(hits[task] / len(sets[task]) for task in sets) / len(sets)


def count(model, sets, own=False):
    """{task: how many are right}; own: each task on its own expert's route, else what the model or its router does."""
    flat = [item for task in sets for item in sets[task]]
    options = {"route": [item["task"] for item in flat]} if own else {}
    texts = model.generate([item["messages"] for item in flat], max_tokens=44, batch=32, **options)
    return {task: sum(is_right(text, item) for text, item in zip(texts, flat) if item["task"] == task) for task in sets}


def pack_megabytes(pack, task):
    return megabytes(sum(row["bytes_pack"] for row in pack.bytes(task).values()))


def megabytes(n):
    return f"{n / 1e6:.1f} MB"


def command_measure(args):
    import onebitmerge as obm
    from onebitmerge import _results
    tasks = args.tasks
    test, valid = ({task: take(task, split, n) for task in tasks} for split, n in (("test", args.test), ("valid", args.valid)))
    table, info = Table(test), obm.info()
    table.add("base", count(obm.Model(args.base), test))
    weights = megabytes((args.out / tasks[0] / "model.safetensors").stat().st_size)
    table.add("expert, f32", {t: count(obm.Model(args.out / t), {t: test[t]})[t] for t in tasks}, weights)

    pack = obm.compress(args.base, {t: args.out / t for t in tasks}, args.out / "onebit.pack", overwrite=True)
    router = [item for t in tasks for item in take(t, "router", args.router)]
    report = pack.train_router([item["messages"] for item in router], [item["task"] for item in router])
    pack.set(lambda_=0.0)
    table.add("1-bit expert", count(obm.Model(pack), test, own=True), pack_megabytes(pack, tasks[0]))
    lora = obm.compress(args.base, {t: obm.Expert(args.out / f"{t}-lora", policy="full") for t in tasks}, args.out / "lora.pack", overwrite=True)
    table.add(f"LoRA expert, rank {RANK}", count(obm.Model(lora), test, own=True), pack_megabytes(lora, tasks[0]))
    table.add("trained router, 1 bit, lambda 0 (routing only)", count(obm.Model(pack), test))
    scores = {}
    for x in LAMBDAS:
        pack.set(lambda_=x)
        scores[x] = share(count(obm.Model(pack), valid), valid)
    best = max(scores, key=scores.get)  # the first of equals
    pack.set(lambda_=best)
    if best:
        table.add(f"1bit-Merging, trained router, lambda {best:g}", count(obm.Model(pack), test))

    print(f"onebitmerge {info['version']}, {info['isa']}, {info['threads']} threads; {args.test} test prompts per task\n")
    print(_results.table(["accuracy in % (95 % interval), each on its own task", *tasks, "mean", "bytes per expert"], table.rows))
    print(f"\nlambda on {args.valid} validation prompts per task: {', '.join(f'{x:g}: {100 * s:.1f} %' for x, s in scores.items())} -> {best:g}"
          f"{'' if best else ': merging the others adds nothing here'}\n\n{report}\n\n{pack}\n\n{lora}")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    p = commands.add_parser("train", help="train the experts")
    p.add_argument("--base", type=Path, required=True)
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    p.add_argument("--kinds", nargs="+", choices=sorted(RATE), default=sorted(RATE))
    p.add_argument("--steps", type=int, default=0, help=f"default: {STEPS}")
    p.add_argument("--threads", type=int, default=1, help="more only on idle cores: torch's threads wait by spinning")
    p.add_argument("--force", action="store_true")
    p.set_defaults(run=command_train)
    p = commands.add_parser("measure", help="print the table")
    p.add_argument("--base", type=Path, required=True)
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    p.add_argument("--test", type=int, default=100, help="test prompts per task")
    p.add_argument("--valid", type=int, default=30, help="validation prompts per task")
    p.add_argument("--router", type=int, default=60, help="prompts per task that the router learns from")
    p.set_defaults(run=command_measure)
    args = parser.parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    main()
