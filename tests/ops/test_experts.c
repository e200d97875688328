#include "activation_reference.h"

/* One call of the experts and everything around it. Rows beyond the last offset are poisoned:
 * nobody may read or write them. */
struct experts {
    enum activation_kind activation;
    int64_t num_tokens, num_rows, num_experts, hidden, ffn, fc1_width;
    bool gathered; /* x and d_y are tokens; else rows */
    bool with_prob, with_bias;
    bool overwrites; /* d_fc1 and d_fc2, which begin poisoned; else they are added to */
    struct tensor x, row_token, offsets, row_prob, fc1, fc2, fc1_bias, fc2_bias;
    struct tensor y, pre_activation, d_y, d_x, d_row_prob, d_fc1, d_fc2, d_fc1_bias, d_fc2_bias;
};

/* The same in double. */
struct experts_doubles {
    const struct experts *shape;
    double *x, *row_prob, *fc1, *fc2, *fc1_bias, *fc2_bias, *d_y;
    double *y, *h;
    double *d_x, *d_row_prob, *d_fc1, *d_fc2, *d_fc1_bias, *d_fc2_bias; /* d_fc* are added to */
};

static int64_t num_used_rows(const struct experts *s)
{
    return ((const int32_t *)s->offsets.data)[s->num_experts];
}

static int64_t expert_of(const struct experts *s, int64_t row)
{
    int64_t e = 0;

    while (row >= ((const int32_t *)s->offsets.data)[e + 1]) {
        e++;
    }
    return e;
}

/* Row r of x and d_y. */
static int64_t source_row(const struct experts *s, int64_t row)
{
    return s->gathered ? ((const int32_t *)s->row_token.data)[row] : row;
}

static double prob_of(const struct experts_doubles *d, int64_t row)
{
    return d->shape->with_prob ? d->row_prob[row] : 1.0;
}

static void reference_forward(const struct experts_doubles *d)
{
    const struct experts *s = d->shape;
    double *act = malloc((size_t)s->ffn * sizeof *act);

    for (int64_t r = 0; r < num_used_rows(s); r++) {
        const int64_t e = expert_of(s, r), from = source_row(s, r);
        double *h = d->h + r * s->fc1_width;

        for (int64_t i = 0; i < s->fc1_width; i++) {
            h[i] = s->with_bias ? d->fc1_bias[e * s->fc1_width + i] : 0.0;
            for (int64_t j = 0; j < s->hidden; j++) {
                h[i] += d->x[from * s->hidden + j] * d->fc1[(e * s->fc1_width + i) * s->hidden + j];
            }
        }
        reference_activation(s->activation, act, h, s->ffn);
        for (int64_t i = 0; i < s->hidden; i++) {
            double sum = s->with_bias ? d->fc2_bias[e * s->hidden + i] : 0.0;

            for (int64_t j = 0; j < s->ffn; j++) {
                sum += act[j] * d->fc2[(e * s->hidden + i) * s->ffn + j];
            }
            d->y[r * s->hidden + i] = prob_of(d, r) * sum;
        }
    }
    free(act);
}

static void reference_backward_row(const struct experts_doubles *d, int64_t r, double *act,
                                   double *d_act, double *d_h)
{
    const struct experts *s = d->shape;
    const int64_t e = expert_of(s, r), from = source_row(s, r);
    const double *x = d->x + from * s->hidden, *d_y = d->d_y + from * s->hidden;
    const double prob = prob_of(d, r);

    reference_activation(s->activation, act, d->h + r * s->fc1_width, s->ffn);
    memset(d_act, 0, (size_t)s->ffn * sizeof *d_act);
    d->d_row_prob[r] = 0.0;
    for (int64_t i = 0; i < s->hidden; i++) {
        double sum = s->with_bias ? d->fc2_bias[e * s->hidden + i] : 0.0;

        for (int64_t j = 0; j < s->ffn; j++) {
            const int64_t at = (e * s->hidden + i) * s->ffn + j;

            sum += act[j] * d->fc2[at];
            d_act[j] += prob * d_y[i] * d->fc2[at];
            d->d_fc2[at] += prob * d_y[i] * act[j];
        }
        d->d_row_prob[r] += d_y[i] * sum;
        d->d_fc2_bias[e * s->hidden + i] += prob * d_y[i];
    }
    reference_activation_backward(s->activation, d_h, d->h + r * s->fc1_width, d_act, s->ffn);
    memset(d->d_x + r * s->hidden, 0, (size_t)s->hidden * sizeof(double));
    for (int64_t i = 0; i < s->fc1_width; i++) {
        d->d_fc1_bias[e * s->fc1_width + i] += d_h[i];
        for (int64_t j = 0; j < s->hidden; j++) {
            const int64_t at = (e * s->fc1_width + i) * s->hidden + j;

            d->d_fc1[at] += d_h[i] * x[j];
            d->d_x[r * s->hidden + j] += d_h[i] * d->fc1[at];
        }
    }
}

