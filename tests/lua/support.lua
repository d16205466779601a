-- What the specs share: paths, fresh folders, safetensors files, the shared vectors' numbers.
local M = {}

M.root = debug.getinfo(1, "S").source:match("^@(.*)tests/lua/support%.lua$")
if M.root == "" then M.root = "./" end
M.models = M.root .. "examples/models/"
M.vectors = M.root .. "tests/vectors/"

local folders = {}

--- A fresh folder; every spec file ends with teardown(support.clean).
function M.folder()
  local pipe = assert(io.popen("mktemp -d"))
  local path = pipe:read("l")
  pipe:close()
  folders[#folders + 1] = path
  return path
end

function M.clean()
  for _, path in ipairs(folders) do os.execute(("rm -rf '%s'"):format(path)) end
  folders = {}
end

function M.write(path, text)
  local file = assert(io.open(path, "wb"))
  assert(file:write(text))
  file:close()
  return path
end

function M.read(path)
  local file = assert(io.open(path, "rb"))
  local text = file:read("a")
  file:close()
  return text
end

function M.exists(path)
  local file = io.open(path, "rb")
  if file then file:close() end
  return file ~= nil
end

function M.f32(numbers)
  local parts = {}
  for i, v in ipairs(numbers) do parts[i] = ("<f"):pack(v) end
  return table.concat(parts)
end

--- What a program writes, warnings too: they go to the stderr of the process.
function M.child(program)
  local path = M.write(os.tmpname(), 'warn("@on") ' .. program)
  local pipe = assert(io.popen(("%s '%s' 2>&1"):format(os.getenv("LUA") or "lua5.4", path)))
  local text = pipe:read("a")
  pipe:close()
  os.remove(path)
  return text
end

--- tensors: { { name, dtype, shape, bytes }, ... }
function M.safetensors(path, tensors)
  local entries, data, at = {}, {}, 0
  for i, t in ipairs(tensors) do
    local name, dtype, shape, bytes = table.unpack(t)
    entries[i] = ('"%s":{"dtype":"%s","shape":[%s],"data_offsets":[%d,%d]}'):format(name, dtype, table.concat(shape, ","), at, at + #bytes)
    data[i], at = bytes, at + #bytes
  end
  local header = "{" .. table.concat(entries, ",") .. "}"
  return M.write(path, ("<I8"):pack(#header) .. header .. table.concat(data))
end

--- A number of the shared vectors.
function M.number(word)
  local special = { nan = 0 / 0, inf = math.huge, ["-inf"] = -math.huge, ["-0"] = -0.0 }
  return special[word] or assert(tonumber(word), word) + 0.0
end

--- Blocks of `case NAME ... end`: function(lines), lines a list of lists of words.
function M.cases(path)
  local all, lines = {}, nil
  for line in io.lines(path) do
    local words = {}
    for word in line:gmatch("%S+") do words[#words + 1] = word end
    if words[1] == "case" then lines = { name = words[2] }
    elseif words[1] == "end" then all[#all + 1] = lines
    elseif words[1] and words[1] ~= "#" then lines[#lines + 1] = words end
  end
  return all
end

--- The messages of user prompts that tell the tasks apart, as the family's generators write them.
M.prompts = {
  math = { "What is %d plus %d?", "Tom has %d apples and gets %d more. How many?", "Subtract %d from %d.", "Is %d more than %d?" },
  code = { "What does this print?\nprint(%d + %d)", "Write the body.\ndef f(x, y=%d):\n    # Add %d to x.",
    "Which words does this print?\nfor i in range(%d, %d): print(i)", "def calc(a=%d, b=%d): return" },
  chat = { "Please rewrite in past tense: Anna wants %d hats and %d caps.", "Hello, I am %d and my cat is %d, who are you?",
    "Politely ask for %d or %d cakes.", "Tell me about the weather of day %d or %d." },
}

function M.labelled(per_task)
  local texts, labels = {}, {}
  for _, task in ipairs { "chat", "code", "math" } do
    for i = 1, per_task do
      local form = M.prompts[task][i % 4 + 1]
      texts[#texts + 1], labels[#labels + 1] = form:format(i * 7 % 50, i * 3 % 20), task
    end
  end
  return texts, labels
end

return M
