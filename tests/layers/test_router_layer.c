/* router: choices, probabilities and gradients under every rule, with every loss. */
#include "reference_moe.h"

enum { S = 8, B = 2, T = S * B, H = 6, E = 8, K = 3 };

struct router_case {
    struct router router;
    struct routing routing;
    double *x, *d_probs;
};

static double router_loss(const void *context)
{
    const struct router_case *c = context;
    const double *logits = reference_router_logits(&c->router, c->x, T);

    return dot(reference_probs(&c->router, &c->routing, logits, T), c->d_probs,
               T * c->router.config.rule.topk) +
           (double)world.pass.aux_loss_scale *
               reference_router_losses(&c->router, &c->routing, logits, T);
}

static struct router_config plain_config(void)
{
    return (struct router_config){.name = "router",
                                  .layer = 1,
                                  .hidden_size = H,
                                  .num_experts = E,
                                  .rule = {.topk = K, .scaling_factor = 1.0f}};
}

static void build(struct router_case *c, struct router_config config)
{
    config.balance.score = config.rule.score;
    config.balance.topk = config.rule.topk;
    config.balance.num_experts = config.num_experts;
    router_init(&c->router, &world.params, &world.groups, &config);
    world_fill_params(1.0);
    router_allocate(&c->router, stream, world.run);
    world_make_pass(S, B, 2);
}

/* Runs forward and backward on new inputs and compares; the caller has built c->router. Returns the
 * forward's results. */
static struct router_saved check_router(struct router_case *c)
{
    const int topk = c->router.config.rule.topk;
    struct tensor x = normal_tensor(1.0, DTYPE_F32, T, H);
    struct tensor d_probs = normal_tensor(1.0, DTYPE_F32, T, topk);
    struct tensor d_x = normal_tensor(1.0, DTYPE_F32, T, H); /* the experts' part comes first */
    const double *before = doubles_of(&d_x), *logits;
    struct router_saved saved;

    c->x = doubles_of(&x);
    c->d_probs = doubles_of(&d_probs);
    router_forward(&c->router, &world.pass, &x, &saved);
    c->routing = routing_of(&c->router, &saved);
    for (int slot = 0; slot < T * topk; slot++) {
        if (c->routing.kept[slot] < 0) { /* as the dispatcher gives it */
            tensor_set(&d_probs, slot, 0.0);
        }
    }
    logits = reference_router_logits(&c->router, c->x, T);
    assert_close(&saved.logits, logits, 1e-5);
    assert_close(&saved.probs, reference_probs(&c->router, &c->routing, logits, T), 1e-5);
    router_backward(&c->router, &world.pass, &d_x, &d_probs, &saved);
    for (int i = 0; i < T * H; i++) {
        tensor_set(&d_x, i, tensor_get(&d_x, i) - before[i]);
    }
    check_gradients(router_loss, c, c->x, &d_x);
    assert_scratch_is_empty();
    return saved;
}

/* What the rule selects by: logits, scores, plus the bias. */
static double *selection_of(const struct router_case *c, bool by_scores)
{
    const double *logits = reference_router_logits(&c->router, c->x, T);
    double *selection = new_doubles(T * E);

    for (int64_t i = 0; i < T * E; i++) {
        const double *scores = reference_scores(c->router.config.rule.score, logits + i / E * E, E);

        selection[i] = by_scores ? scores[i % E] : logits[i];
        if (c->router.config.expert_bias) {
            selection[i] += tensor_get(&c->router.expert_bias, i % E);
        }
    }
    return selection;
}

static void softmax_of_the_chosen(void **state)
{
    struct router_saved saved;
    struct router_case c;

    build(&c, plain_config());
    saved = check_router(&c);
    assert_topk_is_best(selection_of(&c, false), &saved.chosen, E);
    assert_ptr_equal(saved.indices.data, saved.chosen.data); /* dropless */
}

static void softmax_over_all_then_topk(void **state)
{
    struct router_config config = plain_config();
    struct router_saved saved;
    struct router_case c;

    config.rule.pre_softmax = true;
    config.rule.scaling_factor = 2.5f;
    build(&c, config);
    saved = check_router(&c);
    assert_topk_is_best(selection_of(&c, true), &saved.chosen, E);
}

static void softmax_over_all_renormalised(void **state)
{
    struct router_config config = plain_config();
    struct router_case c;

    config.rule.pre_softmax = true;
    config.rule.renormalize = true;
    build(&c, config);
    check_router(&c);
}

/* transformers' top-1: the probability is 1 whatever the logits, so that no gradient reaches them.
 */
static void a_renormalised_top_1_has_probability_one(void **state)
{
    struct router_config config = plain_config();
    struct router_saved saved;
    struct router_case c;

    config.rule.topk = 1;
    config.rule.pre_softmax = true;
    config.rule.renormalize = true;
    build(&c, config);
    saved = check_router(&c);
    for (int t = 0; t < T; t++) {
        assert_true(tensor_get(&saved.probs, t) == 1.0);
    }
    for (int i = 0; i < E * H; i++) {
        assert_true(tensor_get(&c.router.weight->grad, i) == (double)grad_start);
    }
}

