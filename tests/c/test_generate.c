/* Sampling, generation, streams and scores on a tiny random model with a real tokenizer. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "model/model.h"
#include "tiny_model.h"

static obm_context *ctx;
static obm_model *model;
static char *dir;
static tiny shape = {"mistral", 450, 24, 37, 2, 4, 2, 6, 20, 0, OBM_BF16, 5, NULL};
static tiny_weights weights;

static void check_ok(obm_status status, const obm_error *err) {
    if (status != OBM_OK) fail_msg("%s: %s", obm_status_name(status), err->message);
}

static obm_model *open_model(void) {
    obm_model *m;
    obm_error err;
    check_ok(obm_model_open(ctx, dir, NULL, &m, &err), &err);
    return m;
}

static int setup(void **state) {
    (void)state;
    obm_error err;
    obm_context_options options = OBM_INIT(obm_context_options);
    char *text;
    size_t size;
    options.threads = 2;
    check_ok(obm_context_new(&options, &ctx, &err), &err);
    dir = tiny_folder();
    tiny_weights_new(&shape, &weights);
    if (tiny_write(&shape, &weights, dir, &err)) return -1;
    check_ok(obm__file_read(OBM_SOURCE_DIR "/tests/vectors/tokenizers/smollm2.json", &text, &size, &err), &err);
    if (tiny_write_text(dir, "tokenizer.json", text)) return -1;
    obm_free(text);
    if (tiny_write_text(
            dir, "tokenizer_config.json",
            "{\"chat_template\":\"{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + "
            "message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}{% if add_generation_prompt %}"
            "{{ '<|im_start|>assistant\\n' }}{% endif %}\"}"))
        return -1;
    model = open_model();
    return 0;
}

static int teardown(void **state) {
    (void)state;
    obm_model_free(model);
    tiny_weights_free(&weights);
    tiny_remove(dir);
    obm_context_free(ctx);
    return 0;
}

/* ---- sampling ---- */

#define V 40

/* What transformers' processors do, plainly: out[i] = probability of token i. */
static void plain_probabilities(const float *logits, double temperature, int k, double p, double min_p, double *out) {
    int order[V];
    double total = 0, cumulative = 0;
    for (int i = 0; i < V; i++) order[i] = i;
    for (int i = 0; i < V; i++)
        for (int j = i + 1; j < V; j++)
            if (logits[order[j]] > logits[order[i]]) { int t = order[i]; order[i] = order[j]; order[j] = t; }
    for (int r = 0; r < V; r++)
        out[order[r]] = k && r >= k ? 0 : exp((logits[order[r]] - logits[order[0]]) / temperature);
    for (int i = 0; i < V; i++) total += out[i];
    if (p > 0)   /* ascending: drop while the sum of what is dropped stays within 1 - p */
        for (int r = V - 1; r > 0; r--) {
            cumulative += out[order[r]] / total;
            if (cumulative <= 1 - p) out[order[r]] = 0;
        }
    for (int i = 0; i < V; i++)
        if (out[i] < min_p * out[order[0]]) out[i] = 0;
    total = 0;
    for (int i = 0; i < V; i++) total += out[i];
    for (int i = 0; i < V; i++) out[i] /= total;
}

static void samples_follow_the_distribution(void **state) {
    (void)state;
    const struct { double temperature; size_t k; double p, min_p;
    } cases[] = {{1, 0, 0, 0},         {0.7, 5, 0, 0}, {1.5, 0, 0.8, 0}, {1, 0, 0, 0.2},
                 {0.9, 12, 0.9, 0.05}, {1, 1, 0, 0},   {2, 0, 0.01, 0},  {1, 100, 0.999, 0}};
    const int draws = 20000;
    unsigned random = 7;
    float logits[V], copy[V];
    for (int i = 0; i < V; i++) logits[i] = (float)(tiny_random(&random) % 1000) / 250.0f - 2;
    logits[3] = -INFINITY;   /* a masked id */
    for (size_t c = 0; c < sizeof cases / sizeof *cases; c++) {
        obm_generate_options o = OBM_INIT(obm_generate_options);
        obm_error err;
        obm__sampler s;
        double expected[V];
        int count[V] = {0};
        o.temperature = cases[c].temperature;
        o.top_k = cases[c].k;
        o.top_p = cases[c].p;
        o.min_p = cases[c].min_p;
        o.seed = 11 + c;
        check_ok(obm__sampler_init(&s, *obm_kernels_list(), &o, 0, V, &err), &err);
        plain_probabilities(logits, cases[c].temperature, (int)cases[c].k, cases[c].p, cases[c].min_p, expected);
        for (int i = 0; i < draws; i++) {
            memcpy(copy, logits, sizeof copy);
            count[obm__sample(&s, copy, NULL, 0, (uint64_t)i)]++;
        }
        for (int i = 0; i < V; i++) {
            double mean = draws * expected[i], deviation = sqrt(mean * (1 - expected[i]));
            if (expected[i] == 0) assert_int_equal(count[i], 0);
            else if (fabs(count[i] - mean) > 5 * deviation + 1)
                fail_msg("case %zu, token %d: %d draws, expected %g", c, i, count[i], mean);
        }
        obm__sampler_clear(&s);
    }
}

