/* The experts' feed-forward, one expert after the other: its products fill the machine by
 * themselves, and its intermediate rows stay in the last-level cache between them. An expert
 * without rows does nothing, but for zeros where gradients are to be overwritten.
 *
 * The number of an expert's rows changes with every microbatch, and a matrix library generates code
 * for each number it meets, which takes as long as several percent of the product. So products run
 * over a few more rows, up to a round number. In scratch the extra rows are zero; in the outputs
 * they belong to later experts, which overwrite them when their turn comes (where no row follows,
 * none is added). */
#include "ops/activation_cpu.h"
#include "ops/ops_cpu.h"
#include "ops/ops_cpu_internal.h"

/* Matrix e of [E,M,N]. */
static struct tensor expert_matrix(const struct tensor *x, int64_t e)
{
    const struct tensor one = tensor_rows(x, e, 1);

    return tensor_view(&one, x->dim[1], x->dim[2]);
}

/* Vector e of [E,N]. */
static struct tensor expert_vector(const struct tensor *x, int64_t e)
{
    const struct tensor one = tensor_rows(x, e, 1);

    return tensor_view(&one, x->dim[1]);
}

/* The rows of one expert. */
struct span {
    int64_t expert, first, count;
    int64_t padded;     /* count rounded up: rows of products within scratch */
    int64_t num_output; /* rows of products into outputs: padded, but not beyond the rows in use */
};

static struct span expert_span(const struct tensor *offsets, int64_t expert)
{
    const int32_t *offset = offsets->data;
    const int64_t num_used = offset[offsets->dim[0] - 1];
    struct span span = {.expert = expert, .first = offset[expert]};
    int64_t multiple = 16;

    span.count = offset[expert + 1] - span.first;
    while (multiple * 64 <= span.count) {
        multiple *= 2; /* 32 numbers an octave; at most 1/32 more work from 512 rows on */
    }
    span.padded = (span.count + multiple - 1) / multiple * multiple;
    span.num_output = span.padded < num_used - span.first ? span.padded : num_used - span.first;
    return span;
}

/* Rows from first on become zero. */
static void zero_rows(struct tensor *x, int64_t first)
{
    struct tensor rest = tensor_rows(x, first, x->dim[0] - first);

    memset(rest.data, 0, tensor_size_bytes(&rest));
}

/* The span's rows of x, or the tokens that row_token names for them, then zeros to span->padded. */
static struct tensor expert_rows(struct stream *stream, const struct tensor *x,
                                 const struct tensor *row_token, const struct span *span)
{
    struct tensor rows;

    if (row_token == NULL && span->padded == span->count) {
        return tensor_rows(x, span->first, span->count);
    }
    rows = tensor_new(stream->scratch, x->dtype, span->padded, x->dim[1]);
    zero_rows(&rows, span->count);
    if (row_token == NULL) {
        const struct tensor from = tensor_rows(x, span->first, span->count);

        memcpy(rows.data, from.data, tensor_size_bytes(&from));
    } else {
        const struct tensor index = tensor_rows(row_token, span->first, span->count);
        struct tensor used = tensor_rows(&rows, 0, span->count);

        row_gather_cpu(stream, &(struct row_gather){.y = &used, .x = x, .index = &index});
    }
    return rows;
}

/* The probability of a row of the whole call, 1 where there are none. */
static float row_prob_of(const struct tensor *row_prob, int64_t row)
{
    return row_prob != NULL ? ((const float *)row_prob->data)[row] : 1.0f;
}

/* y[row] = x[row] + scale * bias */
static void add_scaled_bias(struct tensor *y, const struct tensor *x, const struct tensor *bias,
                            int64_t row, float scale)
{
    const int64_t width = y->dim[1];
    float x_block[OPS_BLOCK], bias_block[OPS_BLOCK], y_block[OPS_BLOCK];

    for (int64_t i = 0; i < width; i += OPS_BLOCK) {
        const int64_t n = width - i < OPS_BLOCK ? width - i : OPS_BLOCK;
        const float *from = floats_get(x, row * width + i, n, x_block);
        const float *add = floats_get(bias, i, n, bias_block);
        float *to = floats_place(y, row * width + i, y_block);

#pragma omp simd
        for (int64_t j = 0; j < n; j++) {
            to[j] = from[j] + scale * add[j];
        }
        floats_put(y, row * width + i, n, to);
    }
}

