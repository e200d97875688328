#include "moe/router.h"

#include <math.h>
#include <stdio.h>

#include "moe/metrics.h"

/* The stopping rule of M1.9; the reference has no limit on the iterations. */
static const float sinkhorn_tolerance = 1e-4f;
enum { SINKHORN_ITERATIONS_MAX = 10000 };

void router_init(struct router *router, struct param_list *params, const struct groups *groups,
                 const struct router_config *config)
{
    struct param facts = {.num_dims = 2,
                          .global_shape = {config->num_experts, config->hidden_size},
                          .init = PARAM_INIT_NORMAL,
                          .init_std = config->init_std,
                          .weight_decay = true,
                          .sum_over_tp = groups->sequence_parallel,
                          .grad_is_product = true};

    snprintf(facts.name, sizeof facts.name, "%s.weight", config->name);
    facts.box = box_whole(facts.global_shape, 2);
    *router = (struct router){.config = *config, .weight = param_add(params, &facts)};
}

void router_allocate(struct router *router, struct stream *stream, struct arena *run)
{
    const int num_experts = router->config.num_experts;

    balance_init(&router->balance, &router->config.balance, stream, run);
    router->tokens_per_expert = tensor_new(run, DTYPE_F32, num_experts);
    op_fill_zero(stream, &router->tokens_per_expert);
    if (router->config.expert_bias) {
        router->expert_bias = tensor_new(run, DTYPE_F32, num_experts);
        op_fill_zero(stream, &router->expert_bias);
    }
}

int64_t router_capacity(const struct router *router, int64_t num_tokens)
{
    const struct router_config *config = &router->config;
    const double slots = (double)(num_tokens * config->rule.topk) / config->num_experts;
    int64_t capacity;

    if (config->capacity_factor <= 0.0) {
        return 0;
    }
    capacity = (int64_t)ceil(slots * config->capacity_factor);
    return capacity < num_tokens ? capacity : num_tokens;
}

static struct tensor jittered(const struct router *router, const struct pass *pass,
                              const struct tensor *x)
{
    struct tensor y;

    if (router->config.jitter_eps == 0.0f) {
        return *x;
    }
    y = tensor_allocate(pass->saved, x->dtype, x->dim, x->num_dims);
    op_jitter(pass->stream, &(struct jitter){.y = &y,
                                             .x = x,
                                             .token_id = &pass->token_id,
                                             .eps = router->config.jitter_eps,
                                             .key = rng_key(pass->seed, "router_jitter",
                                                            (uint64_t)router->config.layer)});
    return y;
}

/* Logits are f32. Products of bf16 numbers are exact in f32, so operands stay as they are. */
static void compute_logits(const struct router *router, const struct pass *pass,
                           struct router_saved *saved)
{
    if (router->config.force_load_balancing) {
        op_random_normal(pass->stream,
                         &(struct random_normal){.x = &saved->logits,
                                                 .token_id = &pass->token_id,
                                                 .key = rng_key(pass->seed, "router_force",
                                                                (uint64_t)router->config.layer)});
    } else {
        op_matmul(pass->stream, &(struct matmul){.c = &saved->logits,
                                                 .a = &saved->x,
                                                 .b = &router->weight->value,
                                                 .transpose_b = true});
    }
}

static void choose_experts(const struct router *router, const struct pass *pass,
                           struct router_saved *saved)
{
    const struct arena_mark mark = arena_mark(pass->scratch);
    const bool balanced = router->config.sinkhorn && pass->training;
    struct tensor assignment = {0};

    if (balanced) {
        assignment =
            tensor_new(pass->scratch, DTYPE_F32, saved->logits.dim[0], router->config.num_experts);
        op_router_sinkhorn(pass->stream,
                           &(struct router_sinkhorn){.assignment = &assignment,
                                                     .logits = &saved->logits,
                                                     .tolerance = sinkhorn_tolerance,
                                                     .max_iterations = SINKHORN_ITERATIONS_MAX});
    }
    op_router_topk_forward(
        pass->stream, &(struct router_topk){
                          .rule = router->config.rule,
                          .probs = &saved->probs,
                          .indices = &saved->chosen,
                          .logits = &saved->logits,
                          .selection = balanced ? &assignment : NULL,
                          .expert_bias = router->config.expert_bias ? &router->expert_bias : NULL});
    arena_release(pass->scratch, mark);
}

