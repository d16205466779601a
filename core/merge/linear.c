/* linear: the weighted mean of the models themselves; no task vectors. */
#include "merge.h"

static const obm_param_info params[] = {
    OBM_PARAM_WEIGHT,
    OBM_PARAM_NORMALIZE("divide by the sum of the weights", 1),
};

const obm__method obm__method_linear = {
    .info = {"linear", "weighted mean of the models", "Wortsman et al., Model soups, arXiv 2203.05482", params,
             OBM_COUNT(params), false, 1, 0},
};
