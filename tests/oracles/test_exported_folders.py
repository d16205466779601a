"""What export and merge write, read by transformers and the `safetensors` package as they are."""

import pathlib

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers

import onebitmerge as obm

MODELS = pathlib.Path(__file__).resolve().parents[2] / "examples" / "models"
TASKS = ("chat", "math", "code")
PROMPTS = ["What is 17 plus 5?", "Say tea cheese four times.", "What does this print?\nx = [9, 6, 0, 2]\nprint(sorted(x))"]


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    return obm.compress(MODELS / "base", {t: MODELS / t for t in TASKS}, tmp_path_factory.mktemp("pack") / "p")


def greedy(folder, prompt, dtype):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    text = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    with torch.no_grad():
        out = model.generate(ids, max_new_tokens=24, do_sample=False)
    return tokenizer.decode(out[0, ids.shape[1]:], skip_special_tokens=True)


@pytest.mark.parametrize("route", ["math", "base", "chat=0.5,code=0.5"])
def test_export_runs_in_transformers(pack, tmp_path, route):
    pack.export(route, tmp_path / "dense", dtype="f32")
    ours = obm.Model(tmp_path / "dense")
    for prompt in PROMPTS:
        assert greedy(tmp_path / "dense", prompt, torch.float32) == ours.generate(prompt, chat=True, max_tokens=24)


def test_logits_of_an_export(pack, tmp_path):
    pack.export("code", tmp_path / "dense", dtype="f32")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    ids = list(range(3, 90))
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0].numpy()
    # 2e-4: two f32 forward passes that sum in different orders, as in test_transformers_oracle.
    assert np.abs(obm.Model(tmp_path / "dense").logits(ids) - expected).max() <= 2e-4


def test_safetensors_reads_what_export_wrote(pack, tmp_path):
    pack.export("math", tmp_path / "f32", dtype="f32")
    pack.export("math", tmp_path / "own")
    f32 = safetensors.torch.load_file(tmp_path / "f32" / "model.safetensors")
    own = safetensors.torch.load_file(tmp_path / "own" / "model.safetensors")
    assert sorted(f32) == sorted(pack.base) == sorted(own)
    for name in f32:
        assert np.array_equal(f32[name].numpy(), pack.materialise("math", name))
        assert own[name].dtype == torch.bfloat16
        assert torch.equal(own[name], f32[name].to(torch.bfloat16))   # both round to nearest even


def test_shards_load_as_one(pack, tmp_path):
    pack.export("math", tmp_path / "one", dtype="f32")
    pack.export("math", tmp_path / "many", dtype="f32", shard_bytes=1_000_000)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    one = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "one").state_dict()
    many = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "many").state_dict()
    assert one.keys() == many.keys()
    assert all(torch.equal(one[name], many[name]) for name in one)


def test_a_merge_runs_in_transformers(tmp_path):
    recipe = {"merge_method": "ties", "base_model": str(MODELS / "base"), "parameters": {"density": 0.5},
              "models": [{"model": str(MODELS / t), "parameters": {"weight": 1.0}} for t in TASKS], "dtype": "bfloat16"}
    obm.merge(recipe, tmp_path / "merged")
    ours = obm.Model(tmp_path / "merged")
    state = safetensors.torch.load_file(tmp_path / "merged" / "model.safetensors")
    assert all(t.dtype == torch.bfloat16 for t in state.values())
    for prompt in PROMPTS:
        assert greedy(tmp_path / "merged", prompt, torch.float32) == ours.generate(prompt, chat=True, max_tokens=24)


def test_checkpoints_written_by_safetensors(tmp_path):
    tensors = {"a": torch.randn(3, 5), "b.c": torch.randn(7).to(torch.bfloat16), "d": torch.randn(2, 2, 2).half()}
    safetensors.torch.save_file(tensors, tmp_path / "x.safetensors")
    ckpt = obm.Checkpoint(tmp_path / "x.safetensors")
    assert list(ckpt) == sorted(tensors)
    for name, t in tensors.items():
        assert torch.equal(torch.from_dlpack(ckpt[name]), t)
        assert np.array_equal(np.asarray(ckpt[name]).astype(np.float32), t.float().numpy())
