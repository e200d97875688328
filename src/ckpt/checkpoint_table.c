/* A sorted table of the boxes in all files. */
#include "ckpt/checkpoint_table.h"

#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>

#include "base/check.h"
#include "base/checked.h"
#include "ckpt/box_tiling.h"
#include "ckpt/checkpoint_layout.h"

enum { OTHER_OPEN_FILES = 256 };

static int read_dims(const json_t *array, int num_dims, int64_t *dims, const char *what,
                     const char *name)
{
    if (!json_is_array(array) || json_array_size(array) != (size_t)num_dims) {
        return error_set("%s of %.200s is missing or not %d integers", what, name, num_dims);
    }
    for (int i = 0; i < num_dims; i++) {
        const json_t *value = json_array_get(array, (size_t)i);

        if (!json_is_integer(value) || json_integer_value(value) < 0) {
            return error_set("%s of %.200s holds something other than a non-negative integer", what,
                             name);
        }
        dims[i] = json_integer_value(value);
    }
    return 0;
}

static int make_chunk(struct checkpoint_chunk *chunk, const struct safetensors *file,
                      const struct safetensors_tensor *tensor, const json_t *offsets,
                      const json_t *shapes)
{
    const char *name = tensor->name;
    int64_t count;

    *chunk = (struct checkpoint_chunk){.file = file, .tensor = tensor};
    if (tensor->num_dims < 1 || tensor->num_dims > TENSOR_DIMS_MAX || tensor->dtype == NUM_DTYPES) {
        return error_set("tensor %.200s (%s, %d dims) is none of a checkpoint", name,
                         tensor->dtype_name, tensor->num_dims);
    }
    chunk->box.num_dims = tensor->num_dims;
    memcpy(chunk->box.size, tensor->shape, (size_t)tensor->num_dims * sizeof(int64_t));
    TRY(read_dims(json_object_get(json_object_get(offsets, name), "saved_offsets"),
                  tensor->num_dims, chunk->box.offset, "saved_offsets", name));
    TRY(read_dims(json_object_get(shapes, name), tensor->num_dims, chunk->global_shape,
                  CHECKPOINT_SHAPE_KEY, name));
    if (!box_inside(&chunk->box, chunk->global_shape) ||
        !checked_product(chunk->global_shape, tensor->num_dims, &count)) {
        return error_set("the box of %.200s lies outside its global shape", name);
    }
    chunk->name = strndup(name, strcspn(name, CHECKPOINT_BOX_MARK));
    CHECK(chunk->name != NULL, "out of memory");
    return 0;
}

static json_t *load_metadata(const struct safetensors *file, const char *key)
{
    const char *text = safetensors_metadata(file, key);
    json_error_t error;
    json_t *value;

    if (text == NULL) {
        return FAIL_NULL("%s has no %s in its metadata", safetensors_path(file), key);
    }
    value = json_loads(text, JSON_REJECT_DUPLICATES, &error);
    return value != NULL ? value : FAIL_NULL("%s: %s: %s", safetensors_path(file), key, error.text);
}

static int add_chunks(struct checkpoint_table *table, const struct safetensors *file,
                      const json_t *offsets, const json_t *shapes, bool is_optimizer)
{
    for (int i = 0; i < safetensors_num_tensors(file); i++) {
        struct checkpoint_chunk *chunk = &table->chunks[table->num_chunks];

        if (make_chunk(chunk, file, safetensors_at(file, i), offsets, shapes) != 0) {
            return error_prepend("%s", safetensors_path(file));
        }
        chunk->is_optimizer = is_optimizer;
        table->num_chunks++;
    }
    return 0;
}

/* Reads where the boxes of an open file lie. */
static int add_boxes(struct checkpoint_table *table, const struct safetensors *file,
                     bool is_optimizer)
{
    const size_t capacity = (size_t)(table->num_chunks + safetensors_num_tensors(file)) + 1;
    json_t *offsets = load_metadata(file, CHECKPOINT_SHARDING_KEY);
    json_t *shapes = offsets != NULL ? load_metadata(file, CHECKPOINT_SHAPE_KEY) : NULL;
    int result = -1;

    table->chunks = realloc(table->chunks, capacity * sizeof *table->chunks);
    CHECK(table->chunks != NULL, "out of memory");
    if (shapes != NULL) {
        result = add_chunks(table, file, offsets, shapes, is_optimizer);
    }
    json_decref(offsets);
    json_decref(shapes);
    return result;
}

static int add_file(struct checkpoint_table *table, const char *directory, const char *name)
{
    static const char folder[] = CHECKPOINT_OPTIMIZER_FOLDER "/";
    char path[PATH_LENGTH_MAX];
    struct safetensors *file;

    TRY(path_format(path, "%s/%s", directory, name));
    file = safetensors_open(path);
    if (file == NULL) {
        return -1;
    }
    table->files[table->num_files++] = file;
    return add_boxes(table, file, strncmp(name, folder, strlen(folder)) == 0);
}

static int compare_chunks(const void *left, const void *right)
{
    const struct checkpoint_chunk *a = left, *b = right;
    const int order = strcmp(a->name, b->name);

    if (order != 0) {
        return order;
    }
    for (int i = 0; i < a->box.num_dims && i < b->box.num_dims; i++) {
        if (a->box.offset[i] != b->box.offset[i]) {
            return a->box.offset[i] < b->box.offset[i] ? -1 : 1;
        }
    }
    return 0;
}

