/* tests/vectors/dynamic.txt: checkpoints to a pack to materialised tensors, equal to the bit. */
#include "delta_fixture.h"

enum { MAX_TENSORS = 4, MAX_TASKS = 4, MAX_VALUES = 1024 };

typedef struct reader {
    char *text, *at;
} reader;

/* The next word, or NULL at the end of the line. */
static char *next_word(char **line) {
    while (**line == ' ') ++*line;
    if (!**line) return NULL;
    char *word = *line;
    *line += strcspn(*line, " ");
    if (**line) *(*line)++ = 0;
    return word;
}

/* The next line without comments; NULL at the end of the file. */
static char *next_line(reader *r) {
    while (r->at && *r->at) {
        char *line = r->at, *end = strchr(line, '\n');
        if (end) *end = 0;
        r->at = end ? end + 1 : NULL;
        if (*line && *line != '#') return line;
    }
    return NULL;
}

static size_t read_values(char **line, float *out) {
    size_t n = 0;
    for (char *word; (word = next_word(line)); n++) {
        assert_true(n < MAX_VALUES);
        out[n] = strtof(word, NULL);
    }
    return n;
}

typedef struct model {
    char *task, *policy, *scale;
    int planes;
    float values[MAX_TENSORS][MAX_VALUES];
} model;

typedef struct family {
    obm_context *ctx;
    char *dir;
    obm_pack *pack;
    fixture_tensor tensors[MAX_TENSORS];
    size_t n_tensors, n_experts, merges;
    model base, experts[MAX_TASKS];
} family;

static char *write_one(family *f, const char *name, const model *m) {
    fixture_tensor t[MAX_TENSORS];
    for (size_t i = 0; i < f->n_tensors; i++) {
        t[i] = f->tensors[i];
        t[i].values = m->values[i];
    }
    return fixture_model(f->ctx, f->dir, name, t, f->n_tensors);
}

static void compress_family(family *f, const char *name) {
    obm_expert experts[MAX_TASKS];
    char *paths[MAX_TASKS], *folder = obm__path_join(f->dir, name), *own = f->dir;
    f->dir = folder; /* a folder for each family */
    char *base = write_one(f, "base", &f->base), *pack = obm__path_join(folder, "pack");
    for (size_t k = 0; k < f->n_experts; k++) {
        paths[k] = write_one(f, f->experts[k].task, &f->experts[k]);
        experts[k] = OBM_INIT(obm_expert);
        experts[k].name = f->experts[k].task, experts[k].path = paths[k], experts[k].policy = f->experts[k].policy;
        experts[k].scale = f->experts[k].scale, experts[k].planes = f->experts[k].planes;
    }
    obm_pack_free(f->pack);
    OK(obm_compress(f->ctx, base, experts, f->n_experts, NULL, pack, NULL, &f->pack, err));
    for (size_t k = 0; k < f->n_experts; k++) obm_free(paths[k]);
    obm_free(base), obm_free(pack), obm_free(folder);
    f->dir = own;
}

static void read_tensor(family *f, char *line) {
    fixture_tensor *t = &f->tensors[f->n_tensors++];
    assert_true(f->n_tensors <= MAX_TENSORS);
    *t = (fixture_tensor){.name = next_word(&line), .dtype = OBM_F32};
    int64_t rows = strtol(next_word(&line), NULL, 10), cols = strtol(next_word(&line), NULL, 10);
    t->ndim = rows ? 2 : 1;
    t->shape[0] = rows ? rows : cols;
    t->shape[1] = cols;
}

static size_t tensor_index(const family *f, const char *name) {
    size_t i = 0;
    while (i < f->n_tensors && strcmp(f->tensors[i].name, name)) i++;
    assert_true(i < f->n_tensors);
    return i;
}

static void read_family(family *f, reader *r, char *line) {
    char *name = next_word(&line);
    f->n_tensors = f->n_experts = 0;
    while ((line = next_line(r))) {
        char *key = next_word(&line);
        if (!strcmp(key, "end")) break;
        if (!strcmp(key, "tensor")) read_tensor(f, line);
        if (!strcmp(key, "base")) read_values(&line, f->base.values[f->n_tensors - 1]);
        if (!strcmp(key, "expert")) {
            model *m = &f->experts[f->n_experts++];
            assert_true(f->n_experts <= MAX_TASKS);
            m->task = next_word(&line), m->policy = next_word(&line), m->scale = next_word(&line);
            m->planes = (int)strtol(next_word(&line), NULL, 10);
        }
        if (!strcmp(key, "own"))
            read_values(&line, f->experts[f->n_experts - 1].values[tensor_index(f, next_word(&line))]);
    }
    compress_family(f, name);
}

static void read_settings(family *f, char *line) {
    obm_pack_settings s = OBM_INIT(obm_pack_settings);
    s.lambda = strtod(next_word(&line), NULL);
    s.reading = strcmp(next_word(&line), "recomputed") ? OBM_READING_ONTO_BASE : OBM_READING_RECOMPUTED;
    s.profile = strcmp(next_word(&line), "paper") ? OBM_PROFILE_MERGEKIT : OBM_PROFILE_PAPER;
    s.density = strtod(next_word(&line), NULL);
    OK(obm_pack_set_settings(f->pack, &s, err));
}

static void check_value(family *f, const double *weights, char *line) {
    static float expected[MAX_VALUES], found[MAX_VALUES];
    const char *name = next_word(&line);
    size_t n = read_values(&line, expected);
    OK(obm_pack_materialise(f->pack, weights, name, found, err));
    for (size_t i = 0; i < n; i++) {
        if (found[i] != expected[i])
            fail_msg("merge %zu, %s, element %zu: %a, expected %a", f->merges, name, i, (double)found[i],
                     (double)expected[i]);
    }
}

static void read_merge(family *f, reader *r) {
    double weights[MAX_TASKS] = {0};
    f->merges++;
    for (char *line; (line = next_line(r));) {
        char *key = next_word(&line);
        if (!strcmp(key, "end")) break;
        if (!strcmp(key, "settings")) read_settings(f, line);
        if (!strcmp(key, "route"))
            for (size_t k = 0; k < f->n_experts; k++) weights[k] = strtod(next_word(&line), NULL);
        if (!strcmp(key, "value")) check_value(f, weights, line);
    }
}

static void test_vectors(void **state) {
    (void)state;
    family *f = calloc(1, sizeof *f);
    reader r;
    size_t size;
    OK(obm__file_read(OBM_SOURCE_DIR "/tests/vectors/dynamic.txt", &r.text, &size, err));
    r.at = r.text;
    f->ctx = fixture_context(2);
    f->dir = fixture_folder();
    for (char *line; (line = next_line(&r));) {
        char *key = next_word(&line);
        if (!strcmp(key, "family"))
            read_family(f, &r, line);
        else if (!strcmp(key, "merge"))
            read_merge(f, &r);
        else
            fail_msg("unknown line %s", key);
    }
    assert_true(f->merges > 40);
    obm_pack_free(f->pack);
    obm_context_free(f->ctx);
    fixture_remove(f->dir);
    obm_free(f->dir), obm_free(r.text);
    free(f);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_vectors)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
