#include "reference.h"

static bool contains(const int32_t *indices, int n, int64_t e)
{
    for (int k = 0; k < n; k++) {
        if (indices[k] == e) {
            return true;
        }
    }
    return false;
}

static void reference_scores(enum router_score score, double *s, const double *logits, int64_t e)
{
    double sum = 0.0;

    for (int64_t i = 0; i < e; i++) {
        s[i] = score == ROUTER_SIGMOID ? 1.0 / (1.0 + exp(-logits[i])) : exp(logits[i]);
        sum += s[i];
    }
    for (int64_t i = 0; score == ROUTER_SOFTMAX && i < e; i++) {
        s[i] /= sum;
    }
}

/* Probabilities of one token's chosen experts (M1.4 to M1.6). */
static void reference_probs(const struct router_rule *rule, double *probs, const int32_t *indices,
                            const double *logits, int64_t e)
{
    double s[64], sum = 0.0;

    reference_scores(rule->score, s, logits, e);
    for (int k = 0; k < rule->topk; k++) {
        probs[k] = s[indices[k]];
        sum += probs[k];
    }
    for (int k = 0; k < rule->topk; k++) {
        if (rule->score == ROUTER_SIGMOID && rule->topk > 1) {
            probs[k] /= sum + 1e-20;
        } else if (rule->score == ROUTER_SOFTMAX && (!rule->pre_softmax || rule->renormalize)) {
            probs[k] /= sum;
        }
        probs[k] *= rule->scaling_factor;
    }
}

/* What the top-k goes by, after the group limit. */
static void reference_selection(const struct router_rule *rule, double *selection,
                                const double *logits, const double *bias, int64_t e)
{
    const int64_t size = rule->num_groups > 0 ? e / rule->num_groups : e;
    double group_score[64];

    reference_scores(rule->score, selection, logits, e);
    for (int64_t i = 0; i < e; i++) {
        if (rule->score == ROUTER_SOFTMAX && !rule->pre_softmax) {
            selection[i] = logits[i];
        }
        selection[i] += bias != NULL ? bias[i] : 0.0;
    }
    for (int g = 0; g < rule->num_groups; g++) {
        group_score[g] = 0.0;
        for (int64_t i = g * size; i < (g + 1) * size; i++) {
            int num_above = 0;

            for (int64_t j = g * size; j < (g + 1) * size; j++) {
                num_above += selection[j] > selection[i];
            }
            group_score[g] += num_above < rule->topk / rule->group_topk ? selection[i] : 0.0;
        }
    }
    for (int g = 0; g < rule->num_groups; g++) {
        int num_above = 0;

        for (int h = 0; h < rule->num_groups; h++) {
            num_above += group_score[h] > group_score[g];
        }
        for (int64_t i = g * size; num_above >= rule->group_topk && i < (g + 1) * size; i++) {
            selection[i] = -INFINITY;
        }
    }
}

/* The chosen are distinct, in falling order, and nobody better is left out (1e-6: rounding). */
static void check_chosen(const int32_t *indices, int topk, const double *selection, int64_t e)
{
    for (int k = 0; k < topk; k++) {
        assert_in_range(indices[k], 0, (unsigned long)e - 1);
        assert_false(contains(indices, k, indices[k]));
        for (int64_t i = 0; i < e; i++) {
            assert_true(contains(indices, k, i) || selection[i] <= selection[indices[k]] + 1e-6);
        }
    }
}

static void check_rule(struct router_rule rule, int64_t t, int64_t e, bool with_bias)
{
    struct tensor logits = normal_tensor(2.0, DTYPE_F32, t, e),
                  bias = normal_tensor(0.5, DTYPE_F32, e);
    struct tensor probs = poisoned_tensor(DTYPE_F32, t, rule.topk);
    struct tensor indices = poisoned_tensor(DTYPE_I32, t, rule.topk);
    const double *logits_ref = doubles_of(&logits);
    double *probs_ref = new_doubles(t * rule.topk), selection[64];

    WITH_THREADS(&probs, &indices)
    {
        op_router_topk_forward(stream,
                               &(struct router_topk){.rule = rule,
                                                     .probs = &probs,
                                                     .indices = &indices,
                                                     .logits = &logits,
                                                     .expert_bias = with_bias ? &bias : NULL});
    }
    for (int64_t i = 0; i < t; i++) {
        const int32_t *chosen = (const int32_t *)indices.data + i * rule.topk;

        reference_selection(&rule, selection, logits_ref + i * e,
                            with_bias ? doubles_of(&bias) : NULL, e);
        check_chosen(chosen, rule.topk, selection, e);
        reference_probs(&rule, probs_ref + i * rule.topk, chosen, logits_ref + i * e, e);
    }
    assert_close(&probs, probs_ref, 1e-6);
}

