/* The names that the tensors of one model go by: its text part may be a file of its own, or lie beside the part that
 * sees images, and that in two ways.  It knows names only, no tensors. */
#include "io.h"

#include <stdlib.h>
#include <string.h>

enum { BODY, HEAD, VISION, PROJECTOR, PARTS };

#define OUTSIDE "vision_tower.", "multi_modal_projector."
static const struct {
    const char *prefix[PARTS];
    const char *embedding, *head;
} layouts[OBM_LAYOUTS] = {
    {{"model.", "lm_head.", OUTSIDE}, OBM_EMBEDDING_NAME, OBM_HEAD_NAME},
    /* what transformers writes for Gemma3ForConditionalGeneration, and what is published */
    {{"language_model.model.", "language_model.lm_head.", OUTSIDE},
     "language_model.model.embed_tokens.weight",
     "language_model.lm_head.weight"},
    /* its modules since transformers 4.52: what trainers write that save a state_dict as it is, and peft */
    {{"model.language_model.", "lm_head.", "model.vision_tower.", "model.multi_modal_projector."},
     "model.language_model.embed_tokens.weight",
     OBM_HEAD_NAME},
};

const char *obm__layout_embedding(int layout) { return layouts[layout].embedding; }

const char *obm__layout_body(int layout) { return layouts[layout].prefix[BODY]; }
const char *obm__layout_head(int layout) { return layouts[layout].head; }

/* Which part of a model a name belongs to, -1: none.  Backwards, because "model." is the beginning of others. */
static int part_of(const char *name, const char **rest) {
    for (int i = OBM_LAYOUTS - 1; i >= 0; i--) {
        for (int part = 0; part < PARTS; part++) {
            size_t n = strlen(layouts[i].prefix[part]);
            if (strncmp(name, layouts[i].prefix[part], n)) continue;
            *rest = name + n;
            return part;
        }
    }
    return -1;
}

bool obm__is_head(const char *name) {
    const char *rest;
    return part_of(name, &rest) == HEAD && !strcmp(rest, "weight");
}

bool obm__same_place(const char *a, const char *b) {
    const char *of_a, *of_b;
    int part = part_of(a, &of_a);
    return part < 0 ? !strcmp(a, b) : part == part_of(b, &of_b) && !strcmp(of_a, of_b);
}

/* ---- searching ---- */

typedef struct wanted {
    const char *prefix, *rest; /* of the name, one after the other */
    obm__name_fn name_of;
} wanted;

static int compare(const void *key, const void *item) {
    const wanted *w = key;
    const char *name = w->name_of(item);
    size_t n = strlen(w->prefix);
    int order = strncmp(w->prefix, name, n);
    return order ? order : strcmp(w->rest, name + n);
}

const void *obm__find_named(const char *name, int layout, const void *items, size_t count, size_t size,
                            obm__name_fn name_of) {
    wanted w = {"", name, name_of};
    const void *found = count ? bsearch(&w, items, count, size, compare) : NULL;
    if (found || !count) return found;
    int part = part_of(name, &w.rest);
    if (part < 0) return NULL;
    w.prefix = layouts[layout].prefix[part];
    return bsearch(&w, items, count, size, compare);
}
