/* The router: which experts a token goes to, with what probability, and the losses that balance
 * them. A warp takes a token and keeps the token's E numbers in shared memory. */
#include "ops/ops_cuda_internal.cuh"

/* Shared memory of a warp, and warps of a block, are chosen so that a block stays under 48 KB. */
enum { WARPS_MAX = 8, SHARED_BYTES_MAX = 48 * 1024 };

#define SUM_EPSILON 1e-20f /* Megatron's guard against a sum of sigmoid scores that is zero */

static int warps_for(int64_t warp_bytes)
{
    const int64_t fit = SHARED_BYTES_MAX / warp_bytes;

    CHECK(fit >= 1, "%lld bytes of shared memory for a token", (long long)warp_bytes);
    return fit < WARPS_MAX ? (int)fit : WARPS_MAX;
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

/* Whether (value, index) comes before the best so far: larger, or equal and of a lower index. */
__device__ inline bool is_better(float value, int index, float best, int best_index)
{
    return best_index < 0 || value > best || (value == best && index < best_index);
}

/* The best expert not yet taken, in every lane; taken is updated. NaN counts as -infinity, so that
 * the choices are distinct experts whatever the values. */
__device__ inline int warp_choose(const float *values, unsigned char *taken, int num_experts)
{
    float best = -INFINITY;
    int index = -1;

    for (int e = lane_id(); e < num_experts; e += 32) {
        const float value = isnan(values[e]) ? -INFINITY : values[e];

        if (!taken[e] && is_better(value, e, best, index)) {
            best = value;
            index = e;
        }
    }
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {
        const float other = __shfl_xor_sync(0xffffffffu, best, distance);
        const int other_index = __shfl_xor_sync(0xffffffffu, index, distance);

        if (other_index >= 0 && is_better(other, other_index, best, index)) {
            best = other;
            index = other_index;
        }
    }
    __syncwarp();
    if (lane_id() == 0) {
        taken[index] = 1;
    }
    __syncwarp();
    return index;
}

/* Sum of the `count` largest of values[n], each time the first of the largest ones left. For one
 * thread; n is small. */
__device__ inline float sum_of_best(const float *values, int n, int count)
{
    float sum = 0.0f, last = INFINITY;
    int last_index = -1;

    for (int i = 0; i < count; i++) {
        float best = -INFINITY;
        int index = -1;

        for (int j = 0; j < n; j++) {
            const bool left = values[j] < last || (values[j] == last && j > last_index);

            if (left && is_better(values[j], j, best, index)) {
                best = values[j];
                index = j;
            }
        }
        sum += best;
        last = best;
        last_index = index;
    }
    return sum;
}

/* Takes the experts outside the group_topk best groups out of the choice (M1.6): a group's score is
 * the sum of its topk / group_topk best experts. group_scores and group_taken: num_groups each. */
__device__ inline void warp_limit_groups(const struct router_rule &rule, const float *selection,
                                         unsigned char *taken, float *group_scores,
                                         unsigned char *group_taken, int num_experts)
{
    const int group_size = num_experts / rule.num_groups;

    for (int g = lane_id(); g < rule.num_groups; g += 32) {
        group_scores[g] =
            sum_of_best(selection + g * group_size, group_size, rule.topk / rule.group_topk);
        group_taken[g] = 0;
    }
    __syncwarp();
    for (int i = 0; i < rule.group_topk; i++) {
        warp_choose(group_scores, group_taken, rule.num_groups);
    }
    for (int e = lane_id(); e < num_experts; e += 32) {
        taken[e] = !group_taken[e / group_size];
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
    c.divisor = warp_sum(sum) + (c.exponential ? 0.0f : SUM_EPSILON);
    return c;
}

/* Floats of shared memory of a warp: scores and selection [E], group scores [E], flags [2E bytes].
 */
static int64_t topk_warp_bytes(int64_t num_experts)
{
    return ceil_div(num_experts * (3 * 4 + 2), 4) * 4;
}

__global__ void router_topk_forward_kernel(struct router_rule rule, float *probs, int32_t *indices,
                                           const float *all_logits, const float *selection_in,
                                           const float *expert_bias, int64_t num_tokens,
                                           int num_experts, int warp_bytes)
{
    extern __shared__ char shared[];
    float *scores = (float *)(shared + threadIdx.x / 32 * warp_bytes);
    float *selection = scores + num_experts, *group_scores = selection + num_experts;
    unsigned char *taken = (unsigned char *)(group_scores + num_experts);
    const int64_t token = warp_token();
    const float *logits = all_logits + token * num_experts, *chosen_by = scores;
    int32_t *mine = indices + token * rule.topk;
    struct chosen c;

    if (token >= num_tokens) {
        return;
    }
    warp_scores(rule.score, scores, logits, num_experts);
    if (selection_in != NULL) {
        chosen_by = selection_in + token * num_experts;
    } else if (rule.score == ROUTER_SOFTMAX && !rule.pre_softmax) {
        chosen_by = logits;
    }
    for (int e = lane_id(); e < num_experts; e += 32) {
        selection[e] = chosen_by[e] + (expert_bias != NULL ? expert_bias[e] : 0.0f);
        taken[e] = 0;
    }
    __syncwarp();
    if (rule.num_groups > 0) {
        warp_limit_groups(rule, selection, taken, group_scores, taken + num_experts, num_experts);
    }
    for (int k = 0; k < rule.topk; k++) {
        const int expert = warp_choose(selection, taken, num_experts);

        if (lane_id() == 0) {
            mine[k] = expert;
        }
    }
    __syncwarp();
    c = chosen_of(rule, logits, scores, mine);
    for (int k = lane_id(); k < rule.topk; k += 32) {
        probs[token * rule.topk + k] =
            chosen_weight(c, logits, scores, mine[k]) / c.divisor * rule.scaling_factor;
    }
}

extern "C" void router_topk_forward_cuda(struct stream *stream, const struct router_topk *op)
{
    const int64_t num_tokens = op->logits->dim[0], num_experts = op->logits->dim[1];
    const int64_t warp_bytes = topk_warp_bytes(num_experts);
    const int num_warps = warps_for(warp_bytes);

    LAUNCH(stream, router_topk_forward_kernel, ceil_div(num_tokens, num_warps), num_warps * 32,
           num_warps * warp_bytes, op->rule, data_of<float>(op->probs),
           data_of<int32_t>(op->indices), data_of<float>(op->logits), data_of<float>(op->selection),
           data_of<float>(op->expert_bias), num_tokens, (int)num_experts, (int)warp_bytes);
}

/* p = softmax of the chosen: d_l[k] += p_k (d_k - sum_j p_j d_j).
 * Sigmoid: p_k = s_k / D: d_s[k] = (d_k - sum_j p_j d_j) / D (no sum for k = 1), d_l = d_s s (1-s).
 * Softmax over all: d_l += s (d_s - sum_e s d_s), d_s = d_probs at the chosen, else 0. */
__global__ void router_topk_backward_kernel(struct router_rule rule, float *d_logits,
                                            const float *d_probs, const float *all_logits,
                                            const int32_t *indices, int64_t num_tokens,
                                            int num_experts, int warp_bytes)
{
    extern __shared__ char shared[];
    float *scores = (float *)(shared + threadIdx.x / 32 * warp_bytes);
    const int64_t token = warp_token();
    const float *logits = all_logits + token * num_experts, *d = d_probs + token * rule.topk;
    const int32_t *mine = indices + token * rule.topk;
    float *to = d_logits + token * num_experts, mean = 0.0f;
    struct chosen c;

    if (token >= num_tokens) {
        return;
    }
    warp_scores(rule.score, scores, logits, num_experts);
    c = chosen_of(rule, logits, scores, mine);
    for (int k = lane_id(); k < rule.topk; k += 32) {
        mean += chosen_weight(c, logits, scores, mine[k]) / c.divisor * d[k];
    }
    mean = warp_sum(mean);
    if (rule.score == ROUTER_SIGMOID && rule.topk == 1) {
        mean = 0.0f;
    }
    for (int k = lane_id(); k < rule.topk; k += 32) {
        const int e = mine[k];
        const float s = chosen_weight(c, logits, scores, e);

        if (c.exponential) {
            to[e] += rule.scaling_factor * s / c.divisor * (d[k] - mean);
        } else if (rule.score == ROUTER_SIGMOID) {
            to[e] += rule.scaling_factor * (d[k] - mean) / c.divisor * s * (1.0f - s);
        } else {
            to[e] += rule.scaling_factor * s * d[k];
        }
    }
    if (rule.score == ROUTER_SOFTMAX && !c.exponential) {
        __syncwarp();
        for (int e = lane_id(); e < num_experts; e += 32) {
            to[e] -= rule.scaling_factor * scores[e] * mean;
        }
    }
}

extern "C" void router_topk_backward_cuda(struct stream *stream,
                                          const struct router_topk_backward *op)
{
    const int64_t num_tokens = op->logits->dim[0], num_experts = op->logits->dim[1];
    const int64_t warp_bytes = num_experts * 4;
    const int num_warps = warps_for(warp_bytes);

    LAUNCH(stream, router_topk_backward_kernel, ceil_div(num_tokens, num_warps), num_warps * 32,
           num_warps * warp_bytes, op->rule, data_of<float>(op->d_logits),
           data_of<float>(op->d_probs), data_of<float>(op->logits), data_of<int32_t>(op->indices),
           num_tokens, (int)num_experts, (int)warp_bytes);
}

/* ---- balance ---- */

enum { CHUNK = 256 }; /* tokens of a column whose sums a block forms */

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
        divisor = warp_sum(sum) + SUM_EPSILON;
        for (int e = lane_id(); e < num_experts; e += 32) {
            scores[e] /= divisor;
        }
        __syncwarp();
    }
    return divisor;
}

