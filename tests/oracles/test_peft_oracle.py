"""LoRA adapters against peft: what it merges, what it runs, what it saves."""

import numpy as np
import pytest
import torch
from peft import IA3Config, LoHaConfig, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import onebitmerge as obm

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def llama(tied=False, bias=False):
    torch.manual_seed(1)
    return LlamaForCausalLM(LlamaConfig(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
                                        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=tied, attention_bias=bias,
                                        initializer_range=0.2)).float()


def gpt2():
    torch.manual_seed(1)
    return GPT2LMHeadModel(GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=64)).float()


def adapted(model, folder, **config):
    """Base and adapter saved, the adapter with random numbers everywhere; the peft model."""
    model.save_pretrained(folder / "base")
    peft_model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **config))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, p in peft_model.named_parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.2)
    peft_model.save_pretrained(folder / "adapter")
    return peft_model.eval()


def export(folder):
    """The expert's own hard route of a pack that keeps the factors."""
    pack = obm.compress(folder / "base", {"x": obm.Expert(folder / "adapter", policy="full")}, out=folder / "pack")
    pack.export("x", folder / "out", dtype="f32")
    return obm.Checkpoint(folder / "out")


CASES = {
    "plain": dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]),
    "all linear, rslora": dict(r=8, lora_alpha=16, use_rslora=True, target_modules=LINEAR),
    "patterns": dict(r=4, lora_alpha=8, target_modules=LINEAR, rank_pattern={r"layers\.1\.self_attn\.q_proj": 7, "down_proj": 2, "^q_proj": 5},
                     alpha_pattern={r"model.layers.\d+.mlp.(gate|up)_proj": 3, "model.layers.2.self_attn.k_proj": 11}),
    "some layers": dict(r=4, lora_alpha=8, target_modules=LINEAR, layers_to_transform=[1], layers_pattern="layers", exclude_modules=["up_proj"]),
    "saved modules": dict(r=4, lora_alpha=8, target_modules=["q_proj"], modules_to_save=["lm_head", "norm"]),
    "embedding": dict(r=4, lora_alpha=8, target_modules=["embed_tokens", "v_proj"]),
    "head": dict(r=4, lora_alpha=8, target_modules=["lm_head"]),
}


def check_merged(peft_model, folder, rank):
    """|ours - peft's| <= 2^-23 (rank + 2) (|W| + scaling sum |B| |A|): both round the base plus d, and peft sums in f32."""
    before = obm.Checkpoint(folder / "base")
    ours = export(folder)
    wide = {name: np.abs(np.asarray(before[name])) for name in before}
    for name, module in peft_model.named_modules():
        if not hasattr(module, "get_delta_weight"):
            continue
        scaling = module.scaling["default"]
        a, b = ((module.lora_embedding_A, module.lora_embedding_B) if "default" in module.lora_embedding_A else
                (module.lora_A, module.lora_B))
        a, b = (x["default"] if isinstance(x["default"], torch.nn.Parameter) else x["default"].weight for x in (a, b))
        size = scaling * (b.detach().abs() @ a.detach().abs()).numpy()
        target = name.removeprefix("base_model.model.") + ".weight"
        wide[target] = wide[target] + (size if size.shape == wide[target].shape else size.T)
        if wide[target].shape[0] == wide[target].shape[1]:
            wide[target] = wide[target] + size.T   # square: whichever way it lies
    merged = {name: t.detach().numpy() for name, t in peft_model.merge_and_unload().state_dict().items()}
    assert set(ours) <= set(merged)
    for name in ours:
        bound = 2.0**-23 * (rank + 2) * np.maximum(wide[name], np.abs(merged[name]))
        assert np.all(np.abs(np.asarray(ours[name]) - merged[name]) <= bound), name
    return sum(not np.array_equal(merged[name], np.asarray(before[name])) for name in ours)


@pytest.mark.parametrize("case", CASES)
def test_merged(case, tmp_path):
    config = CASES[case]
    changed = check_merged(adapted(llama(), tmp_path, **config), tmp_path, max([config["r"], *config.get("rank_pattern", {}).values()]))
    assert changed >= 1


def test_biases(tmp_path):
    peft_model = adapted(llama(bias=True), tmp_path, r=4, lora_alpha=8, target_modules=["q_proj", "o_proj"], bias="all")
    assert check_merged(peft_model, tmp_path, 4) >= 6 + 12   # q and o matrices, and the biases of q, k, v, o


