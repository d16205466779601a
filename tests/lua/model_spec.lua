-- Models: generate, stream, score, logits, routers and what they raise.
local obm = require "onebitmerge"
local support = dofile(debug.getinfo(1, "S").source:match("^@(.*/)") .. "support.lua")

teardown(support.clean)

local path = support.folder() .. "/p.pack"
local pack = assert(obm.compress(support.models .. "base",
  { chat = support.models .. "chat", math = support.models .. "math", code = support.models .. "code" }, { out = path }))
local report = assert(pack:train_router(support.labelled(30)))
local model = assert(obm.model(path))
local question = "What is 17 plus 5?"

describe("router training", function()
  it("reports and stores", function()
    assert.same({ "chat", "code", "math" }, report.tasks)
    assert.equal(90, report.n_train + report.n_held_out)
    assert.is_true(report.accuracy > 0.8)
    local n = 0
    for _, row in ipairs(report.confusion) do for _, count in ipairs(row) do n = n + count end end
    assert.equal(report.n_held_out, n)
    assert.same(report, obm.pack(path):router_report())
    assert.truthy(tostring(report):find("held-out accuracy", 1, true))
  end)

  it("checks labels", function()
    local p = assert(obm.pack(path))
    assert.error_matches(function() p:train_router({ "a", "b" }, { "chat" }) end, "2 texts but 1 labels")
    local r, message, code = p:train_router({ "a", "b" }, { "chat", "law" })
    assert.is_nil(r)
    assert.equal("NOTFOUND", code)
    assert.truthy(message:find("law", 1, true))
    assert.equal("BUSY", select(3, model:pack():train_router({ "a" }, { "chat" })))
  end)

  it("needs one before it routes", function()
    local p = assert(obm.compress(support.models .. "base", { math = support.models .. "math" }, { out = support.folder() .. "/p" }))
    assert.equal("NOTFOUND", select(3, p:router_report()))
    local m = assert(obm.model(p))
    assert.equal("NOTFOUND", select(3, m:generate(question)))
    local text = assert(m:generate(question, { max_tokens = 2, router = function(request)
      assert.is_nil(request.builtin)
      assert.is_nil(request.probabilities)
      return 1
    end }))
    assert.equal("string", type(text))
    assert.equal(p, m:pack())
  end)
end)

describe("prompts that are none", function()
  local function raises(prompt, said)
    local ok, message = pcall(model.generate, model, prompt, { route = "base", max_tokens = 1 })
    assert.is_false(ok)
    assert.truthy(tostring(message):find(said, 1, true), message)
  end

  it("say which, and what was expected", function()
    raises({ ids = {} }, "expected at least one token id, found none")
    raises("", "the prompt is empty: expected at least one token, and the tokenizer puts none (no BOS) in front")
    raises({ "x", "" }, "prompt 1: the prompt is empty")
    raises({ "x", { ids = { 768 } } }, "prompt 1: token id 768 at index 0 is outside the vocabulary of 768")
    raises(("x 1"):rep(400), "positions of the model (max_position_embeddings)")
  end)

  it("raise where the type is wrong", function()
    raises({ messages = "text" }, "messages: expected a list of {role, content}, found string")
    raises({ messages = {} }, "messages: expected a list of {role, content}, found an empty table")
    raises({ messages = { { role = "user" } } }, "(missing: content)")
    raises({ ids = { 1.5 } }, "ids: expected integers, found number")
    raises({ prompt = 5 }, "prompt: expected string, found number")
  end)
end)

