/* AVX-512 F, BW, DQ, VL: 16 lanes.  Parameters of the templates; nothing else is written here. */
#if defined(__x86_64__)
#include "tables.h"

#include <immintrin.h>
#include <math.h>
#include <string.h>

#define FN __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,popcnt")))
#define NAME(op) avx512_##op
#define TABLE obm__kernels_avx512
#define ISA "avx512"

#define V __m512
#define VL 16
#define LOAD(p) _mm512_loadu_ps(p)
#define STORE(p, v) _mm512_storeu_ps(p, v)
#define SET1(a) _mm512_set1_ps(a)
#define ADD(a, b) _mm512_add_ps(a, b)
#define SUB(a, b) _mm512_sub_ps(a, b)
#define MUL(a, b) _mm512_mul_ps(a, b)
#define FMA(a, b, c) _mm512_fmadd_ps(a, b, c)

#define DIV(a, b) _mm512_div_ps(a, b)
/* Of a NaN and a number the instruction gives the second operand. */
#define AT_LEAST(v, a) _mm512_max_ps(a, v)
#define AT_MOST(v, a) _mm512_min_ps(a, v)
#define TIMES_POWER(v, n) _mm512_scalef_ps(v, n)

#define D __m512d
#define DL 8
#define LOAD_D(p) _mm512_cvtps_pd(_mm256_loadu_ps(p))
#define STORE_D(p, v) _mm512_storeu_pd(p, v)
#define NARROW_D(p, v) _mm256_storeu_ps(p, _mm512_cvtpd_ps(v))
#define SET1_D(a) _mm512_set1_pd(a)
#define ADD_D(a, b) _mm512_add_pd(a, b)
#define MUL_D(a, b) _mm512_mul_pd(a, b)
#define ABS_D(a) _mm512_andnot_pd(_mm512_set1_pd(-0.0), a)
#define EACH_D(X) X(0) X(1)

#define LOAD_128(p) _mm_loadu_si128((const __m128i *)(const void *)(p))
#define LOAD_256(p) _mm256_loadu_si256((const __m256i *)(const void *)(p))
#define LOAD_512(p) _mm512_loadu_si512((const void *)(p))

#define LOAD_BF16(p) _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(LOAD_256(p)), 16))
#define WIDE_BF16(p) ((NAME(u))LOAD_BF16(p))
#define ANY(v) _mm512_test_epi32_mask((__m512i)(v), (__m512i)(v))
#define LANES(v) ((uint32_t)_mm512_movepi16_mask((__m512i)(v)))
#define MUL_UPPER(a, b) ((NAME(w))_mm512_mulhi_epu16((__m512i)(a), (__m512i)(b)))
#define LESS_SOME(a, b) ((NAME(w))_mm512_subs_epu16((__m512i)(a), (__m512i)(b)))
#define AT_MOST_H(a, b) ((NAME(w))_mm512_min_epu16((__m512i)(a), (__m512i)(b)))
#define AT_LEAST_H(a, b) ((NAME(w))_mm512_max_epu16((__m512i)(a), (__m512i)(b)))
#define MASK __mmask16
#define ABOVE_I(a, b) _mm512_cmpgt_epi32_mask((__m512i)(a), (__m512i)(b))
#define ABOVE_F(a, b) _mm512_cmp_ps_mask((__m512)(a), (__m512)(b), _CMP_GT_OQ)
#define HAS_BITS(a, b) _mm512_test_epi32_mask((__m512i)(a), (__m512i)(b))
#define KEEP_IF(mask, v) ((NAME(f))_mm512_maskz_mov_ps(mask, (__m512)(v)))
#define ADD_IF(mask, a, b) ((NAME(f))_mm512_mask_add_ps((__m512)(a), mask, (__m512)(a), (__m512)(b)))
#define COUNT_W(n, a, b) mask_less_w((__m512i)(n), _mm512_cmpgt_epi16_mask((__m512i)(a), (__m512i)(b)))
#define COUNT_B(n, a, b) mask_less_b((__m512i)(n), _mm512_cmpgt_epi8_mask((__m512i)(a), (__m512i)(b)))
#define PLUS_PRODUCT(c, a, b) ((NAME(f))_mm512_fmadd_ps((__m512)(a), (__m512)(b), (__m512)(c)))
#define ROUND_BY(x, a, b) ((NAME(f))round_by((__m512)(x), (__m512)(a), (__m512)(b)))
#define PACK(a, b) _mm512_packs_epi16((__m512i)(a), (__m512i)(b))
#define AVERAGE(a, b) _mm512_avg_epu16((__m512i)(a), (__m512i)(b))
#define HALVES(even, odd) _mm512_mask_blend_epi16(0xaaaaaaaa, (__m512i)(even), (__m512i)(odd))
#define LOAD_F16(p) _mm512_cvtph_ps(LOAD_256(p))
#define STORE_F16(p, v) _mm256_storeu_si256((__m256i *)(void *)(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT))
#define STORE_BF16(p, v) _mm256_storeu_si256((__m256i *)(void *)(p), narrow_bf16(v))

