/* ties: trim each task vector by magnitude, elect a sign per element, average what agrees. */
#include "merge.h"

static const obm_param_info params[] = {
    OBM_PARAM_WEIGHT,
    OBM_PARAM_DENSITY("share of the elements kept, the largest by magnitude"),
    OBM_PARAM_NORMALIZE("divide by the weights that agree with the elected sign", 1),
    OBM_PARAM_RESCALE("scale trimmed task vectors back to their L1 norm", 0),
    OBM_PARAM_LAMBDA,
    OBM_PARAM_SCOPE,
    OBM_PARAM_INT8_MASK,
};

const obm__method obm__method_ties = {
    .info = {"ties", "trim, elect signs, merge what agrees", "Yadav et al., TIES-Merging, arXiv 2306.01708, section 4",
             params, OBM_COUNT(params), true, 1, 0},
    .deltas = true,
    .mask = OBM_MASK_MAGNITUDE,
    .consensus = OBM_CONSENSUS_SIGN,
    .rescale = OBM_RESCALE_L1,
};
