#include "model/transformer_stage.h"

#include <stdlib.h>

#include "base/check.h"
#include "nn/rope.h"
#include "parallel/tp_region.h"

struct stage_place stage_place_whole(const struct model_config *config)
{
    return (struct stage_place){
        .num_layers = config->num_layers, .has_embedding = true, .has_head = true};
}

static void init_embedding(struct transformer_stage *stage)
{
    const struct model_config *config = &stage->config;

    stage->embedding_params.begin = stage->params->num_params;
    if (stage->place.has_embedding) {
        embedding_layer_init(
            &stage->embedding, stage->params, stage->groups,
            &(struct embedding_config){
                .vocab_size = config->padded_vocab_size,
                .hidden_size = config->hidden_size,
                .num_positions = config->position == POSITION_LEARNED ? config->max_positions : 0,
                .dropout = (float)config->hidden_dropout,
                .init_std = (float)config->init_std});
    }
    stage->embedding_params.end = stage->params->num_params;
}

static void init_layers(struct transformer_stage *stage)
{
    const size_t count = (size_t)stage->place.num_layers + 1;

    stage->layers = calloc(count, sizeof *stage->layers);
    stage->layer_params = calloc(count, sizeof *stage->layer_params);
    CHECK(stage->layers != NULL && stage->layer_params != NULL, "out of memory for %d layers",
          stage->place.num_layers);
    for (int i = 0; i < stage->place.num_layers; i++) {
        stage->layer_params[i].begin = stage->params->num_params;
        transformer_layer_init(&stage->layers[i], stage->params, stage->groups, &stage->config,
                               stage->place.first_layer + i);
        stage->layer_params[i].end = stage->params->num_params;
    }
}

/* A head with tied weights on another stage than the embedding has a copy of them. */
static void init_head(struct transformer_stage *stage)
{
    const struct model_config *config = &stage->config;
    const bool tied = config->tied_embeddings;

    stage->head_params.begin = stage->params->num_params;
    if (stage->place.has_head) {
        norm_init(&stage->final_norm, stage->params, stage->groups,
                  &(struct norm_config){.name = "decoder.final_layernorm",
                                        .kind = config->norm,
                                        .one_plus = config->norm_one_plus,
                                        .hidden_size = config->hidden_size,
                                        .eps = (float)config->norm_eps});
        lm_loss_init(&stage->head, stage->params, stage->groups,
                     &(struct lm_loss_config){
                         .vocab_size = config->padded_vocab_size,
                         .hidden_size = config->hidden_size,
                         .init_std = (float)config->init_std,
                         .tied = tied && stage->place.has_embedding ? stage->embedding.word : NULL,
                         .is_copy_of_embedding = tied && !stage->place.has_embedding});
    }
    stage->head_params.end = stage->params->num_params;
    if (tied && stage->place.has_embedding && !stage->place.has_head) {
        stage->embedding.word->shared_over_stages = true;
    }
}

void transformer_stage_init(struct transformer_stage *stage, struct param_list *params,
                            const struct groups *groups, const struct model_config *config,
                            const struct stage_place *place)
{
    *stage = (struct transformer_stage){
        .config = *config, .groups = groups, .place = *place, .params = params};
    init_embedding(stage);
    init_layers(stage);
    init_head(stage);
}

void transformer_stage_allocate(struct transformer_stage *stage, struct stream *stream,
                                struct arena *run)
{
    const struct model_config *config = &stage->config;

