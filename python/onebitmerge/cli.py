"""The command line: onebitmerge VERB ...

Results go to stdout (--json: JSON lines), progress and warnings to stderr.  Exit codes: 0 done, 1 failed, 2 wrong usage;
130, interrupted, and the ends by a signal are __main__'s.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import sys
import warnings

import onebitmerge as obm
from onebitmerge import _core, _results
from onebitmerge._results import percent
from onebitmerge.evaluate import LAMBDAS, READINGS, evaluate, prompt_of
from onebitmerge.items import Item, check_keys, check_options, check_route, check_vocabulary, located, need, read_lines, wrong

NUMA = ("auto", "shard", "replicate", "isolate", "interleave", "off")
ROUTER = "a function of one's own in place of the pack's router: it gets the request and returns a task, an index or weights"
POLICIES = ("linear", "attention", "mlp", "paper", "full")


class Failure(Exception):
    """One clear line and exit code 1."""


class Usage(Exception):
    """One clear line and exit code 2."""


# ---- input and output ----


def clean(value):
    """JSON has no NaN and no infinity: null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: clean(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [clean(v) for v in value]
    return value


def emit(record):
    print(json.dumps(clean(record), ensure_ascii=False, allow_nan=False), flush=True)


def progress_of(args):
    return True if sys.stderr.isatty() and not args.quiet else None


def number(value, digits=4):
    return "-" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def print_plan(args, plan, what, at_most=""):
    """at_most: tensors that turn out equal to the base's take no bytes, and a dry run does not read them."""
    output = getattr(args, "output", None)
    exists = bool(output) and os.path.lexists(output)
    if args.json:
        return emit({"dry_run": True, **plan, **({"exists": exists} if output else {})})
    tiles = f" in {plan['tiles']} tiles" if "tiles" in plan else ""
    print(f"{what}: {plan['tensors']} tensors{tiles}, reads {_results.size(plan['bytes_read'])}, writes {at_most}{_results.size(plan['bytes_written'])}, "
          f"peak memory about {_results.size(plan['peak_memory'])}, about {plan['seconds']:.1f} s; nothing was written{f', {output} exists already' if exists else ''}")


def output_of(args):
    if os.path.lexists(args.output) and not args.force:
        raise Failure(f"{args.output} exists; --force replaces it")
    return args.output


def is_pack(path):
    return os.path.isfile(os.path.join(path, "pack.json"))


def open_model(args):
    if args.base and not is_pack(args.model):
        raise Usage("--base goes with a pack; this is a plain model")
    return obm.Model(args.model, base=args.base, materialise=args.materialise, z12=args.z12, progress=progress_of(args), prefill=args.prefill)


def parse_size(text):
    """"5GB", "500M", "64MiB", "1000000": bytes; 0 stands for the default."""
    units = {"": 1, **{u: 1000**i for i, u in enumerate("kmgt", 1)}, **{f"{u}i": 1024**i for i, u in enumerate("kmgt", 1)}}
    body = text.strip().lower().removesuffix("b")
    digits = body.rstrip("kmgti")
    try:
        value = float(digits) * units[body[len(digits):]]
    except (KeyError, ValueError):
        raise argparse.ArgumentTypeError(f"\"{text}\" is not a size (like 500MB, 5GB or 64MiB)") from None
    if value != 0 and not 1 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"\"{text}\" is not a size between 1 byte and 2^63")
    return int(value)


def load_router(spec):
    """FILE.py:FUNCTION, or FILE.lua (run by the lua5.4 interpreter)."""
    if spec.endswith(".lua"):
        from onebitmerge.lua_router import LuaRouter
        return LuaRouter(spec)
    path, _, name = spec.rpartition(":")
    if not path or not path.endswith(".py"):
        raise Usage(f"--router takes FILE.py:FUNCTION or FILE.lua, found \"{spec}\"")
    if not os.path.isfile(path):
        raise Failure(f"{path}: no such file")
    import importlib.util
    module_spec = importlib.util.spec_from_file_location("onebitmerge_user_router", path)
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    if not callable(getattr(module, name, None)):
        raise Failure(f"{path} has no function \"{name}\"")
    return getattr(module, name)


# ---- verbs ----


def base_weights(info):
    return "bf16, f16 and f32 as they are; bf16 also in 12 bits per weight (z12), " + (
        "behind the first tokens of models that the caches do not hold" if info["z12_auto"] else f"where --z12 on asks for it ({info['isa']}: not by itself)")


def prompts(info):
    if not info["prefill_bf16"]:
        return "f32"
    tiles = ", by AMX tiles, whose speed has not been measured (ONEBITMERGE_ISA=avx512: without)"
    return "f32; with --prefill bf16 the CPU's products of bf16" + (tiles if info["isa"] == "amx" else "")


def doctor(args):
    import importlib.util
    import shutil
    info = obm.info()
    optional = {"jinja2": "pip install jinja2 (the models' own chat templates)", "tqdm": "pip install tqdm (progress bars)"}
    missing = {m: how for m, how in optional.items() if importlib.util.find_spec(m) is None}
    lua = shutil.which("lua5.4") or shutil.which("lua")
    if args.json:
        return emit({**info, "python": sys.version.split()[0], "lua": lua, "missing": missing})
    rows = [["version", info["version"]], ["compiler", info["compiler"]], ["python", sys.version.split()[0]],
            ["ISA in use", info["isa"]], ["ISA available", info["isa_available"]], ["BLAS", info["blas"]],
            ["base weights", base_weights(info)],
            ["prompts", prompts(info)],
            ["topology", info["topology"]], ["threads", f"{info['threads']} (of {info['cores']} cores, {info['nodes']} NUMA node{'s' * (info['nodes'] != 1)})"],
            ["memory", f"{_results.size(info['memory_free'])} free of {_results.size(info['memory_total'])}"],
            ["lua", lua or "not found: apt-get install lua5.4 (only for --router FILE.lua)"]]
    for name, value in rows:
        print(f"{name:<14} {value}")
    for module, how in missing.items():
        print(f"{'missing':<14} {module}: {how}")


def ranges(pairs):
    return "-" if pairs is None else ", ".join(f"{a}..{b - 1}" if b > a else "none" for a, b in pairs)


def plan(args):
    if args.base and not is_pack(args.model):
        raise Usage("--base goes with a pack; this is a plain model")
    p = obm.plan(args.model, topology=args.topology, numa=args.numa, threads=args.threads, base=args.base, z12=args.z12, kv=args.kv)
    found = verify_placement(args) if args.verify_placement else None
    if args.json:
        return emit(p if found is None else {**p, "verified": found})
    print(f"numa {p['numa']}" + (f" ({p['asked']} was asked for)" if p["asked"] != p["numa"] else "") + f": {p['reason']}")
    print(_results.table(["node", "memory", "cores", "workers", "weights", "planes", "KV per position", "KV heads", "remote per token"],
                         [[n["os_index"], _results.size(n["memory"]), n["cores"], n["workers"], _results.size(n["weight_bytes"]),
                           _results.size(n["plane_bytes"]), _results.size(n["kv_bytes"]), ranges(n["kv_heads"] and [n["kv_heads"]]),
                           _results.size(n["remote_bytes"])] for n in p["nodes"]]))
    print()
    print(_results.table(["matrix", "of", "rows", "cols", "bytes", "rows of each node"],
                         [[m["role"], m["layers"], m["rows"], m["cols"], _results.size(m["bytes"]), ranges(m["nodes"])] for m in p["matrices"]]))
    print()
    print(_results.table(["worker", "cpu", "node"] + [m["role"] for m in p["matrices"]],
                         [[i, "any" if w["cpu"] is None else w["cpu"], p["nodes"][w["node"]]["os_index"]] +
                          [ranges(m["workers"] and [m["workers"][i]]) for m in p["matrices"]] for i, w in enumerate(p["workers"])]))
    print(f"\na token reads {_results.size(p['weight_bytes_per_token'])} of weights and planes, "
          f"{_results.size(p['remote_weight_bytes_per_token'])} of them from another node's memory, and passes "
          f"{_results.size(p['remote_activation_bytes_per_token'])} of activations between nodes")
    if found:
        print_found(p, found)


