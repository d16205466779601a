"""The live oracle: tiny random models made by transformers, run by both."""

import numpy as np
import pytest

import torch  # noqa: E402
import transformers  # noqa: E402
import onebitmerge as obm  # noqa: E402

TOKENS = 90  # over a tile of 64 positions
COMMON = dict(num_hidden_layers=2, max_position_embeddings=256, bos_token_id=1, eos_token_id=None, pad_token_id=0)
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}


def llama(**kw):
    return transformers.LlamaForCausalLM, transformers.LlamaConfig(**{**COMMON, **kw})


def mistral(**kw):
    return transformers.MistralForCausalLM, transformers.MistralConfig(**{**COMMON, **kw})


CASES = {
    "tied": llama(vocab_size=97, hidden_size=48, intermediate_size=77, num_attention_heads=4, tie_word_embeddings=True),
    "untied-gqa2": llama(vocab_size=131, hidden_size=40, intermediate_size=131, num_attention_heads=4, num_key_value_heads=2),
    "gqa4-head-dim": llama(vocab_size=97, hidden_size=40, intermediate_size=51, num_attention_heads=4, num_key_value_heads=1,
                           head_dim=16, rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
    "llama3-rope": llama(vocab_size=97, hidden_size=64, intermediate_size=51, num_attention_heads=8, num_key_value_heads=2,
                         rope_parameters=LLAMA3, tie_word_embeddings=True),
    "biases": llama(vocab_size=97, hidden_size=36, intermediate_size=51, num_attention_heads=3, attention_bias=True, mlp_bias=True),
    "mistral-window": mistral(vocab_size=97, hidden_size=36, intermediate_size=51, num_attention_heads=4, num_key_value_heads=2,
                              head_dim=14, sliding_window=9),
    "mistral-no-window": mistral(vocab_size=97, hidden_size=36, intermediate_size=51, num_attention_heads=6, num_key_value_heads=3,
                                 sliding_window=None, tie_word_embeddings=True),
}


@pytest.fixture(scope="module", params=CASES, ids=list(CASES))
def pair(request, tmp_path_factory):
    cls, config = CASES[request.param]
    config._attn_implementation = "eager"
    reference = cls(config).float().eval()
    generator = torch.Generator().manual_seed(len(request.param))
    with torch.no_grad():
        for name, p in reference.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(1 + 0.2 * noise if "norm" in name else 0.25 * noise)
    folder = tmp_path_factory.mktemp(request.param)
    reference.save_pretrained(folder)
    ids = torch.randint(3, config.vocab_size, (TOKENS,), generator=generator)
    return reference, obm.Model(str(folder)), ids


@pytest.mark.parametrize("decode", [False, True])
def test_logits(pair, decode):
    reference, model, ids = pair
    with torch.no_grad():
        expected = reference(ids[None]).logits[0].numpy()
    got = model.logits(ids.tolist(), all=True, decode=decode)
    assert got.shape == expected.shape and got.dtype == np.float32
    assert np.abs(got - expected).max() <= 2e-4


def test_hidden(pair):
    reference, model, ids = pair
    with torch.no_grad():
        states = reference.model(ids[None], output_hidden_states=True).hidden_states
    layers = model.info["layers"]
    for layer in range(layers):  # transformers' last entry is after the final norm
        got = model.hidden(ids.tolist(), layer)
        assert np.abs(got - states[layer][0].numpy()).max() <= 2e-4


def clear_margin(logits):
    top = logits.topk(2, dim=-1).values
    return bool(((top[..., 0] - top[..., 1]) > 1e-3).all())


def test_greedy_generation(pair):
    """Where no two candidates come close enough for rounding to choose between them."""
    reference, model, ids = pair
    compared = 0
    for length in (1, 7, 40, 70):
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


def test_scores(pair):
    reference, model, ids = pair
    prompt, continuation = ids[:30].tolist(), ids[30:].tolist()
    with torch.no_grad():
        logprobs = torch.log_softmax(reference(ids[None]).logits[0].double(), -1)
    expected = [float(logprobs[i - 1, ids[i]]) for i in range(30, TOKENS)]
    score = model.score({"ids": prompt}, continuation)
    assert np.abs(np.asarray(score.token_logprobs) - expected).max() <= 1e-3
    assert abs(score.logprob - sum(expected)) <= 1e-2
