/* What ops cost, counted by hand. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "ops/op_cost.h"

/* Shapes without memory. */
#define SHAPE(dtype, ...) tensor_of(NULL, dtype, __VA_ARGS__)

static void expect(struct op_cost cost, double flops, double bytes)
{
    if (cost.flops != flops || cost.bytes != bytes) {
        fail_msg("%.0f operations, %.0f bytes; wanted %.0f, %.0f", cost.flops, cost.bytes, flops,
                 bytes);
    }
}

static void products_count_two_operations_an_element(void **state)
{
    struct tensor a = SHAPE(DTYPE_BF16, 7, 5), b = SHAPE(DTYPE_BF16, 7, 3);
    struct tensor c = SHAPE(DTYPE_F32, 5, 3), bias = SHAPE(DTYPE_F32, 3);
    struct matmul args = {.c = &c, .a = &a, .b = &b, .transpose_a = true};

    expect(OP_COST((const struct matmul *)&args), 2 * 5 * 3 * 7, 2 * 35 + 2 * 21 + 4 * 15);
    args.accumulate = true;
    args.bias = &bias;
    expect(OP_COST((const struct matmul *)&args), 2 * 5 * 3 * 7,
           2 * 35 + 2 * 21 + 2 * 4 * 15 + 4 * 3);
}

static void causal_attention_counts_half_of_the_pairs(void **state)
{
    enum { S = 6, B = 2, A = 4, G = 2, D = 8 };
    struct tensor q = SHAPE(DTYPE_BF16, S, B, A, D), k = SHAPE(DTYPE_BF16, S, B, G, D);
    struct attention forward = {
        .causal = true, .kv_length = S, .q = &q, .k = &k, .v = &k, .out = &q};
    struct attention_backward backward = {.d_out = &q, .d_q = &q, .d_k = &k, .d_v = &k};
    const double flops = 4.0 * S * S * B * A * D, bytes = 2.0 * 2 * S * B * (A + G) * D;

    expect(OP_COST((const struct attention *)&forward), flops / 2, bytes);
    forward.causal = false;
    backward.forward = forward;
    expect(OP_COST((const struct attention *)&forward), flops, bytes);
    expect(OP_COST((const struct attention_backward *)&backward), 2.5 * flops, 2 * bytes);
}

static void experts_count_rows_times_the_weights_of_one(void **state)
{
    enum { R = 20, T = 10, E = 3, H = 4, F = 5 };
    struct tensor x = SHAPE(DTYPE_BF16, T, H), h = SHAPE(DTYPE_BF16, R, 2 * F);
    struct tensor rows = SHAPE(DTYPE_BF16, R, H);
    struct tensor fc1 = SHAPE(DTYPE_BF16, E, 2 * F, H), fc2 = SHAPE(DTYPE_BF16, E, H, F);
    struct tensor d_fc1 = SHAPE(DTYPE_F32, E, 2 * F, H), d_fc2 = SHAPE(DTYPE_F32, E, H, F);
    const struct experts_forward forward = {
        .y = &rows, .pre_activation = &h, .x = &x, .fc1 = &fc1, .fc2 = &fc2};
    struct experts_backward backward = {
        .forward = forward, .d_x = &rows, .d_fc1 = &d_fc1, .d_fc2 = &d_fc2};
    const double bytes = 2 * (2 * R * H + R * 2 * F + E * 3 * F * H);

    expect(OP_COST((const struct experts_forward *)&forward), 2 * R * 3 * F * H, bytes);
    expect(OP_COST((const struct experts_backward *)&backward), 4 * R * 3 * F * H,
           bytes + 2 * R * H + 2 * 4 * E * 3 * F * H);
}

static void the_optimizer_reads_and_writes_its_states(void **state)
{
    float memory[8];
    struct tensor f32 = tensor_of(memory, DTYPE_F32, 8), bf16 = SHAPE(DTYPE_BF16, 8);
    struct adam_step args = {
        .param = &bf16, .master = &f32, .exp_avg = &f32, .exp_avg_sq = &f32, .grad = &f32};

    expect(OP_COST((const struct adam_step *)&args), 0, 8 * (2 + 3 * 8 + 4));
    args.param = &f32;
    expect(OP_COST((const struct adam_step *)&args), 0, 8 * (3 * 8 + 4));
}

static void an_op_without_a_count_has_none(void **state)
{
    expect(OP_COST((const struct clip_scale *)NULL), 0, 0);
}

static void the_longer_of_two_times_is_the_roof(void **state)
{
    const struct op_roof roof = {100.0, 10.0};

    assert_float_equal(op_cost_seconds(&(struct op_cost){300.0, 20.0}, &roof), 3.0, 0.0);
    assert_float_equal(op_cost_seconds(&(struct op_cost){100.0, 20.0}, &roof), 2.0, 0.0);
    assert_float_equal(op_cost_seconds(&(struct op_cost){100.0, 20.0}, &(struct op_roof){0}), 0.0,
                       0.0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(products_count_two_operations_an_element),
        cmocka_unit_test(causal_attention_counts_half_of_the_pairs),
        cmocka_unit_test(experts_count_rows_times_the_weights_of_one),
        cmocka_unit_test(the_optimizer_reads_and_writes_its_states),
        cmocka_unit_test(an_op_without_a_count_has_none),
        cmocka_unit_test(the_longer_of_two_times_is_the_roof),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
