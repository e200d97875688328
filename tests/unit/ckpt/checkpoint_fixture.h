/* checkpoint_fixture.h - a small checkpoint whose every element tells its iteration, name and
 * index: saved by one or more "ranks", checked after loading. */
#ifndef CADRE_TESTS_CHECKPOINT_FIXTURE_H
#define CADRE_TESTS_CHECKPOINT_FIXTURE_H

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/check.h"
#include "ckpt/checkpoint.h"

enum { FIXTURE_TENSORS = 3, FIXTURE_ELEMENTS_MAX = 48 };

static const struct {
    const char *name;
    enum dtype dtype;
    int num_dims;
    int64_t shape[3];
    bool is_optimizer;
} fixture_tensors[FIXTURE_TENSORS] = {
    {"decoder.layers.0.mlp.experts.linear_fc2.weight", DTYPE_BF16, 3, {4, 3, 4}, false},
    {"embedding.word_embeddings.weight", DTYPE_F32, 2, {6, 4, 0}, false},
    {"optimizer.state.exp_avg.embedding.word_embeddings.weight", DTYPE_F32, 2, {6, 4, 0}, true},
};

/* Small integers: exact in bf16. */
static inline float fixture_value(int64_t iteration, int tensor, int64_t index)
{
    return (float)((iteration * 7 + tensor * 50 + index) % 256);
}

/* The rank's box of the tensor's values, as stage function: the context is the iteration. */
static inline int fixture_stage(void *context, const struct ckpt_item *item, void *host)
{
    const int64_t iteration = *(const int64_t *)context;
    const struct box whole = box_whole(item->global_shape, item->num_dims);
    float f32[FIXTURE_ELEMENTS_MAX];
    uint16_t bf16[FIXTURE_ELEMENTS_MAX];
    int tensor = 0;

    while (strcmp(fixture_tensors[tensor].name, item->name) != 0) {
        tensor++;
    }
    for (int64_t i = 0; i < box_num_elements(&whole); i++) {
        f32[i] = fixture_value(iteration, tensor, i);
        bf16[i] = bf16_from_float(f32[i]);
    }
    box_copy(host, &item->box, item->dtype == DTYPE_F32 ? (void *)f32 : (void *)bf16, &whole,
             &item->box, dtype_size_bytes(item->dtype));
    return 0;
}

/* Saves part `ranks.rank` of ranks.num_ranks (0 or 1: everything), cut along the first dim. */
static inline int fixture_save(const char *directory, int64_t iteration,
                               const struct checkpoint_ranks *ranks)
{
    const int count = ranks != NULL && ranks->num_ranks > 1 ? ranks->num_ranks : 1;
    struct ckpt_item items[FIXTURE_TENSORS];
    struct checkpoint_save_request request = {.directory = directory,
                                              .iteration = iteration,
                                              .items = items,
                                              .num_items = FIXTURE_TENSORS,
                                              .stage = fixture_stage,
                                              .context = &iteration};
    int result;

    for (int i = 0; i < FIXTURE_TENSORS; i++) {
        struct box whole;

        items[i] = (struct ckpt_item){.name = fixture_tensors[i].name,
                                      .dtype = fixture_tensors[i].dtype,
                                      .num_dims = fixture_tensors[i].num_dims,
                                      .is_optimizer = fixture_tensors[i].is_optimizer};
        memcpy(items[i].global_shape, fixture_tensors[i].shape, sizeof fixture_tensors[i].shape);
        whole = box_whole(items[i].global_shape, items[i].num_dims);
        items[i].box = box_part(&whole, 0, ranks != NULL ? ranks->rank : 0, count);
    }
    if (ranks != NULL) {
        request.ranks = *ranks;
    }
    request.state = json_pack("{s:I}", "consumed_train_samples", (json_int_t)(iteration * 100));
    result = checkpoint_save(&request);
    json_decref(request.state);
    return result;
}

/* Does the open checkpoint hold exactly what fixture_save wrote at this iteration? */
static inline int fixture_check(const struct checkpoint *checkpoint, int64_t iteration)
{
    if (checkpoint_iteration(checkpoint) != iteration ||
        checkpoint_num_tensors(checkpoint) != FIXTURE_TENSORS ||
        json_integer_value(json_object_get(checkpoint_state(checkpoint),
                                           "consumed_train_samples")) != iteration * 100) {
        return error_set("iteration, state or number of tensors differ");
    }
    for (int t = 0; t < FIXTURE_TENSORS; t++) {
        struct checkpoint_read read = {.name = fixture_tensors[t].name,
                                       .dtype = DTYPE_F32,
                                       .num_dims = fixture_tensors[t].num_dims};
        float values[FIXTURE_ELEMENTS_MAX];

        memcpy(read.global_shape, fixture_tensors[t].shape, sizeof fixture_tensors[t].shape);
        read.box = box_whole(read.global_shape, read.num_dims);
        TRY(checkpoint_read_box(checkpoint, &read, values));
        for (int64_t i = 0; i < box_num_elements(&read.box); i++) {
            if (values[i] != fixture_value(iteration, t, i)) {
                return error_set("%s[%lld] is %g", read.name, (long long)i, (double)values[i]);
            }
        }
    }
    return 0;
}

/* Finds, opens and checks what --load DIRECTORY means. Returns the iteration, or -1. */
static inline int64_t fixture_load(const char *directory, int64_t ckpt_step)
{
    char path[PATH_LENGTH_MAX];
    struct checkpoint *checkpoint;
    int64_t iteration = -1;

    if (checkpoint_find(directory, ckpt_step, path) != CHECKPOINT_FOUND) {
        return -1;
    }
    checkpoint = checkpoint_open(path, NULL);
    if (checkpoint != NULL && fixture_check(checkpoint, checkpoint_iteration(checkpoint)) == 0) {
        iteration = checkpoint_iteration(checkpoint);
    }
    checkpoint_close(checkpoint);
    return iteration;
}

#endif
