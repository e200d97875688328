/* Products of the experts' rows on Hopper's matrix units: one persistent kernel for all experts,
 * whose numbers of rows it reads on the device.
 *
 * A block owns a multiprocessor. Its first warpgroup (the producer) brings tiles of A and B into a
 * ring of shared memory, by the copy engine, or where the rows of A are gathered by 128 threads,
 * 16 bytes each; two warpgroups (the consumers) multiply, 64 x 256 each, accumulators in registers.
 * Two blocks of a cluster work on neighbouring tiles of M: each brings half of the tile of B for
 * both.
 *
 * Two shapes. TOGETHER: the consumers share a tile of 128 x 256, which reads shared memory least.
 * TAKE_TURNS: each has its own tile of 64 x 256 and multiplies while the other one stores, for a
 * heavy end (SwiGLU backward) or a short depth. shape_of() chooses.
 *
 * Ragged rows need no padding: a tile that runs over the end of its expert computes rows of the
 * next one, which are not stored. */
#include "ops/activation_cuda.cuh"
#include "ops/grouped_matmul_cuda.cuh"
#include "ops/grouped_schedule_cuda.cuh"

enum {
    TILE_N = 256,
    TILE_K = 64, /* 128 bytes of bf16: the width of the swizzle */
    THREADS = 384,
    BOX_BYTES = 64 * TILE_K * 2, /* 64 rows of a tile by the copy engine */
    B_BYTES = TILE_N * TILE_K * 2,
    STAGING_BYTES = 16 * 64 * 2, /* of a consumer warp: 16 rows of 64 columns on their way out */
    RASTER_ROWS = 2048,          /* see struct tile_grid */
    TURN_BARRIER = 1,            /* and 2: of each consumer */
};

enum shape { TOGETHER, TAKE_TURNS };

template <enum shape S> struct sizes {
    static constexpr int tile_m = S == TOGETHER ? 128 : 64;
    static constexpr int num_slots = S == TOGETHER ? 4 : 5;
    static constexpr int a_bytes = tile_m * TILE_K * 2;
    static constexpr int slot_bytes = a_bytes + B_BYTES;
    static constexpr int shared_bytes = 1024 + num_slots * slot_bytes + 8 * STAGING_BYTES;
};

/* What a product is for: where B lies, and what becomes of a tile. */
enum product {
    PRODUCT_FC1,    /* B [E,2F,K]: gate and up side by side in a tile; stores h and a */
    PRODUCT_ROWS,   /* B [E,N,K] */
    PRODUCT_ROWS_T, /* B [E,K,N] */
    PRODUCT_D_FC2,  /* B [E,K,N]; derivative of SwiGLU, stores d_h and a */
};

struct rows_args {
    struct tile_grid grid;
    int n, k; /* n: width of an output row (F for FC1 and D_FC2) */
    int num_rows;
    const bf16 *x; /* gathered A: rows of width k that row_token names */
    const int32_t *row_token;
    bf16 *out, *a; /* out: y, h or d_h */
    const bf16 *h; /* D_FC2 */
    const float *row_prob;
    float *prob_partial; /* D_FC2: [tiles of N, R] */
};

template <enum shape S> struct rows_ring {
    char *slots;
    uint64_t *full, *empty;

    __device__ char *a(int slot) const
    {
        return slots + slot * sizes<S>::slot_bytes;
    }

    __device__ char *b(int slot) const
    {
        return a(slot) + sizes<S>::a_bytes;
    }
};

/* ---- the producer ---- */

/* For this block, or for both of the cluster. */
__device__ inline void load_box(char *to, const CUtensorMap *map, uint64_t *full, int x, int y,
                                const struct tile &tile)
{
    if (tile.shares_b) {
        tma_load_3d_both(to, map, full, x, y, tile.expert);
    } else {
        tma_load_3d(to, map, full, x, y, tile.expert);
    }
}

