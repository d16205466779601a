"""Merges on LAPACK against NumPy's decompositions, and the identities that their papers' formulas imply.

Formulas are in f64 here and in the library, the result is rounded to f32 once: values of size 1 to 4 differ by 2^-22 and by what
another order of sums leaves, hence 2e-6 unless a test says why it is more."""

import numpy as np
import pytest

import onebitmerge as obm
import plain

TOLERANCE = 2e-6
SHAPES = {"model.embed_tokens.weight": (23, 9), "model.layers.0.self_attn.q_proj.weight": (9, 9), "model.layers.0.self_attn.k_proj.weight": (5, 9),
          "model.layers.0.mlp.up_proj.weight": (31, 9), "model.layers.0.mlp.down_proj.weight": (9, 31), "model.layers.0.input_layernorm.weight": (9,),
          "model.layers.0.self_attn.q_proj.bias": (9,), "model.norm.weight": (9,)}
LINEAR = [name for name in SHAPES if name.endswith("_proj.weight")]
TASKS = ("a", "b", "c")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base whose embedding is its head, and three models of it."""
    root, rng = tmp_path_factory.mktemp("families"), np.random.default_rng(7)
    base = {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}
    plain.write_folder(root / "base", base, config={"model_type": "llama", "tie_word_embeddings": True})
    for task in TASKS:
        plain.write_folder(root / task, {name: (x + .3 * rng.normal(size=x.shape)).astype(np.float32) for name, x in base.items()},
                           config={"model_type": "llama", "tie_word_embeddings": True})
    return root


def merged(folders, out, method, models=TASKS, options=None, **parameters):
    obm.merge({"merge_method": method, "base_model": str(folders / "base"), "dtype": "float32", "parameters": parameters,
               "models": [{"model": str(folders / m)} for m in models]}, out, **(options or {}))
    return plain.load(out)


def svd(a):
    u, s, vt = np.linalg.svd(a, full_matrices=False)
    return u, s, vt


def cut(a, rank):
    u, s, vt = svd(a)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


def polar(a):
    u, s, vt = svd(a)
    keep = s > 2**-20 * s[0]
    return u[:, keep] @ vt[keep]


def wudi(ds, k):
    """The minimum of sum ||(M - D_t) D_t^T||^2 / ||D_t||^2 by least squares on the residuals."""
    x = np.vstack([d / np.linalg.norm(d) for d in ds])
    y = np.hstack([d @ d.T / np.linalg.norm(d) for d in ds])
    return np.linalg.lstsq(x, y.T, rcond=None)[0].T


def optmerge(ds, k):
    ts = [cut(d, max(1, k // len(ds))) for d in ds]
    x = np.vstack([t / np.linalg.norm(d) for t, d in zip(ts, ds)])
    y = np.hstack([t @ t.T / np.linalg.norm(d) for t, d in zip(ts, ds)])
    mean = sum(ds) / len(ds)
    return mean + np.linalg.lstsq(x, (y - mean @ x.T).T, rcond=None)[0].T


def tsvm(ds, k):
    parts = [[x[..., :k // len(ds)] if i < 2 else x[:k // len(ds)] for i, x in enumerate(svd(d))] for d in ds]
    u, s, vt = np.hstack([p[0] for p in parts]), np.hstack([p[1] for p in parts]), np.vstack([p[2] for p in parts])
    return polar(u) * s @ polar(vt)


def iso_c(ds, k):
    u, s, vt = svd(sum(ds))
    return s.mean() * u @ vt


def iso_cts(ds, k):
    each = round((k - int(.8 * k)) / len(ds))
    common = k - each * len(ds)
    u, s, vt = svd(sum(ds))
    us, ss, vts, inside = [], [], [], u[:, :common]
    for d in ds:
        ut, st, vtt = svd(d - inside @ inside.T @ d)
        us.append(ut[:, :each]), ss.append(st[:each]), vts.append(vtt[:each])
    us, ss, vts = np.hstack(us + [inside]), np.hstack(ss + [s[:common]]), np.vstack(vts + [vt[:common]])
    return ss.mean() * polar(us) @ polar(vts)


def opcm_step(acc, d, alpha=.5):
    """One expert on full bases, as the paper has it."""
    u, s, vt = np.linalg.svd(acc)
    k = int(np.argmax(np.cumsum(s) / s.sum() > alpha))
    p = u.T @ d @ vt.T
    np.fill_diagonal(p, 0)
    p[:k, :k] = 0
    return u @ p @ vt


MATRIX = {f.__name__: f for f in (wudi, optmerge, tsvm, iso_c, iso_cts)}


@pytest.mark.parametrize("method", MATRIX)
def test_recipes(folders, tmp_path, method):
    full = {"rank": 1} if method in ("wudi", "optmerge") else {}   # lstsq leaves no direction out
    got = merged(folders, tmp_path / "out", method, **{"lambda": .7}, **full)
    base, models = plain.load(folders / "base"), [plain.load(folders / m) for m in TASKS]
    assert set(got) == set(SHAPES)   # the head stays tied
    for name in SHAPES:
        ds = [(m[name] - base[name]).astype(np.float64) for m in models]
        want = MATRIX[method](ds, min(SHAPES[name])) if name in LINEAR else sum(ds) / 3
        assert np.abs(got[name] - (base[name] + .7 * want)).max() < TOLERANCE, name


@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_opcm_is_its_recursion(folders, tmp_path, scope):
    """The paper scales after every step; the library keeps the sum and scales once."""
    got = merged(folders, tmp_path / "out", "opcm", scope=scope)
    base, models = plain.load(folders / "base"), [plain.load(folders / m) for m in TASKS]
    deltas = [{n: (m[n] - base[n]).astype(np.float64) for n in SHAPES} for m in models]
    for names in [[n] for n in SHAPES] if scope == "tensor" else [list(SHAPES)]:
        size = lambda d: np.sqrt(sum((d[n]**2).sum() for n in names))   # noqa: E731
        state, factor = {n: deltas[0][n] for n in names}, 1.0
        for i, d in enumerate(deltas[1:], 2):
            state = {n: factor * state[n] + (opcm_step(state[n], d[n]) if n in LINEAR else d[n]) for n in names}
            mean = np.mean([size(x) for x in deltas[:i]])
            factor = size(state) / mean
            state = {n: x / factor for n, x in state.items()}
        for n in names:
            assert np.abs(got[n] - (base[n] + state[n])).max() < TOLERANCE, n


def test_twin_in_a_recipe(folders, tmp_path):
    got = merged(folders, tmp_path / "out", "twin", density=.5, **{"lambda": .4})
    base, models = plain.load(folders / "base"), [plain.load(folders / m) for m in TASKS]
    for name, shape in SHAPES.items():
        ds = [(m[name] - base[name]).astype(np.float64) for m in models]
        shared = .4 * sum(ds)
        own = [cut(d - shared, int(.5 * min(shape))) if name in LINEAR else d - shared for d in ds]
        assert np.abs(got[name] - (base[name] + shared + sum(own) / 3)).max() < TOLERANCE, name


# ---- identities ----

def task_vectors(shape, n=3, seed=1, scale=.3):
    rng = np.random.default_rng(seed)
    base = rng.normal(size=shape).astype(np.float32)
    return base, [(base + scale * rng.normal(size=shape)).astype(np.float32) for _ in range(n)]


@pytest.mark.parametrize("shape", [(40, 17), (21, 33), (3, 50), (64, 64)])
def test_wudi_is_regmean_with_its_gram(shape):
    """RegMean's own form: (sum W_t G_t) (sum G_t)^-1 on the weights, with D_t^T D_t / ||D_t||^2 for X^T X; where the Grams have
    no inverse, the base's part there stays."""
    base, models = task_vectors(shape)
    ds = [m.astype(np.float64) - base for m in models]
    grams = [d.T @ d / (d**2).sum() for d in ds]
    inverse = np.linalg.pinv(sum(grams), rcond=1e-12, hermitian=True)
    want = sum(m @ g for m, g in zip(models, grams)) @ inverse + base @ (np.eye(shape[1]) - sum(grams) @ inverse)
    assert np.abs(obm.merge_tensors("wudi", models, base, {"rank": 1}) - want).max() < 1e-5   # pinv of a Gram: its condition is a square


