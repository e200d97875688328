/* norm: RMSNorm and LayerNorm, plain and 1p, with and without the residual sum. */
#include "reference_nn.h"

enum { T = 6, H = 13 };

struct norm_case {
    struct norm norm;
    double *x, *residual, *d_y, *d_residual; /* residual, d_residual: NULL without */
};

/* What is normalised: x, or x + residual. */
static double *normalised_input(const struct norm_case *c)
{
    double *sum = new_doubles(T * H);

    for (int i = 0; i < T * H; i++) {
        sum[i] = c->x[i] + (c->residual != NULL ? c->residual[i] : 0.0);
    }
    return sum;
}

/* The sum also goes on beside the norm, and receives d_residual there. */
static double norm_loss(const void *context)
{
    const struct norm_case *c = context;
    const double *sum = normalised_input(c);

    return dot(reference_norm(&c->norm, sum, T, H), c->d_y, T * H) +
           (c->d_residual != NULL ? dot(sum, c->d_residual, T * H) : 0.0);
}

static void check_norm(enum norm_kind kind, bool one_plus, bool with_residual)
{
    struct tensor x, residual, d_y, d_x, y = poisoned_tensor(DTYPE_F32, T, H);
    struct norm_case c = {0};
    struct norm_saved saved;

    norm_init(
        &c.norm, &world.params, &world.groups,
        &(struct norm_config){
            .name = "norm", .kind = kind, .one_plus = one_plus, .hidden_size = H, .eps = 1e-3f});
    world_fill_params(0.3);
    world_make_pass(T, 1, 2);
    x = normal_tensor(2.0, DTYPE_F32, T, H);
    residual = normal_tensor(2.0, DTYPE_F32, T, H);
    d_y = normal_tensor(1.0, DTYPE_F32, T, H);
    d_x = poisoned_tensor(DTYPE_F32, T, H);
    c.x = doubles_of(&x);
    c.d_y = doubles_of(&d_y);
    if (with_residual) {
        d_x = normal_tensor(1.0, DTYPE_F32, T, H); /* d_residual is the same memory */
        c.residual = doubles_of(&residual);
        c.d_residual = doubles_of(&d_x);
    }
    norm_forward(&c.norm, &world.pass, &y, &x, with_residual ? &residual : NULL, &saved);
    assert_close(&y, reference_norm(&c.norm, normalised_input(&c), T, H), 1e-5);
    assert_close(&saved.x, normalised_input(&c), 1e-6);
    norm_backward(&c.norm, &world.pass, &d_x, &d_y, with_residual ? &d_x : NULL, &saved);
    check_gradients(norm_loss, &c, c.x, &d_x);
    assert_scratch_is_empty();
}

static void rmsnorm(void **state)
{
    check_norm(NORM_RMSNORM, false, false);
}

static void rmsnorm_1p_after_a_residual_sum(void **state)
{
    check_norm(NORM_RMSNORM, true, true);
}

static void layernorm(void **state)
{
    check_norm(NORM_LAYERNORM, false, false);
}

static void layernorm_after_a_residual_sum(void **state)
{
    check_norm(NORM_LAYERNORM, false, true);
}

static void layernorm_1p(void **state)
{
    check_norm(NORM_LAYERNORM, true, false);
}

/* A fresh norm scales with 1: stored as 1, or as 0 with 1p. */
static void a_fresh_norm_scales_with_one(void **state)
{
    struct norm plain, one_plus;

    norm_init(&plain, &world.params, &world.groups,
              &(struct norm_config){.name = "plain", .kind = NORM_LAYERNORM, .hidden_size = H});
    norm_init(&one_plus, &world.params, &world.groups,
              &(struct norm_config){.name = "1p", .one_plus = true, .hidden_size = H});
    param_list_allocate(&world.params, world.run, stream, DTYPE_F32, false);
    param_list_initialize(&world.params, stream, 1);
    for (int i = 0; i < H; i++) {
        assert_true(tensor_get(&plain.weight->value, i) == 1.0);
        assert_true(tensor_get(&plain.bias->value, i) == 0.0);
        assert_true(tensor_get(&one_plus.weight->value, i) == 0.0);
    }
    assert_null(one_plus.bias);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        layer_test(rmsnorm),      layer_test(rmsnorm_1p_after_a_residual_sum),
        layer_test(layernorm),    layer_test(layernorm_after_a_residual_sum),
        layer_test(layernorm_1p), layer_test(a_fresh_norm_scales_with_one),
    };

    return cmocka_run_group_tests(tests, reference_start, reference_stop);
}
