/* box.h - hyper-rectangles of a global tensor. What a rank holds of a parameter is a box; a
 * checkpoint is a set of boxes; loading intersects the boxes wanted with the boxes on disk. */
#ifndef CADRE_TENSOR_BOX_H
#define CADRE_TENSOR_BOX_H

#include <stdbool.h>
#include <stdint.h>

#include "tensor/tensor.h"

struct box {
    int num_dims;
    int64_t offset[TENSOR_DIMS_MAX]; /* of the first element, in the global tensor */
    int64_t size[TENSOR_DIMS_MAX];
};

/* A run of a box's elements is at most this many boxes. */
enum { BOX_RUN_PARTS_MAX = 2 * TENSOR_DIMS_MAX - 1 };

struct box box_whole(const int64_t *global_shape, int num_dims);
/* Part `index` of `count` equal parts of the box along dim. The size must divide. */
struct box box_part(const struct box *box, int dim, int index, int count);
/* Elements [first, first + count) of the packed box as boxes, in the run's order: partial rows,
 * whole rows, partial rows, for every dim. Returns how many (at most 2 * num_dims - 1; 0 for an
 * empty run). Each part's elements lie together in the box's memory, in the part's own order. */
int box_from_run(const struct box *box, int64_t first, int64_t count,
                 struct box parts[BOX_RUN_PARTS_MAX]);
int64_t box_num_elements(const struct box *box);
bool box_equal(const struct box *a, const struct box *b);
bool box_inside(const struct box *box, const int64_t *global_shape);
/* The common part of two boxes of the same tensor; false when they do not meet. */
bool box_intersect(const struct box *a, const struct box *b, struct box *common);
/* Copies the elements of `part` from `from` (holding from_box) to `to` (holding to_box), both
 * packed and row-major. part lies inside both boxes. */
void box_copy(void *to, const struct box *to_box, const void *from, const struct box *from_box,
              const struct box *part, int element_bytes);

#endif
