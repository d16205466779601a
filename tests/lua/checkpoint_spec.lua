-- Checkpoints, tensors, task vectors, tokenizers and the module's functions.
local obm = require "onebitmerge"
local support = dofile(debug.getinfo(1, "S").source:match("^@(.*/)") .. "support.lua")

teardown(support.clean)

describe("module", function()
  it("tells what it runs on", function()
    local info = obm.info()
    assert.equal(obm.version, info.version)
    assert.is_true(info.threads >= 1 and info.memory_total > 0)
    assert.equal("string", type(info.isa))
  end)

  it("classes tensors by name", function()
    assert.equal("attention", obm.class_of("model.layers.0.self_attn.q_proj.weight"))
    assert.equal("norm", obm.class_of("model.norm.weight", 1))
  end)

  it("checks the number of threads", function()
    assert.is_true(obm.set_threads(1))
    assert.equal(1, obm.info().threads)
    assert.is_true(obm.set_threads(0))
    assert.error_matches(function() obm.set_threads(-1) end, "threads: expected 0 %(one per core%) to 4096, found %-1")
    assert.error_matches(function() obm.set_threads(1 << 40) end, "to 4096, found 1099511627776")
    assert.error_matches(function() obm.set_threads("many") end, "number expected")
  end)
end)

describe("checkpoint", function()
  local base = assert(obm.checkpoint(support.models .. "base"))

  it("is a mapping of names to tensors", function()
    local keys = base:keys()
    assert.equal(#base, #keys)
    local t = base["model.norm.weight"]
    assert.equal("BF16", t.dtype)
    assert.same({ base:config().hidden_size }, t.shape)
    assert.equal(2 * #t, t.nbytes)
    assert.equal(t.nbytes, #t:tostring())
    local all = t:totable()
    assert.equal(#t, #all)
    assert.equal(all[#all], t[#t])
    assert.is_nil(t[0])
    assert.is_nil(t[#t + 1])
    assert.is_nil(base["no.such"])
    assert.is_true(base:tied())
    assert.equal(support.models .. "base", base:path())
  end)

  it("says what 12 bits per weight would give", function()
    local name = "model.layers.0.mlp.up_proj.weight"
    local rows, cols = table.unpack(base[name].shape)
    local all = base:z12(name, 0)
    assert.equal(rows * cols, all.weights)
    assert.is_true(all.escapes < all.weights / 100 and all.fits)
    assert.equal(16 * cols, base:z12(name).weights)
    assert.equal(0, base:z12("model.norm.weight").weights)
    assert.error_matches(function() base:z12(name, -1) end, "rows: expected 0")
  end)

  it("reports failures as nil, message, code", function()
    local t, message, code = base:get("no.such")
    assert.is_nil(t)
    assert.equal("NOTFOUND", code)
    assert.truthy(message:find("no.such", 1, true))
    assert.equal("NOTFOUND", select(3, base:sha256("no.such")))
    assert.equal("NOTFOUND", select(3, base:z12("no.such")))
    assert.same({ "IO" }, { select(3, obm.checkpoint("/no/such")) })
    assert.equal("FORMAT", select(3, obm.checkpoint(support.write(support.folder() .. "/x.safetensors", "not one"))))
  end)

  it("raises on wrong use", function()
    assert.error_matches(function() obm.checkpoint() end, "string expected")
    assert.error_matches(function() obm.checkpoint("a\0b") end, "NUL")
    assert.error_matches(function() base.get({}, "x") end, "onebitmerge.checkpoint expected")
  end)

  it("hashes one tensor", function()
    assert.truthy(base:sha256("model.norm.weight"):match("^%x+$"))
    assert.equal(64, #base:sha256("model.norm.weight"))
  end)

  it("keeps tensors alive when it is closed", function()
    local t
    do
      local c <close> = assert(obm.checkpoint(support.models .. "base"))
      t = c["model.norm.weight"]
    end
    collectgarbage()
    assert.same(base["model.norm.weight"]:totable(), t:totable())
  end)

  it("cannot be used when it is closed", function()
    local c <const> = assert(obm.checkpoint(support.models .. "base"))
    getmetatable(c).__close(c)
    getmetatable(c).__close(c)
    assert.error_matches(function() c:keys() end, "closed")
    assert.equal("onebitmerge.checkpoint (closed)", tostring(c))
  end)

  it("reads every dtype", function()
    local path = support.safetensors(support.folder() .. "/t.safetensors", {
      { "f16", "F16", { 2 }, "\0\60\0\192" }, { "f64", "F64", { 1 }, ("<d"):pack(0.1) }, { "i64", "I64", { 1 }, ("<i8"):pack(-3) },
      { "u8", "U8", { 2 }, "\1\255" }, { "bool", "BOOL", { 2 }, "\1\0" }, { "none", "F32", { 0, 3 }, "" } })
    local c = assert(obm.checkpoint(path))
    assert.same({ 1.0, -2.0 }, c.f16:totable())
    assert.same({ 0.1 }, c.f64:totable())
    assert.same({ -3 }, c.i64:totable())
    assert.same({ 1, 255 }, c.u8:totable())
    assert.same({ true, false }, c.bool:totable())
    assert.same({}, c.none:totable())
    assert.equal("", c.none:tostring())
  end)
end)

describe("task vector", function()
  local vector = assert(obm.task_vector(support.models .. "base", support.models .. "math"))

  it("is expert - base", function()
    local name = "model.layers.0.mlp.up_proj.weight"
    local base, expert = assert(obm.checkpoint(support.models .. "base")), assert(obm.checkpoint(support.models .. "math"))
    local d, b, e = vector[name], base[name], expert[name]
    assert.equal("F32", d.dtype)
    assert.same(b.shape, d.shape)
    for i = 1, #d, 997 do assert.equal(("<f"):pack(e[i] - b[i]), ("<f"):pack(d[i])) end
    assert.is_nil(vector["no.such"])
    assert.equal("NOTFOUND", select(3, vector:get("no.such")))
    assert.equal(#vector, #vector:keys())
  end)

  it("has statistics", function()
    local calls = 0
    local stats = assert(vector:stats { progress = function() calls = calls + 1 end })
    assert.is_true(calls > 0)
    assert.is_true(stats.mlp.relative_norm > 0 and stats.mlp.relative_norm < 0.2)
    local one = assert(vector:tensor_stats("model.layers.0.mlp.up_proj.weight"))
    assert.equal(1, one.tensors)
    assert.equal("NOTFOUND", select(3, vector:tensor_stats("no.such")))
    local pair = assert(vector:compare(vector))
    assert.is_true(math.abs(pair.mlp.cosine - 1) < 1e-9)
    assert.equal(1, pair.mlp.sign_agreement)
  end)

  it("names what does not fit", function()
    local folder = support.folder()
    local a = support.safetensors(folder .. "/a.safetensors", { { "w", "F32", { 1, 2 }, support.f32 { 1, 2 } } })
    local b = support.safetensors(folder .. "/b.safetensors", { { "w", "F32", { 2, 1 }, support.f32 { 1, 2 } } })
    local v, message, code = obm.task_vector(a, b)
    assert.is_nil(v)
    assert.equal("SHAPE", code)
    assert.truthy(message:find("w", 1, true))
    local nan = support.safetensors(folder .. "/n.safetensors", { { "w", "F32", { 1, 2 }, support.f32 { 1, 0 / 0 } } })
    local d = assert(obm.task_vector(a, nan))
    assert.equal("VALUE", select(3, d:get("w")))
    assert.has_error(function() return d.w end)
  end)
end)

describe("tokenizer", function()
  local tokenizer = assert(obm.tokenizer(support.models .. "base"))

  it("goes there and back", function()
    local ids = assert(tokenizer:encode("What is 17 plus 5?"))
    assert.equal("What is 17 plus 5?", tokenizer:decode(ids, { skip_special = true }))
    local piece = assert(tokenizer:piece(ids[#ids]))
    assert.equal(ids[#ids], tokenizer:id(piece))
    assert.is_nil(tokenizer:piece(#tokenizer + 10))
    assert.is_nil(tokenizer:id("no such piece"))
    assert.has_error(function() tokenizer:decode({ #tokenizer + 10 }) end)
    local turn = { { role = "user", content = " a" } }
    assert.equal("chatml", tokenizer:template_name())
    assert.equal("<|user|>\n a<|end|>\n<|assistant|>\n", tokenizer:builtin_template(turn, { name = "phi3" }))
    assert.has_error(function() tokenizer:builtin_template(turn, { name = "alpaca" }) end,
      'no built-in chat template is called "alpaca" (llama2, mistral, llama3, llama3.1, chatml, qwen3, gemma, gemma3, phi3, phi4, '
      .. "phi4mini, granite, olmo2)")
    assert.error_matches(function() tokenizer:decode({ 1.5 }) end, "integers")
    assert.error_matches(function() tokenizer:encode("a", { spezial = true }) end, "unknown option spezial %(known: special%)")
    assert.equal("FORMAT", select(3, tokenizer:encode("\255")))
  end)

  it("renders ChatML", function()
    local messages = { { role = "user", content = "Hello" } }
    assert.equal("<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n", tokenizer:apply_template(messages))
    assert.equal("<|im_start|>user\nHello<|im_end|>\n", tokenizer:builtin_template(messages, { add_generation = false }))
    assert.error_matches(function() tokenizer:apply_template("Hello") end, "messages")
    assert.error_matches(function() tokenizer:apply_template({ { role = "user" } }) end, "content")
  end)
end)