static const float *logits_to_sort;
static int larger_first(const void *a, const void *b) {
    int x = *(const int *)a, y = *(const int *)b;
    float u = logits_to_sort[x], v = logits_to_sort[y];
    return u != v ? (u > v ? -1 : 1) : x - y;
}

/* Among hundreds of ids, many as likely as others: every draw is one of the fewest that reach top_p, and each of those is drawn. */
static void a_nucleus_is_the_smallest(void **state) {
    (void)state;
    enum { MANY = 600, DRAWS = 12000 };
    static float logits[MANY], copy[MANY];
    static int order[MANY], drawn[MANY];
    for (unsigned round = 0; round < 3; round++) {
        obm_generate_options o = OBM_INIT(obm_generate_options);
        obm_error err;
        obm__sampler s;
        unsigned random = 3 + round;
        double total = 0, sum = 0;
        size_t kept = 0;
        for (int i = 0; i < MANY; i++) {
            logits[i] = (float)(tiny_random(&random) % (round ? 40 : 1)) / 8.0f;
            order[i] = i;
            drawn[i] = 0;
        }
        logits_to_sort = logits;
        qsort(order, MANY, sizeof *order, larger_first);
        for (int i = 0; i < MANY; i++) total += exp((double)logits[i] - logits[order[0]]);
        o.temperature = 1;
        o.top_p = 0.4371;
        o.seed = round;
        while (sum < o.top_p * total) sum += exp((double)logits[order[kept++]] - logits[order[0]]);
        check_ok(obm__sampler_init(&s, *obm_kernels_list(), &o, 0, MANY, &err), &err);
        for (int i = 0; i < DRAWS; i++) {
            memcpy(copy, logits, sizeof copy);
            drawn[obm__sample(&s, copy, NULL, 0, (uint64_t)i)]++;
        }
        for (size_t i = 0; i < MANY; i++) assert_int_equal(drawn[order[i]] > 0, i < kept);
        obm__sampler_clear(&s);
    }
}

static void repetition_penalty_is_the_one_of_transformers(void **state) {
    (void)state;
    obm_generate_options o = OBM_INIT(obm_generate_options);
    obm_error err;
    obm__sampler s;
    float logits[4] = {3, 2.9f, -1, -2};
    const int32_t history[] = {0, 2, 0, 0};   /* repeated ids count once */
    o.repetition_penalty = 2;
    check_ok(obm__sampler_init(&s, *obm_kernels_list(), &o, 0, 4, &err), &err);
    assert_int_equal(obm__sample(&s, logits, history, 4, 0), 1);
    assert_true(logits[0] == 1.5f && logits[1] == 2.9f && logits[2] == -2 && logits[3] == -2);
    obm__sampler_clear(&s);
    /* one so small that logits overflow leaves those to draw from */
    o.repetition_penalty = 1e-40;
    o.temperature = 1;
    for (int k = 0; k < 4; k++) {
        float drawn[4] = {3, 2.9f, 0.5f, -2};
        o.top_p = k & 1 ? 0.9 : 0;
        o.min_p = k & 2 ? 0.1 : 0;
        check_ok(obm__sampler_init(&s, *obm_kernels_list(), &o, 0, 4, &err), &err);
        for (uint64_t step = 0; step < 20; step++) assert_int_equal(obm__sample(&s, drawn, history, 2, step) % 2, 0);
        obm__sampler_clear(&s);
    }
}

static void argmax_is_the_first_of_the_largest(void **state) {
    (void)state;
    for (const obm_kernels *const *k = obm_kernels_list(); *k; k++) {
        float x[100];
        for (int64_t n = 1; n <= 100; n++) {
            for (int64_t i = 0; i < n; i++) x[i] = i < n / 2 ? (float)i : -1; /* a record at each of the first half */
            assert_int_equal(obm__argmax(*k, x, n), n / 2 ? n / 2 - 1 : 0);
            x[n - 1] = x[n / 3] = 200;
            assert_int_equal(obm__argmax(*k, x, n), n / 3);
            x[n / 3] = NAN;
            assert_int_equal(obm__argmax(*k, x, n), n / 3);
            for (int64_t i = 0; i < n; i++) x[i] = -INFINITY;
            assert_int_equal(obm__argmax(*k, x, n), 0);
        }
    }
}

