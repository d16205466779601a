"""Trains the tiny tokenizers of tests/vectors/tokenizers and writes what the `tokenizers` package makes of some strings.

    python make_tokenizer_vectors.py                    # rewrites tests/vectors/tokenizers
    python make_tokenizer_vectors.py --strings N SEED   # prints N test strings as JSON lines

Each configuration has the normalizer, pre-tokenizer, post-processor, decoder and added tokens of a real model (KINDS says
which) on a vocabulary of about 450 pieces.  NAME.jsonl has one line a string: [text, ids, ids with the post-processor's
tokens, decoded with skip_special].  tests/oracles builds all KINDS anew; those in COMMITTED are vectors of the default tests.
"""
import json
import random
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / "vectors" / "tokenizers"

LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
          r"|\s+(?!\S)|\s+")
QWEN2 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
         r"|\s+(?!\S)|\s+")

# Mistral's Tekken, OpenAI's cl100k (OLMo 2, Granite 4) and o200k (Phi-4) as their tokenizer.json have them.
TEKKEN = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
          r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}"
          r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
CL100K = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]"
          r"|\s+(?!\S)|\s+")
O200K = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
         r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
         r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")

CORPUS = """The quick brown fox jumps over the lazy dog. It's what they're saying: we'll see, I've been told, don't worry.
def add(a, b):\n    return a + b\n\nfor i in range(10):\n\tprint(i, 3.14, "text")\n
Tom has 12 apples and 345 pears; 2024-05-17 was a Friday. 1,234,567.89 euros!?  Some    spaces,\n\n\nnew lines.
Der schnelle braune Fuchs springt \u00fcber den faulen Hund. Les \u00e9l\u00e8ves fran\u00e7ais \u00e9taient l\u00e0. \u00bfQu\u00e9 tal, ni\u00f1o?
\u0411\u044b\u0441\u0442\u0440\u0430\u044f \u043a\u043e\u0440\u0438\u0447\u043d\u0435\u0432\u0430\u044f \u043b\u0438\u0441\u0430. \u4f60\u597d\uff0c\u4e16\u754c\u3002 \u3053\u3093\u306b\u3061\u306f \uc548\ub155\ud558\uc138\uc694 \u0645\u0631\u062d\u0628\u0627 \u0928\u092e\u0938\u094d\u0924\u0947 \U0001f600\U0001f680
int main(void) { return 0; } /* the answer to the question is 42 */ the there then that this these those""".split("\n")

ATOMS = (
    "the The quick don't we'll I'VE they'Re it'S 'tis y'all'd've O'Neill 'LL \u017f '\u017f 'M' a b xyz HELLO camelCase snake_case".split()
    + ["0", "7", "12", "123", "1234", "1234567", "3.14", "1,000", "1e-5", "\u0663\u0664\u0665", "\u00bd", "\u2167", "\u00b2", "\u4e00\u4e8c", "\U0001d7d9"]
    + [" ", "  ", "   ", " " * 9, "\t", "\t\t", "\n", "\n\n", "\r\n", "\r", " \n", "\n ", " \n \n", "\u00a0", "\u3000", "\u2003", "\u180e",
       "\u200b", "\u2028", "\x0b", "\x0c", "\x85", "\x1c", "\x1f", "\ufeff"]
    + ["!", "?!", "...", "\u2026", "--", "\u2014", "(", ")", "[x]", "{}", "\\", "/", "#", "@user", "$5", "100%", "<", ">", "<|", "|>", "`code`", "\""]
    + ["\u00e9", "e\u0301", "\u1e9b\u0323", "\u00c5", "A\u030a", "\u212b", "\ufb01", "\u0345", "q\u0307\u0323", "\uac00", "\u1100\u1161\u11a8", "\u0958", "\u2126"]
    + ["\u4f60\u597d", "\u4e16\u754c", "\u6f22\u5b57", "\u3053\u3093\u306b\u3061\u306f", "\u30ab\u30bf\u30ab\u30ca", "\uc548\ub155", "\u0645\u0631\u062d\u0628\u0627", "\u0633\u0644\u0627\u0645\u064c",
       "\u0928\u092e\u0938\u094d\u0924\u0947", "\u0915\u094d\u0937", "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35", "\u0539\u0578\u0582", "\u10d2\u10d0\u10db\u10d0\u10e0\u10ef\u10dd\u10d1\u10d0", "\u041f\u0440\u0438\u0432\u0435\u0442"]
    + ["\U0001f600", "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466", "\U0001f1e9\U0001f1ea", "\U0001f44d\U0001f3fd", "\u2764\ufe0f", "1\ufe0f\u20e3", "\U0001f3f4\U000e0067\U000e0062\U000e007f"]
    + ["\x00", "\x01", "\x07", "\x1b[0m", "\x7f", "\x80", "\x9f", "\ufffd", "\ufffe", "\uffff", "\U0010ffff", "\ue000", "\u0378", "\U000e0080",
       "\U00031350", "\U0002ebf0", "\U0001e4f0", "\U00010d40", "\ua7cb", "\u1c89", "\u200c", "\u200d"]
)
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|eot_id|>", "<|im_start|>user\n", "<|im_end|>\n",
            "<|im_", "<|endoftext|", "<tool>", "<tool>s", "caf\u00e9", "cafe\u0301", "<pad>", " <pad> ", "word", "words", "keyword"]
