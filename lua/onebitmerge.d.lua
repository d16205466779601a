---@meta onebitmerge
-- Annotations of the Lua module for LuaLS.  Expected failures (files, formats, unknown tasks, a busy model) return
-- nil, message, code, with code one of onebitmerge.Code; wrong use raises; what a callback raises comes back unchanged.  What a
-- recipe says is no use but data: merge returns all that is wrong with it, code "ARG" too, which other functions raise.

---@alias onebitmerge.Code "ARG"|"NOMEM"|"SHAPE"|"DTYPE"|"IO"|"FORMAT"|"NOTFOUND"|"UNSUPPORTED"|"BUSY"|"EXISTS"|"OCCUPIED"|"MISMATCH"|"VALUE"
---@alias onebitmerge.Profile "default"|"paper"|"mergekit"
---@alias onebitmerge.Progress boolean|fun(what: string, done: integer, total: integer)  true: a line on stderr
---A task name ("chat", "chat=.7,math=.3", "base"), a task's index from 1, weights by task name, or one weight per task.
---@alias onebitmerge.Route string|integer|table<string, number>|number[]
---@alias onebitmerge.Router fun(request: onebitmerge.request): onebitmerge.Route
---@alias onebitmerge.Message { role: string, content: string }
---A text, a list of messages, a list of ids, or a table with one of these fields.
---@alias onebitmerge.Prompt string|onebitmerge.Message[]|integer[]|{ prompt?: string, text?: string, messages?: onebitmerge.Message[], ids?: integer[] }
---What merge_tensors takes in: data is a string of raw bytes, or a table of numbers (F32, F64).
---@alias onebitmerge.TensorLike onebitmerge.tensor|{ shape: integer[], dtype?: string, data: string|number[] }

---A tensor of a checkpoint (a view) or a result.  #t is the number of elements, t[i] the i-th, row-major, from 1.
---@class onebitmerge.tensor
---@field shape integer[]
---@field dtype string "F32", "BF16", ...
---@field nbytes integer
---@field [integer] number|integer|boolean
---@operator len: integer
---@operator add(onebitmerge.tensor|number): onebitmerge.tensor
---@operator sub(onebitmerge.tensor|number): onebitmerge.tensor
---@operator mul(onebitmerge.tensor|number): onebitmerge.tensor
---@operator div(onebitmerge.tensor|number): onebitmerge.tensor
---@operator unm: onebitmerge.tensor
---@field min fun(self, other: onebitmerge.tensor|number): onebitmerge.tensor  arithmetic is in f32, element by element
---@field max fun(self, other: onebitmerge.tensor|number): onebitmerge.tensor
---@field lt fun(self, other: onebitmerge.tensor|number): onebitmerge.tensor  1 where self is less, else 0
---@field le fun(self, other: onebitmerge.tensor|number): onebitmerge.tensor
---@field eq fun(self, other: onebitmerge.tensor|number): onebitmerge.tensor
---@field where fun(self, yes: onebitmerge.tensor|number, no: onebitmerge.tensor|number): onebitmerge.tensor  yes where self is not 0
---@field abs fun(self): onebitmerge.tensor
---@field sign fun(self): onebitmerge.tensor
---@field sqrt fun(self): onebitmerge.tensor
---@field exp fun(self): onebitmerge.tensor
---@field log fun(self): onebitmerge.tensor
---@field tanh fun(self): onebitmerge.tensor
---@field dot fun(self, other: onebitmerge.tensor|number): number  in f64; dot(1) is the sum
local tensor = {}

---All elements, flat.
---@return (number|integer|boolean)[]?, string? message, onebitmerge.Code? code
function tensor:totable() end

---The raw bytes, little-endian, row-major.
---@return string
function tensor:tostring() end

---A Hugging Face folder or one .safetensors file, memory-mapped; checkpoint[name] is a tensor, nil without one.
---@class onebitmerge.checkpoint
---@field [string] onebitmerge.tensor
---@operator len: integer
local checkpoint = {}