def verify_placement(args):
    if args.topology:
        raise Usage("--verify-placement is about this machine; --topology is about another")
    obm.set_threads(args.threads, args.numa)
    return obm.Model(args.model, base=args.base, z12=args.z12, kv=args.kv, progress=progress_of(args)).verify_placement()


def print_found(p, found):
    parts = [name for name in ("weights", "planes", "kv") if name in found]
    if not parts:
        print("\nnothing is placed: the system decides where pages go")
        return
    print()
    print(_results.table(["pages found"] + [f"node {n['os_index']}" for n in p["nodes"]] + ["other nodes", "not in memory", "remote"],
                         [[name, *map(_results.size, found[name]["nodes"]), _results.size(found[name]["other"]), _results.size(found[name]["absent"]),
                           "-" if found[name]["remote_bytes"] is None else _results.size(found[name]["remote_bytes"])] for name in parts]))
    if not found["bound"]:
        print("the system refused to bind memory")


def z12_of(ckpt):
    """What packing bf16 matrices into 12 bits per weight would give, from rows of each; None without such matrices."""
    counts = [c for c in map(ckpt.z12, ckpt) if c["weights"]]
    if not counts:
        return None
    return {"matrices": len(counts), "kept_plain": sum(not c["fits"] for c in counts),
            "escape_rate": sum(c["escapes"] for c in counts) / sum(c["weights"] for c in counts)}


def inspect(args):
    pack = args.model.rpartition(":")[0]
    if pack and is_pack(pack) and not os.path.exists(args.model):
        raise Failure(f"{args.model} is an expert of a pack: it goes behind its base, as in `inspect BASE {args.model}`; `pack show {pack}` tells what it holds")
    ckpt = obm.Checkpoint(args.model)
    ckpt.check_layers()
    vectors = {path: obm.TaskVector(ckpt, path) for path in args.experts}
    if args.tensors or args.checksums:
        return inspect_tensors(args, ckpt, vectors)
    classes = {}
    for name in ckpt:
        t = ckpt[name]
        row = classes.setdefault(obm.class_of(name, len(t.shape)), {"tensors": 0, "params": 0, "bytes": 0})
        row["tensors"] += 1
        row["params"] += math.prod(t.shape)
        row["bytes"] += t.nbytes
    stats = {path: v.stats(progress=progress_of(args)) for path, v in vectors.items()}
    pairs = [(a, b, vectors[a].compare(vectors[b], progress=progress_of(args)))
             for i, a in enumerate(args.experts) for b in args.experts[i + 1:]]
    z12 = z12_of(ckpt)
    if args.json:
        for cls, row in classes.items():
            emit({"kind": "class", "class": cls, **row})
        if z12:
            emit({"kind": "z12", **z12})
        for path, by_class in stats.items():
            for cls, s in by_class.items():
                emit({"kind": "delta", "expert": path, "class": cls, **s})
        for a, b, by_class in pairs:
            for cls, p in by_class.items():
                emit({"kind": "pair", "experts": [a, b], "class": cls, **p})
        return
    config = ckpt.config or {}
    keys = ("model_type", "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads",
            "vocab_size", "tie_word_embeddings")
    print(", ".join(f"{k} {config[k]}" for k in keys if k in config) or f"{args.model}: no config.json")
    print(_results.table(["class", "tensors", "parameters", "bytes"],
                         [[c, r["tensors"], r["params"], _results.size(r["bytes"])] for c, r in classes.items()]))
    if z12:
        plain = f", {z12['kept_plain']} of {z12['matrices']} matrices have more than 1 % and would stay bf16" if z12["kept_plain"] else ""
        print(f"z12 (bf16 in 12 bits): {percent(z12['escape_rate'])} of the weights would go into its list aside (16 rows of each matrix looked at){plain}")
    for path, by_class in stats.items():
        print(f"\n{path}: task vector d = expert - base (1-bit error is ||d - alpha sign d|| / ||d||)")
        print(_results.table(["class", "parameters", "||d||/||base||", "zeros", "1-bit error, matrix", "row"],
                             [[c, s["params"], percent(s["relative_norm"]), percent(s["zero_share"]), number(s["onebit_error_matrix"]),
                               number(s["onebit_error_row"])] for c, s in by_class.items()]))
    for a, b, by_class in pairs:
        print(f"\n{a} and {b}")
        print(_results.table(["class", "cosine", "sign agreement"],
                             [[c, number(p["cosine"]), number(p["sign_agreement"] if math.isfinite(p["cosine"]) else math.nan)] for c, p in by_class.items()]))


def inspect_tensors(args, ckpt, vectors):
    rows = []
    for name in ckpt:
        t = ckpt[name]
        row = {"name": name, "dtype": t.dtype, "shape": list(t.shape)}
        if args.checksums:
            row["sha256"] = ckpt.sha256(name)
        for path, v in vectors.items():
            s = v.tensor_stats(name)
            row.setdefault("deltas", {})[path] = {k: s[k] for k in ("relative_norm", "zero_share", "onebit_error_matrix", "onebit_error_row")}
        rows.append(row)
    if args.json:
        for row in rows:
            emit(row)
        return
    head = ["name", "dtype", "shape"] + (["sha256"] if args.checksums else []) + [f"||d||/||base|| {p}" for p in vectors]
    print(_results.table(head, [[r["name"], r["dtype"], "x".join(map(str, r["shape"]))] + ([r["sha256"]] if args.checksums else []) +
                                [percent(d["relative_norm"]) for d in r.get("deltas", {}).values()] for r in rows]))


def parse_map(entries):
    rules = {}
    for entry in entries or []:
        glob, eq, mode = entry.rpartition("=")
        if not eq or mode not in ("1bit", "mask", "full", "drop"):
            raise Usage(f"--map takes GLOB=1bit|mask|full|drop, found \"{entry}\"")
        rules[glob] = mode
    return rules or None


def parse_expert(text, args):
    name, eq, path = text.partition("=")
    if not eq or not name or not path:
        raise Usage(f"an expert is NAME=PATH or NAME=PATH:POLICY, found \"{text}\"")
    head, colon, tail = path.rpartition(":")
    policy = args.policy
    if colon and tail in POLICIES:
        path, policy = head, tail
    elif colon and os.path.exists(head) and not is_pack(head) and not os.path.exists(path):
        raise Usage(f"{text}: no policy \"{tail}\"{did_you_mean(tail, POLICIES) or ': ' + ', '.join(POLICIES)}")
    return name, obm.Expert(path, policy=policy, scale=args.scale, planes=args.planes, map=parse_map(args.map))


