/* Grouped products on Hopper's matrix units: one persistent kernel for all experts, whose numbers
 * of rows it reads on the device.
 *
 * A block owns a multiprocessor. One thread of its first warpgroup (the producer) brings tiles of A
 * and B into a ring of shared memory by the copy engine (TMA); two warpgroups (the consumers)
 * multiply 64 x 256 each of a tile of 128 x 256 (wgmma, accumulators in registers). A slot of the
 * ring is handed over by two mbarriers: `full` counts the bytes that arrived, `empty` the consumers
 * that are done. While the consumers store one tile, the producer already fetches the next.
 *
 * Ragged rows need no padding. Where rows are the tile's M, a tile that runs over the end of its
 * expert computes rows of the next one, which are not stored. Where rows are the depth (weight
 * gradients), the consumers put zeros over the foreign rows of the expert's last block.
 *
 * Techniques after CUTLASS's warp-specialised kernels and fast.cu (reference/performance.md 3). */
#include <cuda.h>

#include "ops/activation_cuda.cuh"
#include "ops/grouped_matmul_cuda.cuh"

enum {
    TILE_M = 128,
    TILE_N = 256,
    TILE_K = 64, /* 128 bytes of bf16: the width of the swizzle */
    NUM_SLOTS = 4,
    THREADS = 384,
    RASTER =
        8, /* tiles of M that are walked for each tile of N, so that both stay in the L2 cache */
    BOX_BYTES = 64 * TILE_K * 2, /* 64 rows of a tile by the copy engine */
    A_BYTES = TILE_M * TILE_K * 2,
    B_BYTES = TILE_N * TILE_K * 2,
    STAGING_BYTES = 16 * 64 * 2, /* of a consumer warp: 16 rows of 64 columns on their way out */
    SHARED_BYTES = 1024 + NUM_SLOTS * (A_BYTES + B_BYTES) + 8 * STAGING_BYTES,
};

/* What a product is for: where A and B lie, and what becomes of a tile. */
enum product {
    PRODUCT_FC1,     /* A rows, B [E,2F,K]: gate and up side by side in a tile; stores h and a */
    PRODUCT_ROWS,    /* A rows, B [E,N,K]; stores bf16 */
    PRODUCT_ROWS_T,  /* A rows, B [E,K,N]; stores bf16 */
    PRODUCT_D_FC2,   /* A rows, B [E,K,N]; derivative of SwiGLU, stores d_h and a */
    PRODUCT_WEIGHTS, /* A^T and B are rows; adds to f32 */
};

struct hopper_args {
    const int32_t *offsets;
    int num_experts;
    int m, n, k; /* m: of PRODUCT_WEIGHTS; n: width of an output row (F for FC1 and D_FC2) */
    int num_rows;
    bf16 *out, *a; /* out: y, h or d_h */
    const bf16 *h; /* D_FC2 */
    const float *row_prob;
    float *prob_partial; /* D_FC2: [tiles of N, R] */
    float *weights;      /* WEIGHTS */
};

/* ---- the machine's instructions ---- */

__device__ inline uint32_t shared_address(const void *p)
{
    return (uint32_t)__cvta_generic_to_shared(p);
}

__device__ inline void barrier_init(uint64_t *barrier, int count)
{
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
                 "r"(count));
}

__device__ inline void barrier_expect(uint64_t *barrier, int num_bytes)
{
    asm volatile(
        "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
        "r"(num_bytes)
        : "memory");
}

__device__ inline void barrier_arrive(uint64_t *barrier)
{
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
                 : "memory");
}

__device__ inline void barrier_wait(uint64_t *barrier, int parity)
{
    asm volatile("{\n"
                 ".reg .pred p;\n"
                 "again:\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
                 "@p bra done;\n"
                 "bra again;\n"
                 "done:\n"
                 "}\n" ::"r"(shared_address(barrier)),
                 "r"(parity)
                 : "memory");
}

__device__ inline void tma_load_2d(void *to, const CUtensorMap *map, uint64_t *barrier, int x,
                                   int y)
{
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%3, %4}], [%2];" ::"r"(shared_address(to)),
                 "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y)
                 : "memory");
}

__device__ inline void tma_load_3d(void *to, const CUtensorMap *map, uint64_t *barrier, int x,
                                   int y, int z)
{
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%3, %4, %5}], [%2];" ::"r"(shared_address(to)),
                 "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y), "r"(z)
                 : "memory");
}