---Tensor names, sorted.
---@return string[]
function checkpoint:keys() end

---checkpoint[name] with the reason where there is none.
---@param name string
---@return onebitmerge.tensor?, string? message, onebitmerge.Code? code
function checkpoint:get(name) end

---SHA-256 of one tensor's bytes, hex.
---@param name string
---@return string?, string? message, onebitmerge.Code? code
function checkpoint:sha256(name) end

---How well 12 bits per weight (`model` with z12) would hold a matrix, by `rows` rows of it that lie evenly (16 unless told; 0: all): how
---many weights they have, how many of them need an escape, and whether that is few enough (1 %) for a model to pack it. 0, 0 and false
---where it is no bf16 matrix.
---@param name string
---@param rows integer?
---@return {weights: integer, escapes: integer, fits: boolean}?, string? message, onebitmerge.Code? code
function checkpoint:z12(name, rows) end

---Warns of tensors in layers that config.json does not count, which no model runs.
function checkpoint:check_layers() end

---As given.
---@return string
function checkpoint:path() end

---config.json as a table (null is nil), or nil without one.
---@return table?
function checkpoint:config() end

---No head of its own: lm_head is the embedding.
---@return boolean
function checkpoint:tied() end

---A PEFT LoRA folder: its tensors have the adapter's names.
---@return boolean
function checkpoint:adapter() end

---@class onebitmerge.Stats
---@field tensors integer
---@field params integer
---@field zeros integer
---@field base_norm number
---@field delta_norm number
---@field relative_norm number
---@field zero_share number
---@field onebit_error_matrix number
---@field onebit_error_row number

---expert - base, tensor by tensor, in f32, computed when vector[name] asks for it (nil without such a tensor).
---@class onebitmerge.task_vector
---@field [string] onebitmerge.tensor
---@operator len: integer
local task_vector = {}

---@return string[]
function task_vector:keys() end

---@param name string
---@return onebitmerge.tensor?, string? message, onebitmerge.Code? code
function task_vector:get(name) end

---By module class.
---@param options? { progress?: onebitmerge.Progress }
---@return table<string, onebitmerge.Stats>?, string? message, onebitmerge.Code? code
function task_vector:stats(options) end

---@param name string
---@return onebitmerge.Stats?, string? message, onebitmerge.Code? code
function task_vector:tensor_stats(name) end

---By module class: two task vectors of one base.
---@param other onebitmerge.task_vector
---@param options? { progress?: onebitmerge.Progress }
---@return table<string, { params: integer, cosine: number, sign_agreement: number }>?, string? message, onebitmerge.Code? code
function task_vector:compare(other, options) end

---A path, or a table.  map: { [glob] = mode } is tried in the order of the globs' bytes, { { glob, mode }, ... } in its own; modes are
---"1bit", "mask" (with shared), "full" and "drop", tried before the policy.
---@class onebitmerge.Expert
---@field [1]? string the path
---@field path? string
---@field name? string in a list of experts
---@field policy? "linear"|"attention"|"mlp"|"paper"|"full"
---@field scale? string "row" (default), "matrix", "group:N"
---@field planes? integer
---@field map? table<string, string>|string[][]

---@class onebitmerge.Plan
---@field tensors integer
---@field tiles integer the pieces that are worked out one after the other
---@field bytes_read integer
---@field bytes_written integer
---@field peak_memory integer
---@field seconds number

---@class onebitmerge.MergeDocument: onebitmerge.Plan
---@field name? string
---@field output? string nil: not UTF-8
---@field kept boolean false: taken back once the result is there
---@field files { file: string, bytes: integer, there: boolean }[] of the weights; there, with resume: finished and checked

---Of a dry run, sums over the documents.
---@class onebitmerge.MergePlan: onebitmerge.Plan
---@field documents onebitmerge.MergeDocument[]

---@class onebitmerge.ExportReport: onebitmerge.Plan
---@field changed integer
---@field lost integer