static void random_numbers_depend_on_seed_stream_and_step(void **state) {
    (void)state;
    double sum = 0;
    for (uint64_t i = 0; i < 1000; i++) {
        double u = obm__random_uniform(1, 2, i);
        assert_true(u >= 0 && u < 1);
        assert_true(u != obm__random_uniform(2, 1, i) && u != obm__random_uniform(1, 3, i) &&
                    u != obm__random_uniform(1, 2, i + 1));
        sum += u;
    }
    assert_true(fabs(sum / 1000 - 0.5) < 0.05);   /* 5 standard deviations */
}

/* ---- generation ---- */

#define N 11
static const char *const words[N] = {
    "the sea",
    "a b c",
    "in",
    "Then she said: hello there",
    "1 + 2 =",
    "es",
    "x",
    "th th th th th",
    "long long prompt that goes on and on and on until it is over one tile of positions, which takes a while, "
    "and then some more words to be safe",
    "\xc3\xa9t\xc3\xa9",
    "end"};

static void make_prompts(obm_prompt *p) {
    memset(p, 0, N * sizeof *p);
    for (int i = 0; i < N; i++) p[i].text = words[i];
}

static void generate(obm_model *m, const obm_prompt *p, size_t n, const obm_generate_options *o, obm_completion *out) {
    obm_error err;
    check_ok(obm_model_generate_batch(m, p, n, o, out, &err), &err);
}

static void clear(obm_completion *c, size_t n) {
    for (size_t i = 0; i < n; i++) obm_completion_clear(&c[i]);
}

static void assert_same(const obm_completion *a, const obm_completion *b) {
    assert_int_equal(a->n_ids, b->n_ids);
    assert_memory_equal(a->ids, b->ids, a->n_ids * sizeof *a->ids);
    assert_int_equal(a->text_len, b->text_len);
    assert_memory_equal(a->text, b->text, a->text_len);
    assert_int_equal(a->finish, b->finish);
    assert_int_equal(a->n_prompt, b->n_prompt);
}

/* Greedy generation is the argmax of the logits of what is there so far, fed through the same paths. */
static void greedy_is_the_argmax_of_logits(void **state) {
    (void)state;
    obm_generate_options o = OBM_INIT(obm_generate_options);
    obm_prompt p[N];
    obm_completion c;
    obm_error err;
    make_prompts(p);
    o.max_tokens = 12;
    o.ignore_eos = true;
    generate(model, p, 1, &o, &c);
    int32_t *ids, all[64];
    size_t n;
    float logits[450];
    check_ok(obm_tokenizer_encode(obm_model_tokenizer(model), words[0], strlen(words[0]), true, &ids, &n, &err), &err);
    assert_int_equal(c.n_prompt, n);
    assert_int_equal(c.n_ids, 12);
    memcpy(all, ids, n * sizeof *ids);
    memcpy(all + n, c.ids, c.n_ids * sizeof *ids);
    for (size_t i = 0; i < c.n_ids; i++) {
        check_ok(obm_model_logits(model, all, n + i, NULL, logits, &err), &err);
        assert_int_equal(obm__argmax(*obm_kernels_list(), logits, 450), c.ids[i]);
    }
    char *text;
    size_t len;
    check_ok(obm_tokenizer_decode(obm_model_tokenizer(model), c.ids, c.n_ids, true, &text, &len, &err), &err);
    assert_int_equal(len, c.text_len);
    assert_memory_equal(text, c.text, len);
    obm_free(text);
    obm_free(ids);
    clear(&c, 1);
}

static void batching_does_not_matter(void **state) {
    (void)state;
    obm_prompt p[N];
    obm_completion reference[N], got[N];
    make_prompts(p);
    for (int sampled = 0; sampled < 2; sampled++) {
        obm_generate_options o = OBM_INIT(obm_generate_options);
        o.temperature = sampled ? 0.9 : 0;
        o.top_p = sampled ? 0.95 : 0;
        o.seed = 3;
        o.max_tokens = 15;
        o.batch = 1;
        generate(model, p, N, &o, reference);
        const size_t sizes[] = {2, 3, 8, 100};
        for (size_t b = 0; b < 4; b++) {
            o.batch = sizes[b];
            generate(model, p, N, &o, got);
            for (int i = 0; i < N; i++) assert_same(&got[i], &reference[i]);
            clear(got, N);
        }
        clear(reference, N);
    }
}

