/* Attention in bf16 on the matrix units, for what cuDNN's kernels do not take: documents, dropout
 * by cadre's own random numbers, parts of the keys. Tiles in shared memory, the products by
 * mma.m16n8k16 from bf16 into f32, softmax in registers (Dao 2023). Four warps a block, each with
 * 16 rows of the output; the rows or columns of the scores that a warp needs are its own, so
 * nothing is summed over warps, and every sum has one owner and a fixed order.
 *
 * Fragments of m16n8k16, with g = lane / 4 and c = 2 (lane % 4): a thread holds of A [16,16] the
 * pairs (g, c), (g+8, c), (g, c+8), (g+8, c+8); of B [16,8] the pairs (k = c, n = g), (k = c+8,
 * n = g); of C [16,8] the pairs (g, c), (g+8, c). Two neighbouring C are therefore one A. */
#include <type_traits>

#include "ops/attention_cuda.cuh"

namespace
{

constexpr int WARPS = 4, THREADS = 32 * WARPS, ROWS = 16 * WARPS; /* ROWS of the output a block */
constexpr float LOG2_E = 1.44269504088896340736f, LN_2 = 0.69314718055994530942f;

/* ---- tiles and products ---- */

/* Elements between rows of a tile of D columns: 16 bytes more, so that the 8 rows that ldmatrix
 * reads together lie in different banks. */
template <int D> constexpr int pitch = D + 8;

__device__ inline uint32_t shared_address(const void *memory)
{
    return (uint32_t)__cvta_generic_to_shared(memory);
}

/* tile [count][D] = rows [first, first + count) of x, asynchronously; zeros from row `end` and from
 * column `d` on. stride: elements between rows of x. */
template <int D>
__device__ inline void load_tile(bf16 *tile, const bf16 *x, int64_t stride, int first, int count,
                                 int end, int d)
{
    for (int i = threadIdx.x; i < count * (D / 8); i += THREADS) {
        const int row = i / (D / 8), column = i % (D / 8) * 8;
        const bool inside = first + row < end && column < d;
        const bf16 *from = inside ? x + (first + row) * stride + column : x;

        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(
                         shared_address(tile + row * pitch<D> + column)),
                     "l"(from), "r"(inside ? 16 : 0));
    }
}

__device__ inline void commit_loads()
{
    asm volatile("cp.async.commit_group;");
}

/* All but the newest `pending` groups of loads have arrived, for all threads. */
template <int PENDING> __device__ inline void wait_loads()
{
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING));
    __syncthreads();
}

template <bool TRANSPOSED>
__device__ inline void load_matrices(uint32_t (&x)[4], const bf16 *address)
{
    if constexpr (TRANSPOSED) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                     : "r"(shared_address(address)));
    } else {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                     : "r"(shared_address(address)));
    }
}

__device__ inline void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1)
{
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, "
                 "{%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <int N> __device__ inline void clear(float (&c)[N][4])
{
#pragma unroll
    for (int n = 0; n < N; n++) {
        c[n][0] = c[n][1] = c[n][2] = c[n][3] = 0.0f;
    }
}

/* c [16, N] = a [16, D] b [N, D]^T, both tiles. */
template <int D, int N>
__device__ inline void multiply_tiles(float (&c)[N / 8][4], const bf16 *a, const bf16 *b)
{
    const int lane = threadIdx.x % 32;

    clear(c);
#pragma unroll
    for (int k = 0; k < D; k += 16) {
        uint32_t left[4];

        load_matrices<false>(left, a + lane % 16 * pitch<D> + k + lane / 16 * 8);
#pragma unroll
        for (int n = 0; n < N; n += 16) {
            uint32_t right[4];

            load_matrices<false>(right, b + (n + lane % 8 + lane / 16 * 8) * pitch<D> + k +
                                            lane / 8 % 2 * 8);
            multiply(c[n / 8], left, right[0], right[1]);
            multiply(c[n / 8 + 1], left, right[2], right[3]);
        }
    }
}

__device__ inline uint32_t packed(float low, float high)
{
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);

    return *reinterpret_cast<const uint32_t *>(&pair);
}

