#include "reference.h"

static struct tensor made_i32(int64_t t, int64_t k, const double *values)
{
    struct tensor x = tensor_new(arena, DTYPE_I32, t, k);

    for (int64_t i = 0; i < t * k; i++) {
        tensor_set(&x, i, values[i]);
    }
    return x;
}

/* Four tokens, top-2 of three experts; token 2's first slot is dropped. */
static const double chosen[] = {2, 0, 0, 1, -1, 2, 0, 2};

static void rows_are_by_expert_then_token(void **state)
{
    struct tensor indices = made_i32(4, 2, chosen), probs = normal_tensor(1.0, DTYPE_F32, 4, 2);
    struct tensor row_of = poisoned_tensor(DTYPE_I32, 4, 2),
                  offsets = poisoned_tensor(DTYPE_I32, 4);
    struct tensor row_token = poisoned_tensor(DTYPE_I32, 8),
                  row_prob = poisoned_tensor(DTYPE_F32, 8);
    const int expected_token[] = {0, 1, 3, 1, 0, 2, 3}, expected_slot[] = {1, 2, 6, 3, 0, 5, 7};

    op_permutation(stream, &(struct permutation){.row_of = &row_of,
                                                 .row_token = &row_token,
                                                 .row_prob = &row_prob,
                                                 .offsets = &offsets,
                                                 .indices = &indices,
                                                 .probs = &probs});
    assert_values(&offsets, 0.0, 0, 3, 4, 7);
    assert_values(&row_of, 0.0, 4, 0, 1, 3, -1, 5, 2, 6);
    for (int row = 0; row < 7; row++) {
        assert_int_equal(((int32_t *)row_token.data)[row], expected_token[row]);
        assert_true(tensor_get(&row_prob, row) == tensor_get(&probs, expected_slot[row]));
    }
}

static void padding_fills_every_expert_up(void **state)
{
    struct tensor indices = made_i32(4, 2, chosen), probs = normal_tensor(1.0, DTYPE_F32, 4, 2);
    struct tensor row_of = poisoned_tensor(DTYPE_I32, 4, 2),
                  offsets = poisoned_tensor(DTYPE_I32, 4);
    struct tensor row_token = poisoned_tensor(DTYPE_I32, 9),
                  row_prob = poisoned_tensor(DTYPE_F32, 9);

    op_permutation(stream, &(struct permutation){.row_of = &row_of,
                                                 .row_token = &row_token,
                                                 .row_prob = &row_prob,
                                                 .offsets = &offsets,
                                                 .indices = &indices,
                                                 .probs = &probs,
                                                 .padded_capacity = 3});
    assert_values(&offsets, 0.0, 0, 3, 6, 9);
    assert_values(&row_of, 0.0, 6, 0, 1, 3, -1, 7, 2, 8);
    assert_values(&row_token, 0.0, 0, 1, 3, 1, 0, 0, 0, 2, 3);
    assert_true(tensor_get(&row_prob, 4) == 0.0 && tensor_get(&row_prob, 5) == 0.0);
    assert_true(tensor_get(&row_prob, 3) == tensor_get(&probs, 3));
}

static void all_dropped_or_all_to_one_expert(void **state)
{
    struct tensor none = made_i32(3, 1, (double[]){-1, -1, -1});
    struct tensor last = made_i32(3, 1, (double[]){4, 4, 4}),
                  probs = normal_tensor(1.0, DTYPE_F32, 3, 1);
    struct tensor row_of = poisoned_tensor(DTYPE_I32, 3, 1),
                  offsets = poisoned_tensor(DTYPE_I32, 6);
    struct tensor row_token = poisoned_tensor(DTYPE_I32, 3),
                  row_prob = poisoned_tensor(DTYPE_F32, 3);
    struct permutation op = {.row_of = &row_of,
                             .row_token = &row_token,
                             .row_prob = &row_prob,
                             .offsets = &offsets,
                             .indices = &none,
                             .probs = &probs};

    op_permutation(stream, &op);
    assert_values(&offsets, 0.0, 0, 0, 0, 0, 0, 0);
    assert_values(&row_of, 0.0, -1, -1, -1);
    op.indices = &last;
    op_permutation(stream, &op);
    assert_values(&offsets, 0.0, 0, 0, 0, 0, 0, 3);
    assert_values(&row_token, 0.0, 0, 1, 2);
}

static void slots_gather_their_rows_gradient(void **state)
{
    struct tensor row_of = made_i32(2, 2, (double[]){2, -1, 0, 1}),
                  d_probs = poisoned_tensor(DTYPE_F32, 2, 2);
    struct tensor d_rows = normal_tensor(1.0, DTYPE_F32, 3);

    op_slot_gather(stream, &(struct slot_gather){
                               .d_probs = &d_probs, .d_row_prob = &d_rows, .row_of = &row_of});
    assert_values(&d_probs, 0.0, tensor_get(&d_rows, 2), 0.0, tensor_get(&d_rows, 0),
                  tensor_get(&d_rows, 1));
}

