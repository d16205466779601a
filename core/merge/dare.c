/* dare_linear, dare_ties: drop elements of each task vector at random, rescale the rest, then sum or elect signs. */
#include "merge.h"

#define DENSITY OBM_PARAM_DENSITY("probability that an element is kept")
#define RESCALE OBM_PARAM_RESCALE("scale what is kept by 1 / density", 1)
#define RESCALE_L1               \
    OBM_PARAM_BOOL("rescale_l1", \
                   "rescale to the L1 norm of the task vector, as mergekit does, instead of by 1 / density", 0)

static const obm_param_info linear_params[] = {
    OBM_PARAM_WEIGHT,
    DENSITY,
    OBM_PARAM_NORMALIZE("divide by the sum of the weights", 0),
    RESCALE,
    RESCALE_L1,
    OBM_PARAM_LAMBDA,
    OBM_PARAM_INT8_MASK,
};

const obm__method obm__method_dare_linear = {
    .info = {"dare_linear", "random drop and rescale, then the weighted sum",
             "Yu et al., Language models are super Mario, arXiv 2311.03099, section 3", linear_params,
             OBM_COUNT(linear_params), true, 1, 0},
    .deltas = true,
    .mask = OBM_MASK_RANDOM,
    .rescale = OBM_RESCALE_INVERSE_DENSITY,
};

static const obm_param_info ties_params[] = {
    OBM_PARAM_WEIGHT,
    DENSITY,
    OBM_PARAM_NORMALIZE("divide by the weights that agree with the elected sign", 0),
    RESCALE,
    RESCALE_L1,
    OBM_PARAM_LAMBDA,
    OBM_PARAM_SCOPE,
    OBM_PARAM_INT8_MASK,
};

const obm__method obm__method_dare_ties = {
    .info = {"dare_ties", "random drop and rescale, then elect signs and sum what agrees",
             "Yu et al., Language models are super Mario, arXiv 2311.03099, section 3", ties_params,
             OBM_COUNT(ties_params), true, 1, 0},
    .deltas = true,
    .mask = OBM_MASK_RANDOM,
    .consensus = OBM_CONSENSUS_SIGN,
    .rescale = OBM_RESCALE_INVERSE_DENSITY,
};
