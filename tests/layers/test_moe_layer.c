/* moe_layer: the whole block against plain loops and finite differences, and what must give the
 * same bits: sequential and grouped experts, recomputation. */
#include "reference_moe.h"

enum { H = 6, F = 7, E = 5, K = 2 };

struct moe_case {
    struct moe_layer moe;
    struct routing routing;
    int64_t num_tokens;
    double *x, *d_y;
};

static double moe_loss(const void *context)
{
    const struct moe_case *c = context;
    double losses = 0.0;
    const double *y = reference_moe(&c->moe, &c->routing, c->x, c->num_tokens, &losses);

    return dot(y, c->d_y, c->num_tokens * H) + (double)world.pass.aux_loss_scale * losses;
}

static struct moe_layer_config plain_config(void)
{
    return (struct moe_layer_config){.router = {.name = "router",
                                                .hidden_size = H,
                                                .num_experts = E,
                                                .rule = {.topk = K, .scaling_factor = 1.0f},
                                                .balance = {.topk = K, .num_experts = E}},
                                     .experts = {.name = "experts",
                                                 .hidden_size = H,
                                                 .ffn_hidden_size = F,
                                                 .num_experts = E,
                                                 .activation = ACTIVATION_SWIGLU,
                                                 .grouped = true},
                                     .shared_expert = {.name = "shared_experts",
                                                       .hidden_size = H,
                                                       .activation = ACTIVATION_SWIGLU}};
}

static void build(struct moe_layer *moe, const struct moe_layer_config *config, int64_t s,
                  int64_t b)
{
    moe_layer_init(moe, &world.params, &world.groups, config);
    world_fill_params(0.7);
    moe_layer_allocate(moe, stream, world.run);
    world_make_pass(s, b, 2);
}

/* Forward and backward of c->moe, which has been built, on new inputs. */
static struct moe_saved check_moe(struct moe_case *c)
{
    const int64_t t = world.pass.token.dim[0];
    struct tensor x = normal_tensor(1.0, DTYPE_F32, t, H), y = poisoned_tensor(DTYPE_F32, t, H);
    struct tensor d_y = normal_tensor(1.0, DTYPE_F32, t, H);
    struct tensor d_x = poisoned_tensor(DTYPE_F32, t, H);
    struct moe_saved saved;
    double losses = 0.0;

    c->num_tokens = t;
    c->x = doubles_of(&x);
    c->d_y = doubles_of(&d_y);
    moe_layer_forward(&c->moe, &world.pass, &y, &x, NULL, &saved);
    c->routing = routing_of(&c->moe.router, &saved.router);
    assert_close(&y, reference_moe(&c->moe, &c->routing, c->x, t, &losses), 1e-5);
    moe_layer_backward(&c->moe, &world.pass, &d_x, &d_y, &saved);
    check_gradients(moe_loss, c, c->x, &d_x);
    assert_scratch_is_empty();
    return saved;
}

static void swiglu_experts(void **state)
{
    const struct moe_layer_config config = plain_config();
    struct moe_case c;

    build(&c.moe, &config, 5, 2);
    check_moe(&c);
}

static void gelu_experts_with_biases_one_after_another(void **state)
{
    struct moe_layer_config config = plain_config();
    struct moe_case c;

    config.experts.activation = ACTIVATION_GELU;
    config.experts.bias = true;
    config.experts.grouped = false;
    build(&c.moe, &config, 5, 2);
    check_moe(&c);
}

static void squared_relu_experts_with_pre_softmax_top_1(void **state)
{
    struct moe_layer_config config = plain_config();
    struct moe_case c;

    config.experts.activation = ACTIVATION_SQUARED_RELU;
    config.router.rule.topk = config.router.balance.topk = 1;
    config.router.rule.pre_softmax = true;
    build(&c.moe, &config, 6, 1);
    check_moe(&c);
}

static void shared_expert_and_every_loss(void **state)
{
    struct moe_layer_config config = plain_config();
    struct moe_case c;

    config.shared_expert.ffn_hidden_size = 9;
    config.router.jitter_eps = 0.1f;
    config.router.z_loss_coefficient = 0.2f;
    config.router.balance.coefficient[BALANCE_AUX_LOSS] = 0.3f;
    config.router.balance.coefficient[BALANCE_SEQ_AUX_LOSS] = 0.4f;
    config.router.balance.coefficient[BALANCE_GLOBAL_AUX_LOSS] = 0.5f;
    build(&c.moe, &config, 4, 3);
    check_moe(&c);
}

