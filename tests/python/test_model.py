"""Running models: logits, hidden states, scores, generation.  The trained experts' accuracy keeps a broken forward from passing;
tests/oracles holds logits against transformers."""

import gc
import threading
import warnings

import numpy as np
import pytest

import onebitmerge as obm
import plain

PROMPT = "What is 17 plus 5?"
PROMPTS = ["What is 3 plus 4?", "Say blue three times.", "hello", "What does this print?\nprint(3 + 4)", "a", PROMPT, "x = [1, 2, 3]", "Find 7+5 in this list:",
           "There are 12 books in the park and Uma brings 5. How many is that?", "zzz"]


@pytest.fixture(scope="module")
def ids(model):
    return model.tokenizer.encode("Uma has 17 books, buys 12 and loses 4. How many are left?\nLook: 17+12=29.")


@pytest.fixture(scope="module")
def math_model(models):
    return obm.Model(models / "math")


# ---- what it is ----

def test_info(model, base_model):
    want = {"architecture": "llama", "vocab": 768, "hidden": 192, "intermediate": 384, "layers": 4, "heads": 6, "kv_heads": 2, "head_dim": 32,
            "max_positions": 512, "sliding_window": 0, "tied": True}
    assert {k: base_model.info[k] for k in want} == want
    assert base_model.info["params"] == sum(np.prod(model.pack.base[name].shape) for name in model.pack.base)
    assert base_model.info["bytes"] == model.pack.base_bytes
    assert set(model.memory) == {"base", "planes", "overlays", "kv", "scratch"} and model.memory["base"] > 0
    assert "3 tasks" in repr(model)
    assert model.pack.tasks == ["chat", "math", "code"]


def test_what_is_refused(tmp_path, models):
    with pytest.raises(OSError, match="nowhere"):
        obm.Model(tmp_path / "nowhere")
    with pytest.raises(obm.ArgumentError, match="bf16.*f32"):
        obm.Model(models / "base", kv="bf16")
    with pytest.raises(TypeError):
        obm.Model(3)


# ---- logits ----

def test_shapes(base_model, ids):
    everything = base_model.logits(ids)
    assert everything.shape == (len(ids), 768) and everything.dtype == np.float32 and np.isfinite(everything).all()
    last = base_model.logits(ids, all=False)
    assert last.shape == (768,) and np.array_equal(last, everything[-1])


def test_ids_in_all_forms(base_model, ids):
    want = base_model.logits(ids)
    strided = np.zeros(2 * len(ids), np.int64)
    strided[::2] = ids
    for form in (tuple(ids), np.array(ids, np.int32), np.array(ids, np.int64), strided[::2]):
        assert np.array_equal(base_model.logits(form), want)
    for wrong in ("text", 3, [1.5], np.zeros((2, 2), np.int32), np.zeros(3, np.float32)):
        with pytest.raises(TypeError):
            base_model.logits(wrong)
    for outside in ([768], [-1], [1 << 40], [], [1] * 513):
        with pytest.raises(obm.ArgumentError):
            base_model.logits(outside)


def test_a_position_sees_only_what_is_before(base_model, ids):
    changed = list(ids)
    changed[-1] = 5
    a, b = base_model.logits(ids), base_model.logits(changed)
    assert np.array_equal(a[:-1], b[:-1]) and not np.array_equal(a[-1], b[-1])
    assert np.abs(base_model.logits(ids[:10]) - a[:10]).max() < 1e-4


def test_decode_and_f16_kv_are_close(base_model, ids):
    prefill = base_model.logits(ids)
    assert np.abs(base_model.logits(ids, decode=True) - prefill).max() < 2e-3
    half = np.abs(base_model.logits(ids, kv="f16") - prefill).max()
    assert 0 < half < 0.1


def test_f16_kv_generates_the_same_here(models, math_model):
    want = math_model.generate(PROMPT, chat=True, max_tokens=40)
    assert obm.Model(models / "math", kv="f16").generate(PROMPT, chat=True, max_tokens=40) == want


def test_thread_counts_agree_to_the_bit(pack_path, models, ids, threads):
    seen = []
    for n in (1, 2, 5):
        threads(n)
        plain_model, routed = obm.Model(models / "chat"), obm.Model(pack_path)
        seen.append([plain_model.logits(ids).tobytes(), plain_model.logits(ids, decode=True).tobytes(),
                     routed.logits(ids, route={"math": .5, "code": .5}).tobytes(), routed.generate(PROMPTS, max_tokens=12, chat=True),
                     plain_model.hidden(ids, 2).tobytes(), routed.embed(PROMPTS, layer=1).tobytes()])
    assert seen[0] == seen[1] == seen[2]


