/* checkpoint_table.h - the tensors of a checkpoint, and where their boxes are. */
#ifndef CADRE_CKPT_CHECKPOINT_TABLE_H
#define CADRE_CKPT_CHECKPOINT_TABLE_H

#include "ckpt/checkpoint.h"
#include "ckpt/manifest.h"
#include "ckpt/safetensors.h"

/* A box on disk. */
struct checkpoint_chunk {
    char *name; /* of the tensor: the file's key up to a '#' */
    const struct safetensors *file;
    const struct safetensors_tensor *tensor;
    struct box box;
    int64_t global_shape[TENSOR_DIMS_MAX];
    bool is_optimizer;
};

struct checkpoint_table {
    struct safetensors **files; /* [num_files] */
    int num_files;
    struct checkpoint_chunk *chunks; /* sorted by tensor name, then by offset */
    int num_chunks;
    struct checkpoint_tensor *tensors; /* sorted by name */
    int *first_chunk;                  /* [num_tensors + 1] */
    int num_tensors;
};

/* Opens the manifest's files, in the directory `path`. Boxes that overlap, or leave out elements of
 * a tensor, are an error. The caller frees in any case. */
int checkpoint_table_load(struct checkpoint_table *table, const char *path,
                          const struct manifest *manifest);
void checkpoint_table_free(struct checkpoint_table *table);

#endif
