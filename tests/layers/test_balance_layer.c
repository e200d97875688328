/* The balancing losses: small cases worked by hand, and gradients through the router. */
#include "reference_moe.h"

/* One router over H = E features, whose weight is the identity: x are the logits. */
static void build(struct router *router, int num_experts, int topk, enum router_score score,
                  enum balance_type type, float coefficient)
{
    struct router_config config = {
        .name = "router",
        .hidden_size = num_experts,
        .num_experts = num_experts,
        .rule = {.score = score, .topk = topk, .scaling_factor = 1.0f},
        .balance = {.score = score, .topk = topk, .num_experts = num_experts}};

    config.balance.coefficient[type] = coefficient;
    router_init(router, &world.params, &world.groups, &config);
    param_list_allocate(&world.params, world.run, stream, DTYPE_F32, true);
    router_allocate(router, stream, world.run);
    for (int e = 0; e < num_experts; e++) {
        tensor_set(&router->weight->value, e * num_experts + e, 1.0);
    }
}

/* The loss that the layer logs for these logits. */
static float logged_loss(struct router *router, enum moe_metric metric, const struct tensor *x,
                         struct router_saved *saved)
{
    static struct moe_metrics metrics; /* the pass keeps pointing to it */
    float value;

    moe_metrics_init(&metrics, stream, world.run, 1);
    world.pass.metrics = &metrics;
    router_forward(router, &world.pass, x, saved);
    stream_copy_to_host(stream, &value, metrics.sums[metric].data, sizeof value);
    return value;
}

/* Two tokens, two experts, top-1, logits (ln 3, 0) twice: s = (3/4, 1/4), n = (2, 0).
 * loss = 2 / (2 * 2 * 1) * 2 * (3/4 + 3/4) = 3/2.
 * d_loss/d_logit_t0 = 2 / 4 * n_0 * s_0 (1 - s_0) = 3/16, and -3/16 for the other. */
static void aux_loss_of_two_tokens_that_agree(void **state)
{
    const float ln3 = logf(3.0f), logits[4] = {ln3, 0.0f, ln3, 0.0f};
    struct tensor x = tensor_new(arena, DTYPE_F32, 2, 2), d_x = zero_tensor(DTYPE_F32, 2, 2);
    struct tensor d_probs = zero_tensor(DTYPE_F32, 2, 1);
    struct router_saved saved;
    struct router router;

    memcpy(x.data, logits, sizeof logits);
    build(&router, 2, 1, ROUTER_SOFTMAX, BALANCE_AUX_LOSS, 0.5f);
    world_make_pass(2, 1, 2);
    assert_float_equal(logged_loss(&router, MOE_LOAD_BALANCING_LOSS, &x, &saved), 1.5f, 1e-6);
    world.pass.aux_loss_scale = 4.0f;
    router_backward(&router, &world.pass, &d_x, &d_probs, &saved);
    for (int t = 0; t < 2; t++) { /* times coefficient and scale: 0.5 * 4 */
        assert_float_equal(tensor_get(&d_x, t * 2), 2.0 * 3.0 / 16.0, 1e-6);
        assert_float_equal(tensor_get(&d_x, t * 2 + 1), -2.0 * 3.0 / 16.0, 1e-6);
    }
}

/* Equal scores give 1 whatever the counts, for any k. */
static void equal_scores_give_one(void **state)
{
    struct tensor x = zero_tensor(DTYPE_F32, 12, 4);
    struct router_saved saved;
    struct router router;

    build(&router, 4, 3, ROUTER_SOFTMAX, BALANCE_AUX_LOSS, 1.0f);
    world_make_pass(12, 1, 2);
    assert_float_equal(logged_loss(&router, MOE_LOAD_BALANCING_LOSS, &x, &saved), 1.0f, 1e-6);
}

/* Sigmoid scores count as s / sum s: logits (0, -inf'ish) give s = (1, 0) and n = (T, 0): loss = E
 * = 2. */
static void sigmoid_scores_are_normalised(void **state)
{
    struct tensor x = tensor_new(arena, DTYPE_F32, 3, 2);
    struct router_saved saved;
    struct router router;

    for (int i = 0; i < 6; i++) {
        tensor_set(&x, i, i % 2 == 0 ? 0.0 : -40.0);
    }
    build(&router, 2, 1, ROUTER_SIGMOID, BALANCE_AUX_LOSS, 1.0f);
    world_make_pass(3, 1, 2);
    assert_float_equal(logged_loss(&router, MOE_LOAD_BALANCING_LOSS, &x, &saved), 2.0f, 1e-6);
}

/* Two sequences, each all for one expert (0, and 1): unbalanced each, balanced together.
 * In a sequence of 2 tokens: 2 / (2 * 2) * 2 * (3/4 + 3/4) = 3/2; together: 2 / (4 * 4) * (2 * 2 +
 * 2 * 2) = 1. */
