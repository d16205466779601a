"""Running on sign planes says what the dense folder of the same route says, greedily, on really trained models."""

import pytest

import onebitmerge as obm

ROUTES = ("chat", "math", "code", "chat=.7,math=.3", "chat=.5,math=.5,code=.5")
PER_TASK = 20


@pytest.fixture(scope="module")
def prompts(data):
    return [item["messages"] for task in data.test for item in data.test[task][:PER_TASK]]


def generate(model, prompts, **options):
    return [c.ids for c in model.generate(prompts, max_tokens=24, batch=32, **options)]


def dense(pack, route, folder):
    """The route as a plain f32 model: no code of running packs takes part."""
    pack.export(route, folder, dtype="f32")
    return obm.Model(folder)


@pytest.mark.parametrize("route", ROUTES)
def test_greedy_text_is_that_of_the_dense_model(pack, model, prompts, tmp_path, route):
    assert model.memory["planes"] > 0
    assert generate(model, prompts, route=route) == generate(dense(pack, route, tmp_path / "dense"), prompts)


def test_greedy_text_of_a_mixed_batch(pack_path, model, prompts):
    """Neighbours on other routes, and the routes of the built-in router, materialised and not."""
    other = obm.Model(pack_path, materialise=True)
    routes = [ROUTES[i % len(ROUTES)] if i % 7 else None for i in range(len(prompts))]
    assert generate(model, prompts, route=routes) == generate(other, prompts, route=routes)
    assert other.memory["planes"] == 0 and other.memory["overlays"] > 0


def test_switching_the_route_moves_no_weights(pack_path, prompts):
    """The family differs from its base in 1-bit matrices and nothing else (embeddings and norms are the base's)."""
    grown = {}
    for way in (False, True):
        m = obm.Model(pack_path, materialise=way)
        generate(m, prompts[:1], route="base")
        before = m.memory["overlays"]
        generate(m, prompts[:1], route="math")
        grown[way] = m.memory["overlays"] - before
    assert grown[False] < 65536 and grown[True] > m.info["bytes"]


# ---- routing again ----

QUESTION = "What is 17 plus 5?"


class Changing:
    """Answers each question about a prompt with the next of its routes; notes what it saw."""

    def __init__(self, **routes):
        self.routes, self.seen = routes, {word: [] for word in routes}

    def __call__(self, request):
        word, = [w for w in self.routes if w in request.text]
        self.seen[word].append(request.text)
        return self.routes[word][len(self.seen[word]) - 1]


def test_a_router_is_asked_again(model):
    router = Changing(plus=["math", "math", "code", {"chat": .5, "math": .5}])
    c = model.generate(QUESTION, chat=True, max_tokens=16, ignore_eos=True, router=router, route_every=4)
    assert c.routes == [(0, {"math": 1}), (8, {"code": 1}), (12, {"chat": .5, "math": .5})] and c.route == {"chat": .5, "math": .5}
    alone = model.generate(QUESTION, chat=True, max_tokens=16, ignore_eos=True, route="math")
    assert c.ids[:8] == alone.ids[:8] and alone.routes is None
    first, *later = router.seen["plus"]
    assert first == QUESTION
    for n, seen in enumerate(later, 1):   # the user's words, then what came of them
        assert seen == QUESTION + "\n" + model.tokenizer.decode(c.ids[:4 * n], skip_special=True)


def test_each_sequence_of_a_batch_is_routed_again_on_its_own(model, pack_path):
    routes = {"plus": ["math", "code", "math", "code"], "house": ["chat", "chat", {"chat": 1, "code": .2}, "base"], "times": ["code"] * 4}
    prompts = [QUESTION, "Tell me of a house", "What is 3 times 4?", QUESTION]
    given = [None, None, None, "math"]

    def run(m, prompts, given, batch):
        return m.generate(prompts, route=given, router=Changing(**routes), chat=True, max_tokens=12, ignore_eos=True, route_every=3, batch=batch)

    together = run(model, prompts, given, 4)
    for i, c in enumerate(together):
        alone, = run(model, [prompts[i]], [given[i]], 1)
        assert (alone.ids, alone.routes) == (c.ids, c.routes)
    assert [len(c.routes) for c in together] == [4, 3, 1, 1] and together[3].routes == [(0, {"math": 1})]   # a given route stays
    small = obm.Model(pack_path, materialise=True, route_budget=1)   # room for one route: the others wait for it
    assert [(c.ids, c.routes) for c in run(small, prompts, given, 4)] == [(c.ids, c.routes) for c in together]


def test_a_stream_is_routed_again_and_what_its_router_raises_comes_back(model):
    options = {"chat": True, "max_tokens": 10, "ignore_eos": True, "route_every": 2}
    routes = ["math", "math", "code", "chat", "math"]
    stream = model.stream(QUESTION, router=Changing(plus=routes), **options)
    text, result = "".join(stream), stream.result
    assert (result, result.ids, result.routes) == (text, *(lambda c: (c.ids, c.routes))(model.generate(QUESTION, router=Changing(plus=routes), **options)))
    stream.close()
    with pytest.raises(IndexError):
        model.generate(QUESTION, router=Changing(plus=routes[:3]), **options)
    built_in = model.generate(QUESTION, chat=True, max_tokens=40, route_every=8)
    assert built_in.routes[0] == (0, {"math": 1}) and "22" in built_in
    with pytest.raises(obm.ArgumentError, match="route_every"):
        model.generate(QUESTION, route_every=-1)


def test_a_plain_model_has_no_router_to_ask(base_model):
    with pytest.raises(obm.ArgumentError, match="plain model"):
        base_model.generate(QUESTION, route_every=2)
