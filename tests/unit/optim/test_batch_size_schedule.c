/* The global batch size over the samples consumed. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <cmocka.h>

#include "base/check.h"
#include "optim/batch_size_schedule.h"

/* 8, 16, 24 for 100 samples each, then 32; 8 = 2 samples x 4 ranks. */
static const struct batch_size_config rampup = {
    .global_batch_size = 32,
    .micro_batch_size = 2,
    .data_parallel_size = 4,
    .ramps_up = true,
    .rampup_start = 8,
    .rampup_increment = 8,
    .rampup_samples = 300,
};

static void constant_batch_never_changes(void **state)
{
    struct batch_size_config config = rampup;

    config.ramps_up = false;
    assert_int_equal(batch_size_check(&config), 0);
    for (int64_t consumed = 0; consumed < 1000; consumed += 100) {
        const struct batch_size size = batch_size_at(&config, consumed);

        assert_int_equal(size.global_batch_size, 32);
        assert_int_equal(size.running, 32);
        assert_int_equal(size.num_microbatches, 4);
    }
}

static void rampup_rises_at_even_distances(void **state)
{
    static const struct {
        int64_t consumed, size;
    } expected[] = {{0, 8},    {99, 8},   {100, 16}, {199, 16},
                    {200, 24}, {299, 24}, {300, 32}, {INT64_MAX, 32}};

    assert_int_equal(batch_size_check(&rampup), 0);
    for (size_t i = 0; i < sizeof expected / sizeof expected[0]; i++) {
        const struct batch_size size = batch_size_at(&rampup, expected[i].consumed);

        assert_int_equal(size.global_batch_size, expected[i].size);
        assert_int_equal(size.num_microbatches, expected[i].size / 8);
    }
}

static void rampup_without_distance_or_samples_is_constant(void **state)
{
    struct batch_size_config config = rampup;

    config.rampup_samples = 0;
    assert_int_equal(batch_size_check(&config), 0);
    assert_int_equal(batch_size_at(&config, 0).global_batch_size, 32);
    config = rampup;
    config.rampup_start = 32;
    assert_int_equal(batch_size_check(&config), 0);
    assert_int_equal(batch_size_at(&config, 0).global_batch_size, 32);
}

static void sizes_that_do_not_fit_are_refused_or_rounded_down(void **state)
{
    struct batch_size_config config = rampup;
    struct batch_size size;

    config.rampup_increment = 12;
    config.global_batch_size = 56;
    assert_int_equal(batch_size_check(&config), -1);
    assert_non_null(strstr(error_text(), "second size 20"));
    assert_non_null(strstr(error_text(), "use 16"));
    config.decreases_if_needed = true;
    assert_int_equal(batch_size_check(&config), 0);
    size = batch_size_at(&config, 75); /* the second of four sizes, each for 75 samples */
    assert_int_equal(size.global_batch_size, 20);
    assert_int_equal(size.running, 16);
    assert_int_equal(size.num_microbatches, 2);
}

static void expect_refusal(struct batch_size_config config, const char *says)
{
    assert_int_equal(batch_size_check(&config), -1);
    if (strstr(error_text(), says) == NULL) {
        fail_msg("\"%s\" does not say \"%s\"", error_text(), says);
    }
}

static void contradictions_are_refused_with_their_values(void **state)
{
#define REFUSE(field, value, says)                                                                 \
    do {                                                                                           \
        struct batch_size_config bad = rampup;                                                     \
        bad.field = value;                                                                         \
        expect_refusal(bad, says);                                                                 \
    } while (0)
    REFUSE(micro_batch_size, 0, "micro-batch size 0");
    REFUSE(micro_batch_size, INT64_MAX, "too large");
    REFUSE(global_batch_size, 36, "global batch size 36 is not a multiple");
    REFUSE(global_batch_size, 4, "smaller than");
    REFUSE(rampup_start, 40, "starts at 40");
    REFUSE(rampup_start, 0, "starts at 0");
    REFUSE(rampup_increment, 0, "found 0");
    REFUSE(rampup_increment, 7, "divides 24, found 7");
    REFUSE(rampup_samples, -1, "over -1");
    REFUSE(data_parallel_size, 16, "smaller than");
#undef REFUSE
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(constant_batch_never_changes),
        cmocka_unit_test(rampup_rises_at_even_distances),
        cmocka_unit_test(rampup_without_distance_or_samples_is_constant),
        cmocka_unit_test(sizes_that_do_not_fit_are_refused_or_rounded_down),
        cmocka_unit_test(contradictions_are_refused_with_their_values),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