@pytest.mark.parametrize("method", ["wudi", "optmerge", "tsvm"])
def test_one_model_is_itself(method):
    for shape in [(7, 30), (30, 7), (11, 11)]:
        base, (model,) = task_vectors(shape, 1)
        assert np.abs(obm.merge_tensors(method, [model], base) - model).max() < TOLERANCE


@pytest.mark.parametrize("method", ["wudi", "optmerge"])
def test_defaults_stay_near_the_experts(method):
    """The whole pseudo-inverse divides by the smallest eigenvalues, which are noise; the default leaves them out."""
    rng = np.random.default_rng(4)
    base = rng.normal(size=(60, 40)).astype(np.float32)
    ds = [rng.normal(size=(60, 12)) @ rng.normal(size=(12, 40)) + .02 * rng.normal(size=(60, 40)) for _ in range(3)]
    got = obm.merge_tensors(method, [base + d for d in ds], base)
    assert np.linalg.norm(got - base) < 2 * np.linalg.norm(sum(ds))


def test_tasks_in_orthogonal_spaces_add_up():
    """Nothing interferes: the sum is exact for wudi, and for tsvm where each task's rank is within its budget."""
    rng = np.random.default_rng(3)
    q, r = (np.linalg.qr(rng.normal(size=(n, n)))[0] for n in (24, 15))
    ds = [(q[:, 5 * t:5 * t + 5] * [5, 4, 3, 2, 1]) @ r[5 * t:5 * t + 5] * .1 for t in range(3)]
    base = rng.normal(size=(24, 15))
    for method in ("wudi", "tsvm"):
        got = obm.merge_tensors(method, [base + d for d in ds], base)
        assert np.abs(got - (base + sum(ds))).max() < 4e-6   # inputs are f32: each delta is off by 2^-23 here and there