/* Brings bytes into the L2 cache. Address and number are multiples of 16. */
__device__ inline void prefetch(const void *from, int num_bytes)
{
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(num_bytes)
                 : "memory");
}

__device__ inline void wgmma_begin(void)
{
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ inline void wgmma_commit(void)
{
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

template <int PENDING> __device__ inline void wgmma_wait(void)
{
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

/* A tile in shared memory as wgmma reads it, 128-byte swizzle. Along k (64 elements a line): groups
 * of 8 lines, 1024 bytes apart. By rows (a line is one k, 64 of M or N): groups of 8 k, 1024
 * bytes apart, and boxes of 64 of M or N, BOX_BYTES apart. */
template <bool BY_ROWS> __device__ inline uint64_t tile_descriptor(const void *tile)
{
    const uint64_t address = (shared_address(tile) & 0x3ffff) >> 4;
    const uint64_t leading = BY_ROWS ? BOX_BYTES >> 4 : 1, stride = 1024 >> 4;

    return address | leading << 16 | stride << 32 | (uint64_t)1 << 62;
}

/* d [64,256] (+)= a [64,16] b [16,256]. */
template <bool A_BY_ROWS, bool B_BY_ROWS>
__device__ inline void wgmma(float (&d)[128], uint64_t a, uint64_t b, bool add)
{
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "setp.ne.b32 p, %130, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
        "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
        "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
        "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, "
        "%111, "
        "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, "
        "%127"
        "}, %128, %129, p, 1, 1, %131, %132;\n"
        "}\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),
          "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]),
          "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]),
          "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]),
          "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]),
          "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]),
          "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]),
          "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]),
          "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]),
          "+f"(d[63]), "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67]), "+f"(d[68]), "+f"(d[69]),
          "+f"(d[70]), "+f"(d[71]), "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75]), "+f"(d[76]),
          "+f"(d[77]), "+f"(d[78]), "+f"(d[79]), "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83]),
          "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87]), "+f"(d[88]), "+f"(d[89]), "+f"(d[90]),
          "+f"(d[91]), "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95]), "+f"(d[96]), "+f"(d[97]),
          "+f"(d[98]), "+f"(d[99]), "+f"(d[100]), "+f"(d[101]), "+f"(d[102]), "+f"(d[103]),
          "+f"(d[104]), "+f"(d[105]), "+f"(d[106]), "+f"(d[107]), "+f"(d[108]), "+f"(d[109]),
          "+f"(d[110]), "+f"(d[111]), "+f"(d[112]), "+f"(d[113]), "+f"(d[114]), "+f"(d[115]),
          "+f"(d[116]), "+f"(d[117]), "+f"(d[118]), "+f"(d[119]), "+f"(d[120]), "+f"(d[121]),
          "+f"(d[122]), "+f"(d[123]), "+f"(d[124]), "+f"(d[125]), "+f"(d[126]), "+f"(d[127])
        : "l"(a), "l"(b), "r"(add ? 1 : 0), "n"(A_BY_ROWS ? 1 : 0), "n"(B_BY_ROWS ? 1 : 0));
}

/* ---- which tiles there are ---- */

/* In shared memory, by the whole block: the experts' rows and the number of tiles before each. */
struct schedule {
    int first_row[1025], first_tile[1025];
};

struct tile {
    int expert, m, n, first_row, num_rows; /* m, n: tile coordinates; num_rows: of the expert */
};

template <enum product P> __device__ inline int num_tiles_n(const hopper_args &args)
{
    const int width = P == PRODUCT_FC1 ? TILE_N / 2 : TILE_N;

    return (args.n + width - 1) / width;
}

template <enum product P> __device__ inline int num_tiles_m(const hopper_args &args, int num_rows)
{
    if (P == PRODUCT_WEIGHTS) {
        return num_rows > 0 ? (args.m + TILE_M - 1) / TILE_M : 0;
    }
    return (num_rows + TILE_M - 1) / TILE_M;
}

template <enum product P>
__device__ inline void schedule_init(struct schedule *schedule, const hopper_args &args)
{
    const int lane = threadIdx.x, tiles_n = num_tiles_n<P>(args);
    int before = 0;

    if (threadIdx.x >= 32) {
        return;
    }
    for (int begin = 0; begin < args.num_experts; begin += 32) {
        const int e = begin + lane;
        const int first = e < args.num_experts ? args.offsets[e] : 0;
        const int end = e < args.num_experts ? args.offsets[e + 1] : first;
        const int count = num_tiles_m<P>(args, end - first) * tiles_n;
        int prefix = count;

        for (int distance = 1; distance < 32; distance *= 2) {
            const int other = __shfl_up_sync(0xffffffffu, prefix, distance);

            prefix += lane >= distance ? other : 0;
        }
        if (e < args.num_experts) {
            schedule->first_row[e + 1] = end;
            schedule->first_tile[e + 1] = before + prefix;
        }
        before += __shfl_sync(0xffffffffu, prefix, 31);
    }
    if (lane == 0) {
        schedule->first_row[0] = args.offsets[0];
        schedule->first_tile[0] = 0;
    }
}

template <enum product P>
__device__ inline struct tile tile_at(const struct schedule *schedule, const hopper_args &args,
                                      int index)
{
    const int tiles_n = num_tiles_n<P>(args);
    int low = 0, high = args.num_experts; /* first_tile[low] <= index < first_tile[high] */
    struct tile tile;
    int tiles_m, group, group_size;

    while (high - low > 1) {
        const int middle = (low + high) / 2;

        if (schedule->first_tile[middle] <= index) {
            low = middle;
        } else {
            high = middle;
        }
    }
    tile.expert = low;
    tile.first_row = schedule->first_row[low];
    tile.num_rows = schedule->first_row[low + 1] - tile.first_row;
    tiles_m = (schedule->first_tile[low + 1] - schedule->first_tile[low]) / tiles_n;
    index -= schedule->first_tile[low];
    group = index / (RASTER * tiles_n);
    index -= group * RASTER * tiles_n;
    group_size = min(RASTER, tiles_m - group * RASTER);
    tile.m = group * RASTER + index % group_size;
    tile.n = index / group_size;
    return tile;
}

/* Blocks of TILE_K of a tile's depth. */
template <enum product P>
__device__ inline int num_blocks_k(const hopper_args &args, const struct tile &tile)
{
    return ((P == PRODUCT_WEIGHTS ? tile.num_rows : args.k) + TILE_K - 1) / TILE_K;
}

/* ---- the ring of shared memory ---- */

struct ring {
    char *slots;
    uint64_t *full, *empty;

    __device__ char *a(int slot) const
    {
        return slots + slot * (A_BYTES + B_BYTES);
    }

    __device__ char *b(int slot) const
    {
        return a(slot) + A_BYTES;
    }
};

/* Brings block `k` of a tile into a slot. */
template <enum product P>
__device__ inline void load_block(const struct ring &ring, int slot, const CUtensorMap *map_a,
                                  const CUtensorMap *map_b, const hopper_args &args,
                                  const struct tile &tile, int k)
{
    uint64_t *full = &ring.full[slot];
    char *a = ring.a(slot), *b = ring.b(slot);
    const int n = tile.n * TILE_N;

    barrier_expect(full, A_BYTES + B_BYTES);
    if (P == PRODUCT_WEIGHTS) {
        const int row = tile.first_row + k * TILE_K;

        for (int i = 0; i < TILE_M / 64; i++) {
            tma_load_2d(a + i * BOX_BYTES, map_a, full, tile.m * TILE_M + i * 64, row);
        }
        for (int i = 0; i < TILE_N / 64; i++) {
            tma_load_2d(b + i * BOX_BYTES, map_b, full, n + i * 64, row);
        }
        return;
    }
    tma_load_2d(a, map_a, full, k * TILE_K, tile.first_row + tile.m * TILE_M);
    if (P == PRODUCT_FC1) {
        tma_load_3d(b, map_b, full, k * TILE_K, n / 2, tile.expert);
        tma_load_3d(b + B_BYTES / 2, map_b, full, k * TILE_K, args.n + n / 2, tile.expert);
    } else if (P == PRODUCT_ROWS) {
        tma_load_3d(b, map_b, full, k * TILE_K, n, tile.expert);
    } else {
        for (int i = 0; i < TILE_N / 64; i++) {
            tma_load_3d(b + i * BOX_BYTES, map_b, full, n + i * 64, k * TILE_K, tile.expert);
        }
    }
}

/* While block `k` of a tile's depth is multiplied, a share of the h that its end reads comes into
 * the L2 cache. */
__device__ inline void prefetch_share(const hopper_args &args, const struct tile &tile, int k,
                                      int num_blocks)
{
    const int share = (TILE_M + num_blocks - 1) / num_blocks, column = tile.n * TILE_N;
    const int end = min(min((k + 1) * share, TILE_M), tile.num_rows - tile.m * TILE_M);
    const int num_bytes = min(TILE_N, args.n - column) * 2;

    for (int row = k * share; row < end; row++) {
        const bf16 *gate =
            args.h + (tile.first_row + tile.m * TILE_M + row) * 2 * (int64_t)args.n + column;

        prefetch(gate, num_bytes);
        prefetch(gate + args.n, num_bytes);
    }
}

template <enum product P>
__device__ inline void produce(const struct ring &ring, const struct schedule *schedule,
                               const CUtensorMap *map_a, const CUtensorMap *map_b,
                               const hopper_args &args)
{
    const int num_tiles = schedule->first_tile[args.num_experts];
    int slot = 0, parity = 1; /* the first wait for an empty slot passes */

    for (int i = blockIdx.x; i < num_tiles; i += gridDim.x) {
        const struct tile tile = tile_at<P>(schedule, args, i);
        const int num_blocks = num_blocks_k<P>(args, tile);

        for (int k = 0; k < num_blocks; k++) {
            barrier_wait(&ring.empty[slot], parity);
            load_block<P>(ring, slot, map_a, map_b, args, tile, k);
            if (P == PRODUCT_D_FC2) {
                prefetch_share(args, tile, k, num_blocks);
            }
            if (++slot == NUM_SLOTS) {
                slot = 0;
                parity ^= 1;
            }
        }
    }
}

/* Zeros over the lines from `rest` on of the slot's six boxes, three by each consumer. */
__device__ inline void clear_foreign_rows(char *slot, int consumer, int rest)
{
    const int num_packs = (TILE_K - rest) * 8, thread = threadIdx.x % 128;

    for (int box = consumer * 3; box < consumer * 3 + 3; box++) {
        uint4 *lines = (uint4 *)(slot + box * BOX_BYTES + rest * 128);

        for (int i = thread; i < num_packs; i += 128) {
            lines[i] = make_uint4(0, 0, 0, 0);
        }
    }
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    asm volatile("bar.sync 1, 256;" ::: "memory");
}

/* The accumulators of one tile. slot and parity go on from tile to tile. */
template <enum product P>
__device__ inline void multiply(float (&acc)[128], const struct ring &ring, int &slot, int &parity,
                                int consumer, int num_blocks, int num_rows)
{
    constexpr bool a_by_rows = P == PRODUCT_WEIGHTS;
    constexpr bool b_by_rows = P == PRODUCT_WEIGHTS || P == PRODUCT_ROWS_T || P == PRODUCT_D_FC2;
    /* 16 of k further: 32 bytes along a line, or 16 lines */
    constexpr uint64_t a_step = (a_by_rows ? 2048 : 32) >> 4, b_step = (b_by_rows ? 2048 : 32) >> 4;
    int previous = 0;

    for (int k = 0; k < num_blocks; k++) {
        uint64_t a, b;

        barrier_wait(&ring.full[slot], parity);
        if (P == PRODUCT_WEIGHTS && num_rows - k * TILE_K < TILE_K) {
            clear_foreign_rows(ring.a(slot), consumer, num_rows - k * TILE_K);
        }
        a = tile_descriptor<a_by_rows>(ring.a(slot) + consumer * BOX_BYTES);
        b = tile_descriptor<b_by_rows>(ring.b(slot));
        wgmma_begin();
#pragma unroll
        for (int i = 0; i < TILE_K / 16; i++) {
            wgmma<a_by_rows, b_by_rows>(acc, a + i * a_step, b + i * b_step, k > 0 || i > 0);
        }
        wgmma_commit();
        wgmma_wait<1>(); /* the block before is done */
        if (k > 0 && threadIdx.x % 128 == 0) {
            barrier_arrive(&ring.empty[previous]);
        }
        previous = slot;
        if (++slot == NUM_SLOTS) {
            slot = 0;
            parity ^= 1;
        }
    }
    wgmma_wait<0>();
    if (threadIdx.x % 128 == 0) {
        barrier_arrive(&ring.empty[previous]);
    }
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
                                  const hopper_args &args, const struct tile &tile)
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
__device__ inline float row_prob_of(const hopper_args &args, const struct warp_rows &w, int i)
{
    const int row = w.first + w.lane / 4 + 8 * i;

    return args.row_prob != NULL && row < w.end ? args.row_prob[row] : 1.0f;
}

/* Accumulators [0, 64) are the gate, [64, 128) the other half. a comes from the rounded h, which is
 * what backward will find. */
__device__ inline void store_fc1(float (&acc)[128], const struct warp_rows &w,
                                 const hopper_args &args, const struct tile &tile)
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
                                   const hopper_args &args, const struct tile &tile)
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

/* Each element is added to by one lane once, so the order of the reductions does not matter. */
__device__ inline void add_weights(const float (&acc)[128], const struct warp_rows &w,
                                   const hopper_args &args, const struct tile &tile)
{
#pragma unroll
    for (int j = 0; j < 32; j++) {
        const int column = tile.n * TILE_N + 8 * j + w.lane % 4 * 2;

#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int row = w.first + w.lane / 4 + 8 * i;

            if (row < args.m && column < args.n) {
                float *to = args.weights + ((int64_t)tile.expert * args.m + row) * args.n + column;

                asm volatile("red.relaxed.gpu.global.add.v2.f32 [%0], {%1, %2};" ::"l"(to),
                             "f"(acc[4 * j + 2 * i]), "f"(acc[4 * j + 2 * i + 1])
                             : "memory");
            }
        }
    }
}

