/* toy_pipeline.h - a model to send through a pipeline: part v of the model is y = a_v * x + b_v, so
 * what enters and leaves every part, and every gradient, is known to everybody as an exact whole
 * number. The work of a stage checks all that it is given. */
#ifndef CADRE_TESTS_TOY_PIPELINE_H
#define CADRE_TESTS_TOY_PIPELINE_H

#include <stdio.h>

#include "base/check.h"
#include "pipeline/executor.h"

enum { TOY_SLOTS_MAX = 128 };

struct toy {
    struct pipeline_shape shape;
    int64_t num_rows, hidden_size;
    bool training;
    struct {
        bool is_taken;
        int microbatch, chunk;
        const struct tensor *input;
    } slots[TOY_SLOTS_MAX];
    int num_forwards, num_backwards;
    int fail_after; /* the forward that fails; 0: none */
    int num_wrong;
    char first_wrong[256];
};

#define TOY_EXPECT(toy, condition, ...)                                                            \
    do {                                                                                           \
        if (!(condition) && (toy)->num_wrong++ == 0) {                                             \
            snprintf((toy)->first_wrong, sizeof(toy)->first_wrong, __VA_ARGS__);                   \
        }                                                                                          \
    } while (0)

/* Part of the model: chunk 0 of all stages, then chunk 1, ... */
static inline int toy_part(const struct pipeline_shape *shape, int chunk)
{
    return chunk * shape->num_stages + shape->stage;
}

static inline int toy_num_parts(const struct pipeline_shape *shape)
{
    return shape->num_chunks * shape->num_stages;
}

static inline float toy_a(int part)
{
    return part % 7 == 3 ? 2.0f : part % 2 == 0 ? -1.0f : 1.0f;
}

static inline float toy_b(int part)
{
    return (float)(part % 5 - 2);
}

/* Element i of what enters a part, and of the gradient of what leaves it. */
static inline float toy_input(int part, int microbatch, int64_t i)
{
    float x = (float)((i * 7 + microbatch * 13) % 31 - 15);

    for (int v = 0; v < part; v++) {
        x = toy_a(v) * x + toy_b(v);
    }
    return x;
}

static inline float toy_d_output(const struct pipeline_shape *shape, int part, int microbatch,
                                 int64_t i)
{
    float d = (float)((i * 5 + microbatch * 11) % 29 - 14);

    for (int v = toy_num_parts(shape) - 1; v > part; v--) {
        d = toy_a(v) * d;
    }
    return d;
}

static inline int toy_forward(void *context, const struct pipeline_step *step, int slot,
                              const struct tensor *input, struct tensor *output)
{
    struct toy *toy = context;
    const int part = toy_part(&toy->shape, step->chunk);
    const bool is_first = part == 0, is_last = part == toy_num_parts(&toy->shape) - 1;

    TOY_EXPECT(toy, (input == NULL) == is_first && (output == NULL) == is_last,
               "forward of part %d has the wrong tensors", part);
    TOY_EXPECT(toy, slot >= 0 && slot < TOY_SLOTS_MAX && !toy->slots[slot].is_taken,
               "slot %d is not free", slot);
    for (int64_t i = 0; i < toy->num_rows * toy->hidden_size; i++) {
        const float x = toy_input(part, step->microbatch, i);

        TOY_EXPECT(toy, is_first || ((const float *)input->data)[i] == x,
                   "part %d, microbatch %d: input %lld is %g, wanted %g", part, step->microbatch,
                   (long long)i, (double)((const float *)input->data)[i], (double)x);
        if (!is_last) {
            ((float *)output->data)[i] = toy_a(part) * x + toy_b(part);
        }
    }
    toy->slots[slot].is_taken = toy->training;
    toy->slots[slot].microbatch = step->microbatch;
    toy->slots[slot].chunk = step->chunk;
    toy->slots[slot].input = input;
    return ++toy->num_forwards == toy->fail_after ? error_set("forward failed") : 0;
}

static inline int toy_backward(void *context, const struct pipeline_step *step, int slot,
                               const struct tensor *d_output, struct tensor *d_input)
{
    struct toy *toy = context;
    const int part = toy_part(&toy->shape, step->chunk);
    const bool is_first = part == 0, is_last = part == toy_num_parts(&toy->shape) - 1;
    const struct tensor *input = toy->slots[slot].input;

    TOY_EXPECT(toy, (d_input == NULL) == is_first && (d_output == NULL) == is_last,
               "backward of part %d has the wrong tensors", part);
    TOY_EXPECT(toy,
               toy->slots[slot].is_taken && toy->slots[slot].microbatch == step->microbatch &&
                   toy->slots[slot].chunk == step->chunk,
               "slot %d is another forward's", slot);
    for (int64_t i = 0; i < toy->num_rows * toy->hidden_size; i++) {
        const float d = toy_d_output(&toy->shape, part, step->microbatch, i);

        TOY_EXPECT(toy, is_last || ((const float *)d_output->data)[i] == d,
                   "part %d, microbatch %d: gradient %lld is %g, wanted %g", part, step->microbatch,
                   (long long)i, (double)((const float *)d_output->data)[i], (double)d);
        TOY_EXPECT(
            toy,
            is_first || ((const float *)input->data)[i] == toy_input(part, step->microbatch, i),
            "part %d, microbatch %d: the input was lost before backward", part, step->microbatch);
        if (!is_first) {
            ((float *)d_input->data)[i] = toy_a(part) * d;
        }
    }
    toy->slots[slot].is_taken = false;
    toy->num_backwards++;
    return 0;
}

/* One batch; the caller looks at num_wrong. */
static inline int toy_run(struct toy *toy, const struct pipeline_transport *transport)
{
    const struct pipeline_work work = {
        .forward = toy_forward, .backward = toy_backward, .context = toy};
    const int num_passes = toy->shape.num_chunks * toy->shape.num_microbatches;
    struct pipeline_schedule schedule;
    int result;

    if (toy->training) {
        TRY(schedule_training(&schedule, &toy->shape));
    } else {
        schedule_forward_only(&schedule, &toy->shape);
    }
    result = pipeline_execute(&schedule, &work, transport);
    TOY_EXPECT(toy,
               result != 0 || (toy->num_forwards == num_passes &&
                               toy->num_backwards == (toy->training ? num_passes : 0)),
               "%d forwards and %d backwards for %d passes", toy->num_forwards, toy->num_backwards,
               num_passes);
    pipeline_schedule_free(&schedule);
    return result;
}

#endif