/* y = a W2^T + prob b2. With a bias the product is kept in f32 until the bias is in. */
static void expert_output(struct stream *stream, const struct experts_forward *op,
                          const struct span *span, const struct tensor *a)
{
    const struct tensor fc2 = expert_matrix(op->fc2, span->expert);
    struct tensor y = tensor_rows(op->y, span->first, a->dim[0]);
    struct tensor product, bias;

    if (op->fc2_bias == NULL) {
        matmul_cpu(stream, &(struct matmul){.c = &y, .a = a, .b = &fc2, .transpose_b = true});
        return;
    }
    product = tensor_new(stream->scratch, DTYPE_F32, y.dim[0], y.dim[1]);
    bias = expert_vector(op->fc2_bias, span->expert);
    matmul_cpu(stream, &(struct matmul){.c = &product, .a = a, .b = &fc2, .transpose_b = true});
#pragma omp parallel for schedule(static) if (span->count * y.dim[1] > OPS_PARALLEL_MIN)
    for (int64_t r = 0; r < span->count; r++) {
        add_scaled_bias(&y, &product, &bias, r, row_prob_of(op->row_prob, span->first + r));
    }
}

static void expert_forward(struct stream *stream, const struct experts_forward *op,
                           const struct span *span)
{
    const int64_t num_rows = span->num_output;
    const struct tensor padded = expert_rows(stream, op->x, op->row_token, span);
    const struct tensor x = tensor_rows(&padded, 0, num_rows);
    const struct tensor fc1 = expert_matrix(op->fc1, span->expert);
    struct tensor h = tensor_rows(op->pre_activation, span->first, num_rows);
    struct tensor a = tensor_new(stream->scratch, h.dtype, num_rows, op->fc2->dim[2]);
    struct tensor bias;

    if (op->fc1_bias != NULL) {
        bias = expert_vector(op->fc1_bias, span->expert);
    }
    matmul_cpu(stream, &(struct matmul){.c = &h,
                                        .a = &x,
                                        .b = &fc1,
                                        .transpose_b = true,
                                        .bias = op->fc1_bias != NULL ? &bias : NULL});
#pragma omp parallel for schedule(static) if (span->count * a.dim[1] > OPS_PARALLEL_MIN)
    for (int64_t r = 0; r < span->count; r++) {
        activation_row_forward(op->activation, &a, &h, r,
                               row_prob_of(op->row_prob, span->first + r));
    }
    zero_rows(&a, span->count);
    expert_output(stream, op, span, &a);
}

void experts_forward_cpu(struct stream *stream, const struct experts_forward *op)
{
    for (int64_t e = 0; e < op->fc1->dim[0]; e++) {
        const struct arena_mark mark = arena_mark(stream->scratch);
        const struct span span = expert_span(op->offsets, e);

        if (span.count > 0) {
            expert_forward(stream, op, &span);
        }
        arena_release(stream->scratch, mark);
    }
}

/* Columns of a gradient that one thread sums. */
enum { COLUMN_BLOCK = 128 };

/* d_b2 += sum_r prob_r d_y_r: each column by one thread, in row order. */
static void fc2_bias_backward(const struct experts_backward *op, const struct span *span,
                              const struct tensor *d_y)
{
    const int64_t width = d_y->dim[1];
    const int64_t num_blocks = (width + COLUMN_BLOCK - 1) / COLUMN_BLOCK;
    const struct tensor *row_prob = op->forward.row_prob;
    float *d_bias = (float *)op->d_fc2_bias->data + span->expert * width;

#pragma omp parallel for schedule(static) if (span->count * width > OPS_PARALLEL_MIN)
    for (int64_t block = 0; block < num_blocks; block++) {
        const int64_t i = block * COLUMN_BLOCK, rest = width - i;
        const int64_t n = rest < COLUMN_BLOCK ? rest : COLUMN_BLOCK;
        float buffer[COLUMN_BLOCK];

        for (int64_t r = 0; r < span->count; r++) {
            const float *d_row = floats_get(d_y, r * width + i, n, buffer);
            const float prob = row_prob_of(row_prob, span->first + r);

#pragma omp simd
            for (int64_t j = 0; j < n; j++) {
                d_bias[i + j] += prob * d_row[j];
            }
        }
    }
}

/* d_prob_r += d_y_r . b2 */
static float fc2_bias_dot(const struct experts_backward *op, const struct tensor *d_y,
                          int64_t expert, int64_t row)
{
    const int64_t width = d_y->dim[1];
    float d_y_block[OPS_BLOCK], bias_block[OPS_BLOCK], dot = 0.0f;

    for (int64_t i = 0; i < width; i += OPS_BLOCK) {
        const int64_t n = width - i < OPS_BLOCK ? width - i : OPS_BLOCK;

        dot += floats_dot(floats_get(d_y, row * width + i, n, d_y_block),
                          floats_get(op->forward.fc2_bias, expert * width + i, n, bias_block), n);
    }
    return dot;
}