static void sigmoid_scores_scaled_with_biases(void **state)
{
    struct moe_layer_config config = plain_config();
    struct moe_case c;

    config.router.rule.score = ROUTER_SIGMOID;
    config.router.rule.scaling_factor = 2.5f;
    config.experts.bias = true;
    build(&c.moe, &config, 5, 2);
    check_moe(&c);
}

static void check_capacity(enum drop_policy policy, bool pad, bool grouped)
{
    struct moe_layer_config config = plain_config();
    struct moe_saved saved;
    struct moe_case c;

    config.router.capacity_factor = 0.7;
    config.router.drop_policy = policy;
    config.router.pad_to_capacity = pad;
    config.experts.grouped = grouped;
    build(&c.moe, &config, 7, 2);
    saved = check_moe(&c);
    /* 14 tokens, 28 slots, 5 experts: ceil(5.6 * 0.7) = 4 */
    assert_int_equal(saved.rows.num_rows, pad ? 4 * E : 28);
}

static void capacity_by_probs(void **state)
{
    check_capacity(DROP_BY_PROBS, false, true);
}

static void capacity_by_probs_padded(void **state)
{
    check_capacity(DROP_BY_PROBS, true, true);
}

static void capacity_by_position(void **state)
{
    check_capacity(DROP_BY_POSITION, false, false);
}

static void capacity_by_position_padded(void **state)
{
    check_capacity(DROP_BY_POSITION, true, false);
}

/* Every token goes to experts 0 and 1. */
static void experts_without_tokens_get_no_gradient(void **state)
{
    for (int grouped = 0; grouped < 2; grouped++) {
        struct moe_layer_config config = plain_config();
        struct moe_case c;

        world_end(state);
        world_begin(state);
        config.router.rule.score = ROUTER_SIGMOID;
        config.router.expert_bias = true;
        config.experts.bias = true;
        config.experts.grouped = grouped == 1;
        build(&c.moe, &config, 5, 2);
        tensor_set(&c.moe.router.expert_bias, 0, 9.0);
        tensor_set(&c.moe.router.expert_bias, 1, 9.0);
        check_moe(&c);
        for (int i = 2 * H * F; i < E * H * F; i++) {
            assert_true(tensor_get(&c.moe.experts.fc2->grad, i) == (double)grad_start);
        }
    }
}

static void one_token(void **state)
{
    struct moe_layer_config config = plain_config();
    struct moe_case c;

    config.shared_expert.ffn_hidden_size = 3;
    build(&c.moe, &config, 1, 1);
    check_moe(&c);
}

/* ---- the same bits ---- */

enum { S = 24, B = 2, T = S * B };

struct moe_result {
    struct tensor y, d_x, grads, metrics;
};

/* Forward and backward, twice (two microbatches), of a variant of the layer that has been built.
 * The variant shares the parameters. */
static struct moe_result run_variant(const struct moe_layer *built, bool grouped, bool recompute,
                                     const struct tensor *x, const struct tensor *d_y)
{
    struct moe_result result = {.y = poisoned_tensor(DTYPE_F32, T, H),
                                .d_x = poisoned_tensor(DTYPE_F32, T, H)};
    struct moe_layer moe = *built;
    struct moe_metrics metrics;
    struct moe_saved saved;

    moe.experts.config.grouped = grouped;
    moe.recompute = recompute;
    moe_layer_allocate(&moe, stream, world.run);
    moe_metrics_init(&metrics, stream, world.run, 1);
    world.pass.metrics = &metrics;
    world_reset_grads();
    for (int microbatch = 0; microbatch < 2; microbatch++) {
        const struct arena_mark mark = arena_mark(world.saved);

        moe_layer_forward(&moe, &world.pass, &result.y, x, NULL, &saved);
        assert_true(!recompute || arena_used_bytes(world.saved) == mark.total_bytes);
        moe_layer_backward(&moe, &world.pass, &result.d_x, d_y, &saved);
        arena_release(world.saved, mark);
    }
    result.grads = copy_of(&world.params.grads);
    result.metrics = copy_of(&metrics.sums[MOE_LOAD_BALANCING_LOSS]);
    return result;
}

