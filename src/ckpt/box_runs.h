/* box_runs.h - the contiguous runs of a part of two packed boxes.
 *
 *     box_runs_begin(&runs, part, from_box, to_box);
 *     while (box_runs_next(&runs)) {
 *         move runs.count elements, from element runs.from_index to element runs.to_index
 *     }
 *
 * A run is as long as both boxes allow: one run where the part spans both boxes' inner dims. */
#ifndef CADRE_CKPT_BOX_RUNS_H
#define CADRE_CKPT_BOX_RUNS_H

#include "tensor/box.h"

struct box_runs {
    int64_t from_index, to_index, count; /* of the present run */
    int num_outer;                       /* dims that are stepped through */
    int64_t run, num_runs;
    int64_t position[TENSOR_DIMS_MAX];
    struct box part, from_box, to_box;
};

/* part lies inside both boxes. */
void box_runs_begin(struct box_runs *runs, const struct box *part, const struct box *from_box,
                    const struct box *to_box);
bool box_runs_next(struct box_runs *runs);

#endif
