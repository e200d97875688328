/* Loading: what is wanted is put together from the boxes on disk that it meets. */
#include <stdlib.h>
#include <string.h>

#include "base/check.h"
#include "ckpt/checkpoint.h"
#include "ckpt/checkpoint_table.h"
#include "ckpt/checkpoint_verify.h"

struct checkpoint {
    char path[PATH_LENGTH_MAX];
    struct manifest manifest;
    struct checkpoint_table table;
};

/* ---- opening ---- */

/* What is in the files, and whether it is what was written; the ranks share the hashing. */
static int load(struct checkpoint *checkpoint, const struct checkpoint_ranks *ranks)
{
    TRY(manifest_read(&checkpoint->manifest, checkpoint->path));
    TRY(checkpoint_verify_files(checkpoint->path, &checkpoint->manifest,
                                checkpoint_ranks_index(ranks), checkpoint_ranks_count(ranks)));
    return checkpoint_table_load(&checkpoint->table, checkpoint->path, &checkpoint->manifest);
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
    int result;

    CHECK(checkpoint != NULL, "out of memory");
    while (length > 1 && path[length - 1] == '/') {
        length--;
    }
    result = path_format(checkpoint->path, "%.*s", (int)length, path);
    if (checkpoint_ranks_agree(ranks, result != 0 ? -1 : load(checkpoint, ranks)) == 0) {
        return checkpoint;
    }
    if (checkpoint_ranks_index(ranks) == 0) {
        report_damage(checkpoint->path);
    }
    checkpoint_ranks_share_error(ranks);
    checkpoint_close(checkpoint);
    return NULL;
}

void checkpoint_close(struct checkpoint *checkpoint)
{
    if (checkpoint == NULL) {
        return;
    }
    checkpoint_table_free(&checkpoint->table);
    manifest_free(&checkpoint->manifest);
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
    return checkpoint->table.num_tensors;
}

const struct checkpoint_tensor *checkpoint_tensor_at(const struct checkpoint *checkpoint, int index)
{
    CHECK(index >= 0 && index < checkpoint->table.num_tensors, "tensor %d of %d", index,
          checkpoint->table.num_tensors);
    return &checkpoint->table.tensors[index];
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

    return bsearch(&key, checkpoint->table.tensors, (size_t)checkpoint->table.num_tensors,
                   sizeof key, compare_tensor_names);
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

/* Reads `wanted` from the tensor's chunks, which hold each of its elements once. */
static int read_chunks(const struct checkpoint_table *table, int tensor,
                       const struct checkpoint_read *read, const struct box *wanted, void *to)
{
    for (int i = table->first_chunk[tensor]; i < table->first_chunk[tensor + 1]; i++) {
        const struct checkpoint_chunk *chunk = &table->chunks[i];
        struct box part;

        if (chunk->box.offset[0] >= wanted->offset[0] + wanted->size[0]) {
            break; /* sorted by this offset */
        }
        if (box_intersect(&chunk->box, wanted, &part)) {
            TRY(safetensors_read_box(chunk->file, chunk->tensor, &chunk->box, &part, to, &read->box,
                                     read->dtype));
        }
    }
    return 0;
}

int checkpoint_read_box(const struct checkpoint *checkpoint, const struct checkpoint_read *read,
                        void *to)
{
    const struct checkpoint_tensor *tensor = checkpoint_find_tensor(checkpoint, read->name);
    struct box saved, wanted;

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
    return read_chunks(&checkpoint->table, (int)(tensor - checkpoint->table.tensors), read, &wanted,
                       to);
}
