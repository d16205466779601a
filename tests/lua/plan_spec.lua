-- Placement plans, as Lua gets them; the planner is tested by tests/c/test_placement.c.
local obm = require "onebitmerge"
local support = dofile(debug.getinfo(1, "S").source:match("^@(.*/)") .. "support.lua")

teardown(support.clean)

local model = support.vectors .. "models/llama-tied"

describe("plans", function()
  it("cut rows at slabs, a part to each node", function()
    local p = assert(obm.plan(model, { topology = support.vectors .. "topologies/two-sockets.xml", numa = "shard" }))
    assert.same({ "shard", 8, 2, 8 }, { p.numa, p.threads, #p.nodes, #p.matrices })
    assert.same({ 0, 2, 4, 6, 8, 10, 12, 14 }, (function() local t = {} for i, w in ipairs(p.workers) do t[i] = w.cpu end return t end)())
    for _, m in ipairs(p.matrices) do
      assert.equal(0, m.nodes[1][1])
      assert.equal(m.nodes[1][2], m.nodes[2][1])
      assert.equal(m.rows, m.nodes[2][2])
    end
    assert.equal(0, p.remote_weight_bytes_per_token)
    assert.equal(p.weight_bytes_per_token, p.nodes[1].weight_bytes + p.nodes[2].weight_bytes)
  end)

  it("have modes", function()
    local total = assert(obm.plan(model)).weight_bytes_per_token
    local p = assert(obm.plan(model, { topology = "numa:4 core:2 pu:1", numa = "interleave" }))
    assert.is_nil(p.matrices[1].nodes)
    assert.is_true(math.abs(p.remote_weight_bytes_per_token - total * 3 // 4) <= 1)
    p = assert(obm.plan(model, { topology = "numa:2 core:2 pu:1", numa = "replicate", threads = 1 }))
    assert.same({ { 0, p.matrices[1].rows }, { 0, 0 } }, p.matrices[1].nodes)
    assert.equal("isolate", assert(obm.plan(model, { topology = "numa:2 core:2 pu:1", threads = 2 })).numa)
  end)

  it("refuse what is none", function()
    assert.error_matches(function() obm.plan(model, { numa = "both" }) end, "numa: expected auto, shard, .* found \"both\"")
    assert.error_matches(function() obm.plan(model, { topology = "numa:x" }) end, "topology: expected a file")
    local p, message, code = obm.plan(model, { topology = "missing.xml" })
    assert.is_nil(p)
    assert.equal("IO", code)
    assert.truthy(message:find("missing.xml", 1, true))
  end)
end)

describe("modes", function()
  it("change no result", function()
    local ids = { 1, 5, 9, 3, 7 }
    local expected = assert(obm.model(model)):logits(ids):totable()
    for _, mode in ipairs { "auto", "shard", "isolate", "interleave", "off" } do
      obm.set_threads(2, mode)
      local m = assert(obm.model(model))
      assert.same(expected, m:logits(ids):totable())
      local found = assert(m:verify_placement())
      if obm.info().nodes == 1 then assert.same({ numa = "off", bound = false }, found) end
    end
    obm.set_threads(0)
    assert.error_matches(function() obm.plan(model, { threads = 4097 }) end, "threads: expected 0 %(one per core%) to 4096, found 4097")
    assert.error_matches(function() obm.set_threads(0, "both") end, "numa: expected auto")
  end)
end)
