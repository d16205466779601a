/* Errors: one code, one message that says what was expected and what came. */
#include "sys.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>

const char *obm_version(void) {
#define STRING_(x) #x
#define STRING(x) STRING_(x)
    return STRING(OBM_VERSION_MAJOR) "." STRING(OBM_VERSION_MINOR) "." STRING(OBM_VERSION_PATCH);
}

int obm_abi_version(void) { return OBM_ABI_VERSION; }

const char *obm_status_name(obm_status status) {
    static const char *const names[] = {"OK",   "NOMEM",  "ARG",      "SHAPE",       "DTYPE",
                                        "IO",   "FORMAT", "NOTFOUND", "UNSUPPORTED", "BUSY",
                                        "USER", "EXISTS", "MISMATCH", "VALUE",       "OCCUPIED"};
    int i = -(int)status;
    return i >= 0 && i < (int)(sizeof names / sizeof *names) ? names[i] : "UNKNOWN";
}

/* Cuts at a character boundary: a path may hold any UTF-8, and bindings decode the message. */
static void trim_partial_character(char *s, size_t size) {
    size_t n = strlen(s);
    if (n + 1 < size) return;
    while (n > 0 && ((unsigned char)s[n - 1] & 0xc0) == 0x80) n--;
    if (n > 0 && (unsigned char)s[n - 1] >= 0x80) s[n - 1] = 0;
}

/* Names come from files, and a message is one line. */
static void replace_controls(char *s) {
    for (; *s; s++) {
        if ((unsigned char)*s < 0x20 || *s == 0x7f) *s = '?';
    }
}

static void set_message(obm_error *err, obm_status status, const char *format, va_list args) {
    err->code = status;
    err->os_errno = 0;
    vsnprintf(err->message, sizeof err->message, format, args);
    trim_partial_character(err->message, sizeof err->message);
    replace_controls(err->message);
}

obm_status obm__fail(obm_error *err, obm_status status, const char *format, ...) {
    if (err) {
        va_list args;
        va_start(args, format);
        set_message(err, status, format, args);
        va_end(args);
    }
    return status;
}

obm_status obm__fail_errno(obm_error *err, const char *format, ...) {
    int code = errno;
    obm_status status = code == ENOMEM ? OBM_E_NOMEM : OBM_E_IO;
    if (err) {
        va_list args;
        va_start(args, format);
        set_message(err, status, format, args);
        va_end(args);
        err->os_errno = status == OBM_E_IO ? code : 0;
        size_t n = strlen(err->message);
        char reason[128];
        /* GNU strerror_r returns the text, which need not be in the buffer. */
        snprintf(err->message + n, sizeof err->message - n, ": %s", strerror_r(code, reason, sizeof reason));
    }
    return status;
}

obm_status obm__fail_nomem(obm_error *err, uint64_t bytes) {
    return obm__fail(err, OBM_E_NOMEM, "out of memory (%llu bytes asked for)", (unsigned long long)bytes);
}

obm_status obm__fail_at(const char *what, size_t index, obm_status status, obm_error *err) {
    if (status != OBM_E_ARG || !err) return status;
    char message[OBM_ERROR_MESSAGE];
    memcpy(message, err->message, sizeof message);
    return obm__fail(err, status, "%s %zu: %s", what, index, message);
}
