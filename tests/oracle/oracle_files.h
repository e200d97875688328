/* oracle_files.h - the files of golden cases: DIR/KIND/NAME.json with the flags and
 * NAME.safetensors with the tensors. Keys and tensors that nobody knows are errors: a case that
 * says more than the oracle checks must not pass. */
#ifndef CADRE_TESTS_ORACLE_ORACLE_FILES_H
#define CADRE_TESTS_ORACLE_ORACLE_FILES_H

#include <dirent.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <jansson.h>

#include "base/check.h"
#include "base/path.h"
#include "ckpt/safetensors.h"
#include "tensor/tensor.h"

/* ---- directories ---- */

static inline int oracle_is_json(const struct dirent *entry)
{
    const size_t length = strlen(entry->d_name);

    return length > 5 && strcmp(entry->d_name + length - 5, ".json") == 0;
}

/* Runs one(path without ".json", name) for every .json of directory, by name. Returns their number,
 * or -1. */
static inline int oracle_for_each(const char *directory,
                                  void (*one)(const char *stem_path, const char *name))
{
    struct dirent **entries;
    const int count = scandir(directory, &entries, oracle_is_json, alphasort);

    if (count < 0) {
        return error_set("%s: cannot be listed", directory);
    }
    for (int i = 0; i < count; i++) {
        char path[PATH_LENGTH_MAX], *name = entries[i]->d_name;

        name[strlen(name) - 5] = '\0';
        if (path_format(path, "%s/%s", directory, name) == 0) {
            one(path, name);
        }
        free(entries[i]);
    }
    free(entries);
    return count;
}

/* ---- JSON objects with known keys ---- */

enum oracle_field_kind {
    ORACLE_INTEGER, /* int64_t */
    ORACLE_NUMBER,  /* double */
    ORACLE_FLAG,    /* bool */
    ORACLE_TEXT,    /* const char *, of the JSON value */
};

struct oracle_field {
    const char *key;
    enum oracle_field_kind kind;
    size_t offset; /* in the struct to fill; a key that is absent or null leaves its default */
};

static inline json_t *oracle_json(const char *path)
{
    json_error_t error;
    json_t *json = json_load_file(path, JSON_REJECT_DUPLICATES, &error);

    if (json == NULL) {
        return FAIL_NULL("%s: line %d: %s", path, error.line, error.text);
    }
    if (!json_is_object(json)) {
        json_decref(json);
        return FAIL_NULL("%s: not a JSON object", path);
    }
    return json;
}

static inline int oracle_field_set(const struct oracle_field *field, const json_t *value, void *to)
{
    char *at = (char *)to + field->offset;

    if (field->kind == ORACLE_INTEGER && json_is_integer(value)) {
        *(int64_t *)at = json_integer_value(value);
    } else if (field->kind == ORACLE_NUMBER && json_is_number(value)) {
        *(double *)at = json_number_value(value);
    } else if (field->kind == ORACLE_FLAG && json_is_boolean(value)) {
        *(bool *)at = json_is_true(value);
    } else if (field->kind == ORACLE_TEXT && json_is_string(value)) {
        *(const char **)at = json_string_value(value);
    } else {
        return error_set("key %s has a value of another type", field->key);
    }
    return 0;
}

static inline int oracle_fields_read(json_t *json, const struct oracle_field *fields,
                                     int num_fields, void *to)
{
    const char *key;
    json_t *value;

    json_object_foreach(json, key, value)
    {
        int i = 0;

        while (i < num_fields && strcmp(fields[i].key, key) != 0) {
            i++;
        }
        if (i == num_fields) {
            return error_set("key %s is not known", key);
        }
        if (!json_is_null(value)) {
            TRY(oracle_field_set(&fields[i], value, to));
        }
    }
    return 0;
}

/* A size that the case must give: 1 .. 2^20. */
static inline int oracle_check_size(const char *key, int64_t value)
{
    if (value < 1 || value > 1 << 20) {
        return error_set("%s is %lld, expected 1 .. 1048576", key, (long long)value);
    }
    return 0;
}

/* Sizes that the router's ops take for granted. */
static inline int oracle_check_routing(int64_t num_experts, int64_t topk, int64_t num_groups,
                                       int64_t group_topk)
{
    TRY(oracle_check_size("E", num_experts));
    TRY(oracle_check_size("topk", topk));
    if (topk > num_experts) {
        return error_set("topk is %lld of %lld experts", (long long)topk, (long long)num_experts);
    }
    if (num_groups != 0 &&
        (num_groups < 0 || num_experts % num_groups != 0 || group_topk < 1 ||
         group_topk > num_groups || topk > num_experts / num_groups * group_topk)) {
        return error_set("top-%lld of %lld experts in %lld of %lld groups", (long long)topk,
                         (long long)num_experts, (long long)group_topk, (long long)num_groups);
    }
    return 0;
}

/* ---- tensors ---- */

struct oracle_tensors {
    struct safetensors *file;
    bool *is_read; /* [number of tensors] */
};

static inline int oracle_tensors_open(struct oracle_tensors *tensors, const char *path)
{
    tensors->file = safetensors_open(path);
    tensors->is_read = NULL;
    if (tensors->file == NULL) {
        return -1;
    }
    tensors->is_read = calloc((size_t)safetensors_num_tensors(tensors->file) + 1, sizeof(bool));
    CHECK(tensors->is_read != NULL, "out of memory");
    return 0;
}

static inline void oracle_tensors_close(struct oracle_tensors *tensors)
{
    safetensors_close(tensors->file);
    free(tensors->is_read);
}

static inline const struct safetensors_tensor *oracle_find(struct oracle_tensors *tensors,
                                                           const char *name)
{
    for (int i = 0; i < safetensors_num_tensors(tensors->file); i++) {
        if (strcmp(safetensors_at(tensors->file, i)->name, name) == 0) {
            tensors->is_read[i] = true;
            return safetensors_at(tensors->file, i);
        }
    }
    return NULL;
}

/* The tensor with this dtype and shape, in the arena (of the CPU). */
static inline int oracle_read(struct oracle_tensors *tensors, const char *name, struct arena *arena,
                              enum dtype dtype, const int64_t *shape, int num_dims,
                              struct tensor *out)
{
    const struct safetensors_tensor *found = oracle_find(tensors, name);
    const struct tensor expected = tensor_wrap(NULL, dtype, shape, num_dims);

    *out = expected;
    if (found == NULL) {
        return error_set("tensor %s is missing", name);
    }
    if (found->dtype != dtype || found->num_dims != num_dims ||
        (num_dims > 0 && memcmp(found->shape, shape, (size_t)num_dims * sizeof *shape) != 0)) {
        return error_set("tensor %s is not %s", name, tensor_describe(&expected));
    }
    *out = tensor_allocate(arena, dtype, shape, num_dims);
    return safetensors_read(tensors->file, found, out->data);
}

/* oracle_get(&tensors, "x", arena, &x, DTYPE_F32, S, B, H) */
#define oracle_get(tensors, name, arena, out, dtype, ...)                                          \
    oracle_read((tensors), (name), (arena), (dtype), (const int64_t[]){__VA_ARGS__},               \
                (int)(sizeof((const int64_t[]){__VA_ARGS__}) / sizeof(int64_t)), (out))

/* Every tensor of the file has been looked at. */
static inline int oracle_all_read(const struct oracle_tensors *tensors)
{
    for (int i = 0; i < safetensors_num_tensors(tensors->file); i++) {
        if (!tensors->is_read[i]) {
            return error_set("tensor %s is not known", safetensors_at(tensors->file, i)->name);
        }
    }
    return 0;
}

#endif
