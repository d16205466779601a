/* Checksums: XXH3-128 for the files this library writes, SHA-256 for people who compare tensors with other tools. */
#include "io.h"

#include <string.h>
#include <xxhash.h>
#ifdef OBM_XXH_DISPATCH
#include <xxh_x86dispatch.h> /* stands in for XXH3_128bits and its update: three times as fast with AVX2 */
#endif

static void to_hex(const uint8_t *bytes, size_t n, char *out) {
    for (size_t i = 0; i < n; i++) {
        out[2 * i] = "0123456789abcdef"[bytes[i] >> 4];
        out[2 * i + 1] = "0123456789abcdef"[bytes[i] & 15];
    }
    out[2 * n] = 0;
}

/* ---- XXH3-128 ---- */

/* The canonical (big-endian) form is what xxh128sum prints. */
static void xxh3_hex(XXH128_hash_t hash, char out[33]) {
    XXH128_canonical_t canonical;
    XXH128_canonicalFromHash(&canonical, hash);
    to_hex(canonical.digest, 16, out);
}

obm__xxh3 *obm__xxh3_new(void) {
    XXH3_state_t *state = XXH3_createState();
    if (state) XXH3_128bits_reset(state);
    return (obm__xxh3 *)state;
}

void obm__xxh3_add(obm__xxh3 *h, const void *bytes, size_t n) {
    if (n) XXH3_128bits_update((XXH3_state_t *)h, bytes, n);
}

void obm__xxh3_end(obm__xxh3 *h, char out[33]) {
    XXH3_state_t *state = (XXH3_state_t *)h;
    if (out) xxh3_hex(XXH3_128bits_digest(state), out);
    XXH3_freeState(state);
}

void obm__xxh3_of(const void *bytes, size_t n, char out[33]) { xxh3_hex(XXH3_128bits(bytes, n), out); }

/* Bytes between two ticks: about a millisecond from memory, some tens from a slow disk. */
#define HASH_PIECE ((size_t)4 << 20)

obm_status obm__map_xxh3(const obm__map *m, obm__tick_fn tick, void *user, char out[33], obm_error *err) {
    obm__xxh3 *h = obm__xxh3_new();
    if (!h) return obm__fail_nomem(err, 0);
    obm_status status = OBM_OK;
    for (size_t at = 0, n; status == OBM_OK && at < m->size; at += n) {
        n = m->size - at < HASH_PIECE ? m->size - at : HASH_PIECE;
        obm__xxh3_add(h, m->data + at, n);
        obm__pages_release(m->data + at, n);
        if (tick) status = tick(user, n, err);
    }
    obm__xxh3_end(h, status == OBM_OK ? out : NULL);
    return status;
}

/* ---- SHA-256 (FIPS 180-4) ---- */

/* Section 4.2.2: the first 32 bits of the fractional parts of the cube roots of the first 64 primes. */
static const uint32_t sha256_k[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

static uint32_t rotr(uint32_t x, int n) { return x >> n | x << (32 - n); }

/* Section 6.2.2, one block; the message schedule is kept as a ring of its last 16 words. */
static void sha256_block(uint32_t state[8], const uint8_t *block) {
    uint32_t w[16], a = state[0], b = state[1], c = state[2], d = state[3], e = state[4], f = state[5], g = state[6],
                    h = state[7];
    for (int t = 0; t < 64; t++) {
        uint32_t *wt = &w[t % 16];
        if (t < 16) {
            *wt = (uint32_t)block[4 * t] << 24 | (uint32_t)block[4 * t + 1] << 16 | (uint32_t)block[4 * t + 2] << 8 |
                  block[4 * t + 3];
        } else {
            uint32_t w2 = w[(t - 2) % 16], w15 = w[(t - 15) % 16];
            *wt +=
                (rotr(w15, 7) ^ rotr(w15, 18) ^ w15 >> 3) + w[(t - 7) % 16] + (rotr(w2, 17) ^ rotr(w2, 19) ^ w2 >> 10);
        }
        uint32_t t1 = h + (rotr(e, 6) ^ rotr(e, 11) ^ rotr(e, 25)) + ((e & f) ^ (~e & g)) + sha256_k[t] + *wt;
        uint32_t t2 = (rotr(a, 2) ^ rotr(a, 13) ^ rotr(a, 22)) + ((a & b) ^ (a & c) ^ (b & c));
        h = g, g = f, f = e, e = d + t1, d = c, c = b, b = a, a = t1 + t2;
    }
    state[0] += a, state[1] += b, state[2] += c, state[3] += d, state[4] += e, state[5] += f, state[6] += g,
        state[7] += h;
}

/* Section 5.1.1: a one bit, zeros, the length in bits; one block more when the length does not fit behind the rest. */
static void sha256_tail(uint32_t state[8], const uint8_t *rest, size_t n_rest, uint64_t total) {
    uint8_t tail[128] = {0};
    if (n_rest) memcpy(tail, rest, n_rest);
    tail[n_rest] = 0x80;
    size_t size = n_rest + 9 <= 64 ? 64 : 128;
    for (int i = 0; i < 8; i++) tail[size - 1 - (size_t)i] = (uint8_t)(total * 8 >> 8 * i);
    for (size_t at = 0; at < size; at += 64) sha256_block(state, tail + at);
}

/* Bytes between two looks at the pulse: some ms. */
#define SHA256_PIECE ((size_t)1 << 20)

obm_status obm__sha256_of(const void *bytes, size_t n, obm__pulse *pulse, char out[65], obm_error *err) {
    /* Section 5.3.3: the first 32 bits of the fractional parts of the square roots of the first eight primes. */
    uint32_t state[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                         0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
    const uint8_t *p = bytes;
    size_t whole = n / 64 * 64;
    for (size_t at = 0; at < whole; at += 64) {
        sha256_block(state, p + at);
        if (at % SHA256_PIECE == 0) OBM_TRY(obm__pulse_check(pulse, err));
    }
    sha256_tail(state, p ? p + whole : NULL, n - whole, n);
    uint8_t digest[32];
    for (int i = 0; i < 32; i++) digest[i] = (uint8_t)(state[i / 4] >> (24 - 8 * (i % 4)));
    to_hex(digest, 32, out);
    return OBM_OK;
}
