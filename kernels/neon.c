/* Advanced SIMD (armv8-a baseline): two q registers as 8 lanes.  Parameters of the templates and their small functions.
 */
#if defined(__aarch64__)
#include "tables.h"

#include <arm_neon.h>
#include <math.h>
#include <string.h>

#define FN
#define NAME(op) neon_##op
#define TABLE obm__kernels_neon
#define ISA "neon"

#define V float32x4x2_t
#define VL 8
#define LOAD(p) load8(p)
#define STORE(p, v) store8(p, v)
#define SET1(a) pair(vdupq_n_f32(a), vdupq_n_f32(a))
#define ADD(a, b) add8(a, b)
#define SUB(a, b) sub8(a, b)
#define MUL(a, b) mul8(a, b)
#define FMA(a, b, c) fma8(a, b, c)

static inline V pair(float32x4_t low, float32x4_t high) { return (V){{low, high}}; }
static inline V load8(const float *p) { return pair(vld1q_f32(p), vld1q_f32(p + 4)); }
static inline void store8(float *p, V v) {
    vst1q_f32(p, v.val[0]);
    vst1q_f32(p + 4, v.val[1]);
}
static inline V add8(V a, V b) { return pair(vaddq_f32(a.val[0], b.val[0]), vaddq_f32(a.val[1], b.val[1])); }
static inline V sub8(V a, V b) { return pair(vsubq_f32(a.val[0], b.val[0]), vsubq_f32(a.val[1], b.val[1])); }
static inline V mul8(V a, V b) { return pair(vmulq_f32(a.val[0], b.val[0]), vmulq_f32(a.val[1], b.val[1])); }
static inline V fma8(V a, V b, V c) {
    return pair(vfmaq_f32(c.val[0], a.val[0], b.val[0]), vfmaq_f32(c.val[1], a.val[1], b.val[1]));
}

#define DIV(a, b) div8(a, b)
#define AT_LEAST(v, a) max8(v, a)
#define AT_MOST(v, a) min8(v, a)
#define POWER(n) power8(n)

static inline V div8(V a, V b) { return pair(vdivq_f32(a.val[0], b.val[0]), vdivq_f32(a.val[1], b.val[1])); }
static inline V max8(V a, V b) { return pair(vmaxq_f32(a.val[0], b.val[0]), vmaxq_f32(a.val[1], b.val[1])); }
static inline V min8(V a, V b) { return pair(vminq_f32(a.val[0], b.val[0]), vminq_f32(a.val[1], b.val[1])); }
static inline float32x4_t power4(float32x4_t n) {
    return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127)), 23));
}
static inline V power8(V n) { return pair(power4(n.val[0]), power4(n.val[1])); }

#define D float64x2_t
#define DL 2
#define LOAD_D(p) vcvt_f64_f32(vld1_f32(p))
#define STORE_D(p, v) vst1q_f64(p, v)
#define NARROW_D(p, v) vst1_f32(p, vcvt_f32_f64(v))
#define SET1_D(a) vdupq_n_f64(a)
#define ADD_D(a, b) vaddq_f64(a, b)
#define MUL_D(a, b) vmulq_f64(a, b)
#define ABS_D(a) vabsq_f64(a)
#define EACH_D(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7)

#define LOAD_BF16(p) load_bf16(vld1q_u16(p))
#define LOAD_F16(p) load_f16(vld1q_u16(p))
#define STORE_BF16(p, v) vst1q_u16(p, vcombine_u16(narrow_bf16((v).val[0]), narrow_bf16((v).val[1])))
#define STORE_F16(p, v) vst1q_u16(p, vcombine_u16(narrow_f16((v).val[0]), narrow_f16((v).val[1])))

static inline V load_bf16(uint16x8_t h) {
    return pair(vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(h), 16)),
                vreinterpretq_f32_u32(vshll_n_u16(vget_high_u16(h), 16)));
}
static inline V load_f16(uint16x8_t h) {
    return pair(vcvt_f32_f16(vreinterpret_f16_u16(vget_low_u16(h))),
                vcvt_f32_f16(vreinterpret_f16_u16(vget_high_u16(h))));
}
static inline uint16x4_t narrow_f16(float32x4_t v) { return vreinterpret_u16_f16(vcvt_f16_f32(v)); }
/* As narrow_bf16 in scalar.c. */
static inline uint16x4_t narrow_bf16(float32x4_t v) {
    uint32x4_t u = vreinterpretq_u32_f32(v), last = vandq_u32(vshrq_n_u32(u, 16), vdupq_n_u32(1));
    uint32x4_t rounded = vaddq_u32(u, vaddq_u32(last, vdupq_n_u32(0x7fff)));
    uint32x4_t quiet = vorrq_u32(u, vdupq_n_u32(0x400000));
    return vshrn_n_u32(vbslq_u32(vceqq_f32(v, v), rounded, quiet), 16);
}

