/* breadcrumbs, breadcrumbs_ties: task vectors without their largest and smallest elements, summed or by elected signs.
 */
#include "merge.h"

#define DENSITY OBM_PARAM_DENSITY("share of the elements kept, the largest behind the outliers")
#define GAMMA                                                                                                        \
    OBM_PARAM_ROW("gamma", "share of the elements dropped as outliers, the largest; less where density leaves less", \
                  OBM_PARAM_PER_MODEL, false, 0.01, 0, 1, false)
#define RESCALE OBM_PARAM_RESCALE("scale trimmed task vectors back to their L1 norm", 0)
#define SOURCE "Davari and Belilovsky, Model Breadcrumbs, arXiv 2312.06795, section 3"

static const obm_param_info linear_params[] = {
    OBM_PARAM_WEIGHT, DENSITY,          GAMMA,           OBM_PARAM_NORMALIZE("divide by the sum of the weights", 0),
    RESCALE,          OBM_PARAM_LAMBDA, OBM_PARAM_SCOPE, OBM_PARAM_INT8_MASK,
};

const obm__method obm__method_breadcrumbs = {
    .info = {"breadcrumbs", "drop outliers and small elements, then the weighted sum", SOURCE, linear_params,
             OBM_COUNT(linear_params), true, 1, 0},
    .deltas = true,
    .mask = OBM_MASK_OUTLIERS,
    .rescale = OBM_RESCALE_L1,
    .tensor_statistics = true,
};

static const obm_param_info ties_params[] = {
    OBM_PARAM_WEIGHT,
    DENSITY,
    GAMMA,
    OBM_PARAM_NORMALIZE("divide by the weights that agree with the elected sign", 0),
    RESCALE,
    OBM_PARAM_LAMBDA,
    OBM_PARAM_SCOPE,
    OBM_PARAM_INT8_MASK,
};

const obm__method obm__method_breadcrumbs_ties = {
    .info = {"breadcrumbs_ties", "drop outliers and small elements, then elect signs and sum what agrees", SOURCE,
             ties_params, OBM_COUNT(ties_params), true, 1, 0},
    .deltas = true,
    .mask = OBM_MASK_OUTLIERS,
    .consensus = OBM_CONSENSUS_SIGN,
    .rescale = OBM_RESCALE_L1,
    .tensor_statistics = true,
};
