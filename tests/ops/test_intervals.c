#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <math.h>
#include <cmocka.h>

#include "base/rng.h"
#include "ops/intervals.h"

enum { MOMENTS = 60, MANY = 12, ROUNDS = 200 };

static void assert_near(double seen, double expected)
{
    assert_true(fabs(seen - expected) < 1e-12);
}

static void joined_intervals_are_in_order_and_apart(void **state)
{
    struct interval x[] = {{7.0, 9.0}, {1.0, 2.0}, {8.0, 8.5}, {2.0, 3.0}, {8.5, 10.0}};

    assert_int_equal(intervals_join(x, 5), 2);
    assert_near(x[0].begin, 1.0);
    assert_near(x[0].end, 3.0);
    assert_near(x[1].begin, 7.0);
    assert_near(x[1].end, 10.0);
    assert_near(intervals_length(x, 2), 5.0);
    assert_int_equal(intervals_join(x, 0), 0);
    assert_near(intervals_length(x, 0), 0.0);
}

static void what_two_sets_share(void **state)
{
    const struct interval compute[] = {{0.0, 4.0}, {5.0, 6.0}, {9.0, 12.0}};
    const struct interval across[] = {{3.0, 10.0}}, between[] = {{4.0, 5.0}};
    const struct interval inside[] = {{1.0, 2.0}, {2.5, 3.0}};

    assert_near(intervals_common_length(compute, 3, across, 1), 1.0 + 1.0 + 1.0);
    assert_near(intervals_common_length(across, 1, compute, 3), 3.0);
    assert_near(intervals_common_length(compute, 3, between, 1), 0.0);
    assert_near(intervals_common_length(compute, 3, inside, 2), 1.5);
    assert_near(intervals_common_length(compute, 3, compute, 3), 8.0);
    assert_near(intervals_common_length(compute, 3, compute, 0), 0.0);
}

/* Intervals between whole moments, and which moments they cover. */
static void random_intervals(uint64_t seed, struct interval *intervals, int *covered)
{
    const struct rng_key key = rng_key(seed, "intervals", 0);

    for (int m = 0; m < MOMENTS; m++) {
        covered[m] = 0;
    }
    for (int i = 0; i < MANY; i++) {
        const int begin = (int)(rng_uniform(key, 0, (uint64_t)i) * (MOMENTS - 5));
        const int end = begin + (int)(rng_uniform(key, 1, (uint64_t)i) * 5.0f);

        intervals[i] = (struct interval){begin, end};
        for (int m = begin; m < end; m++) {
            covered[m] = 1;
        }
    }
}

static void lengths_are_those_of_counted_moments(void **state)
{
    for (uint64_t round = 0; round < ROUNDS; round++) {
        struct interval a[MANY], b[MANY];
        int in_a[MOMENTS], in_b[MOMENTS], num_a, num_b, length = 0, common = 0;

        random_intervals(2 * round, a, in_a);
        random_intervals(2 * round + 1, b, in_b);
        for (int m = 0; m < MOMENTS; m++) {
            length += in_a[m];
            common += in_a[m] && in_b[m];
        }
        num_a = intervals_join(a, MANY);
        num_b = intervals_join(b, MANY);
        assert_near(intervals_length(a, num_a), length);
        assert_near(intervals_common_length(a, num_a, b, num_b), common);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(joined_intervals_are_in_order_and_apart),
        cmocka_unit_test(what_two_sets_share),
        cmocka_unit_test(lengths_are_those_of_counted_moments),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