def compress(args):
    experts = {}
    for text in args.experts:
        name, expert = parse_expert(text, args)
        if name in experts:
            raise Usage(f"two experts are called \"{name}\"")
        experts[name] = expert
    if args.shared and (args.scale or args.planes) and "1bit" not in (parse_map(args.map) or {}).values():
        raise Usage(f"--{'scale' if args.scale else 'planes'} is of 1-bit planes, and with --shared matrices have masks (but where --map GLOB=1bit says otherwise)")
    given = {"profile": args.profile, "shared": args.shared, "tall_lambda": args.tall_lambda, "shared_dtype": args.shared_dtype}
    if args.dry_run:
        return print_plan(args, obm.compress(args.base, experts, args.output, dry_run=True, overwrite=args.force, **given), "compress", "at most ")
    pack = obm.compress(args.base, experts, args.output, overwrite=args.force, progress=progress_of(args), **given)
    show_pack(args, pack)


def show_pack(args, pack):
    if not args.json:
        print(_results.pack_repr(pack))
        print(_results.run_table(pack))
        for task in pack.tasks:
            print(f"{task}: {pack.policy(task)}")
        return
    for task in pack.tasks:
        for cls, b in pack.bytes(task).items():
            emit({"expert": task, "class": cls, **b, "policy": pack.policy(task), "text": pack.text(task)})
    emit({"base": pack.base.path, "base_bytes": pack.base_bytes, **({"shared": pack.shared} if pack.shared else {}), "settings": pack.settings,
          "runs": {row.pop("class"): row for row in _results.run_rows(pack)}, **{label: value for label, value in _results.pack_ratios(pack).items()}})


def add_reasons(pack, runs):
    """Overlays get `why`: an expert's full tensor (extra vocabulary rows come with one) or mask, else too many products of planes."""
    full, masks = {}, {}
    for task in pack.tasks:
        for t in pack.tensors(task):
            if t["mode"] in ("full", "mask"):
                (full if t["mode"] == "full" else masks).setdefault(t["name"], []).append(task)
    for r in runs:
        if "overlay" in (r["hard"], r["soft"]):
            found = [f"{what} in {', '.join(of[r['name']])}" for what, of in (("full", full), ("a mask", masks)) if r["name"] in of]
            r["why"] = "; ".join(found) or "more than 8 masks"


def show_runs(args, pack):
    runs = pack.runs()
    add_reasons(pack, runs)
    if args.json:
        for r in runs:
            emit(r)
        return
    print(_results.table(["tensor", "planes", "hard routes", "masks", "overlay in", "all mixed", "masks", "why an overlay"],
                         [[r["name"], r["planes"], r["hard"], r["hard_masks"], f"{r['overlays']} of {len(pack.tasks)}", r["soft"],
                           r["soft_masks"], r.get("why", "")] for r in runs], left=(0, 7)))


def show_scales(args, pack):
    planes, masks = [], []
    for task in pack.tasks:
        for tensor in pack.tensors(task):
            of = {"expert": task, "name": tensor["name"]}
            for plane, (_, scales) in enumerate(tensor["planes"]):
                alpha = [float(a) for a in scales]
                planes.append({**of, "plane": plane, "alpha": alpha[0] if len(alpha) == 1 else alpha})
            if tensor["mask"]:
                masks.append({**of, "scaling": tensor["mask"][1]})
    if args.json:
        for row in planes + masks:
            emit(row)
        return
    if planes or not masks:
        print(_results.table(["name", "expert", "plane", "scales", "least alpha", "greatest alpha"],
                             [[r["name"], r["expert"], r["plane"], len(a), f"{min(a):.6g}", f"{max(a):.6g}"]
                              for r in planes for a in [r["alpha"] if isinstance(r["alpha"], list) else [r["alpha"]]]]))
    if masks:
        print(_results.table(["name", "expert", "scaling"], [[r["name"], r["expert"], f"{r['scaling']:.6g}"] for r in masks]))


def pack_show(args):
    pack = obm.Pack(args.pack, base=args.base)
    if args.runs:
        show_runs(args, pack)
        return
    if args.scales:
        show_scales(args, pack)
        return
    show_pack(args, pack)
    with contextlib.suppress(obm.NotFoundError):
        report = pack.router_report()
        if not args.json:
            print(report)


def pack_verify(args):
    pack = obm.Pack(args.pack, base=args.base)
    pack.verify(progress=progress_of(args))
    emit({"pack": args.pack, "verified": True}) if args.json else print(f"{args.pack}: every checksum and the base agree")


def has_router(pack):
    with contextlib.suppress(obm.NotFoundError):
        return pack.router_report() is not None
    return False


def pack_add(args):
    pack = obm.Pack(args.pack, base=args.base)
    name, expert = parse_expert(args.expert, args)
    if args.dry_run and not pack.shared:   # else `add` refuses
        if name in pack.tasks and not args.force:
            raise Failure(f"pack {args.pack} has an expert {name} already, and overwriting was not asked for; --force replaces it")
        return print_plan(args, obm.compress(pack.base, {name: expert}, args.pack, dry_run=True, overwrite=True), "add", "at most ")
    routed = has_router(pack)
    pack.add(name, expert, progress=progress_of(args), overwrite=args.force)
    if routed:
        print("onebitmerge: the router was dropped: its tasks changed (router train makes a new one)", file=sys.stderr)
    show_pack(args, pack)


def pack_remove(args):
    pack = obm.Pack(args.pack, base=args.base)
    if args.dry_run:
        freed = sum(b["bytes_pack"] for b in pack.bytes(args.name).values())
        emit({"dry_run": True, "bytes_freed": freed}) if args.json else print(f"would free {_results.size(freed)}; nothing was written")
        return
    pack.remove(args.name)
    show_pack(args, pack)


def pack_set(args):
    pack = obm.Pack(args.pack, base=args.base)
    changes = {"lambda": args.lambda_, "reading": args.reading, "profile": args.profile, "density": args.density}
    settings = {**pack.settings, **{k: v for k, v in changes.items() if v is not None}}
    if not args.dry_run:
        pack.set(lambda_=args.lambda_, reading=args.reading, profile=args.profile, density=args.density)
        settings = pack.settings
    if args.json:
        return emit({**({"dry_run": True} if args.dry_run else {}), **settings})
    print(", ".join(f"{k} {v}" for k, v in settings.items()) + ("; nothing was written" if args.dry_run else ""))


def router_train(args):
    items = read_lines(args.data)
    prompts = [need(item, i, "messages", "text", "prompt") for i, item in enumerate(items)]
    labels = [need(item, i, "task") for i, item in enumerate(items)]
    pack = obm.Pack(args.pack, base=args.base)
    for i, (item, label) in enumerate(zip(items, labels)):
        if label not in pack.tasks:
            wrong(item, i, f"task: expected one of {', '.join(pack.tasks)}, found \"{label}\"")
    report = pack.train_router(prompts, labels, layer=args.layer, l2=args.l2, holdout=args.holdout, seed=args.seed,
                               progress=progress_of(args))
    if args.json:
        return emit({"accuracy": report.accuracy, "calibration_error": report.calibration_error, "tasks": report.tasks,
                     "confusion": report.confusion, "layer": report.layer, "n_train": report.n_train, "n_held_out": report.n_held_out})
    print(report)


def user_text(prompt):
    return prompt if isinstance(prompt, str) else "\n".join(m["content"] for m in prompt if m.get("role") == "user")


def texts_or_lines(args):
    texts = [*args.text, *args.prompt]
    if bool(texts) == bool(args.file):
        raise Usage("give either texts or --file")
    return [Item(text=text) for text in texts] or read_lines(args.file)


