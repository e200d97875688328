/* router_cuda.cuh - a token's scores over the experts and the probabilities of the chosen ones, for
 * routing, balancing and their gradients: a warp takes a token. */
#ifndef CADRE_OPS_ROUTER_CUDA_CUH
#define CADRE_OPS_ROUTER_CUDA_CUH

#include "ops/ops_cuda_internal.cuh"

/* Shared memory of a warp, and warps of a block, are chosen so that a block stays under 48 KB. */
enum { ROUTER_WARPS_MAX = 8, ROUTER_SHARED_BYTES_MAX = 48 * 1024 };

#define ROUTER_SUM_EPSILON                                                                         \
    1e-20f /* Megatron's guard against a sum of sigmoid scores that is zero */

static inline int warps_for(int64_t warp_bytes)
{
    const int64_t fit = ROUTER_SHARED_BYTES_MAX / warp_bytes;

    CHECK(fit >= 1, "%lld bytes of shared memory for a token", (long long)warp_bytes);
    return fit < ROUTER_WARPS_MAX ? (int)fit : ROUTER_WARPS_MAX;
}

__device__ inline int lane_id(void)
{
    return threadIdx.x % 32;
}

/* The token of the calling warp. */
__device__ inline int64_t warp_token(void)
{
    return (int64_t)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
}

__device__ inline float router_sigmoid(float x)
{
    return 1.0f / (1.0f + expf(-x));
}

/* scores = softmax(logits); returns logsumexp(logits). For the warp, which may then read scores. */
__device__ inline float warp_softmax(float *scores, const float *logits, int num_experts)
{
    float max = -INFINITY, sum = 0.0f;

    for (int e = lane_id(); e < num_experts; e += 32) {
        max = fmaxf(max, logits[e]);
    }
    max = warp_max(max);
    for (int e = lane_id(); e < num_experts; e += 32) {
        scores[e] = expf(logits[e] - max);
        sum += scores[e];
    }
    sum = warp_sum(sum);
    for (int e = lane_id(); e < num_experts; e += 32) {
        scores[e] /= sum;
    }
    __syncwarp();
    return max + logf(sum);
}

__device__ inline void warp_scores(enum router_score kind, float *scores, const float *logits,
                                   int num_experts)
{
    if (kind == ROUTER_SOFTMAX) {
        warp_softmax(scores, logits, num_experts);
        return;
    }
    for (int e = lane_id(); e < num_experts; e += 32) {
        scores[e] = router_sigmoid(logits[e]);
    }
    __syncwarp();
}

/* Whether the probabilities are a softmax over the chosen logits only. */
__device__ inline bool is_softmax_of_chosen(const struct router_rule &rule)
{
    return rule.score == ROUTER_SOFTMAX && (!rule.pre_softmax || rule.renormalize);
}

/* The probability of slot k before scaling is weight(k) / divisor: what both passes need. */
struct chosen {
    float max, divisor;
    bool exponential;
};

__device__ inline float chosen_weight(const struct chosen &c, const float *logits,
                                      const float *scores, int expert)
{
    return c.exponential ? expf(logits[expert] - c.max) : scores[expert];
}

__device__ inline struct chosen chosen_of(const struct router_rule &rule, const float *logits,
                                          const float *scores, const int32_t *indices)
{
    struct chosen c = {-INFINITY, 1.0f, is_softmax_of_chosen(rule)};
    float sum = 0.0f;

    if (!c.exponential && (rule.score == ROUTER_SOFTMAX || rule.topk == 1)) {
        return c;
    }
    for (int k = lane_id(); k < rule.topk; k += 32) {
        c.max = fmaxf(c.max, logits[indices[k]]);
    }
    c.max = warp_max(c.max);
    for (int k = lane_id(); k < rule.topk; k += 32) {
        sum += chosen_weight(c, logits, scores, indices[k]);
    }
    c.divisor = warp_sum(sum) + (c.exponential ? 0.0f : ROUTER_SUM_EPSILON);
    return c;
}

/* scores of the calling warp's token for the balancing losses: softmax, or sigmoid over its sum.
 * Returns the divisor of the sigmoid scores (1 for softmax). */
__device__ inline float warp_balance_scores(enum router_score kind, float *scores,
                                            const float *logits, int num_experts)
{
    float divisor = 1.0f;

    warp_scores(kind, scores, logits, num_experts);
    if (kind == ROUTER_SIGMOID) {
        float sum = 0.0f;

        for (int e = lane_id(); e < num_experts; e += 32) {
            sum += scores[e];
        }
        divisor = warp_sum(sum) + ROUTER_SUM_EPSILON;
        for (int e = lane_id(); e < num_experts; e += 32) {
            scores[e] /= divisor;
        }
        __syncwarp();
    }
    return divisor;
}

#endif
