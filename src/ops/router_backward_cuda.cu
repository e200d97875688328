/* The gradient of the router: of its logits in one pass, a warp a token, and of its linear layer.
 */
#include "ops/router_cuda.cuh"

enum { BLOCK = 256 };

struct router_gradient {
    struct router_rule rule;
    float *d_logits;
    const float *logits, *d_probs;
    const int32_t *indices;
    struct {
        const float *counts; /* [columns, E] */
        int64_t num_columns;
        float scale;
    } balance[ROUTER_BALANCE_TERMS_MAX];
    int num_balance_terms;
    float z_scale; /* over the number of tokens */
    int64_t num_tokens;
    int num_experts;
};

/* Through the probabilities. p = softmax of the chosen: d_l[k] += p_k (d_k - sum_j p_j d_j).
 * Sigmoid: p_k = s_k / D: d_s[k] = (d_k - sum_j p_j d_j) / D (no sum for k = 1), d_l = d_s s (1-s).
 * Softmax over all: d_l += s (d_s - sum_e s d_s), d_s = d_probs at the chosen, else 0. */
__device__ inline void warp_add_probs(const struct router_gradient &a, float *to, float *scores,
                                      const float *logits, int64_t token)
{
    const float *d = a.d_probs + token * a.rule.topk, scale = a.rule.scaling_factor;
    const int32_t *mine = a.indices + token * a.rule.topk;
    float mean = 0.0f;
    struct chosen c;

    if (!is_softmax_of_chosen(a.rule)) {
        warp_scores(a.rule.score, scores, logits, a.num_experts);
    }
    c = chosen_of(a.rule, logits, scores, mine);
    for (int k = lane_id(); k < a.rule.topk; k += 32) {
        mean += chosen_weight(c, logits, scores, mine[k]) / c.divisor * d[k];
    }
    mean = a.rule.score == ROUTER_SIGMOID && a.rule.topk == 1 ? 0.0f : warp_sum(mean);
    for (int k = lane_id(); k < a.rule.topk; k += 32) {
        const float s = chosen_weight(c, logits, scores, mine[k]);

        if (c.exponential) {
            to[mine[k]] += scale * s / c.divisor * (d[k] - mean);
        } else if (a.rule.score == ROUTER_SIGMOID) {
            to[mine[k]] += scale * (d[k] - mean) / c.divisor * s * (1.0f - s);
        } else {
            to[mine[k]] += scale * s * d[k];
        }
    }
    __syncwarp();
    if (a.rule.score == ROUTER_SOFTMAX && !c.exponential) {
        for (int e = lane_id(); e < a.num_experts; e += 32) {
            to[e] -= scale * scores[e] * mean;
        }
    }
}

/* Through the balancing losses: d_u = the sum of scale * counts. Softmax: d_l += u (d_u - sum_j u_j
 * d_u_j). Sigmoid, u = s / D: the same times (1 - s), s = u D. */
__device__ inline void warp_add_balance(const struct router_gradient &a, float *to, float *scores,
                                        const float *logits, int64_t token)
{
    const float divisor = warp_balance_scores(a.rule.score, scores, logits, a.num_experts);

    for (int i = 0; i < a.num_balance_terms; i++) {
        const float *counts =
            a.balance[i].counts + token % a.balance[i].num_columns * a.num_experts;
        float mean = 0.0f;

        for (int e = lane_id(); e < a.num_experts; e += 32) {
            mean += scores[e] * a.balance[i].scale * counts[e];
        }
        mean = warp_sum(mean);
        for (int e = lane_id(); e < a.num_experts; e += 32) {
            const float slope = a.rule.score == ROUTER_SIGMOID ? 1.0f - scores[e] * divisor : 1.0f;

            to[e] += (a.balance[i].scale * counts[e] - mean) * scores[e] * slope;
        }
    }
}

