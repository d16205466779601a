-- Runs a user's router for the command line's --router FILE.lua.  FILE.lua returns function(request) -> task name, index
-- (from 1) or {task = weight}.  Frames on stdin and stdout: a line with the byte count, then the bytes.
local path = ...

local function read()
  local n = tonumber(io.read("l") or "")
  if not n then os.exit(0) end
  return io.read(n)
end

local function write(s)
  io.write(#s, "\n", s)
  io.flush()
end

-- What a router prints is for people: stdout belongs to the frames.
function print(...)
  for i = 1, select("#", ...) do io.stderr:write(i > 1 and "\t" or "", tostring((select(i, ...)))) end
  io.stderr:write("\n")
end

local function numbers(s)
  local t = {}
  for word in s:gmatch("%S+") do t[#t + 1] = tonumber(word) end
  return t
end

-- The built-in router's answer is asked for only when the user's function looks at it.
local ask = {}
function ask.builtin() write("builtin") return read() end
function ask.probabilities()
  write("probabilities")
  local t = {}
  for name, p in read():gmatch("(%S+) (%S+)\n") do t[name] = tonumber(p) end
  return t
end
local request_type = {
  __index = function(request, key)
    local value = ask[key] and ask[key]()
    rawset(request, key, value)
    return value
  end,
}

local function answer_text(answer)
  if type(answer) == "string" then return "name " .. answer end
  if math.type(answer) == "integer" then return "index " .. answer end
  if type(answer) == "table" then
    local parts = {}
    for name, weight in pairs(answer) do parts[#parts + 1] = string.format("%s %.17g\n", name, weight) end
    return "weights " .. table.concat(parts)
  end
  error("a router returns a task name, an index or a table of weights, found " .. type(answer), 0)
end

local ok, router = pcall(dofile, path)
if ok and type(router) ~= "function" then ok, router = false, path .. " must return a function (request)" end
if not ok then
  write("error " .. tostring(router))
  os.exit(1)
end
write("ready")

while true do
  local request = setmetatable({ text = read(), tokens = numbers(read()) }, request_type)
  function request.features(_, layer)
    write("features " .. (layer or 0))
    return numbers(read())
  end
  local done, result = pcall(function() return answer_text(router(request)) end)
  write(done and result or "error " .. tostring(result))
end
