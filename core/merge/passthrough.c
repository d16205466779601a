/* passthrough: one model as it is, or scaled. */
#include "merge.h"

static const obm_param_info params[] = {
    OBM_PARAM_ROW("scale", "factor of the tensor", OBM_PARAM_PER_MODEL, false, 1, -INFINITY, INFINITY, false),
};

static void merge(const obm__block *b) {
    double scale = obm__steps_value(b->g->steps, "scale", 0);
    for (size_t j = 0; j < b->n; j++) b->mixed[j] = (float)(scale * b->deltas[j]);
}

static const obm__custom custom = {.merge = merge};

const obm__method obm__method_passthrough = {
    .info = {"passthrough", "one model, each tensor times a scale", "as in mergekit", params, OBM_COUNT(params), false,
             1, 1},
    .custom = &custom,
};
