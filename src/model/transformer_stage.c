#include "model/transformer_stage.h"

#include <stdlib.h>

#include "base/check.h"
#include "nn/rope.h"
#include "parallel/tp_region.h"

void transformer_stage_init(struct transformer_stage *stage, const struct groups *groups,
                            const struct model_config *config)
{
    *stage = (struct transformer_stage){
        .config = *config, .groups = groups, .num_layers = config->num_layers};
    param_list_init(&stage->params);
    embedding_layer_init(
        &stage->embedding, &stage->params, groups,
        &(struct embedding_config){
            .vocab_size = config->padded_vocab_size,
            .hidden_size = config->hidden_size,
            .num_positions = config->position == POSITION_LEARNED ? config->max_positions : 0,
            .dropout = (float)config->hidden_dropout,
            .init_std = (float)config->init_std});
    stage->layers = calloc((size_t)config->num_layers, sizeof *stage->layers);
    CHECK(stage->layers != NULL, "out of memory for %d layers", config->num_layers);
    for (int i = 0; i < stage->num_layers; i++) {
        transformer_layer_init(&stage->layers[i], &stage->params, groups, config,
                               stage->first_layer + i);
    }
    norm_init(&stage->final_norm, &stage->params, groups,
              &(struct norm_config){.name = "decoder.final_layernorm",
                                    .kind = config->norm,
                                    .one_plus = config->norm_one_plus,
                                    .hidden_size = config->hidden_size,
                                    .eps = (float)config->norm_eps});
    lm_loss_init(&stage->head, &stage->params, groups, config->padded_vocab_size,
                 config->hidden_size, (float)config->init_std,
                 config->tied_embeddings ? stage->embedding.word : NULL);
}

void transformer_stage_allocate(struct transformer_stage *stage, struct stream *stream,
                                struct arena *run, bool with_grads)
{
    const struct model_config *config = &stage->config;

    param_list_allocate(&stage->params, run, stream, config->dtype, with_grads);
    for (int i = 0; i < stage->num_layers; i++) {
        transformer_layer_allocate(&stage->layers[i], stream, run);
    }
    if (config->position == POSITION_ROPE) {
        stage->rope =
            rope_table(stream, run,
                       &(struct rope_config){.base = config->rope_base,
                                             .percent = config->rope_percent,
                                             .interpolation_factor = config->rope_interpolation,
                                             .head_dim = config->head_dim,
                                             .num_positions = config->seq_length});
    }
}

void transformer_stage_free(struct transformer_stage *stage)
{
    param_list_free(&stage->params);
    free(stage->layers);
    stage->layers = NULL;
}

void stage_saved_init(struct stage_saved *saved, const struct transformer_stage *stage)
{
    const size_t count = (size_t)stage->num_layers + 1;

    saved->layers = calloc(count, sizeof *saved->layers);
    saved->inputs = calloc(count, sizeof *saved->inputs);
    saved->marks = calloc(count, sizeof *saved->marks);
    CHECK(saved->layers != NULL && saved->inputs != NULL && saved->marks != NULL, "out of memory");
}

void stage_saved_free(struct stage_saved *saved)
{
    free(saved->layers);
    free(saved->inputs);
    free(saved->marks);
}

/* Does the layer's backward run its forward again? uniform: all layers, in groups of which the
 * first input is kept; block: the first recompute_num_layers layers. */
static bool is_recomputed(const struct transformer_stage *stage, int i)
{
    switch (stage->config.recompute) {
    case RECOMPUTE_FULL_UNIFORM:
        return true;
    case RECOMPUTE_FULL_BLOCK:
        return i < stage->config.recompute_num_layers;
    default:
        return false;
    }
}

/* Is the layer's input kept through the forward pass? */
static bool keeps_input(const struct transformer_stage *stage, int i)
{
    return stage->config.recompute != RECOMPUTE_FULL_UNIFORM ||
           i % stage->config.recompute_num_layers == 0;
}

static struct tensor new_activation(const struct transformer_stage *stage, const struct pass *pass,
                                    struct arena *arena)
{
    return tensor_new(arena, pass->dtype, tp_region_outside(stage->groups, pass->token.dim[0]),
                      stage->config.hidden_size);
}

static void layer_forward(struct transformer_stage *stage, const struct pass *pass, int i,
                          struct kv_cache *caches, struct tensor *y, const struct tensor *x,
                          struct transformer_layer_saved *saved)
{
    transformer_layer_forward(&stage->layers[i], pass, &stage->rope,
                              caches != NULL ? &caches[i] : NULL, y, x, saved);
}

/* Runs all layers keeping nothing but two activations: evaluation and generation. Returns the
 * result, in pass->saved. */
static struct tensor layers_without_saving(struct transformer_stage *stage, const struct pass *pass,
                                           struct kv_cache *caches, struct tensor *router_logits)
{
    struct tensor x = new_activation(stage, pass, pass->saved);
    struct tensor y = new_activation(stage, pass, pass->saved);

    embedding_layer_forward(&stage->embedding, pass, &x);
    for (int i = 0; i < stage->num_layers; i++) {
        const struct arena_mark mark = arena_mark(pass->saved);
        const struct tensor input = x;
        struct transformer_layer_saved saved;

        layer_forward(stage, pass, i, caches, &y, &x, &saved);
        if (router_logits != NULL && stage->layers[i].is_moe) {
            stream_copy(pass->stream, router_logits[i].data, saved.moe.router.logits.data,
                        tensor_size_bytes(&router_logits[i]));
        }
        arena_release(pass->saved, mark);
        x = y;
        y = input;
    }
    return x;
}