/* One bit per lane of two comparison results. */
static inline unsigned lanes(uint32x4_t low, uint32x4_t high) {
    static const uint32_t weight[8] = {1, 2, 4, 8, 16, 32, 64, 128};
    return vaddvq_u32(vorrq_u32(vandq_u32(low, vld1q_u32(weight)), vandq_u32(high, vld1q_u32(weight + 4))));
}
#define GE_ZERO(v) ge_zero(v)
#define IS_ZERO(v) is_zero(v)
#define NOT_FINITE(v) not_finite(v)
#define NOT_AT_MOST(v, a) (~lanes(vcleq_f32((v).val[0], (a).val[0]), vcleq_f32((v).val[1], (a).val[1])) & 0xffu)
static inline unsigned ge_zero(V v) { return lanes(vcgezq_f32(v.val[0]), vcgezq_f32(v.val[1])); }
static inline unsigned is_zero(V v) { return lanes(vceqzq_f32(v.val[0]), vceqzq_f32(v.val[1])); }
static inline uint32x4_t above_finite(float32x4_t v) {
    return vcgtq_u32(vandq_u32(vreinterpretq_u32_f32(v), vdupq_n_u32(0x7fffffff)), vdupq_n_u32(0x7f7fffff));
}
static inline unsigned not_finite(V v) { return lanes(above_finite(v.val[0]), above_finite(v.val[1])); }

#define SIGNED(a, bits) signed8(a, bits)
#define SIGNED_AT(a, bits, l) signed8(a, (bits) >> (l))
static inline V signed8(float a, unsigned bits) {
    static const uint32_t weight[8] = {1, 2, 4, 8, 16, 32, 64, 128};
    uint32x4_t all = vdupq_n_u32(bits);
    float32x4_t plus = vdupq_n_f32(a), minus = vdupq_n_f32(-a);
    return pair(vbslq_f32(vtstq_u32(all, vld1q_u32(weight)), plus, minus),
                vbslq_f32(vtstq_u32(all, vld1q_u32(weight + 4)), plus, minus));
}

#define KEEP(v) (void)(v)
#define ROWS_AHEAD 0
/* (0 + 4) + (2 + 6), then the odd ones: written out, since vaddvq_f32 leaves the order to the instruction's pairs. */
#define HSUM(v) lanes_sum(v)
static inline float lanes_sum(V v) {
    float32x4_t four = vaddq_f32(v.val[0], v.val[1]);
    float32x2_t two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
    return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
}

#define HSUM_4(p, a, b, c, d) ((p)[0] = HSUM(a), (p)[1] = HSUM(b), (p)[2] = HSUM(c), (p)[3] = HSUM(d))

#define W uint16x8x2_t
#define LOAD_W(p) ((W){{vld1q_u16(p), vld1q_u16((p) + 8)}})
#define STORE_W(p, w) (vst1q_u16(p, (w).val[0]), vst1q_u16((p) + 8, (w).val[1]))
#define EVEN_W(w) even_bf16((w).val[0], (w).val[1])
#define ODD_W(w) odd_bf16((w).val[0], (w).val[1])
static inline V even_bf16(uint16x8_t a, uint16x8_t b) {
    return pair(vreinterpretq_f32_u32(vshlq_n_u32(vreinterpretq_u32_u16(a), 16)),
                vreinterpretq_f32_u32(vshlq_n_u32(vreinterpretq_u32_u16(b), 16)));
}
static inline V odd_bf16(uint16x8_t a, uint16x8_t b) {
    uint32x4_t upper = vdupq_n_u32(0xffff0000);
    return pair(vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_u16(a), upper)),
                vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_u16(b), upper)));
}
#define SPLIT_EVEN_ODD(p, a, b)                                      \
    do {                                                             \
        float32x4x2_t low = vld2q_f32(p), high = vld2q_f32((p) + 8); \
        a = pair(low.val[0], high.val[0]);                           \
        b = pair(low.val[1], high.val[1]);                           \
    } while (0)
#define ADD_PAIRS(a, b) add_pairs(a, b)
static inline V add_pairs(V a, V b) { return pair(vpaddq_f32(a.val[0], a.val[1]), vpaddq_f32(b.val[0], b.val[1])); }

