"""The built-in router's training and answers, and routers of one's own."""

import numpy as np
import pytest

import onebitmerge as obm

TASKS = ["chat", "math", "code"]
CODE = "What does this print?\nx = [1, 2]\nprint(x[::-1])"


@pytest.fixture(scope="module")
def prompts(data):
    return [item["messages"] for item in data.router], [item["task"] for item in data.router]


@pytest.fixture
def untrained(models, experts, tmp_path):
    return obm.compress(models / "base", experts, tmp_path / "p")


# ---- training ----

def test_report(untrained, prompts):
    texts, labels = prompts
    report = untrained.train_router(texts, labels, holdout=.25, seed=3)
    assert report.tasks == TASKS and report.layer == 0
    assert report.n_held_out == sum(-(-labels.count(task) // 4) for task in TASKS)
    assert report.n_train + report.n_held_out == len(texts)
    confusion = np.array(report.confusion)
    assert confusion.shape == (3, 3) and confusion.sum() == report.n_held_out
    assert confusion.sum(axis=1).tolist() == [25, 25, 25]
    assert report.accuracy == pytest.approx(np.trace(confusion) / report.n_held_out)
    assert report.accuracy > 0.9 and 0 <= report.calibration_error < 0.2
    stored = obm.Pack(untrained.path).router_report()
    assert stored == untrained.router_report() == report
    assert "held-out accuracy" in str(report) and "<table>" in report._repr_html_()
    untrained.verify()


def test_training_is_reproducible(untrained, prompts, threads):
    seen = []
    for n in (1, 2, 5):
        threads(n)
        pack = obm.Pack(untrained.path)
        pack.train_router(*prompts, layer=1)
        seen.append(obm.Model(pack).route(CODE))
    assert seen[0] == seen[1] == seen[2]


def test_it_routes_the_test_prompts(model, data):
    hits = total = 0
    for task in TASKS:
        for item in data.test[task]:
            weights, probabilities = model.route(item["messages"])
            assert sum(probabilities.values()) == pytest.approx(1)
            best = max(probabilities, key=probabilities.get)
            assert weights == {best: 1}
            hits += best == task
            total += 1
    assert hits / total > 0.9


def test_the_probabilities_are_a_logistic_regression(model, pack_path):
    """softmax of an affine map of the features, from the tensors of router.safetensors alone."""
    import plain

    file, = pack_path.glob("router-*.safetensors")
    tensors = {name: plain.widen(*t).astype(np.float64) for name, t in plain.read_safetensors(file).items()}
    x = model.embed([CODE])[0].astype(np.float64)
    shapes = {name: t.shape for name, t in tensors.items()}
    weight = next(t for t in tensors.values() if t.shape == (3, x.size))
    bias = next(t for t in tensors.values() if t.shape == (3,))
    vectors = {name: t for name, t in tensors.items() if t.shape == (x.size,)}
    assert len(vectors) == 2, shapes
    mean = next(t for name, t in vectors.items() if "mean" in name)
    other = next(t for name, t in vectors.items() if "mean" not in name)
    _, probabilities = model.route(CODE)
    fits = []
    for standardised in ((x - mean) / other, (x - mean) * other):
        z = weight @ standardised + bias
        p = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
        fits.append(np.abs(p - [probabilities[t] for t in TASKS]).max())
    assert min(fits) < 1e-6


def test_without_a_router(untrained):
    with pytest.raises(obm.NotFoundError, match="router"):
        untrained.router_report()
    m = obm.Model(untrained)
    with pytest.raises(obm.NotFoundError, match="router"):
        m.generate("hello", max_tokens=2)
    with pytest.raises(obm.NotFoundError, match="router"):
        m.route("hello")
    assert m.generate("hello", route="chat", max_tokens=2).route == {"chat": 1}


@pytest.mark.parametrize("texts, labels, error, message", [
    (["a", "b"], ["chat"], ValueError, "2 texts but 1 labels"),
    (["a", "b"], ["chat", "poetry"], obm.NotFoundError, "poetry"),
    (["a", "b", "c", "d"], ["chat", "chat", "math", "math"], obm.ArgumentError, "code"),
    (["a", "b"], ["chat", 3], TypeError, "labels"),
    ([], [], obm.ArgumentError, "chat|example|prompt"),
    ([3.5], ["chat"], TypeError, "prompt"),
])
def test_training_refuses(untrained, texts, labels, error, message):
    with pytest.raises(error, match=message):
        untrained.train_router(texts, labels)
    with pytest.raises(obm.NotFoundError):
        untrained.router_report()


def test_what_progress_raises_leaves_no_router(untrained, prompts):
    with pytest.raises(ZeroDivisionError):
        untrained.train_router(*prompts, progress=lambda what, done, total: 1 / 0)
    with pytest.raises(obm.NotFoundError):
        untrained.router_report()


# ---- one's own ----

@pytest.mark.parametrize("answer, weights", [
    ("code", {"code": 1}), (1, {"math": 1}), (np.int64(2), {"code": 1}), ({"chat": .5, "math": .25}, {"chat": .5, "math": .25}),
    ([0, 0, 1], {"code": 1}), ((.5, .5, 0), {"chat": .5, "math": .5}), (np.array([1., 0, 0]), {"chat": 1}), ("chat=.5,code=.5", {"chat": .5, "code": .5}),
    ({}, {}), ("base", {}),
])
def test_answers(model, answer, weights):
    assert model.route("hello", router=lambda request: answer) == (weights, None)
    assert model.generate("hello", router=lambda request: answer, max_tokens=2).route == weights


def test_a_router_runs_once_per_prompt(model):
    seen = []

    def router(request):
        seen.append(request.text)
        return "math"

    out = model.generate(["a", "b", "c"], router=router, route=[None, "code", "auto"], max_tokens=2)
    assert seen == ["a", "c"]
    assert [c.route for c in out] == [{"math": 1}, {"code": 1}, {"math": 1}]
    assert "".join(model.stream("d", router=router, max_tokens=2)) == model.generate("d", route="math", max_tokens=2)
    assert seen[-1] == "d"


def test_what_a_request_holds(model):
    seen = {}

    def router(request):
        seen.update(text=request.text, tokens=request.tokens, tasks=request.tasks, builtin=request.builtin,
                    probabilities=request.probabilities, features=[request.features(), request.features(2)])
        return request.builtin

    weights, _ = model.route(CODE, router=router)
    builtin, probabilities = model.route(CODE)
    assert weights == builtin == {"code": 1}
    assert seen["text"] == CODE
    assert seen["tokens"] == model.tokenizer.encode(CODE)
    assert seen["tasks"] == TASKS
    assert seen["builtin"] == "code" and seen["probabilities"] == probabilities
    for layer, features in zip((0, 2), seen["features"]):
        assert np.array_equal(features, model.embed([CODE], layer=layer)[0])


def test_a_request_sees_the_user_turns(model):
    texts = []

    def router(request):
        texts.append(request.text)
        return 0

    turns = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "one"}, {"role": "assistant", "content": "two"},
             {"role": "user", "content": "three"}]
    ids = model.tokenizer.encode("from ids")
    for prompt in (turns, "plain", ids, {"prompt": "keyed"}, {"messages": turns}):
        model.generate([prompt], router=router, max_tokens=1)
    assert texts == ["one\nthree", "plain", "from ids", "keyed", "one\nthree"]


