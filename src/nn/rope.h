/* rope.h - the table of rotary position embeddings (Su et al. 2021). */
#ifndef CADRE_NN_ROPE_H
#define CADRE_NN_ROPE_H

#include "device/device.h"
#include "tensor/tensor.h"

struct rope_config {
    double base;                 /* theta: frequency of pair i is base^(-2i / rotary_dim) */
    double percent;              /* share of the head dim that is rotated */
    double interpolation_factor; /* positions are divided by it; 1: not */
    int64_t head_dim;
    int64_t num_positions;
};

/* Dims that are rotated: even, at most head_dim. */
int64_t rope_rotary_dim(const struct rope_config *config);
/* [num_positions, rotary_dim / 2, 2] f32 of (cos, sin) on the stream's device. */
struct tensor rope_table(struct stream *stream, struct arena *arena,
                         const struct rope_config *config);

#endif
