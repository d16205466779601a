/* A PEFT LoRA adapter against its base: every tensor of the adapter becomes part of one pair, or an error that names
 * it. What the adapter does not touch is the base's own tensor. */
#include "../text/text.h"
#include "delta.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define PREFIX "base_model.model."
#define INNER "base_layer." /* peft's name of what a LoRA layer wraps */

/* ---- names ---- */

typedef enum { PART_A, PART_B, PART_EMBEDDING_A, PART_EMBEDDING_B, PART_WHOLE } part;

static const struct {
    const char *suffix;
    part part;
} suffixes[] = {{".lora_A.weight", PART_A},
                {".lora_B.weight", PART_B},
                {".lora_embedding_A", PART_EMBEDDING_A},
                {".lora_embedding_B", PART_EMBEDDING_B}};

/* What other methods leave in a file, whatever the config says. */
static const struct {
    const char *mark, *what;
} foreign[] = {{"lora_magnitude_vector", "DoRA"},
               {"lora_B.bias", "a bias of a LoRA layer"},
               {"lora_A.bias", "a bias of a LoRA layer"},
               {".hada_", "LoHa"},
               {".lokr_", "LoKr"},
               {".ia3_", "IA3"},
               {"prompt_embeddings", "prompt tuning"},
               {"prompt_encoder", "p-tuning"},
               {".oft_", "OFT"},
               {".boft_", "BOFT"},
               {".vera_", "VeRA"},
               {"token_adapter", "single trained token rows"},
               {"trainable_tokens", "single trained token rows"}};

/* `module`: without prefix and suffix; for a whole tensor its name in the base.  Owned; NULL without memory. */
static char *split_name(const char *name, part *what) {
    if (!strncmp(name, PREFIX, sizeof PREFIX - 1)) name += sizeof PREFIX - 1;
    size_t n = strlen(name);
    for (size_t i = 0; i < sizeof suffixes / sizeof *suffixes; i++) {
        size_t m = strlen(suffixes[i].suffix);
        if (n <= m || strcmp(name + n - m, suffixes[i].suffix)) continue;
        *what = suffixes[i].part;
        return obm__strndup(name, n - m);
    }
    *what = PART_WHOLE;
    const char *inner = strstr(name, "." INNER);
    if (!inner) return obm__strdup(name);
    return obm__format("%.*s%s", (int)(inner + 1 - name), name, inner + sizeof("." INNER) - 1);
}

/* ---- the place of the work ---- */

typedef struct patterns {
    const obm_json *values; /* object or NULL */
    obm__regex **compiled;  /* (n), in the object's order */
    size_t n;
} patterns;

typedef struct work {
    obm_task_vector *v;
    const obm__adapter *a;
    patterns ranks, alphas;
    obm__matching *matching;
    size_t n_lowranks;
    char *module; /* of the tensor at hand */
} work;

static const char *file_of(const work *w) { return w->v->expert->files[0]->path; }

static obm__pair *find_pair(const work *w, const char *name) {
    return (obm__pair *)obm__task_vector_find(w->v, name, NULL);
}

static obm_status unknown(const work *w, const char *name, obm_error *err) {
    for (size_t i = 0; i < sizeof foreign / sizeof *foreign; i++)
        if (strstr(name, foreign[i].mark))
            return obm__fail(err, OBM_E_UNSUPPORTED, "%s: tensor %s: %s is not supported; merge the adapter with peft",
                             file_of(w), name, foreign[i].what);
    return obm__fail(err, OBM_E_NOTFOUND, "%s: tensor %s: expected LoRA factors or a tensor of the base %s", file_of(w),
                     name, w->v->base->path);
}

/* ---- rank and scaling ---- */

static obm_status compile_one(const work *w, const char *pattern, const char *key, obm__regex **out, obm_error *err) {
    /* peft: re.match(rf"(.*\.)?({key})$", module name) */
    char *anchored = obm__format("^(.*\\.)?(%s)$", pattern), *where = obm__format("%s: %s", w->a->path, key);
    obm_status status = anchored && where ? obm__regex_new_rare(anchored, strlen(anchored), where, out, err)
                                          : obm__fail_nomem(err, strlen(pattern));
    obm_free(anchored);
    obm_free(where);
    return status;
}

static obm_status compile(const work *w, const obm_json *values, const char *key, patterns *p, obm_error *err) {
    size_t n = obm__json_size(values);
    p->values = values;
    if (!n) return OBM_OK;
    if (!(p->compiled = obm__calloc(n, sizeof *p->compiled))) return obm__fail_nomem(err, n * sizeof *p->compiled);
    for (void *it = obm__json_first(values); it; it = obm__json_next(values, it), p->n++)
        OBM_TRY(compile_one(w, obm__json_key(it), key, &p->compiled[p->n], err));
    return OBM_OK;
}

