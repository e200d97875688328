#include "reference.h"

static void rows_belong_to_token_ids(void **state)
{
    enum { T = 50, N = 40 };
    const struct rng_key key = rng_key(7, "forced routing", 3);
    struct tensor x = poisoned_tensor(DTYPE_F32, T, N), id = tensor_new(arena, DTYPE_I64, T);

    for (int64_t t = 0; t < T; t++) {
        ((int64_t *)id.data)[t] = (1ll << 40) + (t * 37) % T;
    }
    WITH_THREADS(&x)
    {
        op_random_normal(stream, &(struct random_normal){.x = &x, .token_id = &id, .key = key});
    }
    for (int64_t t = 0; t < T; t++) {
        for (int64_t i = 0; i < N; i++) {
            const double expected = rng_normal(key, (uint64_t)((int64_t *)id.data)[t], (uint64_t)i);

            assert_true(tensor_get(&x, t * N + i) == (double)(float)expected);
        }
    }
}

/* 40000 numbers: mean 0 +- 0.03, variance 1 +- 0.05 (six standard errors and more). */
static void numbers_are_standard_normal(void **state)
{
    enum { T = 200, N = 200 };
    struct tensor x = poisoned_tensor(DTYPE_F32, T, N), id = tensor_new(arena, DTYPE_I64, T);
    double mean = 0.0, square = 0.0;

    for (int64_t t = 0; t < T; t++) {
        ((int64_t *)id.data)[t] = t;
    }
    op_random_normal(stream, &(struct random_normal){.x = &x, .token_id = &id, .key = test_key});
    for (int64_t i = 0; i < T * N; i++) {
        mean += tensor_get(&x, i) / (T * N);
        square += tensor_get(&x, i) * tensor_get(&x, i) / (T * N);
    }
    assert_true(fabs(mean) < 0.03);
    assert_true(fabs(square - 1.0) < 0.05);
}

/* Elements of a box are those of the whole tensor at the same places. */
static void initial_weights_do_not_depend_on_the_box(void **state)
{
    const struct rng_key key = rng_key(11, "decoder.layers.0.mlp.experts.weight1", 0);
    struct initial_normal op = {.key = key,
                                .std = 0.02f,
                                .box = {.num_dims = 3, .offset = {1, 3, 2}, .size = {2, 5, 7}},
                                .global_shape = {4, 9, 11}};

    for (int d = 0; d < 2; d++) {
        const enum dtype dtype = d == 0 ? DTYPE_F32 : DTYPE_BF16;
        struct tensor x = poisoned_tensor(dtype, 2, 5, 7);

        op.x = &x;
        WITH_THREADS(&x)
        {
            op_initial_normal(stream, &op);
        }
        for (int64_t i = 0; i < 2 * 5 * 7; i++) {
            const int64_t index = ((1 + i / 35) * 9 + 3 + i / 7 % 5) * 11 + 2 + i % 7;
            const float expected = (float)(0.02f * rng_normal(key, 0, (uint64_t)index));

            assert_true(tensor_get(&x, i) ==
                        (double)(d == 0 ? expected : bf16_to_float(bf16_from_float(expected))));
        }
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_teardown(rows_belong_to_token_ids, reference_empty_arena),
        cmocka_unit_test_teardown(numbers_are_standard_normal, reference_empty_arena),
        cmocka_unit_test_teardown(initial_weights_do_not_depend_on_the_box, reference_empty_arena),
    };

    return cmocka_run_group_tests(tests, reference_start, reference_stop);
}