template <enum product P>
__device__ inline void consume(const struct ring &ring, const struct schedule *schedule,
                               char *staging, const hopper_args &args)
{
    const int consumer = threadIdx.x / 128 - 1, warp = threadIdx.x / 32 - 4;
    const int num_tiles = schedule->first_tile[args.num_experts];
    int slot = 0, parity = 0;

    for (int t = blockIdx.x; t < num_tiles; t += gridDim.x) {
        const struct tile tile = tile_at<P>(schedule, args, t);
        const int first = tile.m * TILE_M + warp * 16;
        struct warp_rows w = {staging + warp * STAGING_BYTES, tile.first_row + first,
                              tile.first_row + tile.num_rows, (int)threadIdx.x % 32};
        float acc[128];

        multiply<P>(acc, ring, slot, parity, consumer, num_blocks_k<P>(args, tile), tile.num_rows);
        if (P == PRODUCT_FC1) {
            store_fc1(acc, w, args, tile);
        } else if (P == PRODUCT_D_FC2) {
            store_d_fc2(acc, w, args, tile);
        } else if (P == PRODUCT_WEIGHTS) {
            w.first = first;
            add_weights(acc, w, args, tile);
        } else {
            store_rows(acc, w, args, tile);
        }
    }
}

template <enum product P>
__global__ void __launch_bounds__(THREADS, 1)
    hopper_kernel(const __grid_constant__ CUtensorMap map_a,
                  const __grid_constant__ CUtensorMap map_b, const hopper_args args)
{
    extern __shared__ char shared[];
    __shared__ uint64_t full[NUM_SLOTS], empty[NUM_SLOTS];
    __shared__ struct schedule schedule;
    char *aligned = shared + (1024 - shared_address(shared) % 1024) % 1024;
    const struct ring ring = {aligned, full, empty};

    if (threadIdx.x == 0) {
        for (int i = 0; i < NUM_SLOTS; i++) {
            barrier_init(&full[i], 1);
            barrier_init(&empty[i], 2);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    schedule_init<P>(&schedule, args);
    __syncthreads();
    if (threadIdx.x < 128) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        if (threadIdx.x == 0) {
            produce<P>(ring, &schedule, &map_a, &map_b, args);
        }
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
        consume<P>(ring, &schedule, aligned + NUM_SLOTS * (A_BYTES + B_BYTES), args);
    }
}

/* ---- on the host ---- */

typedef CUresult encode_function(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *,
                                 const cuuint64_t *, const cuuint64_t *, const cuuint32_t *,
                                 const cuuint32_t *, CUtensorMapInterleave, CUtensorMapSwizzle,
                                 CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

/* From the driver, which is not linked. */
static encode_function *tensor_map_encode(void)
{
    static void *function;

    if (function == NULL) {
        cudaDriverEntryPointQueryResult found;

        CUDA_CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                                    cudaEnableDefault, &found));
        CHECK(found == cudaDriverEntryPointSuccess, "the driver has no cuTensorMapEncodeTiled");
    }
    return (encode_function *)function;
}