static void assert_same_result(const struct moe_result *a, const struct moe_result *b)
{
    assert_same_bits(&a->y, &b->y);
    assert_same_bits(&a->d_x, &b->d_x);
    assert_same_bits(&a->grads, &b->grads);
    assert_same_bits(&a->metrics, &b->metrics);
}

static void check_variants(struct moe_layer_config config)
{
    struct tensor x = normal_tensor(1.0, DTYPE_F32, T, H),
                  d_y = normal_tensor(1.0, DTYPE_F32, T, H);
    struct moe_result sequential, other;
    struct moe_layer moe;

    config.router.balance.coefficient[BALANCE_AUX_LOSS] = 0.1f;
    config.router.balance.coefficient[BALANCE_GLOBAL_AUX_LOSS] = 0.1f;
    build(&moe, &config, S, B);
    sequential = run_variant(&moe, false, false, &x, &d_y);
    for (int variant = 1; variant < 4; variant++) {
        other = run_variant(&moe, variant % 2 == 1, variant >= 2, &x, &d_y);
        assert_same_result(&sequential, &other);
    }
}

static void variants_give_the_same_bits(void **state)
{
    struct moe_layer_config config = plain_config();

    config.experts.bias = true;
    config.shared_expert.ffn_hidden_size = 8;
    check_variants(config);
}

static void variants_give_the_same_bits_with_drops_and_jitter(void **state)
{
    struct moe_layer_config config = plain_config();

    config.router.capacity_factor = 0.8;
    config.router.jitter_eps = 0.2f;
    check_variants(config);
}

static void variants_give_the_same_bits_when_padded(void **state)
{
    struct moe_layer_config config = plain_config();

    config.router.capacity_factor = 1.3;
    config.router.pad_to_capacity = true;
    check_variants(config);
}

/* Evaluation adds no loss and leaves the counters alone. */
static void evaluation_logs_nothing(void **state)
{
    struct moe_layer_config config = plain_config();
    struct tensor x, y = poisoned_tensor(DTYPE_F32, T, H);
    struct moe_metrics metrics;
    struct moe_saved saved;
    struct moe_layer moe;

    config.router.balance.coefficient[BALANCE_GLOBAL_AUX_LOSS] = 0.1f;
    config.router.z_loss_coefficient = 0.1f;
    config.router.rule.score = ROUTER_SIGMOID;
    config.router.expert_bias = true;
    build(&moe, &config, S, B);
    x = normal_tensor(1.0, DTYPE_F32, T, H);
    moe_metrics_init(&metrics, stream, world.run, 1);
    world.pass.metrics = &metrics;
    world.pass.training = false;
    moe_layer_forward(&moe, &world.pass, &y, &x, NULL, &saved);
    for (int metric = 0; metric < NUM_MOE_METRICS; metric++) {
        assert_true(!metrics.used[metric] && tensor_get(&metrics.sums[metric], 0) == 0.0);
    }
    for (int e = 0; e < E; e++) {
        assert_true(tensor_get(&moe.router.tokens_per_expert, e) == 0.0);
        assert_true(tensor_get(&moe.router.balance.global_counts, e) == 0.0);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        layer_test(swiglu_experts),
        layer_test(gelu_experts_with_biases_one_after_another),
        layer_test(squared_relu_experts_with_pre_softmax_top_1),
        layer_test(shared_expert_and_every_loss),
        layer_test(sigmoid_scores_scaled_with_biases),
        layer_test(capacity_by_probs),
        layer_test(capacity_by_probs_padded),
        layer_test(capacity_by_position),
        layer_test(capacity_by_position_padded),
        layer_test(experts_without_tokens_get_no_gradient),
        layer_test(one_token),
        layer_test(variants_give_the_same_bits),
        layer_test(variants_give_the_same_bits_with_drops_and_jitter),
        layer_test(variants_give_the_same_bits_when_padded),
        layer_test(evaluation_logs_nothing),
    };

    return cmocka_run_group_tests(tests, reference_start, reference_stop);
}
