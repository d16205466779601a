/* Routes as text, and single tensors under a route: the public face of the dynamic merge.  No arithmetic of its own. */
#include "dynamic.h"

#include <ctype.h>
#include <locale.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- text to weights ---- */

static obm_status unknown_task(const obm_pack *p, const char *name, obm_error *err) {
    obm__buffer known = {0};
    for (size_t k = 0; k < p->n_experts; k++) obm__buffer_printf(&known, "%s%s", k ? ", " : "", p->experts[k].name);
    obm__fail(err, OBM_E_NOTFOUND, "route: no task named %.64s%s; this pack has %s", name,
              strcmp(name, "auto") ? "" : " (a router answers for a prompt; here is none)",
              known.data ? known.data : "none");
    obm__buffer_free(&known);
    return OBM_E_NOTFOUND;
}

/* By name, else by index from 0. */
static obm_status find_task(const obm_pack *p, const char *name, size_t *task, obm_error *err) {
    for (size_t k = 0; k < p->n_experts; k++) {
        if (strcmp(p->experts[k].name, name)) continue;
        *task = k;
        return OBM_OK;
    }
    size_t digits = strspn(name, "0123456789");
    if (!digits || name[digits] || digits > 9) return unknown_task(p, name, err);
    size_t k = (size_t)strtoul(name, NULL, 10);
    if (k >= p->n_experts)
        return obm__fail(err, OBM_E_NOTFOUND, "route: no task %s, this pack has %zu (counted from 0)", name,
                         p->n_experts);
    *task = k;
    return OBM_OK;
}

/* A number as C writes it, whatever the program's locale says about decimal points. */
static bool parse_number(const char *text, double *out) {
    locale_t c = newlocale(LC_ALL_MASK, "C", (locale_t)0);
    if (!c) return false;
    char *end;
    *out = strtod_l(text, &end, c);
    freelocale(c);
    return end != text && !*end;
}

static char *trim(char *s) {
    while (isspace((unsigned char)*s)) s++;
    char *end = s + strlen(s);
    while (end > s && isspace((unsigned char)end[-1])) *--end = 0;
    return s;
}

/* "name=weight". */
static obm_status parse_part(const obm_pack *p, char *part, double *weights, bool *seen, obm_error *err) {
    char *equals = strchr(part, '=');
    if (!equals) return obm__fail(err, OBM_E_ARG, "route: expected name=weight, found %.64s", trim(part));
    *equals = 0;
    const char *name = trim(part), *number = trim(equals + 1);
    size_t task = 0;
    double weight;
    OBM_TRY(find_task(p, name, &task, err));
    if (seen[task]) return obm__fail(err, OBM_E_ARG, "route: task %.64s stands twice", name);
    if (!parse_number(number, &weight))
        return obm__fail(err, OBM_E_ARG, "route: the weight of task %.64s is \"%.32s\", expected a number", name, number);
    seen[task] = true;
    weights[task] = weight;
    return OBM_OK;
}

static obm_status parse_parts(const obm_pack *p, char *text, double *weights, bool *seen, obm_error *err) {
    for (char *part = text, *comma; part; part = comma) {
        comma = strchr(part, ',');
        if (comma) *comma++ = 0;
        OBM_TRY(parse_part(p, part, weights, seen, err));
    }
    return obm__route_check(p, weights, err);
}

static obm_status parse_text(const obm_pack *p, char *text, double *weights, bool *seen, obm_error *err) {
    char *whole = trim(text);
    size_t task = 0;
    if (strpbrk(whole, "=,")) return parse_parts(p, whole, weights, seen, err);
    bool is_task = find_task(p, whole, &task, NULL) == OBM_OK;
    if (!is_task && !strcmp(whole, "base")) return OBM_OK;
    if (!is_task) return find_task(p, whole, &task, err);
    weights[task] = 1;
    return OBM_OK;
}

obm_status obm_pack_parse_route(const obm_pack *p, const char *text, double *weights, obm_error *err) {
    if (!text) return obm__fail(err, OBM_E_ARG, "route: expected a text, found NULL");
    char *copy = obm__strdup(text);
    double *parsed = obm__calloc(p->n_experts, sizeof *parsed);
    bool *seen = obm__calloc(p->n_experts, sizeof *seen);
    obm_status status =
        copy && parsed && seen ? parse_text(p, copy, parsed, seen, err) : obm__fail_nomem(err, strlen(text));
    if (status == OBM_OK) memcpy(weights, parsed, p->n_experts * sizeof *weights);
    obm_free(copy);
    obm_free(parsed);
    obm_free(seen);
    return status;
}

/* ---- weights to text ---- */

