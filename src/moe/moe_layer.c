#include "moe/moe_layer.h"

#include "base/check.h"

/* A row's input, output and their gradients, and the activations of its expert. */
static struct row_limit row_limit_of(const struct moe_layer_config *config,
                                     const struct groups *groups)
{
    const int64_t halves = config->experts.activation == ACTIVATION_SWIGLU ? 2 : 1;
    const int64_t ffn_hidden_size = config->experts.ffn_hidden_size / groups->etp->size;
    const int64_t elements = 4 * config->experts.hidden_size + 2 * (halves + 1) * ffn_hidden_size;

    return (struct row_limit){.layer = config->router.layer,
                              .rank_capacity_factor = config->rank_capacity_factor,
                              .row_elements = elements};
}

void moe_layer_init(struct moe_layer *moe, struct param_list *params, const struct groups *groups,
                    const struct moe_layer_config *config)
{
    CHECK(groups->tp->size == 1 || groups->sequence_parallel,
          "experts with %d TP ranks that all hold all tokens", groups->tp->size);
    *moe = (struct moe_layer){.recompute = config->recompute,
                              .dispatcher = dispatcher_select(config->dispatcher, groups),
                              .has_shared_expert = config->shared_expert.ffn_hidden_size > 0};
    moe->shared_expert_overlap = config->shared_expert_overlap && moe->has_shared_expert;
    moe->row_limit = row_limit_of(config, groups);
    router_init(&moe->router, params, groups, &config->router);
    experts_init(&moe->experts, params, groups, &config->experts);
    if (moe->has_shared_expert) {
        mlp_init(&moe->shared_expert, params, groups, &config->shared_expert);
    }
}

void moe_layer_allocate(struct moe_layer *moe, struct stream *stream, struct arena *run)
{
    router_allocate(&moe->router, stream, run);
}

static struct dispatch_input dispatch_input(const struct moe_layer *moe, const struct tensor *x,
                                            const struct moe_saved *saved)
{
    const struct router_config *config = &moe->router.config;

    return (struct dispatch_input){
        .x = x,
        .indices = &saved->router.indices,
        .probs = &saved->router.probs,
        .num_experts = config->num_experts,
        .padded_capacity = config->pad_to_capacity ? router_capacity(&moe->router, x->dim[0]) : 0,
        .limit = &moe->row_limit,
    };
}

/* y = the routed experts' output (+ residual). With steps, the shared expert's come between. */
static void routed_forward(struct moe_layer *moe, const struct pass *pass, struct tensor *y,
                           const struct tensor *x, const struct tensor *residual,
                           struct moe_saved *saved, struct tensor *shared, struct mlp_steps *steps)
{
    const struct arena_mark mark = arena_mark(pass->scratch);
    const struct dispatcher *dispatcher = moe->dispatcher;
    struct dispatch_flight flight = {0};
    struct dispatch_input input;
    struct tensor y_rows;

    router_forward(&moe->router, pass, x, &saved->router);
    input = dispatch_input(moe, x, saved);
    dispatcher->dispatch_start(pass, &input, &saved->rows, &flight);
    if (steps != NULL) {
        mlp_forward_fc1(&moe->shared_expert, pass, &saved->shared_expert, steps);
    }
    dispatcher->dispatch_finish(pass, &saved->rows, &flight);
    y_rows = tensor_new(pass->scratch, pass->dtype, saved->rows.num_rows, x->dim[1]);
    experts_layer_forward(&moe->experts, pass, &y_rows, &saved->rows, &saved->experts);
    dispatcher->combine_start(pass, &saved->rows, y, &y_rows, residual, &flight);
    if (steps != NULL) {
        mlp_forward_fc2(&moe->shared_expert, pass, shared, &saved->shared_expert, steps);
    }
    dispatcher->combine_finish(pass, &saved->rows, y, residual, &flight);
    arena_release(pass->scratch, mark);
}

static void forward_and_save(struct moe_layer *moe, const struct pass *pass, struct tensor *y,
                             const struct tensor *x, const struct tensor *residual,
                             struct moe_saved *saved)
{
    const struct arena_mark mark = arena_mark(pass->scratch);
    const bool overlap = moe->shared_expert_overlap;
    struct tensor shared;
    struct mlp_steps steps;

    saved->x = *x;
    if (!moe->has_shared_expert) {
        routed_forward(moe, pass, y, x, residual, saved, NULL, NULL);
        return;
    }
    shared = tensor_new(pass->scratch, pass->dtype, x->dim[0], x->dim[1]);
    if (overlap) {
        mlp_forward_enter(&moe->shared_expert, pass, x, &saved->shared_expert, &steps);
    }
    routed_forward(moe, pass, y, x, residual, saved, &shared, overlap ? &steps : NULL);
    if (overlap) {
        mlp_leave(pass, &steps);
    } else {
        mlp_forward(&moe->shared_expert, pass, &shared, x, &saved->shared_expert);
    }
    op_add(pass->stream, &(struct add){.y = y, .u = y, .v = &shared});
    arena_release(pass->scratch, mark);
}