static bool same_tensor(const struct checkpoint_chunk *a, const struct checkpoint_chunk *b)
{
    return a->tensor->dtype == b->tensor->dtype && a->box.num_dims == b->box.num_dims &&
           a->is_optimizer == b->is_optimizer &&
           memcmp(a->global_shape, b->global_shape,
                  (size_t)a->box.num_dims * sizeof a->global_shape[0]) == 0;
}

/* Groups the sorted chunks into tensors. */
static int make_tensors(struct checkpoint_table *table)
{
    const size_t capacity = (size_t)table->num_chunks + 1;

    table->tensors = calloc(capacity, sizeof *table->tensors);
    table->first_chunk = calloc(capacity, sizeof *table->first_chunk);
    CHECK(table->tensors != NULL && table->first_chunk != NULL, "out of memory");
    for (int i = 0; i < table->num_chunks; i++) {
        const struct checkpoint_chunk *chunk = &table->chunks[i];
        struct checkpoint_tensor *tensor = &table->tensors[table->num_tensors];

        if (i > 0 && strcmp(chunk->name, chunk[-1].name) == 0) {
            if (!same_tensor(chunk, chunk - 1)) {
                return error_set("%s and %s disagree about the type or shape of %.200s",
                                 safetensors_path(chunk[-1].file), safetensors_path(chunk->file),
                                 chunk->name);
            }
            continue;
        }
        *tensor = (struct checkpoint_tensor){.name = chunk->name,
                                             .dtype = chunk->tensor->dtype,
                                             .num_dims = chunk->box.num_dims,
                                             .is_optimizer = chunk->is_optimizer};
        memcpy(tensor->global_shape, chunk->global_shape, sizeof tensor->global_shape);
        table->first_chunk[table->num_tensors++] = i;
    }
    table->first_chunk[table->num_tensors] = table->num_chunks;
    return 0;
}

/* ---- each element once ---- */

static int check_boxes(const struct checkpoint_tensor *tensor,
                       const struct checkpoint_chunk *chunks, const struct box *boxes,
                       int num_boxes)
{
    const struct box whole = box_whole(tensor->global_shape, tensor->num_dims);
    int64_t num_elements = 0;
    int overlap[2];

    if (box_tiling_find_overlap(boxes, num_boxes, overlap)) {
        return error_set("elements of %.200s are saved twice, in %s and %s", tensor->name,
                         safetensors_path(chunks[overlap[0]].file),
                         safetensors_path(chunks[overlap[1]].file));
    }
    for (int i = 0; i < num_boxes; i++) {
        num_elements += box_num_elements(&boxes[i]); /* disjoint: at most the whole */
    }
    if (num_elements != box_num_elements(&whole)) {
        return error_set("only %lld of the %lld elements of %.200s are in the files",
                         (long long)num_elements, (long long)box_num_elements(&whole),
                         tensor->name);
    }
    return 0;
}

static int check_tensors(const struct checkpoint_table *table)
{
    struct box *boxes = calloc((size_t)table->num_chunks + 1, sizeof *boxes);
    int result = 0;

    CHECK(boxes != NULL, "out of memory");
    for (int i = 0; i < table->num_chunks; i++) {
        boxes[i] = table->chunks[i].box;
    }
    for (int t = 0; t < table->num_tensors && result == 0; t++) {
        const int first = table->first_chunk[t];

        result = check_boxes(&table->tensors[t], &table->chunks[first], &boxes[first],
                             table->first_chunk[t + 1] - first);
    }
    free(boxes);
    return result;
}

/* ---- interface ---- */

/* All files stay open, two of each rank that saved: the usual limit is 1024 files, and a process
 * may raise it. Where it may not, opening one of them says so. */
static void allow_open_files(int num_files)
{
    const rlim_t needed = (rlim_t)num_files + OTHER_OPEN_FILES;
    struct rlimit limit;

    if (getrlimit(RLIMIT_NOFILE, &limit) == 0 && limit.rlim_cur < needed) {
        limit.rlim_cur = needed < limit.rlim_max ? needed : limit.rlim_max;
        setrlimit(RLIMIT_NOFILE, &limit);
    }
}

int checkpoint_table_load(struct checkpoint_table *table, const char *path,
                          const struct manifest *manifest)
{
    *table = (struct checkpoint_table){0};
    allow_open_files(manifest->num_files);
    table->files = calloc((size_t)manifest->num_files + 1, sizeof *table->files);
    CHECK(table->files != NULL, "out of memory");
    for (int i = 0; i < manifest->num_files; i++) {
        TRY(add_file(table, path, manifest->files[i].name));
    }
    if (table->num_chunks > 1) {
        qsort(table->chunks, (size_t)table->num_chunks, sizeof *table->chunks, compare_chunks);
    }
    TRY(make_tensors(table));
    return check_tensors(table);
}

void checkpoint_table_free(struct checkpoint_table *table)
{
    for (int i = 0; i < table->num_files; i++) {
        safetensors_close(table->files[i]);
    }
    for (int i = 0; i < table->num_chunks; i++) {
        free(table->chunks[i].name);
    }
    free(table->files);
    free(table->chunks);
    free(table->tensors);
    free(table->first_chunk);
    *table = (struct checkpoint_table){0};
}