static void seq_aux_loss_counts_every_sequence_apart(void **state)
{
    const float ln3 = logf(3.0f), logits[8] = {ln3, 0.0f, 0.0f, ln3, ln3, 0.0f, 0.0f, ln3};
    struct tensor x = tensor_new(arena, DTYPE_F32, 4, 2); /* token t = s * 2 + b */
    struct router_saved saved;
    struct router router;

    memcpy(x.data, logits, sizeof logits);
    build(&router, 2, 1, ROUTER_SOFTMAX, BALANCE_SEQ_AUX_LOSS, 1.0f);
    router.config.balance.coefficient[BALANCE_AUX_LOSS] = 1.0f;
    router.balance.config.coefficient[BALANCE_AUX_LOSS] = 1.0f;
    world_make_pass(2, 2, 2);
    assert_float_equal(logged_loss(&router, MOE_SEQ_LOAD_BALANCING_LOSS, &x, &saved), 1.5f, 1e-6);
    assert_float_equal(logged_loss(&router, MOE_LOAD_BALANCING_LOSS, &x, &saved), 1.0f, 1e-6);
}

/* With one sequence the losses are the same bits. */
static void one_sequence_gives_aux_loss(void **state)
{
    struct tensor x = normal_tensor(1.0, DTYPE_F32, 9, 4);
    struct router_saved saved;
    struct router router;
    float of_sequence, of_all;

    build(&router, 4, 2, ROUTER_SOFTMAX, BALANCE_SEQ_AUX_LOSS, 1.0f);
    router.balance.config.coefficient[BALANCE_AUX_LOSS] = 1.0f;
    world_make_pass(9, 1, 2);
    of_sequence = logged_loss(&router, MOE_SEQ_LOAD_BALANCING_LOSS, &x, &saved);
    of_all = logged_loss(&router, MOE_LOAD_BALANCING_LOSS, &x, &saved);
    assert_true(of_sequence == of_all);
}

/* Microbatch 1 is all for expert 0, microbatch 2 all for expert 1. The counts of the second are the
 * mean of both, (1, 1): loss = 2 / (2 * 2) * (1 * 1/2 + 1 * 3/2) = 1. After the batch the counts
 * begin anew. */
static void global_aux_loss_averages_over_the_microbatches(void **state)
{
    const float ln3 = logf(3.0f), first[4] = {ln3, 0.0f, ln3, 0.0f},
                second[4] = {0.0f, ln3, 0.0f, ln3};
    struct tensor x = tensor_new(arena, DTYPE_F32, 2, 2);
    struct router_saved saved;
    struct router router;

    build(&router, 2, 1, ROUTER_SOFTMAX, BALANCE_GLOBAL_AUX_LOSS, 1.0f);
    world_make_pass(2, 1, 2);
    for (int batch = 0; batch < 2; batch++) {
        memcpy(x.data, first, sizeof first);
        assert_float_equal(logged_loss(&router, MOE_GLOBAL_LOAD_BALANCING_LOSS, &x, &saved), 1.5f,
                           1e-6);
        memcpy(x.data, second, sizeof second);
        assert_float_equal(logged_loss(&router, MOE_GLOBAL_LOAD_BALANCING_LOSS, &x, &saved), 1.0f,
                           1e-6);
        router_finish_batch(&router, stream, &world.groups);
    }
}

/* A recomputed forward sees the same counts, logs nothing and adds nothing. */
static void recomputation_feeds_no_counter(void **state)
{
    struct tensor x = normal_tensor(1.0, DTYPE_F32, 6, 4);
    struct router_saved saved, again;
    struct router router;
    struct pass recompute;

    build(&router, 4, 2, ROUTER_SOFTMAX, BALANCE_GLOBAL_AUX_LOSS, 1.0f);
    world_make_pass(6, 1, 2);
    assert_true(logged_loss(&router, MOE_GLOBAL_LOAD_BALANCING_LOSS, &x, &saved) > 0.0f);
    moe_metrics_clear(world.pass.metrics, stream);
    recompute = world.pass;
    recompute.recompute = true;
    router_forward(&router, &recompute, &x, &again);
    assert_same_bits(&saved.balance.counts[BALANCE_GLOBAL_AUX_LOSS],
                     &again.balance.counts[BALANCE_GLOBAL_AUX_LOSS]);
    assert_true(tensor_get(&world.pass.metrics->sums[MOE_GLOBAL_LOAD_BALANCING_LOSS], 0) == 0.0);
    assert_int_equal(router.balance.num_microbatches, 1);
}

/* ---- gradients ---- */