static void patterns_clear(patterns *p) {
    for (size_t i = 0; i < p->n; i++) obm__regex_free(p->compiled[i]);
    obm_free(p->compiled);
}

/* The first pattern that matches the module, else a key of its very name; *out stays where there is none. */
static obm_status pattern_value(const work *w, const patterns *p, double *out, obm_error *err) {
    const obm_json *found = obm__json_get(p->values, w->module);
    size_t i = 0, begin, end;
    for (void *it = obm__json_first(p->values); it; it = obm__json_next(p->values, it), i++) {
        bool match = false;
        OBM_TRY(
            obm__regex_find(p->compiled[i], w->matching, w->module, strlen(w->module), 0, &match, &begin, &end, err));
        if (!match) continue;
        found = obm__json_value(it);
        break;
    }
    if (found) obm__json_real(found, out);
    return OBM_OK;
}

/* alpha / r (Hu et al., section 4.1), or alpha / sqrt(r) (Kalajdzievski, "rsLoRA", arXiv 2312.03732, section 3). */
static obm_status settings_of(const work *w, obm__lowrank *l, obm_error *err) {
    double rank = (double)w->a->rank, alpha = w->a->alpha;
    OBM_TRY(pattern_value(w, &w->ranks, &rank, err));
    OBM_TRY(pattern_value(w, &w->alphas, &alpha, err));
    l->rank = (int64_t)rank;
    l->scaling = alpha / (w->a->rslora ? sqrt(rank) : rank);
    return OBM_OK;
}

/* ---- pairs ---- */

/* The factor beside one that is at hand. */
static obm_status other_factor(const work *w, const char *name, const char *mine, const char *other, obm_tensor *out,
                               obm_error *err) {
    size_t n = strlen(name) - strlen(mine);
    char *wanted = obm__format("%.*s%s", (int)n, name, other);
    if (!wanted) return obm__fail_nomem(err, n);
    const obm__st_entry *e = obm__checkpoint_find(w->v->expert, wanted);
    obm_status status = OBM_OK;
    if (e)
        *out = e->t;
    else
        status = obm__fail(err, OBM_E_FORMAT, "%s: tensor %s has no %s beside it", file_of(w), name, wanted);
    obm_free(wanted);
    return status;
}

/* peft saves the base's own embedding with an adapter on it; another one would need both at once. */
static obm_status check_unchanged(const work *w, const obm__pair *p, obm_error *err) {
    float a[OBM_BLOCK], b[OBM_BLOCK];
    const obm_kernels *k = w->v->base->ctx->k;
    bool same = p->extra_rows == 0;
    for (int64_t at = 0, n, count = obm_tensor_count(&p->base); same && at < count; at += n) {
        n = count - at < OBM_BLOCK ? count - at : OBM_BLOCK;
        obm__widen(k, &p->base, at, n, a);
        obm__widen(k, &p->expert, at, n, b);
        same = !memcmp(a, b, (size_t)n * sizeof *a);
    }
    if (same) return OBM_OK;
    return obm__fail(err, OBM_E_UNSUPPORTED,
                     "%s: tensor %s is replaced and has LoRA factors too, which is not supported; merge the adapter "
                     "with peft",
                     file_of(w), p->name);
}

static obm_status add_factors(work *w, const obm__st_entry *e, bool embedding, obm_error *err) {
    char *name = obm__format("%s.weight", w->module);
    if (!name) return obm__fail_nomem(err, strlen(w->module));
    obm__pair *p = find_pair(w, name);
    obm_free(name);
    if (!p) return unknown(w, e->name, err);
    obm__lowrank *l = &w->v->lowranks[w->n_lowranks];
    *l = (obm__lowrank){.a = e->t, .transposed = embedding || w->a->transposed};
    OBM_TRY(
        other_factor(w, e->name, suffixes[embedding ? 2 : 0].suffix, suffixes[embedding ? 3 : 1].suffix, &l->b, err));
    OBM_TRY(settings_of(w, l, err));
    obm_error why;
    if (obm__lowrank_check(l, p->name, &p->base, &why) != OBM_OK)
        return obm__fail(err, why.code, "%s: %s", file_of(w), why.message);
    if (p->lora)
        return obm__fail(err, OBM_E_FORMAT, "%s: two pairs of LoRA factors for tensor %s", file_of(w), p->name);
    if (p->expert.data != p->base.data) OBM_TRY(check_unchanged(w, p, err));
    l->rows = p->base.shape[0];
    l->cols = p->base.shape[1];
    w->n_lowranks++;
    p->lora = l;
    p->expert = p->base;
    p->expert.data = NULL;
    p->extra_rows = 0;
    return OBM_OK;
}