static const struct router_rule rules[] = {
    {.score = ROUTER_SOFTMAX, .topk = 2, .scaling_factor = 1.0f},
    {.score = ROUTER_SOFTMAX, .topk = 4, .scaling_factor = 1.5f},
    {.score = ROUTER_SOFTMAX, .pre_softmax = true, .topk = 1, .scaling_factor = 1.0f},
    {.score = ROUTER_SOFTMAX, .pre_softmax = true, .topk = 3, .scaling_factor = 2.5f},
    {.score = ROUTER_SOFTMAX,
     .pre_softmax = true,
     .renormalize = true,
     .topk = 3,
     .scaling_factor = 1.0f},
    {.score = ROUTER_SOFTMAX,
     .pre_softmax = true,
     .renormalize = true,
     .topk = 1,
     .scaling_factor = 1.0f},
    {.score = ROUTER_SIGMOID, .topk = 1, .scaling_factor = 1.0f},
    {.score = ROUTER_SIGMOID, .topk = 4, .scaling_factor = 2.5f},
    {.score = ROUTER_SIGMOID, .topk = 4, .num_groups = 4, .group_topk = 2, .scaling_factor = 1.0f},
    {.score = ROUTER_SOFTMAX,
     .pre_softmax = true,
     .topk = 4,
     .num_groups = 8,
     .group_topk = 3,
     .scaling_factor = 1.0f},
};
enum { NUM_RULES = sizeof rules / sizeof rules[0] };

static void every_rule_chooses_and_weighs_as_the_formulas_say(void **state)
{
    for (int i = 0; i < NUM_RULES; i++) {
        check_rule(rules[i], 1, 16, false);
        check_rule(rules[i], 23, 16, true);
        check_rule(rules[i], 301, 16, false);
    }
}

static void all_experts_can_be_chosen(void **state)
{
    check_rule((struct router_rule){.score = ROUTER_SOFTMAX, .topk = 7, .scaling_factor = 1.0f}, 11,
               7, false);
    check_rule(
        (struct router_rule){
            .score = ROUTER_SIGMOID, .pre_softmax = true, .topk = 1, .scaling_factor = 1.0f},
        5, 1, false);
}

/* Logits ln 1, ln 2, ln 4, ln 1: the probabilities are whole fractions. */
static void worked_by_hand(void **state)
{
    const double values[] = {0.0, log(2.0), log(4.0), 0.0};
    struct tensor logits = tensor_new(arena, DTYPE_F32, 1, 4);
    struct tensor probs = poisoned_tensor(DTYPE_F32, 1, 2),
                  indices = poisoned_tensor(DTYPE_I32, 1, 2);
    struct router_topk op = {.rule = {.score = ROUTER_SOFTMAX, .topk = 2, .scaling_factor = 1.0f},
                             .probs = &probs,
                             .indices = &indices,
                             .logits = &logits};

    for (int i = 0; i < 4; i++) {
        tensor_set(&logits, i, values[i]);
    }
    op_router_topk_forward(stream, &op);
    assert_values(&indices, 0.0, 2, 1);
    assert_values(&probs, 1e-6, 2.0 / 3.0, 1.0 / 3.0);
    op.rule.pre_softmax = true;
    op_router_topk_forward(stream, &op);
    assert_values(&probs, 1e-6, 0.5, 0.25);
    /* sigmoid(ln x) = x / (1 + x): 4/5 and 2/3 */
    op.rule.score = ROUTER_SIGMOID;
    op_router_topk_forward(stream, &op);
    assert_values(&probs, 1e-6, 0.8 / (0.8 + 2.0 / 3.0), 2.0 / 3.0 / (0.8 + 2.0 / 3.0));
}

