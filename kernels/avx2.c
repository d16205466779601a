/* AVX2 + FMA + F16C: 8 lanes.  Parameters of the templates; nothing else is written here. */
#if defined(__x86_64__)
#include "tables.h"

#include <immintrin.h>
#include <math.h>
#include <string.h>

#define FN __attribute__((target("avx2,fma,f16c,popcnt")))
#define NAME(op) avx2_##op
#define TABLE obm__kernels_avx2
#define ISA "avx2"

#define V __m256
#define VL 8
#define LOAD(p) _mm256_loadu_ps(p)
#define STORE(p, v) _mm256_storeu_ps(p, v)
#define SET1(a) _mm256_set1_ps(a)
#define ADD(a, b) _mm256_add_ps(a, b)
#define SUB(a, b) _mm256_sub_ps(a, b)
#define MUL(a, b) _mm256_mul_ps(a, b)
#define FMA(a, b, c) _mm256_fmadd_ps(a, b, c)

#define DIV(a, b) _mm256_div_ps(a, b)
/* Of a NaN and a number the instruction gives the second operand. */
#define AT_LEAST(v, a) _mm256_max_ps(a, v)
#define AT_MOST(v, a) _mm256_min_ps(a, v)
#define POWER(n) \
    _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23))

#define D __m256d
#define DL 4
#define LOAD_D(p) _mm256_cvtps_pd(_mm_loadu_ps(p))
#define STORE_D(p, v) _mm256_storeu_pd(p, v)
#define NARROW_D(p, v) _mm_storeu_ps(p, _mm256_cvtpd_ps(v))
#define SET1_D(a) _mm256_set1_pd(a)
#define ADD_D(a, b) _mm256_add_pd(a, b)
#define MUL_D(a, b) _mm256_mul_pd(a, b)
#define ABS_D(a) _mm256_andnot_pd(_mm256_set1_pd(-0.0), a)
#define EACH_D(X) X(0) X(1) X(2) X(3)

#define LOAD_128(p) _mm_loadu_si128((const __m128i *)(const void *)(p))
#define LOAD_256(p) _mm256_loadu_si256((const __m256i *)(const void *)(p))

/* The eight words are loaded to both halves for nothing, so that one shuffle widens them: unpacking and shifting would
 * be two operations on units that multiplications need. */
#define LOAD_BF16(p) _mm256_castsi256_ps(_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(LOAD_128(p)), WIDEN_BF16))
#define WIDEN_BF16                                                                                                     \
    _mm256_setr_epi8(-1, -1, 0, 1, -1, -1, 2, 3, -1, -1, 4, 5, -1, -1, 6, 7, -1, -1, 8, 9, -1, -1, 10, 11, -1, -1, 12, \
                     13, -1, -1, 14, 15)
/* The same with the indices in memory: batch.h has no register left for them, and gcc would rather keep a sum there. */
#define BATCH_LOAD_BF16(p) load_bf16(p)
FN static inline __m256 load_bf16(const uint16_t *p) {
    static const _Alignas(32)
        uint8_t order[32] = {255, 255, 0, 1, 255, 255, 2,  3,  255, 255, 4,  5,  255, 255, 6,  7,
                             255, 255, 8, 9, 255, 255, 10, 11, 255, 255, 12, 13, 255, 255, 14, 15};
    __m256i v = _mm256_broadcastsi128_si256(LOAD_128(p));
    __asm__("vpshufb %1, %0, %0" : "+x"(v) : "m"(order));
    return _mm256_castsi256_ps(v);
}
#define WIDE_BF16(p) ((NAME(u))LOAD_BF16(p))
#define ANY(v) _mm256_movemask_epi8((__m256i)(v))
#define LANES(v)                  \
    ((uint32_t)_mm_movemask_epi8( \
        _mm_packs_epi16(_mm256_castsi256_si128((__m256i)(v)), _mm256_extracti128_si256((__m256i)(v), 1))))
