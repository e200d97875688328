/* transformer_stage.h - the layers of one pipeline stage (all of them when there is one): embedding
 * on the first, final norm and loss on the last. */
#ifndef CADRE_MODEL_TRANSFORMER_STAGE_H
#define CADRE_MODEL_TRANSFORMER_STAGE_H

#include "model/transformer_layer.h"
#include "nn/embedding.h"
#include "nn/lm_loss.h"

struct transformer_stage {
    struct model_config config;
    const struct groups *groups;
    int first_layer, num_layers; /* of this stage */
    struct embedding_layer embedding;
    struct transformer_layer *layers;
    struct norm final_norm;
    struct lm_loss head;
    struct param_list params;
    struct tensor rope; /* table, or no data */
};

/* What one microbatch's forward leaves for its backward; owned by the caller, reusable. */
struct stage_saved {
    struct transformer_layer_saved *layers; /* [num_layers] */
    struct tensor *inputs;                  /* [num_layers] */
    struct arena_mark *marks;               /* [num_layers]: pass->saved before the layer's */
    struct norm_saved final_norm;
    struct lm_loss_saved head;
};

/* Parameters are registered, not allocated. */
void transformer_stage_init(struct transformer_stage *stage, const struct groups *groups,
                            const struct model_config *config);
/* Memory of parameters (and gradients) and tables from the run arena. Values are zero. */
void transformer_stage_allocate(struct transformer_stage *stage, struct stream *stream,
                                struct arena *run, bool with_grads);
void transformer_stage_free(struct transformer_stage *stage);
void stage_saved_init(struct stage_saved *saved, const struct transformer_stage *stage);
void stage_saved_free(struct stage_saved *saved);

/* loss [T] f32 of pass->label. Without training nothing is kept for backward. */
void transformer_stage_forward(struct transformer_stage *stage, const struct pass *pass,
                               struct tensor *loss, struct stage_saved *saved);
/* From d(total)/d(loss) = pass->loss_weight; gradients are added to the parameters' grads, and
 * pass->saved is where it was before the forward. */
void transformer_stage_backward(struct transformer_stage *stage, const struct pass *pass,
                                struct stage_saved *saved);
/* logits [T,V] act; caches [num_layers] or NULL. router_logits: NULL, or [num_layers] tensors [T,E]
 * f32 of the caller's, of which those of MoE layers are written. */
void transformer_stage_logits(struct transformer_stage *stage, const struct pass *pass,
                              struct kv_cache *caches, struct tensor *logits,
                              struct tensor *router_logits);
/* After the last microbatch of a global batch: expert biases, running balance counts. */
void transformer_stage_finish_batch(struct transformer_stage *stage, struct stream *stream);

#endif