/* c [16, D] += p [16, N] b [N, D]: p in registers, rounded to bf16; b a tile. */
template <int D, int N>
__device__ inline void add_product(float (&c)[D / 8][4], const float (&p)[N / 8][4], const bf16 *b)
{
    const int lane = threadIdx.x % 32;

#pragma unroll
    for (int k = 0; k < N; k += 16) {
        const float(&x)[4] = p[k / 8], (&y)[4] = p[k / 8 + 1];
        const uint32_t left[4] = {packed(x[0], x[1]), packed(x[2], x[3]), packed(y[0], y[1]),
                                  packed(y[2], y[3])};

#pragma unroll
        for (int n = 0; n < D; n += 16) {
            uint32_t right[4];

            load_matrices<true>(right, b + (k + lane % 16) * pitch<D> + n + lane / 16 * 8);
            multiply(c[n / 8], left, right[0], right[1]);
            multiply(c[n / 8 + 1], left, right[2], right[3]);
        }
    }
}

/* ---- masks ---- */

/* The keys [begin, end) that a query sees; none for a query that is not there. */
struct span {
    int begin, end;

    __device__ bool has(int j) const
    {
        return j >= begin && j < end;
    }
};

template <class ARGS> __device__ inline span span_of(const head<ARGS> &h, int64_t s)
{
    const auto &a = h.a;
    int64_t begin = 0, end = a.kv_length;

    if (s >= a.s) {
        return {0, 0};
    }
    if (a.causal && a.q_start + s + 1 - a.k_start < end) {
        end = a.q_start + s + 1 - a.k_start;
    }
    if (a.document_start != NULL && a.document_start[s * a.b + h.batch] > a.k_start) {
        begin = a.document_start[s * a.b + h.batch] - a.k_start;
    }
    return {(int)begin, (int)end};
}

