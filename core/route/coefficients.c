/*
 * TIES on planes: the merged value as a table over sign patterns, and as a few scalars per matrix.  Knows nothing of
 * packs.
 *
 * Let n planes with scales a_1 .. a_n take part in a matrix (pack order; an expert with two planes brings both), and
 * let s in {-1, +1}^n be their signs at one element.  Every d~_k there is a signed sum of its own a_i, so the merged
 * value is a function v(s) of the pattern alone, with 2^n values: the table that materialising looks up.
 *
 * Any function on {-1, +1}^n is a polynomial in which no sign is squared (the Walsh-Hadamard transform finds it):
 *
 *     v(s) = sum over M of c_M * prod_{i in M} s_i,        c_M = 2^-n * sum over s of v(s) * prod_{i in M} s_i.
 *
 * v is odd: v(-s) = -v(s).  Substituting s -> -s in the second formula gives c_M = (-1)^(|M| + 1) c_M, so c_M = 0
 * whenever |M| is even, and half of the table is the other half negated.  Three properties of the rule are needed for
 * that and for c(w) = sum_k w_k c(k), and they are why the rule is as it is:
 *
 *   - a zero sum elects no sign and yields 0 (electing +1, as mergekit does, or the model's majority is not odd);
 *   - nothing is trimmed (all magnitudes of a plane are equal, so a trim would have to look at the index);
 *   - elections do not see the route's weights (they would stay odd, but v would no longer be linear in w).
 *
 * A product of signs is the parity of sign bits: with b_i = 1 where s_i = +1, prod_{i in M} s_i is -1 to the number of
 * cleared bits of M, and for an odd |M| that is +1 exactly where the XOR of the b_i is 1.  So the mask M is a plane
 * like any other, formed by XOR from |M| planes, and c_M is its scale.
 *
 * n planes have 2^(n-1) masks of odd size: 1 and 2 planes are linear (1 and 2 masks), 3 planes have 4 masks (themselves
 * and the XOR of all), 4 have 8, 5 have 16.  The routed expert is a sum by itself (reading onto_base), so its planes
 * come in no mask with others: hard routes of 3 one-plane experts read three planes and nothing else, of 4 their planes
 * and one XOR of three, of 5 nine masks.  What a route changes are the scalars c_M.  For the disjoint mean of two
 * planes, a > b > 0, the transform gives
 *
 *     TIES(a s1, b s2) = ((3a + b) / 4) s1 - ((a - b) / 4) s2      (agreeing: (a + b) / 2, else the larger one wins)
 *
 * and a = b needs no case of its own: the table holds 0 where the signs disagree, and its transform is a (s1 + s2) / 2.
 * A scale of 0 is an absent plane: +0 and -0 agree with no elected sign, and every c_M with that plane is 0.
 */
#include "coefficients.h"

#include "dynamic.h"

#include <math.h>
#include <string.h>

bool obm__plane_set_add(obm__plane_set *s, size_t task, const obm__planes *planes) {
    if (s->n + planes->n > OBM_PATTERN_PLANES) return false;
    for (int p = 0; p < planes->n; p++, s->n++) {
        s->task[s->n] = task;
        s->from[s->n] = planes;
        s->plane[s->n] = p;
    }
    return true;
}

int64_t obm__plane_set_span(const obm__plane_set *s, int64_t col) {
    int64_t span = obm__planes_span(s->from[0], col);
    for (int i = 1; i < s->n; i++) {
        int64_t own = obm__planes_span(s->from[i], col);
        if (own < span) span = own;
    }
    return span;
}

void obm__plane_set_alphas(const obm__plane_set *s, int64_t row, int64_t col, float *alpha) {
    for (int i = 0; i < s->n; i++) alpha[i] = obm__planes_alpha(s->from[i], s->plane[i], row, col);
}

/* Bit c of a byte becomes 0 or 1 in byte c of a word: copy the byte eight times, keep one bit in each, and carry it
 * into bit 7 (0x7f plus any single bit reaches 0x80 and never the next byte). */
static uint64_t spread(uint8_t byte) {
    uint64_t bits = byte * 0x0101010101010101u & 0x8040201008040201u;
    return (bits + 0x7f7f7f7f7f7f7f7fu) >> 7 & 0x0101010101010101u;
}

/* The patterns of the eight columns of byte `at` of a row, one byte each. */
static uint64_t eight_patterns(const obm__plane_set *s, int64_t row, int64_t at) {
    uint64_t word = 0;
    for (int p = 0; p < s->n; p++) {
        const obm__planes *from = s->from[p];
        word |= spread(from->signs[s->plane[p]][row * from->row_bytes + at]) << p;
    }
    return word;
}

void obm__plane_set_patterns(const obm__plane_set *s, int64_t row, int64_t col, int64_t m, uint8_t *pattern) {
    int64_t whole = m & ~(int64_t)7;
    for (int64_t i = 0; i < whole; i += 8) {
        uint64_t word = eight_patterns(s, row, (col + i) / 8);
        for (int j = 0; j < 8; j++) pattern[i + j] = (uint8_t)(word >> 8 * j);
    }
    uint64_t word = whole < m ? eight_patterns(s, row, (col + whole) / 8) : 0;
    for (int64_t i = whole; i < m; i++, word >>= 8) pattern[i] = (uint8_t)word;
}

/* The K task-vector values of one sign pattern. */
static void values_of(const obm__plane_set *s, const float *alpha, unsigned pattern, size_t n_tasks, double *d) {
    memset(d, 0, n_tasks * sizeof *d);
    for (int i = 0; i < s->n; i++) d[s->task[i]] += pattern >> i & 1 ? (double)alpha[i] : -(double)alpha[i];
}

void obm__pattern_values(const obm__merge_rule *rule, const obm__plane_set *s, const float *alpha, double *value) {
    double d[OBM_ROUTE_TASKS];
    unsigned count = 1u << s->n;
    for (unsigned pattern = count / 2; pattern < count; pattern++) {
        values_of(s, alpha, pattern, rule->n_tasks, d);
        value[pattern] = obm__merged_delta(d, rule->n_tasks, rule->weights, rule->lambda, rule->reading);
        value[count - 1 - pattern] = -value[pattern];
    }
}

void obm__pattern_transform(double *c, int n, size_t lanes) {
    size_t count = (size_t)1 << n;
    for (size_t step = 1; step < count; step *= 2) {
        for (size_t i = 0; i < count; i++) {
            if (i & step) continue;
            double *lower = c + i * lanes, *upper = c + (i | step) * lanes;
            for (size_t j = 0; j < lanes; j++) {
                double clear = lower[j], set = upper[j];
                lower[j] = clear + set;
                upper[j] = set - clear;
            }
        }
    }
    for (size_t mask = 0; mask < count; mask++) {
        double scale = __builtin_parity((unsigned)mask) ? 1.0 / (double)count : 0.0;
        for (size_t j = 0; j < lanes; j++) c[mask * lanes + j] *= scale;
    }
}
