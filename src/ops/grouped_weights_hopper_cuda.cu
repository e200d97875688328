/* Gradients of the experts' weights on Hopper's matrix units: C_e[m,n] += sum over the rows r of e
 * of A[r,m] B[r,n], into f32.
 *
 * At a thousand rows an expert, reading and writing C takes as long as the product, so the two must
 * overlap: the consumers put a finished tile of 128 x 256 f32 into shared memory at once, and the
 * copy engine adds it to C box by box while they multiply the next one. That leaves room for four
 * slots of 32 rows. Every element of C is added to once in a call, so the order does not matter.
 *
 * Rows are the depth here. An expert's last block runs over its end: the consumers put zeros over
 * the foreign rows. A may be gathered: then the producer's 128 threads copy its pieces of 16 bytes.
 *
 * A is the narrow side of a tile, since B's is brought once for both blocks of a cluster. */
#include "ops/grouped_matmul_cuda.cuh"
#include "ops/grouped_schedule_cuda.cuh"

enum {
    TILE_M = 128,
    TILE_N = 256,
    TILE_K = 32,
    NUM_SLOTS = 4,
    THREADS = 384,
    BOX_BYTES = TILE_K * 128, /* TILE_K rows of 64 bf16 */
    A_BYTES = TILE_M / 64 * BOX_BYTES,
    SLOT_BYTES = (TILE_M + TILE_N) / 64 * BOX_BYTES,
    NUM_BOXES = 16, /* of 32 x 32 f32, of a consumer's 64 x 256 */
    ADD_BOX_BYTES = 32 * 128,
    STAGING_BYTES = NUM_BOXES * ADD_BOX_BYTES, /* of a consumer */
    EXPERTS_MAX = 192, /* of a launch, so that the schedule fits beside the rest */
    SHARED_BYTES = 1024 + NUM_SLOTS * SLOT_BYTES + 2 * STAGING_BYTES,
    RASTER = 16,
    CONSUMERS_BARRIER = 1, /* and 2, 3: of one consumer */
};

struct weights_args {
    struct tile_grid grid;
    int first_expert; /* of this launch */
    bool transposed;
    const bf16 *a; /* gathered A: rows of width m that row_token names */
    const int32_t *row_token;
    int m;
};

struct weights_maps {
    CUtensorMap a, b, c;
};

struct weights_ring {
    char *slots;
    uint64_t *full, *empty;

    __device__ char *a(int slot) const
    {
        return slots + slot * SLOT_BYTES;
    }

    __device__ char *b(int slot) const
    {
        return a(slot) + A_BYTES;
    }
};

/* ---- the producer ---- */

/* The copy engine's share of a slot. */
template <bool GATHER>
__device__ inline void load_block(const struct weights_ring &ring, int slot,
                                  const struct weights_maps &maps, const struct tile &tile, int row)
{
    const int rank = cluster_rank(), m = tile.m * TILE_M, n = tile.n * TILE_N;
    uint64_t *full = &ring.full[slot];

    barrier_expect(full, GATHER ? SLOT_BYTES - A_BYTES : SLOT_BYTES);
    for (int i = 0; i < TILE_M / 64 && !GATHER; i++) {
        tma_load_2d(ring.a(slot) + i * BOX_BYTES, &maps.a, full, m + i * 64, row);
    }
    for (int i = 0; i < TILE_N / 64; i++) {
        char *to = ring.b(slot) + i * BOX_BYTES;

        if (!tile.shares_b) {
            tma_load_2d(to, &maps.b, full, n + i * 64, row);
        } else if (i / 2 == rank) {
            tma_load_2d_both(to, &maps.b, full, n + i * 64, row);
        }
    }
}

/* Four pieces of 16 bytes of A by each of 128 threads: piece thread % 16 of rows thread / 16 + 8 i.
 */
struct gathered_rows {
    uint32_t piece[4]; /* of the tokens, from the beginning of A */

    __device__ void find(const struct weights_args &args, const struct tile &tile, int first)
    {
        const int end = tile.first_row + tile.num_rows;

#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int row = min(first + (int)threadIdx.x / 16 + 8 * i, end - 1);

            piece[i] = (uint32_t)args.row_token[row] * (uint32_t)(args.m / 8);
        }
    }

    __device__ void copy(const struct weights_args &args, char *a, int m) const
    {
        const int column = threadIdx.x % 16, row = threadIdx.x / 16;
        char *to = a + column / 8 * BOX_BYTES + row * 128 + ((column % 8 ^ row) << 4);
        const int at = m / 8 + column;
        const int num_bytes = at < args.m / 8 ? 16 : 0;

#pragma unroll
        for (int i = 0; i < 4; i++) {
            const uint64_t from = num_bytes > 0 ? piece[i] + (uint64_t)at : 0;

            copy_async(to + i * 1024, args.a + from * 8, num_bytes);
        }
    }
};