/* Random biases on the selection, that the probabilities do not see. */
static void set_bias(struct router_case *c)
{
    for (int e = 0; e < E; e++) {
        tensor_set(&c->router.expert_bias, e, 0.3 * random_normal_number());
    }
}

static void sigmoid_with_bias(void **state)
{
    struct router_config config = plain_config();
    struct router_saved saved;
    struct router_case c;

    config.rule.score = ROUTER_SIGMOID;
    config.expert_bias = true;
    build(&c, config);
    set_bias(&c);
    saved = check_router(&c);
    assert_topk_is_best(selection_of(&c, true), &saved.chosen, E);
}

static void sigmoid_top_1(void **state)
{
    struct router_config config = plain_config();
    struct router_case c;

    config.rule.score = ROUTER_SIGMOID;
    config.rule.topk = 1;
    build(&c, config);
    check_router(&c);
}

/* Two of four groups of two experts: by the sum of their topk / group_topk = 2 best. */
static void groups_limit_the_choice(void **state)
{
    struct router_config config = plain_config();
    struct router_saved saved;
    struct router_case c;
    double *selection;

    config.rule.score = ROUTER_SIGMOID;
    config.rule.topk = 4;
    config.rule.num_groups = 4;
    config.rule.group_topk = 2;
    config.expert_bias = true;
    build(&c, config);
    set_bias(&c);
    saved = check_router(&c);
    selection = selection_of(&c, true);
    for (int t = 0; t < T; t++) {
        const int32_t *chosen = (const int32_t *)saved.chosen.data + t * 4;
        double group_score[4];
        bool is_chosen[4] = {false};
        double lowest = INFINITY;

        for (int g = 0; g < 4; g++) {
            group_score[g] = selection[t * E + 2 * g] + selection[t * E + 2 * g + 1];
        }
        for (int k = 0; k < 4; k++) {
            is_chosen[chosen[k] / 2] = true;
            lowest = fmin(lowest, group_score[chosen[k] / 2]);
        }
        assert_int_equal(is_chosen[0] + is_chosen[1] + is_chosen[2] + is_chosen[3], 2);
        for (int g = 0; g < 4; g++) {
            assert_true(is_chosen[g] || group_score[g] <= lowest + 1e-5);
        }
    }
}

static void jitter_multiplies_the_input_of_the_logits(void **state)
{
    struct router_config config = plain_config();
    struct router_case c;

    config.jitter_eps = 0.2f;
    build(&c, config);
    check_router(&c);
}

static void z_loss(void **state)
{
    struct router_config config = plain_config();
    struct moe_metrics metrics;
    struct router_case c;
    float logged[3];

    config.z_loss_coefficient = 0.3f;
    build(&c, config);
    moe_metrics_init(&metrics, stream, world.run, 3);
    world.pass.metrics = &metrics;
    check_router(&c);
    stream_copy_to_host(stream, logged, metrics.sums[MOE_Z_LOSS].data, sizeof logged);
    assert_float_equal(logged[1],
                       reference_z_loss(reference_router_logits(&c.router, c.x, T), T, E), 1e-4);
    assert_true(logged[0] == 0.0f && logged[2] == 0.0f && metrics.used[MOE_Z_LOSS]);
}

/* Rows of the assignment are balanced over the tokens: with T*K/E slots an expert on average, no
 * expert is far from it even if all tokens prefer the same. */
static void sinkhorn_spreads_tokens_that_agree(void **state)
{
    struct router_config config = plain_config();
    struct router_saved saved;
    struct router_case c;
    int counts[E] = {0};

    config.rule.topk = 1;
    config.rule.score = ROUTER_SIGMOID;
    config.rule.pre_softmax = true;
    config.sinkhorn = true;
    build(&c, config);
    for (int i = 0; i < E * H;
         i++) { /* logits are nearly the same for all tokens: expert 5 is best */
        const double value = i % H == 0 ? (i / H == 5 ? 3.0 : 0.2) : 0.01 * random_normal_number();

        tensor_set(&c.router.weight->value, i, value);
        values_of(c.router.weight)[i] = tensor_get(&c.router.weight->value, i);
    }
    saved = check_router(&c);
    for (int t = 0; t < T; t++) {
        counts[((const int32_t *)saved.chosen.data)[t]]++;
    }
    assert_true(counts[5] < T);
    world.pass.training = false; /* evaluation takes the best logit */
    router_forward(&c.router, &world.pass, &saved.x, &saved);
    assert_topk_is_best(selection_of(&c, false), &saved.chosen, E);
}