---Of the held-out part; confusion[true][predicted], tasks from 1.
---@class onebitmerge.RouterReport
---@field accuracy number
---@field calibration_error number
---@field confusion integer[][]
---@field tasks string[]
---@field layer integer
---@field n_train integer
---@field n_held_out integer

---@class onebitmerge.Settings
---@field lambda? number
---@field reading? "onto_base"|"recomputed"
---@field profile? onebitmerge.Profile
---@field density? number

---Compressed experts of one base, their router and merge settings.
---@class onebitmerge.pack
local pack = {}

---Compresses one more expert into the pack (atomic).
---@param name string
---@param expert string|onebitmerge.Expert
---@param options? { overwrite?: boolean, progress?: onebitmerge.Progress }
---@return true?, string? message, onebitmerge.Code? code
function pack:add(name, expert, options) end

---Drops an expert; the router goes too, its tasks changed.
---@param name string
---@return true?, string? message, onebitmerge.Code? code
function pack:remove(name) end

---Takes the experts and the settings of another pack of the same base and tasks; the router stays.
---@param path string
---@return true?, string? message, onebitmerge.Code? code
function pack:adopt(path) end

---Changes the merge settings on disk.
---@param settings onebitmerge.Settings
---@return true?, string? message, onebitmerge.Code? code
function pack:set(settings) end

---@return onebitmerge.Settings
function pack:settings() end

---Checksums of every file and the full hash of the base.
---@param options? { progress?: onebitmerge.Progress }
---@return true?, string? message, onebitmerge.Code? code
function pack:verify(options) end

---Task names in pack order.
---@return string[]
function pack:tasks() end

---@return string
function pack:path() end

---@return onebitmerge.checkpoint
function pack:base() end

---@return integer
function pack:base_bytes() end

---The vectors that the masks of all experts apply to; nil without.
---@return { method: string, lambda: number, tensors: integer, bytes: integer }?
function pack:shared() end

---By module class.
---@param task string|integer
---@return table<string, { tensors: integer, params: integer, bytes_expert: integer, bytes_pack: integer, bytes_adapter: integer }>?, string? message, onebitmerge.Code? code
function pack:bytes(task) end

---@param task string|integer
---@return string?, string? message, onebitmerge.Code? code
function pack:policy(task) end

---Which of "tokenizer, template, eos" the expert brings itself; "": all are the base's.
---@param task string|integer
---@return string?, string? message, onebitmerge.Code? code
function pack:text(task) end

---Each plane is { signs, scales }, a mask the bits: tensors that look into the pack.
---@param task string|integer
---@return { name: string, class: string, mode: string, bytes: integer, rows: integer, cols: integer, planes: onebitmerge.tensor[][], mask?: onebitmerge.tensor, scaling?: number }[]?, string? message, onebitmerge.Code? code
function pack:tensors(task) end

---How each tensor comes about while a model runs, by the settings: "base", "planes" (read by masks of signs) or "overlay"
---(materialised for the route).  hard: the costliest of the hard routes; soft: a mixture of all tasks.
---@return { name: string, class: string, planes: integer, hard: string, soft: string, hard_masks: integer, soft_masks: integer, overlays: integer }[]?, string? message, onebitmerge.Code? code
function pack:runs() end

---"chat=.7,math=.3" -> { chat = 0.7, math = 0.3 }
---@param route onebitmerge.Route
---@return table<string, number>?, string? message, onebitmerge.Code? code
function pack:parse_route(route) end

---@param route onebitmerge.Route
---@return string?, string? message, onebitmerge.Code? code
function pack:format_route(route) end

---The merged tensor under a route, f32.
---@param route onebitmerge.Route
---@param name string
---@return onebitmerge.tensor?, string? message, onebitmerge.Code? code
function pack:materialise(route, name) end