def route(args):
    items = texts_or_lines(args)
    prompts = [need(item, i, "messages", "text", "prompt") for i, item in enumerate(items)]
    # a router sees the base alone: no planes to load
    model = obm.Model(args.pack, base=args.base, materialise=True, progress=progress_of(args))
    router = load_router(args.router) if args.router else None
    for index, prompt in enumerate(prompts):
        with located([items[index]], index):
            weights, probabilities = model.route(prompt, router=router)
        task = max(weights, key=weights.get) if weights else "base"
        record = {"index": index, "text": user_text(prompt), "task": task, "weights": probabilities if probabilities is not None else weights}
        if args.json:
            emit(record)
        else:
            print(f"{task}\t{', '.join(f'{k} {v:.3f}' for k, v in record['weights'].items())}\t{record['text'][:80]!r}")


def generate_options(args):
    return {"max_tokens": args.max_tokens, "temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p, "min_p": args.min_p,
            "repetition_penalty": args.repetition_penalty, "seed": args.seed, "stop": args.stop, "chat": args.chat,
            "template": args.template}


def route_text(model, route):
    return None if route is None or model.pack is None else model.pack.format_route(route)


def read_prompt(text):
    """"-": standard input as it is, but for the newline that ends its last line."""
    if text != "-":
        return text
    if sys.stdin is None:
        raise Failure("standard input is closed")
    try:
        return getattr(sys.stdin, "buffer", sys.stdin).read().decode("utf-8").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as e:
        raise Failure(f"standard input: not UTF-8 at byte {e.start}") from None


def generate(args):
    if (args.prompt is None) == (args.file is None):
        raise Usage("give either -p or --file")
    model = open_model(args)
    options = generate_options(args)
    if args.router:
        if args.route:
            raise Usage("give either --route or --router")
        options["router"] = load_router(args.router)
    if args.route_every:
        if args.route not in (None, "auto"):
            raise Usage("--route-every asks the router again, and --route leaves it nothing to decide")
        options["route_every"] = args.route_every
    items = [Item(prompt=read_prompt(args.prompt))] if args.file is None else read_lines(args.file)
    for i, item in enumerate(items if args.file is not None else ()):
        check_keys(item, i, {*options, "router", "route_every", "batch"})
    prompts = [prompt_of(item, i) for i, item in enumerate(items)]
    routes = [item.get("route", args.route) for item in items]
    for i, (item, r) in enumerate(zip(items, routes)):
        check_vocabulary(item, i, model.info["vocab"], "ids")
        check_route(model, item, i, r)
    given = {} if model.pack is None else {"route": routes}
    if args.file is None and not args.json:
        begun = False
        try:
            for piece in model.stream(prompts[0], **({"route": routes[0]} if given else {}), **options):
                print(piece, end="", flush=True)
                begun = True
        except KeyboardInterrupt:
            if begun:
                print(flush=True)    # what is said of it begins a line of its own
            raise
        return print()
    check_options(model, batch=args.batch, **options)
    # Slices keep the first answers from waiting for the last; results do not depend on them.
    step = max(1, 8 * (args.batch or 8))
    for begin in range(0, len(prompts), step):
        part = {"route": given["route"][begin:begin + step]} if given else {}
        with located(items[begin:begin + step], begin):
            answers = model.generate(prompts[begin:begin + step], batch=args.batch, progress=progress_of(args), **part, **seed_for(options, begin))
        for i, c in enumerate(answers):
            record = {"index": begin + i, "text": str(c), "ids": c.ids, "route": route_text(model, c.route), "finish_reason": c.finish_reason}
            if args.route_every:
                record["routes"] = [{"token": token, "route": route_text(model, r)} for token, r in c.routes]
            emit(record) if args.json else print(f"[{begin + i}] {taken(record)}\n{c}")


def taken(record):
    """"math", or "math, code from token 8" where the route changed."""
    first, *later = record.get("routes") or [{"route": record["route"] or ""}]
    return ", ".join([first["route"], *(f"{r['route']} from token {r['token']}" for r in later)])


def seed_for(options, begin):
    """Prompt i draws from (seed, i) with i counted inside one call; slices after the first get a seed of their own."""
    return options if begin == 0 else {**options, "seed": options["seed"] + begin * 0x9E3779B97F4A7C15 & (2**64 - 1)}


def score_row(item, index, route):
    """(prompt, continuation, route); a whole text has no prompt."""
    if "text" in item:
        return "", need(item, index, "text"), route
    if "continuation_ids" in item:
        more = [key for key in ("prompt", "messages", "continuation") if key in item]
        if "ids" in item and more:
            wrong(item, index, f"expected ids and continuation_ids; found {' and '.join(more)} besides")
        return need(item, index, "ids"), need(item, index, "continuation_ids"), route
    continuation = ("continuation", "continuation_ids") if "ids" in item else ("continuation",)
    return need(item, index, "prompt", "messages", "ids"), need(item, index, *continuation), route


def score(args):
    items = read_lines(args.file)
    rows = [score_row(item, i, item.get("route", args.route)) for i, item in enumerate(items)]
    model = open_model(args)
    for i, item in enumerate(items):
        check_vocabulary(item, i, model.info["vocab"], "ids", "continuation_ids")
        check_route(model, item, i, rows[i][2])
    with located(items):
        scores = model.score_items(rows, progress=progress_of(args))
    for index, s in enumerate(scores):
        record = {"index": index, "logprob": s.logprob, "token_logprobs": s.token_logprobs, "is_greedy": s.is_greedy,
                  "perplexity": s.perplexity, "route": route_text(model, s.route)}
        if args.json:
            emit(record)
        else:
            print(f"[{index}] logprob {s.logprob:.4f}, perplexity {s.perplexity:.4f}, {'greedy' if s.is_greedy else 'not greedy'}"
                  + (f", route {record['route']}" if record["route"] else ""))


def logits(args):
    import numpy as np

    items = read_lines(args.file)
    ids = [need(item, i, "ids") for i, item in enumerate(items)]
    model = open_model(args)
    for i, item in enumerate(items):
        check_vocabulary(item, i, model.info["vocab"], "ids")
        check_route(model, item, i, item.get("route", args.route))
    out = output_of(args)
    if not os.path.isdir(os.path.dirname(os.path.abspath(out))):
        raise Failure(f"{out}: no such folder")
    if os.path.isdir(out):
        raise Failure(f"{out} is a folder, expected a file or nothing")
    if args.dry_run:
        rows = sum(len(row) if args.all else 1 for row in ids)
        return print_plan(args, {"tensors": len(items), "bytes_read": model.info["bytes"], "bytes_written": 4 * rows * model.info["vocab"],
                                 "peak_memory": model.info["bytes"] + 8 * rows * model.info["vocab"], "seconds": 0.0}, "logits")
    arrays = {}
    for index, item in enumerate(items):
        r = item.get("route", args.route)
        r = None if r == "auto" and model.pack is None else r
        with located([item], index):
            if r == "auto" or (r is None and model.pack is not None):
                r = model.route(ids[index])[0]
            arrays[f"logits_{index}"] = model.logits(ids[index], all=args.all, route=r, decode=args.decode, kv=args.kv)
    partial = f"{out}.tmp-{os.getpid()}"
    try:
        with open(partial, "wb") as file:
            np.savez(file, **arrays)
        os.replace(partial, out)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(partial)
    emit({"output": out, "arrays": len(arrays)}) if args.json else print(f"{out}: {len(arrays)} arrays")


def tokenize(args):
    tokenizer = obm.Model(args.model, materialise=True).tokenizer if is_pack(args.model) else obm.Tokenizer(args.model)
    for index, item in enumerate(texts_or_lines(args)):
        with located([item], index):
            if "ids" in item and "text" not in item:
                record = {"index": index, "text": tokenizer.decode(item["ids"] if item["ids"] == [] else need(item, index, "ids"), skip_special=args.skip_special)}
            else:
                ids = tokenizer.encode(need(item, index, "text", "ids"), special=args.special)
                record = {"index": index, "ids": ids, "pieces": [tokenizer.piece(i) for i in ids]}
        emit(record) if args.json else print(record["text"] if "text" in record else " ".join(map(str, record["ids"])))


