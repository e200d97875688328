/* Sums over a gradient range, and the clipping factor. Sums are by chunks of a fixed size, added in
 * order, in double: they depend neither on the threads nor, to the last float bit, on the order. */
#include <math.h>

#include "ops/ops_cpu.h"
#include "ops/ops_cpu_internal.h"

enum { SUM_CHUNK = 16384 };

typedef double chunk_sum(const float *x, int64_t n);

static double square_sum_block(const float *x, int64_t n)
{
    double lanes[SUM_LANES] = {0.0}, sum = 0.0;
    int64_t i = 0;

    for (; i + SUM_LANES <= n; i += SUM_LANES) {
#pragma omp simd
        for (int lane = 0; lane < SUM_LANES; lane++) {
            lanes[lane] += (double)x[i + lane] * (double)x[i + lane];
        }
    }
    for (; i < n; i++) {
        lanes[i % SUM_LANES] += (double)x[i] * (double)x[i];
    }
    for (int lane = 0; lane < SUM_LANES; lane++) {
        sum += lanes[lane];
    }
    return sum;
}

static double zero_count_block(const float *x, int64_t n)
{
    int count = 0;

#pragma omp simd reduction(+ : count)
    for (int64_t i = 0; i < n; i++) {
        count += x[i] == 0.0f;
    }
    return (double)count;
}

static double sum_of_chunk(const struct tensor *x, int64_t first, int64_t n, chunk_sum *sum_block)
{
    float buffer[OPS_BLOCK];
    double sum = 0.0;

    for (int64_t i = 0; i < n; i += OPS_BLOCK) {
        const int64_t length = n - i < OPS_BLOCK ? n - i : OPS_BLOCK;

        sum += sum_block(floats_get(x, first + i, length, buffer), length);
    }
    return sum;
}

static double sum_of_tensor(struct stream *stream, const struct tensor *x, chunk_sum *sum_block)
{
    const int64_t num_elements = tensor_num_elements(x);
    const int64_t num_chunks = (num_elements + SUM_CHUNK - 1) / SUM_CHUNK;
    double *sums = arena_allocate(stream->scratch, (size_t)num_chunks * sizeof *sums), sum = 0.0;

#pragma omp parallel for schedule(static) if (num_chunks > 1)
    for (int64_t chunk = 0; chunk < num_chunks; chunk++) {
        const int64_t first = chunk * SUM_CHUNK, rest = num_elements - first;

        sums[chunk] = sum_of_chunk(x, first, rest < SUM_CHUNK ? rest : SUM_CHUNK, sum_block);
    }
    for (int64_t chunk = 0; chunk < num_chunks; chunk++) {
        sum += sums[chunk];
    }
    return sum;
}

void square_sum_cpu(struct stream *stream, const struct square_sum *op)
{
    *(double *)op->sum->data += sum_of_tensor(stream, op->x, square_sum_block);
}

void zero_count_cpu(struct stream *stream, const struct zero_count *op)
{
    *(double *)op->count->data += sum_of_tensor(stream, op->x, zero_count_block);
}

void clip_scale_cpu(struct stream *stream, const struct clip_scale *op)
{
    const float norm = (float)sqrt(*(const double *)op->sum->data);
    const float scale = op->max_norm / (norm + 1e-6f);

    *(float *)op->norm->data = norm;
    *(float *)op->scale->data = op->max_norm > 0.0f && scale < 1.0f ? scale : 1.0f;
}
