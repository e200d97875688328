/* param.h - a parameter states its facts once. Init, gradient buffers, reduction, optimizer, norms,
 * conversion and checkpoints are loops over the list and know no layer.
 *
 * Layers register their parameters with param_add while they are built; param_list_allocate then
 * lays all values out in one buffer of the model's dtype and all gradients in one f32 buffer. */
#ifndef CADRE_NN_PARAM_H
#define CADRE_NN_PARAM_H

#include <stdbool.h>
#include <stdint.h>

#include "device/device.h"
#include "tensor/box.h"
#include "tensor/tensor.h"

enum { PARAM_NAME_MAX = 128, PARAM_ALIGNMENT_ELEMENTS = 64 };

/* Which group averages the gradient: DPxCP, or the expert grid's EDP. */
enum param_scope { PARAM_DENSE, PARAM_EXPERT };
enum param_init { PARAM_INIT_NORMAL, PARAM_INIT_ONES, PARAM_INIT_ZEROS };

struct param {
    char name[PARAM_NAME_MAX]; /* "decoder.layers.3.mlp.router.weight": the checkpoint key */
    int num_dims;              /* of the global tensor and of value */
    int64_t global_shape[TENSOR_DIMS_MAX]; /* over all ranks */
    struct box box;                        /* what this rank holds */
    enum param_scope scope;
    bool sum_over_tp; /* replicated over TP, its gradient is a partial sum there (under SP) */
    bool shared_over_stages; /* tied embedding of a pipeline: summed over groups->embedding */
    bool is_copy;            /* the tied embedding on the last stage: in no norm, not saved */
    enum param_init init;
    float init_std; /* of PARAM_INIT_NORMAL */
    bool weight_decay;
    bool decoupled_lr;    /* embedding and output layer, with --decoupled-lr */
    bool grad_is_product; /* a backward computes it by one matrix product, which can replace what is
                           * there instead of adding to it */
    struct tensor value;  /* box.size, model dtype; in the value buffer */
    struct tensor grad;   /* box.size, f32; in the gradient buffer */
    int64_t start;        /* first element in both buffers: after the parameter added before it, or
                           * where grad_buckets_init puts it */
};

struct param_list {
    struct param **params; /* pointers are stable */
    int num_params;
    int64_t num_elements; /* of the buffers, paddings included */
    struct tensor values; /* [num_elements], model dtype */
    struct tensor grads;  /* [num_elements], f32; empty without gradients */
};

void param_list_init(struct param_list *list);
void param_list_free(struct param_list *list);
/* Copies the facts given (name, shape, box, scope, ...); the name must be new. */
struct param *param_add(struct param_list *list, const struct param *facts);
/* NULL when there is none. */
struct param *param_find(const struct param_list *list, const char *name);
/* After the last param_add. Paddings and gradients are zero. */
void param_list_allocate(struct param_list *list, struct arena *arena, struct stream *stream,
                         enum dtype dtype, bool with_grads);
/* Initial values: element i of the global tensor is drawn from (seed, name, i), so they do not
 * depend on the mapping. */
void param_list_initialize(struct param_list *list, struct stream *stream, uint64_t seed);
/* Before a batch: zeroes what its backward passes only add to. The other gradients
 * (grad_is_product) keep the values of the batch before until the first microbatch replaces them.
 */
void param_list_clear_grads(const struct param_list *list, struct stream *stream);
/* Whether a backward adds to the gradient or replaces it; overwrite_grads: that of its pass. */
bool param_grad_accumulates(const struct param *param, bool overwrite_grads);
/* Elements of this rank. */
int64_t param_list_num_local(const struct param_list *list);

#endif