/* Half `i` of block k of a tile of B. */
template <enum product P>
__device__ inline void load_half(char *to, const CUtensorMap *map, uint64_t *full,
                                 const struct rows_args &args, const struct tile &tile, int k,
                                 int i)
{
    const int n = tile.n * TILE_N;

    to += i * (B_BYTES / 2);
    if constexpr (P == PRODUCT_FC1 || P == PRODUCT_ROWS) {
        const int row = P == PRODUCT_FC1 ? i * args.n + n / 2 : n + i * (TILE_N / 2);

        load_box(to, map, full, k * TILE_K, row, tile);
    } else {
        for (int j = 0; j < TILE_N / 128; j++) {
            load_box(to + j * BOX_BYTES, map, full, n + i * (TILE_N / 2) + j * 64, k * TILE_K,
                     tile);
        }
    }
}

/* The copy engine's share of block k of a tile. */
template <enum product P, enum shape S, bool GATHER>
__device__ inline void load_block(const struct rows_ring<S> &ring, int slot,
                                  const CUtensorMap *map_a, const CUtensorMap *map_b,
                                  const struct rows_args &args, const struct tile &tile, int k)
{
    uint64_t *full = &ring.full[slot];

    barrier_expect(full, GATHER ? B_BYTES : sizes<S>::slot_bytes);
    if (!GATHER) {
        tma_load_2d(ring.a(slot), map_a, full, k * TILE_K,
                    tile.first_row + tile.m * sizes<S>::tile_m);
    }
    if (tile.shares_b) {
        load_half<P>(ring.b(slot), map_b, full, args, tile, k, cluster_rank());
    } else {
        load_half<P>(ring.b(slot), map_b, full, args, tile, k, 0);
        load_half<P>(ring.b(slot), map_b, full, args, tile, k, 1);
    }
}

/* Pieces of 16 bytes of A by each of 128 threads: piece thread % 8 of rows thread / 8 + 16 i. */
template <enum shape S> struct gathered_rows {
    static constexpr int count = sizes<S>::tile_m / 16;
    uint32_t piece[count]; /* where the token begins, in pieces from the beginning of x */

    /* Rows beyond the expert's last are not stored: any row does. */
    __device__ void find(const struct rows_args &args, const struct tile &tile)
    {
        const int end = tile.first_row + tile.num_rows;
        const int first = tile.first_row + tile.m * sizes<S>::tile_m + threadIdx.x / 8;

#pragma unroll
        for (int i = 0; i < count; i++) {
            piece[i] =
                (uint32_t)args.row_token[min(first + 16 * i, end - 1)] * (uint32_t)(args.k / 8);
        }
    }

    __device__ void copy(const struct rows_args &args, char *a, int k) const
    {
        const int row = threadIdx.x / 8, column = threadIdx.x % 8, at = k * (TILE_K / 8) + column;
        const int num_bytes = at < args.k / 8 ? 16 : 0;
        char *to = a + row * 128 + ((column ^ row % 8) << 4);

#pragma unroll
        for (int i = 0; i < count; i++) {
            const uint64_t from = num_bytes > 0 ? piece[i] + (uint64_t)at : 0;

            copy_async(to + i * 2048, args.x + from * 8, num_bytes);
        }
    }
};

/* While block `k` of a tile's depth is multiplied, a share of the h that its end reads comes into
 * the L2 cache. */
template <enum shape S>
__device__ inline void prefetch_share(const struct rows_args &args, const struct tile &tile, int k,
                                      int num_blocks)
{
    constexpr int tile_m = sizes<S>::tile_m;
    const int share = (tile_m + num_blocks - 1) / num_blocks, column = tile.n * TILE_N;
    const int end = min(min((k + 1) * share, tile_m), tile.num_rows - tile.m * tile_m);
    const int num_bytes = min(TILE_N, args.n - column) * 2;

    for (int row = k * share; row < end && num_bytes > 0; row++) {
        const bf16 *gate =
            args.h + (tile.first_row + tile.m * tile_m + row) * 2 * (int64_t)args.n + column;

        prefetch(gate, num_bytes);
        prefetch(gate + args.n, num_bytes);
    }
}

__device__ inline int num_blocks_k(const struct rows_args &args)
{
    return (args.k + TILE_K - 1) / TILE_K;
}

