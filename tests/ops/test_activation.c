#include "activation_reference.h"

static const enum activation_kind kinds[] = {ACTIVATION_SWIGLU, ACTIVATION_GELU,
                                             ACTIVATION_SQUARED_RELU};
static const enum dtype dtypes[] = {DTYPE_F32, DTYPE_BF16};

static void check_shape(enum activation_kind kind, enum dtype dtype, int64_t t, int64_t f)
{
    const int64_t inputs = activation_inputs(kind, f);
    struct tensor x = normal_tensor(2.0, dtype, t, inputs), d_y = normal_tensor(1.0, dtype, t, f);
    struct tensor y = poisoned_tensor(dtype, t, f), d_x = poisoned_tensor(dtype, t, inputs);
    const double *x_ref = doubles_of(&x), *d_y_ref = doubles_of(&d_y);
    double *y_ref = new_doubles(t * f), *d_x_ref = new_doubles(t * inputs);

    for (int64_t i = 0; i < t; i++) {
        reference_activation(kind, y_ref + i * f, x_ref + i * inputs, f);
        reference_activation_backward(kind, d_x_ref + i * inputs, x_ref + i * inputs,
                                      d_y_ref + i * f, f);
    }
    WITH_THREADS(&y, &d_x)
    {
        op_activation_forward(stream, &(struct activation){.kind = kind, .y = &y, .x = &x});
        op_activation_backward(
            stream, &(struct activation){.kind = kind, .x = &x, .d_y = &d_y, .d_x = &d_x});
    }
    assert_close(&y, y_ref, tolerance_of(dtype));
    assert_close(&d_x, d_x_ref, tolerance_of(dtype));

    op_activation_backward(stream,
                           &(struct activation){.kind = kind, .x = &x, .d_y = &d_y, .d_x = &x});
    assert_same_bits(&x, &d_x);
}

static void all_kinds_and_dtypes_agree_with_the_formulas(void **state)
{
    const int64_t shapes[][2] = {{1, 1}, {3, 17}, {7, 1031}, {64, 512}};

    for (int kind = 0; kind < 3; kind++) {
        for (int dtype = 0; dtype < 2; dtype++) {
            for (int shape = 0; shape < 4; shape++) {
                check_shape(kinds[kind], dtypes[dtype], shapes[shape][0], shapes[shape][1]);
            }
        }
    }
}

struct row {
    enum activation_kind kind;
    double x[14], weight[7];
};

static double row_loss(const void *context)
{
    const struct row *row = context;
    double y[7], loss = 0.0;

    reference_activation(row->kind, y, row->x, 7);
    for (int i = 0; i < 7; i++) {
        loss += y[i] * row->weight[i];
    }
    return loss;
}

static void reference_backward_is_the_derivative(void **state)
{
    for (int kind = 0; kind < 3; kind++) {
        struct row row = {.kind = kinds[kind]};
        double gradient[14] = {0.0};

        for (int i = 0; i < 14; i++) {
            row.x[i] = random_normal_number();
            row.weight[i / 2] = random_normal_number();
        }
        reference_activation_backward(row.kind, gradient, row.x, row.weight, 7);
        assert_gradient(row_loss, &row, row.x, activation_inputs(row.kind, 7), gradient);
    }
}

/* The formulas as ops.h's sources write them. */
static void worked_by_hand(void **state)
{
    struct tensor x = tensor_new(arena, DTYPE_F32, 1, 2), y = poisoned_tensor(DTYPE_F32, 1, 2);
    struct tensor gated = poisoned_tensor(DTYPE_F32, 1, 1);

    tensor_set(&x, 0, 1.0);
    tensor_set(&x, 1, -2.0);
    op_activation_forward(stream, &(struct activation){.kind = ACTIVATION_GELU, .y = &y, .x = &x});
    assert_values(&y, 1e-6, 0.5 * (1.0 + tanh(sqrt(2.0 / M_PI) * 1.044715)),
                  -1.0 * (1.0 + tanh(sqrt(2.0 / M_PI) * (-2.0 - 8.0 * 0.044715))));
    op_activation_forward(stream,
                          &(struct activation){.kind = ACTIVATION_SQUARED_RELU, .y = &y, .x = &x});
    assert_values(&y, 0.0, 1.0, 0.0);
    op_activation_forward(stream,
                          &(struct activation){.kind = ACTIVATION_SWIGLU, .y = &gated, .x = &x});
    assert_values(&gated, 1e-6, -2.0 / (1.0 + exp(-1.0)));
}

/* exp would overflow; the result must not be NaN. */
static void large_inputs_saturate(void **state)
{
    struct tensor x = tensor_new(arena, DTYPE_F32, 1, 4), y = poisoned_tensor(DTYPE_F32, 1, 4);
    struct tensor d_y = tensor_new(arena, DTYPE_F32, 1, 4), d_x = poisoned_tensor(DTYPE_F32, 1, 4);

    for (int i = 0; i < 4; i++) {
        tensor_set(&x, i, (double[]){-1e4, -200.0, 200.0, 1e4}[i]);
        tensor_set(&d_y, i, 1.0);
    }
    op_activation_forward(stream, &(struct activation){.kind = ACTIVATION_GELU, .y = &y, .x = &x});
    op_activation_backward(
        stream, &(struct activation){.kind = ACTIVATION_GELU, .x = &x, .d_y = &d_y, .d_x = &d_x});
    assert_values(&y, 1e-7, 0.0, 0.0, 200.0, 1e4);
    assert_values(&d_x, 1e-7, 0.0, 0.0, 1.0, 1.0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_teardown(all_kinds_and_dtypes_agree_with_the_formulas,
                                  reference_empty_arena),
        cmocka_unit_test(reference_backward_is_the_derivative),
        cmocka_unit_test_teardown(worked_by_hand, reference_empty_arena),
        cmocka_unit_test_teardown(large_inputs_saturate, reference_empty_arena),
    };

    return cmocka_run_group_tests(tests, reference_start, reference_stop);
}
