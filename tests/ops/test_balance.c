#include "reference.h"

/* The scores that the balancing losses sum, of one token (M1.7). */
static void reference_balance_scores(enum router_score score, double *s, const double *logits,
                                     int64_t e)
{
    double sum = 0.0;

    for (int64_t i = 0; i < e; i++) {
        s[i] = score == ROUTER_SIGMOID ? 1.0 / (1.0 + exp(-logits[i])) : exp(logits[i]);
        sum += s[i];
    }
    for (int64_t i = 0; i < e; i++) {
        s[i] /= sum + (score == ROUTER_SIGMOID ? 1e-20 : 0.0);
    }
}

/* T x K distinct random experts a token. */
static struct tensor random_indices(int64_t t, int topk, int64_t e)
{
    struct tensor indices = tensor_new(arena, DTYPE_I32, t, topk);

    for (int64_t i = 0; i < t; i++) {
        const int64_t first = random_below(e);

        for (int k = 0; k < topk; k++) {
            tensor_set(&indices, i * topk + k, (double)((first + k * k) % e));
        }
    }
    return indices;
}

struct problem {
    enum router_score score;
    int64_t num_tokens, num_experts, num_columns;
    double *logits;
    const double *counts;
};

/* sum over columns and experts of counts * score_sums */
static double balance_sum(const void *context)
{
    const struct problem *p = context;
    double s[64], sum = 0.0;

    for (int64_t t = 0; t < p->num_tokens; t++) {
        reference_balance_scores(p->score, s, p->logits + t * p->num_experts, p->num_experts);
        for (int64_t e = 0; e < p->num_experts; e++) {
            sum += p->counts[t % p->num_columns * p->num_experts + e] * s[e];
        }
    }
    return sum;
}

static void check_balance(enum router_score score, int64_t t, int64_t e, int topk, int64_t columns)
{
    struct tensor logits = normal_tensor(1.5, DTYPE_F32, t, e);
    struct tensor indices = random_indices(t, topk, e);
    struct tensor counts = poisoned_tensor(DTYPE_F32, columns, e);
    struct tensor sums = poisoned_tensor(DTYPE_F32, columns, e),
                  loss = poisoned_tensor(DTYPE_F32, 1);
    double *expected_counts = new_doubles(columns * e), *expected_sums = new_doubles(columns * e);
    const double *logits_ref = doubles_of(&logits);
    double s[64], expected_loss = 0.0;

    for (int64_t i = 0; i < t; i++) {
        reference_balance_scores(score, s, logits_ref + i * e, e);
        for (int64_t j = 0; j < e; j++) {
            expected_sums[i % columns * e + j] += s[j];
        }
        for (int k = 0; k < topk; k++) {
            expected_counts[i % columns * e + (int64_t)tensor_get(&indices, i * topk + k)] += 1.0;
        }
    }
    for (int64_t i = 0; i < columns * e; i++) {
        expected_loss += 0.125 * expected_counts[i] * expected_sums[i];
    }
    WITH_THREADS(&counts, &sums, &loss)
    {
        op_router_balance(stream, &(struct router_balance){.score = score,
                                                           .counts = &counts,
                                                           .score_sums = &sums,
                                                           .logits = &logits,
                                                           .indices = &indices});
        op_router_balance_loss(
            stream, &(struct router_balance_loss){
                        .loss = &loss, .counts = &counts, .score_sums = &sums, .factor = 0.125f});
    }
    assert_close(&counts, expected_counts, 0.0);
    assert_close(&sums, expected_sums, 1e-6);
    assert_close(&loss, &expected_loss, 1e-6);
}

static void counts_sums_and_loss_agree_with_the_plain_loop(void **state)
{
    for (int score = ROUTER_SOFTMAX; score <= ROUTER_SIGMOID; score++) {
        check_balance((enum router_score)score, 1, 1, 1, 1);
        check_balance((enum router_score)score, 13, 5, 2, 1);
        check_balance((enum router_score)score, 1028, 8, 2, 1);
        check_balance((enum router_score)score, 1028, 8, 2, 4);
        check_balance((enum router_score)score, 21, 16, 3, 7);
    }
}

/* With equal counts and equal scores, E/(T T k) sum n s = 1 for any k (M1.7). */
static void perfect_balance_is_a_loss_of_one(void **state)
{
    enum { T = 12, E = 4, K = 3 };
    struct tensor logits = zero_tensor(DTYPE_F32, T, E),
                  indices = tensor_new(arena, DTYPE_I32, T, K);
    struct tensor counts = poisoned_tensor(DTYPE_F32, 1, E),
                  sums = poisoned_tensor(DTYPE_F32, 1, E);
    struct tensor loss = poisoned_tensor(DTYPE_F32, 1);

    for (int i = 0; i < T * K; i++) {
        tensor_set(&indices, i, i % E);
    }
    op_router_balance(stream, &(struct router_balance){.counts = &counts,
                                                       .score_sums = &sums,
                                                       .logits = &logits,
                                                       .indices = &indices});
    op_router_balance_loss(stream,
                           &(struct router_balance_loss){.loss = &loss,
                                                         .counts = &counts,
                                                         .score_sums = &sums,
                                                         .factor = (float)E / (float)(T * T * K)});
    assert_values(&loss, 1e-7, 1.0);
}