static void ties_go_to_the_lowest_expert(void **state)
{
    struct tensor logits = zero_tensor(DTYPE_F32, 2, 6);
    struct tensor probs = poisoned_tensor(DTYPE_F32, 2, 3),
                  indices = poisoned_tensor(DTYPE_I32, 2, 3);
    struct router_topk op = {.rule = {.score = ROUTER_SOFTMAX, .topk = 3, .scaling_factor = 1.0f},
                             .probs = &probs,
                             .indices = &indices,
                             .logits = &logits};

    tensor_set(&logits, 6 + 4, 1.0);
    op_router_topk_forward(stream, &op);
    assert_values(&indices, 0.0, 0, 1, 2, 4, 0, 1);
    op.rule.score = ROUTER_SIGMOID;
    op.rule.num_groups = 3;
    op.rule.group_topk = 2;
    op_router_topk_forward(stream, &op);
    assert_values(&indices, 0.0, 0, 1, 2, 4, 0, 1);
}

/* The best two groups of four (M1.6 with k = 4, m = 2: sums of the two best) hold the four chosen,
 * though expert 6 is the second best of all. */
static void groups_limit_the_choice(void **state)
{
    const double values[] = {3.0, 1.0, 2.5, 2.0, 0.5, 0.4, 2.9, -4.0};
    struct tensor logits = tensor_new(arena, DTYPE_F32, 1, 8);
    struct tensor probs = poisoned_tensor(DTYPE_F32, 1, 4),
                  indices = poisoned_tensor(DTYPE_I32, 1, 4);
    struct router_topk op = {.rule = {.score = ROUTER_SOFTMAX,
                                      .topk = 4,
                                      .num_groups = 4,
                                      .group_topk = 2,
                                      .scaling_factor = 1.0f},
                             .probs = &probs,
                             .indices = &indices,
                             .logits = &logits};

    for (int i = 0; i < 8; i++) {
        tensor_set(&logits, i, values[i]);
    }
    op_router_topk_forward(stream, &op);
    assert_values(&indices, 0.0, 0, 2, 3, 1);
}

/* Sinkhorn: the assignment chooses, the logits weigh. */
static void a_given_selection_chooses(void **state)
{
    struct tensor logits = normal_tensor(1.0, DTYPE_F32, 9, 5);
    struct tensor selection = normal_tensor(1.0, DTYPE_F32, 9, 5);
    struct tensor probs = poisoned_tensor(DTYPE_F32, 9, 2),
                  indices = poisoned_tensor(DTYPE_I32, 9, 2);
    const struct router_rule rule = {
        .score = ROUTER_SOFTMAX, .pre_softmax = true, .topk = 2, .scaling_factor = 1.0f};
    const double *logits_ref = doubles_of(&logits), *selection_ref = doubles_of(&selection);
    double expected[18];

    op_router_topk_forward(stream, &(struct router_topk){.rule = rule,
                                                         .probs = &probs,
                                                         .indices = &indices,
                                                         .logits = &logits,
                                                         .selection = &selection});
    for (int64_t i = 0; i < 9; i++) {
        const int32_t *chosen = (const int32_t *)indices.data + i * 2;

        check_chosen(chosen, 2, selection_ref + i * 5, 5);
        reference_probs(&rule, expected + i * 2, chosen, logits_ref + i * 5, 5);
    }
    assert_close(&probs, expected, 1e-6);
}

static void nan_and_infinite_logits_give_distinct_legal_experts(void **state)
{
    struct tensor logits = tensor_new(arena, DTYPE_F32, 2, 4);
    struct tensor probs = poisoned_tensor(DTYPE_F32, 2, 4),
                  indices = poisoned_tensor(DTYPE_I32, 2, 4);

    for (int i = 0; i < 8; i++) {
        tensor_set(&logits, i, i < 4 ? NAN : -INFINITY);
    }
    op_router_topk_forward(
        stream,
        &(struct router_topk){.rule = {.score = ROUTER_SIGMOID, .topk = 4, .scaling_factor = 1.0f},
                              .probs = &probs,
                              .indices = &indices,
                              .logits = &logits});
    assert_values(&indices, 0.0, 0, 1, 2, 3, 0, 1, 2, 3);
}

