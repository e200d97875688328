/* Boxes that tile a tensor, and boxes that do not. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <cmocka.h>

#include "base/rng.h"
#include "ckpt/box_tiling.h"

enum { MANY = 120000 };

static struct rng_key key;
static uint64_t num_drawn;

/* In [0, n). */
static int64_t draw(int64_t n)
{
    return (int64_t)(rng_uniform(key, num_drawn++, 0) * (float)n);
}

static int seed_draws(void **state)
{
    const uint64_t seed = (uint64_t)time(NULL);

    print_message("seed %llu\n", (unsigned long long)seed);
    key = rng_key(seed, "tiling", 0);
    return 0;
}

static bool any_pair_overlaps(const struct box *boxes, int num_boxes)
{
    struct box common;

    for (int i = 0; i < num_boxes; i++) {
        for (int j = 0; j < i; j++) {
            if (box_intersect(&boxes[i], &boxes[j], &common)) {
                return true;
            }
        }
    }
    return false;
}

static void assert_answer_is_right(const struct box *boxes, int num_boxes)
{
    int overlap[2];
    struct box common;
    const bool found = box_tiling_find_overlap(boxes, num_boxes, overlap);

    assert_int_equal(found, any_pair_overlaps(boxes, num_boxes));
    if (found) {
        assert_true(overlap[0] != overlap[1]);
        assert_true(box_intersect(&boxes[overlap[0]], &boxes[overlap[1]], &common));
    }
}

static void random_boxes_are_judged_as_by_comparing_all_pairs(void **state)
{
    for (int round = 0; round < 3000; round++) {
        const int num_dims = 1 + (int)draw(3), num_boxes = (int)draw(6);
        struct box boxes[6];

        for (int i = 0; i < num_boxes; i++) {
            boxes[i].num_dims = num_dims;
            for (int d = 0; d < num_dims; d++) {
                boxes[i].offset[d] = draw(6);
                boxes[i].size[d] = draw(5); /* may be empty */
            }
        }
        assert_answer_is_right(boxes, num_boxes);
    }
}

/* No cut along any dim parts the five boxes of a pinwheel. */
static void boxes_that_no_cut_parts_are_judged_right(void **state)
{
    struct box boxes[5] = {{2, {0, 0}, {1, 2}},
                           {2, {0, 2}, {2, 1}},
                           {2, {2, 1}, {1, 2}},
                           {2, {1, 0}, {2, 1}},
                           {2, {1, 1}, {1, 1}}};

    assert_answer_is_right(boxes, 5);
    boxes[4].size[0] = 2;
    assert_answer_is_right(boxes, 5);
}

/* A tensor cut along its last dim, each slice into flat runs of random lengths, the boxes shuffled:
 * what thousands of ranks hold of an optimizer's state. */
static int cut_into_runs(struct box *boxes, int64_t slices, const int64_t *shape, int64_t run_max)
{
    const struct box whole = box_whole(shape, 3);
    int num_boxes = 0;

    for (int64_t s = 0; s < slices; s++) {
        const struct box slice = box_part(&whole, 2, (int)s, (int)slices);

        for (int64_t first = 0, count; first < box_num_elements(&slice); first += count) {
            const int64_t left = box_num_elements(&slice) - first;

            count = 1 + draw(run_max);
            count = count < left ? count : left;
            num_boxes += box_from_run(&slice, first, count, &boxes[num_boxes]);
            assert_true(num_boxes <= MANY - BOX_RUN_PARTS_MAX);
        }
    }
    for (int i = num_boxes - 1; i > 0; i--) {
        const int64_t j = draw(i + 1);
        const struct box box = boxes[i];

        boxes[i] = boxes[j];
        boxes[j] = box;
    }
    return num_boxes;
}

/* Comparing all pairs would run into ctest's timeout. */
static void a_hundred_thousand_boxes_are_judged_without_comparing_all_pairs(void **state)
{
    const int64_t shape[3] = {2, 40000, 64};
    struct box *boxes = calloc(MANY, sizeof *boxes);
    const int num_boxes = cut_into_runs(boxes, 4, shape, 300);
    int overlap[2];
    int64_t num_elements = 0;

    assert_true(num_boxes > 60000);
    for (int repeat = 0; repeat < 20; repeat++) {
        assert_false(box_tiling_find_overlap(boxes, num_boxes, overlap));
    }
    for (int i = 0; i < num_boxes; i++) {
        num_elements += box_num_elements(&boxes[i]);
    }
    assert_int_equal(num_elements, 2 * 40000 * 64);
    boxes[num_boxes] = (struct box){3, {1, 1234, 7}, {1, 1, 1}};
    assert_true(box_tiling_find_overlap(boxes, num_boxes + 1, overlap));
    assert_true(overlap[0] == num_boxes || overlap[1] == num_boxes);
    free(boxes);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(random_boxes_are_judged_as_by_comparing_all_pairs),
        cmocka_unit_test(boxes_that_no_cut_parts_are_judged_right),
        cmocka_unit_test(a_hundred_thousand_boxes_are_judged_without_comparing_all_pairs),
    };

    return cmocka_run_group_tests(tests, seed_draws, NULL);
}
