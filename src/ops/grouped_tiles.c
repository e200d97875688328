#include "ops/grouped_tiles.h"

/* Time of a tile, in parts of a wide one's: a narrow one reads as much of A for half the products.
 */
enum { TIME_WIDE = 100, TIME_NARROW = 60 };

static int64_t quotient_up(int64_t x, int64_t y)
{
    return (x + y - 1) / y;
}

/* Of multiprocessors that take the tiles in rounds. */
static int64_t rounds_of(int64_t tiles_m, int64_t columns, int64_t tile_columns,
                         int num_multiprocessors)
{
    return quotient_up(tiles_m * quotient_up(columns, tile_columns), num_multiprocessors);
}

/* Wide tiles read the operands least often; narrow ones spread a small product over more
 * multiprocessors. The rows are taken to be shared evenly. */
int grouped_tile_columns(int64_t num_rows, int64_t num_experts, int64_t columns,
                         int num_multiprocessors)
{
    const int64_t num_used = num_rows < num_experts ? num_rows : num_experts;
    const int64_t tiles_m =
        num_used *
        quotient_up(quotient_up(num_rows, num_used > 0 ? num_used : 1), GROUPED_TILE_ROWS);
    const int64_t wide =
        TIME_WIDE * rounds_of(tiles_m, columns, GROUPED_TILE_WIDE, num_multiprocessors);
    const int64_t narrow =
        TIME_NARROW * rounds_of(tiles_m, columns, GROUPED_TILE_NARROW, num_multiprocessors);

    return narrow < wide ? GROUPED_TILE_NARROW : GROUPED_TILE_WIDE;
}
