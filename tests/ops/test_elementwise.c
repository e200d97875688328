#include "reference.h"

static const int64_t sizes[] = {0, 7, 1023, 1025, 40000};
static const enum dtype dtypes[] = {DTYPE_F32, DTYPE_BF16};

static void check_combination(enum dtype dtype_y, enum dtype dtype_x, int64_t n, float a, float b)
{
    struct tensor x = normal_tensor(1.0, dtype_x, n);
    struct tensor y = b != 0.0f ? normal_tensor(1.0, dtype_y, n) : poisoned_tensor(dtype_y, n);
    const double *old = doubles_of(&y);
    double *expected = new_doubles(n);

    for (int64_t i = 0; i < n; i++) {
        expected[i] = (double)a * tensor_get(&x, i) + (b != 0.0f ? (double)b * old[i] : 0.0);
    }
    WITH_THREADS(&y)
    {
        op_linear_combination(stream,
                              &(struct linear_combination){.y = &y, .x = &x, .a = a, .b = b});
    }
    assert_close(&y, expected, tolerance_of(dtype_y));
}

static void combinations_of_all_dtypes_agree(void **state)
{
    for (int size = 0; size < 5; size++) {
        for (int pair = 0; pair < 4; pair++) {
            check_combination(dtypes[pair & 1], dtypes[pair >> 1], sizes[size], 1.0f, 0.0f);
            check_combination(dtypes[pair & 1], dtypes[pair >> 1], sizes[size], -0.3f, 1.7f);
        }
    }
}

static void casts_round_to_nearest_even_and_keep_nan(void **state)
{
    const double in[] = {1.00390625, 1.01171875, 3.4e38, -INFINITY, NAN};
    const double out[] = {1.0, 1.015625, INFINITY, -INFINITY, NAN};
    struct tensor x = tensor_new(arena, DTYPE_F32, 5), y = tensor_new(arena, DTYPE_BF16, 5);

    for (int i = 0; i < 5; i++) {
        tensor_set(&x, i, in[i]);
    }
    op_linear_combination(stream, &(struct linear_combination){.y = &y, .x = &x, .a = 1.0f});
    for (int i = 0; i < 5; i++) {
        assert_true(isnan(out[i]) ? isnan(tensor_get(&y, i)) : tensor_get(&y, i) == out[i]);
    }
}

static void sums_agree_also_in_place(void **state)
{
    for (int size = 0; size < 5; size++) {
        for (int i = 0; i < 2; i++) {
            const int64_t n = sizes[size];
            struct tensor u = normal_tensor(1.0, dtypes[i], 1, n),
                          v = normal_tensor(1.0, dtypes[i], 1, n);
            struct tensor y = poisoned_tensor(dtypes[i], 1, n);
            double *expected = new_doubles(n);

            for (int64_t j = 0; j < n; j++) {
                expected[j] = tensor_get(&u, j) + tensor_get(&v, j);
            }
            WITH_THREADS(&y)
            {
                op_add(stream, &(struct add){.y = &y, .u = &u, .v = &v});
            }
            assert_close(&y, expected, tolerance_of(dtypes[i]));
            op_add(stream, &(struct add){.y = &v, .u = &u, .v = &v});
            assert_same_bits(&v, &y);
        }
    }
}

static void fill_zero_writes_every_byte(void **state)
{
    struct tensor x = poisoned_tensor(DTYPE_F32, 3, 777777), small = poisoned_tensor(DTYPE_BF16, 3);

    op_fill_zero(stream, &x);
    op_fill_zero(stream, &small);
    for (int64_t i = 0; i < 3 * 777777; i++) {
        assert_true(tensor_get(&x, i) == 0.0);
    }
    assert_close(&small, new_doubles(3), 0.0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_teardown(combinations_of_all_dtypes_agree, reference_empty_arena),
        cmocka_unit_test_teardown(casts_round_to_nearest_even_and_keep_nan, reference_empty_arena),
        cmocka_unit_test_teardown(sums_agree_also_in_place, reference_empty_arena),
        cmocka_unit_test_teardown(fill_zero_writes_every_byte, reference_empty_arena),
    };

    return cmocka_run_group_tests(tests, reference_start, reference_stop);
}