template <enum product P, enum shape S, bool GATHER>
__device__ inline void produce(const struct rows_ring<S> &ring, const struct schedule &schedule,
                               const CUtensorMap *map_a, const CUtensorMap *map_b,
                               const struct rows_args &args)
{
    const int num = num_units(schedule, args.grid), rank = cluster_rank();
    const int num_blocks = num_blocks_k(args);
    struct ring_position<sizes<S>::num_slots> at = {
        0, 1
    }; /* the first slots are empty */

    for (int unit = blockIdx.x / 2; unit < num; unit += gridDim.x / 2) {
        const struct tile tile = tile_at(schedule, args.grid, unit, rank);
        struct gathered_rows<S> rows;

        if (GATHER) {
            rows.find(args, tile);
        }
        for (int k = 0; k < num_blocks; k++) {
            barrier_wait(&ring.empty[at.slot], at.parity);
            if (threadIdx.x == 0) {
                load_block<P, S, GATHER>(ring, at.slot, map_a, map_b, args, tile, k);
            }
            if (GATHER) {
                rows.copy(args, ring.a(at.slot), k);
                barrier_arrive_after_copies(&ring.full[at.slot]);
            }
            if (P == PRODUCT_D_FC2 && threadIdx.x == 0) {
                prefetch_share<S>(args, tile, k, num_blocks);
            }
            at.advance();
        }
    }
}

/* ---- the product ---- */

/* The accumulators of one tile of the calling consumer. A turn is passed on once the last block is
 * in the matrix units' queue. */
template <enum product P, enum shape S, bool GATHER>
__device__ inline void multiply(float (&acc)[128], const struct rows_ring<S> &ring,
                                struct ring_position<sizes<S>::num_slots> &at, int consumer,
                                int num_blocks)
{
    constexpr bool b_by_rows = P == PRODUCT_ROWS_T || P == PRODUCT_D_FC2;
    /* 16 of k further: 32 bytes along a line, or 16 lines */
    constexpr uint64_t a_step = 32 >> 4, b_step = (b_by_rows ? 2048 : 32) >> 4;
    const int a_offset = S == TOGETHER ? consumer * BOX_BYTES : 0;
    int previous = 0;

    for (int k = 0; k < num_blocks; k++) {
        uint64_t a, b;

        barrier_wait(&ring.full[at.slot], at.parity);
        if (GATHER) {
            fence_async();
        }
        a = tile_descriptor<false>(ring.a(at.slot) + a_offset, BOX_BYTES);
        b = tile_descriptor<b_by_rows>(ring.b(at.slot), BOX_BYTES);
        wgmma_begin();
#pragma unroll
        for (int i = 0; i < TILE_K / 16; i++) {
            wgmma<false, b_by_rows>(acc, a + i * a_step, b + i * b_step, k > 0 || i > 0);
        }
        wgmma_commit();
        wgmma_wait<1>(); /* the block before is done */
        if (k > 0) {
            slot_release(&ring.empty[previous]);
        }
        previous = at.slot;
        at.advance();
    }
    if (S == TAKE_TURNS) {
        named_barrier_arrive(TURN_BARRIER + 1 - consumer, 256);
    }
    wgmma_wait<0>();
    slot_release(&ring.empty[previous]);
}

/* ---- what becomes of a tile ----
 *
 * A warp owns 16 rows. Accumulator 4 j + 2 i + c of a lane is row lane / 4 + 8 i, column
 * 8 j + 2 (lane % 4) + c. Chunks of 64 columns pass through the warp's staging memory, so that
 * global memory is touched in whole lines; its packs of 16 bytes are swizzled by the row. */

struct warp_rows {
    char *staging;
    int first, end; /* the warp's first row, the expert's last + 1 */
    int lane;

    __device__ uint32_t *pair(int i, int j) const /* of accumulator 4 j + 2 i within the chunk */
    {
        const int row = lane / 4 + 8 * i;

        return (uint32_t *)(staging + row * 128 + ((j ^ (row & 7)) << 4) + lane % 4 * 4);
    }

    __device__ uint4 *pack(int i) const /* of this lane's i-th line of memory */
    {
        const int row = i * 4 + lane / 8;

        return (uint4 *)(staging + row * 128 + ((lane % 8 ^ (row & 7)) << 4));
    }

    /* Element of x [R,stride] that pack(i) holds, or NULL outside the expert or the width. */
    __device__ bf16 *element(const bf16 *x, int i, int64_t stride, int column, int width) const
    {
        const int row = first + i * 4 + lane / 8, at = column + lane % 8 * 8;

        return row < end && at < width ? (bf16 *)x + row * stride + at : NULL;
    }
};