/* Over the four threads that share a row of C. */
__device__ inline float quad_max(float x)
{
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

__device__ inline float quad_sum(float x)
{
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

/* ---- forward ---- */

constexpr int KEYS = 64; /* of a tile of the forward pass */

/* The running softmax of a thread's rows g and g + 8; max is that of scores * log2(e). */
struct softmax_rows {
    float max[2], sum[2];
};

/* Scores become probabilities relative to the new maximum; factor: what earlier sums are multiplied
 * with. */
template <int N>
__device__ inline void softmax_step(float (&score)[N / 8][4], softmax_rows &rows,
                                    float (&factor)[2], const span (&spans)[2], int j0, float scale)
{
    const int c = threadIdx.x % 4 * 2;

#pragma unroll
    for (int r = 0; r < 2; r++) {
        float top = rows.max[r], added = 0.0f;

#pragma unroll
        for (int n = 0; n < N / 8; n++) {
#pragma unroll
            for (int i = 2 * r; i < 2 * r + 2; i++) {
                score[n][i] =
                    spans[r].has(j0 + n * 8 + c + i % 2) ? score[n][i] * scale : -INFINITY;
                top = fmaxf(top, score[n][i]);
            }
        }
        top = quad_max(top);
        factor[r] = rows.max[r] == -INFINITY ? 0.0f : exp2f(rows.max[r] - top);
#pragma unroll
        for (int n = 0; n < N / 8; n++) {
#pragma unroll
            for (int i = 2 * r; i < 2 * r + 2; i++) {
                score[n][i] = score[n][i] == -INFINITY ? 0.0f : exp2f(score[n][i] - top);
                added += score[n][i];
            }
        }
        rows.max[r] = top;
        rows.sum[r] = rows.sum[r] * factor[r] + quad_sum(added);
    }
}

/* Zeros in p [16, N] where rows s and s + 8 drop a key, j0 and on. The factor 1 / (1 - p) comes
 * last, in f32: it would cost a probability near 1 its exactness in bf16. A call of Philox makes
 * the numbers of four keys: of the two threads that hold them, one makes those of row s, the other
 * those of row s + 8, and each gives the other its half. */
template <class ARGS, int N>
__device__ inline void drop(float (&p)[N / 8][4], const head<ARGS> &h, int64_t s, int j0)
{
    const struct dropout_rule rule = h.a.dropout;
    const int lane = threadIdx.x % 32, odd = lane % 2, c = lane % 4 * 2;
    const int64_t first = h.a.k_start + j0;

    if (first % 4 != 0) {
#pragma unroll
        for (int i = 0; i < N / 2; i++) {
            if (!h.keeps(s + i % 4 / 2 * 8, j0 + i / 4 * 8 + c + i % 2)) {
                p[i / 4][i % 4] = 0.0f;
            }
        }
        return;
    }
#pragma unroll
    for (int n = 0; n < N / 8; n++) {
        uint32_t bits[4], given[2];

        rng_philox(bits, rule.key, h.dropout_row(s + 8 * odd), (uint64_t)(first + n * 8 + c) / 4);
        given[0] = __shfl_xor_sync(0xffffffffu, odd ? bits[0] : bits[2], 1);
        given[1] = __shfl_xor_sync(0xffffffffu, odd ? bits[1] : bits[3], 1);
#pragma unroll
        for (int i = 0; i < 4; i++) { /* i / 2: row; i % 2: key */
            const uint32_t own = odd ? bits[2 + i % 2] : bits[i % 2];
            const uint32_t number = i / 2 == odd ? own : given[i % 2];

            p[n][i] = rng_to_uniform(number) >= rule.p ? p[n][i] : 0.0f;
        }
    }
}

/* Rows s and s + 8 go on from the result over other keys. */
template <int D, class ARGS>
__device__ inline void resume(const head<ARGS> &h, int64_t s, softmax_rows &rows,
                              float (&out)[D / 8][4])
{
    const ARGS &a = h.a;
    const int c = threadIdx.x % 4 * 2;

#pragma unroll
    for (int r = 0; r < 2; r++) {
        if (s + 8 * r < a.s && a.lse[h.row(s + 8 * r)] != -INFINITY) {
            rows.max[r] = a.lse[h.row(s + 8 * r)] * LOG2_E;
            rows.sum[r] = 1.0f;
#pragma unroll
            for (int n = 0; n < D / 8; n++) {
                const int64_t at = h.query_element(s + 8 * r) + n * 8 + c;

                if (n * 8 + c < a.d) {
                    out[n][2 * r] = (1.0f - a.dropout.p) * to_float(a.out_written[at]);
                    out[n][2 * r + 1] = (1.0f - a.dropout.p) * to_float(a.out_written[at + 1]);
                }
            }
        }
    }
}

template <int D, class ARGS>
__device__ inline void write_rows(const head<ARGS> &h, int64_t s, const softmax_rows &rows,
                                  const float (&out)[D / 8][4])
{
    using O = typename std::remove_pointer<decltype(ARGS::out_written)>::type;
    const ARGS &a = h.a;
    const int c = threadIdx.x % 4 * 2;

#pragma unroll
    for (int r = 0; r < 2; r++) {
        const float inverse = rows.sum[r] > 0.0f ? h.kept_factor() / rows.sum[r] : 0.0f;

        if (s + 8 * r >= a.s) {
            continue;
        }
#pragma unroll
        for (int n = 0; n < D / 8; n++) {
            const int64_t at = h.query_element(s + 8 * r) + n * 8 + c;

            if (n * 8 + c < a.d) {
                a.out_written[at] = from_float<O>(out[n][2 * r] * inverse);
                a.out_written[at + 1] = from_float<O>(out[n][2 * r + 1] * inverse);
            }
        }
        if (c == 0) {
            a.lse_written[h.row(s + 8 * r)] =
                rows.sum[r] > 0.0f ? rows.max[r] * LN_2 + logf(rows.sum[r]) : -INFINITY;
        }
    }
}

/* Block: ROWS queries of a head, the last of the sequence first, since they see most keys. */
template <int D, class O>
__global__ void __launch_bounds__(THREADS) forward_kernel(attention_args<bf16, O, bf16> a)
{
    using ARGS = attention_args<bf16, O, bf16>;
    extern __shared__ __align__(16) bf16 tiles[];
    bf16 *q = tiles, *k = q + ROWS * pitch<D>, *v = k + 2 * KEYS * pitch<D>;
    const int64_t num_items = a.b * a.num_heads, item = blockIdx.x % num_items;
    const int s0 = (int)((a.s - 1) / ROWS - blockIdx.x / num_items) * ROWS;
    const head<ARGS> h(a, item / a.num_heads, item % a.num_heads);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int64_t s = s0 + warp * 16 + lane / 4; /* and s + 8 */
    const int64_t q_stride = a.b * a.num_heads * a.d, k_stride = a.b * a.num_groups * a.d;
    const int end = (int)h.key_end(s0, ROWS), d = (int)a.d;
    const span spans[2] = {span_of(h, s), span_of(h, s + 8)};
    const float scale = a.scale * LOG2_E;
    softmax_rows rows = {{-INFINITY, -INFINITY}, {0.0f, 0.0f}};
    float out[D / 8][4];

    load_tile<D>(q, a.q + h.query_element(0), q_stride, s0, ROWS, (int)a.s, d);
    load_tile<D>(k, a.k + h.key_element(0), k_stride, 0, KEYS, end, d);
    load_tile<D>(v, a.v + h.key_element(0), k_stride, 0, KEYS, end, d);
    commit_loads();
    clear(out);
    if (a.merge) {
        resume<D>(h, s, rows, out);
    }
    for (int j0 = 0, slot = 0; j0 < end; j0 += KEYS, slot ^= 1) {
        float score[KEYS / 8][4], factor[2];

        if (j0 + KEYS < end) {
            load_tile<D>(k + (slot ^ 1) * KEYS * pitch<D>, a.k + h.key_element(0), k_stride,
                         j0 + KEYS, KEYS, end, d);
            load_tile<D>(v + (slot ^ 1) * KEYS * pitch<D>, a.v + h.key_element(0), k_stride,
                         j0 + KEYS, KEYS, end, d);
        }
        commit_loads();
        wait_loads<1>();
        multiply_tiles<D, KEYS>(score, q + warp * 16 * pitch<D>, k + slot * KEYS * pitch<D>);
        softmax_step<KEYS>(score, rows, factor, spans, j0, scale);
#pragma unroll
        for (int n = 0; n < D / 8; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                out[n][i] *= factor[i / 2];
            }
        }
        if (a.dropout.p > 0.0f) {
            drop<ARGS, KEYS>(score, h, s, j0);
        }
        add_product<D, KEYS>(out, score, v + slot * KEYS * pitch<D>);
        __syncthreads();
    }
    write_rows<D>(h, s, rows, out);
}

/* ---- backward: the formulas are in attention_cuda.cu ---- */

constexpr int STEP = 32; /* keys of a tile of d_q, queries of a tile of d_k and d_v */

/* delta [B,A,S] = d_out . out; a warp a row. */
template <class ARGS> __global__ void __launch_bounds__(THREADS) delta_kernel(ARGS a)
{
    const int64_t i = (int64_t)blockIdx.x * WARPS + threadIdx.x / 32;
    const int64_t item = i / a.s, s = i % a.s;
    float sum = 0.0f;

    if (item >= a.b * a.num_heads) {
        return;
    }
    const head<ARGS> h(a, item / a.num_heads, item % a.num_heads);

    for (int64_t column = threadIdx.x % 32; column < a.d; column += 32) {
        sum += to_float(a.out[h.query_element(s) + column]) *
               to_float(a.d_out[h.query_element(s) + column]);
    }
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) {
        a.delta[h.row(s)] = sum;
    }
}

