#include "reference.h"

static void check_shape(enum dtype dtype, int64_t t, int64_t n)
{
    struct tensor y = normal_tensor(1.0, dtype, t, n), bias = normal_tensor(1.0, dtype, n);
    struct tensor d_bias = normal_tensor(1.0, DTYPE_F32, n);
    double *sum = doubles_of(&d_bias), *y_ref = doubles_of(&y);
    const double *d_y = doubles_of(&y);

    for (int64_t i = 0; i < t * n; i++) {
        sum[i % n] += d_y[i];
        y_ref[i] += tensor_get(&bias, i % n);
    }
    WITH_THREADS(&d_bias)
    {
        op_bias_backward(stream, &(struct bias_backward){.d_bias = &d_bias, .d_y = &y});
    }
    assert_close(&d_bias, sum, tolerance_of(DTYPE_F32));
    WITH_THREADS(&y)
    {
        op_bias_forward(stream, &(struct bias_forward){.y = &y, .bias = &bias});
    }
    assert_close(&y, y_ref, tolerance_of(dtype));
}

static void bias_and_its_gradient_agree_with_plain_loops(void **state)
{
    const int64_t sizes[][2] = {{1, 1}, {0, 5}, {17, 3}, {103, 1031}, {1500, 40}};

    for (int size = 0; size < 5; size++) {
        check_shape(DTYPE_F32, sizes[size][0], sizes[size][1]);
        check_shape(DTYPE_BF16, sizes[size][0], sizes[size][1]);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_teardown(bias_and_its_gradient_agree_with_plain_loops,
                                  reference_empty_arena),
    };

    return cmocka_run_group_tests(tests, reference_start, reference_stop);
}