/* partial [chunk, C, 2, E]: counts and score sums of CHUNK tokens of a column. Shared memory:
 * scores and sums of each warp, counts of the block. */
__global__ void router_balance_kernel(enum router_score kind, double *partial, const float *logits,
                                      const int32_t *indices, int64_t num_tokens, int num_experts,
                                      int num_columns, int topk)
{
    extern __shared__ float work[];
    const int num_warps = blockDim.x / 32, warp = threadIdx.x / 32;
    const int64_t chunk = blockIdx.x / num_columns, column = blockIdx.x % num_columns;
    const int64_t column_tokens = num_tokens / num_columns;
    float *scores = work + warp * 2 * num_experts, *sums = scores + num_experts;
    int *counts = (int *)(work + num_warps * 2 * num_experts);
    double *out = partial + (int64_t)blockIdx.x * 2 * num_experts;

    for (int e = threadIdx.x; e < num_experts; e += blockDim.x) {
        counts[e] = 0;
    }
    for (int e = lane_id(); e < num_experts; e += 32) {
        sums[e] = 0.0f;
    }
    __syncthreads();
    for (int64_t i = chunk * CHUNK + warp; i < (chunk + 1) * CHUNK && i < column_tokens;
         i += num_warps) {
        const int64_t token = i * num_columns + column;

        warp_balance_scores(kind, scores, logits + token * num_experts, num_experts);
        for (int e = lane_id(); e < num_experts; e += 32) {
            sums[e] += scores[e];
        }
        for (int k = lane_id(); k < topk; k += 32) {
            if (indices[token * topk + k] >= 0) {
                atomicAdd(&counts[indices[token * topk + k]], 1);
            }
        }
        __syncwarp();
    }
    __syncthreads();
    for (int e = threadIdx.x; e < num_experts; e += blockDim.x) {
        double sum = 0.0;

        for (int w = 0; w < num_warps; w++) {
            sum += (double)work[w * 2 * num_experts + num_experts + e];
        }
        out[e] = (double)counts[e];
        out[num_experts + e] = sum;
    }
}