FN static inline __m512i mask_less_w(__m512i n, __mmask32 more) {
    return _mm512_mask_sub_epi16(n, more, n, _mm512_set1_epi16(-1));
}
FN static inline __m512i mask_less_b(__m512i n, __mmask64 more) {
    return _mm512_mask_sub_epi8(n, more, n, _mm512_set1_epi8(-1));
}

FN static inline __m512 round_by(__m512 x, __m512 a, __m512 b) {
    return _mm512_fnmadd_ps(a, b, _mm512_fmadd_ps(a, b, x));
}

/* As narrow_bf16 in scalar.c. */
FN static inline __m256i narrow_bf16(__m512 v) {
    __m512i u = _mm512_castps_si512(v), last = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(u, _mm512_add_epi32(last, _mm512_set1_epi32(0x7fff)));
    __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    __m512i result = _mm512_mask_or_epi32(rounded, nan, u, _mm512_set1_epi32(0x400000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(result, 16));
}

#define GE_ZERO(v) ((unsigned)_mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_GE_OQ))
#define IS_ZERO(v) ((unsigned)_mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_EQ_OQ))
#define NOT_AT_MOST(v, a) ((unsigned)_mm512_cmp_ps_mask(v, a, _CMP_NLE_UQ))
/* Magnitude bits above those of the largest finite float. */
#define NOT_FINITE(v)                                                                                           \
    ((unsigned)_mm512_cmpgt_epi32_mask(_mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(0x7fffffff)), \
                                       _mm512_set1_epi32(0x7f7fffff)))
#define SIGNED(a, bits) _mm512_mask_blend_ps((__mmask16)(bits), _mm512_set1_ps(-(a)), _mm512_set1_ps(a))
#define SIGNED_AT(a, bits, l) SIGNED(a, (bits) >> (l))

#define BATCH_WIDE
#define KEEP(v) __asm__("" : "+v"(v))
#define ROWS_AHEAD 1024
#define HSUM(v) lanes_sum(v)
FN static inline float lanes_sum(__m512 v) {
    __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}

/* The same sums of four vectors: halves of two at a time, then quarters of all. */
#define HSUM_4(p, a, b, c, d) _mm_storeu_ps(p, lanes_sum_4(a, b, c, d))
FN static inline __m128 lanes_sum_4(__m512 a, __m512 b, __m512 c, __m512 d) {
    __m512 ab = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
    __m512 cd = _mm512_add_ps(_mm512_shuffle_f32x4(c, d, 0x44), _mm512_shuffle_f32x4(c, d, 0xee));
    __m512 four = _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd));
    __m512 two = _mm512_add_ps(four, _mm512_permute_ps(four, 0x4e));
    __m512 sums = _mm512_add_ps(two, _mm512_permute_ps(two, 0xb1));
    const __m512i first = _mm512_setr_epi32(0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12);
    return _mm512_castps512_ps128(_mm512_permutexvar_ps(first, sums));
}

#define W __m512i
#define LOAD_W(p) LOAD_512(p)
#define STORE_W(p, w) _mm512_storeu_si512((void *)(p), w)
#define EVEN_W(w) _mm512_castsi512_ps(_mm512_slli_epi32(w, 16))
#define ODD_W(w) _mm512_castsi512_ps(_mm512_and_si512(w, _mm512_set1_epi32((int)0xffff0000)))
/* Loaded once: where a matrix lies across cache lines, each of its loads is two. */
#define SPLIT_W_BF16(p, a, b)     \
    do {                          \
        __m512i both = LOAD_W(p); \
        KEEP(both);               \
        a = EVEN_W(both);         \
        b = ODD_W(both);          \
    } while (0)
/* Indices 16 and up of the two-source permute select from the second vector. */
#define EVEN_OF(a, b) \
    _mm512_permutex2var_ps(a, _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30), b)
#define ODD_OF(a, b) \
    _mm512_permutex2var_ps(a, _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31), b)
#define SPLIT_EVEN_ODD(p, a, b)                      \
    do {                                             \
        __m512 low = LOAD(p), high = LOAD((p) + 16); \
        a = EVEN_OF(low, high);                      \
        b = ODD_OF(low, high);                       \
    } while (0)

