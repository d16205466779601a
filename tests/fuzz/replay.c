/* Runs a fuzz target over files and folders given as arguments, without libFuzzer: the corpus as an ordinary test.
 * Small inputs are also cut after every byte.  Each run gets a block of exactly its size, so that sanitizers see any
 * read beyond. */
#include <dirent.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#define CUT_BELOW 1024

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void run(const uint8_t *bytes, size_t n) {
    uint8_t *copy = malloc(n ? n : 1);
    if (!copy) exit(2);
    memcpy(copy, bytes, n);
    LLVMFuzzerTestOneInput(copy, n);
    free(copy);
}

static size_t run_file(const char *path) {
    static uint8_t bytes[1 << 20];
    FILE *f = fopen(path, "rb");
    if (!f) {
        perror(path);
        exit(2);
    }
    size_t n = fread(bytes, 1, sizeof bytes, f);
    fclose(f);
    run(bytes, n);
    for (size_t cut = 0; n < CUT_BELOW && cut < n; cut++) run(bytes, cut);
    return 1;
}

static size_t run_path(const char *path) {
    struct stat st;
    if (stat(path, &st) != 0 || !S_ISDIR(st.st_mode)) return run_file(path);
    size_t count = 0;
    DIR *dir = opendir(path);
    for (struct dirent *e; dir && (e = readdir(dir));) {
        char name[4096];
        if (e->d_name[0] == '.') continue;
        snprintf(name, sizeof name, "%s/%s", path, e->d_name);
        count += run_path(name);
    }
    if (dir) closedir(dir);
    return count;
}

int main(int argc, char **argv) {
    size_t count = 0;
    for (int i = 1; i < argc; i++) count += run_path(argv[i]);
    printf("%zu inputs\n", count);
    return count > 0 ? 0 : 1; /* an empty corpus tests nothing */
}
