/* router_score_cpu.h - the scores of one token over the experts, shared by routing and balancing.
 */
#ifndef CADRE_OPS_ROUTER_SCORE_CPU_H
#define CADRE_OPS_ROUTER_SCORE_CPU_H

#include <math.h>

#include "ops/ops_cpu_internal.h"
#include "ops/vector_math.h"

enum {
    /* Tokens whose partial sums are formed together; chunks are then summed in order, so that sums
     * over tokens do not depend on the number of threads. */
    ROUTER_CHUNK = 256,
};

/* scores = softmax(logits); returns logsumexp(logits). */
static inline float router_softmax(float *scores, const float *logits, int64_t num_experts)
{
    const float max = floats_max(logits, num_experts);
    float sum, inverse;

#pragma omp simd
    for (int64_t e = 0; e < num_experts; e++) {
        scores[e] = fast_exp(logits[e] - max);
    }
    sum = floats_sum(scores, num_experts);
    inverse = 1.0f / sum;
#pragma omp simd
    for (int64_t e = 0; e < num_experts; e++) {
        scores[e] *= inverse;
    }
    return max + logf(sum);
}

static inline void router_sigmoid(float *scores, const float *logits, int64_t num_experts)
{
#pragma omp simd
    for (int64_t e = 0; e < num_experts; e++) {
        scores[e] = fast_sigmoid(logits[e]);
    }
}

/* d_logits += J^T d_scores, J = diag(s) - s s^T of the softmax. */
static inline void router_softmax_backward(float *d_logits, const float *d_scores,
                                           const float *scores, int64_t num_experts)
{
    const float mean = floats_dot(scores, d_scores, num_experts);

#pragma omp simd
    for (int64_t e = 0; e < num_experts; e++) {
        d_logits[e] += scores[e] * (d_scores[e] - mean);
    }
}

#endif
