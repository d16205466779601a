-- Merge methods written in Lua, and the arithmetic of tensors, against plain Lua.
local obm = require "onebitmerge"
local support = dofile(debug.getinfo(1, "S").source:match("^@(.*/)") .. "support.lua")

teardown(support.clean)

local function f32(x) return (string.unpack("<f", string.pack("<f", x))) end

local function vector(data, dtype) return { shape = { #data }, dtype = dtype or "F32", data = data } end

local function recipe(method)
  local models = {}
  for i, name in ipairs { "chat", "math" } do
    models[i] = { model = support.models .. name, parameters = { weight = i / 2 } }
  end
  return { merge_method = method, base_model = support.models .. "base", dtype = "float32", models = models }
end

-- The task vector that is larger, times its weight.
local function larger(tile)
  local a, b, weight = tile.vectors[1], tile.vectors[2], tile.parameters.weight
  return b:abs():le(a:abs()):where(a * weight[1], b * weight[2]) * tile.parameters.gain
end
local parameters = { weight = { default = 1, scope = "model" }, gain = 0.5 }

describe("tensor", function()
  it("computes element by element", function()
    local base = obm.merge_tensors("linear", { vector { 1, -2, 0, 4.5 } }, nil, { weight = 1 })
    local other = vector { 3, 0.5, 0, -1 }
    local function is(want, got)
      assert.equal("F32", got.dtype)
      assert.same({ 4 }, got.shape)
      for i, x in ipairs(want) do assert.equal(f32(x), got[i]) end
    end
    is({ 4, -1.5, 0, 3.5 }, base + other)
    is({ 0, -3, -1, 3.5 }, base - 1)
    is({ 1, 4, 2, -2.5 }, 2 - base)
    is({ 3, -1, 0, -4.5 }, base * other)
    is({ 0.1, -0.2, 0, 0.45 }, base / 10)
    is({ -1, 2, 0, -4.5 }, -base)
    is({ 1, 2, 0, 4.5 }, base:abs())
    is({ 1, -1, 0, 1 }, base:sign())
    is({ 1, -2, 0, -1 }, base:min(other))
    is({ 1, 0, 0, 4.5 }, base:max(0))
    is({ 1, 1, 0, 0 }, base:lt(other))
    is({ 1, 1, 1, 0 }, base:le(other))
    is({ 0, 0, 1, 0 }, base:eq(other))
    is({ 1, 0.5, 0, 4.5 }, base:le(-1):where(other, base))
    is({ 1, 9, 0, 4.5 }, base:le(-1):where(9, base))
    is({ 1, math.sqrt(2), 0, math.sqrt(4.5) }, base:abs():sqrt())
    for i = 1, 4 do
      assert.is_true(math.abs(base:exp()[i] - math.exp(base[i])) < 1e-5 * math.exp(base[i]))
      local tanh = (math.exp(2 * base[i]) - 1) / (math.exp(2 * base[i]) + 1)
      assert.is_true(math.abs(base:tanh()[i] - tanh) < 1e-6)
    end
    assert.is_true(math.abs(base:max(0.5):log()[4] - math.log(4.5)) < 1e-6)
    assert.equal(1 * 3 - 2 * 0.5 - 4.5, base:dot(other))
    assert.equal(3.5, base:dot(1))
    assert.error_matches(function() return base + vector { 1, 2 } end, "add: expected equal shapes, found %(4%) and %(2%)")
    assert.error_matches(function() return base + "x" end, "expected a tensor")
    assert.error_matches(function() return base:where(1) end, "expected a tensor")
  end)
end)

describe("a method in Lua", function()
  it("merges a folder", function()
    local folder = support.folder()
    obm.register_method("larger", larger, { parameters = parameters, doc = "the larger wins" })
    local mine = recipe "larger"
    mine.parameters = { gain = { { filter = "mlp", value = 2 }, { value = 1 } } }
    assert(obm.merge(mine, folder .. "/a"))
    local got, base = assert(obm.checkpoint(folder .. "/a")), assert(obm.checkpoint(support.models .. "base"))
    local chat, math_ = assert(obm.checkpoint(support.models .. "chat")), assert(obm.checkpoint(support.models .. "math"))
    for _, name in ipairs { "model.norm.weight", "model.layers.1.mlp.up_proj.weight" } do
      local gain = name:find "mlp" and 2 or 1
      local x, b, c, m = got[name]:totable(), base[name]:totable(), chat[name]:totable(), math_[name]:totable()
      for i = 1, #x do
        local dc, dm = f32(c[i] - b[i]), f32(m[i] - b[i])
        local d = math.abs(dm) <= math.abs(dc) and dc * 0.5 or dm * 1
        assert.equal(f32(b[i] + f32(f32(d) * gain)), x[i])
      end
    end
    assert(obm.merge(mine, folder .. "/b", { memory = 64 << 20 }))
    obm.set_threads(3)
    assert(obm.merge(mine, folder .. "/c"))
    obm.set_threads(0)
    local b, c = assert(obm.checkpoint(folder .. "/b")), assert(obm.checkpoint(folder .. "/c"))
    for _, name in ipairs(got:keys()) do
      assert.equal(got:sha256(name), b:sha256(name))
      assert.equal(got:sha256(name), c:sha256(name))
    end
    local methods = obm.methods()
    assert.equal("larger", methods[#methods].name)
    assert.equal("the larger wins", methods[#methods].doc)
    obm.register_method("larger", nil)
    assert.equal("ARG", select(3, obm.merge(mine, folder .. "/d")))
    assert.error_matches(function() obm.register_method("larger", nil) end, "no method")
  end)

  it("is a function in the recipe, an option, or a name", function()
    local folder = support.folder()
    local first = function(tile) return tile.vectors[1] * 0.5 end
    local plain = recipe(first)
    for _, model in ipairs(plain.models) do model.parameters = nil end
    assert(obm.merge(plain, folder .. "/a"))
    plain.merge_method = nil
    assert(obm.merge(plain, folder .. "/b", { method = first }))
    obm.register_method("first", first)
    plain.merge_method = "first"
    assert(obm.merge(plain, folder .. "/c"))
    obm.register_method("first", nil)
    for _, other in ipairs { "b", "c" } do
      assert.truthy(os.execute(("cmp -s '%s/a/model.safetensors' '%s/%s/model.safetensors'"):format(folder, folder, other)))
    end
  end)

  it("sees whole tensors or tiles, with base and parameters", function()
    local n, big = 262200, {}
    for i = 1, n do big[i] = i % 17 end
    local base = assert(obm.merge_tensors("linear", { vector(big) }, nil, { weight = 1 }))
    local tiles, kept = 0, nil
    local result = assert(obm.merge_tensors(function(tile)
      tiles = tiles + 1
      kept = tile.vectors[1]
      assert.equal((tiles - 1) * 262144 + 1, tile.begin)
      assert.same({ n }, tile.shape)
      assert.equal((tile.begin - 1 + 3) % 17, tile.base[3])
      return tile.vectors[1] + tile.begin * 0
    end, { base, base }, base))
    assert.equal(2, tiles)
    assert.equal(16, result[16])
    assert.error_matches(function() return kept[1] end, "closed")
    obm.register_method("mean", function(tile)
      assert.equal(1, tile.begin)
      assert.is_nil(tile.base)
      assert.is_true(tile.parameters.flag)
      return (tile.vectors[1] + tile.vectors[2]) / 2
    end, { scope = "tensor", base = false, parameters = { flag = true } })
    result = assert(obm.merge_tensors("mean", { base, base }))
    obm.register_method("mean", nil)
    assert.equal(n, #result)
    assert.equal(16, result[16])
  end)

  it("gives back what it raises", function()
    local folder, mark = support.folder(), {}
    local plain = recipe(function() error(mark) end)
    for _, model in ipairs(plain.models) do model.parameters = nil end
    local ok, raised = pcall(obm.merge, plain, folder .. "/a")
    assert.is_false(ok)
    assert.equal(mark, raised)
    assert.is_false(support.exists(folder .. "/a/config.json"))
  end)

  it("is told what is wrong with its answer", function()
    local x = vector { 1, 2, 3 }
    local function answer(fn) return obm.merge_tensors(fn, { x }, x) end
    local result, message, code = answer(function() return nil end)
    assert.is_nil(result)
    assert.equal("DTYPE", code)
    assert.equal("the tensor: the method custom gave nothing, expected a tensor of F32 and shape (3)", message)
    assert.equal("SHAPE", select(3, answer(function() return obm.merge_tensors("linear", { vector { 1 } }, nil, { weight = 1 }) end)))
    result, message, code = answer(function(tile) return tile.base / 0 end)
    assert.is_nil(result)
    assert.equal("VALUE", code)
    assert.equal("the tensor: the method custom gave NaN or Inf at index 0", message)
  end)

  it("is refused with a reason", function()
    local fn = function(tile) return tile.base end
    local function refused(message, ...)
      local arguments = table.pack(...)
      assert.error_matches(function() obm.register_method(table.unpack(arguments)) end, message)
    end
    refused("ties is a built%-in method", "ties", fn)
    refused("function expected", "m", 3)
    refused("expected element or tensor, found model", "m", fn, { scope = "model" })
    refused("unknown option parameter", "m", fn, { parameter = {} })
    refused("parameter x: unknown key defalt", "m", fn, { parameters = { x = { defalt = 1 } } })
    refused("expected a default in", "m", fn, { parameters = { x = { default = 2, max = 1 } } })
    assert.error_matches(function() obm.merge_tensors(fn, { vector { 1 } }) end, "needs a base")
  end)
end)
