#include "cmd/inspect_tensors.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/check.h"
#include "ckpt/content_hash.h"

static const int64_t slab_max_bytes = 64 << 20;

struct totals {
    int64_t num_tensors, num_elements, num_bytes;
};

/* ---- lines ---- */

static void print_head(const char *name, const char *dtype, const int64_t *shape, int num_dims)
{
    printf("%s %s [", name, dtype);
    for (int i = 0; i < num_dims; i++) {
        printf("%s%" PRId64, i > 0 ? "," : "", shape[i]);
    }
    printf("] ");
}

static void add_to_totals(struct totals *totals, const int64_t *shape, int num_dims,
                          int64_t num_bytes)
{
    int64_t count = 1;

    for (int i = 0; i < num_dims; i++) {
        count *= shape[i];
    }
    totals->num_tensors++;
    totals->num_elements += count;
    totals->num_bytes += num_bytes;
}

static void print_totals(const struct totals *totals)
{
    printf("%" PRId64 " tensors, %" PRId64 " elements, %" PRId64 " bytes\n", totals->num_tensors,
           totals->num_elements, totals->num_bytes);
}

/* ---- checkpoints ---- */

/* The tensor's first box of at most slab_max_bytes that is contiguous in it: one index of the outer
 * dims, a range of dim `axis`, all of the inner dims. */
static struct box first_slab(const struct checkpoint_tensor *tensor, int *axis)
{
    struct box slab = box_whole(tensor->global_shape, tensor->num_dims);
    int64_t row_bytes = box_num_elements(&slab) * dtype_size_bytes(tensor->dtype);

    for (*axis = 0; *axis < tensor->num_dims; ++*axis) {
        const int64_t rows = slab.size[*axis];

        row_bytes = rows > 0 ? row_bytes / rows : 0;
        if (row_bytes <= slab_max_bytes || *axis == tensor->num_dims - 1) {
            const int64_t fitting = row_bytes > 0 ? slab_max_bytes / row_bytes : rows;

            slab.size[*axis] = fitting < 1 ? 1 : fitting < rows ? fitting : rows;
            break;
        }
        slab.size[*axis] = 1;
    }
    return slab;
}

/* Moves to the next slab in row-major order; false after the last. */
static bool next_slab(const struct checkpoint_tensor *tensor, struct box *slab, int axis,
                      int64_t slab_rows)
{
    slab->offset[axis] += slab->size[axis];
    for (int i = axis; i > 0 && slab->offset[i] == tensor->global_shape[i]; i--) {
        slab->offset[i] = 0;
        slab->offset[i - 1]++;
    }
    if (slab->offset[0] == tensor->global_shape[0]) {
        return false;
    }
    slab->size[axis] = tensor->global_shape[axis] - slab->offset[axis];
    slab->size[axis] = slab->size[axis] < slab_rows ? slab->size[axis] : slab_rows;
    return true;
}

static int hash_slabs(const struct checkpoint *checkpoint, const struct checkpoint_tensor *tensor,
                      struct content_hash *hash)
{
    struct checkpoint_read read = {
        .name = tensor->name, .dtype = tensor->dtype, .num_dims = tensor->num_dims};
    int axis, result;
    struct box slab = first_slab(tensor, &axis);
    const int64_t slab_rows = slab.size[axis];
    const size_t slab_bytes = (size_t)(box_num_elements(&slab) * dtype_size_bytes(tensor->dtype));
    char *bytes = malloc(slab_bytes + 1);

    CHECK(bytes != NULL, "out of memory for %zu bytes", slab_bytes);
    memcpy(read.global_shape, tensor->global_shape, sizeof read.global_shape);
    do {
        read.box = slab;
        result = checkpoint_read_box(checkpoint, &read, bytes);
        if (result == 0) {
            content_hash_add(hash, bytes,
                             (size_t)(box_num_elements(&slab) * dtype_size_bytes(tensor->dtype)));
        }
    } while (result == 0 && next_slab(tensor, &slab, axis, slab_rows));
    free(bytes);
    return result;
}

static int hash_tensor(const struct checkpoint *checkpoint, const struct checkpoint_tensor *tensor,
                       char text[CONTENT_HASH_TEXT_BYTES])
{
    const struct box whole = box_whole(tensor->global_shape, tensor->num_dims);
    struct content_hash *hash = content_hash_create();
    const int result = box_num_elements(&whole) > 0 ? hash_slabs(checkpoint, tensor, hash) : 0;

    content_hash_finish(hash, text);
    return result;
}

