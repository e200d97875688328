#include "ckpt/hf_weights.h"

#include <stdlib.h>
#include <string.h>

#include "base/check.h"
#include "base/path.h"
#include "ckpt/hf_index.h"

static const int64_t index_max_bytes = 256 << 20;

struct hf_weights {
    struct safetensors **files;
    int num_files;
    struct hf_tensor *tensors; /* sorted by name */
    int num_tensors;
};

static int compare_tensors(const void *left, const void *right)
{
    return strcmp(((const struct hf_tensor *)left)->tensor->name,
                  ((const struct hf_tensor *)right)->tensor->name);
}

/* Opens directory/name unless it is open already. */
static struct safetensors *open_file(struct hf_weights *weights, const char *directory,
                                     const char *name)
{
    char path[PATH_LENGTH_MAX];
    struct safetensors *file;

    if (path_format(path, "%s/%s", directory, name) != 0) {
        return NULL;
    }
    for (int i = weights->num_files - 1; i >= 0; i--) {
        if (strcmp(safetensors_path(weights->files[i]), path) == 0) {
            return weights->files[i];
        }
    }
    file = safetensors_open(path);
    if (file != NULL) {
        weights->files = realloc(weights->files,
                                 (size_t)(weights->num_files + 1) * sizeof(struct safetensors *));
        CHECK(weights->files != NULL, "out of memory");
        weights->files[weights->num_files++] = file;
    }
    return file;
}

static void allocate_tensors(struct hf_weights *weights, int num_tensors)
{
    weights->tensors = calloc((size_t)num_tensors + 1, sizeof *weights->tensors);
    CHECK(weights->tensors != NULL, "out of memory");
}

static int open_single(struct hf_weights *weights, const char *directory)
{
    const struct safetensors *file = open_file(weights, directory, HF_SINGLE_FILE);

    if (file == NULL) {
        return -1;
    }
    allocate_tensors(weights, safetensors_num_tensors(file));
    for (int i = 0; i < safetensors_num_tensors(file); i++) {
        weights->tensors[weights->num_tensors++] =
            (struct hf_tensor){.file = file, .tensor = safetensors_at(file, i)};
    }
    return 0;
}

static int open_indexed_tensors(struct hf_weights *weights, const char *directory,
                                const struct hf_index *index)
{
    int num_in_files = 0;

    allocate_tensors(weights, index->num_tensors);
    for (int i = 0; i < index->num_tensors; i++) {
        const struct safetensors *file = open_file(weights, directory, index->file_names[i]);
        struct hf_tensor *entry = &weights->tensors[weights->num_tensors];

        if (file == NULL) {
            return -1;
        }
        *entry = (struct hf_tensor){.file = file,
                                    .tensor = safetensors_find(file, index->tensor_names[i])};
        if (entry->tensor == NULL) {
            return error_set("%s has no tensor %.200s, which the index promises",
                             safetensors_path(file), index->tensor_names[i]);
        }
        weights->num_tensors++;
    }
    for (int i = 0; i < weights->num_files; i++) {
        num_in_files += safetensors_num_tensors(weights->files[i]);
    }
    if (num_in_files != index->num_tensors) {
        return error_set("the files hold %d tensors, the index lists %d", num_in_files,
                         index->num_tensors);
    }
    return 0;
}

static int open_indexed(struct hf_weights *weights, const char *directory, const char *index_path)
{
    size_t length;
    char *text = path_read_file(index_path, index_max_bytes, &length);
    struct hf_index index;
    int result;

    if (text == NULL) {
        return -1;
    }
    result = hf_index_parse(&index, text, length);
    free(text);
    TRY(result);
    result = open_indexed_tensors(weights, directory, &index);
    hf_index_free(&index);
    return result;
}

static bool has_file(const char *directory, const char *name, char path[PATH_LENGTH_MAX])
{
    return path_format(path, "%s/%s", directory, name) == 0 && path_exists(path);
}

bool hf_weights_are_at(const char *directory)
{
    char path[PATH_LENGTH_MAX];

    return has_file(directory, HF_INDEX_FILE, path) || has_file(directory, HF_SINGLE_FILE, path);
}

struct hf_weights *hf_weights_open(const char *directory)
{
    struct hf_weights *weights = calloc(1, sizeof *weights);
    char path[PATH_LENGTH_MAX];
    int result;

    CHECK(weights != NULL, "out of memory");
    if (has_file(directory, HF_INDEX_FILE, path)) {
        result = open_indexed(weights, directory, path);
        result = result == 0 ? 0 : error_prepend("%s", path);
    } else {
        result = open_single(weights, directory);
    }
    if (result != 0) {
        hf_weights_close(weights);
        return NULL;
    }
    qsort(weights->tensors, (size_t)weights->num_tensors, sizeof *weights->tensors,
          compare_tensors);
    return weights;
}

void hf_weights_close(struct hf_weights *weights)
{
    if (weights == NULL) {
        return;
    }
    for (int i = 0; i < weights->num_files; i++) {
        safetensors_close(weights->files[i]);
    }
    free(weights->files);
    free(weights->tensors);
    free(weights);
}

int hf_weights_num_tensors(const struct hf_weights *weights)
{
    return weights->num_tensors;
}

struct hf_tensor *hf_weights_at(struct hf_weights *weights, int index)
{
    CHECK(index >= 0 && index < weights->num_tensors, "tensor %d of %d", index,
          weights->num_tensors);
    return &weights->tensors[index];
}

const struct safetensors *const *hf_weights_files(const struct hf_weights *weights, int *num_files)
{
    *num_files = weights->num_files;
    return (const struct safetensors *const *)weights->files;
}

struct hf_tensor *hf_weights_find(struct hf_weights *weights, const char *name)
{
    const struct safetensors_tensor wanted = {.name = name};
    const struct hf_tensor key = {.tensor = &wanted};

    return bsearch(&key, weights->tensors, (size_t)weights->num_tensors, sizeof key,
                   compare_tensors);
}