SPM_SPECIALS = ["<s>", "</s>", "<unk>", "<s> ", " </s>", "\u2581", "\u2581\u2581the", "<0x0A>", "<0xe9>", "[INST]", " [/INST] ", "<|user|>\n",
                "<|user|>  x", "<|end|>", "<start_of_turn>", "<start_of_turn>user\n", "\u2581<s>", "<s>\u2581"]


def strings(n, seed, specials=SPECIALS):
    """n strings of 0 to 12 atoms, or of random code points; the same for every run."""
    r = random.Random(seed)
    atoms = ATOMS + [c for line in CORPUS for c in line.split(" ")[:4] if c]
    fixed = ["", " ", "\n", "a", "\x00", " " * 70, "\n" * 40, "\t " * 30, "1" * 50, "a" * 200, "'" * 9, "\u00e9" * 30, "\U0001f600" * 9]
    out = fixed + specials + [line for line in CORPUS]
    while len(out) < n:
        kind = r.random()
        if kind < 0.15:
            out.append("".join(chr(c) for c in (r.choice([r.randrange(0x80), r.randrange(0x3000), r.randrange(0xd800),
                                                           r.randrange(0xe000, 0x110000), r.randrange(0x1f000, 0x20000)])
                                                 for _ in range(r.randrange(1, 24)))))
            continue
        glue = "" if kind < 0.6 else " "
        parts = [r.choice(specials) if r.random() < 0.12 else r.choice(atoms) for _ in range(r.randrange(1, 13))]
        out.append(glue.join(parts))
    return out[:n]


def build_bytes(name):
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    t = Tokenizer(models.BPE(ignore_merges=name in ("llama3", "tekken")))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=name == "prefix", use_regex=name in ("gpt2", "smollm2", "prefix"))
    patterns = {"llama3": LLAMA3, "qwen2": QWEN2, "tekken": TEKKEN, "cl100k": CL100K, "o200k": O200K}
    specials = ["<|endoftext|>"]
    if name in ("gpt2", "prefix"):
        t.pre_tokenizer = byte_level
    elif name == "smollm2":
        t.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
        specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    else:
        t.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(patterns[name]), "isolated"), byte_level])
        specials = []
    if name == "qwen2":
        t.normalizer = normalizers.NFC()
    t.train_from_iterator(CORPUS * 3, trainers.BpeTrainer(vocab_size=450, min_frequency=2, special_tokens=specials, show_progress=False,
                                                          initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    t.decoder = decoders.ByteLevel()
    t.post_processor = processors.ByteLevel(trim_offsets=False)
    if name == "gpt2":   # options that GPT-2 itself does not use: every kind of added token
        t.add_tokens([AddedToken("<pad>", lstrip=True, rstrip=True), AddedToken("word", single_word=True), "caf\u00e9", "<tool>"])
    elif name == "llama3":
        t.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"])
        bos = t.token_to_id("<|begin_of_text|>")
        t.post_processor = processors.Sequence([
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single="<|begin_of_text|> $A", pair="<|begin_of_text|> $A <|begin_of_text|> $B:1",
                                          special_tokens=[("<|begin_of_text|>", bos)])])
    elif name == "qwen2":
        t.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
        t.add_tokens([AddedToken("<tool>", normalized=False), AddedToken("cafe\u0301", normalized=True)])
    else:
        t.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<s>", "</s>"])
    return t


def sentencepiece(kind):
    """Normalizer, pre-tokenizer, decoder and added tokens of the models whose vocabulary came from SentencePiece."""
    from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers
    prefix = kind not in ("gemma", "metaspace_never")
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    pre_tokenizer, extra = None, []
    if kind.startswith("metaspace"):
        scheme = kind.removeprefix("metaspace_")
        normalizer, pre_tokenizer = None, pre_tokenizers.Metaspace("\u2581", scheme, split=scheme != "first")
        if scheme != "first":
            decoder = decoders.Metaspace("\u2581", scheme)
        extra = [AddedToken("[INST]", special=True, normalized=False), AddedToken("[/INST]", special=True, normalized=False)]
    elif kind == "gemma":
        normalizer, pre_tokenizer = normalizers.Replace(" ", "\u2581"), pre_tokenizers.Split(" ", "merged_with_previous")
        extra = [AddedToken("<start_of_turn>", special=True, normalized=False), AddedToken("\n\n", normalized=False), AddedToken("\t\t", normalized=False)]
    elif kind == "phi3":
        extra = [AddedToken(t, special=True, normalized=False, rstrip=True) for t in ("<|user|>", "<|end|>", "<|assistant|>")]
        extra.append(AddedToken("</tool>", lstrip=True, single_word=True))
    elif kind.startswith("mixed"):   # of no model: every other part there is
        normalizer = normalizers.Sequence([normalizers.Strip(left=True, right=kind == "mixed"),
                                           normalizers.NFKC() if kind == "mixed" else normalizers.NFC(), normalizers.Lowercase(),
                                           normalizers.Replace(Regex(r"\d{4,}"), "#"), normalizers.Replace("!", "")])
        pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Whitespace(), pre_tokenizers.Punctuation("merged_with_previous")] if kind == "mixed" else
            [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation("contiguous"), pre_tokenizers.Digits(individual_digits=False),
             pre_tokenizers.Metaspace("_", "first", split=True)])
        decoder = None if kind == "mixed" else decoders.Sequence([decoders.Strip("e", 0, 1), decoders.ByteFallback(),
                                                                   decoders.Metaspace("_", "always"), decoders.Replace(Regex("[aeiou]{2,}"), "<>")])
    specials = [AddedToken(t, special=True, normalized=kind == "llama1") for t in ("<unk>", "<s>", "</s>")]
    return normalizer, pre_tokenizer, decoder, specials, extra