/* Two tokens, two experts, logits ln 3 and 0: softmax (3/4, 1/4); both chose expert 0 (k = 1).
 * loss = E/(T T k) (2 * 3/2 + 0) = 3/2. d/dl_0 = E/(T T k) n_0 s_0 (1 - s_0) = 1/2 * 2 * 3/16. */
static void worked_by_hand_with_the_gradient(void **state)
{
    struct tensor logits = zero_tensor(DTYPE_F32, 2, 2), indices = zero_tensor(DTYPE_I32, 2, 1);
    struct tensor counts = poisoned_tensor(DTYPE_F32, 1, 2),
                  sums = poisoned_tensor(DTYPE_F32, 1, 2);
    struct tensor loss = poisoned_tensor(DTYPE_F32, 1), d_logits = poisoned_tensor(DTYPE_F32, 2, 2);

    tensor_set(&logits, 0, log(3.0));
    tensor_set(&logits, 2, log(3.0));
    op_router_balance(stream, &(struct router_balance){.counts = &counts,
                                                       .score_sums = &sums,
                                                       .logits = &logits,
                                                       .indices = &indices});
    op_router_balance_loss(
        stream, &(struct router_balance_loss){
                    .loss = &loss, .counts = &counts, .score_sums = &sums, .factor = 0.5f});
    op_router_backward(stream, &(struct router_backward){.d_logits = &d_logits,
                                                         .logits = &logits,
                                                         .balance = {{&counts, 0.5f}},
                                                         .num_balance_terms = 1});
    assert_values(&counts, 0.0, 2.0, 0.0);
    assert_values(&sums, 1e-6, 1.5, 0.5);
    assert_values(&loss, 1e-6, 1.5);
    assert_values(&d_logits, 1e-6, 0.1875, -0.1875, 0.1875, -0.1875);
}

static void dropped_slots_are_not_counted(void **state)
{
    struct tensor logits = zero_tensor(DTYPE_F32, 2, 4),
                  indices = tensor_new(arena, DTYPE_I32, 2, 2);
    struct tensor counts = poisoned_tensor(DTYPE_F32, 2, 4),
                  sums = poisoned_tensor(DTYPE_F32, 2, 4);

    for (int i = 0; i < 4; i++) {
        tensor_set(&indices, i, (double[]){2, -1, -1, 2}[i]);
    }
    op_router_balance(stream, &(struct router_balance){.counts = &counts,
                                                       .score_sums = &sums,
                                                       .logits = &logits,
                                                       .indices = &indices});
    assert_values(&counts, 0.0, 0, 0, 1, 0, 0, 0, 1, 0);
    assert_values(&sums, 1e-7, 0.25, 0.25, 0.25, 0.25, 0.25, 0.25, 0.25, 0.25);
}

static void check_backward(enum router_score score, int64_t t, int64_t e, int64_t columns)
{
    struct tensor logits = normal_tensor(1.0, DTYPE_F32, t, e);
    struct tensor counts = tensor_new(arena, DTYPE_F32, columns, e);
    struct tensor d_logits = poisoned_tensor(DTYPE_F32, t, e);
    double *expected = new_doubles(t * e);
    struct problem p = {score, t, e, columns, doubles_of(&logits), NULL};

    for (int64_t i = 0; i < columns * e; i++) {
        tensor_set(&counts, i, (double)random_below(20));
    }
    p.counts = doubles_of(&counts);
    for (int64_t i = 0; i < t * e; i++) {
        const double saved = p.logits[i], step = 1e-4;
        double above;

        p.logits[i] = saved + step;
        above = balance_sum(&p);
        p.logits[i] = saved - step;
        expected[i] = 0.25 * (above - balance_sum(&p)) / (2.0 * step);
        p.logits[i] = saved;
    }
    WITH_THREADS(&d_logits)
    {
        op_router_backward(stream, &(struct router_backward){.rule = {.score = score},
                                                             .d_logits = &d_logits,
                                                             .logits = &logits,
                                                             .balance = {{&counts, 0.25f}},
                                                             .num_balance_terms = 1});
    }
    assert_near(&d_logits, expected, 5e-6);
}

static void backward_is_the_derivative(void **state)
{
    for (int score = ROUTER_SOFTMAX; score <= ROUTER_SIGMOID; score++) {
        check_backward((enum router_score)score, 1, 2, 1);
        check_backward((enum router_score)score, 15, 7, 1);
        check_backward((enum router_score)score, 15, 8, 3);
    }
}