/* ---- streams ---- */

static void stream_all(const obm_prompt *p, const obm_generate_options *o, obm__buffer *text, obm_completion *copy) {
    obm_stream *s;
    obm_error err;
    const char *piece;
    size_t len;
    check_ok(obm_stream_open(model, p, o, &s, &err), &err);
    for (;;) {
        check_ok(obm_stream_next(s, &piece, &len, &err), &err);
        if (!piece) break;
        assert_true(len > 0);
        obm__buffer_add(text, piece, len);
    }
    const obm_completion *r = obm_stream_result(s);
    *copy = *r;
    copy->ids = malloc(r->n_ids * sizeof *r->ids);
    memcpy(copy->ids, r->ids, r->n_ids * sizeof *r->ids);
    copy->text = obm__strndup(text->data ? text->data : "", text->size);
    assert_int_equal(r->text_len, text->size);
    obm_stream_free(s);
}

static void a_stream_gives_what_generate_gives(void **state) {
    (void)state;
    obm_prompt p[N];
    make_prompts(p);
    obm_generate_options o = OBM_INIT(obm_generate_options);
    o.temperature = 1;
    o.seed = 8;
    o.max_tokens = 30;
    for (int i = 0; i < N; i++) {
        obm_completion c, streamed;
        obm__buffer text = {0};
        generate(model, &p[i], 1, &o, &c);
        stream_all(&p[i], &o, &text, &streamed);
        assert_same(&streamed, &c);
        obm__buffer_free(&text);
        clear(&streamed, 1);
        clear(&c, 1);
    }
}

static void a_stream_holds_the_model_until_it_ends(void **state) {
    (void)state;
    obm_prompt p[N];
    obm_stream *s;
    obm_error err;
    const char *piece;
    size_t len;
    float logits[450];
    const int32_t id = 5;
    make_prompts(p);
    obm_generate_options o = OBM_INIT(obm_generate_options);
    o.max_tokens = 3;
    check_ok(obm_stream_open(model, &p[0], &o, &s, &err), &err);
    assert_int_equal(obm_model_logits(model, &id, 1, NULL, logits, &err), OBM_E_BUSY);
    do check_ok(obm_stream_next(s, &piece, &len, &err), &err);
    while (piece);
    check_ok(obm_model_logits(model, &id, 1, NULL, logits, &err), &err);
    check_ok(obm_stream_next(s, &piece, &len, &err), &err);   /* the end again */
    assert_null(piece);
    obm_stream_free(s);
    check_ok(obm_stream_open(model, &p[0], &o, &s, &err), &err);   /* and one that is dropped half way */
    obm_stream_free(s);
    check_ok(obm_model_logits(model, &id, 1, NULL, logits, &err), &err);
}

/* ---- endings ---- */

static void stop_strings(void **state) {
    (void)state;
    obm_prompt p[N];
    make_prompts(p);
    obm_generate_options o = OBM_INIT(obm_generate_options);
    o.max_tokens = 40;
    o.temperature = 1.2;
    o.seed = 21;
    o.ignore_eos = true;
    int tried = 0;
    for (int i = 0; i < N; i++) {
        obm_completion c, cut, streamed;
        obm__buffer text = {0};
        o.n_stop = 0;
        generate(model, &p[i], 1, &o, &c);
        if (c.text_len >= 12 && strlen(c.text) == c.text_len) {
            /* Five bytes from the middle (at characters' edges), a longer string that begins one byte earlier and never
             * completes, and one that does not occur at all. */
            size_t at = c.text_len / 2, length = 5;
            while (at && ((unsigned char)c.text[at] & 0xc0) == 0x80) at--;
            while (((unsigned char)c.text[at + length] & 0xc0) == 0x80) length++;
            char stop[32], longer[64], *found;
            snprintf(stop, sizeof stop, "%.*s", (int)length, c.text + at);
            snprintf(longer, sizeof longer, "%.*s~~", (int)length + 1, c.text + at - 1);
            const char *stops[] = {"@@never@@", longer, stop};
            o.stop = stops;
            o.n_stop = 3;
            found = strstr(c.text, stop);
            generate(model, &p[i], 1, &o, &cut);
            stream_all(&p[i], &o, &text, &streamed);
            assert_int_equal(cut.text_len, found - c.text);
            assert_memory_equal(cut.text, c.text, cut.text_len);
            assert_int_equal(cut.finish, OBM_FINISH_STOP);
            assert_true(cut.n_ids <= c.n_ids);
            assert_same(&streamed, &cut);
            clear(&cut, 1);
            clear(&streamed, 1);
            tried++;
        }
        obm__buffer_free(&text);
        clear(&c, 1);
    }
    assert_true(tried >= 5);
}

