#include "reference.h"

static double reference_loss(const double *logits, int64_t v, int64_t label)
{
    double max = logits[0], sum = 0.0;

    for (int64_t i = 1; i < v; i++) {
        max = fmax(max, logits[i]);
    }
    for (int64_t i = 0; i < v; i++) {
        sum += exp(logits[i] - max);
    }
    return log(sum) + max - logits[label];
}

static void reference_gradient(double *d, const double *logits, int64_t v, int64_t label)
{
    const double loss = reference_loss(logits, v, label);

    for (int64_t i = 0; i < v; i++) {
        d[i] = exp(logits[i] - (loss + logits[label])) - (i == label ? 1.0 : 0.0);
    }
}

struct token {
    double logits[9];
    int64_t label;
};

static double token_reference_loss(const void *context)
{
    const struct token *token = context;

    return reference_loss(token->logits, 9, token->label);
}

static void reference_gradient_is_the_derivative(void **state)
{
    struct token token = {.label = 4};
    double d[9];

    for (int i = 0; i < 9; i++) {
        token.logits[i] = random_normal_number();
    }
    reference_gradient(d, token.logits, 9, token.label);
    assert_gradient(token_reference_loss, &token, token.logits, 9, d);
}

/* The vocabulary cut into `parts` ranks as TP does it. */
struct part {
    struct tensor logits, max, sum_exp, target;
};

static void combine(struct part *parts, int num_parts, int64_t t, struct tensor *max,
                    struct tensor *sum_exp, struct tensor *target)
{
    memcpy(max->data, parts[0].max.data, tensor_size_bytes(max));
    memset(sum_exp->data, 0, tensor_size_bytes(sum_exp));
    memset(target->data, 0, tensor_size_bytes(target));
    for (int p = 1; p < num_parts; p++) {
        for (int64_t i = 0; i < t; i++) {
            tensor_set(max, i, fmax(tensor_get(max, i), tensor_get(&parts[p].max, i)));
        }
    }
    for (int p = 0; p < num_parts; p++) {
        op_softmax_rescale(stream, &(struct softmax_rescale){.sum_exp = &parts[p].sum_exp,
                                                             .local_max = &parts[p].max,
                                                             .max = max});
        for (int64_t i = 0; i < t; i++) {
            tensor_set(sum_exp, i, tensor_get(sum_exp, i) + tensor_get(&parts[p].sum_exp, i));
            tensor_set(target, i, tensor_get(target, i) + tensor_get(&parts[p].target, i));
        }
    }
}

static void check_loss(enum dtype dtype, int64_t t, int64_t v, int num_parts, double deviation)
{
    struct part parts[3];
    struct tensor label = tensor_new(arena, DTYPE_I32, t),
                  d_loss = normal_tensor(1.0, DTYPE_F32, t);
    struct tensor max = poisoned_tensor(DTYPE_F32, t), sum_exp = poisoned_tensor(DTYPE_F32, t);
    struct tensor target = poisoned_tensor(DTYPE_F32, t), loss = poisoned_tensor(DTYPE_F32, t);
    const int64_t all = v * num_parts;
    double *logits = new_doubles(t * all), *loss_ref = new_doubles(t),
           *d_ref = new_doubles(t * all);

    for (int64_t i = 0; i < t; i++) {
        ((int32_t *)label.data)[i] = (int32_t)random_below(all);
    }
    for (int p = 0; p < num_parts; p++) {
        parts[p] =
            (struct part){normal_tensor(deviation, dtype, t, v), poisoned_tensor(DTYPE_F32, t),
                          poisoned_tensor(DTYPE_F32, t), poisoned_tensor(DTYPE_F32, t)};
        WITH_THREADS(&parts[p].max, &parts[p].sum_exp, &parts[p].target)
        {
            op_cross_entropy_forward(stream, &(struct cross_entropy){.max = &parts[p].max,
                                                                     .sum_exp = &parts[p].sum_exp,
                                                                     .target = &parts[p].target,
                                                                     .label = &label,
                                                                     .logits = &parts[p].logits,
                                                                     .vocab_start = p * v});
        }
        for (int64_t i = 0; i < t * v; i++) {
            logits[i / v * all + p * v + i % v] = tensor_get(&parts[p].logits, i);
        }
    }
    combine(parts, num_parts, t, &max, &sum_exp, &target);
    op_token_loss(stream, &(struct token_loss){
                              .loss = &loss, .max = &max, .sum_exp = &sum_exp, .target = &target});
    for (int64_t i = 0; i < t; i++) {
        const int64_t index = ((int32_t *)label.data)[i];

        loss_ref[i] = reference_loss(logits + i * all, all, index);
        reference_gradient(d_ref + i * all, logits + i * all, all, index);
    }
    assert_close(&loss, loss_ref, 1e-5);
    for (int p = 0; p < num_parts; p++) {
        double *expected = new_doubles(t * v);

        for (int64_t i = 0; i < t * v; i++) {
            expected[i] = tensor_get(&d_loss, i / v) * d_ref[i / v * all + p * v + i % v];
        }
        WITH_THREADS(&parts[p].logits)
        {
            op_cross_entropy_backward(stream,
                                      &(struct cross_entropy_backward){.logits = &parts[p].logits,
                                                                       .max = &max,
                                                                       .sum_exp = &sum_exp,
                                                                       .label = &label,
                                                                       .d_loss = &d_loss,
                                                                       .vocab_start = p * v});
        }
        assert_close(&parts[p].logits, expected, tolerance_of(dtype));
    }
}