struct token {
    struct router_rule rule;
    const int32_t *indices;
    const double *d_probs;
    double *logits;
    int64_t num_experts;
};

static double token_loss(const void *context)
{
    const struct token *token = context;
    double probs[64], loss = 0.0;

    reference_probs(&token->rule, probs, token->indices, token->logits, token->num_experts);
    for (int k = 0; k < token->rule.topk; k++) {
        loss += probs[k] * token->d_probs[k];
    }
    return loss;
}

/* The op's gradient, read back as doubles, is the derivative of the reference forward by finite
 * differences. */
static void check_backward(struct router_rule rule, int64_t t, int64_t e)
{
    struct tensor logits = normal_tensor(1.5, DTYPE_F32, t, e);
    struct tensor probs = poisoned_tensor(DTYPE_F32, t, rule.topk);
    struct tensor indices = poisoned_tensor(DTYPE_I32, t, rule.topk);
    struct tensor d_probs = normal_tensor(1.0, DTYPE_F32, t, rule.topk);
    struct tensor d_logits = poisoned_tensor(DTYPE_F32, t, e);
    double *logits_ref = doubles_of(&logits), *expected = new_doubles(t * e);
    const double *d_probs_ref = doubles_of(&d_probs), step = 1e-5;

    op_router_topk_forward(
        stream, &(struct router_topk){
                    .rule = rule, .probs = &probs, .indices = &indices, .logits = &logits});
    for (int64_t i = 0; i < t * e; i++) {
        const int64_t row = i / e;
        const struct token token = {rule, (const int32_t *)indices.data + row * rule.topk,
                                    d_probs_ref + row * rule.topk, logits_ref + row * e, e};
        const double saved = logits_ref[i];
        double above;

        logits_ref[i] = saved + step;
        above = token_loss(&token);
        logits_ref[i] = saved - step;
        expected[i] = (above - token_loss(&token)) / (2.0 * step);
        logits_ref[i] = saved;
    }
    WITH_THREADS(&d_logits)
    {
        op_router_backward(stream, &(struct router_backward){.rule = rule,
                                                             .d_logits = &d_logits,
                                                             .d_probs = &d_probs,
                                                             .logits = &logits,
                                                             .indices = &indices});
    }
    assert_near(&d_logits, expected, 5e-6);
}

static void backward_is_the_derivative(void **state)
{
    for (int i = 0; i < NUM_RULES; i++) {
        check_backward(rules[i], 1, 16);
        check_backward(rules[i], 37, 16);
    }
}

/* Two balancing losses, one of them by columns, and the z-loss beside the probabilities: the sum of
 * what each gives alone. */
static void backward_adds_what_each_part_gives(void **state)
{
    enum { NUM_TOKENS = 12, NUM_EXPERTS = 6, TOPK = 2, COUNT = NUM_TOKENS * NUM_EXPERTS };
    struct tensor logits = normal_tensor(1.0, DTYPE_F32, NUM_TOKENS, NUM_EXPERTS), parts[4], whole;
    struct tensor counts = normal_tensor(9.0, DTYPE_F32, 1, NUM_EXPERTS);
    struct tensor by_column = normal_tensor(9.0, DTYPE_F32, 3, NUM_EXPERTS);
    struct tensor d_probs = normal_tensor(1.0, DTYPE_F32, NUM_TOKENS, TOPK);
    struct tensor indices = tensor_new(arena, DTYPE_I32, NUM_TOKENS, TOPK);
    struct router_backward op = {.rule = {.score = ROUTER_SIGMOID, .topk = TOPK},
                                 .logits = &logits,
                                 .balance = {{&counts, 0.1f}, {&by_column, 0.2f}}};
    struct router_backward part;
    double *expected = new_doubles(COUNT);

    op.rule.scaling_factor = 1.5f;
    for (int i = 0; i < NUM_TOKENS * TOPK; i++) {
        tensor_set(&indices, i, (double)(i * 5 % NUM_EXPERTS));
    }
    for (int i = 0; i < 4; i++) {
        part = op;
        part.d_probs = i == 0 ? &d_probs : NULL;
        part.indices = &indices;
        part.balance[0] = op.balance[i == 2];
        part.num_balance_terms = i == 1 || i == 2;
        part.z_scale = i == 3 ? 0.3f : 0.0f;
        parts[i] = poisoned_tensor(DTYPE_F32, NUM_TOKENS, NUM_EXPERTS);
        part.d_logits = &parts[i];
        op_router_backward(stream, &part);
        for (int j = 0; j < COUNT; j++) {
            expected[j] += tensor_get(&parts[i], j);
        }
    }
    whole = poisoned_tensor(DTYPE_F32, NUM_TOKENS, NUM_EXPERTS);
    op.d_logits = &whole;
    op.d_probs = &d_probs;
    op.indices = &indices;
    op.num_balance_terms = 2;
    op.z_scale = 0.3f;
    op_router_backward(stream, &op);
    assert_near(&whole, expected, 1e-5);
}