int inspect_checkpoint(const struct checkpoint *checkpoint, bool with_hash)
{
    struct totals totals = {0};

    for (int i = 0; i < checkpoint_num_tensors(checkpoint); i++) {
        const struct checkpoint_tensor *tensor = checkpoint_tensor_at(checkpoint, i);
        const struct box whole = box_whole(tensor->global_shape, tensor->num_dims);
        const int64_t num_bytes = box_num_elements(&whole) * dtype_size_bytes(tensor->dtype);
        char hash[CONTENT_HASH_TEXT_BYTES];

        if (with_hash) {
            TRY(hash_tensor(checkpoint, tensor, hash));
        }
        print_head(tensor->name, dtype_name(tensor->dtype), tensor->global_shape, tensor->num_dims);
        add_to_totals(&totals, tensor->global_shape, tensor->num_dims, num_bytes);
        if (with_hash) {
            puts(hash);
        } else {
            printf("%" PRId64 "\n", num_bytes);
        }
    }
    if (!with_hash) {
        print_totals(&totals);
    }
    return 0;
}

/* ---- safetensors files ---- */

struct listed {
    const struct safetensors *file;
    const struct safetensors_tensor *tensor;
};

static int compare_listed(const void *left, const void *right)
{
    return strcmp(((const struct listed *)left)->tensor->name,
                  ((const struct listed *)right)->tensor->name);
}

static struct listed *list_tensors(const struct safetensors *const *files, int num_files,
                                   int *num_tensors)
{
    struct listed *listed;

    *num_tensors = 0;
    for (int f = 0; f < num_files; f++) {
        *num_tensors += safetensors_num_tensors(files[f]);
    }
    listed = calloc((size_t)*num_tensors + 1, sizeof *listed);
    CHECK(listed != NULL, "out of memory");
    for (int f = 0, n = 0; f < num_files; f++) {
        for (int i = 0; i < safetensors_num_tensors(files[f]); i++) {
            listed[n++] = (struct listed){files[f], safetensors_at(files[f], i)};
        }
    }
    qsort(listed, (size_t)*num_tensors, sizeof *listed, compare_listed);
    return listed;
}

static int hash_listed(const struct listed *listed, char text[CONTENT_HASH_TEXT_BYTES])
{
    const int64_t total = listed->tensor->size_bytes;
    const int64_t piece_max = total < slab_max_bytes ? total : slab_max_bytes;
    struct content_hash *hash = content_hash_create();
    char *bytes = malloc((size_t)piece_max + 1);
    int result = 0;

    CHECK(bytes != NULL, "out of memory");
    for (int64_t done = 0; done < total && result == 0;) {
        const int64_t piece = total - done < piece_max ? total - done : piece_max;

        result = safetensors_read_range(listed->file, listed->tensor, done, piece, bytes);
        if (result == 0) {
            content_hash_add(hash, bytes, (size_t)piece);
        }
        done += piece;
    }
    free(bytes);
    content_hash_finish(hash, text);
    return result;
}

static int print_listed(const struct listed *listed, bool with_hash, struct totals *totals)
{
    const struct safetensors_tensor *tensor = listed->tensor;
    char hash[CONTENT_HASH_TEXT_BYTES];

    if (with_hash) {
        TRY(hash_listed(listed, hash));
    }
    print_head(tensor->name, tensor->dtype_name, tensor->shape, tensor->num_dims);
    add_to_totals(totals, tensor->shape, tensor->num_dims, tensor->size_bytes);
    if (with_hash) {
        puts(hash);
    } else {
        printf("%" PRId64 "\n", tensor->size_bytes);
    }
    return 0;
}

int inspect_safetensors(const struct safetensors *const *files, int num_files, bool with_hash)
{
    struct totals totals = {0};
    int num_tensors, result = 0;
    struct listed *listed = list_tensors(files, num_files, &num_tensors);

    for (int i = 0; i < num_tensors && result == 0; i++) {
        result = print_listed(&listed[i], with_hash, &totals);
    }
    if (result == 0 && !with_hash) {
        print_totals(&totals);
    }
    free(listed);
    return result;
}
