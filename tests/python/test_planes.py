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


def test_switching_the_route_materialises_the_embedding_only(pack_path, prompts):
    """The family's embeddings are full and tied to the head, so they are the one tensor of a route that planes cannot give."""
    model, other = obm.Model(pack_path), obm.Model(pack_path, materialise=True)
    grown = {}
    for name, m in (("planes", model), ("materialised", other)):
        generate(m, prompts[:1], route="base")
        before = m.memory["overlays"]
        generate(m, prompts[:1], route="math")
        grown[name] = m.memory["overlays"] - before
    embedding = 4 * model.info["vocab"] * model.info["hidden"]
    assert 0 < grown["planes"] < embedding + 65536 < grown["materialised"]
