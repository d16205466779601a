/* della, della_linear: drop elements at random, the more likely the lower their magnitude ranks in its row; rescale,
 * then elect signs or sum. */
#include "merge.h"

#define DENSITY OBM_PARAM_DENSITY("mean probability that an element is kept")
#define EPSILON                                                                                          \
    OBM_PARAM_ROW("epsilon", "the probability runs from density - epsilon to density + epsilon by rank", \
                  OBM_PARAM_PER_MODEL, false, 0.15, 0, 1, false)
#define RESCALE        \
    OBM_PARAM_RESCALE( \
        "scale what is kept: to the L1 norm of the task vector; in the paper profile by 1 / probability", 1)
#define SOURCE "Deep et al., DELLA-Merging, arXiv 2406.11617, section 3"

static obm_status check(const obm__steps *s, obm_error *err) {
    obm__model_name buf;
    for (size_t i = 0; i < s->n; i++) {
        double density = s->density[i], epsilon = obm__steps_value(s, "epsilon", i);
        if (density <= 0 || density >= 1 || (density - epsilon > 0 && density + epsilon < 1)) continue;
        return obm__fail(err, OBM_E_ARG,
                         "%s: epsilon: expected density - epsilon and density + epsilon in (0, 1) for %.300s, found "
                         "%g and %g",
                         s->method->info.name, obm__model_label(s->labels, i, buf), density - epsilon,
                         density + epsilon);
    }
    return OBM_OK;
}

static const obm__custom custom = {.check = check};

static const obm_param_info ties_params[] = {
    OBM_PARAM_WEIGHT,
    DENSITY,
    EPSILON,
    OBM_PARAM_NORMALIZE("divide by the weights that agree with the elected sign", 1),
    RESCALE,
    OBM_PARAM_LAMBDA,
    OBM_PARAM_INT8_MASK,
};

const obm__method obm__method_della = {
    .info = {"della", "random drop by rank and rescale, then elect signs and merge what agrees", SOURCE, ties_params,
             OBM_COUNT(ties_params), true, 1, 0},
    .deltas = true,
    .mask = OBM_MASK_RANKED,
    .consensus = OBM_CONSENSUS_SIGN,
    .rescale = OBM_RESCALE_BY_PROFILE,
    .custom = &custom,
};

static const obm_param_info linear_params[] = {
    OBM_PARAM_WEIGHT,
    DENSITY,
    EPSILON,
    OBM_PARAM_NORMALIZE("divide by the sum of the weights", 0),
    RESCALE,
    OBM_PARAM_LAMBDA,
    OBM_PARAM_INT8_MASK,
};

const obm__method obm__method_della_linear = {
    .info = {"della_linear", "random drop by rank and rescale, then the weighted sum", SOURCE, linear_params,
             OBM_COUNT(linear_params), true, 1, 0},
    .deltas = true,
    .mask = OBM_MASK_RANKED,
    .rescale = OBM_RESCALE_BY_PROFILE,
    .custom = &custom,
};
