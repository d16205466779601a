-- LoRA folders as experts, against tests/vectors/lora (tests/reference/lora_reference.py).
local obm = require "onebitmerge"
local support = dofile(debug.getinfo(1, "S").source:match("^@(.*/)") .. "support.lua")

teardown(support.clean)

local vectors = support.vectors .. "lora/"

describe("adapters", function()
  it("are task vectors, to the bit", function()
    for line in io.lines(vectors .. "cases.txt") do
      local case, base = line:match("^(%S+) (%S+)$")
      local vector = assert(obm.task_vector(vectors .. base, vectors .. case))
      local expected = assert(obm.checkpoint(vectors .. case .. "/expected.safetensors"))
      assert.equal(#expected, #vector)
      for _, name in ipairs(expected:keys()) do
        assert.same(expected[name]:totable(), vector[name]:totable(), case .. " " .. name)
      end
    end
  end)

  it("are told from models", function()
    local adapter, base = assert(obm.checkpoint(vectors .. "plain")), assert(obm.checkpoint(vectors .. "base-f32"))
    assert.is_true(adapter:adapter())
    assert.is_false(base:adapter())
    assert.error_matches(function() obm.model(vectors .. "plain") end, "it can be an expert, not a model to run")
  end)

  it("are kept as factors or planes", function()
    local pack = assert(obm.compress(vectors .. "base-bf16", { a = { vectors .. "plain", policy = "full" }, b = vectors .. "patterns" },
      { out = support.folder() .. "/p.pack" }))
    local ranks = {}
    for _, t in ipairs(pack:tensors("a")) do if t.rank > 0 then ranks[#ranks + 1] = t.mode .. t.rank end end
    assert.same({ "full3", "full3", "full3", "full3" }, ranks)
    local bytes = pack:bytes("a").attention
    assert.equal(bytes.bytes_adapter, bytes.bytes_pack)
    assert.equal(4 * (2 * 3 * 16 + 2 * 3 * 12), bytes.bytes_adapter)
    assert.truthy(tostring(pack):find("a was made from LoRA factors of 672 B", 1, true))
  end)

  it("have local paths", function()
    local checkpoint, message, code = obm.checkpoint("org/name")
    assert.is_nil(checkpoint)
    assert.equal("IO", code)
    assert.truthy(message:find("org/name: a local path is needed here", 1, true))
  end)

  it("come out of fine-tunes, at full rank as they went in", function()
    local out, base, expert = support.folder() .. "/out", vectors .. "base-f32", vectors .. "plain"
    local calls = 0
    local rows = assert(obm.extract_lora(base, expert, out, { rank = 64, progress = function() calls = calls + 1 end }))
    assert.equal(4, #rows)
    assert.is_true(calls > 0)
    local ours, theirs = assert(obm.task_vector(base, out)), assert(obm.task_vector(base, expert))
    for _, row in ipairs(rows) do
      assert.equal(3, row.rank)
      local square, got, want = 0, ours[row.name]:totable(), theirs[row.name]:totable()
      for i, x in ipairs(want) do
        square = square + x * x
        assert.is_true(math.abs(got[i] - x) < 2e-6 * row.norm)
      end
      assert.is_true(math.abs(math.sqrt(square) - row.norm) < 1e-9 * row.norm and row.energy > 1 - 1e-9)
    end
    assert.equal(28, assert(obm.extract_lora(base, expert, out, { energy = 0.5, dry_run = true, overwrite = true })).tensors)
    local none, message, code = obm.extract_lora(base, expert, out, { rank = 1 })
    assert.is_nil(none)
    assert.equal("EXISTS", code)
    assert.truthy(message:find("holds an adapter", 1, true))
    assert.error_matches(function() obm.extract_lora(base, expert, out, { rank = 1, energy = 0.5 }) end, "found both")
  end)

  it("are refused by name where they are more than LoRA", function()
    local folder = support.folder()
    support.write(folder .. "/adapter_config.json", '{"peft_type": "LORA", "r": 2, "lora_alpha": 4, "use_dora": true}')
    local vector, message, code = obm.task_vector(vectors .. "base-bf16", folder)
    assert.is_nil(vector)
    assert.equal("UNSUPPORTED", code)
    assert.truthy(message:find("use_dora: DoRA is not supported", 1, true))
  end)
end)
