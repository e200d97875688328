/* grouped_tiles.h - which tiles the experts' products on the matrix units are cut into. */
#ifndef CADRE_OPS_GROUPED_TILES_H
#define CADRE_OPS_GROUPED_TILES_H

#include <stdint.h>

enum { GROUPED_TILE_ROWS = 128, GROUPED_TILE_WIDE = 256, GROUPED_TILE_NARROW = 128 };

/* Columns of a tile: GROUPED_TILE_WIDE or _NARROW. num_rows are those of all num_experts, whose
 * shares are not known here; columns are those of one expert's product. */
int grouped_tile_columns(int64_t num_rows, int64_t num_experts, int64_t columns,
                         int num_multiprocessors);

#endif
