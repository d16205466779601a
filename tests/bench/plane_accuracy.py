"""How exact running on sign planes is, on the example family: prints the tables of kernels/README.md and README.md.

    python3 tests/bench/plane_accuracy.py [PROMPTS_PER_TASK]

First: activations in fixed point (two limbs of 7 bits, as kernels do it, and what a third would give), at the inputs of the
four kinds of linear layers, by a NumPy forward pass of the same route.  Then: logits on planes against the dense model of the
same route in f32 and in bf16.
"""

import contextlib
import json
import pathlib
import platform
import sys
import tempfile

import numpy as np

import onebitmerge as obm

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples"))
import train_experts  # noqa: E402  (the generators of prompts)

MODELS = ROOT / "examples" / "models"
TASKS = ("chat", "math", "code")
ROUTES = (*TASKS, "chat=.7,math=.3")
TILE = 2048
LIMBS = {2: 2**12 - 1, 3: 2**19 - 1}   # largest integer: the sum of four fills 14 and 21 bits
KINDS = {"attention in": "self_attn.q_proj", "o in": "self_attn.o_proj", "mlp in": "mlp.up_proj", "down in": "mlp.down_proj"}


def fixed_point(x, steps):
    """Each tile of 2048 columns as integers times one scale."""
    out = np.empty_like(x, dtype=np.float64)
    for begin in range(0, x.shape[1], TILE):
        tile = x[:, begin:begin + TILE].astype(np.float64)
        scale = np.maximum(np.abs(tile).max(axis=1, keepdims=True), 1e-300) / steps
        out[:, begin:begin + TILE] = np.rint(tile / scale) * scale
    return out


def norm(x, weight, eps):
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * weight


def rotate(x, cosine, sine):
    half = x.shape[-1] // 2
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * cosine - b * sine, b * cosine + a * sine], axis=-1)


