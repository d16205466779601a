/* Packs of many experts, made cheaply: one expert is compressed, the others are copies of its file with random signs
 * and scales of their own, listed in pack.json. */
#ifndef OBM_BENCH_SYNTHETIC_PACK_H
#define OBM_BENCH_SYNTHETIC_PACK_H

#include "synthetic.h"

#include "io/io.h"
#include "io/json.h"

/* A compressed expert as it lies in memory, to be varied. */
typedef struct expert_file {
    char *bytes; /* a whole safetensors file */
    size_t size;
    obm_json *manifest, *header; /* pack.json; of the file */
} expert_file;

static inline void join(char *out, size_t size, const char *dir, const char *name) {
    need((size_t)snprintf(out, size, "%s/%s", dir, name) < size, "a path");
}

static inline void load_expert(const char *dir, expert_file *f) {
    char path[256];
    obm_error err;
    uint64_t header;
    join(path, sizeof path, dir, "pack.json");
    check(obm__json_load(path, &f->manifest, &err), &err);
    const obm_json *record = obm__json_at(obm__json_get(f->manifest, "experts"), 0);
    join(path, sizeof path, dir, obm__json_string(obm__json_get(record, "file")));
    check(obm__file_read(path, &f->bytes, &f->size, &err), &err);
    memcpy(&header, f->bytes, sizeof header);
    check(obm__json_parse(f->bytes + 8, header, path, &f->header, &err), &err);
}

static inline void free_expert(expert_file *f) {
    obm_free(f->bytes);
    obm__json_free(f->manifest);
    obm__json_free(f->header);
}

/* Other signs, and scales between 1/2 and 3/2 of what they were. */
static inline void vary_expert(expert_file *f, uint64_t *state) {
    uint64_t header;
    memcpy(&header, f->bytes, sizeof header);
    for (void *it = obm__json_first(f->header); it; it = obm__json_next(f->header, it)) {
        const obm_json *range = obm__json_get(obm__json_value(it), "data_offsets");
        int64_t begin, end;
        if (!obm__json_int(obm__json_at(range, 0), &begin) || !obm__json_int(obm__json_at(range, 1), &end)) continue;
        char *at = f->bytes + 8 + header + begin, *stop = f->bytes + 8 + header + end;
        bool signs = strstr(obm__json_key(it), ".sign.") != NULL;
        for (; at < stop; at += signs ? 8 : 4) {
            *state ^= *state << 13, *state ^= *state >> 7, *state ^= *state << 17; /* Marsaglia 2003, xorshift */
            float scale;
            memcpy(&scale, at, sizeof scale);
            scale *= 0.5f + (float)(*state >> 40) * 0x1p-24f;
            memcpy(at, signs ? (void *)state : (void *)&scale, signs ? 8 : 4); /* signs come in groups of 8 bytes */
        }
    }
}

/* Task `index` as a file of the pack and its record. */
static inline obm_json *add_expert(const char *dir, expert_file *f, int index) {
    obm_json *record = obm__json_copy(obm__json_at(obm__json_get(f->manifest, "experts"), 0));
    char name[16], file[64], hash[33];
    obm__xxh3_of(f->bytes, f->size, hash);
    snprintf(name, sizeof name, "task%d", index);
    snprintf(file, sizeof file, "%s-%.16s.safetensors", name, hash);
    FILE *out = create(dir, file);
    need(fwrite(f->bytes, 1, f->size, out) == f->size && !fclose(out), file);
    need(obm__json_set(record, "name", obm__json_new_string(name)) &&
             obm__json_set(record, "file", obm__json_new_string(file)) &&
             obm__json_set(record, "xxh3", obm__json_new_string(hash)),
         "memory");
    return record;
}

/* From `seed`, a pack of one expert, to a pack of n in the folder `dir`. */
static inline void write_pack(const char *seed, const char *dir, int n) {
    expert_file f;
    uint64_t state = 88172645463325252u;
    obm_json *experts = obm__json_new_array();
    load_expert(seed, &f);
    need(!mkdir(dir, 0755), dir);
    for (int i = 0; i < n; i++) {
        vary_expert(&f, &state);
        need(obm__json_append(experts, add_expert(dir, &f, i)), "memory");
    }
    need(obm__json_set(f.manifest, "experts", experts), "memory");
    char *text = obm__json_text(f.manifest, 2);
    FILE *out = create(dir, "pack.json");
    need(text && fputs(text, out) >= 0 && !fclose(out), "pack.json");
    obm_free(text);
    free_expert(&f);
}

#endif
