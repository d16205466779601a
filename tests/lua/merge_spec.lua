-- Static merges: recipes as tables and files, tensors, the method table.
local obm = require "onebitmerge"
local support = dofile(debug.getinfo(1, "S").source:match("^@(.*/)") .. "support.lua")

teardown(support.clean)

local function recipe()
  return { merge_method = "ties", base_model = support.models .. "base", dtype = "float32",
    models = { { model = support.models .. "chat", parameters = { weight = 0.5, density = 0.5 } },
      { model = support.models .. "math", parameters = { weight = 1, density = 1e-1 } } } }
end

local yaml = [[
merge_method: ties
base_model: base
dtype: float32
models:
  - model: chat
    parameters: {weight: 0.5, density: 0.5}
  - model: math
    parameters: {weight: 1, density: 0.1}
]]

describe("merge", function()
  it("gives the same folder from a table and from a file", function()
    local folder = support.folder()
    os.execute(("cp -r '%s'* '%s'"):format(support.models, folder))
    local plan = assert(obm.merge(recipe(), folder .. "/a"))
    assert.is_true(plan.tensors > 0)
    assert(obm.merge(support.write(folder .. "/recipe.yml", yaml), folder .. "/b"))
    local a, b = assert(obm.checkpoint(folder .. "/a")), assert(obm.checkpoint(folder .. "/b"))
    assert.same(a:keys(), b:keys())
    for _, name in ipairs(a:keys()) do assert.equal(a:sha256(name), b:sha256(name)) end
    assert.equal("EXISTS", select(3, obm.merge(recipe(), folder .. "/a")))
    assert.truthy(obm.merge(recipe(), folder .. "/a", { overwrite = true, memory = 64 << 20 }))
    local dry = assert(obm.merge(recipe(), folder .. "/c", { dry_run = true }))
    assert.equal(plan.bytes_read, dry.bytes_read)
    assert.equal(1, #dry.documents)
    assert.equal(folder .. "/c", dry.documents[1].output)
    assert.equal("model.safetensors", dry.documents[1].files[1].file)
    assert.is_true(dry.documents[1].files[1].bytes > dry.bytes_written)
    assert.is_false(dry.documents[1].files[1].there)
    assert.is_false(support.exists(folder .. "/c/config.json"))
    assert.truthy(obm.model(folder .. "/a"):generate("What is 17 plus 5?", { max_tokens = 2 }))
  end)

  it("takes experts of a pack, on the pack's base or the recipe's", function()
    local folder = support.folder()
    assert(obm.compress(support.models .. "base", { chat = support.models .. "chat" }, { out = folder .. "/my.pack" }))
    local own = { merge_method = "passthrough", models = { { model = folder .. "/my.pack:chat" } } }
    assert(obm.merge(own, folder .. "/a"))
    local pack = assert(obm.pack(folder .. "/my.pack"))
    assert(pack:export("chat", folder .. "/b"))
    local a, b = assert(obm.checkpoint(folder .. "/a")), assert(obm.checkpoint(folder .. "/b"))
    for _, name in ipairs(a:keys()) do assert.equal(b:sha256(name), a:sha256(name)) end
    local vector = assert(obm.task_vector(support.models .. "base", folder .. "/my.pack:chat"))
    assert.equal(0, vector:tensor_stats("model.layers.0.mlp.up_proj.weight").onebit_error_row)
    local _, message, code = obm.checkpoint(folder .. "/my.pack:gone")
    assert.matches('my.pack has no expert "gone": it has chat', message, 1, true)
    assert.equal("NOTFOUND", code)
    own.merge_method, own.base_model = "task_arithmetic", support.models .. "math"
    own.models[1].parameters = { weight = 1 }
    _, message, code = obm.merge(own, folder .. "/c")
    assert.matches("math is not the base that pack .*my.pack was made from: tensor", message)
    assert.equal("MISMATCH", code)
  end)

  it("takes slices, a tokenizer block and a chat template as a table; the result runs", function()
    local folder = support.folder()
    local base, chat = support.models .. "base", support.models .. "chat"
    assert(obm.merge({ merge_method = "passthrough", base_model = base, chat_template = "chatml", slices = {
      { sources = { { model = base, layer_range = { 0, 2 } } } },
      { sources = { { model = chat, layer_range = { 1, 2 }, parameters = { scale = 0.5 } } } } },
      tokenizer = { source = "union", pad_to_multiple_of = 64, tokens = { ["<new>"] = { source = { kind = "zero" } } } },
    }, folder .. "/a"))
    local a, b = assert(obm.checkpoint(folder .. "/a")), assert(obm.checkpoint(chat))
    local last, norm = a:get("model.layers.2.input_layernorm.weight"), b:get("model.layers.1.input_layernorm.weight")
    assert.equal(0.5 * norm[1], last[1])
    assert.equal(0, a:get("model.embed_tokens.weight").shape[1] % 64)
    assert.truthy(obm.model(folder .. "/a"):generate("What is 17 plus 5?", { max_tokens = 2 }))
    local none, reason, code = obm.merge({ merge_method = "passthrough",
      slices = { { sources = { { model = base, layer_range = { 0, 200 } } } } } }, folder .. "/b")
    assert.is_nil(none)
    assert.equal("ARG", code)
    assert.matches("slices%[0%]%.sources%[0%]: layer_range", reason)
  end)

  it("resumes what was stopped", function()
    local folder = support.folder()
    local stop = function(_, done) if done >= 3000000 then error("enough", 0) end end
    assert.error_matches(function()
      obm.merge(recipe(), folder .. "/a", { shard_bytes = 1000000, resume = true, progress = stop })
    end, "enough")
    assert.is_true(support.exists(folder .. "/a/onebitmerge-unfinished.json"))
    local plan, reason, code = obm.merge(recipe(), folder .. "/a", { shard_bytes = 2000000, resume = true })
    assert.is_nil(plan)
    assert.equal("MISMATCH", code)
    assert.truthy(reason:find('shard size differs, "1000000" then, "2000000" now', 1, true))
    assert(obm.merge(recipe(), folder .. "/a", { shard_bytes = 1000000, resume = true }))
    assert(obm.merge(recipe(), folder .. "/b", { shard_bytes = 1000000 }))
    assert.truthy(os.execute(("diff -r '%s/a' '%s/b'"):format(folder, folder)))
  end)

  it("says of what is finished that it is, and of what is damaged which file", function()
    local folder = support.folder()
    local out, options = folder .. "/a", { shard_bytes = 1000000, resume = true }
    local program = ([[local recipe = { merge_method = "linear", models = { { model = "%schat", parameters = { weight = 1 } } } }
      print(assert(require("onebitmerge").merge(recipe, "%s/b", { resume = true })).tensors)]]):format(support.models, folder)
    assert.equal("38\n", support.child(program))
    assert.equal(("Lua warning: onebitmerge: %s/b: this merge is finished already (size and checksum of every file verified); " ..
      "nothing was written\n38\n"):format(folder), support.child(program))
    assert(obm.merge(recipe(), out, options))
    local shard = out .. "/model-00001-of-00006.safetensors"
    local bytes = support.read(shard)
    assert(obm.merge(recipe(), out, options))
    support.write(shard, bytes:sub(1, -2) .. string.char(bytes:byte(-1) ~ 1))
    local plan, reason, code = obm.merge(recipe(), out, options)
    assert.is_nil(plan)
    assert.equal("EXISTS", code)
    assert.matches("model%-00001%-of%-00006.safetensors is damaged: it is not what the finished merge wrote", reason)
  end)

  it("equals merge_tensors on a tensor", function()
    local folder = support.folder()
    assert(obm.merge(recipe(), folder .. "/a"))
    local name = "model.layers.0.mlp.up_proj.weight"
    local function wide(folder_name)   -- dtype float32 in the recipe
      local t = obm.checkpoint(support.models .. folder_name)[name]
      return { shape = t.shape, data = t:totable() }
    end
    local out = assert(obm.merge_tensors("ties", { wide "chat", wide "math" }, wide "base",
      { weight = { 0.5, 1 }, density = { 0.5, 0.1 } }))
    assert.is_true(obm.checkpoint(folder .. "/a")[name]:tostring() == out:tostring())
  end)

  it("refuses in a dry run what a run refuses", function()
    local folder = support.folder()
    assert(obm.merge(recipe(), folder .. "/a"))
    for _, dry_run in ipairs { true, false } do
      local _, message, code = obm.merge(recipe(), folder .. "/a", { dry_run = dry_run })
      assert.equal("EXISTS", code)
      assert.matches("overwrite = true replaces it", message, 1, true)
      _, message, code = obm.merge(recipe(), support.models .. "math", { dry_run = dry_run, overwrite = true })
      assert.equal("ARG", code)
      assert.matches("is an input of the merge", message, 1, true)
    end
    assert(obm.merge(recipe(), folder .. "/a", { dry_run = true, overwrite = true }))
  end)

  it("checks recipes", function()
    local r = recipe()
    r.merge_metod = "ties"
    local plan, reason, name = obm.merge(r, support.folder() .. "/a")
    assert.is_nil(plan)
    assert.equal("ARG", name)
    assert.truthy(reason:find("merge_metod", 1, true) and reason:find("did you mean \"merge_method\"", 1, true))
    local missing, text, code = obm.merge("/no/such.yml", support.folder() .. "/a")
    assert.is_nil(missing)
    assert.equal("IO", code)
    assert.truthy(text:find("/no/such.yml", 1, true))
  end)

  it("returns what is wrong with a recipe and raises what is wrong with a call", function()
    local folder = support.folder()
    local out = folder .. "/out"
    local function changed(key, value)
      local r = recipe()
      r[key] = value
      return r
    end
    local function file(text) return support.write(("%s/%d.yml"):format(folder, #text), text) end
    local light = recipe()
    light.models[1].parameters.weight = "heavy"
    local idle = { merge_method = "linear", models = { { model = support.models .. "chat", parameters = { weight = 0 } } } }
    local unlike = recipe()
    unlike.models[2].parameters.density = 2
    for i, case in ipairs {
      { { models = { "a", x = 1 } }, "ARG", "a list has the key x as well" },   -- the text
      { { [2] = 1 }, "ARG", "key 2 is not a string" },
      { { a = print }, "ARG", "cannot be written" },
      { { a = 0 / 0 }, "ARG", "cannot be written" },
      { file "merge_method: [ties", "FORMAT", "line" },
      { file "[1, 2]", "FORMAT", "expected a mapping" },
      { file "models: []", "ARG", '"merge_method" is missing' },
      { light, "ARG", "expected a number" },                                    -- the plan
      { unlike, "ARG", "density: expected a number in" },
      { changed("dtype", "float31"), "ARG", 'no dtype "float31"' },
      { changed("merge_method", "tise"), "ARG", 'did you mean "ties"' },
      { changed("base_model", folder .. "/gone"), "IO", "gone" },
      { idle, "ARG", "weights sum to 0" },
    } do
      local none, reason, code = obm.merge(case[1], out)
      assert.is_nil(none)
      assert.equal(case[2], code, i .. ": " .. reason)
      assert.truthy(reason:find(case[3], 1, true), reason)
    end
    local none, reason, code = obm.merge(recipe(), out, { memory = 1 })
    assert.is_nil(none)
    assert.equal("ARG", code)
    assert.matches("memory: this merge needs at least", reason)
    local nan = folder .. "/nan.safetensors"                                    -- the run
    support.safetensors(nan, { { "w", "F32", { 2 }, support.f32 { 0 / 0, 1 } } })
    none, reason, code = obm.merge({ merge_method = "linear", models = { { model = nan, parameters = { weight = 1 } } } }, out)
    assert.is_nil(none)
    assert.equal("VALUE", code, reason)
    for i, arguments in ipairs { { 7, out }, { nil, out }, { print, out }, { recipe(), {} }, { recipe(), nil }, { recipe(), out, 7 },
      { recipe(), out, { sed = 1 } }, { recipe(), out, { seed = "x" } }, { recipe(), out, { overwrite = 1 } },
      { recipe(), out, { progress = 5 } } } do
      assert.is_false(pcall(obm.merge, table.unpack(arguments, 1, 3)), i)
    end
    assert.error_matches(function() obm.merge(7, out) end, "bad argument #1 to 'merge' %(table or path expected, got number%)")
    assert.error_matches(function() obm.merge(recipe(), "out", { sed = 1 }) end, 'unknown option sed %(known: .*%), did you mean "seed"%?$')
    assert.error_matches(function() obm.merge(recipe(), "out", { colour = 1 }) end, "unknown option colour %(known: [%w_ ]+%)$")
    assert.is_false(support.exists(out .. "/config.json"))
  end)
end)

describe("merge_tensors", function()
  local a, b = { shape = { 2, 2 }, data = { 1, 2, 3, 4 } }, { shape = { 2, 2 }, dtype = "F32", data = support.f32 { 3, 2, 1, 0 } }

  it("takes tables of numbers and raw bytes", function()
    local out = assert(obm.merge_tensors("linear", { a, b }, nil, { weight = { 1, 1 } }))
    assert.same({ 2.0, 2.0, 2.0, 2.0 }, out:totable())
    assert.same({ 2, 2 }, out.shape)
    assert.equal("Tensor(F32, shape={2, 2})", tostring(out))
  end)

  it("checks what it is given", function()
    assert.equal("NOTFOUND", select(3, obm.merge_tensors("linaer", { a, b })))
    assert.equal("SHAPE", select(3, obm.merge_tensors("linear", { a, { shape = { 4 }, data = { 1, 2, 3, 4 } } }, nil, { weight = 1 })))
    assert.error_matches(function() obm.merge_tensors("linear", { { shape = { 3 }, data = { 1 } } }) end, "has 1 numbers, its shape 3")
    assert.error_matches(function() obm.merge_tensors("linear", { { shape = { 3 }, data = "abc" } }) end, "has 3 bytes")
    assert.error_matches(function() obm.merge_tensors("linear", { { data = "abc" } }) end, "missing: shape")
    assert.error_matches(function() obm.merge_tensors("linear", { { shape = { 1 }, dtype = "F33", data = "abc" } }) end, "unknown dtype")
    assert.error_matches(function() obm.merge_tensors("linear", { { shape = { -1 }, data = "" } }) end, "negative")
    assert.error_matches(function() obm.merge_tensors("linear", { 7 }) end, "expected a tensor")
    assert.error_matches(function() obm.merge_tensors("linear", {}) end, "no models")
  end)

  it("has a documented method table", function()
    local names = {}
    for _, method in ipairs(obm.methods()) do
      names[method.name] = true
      assert.is_true(#method.doc > 0 and #method.source > 0)
      for _, p in ipairs(method.params) do assert.is_true(#p.name > 0 and p.min <= p.max) end
    end
    for _, name in ipairs { "linear", "task_arithmetic", "ties", "dare_linear", "dare_ties" } do assert.is_true(names[name]) end
    assert.same(obm.methods(), obm:methods())   -- arguments change nothing
    assert.same(obm.methods(), obm.methods(5))
    assert.is_nil(obm[1])
  end)
end)