__global__ void router_balance_sum_kernel(float *counts, float *score_sums, const double *partial,
                                          int64_t num_chunks, int num_experts, int num_columns)
{
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    const int column = i / num_experts, e = i % num_experts;
    double count = 0.0, sum = 0.0;

    if (column >= num_columns) {
        return;
    }
    for (int64_t chunk = 0; chunk < num_chunks; chunk++) {
        const double *from = partial + (chunk * num_columns + column) * 2 * num_experts;

        count += from[e];
        sum += from[num_experts + e];
    }
    counts[i] = (float)count;
    score_sums[i] = (float)sum;
}

extern "C" void router_balance_cuda(struct stream *stream, const struct router_balance *op)
{
    const int64_t num_tokens = op->logits->dim[0], num_experts = op->logits->dim[1];
    const int64_t num_columns = op->counts->dim[0];
    const int64_t num_chunks = ceil_div(num_tokens / num_columns, CHUNK);
    const int num_warps = warps_for(num_experts * 12); /* the counts: at most as much as a warp */
    double *partial = (double *)arena_allocate(
        stream->scratch, (size_t)(num_chunks * num_columns * 2 * num_experts) * 8);

    LAUNCH(stream, router_balance_kernel, num_chunks * num_columns, num_warps * 32,
           (num_warps * 2 + 1) * num_experts * 4, op->score, partial, data_of<float>(op->logits),
           data_of<int32_t>(op->indices), num_tokens, (int)num_experts, (int)num_columns,
           (int)op->indices->dim[1]);
    LAUNCH(stream, router_balance_sum_kernel, ceil_div(num_columns * num_experts, 128), 128, 0,
           data_of<float>(op->counts), data_of<float>(op->score_sums), partial, num_chunks,
           (int)num_experts, (int)num_columns);
}

