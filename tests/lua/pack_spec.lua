-- Packs: compress, change, account, routes, export.
local obm = require "onebitmerge"
local support = dofile(debug.getinfo(1, "S").source:match("^@(.*/)") .. "support.lua")

teardown(support.clean)

local function experts() return { chat = support.models .. "chat", math = support.models .. "math", code = support.models .. "code" } end

local function compress(options, given)
  options = options or {}
  options.out = options.out or support.folder() .. "/p.pack"
  return obm.compress(support.models .. "base", given or experts(), options)
end

local pack = assert(compress())

describe("compress", function()
  it("orders experts by name, a list keeps its order", function()
    assert.same({ "chat", "code", "math" }, pack:tasks())
    local list = assert(compress({}, { { name = "math", path = support.models .. "math" },
      { name = "chat", support.models .. "chat", policy = "mlp" } }))
    assert.same({ "math", "chat" }, list:tasks())
    assert.truthy(list:policy("chat"):find("mlp", 1, true))
    assert.equal(list:policy("chat"), list:policy(2))
  end)

  it("takes policies, scales, planes and maps", function()
    local p = assert(compress({}, { a = { support.models .. "math", policy = "attention", scale = "group:64", planes = 2,
      map = { { "*.q_proj.weight", "full" }, { "*_proj.weight", "1bit" } } } }))
    for _, t in ipairs(p:tensors("a")) do
      if t.name:find("q_proj", 1, true) then assert.equal("full", t.mode)
      elseif t.rows > 1 and t.mode == "1bit" then assert.equal(2, #t.planes) end
    end
  end)

  it("checks what it is given", function()
    assert.error_matches(function() obm.compress(support.models .. "base", experts()) end, "option out")
    assert.error_matches(function() compress({ over = true }) end, "unknown option over")
    assert.error_matches(function() compress({}, { a = { policy = "mlp" } }) end, "path is missing")
    assert.error_matches(function() compress({}, { a = { support.models .. "math", polcy = "mlp" } }) end, "no polcy")
    assert.error_matches(function() compress({}, { a = { support.models .. "math", policy = "none such" } }) end, "none such")
    assert.error_matches(function() compress({}, { a = { support.models .. "math", map = { ["*"] = "2bit" } } }) end, "unknown mode")
    assert.error_matches(function() compress({ profile = "best" }) end, "unknown profile")
    assert.error_matches(function() compress({}, { a = 7 }) end, "an expert is a path")
    local p, message, code = compress({}, { a = "/no/such" })
    assert.is_nil(p)
    assert.equal("IO", code)
    assert.truthy(message:find("/no/such", 1, true))
    message, code = select(2, compress { out = pack:path() })
    assert.equal("EXISTS", code)
    assert.truthy(message:find("; overwrite = true replaces it", 1, true))
    message, code = select(2, compress { out = support.models .. "base", overwrite = true })
    assert.equal("OCCUPIED", code)
    assert.truthy(message:find("is not a pack: it will not be replaced$"))
  end)

  it("plans in a dry run", function()
    local out = support.folder() .. "/dry.pack"
    local plan = assert(compress { out = out, dry_run = true })
    assert.is_true(plan.bytes_read > 0 and plan.tensors > 0)
    assert.is_false(support.exists(out .. "/pack.json"))
  end)

  it("takes a checkpoint as the base", function()
    local base = assert(obm.checkpoint(support.models .. "base"))
    assert.same({ "math" }, assert(obm.compress(base, { math = support.models .. "math" }, { out = support.folder() .. "/p" })):tasks())
  end)
end)

describe("pack", function()
  it("opens again and verifies", function()
    local again = assert(obm.pack(pack:path()))
    assert.is_true(again:verify())
    assert.same(pack:tasks(), again:tasks())
    assert.equal(support.models .. "base/../base", assert(obm.pack(pack:path(), support.models .. "base/../base")):base():path())
    assert.equal("IO", select(3, obm.pack("/no/such")))
    local none, message, code = obm.pack(pack:path(), support.models .. "math")
    assert.is_nil(none)
    assert.equal("MISMATCH", code)
    assert.truthy(message:find("weight", 1, true))
  end)

  it("accounts for its bytes", function()
    local bytes = pack:bytes("math")
    assert.is_true(bytes.mlp.bytes_pack * 8 < bytes.mlp.bytes_expert)
    assert.same(bytes, pack:bytes(3))
    assert.is_true(pack:base_bytes() > 0)
    assert.equal("NOTFOUND", select(3, pack:bytes("law")))
    assert.error_matches(function() pack:bytes(4) end, "task index 4 is outside 1..3")
    assert.truthy(tostring(pack):find("lambda 0.3", 1, true))
  end)

  it("says how its tensors run", function()
    local runs = {}
    for _, r in ipairs(assert(pack:runs())) do runs[r.name] = r end
    assert.same({ name = "model.layers.0.mlp.up_proj.weight", class = "mlp", planes = 3, hard = "planes", soft = "planes",
      hard_masks = 3, soft_masks = 3, overlays = 0 }, runs["model.layers.0.mlp.up_proj.weight"])
    assert.equal("base", runs["model.norm.weight"].hard)
  end)

  it("shows planes that decompress to alpha * sign", function()
    for _, t in ipairs(pack:tensors("math")) do
      if t.mode == "1bit" then
        local signs, scales = t.planes[1][1], t.planes[1][2]
        assert.equal(t.rows, signs.shape[1])
        assert.equal(t.rows, #scales)
        local base = pack:base()[t.name]
        assert(pack:set { lambda = 0 })
        local d = assert(pack:materialise("math", t.name))
        local sign = signs[1] & 1 == 1 and 1 or -1
        assert.equal(("<f"):pack(base[1] + sign * scales[1]), ("<f"):pack(d[1]))
        assert(pack:set { lambda = 0.3 })
        return
      end
    end
  end)

  it("changes settings on disk", function()
    local p = assert(compress())
    assert.is_true(p:set { lambda = 0.5, reading = "recomputed", profile = "paper", density = 0.2 })
    assert.same({ lambda = 0.5, reading = "recomputed", profile = "paper", density = 0.2 }, assert(obm.pack(p:path())):settings())
    assert.error_matches(function() p:set { lambda = -1 } end, "lambda")
    assert.error_matches(function() p:set { lambda = "0.5" } end, "expected number, found string")
    assert.error_matches(function() p:set { reading = "upwards" } end, "unknown reading")
    assert.error_matches(function() p:set { lamda = 1 } end, "unknown option lamda")
  end)

  it("adds and removes experts", function()
    local p = assert(compress({}, { math = support.models .. "math" }))
    assert.is_true(p:add("chat", { support.models .. "chat", policy = "mlp" }))
    assert.same({ "math", "chat" }, p:tasks())
    local _, again, exists = p:add("chat", support.models .. "chat")
    assert.equal("EXISTS", exists)
    assert.truthy(again:find("; overwrite = true replaces it", 1, true))
    assert.is_true(p:add("chat", support.models .. "chat", { overwrite = true }))
    local planes = p:tensors("math")
    local ok, message, code = p:remove("chat")
    assert.is_nil(ok)
    assert.equal("BUSY", code)
    assert.truthy(message:find("in use", 1, true))
    assert.is_true(#planes > 0)
    planes = nil   -- luacheck: ignore
    assert.is_true(p:remove("chat"))
    assert.equal("NOTFOUND", select(3, p:remove("chat")))
    assert.is_true(p:verify())
    local other = assert(obm.compress(support.models .. "base", { math = { support.models .. "math", policy = "mlp" } },
      { out = support.folder() .. "/other" }))
    assert.is_true(other:set { lambda = 0.5 })
    assert.is_true(p:adopt(other:path()))
    assert.equal("mlp, scale row, planes 1", p:policy("math"))
    assert.equal(0.5, p:settings().lambda)
    assert.is_true(p:verify())
    assert.equal("FORMAT", select(3, p:adopt(support.models .. "math")))
  end)

  it("finds damage", function()
    local p = assert(compress({}, { math = support.models .. "math" }))
    local name = support.read(p:path() .. "/pack.json"):match('"file":%s*"([^"]+)"')
    local path = p:path() .. "/" .. name
    local text = support.read(path)
    support.write(path .. ".new", text:sub(1, -2) .. string.char(text:byte(-1) ~ 1))
    os.rename(path .. ".new", path)
    local again = assert(obm.pack(p:path()))
    local ok, message, code = again:verify()
    assert.is_nil(ok)
    assert.equal("FORMAT", code)
    assert.truthy(message:find(name, 1, true))
  end)
end)

describe("routes", function()
  it("come in four forms", function()
    assert.same({ chat = 0.7, math = 0.3 }, pack:parse_route("chat=.7,math=.3"))
    assert.same({ chat = 0.7, math = 0.3 }, pack:parse_route { chat = 0.7, math = 0.3 })
    assert.same({ math = 1 }, pack:parse_route(3))
    assert.same({ code = 2.0 }, pack:parse_route { 0, 2, 0 })
    assert.same({}, pack:parse_route("base"))
    assert.equal("math", pack:format_route { math = 1 })
    assert.equal("base", pack:format_route {})
  end)

  it("are checked", function()
    local r, message, code = pack:parse_route("law")
    assert.is_nil(r)
    assert.equal("NOTFOUND", code)
    assert.truthy(message:find("chat", 1, true))
    assert.equal("NOTFOUND", select(3, pack:parse_route { law = 1 }))
    assert.error_matches(function() pack:parse_route(0) end, "outside 1..3")
    assert.error_matches(function() pack:parse_route { 1, 2 } end, "one weight per task: expected 3, found 2")
    assert.error_matches(function() pack:parse_route { math = "1" } end, "numbers as values")
    assert.error_matches(function() pack:parse_route(true) end, "a route is")
    assert.error_matches(function() pack:format_route { math = -1 } end, "math")
  end)

  it("materialise and export to the same tensors", function()
    local out = support.folder() .. "/dense"
    local report = assert(pack:export("math", out, { dtype = "f32" }))
    assert.is_true(report.changed > 0)
    assert.equal(0, report.lost)
    local dense = assert(obm.checkpoint(out))
    for _, name in ipairs { "model.layers.1.mlp.down_proj.weight", "model.norm.weight" } do
      assert.is_true(dense[name]:tostring() == assert(pack:materialise("math", name)):tostring())
    end
    assert.equal("EXISTS", select(3, pack:export("math", out)))
    assert.is_true(assert(pack:export("math", out, { dry_run = true, overwrite = true })).bytes_written > 0)
    assert.error_matches(function() pack:export("math", out .. "2", { dtype = "f12" }) end, "f12")
    assert.equal("NOTFOUND", select(3, pack:materialise("math", "no.such")))
  end)
end)

describe("shared vectors", function()
  local shared = assert(compress { shared = "tall", tall_lambda = 0.3, shared_dtype = "f32" })

  it("are one for all experts, with a mask each", function()
    local s = shared:shared()
    assert.same({ "tall", 0.3, 28 }, { s.method, s.lambda, s.tensors })
    assert.is_nil(pack:shared())
    local masks, values = 0, 0
    for _, t in ipairs(shared:tensors("math")) do
      if t.mode == "mask" then
        masks, values = masks + 1, values + t.rows * t.cols
        assert.equal(1, t.scaling)
        assert.same({ t.rows, t.bytes // t.rows }, t.mask.shape)
        assert.same({}, t.planes)
      end
    end
    assert.equal(28, masks)
    assert.equal(4 * values, s.bytes)
    assert.truthy(tostring(shared):find("shared by the masks of all experts (tall, lambda 0.3): 28 tensors", 1, true))
  end)

  it("give the sum of the task vectors where the mask is 1", function()
    local name = "model.layers.1.self_attn.q_proj.weight"
    local d, base = {}, assert(obm.checkpoint(support.models .. "base"))[name]:totable()
    for task, path in pairs(experts()) do d[task] = assert(obm.checkpoint(path))[name]:totable() end
    local have = assert(shared:materialise("math", name)):totable()
    local kept = 0
    for i = 1, #base, 37 do
      local mine = d.math[i] - base[i]
      local sum = d.chat[i] + d.code[i] + d.math[i] - 3 * base[i]
      local mask = math.abs(mine) > 0.3 * math.abs(sum - mine)
      kept = kept + (mask and 1 or 0)
      assert.near(base[i] + (mask and sum or 0), have[i], 1e-6)
    end
    assert.is_true(kept > 100)
  end)

  it("take no more experts, and let some go", function()
    local p = assert(compress { shared = "emr" })
    assert.equal("UNSUPPORTED", select(3, p:add("d", support.models .. "math")))
    assert.is_true(p:remove("chat") ~= nil)
    assert.same({ "code", "math" }, p:tasks())
    assert(p:verify())
  end)

  it("are refused for what they are not", function()
    assert.error_matches(function() compress { shared = "sum" } end, "tall or emr")
    local misspelt = { a = { support.models .. "math", map = { ["*q_proj*"] = "maks" } } }
    assert.error_matches(function() compress({}, misspelt) end, "known: 1bit, mask")
  end)
end)