def test_fan_in_fan_out(tmp_path):
    """GPT-2's Conv1D keeps (in, out); c_proj of its attention is square."""
    peft_model = adapted(gpt2(), tmp_path, r=4, lora_alpha=8, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    assert check_merged(peft_model, tmp_path, 4) == 6


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_tied(target, tmp_path):
    """On a tied model the adapter works on one of the two while it runs, and so does the exported model."""
    peft_model = adapted(llama(tied=True), tmp_path, r=4, lora_alpha=8, target_modules=[target])
    ids = torch.arange(1, 41).reshape(2, 20)
    with torch.no_grad():
        want = peft_model(ids).logits.numpy()
        export(tmp_path)
        have = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()(ids).logits.numpy()
    assert np.abs(have - want).max() <= 2e-5 * np.abs(want).max()


def test_merge_recipe(tmp_path):
    """MODEL+ADAPTER with weight 1 onto its base is what peft merges, rounded to the base's dtype at the end."""
    peft_model = adapted(llama(), tmp_path, r=4, lora_alpha=8, target_modules=LINEAR)
    obm.merge({"merge_method": "task_arithmetic", "base_model": str(tmp_path / "base"),
               "models": [{"model": f"{tmp_path / 'base'}+{tmp_path / 'adapter'}", "parameters": {"weight": 1}}]}, tmp_path / "merged")
    ours = obm.Checkpoint(tmp_path / "merged")
    for name, t in peft_model.merge_and_unload().state_dict().items():
        if name in ours:
            assert np.allclose(np.asarray(ours[name]), t.detach().numpy(), rtol=1e-5, atol=1e-6), name


@pytest.mark.parametrize("config, message", [
    (LoraConfig(r=4, use_dora=True, target_modules=["q_proj"]), "DoRA"), (LoHaConfig(r=4, target_modules=["q_proj"]), "LOHA"),
    (IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]), "IA3"),
    (LoraConfig(r=4, lora_bias=True, target_modules=["q_proj"]), "biases of LoRA layers"),
    (LoraConfig(r=4, trainable_token_indices=[1, 2], target_modules=["q_proj"]), "single trained token rows"),
    (LoraConfig(r=4, init_lora_weights="pissa", target_modules=["q_proj"]), "init_lora_weights: .pissa.")])
def test_refused(config, message, tmp_path):
    model = llama(bias=True)
    model.save_pretrained(tmp_path / "base")
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(obm.UnsupportedError, match=message):
        obm.TaskVector(tmp_path / "base", tmp_path / "adapter")


@pytest.mark.parametrize("cut", [{"rank": 5}, {"energy": .8}, {"energy": 1}])
def test_extracted_adapters_load(tmp_path, cut):
    """peft runs what extract_lora wrote: base + the truncated singular value decomposition of the fine-tune's difference."""
    base, tuned = llama(), llama()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for i, (name, p) in enumerate(tuned.named_parameters()):
            if name.split(".")[-2] in LINEAR and "layers.1.self_attn.k_proj" not in name:   # one that does not differ
                p += .05 * torch.randn(p.shape, generator=generator)
    base.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned")
    rows = {m["name"]: m for m in obm.extract_lora(tmp_path / "base", tmp_path / "tuned", tmp_path / "adapter", **cut)}
    weights = {name: p.detach().clone() for name, p in base.named_parameters()}
    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    merged = PeftModel.from_pretrained(fresh, tmp_path / "adapter").merge_and_unload()
    assert len(rows) == 3 * len(LINEAR) - 1
    for name, p in merged.named_parameters():
        d = (dict(tuned.named_parameters())[name] - weights[name]).detach().double()
        if name not in rows:
            assert torch.equal(p, weights[name]), name
            continue
        u, s, vt = torch.linalg.svd(d, full_matrices=False)
        r = rows[name]["rank"]
        want = weights[name].double() + u[:, :r] * s[:r] @ vt[:r]
        assert (p - want).abs().max() < 1e-6, name   # weights of size 1 in f32, factors in f32
    if cut == {"energy": 1}:
        ids = torch.arange(20)[None]
        assert (merged(ids).logits - tuned(ids).logits).abs().max() < 1e-4
