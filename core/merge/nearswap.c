/* nearswap: towards the model where it is near the base, t / distance of the way. */
#include "merge.h"

static const obm_param_info params[] = {
    OBM_PARAM_ROW("t", "distance up to which the model's value is taken whole", OBM_PARAM_GLOBAL, true, 1e-4, -INFINITY,
                  INFINITY, false),
};

#define LEAST_DISTANCE 1e-6

static void merge(const obm__block *b) {
    double t = obm__steps_value(b->g->steps, "t", 0);
    for (size_t j = 0; j < b->n; j++) {
        double base = b->base[j], x = b->deltas[j];
        double weight = fmin(fmax(t / fmax(fabs(base - x), LEAST_DISTANCE), 0), 1);
        b->mixed[j] = (float)(weight * x + (1 - weight) * base);
    }
}

static const obm__custom custom = {.merge = merge};

const obm__method obm__method_nearswap = {
    .info = {"nearswap", "the model where it is near the base, less of it farther away",
             "huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001", params, OBM_COUNT(params), true, 1, 1},
    .cost = 10,
    .custom = &custom,
};
