/* Bytes as a config.json and, behind a NUL, a generation_config.json: refused with a message of one line, or read, and
 * then every size is in its range and no product of a tensor's shape overflows. */
#include "fuzz_fixture.h"

#include "model/model.h"

#define MAX_INPUT 16384

static void check_config(const obm__config *c) {
    if (!c->arch || c->layers < 1 || c->heads < 1 || c->kv_heads < 1 || c->head_dim < 2 || c->vocab < 1) abort();
    if (c->heads % c->kv_heads || c->max_positions < 1 || !(c->norm_eps >= 0)) abort();
    for (size_t i = 0; i < c->n_eos; i++)
        if (c->eos[i] < -1) abort();
    for (int role = 0; role < OBM_ROLES; role++) {
        int64_t rows = 0, cols = 0;
        if (!obm__config_has(c, (obm__role)role)) continue;
        obm__config_shape(c, (obm__role)role, &rows, &cols);
        if (rows < 1 || cols < 1) abort();
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    obm_json *config = NULL, *generation = NULL;
    obm__config c = {0};
    obm_error err = {0};
    if (size > MAX_INPUT) return 0;
    const uint8_t *nul = size ? memchr(data, 0, size) : NULL;
    size_t first = nul ? (size_t)(nul - data) : size;
    if (obm__json_parse((const char *)data, first, "fuzz", &config, NULL) != OBM_OK) return 0;
    if (nul && obm__json_parse((const char *)nul + 1, size - first - 1, "fuzz", &generation, NULL) != OBM_OK) {
        obm__json_free(config);
        return 0;
    }
    if (obm__config_parse(config, generation, "fuzz", &c, &err) == OBM_OK) {
        check_config(&c);
        obm__config_clear(&c);
    } else {
        check_error(&err);
        if (c.arch || c.eos) abort();
    }
    obm__json_free(config);
    obm__json_free(generation);
    return 0;
}
