"""Against the `tokenizers` package, live: 2,500 strings on each committed tokenizer, and its pieces in random orders."""
import random
import sys
from pathlib import Path

import pytest

import tokenizers  # noqa: E402
import onebitmerge as obm  # noqa: E402

TESTS = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TESTS / "reference"))
from make_tokenizer_vectors import strings  # noqa: E402

FILES = [TESTS / "vectors" / "tokenizers" / f"{name}.json" for name in ("gpt2", "llama3", "smollm2", "qwen2")]


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def pair(request):
    return tokenizers.Tokenizer.from_file(str(request.param)), obm.Tokenizer(str(request.param)), request.param.stem


def test_encode(pair):
    reference, ours, name = pair
    for text in strings(2500, "live " + name):
        for special in (False, True):
            expected = reference.encode(text, add_special_tokens=special).ids
            assert list(ours.encode(text, special=special)) == expected, ascii(text)


def test_decode(pair):
    reference, ours, name = pair
    r = random.Random(name)
    for _ in range(2500):
        ids = [r.randrange(reference.get_vocab_size()) for _ in range(r.randrange(40))]
        for skip in (False, True):
            assert ours.decode(ids, skip_special=skip) == reference.decode(ids, skip_special_tokens=skip), ids
