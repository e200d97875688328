/* Dropping tokens beyond an expert's capacity. */
#include <stdlib.h>

#include "ops/ops_cpu.h"
#include "ops/ops_cpu_internal.h"

static void drop_slot(const struct router_drop *op, int64_t slot)
{
    ((int32_t *)op->indices->data)[slot] = -1;
    ((float *)op->probs->data)[slot] = 0.0f;
}

/* Slots are in token order, and a token chooses an expert at most once. */
static void drop_by_position(struct stream *stream, const struct router_drop *op)
{
    const int64_t num_slots = tensor_num_elements(op->indices);
    const int32_t *indices = op->indices->data;
    const size_t size_bytes = (size_t)op->num_experts * sizeof(int64_t);
    int64_t *num_kept = arena_allocate(stream->scratch, size_bytes);

    memset(num_kept, 0, size_bytes);
    for (int64_t slot = 0; slot < num_slots; slot++) {
        if (indices[slot] >= 0 && num_kept[indices[slot]]++ >= op->capacity) {
            drop_slot(op, slot);
        }
    }
}

struct candidate {
    int32_t expert;
    float prob;
    int64_t slot;
};

/* By expert, then falling probability, then token. */
static int compare_candidates(const void *left, const void *right)
{
    const struct candidate *a = left, *b = right;

    if (a->expert != b->expert) {
        return a->expert < b->expert ? -1 : 1;
    }
    if (a->prob != b->prob) {
        return a->prob > b->prob ? -1 : 1;
    }
    return a->slot < b->slot ? -1 : a->slot > b->slot;
}

static void drop_by_probs(struct stream *stream, const struct router_drop *op)
{
    const int64_t num_slots = tensor_num_elements(op->indices);
    struct candidate *candidates =
        arena_allocate(stream->scratch, (size_t)num_slots * sizeof *candidates);
    int64_t num_candidates = 0, num_kept = 0;

    for (int64_t slot = 0; slot < num_slots; slot++) {
        const int32_t expert = ((const int32_t *)op->indices->data)[slot];

        if (expert >= 0) {
            candidates[num_candidates++] =
                (struct candidate){expert, ((const float *)op->probs->data)[slot], slot};
        }
    }
    qsort(candidates, (size_t)num_candidates, sizeof *candidates, compare_candidates);
    for (int64_t i = 0; i < num_candidates; i++) {
        if (i > 0 && candidates[i].expert != candidates[i - 1].expert) {
            num_kept = 0;
        }
        if (num_kept++ >= op->capacity) {
            drop_slot(op, candidates[i].slot);
        }
    }
}

void router_drop_cpu(struct stream *stream, const struct router_drop *op)
{
    if (op->policy == DROP_BY_POSITION) {
        drop_by_position(stream, op);
    } else {
        drop_by_probs(stream, op);
    }
}