static void end_of_sequence_ids(void **state) {
    (void)state;
    obm_prompt p[N];
    obm_completion c, ended;
    char text[64];
    make_prompts(p);
    obm_generate_options o = OBM_INIT(obm_generate_options);
    o.max_tokens = 10;
    o.ignore_eos = true;
    generate(model, p, 1, &o, &c);
    size_t first = 0;   /* where the id that comes third occurs first */
    while (c.ids[first] != c.ids[2]) first++;
    snprintf(text, sizeof text, "{\"eos_token_id\":[1,%d]}", c.ids[2]);
    tiny_write_text(dir, "generation_config.json", text);
    obm_model *m = open_model();
    o.ignore_eos = false;
    generate(m, p, 1, &o, &ended);
    assert_int_equal(ended.finish, OBM_FINISH_STOP);
    assert_int_equal(ended.n_ids, first + 1);
    assert_memory_equal(ended.ids, c.ids, ended.n_ids * sizeof *c.ids);
    clear(&ended, 1);
    o.ignore_eos = true;
    generate(m, p, 1, &o, &ended);
    assert_int_equal(ended.n_ids, 10);
    assert_int_equal(ended.finish, OBM_FINISH_LENGTH);
    clear(&ended, 1);
    clear(&c, 1);
    obm_model_free(m);
    tiny_write_text(dir, "generation_config.json", "{}");
}

static void the_context_ends(void **state) {
    (void)state;
    int32_t ids[200];
    for (int i = 0; i < 200; i++) ids[i] = 3 + i;
    obm_prompt p = {.ids = ids, .n_ids = 195};
    obm_completion c;
    obm_generate_options o = OBM_INIT(obm_generate_options);
    o.ignore_eos = true;
    generate(model, &p, 1, &o, &c);
    assert_int_equal(c.n_ids, 5);
    assert_int_equal(c.finish, OBM_FINISH_LENGTH);
    clear(&c, 1);
    p.n_ids = 200;
    generate(model, &p, 1, &o, &c);
    assert_int_equal(c.n_ids, 1);
    clear(&c, 1);
}

/* ---- prompts, callbacks, errors ---- */

static obm_status refuse_to_render(void *user, const obm_tokenizer *t, const obm_message *messages, size_t n,
                                   const char **text, obm_error *err) {
    (void)user;
    (void)t;
    (void)messages;
    (void)n;
    (void)text;
    (void)err;
    return OBM_E_USER;
}

static void forms_of_a_prompt(void **state) {
    (void)state;
    const obm_message turn = {"user", "in the sea"};
    obm_prompt p[4] = {
        {.messages = &turn, .n_messages = 1}, {.text = "in the sea", .chat = true}, {.text = "in the sea"}, {0}};
    obm_completion c[4];
    obm_error err;
    char *text;
    int32_t *ids;
    size_t n;
    obm_generate_options o = OBM_INIT(obm_generate_options);
    o.max_tokens = 6;
    check_ok(obm_tokenizer_apply_template(obm_model_tokenizer(model), &turn, 1, true, &text, &err), &err);
    check_ok(obm_tokenizer_encode(obm_model_tokenizer(model), text, strlen(text), false, &ids, &n, &err), &err);
    p[3].ids = ids;
    p[3].n_ids = n;
    generate(model, p, 4, &o, c);
    assert_same(&c[0], &c[1]);
    assert_same(&c[0], &c[3]);
    assert_int_equal(c[0].n_prompt, n);
    assert_true(c[2].n_prompt < n);
    clear(c, 4);
    o.chat = true;
    generate(model, &p[2], 1, &o, c);
    assert_int_equal(c[0].n_prompt, n);
    clear(c, 1);
    /* a built-in template by name, whatever the model's own is, and before a callback that renders */
    char *other = NULL;
    int32_t *other_ids = NULL;
    size_t other_n = 0;
    const obm_tokenizer *t = obm_model_tokenizer(model);
    check_ok(obm_tokenizer_builtin_template(t, "gemma3", &turn, 1, true, &other, &err), &err);
    check_ok(obm_tokenizer_encode(t, other, strlen(other), false, &other_ids, &other_n, &err), &err);
    assert_int_not_equal(other_n, n);
    o.template_name = "gemma3";
    o.render = refuse_to_render;
    generate(model, &p[2], 1, &o, c);
    assert_int_equal(c[0].n_prompt, other_n);
    clear(c, 1);
    o.template_name = "gemma9";
    assert_int_equal(obm_model_generate_batch(model, &p[2], 1, &o, c, &err), OBM_E_ARG);
    assert_non_null(strstr(err.message, "\"gemma9\" (llama2, mistral"));
    obm_free(other);
    obm_free(other_ids);
    obm_free(text);
    obm_free(ids);
}