static void reference_backward(const struct experts_doubles *d)
{
    const struct experts *s = d->shape;
    double *work = malloc((size_t)(2 * s->ffn + s->fc1_width) * sizeof *work);

    for (int64_t r = 0; r < num_used_rows(s); r++) {
        reference_backward_row(d, r, work, work + s->ffn, work + 2 * s->ffn);
    }
    free(work);
}

static struct tensor first_gradient(bool overwritten, int64_t e, int64_t m, int64_t n)
{
    return overwritten ? poisoned_tensor(DTYPE_F32, e, m, n)
                       : normal_tensor(1.0, DTYPE_F32, e, m, n);
}

/* What is added to. */
static double *doubles_of_gradient(bool overwritten, const struct tensor *x)
{
    return overwritten ? new_doubles(tensor_num_elements(x)) : doubles_of(x);
}

/* rows[e] rows for each expert, num_spare more that are not in use. */
static struct experts made_experts(struct experts s, enum dtype dtype, const int64_t *rows,
                                   int64_t num_spare)
{
    int64_t num_used = 0, num_inputs;

    s.fc1_width = activation_inputs(s.activation, s.ffn);
    s.offsets = tensor_new(arena, DTYPE_I32, s.num_experts + 1);
    for (int64_t e = 0; e < s.num_experts; e++) {
        tensor_set(&s.offsets, e, (double)num_used);
        num_used += rows[e];
    }
    tensor_set(&s.offsets, s.num_experts, (double)num_used);
    s.num_rows = num_used + num_spare;
    num_inputs = s.gathered ? s.num_tokens : s.num_rows;
    s.x = normal_tensor(1.0, dtype, num_inputs, s.hidden);
    s.d_y = normal_tensor(1.0, dtype, num_inputs, s.hidden);
    s.row_token = poisoned_tensor(DTYPE_I32, s.num_rows);
    s.row_prob = tensor_new(arena, DTYPE_F32, s.num_rows);
    for (int64_t r = 0; r < s.num_rows; r++) {
        tensor_set(&s.row_prob, r, r < num_used ? (double)random_below(1000) / 1000.0 : NAN);
    }
    for (int64_t r = 0; r < num_used; r++) {
        tensor_set(&s.row_token, r, (double)random_below(s.num_tokens));
    }
    for (int64_t i = num_used * s.hidden; !s.gathered && i < s.num_rows * s.hidden; i++) {
        tensor_set(&s.x, i, NAN);
        tensor_set(&s.d_y, i, NAN);
    }
    s.fc1 =
        normal_tensor(1.0 / sqrt((double)s.hidden), dtype, s.num_experts, s.fc1_width, s.hidden);
    s.fc2 = normal_tensor(1.0 / sqrt((double)s.ffn), dtype, s.num_experts, s.hidden, s.ffn);
    s.fc1_bias = normal_tensor(0.3, dtype, s.num_experts, s.fc1_width);
    s.fc2_bias = normal_tensor(0.3, dtype, s.num_experts, s.hidden);
    s.y = poisoned_tensor(dtype, s.num_rows, s.hidden);
    s.pre_activation = poisoned_tensor(dtype, s.num_rows, s.fc1_width);
    s.d_x = poisoned_tensor(dtype, s.num_rows, s.hidden);
    s.d_row_prob = poisoned_tensor(DTYPE_F32, s.num_rows);
    s.d_fc1 = first_gradient(s.overwrites, s.num_experts, s.fc1_width, s.hidden);
    s.d_fc2 = first_gradient(s.overwrites, s.num_experts, s.hidden, s.ffn);
    s.d_fc1_bias = normal_tensor(1.0, DTYPE_F32, s.num_experts, s.fc1_width);
    s.d_fc2_bias = normal_tensor(1.0, DTYPE_F32, s.num_experts, s.hidden);
    return s;
}