class Forward:
    """LLaMA's forward pass in f64; keeps what goes into the linear layers."""

    def __init__(self, pack, route):
        self.config = pack.base.config
        self.w = {name: pack.materialise(route, name).astype(np.float64) for name in pack.base}
        self.inputs = {kind: [] for kind in KINDS}

    def attend(self, x, layer):
        c, t = self.config, len(x)
        heads, kv = c["num_attention_heads"], c["num_key_value_heads"]
        dim = c.get("head_dim") or c["hidden_size"] // heads
        q, k, v = (x @ self.w[f"{layer}.self_attn.{n}_proj.weight"].T for n in "qkv")
        angle = np.arange(t)[:, None] * float(c.get("rope_theta", 10000.0)) ** (-np.arange(0, dim, 2) / dim)
        cosine, sine = np.cos(angle)[:, None], np.sin(angle)[:, None]
        q, k = (rotate(z.reshape(t, -1, dim), cosine, sine) for z in (q, k))
        k, v = (np.repeat(z.reshape(t, kv, dim), heads // kv, axis=1) for z in (k, v))
        scores = np.einsum("ihd,jhd->hij", q, k) / np.sqrt(dim) + np.triu(np.full((t, t), -np.inf), 1)
        p = np.exp(scores - scores.max(axis=-1, keepdims=True))
        return np.einsum("hij,jhd->ihd", p / p.sum(axis=-1, keepdims=True), v).reshape(t, -1)

    def logits(self, ids):
        eps = self.config["rms_norm_eps"]
        x = self.w["model.embed_tokens.weight"][ids]
        for i in range(self.config["num_hidden_layers"]):
            layer = f"model.layers.{i}"
            h = norm(x, self.w[f"{layer}.input_layernorm.weight"], eps)
            mixed = self.attend(h, layer)
            x = x + mixed @ self.w[f"{layer}.self_attn.o_proj.weight"].T
            g = norm(x, self.w[f"{layer}.post_attention_layernorm.weight"], eps)
            gate, up = (g @ self.w[f"{layer}.mlp.{n}_proj.weight"].T for n in ("gate", "up"))
            down = gate / (1 + np.exp(-gate)) * up
            x = x + down @ self.w[f"{layer}.mlp.down_proj.weight"].T
            for kind, value in zip(KINDS, (h, mixed, g, down)):
                self.inputs[kind].append((layer, value))
        head = self.w.get("lm_head.weight", self.w["model.embed_tokens.weight"])
        return norm(x, self.w["model.norm.weight"], eps) @ head.T


def delta_of(pack, task, name):
    """alpha * sign of one expert, f64."""
    t = next(t for t in pack.tensors(task) if t["name"] == name)
    signs, alpha = t["planes"][0]
    bits = np.unpackbits(np.asarray(signs), axis=1, bitorder="little")[:, :t["cols"]]
    return (2.0 * bits - 1) * np.asarray(alpha, dtype=np.float64)[:, None]


def fixed_point_table(pack, texts):
    """Relative to the rms of the delta's product with the vector, and of the whole layer's."""
    rows = {kind: {"peak": [], **{limbs: ([], []) for limbs in LIMBS}} for kind in KINDS}
    for task in TASKS:
        forward = Forward(pack, task)
        for ids in texts[task]:
            forward.logits(ids)
        for kind, matrix in KINDS.items():
            for layer, x in forward.inputs[kind]:
                delta, whole = delta_of(pack, task, f"{layer}.{matrix}.weight"), forward.w[f"{layer}.{matrix}.weight"]
                exact = x @ delta.T
                size, all_of_it = (np.sqrt((y * y).mean(axis=1, keepdims=True)) for y in (exact, x @ whole.T))
                rows[kind]["peak"].append(np.abs(x).max(axis=1) / np.sqrt((x * x).mean(axis=1)))
                for limbs, steps in LIMBS.items():
                    error = np.abs(fixed_point(x, steps) @ delta.T - exact)
                    rows[kind][limbs][0].append((error / size).ravel())
                    rows[kind][limbs][1].append((error / all_of_it).ravel())
    print("| input of | max abs x / rms, mean and max | 2 limbs: error / rms of the plane's product, mean and max "
          "| / rms of the layer's output, max | 3 limbs, max of the two |\n|---|---|---|---|---|")
    for kind, r in rows.items():
        peak, (e2, w2), (e3, w3) = np.concatenate(r["peak"]), *[map(np.concatenate, r[limbs]) for limbs in LIMBS]
        print(f"| {kind} | {peak.mean():.1f}, {peak.max():.1f} | {e2.mean():.1e}, {e2.max():.1e} | {w2.max():.1e} | {e3.max():.1e}, {w3.max():.1e} |")


def log_softmax(x):
    x = x.astype(np.float64) - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def logits_table(pack, texts, scratch):
    model = obm.Model(pack)
    print("\n| route | against | max abs difference of logits | mean KL divergence, nats | greedy token equal |\n|---|---|---|---|---|")
    for number, route in enumerate(ROUTES):
        prompts = texts[route] if route in texts else [ids for t in TASKS for ids in texts[t]]
        ours = [model.logits(ids, route=route, decode=True) for ids in prompts]
        for dtype in ("f32", "bf16"):
            pack.export(route, scratch / f"{number}-{dtype}", dtype=dtype)
            dense = obm.Model(scratch / f"{number}-{dtype}")
            worst, kl, equal, n = 0.0, 0.0, 0, 0
            for ids, a in zip(prompts, ours):
                b = dense.logits(ids, decode=True)
                p, q = log_softmax(b), log_softmax(a)
                worst = max(worst, float(np.abs(a - b).max()))
                kl += float((np.exp(p) * (p - q)).sum())
                equal += int((a.argmax(axis=1) == b.argmax(axis=1)).sum())
                n += len(ids)
            print(f"| {route} | dense {dtype} | {worst:.1e} | {kl / n:.1e} | {equal} of {n} |", flush=True)


def main():
    per_task = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    info = obm.info()
    print(f"{platform.processor() or platform.machine()}, {info['isa']}, {info['threads']} threads, {info['blas']}, {per_task} prompts per task\n")
    with tempfile.TemporaryDirectory(prefix="onebitmerge-") as folder:
        scratch = pathlib.Path(folder)
        with contextlib.redirect_stdout(sys.stderr):
            train_experts.main(["data", "--out", str(scratch / "data"), "--test", str(per_task), "--valid", "4"])
        pack = obm.compress(MODELS / "base", {t: MODELS / t for t in TASKS}, scratch / "family.pack")
        model = obm.Model(pack)
        texts = {}
        for task in TASKS:   # the prompt and what the expert answers, as one text of ids
            items = [json.loads(line) for line in (scratch / "data" / f"test_{task}.jsonl").read_text(encoding="utf-8").splitlines()]
            prompts = [model.tokenizer.encode(model.tokenizer.apply_template(item["messages"])) for item in items]
            texts[task] = [ids + c.ids for ids, c in zip(prompts, model.generate(prompts, route=task, max_tokens=24))]
        ids = texts["math"][0]
        reference, ours = Forward(pack, "math").logits(ids), model.logits(ids, route="math")
        assert np.abs(reference - ours).max() < 1e-3 * np.abs(reference).max(), "the forward pass here is not the model's"
        fixed_point_table(pack, texts)
        logits_table(pack, texts, scratch)


if __name__ == "__main__":
    main()
