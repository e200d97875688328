#include "reference.h"

/* Slots [t,k] from plain numbers. */
static struct tensor made(enum dtype dtype, int64_t t, int64_t k, const double *values)
{
    struct tensor x = tensor_new(arena, dtype, t, k);

    for (int64_t i = 0; i < t * k; i++) {
        tensor_set(&x, i, values[i]);
    }
    return x;
}

static const double chosen[] = {0, 1, 0, 1, 1, 0, 0, 2};
static const double weights[] = {0.6, 0.4, 0.9, 0.1, 0.7, 0.3, 0.6, 0.4};

/* Expert 0 has tokens 0 (.6), 1 (.9), 2 (.3), 3 (.6); expert 1 has 0 (.4), 1 (.1), 2 (.7); expert 2
 * has 3. */
static void the_least_probable_tokens_are_dropped_and_ties_keep_the_lowest(void **state)
{
    struct tensor indices = made(DTYPE_I32, 4, 2, chosen), probs = made(DTYPE_F32, 4, 2, weights);

    op_router_drop(stream, &(struct router_drop){.probs = &probs,
                                                 .indices = &indices,
                                                 .num_experts = 3,
                                                 .capacity = 2,
                                                 .policy = DROP_BY_PROBS});
    assert_values(&indices, 0.0, 0, 1, 0, -1, 1, -1, -1, 2);
    assert_values(&probs, 1e-7, 0.6, 0.4, 0.9, 0, 0.7, 0, 0, 0.4);
}

static void the_last_tokens_are_dropped_by_position(void **state)
{
    struct tensor indices = made(DTYPE_I32, 4, 2, chosen), probs = made(DTYPE_F32, 4, 2, weights);

    op_router_drop(stream, &(struct router_drop){.probs = &probs,
                                                 .indices = &indices,
                                                 .num_experts = 3,
                                                 .capacity = 2,
                                                 .policy = DROP_BY_POSITION});
    assert_values(&indices, 0.0, 0, 1, 0, 1, -1, -1, -1, 2);
    assert_values(&probs, 1e-7, 0.6, 0.4, 0.9, 0.1, 0, 0, 0, 0.4);
}

static void nothing_is_dropped_within_capacity_and_all_at_zero(void **state)
{
    for (int policy = DROP_BY_PROBS; policy <= DROP_BY_POSITION; policy++) {
        struct tensor indices = made(DTYPE_I32, 4, 2, chosen),
                      probs = made(DTYPE_F32, 4, 2, weights);
        struct router_drop op = {.probs = &probs,
                                 .indices = &indices,
                                 .num_experts = 3,
                                 .capacity = 4,
                                 .policy = (enum drop_policy)policy};

        op_router_drop(stream, &op);
        assert_close(&indices, chosen, 0.0);
        op.capacity = 0;
        op_router_drop(stream, &op);
        assert_values(&indices, 0.0, -1, -1, -1, -1, -1, -1, -1, -1);
        assert_values(&probs, 0.0, 0, 0, 0, 0, 0, 0, 0, 0);
    }
}

/* Each expert keeps min(capacity, its tokens), and none of the dropped beats one that is kept. */
static void random_routings_keep_the_best(void **state)
{
    enum { T = 503, E = 7, K = 2, CAPACITY = 90 };
    struct tensor indices = tensor_new(arena, DTYPE_I32, T, K),
                  probs = tensor_new(arena, DTYPE_F32, T, K);
    double kept[E] = {0}, routed[E] = {0}, worst_kept[E], best_dropped[E];
    const double *before, *before_probs;

    for (int64_t t = 0; t < T; t++) {
        const double e = (double)(random_below(4) * random_below(3) % E);

        tensor_set(&indices, t * K, e);
        tensor_set(&indices, t * K + 1, (double)(((int)e + 1 + random_below(2)) % E));
        tensor_set(&probs, t * K, fabs(random_normal_number()));
        tensor_set(&probs, t * K + 1, fabs(random_normal_number()));
    }
    before = doubles_of(&indices);
    before_probs = doubles_of(&probs);
    op_router_drop(stream, &(struct router_drop){.probs = &probs,
                                                 .indices = &indices,
                                                 .num_experts = E,
                                                 .capacity = CAPACITY,
                                                 .policy = DROP_BY_PROBS});
    for (int e = 0; e < E; e++) {
        worst_kept[e] = INFINITY;
        best_dropped[e] = -INFINITY;
    }
    for (int64_t i = 0; i < T * K; i++) {
        const int e = (int)before[i];

        routed[e]++;
        if (tensor_get(&indices, i) >= 0.0) {
            kept[e]++;
            assert_true(tensor_get(&probs, i) == before_probs[i]);
            worst_kept[e] = fmin(worst_kept[e], before_probs[i]);
        } else {
            best_dropped[e] = fmax(best_dropped[e], before_probs[i]);
        }
    }
    for (int e = 0; e < E; e++) {
        assert_true(kept[e] == fmin(CAPACITY, routed[e]));
        assert_true(worst_kept[e] >= best_dropped[e]);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_teardown(the_least_probable_tokens_are_dropped_and_ties_keep_the_lowest,
                                  reference_empty_arena),
        cmocka_unit_test_teardown(the_last_tokens_are_dropped_by_position, reference_empty_arena),
        cmocka_unit_test_teardown(nothing_is_dropped_within_capacity_and_all_at_zero,
                                  reference_empty_arena),
        cmocka_unit_test_teardown(random_routings_keep_the_best, reference_empty_arena),
    };

    return cmocka_run_group_tests(tests, reference_start, reference_stop);
}