static struct experts_doubles doubles_of_experts(const struct experts *s)
{
    return (struct experts_doubles){
        .shape = s,
        .x = doubles_of(&s->x),
        .row_prob = doubles_of(&s->row_prob),
        .fc1 = doubles_of(&s->fc1),
        .fc2 = doubles_of(&s->fc2),
        .fc1_bias = doubles_of(&s->fc1_bias),
        .fc2_bias = doubles_of(&s->fc2_bias),
        .d_y = doubles_of(&s->d_y),
        .y = new_doubles(s->num_rows * s->hidden),
        .h = new_doubles(s->num_rows * s->fc1_width),
        .d_x = new_doubles(s->num_rows * s->hidden),
        .d_row_prob = new_doubles(s->num_rows),
        .d_fc1 = doubles_of_gradient(s->overwrites, &s->d_fc1),
        .d_fc2 = doubles_of_gradient(s->overwrites, &s->d_fc2),
        .d_fc1_bias = doubles_of(&s->d_fc1_bias),
        .d_fc2_bias = doubles_of(&s->d_fc2_bias),
    };
}

static struct experts_forward forward_of(struct experts *s)
{
    return (struct experts_forward){
        .activation = s->activation,
        .y = &s->y,
        .pre_activation = &s->pre_activation,
        .x = &s->x,
        .row_token = s->gathered ? &s->row_token : NULL,
        .offsets = &s->offsets,
        .row_prob = s->with_prob ? &s->row_prob : NULL,
        .fc1 = &s->fc1,
        .fc2 = &s->fc2,
        .fc1_bias = s->with_bias ? &s->fc1_bias : NULL,
        .fc2_bias = s->with_bias ? &s->fc2_bias : NULL,
    };
}

static struct experts_backward backward_of(struct experts *s)
{
    return (struct experts_backward){
        .forward = forward_of(s),
        .d_y = &s->d_y,
        .d_y_row_token = s->gathered ? &s->row_token : NULL,
        .d_x = &s->d_x,
        .d_row_prob = s->with_prob ? &s->d_row_prob : NULL,
        .d_fc1 = &s->d_fc1,
        .d_fc2 = &s->d_fc2,
        .d_fc1_bias = s->with_bias ? &s->d_fc1_bias : NULL,
        .d_fc2_bias = s->with_bias ? &s->d_fc2_bias : NULL,
        .overwrite_grads = s->overwrites,
    };
}

static void assert_rows_close(const struct tensor *got, const double *expected, int64_t num_used)
{
    const struct tensor used = tensor_rows(got, 0, num_used);
    const struct tensor spare = tensor_rows(got, num_used, got->dim[0] - num_used);

    assert_close(&used, expected, tolerance_of(got->dtype == DTYPE_F32 ? DTYPE_F32 : DTYPE_BF16));
    for (int64_t i = 0; i < tensor_num_elements(&spare); i++) {
        assert_true(isnan(tensor_get(&spare, i)));
    }
}

static void check_experts(struct experts s)
{
    const double tolerance = tolerance_of(s.x.dtype);
    struct experts_doubles d = doubles_of_experts(&s);
    const int64_t num_used = num_used_rows(&s);
    const struct experts_forward forward = forward_of(&s);
    const struct experts_backward backward = backward_of(&s);

    reference_forward(&d);
    op_experts_forward(stream, &forward);
    assert_rows_close(&s.pre_activation, d.h, num_used);
    assert_rows_close(&s.y, d.y, num_used);
    d.h = doubles_of(&s.pre_activation); /* an input of backward, rounded in bf16 */
    reference_backward(&d);
    op_experts_backward(stream, &backward);
    assert_rows_close(&s.d_x, d.d_x, num_used);
    if (s.with_prob) {
        const struct tensor used = tensor_rows(&s.d_row_prob, 0, num_used);

        assert_close(&used, d.d_row_prob, tolerance);
    }
    assert_close(&s.d_fc1, d.d_fc1, tolerance);
    assert_close(&s.d_fc2, d.d_fc2, tolerance);
    if (s.with_bias) {
        assert_close(&s.d_fc1_bias, d.d_fc1_bias, tolerance);
        assert_close(&s.d_fc2_bias, d.d_fc2_bias, tolerance);
    }
}

