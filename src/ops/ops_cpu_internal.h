/* ops_cpu_internal.h - what the CPU ops share: rows as floats, threads, fixed-order sums.
 *
 * Arithmetic is in f32 whatever the tensor holds: a kernel asks for a row as floats (its own memory
 * when it is F32, else converted into a buffer that stays in the first-level cache), computes, and
 * puts the row back. */
#ifndef CADRE_OPS_OPS_CPU_INTERNAL_H
#define CADRE_OPS_OPS_CPU_INTERNAL_H

#include <omp.h>
#include <stdint.h>
#include <string.h>

#include "ops/ops.h"
#include "ops/ops_cpu.h"
#include "ops/vector_math.h"

enum {
    OPS_BLOCK = 1024,         /* elements of an elementwise block: its buffers fit the L1 cache */
    OPS_PARALLEL_MIN = 16384, /* elements below which a parallel region costs more than it gains */
};

/* Elements [first, first + n) of an F32 or BF16 tensor as floats: its own memory, or buffer. */
static inline const float *floats_get(const struct tensor *x, int64_t first, int64_t n,
                                      float *buffer)
{
    return vector_load(x->dtype, x->data, first, n, buffer);
}

/* As floats_get, but always a copy in buffer. */
static inline void floats_copy(float *buffer, const struct tensor *x, int64_t first, int64_t n)
{
    const float *values = floats_get(x, first, n, buffer);

    if (values != buffer) {
        memcpy(buffer, values, (size_t)n * sizeof *buffer);
    }
}

/* Where to compute elements [first, ...) of y: its own memory or buffer; floats_put brings them
 * home. */
static inline float *floats_place(const struct tensor *y, int64_t first, float *buffer)
{
    return vector_target(y->dtype, y->data, first, buffer);
}

static inline void floats_put(struct tensor *y, int64_t first, int64_t n, const float *values)
{
    if (y->dtype == DTYPE_F32 && values != (const float *)y->data + first) {
        memcpy((float *)y->data + first, values, (size_t)n * sizeof *values);
    }
    vector_store(y->dtype, y->data, first, n, values);
}

static inline float float_get(const struct tensor *x, int64_t index)
{
    return x->dtype == DTYPE_F32 ? ((const float *)x->data)[index]
                                 : bf16_to_float(((const bf16_t *)x->data)[index]);
}

/* Sums in 16 lanes and then over the lanes, an order that the compiler cannot change with the
 * address: the same bits in every run and for every number of threads. */
enum { SUM_LANES = 16 };

static inline float lanes_sum(const float lanes[SUM_LANES])
{
    float sum = 0.0f;

    for (int i = 0; i < SUM_LANES; i++) {
        sum += lanes[i];
    }
    return sum;
}

static inline float floats_dot(const float *x, const float *y, int64_t n)
{
    float lanes[SUM_LANES] = {0.0f};
    int64_t i = 0;

    for (; i + SUM_LANES <= n; i += SUM_LANES) {
#pragma omp simd
        for (int lane = 0; lane < SUM_LANES; lane++) {
            lanes[lane] += x[i + lane] * y[i + lane];
        }
    }
    for (; i < n; i++) {
        lanes[i % SUM_LANES] += x[i] * y[i];
    }
    return lanes_sum(lanes);
}

static inline float floats_sum(const float *x, int64_t n)
{
    float lanes[SUM_LANES] = {0.0f};
    int64_t i = 0;

    for (; i + SUM_LANES <= n; i += SUM_LANES) {
#pragma omp simd
        for (int lane = 0; lane < SUM_LANES; lane++) {
            lanes[lane] += x[i + lane];
        }
    }
    for (; i < n; i++) {
        lanes[i % SUM_LANES] += x[i];
    }
    return lanes_sum(lanes);
}

static inline float floats_max(const float *x, int64_t n)
{
    float lanes[SUM_LANES], max = x[0];
    int64_t i = 0;

    for (int lane = 0; lane < SUM_LANES; lane++) {
        lanes[lane] = x[0];
    }
    for (; i + SUM_LANES <= n; i += SUM_LANES) {
#pragma omp simd
        for (int lane = 0; lane < SUM_LANES; lane++) {
            lanes[lane] = x[i + lane] > lanes[lane] ? x[i + lane] : lanes[lane];
        }
    }
    for (; i < n; i++) {
        max = x[i] > max ? x[i] : max;
    }
    for (int lane = 0; lane < SUM_LANES; lane++) {
        max = lanes[lane] > max ? lanes[lane] : max;
    }
    return max;
}

static inline float *scratch_floats(struct stream *stream, int64_t n)
{
    return arena_allocate(stream->scratch, (size_t)n * sizeof(float));
}

/* A buffer of floats for every thread of the next parallel region. */
struct thread_floats {
    float *memory;
    int64_t stride;
};

static inline struct thread_floats thread_floats_new(struct stream *stream, int64_t n)
{
    const int64_t stride = (n + 63) / 64 * 64; /* threads share no cache line */

    return (struct thread_floats){scratch_floats(stream, stride * omp_get_max_threads()), stride};
}

static inline float *thread_floats_mine(const struct thread_floats *floats)
{
    return floats->memory + floats->stride * omp_get_thread_num();
}

#endif