def merge(args):
    given = {"profile": args.profile, "seed": args.random_seed, "memory": args.memory}
    given["shard_bytes"] = args.out_shard_size
    if args.dry_run:
        plan = obm.merge(args.recipe, args.output, dry_run=True, overwrite=args.force, resume=args.resume, **given)
        print_plan(args, plan, "merge")
        return None if args.json else print_documents(plan["documents"])
    try:
        plan = obm.merge(args.recipe, args.output, overwrite=args.force, resume=args.resume, progress=progress_of(args), **given)
    except BaseException as e:
        if args.resume and not isinstance(e, Exception):   # Ctrl-C and the like
            e.add_note("the same command goes on with the shards that are finished")
        raise
    emit({"output": args.output, **plan}) if args.json else print(f"{args.output}: {plan['tensors']} tensors, {_results.size(plan['bytes_written'])}")


def print_documents(documents):
    if len(documents) > 1:
        print(_results.table(["document", "tensors", "tiles", "reads", "writes", "peak memory", "seconds"],
                             [[d["name"] or "the result", d["tensors"], d["tiles"], _results.size(d["bytes_read"]), _results.size(d["bytes_written"]),
                               _results.size(d["peak_memory"]), f"{d['seconds']:.1f}"] for d in documents]))
    for d in documents:
        for f in d["files"]:
            print(f"{os.path.join(d['output'] or '', f['file'])}: {_results.size(f['bytes'])}{', there and verified' if f['there'] else ''}{'' if d['kept'] else ', until the result is there'}")


def bounds(parameter):
    low, high = parameter["min"], parameter["max"]
    if parameter["type"] == "bool":
        return "true or false"
    return f"{low:g} .. {high:g}" if math.isfinite(high) and math.isfinite(low) else f">= {low:g}" if math.isfinite(low) else "any number"


def default_of(parameter):
    if parameter["required"]:
        return "needed"
    return str(bool(parameter["default"])).lower() if parameter["type"] == "bool" else f"{parameter['default']:g}"


def print_method(m):
    most = m["max_models"]
    count = f"{m['min_models']}" if most == m["min_models"] else f"{m['min_models']} to {most}" if most else f"{m['min_models']} or more"
    print(f"{m['name']}: {m['doc']}\n  {count} model{'s' * (count != '1')}{', and a base' * m['needs_base']}; {m['source']}")
    if m["params"]:
        rows = [[p["name"], default_of(p), bounds(p), "each model" if p["scope"] == "model" else "the merge", p["doc"]] for p in m["params"]]
        print(_results.table(["parameter", "default", "range", "of", "what it is"], rows, left=(0, 3, 4)))


def methods_verb(args):
    known = {m["name"]: m for m in obm.methods()}
    for name in args.method:
        if name not in known:
            raise Usage(f"no merge method \"{name}\"{did_you_mean(name, known) or ': ' + ', '.join(known)}")
    found = [known[name] for name in args.method] or list(known.values())
    if args.json:
        for m in found:
            emit(m)
    elif args.method:
        for i, m in enumerate(found):
            print("\n" * (i > 0), end="")
            print_method(m)
    else:
        indent = 2 + max(len(m["name"]) for m in found)
        for m in found:      # one under the other: in columns the two would take more than any terminal has
            given = ", ".join(p["name"] if p["required"] else f"{p['name']}={default_of(p)}" for p in m["params"])
            print(f"{m['name']:{indent}}{m['doc']}" + (f"\n{'':{indent}}{given}" if given else ""))


def extract_lora(args):
    given = {"rank": args.rank, "energy": args.energy, "dtype": args.dtype, "base_name": args.base_name}
    if (args.out is None) == (args.output is None):
        raise Usage("extract-lora takes one folder to write: OUT or -o OUT")
    args.output = args.output or args.out
    if args.dry_run:
        return print_plan(args, obm.extract_lora(args.base, args.expert, args.output, dry_run=True, overwrite=args.force, **given), "extract-lora")
    matrices = obm.extract_lora(args.base, args.expert, args.output, overwrite=args.force, progress=progress_of(args), **given)
    if args.json:
        for m in matrices:
            emit(m)
        return
    print(_results.table(["tensor", "rows", "cols", "rank", "norm", "kept energy"],
                         [[m["name"], m["rows"], m["cols"], m["rank"] or "-", number(m["norm"]) if m["rank"] else "-",
                           percent(m["energy"]) if m["rank"] else "not in the adapter"] for m in matrices]))


def export(args):
    if args.route.strip() in ("auto", ""):
        raise Usage(f"export writes one route: a task (--route chat) or weights (--route chat=.7,math=.3), found \"{args.route}\"; auto asks the router "
                    "for each prompt, so it goes with generate")
    pack = obm.Pack(args.pack, base=args.base)
    if args.dry_run:
        return print_plan(args, pack.export(args.route, args.output, dtype=args.dtype, overwrite=args.force, dry_run=True), "export")
    report = pack.export(args.route, args.output, dtype=args.dtype, shard_bytes=args.out_shard_size, overwrite=args.force,
                         progress=progress_of(args))
    lost = report["lost"] / report["changed"] if report["changed"] else 0.0
    if args.json:
        return emit({"output": args.output, "route": pack.format_route(args.route), "lost_share": lost, **report})
    kept = "no weight changed" if not report["changed"] else "no changed weight was lost to rounding" if not lost else (
        f"{percent(lost) if lost >= 5e-5 else 'less than 0.01 %'} of the changed weights were lost to rounding"
        + (" (--dtype f32 keeps them)" if args.dtype != "f32" else ""))
    print(f"{args.output}: {report['tensors']} tensors, {_results.size(report['bytes_written'])}, route {pack.format_route(args.route)}; {kept}")


def taken_back(args, name, files):
    """The folder that stands behind a list of files, `--task FILE PACK`, where argparse counts it to the list."""
    value = getattr(args, name)
    if value is None and len(files) > 1 and (os.path.isdir(files[-1]) or not os.path.exists(files[-1])):
        value = files.pop()
    if value is None:
        raise Usage(f"the following arguments are required: {'MODEL|PACK' if name == 'model' else 'PACK'}")
    setattr(args, name, value)


def evaluate_verb(args):
    taken_back(args, "model", args.task)
    items = [item for path in args.task for item in read_lines(path)]
    model = open_model(args)
    rows = evaluate(model, items, args.route or [None], max_tokens=args.max_tokens, chat=args.chat, batch=args.batch, stop=args.stop,
                    template=args.template, progress=progress_of(args))
    if args.json:
        for row in rows:
            emit(row)
        return
    print(_results.table(["task", "route", "n", "accuracy", "95 % interval (Wilson)"],
                         [[r["task"], r["route"] or "-", r["n"], percent(r["value"]), f"{percent(r['low'])} .. {percent(r['high'])}"] for r in rows]))