/* In both dtypes, with gradients that are added to and overwritten. */
static void check_all_kinds(struct experts s, const int64_t *rows, int64_t num_spare)
{
    for (int i = 0; i < 2; i++) {
        s.overwrites = i == 1;
        check_experts(made_experts(s, DTYPE_F32, rows, num_spare));
        check_experts(made_experts(s, DTYPE_BF16, rows, num_spare));
    }
}

static const enum activation_kind kinds[] = {ACTIVATION_SWIGLU, ACTIVATION_GELU,
                                             ACTIVATION_SQUARED_RELU};

static void tokens_are_gathered_and_weighed(void **state)
{
    for (int kind = 0; kind < 3; kind++) {
        check_all_kinds((struct experts){.activation = kinds[kind],
                                         .num_tokens = 29,
                                         .num_experts = 3,
                                         .hidden = 40,
                                         .ffn = 72,
                                         .gathered = true,
                                         .with_prob = true},
                        (int64_t[]){13, 17, 5}, 3);
    }
}

static void rows_with_biases(void **state)
{
    for (int kind = 0; kind < 3; kind++) {
        check_all_kinds((struct experts){.activation = kinds[kind],
                                         .num_tokens = 1,
                                         .num_experts = 2,
                                         .hidden = 33,
                                         .ffn = 61,
                                         .with_prob = true,
                                         .with_bias = true},
                        (int64_t[]){7, 11}, 2);
    }
}

static void without_probabilities(void **state)
{
    check_all_kinds((struct experts){.activation = ACTIVATION_SWIGLU,
                                     .num_tokens = 9,
                                     .num_experts = 2,
                                     .hidden = 32,
                                     .ffn = 48,
                                     .gathered = true,
                                     .with_bias = true},
                    (int64_t[]){5, 6}, 0);
}

static void empty_experts_and_one_that_takes_all(void **state)
{
    const struct experts s = {.activation = ACTIVATION_SWIGLU,
                              .num_tokens = 10,
                              .num_experts = 5,
                              .hidden = 24,
                              .ffn = 64,
                              .gathered = true,
                              .with_prob = true,
                              .with_bias = true};

    check_all_kinds(s, (int64_t[]){0, 0, 31, 0, 0}, 1);
    check_all_kinds(s, (int64_t[]){1, 0, 0, 0, 9}, 1);
}

static void no_rows_at_all_add_nothing(void **state)
{
    struct experts s = made_experts((struct experts){.activation = ACTIVATION_GELU,
                                                     .num_tokens = 1,
                                                     .num_experts = 2,
                                                     .hidden = 8,
                                                     .ffn = 8,
                                                     .with_prob = true},
                                    DTYPE_F32, (int64_t[]){0, 0}, 4);
    const double *d_fc1 = doubles_of(&s.d_fc1), *d_fc2 = doubles_of(&s.d_fc2);
    const struct experts_forward forward = forward_of(&s);
    const struct experts_backward backward = backward_of(&s);

    op_experts_forward(stream, &forward);
    op_experts_backward(stream, &backward);
    assert_close(&s.d_fc1, d_fc1, 0.0);
    assert_close(&s.d_fc2, d_fc2, 0.0);
}

static void no_rows_at_all_overwrite_with_zeros(void **state)
{
    struct experts s = made_experts((struct experts){.activation = ACTIVATION_SWIGLU,
                                                     .num_tokens = 1,
                                                     .num_experts = 3,
                                                     .hidden = 8,
                                                     .ffn = 8,
                                                     .overwrites = true},
                                    DTYPE_BF16, (int64_t[]){0, 0, 0}, 0);
    const struct experts_backward backward = backward_of(&s);

    op_experts_backward(stream, &backward);
    assert_close(&s.d_fc1, new_doubles(tensor_num_elements(&s.d_fc1)), 0.0);
    assert_close(&s.d_fc2, new_doubles(tensor_num_elements(&s.d_fc2)), 0.0);
}

