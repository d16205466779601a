/* Every templated kernel and the table, from the parameters of elementwise.h, rows.h, merge.h, planes.h and z12.h and
 * these:
 *
 *   TABLE, ISA                       the table's symbol and name
 *   W, LOAD_W(p)                     2 * VL bf16;   EVEN_W(w) ODD_W(w) the even and the odd ones, widened, in order
 *   Z12_ENCODE GEMM_PACK             the table's z12_encode and gemm_pack
 *   TABLE_PAIRS, GEMM_PAIRS          a second table that has this gemm_pairs, if there is one
 *   SPLIT_EVEN_ODD(p, a, b)          2 * VL floats in the same order
 *   ADD_PAIRS(a, b)                  the even lanes of a, then those of b, and to each its odd neighbour added
 */
#include "elementwise.h"

/* Values that batch.h puts in order on the stack: 128 KiB of the second cache, eight vectors of 4096 columns. */
#define OBM__BATCH_ROOM ((size_t)32768)

/* A 32-bit lane holds two bf16: a shift makes the even one a float, a mask the odd one. */
#define ROWS_NAME NAME(rows_bf16)
#define ROWS_TYPE uint16_t
#define SPLIT_W(p, a, b) (a = EVEN_W(LOAD_W(p)), b = ODD_W(LOAD_W(p)))
#define SPLIT_X SPLIT_EVEN_ODD
#define ROWS_SPLITS 1
#define BATCH_NAME NAME(batch_bf16)
#ifdef BATCH_LOAD_BF16
#define BATCH_LOAD BATCH_LOAD_BF16
#else
#define BATCH_LOAD LOAD_BF16
#endif
#define BATCH_JOIN ADD_PAIRS
#include "rows.h"

#define ROWS_NAME NAME(rows_f16)
#define ROWS_TYPE uint16_t
#define SPLIT_W(p, a, b) (a = LOAD_F16(p), b = LOAD_F16((p) + VL))
#define SPLIT_X(p, a, b) (a = LOAD(p), b = LOAD((p) + VL))
#define ROWS_SPLITS 0
#define BATCH_NAME NAME(batch_f16)
#define BATCH_LOAD LOAD_F16
#define BATCH_JOIN ADD
#include "rows.h"

#define ROWS_NAME NAME(rows_f32)
#define ROWS_TYPE float
#define SPLIT_W(p, a, b) (a = LOAD(p), b = LOAD((p) + VL))
#define SPLIT_X SPLIT_W
#define ROWS_SPLITS 0
#define BATCH_NAME NAME(batch_f32)
#define BATCH_LOAD LOAD
#define BATCH_JOIN ADD
#include "rows.h"

#include "exp.h"
#include "gemm.h"
#ifdef TABLE_PAIRS
#include "gemm_pairs.h"
#endif
#include "merge.h"
#include "merge_bf16.h"
#include "merge_draws.h"
#include "planes.h"
#include "z12.h"

/* The histogram is bound by dependent increments, not by loads: vectors gain nothing. */
#define ENTRIES(pairs)                                            \
    {                                                             \
        .isa = ISA,                                               \
        .bf16_to_f32 = NAME(bf16_to_f32),                         \
        .f16_to_f32 = NAME(f16_to_f32),                           \
        .f32_to_bf16 = NAME(f32_to_bf16),                         \
        .f32_to_f16 = NAME(f32_to_f16),                           \
        .sub_f32 = NAME(sub_f32),                                 \
        .sub_bf16 = NAME(sub_bf16),                               \
        .axpy_f32 = NAME(axpy_f32),                               \
        .mix_f32 = NAME(mix_f32),                                 \
        .find_nonfinite = NAME(find_nonfinite),                   \
        .abs_sum = NAME(abs_sum),                                 \
        .sign_sum_bf16 = NAME(sign_sum_bf16),                     \
        .dot = NAME(dot),                                         \
        .count_zero = NAME(count_zero),                           \
        .sign_pack = NAME(sign_pack),                             \
        .sign_axpy = NAME(sign_axpy),                             \
        .magnitude_histogram = obm__scalar_magnitude_histogram,   \
        .delta_bf16 = NAME(delta_bf16),                           \
        .count_from = NAME(count_from),                           \
        .low_histogram = NAME(low_histogram),                     \
        .agree_f32 = NAME(agree_f32),                             \
        .sum_f32 = NAME(sum_f32),                                 \
        .store_bf16 = NAME(store_bf16),                           \
        .count_bf16 = NAME(count_bf16),                           \
        .low_bf16 = NAME(low_bf16),                               \
        .sizes_bf16 = NAME(sizes_bf16),                           \
        .merge_bf16 = NAME(merge_bf16),                           \
        .vote_bf16 = NAME(vote_bf16),                             \
        .random_bits = NAME(random_bits),                         \
        .random_tops = NAME(random_tops),                         \
        .random_highs = NAME(random_highs),                       \
        .choose_sizes = NAME(choose_sizes),                       \
        .sum_sizes = NAME(sum_sizes),                             \
        .rows_bf16 = NAME(rows_bf16),                             \
        .rows_f16 = NAME(rows_f16),                               \
        .rows_f32 = NAME(rows_f32),                               \
        .batch_bf16 = NAME(batch_bf16),                           \
        .batch_f16 = NAME(batch_f16),                             \
        .batch_f32 = NAME(batch_f32),                             \
        .silu_mul = NAME(silu_mul),                               \
        .exp_sum = NAME(exp_sum),                                 \
        .mix_rows = NAME(mix_rows),                               \
        .gemm_pack = GEMM_PACK,                                   \
        .gemm = NAME(gemm),                                       \
        .gemm_pairs = pairs,                                      \
        .z12_encode = Z12_ENCODE,                                 \
        .z12_unpack = NAME(z12_unpack),                           \
        .rows_z12 = NAME(rows_z12),                               \
        .batch_z12 = NAME(batch_z12),                             \
        .plane_repack = NAME(plane_repack),                       \
        .plane_unpack = NAME(plane_unpack),                       \
        .plane_tables = NAME(plane_tables),                       \
        .plane_sums = NAME(plane_sums),                           \
        .plane_add = NAME(plane_add),                             \
    }

const obm_kernels TABLE = ENTRIES(obm__scalar_gemm_pairs);
#ifdef TABLE_PAIRS
const obm_kernels TABLE_PAIRS = ENTRIES(GEMM_PAIRS);
#endif