def build_characters(kind):
    """As models converted from SentencePiece: <unk>, <s>, </s>, the 256 bytes, then characters and merges; what the corpus has
    seldom is left to byte fallback."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    normalizer, pre_tokenizer, decoder, specials, extra = sentencepiece(kind)
    t = Tokenizer(models.BPE())
    t.pre_tokenizer = pre_tokenizers.Metaspace("_" if kind == "mixed_space" else "\u2581", "never" if kind == "gemma" else "always")
    corpus = [line.lower() for line in CORPUS] if kind.startswith("mixed") else CORPUS
    t.train_from_iterator(corpus * 3, trainers.BpeTrainer(vocab_size=450, min_frequency=2, limit_alphabet=90, show_progress=False))
    data = json.loads(t.to_str())
    trained = sorted(data["model"]["vocab"], key=data["model"]["vocab"].get)
    codes = [f"<0x{b:02X}>" for b in range(256) if kind not in ("unk", "unk_fused") and (kind != "mixed" or b < 0x80 or b % 2)]
    vocab = {piece: i for i, piece in enumerate(["<unk>", "<s>", "</s>", *codes, *trained])}
    data["model"].update(vocab=vocab, unk_token="<unk>", fuse_unk=kind not in ("unk", "mixed"), byte_fallback=bool(codes))
    t = Tokenizer.from_str(json.dumps(data))
    t.normalizer, t.pre_tokenizer, t.decoder = normalizer, pre_tokenizer, decoder
    t.add_special_tokens(specials)
    t.add_tokens(extra)
    t.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B:1", special_tokens=[("<s>", 1)])
    return t


BYTES = ("gpt2", "llama3", "smollm2", "qwen2", "tekken", "cl100k", "o200k", "prefix")   # smollm2 is Granite 3's too
CHARACTERS = ("llama1", "llama2", "metaspace_first", "metaspace_always", "metaspace_never", "gemma", "phi3", "mixed", "mixed_space", "unk", "unk_fused")
KINDS = BYTES + CHARACTERS
COMMITTED = ("gpt2", "llama3", "smollm2", "qwen2", "llama2", "metaspace_first", "gemma", "phi3", "mixed")


def specials_of(name):
    return SPECIALS if name in BYTES else SPM_SPECIALS


def build(name):
    return build_bytes(name) if name in BYTES else build_characters(name)


def with_string_merges(text):
    """Older files have merges as "a b"; the package writes pairs."""
    data = json.loads(text)
    data["model"]["merges"] = [" ".join(m) for m in data["model"]["merges"]]
    return json.dumps(data, ensure_ascii=False, separators=(",", ":"))


def main():
    FOLDER.mkdir(parents=True, exist_ok=True)
    for k, name in enumerate(COMMITTED):
        t = build(name)
        text = json.dumps(json.loads(t.to_str()), ensure_ascii=False, separators=(",", ":"))
        if name in ("gpt2", "smollm2", "phi3"):
            text = with_string_merges(text)
        (FOLDER / f"{name}.json").write_text(text + "\n", encoding="utf-8")
        with open(FOLDER / f"{name}.jsonl", "w", encoding="utf-8") as out:
            for s in strings(170 if name in BYTES else 150, k, specials_of(name)):
                plain, full = t.encode(s, add_special_tokens=False).ids, t.encode(s).ids
                out.write(json.dumps([s, plain, full, t.decode(full, skip_special_tokens=True)], separators=(",", ":")) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--strings"]:
        for s in strings(int(sys.argv[2]), sys.argv[3]):
            print(json.dumps(s))
    else:
        main()