describe("model", function()
  it("opens folders and packs, refuses others", function()
    assert.equal("llama", model:info().architecture)
    assert.is_true(model:memory().base > 0)
    assert.same(pack:tasks(), model:pack():tasks())
    local plain <close> = assert(obm.model(support.models .. "math", { kv = "f16" }))
    assert.is_nil(plain:pack())
    local _, info = plain:generate(question, { max_tokens = 3 })
    assert.is_nil(info.route)
    assert.error_matches(function() plain:generate(question, { route = "math" }) end, "only packs have routes")
    assert.error_matches(function() obm.model(path .. ":math") end, "math is an expert of a pack: it runs as a route of it")
    assert.equal("IO", select(3, obm.model("/no/such")))
    assert.error_matches(function() obm.model(path, { kv = "f8" }) end, "unknown dtype")
    assert.error_matches(function() obm.model(path, { base = 1 }) end, "expected string, found number")
  end)

  it("holds its base in 12 bits per weight", function()
    local packed <close> = assert(obm.model(path, { z12 = true }))
    local info = packed:info()
    assert.is_true(info.z12_bytes > 0 and info.z12_bytes < 0.8 * info.z12_plain and info.z12_to_come == 0)
    for _, z12 in ipairs { "auto", "off", false } do
      local plain <close> = assert(obm.model(path, { z12 = z12 }))
      assert.equal(0, plain:info().z12_plain)
    end
    assert.error_matches(function() obm.model(path, { z12 = "yes" }) end, 'z12: expected auto, on or off, found "yes"')
    assert.error_matches(function() obm.model(path, { z12 = 1 }) end, "expected boolean or string, found number")
    local options = { chat = true, max_tokens = 12 }
    assert.equal((model:generate(question, options)), (packed:generate(question, options)))
  end)

  it("rounds activations of prompts where that is quicker", function()
    local rounded <close> = assert(obm.model(path, { prefill = "bf16" }))
    local options = { chat = true, max_tokens = 12 }
    assert.equal((model:generate(question, options)), (rounded:generate(question, options)))
    local gains = obm.info().prefill_bf16
    assert.equal("f32", model:info().prefill)
    assert.equal(gains and "bf16" or "f32", rounded:info().prefill)
    local ids = model:tokenizer():encode(question)   -- under the base's route, whose matrices are bf16; planes stay f32
    local exact, other = assert(model:logits(ids, { route = "base" })), assert(rounded:logits(ids, { route = "base" }))
    local furthest = 0
    for i = 1, #exact do furthest = math.max(furthest, math.abs(exact[i] - other[i])) end
    assert.is_true(furthest < 1 and (furthest > 0) == gains)
    assert.error_matches(function() obm.model(path, { prefill = "f16" }) end, 'unknown dtype "f16" %(known: f32, bf16%)')
  end)

  it("generates", function()
    local text, info = model:generate(question, { chat = true, max_tokens = 40 })
    local named = model:generate(question, { chat = true, template = "chatml", max_tokens = 40 })
    assert.equal(text, named)
    local _, other = model:generate(question, { chat = true, template = "llama3.1", max_tokens = 1 })
    assert.is_true(other.prompt_tokens > info.prompt_tokens)
    assert.error_matches(function() model:generate(question, { template = "alpaca" }) end, 'called "alpaca" %(llama2, mistral')
    assert.truthy(text:find("22", 1, true))
    assert.same({ math = 1.0 }, info.route)
    assert.equal("stop", info.finish_reason)
    assert.is_true(info.prompt_tokens > 5 and #info.ids > 0)
    assert.equal(text, (model:generate({ { role = "user", content = question } }, { max_tokens = 40 })))
    local ids = model:tokenizer():encode(model:tokenizer():apply_template { { role = "user", content = question } })
    assert.equal(text, (model:generate(ids, { max_tokens = 40, route = "math" })))
    assert.equal(text, (model:generate({ ids = ids }, { max_tokens = 40, route = { math = 1 } })))
    assert.equal(text, (model:generate({ prompt = question }, { chat = true, max_tokens = 40, route = 3 })))
  end)

  it("generates batches with a route each", function()
    local list = assert(model:generate({ question, "def f(x): return", question },
      { max_tokens = 5, ignore_eos = true, route = { "math", { chat = 0.7, code = 0.3 }, false } }))
    assert.equal(3, #list)
    assert.same({ math = 1.0 }, list[1].route)
    assert.same({ chat = 0.7, code = 0.3 }, list[2].route)
    assert.equal("length", list[1].finish_reason)
    assert.equal(list[1].text, (model:generate(question, { max_tokens = 5, ignore_eos = true, route = "math" })))
    assert.same({}, model:generate({}, {}))
    assert.error_matches(function() model:generate({ question }, { route = { "math", "chat" } }) end, "2 routes for 1 prompts")
  end)

  it("is routed again after every n tokens", function()
    local function changing(routes)
      local seen = {}
      return function(request)
        seen[#seen + 1] = request.text
        return routes[#seen]
      end, seen
    end
    local function options(router) return { chat = true, max_tokens = 12, ignore_eos = true, router = router, route_every = 4 } end
    local router, seen = changing { "math", "code", { chat = 0.5, math = 0.5 } }
    local text, info = model:generate(question, options(router))
    local last = { token = 8, route = { chat = 0.5, math = 0.5 } }
    assert.same({ { token = 0, route = { math = 1.0 } }, { token = 4, route = { code = 1.0 } }, last }, info.routes)
    assert.same(info.routes[3].route, info.route)
    assert.equal(question, seen[1])
    assert.equal(question .. "\n" .. text:sub(1, #seen[3] - #question - 1), seen[3])
    local _, alone = model:generate(question, { chat = true, max_tokens = 12, ignore_eos = true, route = "math" })
    assert.is_nil(alone.routes)
    for i = 1, 4 do assert.equal(alone.ids[i], info.ids[i]) end
    local stream = model:stream(question, options((changing { "math", "code", { chat = 0.5, math = 0.5 } })))
    local pieces = {}
    for piece in stream do pieces[#pieces + 1] = piece end
    assert.equal(text, table.concat(pieces))
    assert.same(info.routes, select(2, stream:result()).routes)
    stream:close()
    local broken = function(request) if #request.text > #question then error({ mine = true }) end return "math" end
    local ok, raised = pcall(model.generate, model, question, options(broken))
    assert.is_false(ok)
    assert.same({ mine = true }, raised)
  end)

  it("stops and samples", function()
    local text, info = model:generate(question, { chat = true, max_tokens = 40, stop = { "22", "nowhere" } })
    assert.is_nil(text:find("22", 1, true))
    assert.equal("stop", info.finish_reason)
    local function sample(seed)
      return (model:generate(question, { max_tokens = 12, ignore_eos = true, temperature = 2, seed = seed, top_k = 50, top_p = 0.95 }))
    end
    assert.equal(sample(7), sample(7))
    assert.is_true(sample(1) ~= sample(2) or sample(3) ~= sample(4))
  end)

  it("checks options and prompts", function()
    assert.error_matches(function() model:generate(question, { max_token = 1 }) end,
      'unknown option max_token %(known: .*max_tokens.*%), did you mean "max_tokens"%?$')
    assert.error_matches(function() model:generate(question, { max_tokens = -1 }) end, "max_tokens must be >= 0")
    assert.error_matches(function() model:generate(question, { max_tokens = "1" }) end, "expected integer, found string")
    assert.error_matches(function() model:generate(question, { stop = 1 }) end, "option stop")
    assert.error_matches(function() model:generate(question, { router = "math" }) end, "expected function, found string")
    assert.error_matches(function() model:generate(question, { temperature = -1 }) end, "temperature")
    assert.error_matches(function() model:generate(nil) end, "a prompt is")
    assert.error_matches(function() model:generate({ true }) end, "a prompt is")
    assert.error_matches(function() model:generate("a\0b") end, "NUL")
    assert.equal("NOTFOUND", select(3, model:generate(question, { route = "law" })))
  end)

  it("gives logits and hidden states", function()
    local ids = model:tokenizer():encode(question)
    local all = assert(model:logits(ids, { route = "math" }))
    local last = assert(model:logits(ids, { route = "math", all = false }))
    local info = model:info()
    assert.same({ #ids, info.vocab }, all.shape)
    assert.same({ info.vocab }, last.shape)
    assert.equal(last[1], all[(#ids - 1) * info.vocab + 1])
    local decoded = assert(model:logits(ids, { route = "math", decode = true, all = false }))
    assert.is_true(math.abs(decoded[1] - last[1]) < 1e-3)
    assert.same({ #ids, info.hidden }, assert(model:hidden(ids, 2)).shape)
    assert.same({ 2, info.hidden }, assert(model:embed({ "a", "b" }, { layer = 1 })).shape)
    assert.has_error(function() model:logits({}) end)
    assert.has_error(function() model:logits({ -5 }) end)
    assert.error_matches(function() model:hidden(ids, -1) end, "layer")
    assert.error_matches(function() model:logits("text") end, "ids: expected")
  end)

  it("scores", function()
    local good = assert(model:score("17 plus 5 is", " 22", { route = "math" }))
    assert.is_true(good.logprob < 0)
    local sum = 0
    for _, v in ipairs(good.token_logprobs) do sum = sum + v end
    assert.is_true(math.abs(sum - good.logprob) < 1e-9)
    assert.is_true(math.abs(good.perplexity - math.exp(-good.logprob / #good.token_logprobs)) < 1e-6 * good.perplexity)
    assert.same({ math = 1.0 }, good.route)
    local ids = model:tokenizer():encode(" 22", { special = false })
    assert.same(good, (model:score("17 plus 5 is", ids, { route = "math" })))
    local items = assert(model:score_items { { "17 plus 5 is", " 22", "math" },
      { prompt = "17 plus 5 is", continuation = " 22", route = { math = 1 } },
      { "17 plus 5 is 22", nil, "math" } })
    assert.same(good, items[1])
    assert.same(good, items[2])
    assert.same(items[3], (model:score("17 plus 5 is 22", nil, { route = "math" })))
    assert.error_matches(function() model:score_items { "text" } end, "a score item is a table")
  end)
end)

describe("stream", function()
  it("gives the pieces of generate's text", function()
    local pieces = {}
    for piece in model:stream(question, { chat = true, max_tokens = 40 }) do pieces[#pieces + 1] = piece end
    assert.is_true(#pieces > 3)
    assert.equal((model:generate(question, { chat = true, max_tokens = 40 })), table.concat(pieces))
  end)

  it("keeps the model busy until the loop is left", function()
    for _ in model:stream(question, { max_tokens = 40 }) do   -- luacheck: ignore 512
      local text, message, code = model:generate(question)
      assert.is_nil(text)
      assert.equal("BUSY", code)
      assert.equal("string", type(message))
      break
    end
    assert.truthy(model:generate(question, { max_tokens = 1 }))
    local stream <close> = model:stream(question, { max_tokens = 4 })
    stream()
    local text, info = stream:result()
    assert.equal("string", type(text))
    assert.equal(1, #info.ids)
    stream:close()
    assert.is_nil(stream())
    assert.error_matches(function() stream:result() end, "closed")
    assert.truthy(model:generate(question, { max_tokens = 1 }))
  end)

  it("raises what fails, as io.lines", function()
    assert.error_matches(function() model:stream(question, { route = "law" }) end, "law")
    assert.error_matches(function() model:stream({ "a", "b" }) end, "stream takes one prompt")
    assert.truthy(model:generate(question, { max_tokens = 1 }))
  end)

  it("runs in coroutines", function()
    local pieces = coroutine.wrap(function()
      for piece in model:stream(question, { chat = true, max_tokens = 6 }) do coroutine.yield(piece) end
    end)
    assert.equal("string", type(pieces()))
    while pieces() do end
    assert.truthy(model:generate(question, { max_tokens = 1 }))
  end)
end)

describe("custom router", function()
  local function route(router) return model:route(question, { router = router }) end

  it("sees the request", function()
    local seen
    local weights, probabilities = route(function(request)
      seen = { text = request.text, tokens = request.tokens, tasks = request.tasks, builtin = request.builtin,
        probabilities = request.probabilities, features = request:features(), deep = request:features(1) }
      return "math"
    end)
    assert.same({ math = 1.0 }, weights)
    assert.is_nil(probabilities)
    assert.equal(question, seen.text)
    assert.same(model:tokenizer():encode(question), seen.tokens)
    assert.same({ "chat", "code", "math" }, seen.tasks)
    assert.equal("math", seen.builtin)
    local sum = 0
    for _, p in pairs(seen.probabilities) do sum = sum + p end
    assert.is_true(math.abs(sum - 1) < 1e-9)
    assert.same({ model:info().hidden }, seen.features.shape)
    assert.is_true(seen.features[1] ~= seen.deep[1])
    local _, builtin = model:route(question)
    assert.same(seen.probabilities, builtin)
  end)

  it("answers with a name, an index from 1, or weights", function()
    assert.same({ chat = 1.0 }, (route(function() return 1 end)))
    assert.same({ chat = 0.25, math = 0.75 }, (route(function() return { chat = 0.25, math = 0.75 } end)))
    assert.same({ code = 0.5, math = 0.5 }, (route(function() return { 0, 0.5, 0.5 } end)))
    assert.same({ code = 1.0 }, (model:route(question, function() return "code" end)))
    local callable = setmetatable({}, { __call = function() return "code" end })
    assert.same({ code = 1.0 }, (route(callable)))
    local _, info = model:generate(question, { max_tokens = 1, router = function() return { chat = 0.7, math = 0.3 } end })
    assert.same({ chat = 0.7, math = 0.3 }, info.route)
  end)

  it("is told about wrong answers", function()
    local weights, message, code = route(function() return "law" end)
    assert.is_nil(weights)
    assert.equal("NOTFOUND", code)
    assert.truthy(message:find("law", 1, true))
    assert.matches('^router .*model_spec.lua:%d+, asked about "What is 17 plus 5%?": ', message)
    assert.error_matches(function() route(function() return 9 end) end,
      '^router .*model_spec.lua:%d+, asked about "What is 17.*outside 1..3')
    assert.error_matches(function() route(function() end) end, "a route is a task name")
    assert.error_matches(function() route(setmetatable({}, { __call = function() return 9 end })) end,
      '^router, asked about "What is 17.*outside 1..3')
    assert.error_matches(function() route(function() return { math = -1 } end) end,
      '^router .*model_spec.lua:%d+, asked about "What is 17 plus 5%?": route: the weight of task math is %-1')
    local long = ("word "):rep(30)
    assert.error_matches(function() model:generate({ question, long }, { max_tokens = 1, router = function(request)
      return request.text == question and "math" or 7
    end }) end, 'asked about "word word .*word %.%.%.": task index 7 is outside 1..3')
  end)

  it("may raise anything, and it comes back unchanged", function()
    local object = setmetatable({}, { __tostring = function() return "mine" end })
    for _, value in ipairs { object, {}, "a text without a place", 42, false } do
      for _, call in ipairs { route,
        function(router) return model:generate({ question, question }, { router = router }) end,
        function(router) return model:stream(question, { router = router }) end } do
        local ok, raised = pcall(call, function() error(value, 0) end)
        assert.is_false(ok)
        assert.is_true(rawequal(value, raised))
      end
    end
    local ok, raised = pcall(route, function() error() end)
    assert.is_false(ok)
    assert.is_nil(raised)
    assert.truthy(model:generate(question, { max_tokens = 1 }))
  end)

  it("cannot use the request or the model in the wrong place", function()
    local kept
    route(function(request) kept = request return 1 end)
    assert.error_matches(function() return kept.text end, "valid only while the router runs")
    pcall(route, function(request) kept = request error("x") end)
    assert.error_matches(function() kept:features() end, "valid only while the router runs")
    local inner
    route(function() inner = { model:generate(question) } return 1 end)
    assert.equal("BUSY", inner[3])
    assert.error_matches(function() route(coroutine.yield) end, "yield")
  end)

  it("may close the model, which then ends with the call", function()
    local m = assert(obm.model(path))
    assert.error_matches(function()
      m:generate(question, { max_tokens = 1, router = function() getmetatable(m).__close(m) return 1 end })
    end, "closed")
    assert.error_matches(function() m:info() end, "closed")
    local p = assert(obm.pack(path))
    local of_pack = assert(obm.model(p))
    local answer
    of_pack:route(question, { router = function() answer = { p:remove("chat") } return 1 end })
    assert.equal("BUSY", answer[3])
  end)
end)

describe("progress", function()
  it("is called with what, done and total", function()
    local last
    assert(pack:verify { progress = function(what, done, total) last = { what, done, total } end })
    assert.equal("string", type(last[1]))
    assert.equal(last[2], last[3])
    local prompts
    assert(model:generate({ question, question }, { max_tokens = 2, progress = function(_, done) prompts = done end }))
    assert.equal(2, prompts)
    assert(obm.model(path, { progress = function(what, done, total) last = { what, done, total } end }))
    assert.equal("open", last[1])
    assert.equal(last[2], last[3])
  end)

  it("is no need of what the lua program does at Ctrl-C: a hook on everything", function()
    local ids = {}
    for i = 1, 100 do ids[i] = i end
    assert.is_true(select(2, coroutine.running()))
    debug.sethook(function() end, "crl", 1)
    local logits, message, code = model:logits(ids)
    debug.sethook()
    assert.is_nil(logits)
    assert.equal("USER", code)
    assert.matches("interrupted", message)
    assert(model:logits(ids))
  end)

  it("stops the call by raising, unchanged", function()
    local stop = {}
    local function progress() error(stop) end
    local folder = support.folder()
    local texts, labels = support.labelled(3)
    for _, call in ipairs {
      function() pack:verify { progress = progress } end,
      function() obm.model(path, { progress = progress }) end,
      function() obm.model(pack, { progress = progress }) end,
      function() model:generate(question, { progress = progress, max_tokens = 50, ignore_eos = true }) end,
      function() model:score_items({ { question, " 22", "math" } }, { progress = progress }) end,
      function() model:embed({ "a" }, { progress = progress }) end,
      function() pack:export("math", folder .. "/x", { progress = progress }) end,
      function()
        obm.compress(support.models .. "base", { math = support.models .. "math" }, { out = folder .. "/y", progress = progress })
      end,
      function() obm.task_vector(support.models .. "base", support.models .. "math"):stats { progress = progress } end,
      function() obm.pack(path):train_router(texts, labels, { progress = progress }) end } do
      local ok, raised = pcall(call)
      assert.is_false(ok)
      assert.is_true(rawequal(stop, raised))
    end
    assert.is_false(support.exists(folder .. "/x/config.json"))
    assert.is_false(support.exists(folder .. "/y/pack.json"))
  end)

  -- The lua program's Ctrl-C sets such a hook from its signal handler.
  it("lets a waiting hook interrupt a long call", function()
    local armed = false
    local ok, raised = pcall(function()
      model:generate(question, { max_tokens = 400, ignore_eos = true, router = function()
        debug.sethook(function()
          if not armed then armed = true return end
          debug.sethook()
          error("interrupted!", 0)
        end, "c")
        return 1
      end })
    end)
    debug.sethook()
    assert.is_false(ok)
    assert.equal("interrupted!", raised)
  end)
end)
