/* Policies: which tensors of an expert become 1-bit planes, or masks of a shared vector.  A rule of the caller's map
 * comes first, then the preset by module class; everything that is no float matrix stays full. */
#include "delta.h"

#include <fnmatch.h>
#include <string.h>

#define BIT(cls) (1u << (cls))
#define ATTENTION BIT(OBM_CLASS_ATTENTION)
#define MLP BIT(OBM_CLASS_MLP)

const char *obm_mode_name(obm_mode mode) {
    static const char *const names[] = {"1bit", "full", "drop", "same", "mask"};
    return (unsigned)mode < sizeof names / sizeof *names ? names[mode] : "unknown";
}

/* Liu et al., section 3.2: chat keeps its knowledge in attention, math and code in the MLPs; the other part is
 * binarised. */
static obm_status paper_classes(const char *task, unsigned *out, obm_error *err) {
    if (!strcmp(task, "chat")) {
        *out = MLP;
    } else if (!strcmp(task, "math") || !strcmp(task, "code")) {
        *out = ATTENTION;
    } else {
        return obm__fail(
            err, OBM_E_ARG,
            "expert %s: policy paper knows the tasks chat, math and code only; use attention, mlp or linear", task);
    }
    return OBM_OK;
}

static obm_status preset_classes(const char *preset, const char *task, unsigned *out, obm_error *err) {
    static const struct {
        const char *name;
        unsigned classes;
    } table[] = {{"linear", ATTENTION | MLP}, {"attention", ATTENTION}, {"mlp", MLP}, {"full", 0}};
    if (!strcmp(preset, "paper")) return paper_classes(task, out, err);
    for (size_t i = 0; i < sizeof table / sizeof *table; i++) {
        if (strcmp(preset, table[i].name)) continue;
        *out = table[i].classes;
        return OBM_OK;
    }
    return obm__fail(err, OBM_E_ARG, "expert %s: unknown policy \"%s\": linear, attention, mlp, paper or full", task,
                     preset);
}

static obm_status check_map(const char *task, const obm__policy *p, obm_error *err) {
    for (size_t i = 0; i < p->n_map; i++) {
        const obm_map_rule *r = &p->map[i];
        if (!r->glob || !*r->glob) return obm__fail(err, OBM_E_ARG, "expert %s: map rule %zu has no glob", task, i);
        if (r->mode == OBM_MODE_MASK && p->compressed != OBM_MODE_MASK) {
            return obm__fail(err, OBM_E_ARG, "expert %s: map rule %s=mask: the pack has no shared vector", task,
                             r->glob);
        }
        if (r->mode != OBM_MODE_1BIT && r->mode != OBM_MODE_FULL && r->mode != OBM_MODE_DROP &&
            r->mode != OBM_MODE_MASK) {
            return obm__fail(err, OBM_E_ARG,
                             "expert %s: map rule %s: expected the mode 1bit, mask, full or drop, found %s", task,
                             r->glob, obm_mode_name(r->mode));
        }
    }
    return OBM_OK;
}

static char *describe(const char *preset, const obm__policy *p) {
    char *scale = obm__scale_text(p->scale);
    if (!scale) return NULL;
    obm__buffer b = {0};
    bool planes = p->compressed == OBM_MODE_1BIT;
    for (size_t i = 0; i < p->n_map; i++) planes = planes || p->map[i].mode == OBM_MODE_1BIT;
    obm__buffer_printf(&b, "%s%s", preset, p->compressed == OBM_MODE_MASK ? ", mask" : "");
    if (planes) obm__buffer_printf(&b, ", scale %s, planes %d", scale, p->planes);
    for (size_t i = 0; i < p->n_map; i++) {
        obm__buffer_printf(&b, "%s%s=%s", i ? " " : ", map ", p->map[i].glob, obm_mode_name(p->map[i].mode));
    }
    obm_free(scale);
    if (b.failed) obm__buffer_free(&b);
    return b.data;
}

obm_status obm__policy_parse(const obm_expert *e, obm_profile profile, bool masks, obm__policy *out, char **text,
                             obm_error *err) {
    const char *preset = OBM_OPT(e, obm_expert, policy, NULL), *scale = OBM_OPT(e, obm_expert, scale, NULL);
    if (!preset || !*preset) preset = profile == OBM_PROFILE_PAPER ? "paper" : "linear";
    if (!scale || !*scale) scale = !strcmp(preset, "paper") ? "matrix" : "row";
    obm__policy p = {.planes = OBM_OPT(e, obm_expert, planes, 0)};
    p.compressed = masks ? OBM_MODE_MASK : OBM_MODE_1BIT;
    p.map = OBM_OPT(e, obm_expert, map, NULL);
    p.n_map = p.map ? OBM_OPT(e, obm_expert, n_map, 0) : 0;
    if (!p.planes) p.planes = 1;
    if (p.planes < 1 || p.planes > OBM_MAX_PLANES) {
        return obm__fail(err, OBM_E_ARG, "expert %s: %d planes asked for, 1 to %d are possible", e->name, p.planes,
                         OBM_MAX_PLANES);
    }
    OBM_TRY(preset_classes(preset, e->name, &p.classes, err));
    OBM_TRY(obm__scale_parse(scale, &p.scale, err));
    OBM_TRY(check_map(e->name, &p, err));
    char *described = describe(preset, &p);
    if (!described) return obm__fail_nomem(err, 0);
    *out = p;
    *text = described;
    return OBM_OK;
}

bool obm__glob_matches(const char *glob, const char *name) { return fnmatch(glob, name, 0) == 0; }

bool obm__pair_is_matrix(const obm__pair *p) {
    return p->base.ndim == 2 && obm__is_float(p->base.dtype) && obm_tensor_count(&p->base) > 0;
}

const obm_map_rule *obm__policy_rule(const obm__policy *p, const char *name) {
    for (size_t i = 0; i < p->n_map; i++)
        if (obm__glob_matches(p->map[i].glob, name)) return &p->map[i];
    return NULL;
}

obm_status obm__policy_mode(const obm__policy *p, const obm__pair *pair, obm_mode *out, obm_error *err) {
    bool matrix = obm__pair_is_matrix(pair);
    const obm_map_rule *rule = obm__policy_rule(p, pair->name);
    if (rule) {
        if ((rule->mode == OBM_MODE_1BIT || rule->mode == OBM_MODE_MASK) && !matrix) {
            char shape[160];
            const char *mode = obm_mode_name(rule->mode);
            return obm__fail(err, OBM_E_ARG, "map rule %s=%s matches tensor %s of shape %s: only matrices can be %s",
                             rule->glob, mode, pair->name, obm__shape_text(&pair->base, shape, sizeof shape), mode);
        }
        *out = rule->mode;
        return OBM_OK;
    }
    *out = matrix && (p->classes & BIT(pair->cls)) ? p->compressed : OBM_MODE_FULL;
    return OBM_OK;
}