static obm_status add_whole(work *w, const obm__st_entry *e, obm_error *err) {
    obm__pair *p = find_pair(w, w->module);
    if (!p) return unknown(w, e->name, err);
    if (p->expert.data != p->base.data)
        return obm__fail(err, OBM_E_FORMAT, "%s: tensor %s: there is another for %s of the base", file_of(w), e->name,
                         p->name);
    obm_tensor base = p->base;
    obm_error why;
    if (obm__pair_fill(p, p->name, &base, &e->t, &why) == OBM_OK) return OBM_OK;
    return obm__fail(err, why.code, "%s: %s", file_of(w), why.message);
}

static obm_status add_tensor(work *w, const obm__st_entry *e, bool factors, obm_error *err) {
    part what;
    obm_status status = OBM_OK;
    obm_tensor unused;
    if (!(w->module = split_name(e->name, &what))) return obm__fail_nomem(err, strlen(e->name));
    if (what == PART_WHOLE && !factors) status = add_whole(w, e, err);
    if (factors && (what == PART_A || what == PART_EMBEDDING_A))
        status = add_factors(w, e, what == PART_EMBEDDING_A, err);
    if (factors && what == PART_B)
        status = other_factor(w, e->name, suffixes[1].suffix, suffixes[0].suffix, &unused, err);
    if (factors && what == PART_EMBEDDING_B)
        status = other_factor(w, e->name, suffixes[3].suffix, suffixes[2].suffix, &unused, err);
    obm_free(w->module);
    w->module = NULL;
    return status;
}

/* ---- ties ---- */

static int by_name(const void *a, const void *b) {
    return strcmp(((const obm__pair *)a)->name, ((const obm__pair *)b)->name);
}

static bool touches(const obm_checkpoint *c, const char *tensor) {
    bool found = false;
    for (size_t i = 0; i < c->count && !found; i++) {
        part what;
        char *module = split_name(c->tensors[i]->name, &what);
        char *whole = module && what != PART_WHOLE ? obm__format("%s.weight", module) : NULL;
        found = module && obm__same_place(whole ? whole : module, tensor);
        obm_free(whole);
        obm_free(module);
    }
    return found;
}

/* An adapter runs on the embedding or on the head, not on both through their tie: while it runs, the other one is the
 * base's.  (peft's merge_and_unload writes into the shared tensor and so changes both.) */
static obm_status untie(work *w, obm_error *err) {
    obm_task_vector *v = w->v;
    const obm__st_entry *embedding = obm__checkpoint_find(v->base, OBM_EMBEDDING_NAME);
    bool touched = touches(v->expert, OBM_EMBEDDING_NAME) || touches(v->expert, OBM_HEAD_NAME);
    if (!v->base->tied || !embedding || !touched) return OBM_OK;
    if (w->a->keeps_tie)
        return obm__fail(
            err, OBM_E_UNSUPPORTED,
            "%s: ensure_weight_tying on an embedding or head is not supported; merge the adapter with peft",
            w->a->path);
    if (find_pair(w, OBM_HEAD_NAME)) return OBM_OK;
    OBM_TRY(obm__pair_fill(&v->pairs[v->count], obm__layout_head(v->base->layout), &embedding->t, &embedding->t, err));
    v->count++;
    qsort(v->pairs, v->count, sizeof *v->pairs, by_name);
    return OBM_OK;
}

/* ---- the whole ---- */

static obm_status add_base(obm_task_vector *v, obm_error *err) {
    for (size_t i = 0; i < v->base->count; i++) {
        const obm__st_entry *e = v->base->tensors[i];
        if (obm__is_derived_buffer(e->name)) continue;
        OBM_TRY(obm__pair_fill(&v->pairs[v->count], e->name, &e->t, &e->t, err));
        v->count++;
    }
    return OBM_OK;
}

static obm_status add_all(work *w, obm_error *err) {
    const obm_checkpoint *c = w->v->expert;
    OBM_TRY(add_base(w->v, err));
    OBM_TRY(untie(w, err));
    OBM_TRY(compile(w, w->a->rank_pattern, "rank_pattern", &w->ranks, err));
    OBM_TRY(compile(w, w->a->alpha_pattern, "alpha_pattern", &w->alphas, err));
    if (!(w->matching = obm__matching_new(NULL))) return obm__fail_nomem(err, 0);
    for (int factors = 0; factors < 2; factors++)
        for (size_t i = 0; i < c->count; i++) OBM_TRY(add_tensor(w, c->tensors[i], factors, err));
    return OBM_OK;
}

obm_status obm__adapter_pairs(obm_task_vector *v, obm_error *err) {
    work w = {.v = v, .a = v->expert->adapter};
    if (!(v->lowranks = obm__calloc(v->expert->count, sizeof *v->lowranks)))
        return obm__fail_nomem(err, v->expert->count * sizeof *v->lowranks);
    obm_status status = add_all(&w, err);
    if (w.matching) obm__matching_free(w.matching);
    patterns_clear(&w.ranks);
    patterns_clear(&w.alphas);
    return status;
}
