/* Which tiles the experts' products are cut into. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "ops/grouped_tiles.h"

enum { H100 = 132 };

static void large_products_take_wide_tiles(void **state)
{
    assert_int_equal(grouped_tile_columns(8192, 8, 28672, H100), GROUPED_TILE_WIDE);
    assert_int_equal(grouped_tile_columns(8192, 8, 4096, H100), GROUPED_TILE_WIDE);
    assert_int_equal(grouped_tile_columns(262144, 128, 1536, H100), GROUPED_TILE_WIDE);
}

/* 4 x 16 wide tiles would leave half of the multiprocessors without work. */
static void few_tiles_are_narrow(void **state)
{
    assert_int_equal(grouped_tile_columns(512, 1, 4096, H100), GROUPED_TILE_NARROW);
    assert_int_equal(grouped_tile_columns(1, 8, 256, H100), GROUPED_TILE_NARROW);
}

/* 136 wide tiles take two rounds of which the second is nearly empty; 272 narrow ones take three of
 * little more than half the time. */
static void a_round_for_few_tiles_is_avoided(void **state)
{
    assert_int_equal(grouped_tile_columns(17 * 128, 17, 8 * 256, H100), GROUPED_TILE_NARROW);
    assert_int_equal(grouped_tile_columns(16 * 128, 16, 8 * 256, H100), GROUPED_TILE_WIDE);
}

/* More experts than rows, no rows at all, fewer columns than a tile. */
static void any_size_has_tiles(void **state)
{
    assert_int_equal(grouped_tile_columns(3, 128, 1024, H100), GROUPED_TILE_NARROW);
    assert_int_equal(grouped_tile_columns(0, 8, 1024, H100), GROUPED_TILE_WIDE);
    assert_int_equal(grouped_tile_columns(128, 1, 8, H100), GROUPED_TILE_NARROW);
    assert_int_equal(grouped_tile_columns(4096, 4, 2048, 1), GROUPED_TILE_WIDE);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(large_products_take_wide_tiles),
        cmocka_unit_test(few_tiles_are_narrow),
        cmocka_unit_test(a_round_for_few_tiles_is_avoided),
        cmocka_unit_test(any_size_has_tiles),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
