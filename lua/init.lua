--- onebitmerge: 1-bit task vectors, routed merging and CPU inference of fine-tuned LLMs.
--
--     local pack = assert(obm.compress("base", { chat = "chat-model", math = "math-model" }, { out = "my.pack" }))
--     assert(pack:train_router(texts, labels))
--     print(obm.model("my.pack"):generate("Tom has 3 apples ..."))
--
-- Expected failures return nil, message, code; wrong use raises; what a router or a progress callback raises comes back
-- unchanged.  This file is sugar: texts of objects, recipes as tables or files.  The types are in onebitmerge.d.lua.

local core = require "onebitmerge.core"

local M = {}
for name, value in pairs(core) do
  if name:sub(1, 1) ~= "_" then M[name] = value end
end

---- JSON: config.json to a table, a recipe to text ----

local escapes = { ['"'] = '"', ["\\"] = "\\", ["/"] = "/", b = "\b", f = "\f", n = "\n", r = "\r", t = "\t" }

local function json_error(text, at, message)
  local _, line = text:sub(1, at):gsub("\n", "")
  error(("JSON, line %d: %s"):format(line + 1, message), 0)
end

local function decode_escape(text, at)
  local code = text:match("^u(%x%x%x%x)", at)
  if not code then return escapes[text:sub(at, at)] or json_error(text, at, "unknown escape"), at + 1 end
  local unit, low = tonumber(code, 16), text:match("^\\u([dD][c-fC-F]%x%x)", at + 5)
  if unit >= 0xD800 and unit < 0xDC00 and low then
    return utf8.char(0x10000 + (unit - 0xD800) * 0x400 + tonumber(low, 16) - 0xDC00), at + 11
  end
  return utf8.char(unit), at + 5
end

