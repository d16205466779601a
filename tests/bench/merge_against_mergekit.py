"""Whole merges by mergekit 0.1.5 and by onebitmerge, in turn, on the same recipes and the same three random models.

    python tests/bench/merge_against_mergekit.py [--mergekit .../bin/mergekit-yaml] [--size 0.1b] [--rounds 1]

Wall clock of the whole command (start-up included), its processor time, peak anonymous memory of its process, and ratios.
Inputs are in the page cache, except in the last column, for which they are dropped from it.  Ours syncs what it wrote to
the disk, mergekit does not: "no sync" is ours with a library in front that makes the syncs do nothing.  Not a test: it
prints numbers and judges nothing.  It needs mergekit==0.1.5, torch and safetensors somewhere, a C compiler, and onebitmerge
importable (--ours names another command).
"""
import argparse
import json
import os
import pathlib
import shlex
import shutil
import subprocess
import sys
import tempfile
import time

SHAPES = {"0.1b": (32000, 768, 2048, 12), "0.35b": (32000, 1024, 2816, 24)}
RECIPES = {
    "linear": ("linear", {"weight": 1.0}, {}),
    "task_arithmetic": ("task_arithmetic", {"weight": 0.5}, {}),
    "ties": ("ties", {"weight": 0.5, "density": 0.2}, {}),
    "ties (paper)": ("ties", {"weight": 0.5, "density": 0.2}, {"profile": "paper"}),
    "dare_ties": ("dare_ties", {"weight": 0.5, "density": 0.2}, {}),
    "della": ("della", {"weight": 0.5, "density": 0.2, "epsilon": 0.1}, {}),
}


def tensors(size):
    vocab, hidden, wide, layers = SHAPES[size]
    yield "model.embed_tokens.weight", (vocab, hidden)
    yield "model.norm.weight", (hidden,)
    for layer in range(layers):
        shapes = {f"self_attn.{m}_proj": (hidden, hidden) for m in "qkvo"}
        shapes |= {"mlp.gate_proj": (wide, hidden), "mlp.up_proj": (wide, hidden), "mlp.down_proj": (hidden, wide)}
        shapes |= {"input_layernorm": (hidden,), "post_attention_layernorm": (hidden,)}
        for name, shape in shapes.items():
            yield f"model.layers.{layer}.{name}.weight", shape


def write_models(folder, size):
    """base, e0, e1, e2; returns parameters of one."""
    import torch
    from safetensors.torch import save_file
    vocab, hidden, wide, layers = SHAPES[size]
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": vocab, "hidden_size": hidden,
              "intermediate_size": wide, "num_hidden_layers": layers, "num_attention_heads": hidden // 64,
              "num_key_value_heads": hidden // 64, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5,
              "hidden_act": "silu", "tie_word_embeddings": True, "torch_dtype": "bfloat16"}
    torch.manual_seed(1)
    base = {name: torch.randn(shape) * 0.02 for name, shape in tensors(size)}
    for model in ("base", "e0", "e1", "e2"):
        path = folder / model
        path.mkdir()
        (path / "config.json").write_text(json.dumps(config))
        moved = {k: (v if model == "base" else v + torch.randn(v.shape) * 0.002).to(torch.bfloat16) for k, v in base.items()}
        save_file(moved, path / "model.safetensors", metadata={"format": "pt"})
    return sum(v.numel() for v in base.values())


def write_recipe(folder, name):
    method, parameters, ours = RECIPES[name]
    recipe = {"merge_method": method, "dtype": "bfloat16",
              "models": [{"model": str(folder / f"e{i}"), "parameters": parameters} for i in range(3)]}
    if method != "linear":
        recipe["base_model"] = str(folder / "base")
    path, own = folder / "recipe.yml", folder / "own.yml"
    path.write_text(json.dumps(recipe))   # JSON is YAML
    own.write_text(json.dumps(recipe | ours))
    return path, own


def anonymous(pid):
    try:
        for line in open(f"/proc/{pid}/status"):
            if line.startswith("RssAnon"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def build_no_sync(folder):
    """A library to preload: what syncs to the disk returns at once."""
    source, library = folder / "no_sync.c", folder / "no_sync.so"
    source.write_text("int fsync(int f) { return f < 0; } int fdatasync(int f) { return f < 0; }\n"
                      "int sync_file_range(int f, long o, long n, unsigned g) { return f < 0 && o && n && g; }\n")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)
    return library


def drop(folder):
    """Takes the models out of the page cache."""
    for path in folder.glob("*/*.safetensors"):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def warm(folder):
    for path in folder.glob("*/*.safetensors"):
        path.read_bytes()


def run(command, out, preload=None):
    """Wall seconds, processor seconds and peak anonymous bytes of one command; its output folder is removed."""
    environment = os.environ | ({"LD_PRELOAD": str(preload)} if preload else {})
    before, begin, peak = os.times(), time.perf_counter(), 0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment)
    while process.poll() is None:
        peak = max(peak, anonymous(process.pid))
        time.sleep(0.002)
    took, after = time.perf_counter() - begin, os.times()
    if process.returncode:
        sys.exit(f"{command[0]} failed:\n{process.stderr.read().decode()[-2000:]}")
    shutil.rmtree(out)
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return took, used, peak


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mergekit", default="mergekit-yaml")
    parser.add_argument("--ours", default=f"{shlex.quote(sys.executable)} -m onebitmerge merge",
                        help="command that takes a recipe and -o FOLDER")
    parser.add_argument("--size", choices=SHAPES, default="0.1b")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--only", choices=RECIPES, action="append")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="obm-bench-") as temporary:
        folder = pathlib.Path(temporary)
        count = write_models(folder, options.size)
        print(f"{count / 1e6:.0f} million parameters, 3 experts, bf16; {options.rounds} rounds, load {os.getloadavg()[0]:.1f}",
              flush=True)
        no_sync = build_no_sync(folder)
        for name in options.only or RECIPES:
            theirs, own = write_recipe(folder, name)
            out = folder / "out"
            command = [*shlex.split(options.ours), str(own), "-o", str(out)]
            rows = []
            for _ in range(options.rounds):
                peer = run([options.mergekit, str(theirs), str(out)], out)
                warm(folder)
                rows.append((peer, run(command, out), run(command, out, no_sync)))
            a, b, c = (min(row[side] for row in rows) for side in (0, 1, 2))
            drop(folder)
            cold = run(command, out)
            warm(folder)
            print(f"{name:16} mergekit {a[0]:7.2f} s ({a[0] / count * 1e9:6.1f} ns a parameter), {a[1]:6.1f} s of processor, "
                  f"{a[2] / 1e6:5.0f} MB; ours {b[0]:6.2f} s ({b[0] / count * 1e9:5.1f} ns), {b[1]:5.2f} s, {b[2] / 1e6:4.0f} MB; "
                  f"{a[0] / b[0]:6.1f} times faster, no sync {c[0]:5.2f} s: {a[0] / c[0]:6.1f} times; "
                  f"{a[1] / b[1]:6.1f} times less processor, {a[2] / max(b[2], 1):5.1f} times less memory; "
                  f"cold {cold[0]:5.2f} s", flush=True)


if __name__ == "__main__":
    main()
