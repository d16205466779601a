/* task_arithmetic: the base plus the weighted sum of the task vectors. */
#include "merge.h"

static const obm_param_info params[] = {
    OBM_PARAM_WEIGHT,
    OBM_PARAM_NORMALIZE("divide by the sum of the weights", 0),
    OBM_PARAM_LAMBDA,
    OBM_PARAM_INT8_MASK,
};

const obm__method obm__method_task_arithmetic = {
    .info = {"task_arithmetic", "base plus the weighted sum of the task vectors",
             "Ilharco et al., Editing models with task arithmetic, arXiv 2212.04089, section 2", params,
             OBM_COUNT(params), true, 1, 0},
    .deltas = true,
};