/* A routing of t tokens over e experts with dropped slots, and its permutation. */
struct routing {
    struct tensor indices, probs, row_of, row_token, row_prob, offsets;
};

static void route(struct routing *r, int64_t t, int64_t k, int64_t e)
{
    r->indices = tensor_new(arena, DTYPE_I32, t, k);
    r->probs = normal_tensor(1.0, DTYPE_F32, t, k);
    r->row_of = poisoned_tensor(DTYPE_I32, t, k);
    r->row_token = poisoned_tensor(DTYPE_I32, t * k);
    r->row_prob = poisoned_tensor(DTYPE_F32, t * k);
    r->offsets = poisoned_tensor(DTYPE_I32, e + 1);
    for (int64_t i = 0; i < t * k; i++) {
        tensor_set(&r->indices, i, (double)(random_below(e + 1) - 1));
    }
    op_permutation(stream, &(struct permutation){.row_of = &r->row_of,
                                                 .row_token = &r->row_token,
                                                 .row_prob = &r->row_prob,
                                                 .offsets = &r->offsets,
                                                 .indices = &r->indices,
                                                 .probs = &r->probs});
}

enum residual { RESIDUAL_NONE, RESIDUAL_IN_PLACE, RESIDUAL_ELSEWHERE, NUM_RESIDUALS };

static void check_gather_and_sum(enum dtype dtype, int64_t t, int64_t k, int64_t h,
                                 enum residual kind)
{
    const int64_t num_rows = t * k;
    struct routing r;
    struct tensor x = normal_tensor(1.0, dtype, t, h), rows = poisoned_tensor(dtype, num_rows, h);
    struct tensor residual = normal_tensor(1.0, dtype, t, h);
    struct tensor y = kind == RESIDUAL_IN_PLACE ? residual : poisoned_tensor(dtype, t, h);
    double *expected = kind != RESIDUAL_NONE ? doubles_of(&residual) : new_doubles(t * h);
    int64_t num_used;

    route(&r, t, k, 5);
    num_used = (int64_t)tensor_get(&r.offsets, 5);
    WITH_THREADS(&rows)
    {
        op_row_gather(stream,
                      &(struct row_gather){
                          .y = &rows, .x = &x, .index = &r.row_token, .offsets = &r.offsets});
    }
    for (int64_t i = 0; i < num_rows * h; i++) {
        const int64_t token = (int64_t)tensor_get(&r.row_token, i / h);

        if (i / h >= num_used) {
            assert_true(isnan(tensor_get(&rows, i)));
        } else {
            assert_true(tensor_get(&rows, i) == tensor_get(&x, token * h + i % h));
        }
    }
    for (int64_t slot = 0; slot < t * k; slot++) {
        const int64_t row = (int64_t)tensor_get(&r.row_of, slot);

        for (int64_t i = 0; row >= 0 && i < h; i++) {
            tensor_set(&rows, row * h + i, random_normal_number());
            expected[slot / k * h + i] += tensor_get(&rows, row * h + i);
        }
    }
    WITH_THREADS(&y)
    {
        op_row_sum(stream, &(struct row_sum){.y = &y,
                                             .rows = &rows,
                                             .row_of = &r.row_of,
                                             .residual = kind != RESIDUAL_NONE ? &residual : NULL});
    }
    assert_close(&y, expected, dtype == DTYPE_BF16 ? 4e-3 : 1e-6);
}

static void rows_are_gathered_and_summed(void **state)
{
    for (int kind = 0; kind < NUM_RESIDUALS; kind++) {
        check_gather_and_sum(DTYPE_F32, 1, 1, 1, (enum residual)kind);
        check_gather_and_sum(DTYPE_F32, 13, 3, 1029, (enum residual)kind);
        check_gather_and_sum(DTYPE_BF16, 13, 3, 1029, (enum residual)kind);
        check_gather_and_sum(DTYPE_F32, 301, 2, 64, (enum residual)kind);
        check_gather_and_sum(DTYPE_BF16, 301, 2, 64, (enum residual)kind);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_teardown(rows_are_by_expert_then_token, reference_empty_arena),
        cmocka_unit_test_teardown(padding_fills_every_expert_up, reference_empty_arena),
        cmocka_unit_test_teardown(all_dropped_or_all_to_one_expert, reference_empty_arena),
        cmocka_unit_test_teardown(slots_gather_their_rows_gradient, reference_empty_arena),
        cmocka_unit_test_teardown(rows_are_gathered_and_summed, reference_empty_arena),
    };

    return cmocka_run_group_tests(tests, reference_start, reference_stop);
}
