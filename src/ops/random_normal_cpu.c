#include "ops/ops_cpu.h"
#include "ops/ops_cpu_internal.h"

void random_normal_cpu(struct stream *stream, const struct random_normal *op)
{
    const int64_t num_rows = op->x->dim[0], width = op->x->dim[1];
    const int64_t *token_id = op->token_id->data;
    float *x = op->x->data;

#pragma omp parallel for schedule(static) if (num_rows * width > OPS_PARALLEL_MIN / 64)
    for (int64_t t = 0; t < num_rows; t++) {
        for (int64_t i = 0; i < width; i++) {
            x[t * width + i] = (float)rng_normal(op->key, (uint64_t)token_id[t], (uint64_t)i);
        }
    }
}
