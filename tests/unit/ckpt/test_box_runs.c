/* Runs of a part of two boxes: they move what box_copy moves, and are as long as they can be. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <cmocka.h>

#include "base/rng.h"
#include "ckpt/box_runs.h"

enum { DIM_MAX = 4, ELEMENTS_MAX = DIM_MAX * DIM_MAX * DIM_MAX };

/* A box inside [DIM_MAX] * num_dims, whole along a dim as often as not. */
static struct box random_box(uint64_t seed, int num_dims)
{
    const struct rng_key key = rng_key(seed, "box", 0);
    struct box box = {.num_dims = num_dims};

    for (int i = 0; i < num_dims; i++) {
        const bool whole = rng_uniform(key, (uint64_t)i, 0) < 0.5f;

        box.offset[i] = whole ? 0 : (int64_t)(rng_uniform(key, (uint64_t)i, 1) * DIM_MAX);
        box.size[i] = whole ? DIM_MAX
                            : 1 + (int64_t)(rng_uniform(key, (uint64_t)i, 2) *
                                            (float)(DIM_MAX - box.offset[i]));
        box.size[i] = box.size[i] > DIM_MAX - box.offset[i] ? DIM_MAX - box.offset[i] : box.size[i];
    }
    return box;
}

static void the_runs_move_what_box_copy_moves(void **state)
{
    int num_meetings = 0;

    for (uint64_t seed = 0; seed < 3000; seed++) {
        const int num_dims = 1 + (int)(seed % 3);
        const struct box from_box = random_box(2 * seed, num_dims);
        const struct box to_box = random_box(2 * seed + 1, num_dims);
        uint8_t from[ELEMENTS_MAX], to[ELEMENTS_MAX] = {0}, expected[ELEMENTS_MAX] = {0};
        struct box part;
        struct box_runs runs;

        if (!box_intersect(&from_box, &to_box, &part)) {
            continue;
        }
        for (int i = 0; i < ELEMENTS_MAX; i++) {
            from[i] = (uint8_t)(i + 1);
        }
        box_copy(expected, &to_box, from, &from_box, &part, 1);
        box_runs_begin(&runs, &part, &from_box, &to_box);
        while (box_runs_next(&runs)) {
            memcpy(to + runs.to_index, from + runs.from_index, (size_t)runs.count);
        }
        assert_memory_equal(to, expected, sizeof to);
        num_meetings++;
    }
    assert_true(num_meetings > 1000);
}

static void whole_boxes_are_one_run_and_inner_dims_join(void **state)
{
    const struct box whole = {3, {0, 0, 0}, {2, 3, 4}}, rows = {3, {0, 1, 0}, {2, 2, 4}};
    struct box_runs runs;

    box_runs_begin(&runs, &whole, &whole, &whole);
    assert_true(box_runs_next(&runs));
    assert_int_equal(runs.count, 24);
    assert_false(box_runs_next(&runs));
    box_runs_begin(&runs, &rows, &whole, &rows);
    assert_true(box_runs_next(&runs));
    assert_int_equal(runs.count, 8);
    assert_int_equal(runs.from_index, 4);
    assert_true(box_runs_next(&runs));
    assert_int_equal(runs.from_index, 16);
    assert_int_equal(runs.to_index, 8);
    assert_false(box_runs_next(&runs));
}

static void an_empty_part_has_no_runs(void **state)
{
    const struct box empty = {2, {0, 0}, {3, 0}};
    struct box_runs runs;

    box_runs_begin(&runs, &empty, &empty, &empty);
    assert_false(box_runs_next(&runs));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(the_runs_move_what_box_copy_moves),
        cmocka_unit_test(whole_boxes_are_one_run_and_inner_dims_join),
        cmocka_unit_test(an_empty_part_has_no_runs),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