/* Large enough for parallel regions and several blocks of a row. */
static void large_rows_give_the_same_bits_for_any_number_of_threads(void **state)
{
    struct experts s = made_experts((struct experts){.activation = ACTIVATION_SWIGLU,
                                                     .num_tokens = 80,
                                                     .num_experts = 2,
                                                     .hidden = 48,
                                                     .ffn = 1100,
                                                     .gathered = true,
                                                     .with_prob = true,
                                                     .with_bias = true},
                                    DTYPE_F32, (int64_t[]){77, 3}, 0);
    const struct experts_forward forward = forward_of(&s);
    const struct experts_backward backward = backward_of(&s);

    check_experts(s);
    WITH_THREADS(&s.y, &s.d_x, &s.d_row_prob, &s.d_fc1, &s.d_fc2, &s.d_fc1_bias, &s.d_fc2_bias)
    {
        op_experts_forward(stream, &forward);
        op_experts_backward(stream, &backward);
    }
}

static double experts_loss(const void *context)
{
    const struct experts_doubles *d = context;
    const struct experts *s = d->shape;
    double loss = 0.0;

    reference_forward(d);
    for (int64_t i = 0; i < num_used_rows(s) * s->hidden; i++) {
        loss += d->y[i] * d->d_y[source_row(s, i / s->hidden) * s->hidden + i % s->hidden];
    }
    return loss;
}

static void reference_backward_is_the_derivative(void **state)
{
    for (int kind = 0; kind < 3; kind++) {
        const struct experts s = made_experts((struct experts){.activation = kinds[kind],
                                                               .num_tokens = 1,
                                                               .num_experts = 3,
                                                               .hidden = 4,
                                                               .ffn = 3,
                                                               .with_prob = true,
                                                               .with_bias = true},
                                              DTYPE_F32, (int64_t[]){2, 0, 3}, 0);
        struct experts_doubles d = doubles_of_experts(&s);
        const int64_t fc1_size = tensor_num_elements(&s.fc1),
                      fc2_size = tensor_num_elements(&s.fc2);

        d.d_fc1 = new_doubles(fc1_size);
        d.d_fc2 = new_doubles(fc2_size);
        d.d_fc1_bias = new_doubles(3 * s.fc1_width);
        d.d_fc2_bias = new_doubles(3 * s.hidden);
        reference_forward(&d);
        reference_backward(&d);
        assert_gradient(experts_loss, &d, d.x, 5 * s.hidden, d.d_x);
        assert_gradient(experts_loss, &d, d.row_prob, 5, d.d_row_prob);
        assert_gradient(experts_loss, &d, d.fc1, fc1_size, d.d_fc1);
        assert_gradient(experts_loss, &d, d.fc2, fc2_size, d.d_fc2);
        assert_gradient(experts_loss, &d, d.fc1_bias, 3 * s.fc1_width, d.d_fc1_bias);
        assert_gradient(experts_loss, &d, d.fc2_bias, 3 * s.hidden, d.d_fc2_bias);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_teardown(tokens_are_gathered_and_weighed, reference_empty_arena),
        cmocka_unit_test_teardown(rows_with_biases, reference_empty_arena),
        cmocka_unit_test_teardown(without_probabilities, reference_empty_arena),
        cmocka_unit_test_teardown(empty_experts_and_one_that_takes_all, reference_empty_arena),
        cmocka_unit_test_teardown(no_rows_at_all_add_nothing, reference_empty_arena),
        cmocka_unit_test_teardown(no_rows_at_all_overwrite_with_zeros, reference_empty_arena),
        cmocka_unit_test_teardown(large_rows_give_the_same_bits_for_any_number_of_threads,
                                  reference_empty_arena),
        cmocka_unit_test_teardown(reference_backward_is_the_derivative, reference_empty_arena),
    };

    return cmocka_run_group_tests(tests, reference_start, reference_stop);
}
