-- The shared vectors (tests/vectors), as the C and the Python tests read them.
local obm = require "onebitmerge"
local json = require "dkjson"
local support = dofile(debug.getinfo(1, "S").source:match("^@(.*/)") .. "support.lua")

teardown(support.clean)

local function numbers(words, from)
  local out = {}
  for i = from, #words do out[#out + 1] = support.number(words[i]) end
  return out
end

local halves
local function half_bits(v)   -- by a table of all finite halves: exact, and independent of the library
  if not halves then
    halves = {}
    for bits = 0, 0x7BFF do
      local e, m = bits >> 10, bits & 1023
      halves[e == 0 and m * 2.0 ^ -24 or (1024 + m) * 2.0 ^ (e - 25)] = bits
    end
  end
  return v < 0 and 0x8000 | halves[-v] or 1 / v < 0 and 0x8000 or halves[v]
end

local encoders = {
  f32 = function(v) return ("<f"):pack(v) end,
  bf16 = function(v) return ("<f"):pack(v):sub(3, 4) end,
  f16 = function(v) return ("<I2"):pack(half_bits(v)) end,
}

local function encoded(words, shape)
  local bytes = {}
  for i, v in ipairs(numbers(words, 3)) do bytes[i] = encoders[words[2]](v) end
  return { shape = shape, dtype = words[2], data = table.concat(bytes) }
end

-- A seed is 64 bits without a sign; Lua's integers wrap to the same bits.
local function unsigned(digits)
  local n = 0
  for digit in digits:gmatch("%d") do n = n * 10 + math.tointeger(tonumber(digit)) end
  return n
end