/* Training: layers keep what backward needs, or are to be recomputed. Inputs of a recomputed group
 * other than the first pass through two buffers of scratch memory that the caller releases. */
static struct tensor layers_forward(struct transformer_stage *stage, const struct pass *pass,
                                    struct stage_saved *saved)
{
    struct tensor x = new_activation(stage, pass, pass->saved), passing[2] = {{0}, {0}};

    if (stage->config.recompute == RECOMPUTE_FULL_UNIFORM) {
        passing[0] = new_activation(stage, pass, pass->scratch);
        passing[1] = new_activation(stage, pass, pass->scratch);
    }
    embedding_layer_forward(&stage->embedding, pass, &x);
    for (int i = 0; i < stage->num_layers; i++) {
        const bool next_is_kept = i + 1 == stage->num_layers || keeps_input(stage, i + 1);
        struct tensor y = next_is_kept ? new_activation(stage, pass, pass->saved) : passing[i % 2];

        saved->inputs[i] = x;
        saved->marks[i] = arena_mark(pass->saved);
        layer_forward(stage, pass, i, NULL, &y, &x, &saved->layers[i]);
        if (is_recomputed(stage, i)) {
            arena_release(pass->saved, saved->marks[i]);
        }
        x = y;
    }
    return x;
}

static void head_forward(struct transformer_stage *stage, const struct pass *pass,
                         struct tensor *loss, const struct tensor *x, struct stage_saved *saved)
{
    struct tensor normed = new_activation(stage, pass, pass->saved);

    norm_forward(&stage->final_norm, pass, &normed, x, NULL, &saved->final_norm);
    lm_loss_forward(&stage->head, pass, loss, &normed, &saved->head);
}

void transformer_stage_forward(struct transformer_stage *stage, const struct pass *pass,
                               struct tensor *loss, struct stage_saved *saved)
{
    const struct arena_mark scratch = arena_mark(pass->scratch);
    const struct arena_mark start = arena_mark(pass->saved);
    const struct tensor x = pass->training ? layers_forward(stage, pass, saved)
                                           : layers_without_saving(stage, pass, NULL, NULL);

    head_forward(stage, pass, loss, &x, saved);
    if (!pass->training) {
        arena_release(pass->saved, start);
    }
    saved->marks[stage->num_layers] = start;
    arena_release(pass->scratch, scratch);
}

/* The forward of layers [first, last] again, keeping what backward needs. */
static void recompute_layers(struct transformer_stage *stage, const struct pass *pass, int first,
                             int last, struct stage_saved *saved)
{
    struct pass again = *pass;

    again.recompute = true;
    for (int i = first; i <= last; i++) {
        struct tensor y = new_activation(stage, pass, pass->saved);

        layer_forward(stage, &again, i, NULL, &y, &saved->inputs[i], &saved->layers[i]);
        if (i < last) {
            saved->inputs[i + 1] = y;
        }
    }
}

/* Backward of the layers [first, last], which were recomputed together or are one. */
static void layer_group_backward(struct transformer_stage *stage, const struct pass *pass,
                                 struct tensor *d_x, int first, int last, struct stage_saved *saved)
{
    if (is_recomputed(stage, first)) {
        recompute_layers(stage, pass, first, last, saved);
    }
    for (int i = last; i >= first; i--) {
        transformer_layer_backward(&stage->layers[i], pass, &stage->rope, d_x, d_x,
                                   &saved->layers[i]);
    }
    arena_release(pass->saved, saved->marks[first]);
}

void transformer_stage_backward(struct transformer_stage *stage, const struct pass *pass,
                                struct stage_saved *saved)
{
    const struct arena_mark mark = arena_mark(pass->scratch);
    struct tensor d_normed = new_activation(stage, pass, pass->scratch);
    struct tensor d_x = new_activation(stage, pass, pass->scratch);

    lm_loss_backward(&stage->head, pass, &d_normed, &saved->head);
    norm_backward(&stage->final_norm, pass, &d_x, &d_normed, NULL, &saved->final_norm);
    for (int last = stage->num_layers - 1, first; last >= 0; last = first - 1) {
        for (first = last; !keeps_input(stage, first); first--) {
        }
        layer_group_backward(stage, pass, &d_x, first, last, saved);
    }
    embedding_layer_backward(&stage->embedding, pass, &d_x);
    arena_release(pass->saved, saved->marks[stage->num_layers]);
    arena_release(pass->scratch, mark);
}

void transformer_stage_logits(struct transformer_stage *stage, const struct pass *pass,
                              struct kv_cache *caches, struct tensor *logits,
                              struct tensor *router_logits)
{
    const struct arena_mark mark = arena_mark(pass->saved);
    const struct tensor x = layers_without_saving(stage, pass, caches, router_logits);
    struct tensor normed = new_activation(stage, pass, pass->saved);
    struct norm_saved saved;

    norm_forward(&stage->final_norm, pass, &normed, &x, NULL, &saved);
    lm_loss_logits(&stage->head, pass, logits, &normed);
    arena_release(pass->saved, mark);
}

void transformer_stage_finish_batch(struct transformer_stage *stage, struct stream *stream)
{
    for (int i = 0; i < stage->num_layers; i++) {
        if (stage->layers[i].is_moe) {
            router_finish_batch(&stage->layers[i].moe.router, stream, stage->groups);
        }
    }
}