/* 64 columns of the warp's rows from staging memory to columns [column, ...) of x, which end at
 * `width`, counted from column `base` of a row. */
__device__ inline void chunk_store(const struct warp_rows &w, bf16 *x, int64_t stride, int base,
                                   int column, int width)
{
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 4; i++) {
        bf16 *to = w.element(x + base, i, stride, column, width);

        if (to != NULL) {
            *(uint4 *)to = *w.pack(i);
        }
    }
    __syncwarp();
}

__device__ inline uint32_t pair_of(float x, float y)
{
    const __nv_bfloat162 pair = __floats2bfloat162_rn(x, y);

    return *(const uint32_t *)&pair;
}

__device__ inline float2 floats_of(uint32_t pair)
{
    return __bfloat1622float2(*(const __nv_bfloat162 *)&pair);
}

__device__ inline void store_rows(const float (&acc)[128], const struct warp_rows &w,
                                  const rows_args &args, const struct tile &tile)
{
#pragma unroll
    for (int chunk = 0; chunk < 4; chunk++) {
#pragma unroll
        for (int j = 0; j < 8; j++) {
            *w.pair(0, j) = pair_of(acc[(chunk * 8 + j) * 4], acc[(chunk * 8 + j) * 4 + 1]);
            *w.pair(1, j) = pair_of(acc[(chunk * 8 + j) * 4 + 2], acc[(chunk * 8 + j) * 4 + 3]);
        }
        chunk_store(w, args.out, args.n, 0, tile.n * TILE_N + chunk * 64, args.n);
    }
}

/* The router probabilities of a lane's two rows. */
__device__ inline float row_prob_of(const rows_args &args, const struct warp_rows &w, int i)
{
    const int row = w.first + w.lane / 4 + 8 * i;

    return args.row_prob != NULL && row < w.end ? args.row_prob[row] : 1.0f;
}

/* Accumulators [0, 64) are the gate, [64, 128) the other half. a comes from the rounded h, which is
 * what backward will find. */
__device__ inline void store_fc1(float (&acc)[128], const struct warp_rows &w,
                                 const rows_args &args, const struct tile &tile)
{
    const float prob[2] = {row_prob_of(args, w, 0), row_prob_of(args, w, 1)};

#pragma unroll
    for (int chunk = 0; chunk < 2; chunk++) {
        const int column = tile.n * (TILE_N / 2) + chunk * 64;

#pragma unroll
        for (int j = 0; j < 8; j++) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                *w.pair(i, j) =
                    pair_of(acc[(chunk * 8 + j) * 4 + 2 * i], acc[(chunk * 8 + j) * 4 + 2 * i + 1]);
            }
        }
        chunk_store(w, args.out, 2 * (int64_t)args.n, 0, column, args.n);
#pragma unroll
        for (int j = 0; j < 8; j++) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                *w.pair(i, j) = pair_of(acc[64 + (chunk * 8 + j) * 4 + 2 * i],
                                        acc[64 + (chunk * 8 + j) * 4 + 2 * i + 1]);
            }
        }
        chunk_store(w, args.out, 2 * (int64_t)args.n, args.n, column, args.n);
#pragma unroll
        for (int j = 0; j < 8; j++) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int at = (chunk * 8 + j) * 4 + 2 * i;
                const float2 gate = floats_of(pair_of(acc[at], acc[at + 1]));
                const float2 up = floats_of(pair_of(acc[64 + at], acc[64 + at + 1]));

                *w.pair(i, j) =
                    pair_of(prob[i] * activation_value<ACTIVATION_SWIGLU>(gate.x, up.x),
                            prob[i] * activation_value<ACTIVATION_SWIGLU>(gate.y, up.y));
            }
        }
        chunk_store(w, args.a, args.n, 0, column, args.n);
    }
}

/* 64 columns of h into a lane's pairs, in the order of the accumulators. */
__device__ inline void chunk_load(uint32_t (&pairs)[16], const uint4 (&lines)[4],
                                  const struct warp_rows &w)
{
#pragma unroll
    for (int i = 0; i < 4; i++) {
        *w.pack(i) = lines[i];
    }
    __syncwarp();
#pragma unroll
    for (int j = 0; j < 8; j++) {
        pairs[2 * j] = *w.pair(0, j);
        pairs[2 * j + 1] = *w.pair(1, j);
    }
    __syncwarp();
}

