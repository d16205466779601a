/* Suggestions for mistyped names: the nearest known one by edit distance. */
#include "merge.h"

#include <ctype.h>
#include <stdio.h>
#include <string.h>
#include <strings.h>

#define LONGEST 48

static bool differ(char a, char b) { return tolower((unsigned char)a) != tolower((unsigned char)b); }

/* Levenshtein distance by rows, whatever the case; longer names are compared by their first LONGEST bytes. */
static size_t edit_distance(const char *a, const char *b) {
    size_t n = strnlen(a, LONGEST), m = strnlen(b, LONGEST), row[LONGEST + 1];
    for (size_t j = 0; j <= m; j++) row[j] = j;
    for (size_t i = 1; i <= n; i++) {
        size_t diagonal = row[0];
        row[0] = i;
        for (size_t j = 1; j <= m; j++) {
            size_t best = diagonal + differ(a[i - 1], b[j - 1]);
            if (row[j] + 1 < best) best = row[j] + 1;
            if (row[j - 1] + 1 < best) best = row[j - 1] + 1;
            diagonal = row[j];
            row[j] = best;
        }
    }
    return row[m];
}

/* At least three letters, or any name would be short for some other. */
static bool is_short_for(const char *name, const char *known) {
    size_t n = strlen(name);
    return n >= 3 && !strncasecmp(name, known, n);
}

size_t obm_suggest(const char *name, const char *const *known, size_t n) {
    size_t best = SIZE_MAX, at = n;
    for (size_t i = 0; i < n; i++) {
        size_t d = edit_distance(name, known[i]);
        if (d < best) best = d, at = i;
    }
    for (size_t i = 0; best > 1 && i < n; i++) {
        if (is_short_for(name, known[i])) return i;
    }
    /* Farther than a third of the name is another word, not a slip; two letters are always forgiven. */
    size_t limit = strlen(name) / 3 > 2 ? strlen(name) / 3 : 2;
    return best > limit || best >= strlen(name) ? n : at;
}

const char *obm__suggest(const char *name, const char *const *names, size_t n, char *buf, size_t size) {
    size_t at = obm_suggest(name, names, n);
    if (at == n) return "";
    snprintf(buf, size, ", did you mean \"%s\"?", names[at]);
    return buf;
}
