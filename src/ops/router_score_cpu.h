/* router_score_cpu.h - the scores of one token over the experts, and the probabilities of the
 * chosen ones, shared by routing, balancing and their gradients. */
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

/* Megatron's guard against a sum of sigmoid scores that is zero. */
#define ROUTER_SUM_EPSILON 1e-20f

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

static inline void router_scores(enum router_score kind, float *scores, const float *logits,
                                 int64_t num_experts)
{
    if (kind == ROUTER_SIGMOID) {
        router_sigmoid(scores, logits, num_experts);
    } else {
        router_softmax(scores, logits, num_experts);
    }
}

/* scores[E] of a token for the balancing losses: softmax, or sigmoid over its sum. Returns the
 * divisor of the sigmoid scores (1 for softmax). */
static inline float router_balance_scores(enum router_score kind, float *scores,
                                          const float *logits, int64_t num_experts)
{
    float divisor;

    router_scores(kind, scores, logits, num_experts);
    if (kind == ROUTER_SOFTMAX) {
        return 1.0f;
    }
    divisor = floats_sum(scores, num_experts) + ROUTER_SUM_EPSILON;
    for (int64_t e = 0; e < num_experts; e++) {
        scores[e] /= divisor;
    }
    return divisor;
}

/* Whether the probabilities are a softmax over the chosen logits only. */
static inline bool router_is_softmax_of_chosen(const struct router_rule *rule)
{
    return rule->score == ROUTER_SOFTMAX && (!rule->pre_softmax || rule->renormalize);
}

/* probs = softmax of the chosen logits. Their maximum need not be the first: the selection may be
 * another than the logits. */
static inline void router_softmax_of_chosen(float *probs, const float *logits,
                                            const int32_t *indices, int topk)
{
    float max = logits[indices[0]], sum = 0.0f;

    for (int k = 1; k < topk; k++) {
        max = fmaxf(max, logits[indices[k]]);
    }
    for (int k = 0; k < topk; k++) {
        probs[k] = fast_exp(logits[indices[k]] - max);
        sum += probs[k];
    }
    for (int k = 0; k < topk; k++) {
        probs[k] /= sum;
    }
}

/* The sum by which sigmoid scores are divided; 1 for top-1, which is not normalised. */
static inline float router_sigmoid_divisor(const float *scores, const int32_t *indices, int topk)
{
    float sum = 0.0f;

    if (topk == 1) {
        return 1.0f;
    }
    for (int k = 0; k < topk; k++) {
        sum += scores[indices[k]];
    }
    return sum + ROUTER_SUM_EPSILON;
}

#endif