/* One lane's pair: d_a in acc becomes d_gate (returned as a pair); pairs of h become d_up and a. */
__device__ inline uint32_t swiglu_backward(float d0, float d1, uint32_t &gate_pair,
                                           uint32_t &up_pair, float prob, float &d_prob)
{
    const float2 gate = floats_of(gate_pair), up = floats_of(up_pair);
    const struct activation_slopes x = activation_slopes_of<ACTIVATION_SWIGLU>(gate.x, up.x);
    const struct activation_slopes y = activation_slopes_of<ACTIVATION_SWIGLU>(gate.y, up.y);

    d_prob += d0 * x.value + d1 * y.value;
    up_pair = pair_of(prob * d0 * x.d_up, prob * d1 * y.d_up);
    gate_pair = pair_of(prob * x.value, prob * y.value);
    return pair_of(prob * d0 * x.d_x, prob * d1 * y.d_x);
}

__device__ inline void store_d_fc2(float (&acc)[128], const struct warp_rows &w,
                                   const rows_args &args, const struct tile &tile)
{
    const float prob[2] = {row_prob_of(args, w, 0), row_prob_of(args, w, 1)};
    const int64_t stride = 2 * (int64_t)args.n;
    float d_prob[2] = {0.0f, 0.0f};

#pragma unroll
    for (int chunk = 0; chunk < 4; chunk++) {
        const int column = tile.n * TILE_N + chunk * 64;
        uint4 gate_lines[4], up_lines[4];
        uint32_t gate[16], up[16];

#pragma unroll
        for (int i = 0; i < 4; i++) {
            const bf16 *from = w.element(args.h, i, stride, column, args.n);

            gate_lines[i] = from != NULL ? *(const uint4 *)from : make_uint4(0, 0, 0, 0);
            up_lines[i] = from != NULL ? *(const uint4 *)(from + args.n) : make_uint4(0, 0, 0, 0);
        }
        chunk_load(gate, gate_lines, w);
        chunk_load(up, up_lines, w);
#pragma unroll
        for (int j = 0; j < 8; j++) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int at = (chunk * 8 + j) * 4 + 2 * i;

                *w.pair(i, j) = swiglu_backward(acc[at], acc[at + 1], gate[2 * j + i],
                                                up[2 * j + i], prob[i], d_prob[i]);
            }
        }
        chunk_store(w, args.out, stride, 0, column, args.n);
#pragma unroll
        for (int j = 0; j < 8; j++) {
            *w.pair(0, j) = up[2 * j];
            *w.pair(1, j) = up[2 * j + 1];
        }
        chunk_store(w, args.out, stride, args.n, column, args.n);
#pragma unroll
        for (int j = 0; j < 8; j++) {
            *w.pair(0, j) = gate[2 * j];
            *w.pair(1, j) = gate[2 * j + 1];
        }
        chunk_store(w, args.a, args.n, 0, column, args.n);
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int row = w.first + w.lane / 4 + 8 * i;

        d_prob[i] += __shfl_xor_sync(0xffffffffu, d_prob[i], 1);
        d_prob[i] += __shfl_xor_sync(0xffffffffu, d_prob[i], 2);
        if (w.lane % 4 == 0 && row < w.end) {
            args.prob_partial[(int64_t)tile.n * args.num_rows + row] = d_prob[i];
        }
    }
}