#define PLUS_PRODUCT(c, a, b) ((NAME(f))_mm256_fmadd_ps((__m256)(a), (__m256)(b), (__m256)(c)))
#define PACK(a, b) _mm256_packs_epi16((__m256i)(a), (__m256i)(b))
#define AVERAGE(a, b) _mm256_avg_epu16((__m256i)(a), (__m256i)(b))
#define HALVES(even, odd) _mm256_blend_epi16((__m256i)(even), (__m256i)(odd), 0xaa)
#define MUL_EVEN(a, b) _mm256_mul_epu32((__m256i)(a), (__m256i)(b))
#define MUL_UPPER(a, b) ((NAME(w))_mm256_mulhi_epu16((__m256i)(a), (__m256i)(b)))
#define LESS_SOME(a, b) ((NAME(w))_mm256_subs_epu16((__m256i)(a), (__m256i)(b)))
#define AT_LEAST_H(a, b) ((NAME(w))_mm256_max_epu16((__m256i)(a), (__m256i)(b)))
#define AT_MOST_H(a, b) ((NAME(w))_mm256_min_epu16((__m256i)(a), (__m256i)(b)))
#define QUARTERS(even, odd) _mm256_blend_epi32((__m256i)(even), (__m256i)(odd), 0xaa)
#define LOAD_F16(p) _mm256_cvtph_ps(LOAD_128(p))
#define STORE_F16(p, v) _mm_storeu_si128((__m128i *)(void *)(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT))
#define STORE_BF16(p, v) _mm_storeu_si128((__m128i *)(void *)(p), narrow_bf16(v))

/* As narrow_bf16 in scalar.c; the pack works inside 128-bit halves, the permute brings their results together. */
FN static inline __m128i narrow_bf16(__m256 v) {
    __m256i u = _mm256_castps_si256(v), last = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_add_epi32(u, _mm256_add_epi32(last, _mm256_set1_epi32(0x7fff)));
    __m256i quiet = _mm256_or_si256(u, _mm256_set1_epi32(0x400000));
    __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
    return _mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x08));
}

#define GE_ZERO(v) ((unsigned)_mm256_movemask_ps(_mm256_cmp_ps(v, _mm256_setzero_ps(), _CMP_GE_OQ)))
#define IS_ZERO(v) ((unsigned)_mm256_movemask_ps(_mm256_cmp_ps(v, _mm256_setzero_ps(), _CMP_EQ_OQ)))
#define NOT_AT_MOST(v, a) ((unsigned)_mm256_movemask_ps(_mm256_cmp_ps(v, a, _CMP_NLE_UQ)))
/* Magnitude bits above those of the largest finite float; both sides are positive as signed integers. */
#define NOT_FINITE(v)                                                     \
    ((unsigned)_mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpgt_epi32( \
        _mm256_and_si256(_mm256_castps_si256(v), _mm256_set1_epi32(0x7fffffff)), _mm256_set1_epi32(0x7f7fffff)))))

#define SIGNED(a, bits) signed8(a, bits, 0)
#define SIGNED_AT(a, bits, l) signed8(a, bits, l)
/* The lane's bit moves to the sign and turns -a into a. */
FN static inline __m256 signed8(float a, uint32_t bits, int l) {
    const __m256i up = _mm256_setr_epi32(31 - l, 30 - l, 29 - l, 28 - l, 27 - l, 26 - l, 25 - l, 24 - l);
    __m256 flip = _mm256_castsi256_ps(_mm256_sllv_epi32(_mm256_set1_epi32((int)bits), up));
    return _mm256_xor_ps(_mm256_set1_ps(-a), _mm256_and_ps(flip, _mm256_set1_ps(-0.0f)));
}

#define KEEP(v) __asm__("" : "+x"(v))
#define ROWS_AHEAD 0
#define HSUM(v) lanes_sum(v)
FN static inline float lanes_sum(__m256 v) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}

/* The same sums of four vectors, halves and quarters of two at a time. */
#define HSUM_4(p, a, b, c, d) _mm_storeu_ps(p, lanes_sum_4(a, b, c, d))
FN static inline __m128 lanes_sum_4(__m256 a, __m256 b, __m256 c, __m256 d) {
    __m256 ab = _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
    __m256 cd = _mm256_add_ps(_mm256_permute2f128_ps(c, d, 0x20), _mm256_permute2f128_ps(c, d, 0x31));
    __m256 two =
        _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xee)); /* a a c c | b b d d */
    __m128 ac = _mm256_castps256_ps128(two), bd = _mm256_extractf128_ps(two, 1);
    __m128 even = _mm_shuffle_ps(ac, bd, 0x88), odd = _mm_shuffle_ps(ac, bd, 0xdd); /* a c b d */
    __m128 sums = _mm_add_ps(even, odd);
    return _mm_shuffle_ps(sums, sums, 0xd8);
}