typedef struct calls { uint64_t done; int count, stop_at; } calls;

static int on_progress(void *user, const char *what, uint64_t done, uint64_t total) {
    calls *c = user;
    assert_string_equal(what, "generate");
    assert_int_equal(total, N);
    assert_true(done >= c->done);
    c->done = done;
    return ++c->count == c->stop_at;
}

static int on_text(void *user, const char *text, size_t len) {
    calls *c = user;
    assert_true(text && len);
    return ++c->count == c->stop_at;
}

static void callbacks_report_and_stop(void **state) {
    (void)state;
    obm_prompt p[N];
    obm_completion out[N];
    obm_error err;
    calls c = {0};
    make_prompts(p);
    memset(out, 7, sizeof out);
    obm_generate_options o = OBM_INIT(obm_generate_options);
    o.max_tokens = 5;
    o.ignore_eos = true;
    o.progress = on_progress;
    o.progress_user = &c;
    generate(model, p, N, &o, out);
    assert_int_equal(c.done, N);
    clear(out, N);
    memset(out, 7, sizeof out);
    c = (calls){.stop_at = 4};
    assert_int_equal(obm_model_generate_batch(model, p, N, &o, out, &err), OBM_E_USER);
    for (size_t i = 0; i < sizeof out; i++) assert_int_equal(((unsigned char *)out)[i], 7);
    o.progress = NULL;
    c = (calls){0};
    check_ok(obm_model_generate(model, "the sea", &o, on_text, &c, &err), &err);
    assert_true(c.count > 0);
    c = (calls){.stop_at = 1};
    assert_int_equal(obm_model_generate(model, "the sea", &o, on_text, &c, &err), OBM_E_USER);
    check_ok(obm_model_generate(model, "the sea", &o, on_text, &c, &err), &err);
}

static void wrong_options_are_refused(void **state) {
    (void)state;
    obm_prompt p[N];
    obm_completion out[N];
    obm_error err;
    const double route[] = {1};
    const char *const empty[] = {""};
    make_prompts(p);
#define REFUSED(field, value, word)                                                                                    \
    do {                                                                                                               \
        obm_generate_options o = OBM_INIT(obm_generate_options);                                                       \
        o.n_routes = o.n_stop = 1;                                                                                     \
        const char *const stop[] = {"x"};                                                                              \
        o.stop = stop;                                                                                                 \
        o.field = value;                                                                                               \
        assert_int_equal(obm_model_generate_batch(model, p, N, &o, out, &err), OBM_E_ARG);                             \
        if (!strstr(err.message, word)) fail_msg("%s", err.message);                                                   \
    } while (0)
    REFUSED(temperature, -1, "temperature");
    REFUSED(temperature, NAN, "temperature");
    REFUSED(top_p, 1.5, "top_p");
    REFUSED(min_p, -0.1, "min_p");
    REFUSED(repetition_penalty, INFINITY, "repetition_penalty");
    REFUSED(routes, route, "plain model");
    REFUSED(stop, empty, "stop string 0");
    const int32_t bad = 450;
    obm_prompt wrong[] = {{0}, {.ids = &bad, .n_ids = 1}, {.ids = &bad, .n_ids = 0}};
    for (int i = 0; i < 3; i++)
        assert_int_equal(obm_model_generate_batch(model, &wrong[i], 1, NULL, out, &err), OBM_E_ARG);
    assert_string_equal(err.message, "expected at least one token id, found none");
    const int32_t good = 3;
    obm_prompt two[] = {{.ids = &good, .n_ids = 1}, {.ids = &bad, .n_ids = 1}};
    assert_int_equal(obm_model_generate_batch(model, two, 2, NULL, out, &err), OBM_E_ARG);
    assert_non_null(strstr(err.message, "prompt 1: token id 450 at index 0 is outside the vocabulary"));
}

/* ---- logits that are no numbers ---- */