local function decode_string(text, at)
  local parts = {}
  while true do
    local plain, next_at = text:match('^([^"\\]*)()', at)
    parts[#parts + 1] = plain
    local mark = text:sub(next_at, next_at)
    if mark == '"' then return table.concat(parts), next_at + 1 end
    if mark == "" then json_error(text, at, "a string does not end") end
    parts[#parts + 1], at = decode_escape(text, next_at + 1)
  end
end

local decode_value

local function decode_items(text, at, close, read)
  at = text:match("^%s*()", at)
  if text:sub(at, at) == close then return at + 1 end
  while true do
    at = text:match("^%s*()", read(at))
    local mark = text:sub(at, at)
    if mark == close then return at + 1 end
    if mark ~= "," then json_error(text, at, "expected , or " .. close) end
    at = at + 1
  end
end

local function decode_object(text, at)
  local object = {}
  return object, decode_items(text, at, "}", function(here)
    here = text:match('^%s*"()', here) or json_error(text, here, "expected a key")
    local key, after = decode_string(text, here)
    after = text:match("^%s*:()", after) or json_error(text, after, "expected :")
    object[key], after = decode_value(text, after)
    return after
  end)
end

local function decode_array(text, at)
  local array, n = {}, 0
  return array, decode_items(text, at, "]", function(here)
    n = n + 1
    array[n], here = decode_value(text, here)
    return here
  end)
end

local words = { ["true"] = true, ["false"] = false }

function decode_value(text, at)
  at = text:match("^%s*()", at)
  local mark = text:sub(at, at)
  if mark == "{" then return decode_object(text, at + 1) end
  if mark == "[" then return decode_array(text, at + 1) end
  if mark == '"' then return decode_string(text, at + 1) end
  local word, after = text:match("^([%w+.-]+)()", at)
  if words[word] ~= nil or word == "null" then return words[word], after end
  return tonumber(word) or json_error(text, at, "expected a value"), after
end

core._register("json", function(text) return (decode_value(text, 1)) end)

local encode

local function encode_string(s)
  return '"' .. s:gsub('[%c"\\\127]', function(c) return ("\\u%04x"):format(c:byte()) end) .. '"'
end

local function encode_array(t)
  local parts = {}
  for key in pairs(t) do
    if math.type(key) ~= "integer" or key < 1 or key > #t then
      error { recipe = ("recipe: a list has the key %s as well"):format(tostring(key)) }
    end
  end
  for i, value in ipairs(t) do parts[i] = encode(value) end
  return "[" .. table.concat(parts, ", ") .. "]"
end

local function encode_object(t)
  local keys, parts = {}, {}
  for key in pairs(t) do
    if type(key) ~= "string" then error { recipe = ("recipe: the key %s is not a string"):format(tostring(key)) } end
    keys[#keys + 1] = key
  end
  table.sort(keys)
  for i, key in ipairs(keys) do parts[i] = encode_string(key) .. ": " .. encode(t[key]) end
  return "{" .. table.concat(parts, ", ") .. "}"
end

-- A table with an element 1 is a list, every other one, the empty one too, an object.  A checkpoint stands for its path.
function encode(value)
  local kind = type(value)
  if kind == "table" then return value[1] ~= nil and encode_array(value) or encode_object(value) end
  if kind == "string" then return encode_string(value) end
  if kind == "boolean" then return tostring(value) end
  if math.type(value) == "integer" then return ("%d"):format(value) end
  if kind == "number" and value == value and math.abs(value) < math.huge then return ("%.17g"):format(value) end
  if getmetatable(value) == core._metatable("checkpoint") then return encode_string(value:path()) end
  error { recipe = ("recipe: %s cannot be written"):format(tostring(value)) }
end

local function recipe_text(recipe)
  local ok, text = pcall(encode, recipe)
  if ok then return text end
  if type(text) ~= "table" then error(text, 0) end
  return nil, text.recipe, "ARG"
end

---- merge ----

local function read_recipe(path)
  local file, message = io.open(path, "rb")
  if not file then return nil, message, "IO" end
  local text, failure = file:read("a")
  file:close()
  if not text then return nil, ("%s: %s"):format(path, failure), "IO" end
  return text
end

--- Merges by a recipe (a table with mergekit's keys, or the path of a YAML or JSON file) into the Hugging Face folder `out`.
-- Relative paths in a file start at its folder.  With `resume` the finished shards of a killed merge of the same recipe,
-- options and inputs are kept; a merge that is finished already is verified and left as it is, which a warning says.
-- options.method, a name or a function (tile), takes the place of merge_method, which in a table may be a function too.
-- A recipe is data: whatever is wrong with what it says, in a table or a file, while planning or at work, is returned as
-- nil, message, code.  Arguments of wrong types and unknown options raise.
function M.merge(recipe, out, options)
  local kind = type(recipe)
  if kind ~= "table" and kind ~= "string" then
    error(("bad argument #1 to 'merge' (table or path expected, got %s)"):format(kind), 2)
  end
  if options ~= nil and type(options) ~= "table" then
    error(("bad argument #3 to 'merge' (table expected, got %s)"):format(type(options)), 2)
  end
  if type(recipe) == "table" then
    local copy, more = {}, {}
    for key, value in pairs(recipe) do copy[key] = value end
    for key, value in pairs(options or {}) do more[key] = value end
    if type(copy.merge_method) == "function" then
      more.method = more.method or copy.merge_method
      copy.merge_method = nil
    end
    local text, message, code = recipe_text(copy)
    if not text then return nil, message, code end
    return core.merge(text, out, more)
  end
  local text, message, code = read_recipe(recipe)
  if not text then return nil, message, code end
  local copy = { directory = recipe:match("^(.*)/[^/]*$") or "." }
  if copy.directory == "" then copy.directory = "/" end
  for key, value in pairs(options or {}) do copy[key] = value end
  return core.merge(text, out, copy)
end

---- merge methods ----

local function first_line(text) return (text:match("^%s*([^\n]*)")) end

-- A default alone is a parameter of the whole merge; a table has the keys that methods() prints.
local function parameter(name, given)
  local spec = { name = name }
  if type(given) ~= "table" then
    spec.default, spec.type = given, type(given) == "boolean" and "bool" or "number"
    return spec
  end
  local known = { name = 1, doc = 1, scope = 1, required = 1, default = 1, min = 1, max = 1, type = 1 }
  for key, value in pairs(given) do
    if not known[key] then error(("parameter %s: unknown key %s"):format(name, key), 3) end
    if key ~= "name" then spec[key] = value end
  end
  if spec.scope and spec.scope ~= "global" and spec.scope ~= "model" then
    error(("parameter %s: scope: expected global or model, found %s"):format(name, spec.scope), 3)
  end
  spec.type = spec.type or type(spec.default) == "boolean" and "bool" or "number"
  return spec
end

-- Makes a merge method of a function (tile), which returns the merged task vector of the tile as a tensor; the base is added.
-- options: parameters ({name = default} or {name = {default, min, max, scope, required, type, doc}}), scope "element" (tiles of
-- any size, on which the result must not depend) or "tensor", base = false (merges the weights themselves), doc, min_models,
-- max_models.  Function nil forgets the method.
function M.register_method(name, fn, options)
  if fn == nil then return core.register_method(name, nil) end
  local given, params = {}, {}
  for key, value in pairs(options or {}) do given[key] = value end
  for key, value in pairs(given.parameters or {}) do params[#params + 1] = parameter(key, value) end
  table.sort(params, function(a, b) return a.name < b.name end)
  if given.scope and given.scope ~= "element" and given.scope ~= "tensor" then
    error(("%s: scope: expected element or tensor, found %s"):format(name, given.scope), 2)
  end
  local known = { parameters = 1, scope = 1, base = 1, doc = 1, min_models = 1, max_models = 1 }
  for key in pairs(given) do
    if not known[key] then error(("%s: unknown option %s"):format(name, key), 2) end
  end
  local where = type(fn) == "function" and debug.getinfo(fn, "S") or {}
  core.register_method(name, fn, { params = params, scope = given.scope, base = given.base,
    doc = given.doc and first_line(given.doc) or "a method of the caller's own",
    source = ("%s:%s"):format(where.short_src or "?", where.linedefined or "?"),
    min_models = given.min_models, max_models = given.max_models })
end

---- progress = true ----

core._register("progress_bar", function(what, done, total)
  local share = total > 0 and done / total or 1
  io.stderr:write(("\r%s %3.0f %%%s"):format(what, 100 * share, done >= total and "\n" or ""))
end)

---- texts of objects ----

local function size(n)
  local units = { "B", "kB", "MB", "GB", "TB" }
  local i = 1
  while n >= 1000 and i < #units do n, i = n / 1000, i + 1 end
  return (i == 1 and "%.0f %s" or "%.2f %s"):format(n, units[i])
end

-- Plain text; the first column to the left, the others to the right.
local function layout(rows)
  local width, lines = {}, {}
  for _, row in ipairs(rows) do
    for i, cell in ipairs(row) do width[i] = math.max(width[i] or 0, utf8.len(cell) or #cell) end
  end
  for r, row in ipairs(rows) do
    local cells = {}
    for i, cell in ipairs(row) do
      local pad = (" "):rep(width[i] - (utf8.len(cell) or #cell))
      cells[i] = i == 1 and cell .. pad or pad .. cell
    end
    lines[r] = table.concat(cells, "  "):gsub("%s+$", "")
  end
  return table.concat(lines, "\n")
end

local classes = { "attention", "mlp", "embedding", "head", "norm", "bias", "other" }

-- The modes of a class' tensors: "1bit", "same", "1bit full", ...
local function stored(pack, task)
  local seen, out = {}, {}
  for _, t in ipairs(pack:tensors(task)) do
    seen[t.class] = seen[t.class] or {}
    seen[t.class][t.mode] = true
  end
  for class, modes in pairs(seen) do
    local names = {}
    for mode in pairs(modes) do names[#names + 1] = mode end
    table.sort(names)
    out[class] = table.concat(names, " ")
  end
  return out
end

local function pack_text(pack)
  local rows, packed, full = { { "expert", "class", "tensors", "stored", "expert bytes", "pack bytes" } }, 0, 0
  for _, task in ipairs(pack:tasks()) do
    local bytes, modes = pack:bytes(task), stored(pack, task)
    for _, class in ipairs(classes) do
      local b = bytes[class]
      if b then
        rows[#rows + 1] = { task, class, tostring(b.tensors), modes[class] or "", size(b.bytes_expert), size(b.bytes_pack) }
        packed, full = packed + b.bytes_pack, full + b.bytes_expert
      end
    end
  end
  local base, s, own, shared = pack:base_bytes(), pack:settings(), {}, pack:shared()
  if shared then
    local method = shared.lambda ~= 0 and ("%s, lambda %g"):format(shared.method, shared.lambda) or shared.method
    own[1] = ("\nshared by the masks of all experts (%s): %d tensors, %s"):format(method, shared.tensors, size(shared.bytes))
    packed = packed + shared.bytes
  end
  for _, task in ipairs(pack:tasks()) do
    local factors = 0
    for _, b in pairs(pack:bytes(task)) do factors = factors + b.bytes_adapter end
    if factors > 0 then own[#own + 1] = ("\n%s was made from LoRA factors of %s"):format(task, size(factors)) end
    if pack:text(task) ~= "" then own[#own + 1] = ("\n%s brings its own %s"):format(task, pack:text(task)) end
  end
  return table.concat({ ('Pack("%s")'):format(pack:path()), layout(rows) .. table.concat(own),
    ("pack / K full experts: %.4f"):format(packed / full),
    ("(base + pack) / (base + K full deltas): %.4f"):format((base + packed) / (base + full)),
    ("lambda %g, reading %s, profile %s, density %g"):format(s.lambda, s.reading, s.profile, s.density) }, "\n")
end

local function report_text(r)
  local rows = { { "true \\ routed", table.unpack(r.tasks) } }
  for i, counts in ipairs(r.confusion) do
    rows[i + 1] = { r.tasks[i] }
    for j, n in ipairs(counts) do rows[i + 1][j + 1] = tostring(n) end
  end
  return ("router on layer %d: held-out accuracy %.1f %% of %d, calibration error %.3f (%d training prompts)\n%s"):format(
    r.layer, 100 * r.accuracy, r.n_held_out, r.calibration_error, r.n_train, layout(rows))
end

local function model_text(m)
  local i, pack = m:info(), m:pack()
  return ("Model(%s, %d layers, hidden %d, vocab %d, %d parameters, %d tasks)"):format(i.architecture, i.layers, i.hidden,
    i.vocab, i.params, pack and #pack:tasks() or 0)
end

local texts = {
  tensor = function(t) return ("Tensor(%s, shape={%s})"):format(t.dtype, table.concat(t.shape, ", ")) end,
  checkpoint = function(c) return ('Checkpoint("%s", %d tensors)'):format(c:path(), #c) end,
  task_vector = function(v) return ("TaskVector(%d tensors)"):format(#v) end,
  pack = pack_text,
  tokenizer = function(t) return ("Tokenizer(%d ids)"):format(#t) end,
  model = model_text,
  router_report = report_text,
}
for kind, text in pairs(texts) do
  core._metatable(kind).__tostring = function(object)
    local ok, result = pcall(text, object)
    return ok and result or ("onebitmerge.%s (closed)"):format(kind)
  end
end

return M