__global__ void router_balance_loss_kernel(float *loss, const float *counts,
                                           const float *score_sums, float factor, int64_t n)
{
    __shared__ double buffer[32];
    double sum = 0.0;

    for (int64_t i = threadIdx.x; i < n; i += blockDim.x) {
        sum += (double)counts[i] * (double)score_sums[i];
    }
    sum = block_sum(sum, buffer);
    if (threadIdx.x == 0) {
        *loss = (float)((double)factor * sum);
    }
}

extern "C" void router_balance_loss_cuda(struct stream *stream,
                                         const struct router_balance_loss *op)
{
    LAUNCH(stream, router_balance_loss_kernel, 1, 256, 0, data_of<float>(op->loss),
           data_of<float>(op->counts), data_of<float>(op->score_sums), op->factor,
           tensor_num_elements(op->counts));
}

/* d_u = scale * counts. Softmax: d_l += u (d_u - sum_j u_j d_u_j). Sigmoid, u = s / D: the same
 * times (1 - s), s = u D. */
__global__ void router_balance_backward_kernel(enum router_score kind, float *d_logits,
                                               const float *logits, const float *all_counts,
                                               float scale, int64_t num_tokens, int num_experts,
                                               int num_columns)
{
    extern __shared__ float work[];
    float *scores = work + threadIdx.x / 32 * num_experts, mean = 0.0f, divisor;
    const int64_t token = warp_token();
    const float *counts = all_counts + token % num_columns * num_experts;

    if (token >= num_tokens) {
        return;
    }
    divisor = warp_balance_scores(kind, scores, logits + token * num_experts, num_experts);
    for (int e = lane_id(); e < num_experts; e += 32) {
        mean += scores[e] * scale * counts[e];
    }
    mean = warp_sum(mean);
    for (int e = lane_id(); e < num_experts; e += 32) {
        const float slope = kind == ROUTER_SIGMOID ? 1.0f - scores[e] * divisor : 1.0f;

        d_logits[token * num_experts + e] += (scale * counts[e] - mean) * scores[e] * slope;
    }
}

extern "C" void router_balance_backward_cuda(struct stream *stream,
                                             const struct router_balance_backward *op)
{
    const int64_t num_tokens = op->logits->dim[0], num_experts = op->logits->dim[1];
    const int num_warps = warps_for(num_experts * 4);

    LAUNCH(stream, router_balance_backward_kernel, ceil_div(num_tokens, num_warps), num_warps * 32,
           num_warps * num_experts * 4, op->score, data_of<float>(op->d_logits),
           data_of<float>(op->logits), data_of<float>(op->counts), op->scale, num_tokens,
           (int)num_experts, (int)op->counts->dim[0]);
}

/* d logsumexp(l)^2 / d_l = 2 logsumexp(l) softmax(l). squares[token] = logsumexp^2. */
__global__ void router_z_kernel(double *squares, float *d_logits, const float *logits,
                                float d_scale, int64_t num_tokens, int num_experts)
{
    extern __shared__ float work[];
    float *scores = work + threadIdx.x / 32 * num_experts, z;
    const int64_t token = warp_token();

    if (token >= num_tokens) {
        return;
    }
    z = warp_softmax(scores, logits + token * num_experts, num_experts);
    for (int e = lane_id(); d_logits != NULL && e < num_experts; e += 32) {
        d_logits[token * num_experts + e] += d_scale * 2.0f * z / (float)num_tokens * scores[e];
    }
    if (lane_id() == 0) {
        squares[token] = (double)z * (double)z;
    }
}

__global__ void router_z_sum_kernel(float *loss, const double *squares, float factor,
                                    int64_t num_tokens)
{
    __shared__ double buffer[32];
    double sum = 0.0;

    for (int64_t t = threadIdx.x; t < num_tokens; t += blockDim.x) {
        sum += squares[t];
    }
    sum = block_sum(sum, buffer);
    if (threadIdx.x == 0) {
        *loss = num_tokens > 0 ? (float)((double)factor * sum / (double)num_tokens) : 0.0f;
    }
}

