/* linear: forward and backward against plain loops and finite differences. */
#include "reference_nn.h"

enum { T = 7, IN = 10 };

struct linear_case {
    struct linear linear;
    double *x, *d_y;
};

static double linear_loss(const void *context)
{
    const struct linear_case *c = context;

    return dot(reference_linear(&c->linear, c->x, T), c->d_y, T * c->linear.out_features);
}

static void check_linear(const struct linear_config *config)
{
    struct linear_case c;
    struct tensor x, y, d_x, d_y;

    linear_init(&c.linear, &world.params, &world.groups, config);
    world_fill_params(1.0);
    world_make_pass(T, 1, 2);
    x = normal_tensor(1.0, DTYPE_F32, T, IN);
    d_x = poisoned_tensor(DTYPE_F32, T, IN);
    y = poisoned_tensor(DTYPE_F32, T, c.linear.out_features);
    d_y = normal_tensor(1.0, DTYPE_F32, T, c.linear.out_features);
    c.x = doubles_of(&x);
    c.d_y = doubles_of(&d_y);
    linear_forward(&c.linear, &world.pass, &y, &x);
    assert_close(&y, reference_linear(&c.linear, c.x, T), 1e-5);
    linear_backward(&c.linear, &world.pass, &d_x, &d_y, &x);
    check_gradients(linear_loss, &c, c.x, &d_x);
    assert_scratch_is_empty();
}

static void a_column_linear_with_structured_features(void **state)
{
    check_linear(&(struct linear_config){.name = "fc",
                                         .split = LINEAR_COLUMN,
                                         .num_out_dims = 3,
                                         .out_dims = {2, 3, 4},
                                         .in_features = IN});
}

static void a_column_linear_with_bias(void **state)
{
    check_linear(&(struct linear_config){.name = "fc",
                                         .split = LINEAR_COLUMN,
                                         .num_out_dims = 2,
                                         .out_dims = {2, 5},
                                         .split_dim = 1,
                                         .in_features = IN,
                                         .bias = true});
}

static void a_row_linear_with_bias(void **state)
{
    check_linear(&(struct linear_config){.name = "fc",
                                         .split = LINEAR_ROW,
                                         .num_out_dims = 1,
                                         .out_dims = {9},
                                         .in_features = IN,
                                         .bias = true});
}

/* The first layer's input needs no gradient; the weight's gradient is the same. */
static void backward_without_input_gradient(void **state)
{
    struct linear linear;
    struct tensor x, d_y, d_x, first;

    linear_init(&linear, &world.params, &world.groups,
                &(struct linear_config){.name = "fc",
                                        .split = LINEAR_ROW,
                                        .num_out_dims = 1,
                                        .out_dims = {9},
                                        .in_features = IN});
    world_fill_params(1.0);
    world_make_pass(T, 1, 2);
    x = normal_tensor(1.0, DTYPE_F32, T, IN);
    d_x = poisoned_tensor(DTYPE_F32, T, IN);
    d_y = normal_tensor(1.0, DTYPE_F32, T, 9);
    linear_backward(&linear, &world.pass, &d_x, &d_y, &x);
    first = poisoned_tensor(DTYPE_F32, 9, IN);
    memcpy(first.data, linear.weight->grad.data, tensor_size_bytes(&first));
    world_reset_grads();
    linear_backward(&linear, &world.pass, NULL, &d_y, &x);
    assert_same_bits(&first, &linear.weight->grad);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        layer_test(a_column_linear_with_structured_features),
        layer_test(a_column_linear_with_bias),
        layer_test(a_row_linear_with_bias),
        layer_test(backward_without_input_gradient),
    };

    return cmocka_run_group_tests(tests, reference_start, reference_stop);
}