template <enum product P, enum shape S, bool GATHER>
__device__ inline void consume(const struct rows_ring<S> &ring, const struct schedule &schedule,
                               char *staging, const struct rows_args &args)
{
    constexpr bool turns = S == TAKE_TURNS;
    const int consumer = threadIdx.x / 128 - 1, warp = threadIdx.x / 32 - 4, rank = cluster_rank();
    const int num = num_units(schedule, args.grid), num_blocks = num_blocks_k(args);
    const int clusters = gridDim.x / 2;

    if (turns && consumer == 1) {
        named_barrier_arrive(TURN_BARRIER, 256);
    }
    for (int i = turns ? consumer : 0;; i += turns ? 2 : 1) { /* the cluster's units in order */
        const int unit = blockIdx.x / 2 + i * clusters;

        if (unit >= num) {
            return;
        }
        const struct tile tile = tile_at(schedule, args.grid, unit, rank);
        const int row = tile.m * sizes<S>::tile_m + (turns ? warp % 4 : warp) * 16;
        const struct warp_rows w = {staging + warp * STAGING_BYTES, tile.first_row + row,
                                    tile.first_row + tile.num_rows, (int)threadIdx.x % 32};
        struct ring_position<sizes<S>::num_slots> at;
        float acc[128];

        at.seek((unsigned)i * (unsigned)num_blocks);
        if (turns) {
            named_barrier_sync(TURN_BARRIER + consumer, 256);
        }
        multiply<P, S, GATHER>(acc, ring, at, consumer, num_blocks);
        if (tile.n >= args.grid.tiles_n) {
            continue;
        }
        if (P == PRODUCT_FC1) {
            store_fc1(acc, w, args, tile);
        } else if (P == PRODUCT_D_FC2) {
            store_d_fc2(acc, w, args, tile);
        } else {
            store_rows(acc, w, args, tile);
        }
    }
}

