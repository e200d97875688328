/* The router: which experts a token goes to, with what probability, and the losses that balance
 * them. A warp takes a token and keeps the token's E numbers in shared memory. */
#include "ops/router_cuda.cuh"

/* A whole number that orders as x does, and equal where x is equal; never 0, which stands for "not
 * to choose". NaN counts as -infinity, so that the choices are distinct experts whatever the
 * values. */
__device__ inline unsigned key_of(float x)
{
    const unsigned bits = __float_as_uint(isnan(x) ? -INFINITY : x + 0.0f); /* -0 becomes 0 */

    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

/* The index of the first of the largest keys, in every lane; its key becomes 0. Key i is in lane
 * i % 32, at i / 32. */
template <int N> __device__ inline int warp_choose(unsigned (&keys)[N])
{
    unsigned best = 0;
    int index = INT32_MAX;

#pragma unroll
    for (int j = 0; j < N; j++) {
        best = max(best, keys[j]);
    }
    best = __reduce_max_sync(0xffffffffu, best);
#pragma unroll
    for (int j = N - 1; j >= 0; j--) {
        index = keys[j] == best ? j * 32 + lane_id() : index;
    }
    index = __reduce_min_sync(0xffffffffu, index);
#pragma unroll
    for (int j = 0; j < N; j++) {
        keys[j] = index == j * 32 + lane_id() ? 0 : keys[j];
    }
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

            if (left && (index < 0 || values[j] > best)) {
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

/* Sets chosen[e] where e is in one of the group_topk best groups (M1.6): a group's score is the sum
 * of its topk / group_topk best experts. */
template <int N>
__device__ inline void warp_choose_groups(const struct router_rule &rule, const float *values,
                                          int32_t *chosen, int num_experts)
{
    const int group_size = num_experts / rule.num_groups;
    unsigned keys[N];

#pragma unroll
    for (int j = 0; j < N; j++) {
        const int g = j * 32 + lane_id();

        keys[j] = g < rule.num_groups ? key_of(sum_of_best(values + g * group_size, group_size,
                                                           rule.topk / rule.group_topk))
                                      : 0;
    }
    for (int e = lane_id(); e < num_experts; e += 32) {
        chosen[e] = 0;
    }
    __syncwarp();
    for (int i = 0; i < rule.group_topk; i++) {
        const int first = warp_choose(keys) * group_size;

        for (int e = lane_id(); e < group_size; e += 32) {
            chosen[first + e] = 1;
        }
    }
    __syncwarp();
}

/* keys of the values that the choice goes by; 0 outside the best groups, where there are groups. */
template <int N>
__device__ inline void warp_keys(const struct router_rule &rule, unsigned (&keys)[N],
                                 const float *values, int32_t *groups, int num_experts)
{
    const bool by_groups = rule.num_groups > 0;

    if (by_groups) {
        warp_choose_groups<N>(rule, values, groups, num_experts);
    }
#pragma unroll
    for (int j = 0; j < N; j++) {
        const int e = j * 32 + lane_id();

        keys[j] = e < num_experts && (!by_groups || groups[e] != 0) ? key_of(values[e]) : 0;
    }
    __syncwarp();
}

/* What the choice goes by, in shared memory. */
__device__ inline void warp_selection(const struct router_rule &rule, float *selection,
                                      const float *given, const float *logits, const float *scores,
                                      const float *expert_bias, int num_experts)
{
    const bool by_logits = rule.score == ROUTER_SOFTMAX && !rule.pre_softmax;
    const float *from = given != NULL ? given : by_logits ? logits : scores;

    for (int e = lane_id(); e < num_experts; e += 32) {
        selection[e] = from[e] + (expert_bias != NULL ? expert_bias[e] : 0.0f);
    }
    __syncwarp();
}

/* N: keys of a lane. Shared memory of a warp: scores, what is chosen by, and groups or choices, [E]
 * each. */
template <int N>
__global__ void router_topk_forward_kernel(struct router_rule rule, float *probs, int32_t *indices,
                                           const float *all_logits, const float *selection_in,
                                           const float *expert_bias, int64_t num_tokens,
                                           int num_experts)
{
    extern __shared__ float shared[];
    float *scores = shared + threadIdx.x / 32 * 3 * num_experts, *selection = scores + num_experts;
    int32_t *chosen = (int32_t *)(selection + num_experts);
    const int64_t token = warp_token();
    const float *logits = all_logits + token * num_experts;
    unsigned keys[N];
    struct chosen c;

    if (token >= num_tokens) {
        return;
    }
    if (rule.score == ROUTER_SIGMOID || rule.pre_softmax) {
        warp_scores(rule.score, scores, logits, num_experts);
    }
    warp_selection(rule, selection,
                   selection_in != NULL ? selection_in + token * num_experts : NULL, logits, scores,
                   expert_bias, num_experts);
    warp_keys(rule, keys, selection, chosen, num_experts);
    for (int k = 0; k < rule.topk; k++) {
        const int expert = warp_choose(keys);

        if (lane_id() == k % 32) {
            chosen[k] = expert;
            indices[token * rule.topk + k] = expert;
        }
    }
    __syncwarp();
    c = chosen_of(rule, logits, scores, chosen);
    for (int k = lane_id(); k < rule.topk; k += 32) {
        probs[token * rule.topk + k] =
            chosen_weight(c, logits, scores, chosen[k]) / c.divisor * rule.scaling_factor;
    }
}

template <int N>
static void topk_forward_launch(struct stream *stream, const struct router_topk *op)
{
    const int64_t num_tokens = op->logits->dim[0], num_experts = op->logits->dim[1];
    const int64_t warp_bytes = 3 * num_experts * 4;
    const int num_warps = warps_for(warp_bytes);

    LAUNCH(stream, router_topk_forward_kernel<N>, ceil_div(num_tokens, num_warps), num_warps * 32,
           num_warps * warp_bytes, op->rule, data_of<float>(op->probs),
           data_of<int32_t>(op->indices), data_of<float>(op->logits), data_of<float>(op->selection),
           data_of<float>(op->expert_bias), num_tokens, (int)num_experts);
}

enum { EXPERTS_MAX = 4096 };

extern "C" void router_topk_forward_cuda(struct stream *stream, const struct router_topk *op)
{
    const int64_t num_experts = op->logits->dim[1];

    CHECK(num_experts <= EXPERTS_MAX, "%lld experts", (long long)num_experts);
    if (num_experts <= 32) {
        topk_forward_launch<1>(stream, op);
    } else if (num_experts <= 128) {
        topk_forward_launch<4>(stream, op);
    } else if (num_experts <= 256) {
        topk_forward_launch<8>(stream, op);
    } else {
        topk_forward_launch<EXPERTS_MAX / 32>(stream, op);
    }
}

/* ---- balance ---- */

enum { BALANCE_CHUNK = 32 }; /* tokens of a column whose sums a block forms */

/* partial [chunk, C, 2, E]: counts and score sums of BALANCE_CHUNK tokens of a column. Shared
 * memory: scores and sums of each warp, counts of the block. */
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
    for (int64_t i = chunk * BALANCE_CHUNK + warp;
         i < (chunk + 1) * BALANCE_CHUNK && i < column_tokens; i += num_warps) {
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

/* A warp a column and expert. */
__global__ void router_balance_sum_kernel(float *counts, float *score_sums, const double *partial,
                                          int64_t num_chunks, int num_experts, int num_columns)
{
    const int i = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    const int column = i / num_experts, e = i % num_experts;
    double count = 0.0, sum = 0.0;

    if (column >= num_columns) {
        return;
    }
    for (int64_t chunk = lane_id(); chunk < num_chunks; chunk += 32) {
        const double *from = partial + (chunk * num_columns + column) * 2 * num_experts;

        count += from[e];
        sum += from[num_experts + e];
    }
    count = warp_sum(count);
    sum = warp_sum(sum);
    if (lane_id() == 0) {
        counts[i] = (float)count;
        score_sums[i] = (float)sum;
    }
}

extern "C" void router_balance_cuda(struct stream *stream, const struct router_balance *op)
{
    const int64_t num_tokens = op->logits->dim[0], num_experts = op->logits->dim[1];
    const int64_t num_columns = op->counts->dim[0];
    const int64_t num_chunks = ceil_div(num_tokens / num_columns, BALANCE_CHUNK);
    const int num_warps = warps_for(num_experts * 12); /* the counts: at most as much as a warp */
    double *partial = (double *)arena_allocate(
        stream->scratch, (size_t)(num_chunks * num_columns * 2 * num_experts) * 8);

    LAUNCH(stream, router_balance_kernel, num_chunks * num_columns, num_warps * 32,
           (num_warps * 2 + 1) * num_experts * 4, op->score, partial, data_of<float>(op->logits),
           data_of<int32_t>(op->indices), num_tokens, (int)num_experts, (int)num_columns,
           (int)op->indices->dim[1]);
    LAUNCH(stream, router_balance_sum_kernel, ceil_div(num_columns * num_experts, 4), 128, 0,
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

/* squares[token] = logsumexp^2. */
__global__ void router_z_kernel(double *squares, const float *logits, int64_t num_tokens,
                                int num_experts)
{
    extern __shared__ float work[];
    const int64_t token = warp_token();
    float z;

    if (token >= num_tokens) {
        return;
    }
    z = warp_softmax(work + threadIdx.x / 32 * num_experts, logits + token * num_experts,
                     num_experts);
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
           num_warps * num_experts * 4, squares, data_of<float>(op->logits), num_tokens,
           (int)num_experts);
    LAUNCH(stream, router_z_sum_kernel, 1, 1024, 0, data_of<float>(op->loss), squares, op->factor,
           num_tokens);
}

/* ---- capacity ---- */

enum { CHUNK = 256 }; /* slots that a block compares with all others, as many at a time */

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
