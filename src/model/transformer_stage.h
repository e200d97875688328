/* transformer_stage.h - a run of consecutive layers: a model chunk of a pipeline stage, or the whole
 * model when there is one. The first one has the embedding, the last the final norm and the loss.
 * The chunks of a rank register their parameters in one list. */
#ifndef CADRE_MODEL_TRANSFORMER_STAGE_H
#define CADRE_MODEL_TRANSFORMER_STAGE_H

#include "model/transformer_layer.h"
#include "nn/embedding.h"
#include "nn/lm_loss.h"

/* Which part of the model it is. */
struct stage_place {
    int first_layer, num_layers;
    bool has_embedding, has_head;
};

/* A run of the parameter list: [begin, end). */
struct param_run {
    int begin, end;
};

struct transformer_stage {
    struct model_config config;
    const struct groups *groups;
    struct stage_place place;
    struct param_list *params; /* the rank's; not only this stage's */
    struct embedding_layer embedding;
    struct transformer_layer *layers; /* [place.num_layers] */
    struct norm final_norm;
    struct lm_loss head;
    struct tensor rope; /* table, or no data */
    struct param_run embedding_params, head_params, *layer_params;
};

/* What one microbatch's forward leaves for its backward; owned by the caller, reusable. */
struct stage_saved {
    struct transformer_layer_saved *layers; /* [num_layers] */
    struct tensor *inputs;                  /* [num_layers] */
    struct arena_mark *marks;               /* [num_layers]: pass->saved before the layer's */
    struct arena_mark start;                /* pass->saved before the stage's */
    struct norm_saved final_norm;
    struct lm_loss_saved head;
};

struct stage_place stage_place_whole(const struct model_config *config);

/* Parameters are registered in params, which the caller allocates when all stages are there. */
void transformer_stage_init(struct transformer_stage *stage, struct param_list *params,
                            const struct groups *groups, const struct model_config *config,
                            const struct stage_place *place);
/* Tables and the routers' buffers, from the run arena. */
void transformer_stage_allocate(struct transformer_stage *stage, struct stream *stream,
                                struct arena *run);
void transformer_stage_free(struct transformer_stage *stage);
/* Room for stages of up to num_layers layers. */
void stage_saved_init(struct stage_saved *saved, int num_layers);
void stage_saved_free(struct stage_saved *saved);

/* input [T,H]: what the stage before gave, NULL with the embedding; it stays valid until backward.
 * With the head writes loss [T] f32 of pass->label, otherwise output [T,H]; the other is NULL.
 * Without training nothing is kept for backward. */
void transformer_stage_forward(struct transformer_stage *stage, const struct pass *pass,
                               const struct tensor *input, struct tensor *output,
                               struct tensor *loss, struct stage_saved *saved);
/* From d_output [T,H], or with the head from d(total)/d(loss) = pass->loss_weight; writes d_input
 * unless the stage has the embedding. Gradients are added to the parameters' grads, and pass->saved
 * is where it was before the forward. */
void transformer_stage_backward(struct transformer_stage *stage, const struct pass *pass,
                                const struct tensor *d_output, struct tensor *d_input,
                                struct stage_saved *saved);
/* Of a whole model: logits [T,V] act; caches [num_layers] or NULL. router_logits: NULL, or
 * [num_layers] tensors [T,E] f32 of the caller's, of which those of MoE layers are written. */
void transformer_stage_logits(struct transformer_stage *stage, const struct pass *pass,
                              struct kv_cache *caches, struct tensor *logits,
                              struct tensor *router_logits);
/* After the last microbatch of a global batch: expert biases, running balance counts. */
void transformer_stage_finish_batch(struct transformer_stage *stage, struct stream *stream);

#endif