local function merge_case(lines)
  local c = { name = lines.name, models = {}, params = {} }
  for _, words in ipairs(lines) do
    local key = words[1]
    if key == "param" then
      local name, model, value = words[2], tonumber(words[3]), support.number(words[4])
      if model < 0 then c.params[name] = value
      else
        c.params[name] = c.params[name] or {}
        c.params[name][model + 1] = value
      end
    elseif key == "shape" then
      c.shape = {}
      for i = 2, #words do c.shape[#c.shape + 1] = math.tointeger(tonumber(words[i])) end
    elseif key == "base" then c.base = encoded(words, c.shape)
    elseif key == "model" then c.models[#c.models + 1] = encoded(words, c.shape)
    elseif key == "merged" then c.tolerance, c.expected = words[2], numbers(words, 3)
    else c[key] = words[2] end
  end
  return c
end

describe("merge.txt", function()
  for _, lines in ipairs(support.cases(support.vectors .. "merge.txt")) do
    it(lines.name, function()
      local c = merge_case(lines)
      local out = assert(obm.merge_tensors(c.method, c.models, c.base, c.params, { profile = c.profile, seed = unsigned(c.seed) }))
      assert.same(c.shape, out.shape)
      assert.equal(#c.expected, #out)
      for i, expected in ipairs(c.expected) do
        if c.tolerance == "exact" then assert.equal(expected, out[i])
        else assert.is_true(math.abs(expected - out[i]) <= support.number(c.tolerance)) end
      end
    end)
  end
end)

local function onebit_case(lines)
  local c = { name = lines.name, alpha = {}, sign = {} }
  for _, words in ipairs(lines) do
    local key = words[1]
    if key == "shape" then c.shape = { math.tointeger(tonumber(words[2])), math.tointeger(tonumber(words[3])) }
    elseif key == "base" or key == "expert" then c[key] = numbers(words, 2)
    elseif key == "alpha" then c.alpha[#c.alpha + 1] = numbers(words, 3)
    elseif key == "sign" then c.sign[#c.sign + 1] = words[3]:gsub("%x%x", function(h) return string.char(tonumber(h, 16)) end)
    elseif key == "error" then c.error, c.index = words[2], words[3]
    else c[key] = words[2] end
  end
  return c
end

local function onebit_compress(c, folder)
  local base = support.safetensors(folder .. "/base.safetensors", { { "w", "F32", c.shape, support.f32(c.base) } })
  local expert = support.safetensors(folder .. "/expert.safetensors", { { "w", "F32", c.shape, support.f32(c.expert) } })
  return obm.compress(base, { e = { expert, scale = c.scale, planes = math.tointeger(tonumber(c.planes)), map = { ["*"] = "1bit" } } },
    { out = folder .. "/pack" })
end

describe("onebit.txt", function()
  for _, lines in ipairs(support.cases(support.vectors .. "onebit.txt")) do
    it(lines.name, function()
      local c = onebit_case(lines)
      local pack, message, code = onebit_compress(c, support.folder())
      if c.error and support.f32(c.base) == support.f32(c.expert) then   -- equal bytes are stored as `same`, whatever they are
        return assert.equal("same", assert(pack, message):tensors("e")[1].mode)
      end
      if c.error then
        assert.is_nil(pack)
        assert.equal(c.error, code)
        assert.truthy(message:find("w", 1, true) and message:find(c.index, 1, true))
        return
      end
      local t = assert(pack, message):tensors("e")[1]
      if t.mode == "same" then return assert.equal("0", c.stored) end
      assert.equal(tonumber(c.stored), #t.planes)
      for p, plane in ipairs(t.planes) do
        assert.equal(support.f32(c.alpha[p]), plane[2]:tostring())
        assert.equal(c.sign[p], plane[1]:tostring())
      end
    end)
  end
end)

-- Lines of dynamic.txt to blocks: { kind = "family" | "merge", name =, lines... }.
local function blocks(path)
  local all, block = {}, nil
  for line in io.lines(path) do
    local words = {}
    for word in line:gmatch("%S+") do words[#words + 1] = word end
    if words[1] == "family" or words[1] == "merge" then
      block = { kind = words[1], name = words[2] }
      all[#all + 1] = block
    elseif block and words[1] and words[1] ~= "end" and words[1] ~= "#" then block[#block + 1] = words end
  end
  return all
end

local function family_pack(family)
  local folder, shapes, base, experts, own = support.folder(), {}, {}, {}, {}
  for i, words in ipairs(family) do
    if words[1] == "tensor" then
      local rows, cols = math.tointeger(tonumber(words[3])), math.tointeger(tonumber(words[4]))
      shapes[words[2]] = rows > 0 and { rows, cols } or { cols }
      base[#base + 1] = { words[2], "F32", shapes[words[2]], support.f32(numbers(family[i + 1], 2)) }
    elseif words[1] == "expert" then
      experts[#experts + 1] = { name = words[2], policy = words[3], scale = words[4], planes = math.tointeger(tonumber(words[5])),
        path = folder .. "/" .. words[2] .. ".safetensors" }
      own[#experts] = {}
    elseif words[1] == "own" then
      local tensors = own[#experts]
      tensors[#tensors + 1] = { words[2], "F32", shapes[words[2]], support.f32(numbers(words, 3)) }
    end
  end
  for i, e in ipairs(experts) do support.safetensors(e.path, own[i]) end
  return assert(obm.compress(support.safetensors(folder .. "/base.safetensors", base), experts, { out = folder .. "/pack" }))
end

describe("dynamic.txt", function()
  local families = {}
  for i, block in ipairs(blocks(support.vectors .. "dynamic.txt")) do
    if block.kind == "family" then families[block.name] = block
    else
      it(("%d %s"):format(i, block.name), function()
        local family = families[block.name]
        family.pack = family.pack or family_pack(family)
        local pack, route = family.pack, nil
        for _, words in ipairs(block) do
          if words[1] == "settings" then
            assert(pack:set { lambda = support.number(words[2]), reading = words[3], profile = words[4],
              density = support.number(words[5]) })
          elseif words[1] == "route" then route = numbers(words, 2)
          else
            assert.is_true(support.f32(numbers(words, 3)) == assert(pack:materialise(route, words[2])):tostring(), words[2])
          end
        end
      end)
    end
  end
end)

describe("tokenizers", function()
  for _, name in ipairs { "gpt2", "llama3", "smollm2", "qwen2" } do
    it(name, function()
      local tokenizer = assert(obm.tokenizer(support.vectors .. "tokenizers/" .. name .. ".json"))
      local n = 0
      for line in io.lines(support.vectors .. "tokenizers/" .. name .. ".jsonl") do
        local text, plain, full, back = table.unpack((json.decode(line)))
        assert.same(setmetatable(plain, nil), tokenizer:encode(text, { special = false }))
        assert.same(setmetatable(full, nil), tokenizer:encode(text))
        assert.equal(back, tokenizer:decode(full, { skip_special = true }))
        n = n + 1
      end
      assert.is_true(n >= 150)
    end)
  end
end)

describe("models", function()
  for _, name in ipairs { "llama-tied", "llama-untied-bias", "llama3-rope", "llama3-rope-v5", "mistral-full", "mistral-window" } do
    it(name, function()
      local model = assert(obm.model(support.vectors .. "models/" .. name))
      local expected = assert(obm.checkpoint(support.vectors .. "models/" .. name .. "-expected.safetensors"))
      local logits = assert(model:logits(expected.ids:totable()))
      assert.same(expected.logits.shape, logits.shape)
      local a, b = expected.logits:totable(), logits:totable()
      for i = 1, #a do assert(math.abs(a[i] - b[i]) <= 2e-4, i) end
    end)
  end
end)
