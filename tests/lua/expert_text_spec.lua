-- Experts with a tokenizer, a chat template and eos ids of their own: stored in the pack, in use under their hard routes only.
local obm = require "onebitmerge"
local support = dofile(debug.getinfo(1, "S").source:match("^@(.*/)") .. "support.lua")

teardown(support.clean)

local function template(first)
  return "{% for m in messages %}" .. first ..
    "{{'<|im_start|>' + m['role'] + '\\\\n' + m['content'] + '<|im_end|>' + '\\\\n'}}{% endfor %}"
end
local own_template = template("{% if loop.first %}{{ '<|im_start|>system\\\\ndad<|im_end|>\\\\n' }}{% endif %}")

local function values(n, seed)
  local out = {}
  for i = 1, n do out[i] = math.sin(seed * 100 + i * i) end
  return support.f32(out)
end

local function ones(n)
  local out = {}
  for i = 1, n do out[i] = 1 end
  return support.f32(out)
end

-- One layer: hidden 8, 2 heads, 1 KV head of 4.
local function tensors(rows, seed)
  local list = { { "lm_head.weight", "F32", { rows, 8 }, values(rows * 8, seed) },
    { "model.embed_tokens.weight", "F32", { rows, 8 }, values(rows * 8, seed + 1) }, { "model.norm.weight", "F32", { 8 }, ones(8) } }
  for i, name in ipairs { "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj",
    "mlp.down_proj" } do
    local height = (i == 2 or i == 3) and 4 or 8
    list[#list + 1] = { ("model.layers.0.%s.weight"):format(name), "F32", { height, 8 }, values(height * 8, seed + 1 + i) }
  end
  for _, name in ipairs { "input_layernorm", "post_attention_layernorm" } do
    list[#list + 1] = { ("model.layers.0.%s.weight"):format(name), "F32", { 8 }, ones(8) }
  end
  return list
end

local function tokenizer(b, c, extra)
  local added = { '{"id":4,"content":"<e>","special":true}' }
  if extra then added[2] = '{"id":5,"content":"<t>","special":true}' end
  return ([[{"model":{"type":"BPE","vocab":{"a":0,"b":%d,"c":%d,"d":3},"merges":[]},"added_tokens":[%s],
    "pre_tokenizer":{"type":"ByteLevel","add_prefix_space":false},"decoder":{"type":"ByteLevel"}}]]):format(b, c, table.concat(added, ","))
end

local function folder(rows, seed, text, eos)
  local path = support.folder()
  support.safetensors(path .. "/model.safetensors", tensors(rows, seed))
  support.write(path .. "/config.json", ([[{"model_type":"llama","vocab_size":%d,"hidden_size":8,"intermediate_size":8,
    "num_hidden_layers":1,
    "num_attention_heads":2,"num_key_value_heads":1,"head_dim":4,"max_position_embeddings":64,"rms_norm_eps":1e-5,
    "tie_word_embeddings":false}]]):format(rows))
  support.write(path .. "/tokenizer.json", tokenizer(1, 2, rows == 6))
  support.write(path .. "/tokenizer_config.json", ('{"chat_template":"%s","eos_token":"<e>"}'):format(text))
  support.write(path .. "/generation_config.json", ('{"eos_token_id":%s}'):format(eos))
  return path
end

local base = folder(5, 1, template(""), "4")
local chat = folder(6, 20, own_template, "[4, 5]")
local maths = folder(5, 40, template(""), "[4]")

local function compress()
  return assert(obm.compress(base, { { name = "chat", path = chat }, { name = "math", path = maths } },
    { out = support.folder() .. "/p.pack" }))
end

local function count(path, ending)
  local n = 0
  for name in io.popen(("ls '%s'"):format(path)):lines() do
    if name:sub(-#ending) == ending then n = n + 1 end
  end
  return n
end

describe("an expert's own text", function()
  it("is stored where it differs", function()
    local pack = compress()
    assert.equal("tokenizer, template, eos", pack:text("chat"))
    assert.equal("", pack:text("math"))
    assert.equal("NOTFOUND", select(3, pack:text("law")))
    assert.truthy(tostring(pack):find("chat brings its own tokenizer, template, eos", 1, true))
    assert.is_nil(tostring(pack):find("math brings", 1, true))
    assert.equal(4, count(pack:path(), ".json"))
    assert.is_true(pack:remove("chat"))
    assert.equal(1, count(pack:path(), ".json"))
    assert.is_true(pack:add("again", chat))
    assert.equal(4, count(pack:path(), ".json"))
    assert.is_true(pack:verify())
  end)

  it("applies under its hard route", function()
    local model = assert(obm.model(compress()))
    local own, theirs = model:tokenizer_for("chat"), model:tokenizer()
    assert.equal(5, own:id("<t>"))
    assert.is_nil(theirs:id("<t>"))
    assert.same({ 0, 1, 5 }, own:encode("ab<t>"))
    for _, route in ipairs { "math", "base", { chat = 0.5 }, { chat = 1, math = 1 } } do
      assert.same({ 0, 1 }, model:tokenizer_for(route):encode("ab<t>"))
    end
    assert.same({ 0, 1 }, model:tokenizer_for():encode("ab<t>"))
    assert.equal("NOTFOUND", select(3, model:tokenizer_for("law")))
    local list = assert(model:generate({ "ab<t>", "ab<t>", "ab<t>" }, { route = { "chat", "math", { chat = 0.5 } }, max_tokens = 2 }))
    assert.same({ 3, 2, 2 }, { list[1].prompt_tokens, list[2].prompt_tokens, list[3].prompt_tokens })
    local by_text, info = model:generate("ab<t>", { route = "chat", max_tokens = 5, ignore_eos = true })
    assert.equal(by_text, own:decode(info.ids, { skip_special = true }))
    assert.equal(by_text, (model:generate({ 0, 1, 5 }, { route = "chat", max_tokens = 5, ignore_eos = true })))
    assert.same(model:score({ 0, 1, 5 }, { 2 }, { route = "chat" }), model:score("ab<t>", "c", { route = "chat" }))
    assert.same(model:score({ 0, 1 }, { 2 }, { route = "math" }), model:score("ab<t>", "c", { route = "math" }))
  end)

  it("renders its template", function()
    local model = assert(obm.model(compress()))
    local messages = { { role = "user", content = "ab" } }
    local rendered = assert(model:tokenizer_for("chat"):apply_template(messages))
    assert.truthy(rendered:find("^<|im_start|>system\ndad<|im_end|>"))
    local function tokens(prompt, route, chatted)
      return select(2, model:generate(prompt, { route = route, max_tokens = 1, chat = chatted })).prompt_tokens
    end
    assert.equal(#model:tokenizer_for("chat"):encode(rendered), tokens(messages, "chat"))
    assert.equal(#model:tokenizer():encode(assert(model:tokenizer():apply_template(messages))), tokens(messages, { chat = 0.5 }))
    assert.equal(tokens(messages, "chat"), tokens("ab", "chat", true))
    assert.is_true(tokens(messages, "chat") > tokens(messages, "math"))
  end)

  it("leaves what routers see to the base", function()
    local model = assert(obm.model(compress()))
    local seen
    local _, info = model:generate("ab<t>", { max_tokens = 1, router = function(request)
      seen = request.tokens
      return "chat"
    end })
    assert.same({ 0, 1 }, seen)
    assert.equal(3, info.prompt_tokens)
  end)

  it("stops at its eos", function()
    local model = assert(obm.model(compress()))
    local first = select(2, model:generate("ab", { route = "chat", max_tokens = 1, ignore_eos = true })).ids[1]
    local kept = support.read(chat .. "/generation_config.json")
    support.write(chat .. "/generation_config.json", ('{"eos_token_id":%d}'):format(first))
    local _, info = assert(obm.model(compress())):generate("ab", { route = "chat", max_tokens = 4 })
    support.write(chat .. "/generation_config.json", kept)
    assert.equal("stop", info.finish_reason)
    assert.same({ first }, info.ids)
  end)

  it("may not contradict the base's ids", function()
    local kept = support.read(chat .. "/tokenizer.json")
    support.write(chat .. "/tokenizer.json", tokenizer(2, 1, true))
    local pack, message, code = obm.compress(base, { chat = chat }, { out = support.folder() .. "/p" })
    support.write(chat .. "/tokenizer.json", kept)
    assert.is_nil(pack)
    assert.equal("MISMATCH", code)
    assert.truthy(message:find("expert chat: ", 1, true))
    assert.truthy(message:find([[gives id 1 the token "c", the base's is "b"]], 1, true))
  end)

  it("is verified, and packs without it open", function()
    local path = compress():path()
    local manifest = support.read(path .. "/pack.json")
    local name = manifest:match('"(tokenizer%-%x+%.json)"')
    local text = support.read(path .. "/" .. name)
    support.write(path .. "/" .. name, (text:gsub("<t>", "<u>")))
    local ok, message, code = assert(obm.pack(path)):verify()
    assert.is_nil(ok)
    assert.equal("FORMAT", code)
    assert.truthy(message:find(name, 1, true))
    support.write(path .. "/pack.json", (manifest:gsub('"text"', '"ignored"')))
    local old = assert(obm.pack(path))
    assert.equal("", old:text("chat"))
    assert.is_true(old:verify())
  end)

  it("is exported with its route", function()
    local pack, out = compress(), support.folder() .. "/out"
    for _, case in ipairs { { "chat", chat }, { { chat = 0.5 }, base }, { "math", base } } do
      assert(pack:export(case[1], out, { overwrite = true }))
      for _, name in ipairs { "tokenizer.json", "tokenizer_config.json", "generation_config.json" } do
        assert.equal(support.read(case[2] .. "/" .. name), support.read(out .. "/" .. name))
      end
    end
  end)
end)