/* How the copy engine reads x (2 or 3 dims): boxes of 64 columns and box_rows rows. */
static CUtensorMap tensor_map_of(const struct tensor *x, int box_rows)
{
    const int last = x->num_dims - 1;
    const cuuint64_t dims[3] = {(cuuint64_t)x->dim[last], (cuuint64_t)x->dim[last - 1],
                                (cuuint64_t)x->dim[0]};
    const cuuint64_t strides[2] = {dims[0] * 2, dims[0] * dims[1] * 2};
    const cuuint32_t box[3] = {64, (cuuint32_t)box_rows, 1}, steps[3] = {1, 1, 1};
    CUtensorMap map;
    const CUresult result = tensor_map_encode()(
        &map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, (cuuint32_t)x->num_dims, x->data, dims, strides,
        box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
        CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);

    CHECK(result == CUDA_SUCCESS, "no tensor map for %s: error %d", tensor_describe(x),
          (int)result);
    return map;
}

template <enum product P>
static void hopper_launch(struct stream *stream, const CUtensorMap &map_a, const CUtensorMap &map_b,
                          const hopper_args &args)
{
    CHECK(args.num_experts <= 1024, "%d experts", args.num_experts);
    CUDA_CHECK(cudaFuncSetAttribute(hopper_kernel<P>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    SHARED_BYTES));
    LAUNCH(stream, hopper_kernel<P>, num_multiprocessors(), THREADS, SHARED_BYTES, map_a, map_b,
           args);
}