#define W __m256i
#define LOAD_W(p) LOAD_256(p)
#define STORE_W(p, w) _mm256_storeu_si256((__m256i *)(void *)(p), w)
#define EVEN_W(w) _mm256_castsi256_ps(_mm256_slli_epi32(w, 16))
#define ODD_W(w) _mm256_castsi256_ps(_mm256_and_si256(w, _mm256_set1_epi32((int)0xffff0000)))
/* shuffle_ps picks inside halves and leaves the 64-bit pairs in the order 0 2 1 3; the permute restores it. */
#define IN_ORDER(v) _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(v), 0xd8))
#define SPLIT_EVEN_ODD(p, a, b)                           \
    do {                                                  \
        __m256 low = LOAD(p), high = LOAD((p) + 8);       \
        a = IN_ORDER(_mm256_shuffle_ps(low, high, 0x88)); \
        b = IN_ORDER(_mm256_shuffle_ps(low, high, 0xdd)); \
    } while (0)

/* Pairs are added in the order of IN_ORDER's input. */
#define ADD_PAIRS(a, b) add_pairs(a, b)
FN static inline __m256 add_pairs(__m256 a, __m256 b) {
    __m256 sums = _mm256_add_ps(_mm256_shuffle_ps(a, b, 0x88), _mm256_shuffle_ps(a, b, 0xdd));
    return IN_ORDER(sums);
}

#define B __m256i
#define BL 32
#define EACH_B(X) X(0) X(1)
#define LOAD_B(p) LOAD_256(p)
#define STORE_B(p, v) _mm256_storeu_si256((__m256i *)(void *)(p), v)
#define XOR_B(a, b) _mm256_xor_si256(a, b)
#define LOW_NIBBLE(v) _mm256_and_si256(v, _mm256_set1_epi8(15))
#define HIGH_NIBBLE(v) _mm256_and_si256(_mm256_srli_epi16(v, 4), _mm256_set1_epi8(15))
#define TABLE_B(p) _mm256_broadcastsi128_si256(LOAD_128(p))
#define LOOKUP(t, i) _mm256_shuffle_epi8(t, i)
#define ADD_B(a, b) _mm256_add_epi8(a, b)
#define ZIP_LOW(a, b) _mm256_unpacklo_epi8(a, b)
#define ZIP_HIGH(a, b) _mm256_unpackhi_epi8(a, b)
#define GATHER_B(p, d) _mm256_inserti128_si256(_mm256_castsi128_si256(LOAD_128(p)), LOAD_128((p) + (d)), 1)
#define SCATTER_B(p, d, v)                                                                \
    do {                                                                                  \
        _mm_storeu_si128((__m128i *)(void *)(p), _mm256_castsi256_si128(v));              \
        _mm_storeu_si128((__m128i *)(void *)((p) + (d)), _mm256_extracti128_si256(v, 1)); \
    } while (0)
/* unpack works inside lanes: its low results are the first halves of both lanes, the high ones the second halves. */
#define STORE_PAIRS(p, even, odd)                                                                \
    do {                                                                                         \
        __m256i low = _mm256_unpacklo_epi16(even, odd), high = _mm256_unpackhi_epi16(even, odd); \
        STORE_B(p, _mm256_permute2x128_si256(low, high, 0x20));                                  \
        STORE_B((p) + 16, _mm256_permute2x128_si256(low, high, 0x31));                           \
    } while (0)
#define MAX_ABS(m, v) \
    _mm256_castsi256_ps(_mm256_max_epi32(_mm256_castps_si256(m), _mm256_castps_si256(_mm256_andnot_ps(SET1(-0.0f), v))))

#include "template/planes_x86.h"

#define Z12_PARTS 2
#define Z12_NEIGHBOURS 0
FN static inline void z12_part(W *w, const uint8_t *p, const uint8_t *table, int part) {
    __m256i low = LOAD_B(p + part * 32), index = LOAD_B(p + 64);
    __m256i high = LOOKUP(TABLE_B(table), part ? HIGH_NIBBLE(index) : LOW_NIBBLE(index));
    w[0] = ZIP_LOW(low, high);
    w[1] = ZIP_HIGH(low, high);
}

#include "template/z12_x86.h"
#define Z12_ENCODE NAME(z12_encode)

#include "template/gemm_x86.h"
#define GEMM_PACK NAME(gemm_pack)

#include "template/all.h"
#else
typedef int obm__no_avx2; /* ISO C wants a declaration in every file */
#endif
