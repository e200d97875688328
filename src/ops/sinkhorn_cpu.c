/* Sinkhorn balancing: rows and columns of exp(logits) are scaled in turn until every token gives
 * 1/T and every expert receives 1/E. One pass over the matrix an iteration: a row's scale is known
 * when the row has been read, and goes into the column sums at once. */
#include "ops/ops_cpu.h"
#include "ops/router_score_cpu.h"

static const float scale_epsilon = 1e-8f; /* as in Megatron: a zero sum must not divide */

struct sinkhorn {
    float *kernel;       /* [T,E] exp(logits - the row's maximum) */
    float *row_scale;    /* [T] */
    float *column_scale; /* [E] */
    double *partials;    /* [chunks,E] column sums of each chunk of tokens */
    int64_t num_tokens, num_experts, num_chunks;
};

static void exponentiate(const struct sinkhorn *s, const float *logits)
{
#pragma omp parallel for schedule(static) if (s->num_chunks > 1)
    for (int64_t t = 0; t < s->num_tokens; t++) {
        const float *from = logits + t * s->num_experts;
        float *to = s->kernel + t * s->num_experts;
        const float max = floats_max(from, s->num_experts);

#pragma omp simd
        for (int64_t e = 0; e < s->num_experts; e++) {
            to[e] = fast_exp(from[e] - max);
        }
    }
}

/* Row scales of a chunk's tokens, and the chunk's column sums under them. */
static void scale_chunk(const struct sinkhorn *s, int64_t chunk)
{
    const int64_t first = chunk * ROUTER_CHUNK;
    const int64_t end = first + ROUTER_CHUNK < s->num_tokens ? first + ROUTER_CHUNK : s->num_tokens;
    double *sums = s->partials + chunk * s->num_experts;

    memset(sums, 0, (size_t)s->num_experts * sizeof *sums);
    for (int64_t t = first; t < end; t++) {
        const float *row = s->kernel + t * s->num_experts;
        const float sum = floats_dot(row, s->column_scale, s->num_experts);
        const float scale = 1.0f / (float)s->num_tokens / (sum + scale_epsilon);

        s->row_scale[t] = scale;
#pragma omp simd
        for (int64_t e = 0; e < s->num_experts; e++) {
            sums[e] += (double)(scale * row[e]);
        }
    }
}

/* Returns the mean change of the column scales. */
static double iterate(const struct sinkhorn *s)
{
    double change = 0.0;

#pragma omp parallel for schedule(static) if (s->num_chunks > 1)
    for (int64_t chunk = 0; chunk < s->num_chunks; chunk++) {
        scale_chunk(s, chunk);
    }
    for (int64_t e = 0; e < s->num_experts; e++) {
        double sum = 0.0;
        float scale;

        for (int64_t chunk = 0; chunk < s->num_chunks; chunk++) {
            sum += s->partials[chunk * s->num_experts + e];
        }
        scale = 1.0f / (float)s->num_experts / ((float)sum + scale_epsilon);
        change += fabs((double)s->column_scale[e] - (double)scale);
        s->column_scale[e] = scale;
    }
    return change / (double)s->num_experts;
}

static void apply_scales(const struct sinkhorn *s)
{
#pragma omp parallel for schedule(static) if (s->num_chunks > 1)
    for (int64_t t = 0; t < s->num_tokens; t++) {
        float *row = s->kernel + t * s->num_experts;

#pragma omp simd
        for (int64_t e = 0; e < s->num_experts; e++) {
            row[e] *= s->column_scale[e] * s->row_scale[t];
        }
    }
}

void router_sinkhorn_cpu(struct stream *stream, const struct router_sinkhorn *op)
{
    struct sinkhorn s = {.num_tokens = op->logits->dim[0], .num_experts = op->logits->dim[1]};
    int num_iterations = 0;
    double change;

    s.num_chunks = (s.num_tokens + ROUTER_CHUNK - 1) / ROUTER_CHUNK;
    s.kernel = op->assignment->data;
    s.row_scale = arena_allocate(stream->scratch, (size_t)s.num_tokens * sizeof(float));
    s.column_scale = arena_allocate(stream->scratch, (size_t)s.num_experts * sizeof(float));
    s.partials =
        arena_allocate(stream->scratch, (size_t)(s.num_chunks * s.num_experts) * sizeof(double));
    for (int64_t e = 0; e < s.num_experts; e++) {
        s.column_scale[e] = 1.0f;
    }
    exponentiate(&s, op->logits->data);
    do {
        change = iterate(&s);
        num_iterations++;
    } while (change > (double)op->tolerance && num_iterations < op->max_iterations);
    apply_scales(&s);
}
