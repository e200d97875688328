#include "reference.h"

static struct tensor token_ids(int64_t t)
{
    struct tensor id = tensor_new(arena, DTYPE_I64, t);

    for (int64_t i = 0; i < t; i++) {
        ((int64_t *)id.data)[i] = random_below((int64_t)1 << 40);
    }
    return id;
}

static void check_dropout(enum dtype dtype, float p, int64_t t, int64_t h, bool with_residual)
{
    struct tensor x = normal_tensor(1.0, dtype, t, h), residual = normal_tensor(1.0, dtype, t, h);
    struct tensor y = poisoned_tensor(dtype, t, h), id = token_ids(t);
    const struct dropout args = {.y = &y,
                                 .x = &x,
                                 .residual = with_residual ? &residual : NULL,
                                 .token_id = &id,
                                 .rule = {p, rng_key(7, "dropout", 3)}};
    double *expected = doubles_of(&x);

    for (int64_t i = 0; i < t * h; i++) {
        const uint64_t row = (uint64_t)((int64_t *)id.data)[i / h];
        const bool kept = rng_uniform(args.rule.key, row, (uint64_t)(i % h)) >= p;

        expected[i] = (kept ? expected[i] / (1.0 - (double)p) : 0.0) +
                      (with_residual ? tensor_get(&residual, i) : 0.0);
    }
    WITH_THREADS(&y)
    {
        op_dropout(stream, &args);
    }
    assert_close(&y, expected, tolerance_of(dtype));
    {
        struct dropout in_place = args;

        in_place.y = &x;
        op_dropout(stream, &in_place);
        assert_same_bits(&x, &y);
    }
}

static void mask_is_the_rule_of_token_and_element(void **state)
{
    for (int variant = 0; variant < 12; variant++) {
        const float p = (float[]){0.0f, 0.1f, 0.7f}[variant / 4];

        check_dropout(variant & 1 ? DTYPE_BF16 : DTYPE_F32, p, 13, 67, (variant & 2) != 0);
        check_dropout(variant & 1 ? DTYPE_BF16 : DTYPE_F32, p, 70, 512, (variant & 2) != 0);
    }
}

static void expected_share_is_kept(void **state)
{
    enum { T = 100, H = 1000 };
    struct tensor x = tensor_new(arena, DTYPE_F32, T, H), id = token_ids(T);
    const double p = 0.3, deviation = sqrt(p * (1.0 - p) / (T * H));
    double kept = 0.0;

    for (int64_t i = 0; i < T * H; i++) {
        tensor_set(&x, i, 1.0);
    }
    op_dropout(stream,
               &(struct dropout){
                   .y = &x, .x = &x, .token_id = &id, .rule = {(float)p, rng_key(1, "share", 0)}});
    for (int64_t i = 0; i < T * H; i++) {
        kept += tensor_get(&x, i) != 0.0 ? 1.0 : 0.0;
    }
    assert_true(fabs(kept / (T * H) - (1.0 - p)) < 6.0 * deviation);
}

/* Tokens in another order, or on another rank, keep their masks. */
static void mask_follows_the_token_not_the_row(void **state)
{
    enum { T = 6, H = 37 };
    struct tensor x = tensor_new(arena, DTYPE_F32, T, H),
                  reversed_y = poisoned_tensor(DTYPE_F32, T, H);
    struct tensor y = poisoned_tensor(DTYPE_F32, T, H), id = token_ids(T), reversed = token_ids(T);
    struct dropout args = {
        .y = &y, .x = &x, .token_id = &id, .rule = {0.5f, rng_key(1, "order", 0)}};

    for (int64_t i = 0; i < T * H; i++) {
        tensor_set(&x, i, 1.0);
    }
    for (int64_t i = 0; i < T; i++) {
        ((int64_t *)reversed.data)[i] = ((int64_t *)id.data)[T - 1 - i];
    }
    op_dropout(stream, &args);
    args.y = &reversed_y;
    args.token_id = &reversed;
    op_dropout(stream, &args);
    for (int64_t i = 0; i < T * H; i++) {
        assert_true(tensor_get(&y, i) == tensor_get(&reversed_y, (T - 1 - i / H) * H + i % H));
    }
}

static void jitter_is_uniform_around_one(void **state)
{
    enum { T = 41, H = 513 };
    const enum dtype dtypes[] = {DTYPE_F32, DTYPE_BF16};
    const struct rng_key key = rng_key(2, "jitter", 1);

    for (int i = 0; i < 2; i++) {
        struct tensor x = normal_tensor(1.0, dtypes[i], T, H), id = token_ids(T);
        struct tensor y = poisoned_tensor(dtypes[i], T, H);
        double *expected = doubles_of(&x);

        for (int64_t j = 0; j < T * H; j++) {
            const uint64_t row = (uint64_t)((int64_t *)id.data)[j / H];

            expected[j] *= 1.0 + 0.02 * (2.0 * rng_uniform(key, row, (uint64_t)(j % H)) - 1.0);
        }
        WITH_THREADS(&y)
        {
            op_jitter(stream, &(struct jitter){
                                  .y = &y, .x = &x, .token_id = &id, .eps = 0.02f, .key = key});
        }
        assert_close(&y, expected, tolerance_of(dtypes[i]));
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_teardown(mask_is_the_rule_of_token_and_element, reference_empty_arena),
        cmocka_unit_test_teardown(expected_share_is_kept, reference_empty_arena),
        cmocka_unit_test_teardown(mask_follows_the_token_not_the_row, reference_empty_arena),
        cmocka_unit_test_teardown(jitter_is_uniform_around_one, reference_empty_arena),
    };

    return cmocka_run_group_tests(tests, reference_start, reference_stop);
}
