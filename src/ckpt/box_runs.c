#include "ckpt/box_runs.h"

void box_runs_begin(struct box_runs *runs, const struct box *part, const struct box *from_box,
                    const struct box *to_box)
{
    int inner = part->num_dims - 1;

    *runs = (struct box_runs){
        .count = 1, .num_runs = 1, .part = *part, .from_box = *from_box, .to_box = *to_box};
    /* A dim joins the run as long as every dim inside it is whole in both boxes. */
    for (; inner >= 0; inner--) {
        runs->count *= part->size[inner];
        if (part->size[inner] != from_box->size[inner] ||
            part->size[inner] != to_box->size[inner]) {
            break;
        }
    }
    runs->num_outer = inner > 0 ? inner : 0;
    for (int i = 0; i < part->num_dims; i++) {
        runs->position[i] = part->offset[i];
        runs->num_runs *= i < runs->num_outer ? part->size[i] : 1;
    }
    if (runs->count == 0) {
        runs->num_runs = 0;
    }
}

static int64_t element_index(const struct box *box, const int64_t *position)
{
    int64_t index = 0;

    for (int i = 0; i < box->num_dims; i++) {
        index = index * box->size[i] + position[i] - box->offset[i];
    }
    return index;
}

static void step(struct box_runs *runs)
{
    for (int i = runs->num_outer - 1; i >= 0; i--) {
        if (++runs->position[i] < runs->part.offset[i] + runs->part.size[i]) {
            return;
        }
        runs->position[i] = runs->part.offset[i];
    }
}

bool box_runs_next(struct box_runs *runs)
{
    if (runs->run == runs->num_runs) {
        return false;
    }
    if (runs->run > 0) {
        step(runs);
    }
    runs->run++;
    runs->from_index = element_index(&runs->from_box, runs->position);
    runs->to_index = element_index(&runs->to_box, runs->position);
    return true;
}
