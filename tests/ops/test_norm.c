#include "reference.h"

struct norm_case {
    enum norm_kind kind;
    bool one_plus;
    int64_t t, h;
    double eps;
    double *x, *weight, *bias; /* [t,h], [h], [h] */
    const double *d_y;
};

static double applied_weight(const struct norm_case *c, int64_t i)
{
    return c->weight[i] + (c->one_plus ? 1.0 : 0.0);
}

static void reference_statistics(const struct norm_case *c, int64_t row, double *mean,
                                 double *inv_std)
{
    const double *x = c->x + row * c->h;
    double sum = 0.0, squares = 0.0;

    for (int64_t i = 0; i < c->h; i++) {
        sum += x[i];
    }
    *mean = c->kind == NORM_LAYERNORM ? sum / (double)c->h : 0.0;
    for (int64_t i = 0; i < c->h; i++) {
        squares += (x[i] - *mean) * (x[i] - *mean);
    }
    *inv_std = 1.0 / sqrt(squares / (double)c->h + c->eps);
}

static void reference_forward(const struct norm_case *c, double *y, double *means, double *inv_stds)
{
    for (int64_t row = 0; row < c->t; row++) {
        reference_statistics(c, row, &means[row], &inv_stds[row]);
        for (int64_t i = 0; i < c->h; i++) {
            y[row * c->h + i] =
                (c->x[row * c->h + i] - means[row]) * inv_stds[row] * applied_weight(c, i) +
                (c->kind == NORM_LAYERNORM ? c->bias[i] : 0.0);
        }
    }
}

/* The derivative written from the chain rule over mean and inv_std, not from the short form. */
static void reference_backward(const struct norm_case *c, double *d_x, double *d_weight,
                               double *d_bias)
{
    const double h = (double)c->h;

    for (int64_t row = 0; row < c->t; row++) {
        const double *x = c->x + row * c->h, *d_y = c->d_y + row * c->h;
        double mean, inv_std, d_inv_std = 0.0, d_mean = 0.0, d_variance;

        reference_statistics(c, row, &mean, &inv_std);
        for (int64_t i = 0; i < c->h; i++) {
            const double g = d_y[i] * applied_weight(c, i);

            d_inv_std += g * (x[i] - mean);
            d_mean -= g * inv_std;
            d_weight[i] += d_y[i] * (x[i] - mean) * inv_std;
            d_bias[i] += d_y[i];
        }
        d_variance = -0.5 * inv_std * inv_std * inv_std * d_inv_std;
        for (int64_t i = 0; i < c->h; i++) {
            d_x[row * c->h + i] = d_y[i] * applied_weight(c, i) * inv_std +
                                  d_variance * 2.0 * (x[i] - mean) / h +
                                  (c->kind == NORM_LAYERNORM ? d_mean / h : 0.0);
        }
    }
}

static double norm_loss(const void *context)
{
    const struct norm_case *c = context;
    double y[64], means[8], inv_stds[8], loss = 0.0;

    reference_forward(c, y, means, inv_stds);
    for (int64_t i = 0; i < c->t * c->h; i++) {
        loss += y[i] * c->d_y[i];
    }
    return loss;
}

static double *random_doubles(int64_t n)
{
    double *x = new_doubles(n);

    for (int64_t i = 0; i < n; i++) {
        x[i] = random_normal_number();
    }
    return x;
}

static void reference_backward_is_the_derivative(void **state)
{
    for (int variant = 0; variant < 4; variant++) {
        const struct norm_case c = {.kind = variant % 2 ? NORM_LAYERNORM : NORM_RMSNORM,
                                    .one_plus = variant >= 2,
                                    .t = 3,
                                    .h = 7,
                                    .eps = 1e-2,
                                    .x = random_doubles(21),
                                    .weight = random_doubles(7),
                                    .bias = random_doubles(7),
                                    .d_y = random_doubles(21)};
        double *d_x = new_doubles(21), *d_weight = new_doubles(7), *d_bias = new_doubles(7);

        reference_backward(&c, d_x, d_weight, d_bias);
        assert_gradient(norm_loss, &c, c.x, 21, d_x);
        assert_gradient(norm_loss, &c, c.weight, 7, d_weight);
        if (c.kind == NORM_LAYERNORM) {
            assert_gradient(norm_loss, &c, c.bias, 7, d_bias);
        }
    }
}

static void add_into(double *x, const double *y, int64_t n)
{
    for (int64_t i = 0; i < n; i++) {
        x[i] += y[i];
    }
}

static void check_backward(struct norm_case *c, enum dtype dtype, const struct tensor *x,
                           const struct tensor *weight, struct tensor *mean, struct tensor *inv_std,
                           bool with_residual)
{
    const bool layernorm = c->kind == NORM_LAYERNORM;
    struct tensor d_y = normal_tensor(1.0, dtype, c->t, c->h);
    struct tensor d_residual = normal_tensor(1.0, dtype, c->t, c->h);
    struct tensor d_x = poisoned_tensor(dtype, c->t, c->h);
    struct tensor d_weight = normal_tensor(1.0, DTYPE_F32, c->h);
    struct tensor d_bias = normal_tensor(1.0, DTYPE_F32, c->h);
    double *d_x_ref = new_doubles(c->t * c->h);
    double *d_weight_ref = doubles_of(&d_weight), *d_bias_ref = doubles_of(&d_bias);
    struct norm_backward args = {.kind = c->kind,
                                 .one_plus = c->one_plus,
                                 .d_x = &d_x,
                                 .d_weight = &d_weight,
                                 .d_bias = layernorm ? &d_bias : NULL,
                                 .d_y = &d_y,
                                 .x = x,
                                 .weight = weight,
                                 .inv_std = inv_std,
                                 .mean = layernorm ? mean : NULL,
                                 .d_residual = with_residual ? &d_residual : NULL};

    c->d_y = doubles_of(&d_y);
    reference_backward(c, d_x_ref, d_weight_ref, d_bias_ref);
    if (with_residual) {
        add_into(d_x_ref, doubles_of(&d_residual), c->t * c->h);
    }
    WITH_THREADS(&d_x, &d_weight, &d_bias)
    {
        op_norm_backward(stream, &args);
    }
    assert_close(&d_x, d_x_ref, tolerance_of(dtype));
    assert_close(&d_weight, d_weight_ref, tolerance_of(DTYPE_F32));
    if (layernorm) {
        assert_close(&d_bias, d_bias_ref, tolerance_of(DTYPE_F32));
    }
    if (with_residual) {
        args.d_x = &d_residual; /* in place */
        op_norm_backward(stream, &args);
        assert_same_bits(&d_residual, &d_x);
    }
}

