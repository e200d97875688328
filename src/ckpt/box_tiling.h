/* box_tiling.h - is every element of a tensor in exactly one of a set of boxes? */
#ifndef CADRE_CKPT_BOX_TILING_H
#define CADRE_CKPT_BOX_TILING_H

#include "tensor/box.h"

/* Two boxes, by their indices, that have an element in common; false when there are none. All boxes
 * have the same number of dims, at least 1. */
bool box_tiling_find_overlap(const struct box *boxes, int num_boxes, int overlap[2]);

#endif