---Writes the dense Hugging Face folder of one route.
---@param route onebitmerge.Route
---@param out string
---@param options? { dtype?: "f32"|"bf16"|"f16", shard_bytes?: integer, overwrite?: boolean, dry_run?: boolean, progress?: onebitmerge.Progress }
---@return onebitmerge.ExportReport?, string? message, onebitmerge.Code? code
function pack:export(route, out, options) end

---Multinomial logistic regression on mean-pooled hidden states after `layer` of the base (0: embeddings); stored in the pack.
---@param texts onebitmerge.Prompt[]
---@param labels string[]
---@param options? { layer?: integer, l2?: number, holdout?: number, seed?: integer, progress?: onebitmerge.Progress }
---@return onebitmerge.RouterReport?, string? message, onebitmerge.Code? code
function pack:train_router(texts, labels, options) end

---@return onebitmerge.RouterReport?, string? message, onebitmerge.Code? code
function pack:router_report() end

---@class onebitmerge.tokenizer
---@operator len: integer
local tokenizer = {}

---special (default true): add the post-processor's tokens.
---@param text string
---@param options? { special?: boolean }
---@return integer[]?, string? message, onebitmerge.Code? code
function tokenizer:encode(text, options) end

---@param ids integer[]
---@param options? { skip_special?: boolean }
---@return string?, string? message, onebitmerge.Code? code
function tokenizer:decode(ids, options) end

---The built-in template that the model's own is, or the one of that name: llama2, mistral, llama3, llama3.1, chatml, qwen3, gemma, gemma3, phi3, phi4, phi4mini, granite, olmo2.
---add_generation (default true): open the assistant's turn.
---@param messages onebitmerge.Message[]
---@param options? { add_generation?: boolean, name?: string }
---@return string?, string? message, onebitmerge.Code? code
function tokenizer:apply_template(messages, options) end

---The same; Python's apply_template tries the model's own Jinja template first.
---@param messages onebitmerge.Message[]
---@param options? { add_generation?: boolean, name?: string }
---@return string?, string? message, onebitmerge.Code? code
function tokenizer:builtin_template(messages, options) end

---As in tokenizer.json.
---@param id integer
---@return string?
function tokenizer:piece(id) end

---@param piece string
---@return integer?
function tokenizer:id(piece) end

---The model's own Jinja chat template.
---@return string?
function tokenizer:template() end

---The built-in template that it is.
---@return string?
function tokenizer:template_name() end

---@return string?
function tokenizer:bos() end

---@return string?
function tokenizer:eos() end

---What a router is asked about; valid only while the router runs.
---@class onebitmerge.request
---@field text string the user turns, joined by newlines
---@field tokens integer[] the last 512 ids
---@field tasks string[]
---@field builtin string? the built-in router's answer: a task name; nil where the pack has no router
---@field probabilities table<string, number>? the built-in router's
local request = {}

---Mean-pooled hidden states after `layer` (default 0) of the base.
---@param layer? integer
---@return onebitmerge.tensor?, string? message, onebitmerge.Code? code
function request:features(layer) end

---@class onebitmerge.CompletionInfo
---@field route table<string, number>? nil for a plain model; with route_every the last
---@field routes { token: integer, route: table<string, number> }[]? with route_every: all that were taken, token: how many were generated before
---@field ids integer[] generated
---@field finish_reason "stop"|"length"
---@field prompt_tokens integer

---@class onebitmerge.Completion: onebitmerge.CompletionInfo
---@field text string

---@class onebitmerge.Score
---@field logprob number natural logarithm, summed over token_logprobs
---@field token_logprobs number[]
---@field is_greedy boolean
---@field perplexity number
---@field route table<string, number>?

---@class onebitmerge.GenerateOptions
---@field route? onebitmerge.Route|(onebitmerge.Route|false)[] "auto"; for a list of prompts also one each, false or "auto" for the router
---@field router? onebitmerge.Router
---@field max_tokens? integer 0: 256
---@field temperature? number 0: greedy
---@field top_k? integer
---@field top_p? number
---@field min_p? number
---@field repetition_penalty? number
---@field seed? integer
---@field stop? string|string[]
---@field chat? boolean text prompts are one user turn of the model's chat template
---@field batch? integer 0: 8
---@field ignore_eos? boolean
---@field route_every? integer the router is asked again after each so many generated tokens; 0: once
---@field template? string the built-in chat template to render with, whatever the model's own is
---@field progress? onebitmerge.Progress

