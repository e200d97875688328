/* oracle_run.h - the machinery of a run: a stream, arenas, the groups of one rank, a pass over B
 * sequences of S tokens. */
#ifndef CADRE_TESTS_ORACLE_ORACLE_RUN_H
#define CADRE_TESTS_ORACLE_ORACLE_RUN_H

#include "nn/pass.h"
#include "oracle_device.h"

struct oracle_run {
    struct stream *stream;
    struct arena *run, *saved, *scratch;
    struct groups groups;
};

/* name: "cpu" or "cuda". Returns -1 with an error where that device is not there. */
static inline int oracle_run_begin_on(struct oracle_run *run, const char *name)
{
    const struct device *device = device_select(name, 1);
    const struct ops *ops = device != NULL ? ops_for(device) : NULL;
    struct memory_source memory;

    if (ops == NULL) {
        return -1;
    }
    memory = oracle_memory(device);
    run->stream = stream_create(device, oracle_ops(ops));
    run->run = arena_create("run", &memory);
    run->saved = arena_create("microbatch", &memory);
    run->scratch = arena_create("call", &memory);
    groups_create_self(&run->groups);
    return 0;
}

static inline void oracle_run_begin(struct oracle_run *run)
{
    CHECK(oracle_run_begin_on(run, "cpu") == 0, "%s", error_text());
}

static inline void oracle_run_end(struct oracle_run *run)
{
    groups_destroy(&run->groups);
    arena_destroy(run->scratch);
    arena_destroy(run->saved);
    arena_destroy(run->run);
    stream_destroy(run->stream);
}

static inline struct tensor oracle_zeros(struct oracle_run *run, struct tensor x)
{
    op_fill_zero(run->stream, &x);
    return x;
}

/* A training pass in f32. Token t = s * B + b is at position s; token and label are 0. */
static inline struct pass oracle_pass(struct oracle_run *run, int64_t num_positions,
                                      int64_t num_sequences)
{
    const int64_t num_tokens = num_positions * num_sequences;
    struct pass pass = {.stream = run->stream,
                        .groups = &run->groups,
                        .saved = run->saved,
                        .scratch = run->scratch,
                        .dtype = DTYPE_F32,
                        .training = true,
                        .num_sequences = num_sequences,
                        .aux_loss_scale = 1.0f};

    pass.token = oracle_zeros(run, tensor_new(run->run, DTYPE_I32, num_tokens));
    pass.label = oracle_zeros(run, tensor_new(run->run, DTYPE_I32, num_tokens));
    pass.position = tensor_new(run->run, DTYPE_I32, num_tokens);
    pass.token_id = tensor_new(run->run, DTYPE_I64, num_tokens);
    pass.sample_id = tensor_new(run->run, DTYPE_I64, num_sequences);
    pass.loss_weight = tensor_new(run->run, DTYPE_F32, num_tokens);
    for (int64_t t = 0; t < num_tokens; t++) {
        const int64_t s = t / num_sequences, b = t % num_sequences;

        ((int32_t *)pass.position.data)[t] = (int32_t)s;
        ((int64_t *)pass.token_id.data)[t] = b * num_positions + s;
        ((float *)pass.loss_weight.data)[t] = 1.0f / (float)num_tokens;
    }
    for (int64_t b = 0; b < num_sequences; b++) {
        ((int64_t *)pass.sample_id.data)[b] = b;
    }
    return pass;
}

#endif