/* A whole vocabulary: the gradient comes with the statistics, elsewhere or in place, and is that of
 * the two passes, bit by bit. */
static void check_gradient_with_the_loss(enum dtype dtype, int64_t t, int64_t v)
{
    struct tensor label = tensor_new(arena, DTYPE_I32, t),
                  d_loss = normal_tensor(1.0, DTYPE_F32, t);
    struct tensor max = poisoned_tensor(DTYPE_F32, t), sum_exp = poisoned_tensor(DTYPE_F32, t);
    struct tensor target = poisoned_tensor(DTYPE_F32, t), logits = normal_tensor(2.0, dtype, t, v);
    struct tensor d_logits = poisoned_tensor(dtype, t, v),
                  expected = tensor_new(arena, dtype, t, v);
    struct cross_entropy both = {.max = &max,
                                 .sum_exp = &sum_exp,
                                 .target = &target,
                                 .d_logits = &d_logits,
                                 .logits = &logits,
                                 .label = &label,
                                 .d_loss = &d_loss};

    for (int64_t i = 0; i < t; i++) {
        ((int32_t *)label.data)[i] = (int32_t)random_below(v);
    }
    memcpy(expected.data, logits.data, tensor_size_bytes(&logits));
    WITH_THREADS(&max, &sum_exp, &target, &d_logits)
    {
        op_cross_entropy_forward(stream, &both);
    }
    op_cross_entropy_backward(stream, &(struct cross_entropy_backward){.logits = &expected,
                                                                       .max = &max,
                                                                       .sum_exp = &sum_exp,
                                                                       .label = &label,
                                                                       .d_loss = &d_loss});
    assert_memory_equal(d_logits.data, expected.data, tensor_size_bytes(&expected));
    for (int64_t i = 0; i < t; i++) {
        const int64_t index = ((int32_t *)label.data)[i];

        assert_true(tensor_get(&target, i) == tensor_get(&logits, i * v + index));
    }
    both.d_logits = &logits;
    op_cross_entropy_forward(stream, &both);
    assert_memory_equal(logits.data, expected.data, tensor_size_bytes(&expected));
}

static void gradient_may_come_with_the_loss(void **state)
{
    const enum dtype dtypes[] = {DTYPE_F32, DTYPE_BF16};

    for (int i = 0; i < 2; i++) {
        check_gradient_with_the_loss(dtypes[i], 1, 1);
        check_gradient_with_the_loss(dtypes[i], 5, 17);
        check_gradient_with_the_loss(dtypes[i], 37, 3001);
    }
}

static void loss_and_gradient_agree_with_the_formulas(void **state)
{
    const enum dtype dtypes[] = {DTYPE_F32, DTYPE_BF16};

    for (int i = 0; i < 2; i++) {
        check_loss(dtypes[i], 1, 1, 1, 1.0);
        check_loss(dtypes[i], 5, 17, 1, 2.0);
        check_loss(dtypes[i], 37, 3001, 1, 2.0); /* several blocks, the last one partial */
        check_loss(dtypes[i], 11, 130, 3, 2.0);
        check_loss(dtypes[i], 3, 2100, 1, 100.0); /* exp of the plain logits would overflow */
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(reference_gradient_is_the_derivative),
        cmocka_unit_test_teardown(loss_and_gradient_agree_with_the_formulas, reference_empty_arena),
        cmocka_unit_test_teardown(gradient_may_come_with_the_loss, reference_empty_arena),
    };

    return cmocka_run_group_tests(tests, reference_start, reference_stop);
}
