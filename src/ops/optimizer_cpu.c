/* Adam and SGD on flat ranges. Bound by memory: each array is read once and written once. */
#include <math.h>

#include "ops/ops_cpu.h"
#include "ops/ops_cpu_internal.h"

/* The rounded master into param, unless param is the master. */
static void store_param(struct tensor *param, int64_t first, int64_t n, const float *master)
{
    if (param->data != (const void *)(master - first)) {
        floats_put(param, first, n, master);
    }
}

struct adam_factors {
    float grad_scale, correction1, correction2; /* 1 / (1 - beta1^t), 1 / sqrt(1 - beta2^t) */
};

/* m = b1 m + (1-b1) g, v = b2 v + (1-b2) g^2, p -= lr (m' / (sqrt(v') + eps) + wd p). */
static void adam_block(const struct adam_step *op, const struct adam_factors *factors,
                       int64_t first, int64_t n)
{
    const float *grad = (const float *)op->grad->data + first;
    float *p = (float *)op->master->data + first;
    float *m = (float *)op->exp_avg->data + first, *v = (float *)op->exp_avg_sq->data + first;
    const float beta1 = op->beta1, beta2 = op->beta2, rest1 = 1.0f - beta1, rest2 = 1.0f - beta2;
    const float lr = op->lr, eps = op->eps, decay = op->weight_decay;
    const struct adam_factors f = *factors;

#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
        const float g = grad[i] * f.grad_scale;
        const float mean = beta1 * m[i] + rest1 * g, square = beta2 * v[i] + rest2 * g * g;

        m[i] = mean;
        v[i] = square;
        p[i] -= lr * (mean * f.correction1 / (sqrtf(square) * f.correction2 + eps) + decay * p[i]);
    }
    store_param(op->param, first, n, p);
}

void adam_step_cpu(struct stream *stream, const struct adam_step *op)
{
    const int64_t num_elements = tensor_num_elements(op->master);
    const double t = (double)op->step;
    const struct adam_factors factors = {
        *(const float *)op->grad_scale->data,
        (float)(1.0 / (1.0 - pow((double)op->beta1, t))),
        (float)(1.0 / sqrt(1.0 - pow((double)op->beta2, t))),
    };

#pragma omp parallel for schedule(static) if (num_elements > OPS_PARALLEL_MIN)
    for (int64_t i = 0; i < num_elements; i += OPS_BLOCK) {
        adam_block(op, &factors, i, num_elements - i < OPS_BLOCK ? num_elements - i : OPS_BLOCK);
    }
}

static void sgd_block(const struct sgd_step *op, float grad_scale, int64_t first, int64_t n)
{
    const float *grad = (const float *)op->grad->data + first;
    float *p = (float *)op->master->data + first;
    const float lr = op->lr, decay = op->weight_decay;

    if (op->momentum_buffer == NULL) {
#pragma omp simd
        for (int64_t i = 0; i < n; i++) {
            p[i] -= lr * (grad[i] * grad_scale + decay * p[i]);
        }
    } else {
        float *b = (float *)op->momentum_buffer->data + first;
        const float momentum = op->momentum;
        const bool first_step = op->first_step; /* the buffer holds nothing yet */

#pragma omp simd
        for (int64_t i = 0; i < n; i++) {
            const float step = grad[i] * grad_scale + decay * p[i];

            b[i] = first_step ? step : momentum * b[i] + step;
            p[i] -= lr * b[i];
        }
    }
    store_param(op->param, first, n, p);
}

void sgd_step_cpu(struct stream *stream, const struct sgd_step *op)
{
    const int64_t num_elements = tensor_num_elements(op->master);
    const float grad_scale = *(const float *)op->grad_scale->data;

#pragma omp parallel for schedule(static) if (num_elements > OPS_PARALLEL_MIN)
    for (int64_t i = 0; i < num_elements; i += OPS_BLOCK) {
        sgd_block(op, grad_scale, i, num_elements - i < OPS_BLOCK ? num_elements - i : OPS_BLOCK);
    }
}
