/* Sorted along a dim, boxes fall into groups whose intervals do not touch; boxes of two groups have
 * nothing in common, so only each group is looked at, along the next dim. What ranks hold of a
 * tensor (slices along a few dims, flat runs cut into rows) comes apart like that down to single
 * boxes, in O(n log n) for each dim. Boxes that no dim can tell apart, such as overlapping ones,
 * are compared in pairs. */
#include "ckpt/box_tiling.h"

#include <stdlib.h>

#include "base/check.h"

enum { DEPTH_MAX = 64 };

struct entry {
    const struct box *box;
    int index;
    int64_t key; /* the box's offset along the dim being sorted */
};

static int compare_keys(const void *left, const void *right)
{
    const struct entry *a = left, *b = right;

    return a->key != b->key ? (a->key < b->key ? -1 : 1) : a->index - b->index;
}

static bool compare_pairs(const struct entry *entries, int num_entries, int overlap[2])
{
    struct box common;

    for (int i = 1; i < num_entries; i++) {
        for (int j = 0; j < i; j++) {
            if (box_intersect(entries[i].box, entries[j].box, &common)) {
                overlap[0] = entries[j].index;
                overlap[1] = entries[i].index;
                return true;
            }
        }
    }
    return false;
}

/* num_tried dims in a row, those before dim, have left these entries together. */
static bool search(struct entry *entries, int num_entries, int dim, int num_tried, int depth,
                   int overlap[2])
{
    const int num_dims = entries[0].box->num_dims, next = (dim + 1) % num_dims;
    int64_t reach;
    int first = 0;

    if (num_entries < 2) {
        return false;
    }
    if (num_tried == num_dims || depth == DEPTH_MAX) {
        return compare_pairs(entries, num_entries, overlap);
    }
    for (int i = 0; i < num_entries; i++) {
        entries[i].key = entries[i].box->offset[dim];
    }
    qsort(entries, (size_t)num_entries, sizeof *entries, compare_keys);
    reach = entries[0].key;
    for (int i = 0; i < num_entries; i++) {
        const int64_t end = entries[i].key + entries[i].box->size[dim];

        if (i > first && entries[i].key >= reach) {
            if (search(entries + first, i - first, next, 1, depth + 1, overlap)) {
                return true;
            }
            first = i;
        }
        reach = end > reach ? end : reach;
    }
    return search(entries + first, num_entries - first, next, first == 0 ? num_tried + 1 : 1,
                  depth + 1, overlap);
}

bool box_tiling_find_overlap(const struct box *boxes, int num_boxes, int overlap[2])
{
    struct entry *entries = calloc((size_t)num_boxes + 1, sizeof *entries);
    int num_entries = 0;
    bool found;

    CHECK(entries != NULL, "out of memory");
    for (int i = 0; i < num_boxes; i++) {
        if (box_num_elements(&boxes[i]) > 0) {
            entries[num_entries++] = (struct entry){.box = &boxes[i], .index = i};
        }
    }
    found = num_entries > 1 && search(entries, num_entries, 0, 0, 0, overlap);
    free(entries);
    return found;
}
