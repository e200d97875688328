/* random_normal.h - what the variants of initial_normal share. Also compiled by nvcc. */
#ifndef CADRE_OPS_RANDOM_NORMAL_H
#define CADRE_OPS_RANDOM_NORMAL_H

#include "base/rng.h"
#include "ops/ops.h"

/* Element `local` of the box: a function of its place in the global tensor. */
RNG_INLINE float initial_normal_at(const struct initial_normal *op, int64_t local)
{
    int64_t index = 0, stride = 1;

    for (int i = op->box.num_dims - 1; i >= 0; i--) {
        index += (op->box.offset[i] + local % op->box.size[i]) * stride;
        local /= op->box.size[i];
        stride *= op->global_shape[i];
    }
    return (float)(op->std * rng_normal(op->key, 0, (uint64_t)index));
}

#endif