/* d logsumexp(l)^2 / d_l = 2 logsumexp(l) softmax(l). */
__device__ inline void warp_add_z(const struct router_gradient &a, float *to, float *scores,
                                  const float *logits)
{
    const float z = warp_softmax(scores, logits, a.num_experts);

    for (int e = lane_id(); e < a.num_experts; e += 32) {
        to[e] += a.z_scale * 2.0f * z * scores[e];
    }
}

/* Shared memory of a warp: the gradient and scores, [E] each. */
__global__ void router_backward_kernel(struct router_gradient a)
{
    extern __shared__ float work[];
    float *to = work + threadIdx.x / 32 * 2 * a.num_experts, *scores = to + a.num_experts;
    const int64_t token = warp_token();
    const float *logits = a.logits + token * a.num_experts;

    if (token >= a.num_tokens) {
        return;
    }
    for (int e = lane_id(); e < a.num_experts; e += 32) {
        to[e] = 0.0f;
    }
    __syncwarp();
    if (a.d_probs != NULL) {
        warp_add_probs(a, to, scores, logits, token);
    }
    if (a.num_balance_terms > 0) {
        warp_add_balance(a, to, scores, logits, token);
    }
    if (a.z_scale != 0.0f) {
        warp_add_z(a, to, scores, logits);
    }
    for (int e = lane_id(); e < a.num_experts; e += 32) {
        a.d_logits[token * a.num_experts + e] = to[e];
    }
}

extern "C" void router_backward_cuda(struct stream *stream, const struct router_backward *op)
{
    const int64_t num_tokens = op->logits->dim[0], num_experts = op->logits->dim[1];
    const int num_warps = warps_for(num_experts * 8);
    struct router_gradient a = {op->rule,
                                data_of<float>(op->d_logits),
                                data_of<float>(op->logits),
                                data_of<float>(op->d_probs),
                                data_of<int32_t>(op->indices),
                                {},
                                op->num_balance_terms,
                                op->z_scale / (float)num_tokens,
                                num_tokens,
                                (int)num_experts};

    for (int i = 0; i < op->num_balance_terms; i++) {
        a.balance[i] = {data_of<float>(op->balance[i].counts), op->balance[i].counts->dim[0],
                        op->balance[i].scale};
    }
    LAUNCH(stream, router_backward_kernel, ceil_div(num_tokens, num_warps), num_warps * 32,
           num_warps * num_experts * 8, a);
}

/* ---- the linear layer ---- */

struct halves {
    bf16 *pair;  /* [T,2E]: d_logits as the sum of two numbers, the upper halves first */
    bf16 *twice; /* [2E,H]: the weight, and once more */
    float *sums; /* [2E,H]: zeroed, so that a product of the library may be added to it */
    const float *d_logits;
    const bf16 *weight;
    uint32_t num_logits, num_weights, num_experts;
};

/* N logits a thread, which do not cross the end of a token's. */
template <int N> __global__ void split_kernel(struct halves a)
{
    const uint32_t i = blockIdx.x * BLOCK + threadIdx.x, row_packs = a.num_experts / N;

    if (i < a.num_logits / N) {
        const int64_t at = ((int64_t)(i / row_packs) * 2 * row_packs + i % row_packs) * N;
        float upper[N], lower[N];

        load<N>(lower, a.d_logits, (int64_t)i * N);
#pragma unroll
        for (int j = 0; j < N; j++) {
            upper[j] = to_float(from_float<bf16>(lower[j]));
            lower[j] -= upper[j];
        }
        store<N>(a.pair, at, upper);
        store<N>(a.pair, at + a.num_experts, lower);
    }
    if (i < a.num_weights) {
        a.twice[i] = a.twice[(int64_t)i + a.num_weights] = a.weight[i];
        a.sums[i] = a.sums[(int64_t)i + a.num_weights] = 0.0f;
    }
}