extern "C" void router_z_loss_cuda(struct stream *stream, const struct router_z_loss *op)
{
    const int64_t num_tokens = op->logits->dim[0], num_experts = op->logits->dim[1];
    const int num_warps = warps_for(num_experts * 4);
    double *squares = (double *)arena_allocate(stream->scratch, (size_t)num_tokens * 8);

    LAUNCH(stream, router_z_kernel, ceil_div(num_tokens, num_warps), num_warps * 32,
           num_warps * num_experts * 4, squares, data_of<float>(op->d_logits),
           data_of<float>(op->logits), op->d_scale, num_tokens, (int)num_experts);
    if (op->loss != NULL) {
        LAUNCH(stream, router_z_sum_kernel, 1, 1024, 0, data_of<float>(op->loss), squares,
               op->factor, num_tokens);
    }
}

/* ---- capacity ---- */

/* keep[slot]: whether fewer than `capacity` slots of its expert come before it: those of a higher
 * probability, or (all, for DROP_BY_POSITION) an equal one and a lower token. */
__global__ void router_keep_kernel(bool *keep, const int32_t *indices, const float *probs,
                                   bool by_position, int64_t capacity, int num_slots)
{
    __shared__ int32_t experts[CHUNK];
    __shared__ float others[CHUNK];
    const int slot = blockIdx.x * CHUNK + threadIdx.x;
    const int32_t expert = slot < num_slots ? indices[slot] : -1;
    const float prob = slot < num_slots ? probs[slot] : 0.0f;
    int num_before = 0;

    for (int begin = 0; begin < num_slots; begin += CHUNK) {
        const int count = num_slots - begin < CHUNK ? num_slots - begin : CHUNK;

        __syncthreads();
        if ((int)threadIdx.x < count) {
            experts[threadIdx.x] = indices[begin + threadIdx.x];
            others[threadIdx.x] = by_position ? 0.0f : probs[begin + threadIdx.x];
        }
        __syncthreads();
        for (int i = 0; i < count; i++) {
            const bool equal = by_position || others[i] == prob;

            num_before += experts[i] == expert &&
                          ((!by_position && others[i] > prob) || (equal && begin + i < slot));
        }
    }
    if (slot < num_slots) {
        keep[slot] = num_before < capacity;
    }
}

__global__ void router_drop_kernel(int32_t *indices, float *probs, const bool *keep, int num_slots)
{
    const int slot = blockIdx.x * CHUNK + threadIdx.x;

    if (slot < num_slots && indices[slot] >= 0 && !keep[slot]) {
        indices[slot] = -1;
        probs[slot] = 0.0f;
    }
}

extern "C" void router_drop_cuda(struct stream *stream, const struct router_drop *op)
{
    const int64_t num_slots = tensor_num_elements(op->indices);
    bool *keep = (bool *)arena_allocate(stream->scratch, (size_t)num_slots);

    LAUNCH(stream, router_keep_kernel, ceil_div(num_slots, CHUNK), CHUNK, 0, keep,
           data_of<int32_t>(op->indices), data_of<float>(op->probs), op->policy == DROP_BY_POSITION,
           op->capacity, (int)num_slots);
    LAUNCH(stream, router_drop_kernel, ceil_div(num_slots, CHUNK), CHUNK, 0,
           data_of<int32_t>(op->indices), data_of<float>(op->probs), keep, (int)num_slots);
}

/* Counts are whole numbers, so that a balanced expert compares equal to the mean. */
__global__ void expert_bias_update_kernel(float *bias, const float *counts, float rate,
                                          int num_experts)
{
    __shared__ double buffer[32];
    double mean = 0.0;

    for (int e = threadIdx.x; e < num_experts; e += blockDim.x) {
        mean += (double)counts[e];
    }
    mean = block_sum(mean, buffer) / (double)num_experts;
    for (int e = threadIdx.x; e < num_experts; e += blockDim.x) {
        const double lack = mean - (double)counts[e];

        bias[e] += lack > 0.0 ? rate : lack < 0.0 ? -rate : 0.0f;
    }
}

extern "C" void expert_bias_update_cuda(struct stream *stream, const struct expert_bias_update *op)
{
    LAUNCH(stream, expert_bias_update_kernel, 1, 256, 0, data_of<float>(op->bias),
           data_of<float>(op->counts), op->rate, (int)op->bias->dim[0]);
}
