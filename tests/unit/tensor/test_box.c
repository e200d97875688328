/* Boxes: parts, runs, intersection, copying. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <time.h>
#include <cmocka.h>

#include "base/rng.h"
#include "tensor/box.h"

static void the_parts_of_a_box_tile_it(void **state)
{
    const int64_t shape[3] = {4, 6, 5};
    const struct box whole = box_whole(shape, 3);
    struct box common;
    int64_t count = 0;

    for (int i = 0; i < 3; i++) {
        const struct box part = box_part(&whole, 1, i, 3);

        assert_true(box_inside(&part, shape));
        count += box_num_elements(&part);
        for (int j = 0; j < i; j++) {
            const struct box other = box_part(&whole, 1, j, 3);

            assert_false(box_intersect(&part, &other, &common));
        }
        assert_true(box_intersect(&part, &whole, &common));
        assert_true(box_equal(&part, &common));
    }
    assert_int_equal(count, box_num_elements(&whole));
}

static void a_part_of_a_part_keeps_global_offsets(void **state)
{
    const int64_t shape[2] = {8, 8};
    const struct box whole = box_whole(shape, 2);
    const struct box row = box_part(&whole, 0, 3, 4), cell = box_part(&row, 1, 1, 2);
    const struct box expected = {2, {6, 4}, {2, 4}};

    assert_true(box_equal(&cell, &expected));
}

static void the_intersection_is_the_common_elements(void **state)
{
    const struct box a = {2, {0, 2}, {3, 4}}, b = {2, {2, 0}, {5, 3}};
    const struct box expected = {2, {2, 2}, {1, 1}}, touching = {2, {3, 2}, {1, 1}};
    struct box common;

    assert_true(box_intersect(&a, &b, &common));
    assert_true(box_equal(&common, &expected));
    assert_false(box_intersect(&a, &touching, &common));
}

static void a_box_outside_the_shape_is_seen(void **state)
{
    const int64_t shape[1] = {5};
    const struct box inside = {1, {2}, {3}}, over = {1, {3}, {3}}, before = {1, {-1}, {2}};
    const struct box huge = {1, {4}, {INT64_MAX}};

    assert_true(box_inside(&inside, shape));
    assert_false(box_inside(&over, shape));
    assert_false(box_inside(&before, shape));
    assert_false(box_inside(&huge, shape));
}

static void a_scalar_has_one_element(void **state)
{
    const struct box scalar = box_whole(NULL, 0);
    const float from = 3.0f;
    float to = 0.0f;

    assert_int_equal(box_num_elements(&scalar), 1);
    box_copy(&to, &scalar, &from, &scalar, &scalar, sizeof to);
    assert_true(to == 3.0f);
}

/* Every element of the global tensor [3,4,5] holds its index; a part is moved between two boxes. */
static void copying_a_part_moves_exactly_its_elements(void **state)
{
    const struct box from_box = {3, {0, 1, 0}, {3, 3, 5}}, to_box = {3, {1, 0, 2}, {2, 4, 3}};
    struct box part;
    int16_t from[45], to[24];

    for (int i = 0; i < 45; i++) {
        from[i] = (int16_t)(i / 15 * 20 + (i / 5 % 3 + 1) * 5 + i % 5);
    }
    memset(to, 0xff, sizeof to);
    assert_true(box_intersect(&from_box, &to_box, &part));
    box_copy(to, &to_box, from, &from_box, &part, sizeof to[0]);
    for (int i = 0; i < 24; i++) {
        const int x = i / 12 + 1, y = i / 3 % 4, z = i % 3 + 2;

        assert_int_equal(to[i], y >= 1 ? x * 20 + y * 5 + z : -1);
    }
}

/* Global index of element i of the packed box. */
static int64_t global_element(const struct box *box, const int64_t *shape, int64_t i)
{
    int64_t position[TENSOR_DIMS_MAX], index = 0;

    for (int d = box->num_dims - 1; d >= 0; d--) {
        position[d] = box->offset[d] + i % box->size[d];
        i /= box->size[d];
    }
    for (int d = 0; d < box->num_dims; d++) {
        index = index * shape[d] + position[d];
    }
    return index;
}

/* The parts, one after another, are the elements of the run in their order. */
static void assert_run_is(const struct box *box, const int64_t *shape, int64_t first, int64_t count)
{
    struct box parts[BOX_RUN_PARTS_MAX];
    const int num_parts = box_from_run(box, first, count, parts);
    int64_t at = first;

    assert_true(num_parts <= 2 * box->num_dims - 1 || (box->num_dims == 0 && num_parts <= 1));
    for (int p = 0; p < num_parts; p++) {
        assert_int_equal(parts[p].num_dims, box->num_dims);
        assert_true(box_num_elements(&parts[p]) > 0);
        for (int64_t i = 0; i < box_num_elements(&parts[p]); i++) {
            assert_int_equal(global_element(&parts[p], shape, i), global_element(box, shape, at++));
        }
    }
    assert_int_equal(at, first + count);
}

static void every_run_of_a_random_box_is_a_few_boxes_in_order(void **state)
{
    const uint64_t seed = (uint64_t)time(NULL);
    const struct rng_key key = rng_key(seed, "runs", 0);

    print_message("seed %llu\n", (unsigned long long)seed);
    for (int round = 0; round < 60; round++) {
        struct box box = {.num_dims = round % 5};
        int64_t shape[TENSOR_DIMS_MAX];

        for (int d = 0; d < box.num_dims; d++) {
            const uint64_t draw = (uint64_t)(round * 10 + d);

            box.size[d] = 1 + (int64_t)(rng_uniform(key, draw, 0) * 4.0f);
            box.offset[d] = (int64_t)(rng_uniform(key, draw, 1) * 3.0f);
            shape[d] = box.offset[d] + box.size[d] + (int64_t)(rng_uniform(key, draw, 2) * 2.0f);
        }
        for (int64_t first = 0; first <= box_num_elements(&box); first++) {
            for (int64_t count = 0; first + count <= box_num_elements(&box); count++) {
                assert_run_is(&box, shape, first, count);
            }
        }
    }
}

static void a_run_of_whole_rows_is_one_box(void **state)
{
    const struct box box = {3, {0, 8, 0}, {4, 6, 5}}, rows = {3, {1, 8, 0}, {2, 6, 5}};
    struct box parts[BOX_RUN_PARTS_MAX];

    assert_int_equal(box_from_run(&box, 30, 60, parts), 1);
    assert_true(box_equal(&parts[0], &rows));
    assert_int_equal(box_from_run(&box, 0, 120, parts), 1);
    assert_true(box_equal(&parts[0], &box));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(the_parts_of_a_box_tile_it),
        cmocka_unit_test(a_part_of_a_part_keeps_global_offsets),
        cmocka_unit_test(the_intersection_is_the_common_elements),
        cmocka_unit_test(a_box_outside_the_shape_is_seen),
        cmocka_unit_test(a_scalar_has_one_element),
        cmocka_unit_test(copying_a_part_moves_exactly_its_elements),
        cmocka_unit_test(every_run_of_a_random_box_is_a_few_boxes_in_order),
        cmocka_unit_test(a_run_of_whole_rows_is_one_box),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