/* x [16, D] times factor to rows row and row + 8 of a gradient; element(row): its first element. */
template <int D, class ARGS, class G, class F>
__device__ inline void put_rows(const ARGS &a, G *gradient, const float (&x)[D / 8][4],
                                float factor, int64_t row, int64_t num_rows, F element)
{
    const int c = threadIdx.x % 4 * 2;

#pragma unroll
    for (int r = 0; r < 2; r++) {
        if (row + 8 * r < num_rows) {
#pragma unroll
            for (int n = 0; n < D / 8; n++) {
                const int64_t at = element(row + 8 * r) + n * 8 + c;

                if (n * 8 + c < a.d) {
                    attention_put(a, gradient, at, factor * x[n][2 * r]);
                    attention_put(a, gradient, at + 1, factor * x[n][2 * r + 1]);
                }
            }
        }
    }
}

/* Block: ROWS queries of a head. */
template <int D, class G>
__global__ void __launch_bounds__(THREADS) d_q_kernel(attention_args<bf16, bf16, G> a)
{
    using ARGS = attention_args<bf16, bf16, G>;
    extern __shared__ __align__(16) bf16 tiles[];
    bf16 *q = tiles, *d_out = q + ROWS * pitch<D>, *k = d_out + ROWS * pitch<D>;
    bf16 *v = k + 2 * STEP * pitch<D>;
    const int64_t num_items = a.b * a.num_heads, item = blockIdx.x % num_items;
    const int s0 = (int)((a.s - 1) / ROWS - blockIdx.x / num_items) * ROWS;
    const head<ARGS> h(a, item / a.num_heads, item % a.num_heads);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, c = lane % 4 * 2;
    const int64_t s = s0 + warp * 16 + lane / 4; /* and s + 8 */
    const int64_t q_stride = a.b * a.num_heads * a.d, k_stride = a.b * a.num_groups * a.d;
    const int end = (int)h.key_end(s0, ROWS), d = (int)a.d;
    const span spans[2] = {span_of(h, s), span_of(h, s + 8)};
    const float scale = a.scale * LOG2_E, factor = h.kept_factor();
    float lse[2], delta[2], d_q[D / 8][4];

    load_tile<D>(q, a.q + h.query_element(0), q_stride, s0, ROWS, (int)a.s, d);
    load_tile<D>(d_out, a.d_out + h.query_element(0), q_stride, s0, ROWS, (int)a.s, d);
    load_tile<D>(k, a.k + h.key_element(0), k_stride, 0, STEP, end, d);
    load_tile<D>(v, a.v + h.key_element(0), k_stride, 0, STEP, end, d);
    commit_loads();
    clear(d_q);
#pragma unroll
    for (int r = 0; r < 2; r++) {
        lse[r] = s + 8 * r < a.s ? a.lse[h.row(s + 8 * r)] * LOG2_E : 0.0f;
        delta[r] = s + 8 * r < a.s ? a.delta[h.row(s + 8 * r)] : 0.0f;
    }
    for (int j0 = 0, slot = 0; j0 < end; j0 += STEP, slot ^= 1) {
        float p[STEP / 8][4], d_p[STEP / 8][4];

        if (j0 + STEP < end) {
            load_tile<D>(k + (slot ^ 1) * STEP * pitch<D>, a.k + h.key_element(0), k_stride,
                         j0 + STEP, STEP, end, d);
            load_tile<D>(v + (slot ^ 1) * STEP * pitch<D>, a.v + h.key_element(0), k_stride,
                         j0 + STEP, STEP, end, d);
        }
        commit_loads();
        wait_loads<1>();
        multiply_tiles<D, STEP>(p, q + warp * 16 * pitch<D>, k + slot * STEP * pitch<D>);
        multiply_tiles<D, STEP>(d_p, d_out + warp * 16 * pitch<D>, v + slot * STEP * pitch<D>);
        if (a.dropout.p > 0.0f) {
            drop<ARGS, STEP>(d_p, h, s, j0);
        }
#pragma unroll
        for (int n = 0; n < STEP / 8; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                p[n][i] =
                    spans[i / 2].has(j0 + n * 8 + c + i % 2)
                        ? exp2f(p[n][i] * scale - lse[i / 2]) * (factor * d_p[n][i] - delta[i / 2])
                        : 0.0f;
            }
        }
        add_product<D, STEP>(d_q, p, k + slot * STEP * pitch<D>);
        __syncthreads();
    }
    put_rows<D>(a, a.d_q, d_q, a.scale, s, a.s, [&](int64_t i) { return h.query_element(i); });
}