static void logits_have_to_be_numbers(void **state) {
    (void)state;
    float masked[] = {-INFINITY, 2, -INFINITY}, nan[] = {1, NAN, 2}, all[] = {-INFINITY, -INFINITY},
          inf[] = {0, INFINITY};
    obm_error err;
    assert_int_equal(obm__logits_check(*obm_kernels_list(), masked, 3, 0, 0, &err), OBM_OK);
    assert_int_equal(obm__logits_check(*obm_kernels_list(), nan, 3, 7, 5, &err), OBM_E_VALUE);
    assert_non_null(strstr(err.message, "logits are not finite at position 7 (prompt 5)"));
    assert_int_equal(obm__logits_check(*obm_kernels_list(), all, 2, 0, 0, &err), OBM_E_VALUE);
    assert_int_equal(obm__logits_check(*obm_kernels_list(), inf, 2, 0, 0, &err), OBM_E_VALUE);
}

/* A model whose last norm is NaN: one can look at its logits, and nothing is made of them. */
static void a_broken_model_says_so(void **state) {
    (void)state;
    static const int32_t ids[] = {5, 6, 7};
    char *broken = tiny_folder();
    float logits[450];
    obm_error err;
    obm_model *m = NULL;
    for (int i = 0; i < weights.n; i++) {
        if (strcmp(weights.t[i].name, "model.norm.weight")) continue;
        float before = weights.t[i].data[1];
        weights.t[i].data[1] = NAN;
        assert_int_equal(tiny_write(&shape, &weights, broken, &err), 0);
        weights.t[i].data[1] = before;
    }
    check_ok(obm_model_open(ctx, broken, NULL, &m, &err), &err);
    check_ok(obm_model_logits(m, ids, 3, NULL, logits, &err), &err);
    assert_true(isnan(logits[0]));
    obm_prompt p[2] = {{.ids = ids, .n_ids = 3}, {.ids = ids, .n_ids = 2}};
    obm_completion out[2];
    obm_stream *s = NULL;
    assert_int_equal(obm_model_generate_batch(m, p, 2, NULL, out, &err), OBM_E_VALUE);
    assert_non_null(strstr(err.message, "logits are not finite at position 2 (prompt 0)"));
    assert_int_equal(obm_stream_open(m, &p[1], NULL, &s, &err), OBM_E_VALUE);
    obm_score_item item = {.prompt = p[1], .continuation_ids = ids, .n_continuation_ids = 2};
    obm_score score;
    assert_int_equal(obm_model_score(m, &item, 1, NULL, &score, &err), OBM_E_VALUE);
    assert_non_null(strstr(err.message, "logits are not finite at position 1 (prompt 0)"));
    check_ok(obm_model_logits(m, ids, 3, NULL, logits, &err), &err);   /* failures leave the model usable */
    obm_model_free(m);
    tiny_remove(broken);
}

/* ---- scores ---- */

/* token_logprobs against a plain log-softmax of the logits. */
static void check_score(const obm_score *s, const int32_t *ids, size_t n, size_t first) {
    float *logits = malloc(n * 450 * sizeof *logits);
    obm_run_options all = OBM_INIT(obm_run_options);
    obm_error err;
    double sum = 0;
    bool greedy = true;
    all.all = true;
    check_ok(obm_model_logits(model, ids, n, &all, logits, &err), &err);
    assert_int_equal(s->n, n - first);
    for (size_t t = first; t < n; t++) {
        const float *row = logits + (t - 1) * 450;
        double total = 0;
        for (int i = 0; i < 450; i++) {
            total += exp(row[i]);
            if (row[i] > row[ids[t]]) greedy = false;
        }
        assert_true(fabs(s->token_logprobs[t - first] - (row[ids[t]] - log(total))) < 1e-9);
        sum += s->token_logprobs[t - first];
    }
    assert_true(fabs(s->logprob - sum) < 1e-9 && fabs(s->perplexity - exp(-sum / (double)s->n)) < 1e-6 * s->perplexity);
    assert_int_equal(s->is_greedy, greedy);
    free(logits);
}