def test_long_prompts_are_cut_to_the_last_512(model):
    lengths = []

    def router(request):
        lengths.append(len(request.tokens))
        return 0

    text = "word " * 900
    model.route(text, router=router)
    assert lengths == [512]
    with pytest.raises(obm.ArgumentError):   # the model has 512 positions
        model.generate(text, route="chat")


def test_what_a_router_raises_comes_back(model):
    class Mine(Exception):
        pass

    mine = Mine("no")

    def router(request):
        raise mine

    for call in (lambda: model.generate(["a", "b"], router=router), lambda: list(model.stream("a", router=router)),
                 lambda: model.route("a", router=router)):
        with pytest.raises(Mine) as caught:
            call()
        assert caught.value is mine
    assert model.generate("hello", route="chat", max_tokens=2).finish_reason == "length"


@pytest.mark.parametrize("answer, error", [("poetry", obm.NotFoundError), (7, obm.ArgumentError), (None, TypeError), ([1, 2], ValueError),
                                           ({"chat": -1}, obm.ArgumentError), ({"chat": float("nan")}, obm.ArgumentError), ({"chat": "x"}, TypeError)])
def test_answers_that_are_no_route(model, answer, error):
    """The router is named, and what it was asked."""
    def pick(request):
        return answer if request.text == "b" else "math"

    with pytest.raises(error, match=r'^router test_answers_that_are_no_route\.<locals>\.pick \(.*test_router\.py, line \d+\), asked about "b": .'):
        model.generate(["a", "b", "c"], router=pick, max_tokens=1)
    with pytest.raises(error, match=r'^router Picker, asked about "b": .'):
        model.route("b", router=type("Picker", (), {"__call__": lambda self, request: answer})())


def test_what_an_answer_raises_comes_back(model):
    class Odd(Exception):
        def __init__(self, a, b):
            super().__init__(a, b)

    class Weight:
        def __float__(self):
            raise Odd(1, 2)

    with pytest.raises(Odd) as caught:
        model.route("b", router=lambda request: [Weight()] * 3)
    assert caught.value.args == (1, 2) and caught.traceback[-1].name == "__float__"


def test_a_request_dies_with_its_call(model):
    kept = []
    model.route("a", router=lambda request: kept.append(request) or 0)
    for use in (lambda r: r.text, lambda r: r.tokens, lambda r: r.builtin, lambda r: r.probabilities, lambda r: r.tasks, lambda r: r.features()):
        with pytest.raises(ValueError, match="only while the router runs"):
            use(kept[0])


def test_a_router_cannot_run_the_model_it_routes(model):
    with pytest.raises(obm.BusyError):
        model.generate("a", router=lambda request: model.generate("b", route="chat"))
    assert model.route("a", router=lambda request: 0) == ({"chat": 1}, None)


def test_plain_models_have_no_routes(base_model):
    assert base_model.pack is None
    with pytest.raises(obm.ArgumentError, match="plain model"):
        base_model.generate("a", route="chat")
    with pytest.raises(obm.ArgumentError, match="plain model"):
        base_model.route("a")
    with pytest.raises(obm.ArgumentError):
        base_model.generate("a", router=lambda request: 0)
    with pytest.raises(TypeError, match="callable"):
        base_model.generate("a", router=3)