#define B uint8x16_t
#define BL 16
#define EACH_B(X) X(0) X(1) X(2) X(3)
#define LOAD_B(p) vld1q_u8(p)
#define STORE_B(p, v) vst1q_u8(p, v)
#define XOR_B(a, b) veorq_u8(a, b)
#define LOW_NIBBLE(v) vandq_u8(v, vdupq_n_u8(15))
#define HIGH_NIBBLE(v) vshrq_n_u8(v, 4)
#define TABLE_B(p) vld1q_u8(p)
#define LOOKUP(t, i) vqtbl1q_u8(t, i)
#define WORDS(a) vreinterpretq_u16_u8(a)
#define ADD_B(a, b) vaddq_u8(a, b)
#define STORE_PAIRS(p, even, odd) vst2q_u16(p, ((uint16x8x2_t){{WORDS(even), WORDS(odd)}}))
#define ZIP_LOW(a, b) vzip1q_u8(a, b)
#define ZIP_HIGH(a, b) vzip2q_u8(a, b)
#define GATHER_B(p, d) vld1q_u8(p)
#define SCATTER_B(p, d, v) vst1q_u8(p, v)
#define MAX_ABS(m, v) pair(max_abs((m).val[0], (v).val[0]), max_abs((m).val[1], (v).val[1]))

static inline float32x4_t max_abs(float32x4_t m, float32x4_t v) {
    return vreinterpretq_f32_u32(vmaxq_u32(vreinterpretq_u32_f32(m), vreinterpretq_u32_f32(vabsq_f32(v))));
}

/* Entries 0..7 and 8..15 of a nibble's table.  z holds max(-q, 0) of four columns, then max(q, 0), in 16-bit words;
 * mask k picks word k or k + 4 by bit k of the entry.  Bit 3 is constant in each half. */
static inline void nibble_table(uint8_t *limb0, uint8_t *limb1, uint8x16_t z) {
    static const uint8_t masks[5][16] = {{0, 1, 8, 9, 0, 1, 8, 9, 0, 1, 8, 9, 0, 1, 8, 9},
                                         {2, 3, 2, 3, 10, 11, 10, 11, 2, 3, 2, 3, 10, 11, 10, 11},
                                         {4, 5, 4, 5, 4, 5, 4, 5, 12, 13, 12, 13, 12, 13, 12, 13},
                                         {6, 7, 6, 7, 6, 7, 6, 7, 6, 7, 6, 7, 6, 7, 6, 7},
                                         {14, 15, 14, 15, 14, 15, 14, 15, 14, 15, 14, 15, 14, 15, 14, 15}};
#define PICK(k) WORDS(vqtbl1q_u8(z, vld1q_u8(masks[k])))
    uint16x8_t three = vaddq_u16(vaddq_u16(PICK(0), PICK(1)), PICK(2));
    uint16x8_t low = vaddq_u16(three, PICK(3)), high = vaddq_u16(three, PICK(4)), limb = vdupq_n_u16(127);
#undef PICK
    vst1q_u8(limb0, vcombine_u8(vmovn_u16(vandq_u16(low, limb)), vmovn_u16(vandq_u16(high, limb))));
    vst1q_u8(limb1, vcombine_u8(vshrn_n_u16(low, 7), vshrn_n_u16(high, 7)));
}

static int32_t group_tables(uint8_t *tables, const float *x, obm__quantiser z) {
    uint32x4_t sum = vdupq_n_u32(0);
    for (size_t i = 0; i < OBM__PLANE_GROUP; i += 4) {
        int32x4_t wide = vcvtnq_s32_f32(vmulq_n_f32(vmulq_n_f32(vld1q_f32(x + i), z.lift), z.steps));
        int16x4_t q = vmovn_s32(wide), plus = vmax_s16(q, vdup_n_s16(0)), minus = vsub_s16(plus, q);
        uint8_t *entry = tables + i / 8 * OBM__PLANE_TABLE + i % 8 * 4;
        sum = vaddw_u16(sum, vreinterpret_u16_s16(vadd_s16(plus, minus)));
        nibble_table(entry, entry + 32, vreinterpretq_u8_s16(vcombine_s16(minus, plus)));
    }
    return (int32_t)vaddvq_u32(sum);
}

#define Z12_PARTS 2
#define Z12_NEIGHBOURS 0
static inline void z12_part(W *w, const uint8_t *p, const uint8_t *table, int part) {
    uint8x16_t codes = vld1q_u8(table), index0 = vld1q_u8(p + 64), index1 = vld1q_u8(p + 80);
    uint8x16_t low0 = vld1q_u8(p + part * 32), low1 = vld1q_u8(p + part * 32 + 16);
    uint8x16_t high0 = LOOKUP(codes, part ? HIGH_NIBBLE(index0) : LOW_NIBBLE(index0));
    uint8x16_t high1 = LOOKUP(codes, part ? HIGH_NIBBLE(index1) : LOW_NIBBLE(index1));
    w[0] = (W){{WORDS(ZIP_LOW(low0, high0)), WORDS(ZIP_LOW(low1, high1))}};
    w[1] = (W){{WORDS(ZIP_HIGH(low0, high0)), WORDS(ZIP_HIGH(low1, high1))}};
}

#define Z12_ENCODE obm__scalar_z12_encode
#define GEMM_PACK obm__scalar_gemm_pack

#include "template/all.h"
#else
typedef int obm__no_neon; /* ISO C wants a declaration in every file */
#endif