    for (int i = 0; i < stage->place.num_layers; i++) {
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
    free(stage->layers);
    free(stage->layer_params);
    stage->layers = NULL;
    stage->layer_params = NULL;
}

void stage_saved_init(struct stage_saved *saved, int num_layers)
{
    const size_t count = (size_t)num_layers + 1;

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

static void values_needed(const struct pass *pass, struct param_run run)
{
    if (pass->hooks != NULL && pass->hooks->values_needed != NULL && run.begin < run.end) {
        pass->hooks->values_needed(pass->hooks->context, run.begin, run.end);
    }
}

static void grads_ready(const struct pass *pass, struct param_run run)
{
    if (pass->hooks != NULL && pass->hooks->grads_ready != NULL && run.begin < run.end) {
        pass->hooks->grads_ready(pass->hooks->context, run.begin, run.end);
    }
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
    values_needed(pass, stage->layer_params[i]);
    transformer_layer_forward(&stage->layers[i], pass, &stage->rope,
                              caches != NULL ? &caches[i] : NULL, y, x, saved);
}

/* What enters the first layer: the embeddings, in pass->saved, or the stage's input. */
static struct tensor first_input(struct transformer_stage *stage, const struct pass *pass,
                                 const struct tensor *input)
{
    struct tensor x;

    if (!stage->place.has_embedding) {
        return *input;
    }
    x = new_activation(stage, pass, pass->saved);
    values_needed(pass, stage->embedding_params);
    embedding_layer_forward(&stage->embedding, pass, &x);
    return x;
}

/* Runs all layers keeping nothing but two activations: evaluation and generation. Returns the
 * result, in pass->saved (or input, where there is no layer). */
static struct tensor layers_without_saving(struct transformer_stage *stage, const struct pass *pass,
                                           const struct tensor *input, struct kv_cache *caches,
                                           struct tensor *router_logits)
{
    struct tensor buffers[2] = {new_activation(stage, pass, pass->saved),
                                new_activation(stage, pass, pass->saved)};
    struct tensor x = first_input(stage, pass, input);

    for (int i = 0; i < stage->place.num_layers; i++) {
        const struct arena_mark mark = arena_mark(pass->saved);
        struct tensor *y = &buffers[i % 2];
        struct transformer_layer_saved saved;

        layer_forward(stage, pass, i, caches, y, &x, &saved);
        if (router_logits != NULL && stage->layers[i].is_moe) {
            stream_copy(pass->stream, router_logits[i].data, saved.moe.router.logits.data,
                        tensor_size_bytes(&router_logits[i]));
        }
        arena_release(pass->saved, mark);
        x = *y;
    }
    return x;
}

/* Training: layers keep what backward needs, or are to be recomputed. Inputs of a recomputed group
 * other than the first pass through two buffers of scratch memory that the caller releases. The
 * last layer writes output, if it is given. */
static struct tensor layers_forward(struct transformer_stage *stage, const struct pass *pass,
                                    const struct tensor *input, const struct tensor *output,
                                    struct stage_saved *saved)
{
    const int num_layers = stage->place.num_layers;
    struct tensor x = first_input(stage, pass, input), passing[2] = {{0}, {0}};

    if (stage->config.recompute == RECOMPUTE_FULL_UNIFORM) {
        passing[0] = new_activation(stage, pass, pass->scratch);
        passing[1] = new_activation(stage, pass, pass->scratch);
    }
    for (int i = 0; i < num_layers; i++) {
        struct tensor y;

        if (i + 1 == num_layers && output != NULL) {
            y = *output;
        } else if (i + 1 == num_layers || keeps_input(stage, i + 1)) {
            y = new_activation(stage, pass, pass->saved);
        } else {
            y = passing[i % 2];
        }
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

    values_needed(pass, stage->head_params);
    norm_forward(&stage->final_norm, pass, &normed, x, NULL, &saved->final_norm);
    lm_loss_forward(&stage->head, pass, loss, &normed, &saved->head);
}

void transformer_stage_forward(struct transformer_stage *stage, const struct pass *pass,
                               const struct tensor *input, struct tensor *output,
                               struct tensor *loss, struct stage_saved *saved)
{
    const struct arena_mark scratch = arena_mark(pass->scratch);
    const struct arena_mark start = arena_mark(pass->saved);
    struct tensor x;

    if (pass->training) {
        x = layers_forward(stage, pass, input, output, saved);
    } else {
        x = layers_without_saving(stage, pass, input, NULL, NULL);
    }
    if (stage->place.has_head) {
        head_forward(stage, pass, loss, &x, saved);
    } else if (x.data != output->data) {
        stream_copy(pass->stream, output->data, x.data, tensor_size_bytes(output));
    }
    if (!pass->training) {
        arena_release(pass->saved, start);
    }
    saved->start = start;
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
        grads_ready(pass, stage->layer_params[i]);
    }
    arena_release(pass->saved, saved->marks[first]);
}

/* The gradient of what the last layer gave. */
static void output_gradient(struct transformer_stage *stage, const struct pass *pass,
                            struct tensor *d_x, const struct tensor *d_output,
                            struct stage_saved *saved)
{
    struct tensor d_normed;

    if (!stage->place.has_head) {
        stream_copy(pass->stream, d_x->data, d_output->data, tensor_size_bytes(d_x));
        return;
    }
    d_normed = new_activation(stage, pass, pass->scratch);
    lm_loss_backward(&stage->head, pass, &d_normed, &saved->head);
    norm_backward(&stage->final_norm, pass, d_x, &d_normed, NULL, &saved->final_norm);
    grads_ready(pass, stage->head_params);
}

void transformer_stage_backward(struct transformer_stage *stage, const struct pass *pass,
                                const struct tensor *d_output, struct tensor *d_input,
                                struct stage_saved *saved)
{
    const struct arena_mark mark = arena_mark(pass->scratch);
    struct tensor d_x = stage->place.has_embedding ? new_activation(stage, pass, pass->scratch)
                                                   : *d_input;

    output_gradient(stage, pass, &d_x, d_output, saved);
    for (int last = stage->place.num_layers - 1, first; last >= 0; last = first - 1) {
        for (first = last; !keeps_input(stage, first); first--) {
        }
        layer_group_backward(stage, pass, &d_x, first, last, saved);
    }
    if (stage->place.has_embedding) {
        embedding_layer_backward(&stage->embedding, pass, &d_x);
        grads_ready(pass, stage->embedding_params);
    }
    arena_release(pass->saved, saved->start);
    arena_release(pass->scratch, mark);
}

void transformer_stage_logits(struct transformer_stage *stage, const struct pass *pass,
                              struct kv_cache *caches, struct tensor *logits,
                              struct tensor *router_logits)
{
    const struct arena_mark mark = arena_mark(pass->saved);
    const struct tensor x = layers_without_saving(stage, pass, NULL, caches, router_logits);
    struct tensor normed = new_activation(stage, pass, pass->saved);
    struct norm_saved saved;

    norm_forward(&stage->final_norm, pass, &normed, &x, NULL, &saved);
    lm_loss_logits(&stage->head, pass, logits, &normed);
    arena_release(pass->saved, mark);
}

void transformer_stage_finish_batch(struct transformer_stage *stage, struct stream *stream)
{
    for (int i = 0; i < stage->place.num_layers; i++) {
        if (stage->layers[i].is_moe) {
            router_finish_batch(&stage->layers[i].moe.router, stream, stage->groups);
        }
    }
}
