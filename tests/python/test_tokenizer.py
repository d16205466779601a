"""The byte-level tokenizer of the family, its template, and its pieces; tests/oracles compares with the tokenizers package."""

import json
import pathlib
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import onebitmerge as obm

MESSAGES = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "What is 1+1?\n"}, {"role": "assistant", "content": "2"},
            {"role": "user", "content": "é 🙂"}]


@pytest.fixture(scope="module")
def tok(models):
    return obm.Tokenizer(models / "base")


@pytest.fixture(scope="module")
def file(models):
    return json.loads((models / "base" / "tokenizer.json").read_text(encoding="utf-8"))


def byte_alphabet():
    """GPT-2's map of bytes to printable characters: its own character where there is one, else from U+0100 on."""
    own = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table, extra = {b: chr(b) for b in own}, 0
    for b in range(256):
        if b not in table:
            table[b] = chr(256 + extra)
            extra += 1
    return table


# Surrogates are no text; what would be taken for a special token of the family is.
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
BUSY = st.lists(st.sampled_from(["What ", "is", "  ", "\n", "\t", "\r\n", "17", "+", "é", "日本", "🙂", "a\u0301", "'ll", "x[::-1]", "\u00a0", " \n ", "0", "<|", "|>"]), max_size=25)


@given(TEXT)
@settings(max_examples=300, deadline=None)
def test_round_trip(tok, text):
    ids = tok.encode(text)
    assert tok.decode(ids) == text
    assert all(0 <= i < len(tok) for i in ids)


@given(BUSY.map("".join))
@settings(max_examples=200, deadline=None)
def test_round_trip_of_likely_text(tok, text):
    assert tok.decode(tok.encode(text)) == text


@given(TEXT)
@settings(max_examples=100, deadline=None)
def test_pieces_are_the_bytes(tok, text):
    """Joined pieces are the UTF-8 bytes in GPT-2's alphabet."""
    table = byte_alphabet()
    assert "".join(tok.piece(i) for i in tok.encode(text)) == "".join(table[b] for b in text.encode())


def merge_slowly(word, ranks, vocab):
    """BPE as published: join the adjacent pair of the lowest rank until none is left."""
    parts = list(word)
    while len(parts) > 1:
        pairs = [ranks.get((a, b), len(ranks)) for a, b in zip(parts, parts[1:])]
        best = min(pairs)
        if best == len(ranks):
            break
        at = pairs.index(best)
        parts[at:at + 2] = [parts[at] + parts[at + 1]]
    return [vocab[p] for p in parts]


@given(st.text("abcdefghijklmnopqrstuvwxyzé", min_size=1, max_size=30))
@settings(max_examples=200, deadline=None)
def test_bpe(tok, file, word):
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in file["model"]["merges"]]
    table = byte_alphabet()
    spelled = "".join(table[b] for b in word.encode())
    assert tok.encode(word) == merge_slowly(spelled, {m: i for i, m in enumerate(merges)}, file["model"]["vocab"])


def test_vocabulary(tok, file):
    assert len(tok) == 768
    for piece, i in file["model"]["vocab"].items():
        assert tok.id(piece) == i and tok.piece(i) == piece
    assert tok.piece(len(tok)) is None and tok.piece(-1) is None and tok.piece(1 << 40) is None
    assert tok.id("no such piece") is None
    assert repr(tok) == "Tokenizer(768 ids)"


def test_only_text_is_encoded(tok):
    for wrong in (3, b"x", None):
        with pytest.raises(TypeError, match="must be str, not"):
            tok.encode(wrong)


def test_special_tokens(tok, models):
    assert (tok.bos, tok.eos) == ("<|endoftext|>", "<|im_end|>")
    ids = tok.encode("a<|im_end|>b")
    assert ids == [*tok.encode("a"), tok.id("<|im_end|>"), *tok.encode("b")]
    assert tok.decode(ids) == "a<|im_end|>b" and tok.decode(ids, skip_special=True) == "ab"
    assert tok.encode("ab", special=False) == tok.encode("ab")   # this family's post-processor adds nothing
    assert obm.Tokenizer(models / "base" / "tokenizer.json").encode("hello") == tok.encode("hello")


def test_nul_and_empty(tok):
    assert tok.encode("") == [] and tok.decode([]) == ""
    assert tok.decode(tok.encode("a\0b")) == "a\0b"
    assert tok.decode(tok.encode("🙂")[:1]) == "\ufffd"


def test_refused(tok, tmp_path):
    with pytest.raises(obm.ArgumentError, match="768"):
        tok.decode([768])
    with pytest.raises(UnicodeEncodeError):
        tok.encode("\ud800")
    with pytest.raises(TypeError):
        tok.encode(3)
    with pytest.raises(OSError, match="tokenizer.json"):
        obm.Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{]")
    with pytest.raises(obm.FormatError, match="tokenizer.json"):
        obm.Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"type": "Unigram", "vocab": []}}))
    with pytest.raises(obm.Error, match="Unigram"):
        obm.Tokenizer(tmp_path)