static void split(struct stream *stream, struct tensor *pair, struct tensor *twice,
                  struct tensor *sums, const struct router_linear_backward *op)
{
    const int64_t num_logits = tensor_num_elements(op->d_logits);
    const int64_t num_weights = tensor_num_elements(op->weight);
    const int64_t num_experts = op->d_logits->dim[1];
    const bool whole = num_experts % 4 == 0 && packable(num_experts, {op->d_logits});
    const int64_t num_packs = whole ? num_logits / 4 : num_logits;
    const int64_t num_blocks = ceil_div(num_packs > num_weights ? num_packs : num_weights, BLOCK);
    const struct halves a = {data_of<bf16>(pair),       data_of<bf16>(twice),
                             data_of<float>(sums),      data_of<float>(op->d_logits),
                             data_of<bf16>(op->weight), (uint32_t)num_logits,
                             (uint32_t)num_weights,     (uint32_t)num_experts};

    CHECK(num_logits < INT32_MAX && num_weights < INT32_MAX, "router of %lld x %lld logits",
          (long long)op->d_logits->dim[0], (long long)num_experts);
    if (whole) {
        LAUNCH(stream, split_kernel<4>, num_blocks, BLOCK, 0, a);
    } else {
        LAUNCH(stream, split_kernel<1>, num_blocks, BLOCK, 0, a);
    }
}

/* sum[n] += halves[0, n) + halves[n, 2n), or =. */
__global__ void add_halves_kernel(float *sum, const float *halves, bool overwrite, int64_t n)
{
    const int64_t i = (int64_t)blockIdx.x * BLOCK + threadIdx.x;

    if (i < n) {
        sum[i] = (overwrite ? 0.0f : sum[i]) + (halves[i] + halves[i + n]);
    }
}

/* Products of bf16 numbers are exact in f32, so the two halves of d_logits side by side give the
 * matrix units' speed and 16 bits of d_logits' fraction. */
static void linear_backward_in_halves(struct stream *stream,
                                      const struct router_linear_backward *op)
{
    const int64_t num_tokens = op->x->dim[0], hidden = op->x->dim[1];
    const int64_t num_experts = op->weight->dim[0], num_weights = num_experts * hidden;
    const int64_t pair_dims[] = {num_tokens, 2 * num_experts};
    const int64_t twice_dims[] = {2 * num_experts, hidden};
    struct tensor pair = tensor_allocate(stream->scratch, DTYPE_BF16, pair_dims, 2);
    struct tensor twice = tensor_allocate(stream->scratch, DTYPE_BF16, twice_dims, 2);
    struct tensor sums = tensor_allocate(stream->scratch, DTYPE_F32, twice_dims, 2);
    struct matmul d_weight = {}, d_x = {};

    split(stream, &pair, &twice, &sums, op);
    d_weight.c = &sums;
    d_weight.a = &pair;
    d_weight.b = op->x;
    d_weight.transpose_a = true;
    d_weight.accumulate = true; /* compute-sanitizer does not see what the library stores by TMA */
    matmul_cuda(stream, &d_weight);
    LAUNCH(stream, add_halves_kernel, ceil_div(num_weights, BLOCK), BLOCK, 0,
           data_of<float>(op->d_weight), data_of<float>(&sums), op->overwrite_grads, num_weights);
    d_x.c = op->d_x;
    d_x.a = &pair;
    d_x.b = &twice;
    d_x.accumulate = true;
    matmul_cuda(stream, &d_x);
}

extern "C" void router_linear_backward_cuda(struct stream *stream,
                                            const struct router_linear_backward *op)
{
    struct matmul product = {};

    if (op->x->dtype == DTYPE_BF16) {
        linear_backward_in_halves(stream, op);
        return;
    }
    product.a = op->d_logits;
    product.accumulate = true;
    product.c = op->d_x;
    product.b = op->weight;
    matmul_cuda(stream, &product);
    product.accumulate = !op->overwrite_grads;
    product.c = op->d_weight;
    product.b = op->x;
    product.transpose_a = true;
    matmul_cuda(stream, &product);
}
