"""Decoding, prefill and start of onebitmerge and llama.cpp in turn, on the same random bf16 weights.

    python tests/bench/against_llama_cpp.py [--peer llama=PYTHON] [--peer torch=PYTHON] [--sizes 135m 360m 1.1b] [--rounds 5]
                                            [--planes] [--tasks 4 8] [--f32]

PYTHON is an interpreter that has llama-cpp-python (built from source on this machine: pip install --no-binary llama-cpp-python
llama-cpp-python) or torch and transformers; without a --peer this interpreter is taken for llama.  This one needs numpy, gguf and
onebitmerge.  Each side is a process of its own that waits while the others work.  Logits are compared first: a figure of another
model is worth nothing.  Not a test: it prints numbers and judges nothing.

decode   one sequence, greedy, after a prompt of 8 tokens; llama.cpp's loop has no sampling
batch 8  eight such sequences in one batch, tokens of all of them
prefill  512 tokens, logits of the last; bf16 is prefill="bf16", where the CPU gains by it
start    from the start of the process to the first token after 8, the file in the page cache
planes   --planes: decode with three experts in 1 bit at lambda 0.3 on planes, on plain bf16 and on 12 bits per weight, against
         the model alone and llama.cpp running one materialised model
tasks    --tasks K...: K requests of K experts in one batch on planes at lambda 0, against K llama.cpp processes at the same time, each
         with a model of its own and an equal share of the threads; tokens of all of them
"""
import argparse
import json
import math
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

# vocabulary, hidden, intermediate, layers, heads, KV heads: SmolLM2-135M, SmolLM2-360M and TinyLlama-1.1B
SIZES = {"tiny": (512, 128, 256, 2, 4, 2), "135m": (49152, 576, 1536, 30, 9, 3), "360m": (49152, 960, 2560, 32, 15, 5),
         "1.1b": (32000, 2048, 5632, 22, 32, 4)}
PROMPT, PREFILL, BATCH, CONTEXT = 8, 512, 8, 1024
GGUF = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down"}


# ---- the model, twice ----


