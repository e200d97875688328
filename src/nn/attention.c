#include "nn/attention.h"

#include <math.h>
#include <stdio.h>

#include "base/check.h"
#include "ops/ops.h"

void attention_layer_init(struct attention_layer *attention, struct param_list *params,
                          const struct groups *groups, const struct attention_config *config)
{
    const int64_t queries_per_group = config->num_heads / config->num_groups;
    char qkv_name[PARAM_NAME_MAX], proj_name[PARAM_NAME_MAX];

    CHECK(config->num_heads % config->num_groups == 0 && config->num_groups % groups->tp->size == 0,
          "%lld heads in %lld groups over %d ranks", (long long)config->num_heads,
          (long long)config->num_groups, groups->tp->size);
    attention->config = *config;
    attention->num_groups = config->num_groups / groups->tp->size;
    attention->num_heads = attention->num_groups * queries_per_group;
    snprintf(qkv_name, sizeof qkv_name, "%s.linear_qkv", config->name);
    linear_init(&attention->qkv, params, groups,
                &(struct linear_config){
                    .name = qkv_name,
                    .split = LINEAR_COLUMN,
                    .num_out_dims = 3,
                    .out_dims = {config->num_groups, queries_per_group + 2, config->head_dim},
                    .in_features = config->hidden_size,
                    .bias = config->qkv_bias,
                    .init_std = config->init_std});
    snprintf(proj_name, sizeof proj_name, "%s.linear_proj", config->name);
    linear_init(&attention->proj, params, groups,
                &(struct linear_config){.name = proj_name,
                                        .split = LINEAR_ROW,
                                        .num_out_dims = 1,
                                        .out_dims = {config->hidden_size},
                                        .in_features = config->num_heads * config->head_dim,
                                        .bias = config->proj_bias,
                                        .init_std = config->proj_init_std});
}

/* Splits and rotates; with a cache k and v go to its rows after cache->length. */
static void split(const struct attention_layer *attention, const struct pass *pass,
                  const struct tensor *rope, const struct kv_cache *cache, struct tensor *qkv,
                  struct attention_saved *saved)
{
    const int64_t num_tokens = qkv->dim[0], head_dim = attention->config.head_dim;
    const int64_t num_groups = attention->num_groups;

    saved->q = tensor_new(pass->saved, qkv->dtype, num_tokens, attention->num_heads, head_dim);
    if (cache != NULL) {
        const int64_t num_new = num_tokens / pass->num_sequences;

        saved->k = tensor_rows(&cache->k, cache->length, num_new);
        saved->k = tensor_view(&saved->k, num_tokens, num_groups, head_dim);
        saved->v = tensor_rows(&cache->v, cache->length, num_new);
        saved->v = tensor_view(&saved->v, num_tokens, num_groups, head_dim);
    } else {
        saved->k = tensor_new(pass->saved, qkv->dtype, num_tokens, num_groups, head_dim);
        saved->v = tensor_new(pass->saved, qkv->dtype, num_tokens, num_groups, head_dim);
    }
    op_qkv_split_forward(pass->stream, &(struct qkv_split){
                                           .q = &saved->q,
                                           .k = &saved->k,
                                           .v = &saved->v,
                                           .qkv = qkv,
                                           .table = rope->data != NULL ? rope : NULL,
                                           .position = rope->data != NULL ? &pass->position : NULL,
                                           .interleaved = attention->config.rope_interleaved,
                                       });
}

/* [T, heads, D] as [S, B, heads, D]. */
static struct tensor by_sequence(const struct tensor *x, int64_t num_sequences)
{
    return tensor_view(x, x->dim[0] / num_sequences, num_sequences, x->dim[1], x->dim[2]);
}

/* The four-dimensional views that an attention call points to. */
struct attention_views {
    struct tensor q, k, v, out;
    struct attention call;
};

static void make_views(struct attention_views *views, const struct attention_layer *attention,
                       const struct pass *pass, const struct kv_cache *cache,
                       struct attention_saved *saved)
{
    const int64_t num_sequences = pass->num_sequences;
    const bool dropout = pass->training && attention->config.dropout > 0.0f;