def test_the_spectrum_of_iso_c_is_flat():
    base, models = task_vectors((30, 19))
    got = obm.merge_tensors("iso_c", models, np.zeros_like(base))
    s = np.linalg.svd(got.astype(np.float64))[1]
    total = np.linalg.svd(sum(m.astype(np.float64) for m in models))[1]
    assert np.allclose(s, total.mean(), rtol=1e-6)


def test_low_rank_sums_get_no_directions_of_their_own():
    """A sum of rank 2 stays one: papers spread their value over arbitrary vectors there."""
    rng = np.random.default_rng(5)
    models = [rng.normal(size=(20, 1)) @ rng.normal(size=(1, 12)) for _ in range(2)]
    s = np.linalg.svd(obm.merge_tensors("iso_c", models, np.zeros((20, 12))).astype(np.float64))[1]
    values = np.linalg.svd(sum(models))[1]
    assert np.allclose(s[:2], values[:2].sum() / 12, rtol=1e-5) and s[2] < 1e-5 * s[0]


def test_twin_at_full_rank_is_the_model_asked_for():
    base, models = task_vectors((13, 22))
    got = obm.merge_tensors("twin", models, base, {"weight": [0, 1, 0], "density": 1, "lambda": .3})
    assert np.abs(got - models[1]).max() < TOLERANCE
    shared = obm.merge_tensors("twin", models, base, {"weight": 0, "lambda": .3})
    want = obm.merge_tensors("task_arithmetic", models, base, {"weight": 1, "lambda": .3})
    assert np.abs(shared - want).max() < TOLERANCE


@pytest.mark.parametrize("shape", [(30, 17), (41,)])
def test_sce_that_selects_and_erases_nothing_is_varm(shape):
    """All task vectors have the same sign at each element, so that none is in the minority."""
    rng = np.random.default_rng(11)
    base, sign = rng.normal(size=shape).astype(np.float32), np.sign(rng.normal(size=shape))
    models = [(base + (.1 + t) * sign * np.abs(rng.normal(size=shape))).astype(np.float32) for t in range(3)]
    varm = obm.merge_tensors("varm", models, base)
    assert np.abs(obm.merge_tensors("sce", models, base, {"select_topk": 1}) - varm).max() < TOLERANCE * 2
    models[1] = 2 * base - models[1]   # in the minority where the largest of the three is not
    assert np.abs(obm.merge_tensors("sce", models, base, {"select_topk": 1}) - obm.merge_tensors("varm", models, base)).max() > .1