static double log_sum_exp(const double *logits, int64_t e)
{
    double sum = 0.0;

    for (int64_t i = 0; i < e; i++) {
        sum += exp(logits[i]);
    }
    return log(sum);
}

static void check_z_loss(int64_t t, int64_t e)
{
    struct tensor logits = normal_tensor(2.0, DTYPE_F32, t, e),
                  loss = poisoned_tensor(DTYPE_F32, 1);
    struct tensor d_logits = poisoned_tensor(DTYPE_F32, t, e);
    double *expected = new_doubles(t * e), expected_loss = 0.0;
    const double *logits_ref = doubles_of(&logits);

    for (int64_t i = 0; i < t; i++) {
        const double z = log_sum_exp(logits_ref + i * e, e);

        expected_loss += 0.5 * z * z / (double)t;
        for (int64_t j = 0; j < e; j++) {
            expected[i * e + j] = 3.0 / (double)t * 2.0 * z * exp(logits_ref[i * e + j] - z);
        }
    }
    WITH_THREADS(&loss, &d_logits)
    {
        op_router_z_loss(stream,
                         &(struct router_z_loss){.loss = &loss, .logits = &logits, .factor = 0.5f});
        op_router_backward(stream, &(struct router_backward){
                                       .d_logits = &d_logits, .logits = &logits, .z_scale = 3.0f});
    }
    assert_close(&loss, &expected_loss, 1e-6);
    assert_close(&d_logits, expected, 1e-6);
}

static void z_loss_agrees_with_the_formula(void **state)
{
    check_z_loss(1, 1);
    check_z_loss(17, 5);
    check_z_loss(600, 8);
}

struct z_token {
    double logits[6];
};

static double squared_z(const void *context)
{
    const double z = log_sum_exp(((const struct z_token *)context)->logits, 6);

    return z * z;
}

/* The formula that check_z_loss writes down. */
static void z_loss_formula_is_the_derivative(void **state)
{
    struct z_token token;
    double gradient[6], z;

    for (int i = 0; i < 6; i++) {
        token.logits[i] = random_normal_number();
    }
    z = log_sum_exp(token.logits, 6);
    for (int i = 0; i < 6; i++) {
        gradient[i] = 2.0 * z * exp(token.logits[i] - z);
    }
    assert_gradient(squared_z, &token, token.logits, 6, gradient);
}

/* Logits 0, 0 (z = ln 2) and ln 3, 0 (z = ln 4). */
static void z_loss_worked_by_hand(void **state)
{
    struct tensor logits = zero_tensor(DTYPE_F32, 2, 2), loss = poisoned_tensor(DTYPE_F32, 1);
    struct tensor d_logits = poisoned_tensor(DTYPE_F32, 2, 2);
    const double z0 = log(2.0), z1 = log(4.0), expected = (z0 * z0 + z1 * z1) / 2.0;

    tensor_set(&logits, 2, log(3.0));
    op_router_z_loss(stream,
                     &(struct router_z_loss){.loss = &loss, .logits = &logits, .factor = 1.0f});
    op_router_backward(stream, &(struct router_backward){
                                   .d_logits = &d_logits, .logits = &logits, .z_scale = 1.0f});
    assert_close(&loss, &expected, 1e-6);
    assert_values(&d_logits, 1e-6, z0 * 0.5, z0 * 0.5, z1 * 0.75, z1 * 0.25);
}

/* Mean 5: the expert at the mean keeps its bias. */
static void expert_bias_rises_for_the_starved(void **state)
{
    struct tensor bias = zero_tensor(DTYPE_F32, 3), counts = tensor_new(arena, DTYPE_F32, 3);

    for (int i = 0; i < 3; i++) {
        tensor_set(&counts, i, (double[]){10.0, 5.0, 0.0}[i]);
    }
    for (int i = 0; i < 2; i++) {
        op_expert_bias_update(
            stream, &(struct expert_bias_update){.bias = &bias, .counts = &counts, .rate = 0.5f});
    }
    assert_values(&bias, 0.0, -1.0, 0.0, 1.0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_teardown(counts_sums_and_loss_agree_with_the_plain_loop,
                                  reference_empty_arena),
        cmocka_unit_test_teardown(perfect_balance_is_a_loss_of_one, reference_empty_arena),
        cmocka_unit_test_teardown(worked_by_hand_with_the_gradient, reference_empty_arena),
        cmocka_unit_test_teardown(dropped_slots_are_not_counted, reference_empty_arena),
        cmocka_unit_test_teardown(backward_is_the_derivative, reference_empty_arena),
        cmocka_unit_test_teardown(z_loss_agrees_with_the_formula, reference_empty_arena),
        cmocka_unit_test(z_loss_formula_is_the_derivative),
        cmocka_unit_test_teardown(z_loss_worked_by_hand, reference_empty_arena),
        cmocka_unit_test_teardown(expert_bias_rises_for_the_starved, reference_empty_arena),
    };

    return cmocka_run_group_tests(tests, reference_start, reference_stop);
}