/* The balancing losses look at the plain top-k of the scores: without bias and groups (M1.7). */
static void add_balance_losses(struct router *router, const struct pass *pass,
                               struct router_saved *saved)
{
    const struct arena_mark mark = arena_mark(pass->scratch);
    struct tensor indices = saved->chosen;

    if (router->config.aux_has_own_topk) {
        struct router_rule plain = router->config.rule;
        struct tensor probs = tensor_allocate(pass->scratch, DTYPE_F32, saved->probs.dim, 2);

        plain.num_groups = 0;
        indices = tensor_allocate(pass->scratch, DTYPE_I32, saved->chosen.dim, 2);
        op_router_topk_forward(pass->stream, &(struct router_topk){.rule = plain,
                                                                   .probs = &probs,
                                                                   .indices = &indices,
                                                                   .logits = &saved->logits});
    }
    balance_forward(&router->balance, pass, &saved->logits, &indices, &saved->balance);
    arena_release(pass->scratch, mark);
}

/* c' = c / (TP * CP): a mean per rank, summed over these ranks by the gradient reduction (M1.3). */
static float z_loss_scale(const struct router *router, const struct pass *pass)
{
    return router->config.z_loss_coefficient / (float)pass->groups->tp_cp->size;
}

static void add_z_loss(const struct router *router, const struct pass *pass,
                       const struct router_saved *saved)
{
    const struct arena_mark mark = arena_mark(pass->scratch);
    struct tensor loss = tensor_new(pass->scratch, DTYPE_F32, 1);

    op_router_z_loss(pass->stream, &(struct router_z_loss){
                                       .loss = &loss, .logits = &saved->logits, .factor = 1.0f});
    if (!pass->recompute) {
        moe_metrics_add(pass->metrics, pass->stream, MOE_Z_LOSS, router->config.layer, &loss);
    }
    arena_release(pass->scratch, mark);
}

static void drop_over_capacity(const struct router *router, const struct pass *pass,
                               struct router_saved *saved)
{
    const int64_t capacity = router_capacity(router, saved->chosen.dim[0]);

    saved->indices = saved->chosen;
    if (capacity == 0) {
        return;
    }
    saved->indices = tensor_allocate(pass->saved, DTYPE_I32, saved->chosen.dim, 2);
    stream_copy(pass->stream, saved->indices.data, saved->chosen.data,
                tensor_size_bytes(&saved->chosen));
    op_router_drop(pass->stream, &(struct router_drop){.probs = &saved->probs,
                                                       .indices = &saved->indices,
                                                       .num_experts = router->config.num_experts,
                                                       .capacity = capacity,
                                                       .policy = router->config.drop_policy});
}

/* Kept slots per expert, for the expert bias. */
static void count_kept(struct router *router, const struct pass *pass,
                       const struct router_saved *saved)
{
    const struct arena_mark mark = arena_mark(pass->scratch);
    struct tensor counts = tensor_new(pass->scratch, DTYPE_F32, 1, router->config.num_experts);
    struct tensor score_sums = tensor_new(pass->scratch, DTYPE_F32, 1, router->config.num_experts);
    const struct tensor row = tensor_view(&counts, router->config.num_experts);

    op_router_balance(pass->stream, &(struct router_balance){.score = router->config.rule.score,
                                                             .counts = &counts,
                                                             .score_sums = &score_sums,
                                                             .logits = &saved->logits,
                                                             .indices = &saved->indices});
    op_linear_combination(pass->stream,
                          &(struct linear_combination){
                              .y = &router->tokens_per_expert, .x = &row, .a = 1.0f, .b = 1.0f});
    arena_release(pass->scratch, mark);
}

void router_forward(struct router *router, const struct pass *pass, const struct tensor *x,
                    struct router_saved *saved)
{
    const struct router_config *config = &router->config;
    const int64_t num_tokens = x->dim[0];