def test_routes_change_logits(model, base_model, ids):
    assert np.array_equal(model.logits(ids), base_model.logits(ids))   # no route: the base
    rows = [model.logits(ids, route=r) for r in (None, "chat", "math", "code", {"chat": .5, "math": .5})]
    for i, a in enumerate(rows):
        for b in rows[:i]:
            assert not np.array_equal(a, b)
    assert np.array_equal(model.logits(ids, route={}), rows[0])


# ---- hidden states ----

def test_hidden_0_is_the_embedding(base_model, models, ids):
    table = plain.load(models / "base")["model.embed_tokens.weight"]
    assert np.array_equal(base_model.hidden(ids, 0), table[ids])


def test_the_last_hidden_gives_the_logits(base_model, models, ids):
    """logits = RMSNorm(hidden after the last layer) E^T, the head being tied (LLaMA)."""
    t = plain.load(models / "base")
    h = base_model.hidden(ids, 4).astype(np.float64)
    normed = h / np.sqrt((h * h).mean(axis=1, keepdims=True) + 1e-5) * t["model.norm.weight"]
    assert np.abs(normed @ t["model.embed_tokens.weight"].T.astype(np.float64) - base_model.logits(ids)).max() < 1e-3


def llama_layer(t, i, h, heads=6, kv_heads=2, dim=32, theta=10000.0, seen=lambda x: x):
    """One LLaMA block in float64, from the published equations; matrices meet seen(x)."""
    def norm(x, w):
        return x / np.sqrt((x * x).mean(axis=1, keepdims=True) + 1e-5) * w

    def rope(x):   # (T, n, dim): halves rotated, angle p / theta^(2j/dim)
        angle = np.arange(len(x))[:, None] / theta ** (np.arange(0, dim, 2) / dim)
        cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
        a, b = x[..., :dim // 2], x[..., dim // 2:]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    w = {k.split(".", 3)[3]: v.astype(np.float64) for k, v in t.items() if k.startswith(f"model.layers.{i}.")}
    x = seen(norm(h, w["input_layernorm.weight"]))
    q, k, v = (((x @ w[f"self_attn.{p}_proj.weight"].T).reshape(len(x), -1, dim)) for p in "qkv")
    q, k = rope(q), rope(k)
    mixed = np.zeros_like(q)
    for head in range(heads):
        s = q[:, head] @ k[:, head * kv_heads // heads].T / np.sqrt(dim)
        s = np.where(np.tri(len(x), dtype=bool), s, -np.inf)
        p = np.exp(plain.log_softmax(s))
        mixed[:, head] = p @ v[:, head * kv_heads // heads]
    h = h + seen(mixed.reshape(len(x), -1)) @ w["self_attn.o_proj.weight"].T
    x = seen(norm(h, w["post_attention_layernorm.weight"]))
    gate = x @ w["mlp.gate_proj.weight"].T
    return h + seen(gate / (1 + np.exp(-gate)) * (x @ w["mlp.up_proj.weight"].T)) @ w["mlp.down_proj.weight"].T


def test_every_layer_is_llama(base_model, models, ids):
    t = plain.load(models / "base")
    h = t["model.embed_tokens.weight"][ids].astype(np.float64)
    for layer in range(4):
        h = llama_layer(t, layer, h)
        assert np.abs(base_model.hidden(ids, layer + 1) - h).max() < 1e-3


# ---- prompts in products of bf16 ----

def round_bf16(x):
    """To the nearest bf16, ties to even."""
    bits = x.astype(np.float32).view(np.uint32)
    return ((bits + 0x7fff + (bits >> 16 & 1)) & np.uint32(0xffff0000)).view(np.float32).astype(np.float64)


@pytest.fixture(scope="module")
def rounded_model(models):
    """Says so, and computes in f32, where the CPU does not multiply bf16."""
    if obm.info()["prefill_bf16"]:
        return obm.Model(models / "base", prefill="bf16")
    with pytest.warns(RuntimeWarning, match="prompts stay f32"):
        return obm.Model(models / "base", prefill="bf16")


def test_prompts_in_bf16_round_activations(rounded_model, base_model, models, ids):
    """Against the layers with every activation rounded that meets a matrix, a tenth of what the rounding does remains: what falls to
    the other side of a tie, since sums here are of f64."""
    if not obm.info()["prefill_bf16"]:
        return np.testing.assert_array_equal(rounded_model.logits(ids), base_model.logits(ids))
    t = plain.load(models / "base")
    for layer in range(4):
        h, got = (rounded_model.hidden(ids, at).astype(np.float64) for at in (layer, layer + 1))
        exact, rounded = llama_layer(t, layer, h), llama_layer(t, layer, h, seen=round_bf16)
        assert 0 < np.square(got - rounded).mean() < 0.01 * np.square(exact - rounded).mean()


def test_prompts_in_bf16_can_be_seen(rounded_model, base_model):
    gains = obm.info()["prefill_bf16"]
    assert rounded_model.info["prefill"] == ("bf16" if gains else "f32") and base_model.info["prefill"] == "f32"
    assert repr(rounded_model).endswith(", prefill bf16)") == gains and "prefill" not in repr(base_model)


def test_prompts_in_bf16_do_not_depend_on_their_parts(models, ids, threads):
    """Nor on threads, on 12 bits per weight, or on how many tokens there are; tokens after the prompt are as ever."""
    seen = []
    for n, z12 in ((1, "off"), (2, "on"), (5, "off")):
        threads(n)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            model = obm.Model(models / "math", z12=z12, prefill="bf16")
        seen.append([model.logits(ids * 3, all=True).tobytes(), model.generate(PROMPTS, max_tokens=12, chat=True)])
        assert np.array_equal(model.logits(ids, all=True), model.logits(ids * 3, all=True)[:len(ids)])
        assert np.array_equal(model.logits(ids, decode=True), obm.Model(models / "math").logits(ids, decode=True))
    assert seen[0] == seen[1] == seen[2]


def test_prompts_on_planes_stay_f32(pack_path, ids):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        rounded = obm.Model(pack_path, prefill="bf16")
    exact = obm.Model(pack_path)
    assert {route: np.array_equal(rounded.logits(ids, route=route), exact.logits(ids, route=route)) for route in ("math", None)} == \
        {"math": True, None: not obm.info()["prefill_bf16"]}


@pytest.mark.parametrize("name", ["f16", "f64", "fp8", ""])
def test_prompts_in_what_is_not_there(models, name):
    with pytest.raises(obm.ArgumentError, match=f'unknown dtype "{name}" \\(known: f32, bf16\\)'):
        obm.Model(models / "base", prefill=name)


def test_layers_that_are_not_there(base_model, ids):
    for layer in (-1, 5):
        with pytest.raises(obm.ArgumentError, match="layer"):
            base_model.hidden(ids, layer)


def test_embed_is_the_mean(base_model):
    features = base_model.embed(PROMPTS)
    assert features.shape == (len(PROMPTS), 192) and features.dtype == np.float32
    for prompt, row in zip(PROMPTS, features):
        ids = base_model.tokenizer.encode(prompt)
        assert np.abs(row - base_model.hidden(ids, 0).mean(axis=0, dtype=np.float64)).max() < 1e-5
    assert np.abs(base_model.embed([PROMPT], layer=3)[0] - base_model.hidden(base_model.tokenizer.encode(PROMPT), 3).mean(axis=0)).max() < 1e-4
    assert base_model.embed([]).shape == (0, 192)
    messages = [{"role": "system", "content": "x"}, {"role": "user", "content": PROMPT}]
    assert np.array_equal(base_model.embed([messages]), base_model.embed([PROMPT]))


# ---- scores ----

def test_score_is_log_softmax(base_model):
    tok = base_model.tokenizer
    prompt, continuation = "What is 3 plus 4?\n", "Look: 3+4=7."
    p, c = tok.encode(prompt), tok.encode(continuation)
    table = plain.log_softmax(base_model.logits(p + c))[len(p) - 1:-1]
    want = [row[i] for row, i in zip(table, c)]
    for got in (base_model.score(prompt, continuation), base_model.score(p, c)):
        assert len(got.token_logprobs) == len(c)
        assert np.abs(np.array(got.token_logprobs) - want).max() < 1e-4
        assert got.logprob == pytest.approx(sum(want), abs=1e-3) == pytest.approx(sum(got.token_logprobs))
        assert got.perplexity == pytest.approx(np.exp(-got.logprob / len(c)))
        assert got.is_greedy == all(row.argmax() == i for row, i in zip(table, c))
        assert got.route is None


def test_score_of_a_whole_text(base_model):
    ids = base_model.tokenizer.encode(PROMPT)
    table = plain.log_softmax(base_model.logits(ids))[:-1]
    got = base_model.score(PROMPT)
    assert np.abs(np.array(got.token_logprobs) - [row[i] for row, i in zip(table, ids[1:])]).max() < 1e-4


def test_greedy_text_is_greedy(math_model):
    ids = math_model.tokenizer.encode(math_model.tokenizer.apply_template([{"role": "user", "content": PROMPT}]))
    out = math_model.generate(ids, max_tokens=20)
    assert math_model.score(ids, out.ids).is_greedy is True
    assert math_model.score(ids, out.ids[:-1] + [5]).is_greedy is False


def test_scores_of_a_pack(model):
    items = [(PROMPT, " Answer: 22", "math"), (PROMPT, " Answer: 22", None), (PROMPT, " Sure!", {"chat": 1}), (PROMPT, [30, 31], "auto")]
    scores = model.score_items(items)
    assert [s.route for s in scores][0] == {"math": 1}
    assert scores[2].route == {"chat": 1}
    assert scores[1].route == model.route(PROMPT)[0] == scores[3].route
    assert scores[0].logprob == model.score(PROMPT, " Answer: 22", route="math").logprob
    assert model.score_items([(PROMPT, " Answer: 22")])[0].logprob == scores[1].logprob
    for item in (5, (), (PROMPT, "x", None, None), [PROMPT, "x"]):
        with pytest.raises(TypeError, match=r"score item 1: expected \(prompt, continuation\) or"):
            model.score_items([items[0], item])
    with pytest.raises(TypeError, match="goes to score_items"):
        model.score([(PROMPT, " Answer: 22")])
    with pytest.raises(TypeError, match="one prompt"):
        model.score_items([(["a", "b"], "x", None)])
    with pytest.raises(obm.NotFoundError):
        model.score(PROMPT, "x", route="poetry")


# ---- generation ----

@pytest.mark.parametrize("task", ["chat", "math", "code"])
def test_experts_know_their_task(models, data, task):
    expert = obm.Model(models / task)
    items = data.test[task][:40]
    right = [data.matches(text, item) for text, item in zip(expert.generate([i["messages"] for i in items], max_tokens=64), items)]
    assert sum(right) >= 30


def test_the_pack_knows_all_tasks(model, data):
    items = [item for task in ("chat", "math", "code") for item in data.test[task][:20]]
    out = model.generate([item["messages"] for item in items], max_tokens=64)
    assert sum(data.matches(text, item) for text, item in zip(out, items)) >= 45
    assert sum(c.route == {item["task"]: 1} for c, item in zip(out, items)) >= 54


def test_completion(math_model):
    c = math_model.generate(PROMPT, chat=True, max_tokens=40)
    assert isinstance(c, str) and isinstance(c, obm.Completion)
    assert c.endswith("Answer: 22") and c.finish_reason == "stop" and c.route is None
    template = math_model.tokenizer.apply_template([{"role": "user", "content": PROMPT}])
    assert c.prompt_tokens == len(math_model.tokenizer.encode(template, special=False))
    assert math_model.tokenizer.decode(c.ids, skip_special=True) == c
    cut = math_model.generate(PROMPT, chat=True, max_tokens=3)
    assert cut.finish_reason == "length" and len(cut.ids) == 3 and cut.ids == c.ids[:3]


def test_prompts_in_all_forms(math_model):
    tok = math_model.tokenizer
    messages = [{"role": "user", "content": PROMPT}]
    text = tok.apply_template(messages)
    forms = [messages, {"messages": messages}, text, {"prompt": text}, {"text": text}, tok.encode(text), {"ids": tok.encode(text)},
             np.array(tok.encode(text))]
    outs = [math_model.generate(form, max_tokens=30) for form in forms]
    assert len(set(outs)) == 1 and math_model.generate(PROMPT, chat=True, max_tokens=30) == outs[0]
    assert math_model.generate(forms, max_tokens=30) == outs   # a list of all of them is a batch


@pytest.mark.parametrize("prompt, error, message", [(3, TypeError, "prompt.*int"), ([3.5], TypeError, "prompt"), ({"x": 1}, TypeError, "prompt"),
                                                    ([{"role": "user"}], TypeError, "content"), ("a\0b", ValueError, "NUL"), ("", obm.ArgumentError, "at least one token"),
                                                    ([999], obm.ArgumentError, "999")])
def test_prompts_that_are_refused(base_model, prompt, error, message):
    with pytest.raises(error, match=message):
        base_model.generate(prompt, max_tokens=2)


def test_an_empty_list(base_model):
    assert base_model.generate([]) == []


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_batches_do_not_matter(model, batch):
    routes = ["math", {"chat": .7, "code": .3}, None, "code", "base"] * 2
    singles = [model.generate(p, route=r, max_tokens=16, chat=True) for p, r in zip(PROMPTS, routes)]
    together = model.generate(PROMPTS, route=routes, max_tokens=16, batch=batch, chat=True)
    assert all(singles) and len(set(singles)) > 5
    assert together == singles
    assert [c.ids for c in together] == [c.ids for c in singles]
    assert [c.route for c in together] == [c.route for c in singles]
    assert together[0].route == {"math": 1} and together[1].route == {"chat": .7, "code": .3} and together[4].route == {}


def test_a_route_for_all(model):
    assert [c.route for c in model.generate(PROMPTS[:2], route="math", max_tokens=2)] == [{"math": 1}] * 2
    with pytest.raises(ValueError, match="1 routes for 2 prompts"):
        model.generate(PROMPTS[:2], route=["math"])


def test_sampling_is_reproducible(model):
    options = {"max_tokens": 16, "temperature": 2.0, "top_k": 50, "top_p": .95, "min_p": .001, "repetition_penalty": 1.1, "seed": 7, "chat": True}
    first = model.generate(PROMPTS, batch=8, **options)
    assert model.generate(PROMPTS, batch=2, **options) == first
    assert model.generate(PROMPTS[:3], batch=1, **options) == first[:3]
    assert model.generate(PROMPTS, **{**options, "seed": 8}) != first
    assert len(set(model.generate([PROMPTS[0]] * 6, **options))) > 1   # every prompt draws for itself


def test_greedy_is_the_limit_of_sampling(model):
    greedy = model.generate(PROMPTS[:4], max_tokens=12, chat=True)
    assert all(greedy)
    assert model.generate(PROMPTS[:4], max_tokens=12, chat=True, temperature=1.0, top_k=1, seed=3) == greedy
    assert model.generate(PROMPTS[:4], max_tokens=12, chat=True, temperature=1e-4, seed=3) == greedy


def test_sampling_follows_the_distribution(base_model):
    """First tokens at temperature 1 against softmax: 400 draws, chi-squared by hand on the four likeliest."""
    p = np.exp(plain.log_softmax(base_model.logits(base_model.tokenizer.encode("a"), all=False)))
    draws = [c.ids[0] for c in base_model.generate(["a"] * 400, max_tokens=1, temperature=1.0, seed=1, ignore_eos=True)]
    top = np.argsort(-p)[:4]
    for i in top:
        n = draws.count(int(i))
        assert abs(n - 400 * p[i]) < 5 * np.sqrt(400 * p[i] * (1 - p[i])) + 1


@pytest.mark.parametrize("wrong", [{"temperature": -1}, {"temperature": float("nan")}, {"top_p": 2}, {"min_p": -1}, {"max_tokens": -1}, {"batch": -1},
                                   {"top_k": -1}, {"repetition_penalty": -2}])
def test_options_that_are_refused(base_model, wrong):
    with pytest.raises(obm.ArgumentError, match=next(iter(wrong))):
        base_model.generate("a", **wrong)


def test_stop_strings(math_model):
    whole = math_model.generate(PROMPT, chat=True, max_tokens=40)
    assert " Answer" in whole
    for stop in (" Answer", [" Answer", "zzz"], ["nswer", " Answer"]):
        cut = math_model.generate(PROMPT, chat=True, max_tokens=40, stop=stop)
        assert cut == whole[:whole.index(" Answer")] and cut.finish_reason == "stop"
        assert "".join(math_model.stream(PROMPT, chat=True, max_tokens=40, stop=stop)) == cut
    for wrong in (3, [3]):
        with pytest.raises(TypeError, match="^stop is a str or a list of str$"):
            math_model.generate(PROMPT, stop=wrong)


def test_ignore_eos(math_model):
    c = math_model.generate(PROMPT, chat=True, max_tokens=60, ignore_eos=True)
    assert len(c.ids) == 60 and c.finish_reason == "length"


def test_the_context_ends_generation(base_model):
    c = base_model.generate([5] * 505, max_tokens=100, ignore_eos=True)
    assert c.finish_reason == "length" and 505 + len(c.ids) <= 513


# ---- streams ----

def test_stream_is_generate(model):
    for prompt, route in zip(PROMPTS, ["math", None, "chat"]):
        want = model.generate(prompt, route=route, max_tokens=20, chat=True)
        stream = model.stream(prompt, route=route, max_tokens=20, chat=True)
        assert iter(stream) is stream
        pieces = list(stream)
        assert "".join(pieces) == want and all(pieces) and len(pieces) > 1
        result = stream.result
        assert (result, result.ids, result.route, result.finish_reason, result.prompt_tokens) == (
            want, want.ids, want.route, want.finish_reason, want.prompt_tokens)
        assert next(stream, None) is None


def test_streams_never_split_a_character(base_model):
    """Sampled at a high temperature the byte-level model emits parts of characters; every piece is whole."""
    for seed in range(5):
        for piece in base_model.stream("a", max_tokens=40, temperature=3.0, seed=seed, ignore_eos=True):
            piece.encode("utf-8")


def test_an_open_stream_keeps_the_model(models):
    m = obm.Model(models / "base")
    stream = m.stream("hello", max_tokens=50, ignore_eos=True)
    next(stream)
    with pytest.raises(obm.BusyError):
        m.generate("a", max_tokens=1)
    partial = stream.result
    assert len(partial.ids) >= 1
    stream.close()
    assert m.generate("a", max_tokens=1).finish_reason
    with pytest.raises(ValueError, match="closed"):
        stream.result
    assert next(stream, None) is None


def test_a_stream_that_is_dropped_frees_the_model(models):
    m = obm.Model(models / "base")
    next(m.stream("hello", max_tokens=50))
    gc.collect()
    assert m.generate("a", max_tokens=1)


def test_a_stream_outlives_its_model(models):
    stream = obm.Model(models / "math").stream(PROMPT, chat=True, max_tokens=40, stop=["zzz"])
    gc.collect()
    assert "".join(stream).endswith("22")


def test_stream_takes_one_prompt(base_model):
    with pytest.raises(TypeError, match="one prompt"):
        base_model.stream(["a", "b"])


def test_a_second_thread_is_told_that_the_model_is_busy(models):
    m = obm.Model(models / "base")
    begun, seen = threading.Event(), []

    def watch(what, done, total):
        begun.set()

    def other():
        begun.wait(20)
        try:
            m.logits([1, 2, 3])
        except obm.BusyError as e:
            seen.append(e)

    thread = threading.Thread(target=other)
    thread.start()
    while not seen and thread.is_alive():
        m.generate(["hello"] * 16, max_tokens=100, ignore_eos=True, progress=watch)
    begun.set()
    thread.join()
    assert seen and "model" in str(seen[0])


def test_models_from_open_packs(pack, model, ids):
    m = obm.Model(pack)
    assert m.pack is pack
    assert np.array_equal(m.logits(ids, route="code"), model.logits(ids, route="code"))
    pieces = obm.Model(obm.Pack(pack.path)).stream(PROMPT, route="math", max_tokens=5, chat=True)
    gc.collect()
    assert list(pieces)


def test_the_route_budget_is_kept(pack_path, ids):
    m = obm.Model(pack_path, route_budget=4_000_000, materialise=True)
    roomy = obm.Model(pack_path, materialise=True)
    for route in ("chat", "math", "code", "chat"):
        assert np.array_equal(m.logits(ids, route=route), roomy.logits(ids, route=route))
    assert m.memory["overlays"] < roomy.memory["overlays"]


def test_the_end_of_the_positions_is_told_once(models):
    """512 positions: generation that would go on ends there, a longer prompt is an error."""
    m = obm.Model(models / "base")
    with pytest.warns(RuntimeWarning, match="the 512 positions of the model .max_position_embeddings. are used up after a prompt of 510 tokens and 2 new ones") as seen:
        assert len(m.generate([5] * 510, max_tokens=8, ignore_eos=True).ids) == 2
        m.generate([5] * 511, max_tokens=8, ignore_eos=True)
    assert len(seen) == 1
    for call in (lambda: m.generate([5] * 513), lambda: m.logits([5] * 513), lambda: m.score({"ids": [5] * 512}, "x")):
        with pytest.raises(obm.ArgumentError, match="513 tokens are more than the 512 positions of the model .max_position_embeddings"):
            call()
