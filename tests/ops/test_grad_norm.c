#include "reference.h"

static void check_sums(enum dtype dtype, int64_t n)
{
    struct tensor x = normal_tensor(1.0, dtype, n);
    struct tensor sum = tensor_new(arena, DTYPE_F64, 1), count = tensor_new(arena, DTYPE_F64, 1);
    double expected = 0.5, num_zeros = 2.0;

    for (int64_t i = 0; i < n; i++) {
        if (random_below(7) == 0) {
            tensor_set(&x, i, random_below(2) == 0 ? 0.0 : -0.0);
        }
        expected += tensor_get(&x, i) * tensor_get(&x, i);
        num_zeros += tensor_get(&x, i) == 0.0 ? 1.0 : 0.0;
    }
    tensor_set(&sum, 0, 0.5);
    tensor_set(&count, 0, 2.0);
    WITH_THREADS(&sum, &count)
    {
        op_square_sum(stream, &(struct square_sum){.sum = &sum, .x = &x});
        op_zero_count(stream, &(struct zero_count){.count = &count, .x = &x});
    }
    assert_close(&sum, &expected, 1e-12);
    assert_close(&count, &num_zeros, 0.0);
}

static void sums_are_added_in_double(void **state)
{
    const int64_t sizes[] = {0, 1, 15, 1024, 16385, 200003};

    for (int i = 0; i < 6; i++) {
        check_sums(DTYPE_F32, sizes[i]);
        check_sums(DTYPE_BF16, sizes[i]);
    }
}

static void squares_beyond_floats_do_not_overflow(void **state)
{
    struct tensor x = tensor_new(arena, DTYPE_F32, 2), sum = zero_tensor(DTYPE_F64, 1);

    tensor_set(&x, 0, 3e30);
    tensor_set(&x, 1, 4e30);
    op_square_sum(stream, &(struct square_sum){.sum = &sum, .x = &x});
    assert_true(fabs(sqrt(tensor_get(&sum, 0)) / 5e30 - 1.0) < 1e-6);
}

static void check_clip(double square_sum, float max_norm, double norm, double scale)
{
    struct tensor sum = tensor_new(arena, DTYPE_F64, 1);
    struct tensor got_norm = poisoned_tensor(DTYPE_F32, 1),
                  got_scale = poisoned_tensor(DTYPE_F32, 1);

    tensor_set(&sum, 0, square_sum);
    op_clip_scale(stream,
                  &(struct clip_scale){
                      .norm = &got_norm, .scale = &got_scale, .sum = &sum, .max_norm = max_norm});
    assert_close(&got_norm, &norm, 1e-6);
    assert_close(&got_scale, &scale, 1e-6);
}

static void gradients_are_clipped_only_above_the_norm(void **state)
{
    check_clip(16.0, 1.0f, 4.0, 1.0 / (4.0 + 1e-6));
    check_clip(0.25, 1.0f, 0.5, 1.0);
    check_clip(16.0, 0.0f, 4.0, 1.0);
    check_clip(0.0, 1.0f, 0.0, 1.0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_teardown(sums_are_added_in_double, reference_empty_arena),
        cmocka_unit_test_teardown(squares_beyond_floats_do_not_overflow, reference_empty_arena),
        cmocka_unit_test_teardown(gradients_are_clipped_only_above_the_norm, reference_empty_arena),
    };

    return cmocka_run_group_tests(tests, reference_start, reference_stop);
}
