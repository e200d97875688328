/* Which shard, router row and scale an expert of an upcycled model gets: by hand from M8.10. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "moe/upcycle.h"

static const struct upcycle_plan plain = {.num_experts = 4, .granularity = 1, .topk = 2};

static const struct upcycle_plan granular = {
    .num_experts = 8, .granularity = 2, .topk = 4, .activation = ACTIVATION_SWIGLU};

static void experts_take_the_shards_in_turn(void **state)
{
    static const int shard[] = {0, 1, 0, 1, 0, 1, 0, 1};

    for (int e = 0; e < 8; e++) {
        assert_int_equal(upcycle_shard(&granular, e), shard[e]);
    }
    for (int e = 0; e < 4; e++) {
        assert_int_equal(upcycle_shard(&plain, e), 0);
    }
}

/* The shards of one copy must get equal logits, so that they are chosen together. */
static void the_shards_of_a_copy_share_a_router_row(void **state)
{
    static const int row[] = {0, 0, 1, 1, 2, 2, 3, 3};

    for (int e = 0; e < 8; e++) {
        assert_int_equal(upcycle_router_row(&granular, e), row[e]);
    }
    for (int e = 0; e < 4; e++) {
        assert_int_equal(upcycle_router_row(&plain, e), e);
    }
}

static void weights_are_scaled_by_the_root_of_what_the_output_lacks(void **state)
{
    struct upcycle_plan plan = granular;

    assert_float_equal(upcycle_weight_scale(&plain), 1.0, 1e-12);
    assert_float_equal(upcycle_weight_scale(&plan), pow(2.0, 1.0 / 3.0), 1e-12);
    plan.activation = ACTIVATION_SQUARED_RELU;
    assert_float_equal(upcycle_weight_scale(&plan), pow(2.0, 1.0 / 3.0), 1e-12);
    plan.activation = ACTIVATION_GELU;
    assert_float_equal(upcycle_weight_scale(&plan), sqrt(2.0), 1e-12);
    plan.pre_softmax = true; /* R g g / k = 4 * 4 / 4 */
    assert_float_equal(upcycle_weight_scale(&plan), 2.0, 1e-12);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(experts_take_the_shards_in_turn),
        cmocka_unit_test(the_shards_of_a_copy_share_a_router_row),
        cmocka_unit_test(weights_are_scaled_by_the_root_of_what_the_output_lacks),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