    saved->x = jittered(router, pass, x);
    saved->logits = tensor_new(pass->saved, DTYPE_F32, num_tokens, config->num_experts);
    saved->probs = tensor_new(pass->saved, DTYPE_F32, num_tokens, config->rule.topk);
    saved->chosen = tensor_new(pass->saved, DTYPE_I32, num_tokens, config->rule.topk);
    compute_logits(router, pass, saved);
    choose_experts(router, pass, saved);
    if (pass->training) {
        add_balance_losses(router, pass, saved);
        if (config->z_loss_coefficient != 0.0f) {
            add_z_loss(router, pass, saved);
        }
    }
    drop_over_capacity(router, pass, saved);
    if (config->expert_bias && pass->training && !pass->recompute) {
        count_kept(router, pass, saved);
    }
}

/* d_logits from the probabilities and the losses. */
static void logits_gradient(const struct router *router, const struct pass *pass,
                            struct tensor *d_logits, const struct tensor *d_probs,
                            const struct router_saved *saved)
{
    struct router_backward op = {.rule = router->config.rule,
                                 .d_logits = d_logits,
                                 .logits = &saved->logits,
                                 .d_probs = d_probs,
                                 .indices = &saved->chosen,
                                 .z_scale = pass->aux_loss_scale * z_loss_scale(router, pass)};

    balance_add_terms(&router->balance, pass, saved->logits.dim[0], &saved->balance, &op);
    op_router_backward(pass->stream, &op);
}

/* d_x += d_input, the gradient of the jittered x, times the jitter. */
static void add_through_jitter(const struct router *router, const struct pass *pass,
                               struct tensor *d_x, struct tensor *d_input)
{
    op_jitter(pass->stream, &(struct jitter){.y = d_input,
                                             .x = d_input,
                                             .token_id = &pass->token_id,
                                             .eps = router->config.jitter_eps,
                                             .key = rng_key(pass->seed, "router_jitter",
                                                            (uint64_t)router->config.layer)});
    op_linear_combination(
        pass->stream, &(struct linear_combination){.y = d_x, .x = d_input, .a = 1.0f, .b = 1.0f});
}

void router_backward(const struct router *router, const struct pass *pass, struct tensor *d_x,
                     const struct tensor *d_probs, const struct router_saved *saved)
{
    const struct arena_mark mark = arena_mark(pass->scratch);
    const bool jitters = router->config.jitter_eps != 0.0f;
    struct tensor d_logits = tensor_allocate(pass->scratch, DTYPE_F32, saved->logits.dim, 2);
    struct tensor d_input = *d_x;

    if (jitters) {
        d_input = tensor_allocate(pass->scratch, DTYPE_F32, d_x->dim, 2);
        op_fill_zero(pass->stream, &d_input);
    }
    logits_gradient(router, pass, &d_logits, d_probs, saved);
    op_router_linear_backward(
        pass->stream, &(struct router_linear_backward){.d_x = &d_input,
                                                       .d_weight = &router->weight->grad,
                                                       .d_logits = &d_logits,
                                                       .x = &saved->x,
                                                       .weight = &router->weight->value,
                                                       .overwrite_grads = pass->overwrite_grads});
    if (jitters) {
        add_through_jitter(router, pass, d_x, &d_input);
    }
    arena_release(pass->scratch, mark);
}

void router_finish_batch(struct router *router, struct stream *stream, const struct groups *groups)
{
    balance_reset(&router->balance, stream);
    if (!router->config.expert_bias) {
        return;
    }
    comm_wait(comm_all_reduce(groups->tp_cp, stream, &router->tokens_per_expert, COMM_SUM), stream);
    comm_wait(comm_all_reduce(groups->dp, stream, &router->tokens_per_expert, COMM_SUM), stream);
    op_expert_bias_update(stream,
                          &(struct expert_bias_update){.bias = &router->expert_bias,
                                                       .counts = &router->tokens_per_expert,
                                                       .rate = router->config.bias_update_rate});
    op_fill_zero(stream, &router->tokens_per_expert);
}