    views->q = by_sequence(&saved->q, num_sequences);
    views->k = cache != NULL ? cache->k : by_sequence(&saved->k, num_sequences);
    views->v = cache != NULL ? cache->v : by_sequence(&saved->v, num_sequences);
    views->out = by_sequence(&saved->out, num_sequences);
    views->call = (struct attention){
        .scale = 1.0f / sqrtf((float)attention->config.head_dim),
        .causal = true,
        .q_start = cache != NULL ? cache->length : 0,
        .kv_length = views->q.dim[0] + (cache != NULL ? cache->length : 0),
        .q = &views->q,
        .k = &views->k,
        .v = &views->v,
        .out = &views->out,
        .lse = &saved->lse,
        .document_start = pass->document_start.data != NULL ? &pass->document_start : NULL,
        .dropout = {.p = dropout ? attention->config.dropout : 0.0f,
                    .key = rng_key(pass->seed, "attention_dropout", attention->config.layer)},
        .sample_id = dropout ? &pass->sample_id : NULL,
        .head_start = pass->groups->tp->rank * attention->num_heads,
        .num_heads_global = attention->config.num_heads,
    };
}

void attention_layer_forward(const struct attention_layer *attention, const struct pass *pass,
                             const struct tensor *rope, struct kv_cache *cache, struct tensor *y,
                             const struct tensor *x, struct attention_saved *saved)
{
    const struct arena_mark mark = arena_mark(pass->scratch);
    const int64_t num_tokens = pass->token.dim[0];
    struct attention_views views;
    struct tensor out,
        qkv = tensor_new(pass->scratch, pass->dtype, num_tokens, attention->qkv.out_features);

    saved->x = *x;
    linear_forward(&attention->qkv, pass, &qkv, x);
    split(attention, pass, rope, cache, &qkv, saved);
    saved->out = tensor_new(pass->saved, pass->dtype, num_tokens, attention->num_heads,
                            attention->config.head_dim);
    saved->lse = tensor_new(pass->saved, DTYPE_F32, pass->num_sequences, attention->num_heads,
                            num_tokens / pass->num_sequences);
    make_views(&views, attention, pass, cache, saved);
    op_attention_forward(pass->stream, &views.call);
    out = tensor_view(&saved->out, num_tokens, attention->proj.in_features);
    linear_forward(&attention->proj, pass, y, &out);
    arena_release(pass->scratch, mark);
}

/* d_qkv from d_out, through softmax attention and the rotation. */
static void attention_core_backward(const struct attention_layer *attention,
                                    const struct pass *pass, const struct tensor *rope,
                                    struct tensor *d_qkv, const struct tensor *d_out,
                                    struct attention_saved *saved)
{
    const int64_t num_sequences = pass->num_sequences;
    struct tensor d_q = tensor_allocate(pass->scratch, pass->dtype, saved->q.dim, 3);
    struct tensor d_k = tensor_allocate(pass->scratch, pass->dtype, saved->k.dim, 3);
    struct tensor d_v = tensor_allocate(pass->scratch, pass->dtype, saved->v.dim, 3);
    struct tensor d_q4 = by_sequence(&d_q, num_sequences), d_k4 = by_sequence(&d_k, num_sequences);
    struct tensor d_v4 = by_sequence(&d_v, num_sequences);
    const struct tensor d_out4 =
        tensor_view(d_out, d_q4.dim[0], d_q4.dim[1], d_q4.dim[2], d_q4.dim[3]);
    struct attention_views views;

    make_views(&views, attention, pass, NULL, saved);
    op_attention_backward(
        pass->stream,
        &(struct attention_backward){
            .forward = views.call, .d_out = &d_out4, .d_q = &d_q4, .d_k = &d_k4, .d_v = &d_v4});
    op_qkv_split_backward(pass->stream, &(struct qkv_split){
                                            .q = &d_q,
                                            .k = &d_k,
                                            .v = &d_v,
                                            .qkv = d_qkv,
                                            .table = rope->data != NULL ? rope : NULL,
                                            .position = rope->data != NULL ? &pass->position : NULL,
                                            .interleaved = attention->config.rope_interleaved,
                                        });
}

void attention_layer_backward(const struct attention_layer *attention, const struct pass *pass,
                              const struct tensor *rope, struct tensor *d_x,
                              const struct tensor *d_y, const struct attention_saved *saved)
{
    const struct arena_mark mark = arena_mark(pass->scratch);
    const int64_t num_tokens = pass->token.dim[0];
    const struct tensor out = tensor_view(&saved->out, num_tokens, attention->proj.in_features);
    struct tensor d_out =
        tensor_new(pass->scratch, pass->dtype, num_tokens, attention->proj.in_features);
    struct tensor d_qkv =
        tensor_new(pass->scratch, pass->dtype, num_tokens, attention->qkv.out_features);
    struct attention_saved views = *saved;

    linear_backward(&attention->proj, pass, &d_out, d_y, &out);
    attention_core_backward(attention, pass, rope, &d_qkv, &d_out, &views);
    linear_backward(&attention->qkv, pass, d_x, &d_qkv, &saved->x);
    arena_release(pass->scratch, mark);
}