/* The shortest decimal that reads back as the same number. */
static void add_number(obm__buffer *b, double x) {
    char text[32];
    locale_t c = newlocale(LC_ALL_MASK, "C", (locale_t)0);
    if (!c) {
        b->failed = true;
        return;
    }
    locale_t before = uselocale(c);
    for (int digits = 1; digits <= 17; digits++) {
        snprintf(text, sizeof text, "%.*g", digits, x);
        if (strtod(text, NULL) == x) break;
    }
    uselocale(before);
    freelocale(c);
    obm__buffer_text(b, text);
}

obm_status obm_pack_format_route(const obm_pack *p, const double *weights, char **out, obm_error *err) {
    OBM_TRY(obm__route_check(p, weights, err));
    obm__buffer b = {0};
    size_t hard = obm__route_hard(weights, p->n_experts);
    for (size_t k = 0; k < p->n_experts; k++) {
        if (weights[k] == 0) continue;
        obm__buffer_printf(&b, "%s%s", b.size ? "," : "", p->experts[k].name);
        if (hard != SIZE_MAX) continue;
        obm__buffer_text(&b, "=");
        add_number(&b, weights[k]);
    }
    if (!b.size) obm__buffer_text(&b, "base");
    if (b.failed) {
        obm__buffer_free(&b);
        return obm__fail_nomem(err, 64);
    }
    *out = b.data;
    return OBM_OK;
}

/* ---- single tensors ---- */

static obm_status find_tensor(const obm_pack *p, const char *name, size_t *tensor, obm_error *err) {
    *tensor = obm__pack_find(p, name);
    if (*tensor == SIZE_MAX) return obm__fail(err, OBM_E_NOTFOUND, "pack %s has no tensor named %s", p->path, name);
    return OBM_OK;
}

static obm_status shape_of(const obm__route_plan *plan, const char *name, size_t tensor, obm_tensor *shape,
                           obm_error *err) {
    bool exists;
    obm_tensor found;
    OBM_TRY(obm__route_shape(plan, tensor, &found, &exists));
    if (!exists)
        return obm__fail(err, OBM_E_NOTFOUND, "tensor %s does not exist under this route: the head is the embedding",
                         name);
    *shape = found;
    return OBM_OK;
}

obm_status obm_pack_route_shape(const obm_pack *p, const double *weights, const char *name, obm_tensor *shape,
                                obm_error *err) {
    size_t tensor;
    obm__route_plan *plan = NULL;
    OBM_TRY(find_tensor(p, name, &tensor, err));
    OBM_TRY(obm__route_plan_new(p, weights, OBM_ROUTE_NONE, NULL, &plan, err));
    obm_status status = shape_of(plan, name, tensor, shape, err);
    obm__route_plan_free(plan);
    return status;
}

static obm_status check_finite(const obm_pack *p, const float *values, const obm_tensor *shape, const char *name,
                               obm__pulse *pulse, obm_error *err) {
    size_t n = (size_t)obm_tensor_count(shape);
    for (size_t at = 0, count; at < n; at += count) {
        count = n - at < OBM_TILE ? n - at : OBM_TILE;
        size_t bad = p->ctx->k->find_nonfinite(values + at, count);
        if (bad < count)
            return obm__fail(err, OBM_E_VALUE, "tensor %s is %g at index %zu under this route", name,
                             (double)values[at + bad], at + bad);
        OBM_TRY(obm__pulse_check(pulse, err));
    }
    return OBM_OK;
}

static obm_status materialise(const obm_pack *p, const double *weights, const char *name, float *out, obm_error *err) {
    size_t tensor;
    obm__route_plan *plan = NULL;
    obm_tensor shape;
    OBM_TRY(find_tensor(p, name, &tensor, err));
    obm_dtype dtype = p->tensors[tensor].base.dtype;
    if (!obm__is_float(dtype))
        return obm__fail(err, OBM_E_DTYPE, "tensor %s is %s, expected a float dtype", name, obm_dtype_name(dtype));
    obm__pulse pulse = obm__pulse_new(p->ctx, NULL, NULL, "materialise", 1);
    OBM_TRY(obm__route_plan_new(p, weights, tensor, &pulse, &plan, err));
    obm_status status = shape_of(plan, name, tensor, &shape, err);
    if (status == OBM_OK) status = obm__route_materialise(plan, tensor, &pulse, out, err);
    if (status == OBM_OK && obm__route_changes(plan, tensor)) status = check_finite(p, out, &shape, name, &pulse, err);
    obm__route_plan_free(plan);
    return status;
}

obm_status obm_pack_materialise(const obm_pack *p, const double *weights, const char *name, float *out,
                                obm_error *err) {
    OBM_TRY(obm__pack_use(p, err));
    obm_status status = materialise(p, weights, name, out, err);
    obm__pack_unuse(p);
    return status;
}
