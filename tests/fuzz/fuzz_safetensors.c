/* Bytes as a safetensors file: refused with a message, or every tensor lies inside, is found by name and can be read.
 */
#include "fuzz_fixture.h"

static void check_entry(const obm__safetensors *s, size_t i, const uint8_t *data, size_t size) {
    const obm__st_entry *e = &s->entries[i];
    const uint8_t *begin = e->t.data;
    int64_t count = obm_tensor_count(&e->t);
    size_t bytes = (size_t)count * obm_dtype_size(e->t.dtype);
    if (count < 0 || begin < data || begin > data + size || bytes > (size_t)(data + size - begin)) abort();
    if (i > 0 && strcmp(s->entries[i - 1].name, e->name) >= 0) abort();
    if (obm__safetensors_find(s, e->name) != e) abort();
    float value;
    if (count > 0 && e->t.dtype <= OBM_F64 && obm_tensor_read_f32(&e->t, count - 1, 1, &value, NULL) != OBM_OK) abort();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    obm__safetensors s = {0};
    obm_error err;
    if (obm__safetensors_parse(data, size, "fuzz", &s, &err) != OBM_OK) {
        check_error(&err);
        if (s.entries || s.metadata) abort();
        return 0;
    }
    for (size_t i = 0; i < s.count; i++) {
        check_entry(&s, i, data, size);
    }
    for (size_t i = 0; i < s.count; i++) obm_free(s.entries[i].name);
    obm_free(s.entries);
    obm__json_free(s.metadata);
    return 0;
}
