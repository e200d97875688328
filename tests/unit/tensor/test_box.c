/* Boxes: parts, intersection, copying. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <cmocka.h>

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

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(the_parts_of_a_box_tile_it),
        cmocka_unit_test(a_part_of_a_part_keeps_global_offsets),
        cmocka_unit_test(the_intersection_is_the_common_elements),
        cmocka_unit_test(a_box_outside_the_shape_is_seen),
        cmocka_unit_test(a_scalar_has_one_element),
        cmocka_unit_test(copying_a_part_moves_exactly_its_elements),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
