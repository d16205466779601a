/* The least that a program outside the tree does: header and library agree, and a context opens. */
#include <onebitmerge.h>
#include <stdio.h>

int main(void) {
    obm_context *ctx;
    obm_context_info info;
    obm_error err;
    if (obm_abi_version() != OBM_ABI_VERSION) return 2;
    if (obm_context_new(NULL, &ctx, &err) != OBM_OK) {
        fprintf(stderr, "%s\n", err.message);
        return 1;
    }
    obm_context_describe(ctx, &info);
    printf("onebitmerge %s, %s, %s, %d threads\n", obm_version(), info.isa, info.blas, info.threads);
    obm_context_free(ctx);
    return 0;
}
