"""Experts with a tokenizer, a chat template and eos ids of their own: stored in the pack, in use under their hard routes only."""

import json
import shutil

import numpy as np
import jinja2   # of the extra [test]
import pytest

import onebitmerge as obm
import plain

BASE_TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
OWN_TEMPLATE = "{% for m in messages %}{{ m['content'] | upper | lower }}{{ m.get('tag', '') }}<t>{% endfor %}"
MESSAGES = [{"role": "user", "content": "ab"}]


def tensors(rows, seed):
    """One layer: hidden 8, 2 heads, 1 KV head of 4."""
    r = np.random.default_rng(seed)
    out = {"model.embed_tokens.weight": r.normal(size=(rows, 8)), "lm_head.weight": r.normal(size=(rows, 8)), "model.norm.weight": np.ones(8)}
    for name, shape in {"self_attn.q_proj": (8, 8), "self_attn.k_proj": (4, 8), "self_attn.v_proj": (4, 8), "self_attn.o_proj": (8, 8),
                        "mlp.gate_proj": (8, 8), "mlp.up_proj": (8, 8), "mlp.down_proj": (8, 8)}.items():
        out[f"model.layers.0.{name}.weight"] = r.normal(size=shape)
    for name in ("input_layernorm", "post_attention_layernorm"):
        out[f"model.layers.0.{name}.weight"] = np.ones(8)
    return out


def tokenizer(*added):
    entry = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "c": 2, "d": 3}, "merges": []},
            "added_tokens": [{"id": 4 + i, "content": text, **entry} for i, text in enumerate(added)],
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False}, "decoder": {"type": "ByteLevel"}}


def folder(path, rows, seed, template, eos, *added):
    config = {"model_type": "llama", "vocab_size": rows, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
              "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
              "tie_word_embeddings": False}
    plain.write_folder(path, tensors(rows, seed), config=config)
    (path / "tokenizer.json").write_text(json.dumps(tokenizer(*added)))
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template, "eos_token": "<e>"}))
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    return path


@pytest.fixture
def base(tmp_path):
    return folder(tmp_path / "base", 5, 1, BASE_TEMPLATE, 4, "<e>")


@pytest.fixture
def chat(tmp_path):
    return folder(tmp_path / "chat", 6, 2, OWN_TEMPLATE, [4, 5], "<e>", "<t>")


@pytest.fixture
def math(tmp_path):
    return folder(tmp_path / "math", 5, 3, BASE_TEMPLATE, 4, "<e>")


@pytest.fixture
def pack(tmp_path, base, chat, math):
    return obm.compress(base, {"chat": chat, "math": math}, tmp_path / "my.pack")


@pytest.fixture
def model(pack):
    return obm.Model(pack)