static hopper_args rows_args_of(const struct tensor *a, const struct tensor *offsets, int64_t n)
{
    hopper_args args = {};

    args.offsets = data_of<int32_t>(offsets);
    args.num_experts = (int)offsets->dim[0] - 1;
    args.n = (int)n;
    args.k = (int)a->dim[1];
    args.num_rows = (int)a->dim[0];
    return args;
}

void hopper_fc1(struct stream *stream, const struct hopper_fc1 *op)
{
    hopper_args args = rows_args_of(op->x, op->offsets, op->a->dim[1]);

    args.out = data_of<bf16>(op->h);
    args.a = data_of<bf16>(op->a);
    args.row_prob = data_of<float>(op->row_prob);
    hopper_launch<PRODUCT_FC1>(stream, tensor_map_of(op->x, TILE_M),
                               tensor_map_of(op->fc1, TILE_N / 2), args);
}

void hopper_rows_matmul(struct stream *stream, const struct grouped_rows *op)
{
    hopper_args args = rows_args_of(op->a, op->offsets, op->c->dim[1]);

    args.out = data_of<bf16>(op->c);
    if (op->b_transposed) {
        hopper_launch<PRODUCT_ROWS_T>(stream, tensor_map_of(op->a, TILE_M),
                                      tensor_map_of(op->b, TILE_K), args);
    } else {
        hopper_launch<PRODUCT_ROWS>(stream, tensor_map_of(op->a, TILE_M),
                                    tensor_map_of(op->b, TILE_N), args);
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
    hopper_args args = rows_args_of(op->d_y, op->offsets, op->a->dim[1]);
    const int64_t num_partials = ceil_div(args.n, TILE_N);

    args.out = data_of<bf16>(op->d_h);
    args.a = data_of<bf16>(op->a);
    args.h = data_of<bf16>(op->h);
    args.row_prob = data_of<float>(op->row_prob);
    args.prob_partial =
        (float *)arena_allocate(stream->scratch, (size_t)(num_partials * args.num_rows) * 4);
    hopper_launch<PRODUCT_D_FC2>(stream, tensor_map_of(op->d_y, TILE_M),
                                 tensor_map_of(op->fc2, TILE_K), args);
    if (op->d_row_prob != NULL) {
        LAUNCH(stream, prob_sum_kernel, ceil_div(args.num_rows, 256), 256, 0,
               data_of<float>(op->d_row_prob), args.prob_partial, args.offsets + args.num_experts,
               (int)num_partials, args.num_rows);
    }
}

void hopper_weights_matmul(struct stream *stream, const struct grouped_weights *op)
{
    hopper_args args = rows_args_of(op->a, op->offsets, op->b->dim[1]);

    args.m = (int)op->a->dim[1];
    args.weights = data_of<float>(op->c);
    hopper_launch<PRODUCT_WEIGHTS>(stream, tensor_map_of(op->a, TILE_K),
                                   tensor_map_of(op->b, TILE_K), args);
}
