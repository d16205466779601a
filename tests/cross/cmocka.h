/* What the kernel tests use of cmocka, on libc alone, so that they run under an emulator of another machine without its
 * libraries.  The first failure ends the program. */
#ifndef OBM_CROSS_CMOCKA_H
#define OBM_CROSS_CMOCKA_H

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

__attribute__((noreturn, format(printf, 3, 4))) static inline void cross_fail(const char *file, int line,
                                                                              const char *format, ...) {
    va_list args;
    va_start(args, format);
    fprintf(stderr, "%s:%d: ", file, line);
    vfprintf(stderr, format, args);
    fputc('\n', stderr);
    va_end(args);
    exit(1);
}

#define fail_msg(...) cross_fail(__FILE__, __LINE__, __VA_ARGS__)
#define print_message printf
#define assert_true(x) ((x) ? (void)0 : fail_msg("%s", #x))
#define assert_null(p) assert_true((p) == NULL)
#define assert_non_null(p) assert_true((p) != NULL)
#define assert_ptr_equal(a, b) assert_true((const void *)(a) == (const void *)(b))
#define assert_string_equal(a, b) assert_true(!strcmp((a), (b)))
#define assert_memory_equal(a, b, n) assert_true(!memcmp((a), (b), (n)))
#define assert_int_equal(a, b)                                                                                         \
    ((long long)(a) == (long long)(b) ? (void)0                                                                        \
                                      : fail_msg("%s is %lld, expected %lld", #a, (long long)(a), (long long)(b)))
#define assert_in_range(x, low, high)                                                                                  \
    ((long long)(x) >= (long long)(low) && (long long)(x) <= (long long)(high)                                         \
         ? (void)0                                                                                                     \
         : fail_msg("%s is %lld, expected %lld to %lld", #x, (long long)(x), (long long)(low), (long long)(high)))

struct CMUnitTest {
    const char *name;
    void (*run)(void **state);
};
#define cmocka_unit_test(f) {#f, f}
#define cmocka_run_group_tests(tests, set_up, tear_down) cross_run(tests, sizeof(tests) / sizeof *(tests))

static inline int cross_run(const struct CMUnitTest *tests, size_t n) {
    for (size_t i = 0; i < n; i++) {
        tests[i].run(NULL);
        printf("%s passed\n", tests[i].name);
    }
    return 0;
}

#endif