def test_only_what_differs_is_stored(pack, tmp_path):
    assert pack.text("chat") == "tokenizer, template, eos"
    assert pack.text("math") == ""
    files = json.loads((tmp_path / "my.pack" / "pack.json").read_text())["experts"][0]["text"]["files"]
    assert set(files) == {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    assert (tmp_path / "my.pack" / files["tokenizer.json"]["file"]).read_bytes() == (tmp_path / "chat" / "tokenizer.json").read_bytes()
    assert "chat brings its own tokenizer, template, eos" in repr(pack)
    assert "math brings" not in repr(pack)
    pack.remove("chat")
    assert [p.name for p in (tmp_path / "my.pack").iterdir() if not p.name.endswith(".safetensors")] == ["pack.json"]


def test_tokenizer_for(model):
    assert model.tokenizer.id("<t>") is None
    own = model.tokenizer_for("chat")
    assert own.id("<t>") == 5 and own.encode("ab<t>") == [0, 1, 5] and own.template == OWN_TEMPLATE
    for route in ("math", "base", None, {"chat": 0.5}, {"chat": 1, "math": 1}):
        assert model.tokenizer_for(route).encode("ab<t>") == [0, 1]
        assert model.tokenizer_for(route).template == BASE_TEMPLATE
    with pytest.raises(obm.NotFoundError):
        model.tokenizer_for("law")
    del model
    assert own.decode([5]) == "<t>"   # it keeps the model alive


def test_text_prompts(model):
    counts = [c.prompt_tokens for c in model.generate(["ab<t>"] * 4, route=["chat", "math", {"chat": 0.5}, "base"], max_tokens=2)]
    assert counts == [3, 2, 2, 2]
    by_text, by_ids = (model.generate(p, route="chat", max_tokens=5, ignore_eos=True) for p in ("ab<t>", [0, 1, 5]))
    assert by_text.ids == by_ids.ids and by_text == model.tokenizer_for("chat").decode(by_text.ids, skip_special=True)
    assert model.score("ab<t>", "c", route="chat") == model.score([0, 1, 5], [2], route="chat")
    assert model.score("ab<t>", "c", route="math") == model.score([0, 1], [2], route="math")
    assert model.score("ab<t>", route="chat").token_logprobs == model.score([0], [1, 5], route="chat").token_logprobs


def test_jinja_templates_of_the_route(model):
    routes = ["chat", "math", {"chat": 0.5}]
    assert [c.prompt_tokens for c in model.generate([MESSAGES] * 3, route=routes, max_tokens=1)] == [3, 2, 2]
    assert [c.prompt_tokens for c in model.generate(["ab"] * 3, chat=True, route=routes, max_tokens=1)] == [3, 2, 2]
    tagged = [{**MESSAGES[0], "tag": "dd"}]   # templates see messages as they were given
    assert model.generate(tagged, route="chat", max_tokens=1).prompt_tokens == 5
    assert model.generate({"messages": tagged}, route="chat", max_tokens=1).prompt_tokens == 5
    stream = model.stream(MESSAGES, route="chat", max_tokens=1)
    list(stream)
    assert stream.result.prompt_tokens == 3
    assert model.score(MESSAGES, "c", route="chat") == model.score([0, 1, 5], [2], route="chat")
    assert model.score(MESSAGES, "c", route="math") == model.score([0, 1], [2], route="math")


def test_what_a_template_raises(tmp_path, base, chat):
    (chat / "chat_template.jinja").write_text("{{ raise_exception('only tools') }}")   # wins over tokenizer_config.json
    model = obm.Model(obm.compress(base, {"chat": chat}, tmp_path / "p"))
    for call in (lambda: model.generate(MESSAGES, route="chat"), lambda: model.stream(MESSAGES, route="chat"),
                 lambda: model.score(MESSAGES, "c", route="chat")):
        with pytest.raises(jinja2.exceptions.TemplateError, match="only tools"):
            call()
    assert model.generate(MESSAGES, route="base", max_tokens=1).prompt_tokens == 2


def test_routers_see_the_base(model):
    seen = []

    def router(request):
        seen.append((request.text, request.tokens))
        return "chat"

    assert [c.prompt_tokens for c in model.generate(["ab<t>", MESSAGES], router=router, max_tokens=1)][0] == 3
    assert seen == [("ab<t>", [0, 1]), ("ab", [0, 1])]


def test_eos_of_the_route(tmp_path, base, chat):
    first = obm.Model(obm.compress(base, {"chat": chat}, tmp_path / "p"))
    own, soft = (first.generate("ab", route=r, max_tokens=1, ignore_eos=True).ids[0] for r in ("chat", {"chat": 0.5}))
    (chat / "generation_config.json").write_text(json.dumps({"eos_token_id": [own, soft]}))
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": next(i for i in range(5) if i not in (own, soft))}))
    model = obm.Model(obm.compress(base, {"chat": chat}, tmp_path / "q"))
    assert model.generate("ab", route="chat", max_tokens=4).finish_reason == "stop"
    assert model.generate("ab", route="chat", max_tokens=4).ids == [own]
    assert len(model.generate("ab", route={"chat": 0.5}, max_tokens=4).ids) > 1


def test_conflicting_ids(tmp_path, base, chat, pack):
    clash = tokenizer("<e>", "<t>")
    clash["model"]["vocab"].update(b=2, c=1)
    (chat / "tokenizer.json").write_text(json.dumps(clash))
    message = r'expert law: .*tokenizer\.json gives id 1 the token "c", the base\'s is "b"'
    with pytest.raises(obm.MismatchError, match=message):
        obm.compress(base, {"law": chat}, tmp_path / "p")
    with pytest.raises(obm.MismatchError, match=message):
        pack.add("law", chat)
    assert not (tmp_path / "p").exists() and pack.tasks == ["chat", "math"]


def test_damage_and_age(pack, tmp_path):
    path = tmp_path / "my.pack"
    described = json.loads((path / "pack.json").read_text())
    own = path / described["experts"][0]["text"]["files"]["tokenizer.json"]["file"]
    own.write_bytes(own.read_bytes().replace(b"<t>", b"<u>"))
    with pytest.raises(obm.FormatError, match=own.name):
        obm.Pack(path).verify()
    del described["experts"][0]["text"]   # as packs were written before
    (path / "pack.json").write_text(json.dumps(described))
    old = obm.Pack(path)
    assert old.text("chat") == ""
    old.verify()
    assert obm.Model(old).generate("ab<t>", route="chat", max_tokens=1).prompt_tokens == 2


def test_export(pack, tmp_path, base, chat):
    (base / "merges.txt").write_text("a b\n")
    names = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
    for route, source, merges in (("chat", chat, False), ({"chat": 0.5}, base, True), ("math", base, True), ("base", base, True)):
        out = tmp_path / "out"
        pack.export(route, out, overwrite=True)
        assert all((out / n).read_bytes() == (source / n).read_bytes() for n in names)
        assert (out / "merges.txt").exists() == merges
    pack.export("chat", out, overwrite=True)
    exported, routed = obm.Model(out), obm.Model(pack)
    assert json.loads((out / "config.json").read_text())["eos_token_id"] == [4, 5]
    assert exported.generate("ab<t>", max_tokens=6).ids == routed.generate("ab<t>", route="chat", max_tokens=6).ids
    shutil.rmtree(out)


def test_show_says_it(pack, tmp_path, capsys):
    from onebitmerge import cli
    assert cli.main(["pack", "show", str(tmp_path / "my.pack")]) == 0
    assert "chat brings its own tokenizer, template, eos" in capsys.readouterr().out
    assert cli.main(["pack", "show", str(tmp_path / "my.pack"), "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {r["expert"]: r["text"] for r in rows if "expert" in r} == {"chat": "tokenizer, template, eos", "math": ""}