enum { S = 6, B = 3, T = S * B, H = 5, E = 6, K = 2 };

struct balance_case {
    struct router router;
    struct routing routing;
    double *x;
};

static double balance_loss(const void *context)
{
    const struct balance_case *c = context;

    return (double)world.pass.aux_loss_scale *
           reference_router_losses(&c->router, &c->routing,
                                   reference_router_logits(&c->router, c->x, T), T);
}

static void check_balance_gradient(struct router_config config)
{
    struct tensor x = normal_tensor(1.0, DTYPE_F32, T, H), d_x = zero_tensor(DTYPE_F32, T, H);
    struct tensor d_probs = zero_tensor(DTYPE_F32, T, K);
    struct router_saved saved;
    struct balance_case c;

    config.name = "router";
    config.hidden_size = H;
    config.num_experts = config.balance.num_experts = E;
    config.rule.topk = config.balance.topk = K;
    config.rule.scaling_factor = 1.0f;
    config.balance.score = config.rule.score;
    router_init(&c.router, &world.params, &world.groups, &config);
    world_fill_params(1.0);
    router_allocate(&c.router, stream, world.run);
    world_make_pass(S, B, 2);
    c.x = doubles_of(&x);
    router_forward(&c.router, &world.pass, &x, &saved); /* the first microbatch of a batch */
    router_forward(&c.router, &world.pass, &x, &saved);
    c.routing = routing_of(&c.router, &saved);
    router_backward(&c.router, &world.pass, &d_x, &d_probs, &saved);
    check_gradients(balance_loss, &c, c.x, &d_x);
}

static void gradient_of_aux_loss(void **state)
{
    check_balance_gradient((struct router_config){.balance.coefficient[BALANCE_AUX_LOSS] = 0.7f});
}

static void gradient_of_aux_loss_with_sigmoid(void **state)
{
    check_balance_gradient((struct router_config){.rule.score = ROUTER_SIGMOID,
                                                  .balance.coefficient[BALANCE_AUX_LOSS] = 0.7f});
}

static void gradient_of_seq_aux_loss(void **state)
{
    check_balance_gradient(
        (struct router_config){.balance.coefficient[BALANCE_SEQ_AUX_LOSS] = 0.7f});
}

static void gradient_of_global_aux_loss(void **state)
{
    check_balance_gradient(
        (struct router_config){.balance.coefficient[BALANCE_GLOBAL_AUX_LOSS] = 0.7f});
}

static void gradient_of_all_losses_together(void **state)
{
    check_balance_gradient((struct router_config){.balance.coefficient = {0.7f, 0.2f, 0.4f},
                                                  .z_loss_coefficient = 0.1f});
}

/* The losses look at a plain top-k: not at the bias, which sends every token to experts 0 and 1. */
static void losses_do_not_see_the_bias(void **state)
{
    struct tensor x = normal_tensor(1.0, DTYPE_F32, 40, 4);
    struct router_saved saved;
    struct router router;
    double counts[4];

    build(&router, 4, 2, ROUTER_SIGMOID, BALANCE_AUX_LOSS, 1.0f);
    router.config.expert_bias = router.config.aux_has_own_topk = true;
    router.expert_bias = zero_tensor(DTYPE_F32, 4);
    tensor_set(&router.expert_bias, 0, 5.0);
    tensor_set(&router.expert_bias, 1, 5.0);
    world_make_pass(40, 1, 2);
    logged_loss(&router, MOE_LOAD_BALANCING_LOSS, &x, &saved);
    for (int e = 0; e < 4; e++) {
        counts[e] = tensor_get(&saved.balance.counts[BALANCE_AUX_LOSS], e);
    }
    assert_true(counts[0] + counts[1] + counts[2] + counts[3] == 80.0);
    assert_true(counts[2] > 0.0 && counts[3] > 0.0);
    for (int slot = 0; slot < 80; slot++) {
        assert_in_range(((const int32_t *)saved.chosen.data)[slot], 0, 1);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        layer_test(aux_loss_of_two_tokens_that_agree),
        layer_test(equal_scores_give_one),
        layer_test(sigmoid_scores_are_normalised),
        layer_test(seq_aux_loss_counts_every_sequence_apart),
        layer_test(one_sequence_gives_aux_loss),
        layer_test(global_aux_loss_averages_over_the_microbatches),
        layer_test(recomputation_feeds_no_counter),
        layer_test(gradient_of_aux_loss),
        layer_test(gradient_of_aux_loss_with_sigmoid),
        layer_test(gradient_of_seq_aux_loss),
        layer_test(gradient_of_global_aux_loss),
        layer_test(gradient_of_all_losses_together),
        layer_test(losses_do_not_see_the_bias),
    };

    return cmocka_run_group_tests(tests, reference_start, reference_stop);
}
