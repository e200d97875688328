/* transformer_layer.h - one pre-norm layer: h = x + attention(norm1 x), y = h + mlp(norm2 h), with
 * dropout on both branches; the mlp is dense or a mixture of experts. */
#ifndef CADRE_MODEL_TRANSFORMER_LAYER_H
#define CADRE_MODEL_TRANSFORMER_LAYER_H

#include "model/model_config.h"
#include "moe/moe_layer.h"
#include "nn/attention.h"
#include "nn/mlp.h"
#include "nn/norm.h"

struct transformer_layer {
    int number; /* global, from 0 */
    float hidden_dropout;
    struct norm input_norm, mlp_norm;
    struct attention_layer attention;
    bool is_moe;
    struct mlp mlp;
    struct moe_layer moe;
};

struct transformer_layer_saved {
    struct norm_saved input_norm, mlp_norm;
    struct attention_saved attention;
    struct mlp_saved mlp;
    struct moe_saved moe;
};

void transformer_layer_init(struct transformer_layer *layer, struct param_list *params,
                            const struct groups *groups, const struct model_config *config,
                            int number);
/* Buffers that are no parameters, once the run's memory exists. */
void transformer_layer_allocate(struct transformer_layer *layer, struct stream *stream,
                                struct arena *run);
/* y, x [T,H]; they are different memory. */
void transformer_layer_forward(struct transformer_layer *layer, const struct pass *pass,
                               const struct tensor *rope, struct kv_cache *cache, struct tensor *y,
                               const struct tensor *x, struct transformer_layer_saved *saved);
/* d_x may be d_y. */
void transformer_layer_backward(struct transformer_layer *layer, const struct pass *pass,
                                const struct tensor *rope, struct tensor *d_x,
                                const struct tensor *d_y,
                                const struct transformer_layer_saved *saved);

#endif
