#include "nn/attention.h"

#include <math.h>
#include <stdio.h>

#include "base/check.h"
#include "nn/attention_exchange.h"
#include "ops/ops.h"

void attention_layer_init(struct attention_layer *attention, struct param_list *params,
                          const struct groups *groups, const struct attention_config *config)
{
    const int64_t queries_per_group = config->num_heads / config->num_groups;
    char qkv_name[PARAM_NAME_MAX], proj_name[PARAM_NAME_MAX];

    CHECK(config->num_heads % config->num_groups == 0 && config->num_groups % groups->tp->size == 0,
          "%lld heads in %lld groups over %d ranks", (long long)config->num_heads,
          (long long)config->num_groups, groups->tp->size);
    CHECK(config->cp_comm_type != CP_COMM_A2A ||
              config->num_groups / groups->tp->size % groups->cp->size == 0,
          "%lld groups of a TP rank over %d ranks of the CP group",
          (long long)(config->num_groups / groups->tp->size), groups->cp->size);
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

static bool exchanges_heads(const struct attention_layer *attention, const struct pass *pass)
{
    return pass->groups->cp->size > 1 && attention->config.cp_comm_type == CP_COMM_A2A;
}

/* Memory for q, k and v of this rank's tokens; k and v are rows of one tensor, which can be sent at
 * once. With a cache k and v go to its rows after cache->length. */
static void place(const struct attention_layer *attention, const struct pass *pass,
                  const struct kv_cache *cache, int64_t num_tokens, struct attention_saved *saved)
{
    const int64_t num_groups = attention->num_groups, head_dim = attention->config.head_dim;
    struct arena *arena = exchanges_heads(attention, pass) ? pass->scratch : pass->saved;

    saved->q = tensor_new(arena, pass->dtype, num_tokens, attention->num_heads, head_dim);
    if (cache != NULL) {
        const int64_t num_new = num_tokens / pass->num_sequences;

        saved->k = tensor_rows(&cache->k, cache->length, num_new);
        saved->k = tensor_view(&saved->k, num_tokens, num_groups, head_dim);
        saved->v = tensor_rows(&cache->v, cache->length, num_new);
        saved->v = tensor_view(&saved->v, num_tokens, num_groups, head_dim);
    } else {
        const struct tensor kv =
            tensor_new(arena, pass->dtype, 2 * num_tokens, num_groups, head_dim);

        saved->k = tensor_rows(&kv, 0, num_tokens);
        saved->v = tensor_rows(&kv, num_tokens, num_tokens);
    }
}

/* q, k, v <-> qkv, with the rotation. */
static struct qkv_split split(const struct attention_layer *attention, const struct pass *pass,
                              const struct tensor *rope, struct tensor *q, struct tensor *k,
                              struct tensor *v, struct tensor *qkv)
{
    return (struct qkv_split){
        .q = q,
        .k = k,
        .v = v,
        .qkv = qkv,
        .table = rope->data != NULL ? rope : NULL,
        .position = rope->data != NULL ? &pass->position : NULL,
        .interleaved = attention->config.rope_interleaved,
    };
}

struct tensor attention_by_sequence(const struct tensor *x, int64_t num_sequences)
{
    return tensor_view(x, x->dim[0] / num_sequences, num_sequences, x->dim[1], x->dim[2]);
}

struct attention attention_call(const struct attention_layer *attention, const struct pass *pass)
{
    const bool dropout = pass->training && attention->config.dropout > 0.0f;

    return (struct attention){
        .scale = 1.0f / sqrtf((float)attention->config.head_dim),
        .causal = true,
        .dropout = {.p = dropout ? attention->config.dropout : 0.0f,
                    .key = rng_key(pass->seed, "attention_dropout", attention->config.layer)},
        .sample_id = dropout ? &pass->sample_id : NULL,
        .head_start = pass->groups->tp->rank * attention->num_heads,
        .num_heads_global = attention->config.num_heads,
    };
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

    views->q = attention_by_sequence(&saved->q, num_sequences);
    views->k = cache != NULL ? cache->k : attention_by_sequence(&saved->k, num_sequences);
    views->v = cache != NULL ? cache->v : attention_by_sequence(&saved->v, num_sequences);
    views->out = attention_by_sequence(&saved->out, num_sequences);
    views->call = attention_call(attention, pass);
    views->call.q_start = cache != NULL ? cache->length : 0;
    views->call.kv_length = views->q.dim[0] + views->call.q_start;
    views->call.q = &views->q;
    views->call.k = &views->k;
    views->call.v = &views->v;
    views->call.out = &views->out;
    views->call.lse = &saved->lse;
    views->call.document_start = pass->document_start.data != NULL ? &pass->document_start : NULL;
}

static void forward_alone(const struct attention_layer *attention, const struct pass *pass,
                          const struct kv_cache *cache, struct attention_saved *saved)
{
    struct attention_views views;

    saved->lse = tensor_new(pass->saved, DTYPE_F32, pass->num_sequences, attention->num_heads,
                            saved->q.dim[0] / pass->num_sequences);
    make_views(&views, attention, pass, cache, saved);
    op_attention_forward(pass->stream, &views.call);
}

/* saved->out and ->lse from ->q, ->k, ->v. */
static void attend_forward(const struct attention_layer *attention, const struct pass *pass,
                           const struct kv_cache *cache, struct attention_saved *saved)
{
    if (pass->groups->cp->size == 1) {
        forward_alone(attention, pass, cache, saved);
        return;
    }
    CHECK(cache == NULL, "generation with %d ranks of the CP group", pass->groups->cp->size);
    switch (attention->config.cp_comm_type) {
    case CP_COMM_P2P:
        attention_ring_forward(attention, pass, saved);
        return;
    case CP_COMM_ALL_GATHER:
        attention_gather_forward(attention, pass, saved);
        return;
    case CP_COMM_A2A:
        attention_heads_forward(attention, pass, saved);
        return;
    }
    PANIC("cp_comm_type %d", (int)attention->config.cp_comm_type);
}

void attention_layer_forward(const struct attention_layer *attention, const struct pass *pass,
                             const struct tensor *rope, struct kv_cache *cache, struct tensor *y,
                             const struct tensor *x, struct attention_saved *saved)
{
    const struct arena_mark mark = arena_mark(pass->scratch);
    const int64_t num_tokens = pass->token.dim[0];
    struct tensor out,
        qkv = tensor_new(pass->scratch, pass->dtype, num_tokens, attention->qkv.out_features);
    struct qkv_split call;

    saved->x = *x;
    linear_forward(&attention->qkv, pass, &qkv, x);
    place(attention, pass, cache, num_tokens, saved);
    call = split(attention, pass, rope, &saved->q, &saved->k, &saved->v, &qkv);
    op_qkv_split_forward(pass->stream, &call);
    saved->out = tensor_new(pass->saved, pass->dtype, num_tokens, attention->num_heads,
                            attention->config.head_dim);
    attend_forward(attention, pass, cache, saved);
    out = tensor_view(&saved->out, num_tokens, attention->proj.in_features);
    linear_forward(&attention->proj, pass, y, &out);
    arena_release(pass->scratch, mark);
}

static void backward_alone(const struct attention_layer *attention, const struct pass *pass,
                           struct attention_grads *grads, const struct tensor *d_out,
                           struct attention_saved *saved)
{
    const int64_t num_sequences = pass->num_sequences;
    struct tensor d_q = attention_by_sequence(&grads->d_q, num_sequences);
    struct tensor d_k = attention_by_sequence(&grads->d_k, num_sequences);
    struct tensor d_v = attention_by_sequence(&grads->d_v, num_sequences);
    const struct tensor d_out4 = attention_by_sequence(d_out, num_sequences);
    struct attention_views views;

    make_views(&views, attention, pass, NULL, saved);
    op_attention_backward(
        pass->stream,
        &(struct attention_backward){
            .forward = views.call, .d_out = &d_out4, .d_q = &d_q, .d_k = &d_k, .d_v = &d_v});
}

static void attend_backward(const struct attention_layer *attention, const struct pass *pass,
                            struct attention_grads *grads, const struct tensor *d_out,
                            struct attention_saved *saved)
{
    if (pass->groups->cp->size == 1) {
        backward_alone(attention, pass, grads, d_out, saved);
        return;
    }
    switch (attention->config.cp_comm_type) {
    case CP_COMM_P2P:
        attention_ring_backward(attention, pass, grads, d_out, saved);
        return;
    case CP_COMM_ALL_GATHER:
        attention_gather_backward(attention, pass, grads, d_out, saved);
        return;
    case CP_COMM_A2A:
        attention_heads_backward(attention, pass, grads, d_out, saved);
        return;
    }
    PANIC("cp_comm_type %d", (int)attention->config.cp_comm_type);
}

void attention_layer_backward(const struct attention_layer *attention, const struct pass *pass,
                              const struct tensor *rope, struct tensor *d_x,
                              const struct tensor *d_y, const struct attention_saved *saved)
{
    const struct arena_mark mark = arena_mark(pass->scratch);
    const int64_t num_tokens = pass->token.dim[0], head_dim = attention->config.head_dim;
    const struct tensor out = tensor_view(&saved->out, num_tokens, attention->proj.in_features);
    struct tensor d_out =
        tensor_new(pass->scratch, pass->dtype, num_tokens, attention->proj.in_features);
    struct tensor d_qkv =
        tensor_new(pass->scratch, pass->dtype, num_tokens, attention->qkv.out_features);
    struct attention_grads grads = {
        .d_q = tensor_new(pass->scratch, pass->dtype, num_tokens, attention->num_heads, head_dim),
        .d_k = tensor_new(pass->scratch, pass->dtype, num_tokens, attention->num_groups, head_dim),
        .d_v = tensor_new(pass->scratch, pass->dtype, num_tokens, attention->num_groups, head_dim)};
    const struct tensor d_heads = tensor_view(&d_out, num_tokens, attention->num_heads, head_dim);
    struct attention_saved views = *saved;
    struct qkv_split call;

    linear_backward(&attention->proj, pass, &d_out, d_y, &out);
    attend_backward(attention, pass, &grads, &d_heads, &views);
    call = split(attention, pass, rope, &grads.d_q, &grads.d_k, &grads.d_v, &d_qkv);
    op_qkv_split_backward(pass->stream, &call);
    linear_backward(&attention->qkv, pass, d_x, &d_qkv, &saved->x);
    arena_release(pass->scratch, mark);
}
