#include "moe/moe_layer.h"

void moe_layer_init(struct moe_layer *moe, struct param_list *params, const struct groups *groups,
                    const struct moe_layer_config *config)
{
    *moe = (struct moe_layer){.recompute = config->recompute,
                              .dispatcher = dispatcher_select(config->dispatcher, groups),
                              .has_shared_expert = config->shared_expert.ffn_hidden_size > 0};
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

static void routed_forward(struct moe_layer *moe, const struct pass *pass, struct tensor *y,
                           const struct tensor *x, struct moe_saved *saved)
{
    const struct arena_mark mark = arena_mark(pass->scratch);
    const struct router_config *config = &moe->router.config;
    struct tensor y_rows;

    router_forward(&moe->router, pass, x, &saved->router);
    moe->dispatcher->dispatch(
        pass,
        &(struct dispatch_input){.x = x,
                                 .indices = &saved->router.indices,
                                 .probs = &saved->router.probs,
                                 .num_experts = config->num_experts,
                                 .padded_capacity = config->pad_to_capacity
                                                        ? router_capacity(&moe->router, x->dim[0])
                                                        : 0},
        &saved->rows);
    y_rows = tensor_new(pass->scratch, pass->dtype, saved->rows.num_rows, x->dim[1]);
    experts_layer_forward(&moe->experts, pass, &y_rows, &saved->rows, &saved->experts);
    moe->dispatcher->combine(pass, &saved->rows, y, &y_rows);
    arena_release(pass->scratch, mark);
}

/* y += shared_expert(x). */
static void add_shared_forward(struct moe_layer *moe, const struct pass *pass, struct tensor *y,
                               const struct tensor *x, struct moe_saved *saved)
{
    const struct arena_mark mark = arena_mark(pass->scratch);
    struct tensor shared = tensor_new(pass->scratch, pass->dtype, x->dim[0], x->dim[1]);

    mlp_forward(&moe->shared_expert, pass, &shared, x, &saved->shared_expert);
    op_add(pass->stream, &(struct add){.y = y, .u = y, .v = &shared});
    arena_release(pass->scratch, mark);
}

static void forward_and_save(struct moe_layer *moe, const struct pass *pass, struct tensor *y,
                             const struct tensor *x, struct moe_saved *saved)
{
    saved->x = *x;
    routed_forward(moe, pass, y, x, saved);
    if (moe->has_shared_expert) {
        add_shared_forward(moe, pass, y, x, saved);
    }
}

void moe_layer_forward(struct moe_layer *moe, const struct pass *pass, struct tensor *y,
                       const struct tensor *x, struct moe_saved *saved)
{
    const struct arena_mark mark = arena_mark(pass->saved);

    forward_and_save(moe, pass, y, x, saved);
    if (moe->recompute) {
        arena_release(pass->saved, mark);
    }
}

static void routed_backward(struct moe_layer *moe, const struct pass *pass, struct tensor *d_x,
                            const struct tensor *d_y, const struct moe_saved *saved)
{
    const struct arena_mark mark = arena_mark(pass->scratch);
    const int64_t num_rows = saved->rows.num_rows, hidden = d_x->dim[1];
    struct tensor d_rows = tensor_new(pass->scratch, pass->dtype, num_rows, hidden);
    struct tensor d_row_prob = tensor_new(pass->scratch, DTYPE_F32, num_rows);
    struct tensor d_probs = tensor_allocate(pass->scratch, DTYPE_F32, saved->router.probs.dim, 2);
    const struct tensor *d_y_row_token;
    struct tensor d_y_rows;

    moe->dispatcher->combine_backward(pass, &saved->rows, d_y, &d_y_rows, &d_y_row_token);
    experts_layer_backward(&moe->experts, pass, &d_rows, &d_row_prob, &d_y_rows, d_y_row_token,
                           &saved->rows, &saved->experts);
    moe->dispatcher->dispatch_backward(pass, &saved->rows, d_x, &d_probs, &d_rows, &d_row_prob);
    router_backward(&moe->router, pass, d_x, &d_probs, &saved->router);
    arena_release(pass->scratch, mark);
}

static void add_shared_backward(struct moe_layer *moe, const struct pass *pass, struct tensor *d_x,
                                const struct tensor *d_y, const struct moe_saved *saved)
{
    const struct arena_mark mark = arena_mark(pass->scratch);
    struct tensor d_shared = tensor_new(pass->scratch, pass->dtype, d_x->dim[0], d_x->dim[1]);

    mlp_backward(&moe->shared_expert, pass, &d_shared, d_y, &saved->shared_expert);
    op_add(pass->stream, &(struct add){.y = d_x, .u = d_x, .v = &d_shared});
    arena_release(pass->scratch, mark);
}

static void backward_of_saved(struct moe_layer *moe, const struct pass *pass, struct tensor *d_x,
                              const struct tensor *d_y, const struct moe_saved *saved)
{
    routed_backward(moe, pass, d_x, d_y, saved);
    if (moe->has_shared_expert) {
        add_shared_backward(moe, pass, d_x, d_y, saved);
    }
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
    forward_and_save(moe, &again, &y, &saved->x, &recomputed);
    arena_release(pass->scratch, scratch_mark);
    backward_of_saved(moe, pass, d_x, d_y, &recomputed);
    arena_release(pass->saved, saved_mark);
}
