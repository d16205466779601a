"""The live oracle: tiny random models of every architecture made by transformers, run by both."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import architectures
import onebitmerge as obm

TOKENS = architectures.TOKENS
# Two f32 forward passes that sum in different orders: 6e-8 per operation, a few hundred of them in a row, logits up to 12.
# The largest difference over all cases is about 5e-5; any part of a model done wrongly shows as 1e-2 and more.
BOUND = 2e-4


@pytest.fixture(scope="module", params=architectures.CASES)
def pair(request, tmp_path_factory):
    reference, ids = architectures.build(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    reference.save_pretrained(folder)
    return reference, obm.Model(str(folder)), ids


@pytest.mark.parametrize("decode", [False, True])
def test_logits(pair, decode):
    reference, model, ids = pair
    with torch.no_grad():
        expected = reference(ids[None]).logits[0].numpy()
    got = model.logits(ids.tolist(), all=True, decode=decode)
    assert got.shape == expected.shape and got.dtype == np.float32
    assert 2 <= expected.std() <= 4
    assert np.abs(got - expected).max() <= BOUND


def test_hidden(pair):
    reference, model, ids = pair
    with torch.no_grad():
        states = reference.model(ids[None], output_hidden_states=True).hidden_states
    layers = model.info["layers"]
    for layer in range(layers):  # transformers' last entry is after the final norm
        got = model.hidden(ids.tolist(), layer)
        assert np.abs(got - states[layer][0].numpy()).max() <= BOUND


def clear_margin(logits):
    top = logits.topk(2, dim=-1).values
    return bool(((top[..., 0] - top[..., 1]) > 1e-3).all())


def test_greedy_generation(pair):
    """Where no two candidates come close enough for rounding to choose between them."""
    reference, model, ids = pair
    compared = 0
    # A dynamic rotation is chosen once for all that a call may reach, while transformers changes it with every token.
    changes = (reference.config.get_text_config().rope_parameters or {}).get("rope_type") == "dynamic" and model.info["max_positions"] < 256
    for length in (1, 7, 40) if changes else (1, 7, 40, 70):
        prompt = ids[:length]
        with torch.no_grad():
            out = reference.generate(prompt[None], attention_mask=torch.ones(1, length, dtype=torch.long), max_new_tokens=24,
                                     do_sample=False, output_logits=True, return_dict_in_generate=True)
        if not clear_margin(torch.cat(out.logits)):
            continue
        got = model.generate({"ids": prompt.tolist()}, max_tokens=24)
        assert list(got.ids) == out.sequences[0, length:].tolist()
        compared += 1
    assert compared >= 2


def test_batches_are_singles(pair):
    _, model, ids = pair
    prompts = [{"ids": ids[a:b].tolist()} for a, b in ((0, 1), (3, 70), (20, 31), (5, 90))]
    batch = model.generate(prompts, max_tokens=9)
    assert [list(b.ids) for b in batch] == [list(model.generate(p, max_tokens=9).ids) for p in prompts]


def test_scores(pair):
    reference, model, ids = pair
    prompt, continuation = ids[:30].tolist(), ids[30:].tolist()
    with torch.no_grad():
        logprobs = torch.log_softmax(reference(ids[None]).logits[0].double(), -1)
    expected = [float(logprobs[i - 1, ids[i]]) for i in range(30, TOKENS)]
    score = model.score({"ids": prompt}, continuation)
    assert np.abs(np.asarray(score.token_logprobs) - expected).max() <= 1e-3
    assert abs(score.logprob - sum(expected)) <= 1e-2


@pytest.mark.parametrize("name", ["llama-tied", "gemma3", "gemma3-vision"])
@pytest.mark.parametrize("said", [True, None])
@pytest.mark.parametrize("equal", [False, True])
def test_a_head_in_the_files_of_a_tied_model(tmp_path, name, said, equal):
    """config.json, or the architecture where it says nothing, ties the head: the files decide."""
    reference, ids = architectures.build(name)
    reference.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for part in (config, config.get("text_config", {})):
        part.pop("tie_word_embeddings", None)
        if said is not None:
            part["tie_word_embeddings"] = said
    if name == "llama-tied" and said is None:  # LLaMA is untied by default
        equal = False
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = load_file(tmp_path / "model.safetensors")
    embedding = next(x for n, x in tensors.items() if n.endswith("embed_tokens.weight"))
    head = "language_model.lm_head.weight" if name == "gemma3-vision" else "lm_head.weight"
    tensors[head] = embedding.clone() if equal else torch.randn(embedding.shape, generator=torch.Generator().manual_seed(1))
    save_file(tensors, tmp_path / "model.safetensors")
    loaded = type(reference).from_pretrained(tmp_path, attn_implementation="eager").eval()
    with torch.no_grad():
        expected = loaded(ids[None]).logits[0].numpy()
        tied = reference(ids[None]).logits[0].numpy()
    got = obm.Model(str(tmp_path)).logits(ids.tolist(), all=True)
    assert np.abs(got - expected).max() <= BOUND * max(1, np.abs(expected).max() / 10)
    assert (np.abs(expected - tied).max() > 1) != equal