def tune_verb(args):
    taken_back(args, "pack", args.data)
    items = [item for path in args.data for item in read_lines(path)]
    experts = {}
    for text in args.expert or []:
        name, eq, path = text.partition("=")
        if not eq or not name or not path:
            raise Usage(f"--expert takes NAME=FOLDER, found \"{text}\"")
        experts[name] = path
    found = obm.tune(args.pack, items, base=args.base, lambdas=args.lambdas, readings=args.readings, policies=args.policies or (),
                     scales=args.scales or (), experts=experts, route=args.route, max_tokens=args.max_tokens, chat=args.chat, batch=args.batch,
                     stop=args.stop, template=args.template, materialise=args.materialise, z12=args.z12, prefill=args.prefill, dry_run=args.dry_run,
                     progress=progress_of(args))
    if args.json:
        for row in found.rows or [{"dry_run": True, **c.keys()} for c in found.candidates]:
            emit(row)
        return
    print(found)
    if not args.dry_run:
        c = found.choice
        how = f", policy {c.policy or 'as it was'}, scale {c.scale or 'as it was'}" if c.policy or c.scale else ""
        print(f"{args.pack}: lambda {c.lambda_:g}, reading {c.reading}{how}; stored")


# ---- arguments ----


def listed(kind=str, known=()):
    """A list with commas."""
    def parse(text):
        for word in text.split(","):
            if not word or (known and word not in known):
                raise argparse.ArgumentTypeError(f"expected a list like {','.join(known[:2]) or '0,0.3,1'}, found \"{text}\"")
        return [kind(word) for word in text.split(",")]
    return parse


def scale(text):
    kind, colon, columns = text.partition(":")
    if text not in ("matrix", "row") and not (kind == "group" and colon and columns.isascii() and columns.isdigit()
                                              and int(columns) > 0 and int(columns) % 64 == 0):
        raise argparse.ArgumentTypeError(f"expected matrix, row or group:N with N a multiple of 64 columns, found \"{text}\"")
    return text


def add_generation_arguments(p):
    p.add_argument("--max-tokens", type=whole(0), default=0, help="0 (default): 256")
    p.add_argument("--stop", action="append", metavar="TEXT", help="stop string; may be given again")
    p.add_argument("--chat", action="store_true", help="wrap a text prompt as one user turn of the chat template")
    p.add_argument("--template", metavar="NAME", help="the built-in chat template to use, whatever the model's own is")
    p.add_argument("--batch", type=whole(0), default=0, help="sequences decoded together; 0 (default): 8")


def add_text_arguments(p, lines):
    p.add_argument("text", nargs="*", metavar="TEXT")
    p.add_argument("-p", "--prompt", metavar="TEXT", action="append", default=[], help="the same as TEXT, as generate has it; may be given again")
    p.add_argument("--file", metavar="FILE", action=Once, help=f"JSON lines: {lines}")


def add_expert_arguments(p):
    p.add_argument("--policy", choices=POLICIES, help="what gets one bit per weight: attention and MLP (linear, default), one of them, paper (chat: MLP, else attention), nothing (full)")
    p.add_argument("--scale", type=scale, help="matrix, row (default) or group:N")
    p.add_argument("--planes", type=whole(0, 8), default=0, help="sign planes per matrix; 0 (default): 1")
    p.add_argument("--map", action="append", metavar="GLOB=MODE", help="1bit, full or drop (with --shared also mask) for matching tensors; may be given again")


def whole(low, high=2**63 - 1):
    def parse(text):
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"\"{text}\" is not a whole number") from None
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"expected {low} or more, found {value}" if high >= 2**63 - 1 else f"expected {low} to {high}, found {value}")
        return value
    return parse


def real(low, high=sys.float_info.max, *, low_is_in):
    def parse(text):
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"\"{text}\" is not a number") from None
        if not (low <= value <= high) or (value == low and not low_is_in):
            bounds = f"in {'[' if low_is_in else '('}{low:g}, {high:g}]" if high < sys.float_info.max else f"of {low:g} or more"
            raise argparse.ArgumentTypeError(f"expected a number {bounds}, found {text}")
        return value
    return parse


def columns():
    """As shutil has them, whose import takes longer than all else here; argparse asks for every argument that is added."""
    try:
        if (given := int(os.environ["COLUMNS"])) > 0:
            return given
    except (KeyError, ValueError):
        pass
    try:
        return os.get_terminal_size(sys.__stdout__.fileno()).columns or 80
    except (AttributeError, ValueError, OSError):
        return 80


class Parser(argparse.ArgumentParser):
    def __init__(self, **given):
        super().__init__(formatter_class=lambda prog: argparse.HelpFormatter(prog, width=columns() - 2), **given)

    def _check_value(self, action, value):   # verbs are choices too
        near = did_you_mean(str(value), [str(c) for c in action.choices or ()])
        if near and value not in action.choices:
            raise argparse.ArgumentError(action, f"no {action.metavar or 'choice'} \"{value}\"{near} (choose from {', '.join(map(str, action.choices))})")
        super()._check_value(action, value)


class Once(argparse.Action):
    """Of two values the first would be dropped without a word."""

    def __call__(self, parser, namespace, values, option_string=None):
        given = namespace.__dict__.setdefault("given_once", set())
        if self.dest in given:
            raise argparse.ArgumentError(self, f"given twice, expected once{'; --file takes several prompts' if self.dest == 'prompt' else ''}")
        given.add(self.dest)
        setattr(namespace, self.dest, values)


class Skipped:
    """Stands for the parser of a verb that was not asked for, whose arguments take their time."""

    def __getattr__(self, name):
        return lambda *args, **given: self


