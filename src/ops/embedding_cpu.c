/* Embedding: a gather of rows. Its gradient adds rows that may meet in one place, so threads share
 * the columns instead of the tokens: every element is summed in token order by one thread. */
#include "ops/ops_cpu_internal.h"

void embedding_forward_cpu(struct stream *stream, const struct embedding *a)
{
    const int64_t num_tokens = a->y->dim[0], h = a->y->dim[1], num_ids = a->weight->dim[0];
    const int32_t *id = a->id->data;
    const struct thread_floats buffers = thread_floats_new(stream, 2 * h);

#pragma omp parallel for schedule(static) if (num_tokens * h >= OPS_PARALLEL_MIN)
    for (int64_t token = 0; token < num_tokens; token++) {
        const int64_t row = id[token] - a->vocab_start;
        const bool mine = row >= 0 && row < num_ids;
        float *buffer = thread_floats_mine(&buffers), *y = floats_place(a->y, token * h, buffer);

        if (!mine && !a->accumulate) {
            memset(y, 0, (size_t)h * sizeof *y);
        } else if (mine && !a->accumulate) {
            floats_copy(y, a->weight, row * h, h);
        } else if (mine) {
            const float *w = floats_get(a->weight, row * h, h, buffer + h);

            floats_copy(y, a->y, token * h, h);
#pragma omp simd
            for (int64_t i = 0; i < h; i++) {
                y[i] += w[i];
            }
        } else {
            continue;
        }
        floats_put(a->y, token * h, h, y);
    }
}

enum { EMBEDDING_COLUMNS = 64 };

void embedding_backward_cpu(struct stream *stream, const struct embedding_backward *a)
{
    const int64_t num_tokens = a->d_y->dim[0], h = a->d_y->dim[1], num_ids = a->d_weight->dim[0];
    const int64_t num_blocks = (h + EMBEDDING_COLUMNS - 1) / EMBEDDING_COLUMNS;
    const int32_t *id = a->id->data;
    float *d_weight = a->d_weight->data;

#pragma omp parallel for schedule(static) if (num_tokens * h >= OPS_PARALLEL_MIN)
    for (int64_t block = 0; block < num_blocks; block++) {
        const int64_t first = block * EMBEDDING_COLUMNS;
        const int64_t n = h - first < EMBEDDING_COLUMNS ? h - first : EMBEDDING_COLUMNS;
        float buffer[EMBEDDING_COLUMNS];

        for (int64_t token = 0; token < num_tokens; token++) {
            const int64_t row = id[token] - a->vocab_start;

            if (row >= 0 && row < num_ids) {
                const float *d_y = floats_get(a->d_y, token * h + first, n, buffer);
                float *restrict d_w = d_weight + row * h + first;

#pragma omp simd
                for (int64_t i = 0; i < n; i++) {
                    d_w[i] += d_y[i];
                }
            }
        }
    }
}