void moe_layer_forward(struct moe_layer *moe, const struct pass *pass, struct tensor *y,
                       const struct tensor *x, const struct tensor *residual,
                       struct moe_saved *saved)
{
    const struct arena_mark mark = arena_mark(pass->saved);

    forward_and_save(moe, pass, y, x, residual, saved);
    if (moe->recompute) {
        arena_release(pass->saved, mark);
    }
}

/* d_x = through the routed experts and the router. With steps, the shared expert's come between. */
static void routed_backward(struct moe_layer *moe, const struct pass *pass, struct tensor *d_x,
                            const struct tensor *d_y, const struct moe_saved *saved,
                            struct tensor *d_shared, struct mlp_steps *steps)
{
    const struct arena_mark mark = arena_mark(pass->scratch);
    const struct dispatcher *dispatcher = moe->dispatcher;
    const int64_t num_rows = saved->rows.num_rows, hidden = d_x->dim[1];
    struct tensor d_rows = tensor_new(pass->scratch, pass->dtype, num_rows, hidden);
    struct tensor d_row_prob = tensor_new(pass->scratch, DTYPE_F32, num_rows);
    struct tensor d_probs = tensor_allocate(pass->scratch, DTYPE_F32, saved->router.probs.dim, 2);
    struct dispatch_flight flight = {0};
    const struct tensor *d_y_row_token;
    struct tensor d_y_rows;

    dispatcher->combine_backward_start(pass, &saved->rows, d_y, &d_y_rows, &flight);
    if (steps != NULL) {
        mlp_backward_fc2(&moe->shared_expert, pass, &saved->shared_expert, steps);
    }
    dispatcher->combine_backward_finish(pass, &saved->rows, &d_y_rows, &d_y_row_token, &flight);
    experts_layer_backward(&moe->experts, pass, &d_rows, &d_row_prob, &d_y_rows, d_y_row_token,
                           &saved->rows, &saved->experts);
    dispatcher->dispatch_backward_start(pass, &saved->rows, d_x, &d_probs, &d_rows, &d_row_prob,
                                        &flight);
    if (steps != NULL) {
        mlp_backward_fc1(&moe->shared_expert, pass, d_shared, steps);
    }
    dispatcher->dispatch_backward_finish(pass, &saved->rows, d_x, &d_probs, &flight);
    router_backward(&moe->router, pass, d_x, &d_probs, &saved->router);
    arena_release(pass->scratch, mark);
}

static void backward_of_saved(struct moe_layer *moe, const struct pass *pass, struct tensor *d_x,
                              const struct tensor *d_y, const struct moe_saved *saved)
{
    const struct arena_mark mark = arena_mark(pass->scratch);
    const bool overlap = moe->shared_expert_overlap;
    struct tensor d_shared;
    struct mlp_steps steps;

    if (!moe->has_shared_expert) {
        routed_backward(moe, pass, d_x, d_y, saved, NULL, NULL);
        return;
    }
    d_shared = tensor_new(pass->scratch, pass->dtype, d_x->dim[0], d_x->dim[1]);
    if (overlap) {
        mlp_backward_enter(&moe->shared_expert, pass, d_y, &saved->shared_expert, &steps);
    }
    routed_backward(moe, pass, d_x, d_y, saved, &d_shared, overlap ? &steps : NULL);
    if (overlap) {
        mlp_leave(pass, &steps);
    } else {
        mlp_backward(&moe->shared_expert, pass, &d_shared, d_y, &saved->shared_expert);
    }
    op_add(pass->stream, &(struct add){.y = d_x, .u = d_x, .v = &d_shared});
    arena_release(pass->scratch, mark);
}

void moe_layer_backward(struct moe_layer *moe, const struct pass *pass, struct tensor *d_x,
                        const struct tensor *d_y, const struct moe_saved *saved)
{
    struct arena_mark saved_mark, scratch_mark;
    struct pass again = *pass;
    struct moe_saved recomputed;
    struct tensor y;

    if (!moe->recompute) {
        backward_of_saved(moe, pass, d_x, d_y, saved);
        return;
    }
    saved_mark = arena_mark(pass->saved);
    scratch_mark = arena_mark(pass->scratch);
    again.recompute = true;
    y = tensor_new(pass->scratch, pass->dtype, d_y->dim[0], d_y->dim[1]);
    forward_and_save(moe, &again, &y, &saved->x, NULL, &recomputed);
    arena_release(pass->scratch, scratch_mark);
    backward_of_saved(moe, pass, d_x, d_y, &recomputed);
    arena_release(pass->saved, saved_mark);
}