/* d_weight += d_logits^T x or =, d_x += d_logits W. */
static void check_linear_backward(enum dtype act, enum dtype d_x_dtype, bool overwrite, int64_t t,
                                  int64_t e, int64_t h)
{
    struct tensor d_logits = normal_tensor(1.0, DTYPE_F32, t, e), x = normal_tensor(1.0, act, t, h);
    struct tensor weight = normal_tensor(0.1, act, e, h), d_x = normal_tensor(1.0, d_x_dtype, t, h);
    struct tensor d_weight =
        overwrite ? poisoned_tensor(DTYPE_F32, e, h) : normal_tensor(1.0, DTYPE_F32, e, h);
    double *d_x_ref = doubles_of(&d_x);
    double *d_weight_ref = overwrite ? new_doubles(e * h) : doubles_of(&d_weight);

    for (int64_t i = 0; i < t * e * h; i++) {
        const int64_t token = i / h / e, expert = i / h % e, column = i % h;
        const double d = tensor_get(&d_logits, token * e + expert);

        d_x_ref[token * h + column] += d * tensor_get(&weight, expert * h + column);
        d_weight_ref[expert * h + column] += d * tensor_get(&x, token * h + column);
    }
    op_router_linear_backward(stream,
                              &(struct router_linear_backward){.d_x = &d_x,
                                                               .d_weight = &d_weight,
                                                               .d_logits = &d_logits,
                                                               .x = &x,
                                                               .weight = &weight,
                                                               .overwrite_grads = overwrite});
    assert_close(&d_x, d_x_ref, tolerance_of(d_x_dtype));
    assert_close(&d_weight, d_weight_ref, 1e-5);
}

static void linear_backward_agrees_with_the_plain_loop(void **state)
{
    check_linear_backward(DTYPE_F32, DTYPE_F32, false, 37, 8, 24);
    check_linear_backward(DTYPE_BF16, DTYPE_BF16, true, 37, 8, 24);
    check_linear_backward(DTYPE_BF16, DTYPE_F32, false, 12, 5, 7);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_teardown(every_rule_chooses_and_weighs_as_the_formulas_say,
                                  reference_empty_arena),
        cmocka_unit_test_teardown(all_experts_can_be_chosen, reference_empty_arena),
        cmocka_unit_test_teardown(worked_by_hand, reference_empty_arena),
        cmocka_unit_test_teardown(ties_go_to_the_lowest_expert, reference_empty_arena),
        cmocka_unit_test_teardown(groups_limit_the_choice, reference_empty_arena),
        cmocka_unit_test_teardown(a_given_selection_chooses, reference_empty_arena),
        cmocka_unit_test_teardown(nan_and_infinite_logits_give_distinct_legal_experts,
                                  reference_empty_arena),
        cmocka_unit_test_teardown(backward_is_the_derivative, reference_empty_arena),
        cmocka_unit_test_teardown(backward_adds_what_each_part_gives, reference_empty_arena),
        cmocka_unit_test_teardown(linear_backward_agrees_with_the_plain_loop,
                                  reference_empty_arena),
    };

    return cmocka_run_group_tests(tests, reference_start, reference_stop);
}
