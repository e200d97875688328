/* Rows of tokens in the order of their experts, and back: a counting sort, then gathers. */
#include "base/check.h"
#include "ops/ops_cpu.h"
#include "ops/ops_cpu_internal.h"

/* offsets[e] = where expert e's rows begin; next[e] the same, to count up while rows are placed. */
static void place_experts(const struct permutation *op, int32_t *next)
{
    const int64_t num_slots = tensor_num_elements(op->indices);
    const int64_t num_experts = op->offsets->dim[0] - 1;
    const int32_t *indices = op->indices->data;
    int32_t *offsets = op->offsets->data;
    int64_t end = 0;

    memset(offsets, 0, (size_t)(num_experts + 1) * sizeof *offsets);
    for (int64_t slot = 0; slot < num_slots; slot++) {
        if (indices[slot] >= 0) {
            CHECK(indices[slot] < num_experts, "expert %d of %lld", indices[slot],
                  (long long)num_experts);
            offsets[indices[slot]]++;
        }
    }
    for (int64_t e = 0; e < num_experts; e++) {
        const int64_t num_rows = op->padded_capacity > 0 ? op->padded_capacity : offsets[e];

        CHECK(offsets[e] <= num_rows, "expert %lld has %d rows, its capacity is %lld", (long long)e,
              offsets[e], (long long)num_rows);
        offsets[e] = next[e] = (int32_t)end;
        end += num_rows;
    }
    offsets[num_experts] = (int32_t)end;
}

static void fill_padding(const struct permutation *op, const int32_t *next)
{
    const int64_t num_experts = op->offsets->dim[0] - 1;
    const int32_t *offsets = op->offsets->data;

    for (int64_t e = 0; e < num_experts; e++) {
        for (int64_t row = next[e]; row < offsets[e + 1]; row++) {
            ((int32_t *)op->row_token->data)[row] = 0;
            ((float *)op->row_prob->data)[row] = 0.0f;
        }
    }
}

void permutation_cpu(struct stream *stream, const struct permutation *op)
{
    const int64_t num_slots = tensor_num_elements(op->indices), topk = op->indices->dim[1];
    const int64_t num_experts = op->offsets->dim[0] - 1;
    const int32_t *indices = op->indices->data;
    int32_t *next = arena_allocate(stream->scratch, (size_t)num_experts * sizeof *next);

    place_experts(op, next);
    for (int64_t slot = 0; slot < num_slots; slot++) {
        const int32_t row = indices[slot] >= 0 ? next[indices[slot]]++ : -1;

        ((int32_t *)op->row_of->data)[slot] = row;
        if (row >= 0) {
            ((int32_t *)op->row_token->data)[row] = (int32_t)(slot / topk);
            ((float *)op->row_prob->data)[row] = ((const float *)op->probs->data)[slot];
        }
    }
    fill_padding(op, next);
}

void slot_gather_cpu(struct stream *stream, const struct slot_gather *op)
{
    const int64_t num_slots = tensor_num_elements(op->row_of);
    const int32_t *row_of = op->row_of->data;
    float *d_probs = op->d_probs->data;

    for (int64_t slot = 0; slot < num_slots; slot++) {
        d_probs[slot] =
            row_of[slot] >= 0 ? ((const float *)op->d_row_prob->data)[row_of[slot]] : 0.0f;
    }
}

void row_gather_cpu(struct stream *stream, const struct row_gather *op)
{
    const size_t row_bytes = (size_t)(op->x->dim[1] * dtype_size_bytes(op->x->dtype));
    const int32_t *index = op->index->data;
    int64_t num_rows = op->index->dim[0];

    if (op->offsets != NULL) {
        num_rows = ((const int32_t *)op->offsets->data)[op->offsets->dim[0] - 1];
    }
#pragma omp parallel for schedule(static) if (num_rows * op->x->dim[1] > OPS_PARALLEL_MIN)
    for (int64_t r = 0; r < num_rows; r++) {
        memcpy((char *)op->y->data + (size_t)r * row_bytes,
               (const char *)op->x->data + (size_t)index[r] * row_bytes, row_bytes);
    }
}

static void add_floats(float *sum, const float *x, int64_t n)
{
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
        sum[i] += x[i];
    }
}

/* A block of a token's sum. */
static void sum_rows_block(const struct row_sum *op, int64_t token, int64_t first, int64_t n)
{
    const int64_t width = op->y->dim[1], topk = op->row_of->dim[1];
    const int32_t *rows = (const int32_t *)op->row_of->data + token * topk;
    float sum[OPS_BLOCK], buffer[OPS_BLOCK];

    memset(sum, 0, (size_t)n * sizeof *sum);
    for (int64_t k = 0; k < topk; k++) {
        if (rows[k] >= 0) {
            add_floats(sum, floats_get(op->rows, rows[k] * width + first, n, buffer), n);
        }
    }
    if (op->residual != NULL) {
        add_floats(sum, floats_get(op->residual, token * width + first, n, buffer), n);
    }
    floats_put(op->y, token * width + first, n, sum);
}

void row_sum_cpu(struct stream *stream, const struct row_sum *op)
{
    const int64_t num_tokens = op->y->dim[0], width = op->y->dim[1];

#pragma omp parallel for schedule(static) if (num_tokens * width > OPS_PARALLEL_MIN)
    for (int64_t t = 0; t < num_tokens; t++) {
        for (int64_t i = 0; i < width; i += OPS_BLOCK) {
            sum_rows_block(op, t, i, width - i < OPS_BLOCK ? width - i : OPS_BLOCK);
        }
    }
}