static void scores_are_sums_of_log_probabilities(void **state) {
    (void)state;
    const char *prompt = "Then she said", *continuation = " hello there in the sea",
               *whole = "Then she said hello there in the sea";
    const obm_tokenizer *t = obm_model_tokenizer(model);
    obm_error err;
    int32_t *ids;
    size_t n, n_prompt;
    check_ok(obm_tokenizer_encode(t, prompt, strlen(prompt), true, &ids, &n_prompt, &err), &err);
    obm_free(ids);
    check_ok(obm_tokenizer_encode(t, whole, strlen(whole), true, &ids, &n, &err), &err);
    obm_generate_options o = OBM_INIT(obm_generate_options);
    obm_completion c;
    obm_prompt p = {.ids = ids, .n_ids = n};
    o.max_tokens = 100;   /* more than one tile of scored positions */
    o.ignore_eos = true;
    generate(model, &p, 1, &o, &c);
    obm_score_item items[] = {{.prompt = {.text = prompt}, .continuation = continuation},
                              {.continuation = whole},
                              {.prompt = p, .continuation_ids = c.ids, .n_continuation_ids = c.n_ids},
                              {.prompt = {.ids = ids, .n_ids = n_prompt}, .continuation = continuation}};
    obm_score scores[4];
    check_ok(obm_model_score(model, items, 4, NULL, scores, &err), &err);
    check_score(&scores[0], ids, n, n_prompt);
    check_score(&scores[1], ids, n, 1);
    check_score(&scores[3], ids, n, n_prompt);
    int32_t *all = malloc((n + c.n_ids) * sizeof *all);
    memcpy(all, ids, n * sizeof *all);
    memcpy(all + n, c.ids, c.n_ids * sizeof *all);
    check_score(&scores[2], all, n + c.n_ids, n);
    for (int i = 0; i < 4; i++) obm_score_clear(&scores[i]);
    free(all);
    obm_free(ids);
    clear(&c, 1);
}

static void a_seam_inside_a_token_is_encoded_apart(void **state) {
    (void)state;
    const obm_tokenizer *t = obm_model_tokenizer(model);
    obm_error err;
    int32_t *a, *b;
    size_t na, nb;
    check_ok(obm_tokenizer_encode(t, "in t", 4, true, &a, &na, &err),
             &err); /* " the" is one token, so this seam is inside it */
    check_ok(obm_tokenizer_encode(t, "he", 2, false, &b, &nb, &err), &err);
    int32_t all[16];
    memcpy(all, a, na * sizeof *a);
    memcpy(all + na, b, nb * sizeof *b);
    obm_score_item item = {.prompt = {.text = "in t"}, .continuation = "he"};
    obm_score s;
    check_ok(obm_model_score(model, &item, 1, NULL, &s, &err), &err);
    check_score(&s, all, na + nb, na);
    obm_score_clear(&s);
    obm_free(a);
    obm_free(b);
}

static void wrong_items_are_refused(void **state) {
    (void)state;
    obm_error err;
    obm_score out[2];
    const double route[] = {1};
    obm_score_item items[] = {{.prompt = {.text = "in"}, .continuation = " the"},
                              {.prompt = {.text = "in"}, .continuation = ""}};
    assert_int_equal(obm_model_score(model, items, 2, NULL, out, &err), OBM_E_ARG);
    assert_non_null(strstr(err.message, "item 1"));
    items[1].continuation = NULL;
    assert_int_equal(obm_model_score(model, items, 2, NULL, out, &err), OBM_E_ARG);
    items[1].continuation = "x";
    items[1].route = route;
    assert_int_equal(obm_model_score(model, items, 2, NULL, out, &err), OBM_E_ARG);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(argmax_is_the_first_of_the_largest),
        cmocka_unit_test(samples_follow_the_distribution),
        cmocka_unit_test(a_nucleus_is_the_smallest),
        cmocka_unit_test(repetition_penalty_is_the_one_of_transformers),
        cmocka_unit_test(random_numbers_depend_on_seed_stream_and_step),
        cmocka_unit_test(greedy_is_the_argmax_of_logits),
        cmocka_unit_test(logits_have_to_be_numbers),
        cmocka_unit_test(a_broken_model_says_so),
        cmocka_unit_test(batching_does_not_matter),
        cmocka_unit_test(a_stream_gives_what_generate_gives),
        cmocka_unit_test(a_stream_holds_the_model_until_it_ends),
        cmocka_unit_test(stop_strings),
        cmocka_unit_test(end_of_sequence_ids),
        cmocka_unit_test(the_context_ends),
        cmocka_unit_test(forms_of_a_prompt),
        cmocka_unit_test(callbacks_report_and_stop),
        cmocka_unit_test(wrong_options_are_refused),
        cmocka_unit_test(scores_are_sums_of_log_probabilities),
        cmocka_unit_test(a_seam_inside_a_token_is_encoded_apart),
        cmocka_unit_test(wrong_items_are_refused),
    };
    return cmocka_run_group_tests_name("generate", tests, setup, teardown);
}
