#include "reference.h"

/* Megatron's loop (M1.9), literally, in double: no maximum taken out. */
static void reference_sinkhorn(double *result, const double *logits, int64_t t, int64_t e,
                               double tolerance)
{
    double *d0 = new_doubles(t), *d1 = new_doubles(e), error = 1e9;

    for (int64_t j = 0; j < e; j++) {
        d1[j] = 1.0;
    }
    while (error > tolerance) {
        error = 0.0;
        for (int64_t i = 0; i < t; i++) {
            double sum = 0.0;

            for (int64_t j = 0; j < e; j++) {
                sum += d1[j] * exp(logits[i * e + j]);
            }
            d0[i] = 1.0 / (double)t / (sum + 1e-8);
        }
        for (int64_t j = 0; j < e; j++) {
            const double old = d1[j];
            double sum = 0.0;

            for (int64_t i = 0; i < t; i++) {
                sum += d0[i] * exp(logits[i * e + j]);
            }
            d1[j] = 1.0 / (double)e / (sum + 1e-8);
            error += fabs(old - d1[j]) / (double)e;
        }
    }
    for (int64_t i = 0; i < t * e; i++) {
        result[i] = d1[i % e] * exp(logits[i]) * d0[i / e];
    }
}

static void agrees_with_the_plain_loop(void **state)
{
    const int64_t shapes[][2] = {{1, 4}, {7, 3}, {256, 8}, {257, 8}, {1031, 16}};

    for (int i = 0; i < 5; i++) {
        const int64_t t = shapes[i][0], e = shapes[i][1];
        struct tensor logits = normal_tensor(1.0, DTYPE_F32, t, e);
        struct tensor assignment = poisoned_tensor(DTYPE_F32, t, e);
        double *expected = new_doubles(t * e);

        /* Far beyond the accuracy compared, so that one iteration more or less does not show. */
        reference_sinkhorn(expected, doubles_of(&logits), t, e, 1e-6);
        WITH_THREADS(&assignment)
        {
            op_router_sinkhorn(stream, &(struct router_sinkhorn){.assignment = &assignment,
                                                                 .logits = &logits,
                                                                 .tolerance = 1e-6f,
                                                                 .max_iterations = 1000});
        }
        assert_close(&assignment, expected, 1e-5);
    }
}

/* For c = [[1, 1], [1, 1]] one iteration is exact: every entry is 1/(T E). For [[3, 1], [1, 3]]
 * too: by symmetry the scales are constant, and the entries are c / (T * 4). */
static void worked_by_hand(void **state)
{
    struct tensor logits = zero_tensor(DTYPE_F32, 2, 2),
                  assignment = poisoned_tensor(DTYPE_F32, 2, 2);
    const struct router_sinkhorn op = {
        .assignment = &assignment, .logits = &logits, .tolerance = 1e-4f, .max_iterations = 100};

    op_router_sinkhorn(stream, &op);
    assert_values(&assignment, 1e-6, 0.25, 0.25, 0.25, 0.25);
    tensor_set(&logits, 0, log(3.0));
    tensor_set(&logits, 3, log(3.0));
    op_router_sinkhorn(stream, &op);
    assert_values(&assignment, 1e-6, 0.375, 0.125, 0.125, 0.375);
}

static void columns_are_balanced_even_where_exp_overflows(void **state)
{
    struct tensor logits = normal_tensor(1.0, DTYPE_F32, 64, 4);
    struct tensor assignment = poisoned_tensor(DTYPE_F32, 64, 4);

    for (int64_t i = 0; i < 64; i++) {
        for (int64_t e = 0; e < 4; e++) {
            tensor_set(&logits, i * 4 + e,
                       tensor_get(&logits, i * 4 + e) + (double)(i - 32) * 30.0);
        }
    }
    op_router_sinkhorn(stream, &(struct router_sinkhorn){.assignment = &assignment,
                                                         .logits = &logits,
                                                         .tolerance = 1e-5f,
                                                         .max_iterations = 1000});
    for (int64_t e = 0; e < 4; e++) {
        double sum = 0.0;

        for (int64_t i = 0; i < 64; i++) {
            sum += tensor_get(&assignment, i * 4 + e);
        }
        assert_true(fabs(sum - 0.25) < 1e-5);
    }
}

/* The first iteration moves the column scales by far more than the tolerance; NaN never converges.
 */
static void the_number_of_iterations_is_bounded(void **state)
{
    struct tensor logits = normal_tensor(1.0, DTYPE_F32, 3, 3);
    struct tensor one = poisoned_tensor(DTYPE_F32, 3, 3), many = poisoned_tensor(DTYPE_F32, 3, 3);
    struct router_sinkhorn op = {
        .assignment = &one, .logits = &logits, .tolerance = 1e-6f, .max_iterations = 1};

    op_router_sinkhorn(stream, &op);
    op.assignment = &many;
    op.max_iterations = 1000;
    op_router_sinkhorn(stream, &op);
    assert_memory_not_equal(one.data, many.data, tensor_size_bytes(&one));
    tensor_set(&logits, 4, NAN);
    op_router_sinkhorn(stream, &op);
    assert_true(isnan(tensor_get(&many, 4)));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_teardown(agrees_with_the_plain_loop, reference_empty_arena),
        cmocka_unit_test_teardown(worked_by_hand, reference_empty_arena),
        cmocka_unit_test_teardown(columns_are_balanced_even_where_exp_overflows,
                                  reference_empty_arena),
        cmocka_unit_test_teardown(the_number_of_iterations_is_bounded, reference_empty_arena),
    };

    return cmocka_run_group_tests(tests, reference_start, reference_stop);
}