static void check_norm(enum norm_kind kind, bool one_plus, enum dtype dtype, int64_t t, int64_t h,
                       bool with_residual)
{
    const bool layernorm = kind == NORM_LAYERNORM;
    struct tensor x = normal_tensor(2.0, dtype, t, h), residual = normal_tensor(2.0, dtype, t, h);
    struct tensor weight = normal_tensor(1.0, dtype, h), bias = normal_tensor(1.0, dtype, h);
    struct tensor y = poisoned_tensor(dtype, t, h), sum = poisoned_tensor(dtype, t, h);
    struct tensor mean = poisoned_tensor(DTYPE_F32, t), inv_std = poisoned_tensor(DTYPE_F32, t);
    const struct norm_forward args = {.kind = kind,
                                      .one_plus = one_plus,
                                      .eps = 1e-5f,
                                      .y = &y,
                                      .inv_std = &inv_std,
                                      .mean = layernorm ? &mean : NULL,
                                      .sum = with_residual ? &sum : NULL,
                                      .x = &x,
                                      .residual = with_residual ? &residual : NULL,
                                      .weight = &weight,
                                      .bias = layernorm ? &bias : NULL};
    struct norm_case c = {.kind = kind,
                          .one_plus = one_plus,
                          .t = t,
                          .h = h,
                          .eps = 1e-5f,
                          .weight = doubles_of(&weight),
                          .bias = doubles_of(&bias)};
    double *y_ref = new_doubles(t * h), *mean_ref = new_doubles(t), *inv_ref = new_doubles(t);

    WITH_THREADS(&y, &sum, &mean, &inv_std)
    {
        op_norm_forward(stream, &args);
    }
    c.x = doubles_of(&x);
    if (with_residual) {
        add_into(c.x, doubles_of(&residual), t * h);
        assert_close(&sum, c.x, tolerance_of(dtype));
        c.x = doubles_of(&sum); /* as rounded: what is normalised */
    }
    reference_forward(&c, y_ref, mean_ref, inv_ref);
    assert_close(&y, y_ref, tolerance_of(dtype));
    assert_close(&inv_std, inv_ref, 1e-5);
    if (layernorm) {
        assert_close(&mean, mean_ref, 1e-5);
    }
    check_backward(&c, dtype, with_residual ? &sum : &x, &weight, &mean, &inv_std, with_residual);
    if (with_residual) { /* the sum may replace either addend */
        struct norm_forward in_place = args;

        in_place.sum = &residual;
        op_norm_forward(stream, &in_place);
        assert_same_bits(&residual, &sum);
    }
}

static void forward_and_backward_agree_with_the_formulas(void **state)
{
    const int64_t sizes[][2] = {{1, 7}, {1, 64}, {3, 17}, {101, 130}, {257, 96}, {1100, 33}};
    const enum dtype dtypes[] = {DTYPE_F32, DTYPE_BF16};

    for (int variant = 0; variant < 16; variant++) {
        for (int size = 0; size < 6; size++) {
            check_norm(variant & 1 ? NORM_LAYERNORM : NORM_RMSNORM, (variant & 2) != 0,
                       dtypes[(variant & 4) != 0], sizes[size][0], sizes[size][1],
                       (variant & 8) != 0);
            reference_empty_arena(state);
        }
    }
}

static void no_rows_leave_the_gradients_unchanged(void **state)
{
    struct tensor none = tensor_new(arena, DTYPE_F32, 0, 5),
                  no_stats = tensor_new(arena, DTYPE_F32, 0);
    struct tensor w = normal_tensor(1.0, DTYPE_F32, 5), d_w = normal_tensor(1.0, DTYPE_F32, 5);
    const double *before = doubles_of(&d_w);

    op_norm_forward(
        stream,
        &(struct norm_forward){
            .kind = NORM_RMSNORM, .y = &none, .inv_std = &no_stats, .x = &none, .weight = &w});
    op_norm_backward(stream, &(struct norm_backward){.kind = NORM_RMSNORM,
                                                     .d_x = &none,
                                                     .d_weight = &d_w,
                                                     .d_y = &none,
                                                     .x = &none,
                                                     .weight = &w,
                                                     .inv_std = &no_stats});
    assert_close(&d_w, before, 0.0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_teardown(reference_backward_is_the_derivative, reference_empty_arena),
        cmocka_unit_test_teardown(forward_and_backward_agree_with_the_formulas,
                                  reference_empty_arena),
        cmocka_unit_test_teardown(no_rows_leave_the_gradients_unchanged, reference_empty_arena),
    };

    return cmocka_run_group_tests(tests, reference_start, reference_stop);
}