/* What a tile of queries needs beside q and d_out. */
struct query_facts {
    float lse[STEP], delta[STEP];
    span spans[STEP];
};

template <int D, class ARGS>
__device__ inline void load_queries(const ARGS &a, const head<ARGS> &h, bf16 *q, bf16 *d_out,
                                    query_facts *facts, int s0)
{
    const int64_t stride = a.b * a.num_heads * a.d;

    load_tile<D>(q, a.q + h.query_element(0), stride, s0, STEP, (int)a.s, (int)a.d);
    load_tile<D>(d_out, a.d_out + h.query_element(0), stride, s0, STEP, (int)a.s, (int)a.d);
    if (threadIdx.x < STEP) {
        const int64_t s = s0 + threadIdx.x;

        facts->lse[threadIdx.x] = s < a.s ? a.lse[h.row(s)] * LOG2_E : 0.0f;
        facts->delta[threadIdx.x] = s < a.s ? a.delta[h.row(s)] : 0.0f;
        facts->spans[threadIdx.x] = span_of(h, s);
    }
}

/* Block: ROWS keys of a group, over all its heads and the queries that see them; scores are held
 * transposed, a row a key. Keys from kv_length on get zeros. */
template <int D, class G>
__global__ void __launch_bounds__(THREADS) d_kv_kernel(attention_args<bf16, bf16, G> a)
{
    using ARGS = attention_args<bf16, bf16, G>;
    extern __shared__ __align__(16) bf16 tiles[];
    __shared__ query_facts facts[2];
    bf16 *k = tiles, *v = k + ROWS * pitch<D>, *q = v + ROWS * pitch<D>;
    bf16 *d_out = q + 2 * STEP * pitch<D>;
    const int64_t num_items = a.b * a.num_groups, item = blockIdx.x % num_items;
    const int64_t batch = item / a.num_groups, group = item % a.num_groups;
    const int j0 = (int)(blockIdx.x / num_items) * ROWS;
    const int per_group = (int)(a.num_heads / a.num_groups);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, c = lane % 4 * 2;
    const int j = j0 + warp * 16 + lane / 4; /* and j + 8 */
    const int64_t before = a.causal ? j0 + a.k_start - a.q_start : 0,
                  k_stride = a.b * a.num_groups * a.d;
    const int first = before > 0 ? (int)before / STEP * STEP : 0;
    const int per_head = first < a.s ? ((int)a.s - first + STEP - 1) / STEP : 0;
    const int num_steps = j0 < a.kv_length ? per_group * per_head : 0;
    const head<ARGS> any(a, batch, group * per_group);
    const float scale = a.scale * LOG2_E, factor = any.kept_factor();
    float d_k[D / 8][4], d_v[D / 8][4];

    clear(d_k);
    clear(d_v);
    load_tile<D>(k, a.k + any.key_element(0), k_stride, j0, ROWS, (int)a.kv_length, (int)a.d);
    load_tile<D>(v, a.v + any.key_element(0), k_stride, j0, ROWS, (int)a.kv_length, (int)a.d);
    if (num_steps > 0) {
        load_queries<D>(a, any, q, d_out, &facts[0], first);
    }
    commit_loads();
    for (int step = 0; step < num_steps; step++) {
        const int slot = step % 2, s0 = first + step % per_head * STEP;
        const head<ARGS> h(a, batch, group * per_group + step / per_head);
        const query_facts &tile = facts[slot];
        float p[STEP / 8][4], d_score[STEP / 8][4];

        if (step + 1 < num_steps) {
            const head<ARGS> next(a, batch, group * per_group + (step + 1) / per_head);

            load_queries<D>(a, next, q + (slot ^ 1) * STEP * pitch<D>,
                            d_out + (slot ^ 1) * STEP * pitch<D>, &facts[slot ^ 1],
                            first + (step + 1) % per_head * STEP);
        }
        commit_loads();
        wait_loads<1>();
        multiply_tiles<D, STEP>(p, k + warp * 16 * pitch<D>, q + slot * STEP * pitch<D>);
        multiply_tiles<D, STEP>(d_score, v + warp * 16 * pitch<D>, d_out + slot * STEP * pitch<D>);
#pragma unroll
        for (int n = 0; n < STEP / 8; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int column = n * 8 + c + i % 2, key = j + i / 2 * 8;
                const float kept = a.dropout.p == 0.0f || h.keeps(s0 + column, key) ? 1.0f : 0.0f;
                const float e =
                    tile.spans[column].has(key) ? exp2f(p[n][i] * scale - tile.lse[column]) : 0.0f;

                d_score[n][i] = e * (factor * kept * d_score[n][i] - tile.delta[column]);
                p[n][i] = e * kept;
            }
        }
        add_product<D, STEP>(d_v, p, d_out + slot * STEP * pitch<D>);
        add_product<D, STEP>(d_k, d_score, q + slot * STEP * pitch<D>);
        __syncthreads();
    }
    put_rows<D>(a, a.d_k, d_k, a.scale, j, a.s_kv, [&](int64_t i) { return any.key_element(i); });
    put_rows<D>(a, a.d_v, d_v, factor, j, a.s_kv, [&](int64_t i) { return any.key_element(i); });
}