# ---- the chat template ----

def chatml(messages, add_generation=True):
    text = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
    return text + ("<|im_start|>assistant\n" if add_generation else "")


def jinja(source, messages, add_generation, **values):
    """As transformers renders: sandboxed, trim_blocks, lstrip_blocks."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    return env.from_string(source).render(messages=messages, add_generation_prompt=add_generation, **values)


@pytest.mark.parametrize("add", [True, False])
@pytest.mark.parametrize("messages", [MESSAGES, MESSAGES[1:2]])
def test_template(tok, models, messages, add):
    source = json.loads((models / "base" / "tokenizer_config.json").read_text())["chat_template"]
    assert tok.template == source
    assert tok.apply_template(messages, add_generation=add) == chatml(messages, add) == jinja(source, messages, add)
    assert tok.builtin_template(messages, add) == chatml(messages, add)


def with_template(models, folder, template, **config):
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes((models / "base" / "tokenizer.json").read_bytes())
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template, **config}))
    return obm.Tokenizer(folder)


def test_another_template(models, tmp_path):
    source = """{% for m in messages %}
    {% if m.role == 'user' %}[{{ m.content | trim }}]{{ eos_token }}{% endif %}
{% endfor %}
{% if add_generation_prompt %}{{ bos_token }}>{% endif %}"""
    tok = with_template(models, tmp_path / "own", source, bos_token="<b>", eos_token={"content": "<e>"})
    assert tok.apply_template(MESSAGES) == jinja(source, MESSAGES, True, bos_token="<b>", eos_token="<e>")
    assert "[What is 1+1?]<e>" in tok.apply_template(MESSAGES)
    with pytest.raises(obm.UnsupportedError, match="template"):
        tok.builtin_template(MESSAGES)


TEMPLATES = sorted((pathlib.Path(__file__).resolve().parent.parent / "vectors" / "templates").glob("*.jinja"), key=lambda p: p.name)
NAMES = "llama2, mistral, llama3, llama3.1, chatml, qwen3, gemma, gemma3, phi3, phi4, phi4mini, granite, olmo2".split(", ")
CHATS = [
    [("user", " \u00a0Hi\x1c \n")],
    [("system", "  be brief\n"), ("user", "\tWhat?  ")],
    [("user", "a"), ("assistant", "  b \u3000"), ("user", "c"), ("assistant", "")],
    [("system", ""), ("user", "a"), ("assistant", "b"), ("user", " c ")],
    [("system", "s"), ("user", "a"), ("assistant", " b ")],
    [("system", "only")],
    [("assistant", "first")],
    [("user", "a"), ("user", "b")],
    [("user", "a"), ("assistant", "b"), ("assistant", "c")],
    [("system", "s"), ("assistant", "b")],
    [("system", "s"), ("system", "t"), ("user", "a")],
    [("user", "a"), ("assistant", "<think>\nwhy\n\n</think>\n\nso"), ("user", "b"), ("assistant", "\n<think>\n\nhm\n</think>\n\nc")],
    [("user", "a"), ("assistant", "x</think>\ny<think></think>z"), ("user", "<tool_response>1</tool_response>"), ("assistant", "<think>a<think>b</think>c")],
    [("user", "a"), ("assistant", "</think>\nb"), ("assistant", "<think>\n</think>c"), ("assistant", "\n\nd")],
]


@pytest.mark.parametrize("add", [True, False])
@pytest.mark.parametrize("path", TEMPLATES, ids=lambda p: p.stem)
def test_builtin_templates_are_the_models_own(models, tmp_path, path, add):
    import jinja2

    def refuse(message):
        raise jinja2.exceptions.TemplateError(message)

    source = path.read_text(encoding="utf-8")
    tok = with_template(models, tmp_path / "own", source, bos_token="<s>", eos_token="</s>")
    assert tok.template_name == max((n for n in NAMES if path.stem.startswith(n)), key=len)
    for chat in CHATS:
        messages = [{"role": role, "content": content} for role, content in chat]
        try:
            expected = jinja(source, messages, add, bos_token="<s>", eos_token="</s>", raise_exception=refuse)
        except jinja2.exceptions.TemplateError:
            expected = None
        # A second system message is passed over by some of the templates where roles must alternate; ours refuse it.
        if expected is None or (chat[1:] and chat[1][0] == "system" and path.stem.startswith(("llama2", "mistral", "gemma"))):
            with pytest.raises(obm.ArgumentError, match="chat template"):
                tok.builtin_template(messages, add)
        else:
            assert tok.builtin_template(messages, add) == expected, chat


def test_templates_that_are_almost_known(models, tmp_path):
    """One changed word, space or tag is another template; spaces inside of tags, quotes and comments are not."""
    source = next(p for p in TEMPLATES if p.stem == "llama3").read_text(encoding="utf-8")
    changes = {"<|eot_id|>": "<|eot|>", "| trim": "", "{% endfor %}": "{% endfor %} ", "\\n\\n": "\\n"}
    for k, (old, new) in enumerate(changes.items()):
        assert old in source
        tok = with_template(models, tmp_path / f"changed{k}", source.replace(old, new))
        assert tok.template_name is None
        with pytest.raises(obm.UnsupportedError, match=r"\(it has the marks of llama3\), give its name: " + ", ".join(NAMES)):
            tok.builtin_template(MESSAGES)
    same = "{# a comment #}" + source.replace("{% ", "{%  ").replace("'role'", '"role"')
    assert with_template(models, tmp_path / "same", same).template_name == "llama3"


def test_templates_by_name(tok):
    assert tok.template_name == "chatml"
    assert tok.builtin_template(MESSAGES, True, "chatml") == chatml(MESSAGES)
    assert tok.builtin_template(MESSAGES[1:2], name="phi3") == "<|user|>\nWhat is 1+1?\n<|end|>\n<|assistant|>\n"
    with pytest.raises(obm.ArgumentError, match="llama2, mistral, llama3"):
        tok.builtin_template(MESSAGES, name="alpaca")
    with pytest.raises(obm.ArgumentError, match="gemma has no system"):
        tok.builtin_template(MESSAGES, name="gemma")


@pytest.mark.parametrize("own, fits", [
    ("{{ '<|start_header_id|>' }}{{ 'Cutting Knowledge Date: ' + date }}", "llama3.1"), ("{{ '<start_of_turn>' + role }}", "gemma"),
    ("{{ '<start_of_turn>' + first_user_prefix }}", "gemma3"), ("{{ '<|im_start|>' + role + '<|im_sep|>' }}", "phi4"),
    ("{{ '<|im_start|>' + strip('<think>') + '<|im_end|>' }}", "chatml"), ("{{ '<|start_of_role|>' }}", "granite"),
    ("{{ '<|im_start|>' + strip('<think>') + enable_thinking + '<|im_end|>' }}", "qwen3"),
    ("{{ '<|' + message['role'] + '|>' + x + '<|end|>' }}", "phi4mini"), ("{{ '<|user|>\n' + x + '<|end|>' }}", "phi3"),
    ("{{ '<|assistant|>' + x + eos_token }}", "olmo2"), ("{{ '[INST] <<SYS>>' }}", "llama2"), ("{{ '[INST]' + x }}", "mistral")])
def test_unknown_templates_name_what_may_fit(models, tmp_path, own, fits):
    with pytest.raises(obm.UnsupportedError, match=rf"\(it has the marks of {re.escape(fits)}\), give its name"):
        with_template(models, tmp_path / "own", own).builtin_template(MESSAGES)
    with pytest.raises(obm.UnsupportedError, match="if one of them fits, give its name"):
        with_template(models, tmp_path / "other", "{{ messages }}").builtin_template(MESSAGES)


@pytest.mark.parametrize("name", ["chatml", "phi3", "llama3.1", "gemma3"])
def test_generating_with_a_template_of_that_name(models, name):
    model = obm.Model(models / "base")
    turn = [{"role": "user", "content": "What is 1+1?"}]
    ids = model.tokenizer.encode(model.tokenizer.builtin_template(turn, name=name), special=False)
    expected = model.generate({"ids": ids}, max_tokens=6)
    for prompt, chat in (("What is 1+1?", True), (turn, False)):
        got = model.generate(prompt, chat=chat, template=name, max_tokens=6)
        assert got.ids == expected.ids and got.prompt_tokens == len(ids)
        assert "".join(model.stream(prompt, chat=chat, template=name, max_tokens=6)) == got
    assert model.generate("a", template=name, max_tokens=2).ids == model.generate("a", max_tokens=2).ids   # no chat, no template
    with pytest.raises(obm.ArgumentError, match=r"no built-in chat template is called \"alpaca\" \(llama2, mistral"):
        model.generate("a", template="alpaca")


def test_templates_raise(models, tmp_path):
    import jinja2
    tok = with_template(models, tmp_path / "own", "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(jinja2.exceptions.TemplateError, match="alternate"):
        tok.apply_template(MESSAGES)


def test_templates_are_sandboxed(models, tmp_path):
    import jinja2
    tok = with_template(models, tmp_path / "own", "{{ messages.__class__.__mro__[1].__subclasses__() }}{{ messages.append(1) }}")
    with pytest.raises(jinja2.exceptions.SecurityError):
        tok.apply_template(MESSAGES)


def test_without_jinja2_the_builtin_one_is_used(tok, monkeypatch):
    import builtins
    real = builtins.__import__

    def without(name, *rest):
        if name.startswith("jinja2"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    assert tok.apply_template(MESSAGES) == chatml(MESSAGES)


@pytest.mark.parametrize("wrong", ["text", [{"role": "user"}], [3], [{"role": "user", "content": 3}]])
def test_messages_that_are_refused(tok, wrong):
    with pytest.raises(TypeError):
        tok.builtin_template(wrong)
