/* Every templated kernel and the table, from the parameters of elementwise.h, rows.h, merge.h, planes.h and z12.h and
 * these:
 *
 *   TABLE, ISA                       the table's symbol and name
 *   BATCH_WIDE                       defined where vectors are 64 bytes and there are 32 of them
 *   SPLIT_W_BF16(p, a, b)            SPLIT_W of bf16, where it is not EVEN_W and ODD_W of LOAD_W(p)
 *   W, LOAD_W(p)                     2 * VL bf16;   EVEN_W(w) ODD_W(w) the even and the odd ones, widened, in order
 *   Z12_ENCODE GEMM_PACK             the table's z12_encode and gemm_pack
 *   SPLIT_EVEN_ODD(p, a, b)          2 * VL floats in the same order
 *   ADD_PAIRS(a, b)                  the even lanes of a, then those of b, and to each its odd neighbour added; for batch.h
 */
#include "elementwise.h"

/* Values that batch.h puts in order on the stack: 128 KiB of the second cache, eight vectors of 4096 columns. */
#define OBM__BATCH_ROOM ((size_t)32768)

/* What batch kernels ask memory for while they multiply: of row r and step s, at + (r + lead) * apart + s * step. */
typedef struct NAME(batch_ask) {
    uintptr_t at, next;       /* next: where the row behind the last one of a strip is */
    size_t apart, step, lead; /* bytes, bytes, rows */
} NAME(batch_ask);

/* A 32-bit lane holds two bf16: a shift makes the even one a float, a mask the odd one. */
#define ROWS_NAME NAME(rows_bf16)
#define ROWS_TYPE uint16_t
#ifdef SPLIT_W_BF16
#define SPLIT_W SPLIT_W_BF16
#else
#define SPLIT_W(p, a, b) (a = EVEN_W(LOAD_W(p)), b = ODD_W(LOAD_W(p)))
#endif
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
#include "merge.h"
#include "merge_bf16.h"
#include "merge_draws.h"
#include "planes.h"
#include "z12.h"

#define GEMM_PAIRS obm__scalar_gemm_pairs
#include "table.h"
