/* Dropout and router input jitter: a row's random factors are drawn into a buffer, then multiplied
 * in. One call of the generator serves four neighbouring elements. */
#include "ops/dropout_cpu.h"

#include "ops/ops_cpu_internal.h"

/* u[i] = rng_uniform(key, row, first + i), first a multiple of 4. */
static void uniforms(float *u, struct rng_key key, uint64_t row, uint64_t first, int64_t n)
{
    int64_t i = 0;

    for (; i + 4 <= n; i += 4) {
        uint32_t bits[4];

        rng_philox(bits, key, row, (first + (uint64_t)i) / 4);
        for (int j = 0; j < 4; j++) {
            u[i + j] = rng_to_uniform(bits[j]);
        }
    }
    for (; i < n; i++) {
        u[i] = rng_uniform(key, row, first + (uint64_t)i);
    }
}

void dropout_factors(float *factor, const struct dropout_rule *rule, uint64_t row, uint64_t first,
                     int64_t n)
{
    const float p = rule->p, kept = 1.0f / (1.0f - p);

    uniforms(factor, rule->key, row, first, n);
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
        factor[i] = factor[i] >= p ? kept : 0.0f;
    }
}

static void dropout_row(const struct dropout *a, int64_t row, float *buffer)
{
    const int64_t h = a->x->dim[1], first = row * h;
    const float *x = floats_get(a->x, first, h, buffer);
    const float *residual =
        a->residual != NULL ? floats_get(a->residual, first, h, buffer + h) : NULL;
    float *factor = buffer + 2 * h, *y;

    if (a->rule.p > 0.0f) {
        const uint64_t id = (uint64_t)((const int64_t *)a->token_id->data)[row];

        dropout_factors(factor, &a->rule, id, 0, h);
#pragma omp simd
        for (int64_t i = 0; i < h; i++) {
            factor[i] *= x[i];
        }
        x = factor;
    }
    y = floats_place(a->y, first, buffer);
    if (residual != NULL) {
#pragma omp simd
        for (int64_t i = 0; i < h; i++) {
            y[i] = x[i] + residual[i];
        }
        x = y;
    }
    if (x != y) {
        memcpy(y, x, (size_t)h * sizeof *y);
    }
    floats_put(a->y, first, h, y);
}

void dropout_cpu(struct stream *stream, const struct dropout *a)
{
    const int64_t num_rows = a->x->dim[0], h = a->x->dim[1];
    const struct thread_floats buffers = thread_floats_new(stream, 3 * h);

#pragma omp parallel for schedule(static) if (num_rows * h >= OPS_PARALLEL_MIN)
    for (int64_t row = 0; row < num_rows; row++) {
        dropout_row(a, row, thread_floats_mine(&buffers));
    }
}

static void jitter_row(const struct jitter *a, int64_t row, float *buffer)
{
    const int64_t h = a->x->dim[1], first = row * h;
    const uint64_t id = (uint64_t)((const int64_t *)a->token_id->data)[row];
    const float *x = floats_get(a->x, first, h, buffer);
    float *u = buffer + h, *y = floats_place(a->y, first, buffer);

    uniforms(u, a->key, id, 0, h);
#pragma omp simd
    for (int64_t i = 0; i < h; i++) {
        y[i] = x[i] * (1.0f - a->eps + 2.0f * a->eps * u[i]);
    }
    floats_put(a->y, first, h, y);
}

void jitter_cpu(struct stream *stream, const struct jitter *a)
{
    const int64_t num_rows = a->x->dim[0], h = a->x->dim[1];
    const struct thread_floats buffers = thread_floats_new(stream, 2 * h);

#pragma omp parallel for schedule(static) if (num_rows * h >= OPS_PARALLEL_MIN)
    for (int64_t row = 0; row < num_rows; row++) {
        jitter_row(a, row, thread_floats_mine(&buffers));
    }
}