#define B __m512i
#define BL 64
#define EACH_B(X) X(0)
#define LOAD_B(p) LOAD_512(p)
#define STORE_B(p, v) _mm512_storeu_si512((void *)(p), v)
#define XOR_B(a, b) _mm512_xor_si512(a, b)
#define LOW_NIBBLE(v) _mm512_and_si512(v, _mm512_set1_epi8(15))
#define HIGH_NIBBLE(v) _mm512_and_si512(_mm512_srli_epi16(v, 4), _mm512_set1_epi8(15))
#define TABLE_B(p) _mm512_broadcast_i32x4(LOAD_128(p))
#define LOOKUP(t, i) _mm512_shuffle_epi8(t, i)
#define ADD_B(a, b) _mm512_add_epi8(a, b)
#define ZIP_LOW(a, b) _mm512_unpacklo_epi8(a, b)
#define ZIP_HIGH(a, b) _mm512_unpackhi_epi8(a, b)
#define GATHER_B(p, d) gather4(p, d)
#define SCATTER_B(p, d, v) scatter4(p, d, v)
#define STORE_PAIRS(p, even, odd) store_pairs(p, even, odd)
#define MAX_ABS(m, v)                                            \
    _mm512_castsi512_ps(_mm512_max_epi32(_mm512_castps_si512(m), \
                                         _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(0x7fffffff))))

FN static inline __m512i gather4(const uint8_t *p, size_t d) {
    __m256i low = _mm256_inserti128_si256(_mm256_castsi128_si256(LOAD_128(p)), LOAD_128(p + d), 1);
    __m256i high = _mm256_inserti128_si256(_mm256_castsi128_si256(LOAD_128(p + 2 * d)), LOAD_128(p + 3 * d), 1);
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}
FN static inline void scatter4(uint8_t *p, size_t d, __m512i v) {
    _mm_storeu_si128((__m128i *)(void *)p, _mm512_castsi512_si128(v));
    _mm_storeu_si128((__m128i *)(void *)(p + d), _mm512_extracti32x4_epi32(v, 1));
    _mm_storeu_si128((__m128i *)(void *)(p + 2 * d), _mm512_extracti32x4_epi32(v, 2));
    _mm_storeu_si128((__m128i *)(void *)(p + 3 * d), _mm512_extracti32x4_epi32(v, 3));
}
/* unpack works inside lanes: lane l of its low and high results are the first and second 8 words of lane l. */
FN static inline void store_pairs(uint16_t *p, __m512i even, __m512i odd) {
    const __m512i first = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
    const __m512i second = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
    __m512i low = _mm512_unpacklo_epi16(even, odd), high = _mm512_unpackhi_epi16(even, odd);
    STORE_B(p, _mm512_permutex2var_epi64(low, first, high));
    STORE_B(p + 32, _mm512_permutex2var_epi64(low, second, high));
}

#include "template/planes_x86.h"

/* Unpacking works inside 128-bit lanes: with 8 bytes of each half of the block in every lane, its low results are the
 * 32 columns of the one half in order, and the high ones those of the other. */
#define Z12_PARTS 1
#define Z12_NEIGHBOURS 1
FN static inline void z12_part(W *w, const uint8_t *p, const uint8_t *table, int part) {
    const long long up = 0x0004000400040004; /* words of the second half have their codes in the upper nibbles */
    const __m512i shifts = _mm512_setr_epi64(0, up, 0, up, 0, up, 0, up);
    __m512i low = _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 4, 2, 6, 1, 5, 3, 7), LOAD_512(p));
    __m512i both = _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 0, 2, 2, 1, 1, 3, 3),
                                            _mm512_castsi256_si512(LOAD_256(p + 64)));
    __m512i high = LOOKUP(TABLE_B(table), LOW_NIBBLE(_mm512_srlv_epi16(both, shifts)));
    (void)part;
    w[0] = ZIP_LOW(low, high);
    w[1] = ZIP_HIGH(low, high);
}

#include "template/z12_x86.h"
#define Z12_ENCODE NAME(z12_encode)

#include "template/gemm_x86.h"
#define GEMM_PACK NAME(gemm_pack)

#include "template/all.h"

/* Products of bf16 are an extension: the table with them is a second one. */
#define FN_PAIRS __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c,popcnt")))
#include "template/gemm_pairs.h"
#undef TABLE
#undef GEMM_PAIRS
#define TABLE obm__kernels_avx512_bf16
#define GEMM_PAIRS gemm_pairs
#include "template/table.h"

/* And tiles another: the third table. */
#define FN_TILES __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,popcnt,amx-tile,amx-bf16")))
#include "template/gemm_tiles.h"
#undef TABLE
#undef ISA
#undef GEMM_PAIRS
#define TABLE obm__kernels_amx
#define ISA "amx"
#define GEMM_PAIRS gemm_tiles
#include "template/table.h"
#else
typedef int obm__no_avx512; /* ISO C wants a declaration in every file */
#endif