---Pieces of text as they are generated; never splits a character.  Calling it gives the next piece, nil at the end.
---@class onebitmerge.stream
---@overload fun(): string?
local stream = {}

---So far.
---@return string text, onebitmerge.CompletionInfo info
function stream:result() end

---Frees the model for the next call.
function stream:close() end

---A Hugging Face folder or a pack, ready to run.
---@class onebitmerge.model
local model = {}

---One prompt: text, info.  A list of prompts: a list of completions.
---@param prompts onebitmerge.Prompt
---@param options? onebitmerge.GenerateOptions
---@return string? text, onebitmerge.CompletionInfo|string info, onebitmerge.Code? code
---@overload fun(self: onebitmerge.model, prompts: onebitmerge.Prompt[], options?: onebitmerge.GenerateOptions): onebitmerge.Completion[]?, string?, onebitmerge.Code?
function model:generate(prompts, options) end

---For `for piece in model:stream(prompt) do`; what fails raises, as with io.lines, and leaving the loop frees the model.
---@param prompt onebitmerge.Prompt
---@param options? onebitmerge.GenerateOptions
---@return onebitmerge.stream, nil, nil, onebitmerge.stream
function model:stream(prompt, options) end

---(T, vocab) f32; (vocab) of the last position with all = false.
---@param ids integer[]
---@param options? { all?: boolean, route?: onebitmerge.Route, decode?: boolean, kv?: "f32"|"f16" }
---@return onebitmerge.tensor?, string? message, onebitmerge.Code? code
function model:logits(ids, options) end

---(T, hidden) f32 after `layer`; 0 = embeddings.
---@param ids integer[]
---@param layer integer
---@param options? { route?: onebitmerge.Route }
---@return onebitmerge.tensor?, string? message, onebitmerge.Code? code
function model:hidden(ids, layer, options) end

---Where the pages of weights, planes and KV cache are, by NUMA node, and how many bytes are read from another node.
---@return table<string, any>?, string? message, onebitmerge.Code? code
function model:verify_placement() end

---(n, hidden) f32: mean-pooled hidden states of the base, what the router sees.
---@param texts onebitmerge.Prompt[]
---@param options? { layer?: integer, progress?: onebitmerge.Progress }
---@return onebitmerge.tensor?, string? message, onebitmerge.Code? code
function model:embed(texts, options) end

---Without continuation the prompt is a whole text.
---@param prompt onebitmerge.Prompt
---@param continuation? string|integer[]
---@param options? { route?: onebitmerge.Route }
---@return onebitmerge.Score?, string? message, onebitmerge.Code? code
function model:score(prompt, continuation, options) end

---Items: { prompt, continuation, route }, by place or by name.
---@param items table[]
---@param options? { progress?: onebitmerge.Progress }
---@return onebitmerge.Score[]?, string? message, onebitmerge.Code? code
function model:score_items(items, options) end

---The route; the built-in router's probabilities unless an own router is given.
---@param prompt onebitmerge.Prompt
---@param options? { router?: onebitmerge.Router }|onebitmerge.Router
---@return table<string, number>? weights, table<string, number>|string|nil probabilities, onebitmerge.Code? code
function model:route(prompt, options) end

---The base's.
---@return onebitmerge.tokenizer?
function model:tokenizer() end

---What prompts are encoded and rendered with under a route: the expert's own under its hard route where it brings one, else the
---base's (nil, soft routes).
---@param route? onebitmerge.Route
---@return onebitmerge.tokenizer?, string? message, onebitmerge.Code? code
function model:tokenizer_for(route) end

---nil for a plain model.
---@return onebitmerge.pack?
function model:pack() end

