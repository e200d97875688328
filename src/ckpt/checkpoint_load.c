/* Loading: a sorted table of the boxes in all files, and reads that intersect with them. */
#include <stdlib.h>
#include <string.h>

#include "base/check.h"
#include "base/checked.h"
#include "ckpt/checkpoint.h"
#include "ckpt/checkpoint_layout.h"
#include "ckpt/checkpoint_verify.h"
#include "ckpt/manifest.h"
#include "ckpt/safetensors.h"

/* A box on disk. */
struct chunk {
    const struct safetensors *file;
    const struct safetensors_tensor *tensor;
    struct box box;
    int64_t global_shape[TENSOR_DIMS_MAX];
    bool is_optimizer;
};

struct checkpoint {
    char path[PATH_LENGTH_MAX];
    struct manifest manifest;
    struct safetensors **files;
    struct chunk *chunks; /* sorted by tensor name */
    int num_chunks;
    struct checkpoint_tensor *tensors; /* sorted by name */
    int *first_chunk;                  /* [num_tensors + 1] */
    int num_tensors;
};

/* ---- the table ---- */

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

static int make_chunk(struct chunk *chunk, const struct safetensors *file,
                      const struct safetensors_tensor *tensor, const json_t *offsets,
                      const json_t *shapes)
{
    const char *name = tensor->name;
    int64_t count;

    *chunk = (struct chunk){.file = file, .tensor = tensor};
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

static int add_chunks(struct checkpoint *checkpoint, const struct safetensors *file,
                      const json_t *offsets, const json_t *shapes, bool is_optimizer)
{
    for (int i = 0; i < safetensors_num_tensors(file); i++) {
        struct chunk *chunk = &checkpoint->chunks[checkpoint->num_chunks];

        if (make_chunk(chunk, file, safetensors_at(file, i), offsets, shapes) != 0) {
            return error_prepend("%s", safetensors_path(file));
        }
        chunk->is_optimizer = is_optimizer;
        checkpoint->num_chunks++;
    }
    return 0;
}

static int add_file(struct checkpoint *checkpoint, int index)
{
    static const char folder[] = CHECKPOINT_OPTIMIZER_FOLDER "/";
    const struct manifest_file *entry = &checkpoint->manifest.files[index];
    const bool is_optimizer = strncmp(entry->name, folder, strlen(folder)) == 0;
    char path[PATH_LENGTH_MAX];
    json_t *offsets = NULL, *shapes = NULL;
    struct safetensors *file;
    int result = -1;

    TRY(path_format(path, "%s/%s", checkpoint->path, entry->name));
    file = safetensors_open(path);
    if (file == NULL) {
        return -1;
    }
    checkpoint->files[index] = file;
    checkpoint->chunks = realloc(
        checkpoint->chunks, (size_t)(checkpoint->num_chunks + safetensors_num_tensors(file) + 1) *
                                sizeof *checkpoint->chunks);
    CHECK(checkpoint->chunks != NULL, "out of memory");
    offsets = load_metadata(file, CHECKPOINT_SHARDING_KEY);
    shapes = offsets != NULL ? load_metadata(file, CHECKPOINT_SHAPE_KEY) : NULL;
    if (shapes != NULL) {
        result = add_chunks(checkpoint, file, offsets, shapes, is_optimizer);
    }
    json_decref(offsets);
    json_decref(shapes);
    return result;
}

static int compare_chunks(const void *left, const void *right)
{
    const struct chunk *a = left, *b = right;
    const int order = strcmp(a->tensor->name, b->tensor->name);

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

static bool same_tensor(const struct chunk *a, const struct chunk *b)
{
    return a->tensor->dtype == b->tensor->dtype && a->box.num_dims == b->box.num_dims &&
           a->is_optimizer == b->is_optimizer &&
           memcmp(a->global_shape, b->global_shape,
                  (size_t)a->box.num_dims * sizeof a->global_shape[0]) == 0;
}

/* Groups the sorted chunks into tensors. */
static int make_tensors(struct checkpoint *checkpoint)
{
    const size_t capacity = (size_t)checkpoint->num_chunks + 1;

    checkpoint->tensors = calloc(capacity, sizeof *checkpoint->tensors);
    checkpoint->first_chunk = calloc(capacity, sizeof *checkpoint->first_chunk);
    CHECK(checkpoint->tensors != NULL && checkpoint->first_chunk != NULL, "out of memory");
    for (int i = 0; i < checkpoint->num_chunks; i++) {
        const struct chunk *chunk = &checkpoint->chunks[i];
        struct checkpoint_tensor *tensor = &checkpoint->tensors[checkpoint->num_tensors];

        if (i > 0 && strcmp(chunk->tensor->name, chunk[-1].tensor->name) == 0) {
            if (!same_tensor(chunk, chunk - 1)) {
                return error_set("%s: two files disagree about the type or shape of %.200s",
                                 checkpoint->path, chunk->tensor->name);
            }
            continue;
        }
        *tensor = (struct checkpoint_tensor){.name = chunk->tensor->name,
                                             .dtype = chunk->tensor->dtype,
                                             .num_dims = chunk->box.num_dims,
                                             .is_optimizer = chunk->is_optimizer};
        memcpy(tensor->global_shape, chunk->global_shape, sizeof tensor->global_shape);
        checkpoint->first_chunk[checkpoint->num_tensors++] = i;
    }
    checkpoint->first_chunk[checkpoint->num_tensors] = checkpoint->num_chunks;
    return 0;
}

static int load_table(struct checkpoint *checkpoint)
{
    checkpoint->files =
        calloc((size_t)checkpoint->manifest.num_files + 1, sizeof *checkpoint->files);
    CHECK(checkpoint->files != NULL, "out of memory");
    for (int i = 0; i < checkpoint->manifest.num_files; i++) {
        TRY(add_file(checkpoint, i));
    }
    if (checkpoint->num_chunks > 1) {
        qsort(checkpoint->chunks, (size_t)checkpoint->num_chunks, sizeof *checkpoint->chunks,
              compare_chunks);
    }
    return make_tensors(checkpoint);
}

/* ---- opening ---- */

/* The ranks share the hashing; all of them fail if one does. */
static int verify(const struct checkpoint *checkpoint, const struct checkpoint_ranks *ranks)
{
    const int count = ranks != NULL && ranks->num_ranks > 1 ? ranks->num_ranks : 1;
    const int rank = count > 1 ? ranks->rank : 0;
    int result = checkpoint_verify_files(checkpoint->path, &checkpoint->manifest, rank, count);
    int *results;

    if (count == 1) {
        return result;
    }
    results = calloc((size_t)count, sizeof *results);
    CHECK(results != NULL, "out of memory");
    ranks->all_gather(ranks->context, &result, results, sizeof result);
    for (int r = 0; r < count && result == 0; r++) {
        if (results[r] != 0) {
            result = error_set("rank %d found damage", r);
        }
    }
    free(results);
    return result;
}

/* "checkpoint P is damaged: ...; the newest complete one is ...". Names the sibling, not a restart.
 */
static void report_damage(const char *path)
{
    const char *slash = strrchr(path, '/');
    char parent[PATH_LENGTH_MAX];

    error_prepend("checkpoint %s is damaged", path);
    if (path_parent(parent, path) == 0) {
        checkpoint_offer_other(parent, slash != NULL ? slash + 1 : path);
    }
}

struct checkpoint *checkpoint_open(const char *path, const struct checkpoint_ranks *ranks)
{
    struct checkpoint *checkpoint = calloc(1, sizeof *checkpoint);
    size_t length = strlen(path);

    CHECK(checkpoint != NULL, "out of memory");
    while (length > 1 && path[length - 1] == '/') {
        length--;
    }
    if (path_format(checkpoint->path, "%.*s", (int)length, path) != 0) {
        checkpoint_close(checkpoint);
        return NULL;
    }
    if (manifest_read(&checkpoint->manifest, checkpoint->path) != 0 ||
        verify(checkpoint, ranks) != 0 || load_table(checkpoint) != 0) {
        report_damage(checkpoint->path);
        checkpoint_close(checkpoint);
        return NULL;
    }
    return checkpoint;
}

void checkpoint_close(struct checkpoint *checkpoint)
{
    if (checkpoint == NULL) {
        return;
    }
    for (int i = 0; checkpoint->files != NULL && i < checkpoint->manifest.num_files; i++) {
        safetensors_close(checkpoint->files[i]);
    }
    manifest_free(&checkpoint->manifest);
    free(checkpoint->files);
    free(checkpoint->chunks);
    free(checkpoint->tensors);
    free(checkpoint->first_chunk);
    free(checkpoint);
}

int64_t checkpoint_iteration(const struct checkpoint *checkpoint)
{
    return checkpoint->manifest.iteration;
}

const json_t *checkpoint_state(const struct checkpoint *checkpoint)
{
    return checkpoint->manifest.state;
}

int checkpoint_num_tensors(const struct checkpoint *checkpoint)
{
    return checkpoint->num_tensors;
}

const struct checkpoint_tensor *checkpoint_tensor_at(const struct checkpoint *checkpoint, int index)
{
    CHECK(index >= 0 && index < checkpoint->num_tensors, "tensor %d of %d", index,
          checkpoint->num_tensors);
    return &checkpoint->tensors[index];
}

static int compare_tensor_names(const void *left, const void *right)
{
    return strcmp(((const struct checkpoint_tensor *)left)->name,
                  ((const struct checkpoint_tensor *)right)->name);
}

const struct checkpoint_tensor *checkpoint_find_tensor(const struct checkpoint *checkpoint,
                                                       const char *name)
{
    const struct checkpoint_tensor key = {.name = name};

    return bsearch(&key, checkpoint->tensors, (size_t)checkpoint->num_tensors, sizeof key,
                   compare_tensor_names);
}

/* ---- reading ---- */

static int shape_error(const struct checkpoint *checkpoint, const struct checkpoint_read *read,
                       const struct checkpoint_tensor *tensor)
{
    const struct tensor saved =
        tensor_wrap(NULL, tensor->dtype, tensor->global_shape, tensor->num_dims);
    const struct tensor wanted = tensor_wrap(NULL, read->dtype, read->global_shape, read->num_dims);

    return error_set("%s: %s is %s in the checkpoint, the model has %s", checkpoint->path,
                     read->name, tensor_describe(&saved), tensor_describe(&wanted));
}

static int check_shape(const struct checkpoint *checkpoint, const struct checkpoint_read *read,
                       const struct checkpoint_tensor *tensor)
{
    if (read->num_dims != tensor->num_dims) {
        return shape_error(checkpoint, read, tensor);
    }
    for (int i = 0; i < read->num_dims; i++) {
        if (read->global_shape[i] != tensor->global_shape[i] &&
            !(i == 0 && read->allow_dim0_difference)) {
            return shape_error(checkpoint, read, tensor);
        }
    }
    return 0;
}

/* Reads what the tensor's chunks hold of `wanted`; *num_read counts the elements. Chunks that
 * overlap inside `wanted` are an error, so that a full count means each element exactly once. */
static int read_chunks(const struct checkpoint *checkpoint, const struct checkpoint_read *read,
                       int tensor, const struct box *wanted, void *to, int64_t *num_read)
{
    const int first = checkpoint->first_chunk[tensor], end = checkpoint->first_chunk[tensor + 1];

    *num_read = 0;
    for (int i = first; i < end; i++) {
        const struct chunk *chunk = &checkpoint->chunks[i];
        struct box part, common;

        if (!box_intersect(&chunk->box, wanted, &part)) {
            continue;
        }
        for (int j = first; j < i; j++) {
            if (box_intersect(&checkpoint->chunks[j].box, &part, &common)) {
                return error_set("%s: elements of %s are saved twice, in %s and %s",
                                 checkpoint->path, read->name,
                                 safetensors_path(checkpoint->chunks[j].file),
                                 safetensors_path(chunk->file));
            }
        }
        TRY(safetensors_read_box(chunk->file, chunk->tensor, &chunk->box, &part, to, &read->box,
                                 read->dtype));
        *num_read += box_num_elements(&part);
    }
    return 0;
}

int checkpoint_read_box(const struct checkpoint *checkpoint, const struct checkpoint_read *read,
                        void *to)
{
    const struct checkpoint_tensor *tensor = checkpoint_find_tensor(checkpoint, read->name);
    struct box saved, wanted;
    int64_t num_read;

    CHECK(read->num_dims == read->box.num_dims && box_inside(&read->box, read->global_shape),
          "box of %s", read->name);
    if (tensor == NULL) {
        return error_set("%s has no tensor %s", checkpoint->path, read->name);
    }
    TRY(check_shape(checkpoint, read, tensor));
    saved = box_whole(tensor->global_shape, tensor->num_dims);
    if (!box_intersect(&saved, &read->box, &wanted)) {
        return 0; /* nothing but padding, or an empty box */
    }
    TRY(read_chunks(checkpoint, read, (int)(tensor - checkpoint->tensors), &wanted, to, &num_read));
    if (num_read != box_num_elements(&wanted)) {
        return error_set("%s: only %lld of the %lld elements wanted of %s are in its files",
                         checkpoint->path, (long long)num_read,
                         (long long)box_num_elements(&wanted), read->name);
    }
    return 0;
}
