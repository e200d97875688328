/* checkpoint.h - a checkpoint is a set of boxes of named global tensors, on disk.
 *
 *     DIR/latest_checkpointed_iteration.txt     "20", or "release"
 *     DIR/iter_0000020/metadata.json            the manifest (manifest.h)
 *     DIR/iter_0000020/shard-00001-model-00001-of-00001.safetensors       weights of rank 0
 *     DIR/iter_0000020/optimizer/shard-00001-model-00001-of-00001.safetensors
 *
 * The shards carry PyTorch's DCP_SHARDING_INFO, so that its HuggingFaceStorageReader reads the
 * weights (the optimizer's are in a folder of their own, which it does not enter), and
 * x_global_shape, which that format leaves out.
 *
 * Saving is atomic and durable: everything is written in a temporary directory, synced and hashed,
 * the directory renamed, the tracker file last. Killed at any instant, or out of space, the last
 * complete checkpoint still loads. Loading checks every byte against the manifest's hashes before
 * it is used; damage is an error that names the file and the newest complete checkpoint, never a
 * silent restart.
 *
 * The manifest's `state` is the caller's: "args" (the saved options), and what training needs to go
 * on. */
#ifndef CADRE_CKPT_CHECKPOINT_H
#define CADRE_CKPT_CHECKPOINT_H

#include <jansson.h>
#include <stdbool.h>
#include <stdint.h>

#include "base/path.h"
#include "ckpt/checkpoint_ranks.h"
#include "tensor/box.h"
#include "tensor/dtype.h"

/* A box of a tensor that this rank saves. Over all ranks each element of a tensor is saved once;
 * saving checks that. */
struct ckpt_item {
    const char *name; /* of weights at most one box per rank; no '#' */
    enum dtype dtype;
    int num_dims; /* at least 1 */
    int64_t global_shape[TENSOR_DIMS_MAX];
    struct box box;
    const void *data; /* packed; host memory, or whatever the request's functions take */
    bool is_optimizer;
};

struct checkpoint_save_request {
    const char *directory; /* --save */
    int64_t iteration;
    bool release; /* as "release": weights to start from, of no iteration */
    const struct ckpt_item *items;
    int num_items;
    /* How an item comes to host memory, if it is not there: stage fills host with its box, one item
     * after the other, in file order; or copy brings a piece of its data, perhaps on another thread
     * than the caller's. */
    int (*stage)(void *context, const struct ckpt_item *item, void *host);
    void (*copy)(void *context, void *host, const void *data, size_t size_bytes);
    void *context; /* of both */
    json_t *state; /* rank 0's is written, others may be NULL */
    struct checkpoint_ranks ranks;
};

/* Fails on all ranks alike, with one message, if it fails on one. */
int checkpoint_save(const struct checkpoint_save_request *request);

enum checkpoint_found { CHECKPOINT_ERROR = -1, CHECKPOINT_FOUND, CHECKPOINT_NONE };

/* Which checkpoint --load means: the tracker's, or iteration ckpt_step (-1: none asked for), or
 * load_directory itself where it is one. Without a tracker file the newest complete one is taken,
 * with a warning; CHECKPOINT_NONE: there is nothing there at all. path is set when found. */
enum checkpoint_found checkpoint_find(const char *load_directory, int64_t ckpt_step,
                                      char path[PATH_LENGTH_MAX]);
/* The same, as rank 0 sees it, on all ranks: with one answer, path and error. */
enum checkpoint_found checkpoint_find_together(const struct checkpoint_ranks *ranks,
                                               const char *load_directory, int64_t ckpt_step,
                                               char path[PATH_LENGTH_MAX]);
/* path has a manifest. */
bool checkpoint_is_at(const char *path);

struct checkpoint;

struct checkpoint_tensor {
    const char *name;
    enum dtype dtype;
    int num_dims;
    int64_t global_shape[TENSOR_DIMS_MAX];
    bool is_optimizer;
};

/* Opens iter_X (from checkpoint_find) after checking all its files, and that their boxes make up
 * whole tensors; the ranks share the hashing (NULL: one rank). NULL on all ranks, with one message,
 * if one fails. */
struct checkpoint *checkpoint_open(const char *path, const struct checkpoint_ranks *ranks);
void checkpoint_close(struct checkpoint *checkpoint);

int64_t checkpoint_iteration(const struct checkpoint *checkpoint);
const json_t *checkpoint_state(const struct checkpoint *checkpoint);
int checkpoint_num_tensors(const struct checkpoint *checkpoint);
/* Sorted by name. */
const struct checkpoint_tensor *checkpoint_tensor_at(const struct checkpoint *checkpoint,
                                                     int index);
const struct checkpoint_tensor *checkpoint_find_tensor(const struct checkpoint *checkpoint,
                                                       const char *name);

struct checkpoint_read {
    const char *name;
    enum dtype dtype; /* wanted: f32, bf16 and f16 are converted into each other */
    int num_dims;
    int64_t global_shape[TENSOR_DIMS_MAX]; /* expected */
    struct box box;                        /* wanted */
    /* The first dim may differ (padding of the vocabulary): common rows are read, others left
     * alone. */
    bool allow_dim0_difference;
};

/* Assembles the box from the boxes on disk into `to` (packed). A missing tensor or another shape is
 * an error. */
int checkpoint_read_box(const struct checkpoint *checkpoint, const struct checkpoint_read *read,
                        void *to);

#endif