/* ---- calls ---- */

bool takes(const struct attention *op)
{
    const int64_t d = op->q->dim[3];

    return op->q->dtype == DTYPE_BF16 && d % 8 == 0 && d <= 128 &&
           packable(d, {op->q, op->k, op->v});
}

/* num_rows: rows of D elements in the tiles. */
template <class ARGS>
void launch(struct stream *stream, void (*kernel)(ARGS), const ARGS &a, int64_t num_items,
            int64_t length, int num_rows, int row_elements)
{
    const int shared_bytes = num_rows * row_elements * (int)sizeof(bf16);

    CUDA_CHECK(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
    LAUNCH(stream, kernel, num_items * ceil_div(length, ROWS), THREADS, shared_bytes, a);
}

template <int D, class O> void forward(struct stream *stream, const struct attention *op)
{
    const auto a = attention_args_of<bf16, O, bf16>(op);

    launch(stream, forward_kernel<D, O>, a, a.b * a.num_heads, a.s, ROWS + 4 * KEYS, pitch<D>);
}

template <int D, class G> void backward(struct stream *stream, const struct attention_backward *op)
{
    using ARGS = attention_args<bf16, bf16, G>;
    ARGS a = attention_args_of<bf16, bf16, G>(&op->forward);
    const int64_t num_rows = a.b * a.num_heads * a.s;

    a.d_out = data_of<bf16>(op->d_out);
    a.d_q = data_of<G>(op->d_q);
    a.d_k = data_of<G>(op->d_k);
    a.d_v = data_of<G>(op->d_v);
    a.accumulate = op->accumulate;
    a.delta = (float *)arena_allocate(stream->scratch, (size_t)num_rows * 4);
    LAUNCH(stream, delta_kernel<ARGS>, ceil_div(num_rows, WARPS), THREADS, 0, a);
    launch(stream, d_q_kernel<D, G>, a, a.b * a.num_heads, a.s, 2 * ROWS + 4 * STEP, pitch<D>);
    launch(stream, d_kv_kernel<D, G>, a, a.b * a.num_groups, a.s_kv, 2 * ROWS + 4 * STEP, pitch<D>);
}

template <class O> void forward_of(struct stream *stream, const struct attention *op)
{
    if (op->q->dim[3] <= 64) {
        forward<64, O>(stream, op);
    } else {
        forward<128, O>(stream, op);
    }
}

template <class G> void backward_of(struct stream *stream, const struct attention_backward *op)
{
    if (op->forward.q->dim[3] <= 64) {
        backward<64, G>(stream, op);
    } else {
        backward<128, G>(stream, op);
    }
}

} // namespace

bool attention_forward_mma(struct stream *stream, const struct attention *op)
{
    if (!takes(op)) {
        return false;
    }
    if (op->out->dtype == DTYPE_F32) {
        forward_of<float>(stream, op);
    } else {
        forward_of<bf16>(stream, op);
    }
    return true;
}

bool attention_backward_mma(struct stream *stream, const struct attention_backward *op)
{
    if (!takes(&op->forward) || !packable(op->d_out->dim[3], {op->d_out})) {
        return false;
    }
    if (op->d_q->dtype == DTYPE_F32) {
        backward_of<float>(stream, op);
    } else {
        backward_of<bf16>(stream, op);
    }
    return true;
}
