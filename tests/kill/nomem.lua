-- Out of memory, seen from Lua: allocations of the library fail one after the other, and what comes is nil, a message and
-- "NOMEM", an error that says so, or the result where the memory was not needed; objects stay usable.
--   LD_PRELOAD=nomem.so lua5.4 tests/kill/nomem.lua [--short]
local obm = require "onebitmerge"
local models = debug.getinfo(1, "S").source:match("^@(.*)tests/kill/") .. "examples/models/"
local folder = os.tmpname()
os.remove(folder)
assert(os.execute("mkdir '" .. folder .. "'"))

local function check(name, at, ok, value, message, code)
  local text = tostring(ok and message or value)
  if ok and value ~= nil then return 0 end
  assert(code == "NOMEM" or text:find("memory"), name .. " at " .. at .. ": " .. text)
  return 1
end

local experts = { math = models .. "math", code = models .. "code" }
local pack = assert(obm.compress(models .. "base", experts, { out = folder .. "/p.pack" }))
local model = assert(obm.model(folder .. "/p.pack"))
local function streamed()
  local text = ""
  for piece in model:stream("Hello", { max_tokens = 3, route = "code" }) do text = text .. piece end
  return text
end
local function routed()
  return model:generate("Hello", { max_tokens = 2, router = function() return { math = 0.5, code = 0.5 } end })
end
local calls = {
  { "open", function() return obm.model(folder .. "/p.pack") end },
  { "generate", function() return model:generate({ "Hello", "17 plus 5" }, { max_tokens = 3, route = "math" }) end },
  { "router", routed },
  { "stream", streamed },
  { "tensors", function() return pack:tensors("math") end },
  { "embed", function() return model:embed({ "Hello" }) end },
  { "export", function() return pack:export("math", folder .. "/dense", { overwrite = true }) end },
}
local seed = os.time()
math.randomseed(seed)
print("seed " .. seed)
for _, c in ipairs(calls) do
  local name, call = c[1], c[2]
  assert(call(), name)
  assert(os.getenv("NOMEM_ARM:0") == "armed", "the shim is not preloaded")
  assert(call())
  local total, failed = tonumber(os.getenv("NOMEM_CALLS")), 0
  for _ = 1, arg[1] == "--short" and 8 or 60 do
    local at = math.random(total)
    os.getenv("NOMEM_ARM:" .. at)
    local results = table.pack(pcall(call))
    os.getenv("NOMEM_ARM:0")
    failed = failed + check(name, at, table.unpack(results, 1, 4))
  end
  assert(call())
  assert(failed > 0, name)
  print(("%s: of %d allocations, %d times NOMEM"):format(name, total, failed))
end
assert(pack:verify())
assert(os.execute("rm -r '" .. folder .. "'"))
