#include "reference.h"

/* A flat range with its states. */
struct range {
    struct tensor param, master, grad, grad_scale, exp_avg, exp_avg_sq, momentum;
};

static struct range made_range(enum dtype dtype, int64_t n)
{
    struct range r = {
        .param = poisoned_tensor(dtype, n),
        .master = normal_tensor(1.0, DTYPE_F32, n),
        .grad = normal_tensor(1.0, DTYPE_F32, n),
        .grad_scale = tensor_new(arena, DTYPE_F32, 1),
        .exp_avg = zero_tensor(DTYPE_F32, n),
        .exp_avg_sq = zero_tensor(DTYPE_F32, n),
        .momentum = poisoned_tensor(DTYPE_F32, n),
    };

    tensor_set(&r.grad_scale, 0, 0.375);
    return r;
}

static void adam(struct range *r, int64_t step)
{
    op_adam_step(stream, &(struct adam_step){.param = &r->param,
                                             .master = &r->master,
                                             .exp_avg = &r->exp_avg,
                                             .exp_avg_sq = &r->exp_avg_sq,
                                             .grad = &r->grad,
                                             .grad_scale = &r->grad_scale,
                                             .lr = 1e-2f,
                                             .beta1 = 0.9f,
                                             .beta2 = 0.95f,
                                             .eps = 1e-8f,
                                             .weight_decay = 0.1f,
                                             .step = step});
}

static void check_adam(enum dtype dtype, int64_t n)
{
    struct range r = made_range(dtype, n);
    double *p = doubles_of(&r.master), *m = new_doubles(n), *v = new_doubles(n);

    for (int step = 1; step <= 5; step++) {
        const double beta1 = 0.9f, beta2 = 0.95f, lr = 1e-2f,
                     decay = 0.1f; /* as the op gets them */

        tensor_fill_normal(&r.grad, pow(10.0, -step));
        for (int64_t i = 0; i < n; i++) {
            const double g = tensor_get(&r.grad, i) * 0.375;

            m[i] = beta1 * m[i] + (1.0 - beta1) * g;
            v[i] = beta2 * v[i] + (1.0 - beta2) * g * g;
            p[i] -= lr * (m[i] / (1.0 - pow(beta1, step)) /
                              (sqrt(v[i] / (1.0 - pow(beta2, step))) + 1e-8) +
                          decay * p[i]);
        }
        WITH_THREADS(&r.param, &r.master, &r.exp_avg, &r.exp_avg_sq)
        {
            adam(&r, step);
        }
    }
    assert_close(&r.master, p, 1e-6);
    assert_close(&r.exp_avg, m, 1e-6);
    assert_close(&r.exp_avg_sq, v, 1e-6);
    for (int64_t i = 0; i < n; i++) {
        struct tensor rounded = tensor_new(arena, dtype, 1);

        tensor_set(&rounded, 0, tensor_get(&r.master, i));
        assert_true(tensor_get(&r.param, i) == tensor_get(&rounded, 0));
    }
}

static void adam_agrees_with_the_formula_over_steps(void **state)
{
    check_adam(DTYPE_F32, 1);
    check_adam(DTYPE_F32, 20011);
    check_adam(DTYPE_BF16, 1025);
}

/* First step, g = 3 * 0.375 > 0, no decay: m' = g and v' = g^2, so p moves by lr exactly. */
static void the_first_adam_step_has_the_size_of_lr(void **state)
{
    struct range r = made_range(DTYPE_F32, 2);

    tensor_set(&r.master, 0, 0.0);
    tensor_set(&r.master, 1, 0.0);
    tensor_set(&r.grad, 0, 3.0);
    tensor_set(&r.grad, 1, -1e-3);
    adam(&r, 1);
    assert_values(&r.master, 1e-4, -1e-2, 1e-2);
}

static void the_parameter_may_be_the_master(void **state)
{
    struct range r = made_range(DTYPE_F32, 3000), alias = made_range(DTYPE_F32, 3000);

    memcpy(alias.master.data, r.master.data, tensor_size_bytes(&r.master));
    memcpy(alias.grad.data, r.grad.data, tensor_size_bytes(&r.grad));
    alias.param = alias.master;
    adam(&r, 1);
    adam(&alias, 1);
    assert_same_bits(&alias.master, &r.master);
    assert_same_bits(&alias.master, &r.param);
}

static void check_sgd(enum dtype dtype, int64_t n, float momentum)
{
    struct range r = made_range(dtype, n);
    double *p = doubles_of(&r.master), *b = new_doubles(n);

    for (int step = 0; step < 4; step++) {
        tensor_fill_normal(&r.grad, 1.0);
        for (int64_t i = 0; i < n; i++) {
            const double g = tensor_get(&r.grad, i) * 0.375 + (double)0.01f * p[i];

            b[i] = step == 0 ? g : (double)momentum * b[i] + g;
            p[i] -= (double)0.1f * b[i];
        }
        WITH_THREADS(&r.param, &r.master, &r.momentum)
        {
            op_sgd_step(stream,
                        &(struct sgd_step){.param = &r.param,
                                           .master = &r.master,
                                           .momentum_buffer = momentum != 0.0f ? &r.momentum : NULL,
                                           .grad = &r.grad,
                                           .grad_scale = &r.grad_scale,
                                           .lr = 0.1f,
                                           .momentum = momentum,
                                           .weight_decay = 0.01f,
                                           .first_step = step == 0});
        }
    }
    assert_close(&r.master, p, 1e-6);
    assert_close(&r.param, p, dtype == DTYPE_BF16 ? 4e-3 : 1e-6);
    if (momentum != 0.0f) {
        assert_close(&r.momentum, b, 1e-6);
    }
}

static void sgd_agrees_with_the_formula_over_steps(void **state)
{
    check_sgd(DTYPE_F32, 17, 0.0f);
    check_sgd(DTYPE_F32, 20011, 0.9f);
    check_sgd(DTYPE_BF16, 1025, 0.9f);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_teardown(adam_agrees_with_the_formula_over_steps, reference_empty_arena),
        cmocka_unit_test_teardown(the_first_adam_step_has_the_size_of_lr, reference_empty_arena),
        cmocka_unit_test_teardown(the_parameter_may_be_the_master, reference_empty_arena),
        cmocka_unit_test_teardown(sgd_agrees_with_the_formula_over_steps, reference_empty_arena),
    };

    return cmocka_run_group_tests(tests, reference_start, reference_stop);
}
