/* magnitude_prune, localize_stitch: what is large in a task vector, summed with 1 / density, or averaged over the
 * models that keep it.  (Random pruning with 1 / density is dare_linear.) */
#include "merge.h"

static const obm_param_info prune_params[] = {
    OBM_PARAM_FACTOR("factor of this model"),
    OBM_PARAM_DENSITY("share of the elements kept, the largest by magnitude"),
    OBM_PARAM_NORMALIZE("divide by the sum of the weights", 0),
    OBM_PARAM_RESCALE("scale what is kept by 1 / density", 1),
    OBM_PARAM_LAMBDA,
    OBM_PARAM_SCOPE,
};

const obm__method obm__method_magnitude_prune = {
    .info = {"magnitude_prune", "keep the largest elements and rescale, then the weighted sum",
             "Yu et al., Language models are super Mario, arXiv 2311.03099, section 4.5 (magnitude-based pruning)",
             prune_params, OBM_COUNT(prune_params), true, 1, 0},
    .deltas = true,
    .f32_deltas = true,
    .mask = OBM_MASK_MAGNITUDE,
    .rescale = OBM_RESCALE_INVERSE_DENSITY,
};

static const obm_param_info stitch_params[] = {
    OBM_PARAM_ROW("density", "share of the elements kept, the largest by magnitude", OBM_PARAM_PER_MODEL, false, 0.1, 0,
                  1, false),
    OBM_PARAM_LAMBDA,
    OBM_PARAM_ROW("scope", "the largest of each tensor (0, `tensor`) or of the whole model (1, `model`)",
                  OBM_PARAM_GLOBAL, false, 1, 0, 1, false),
};

/* The mean over the models that keep an element; a change of exactly 0 is nobody's (He et al., section 3.2). */
static void stitch(const obm__block *b) {
    const obm__steps *s = b->g->steps;
    for (size_t j = 0; j < b->n; j++) {
        double sum = 0;
        size_t owners = 0;
        for (size_t i = 0; i < s->n; i++) {
            float d = obm__block_delta(b, i)[j];
            sum += d;
            owners += d != 0;
        }
        b->mixed[j] = (float)(b->base[j] + (owners ? (double)s->lambda * sum / (double)owners : 0));
    }
}

static const obm__custom stitching = {.merge = stitch};

const obm__method obm__method_localize_stitch = {
    .info = {"localize_stitch",
             "the largest elements, averaged where models keep the same ones (dataless Localize-and-Stitch)",
             "He et al., Localize-and-Stitch, arXiv 2408.13656, section 3", stitch_params, OBM_COUNT(stitch_params),
             true, 1, 0},
    .deltas = true,
    .f32_deltas = true,
    .mask = OBM_MASK_MAGNITUDE,
    .custom = &stitching,
};
