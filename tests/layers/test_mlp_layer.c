/* mlp: every activation, with and without biases. */
#include "reference_nn.h"

enum { T = 5, H = 8, F = 11 };

struct mlp_case {
    struct mlp mlp;
    double *x, *d_y;
};

static double mlp_loss(const void *context)
{
    const struct mlp_case *c = context;

    return dot(reference_mlp(&c->mlp, c->x, T), c->d_y, T * H);
}

static void check_mlp(enum activation_kind activation, bool bias)
{
    struct tensor x, d_y, d_x, y = poisoned_tensor(DTYPE_F32, T, H);
    struct mlp_case c;
    struct mlp_saved saved;

    mlp_init(&c.mlp, &world.params, &world.groups,
             &(struct mlp_config){.name = "mlp",
                                  .hidden_size = H,
                                  .ffn_hidden_size = F,
                                  .activation = activation,
                                  .bias = bias});
    world_fill_params(0.5);
    world_make_pass(T, 1, 2);
    x = normal_tensor(1.0, DTYPE_F32, T, H);
    d_y = normal_tensor(1.0, DTYPE_F32, T, H);
    d_x = poisoned_tensor(DTYPE_F32, T, H);
    c.x = doubles_of(&x);
    c.d_y = doubles_of(&d_y);
    mlp_forward(&c.mlp, &world.pass, &y, &x, &saved);
    assert_close(&y, reference_mlp(&c.mlp, c.x, T), 1e-5);
    mlp_backward(&c.mlp, &world.pass, &d_x, &d_y, &saved);
    check_gradients(mlp_loss, &c, c.x, &d_x);
    assert_scratch_is_empty();
}

static void swiglu(void **state)
{
    check_mlp(ACTIVATION_SWIGLU, false);
}

static void swiglu_with_biases(void **state)
{
    check_mlp(ACTIVATION_SWIGLU, true);
}

static void gelu_with_biases(void **state)
{
    check_mlp(ACTIVATION_GELU, true);
}

static void squared_relu(void **state)
{
    check_mlp(ACTIVATION_SQUARED_RELU, false);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        layer_test(swiglu),
        layer_test(swiglu_with_biases),
        layer_test(gelu_with_biases),
        layer_test(squared_relu),
    };

    return cmocka_run_group_tests(tests, reference_start, reference_stop);
}
