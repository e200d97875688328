#include "tensor/box.h"

#include <string.h>

#include "base/check.h"
#include "base/checked.h"

struct box box_whole(const int64_t *global_shape, int num_dims)
{
    struct box box = {.num_dims = num_dims};

    CHECK(num_dims >= 0 && num_dims <= TENSOR_DIMS_MAX, "%d dims", num_dims);
    for (int i = 0; i < num_dims; i++) {
        box.size[i] = global_shape[i];
    }
    return box;
}

struct box box_part(const struct box *box, int dim, int index, int count)
{
    struct box part = *box;

    CHECK(dim < box->num_dims && index >= 0 && index < count && box->size[dim] % count == 0,
          "part %d of %d along dim %d of size %lld", index, count, dim, (long long)box->size[dim]);
    part.size[dim] = box->size[dim] / count;
    part.offset[dim] = box->offset[dim] + index * part.size[dim];
    return part;
}

/* The longest part that starts at element `first` and takes at most count elements: whole blocks
 * (all elements of the dims inside `dim`) along the outermost dim where a block begins at `first`
 * and fits. So a run climbs to the outermost dim it can fill, and comes down again: no dim but the
 * outermost is used more than twice. */
static struct box longest_part(const struct box *box, int64_t first, int64_t count)
{
    struct box part = *box;
    int64_t block = 1, row = 1; /* elements of a block of dim; of all of dim */
    int dim = box->num_dims;

    while (dim > 0) {
        dim--;
        block = row;
        row *= box->size[dim];
        if (first % row != 0 || row > count) {
            break;
        }
    }
    for (int i = dim; i >= 0 && box->num_dims > 0; i--) {
        const int64_t index = first / block % box->size[i];

        part.offset[i] += index;
        part.size[i] = 1;
        if (i == dim) {
            part.size[i] = box->size[i] - index;
            part.size[i] = part.size[i] < count / block ? part.size[i] : count / block;
        }
        block *= box->size[i];
    }
    return part;
}

int box_from_run(const struct box *box, int64_t first, int64_t count,
                 struct box parts[BOX_RUN_PARTS_MAX])
{
    const int64_t end = first + count;
    int num_parts = 0;

    CHECK(first >= 0 && count >= 0 && end <= box_num_elements(box), "elements %lld + %lld of %lld",
          (long long)first, (long long)count, (long long)box_num_elements(box));
    while (first < end) {
        parts[num_parts] = longest_part(box, first, end - first);
        first += box_num_elements(&parts[num_parts++]);
    }
    return num_parts;
}

int64_t box_num_elements(const struct box *box)
{
    int64_t count;

    CHECK(checked_product(box->size, box->num_dims, &count), "box overflows");
    return count;
}

bool box_equal(const struct box *a, const struct box *b)
{
    const size_t bytes = (size_t)a->num_dims * sizeof a->size[0];

    return a->num_dims == b->num_dims && memcmp(a->offset, b->offset, bytes) == 0 &&
           memcmp(a->size, b->size, bytes) == 0;
}

bool box_inside(const struct box *box, const int64_t *global_shape)
{
    for (int i = 0; i < box->num_dims; i++) {
        if (box->offset[i] < 0 || box->size[i] < 0 || box->offset[i] > global_shape[i] ||
            box->size[i] > global_shape[i] - box->offset[i]) {
            return false;
        }
    }
    return true;
}

bool box_intersect(const struct box *a, const struct box *b, struct box *common)
{
    CHECK(a->num_dims == b->num_dims, "%d and %d dims", a->num_dims, b->num_dims);
    common->num_dims = a->num_dims;
    for (int i = 0; i < a->num_dims; i++) {
        const int64_t begin = a->offset[i] > b->offset[i] ? a->offset[i] : b->offset[i];
        const int64_t a_end = a->offset[i] + a->size[i], b_end = b->offset[i] + b->size[i];
        const int64_t end = a_end < b_end ? a_end : b_end;

        if (begin >= end) {
            return false;
        }
        common->offset[i] = begin;
        common->size[i] = end - begin;
    }
    return true;
}

/* Index of the part's corner inside the packed box, after moving `step` along the outer dims. */
static int64_t element_index(const struct box *box, const int64_t *position)
{
    int64_t index = 0;

    for (int i = 0; i < box->num_dims; i++) {
        index = index * box->size[i] + position[i] - box->offset[i];
    }
    return index;
}

void box_copy(void *to, const struct box *to_box, const void *from, const struct box *from_box,
              const struct box *part, int element_bytes)
{
    const int last = part->num_dims - 1;
    const int64_t run = last >= 0 ? part->size[last] : 1;
    int64_t position[TENSOR_DIMS_MAX] = {0};
    int64_t num_runs = 1;

    for (int i = 0; i < last; i++) {
        num_runs *= part->size[i];
    }
    memcpy(position, part->offset, (size_t)part->num_dims * sizeof position[0]);
    for (int64_t r = 0; r < num_runs; r++) {
        memcpy((char *)to + element_index(to_box, position) * element_bytes,
               (const char *)from + element_index(from_box, position) * element_bytes,
               (size_t)(run * element_bytes));
        for (int i = last - 1; i >= 0; i--) {
            if (++position[i] < part->offset[i] + part->size[i]) {
                break;
            }
            position[i] = part->offset[i];
        }
    }
}