def tensors(size):
    """Name in Hugging Face's folder, name in GGUF, shape."""
    vocab, hidden, wide, layers, heads, kv_heads = SIZES[size]
    kv = hidden // heads * kv_heads
    yield "model.embed_tokens.weight", "token_embd.weight", (vocab, hidden)
    yield "model.norm.weight", "output_norm.weight", (hidden,)
    shapes = {"self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden),
              "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (wide, hidden), "mlp.up_proj": (wide, hidden),
              "mlp.down_proj": (hidden, wide), "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,)}
    for layer in range(layers):
        for name, shape in shapes.items():
            yield f"model.layers.{layer}.{name}.weight", f"blk.{layer}.{GGUF[name]}.weight", shape


def random_bits(random, shape):
    """bf16 as uint16: norms near 1, matrices of a deviation that keeps activations in range."""
    import numpy as np
    scale = 0.1 if len(shape) == 1 else 0.7 / math.sqrt(shape[-1])
    values = random.standard_normal(shape, dtype=np.float32) * np.float32(scale) + np.float32(len(shape) == 1)
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def pairs_beside(bits, heads):
    """GGUF has the two rows that RoPE turns together side by side, Hugging Face half a head apart."""
    rows, columns = bits.shape
    return bits.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def widened(bits):
    import numpy as np
    return (bits.astype(np.uint32) << 16).view(np.float32)


def write_model(folder, size, f32=False):
    """folder/model.gguf and folder/config.json with model.safetensors; returns the bytes of the weights.  f32: the same values so."""
    import gguf
    import numpy as np
    vocab, hidden, wide, layers, heads, kv_heads = SIZES[size]
    random, entries, at = np.random.default_rng(1), {}, 0
    writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
    writer.add_vocab_size(vocab)
    writer.add_context_length(2048)
    writer.add_embedding_length(hidden)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(wide)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32 if f32 else gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_tokenizer_model("no_vocab")
    for name, _, shape in tensors(size):
        n = (4 if f32 else 2) * math.prod(shape)
        entries[name] = {"dtype": "F32" if f32 else "BF16", "shape": shape, "data_offsets": (at, at + n)}
        at += n
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for name, other, shape in tensors(size):
            bits = random_bits(random, shape)
            file.write((widened(bits) if f32 else bits).tobytes())
            if len(shape) == 1:   # llama.cpp wants norms in f32: the same values
                writer.add_tensor(other, widened(bits))
                continue
            turned = {"attn_q": heads, "attn_k": kv_heads}.get(other.split(".")[-2])
            bits = pairs_beside(bits, turned) if turned else bits
            if f32:
                writer.add_tensor(other, widened(bits))
                continue
            writer.add_tensor(other, np.ascontiguousarray(bits).view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (folder / "config.json").write_text(json.dumps({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": vocab, "hidden_size": hidden, "intermediate_size": wide,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads, "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": True, "torch_dtype": "float32" if f32 else "bfloat16"}))
    return at


def write_expert(base, folder, size, seed):
    """The base with other low bits of the mantissa in the layers' matrices: as many up as down."""
    import numpy as np
    random = np.random.default_rng(seed)
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns("*.gguf", "*.pack"))
    with open(folder / "model.safetensors", "r+b") as file:
        at = 8 + int.from_bytes(file.read(8), "little")
        for name, _, shape in tensors(size):
            n = math.prod(shape)
            if len(shape) == 2 and ".layers." in name:
                file.seek(at)
                bits = np.frombuffer(file.read(2 * n), np.uint16) ^ (np.frombuffer(random.bytes(n), np.uint8) & 7)
                file.seek(at)
                file.write(bits.astype(np.uint16).tobytes())
            at += 2 * n


def write_pack(folder, size, n, weight):
    """folder/N.pack: n experts, 1 bit in every layer, lambda = weight."""
    import onebitmerge as obm
    path, expert = folder / f"{n}.pack", folder / "expert"
    for task in range(n):
        write_expert(folder, expert, size, 2 + task)
        if task:
            pack.add(f"task{task}", expert)
        else:
            pack = obm.compress(folder, {"task0": expert}, out=path)
        shutil.rmtree(expert)
    pack.set(lambda_=weight)


def ids_of(vocab, n, seed=1):
    return [(seed * 7919 + i * 104729) % vocab for i in range(n)]


# ---- the sides: each has logits(ids), decode(steps, batch) in seconds, prefill(n) in seconds ----


class Ours:
    def __init__(self, folder, threads, pack=None, **options):
        import onebitmerge as obm
        obm.set_threads(threads)
        self.model = obm.Model(pathlib.Path(folder) / pack if pack else folder, kv="f16", **{"z12": False, **options})
        self.tasks = obm.Pack(pathlib.Path(folder) / pack).tasks if pack else []
        self.vocab = json.loads((pathlib.Path(folder) / "config.json").read_text())["vocab_size"]
        self.name = f"onebitmerge {obm.__version__} {obm.info()['isa']}"

    def logits(self, ids):
        return self.model.logits(ids, all=False).reshape(-1)

    def seconds(self, n, batch, tokens):
        prompts = [{"ids": ids_of(self.vocab, n, 1 + i)} for i in range(batch)]
        routes = {"route": [self.tasks[i % len(self.tasks)] for i in range(batch)]} if self.tasks else {}
        begin = time.perf_counter()
        self.model.generate(prompts, max_tokens=tokens, ignore_eos=True, batch=batch, **routes)
        return time.perf_counter() - begin

    def decode(self, steps, batch):
        return self.seconds(PROMPT, batch, steps + 1) - self.seconds(PROMPT, batch, 1)

    def prefill(self, n):
        return self.seconds(n, 1, 1)


class Llama:
    def __init__(self, folder, threads):
        import llama_cpp as c
        self.c = c
        c.llama_backend_init()
        params = c.llama_model_default_params()
        self.model = c.llama_model_load_from_file(str(pathlib.Path(folder) / "model.gguf").encode(), params)
        options = c.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch, options.n_seq_max = CONTEXT, PREFILL, PREFILL, BATCH
        options.n_threads = options.n_threads_batch = threads
        options.kv_unified = True   # or each sequence has an eighth of the context
        self.context = c.llama_init_from_model(self.model, options)
        self.batch = c.llama_batch_init(PREFILL, 0, 1)
        self.vocab = c.llama_vocab_n_tokens(c.llama_model_get_vocab(self.model))
        self.name = f"llama-cpp-python {c.__version__}, {c.llama_print_system_info().decode().strip(' |')}"

    def feed(self, rows):
        """rows: (id, position, sequence, wants logits)."""
        b = self.batch
        b.n_tokens = len(rows)
        for i, (token, position, sequence, wants) in enumerate(rows):
            b.token[i], b.pos[i], b.n_seq_id[i], b.logits[i] = token, position, 1, wants
            b.seq_id[i][0] = sequence
        if self.c.llama_decode(self.context, b):
            sys.exit("llama_decode failed")

    def forget(self):
        self.c.llama_memory_clear(self.c.llama_get_memory(self.context), True)

    def last(self, ids, sequence=0):
        self.feed([(token, i, sequence, i + 1 == len(ids)) for i, token in enumerate(ids)])

    def logits(self, ids):
        import numpy as np
        self.forget()
        self.last(ids)
        return np.ctypeslib.as_array(self.c.llama_get_logits_ith(self.context, -1), (self.vocab,)).copy()

    def decode(self, steps, batch):
        self.forget()
        for i in range(batch):
            self.last(ids_of(self.vocab, PROMPT, 1 + i), i)
        begin = time.perf_counter()
        for step in range(steps):
            self.feed([(ids_of(self.vocab, 1, step + i)[0], PROMPT + step, i, True) for i in range(batch)])
            self.c.llama_get_logits_ith(self.context, -1)   # waits for the work to be done
        return time.perf_counter() - begin

    def prefill(self, n):
        self.forget()
        begin = time.perf_counter()
        self.last(ids_of(self.vocab, n))
        self.c.llama_get_logits_ith(self.context, -1)
        return time.perf_counter() - begin


class Torch:
    def __init__(self, folder, threads):
        import torch
        import transformers
        torch.set_num_threads(threads)
        transformers.utils.logging.disable_progress_bar()
        self.torch = torch
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="eager").eval()
        self.vocab = self.model.config.vocab_size
        self.name = f"transformers {transformers.__version__} eager, torch {torch.__version__}"

    def step(self, ids, cache=None):
        with self.torch.inference_mode():
            return self.model(self.torch.tensor(ids), past_key_values=cache, use_cache=True, logits_to_keep=1)

    def logits(self, ids):
        return self.step([ids]).logits[0, -1].float().numpy()

    def decode(self, steps, batch):
        cache = self.step([ids_of(self.vocab, PROMPT, 1 + i) for i in range(batch)]).past_key_values
        begin = time.perf_counter()
        for step in range(steps):
            cache = self.step([ids_of(self.vocab, 1, step + i) for i in range(batch)], cache).past_key_values
        return time.perf_counter() - begin

    def prefill(self, n):
        begin = time.perf_counter()
        self.step([ids_of(self.vocab, n)])
        return time.perf_counter() - begin


SIDES = {"ours": {}, "z12": {"z12": True}, "bf16": {"prefill": "bf16"}, "planes": {"pack": "3.pack"},
         "planes, z12": {"pack": "3.pack", "z12": True}}


def serve(what, folder, threads):
    """Answers a request a line, as JSON, on what was standard output; libraries may write to what is now."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    if what.endswith(" tasks"):
        side = Ours(folder, threads, pack=f"{what.split()[0]}.pack")
    else:
        side = {"llama": Llama, "torch": Torch}[what](folder, threads) if what not in SIDES else Ours(folder, threads, **SIDES[what])
    first = side.logits(ids_of(side.vocab, PROMPT))
    print(json.dumps(side.name), file=out)
    for line in sys.stdin:
        verb, *arguments = json.loads(line)
        print(json.dumps(first.tolist() if verb == "logits" else getattr(side, verb)(*arguments)), file=out)


class Peer:
    def __init__(self, what, python, folder, threads):
        begin = time.perf_counter()
        self.log = tempfile.TemporaryFile()
        env = {k: v for k, v in os.environ.items() if k not in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")}
        self.process = subprocess.Popen([python, __file__, "--serve", what, str(folder), str(threads)], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, stderr=self.log, text=True, env=env)
        self.what, self.name = what, self.answer()
        self.start = time.perf_counter() - begin

    def answer(self):
        line = self.process.stdout.readline()
        if not line:
            self.log.seek(0)
            sys.exit(f"{self.what} failed:\n{self.log.read().decode(errors='replace')[-2000:]}")
        return json.loads(line)

    def tell(self, *request):
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()

    def ask(self, *request):
        self.tell(*request)
        return self.answer()

    def end(self):
        self.process.stdin.close()
        self.process.wait()
        self.log.close()


# ---- the comparison ----


def compare_logits(peers):
    import numpy as np
    own = np.array(peers[0].ask("logits"))
    for peer in peers[1:]:
        theirs = np.array(peer.ask("logits"))
        far, spread = float(np.abs(own - theirs).max()), float(own.std())
        print(f"logits    {peer.what}: largest difference {far:.4f} at a deviation of {spread:.3f}; "
              f"{'the same' if own.argmax() == theirs.argmax() else 'ANOTHER'} greedy token", flush=True)
        if not far <= 0.25 * spread:
            sys.exit(f"{peer.what} runs another model")


def measure(peers, rounds, verb, *arguments):
    """Seconds (peers, rounds), interleaved; the first round warms up."""
    rows = [[peer.ask(verb, *arguments) for peer in peers] for _ in range(rounds + 1)]
    return [list(column) for column in zip(*rows[1:])]


def print_row(figure, tokens, peers, seconds):
    """Returns {peer: how often as fast the first one is}: the median over rounds of what was measured in turn."""
    ratios = {peer.what: statistics.median(own and other / own for own, other in zip(seconds[0], column))
              for peer, column in zip(peers, seconds)}
    print(f"{figure:9} " + "; ".join(
        f"{peer.what} {tokens / statistics.median(column):.1f} tokens/s" +
        (f" ({peers[0].what} {ratios[peer.what]:.2f} times as fast)" if peer is not peers[0] else "")
        for peer, column in zip(peers, seconds)), flush=True)
    return ratios


def run_planes(folder, size, steps, options, pythons):
    write_pack(folder, size, 3, 0.3)
    peers = [Peer(what, pythons.get(what, sys.executable), folder, options.threads)
             for what in ("planes", "planes, z12", "ours", "z12", *(what for what in pythons if what == "llama"))]
    print_row("planes", steps, peers, measure(peers, options.rounds, "decode", steps, 1))
    for peer in peers:
        peer.end()
    shutil.rmtree(folder / "3.pack")


def run_tasks(folder, size, k, steps, options, python):
    """K processes of llama.cpp at the same time, each with a file of its own: others would share pages and cache."""
    write_pack(folder, size, k, 0)
    ours = Peer(f"{k} tasks", sys.executable, folder, options.threads)
    folders = [folder / f"llama{i}" for i in range(k)]
    for own in folders:
        own.mkdir()
        shutil.copy(folder / "model.gguf", own)
    theirs = [Peer("llama", python, own, max(1, options.threads // k)) for own in folders]
    seconds = [[], []]
    for turn in range(options.rounds + 1):
        own = ours.ask("decode", steps, k)
        for peer in theirs:
            peer.tell("decode", steps, 1)
        slowest = max([peer.answer() for peer in theirs])
        if turn:
            seconds[0].append(own)
            seconds[1].append(slowest)
    print_row(f"{k} tasks", steps * k, [ours, theirs[0]], seconds)
    for peer in [ours, *theirs]:
        peer.end()
    for own in [*folders, folder / f"{k}.pack"]:
        shutil.rmtree(own)


def gains_by_bf16():
    import onebitmerge as obm
    return obm.info()["prefill_bf16"]


def run_size(size, options, pythons):
    """{(figure, peer): how often as fast ours is}."""
    with tempfile.TemporaryDirectory(prefix="obm-bench-", dir=options.folder) as name:
        folder = pathlib.Path(name)
        weights = write_model(folder, size, options.f32)
        sides = ["ours", *([] if options.f32 else ["z12"]), *pythons]
        starts = {what: [] for what in sides}
        for _ in range(options.rounds):
            for what in sides:
                peer = Peer(what, pythons.get(what, sys.executable), folder, options.threads)
                starts[what].append(peer.start)
                peer.end()
        peers = [Peer(what, pythons.get(what, sys.executable), folder, options.threads) for what in sides]
        print(f"\n{size}      {weights / 1e6:.0f} MB of {'f32' if options.f32 else 'bf16'}; load {os.getloadavg()[0]:.1f}")
        if not options.quiet:
            print("\n".join(f"{peer.what:9} {peer.name}" for peer in peers))
        compare_logits(peers)
        steps = min(max(4, int(options.steps * 3e8 / weights)), CONTEXT // BATCH - PROMPT)
        figures = {"decode": (steps, ("decode", steps, 1)), "batch 8": (steps * BATCH, ("decode", steps, BATCH)),
                   "prefill": (PREFILL, ("prefill", PREFILL))}
        ratios = {}
        for figure, (tokens, request) in figures.items():
            rounded = figure == "prefill" and not options.f32 and gains_by_bf16()
            taking = peers + [Peer("bf16", sys.executable, folder, options.threads)] if rounded else peers
            row = print_row(figure, tokens, taking, measure(taking, options.rounds, *request))
            ratios.update({(figure, what): ratio for what, ratio in row.items()})
            for peer in taking[len(peers):]:
                peer.end()
        for what in sides:
            ratios["start", what] = statistics.median(starts[what]) / statistics.median(starts["ours"])
        print("start     " + "; ".join(f"{what} {statistics.median(starts[what]):.2f} s" for what in sides), flush=True)
        for peer in peers:
            peer.end()
        if options.planes:
            run_planes(folder, size, steps, options, pythons)
        for k in options.tasks:
            run_tasks(folder, size, k, steps, options, pythons["llama"])
        return ratios


def main():
    if sys.argv[1:2] == ["--serve"]:
        return serve(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", action="append", default=[], metavar="llama|torch=PYTHON")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["135m", "360m", "1.1b"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=32, help="tokens decoded at a time by a model of 300 MB; more by smaller, fewer by larger ones")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--folder", help="where the models are written, 2 to 9 GB for a time")
    parser.add_argument("--f32", action="store_true", help="the same weights in f32; without z12, bf16 and torch, whose models are bf16")
    parser.add_argument("--planes", action="store_true", help="also three experts on planes")
    parser.add_argument("--tasks", nargs="+", type=int, default=[], metavar="K", help="also K tasks in a batch against K llama.cpp processes")
    parser.add_argument("--quiet", action="store_true", help="do not print what the sides are")
    options = parser.parse_args()
    pythons = dict(peer.split("=", 1) for peer in options.peer) or {"llama": sys.executable}
    if options.f32 and (options.planes or options.tasks or "torch" in pythons):
        parser.error("--f32 goes without --planes, --tasks and torch")
    print(f"threads   {options.threads}, load {os.getloadavg()[0]:.1f}")
    rows = [run_size(size, options, pythons) for size in options.sizes]
    print()
    for figure, what in rows[0]:
        if what != "ours":
            print(f"{figure:9} {what} / ours in seconds, geometric mean over sizes: "
                  f"{math.prod(row[figure, what] for row in rows) ** (1 / len(rows)):.2f}")


if __name__ == "__main__":
    main()