template <bool GATHER>
__device__ inline void produce(const struct weights_ring &ring, const struct schedule &schedule,
                               const struct weights_maps &maps, const struct weights_args &args)
{
    const int num = num_units(schedule, args.grid), rank = cluster_rank();
    struct ring_position<NUM_SLOTS> at = {
        0, 1
    }; /* the first wait for an empty slot passes */

    for (int unit = blockIdx.x / 2; unit < num; unit += gridDim.x / 2) {
        const struct tile tile = tile_at(schedule, args.grid, unit, rank);
        struct gathered_rows rows;

        if (GATHER) {
            rows.find(args, tile, tile.first_row);
        }
        for (int k = 0; k < tile.num_rows; k += TILE_K) {
            barrier_wait(&ring.empty[at.slot], at.parity);
            if (threadIdx.x == 0) {
                load_block<GATHER>(ring, at.slot, maps, tile, tile.first_row + k);
            }
            if (GATHER) {
                rows.copy(args, ring.a(at.slot), tile.m * TILE_M);
                barrier_arrive_after_copies(&ring.full[at.slot]);
                rows.find(args, tile, tile.first_row + k + TILE_K);
            }
            at.advance();
        }
    }
}

/* ---- the consumers ---- */

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
    fence_async();
    named_barrier_sync(CONSUMERS_BARRIER, 256);
}

/* A consumer's 64 x 256 on their way from shared memory to C, as boxes of 32 x 32. */
struct departure {
    char *staging;
    const CUtensorMap *map;
    bool transposed, is_sender;
    int next_box, expert, m, n;

    __device__ void send_box(void)
    {
        const int m_box = m + next_box % 2 * 32, n_box = n + next_box / 2 * 32;

        tma_add_3d(map, staging + next_box * ADD_BOX_BYTES, transposed ? m_box : n_box,
                   transposed ? n_box : m_box, expert);
        next_box++;
    }

    /* A box a block of the product, so that loads find the copy engine free. */
    __device__ void go_on(void)
    {
        if (is_sender && next_box < NUM_BOXES) {
            send_box();
        }
    }

    __device__ void finish(void)
    {
        if (is_sender) {
            while (next_box < NUM_BOXES) {
                send_box();
            }
            tma_wait_read();
        }
    }
};

/* Accumulator 4 j + 2 i + c of a lane is row lane / 4 + 8 i of the warp's 16, column 8 j +
 * 2 (lane % 4) + c. */
__device__ inline void stage(const float (&acc)[128], char *staging)
{
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, line = lane / 4;
    char *box = staging + warp / 2 * ADD_BOX_BYTES + (warp % 2 * 16 + line) * 128 + lane % 2 * 8;

#pragma unroll
    for (int j = 0; j < 32; j++) {
        const int piece = (j % 4 * 2 + lane % 4 / 2) ^ line;
        char *to = box + j / 4 * 2 * ADD_BOX_BYTES + (piece << 4);

        *(float2 *)to = make_float2(acc[4 * j], acc[4 * j + 1]);
        *(float2 *)(to + 8 * 128) = make_float2(acc[4 * j + 2], acc[4 * j + 3]);
    }
}

__device__ inline void stage_transposed(const float (&acc)[128], char *staging)
{
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, line = lane % 4 * 2;
    char *box = staging + warp / 2 * ADD_BOX_BYTES + lane / 4 % 4 * 4;

#pragma unroll
    for (int j = 0; j < 32; j++) {
#pragma unroll
        for (int i = 0; i < 4; i++) { /* 2 * which half of the rows + c */
            const int row = line + i % 2, piece = (warp % 2 * 4 + i / 2 * 2 + lane / 16) ^ row;

            *(float *)(box + j / 4 * 2 * ADD_BOX_BYTES + (j % 4 * 8 + row) * 128 + (piece << 4)) =
                acc[4 * j + i];
        }
    }
}

template <bool GATHER>
__device__ inline void multiply(float (&acc)[128], const struct weights_ring &ring,
                                struct ring_position<NUM_SLOTS> &at, int consumer, int num_rows,
                                struct departure &departure)
{
    int previous = 0;

    for (int k = 0; k < num_rows; k += TILE_K) {
        uint64_t a, b;

        barrier_wait(&ring.full[at.slot], at.parity);
        if (num_rows - k < TILE_K) {
            clear_foreign_rows(ring.a(at.slot), consumer, num_rows - k);
        } else if (GATHER) {
            fence_async();
        }
        a = tile_descriptor<true>(ring.a(at.slot) + consumer * BOX_BYTES, BOX_BYTES);
        b = tile_descriptor<true>(ring.b(at.slot), BOX_BYTES);
        wgmma_begin();
#pragma unroll
        for (int i = 0; i < TILE_K / 16; i++) {
            wgmma<true, true>(acc, a + i * (2048 >> 4), b + i * (2048 >> 4), k > 0 || i > 0);
        }
        wgmma_commit();
        departure.go_on();
        wgmma_wait<1>(); /* the block before is done */
        if (k > 0) {
            slot_release(&ring.empty[previous]);
        }
        previous = at.slot;
        at.advance();
    }
    wgmma_wait<0>();
    slot_release(&ring.empty[previous]);
}