template <enum product P, enum shape S, bool GATHER>
__global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(THREADS, 1)
    rows_kernel(const __grid_constant__ CUtensorMap map_a,
                const __grid_constant__ CUtensorMap map_b, const struct rows_args args)
{
    extern __shared__ char shared[];
    __shared__ uint64_t full[sizes<S>::num_slots], empty[sizes<S>::num_slots];
    char *aligned = shared + (1024 - shared_address(shared) % 1024) % 1024;
    const struct rows_ring<S> ring = {
        aligned, full, empty
    };
    char *staging = aligned + sizes<S>::num_slots * sizes<S>::slot_bytes;
    int *numbers = (int *)(staging + 8 * STAGING_BYTES);
    const struct schedule schedule = {numbers, numbers + args.grid.num_experts + 1};

    if (threadIdx.x == 0) {
        for (int i = 0; i < sizes<S>::num_slots; i++) {
            barrier_init(&full[i], GATHER ? 129 : 1);
            barrier_init(&empty[i], S == TOGETHER ? 4 : 2);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncwarp();
    schedule_init(schedule, args.grid);
    __syncthreads();
    cluster_sync();
    if (threadIdx.x < 128) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        if (GATHER || threadIdx.x == 0) {
            produce<P, S, GATHER>(ring, schedule, &map_a, &map_b, args);
        }
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
        consume<P, S, GATHER>(ring, schedule, staging, args);
    }
    __syncwarp();
    cluster_sync(); /* the other block may still write here */
}

/* ---- on the host ---- */

/* Turns hide the end of a tile under the other consumer's product, but read more shared memory. */
static enum shape shape_of(enum product product, int64_t depth)
{
#ifdef CADRE_TUNE
    if (getenv("CADRE_SHAPES") != NULL) {
        return getenv("CADRE_SHAPES")[product] == '1' ? TAKE_TURNS : TOGETHER;
    }
#endif
    return product == PRODUCT_D_FC2 || depth < 1024 ? TAKE_TURNS : TOGETHER;
}

template <enum product P, enum shape S, bool GATHER>
static void launch(struct stream *stream, const struct tensor *a, const CUtensorMap &map_b,
                   struct rows_args args)
{
    const int shared_bytes = sizes<S>::shared_bytes + schedule_bytes(args.grid.num_experts);
    const CUtensorMap map_a = tensor_map_of(a, sizes<S>::tile_m);

    CHECK(args.grid.num_experts <= HOPPER_EXPERTS_MAX, "%d experts", args.grid.num_experts);
    args.grid.tile_rows = sizes<S>::tile_m;
    args.grid.raster = RASTER_ROWS / (2 * sizes<S>::tile_m);
    CUDA_CHECK(cudaFuncSetAttribute((rows_kernel<P, S, GATHER>),
                                    cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
    LAUNCH(stream, (rows_kernel<P, S, GATHER>), 2 * num_clusters(), THREADS, shared_bytes, map_a,
           map_b, args);
}

template <enum product P, bool GATHER>
static void shape_launch(struct stream *stream, const struct tensor *a, const CUtensorMap &map_b,
                         const struct rows_args &args)
{
    if (shape_of(P, args.k) == TAKE_TURNS) {
        launch<P, TAKE_TURNS, GATHER>(stream, a, map_b, args);
    } else {
        launch<P, TOGETHER, GATHER>(stream, a, map_b, args);
    }
}

static struct rows_args rows_args_of(const struct tensor *a, const struct tensor *row_token,
                                     const struct tensor *offsets, int64_t n, int64_t tiles_n)
{
    struct rows_args args = {};

    args.grid.offsets = data_of<int32_t>(offsets);
    args.grid.num_experts = (int)offsets->dim[0] - 1;
    args.grid.tiles_n = (int)tiles_n;
    args.n = (int)n;
    args.k = (int)a->dim[1];
    args.num_rows = (int)(row_token != NULL ? row_token : a)->dim[0];
    args.x = data_of<bf16>(a);
    args.row_token = data_of<int32_t>(row_token);
    return args;
}

void hopper_fc1(struct stream *stream, const struct hopper_fc1 *op)
{
    const int64_t width = op->a->dim[1];
    struct rows_args args =
        rows_args_of(op->x, op->row_token, op->offsets, width, ceil_div(width, TILE_N / 2));
    const CUtensorMap weights = tensor_map_of(op->fc1, TILE_N / 2);

    args.out = data_of<bf16>(op->h);
    args.a = data_of<bf16>(op->a);
    args.row_prob = data_of<float>(op->row_prob);
    if (op->row_token != NULL) {
        shape_launch<PRODUCT_FC1, true>(stream, op->x, weights, args);
    } else {
        shape_launch<PRODUCT_FC1, false>(stream, op->x, weights, args);
    }
}

void hopper_rows_matmul(struct stream *stream, const struct grouped_rows *op)
{
    const int64_t width = op->c->dim[1];
    struct rows_args args = rows_args_of(op->a, NULL, op->offsets, width, ceil_div(width, TILE_N));

    args.out = data_of<bf16>(op->c);
    if (op->b_transposed) {
        shape_launch<PRODUCT_ROWS_T, false>(stream, op->a, tensor_map_of(op->b, TILE_K), args);
    } else {
        shape_launch<PRODUCT_ROWS, false>(stream, op->a, tensor_map_of(op->b, TILE_N / 2), args);
    }
}

/* d_row_prob[r] = the sum of its partials, for the rows in use. */
__global__ void prob_sum_kernel(float *d_row_prob, const float *partial, const int32_t *num_used,
                                int num_partials, int num_rows)
{
    const int row = blockIdx.x * blockDim.x + threadIdx.x;
    float sum = 0.0f;

    if (row >= *num_used) {
        return;
    }
    for (int i = 0; i < num_partials; i++) {
        sum += partial[(int64_t)i * num_rows + row];
    }
    d_row_prob[row] = sum;
}

void hopper_d_fc2(struct stream *stream, const struct hopper_d_fc2 *op)
{
    const int64_t width = op->a->dim[1], num_partials = ceil_div(width, TILE_N);
    struct rows_args args =
        rows_args_of(op->d_y, op->d_y_row_token, op->offsets, width, num_partials);
    const CUtensorMap weights = tensor_map_of(op->fc2, TILE_K);

    args.out = data_of<bf16>(op->d_h);
    args.a = data_of<bf16>(op->a);
    args.h = data_of<bf16>(op->h);
    args.row_prob = data_of<float>(op->row_prob);
    args.prob_partial =
        (float *)arena_allocate(stream->scratch, (size_t)(num_partials * args.num_rows) * 4);
    if (op->d_y_row_token != NULL) {
        shape_launch<PRODUCT_D_FC2, true>(stream, op->d_y, weights, args);
    } else {
        shape_launch<PRODUCT_D_FC2, false>(stream, op->d_y, weights, args);
    }
    if (op->d_row_prob != NULL) {
        LAUNCH(stream, prob_sum_kernel, ceil_div(args.num_rows, 256), 256, 0,
               data_of<float>(op->d_row_prob), args.prob_partial,
               args.grid.offsets + args.grid.num_experts, (int)num_partials, args.num_rows);
    }
}