/* Tokens of the expert that lie before (position) or above (probs) the capacity. */
static void check_kept(const struct router_case *c, const struct router_saved *saved,
                       int64_t capacity)
{
    const double *probs = new_doubles(T * K);
    const double *logits = reference_router_logits(&c->router, c->x, T);
    const struct routing undropped = {.chosen = saved->chosen.data, .kept = saved->chosen.data};
    const int32_t *chosen = saved->chosen.data, *kept = saved->indices.data;

    probs = reference_probs(&c->router, &undropped, logits, T);
    for (int64_t slot = 0; slot < T * K; slot++) {
        int64_t num_better = 0;

        for (int64_t other = 0; other < T * K; other++) {
            if (chosen[other] == chosen[slot]) {
                num_better += c->router.config.drop_policy == DROP_BY_POSITION
                                  ? other < slot
                                  : probs[other] > probs[slot] + 1e-6;
            }
        }
        assert_int_equal(kept[slot] >= 0, num_better < capacity);
        assert_true(kept[slot] < 0 || kept[slot] == chosen[slot]);
    }
}

static void check_capacity(enum drop_policy policy, double factor, int64_t capacity)
{
    struct router_config config = plain_config();
    struct router_saved saved;
    struct router_case c;

    config.capacity_factor = factor;
    config.drop_policy = policy;
    config.balance.coefficient[BALANCE_AUX_LOSS] = 0.1f;
    build(&c, config);
    assert_int_equal(router_capacity(&c.router, T), capacity);
    saved = check_router(&c);
    check_kept(&c, &saved, capacity);
}

/* 16 tokens, 3 slots each, 8 experts: 6 slots an expert, times 0.6: 4. */
static void capacity_keeps_the_most_probable(void **state)
{
    check_capacity(DROP_BY_PROBS, 0.6, 4);
}

static void capacity_keeps_the_first(void **state)
{
    check_capacity(DROP_BY_POSITION, 0.6, 4);
}

static void capacity_is_at_most_all_tokens(void **state)
{
    check_capacity(DROP_BY_PROBS, 100.0, T);
}

/* Counts of one global batch: kept slots of two microbatches; recomputation does not count. */
static void expert_bias_moves_against_the_load(void **state)
{
    struct router_config config = plain_config();
    struct tensor x = normal_tensor(1.0, DTYPE_F32, T, H);
    struct router_saved saved;
    struct router_case c;
    int counts[E] = {0};

    config.rule.score = ROUTER_SIGMOID;
    config.expert_bias = true;
    config.bias_update_rate = 0.25f;
    config.capacity_factor = 0.75;
    build(&c, config);
    for (int microbatch = 0; microbatch < 2; microbatch++) {
        router_forward(&c.router, &world.pass, &x, &saved);
        for (int slot = 0; slot < T * K; slot++) {
            const int32_t expert = ((const int32_t *)saved.indices.data)[slot];

            if (expert >= 0) {
                counts[expert]++;
            }
        }
    }
    world.pass.recompute = true;
    router_forward(&c.router, &world.pass, &x, &saved);
    router_finish_batch(&c.router, stream, &world.groups);
    for (int e = 0; e < E; e++) {
        double sum = 0.0, sign;

        for (int i = 0; i < E; i++) {
            sum += counts[i];
        }
        sign = (sum / E > counts[e]) - (sum / E < counts[e]);
        assert_true(tensor_get(&c.router.expert_bias, e) == 0.25 * sign);
        assert_true(tensor_get(&c.router.tokens_per_expert, e) == 0.0);
    }
}

static void forced_balance_ignores_the_input(void **state)
{
    struct router_config config = plain_config();
    struct tensor x = normal_tensor(1.0, DTYPE_F32, T, H),
                  other = normal_tensor(9.0, DTYPE_F32, T, H);
    struct router_saved saved, again;
    struct router_case c;

    config.force_load_balancing = true;
    build(&c, config);
    router_forward(&c.router, &world.pass, &x, &saved);
    router_forward(&c.router, &world.pass, &other, &again);
    assert_same_bits(&saved.logits, &again.logits);
    world.pass.seed++;
    router_forward(&c.router, &world.pass, &x, &again);
    assert_memory_not_equal(saved.logits.data, again.logits.data, tensor_size_bytes(&saved.logits));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        layer_test(softmax_of_the_chosen),
        layer_test(softmax_over_all_then_topk),
        layer_test(softmax_over_all_renormalised),
        layer_test(a_renormalised_top_1_has_probability_one),
        layer_test(sigmoid_with_bias),
        layer_test(sigmoid_top_1),
        layer_test(groups_limit_the_choice),
        layer_test(jitter_multiplies_the_input_of_the_logits),
        layer_test(z_loss),
        layer_test(sinkhorn_spreads_tokens_that_agree),
        layer_test(capacity_keeps_the_most_probable),
        layer_test(capacity_keeps_the_first),
        layer_test(capacity_is_at_most_all_tokens),
        layer_test(expert_bias_moves_against_the_load),
        layer_test(forced_balance_ignores_the_input),
    };

    return cmocka_run_group_tests(tests, reference_start, reference_stop);
}