template <bool GATHER>
__device__ inline void consume(const struct weights_ring &ring, const struct schedule &schedule,
                               char *staging, const struct weights_maps &maps,
                               const struct weights_args &args)
{
    const int consumer = threadIdx.x / 128 - 1, rank = cluster_rank();
    const int num = num_units(schedule, args.grid), mine = CONSUMERS_BARRIER + 1 + consumer;
    struct ring_position<NUM_SLOTS> at = {
        0, 0
    };
    struct departure departure = {staging + consumer * STAGING_BYTES,
                                  &maps.c,
                                  args.transposed,
                                  threadIdx.x % 128 == 0,
                                  NUM_BOXES,
                                  0,
                                  0,
                                  0};
    float acc[128];

    for (int unit = blockIdx.x / 2; unit < num; unit += gridDim.x / 2) {
        const struct tile tile = tile_at(schedule, args.grid, unit, rank);

        multiply<GATHER>(acc, ring, at, consumer, tile.num_rows, departure);
        departure.finish();
        named_barrier_sync(mine, 128);
        if (args.transposed) {
            stage_transposed(acc, departure.staging);
        } else {
            stage(acc, departure.staging);
        }
        fence_async();
        named_barrier_sync(mine, 128);
        departure.next_box = 0;
        departure.expert = args.first_expert + tile.expert;
        departure.m = tile.m * TILE_M + consumer * 64;
        departure.n = tile.n * TILE_N;
    }
    departure.finish();
}

template <bool GATHER>
__global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(THREADS, 1)
    weights_kernel(const __grid_constant__ struct weights_maps maps, const struct weights_args args)
{
    extern __shared__ char shared[];
    __shared__ uint64_t full[NUM_SLOTS], empty[NUM_SLOTS];
    char *aligned = shared + (1024 - shared_address(shared) % 1024) % 1024;
    const struct weights_ring ring = {aligned, full, empty};
    char *staging = aligned + NUM_SLOTS * SLOT_BYTES;
    int *numbers = (int *)(staging + 2 * STAGING_BYTES);
    const struct schedule schedule = {numbers, numbers + args.grid.num_experts + 1};

    if (threadIdx.x == 0) {
        for (int i = 0; i < NUM_SLOTS; i++) {
            barrier_init(&full[i], GATHER ? 129 : 1);
            barrier_init(&empty[i], 4);
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
            produce<GATHER>(ring, schedule, maps, args);
        }
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
        consume<GATHER>(ring, schedule, staging, maps, args);
    }
    __syncwarp();
    cluster_sync(); /* the other block may still write here */
}

/* ---- on the host ---- */

template <bool GATHER>
static void weights_launch(struct stream *stream, const struct weights_maps &maps,
                           const struct weights_args &args)
{
    const int shared_bytes = SHARED_BYTES + schedule_bytes(args.grid.num_experts);

    CUDA_CHECK(cudaFuncSetAttribute(weights_kernel<GATHER>,
                                    cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
    LAUNCH(stream, weights_kernel<GATHER>, 2 * num_clusters(), THREADS, shared_bytes, maps, args);
}

void hopper_weights_matmul(struct stream *stream, const struct hopper_weights *op)
{
    const int num_experts = (int)op->offsets->dim[0] - 1;
    const int m = (int)op->a->dim[1], n = (int)op->b->dim[1];
    const struct weights_maps maps = {tensor_map_of(op->a, TILE_K), tensor_map_of(op->b, TILE_K),
                                      tensor_map_of(op->c, 32)};
    struct weights_args args = {};

    args.grid.tiles_m = (int)ceil_div(m, TILE_M);
    args.grid.tiles_n = (int)ceil_div(n, TILE_N);
    args.grid.raster = RASTER;
    args.transposed = op->transposed;
    args.a = data_of<bf16>(op->a);
    args.row_token = data_of<int32_t>(op->row_token);
    args.m = m;
    for (int e = 0; e < num_experts; e += EXPERTS_MAX) {
        args.first_expert = e;
        args.grid.offsets = data_of<int32_t>(op->offsets) + e;
        args.grid.num_experts = num_experts - e < EXPERTS_MAX ? num_experts - e : EXPERTS_MAX;
        if (op->row_token != NULL) {
            weights_launch<true>(stream, maps, args);
        } else {
            weights_launch<false>(stream, maps, args);
        }
    }
}
