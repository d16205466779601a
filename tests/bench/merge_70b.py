"""A merge of 70B-shaped checkpoints out of sparse files: planned, then run for its first gigabytes of input, within the memory option.

    python tests/bench/merge_70b.py [--input-gb 20] [--memory 2e9] [--folder /tmp]

Each of the four inputs (base and three experts, 141 GB of bf16) takes no room on the disk; the output does, a quarter of
the input.  Prints the plan, and the peak of anonymous memory (RssAnon) and of all resident memory while it runs; exits
with 1 if anonymous memory passes the option.  By hand only: it needs the room for the output and some minutes.
"""
import argparse
import json
import os
import pathlib
import sys
import tempfile
import threading
import time

VOCAB, HIDDEN, WIDE, LAYERS, KV = 128256, 8192, 28672, 80, 1024
SHARD_LAYERS = 5


def shards():
    """Names and shapes, by file."""
    yield {"model.embed_tokens.weight": [VOCAB, HIDDEN]}
    for first in range(0, LAYERS, SHARD_LAYERS):
        shard = {}
        for i in range(first, first + SHARD_LAYERS):
            shapes = {"self_attn.q_proj": [HIDDEN, HIDDEN], "self_attn.k_proj": [KV, HIDDEN], "self_attn.v_proj": [KV, HIDDEN],
                      "self_attn.o_proj": [HIDDEN, HIDDEN], "mlp.gate_proj": [WIDE, HIDDEN], "mlp.up_proj": [WIDE, HIDDEN],
                      "mlp.down_proj": [HIDDEN, WIDE], "input_layernorm": [HIDDEN], "post_attention_layernorm": [HIDDEN]}
            shard |= {f"model.layers.{i}.{name}.weight": shape for name, shape in shapes.items()}
        yield shard
    yield {"model.norm.weight": [HIDDEN], "lm_head.weight": [VOCAB, HIDDEN]}


def write_sparse(path):
    """Holes read as zeros; returns bytes of all tensors."""
    path.mkdir()
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": VOCAB, "hidden_size": HIDDEN,
              "intermediate_size": WIDE, "num_hidden_layers": LAYERS, "num_attention_heads": 64, "num_key_value_heads": 8,
              "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": False,
              "torch_dtype": "bfloat16"}
    (path / "config.json").write_text(json.dumps(config))
    weight_map, total, files = {}, 0, list(shards())
    for i, shard in enumerate(files):
        name, header, at = f"model-{i + 1:05}-of-{len(files):05}.safetensors", {}, 0
        for tensor, shape in shard.items():
            size = 2
            for n in shape:
                size *= n
            header[tensor] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
            at += size
            weight_map[tensor] = name
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(path / name, "wb") as f:
            f.write(len(text).to_bytes(8, "little") + text)
            f.truncate(8 + len(text) + at)
        total += at
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
    return total


def status(field):
    for line in open("/proc/self/status"):
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    return 0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input-gb", type=float, default=20)
    parser.add_argument("--memory", type=float, default=2e9)
    parser.add_argument("--folder", default=None)
    options = parser.parse_args()
    import onebitmerge as obm
    with tempfile.TemporaryDirectory(prefix="obm-70b-", dir=options.folder) as temporary:
        folder = pathlib.Path(temporary)
        total = sum(write_sparse(folder / name) for name in ("base", "e0", "e1", "e2"))
        recipe = {"merge_method": "ties", "base_model": str(folder / "base"), "dtype": "bfloat16",
                  "models": [{"model": str(folder / f"e{i}"), "parameters": {"weight": 0.5, "density": 0.2}} for i in range(3)]}
        memory = int(options.memory)
        begin = time.perf_counter()
        plan = obm.merge(recipe, folder / "out", memory=memory, dry_run=True)
        print(f"inputs {total / 1e9:.0f} GB; planned in {time.perf_counter() - begin:.2f} s: {plan}", flush=True)
        before, peaks, done = status("RssAnon"), {"RssAnon": 0, "VmRSS": 0}, threading.Event()

        def watch():
            while not done.wait(0.02):
                for field in peaks:
                    peaks[field] = max(peaks[field], status(field))

        read = [0.0]

        def stop(what, finished, of):
            read[0] = finished * 4 / 1e9   # as many bytes of each input as of the output
            if read[0] >= options.input_gb:
                raise KeyboardInterrupt

        thread = threading.Thread(target=watch)
        thread.start()
        begin = time.perf_counter()
        try:
            obm.merge(recipe, folder / "out", memory=memory, progress=stop)
        except KeyboardInterrupt:
            pass
        took = time.perf_counter() - begin
        done.set()
        thread.join()
        anonymous = peaks["RssAnon"] - before
        print(f"{read[0]:.1f} GB of input in {took:.0f} s ({read[0] / took:.2f} GB/s of input); memory option {memory / 1e6:.0f} MB; "
              f"peak anonymous {anonymous / 1e6:.0f} MB, peak resident with mapped pages {peaks['VmRSS'] / 1e6:.0f} MB; "
              f"left in the output folder: {sorted(os.listdir(folder / 'out')) if (folder / 'out').exists() else 'nothing'}")
        return int(anonymous > memory)


if __name__ == "__main__":
    sys.exit(main())