/* Through the activation: d_h, the recomputed a = prob act(h), and d_row_prob. */
static void expert_activation_backward(const struct experts_backward *op, const struct span *span,
                                       struct tensor *d_h, struct tensor *a,
                                       const struct tensor *d_a, const struct tensor *d_y)
{
    const struct tensor h = tensor_rows(op->forward.pre_activation, span->first, span->count);

#pragma omp parallel for schedule(static) if (span->count * d_a->dim[1] > OPS_PARALLEL_MIN)
    for (int64_t r = 0; r < span->count; r++) {
        const float prob = row_prob_of(op->forward.row_prob, span->first + r);
        float d_prob = activation_row_backward(op->forward.activation, d_h, a, &h, d_a, r, prob);

        if (op->d_row_prob != NULL) {
            if (op->forward.fc2_bias != NULL) {
                d_prob += fc2_bias_dot(op, d_y, span->expert, r);
            }
            ((float *)op->d_row_prob->data)[span->first + r] = d_prob;
        }
    }
    zero_rows(d_h, span->count);
    zero_rows(a, span->count);
}

static void expert_bias_backward(struct stream *stream, const struct experts_backward *op,
                                 const struct span *span, const struct tensor *d_h,
                                 const struct tensor *d_y)
{
    if (op->d_fc1_bias != NULL) {
        const struct tensor used = tensor_rows(d_h, 0, span->count);
        struct tensor d_bias = expert_vector(op->d_fc1_bias, span->expert);

        bias_backward_cpu(stream, &(struct bias_backward){.d_bias = &d_bias, .d_y = &used});
    }
    if (op->d_fc2_bias != NULL) {
        fc2_bias_backward(op, span, d_y);
    }
}

/* d_a = d_y W2, d_W2 += d_y^T a, d_h = through the activation, d_W1 += d_h^T x, d_x = d_h W1. d_a
 * stays in f32, so that d_row_prob, a sum over F of it that often cancels, is not built of rounded
 * terms. */
static void expert_backward(struct stream *stream, const struct experts_backward *op,
                            const struct span *span)
{
    const struct experts_forward *forward = &op->forward;
    const struct tensor x = expert_rows(stream, forward->x, forward->row_token, span);
    const struct tensor d_y = expert_rows(stream, op->d_y, op->d_y_row_token, span);
    const struct tensor fc1 = expert_matrix(forward->fc1, span->expert);
    const struct tensor fc2 = expert_matrix(forward->fc2, span->expert);
    struct tensor d_fc1 = expert_matrix(op->d_fc1, span->expert);
    struct tensor d_fc2 = expert_matrix(op->d_fc2, span->expert);
    struct tensor a = tensor_new(stream->scratch, x.dtype, span->padded, fc2.dim[1]);
    struct tensor d_a = tensor_new(stream->scratch, DTYPE_F32, span->padded, fc2.dim[1]);
    struct tensor d_h = tensor_new(stream->scratch, x.dtype, span->padded, fc1.dim[0]);
    struct tensor d_x = tensor_rows(op->d_x, span->first, span->num_output);
    const struct tensor d_h_output = tensor_rows(&d_h, 0, span->num_output);

    matmul_cpu(stream, &(struct matmul){.c = &d_a, .a = &d_y, .b = &fc2});
    expert_activation_backward(op, span, &d_h, &a, &d_a, &d_y);
    matmul_cpu(stream, &(struct matmul){.c = &d_fc2,
                                        .a = &d_y,
                                        .b = &a,
                                        .transpose_a = true,
                                        .accumulate = !op->overwrite_grads});
    matmul_cpu(stream, &(struct matmul){.c = &d_fc1,
                                        .a = &d_h,
                                        .b = &x,
                                        .transpose_a = true,
                                        .accumulate = !op->overwrite_grads});
    matmul_cpu(stream, &(struct matmul){.c = &d_x, .a = &d_h_output, .b = &fc1});
    expert_bias_backward(stream, op, span, &d_h, &d_y);
}

/* The gradients of an expert without rows. */
static void zero_expert(const struct experts_backward *op, int64_t expert)
{
    struct tensor d_fc1 = tensor_rows(op->d_fc1, expert, 1);
    struct tensor d_fc2 = tensor_rows(op->d_fc2, expert, 1);

    zero_rows(&d_fc1, 0);
    zero_rows(&d_fc2, 0);
}

void experts_backward_cpu(struct stream *stream, const struct experts_backward *op)
{
    for (int64_t e = 0; e < op->forward.fc1->dim[0]; e++) {
        const struct arena_mark mark = arena_mark(stream->scratch);
        const struct span span = expert_span(op->forward.offsets, e);

        if (span.count > 0) {
            expert_backward(stream, op, &span);
        } else if (op->overwrite_grads) {
            zero_expert(op, e);
        }
        arena_release(stream->scratch, mark);
    }
}
