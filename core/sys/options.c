/* Public structs that begin with struct_size: what callers built against another version of the header may pass.
 * Shorter is fine (the missing fields have their defaults), longer is fine as long as what this version does not know
 * is zero. */
#include "sys.h"

#include <string.h>

/* No struct is near it: what is larger was never initialised. */
#define MAX_STRUCT 4096

obm_status obm__options_check(const void *given, size_t known, const char *type, obm_error *err) {
    size_t size;
    if (!given) return OBM_OK;
    memcpy(&size, given, sizeof size);
    if (size < sizeof size || size > MAX_STRUCT) {
        return obm__fail(err, OBM_E_ARG, "%s: struct_size: expected the size of the struct (use OBM_INIT), found %zu",
                         type, size);
    }
    for (size_t i = known; i < size; i++) {
        if (((const unsigned char *)given)[i]) {
            return obm__fail(err, OBM_E_UNSUPPORTED,
                             "%s: struct_size %zu, and a field after byte %zu is set that this version does not know",
                             type, size, known);
        }
    }
    return OBM_OK;
}

void obm__options_read(const void *given, void *own, size_t known) {
    size_t size;
    memcpy(&size, given, sizeof size);
    memset(own, 0, known);
    memcpy(own, given, size < known ? size : known);
    memcpy(own, &known, sizeof known);
}

void obm__options_write(const void *own, size_t known, void *given) {
    size_t size;
    memcpy(&size, given, sizeof size);
    if (size <= sizeof size || size > MAX_STRUCT) return;
    char *to = given;
    size_t n = size < known ? size : known;
    memcpy(to + sizeof size, (const char *)own + sizeof size, n - sizeof size);
    memset(to + n, 0, size - n);
}
