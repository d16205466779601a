-- The collector may run anywhere and in any mode; nothing that is in use may go, nothing may be freed twice.
local obm = require "onebitmerge"
local support = dofile(debug.getinfo(1, "S").source:match("^@(.*/)") .. "support.lua")

teardown(support.clean)

local function work()
  local path = support.folder() .. "/p.pack"
  local pack = assert(obm.compress(support.models .. "base",
    { math = { support.models .. "math", planes = 2 }, code = support.models .. "code" },
    { out = path, progress = function() collectgarbage() end }))
  local tensors = pack:tensors("math")
  local base = pack:base()
  pack = nil   -- luacheck: ignore
  collectgarbage()
  for _, t in ipairs(tensors) do
    if t.planes[1] then assert.is_true(t.planes[1][2][1] > 0) end
  end
  assert.is_true(#base["model.norm.weight"]:totable() > 0)
  local tokenizer = obm.model(path):tokenizer()
  collectgarbage()
  assert.equal("abc", tokenizer:decode(tokenizer:encode("abc", { special = false })))
  local prompts = { "17 plus 5", "def f(x):", { { role = "user", content = "Hello" } } }
  local list = assert(obm.model(path):generate(prompts, { max_tokens = 3, batch = 2,
    progress = function() collectgarbage() end, stop = { "a" .. "b", "c" .. "d" },
    router = function(request)
      collectgarbage()
      local features = request:features()
      collectgarbage()
      return #features > 0 and request.text:find("def") and "code" or { math = 0.5, code = 0.5 }
    end }))
  assert.same({ code = 1.0 }, list[2].route)
  for piece in obm.model(path):stream("17 plus 5", { max_tokens = 4, route = "math" }) do
    collectgarbage()
    assert.equal("string", type(piece))
  end
  local vector = assert(obm.task_vector(support.models .. "base", support.models .. "math"))
  collectgarbage()
  assert.is_true(#vector["model.norm.weight"] > 0)
end

-- A full collection every few instructions, in hooks.
local function tortured(body)
  debug.sethook(function() collectgarbage() end, "", 50)
  local ok, message = pcall(body)
  debug.sethook()
  assert(ok, message)
end

describe("collector", function()
  it("incremental", function()
    tortured(work)
  end)

  it("generational", function()
    collectgarbage("generational")
    local ok, message = pcall(tortured, work)
    collectgarbage("incremental")
    assert(ok, message)
  end)

  it("frees what is let go", function()
    local function memory() collectgarbage() collectgarbage() return collectgarbage("count") end
    for _ = 1, 2 do work() end
    local before = memory()
    for _ = 1, 4 do work() end
    assert.is_true(memory() - before < 200)
  end)

  it("a program may end with everything open", function()
    local code = ([[
      local obm = require "onebitmerge"
      local m = obm.model(%q)
      s = m:stream("17 plus 5", { max_tokens = 9 })
      s()
      t = m:tokenizer()
      c = obm.checkpoint(%q)
      n = c["model.norm.weight"]
    ]]):format(support.models .. "math", support.models .. "base")
    local script = support.write(support.folder() .. "/end.lua", code)
    assert.is_true(os.execute(("%s '%s'"):format(os.getenv("LUA") or "lua5.4", script)))
  end)
end)
