#include "ops/ops_cpu.h"
#include "ops/ops_cpu_internal.h"
#include "ops/random_normal.h"

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

void initial_normal_cpu(struct stream *stream, const struct initial_normal *op)
{
    const int64_t n = tensor_num_elements(op->x);
    const bool bf16 = op->x->dtype == DTYPE_BF16;

#pragma omp parallel for schedule(static) if (n > OPS_PARALLEL_MIN / 64)
    for (int64_t i = 0; i < n; i++) {
        const float value = initial_normal_at(op, i);

        if (bf16) {
            ((bf16_t *)op->x->data)[i] = bf16_from_float(value);
        } else {
            ((float *)op->x->data)[i] = value;
        }
    }
}