---Sizes: architecture, vocab, hidden, layers, ...
---@return table<string, any>
function model:info() end

---Resident bytes: base, planes, overlays, kv, scratch.
---@return table<string, integer>
function model:memory() end

---@class onebitmerge
---@field version string
local obm = {}

---@param path string
---@return onebitmerge.checkpoint?, string? message, onebitmerge.Code? code
function obm.checkpoint(path) end

---@param base string|onebitmerge.checkpoint
---@param expert string|onebitmerge.checkpoint
---@return onebitmerge.task_vector?, string? message, onebitmerge.Code? code
function obm.task_vector(base, expert) end

---Compresses experts of a base into the pack folder `out` (streaming) and opens it.  Experts by name are taken in the order of the
---names' bytes; a list of tables with `name` keeps its order.  dry_run: returns the plan and writes nothing.
---shared: one vector per matrix for all experts, in shared_dtype (the base's), and a bit mask per expert instead of 1-bit planes;
---tall_lambda (0.4): the threshold of TALL's masks.
---@param base string|onebitmerge.checkpoint
---@param experts table<string, string|onebitmerge.Expert>|onebitmerge.Expert[]
---@param options { out: string, profile?: onebitmerge.Profile, overwrite?: boolean, dry_run?: boolean, progress?: onebitmerge.Progress, shared?: "tall"|"emr", tall_lambda?: number, shared_dtype?: "f32"|"bf16"|"f16" }
---@return (onebitmerge.pack|onebitmerge.Plan)?, string? message, onebitmerge.Code? code
function obm.compress(base, experts, options) end

---@param path string
---@param base? string overrides where the base lies
---@return onebitmerge.pack?, string? message, onebitmerge.Code? code
function obm.pack(path, base) end

---true is "on", false "off"; "auto" unless told: packed behind the first tokens where that is faster.
---@alias onebitmerge.Z12 boolean|"auto"|"on"|"off"

---@param path string|onebitmerge.pack
---@param options? { base?: string, kv?: "f32"|"f16", route_budget?: integer, materialise?: boolean, z12?: onebitmerge.Z12, prefill?: "f32"|"bf16", progress?: onebitmerge.Progress }
---@return onebitmerge.model?, string? message, onebitmerge.Code? code
function obm.model(path, options) end

---@param path string a folder or tokenizer.json
---@return onebitmerge.tokenizer?, string? message, onebitmerge.Code? code
function obm.tokenizer(path) end

---Merges by a recipe (a table with mergekit's keys, or the path of a YAML or JSON file) into a Hugging Face folder.  In a table
---one with an element 1 is a list, every other one, the empty one too, a mapping.  Models are folders, MODEL+ADAPTER, or experts of
---packs, PACK:task.  Whatever is wrong with a recipe, its text, its plan or its run, is returned; wrong types of arguments and
---unknown options raise.  dry_run: the plan alone; what the merge would refuse (an output that exists, without overwrite) is refused, too.
---@param recipe table|string
---@param out string
---@param options? { directory?: string, profile?: onebitmerge.Profile, seed?: integer, shard_bytes?: integer, memory?: integer, overwrite?: boolean, resume?: boolean, dry_run?: boolean, method?: string|onebitmerge.Method, progress?: onebitmerge.Progress }
---@return onebitmerge.Plan|onebitmerge.MergePlan|nil, string? message, onebitmerge.Code? code
function obm.merge(recipe, out, options) end

---Merges tensors of one shape.  params: a number is global, a sequence one value per model.
---@param method string|onebitmerge.Method
---@param models onebitmerge.TensorLike[]
---@param base? onebitmerge.TensorLike
---@param params? table<string, number|boolean|(number|boolean)[]>
---@param options? { profile?: onebitmerge.Profile, seed?: integer }
---@return onebitmerge.tensor?, string? message, onebitmerge.Code? code
function obm.merge_tensors(method, models, base, params, options) end

---A part of one tensor, elements begin to begin + #vectors[1] - 1, row-major; its tensors (n) live as long as the call.
---@class onebitmerge.Tile
---@field tensor string the tensor's name
---@field shape integer[] of the whole tensor
---@field begin integer
---@field vectors onebitmerge.tensor[] task vectors, or the weights for a method without a base
---@field base? onebitmerge.tensor
---@field parameters table<string, any> a number or boolean, or a sequence of one per model

---Returns the merged task vector of the tile, F32 (n); the base is added to it.
---@alias onebitmerge.Method fun(tile: onebitmerge.Tile): onebitmerge.tensor

---Makes a merge method of a function: `merge_method: name` in recipes, merge_tensors(name, ...).  nil forgets it.  parameters:
---name = default, or a table with default, min, max, scope ("global"|"model"), required, type ("number"|"bool"), doc.  scope:
---"element" (tiles of any size, on which the result must not depend) or "tensor" (a tensor at once).
---@param name string
---@param fn? onebitmerge.Method
---@param options? { parameters?: table<string, any>, scope?: "element"|"tensor", base?: boolean, doc?: string, min_models?: integer, max_models?: integer }
function obm.register_method(name, fn, options) end

---@class onebitmerge.LoraMatrix
---@field name string
---@field rows integer
---@field cols integer
---@field rank integer  0: the tensor differs and is not in the adapter
---@field norm number  of the task vector
---@field energy number  the share of norm^2 that is kept

---A fine-tune's linear weights as a PEFT LoRA folder, cut by rank or by energy; the plan with dry_run.
---@param base string
---@param expert string
---@param out string
---@param options { rank?: integer, energy?: number, dtype?: "f32"|"bf16"|"f16", base_name?: string, overwrite?: boolean, dry_run?: boolean, progress?: onebitmerge.Progress }
---@return onebitmerge.LoraMatrix[]|onebitmerge.Plan|nil, string? message, onebitmerge.Code? code
function obm.extract_lora(base, expert, out, options) end

---@class onebitmerge.PlacementPlan ranges are [first, end), rows and heads counted from 0, nodes too
---@field numa string
---@field asked string
---@field reason string
---@field threads integer
---@field home integer
---@field nodes { os_index: integer, memory: integer, cores: integer, workers: integer, weight_bytes: integer, plane_bytes: integer, kv_bytes: integer, kv_heads?: integer[], remote_bytes: integer }[]
---@field workers { cpu?: integer, node: integer }[]
---@field matrices { role: string, name: string, layers: integer, rows: integer, cols: integer, bytes: integer, nodes?: integer[][], workers?: integer[][] }[]
---@field weight_bytes_per_token integer
---@field remote_weight_bytes_per_token integer
---@field remote_activation_bytes_per_token integer
---@field remote_bytes_per_token integer

---@alias onebitmerge.Numa "auto"|"shard"|"replicate"|"isolate"|"interleave"|"off"

---Where a model's rows, planes and KV heads would lie on a machine with NUMA nodes, and what workers read from other
---nodes for a token.
---@param model string
---@param options? { topology?: string, numa?: onebitmerge.Numa, threads?: integer, base?: string, z12?: onebitmerge.Z12, kv?: "f32"|"f16" }
---@return onebitmerge.PlacementPlan|nil, string? message, onebitmerge.Code? code
function obm.plan(model, options) end

---Every merge method, the built-in ones, then those that are registered: name, doc, source, needs_base, min_models,
---max_models, params.
---@return table[]
function obm.methods() end

---Version, ISA, BLAS, topology, threads, memory.
---@return table<string, any>
function obm.info() end

---Threads of objects opened from now on (0: one per core), and where they and a model's memory go on a machine with several
---NUMA nodes.
---@param n integer
---@param numa? onebitmerge.Numa
---@return true
function obm.set_threads(n, numa) end

---The module class.
---@param tensor_name string
---@param ndim? integer 2
---@return string
function obm.class_of(tensor_name, ndim) end

return obm
