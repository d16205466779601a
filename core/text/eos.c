/* Which ids end a text, from the files that say so.  Nothing else of these files is looked at. */
#include "text.h"

static obm_status read_list(const obm_json *v, const char *where, int32_t *ids, size_t n, obm_error *err) {
    bool list = obm__json_kind(v) == OBM_JSON_ARRAY;
    for (size_t i = 0; i < n; i++) {
        int64_t id;
        const obm_json *item = list ? obm__json_at(v, i) : v;
        if (!obm__json_int(item, &id) || id < -1 || id > INT32_MAX)
            return obm__fail(err, OBM_E_FORMAT, "%s: \"eos_token_id\": expected a token id or a list of them, found %s",
                             where, obm__json_kind_name(v));
        ids[i] = (int32_t)id;
    }
    return OBM_OK;
}

obm_status obm__eos_read(const obm_json *config, const char *where, int32_t **ids, size_t *n, obm_error *err) {
    const obm_json *v = obm__json_get(config, "eos_token_id");
    if (!v || obm__json_kind(v) == OBM_JSON_NULL) return OBM_OK;
    size_t count = obm__json_kind(v) == OBM_JSON_ARRAY ? obm__json_size(v) : 1;
    int32_t *read = obm__calloc(count ? count : 1, sizeof *read);
    if (!read) return obm__fail_nomem(err, count * sizeof *read);
    obm_status status = read_list(v, where, read, count, err);
    if (status != OBM_OK) {
        obm_free(read);
        return status;
    }
    *ids = read;
    *n = count;
    return OBM_OK;
}
