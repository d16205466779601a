/*
 * Random masks by counter: every draw is a function of (seed, tensor name, model, element) alone, so masks do not
 * depend on threads, tiles or the order of tensors.
 *
 * All arithmetic is modulo 2^64.  With G = 0x9e3779b97f4a7c15 and the finaliser of SplitMix64 (Steele, Lea, Flood,
 * "Fast splittable pseudorandom number generators", 2014; constants of Stafford's variant 13)
 *
 *     mix(z):  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;  z = (z ^ z >> 27) * 0x94d049bb133111eb;  return z ^ z >> 31
 *     name  =  FNV-1a of the name's bytes: h = 0xcbf29ce484222325; per byte h = (h ^ byte) * 0x100000001b3
 *     key   =  mix(mix(mix(seed + G) ^ name) + (model + 1) * G)         model counts the task vectors from 0
 *     draw  =  mix(key + (element + 1) * G)                              output number `element` of SplitMix64 from
 * state key
 *
 * an element is kept iff (draw >> 11) * 2^-53 < density.
 */
#include "merge.h"

#define GOLDEN 0x9e3779b97f4a7c15u

static inline uint64_t mix(uint64_t z) {
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

uint64_t obm__random_key(uint64_t seed, const char *tensor, size_t model) {
    uint64_t name = 0xcbf29ce484222325u;
    for (const unsigned char *p = (const unsigned char *)tensor; *p; p++) name = (name ^ *p) * 0x100000001b3u;
    return mix(mix(mix(seed + GOLDEN) ^ name) + ((uint64_t)model + 1) * GOLDEN);
}

uint64_t obm__random_draw(uint64_t key, uint64_t element) { return mix(key + (element + 1) * GOLDEN) >> 11; }

/* u * 2^-53 < keep as integers: scaling by a power of two is exact, and u < x iff u < ceil(x). */
uint64_t obm__random_limit(double keep) {
    return keep <= 0 ? 0 : keep >= 1 ? UINT64_MAX : (uint64_t)ceil(keep * 0x1p53);
}

void obm__random_mask(uint64_t key, uint64_t begin, double keep, float *d, size_t n) {
    uint64_t limit = obm__random_limit(keep);
    uint64_t state = key + begin * GOLDEN;
    for (size_t j = 0; j < n; j++) {
        uint64_t draw = mix(state + ((uint64_t)j + 1) * GOLDEN);
        d[j] = obm__keep_if(d[j], draw >> 11 < limit);
    }
}

uint64_t obm__random_state(uint64_t key, uint64_t element) { return key + element * GOLDEN; }

void obm__random_bits(const obm_kernels *k, uint64_t key, uint64_t begin, double keep, uint8_t *bits, size_t n) {
    k->random_bits(bits, obm__random_state(key, begin), obm__random_limit(keep), n);
}
