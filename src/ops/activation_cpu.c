/* Activations, forward and backward, a block of a row at a time: the block's floats stay in the L1
 * cache whatever the tensors' dtype. Every kind is written with one exponential and no branch. */
#include "ops/activation_cpu.h"

#include "ops/ops_cpu.h"
#include "ops/ops_cpu_internal.h"
#include "ops/vector_math.h"

/* tanh-GELU: 0.5 x (1 + tanh(u)) = x sigmoid(2u), 2u = 2 sqrt(2/pi) (x + 0.044715 x^3). */
static const float gelu_linear = 1.595769122f, gelu_cubic = 1.595769122f * 0.044715f;

static void forward_block(enum activation_kind kind, float *y, const float *x, const float *up,
                          float scale, int64_t n)
{
    switch (kind) {
    case ACTIVATION_SWIGLU:
#pragma omp simd
        for (int64_t i = 0; i < n; i++) {
            y[i] = scale * x[i] * fast_sigmoid(x[i]) * up[i];
        }
        break;
    case ACTIVATION_GELU:
#pragma omp simd
        for (int64_t i = 0; i < n; i++) {
            const float v = x[i];

            y[i] = scale * v * fast_sigmoid(v * (gelu_linear + gelu_cubic * v * v));
        }
        break;
    case ACTIVATION_SQUARED_RELU:
#pragma omp simd
        for (int64_t i = 0; i < n; i++) {
            const float positive = x[i] > 0.0f ? x[i] : 0.0f;

            y[i] = scale * positive * positive;
        }
        break;
    }
}

/* d silu(g) = s (1 + g (1 - s)), s = sigmoid(g). */
static void swiglu_backward_block(float *d_gate, float *d_up, float *act, const float *gate,
                                  const float *up, const float *d_y, float scale, int64_t n)
{
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
        const float g = gate[i], u = up[i], d = scale * d_y[i];
        const float s = fast_sigmoid(g), silu = g * s;

        act[i] = silu * u;
        d_gate[i] = d * u * s * (1.0f + g - silu);
        d_up[i] = d * silu;
    }
}

/* With v = 2u: d (x sigmoid(v)) = s + x s (1 - s) v', v' = gelu_linear + 3 gelu_cubic x^2. */
static void gelu_backward_block(float *d_x, float *act, const float *x, const float *d_y,
                                float scale, int64_t n)
{
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
        const float v = x[i], square = v * v;
        const float s = fast_sigmoid(v * (gelu_linear + gelu_cubic * square));
        const float slope = gelu_linear + 3.0f * gelu_cubic * square;

        act[i] = v * s;
        d_x[i] = scale * d_y[i] * (s + v * s * (1.0f - s) * slope);
    }
}

static void squared_relu_backward_block(float *d_x, float *act, const float *x, const float *d_y,
                                        float scale, int64_t n)
{
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
        const float positive = x[i] > 0.0f ? x[i] : 0.0f;

        act[i] = positive * positive;
        d_x[i] = scale * d_y[i] * 2.0f * positive;
    }
}

void activation_row_forward(enum activation_kind kind, struct tensor *y, const struct tensor *x,
                            int64_t row, float scale)
{
    const int64_t width = y->dim[1], x_row = row * x->dim[1], y_row = row * width;
    float x_block[OPS_BLOCK], up_block[OPS_BLOCK], y_block[OPS_BLOCK];

    for (int64_t i = 0; i < width; i += OPS_BLOCK) {
        const int64_t n = width - i < OPS_BLOCK ? width - i : OPS_BLOCK;
        const float *in = floats_get(x, x_row + i, n, x_block), *up = NULL;
        float *out = floats_place(y, y_row + i, y_block);

        if (kind == ACTIVATION_SWIGLU) {
            up = floats_get(x, x_row + width + i, n, up_block);
        }
        forward_block(kind, out, in, up, scale, n);
        floats_put(y, y_row + i, n, out);
    }
}

/* act becomes a = scale * act. */
static void store_scaled(struct tensor *a, int64_t first, int64_t n, float *act, float scale)
{
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
        act[i] *= scale;
    }
    floats_put(a, first, n, act);
}

float activation_row_backward(enum activation_kind kind, struct tensor *d_x, struct tensor *a,
                              const struct tensor *x, const struct tensor *d_y, int64_t row,
                              float scale)
{
    const int64_t width = d_y->dim[1], x_row = row * x->dim[1], y_row = row * width;
    float x_block[OPS_BLOCK], up_block[OPS_BLOCK], d_y_block[OPS_BLOCK];
    float d_x_block[OPS_BLOCK], d_up_block[OPS_BLOCK], act[OPS_BLOCK];
    float d_scale = 0.0f;

    for (int64_t i = 0; i < width; i += OPS_BLOCK) {
        const int64_t n = width - i < OPS_BLOCK ? width - i : OPS_BLOCK;
        const float *in = floats_get(x, x_row + i, n, x_block);
        const float *d_out = floats_get(d_y, y_row + i, n, d_y_block);
        float *d_in = floats_place(d_x, x_row + i, d_x_block);

        if (kind == ACTIVATION_SWIGLU) {
            const float *up = floats_get(x, x_row + width + i, n, up_block);
            float *d_up = floats_place(d_x, x_row + width + i, d_up_block);

            swiglu_backward_block(d_in, d_up, act, in, up, d_out, scale, n);
            floats_put(d_x, x_row + width + i, n, d_up);
        } else if (kind == ACTIVATION_GELU) {
            gelu_backward_block(d_in, act, in, d_out, scale, n);
        } else {
            squared_relu_backward_block(d_in, act, in, d_out, scale, n);
        }
        floats_put(d_x, x_row + i, n, d_in);
        d_scale += floats_dot(d_out, act, n);
        if (a != NULL) {
            store_scaled(a, y_row + i, n, act, scale);
        }
    }
    return d_scale;
}

void activation_forward_cpu(struct stream *stream, const struct activation *op)
{
    const int64_t num_rows = op->y->dim[0];

#pragma omp parallel for schedule(static) if (num_rows * op->y->dim[1] > OPS_PARALLEL_MIN)
    for (int64_t row = 0; row < num_rows; row++) {
        activation_row_forward(op->kind, op->y, op->x, row, 1.0f);
    }
}

void activation_backward_cpu(struct stream *stream, const struct activation *op)
{
    const int64_t num_rows = op->d_y->dim[0];

#pragma omp parallel for schedule(static) if (num_rows * op->d_y->dim[1] > OPS_PARALLEL_MIN)
    for (int64_t row = 0; row < num_rows; row++) {
        activation_row_backward(op->kind, op->d_x, NULL, op->x, op->d_y, row, 1.0f);
    }
}