@pytest.mark.parametrize("shape", [(21, 9), (9, 21)])
def test_sub_moe_without_truncation_is_the_weighted_mean(shape):
    """[W_1 ... W_n] = U S [V_1 ... V_n]; U S (sum f_t V_t) / sum f_t (Sub-MoE, section 3.3) is what linear gives."""
    _, models = task_vectors(shape)
    f = np.array([.7, .2, .4])
    u, s, vt = svd(np.hstack([m.astype(np.float64) for m in models]))
    want = (u * s) @ sum(x * v for x, v in zip(f, np.split(vt, 3, axis=1))) / f.sum()
    assert np.abs(obm.merge_tensors("linear", models, None, {"weight": list(f)}) - want).max() < TOLERANCE


# Every method of several models but these: opcm takes them in order, and random masks are drawn for a place in the list.
IN_ORDER = {"opcm", "dare_linear", "dare_ties", "della", "della_linear"}
SYMMETRIC = [m for m in obm.methods() if m["max_models"] != 1 and m["name"] not in IN_ORDER]


@pytest.mark.parametrize("shape", [(18, 25), (25, 18), (33,)])
@pytest.mark.parametrize("method", SYMMETRIC, ids=lambda m: m["name"])
def test_the_order_of_the_models_does_not_matter(method, shape):
    """What is the model's own (weights, densities) moves with it."""
    n = method["max_models"] or 3
    base, models = task_vectors(shape, n)
    own = [p["name"] for p in method["params"] if p["scope"] == "model"]
    values = {name: (.3 + .2 * np.arange(n)).tolist() for name in own}
    start = base if method["needs_base"] else None
    want = obm.merge_tensors(method["name"], models, start, values)
    assert np.abs(want - base).max() > .01
    for order in ([1, 2, 0], [2, 1, 0]) if n == 3 else ([1, 0],):
        got = obm.merge_tensors(method["name"], [models[i] for i in order], start, {k: [v[i] for i in order] for k, v in values.items()})
        assert np.abs(got - want).max() < TOLERANCE


def test_a_rank_of_nothing_keeps_the_start():
    base, models = task_vectors((8, 6))
    d = [m.astype(np.float64) - base for m in models]
    assert np.abs(obm.merge_tensors("wudi", models, base, {"rank": 0}) - (base + sum(d))).max() < TOLERANCE
    assert np.abs(obm.merge_tensors("optmerge", models, base, {"rank": 0}) - (base + sum(d) / 3)).max() < TOLERANCE


# ---- errors ----

@pytest.mark.parametrize("method", ["wudi", "optmerge", "tsvm", "iso_c", "iso_cts", "opcm", "twin"])
def test_what_is_not_finite_is_named(folders, tmp_path, method):
    bad = plain.load(folders / "a")
    bad["model.layers.0.mlp.up_proj.weight"][2, 3] = np.inf
    plain.write_folder(tmp_path / "bad", bad, config={"model_type": "llama", "tie_word_embeddings": True})
    with pytest.raises(obm.Error, match=r"model\.layers\.0\.mlp\.up_proj\.weight: NaN or Inf in .*bad at index 21"):
        merged(folders, tmp_path / "out", method, ["b", tmp_path / "bad"])
    assert not (tmp_path / "out").exists()


def test_memory_and_progress(folders, tmp_path):
    with pytest.raises(obm.Error, match="memory: this merge needs at least"):
        merged(folders, tmp_path / "a", "tsvm", options={"memory": 100000})
    with pytest.raises(ZeroDivisionError):
        merged(folders, tmp_path / "b", "iso_cts", options={"progress": lambda *_: 1 / 0})
    assert not list(tmp_path.iterdir())