def make_parser(asked=None):
    """With all verbs, or with the one that was asked for if it is one."""
    common = Parser(add_help=False)
    common.add_argument("--json", action="store_true", help="results as JSON lines")
    common.add_argument("--quiet", action="store_true", help="no progress bars")
    common.add_argument("--threads", type=whole(0, 4096), default=0, help="default: one per core, no more than a container's quota of processors")
    common.add_argument("--numa", choices=NUMA, default="auto", help="weights and workers on several NUMA nodes; see the verb plan")
    parser = Parser(prog="onebitmerge", description="1-bit task vectors, routed merging and CPU inference of fine-tuned LLMs.")
    parser.add_argument("--version", action="version", version=f"onebitmerge {obm.__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def add(group, name, **given):
        return Skipped() if group is verbs and asked not in (None, name) else group.add_parser(name, **given)

    def verb(group, name, function, text, *, output=None, dry=False, base=False, runs=False, rest=None):
        p = add(group, name, parents=[common], help=text, description=text.replace("%%", "%"))
        p.set_defaults(function=function, rest=rest, parser=p)
        if output:
            p.add_argument("-o", "--output", required=True, metavar=output)
            p.add_argument("--force", action="store_true", help="replace an existing output")
        if output or dry:
            p.add_argument("--dry-run", action="store_true", help="print what would be read and written, write nothing")
        if base:
            p.add_argument("--base", help="where the pack's base lies")
        if runs:
            p.add_argument("--materialise", action="store_true", help="dense weights for every route of a pack, instead of running on its sign planes")
            p.add_argument("--z12", choices=("auto", "on", "off"), default="auto", help="bf16 matrices in 12 bits per weight, the same output: packed behind the first tokens where that is faster (auto), while the model is opened, or not")
            p.add_argument("--prefill", choices=("f32", "bf16"), default="f32", help="bf16: round activations of prompts, for speed where the CPU has AVX512-BF16 (doctor says so)")
        return p

    verb(verbs, "doctor", doctor, "build, instruction sets, BLAS, topology, memory; what is missing and how to get it")

    p = verb(verbs, "plan", plan, "placement on NUMA nodes: rows, bytes per node, remote bytes per token", base=True)
    p.add_argument("model", metavar="MODEL|PACK")
    p.add_argument("--topology", metavar="FILE.xml|TEXT",
                   help="another machine: hwloc's XML (lstopo machine.xml) or a description like \"numa:2 core:4 pu:2\"; default: this one")
    p.add_argument("--z12", choices=("auto", "on", "off"), default="auto", help="on: with bf16 matrices in 12 bits per weight")
    p.add_argument("--verify-placement", action="store_true", help="open the model, run a prompt, and count where its pages are")
    p.add_argument("--kv", choices=("f32", "f16"), default="f32", help="dtype of the keys and values whose bytes are counted")

    p = verb(verbs, "inspect", inspect, "a model by module class; with experts norms, zeros, 1-bit error, cosines, sign agreement",
             rest="experts")
    p.add_argument("model", metavar="MODEL")
    p.add_argument("experts", nargs="*", metavar="EXPERT")
    p.add_argument("--tensors", action="store_true", help="list each tensor")
    p.add_argument("--checksums", action="store_true", help="with the sha256 of each tensor's bytes")

    p = verb(verbs, "compress", compress, "experts to a pack", output="PACK", rest="experts")
    p.add_argument("base", metavar="BASE")
    p.add_argument("experts", nargs="+", metavar="NAME=EXPERT[:POLICY]")
    p.add_argument("--profile", choices=("default", "paper", "mergekit"), help="paper: its policy, lambda 1, and of the others' full tensors the largest fifth; default, mergekit: policy linear, lambda 0.3, no trim")
    p.add_argument("--shared", choices=("tall", "emr"), help="one vector per matrix for all experts and a bit mask each, instead of 1-bit planes")
    p.add_argument("--tall-lambda", type=real(0, low_is_in=True), default=0, help="of tall's masks; 0 (default): 0.4")
    p.add_argument("--shared-dtype", choices=("f32", "bf16", "f16"), help="of the shared vectors (default: the base's)")
    add_expert_arguments(p)

    group = add(verbs, "pack", help="show, verify or change a pack").add_subparsers(dest="action", required=True, metavar="ACTION")
    p = verb(group, "show", pack_show, "bytes per expert and class", base=True)
    p.add_argument("pack", metavar="PACK")
    p.add_argument("--scales", action="store_true", help="alpha of every plane, and the scaling of every mask")
    p.add_argument("--runs", action="store_true", help="per tensor: on how many masks of planes it runs, or as an overlay")
    p = verb(group, "verify", pack_verify, "checksums of every file and the base's full hash", base=True)
    p.add_argument("pack", metavar="PACK")
    p = verb(group, "add", pack_add, "compress one more expert into the pack (the router goes: its tasks changed)", dry=True, base=True)
    p.add_argument("pack", metavar="PACK")
    p.add_argument("expert", metavar="NAME=EXPERT[:POLICY]")
    p.add_argument("--force", action="store_true", help="replace an expert of that name")
    add_expert_arguments(p)
    p = verb(group, "remove", pack_remove, "drop an expert (and the router: its tasks changed)", dry=True, base=True)
    p.add_argument("pack", metavar="PACK")
    p.add_argument("name", metavar="NAME")
    p = verb(group, "set", pack_set, "merge settings", dry=True, base=True)
    p.add_argument("pack", metavar="PACK")
    p.add_argument("--lambda", dest="lambda_", type=real(0, low_is_in=True), metavar="L", help="weight of the merged others beside the routed expert")
    p.add_argument("--reading", choices=READINGS, help="the others relative to the base, or to the routed task")
    p.add_argument("--profile", choices=("default", "paper", "mergekit"), help="of the trim that --density asks for: over the whole model (paper), or tensor by tensor (default, mergekit)")
    p.add_argument("--density", type=real(0, 1, low_is_in=False), help="of the trim of full tensors")

    group = add(verbs, "router", help="train the router of a pack").add_subparsers(dest="action", required=True, metavar="ACTION")
    p = verb(group, "train", router_train, "held-out accuracy, confusion, calibration; stored in the pack", base=True)
    p.add_argument("pack", metavar="PACK")
    p.add_argument("--data", required=True, metavar="FILE", help="JSON lines: text|messages, task")
    p.add_argument("--layer", type=whole(0, 2**31 - 1), default=0, help="0 = embeddings (default)")
    p.add_argument("--l2", type=real(0, 1e6, low_is_in=True), default=0, help="0 (default): 0.01")
    p.add_argument("--holdout", type=real(0, 0.9, low_is_in=True), default=0, help="share held out for the report; 0 (default): 0.2")
    p.add_argument("--seed", type=whole(0, 2**64 - 1), default=0, help="decides which items are held out")

    p = verb(verbs, "route", route, "task and probabilities of texts", base=True, rest="text")
    p.add_argument("pack", metavar="PACK")
    add_text_arguments(p, "text|messages")
    p.add_argument("--router", metavar="FILE.py:FUNC|FILE.lua", help=ROUTER)

    p = verb(verbs, "generate", generate, "text, streamed", base=True, runs=True)
    p.add_argument("model", metavar="MODEL|PACK")
    p.add_argument("-p", "--prompt", metavar="TEXT", action=Once, help="-: standard input; several prompts go into a --file")
    p.add_argument("--file", metavar="FILE", action=Once, help="JSON lines: prompt|messages|ids, route")
    p.add_argument("--route", action=Once, help="auto (default), a task, or chat=.7,math=.3")
    p.add_argument("--router", metavar="FILE.py:FUNC|FILE.lua", help=ROUTER)
    p.add_argument("--route-every", type=whole(0), default=0, metavar="N",
                   help="ask the router again after each N tokens, with the text so far; 0 (default): once")
    add_generation_arguments(p)
    p.add_argument("--temperature", type=real(0, 1e6, low_is_in=True), default=0, help="0 (default): greedy")
    p.add_argument("--top-k", type=whole(0), default=0, help="0 (default): off")
    p.add_argument("--top-p", type=real(0, 1, low_is_in=True), default=0, help="0 (default) and 1: off")
    p.add_argument("--min-p", type=real(0, 1, low_is_in=True), default=0, help="0 (default): off")
    p.add_argument("--repetition-penalty", type=real(0, 100, low_is_in=True), default=0, help="0 (default) and 1: off")
    p.add_argument("--seed", type=whole(0, 2**64 - 1), default=0, help="of what --temperature draws; the same seed, the same text")

    p = verb(verbs, "score", score, "log-likelihoods and perplexity", base=True, runs=True)
    p.add_argument("model", metavar="MODEL|PACK")
    p.add_argument("--file", required=True, metavar="FILE", action=Once, help="JSON lines: prompt, continuation | ids, continuation_ids | text; route")
    p.add_argument("--route", action=Once, help="of the items that name none")

    p = verb(verbs, "logits", logits, "logits of ids, float32, as arrays logits_<index>", output="X.npz", base=True, runs=True)
    p.add_argument("model", metavar="MODEL|PACK")
    p.add_argument("--file", required=True, metavar="FILE", action=Once, help="JSON lines: ids, route")
    p.add_argument("--route", action=Once, help="of the items that name none")
    p.add_argument("--all", action="store_true", help="every position, not the last")
    p.add_argument("--decode", action="store_true", help="feed token by token")
    p.add_argument("--kv", choices=("f32", "f16"), default="f32", help="dtype of the cache of keys and values: f16 takes half the memory, and rounds")

    p = verb(verbs, "tokenize", tokenize, "ids and back", rest="text")
    p.add_argument("model", metavar="MODEL")
    add_text_arguments(p, "text or ids")
    p.add_argument("--special", action="store_true", help="add the post-processor's tokens")
    p.add_argument("--skip-special", action="store_true", help="leave special tokens out of decoded text")

    p = verb(verbs, "merge", merge, "a mergekit recipe to a Hugging Face folder", output="DIR")
    p.add_argument("recipe", metavar="RECIPE.yml")
    p.add_argument("--profile", choices=("mergekit", "paper"), help="mergekit (default): as mergekit 0.1.5; paper: ties as its paper has it, trim over the whole model, unweighted election")
    p.add_argument("--out-shard-size", type=parse_size, default=0, help="like 5GB (default), 500MB or 512MiB")
    p.add_argument("--random-seed", type=whole(0, 2**64 - 1), metavar="N", help="of methods that drop at random (dare, della); default: the recipe's random_seed, else 0")
    p.add_argument("--resume", action="store_true", help="keep the finished shards of a killed run, and of this one when it is stopped")
    p.add_argument("--memory", type=parse_size, default=0, help="budget of tiles and buffers, like 2GB (default) or 512MiB; where it is too little, the message says how much is needed")

    p = verb(verbs, "methods", methods_verb, "the merge methods of recipes: what each does, its parameters with defaults and ranges, its source")
    p.add_argument("method", nargs="*", metavar="METHOD", help="these alone, with all that is known of them")

    p = verb(verbs, "extract-lora", extract_lora, "a fine-tune's linear weights as a PEFT LoRA folder, with the kept energy of each",
             dry=True)
    p.add_argument("base", metavar="BASE")
    p.add_argument("expert", metavar="EXPERT")
    p.add_argument("out", metavar="OUT", nargs="?")
    p.add_argument("-o", "--output", metavar="OUT")
    p.add_argument("--force", action="store_true", help="replace an adapter that is there")
    cut = p.add_mutually_exclusive_group(required=True)
    cut.add_argument("--rank", type=whole(1), metavar="R", help="of every matrix")
    cut.add_argument("--energy", type=real(0, 1, low_is_in=False), metavar="E",
                     help="the least rank of each matrix that keeps this share of its squared norm")
    p.add_argument("--dtype", choices=("f32", "bf16", "f16"), help="of the factors, f32 (default)")
    p.add_argument("--base-name", metavar="NAME", help="what the adapter calls its base, as given by default")

    p = verb(verbs, "export", export, "dense folder of one route", output="DIR", base=True)
    p.add_argument("pack", metavar="PACK")
    p.add_argument("--route", required=True, help="a task, or chat=.7,math=.3")
    p.add_argument("--dtype", choices=("f32", "bf16", "f16"), help="of the weights; default: each tensor's own in the base")
    p.add_argument("--out-shard-size", type=parse_size, default=0, help="like 5GB (default), 500MB or 512MiB")

    p = verb(verbs, "eval", evaluate_verb, "accuracy per task and route, 95 %% intervals", base=True, runs=True)
    p.add_argument("model", metavar="MODEL|PACK", nargs="?")
    p.add_argument("--task", required=True, nargs="+", action="extend", metavar="FILE", help="JSON lines: prompt|messages, answer | choices, correct; task")
    p.add_argument("--route", action="append", help="auto (default), a task, weights; may be given again")
    add_generation_arguments(p)

    p = verb(verbs, "tune", tune_verb, "lambda, policy and scale on validation data: the whole table printed, the choice stored in the pack",
             dry=True, base=True, runs=True)
    p.add_argument("pack", metavar="PACK", nargs="?")
    p.add_argument("--data", required=True, nargs="+", action="extend", metavar="FILE",
                   help="JSON lines: prompt|messages, answer | choices, correct; task")
    p.add_argument("--lambdas", type=listed(real(0, low_is_in=True)), default=LAMBDAS, metavar="LIST",
                   help="default 0,0.1,0.3,0.5,1; 0, routing alone, is always among them")
    p.add_argument("--readings", type=listed(known=READINGS), metavar="LIST", help="default: both, with more than two experts")
    p.add_argument("--policies", type=listed(known=POLICIES), metavar="LIST", help="compress the experts anew, like linear,attention")
    p.add_argument("--scales", type=listed(scale), metavar="LIST", help="compress the experts anew, like matrix,row,group:64")
    p.add_argument("--expert", action="append", metavar="NAME=FOLDER", help="where an expert lies that is to be compressed anew; may be given again")
    p.add_argument("--route", choices=("auto", "task"), default="auto", help="the router's (default), or each item's own task")
    add_generation_arguments(p)
    return parser if verbs.choices else make_parser()


def show_warning(message, category, filename, lineno, file=None, line=None):
    print(f"onebitmerge: warning: {message}", file=sys.stderr)


def hint(args, e):
    """How the command line says what the library's message asks for."""
    return " (--template NAME)" if hasattr(args, "template") and isinstance(e, obm.UnsupportedError) and "chat template" in str(e) else ""


def in_router(args, e):
    """"FILE.py, line 3: " where a function of --router raised it."""
    import traceback
    path = (getattr(args, "router", None) or "").rpartition(":")[0]
    tb = (e.__cause__ or e).__traceback__   # `located` raises from what it met
    lines = [line for frame, line in traceback.walk_tb(tb) if os.path.abspath(frame.f_code.co_filename) == os.path.abspath(path)]
    return f"{path}, line {lines[-1]}: " if lines else ""


def did_you_mean(word, known):
    import difflib
    near = difflib.get_close_matches(word, known, 1, .6)
    return f", did you mean {near[0]}?" if near else ""


def fail(message, code):
    # One line, whatever the message holds.
    print(f"onebitmerge: {' '.join(str(message).split())}", file=sys.stderr)
    return code


def meant(args, rest):
    """What an argument that the verb does not know was probably to be."""
    import difflib
    known = args.parser._option_string_actions
    close = [m for word in rest if word.startswith("--") for m in difflib.get_close_matches(word.partition("=")[0], known, 1, 0.7)]
    if close:
        return f", did you mean {' '.join(close)}?"
    return "; a prompt goes behind -p" if "-p" in known and args.prompt is None and not rest[0].startswith("-") else ""


def parse(argv):
    """argparse gives up on a list of positionals that options interrupt (PACK --router F TEXT...): `rest` names it."""
    argv = sys.argv[1:] if argv is None else argv
    parser = make_parser(argv[0] if argv else None)
    args, rest = parser.parse_known_args(argv)
    if rest and (args.rest is None or any(word.startswith("-") for word in rest)):
        args.parser.error(f"unrecognized arguments: {' '.join(rest)}{meant(args, rest)}")
    if rest:
        setattr(args, args.rest, [*getattr(args, args.rest), *rest])
    return args


def main(argv=None):
    args = parse(argv)
    warnings.showwarning = show_warning
    _core._register("overwrite", "--force")   # what messages tell people to add
    try:
        return run(args)
    finally:
        _core._register("overwrite", None)


def run(args):
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(encoding="utf-8")   # JSON lines and model text are UTF-8 whatever the locale says
    try:
        if (args.threads or args.numa != "auto") and args.function is not plan:   # which may be about another machine
            obm.set_threads(args.threads, args.numa)
        args.function(args)
        sys.stdout.flush()
        return 0
    except Usage as e:
        return fail(e, 2)
    except BrokenPipeError:
        # The reader went away (head, less): nothing to say, and no second error when Python flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as e:
        if e.strerror and e.filename:
            return fail(f"{e.filename}: {e.strerror}", 1)
        return fail(e.strerror or e, 1)
    except MemoryError as e:
        return fail(e if str(e) else "out of memory", 1)
    except (obm.Error, Failure, ValueError) as e:
        return fail(f"{in_router(args, e)}{e}{hint(args, e)}", 1)
    except Exception as e:  # a user's router may raise anything; people get the line, not the traceback
        return fail(f"{in_router(args, e)}{type(e).__name__}: {e}", 1)
