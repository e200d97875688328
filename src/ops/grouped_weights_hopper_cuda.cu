/* Gradients of the experts' weights on Hopper's matrix units: C_e[m,n] += (or =, OVERWRITE) sum
 * over the rows r of e of A[r,m] B[r,n], into f32. Rows are the depth here.
 *
 * At a thousand rows an expert, reading and writing C takes as long as the product, so the two must
 * overlap. A block owns a multiprocessor. A thread (the producer) brings blocks of 32 rows of A and
 * B into a ring of shared memory by the copy engine; two warpgroups (the consumers) multiply, 64
 * rows each of a tile of C, accumulators in registers. At the end of a tile a consumer puts its
 * half into shared memory and goes on with the next; a thread of another warp (its storer) has the
 * copy engine take it away. Beside the ring there is room for 5 of a half's 8 chunks only, so the
 * first 3 lie in one of the two slots that the tile has been multiplied from last, and nobody waits
 * for a store.
 *
 * What is to be added to comes beforehand: for the chunks in the slot by registers, out of the L2
 * cache; for the others by the copy engine, into their boxes. (Reductions by the L2 cache, red.add
 * or the copy engine's, need no reading, but were measured at 1.1 TB/s of C; reading and writing:
 * 1.4; storing only: 3.1. Room for a whole tile of C starves the product of slots. Stores from
 * registers are as fast while the card is cool, and slower at its power limit.)
 *
 * An expert's last block runs over its end: the consumers put zeros over the foreign rows. */
#include "ops/grouped_matmul_cuda.cuh"
#include "ops/grouped_schedule_cuda.cuh"

enum {
    TILE_M = 128,
    TILE_N = 256,
    TILE_K = 32,
    NUM_SLOTS = 6,
    THREADS = 384,
    BOX_BYTES = TILE_K * 128, /* TILE_K rows of 64 bf16 */
    A_BYTES = TILE_M / 64 * BOX_BYTES,
    SLOT_BYTES = (TILE_M + TILE_N) / 64 * BOX_BYTES,
    /* A half of a tile in chunks of 64 x 32: in the slot, in the early boxes, in the late ones. */
    CHUNK_COLUMNS = 32,
    CHUNK_BYTES = 64 * CHUNK_COLUMNS * 4,
    SLOT_CHUNKS = SLOT_BYTES / CHUNK_BYTES,
    EARLY_CHUNKS = 3,
    LATE_CHUNKS = TILE_N / CHUNK_COLUMNS - SLOT_CHUNKS - EARLY_CHUNKS,
    HALF_BYTES = (EARLY_CHUNKS + LATE_CHUNKS) * CHUNK_BYTES, /* of boxes */
    SHARED_BYTES = 1024 + NUM_SLOTS * SLOT_BYTES + 2 * HALF_BYTES,
    RASTER = 8, /* see struct tile_grid */
    CONSUMERS_BARRIER = 1,
    TAKE_AHEAD = 10, /* blocks of rows before its end, a tile's successor is taken */
    /* Cycles: */
    BLOCK_CYCLES = TILE_K * TILE_M * TILE_N / 2048, /* of the product of TILE_K rows */
    STORE_CYCLES = 5000,                            /* of a tile's end */
    /* Parts of a tile's product between two chunks that are stored, and loaded to be added to: */
    STORES_APART = 8,
    ADDS_APART = 16,
    LOADS_APART = 12,
    TURNS_TILES_MIN = 32, /* of a block: fewer are not worth the wait */
};

struct weights_args {
    struct tile_grid grid;
    int first_expert;      /* of this launch */
    bool whole_a, whole_b; /* widths are multiples of 64 */
    struct tile_counter *counter;
    const float *c;
    int m, n; /* of C */
};

struct weights_maps {
    CUtensorMap a, b, c;
};

/* What a consumer and its storer tell each other. */
struct half_barriers {
    uint64_t in_slot, early, late; /* chunks of a tile, by the consumer's four warps */
    uint64_t taken;                /* the tile has left the boxes */
    uint64_t old_early, old_late;  /* what is to be added to is in the boxes */
};

struct weights_barriers {
    uint64_t full[NUM_SLOTS], empty[NUM_SLOTS];
    uint64_t multiplied; /* a tile, by all warps of both consumers: its slots may be written to */
    struct half_barriers half[2];
    struct tile_queue queue;

    __device__ void init(void)
    {
        for (int i = 0; i < NUM_SLOTS; i++) {
            barrier_init(&full[i], 1);
            barrier_init(&empty[i], 2);
        }
        barrier_init(&multiplied, 8);
        queue.init(8 + 2); /* consumers' warps, storers */
        for (struct half_barriers &h : half) {
            barrier_init(&h.in_slot, 4);
            barrier_init(&h.early, 4);
            barrier_init(&h.late, 4);
            barrier_init(&h.taken, 1);
            barrier_init(&h.old_early, 1);
            barrier_init(&h.old_late, 1);
        }
        barrier_init_fence();
    }
};

struct weights_ring {
    char *slots;
    struct weights_barriers *barriers;

    __device__ char *a(int slot) const
    {
        return slots + slot * SLOT_BYTES;
    }

    __device__ char *b(int slot) const
    {
        return a(slot) + A_BYTES;
    }

    __device__ char *boxes(int half) const
    {
        return slots + NUM_SLOTS * SLOT_BYTES + half * HALF_BYTES;
    }
};

/* Of rows; at least two, so that there are two slots for the halves: of a tile with fewer, the
 * others are all foreign. */
__device__ inline int num_blocks_of(const struct tile &tile)
{
    return max(2, (tile.num_rows + TILE_K - 1) / TILE_K);
}

/* Where a half of a tile finds its slot; next: the slot that follows the tile's last. */
__device__ inline int slot_of_half(int half, int next)
{
    return (next + NUM_SLOTS - 2 + half) % NUM_SLOTS;
}

/* ---- the producer ---- */

/* Boxes of 64 columns from column `first` on, at once where the width is a multiple of 64. */
__device__ inline void load_boxes(char *to, const CUtensorMap *map, uint64_t *full, int first,
                                  int row, int num_boxes, bool whole)
{
    if (whole) {
        tma_load_3d(to, map, full, 0, row, first / 64);
        return;
    }
    for (int i = 0; i < num_boxes; i++) {
        tma_load_2d(to + i * BOX_BYTES, map, full, first + i * 64, row);
    }
}

/* Blocks begin one after the other over the time of a tile (of num_rows rows). Begun together, they
 * would end all their tiles together, and each time wait for 17 MB to be stored while nothing is
 * multiplied. */
__device__ inline void wait_for_turn(int num_rows)
{
    const long long tile_cycles = (long long)num_rows / TILE_K * BLOCK_CYCLES + STORE_CYCLES;

    pause(tile_cycles * blockIdx.x / gridDim.x);
}

template <bool SHARES>
__device__ inline void produce(const struct weights_ring &ring, const struct schedule &schedule,
                               struct tile_taker<SHARES> taker, const struct weights_maps &maps,
                               const struct weights_args &args)
{
    const int num = num_tiles(schedule, args.grid);
    ring_position<NUM_SLOTS> at = {0, 1}; /* the first wait for an empty slot passes */

    if (num >= TURNS_TILES_MIN * (int)gridDim.x) {
        const int num_experts = args.grid.num_experts;

        wait_for_turn((schedule.first_row[num_experts] - schedule.first_row[0]) / num_experts);
    }
    while (taker.announce(), taker.index < num) {
        const struct tile tile = tile_at(schedule, args.grid, taker.index);
        const int num_blocks = num_blocks_of(tile), taking_k = max(0, num_blocks - TAKE_AHEAD);

        for (int k = 0; k < num_blocks; k++) {
            uint64_t *full = &ring.barriers->full[at.slot];
            const int row = tile.first_row + k * TILE_K;

            if (k == taking_k) {
                taker.take_next();
            }
            barrier_wait(&ring.barriers->empty[at.slot], at.parity);
            barrier_expect(full, SLOT_BYTES);
            load_boxes(ring.a(at.slot), &maps.a, full, tile.m * TILE_M, row, TILE_M / 64,
                       args.whole_a);
            load_boxes(ring.b(at.slot), &maps.b, full, tile.n * TILE_N, row, TILE_N / 64,
                       args.whole_b);
            at.advance();
        }
    }
}

/* ---- the storers ---- */

/* Half of a tile of C, for the copy engine. */
struct half_of_c {
    const CUtensorMap *map; /* see map_of_c */
    uint64_t policy;
    int expert, m, n;

    __device__ half_of_c(const CUtensorMap *map, const struct tile &tile, int first_expert,
                         int half)
        : map(map), policy(policy_once()), expert(first_expert + tile.expert),
          m(tile.m * TILE_M + half * 64), n(tile.n * TILE_N)
    {
    }

    __device__ int column(int chunk) const
    {
        return n + chunk * CHUNK_COLUMNS;
    }

    /* Each chunk after a pause: see store_halves. */
    __device__ void store(const char *from, int first, int num, int pause_cycles) const
    {
        for (int i = 0; i < num; i++) {
            pause(pause_cycles);
            tma_store_5d_once(map, from + i * CHUNK_BYTES, column(first + i), 0, 0, m / 8, expert,
                              policy);
        }
        tma_commit();
    }

    __device__ void load(char *to, uint64_t *loaded, int first, int num, int pause_cycles) const
    {
        barrier_expect(loaded, num * CHUNK_BYTES);
        for (int i = 0; i < num; i++) {
            pause(pause_cycles);
            tma_load_5d_once(to + i * CHUNK_BYTES, map, loaded, column(first + i), 0, 0, m / 8,
                             expert, policy);
        }
    }

    __device__ void prefetch(int first, int num) const
    {
        for (int i = 0; i < num; i++) {
            tma_prefetch_5d(map, column(first + i), 0, 0, m / 8, expert);
        }
    }

    /* What is to be added to, over not quite half of the product's time, so that the product's
     * loads are not behind it. */
    __device__ void load_old(char *boxes, struct half_barriers *barriers, int num_blocks) const
    {
        const int gap = num_blocks * BLOCK_CYCLES / LOADS_APART;

        load(boxes, &barriers->old_early, SLOT_CHUNKS, EARLY_CHUNKS, gap);
        load(boxes + EARLY_CHUNKS * CHUNK_BYTES, &barriers->old_late, SLOT_CHUNKS + EARLY_CHUNKS,
             LATE_CHUNKS, gap);
        prefetch(0, SLOT_CHUNKS);
    }
};

/* The block's halves of one consumer, in order. The chunks in the slot leave at once, the others
 * apart, over the time of the next tile's product: the copy engine works in order, and behind a
 * whole half the product's loads would come too late. */
template <bool OVERWRITE, bool SHARES>
__device__ inline void
store_halves(const struct weights_ring &ring, const struct schedule &schedule, int half,
             const struct weights_maps &maps, const struct weights_args &args)
{
    struct half_barriers *barriers = &ring.barriers->half[half];
    char *early = ring.boxes(half), *late = early + EARLY_CHUNKS * CHUNK_BYTES;
    const int num = num_tiles(schedule, args.grid);
    struct tile_reader<SHARES> tiles(&ring.barriers->queue);
    int parity = 0, next_slot = 0;

    for (int index; (index = tiles.take(true)) < num; parity ^= 1) {
        const struct tile tile = tile_at(schedule, args.grid, index);
        const struct half_of_c c(&maps.c, tile, args.first_expert, half);
        const int gap =
            num_blocks_of(tile) * BLOCK_CYCLES / (OVERWRITE ? STORES_APART : ADDS_APART);
        int slot;

        if (!OVERWRITE) {
            c.load_old(early, barriers, num_blocks_of(tile));
        }
        next_slot = (next_slot + num_blocks_of(tile)) % NUM_SLOTS;
        slot = slot_of_half(half, next_slot);
        barrier_wait(&barriers->in_slot, parity);
        c.store(ring.a(slot), 0, SLOT_CHUNKS, 0);
        tma_wait_read<0>();
        barrier_arrive(&ring.barriers->empty[slot]);
        pause(half * gap / 2); /* the halves take turns */
        barrier_wait(&barriers->early, parity);
        c.store(early, SLOT_CHUNKS, EARLY_CHUNKS, gap);
        barrier_wait(&barriers->late, parity);
        c.store(late, SLOT_CHUNKS + EARLY_CHUNKS, LATE_CHUNKS, gap);
        tma_wait_read<0>();
        barrier_arrive(&barriers->taken);
    }
}

/* ---- the consumers ---- */

/* Zeros over the lines from `rest` on of the slot's boxes, shared by the consumers. */
__device__ inline void clear_foreign_rows(char *slot, int rest)
{
    const int num_packs = (TILE_K - rest) * 8, thread = threadIdx.x - 128;

    for (int box = 0; box < (TILE_M + TILE_N) / 64; box++) {
        uint4 *lines = (uint4 *)(slot + box * BOX_BYTES + rest * 128);

        for (int i = thread; i < num_packs; i += 256) {
            lines[i] = make_uint4(0, 0, 0, 0);
        }
    }
    fence_async();
    named_barrier_sync(CONSUMERS_BARRIER, 256);
}

/* What a lane's accumulators of the chunks in the slot are to be added to. */
struct old_values {
    float2 value[SLOT_CHUNKS * 8];

    __device__ void load(const struct weights_args &args, const struct tile &tile, int half)
    {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
        const int row = tile.m * TILE_M + half * 64 + warp * 16 + lane / 4;
        const int column = tile.n * TILE_N + 2 * (lane % 4);
        const float *from =
            args.c + ((int64_t)(args.first_expert + tile.expert) * args.m + row) * args.n + column;

#pragma unroll
        for (int j = 0; j < SLOT_CHUNKS * 4; j++) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                value[2 * j + i] = make_float2(0.0f, 0.0f);
                if (row + 8 * i < args.m && column + 8 * j < args.n) {
                    value[2 * j + i] =
                        __ldcg((const float2 *)(from + 8 * (i * (int64_t)args.n + j)));
                }
            }
        }
    }
};

/* A half of a tile. Its slot is not released here, but when its chunks have left it. */
template <bool OVERWRITE>
__device__ inline void multiply(float (&acc)[128], struct old_values &old,
                                const struct weights_ring &ring, ring_position<NUM_SLOTS> &at,
                                int half, const struct tile &tile, const struct weights_args &args)
{
    const int num_blocks = num_blocks_of(tile), kept = num_blocks - 2 + half;
    uint64_t *empty = ring.barriers->empty;
    int previous = 0;

    for (int k = 0; k < num_blocks; k++) {
        const int rest = tile.num_rows - k * TILE_K;
        uint64_t a, b;

        barrier_wait(&ring.barriers->full[at.slot], at.parity);
        if (rest < TILE_K) {
            clear_foreign_rows(ring.a(at.slot), max(rest, 0));
        }
        a = tile_descriptor<true>(ring.a(at.slot) + half * BOX_BYTES, BOX_BYTES);
        b = tile_descriptor<true>(ring.b(at.slot), BOX_BYTES);
        wgmma_begin();
#pragma unroll
        for (int i = 0; i < TILE_K / 16; i++) {
            wgmma<true, true>(acc, a + i * (2048 >> 4), b + i * (2048 >> 4), k > 0 || i > 0);
        }
        wgmma_commit();
        wgmma_wait<1>(); /* the block before is done */
        if (k > 0 && k - 1 != kept) {
            slot_release(&empty[previous]);
        }
        previous = at.slot;
        at.advance();
    }
    if (!OVERWRITE) {
        old.load(args, tile, half);
    }
    wgmma_wait<0>();
    if (half == 0) {
        slot_release(&empty[previous]);
    }
}

/* Where a lane's accumulators lie in a chunk. Accumulator 4 j + 2 i + c is row lane / 4 + 8 i of
 * the warp's 16, column 8 j + 2 (lane % 4) + c; a row's place: see map_of_c. */
struct lane_place {
    int first, column;

    __device__ lane_place(void)
    {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, row = lane / 4;
        const int line = row / 4 + 2 * (row % 4);

        first = (warp * 16 + line) * 128 + lane % 2 * 8;
        column = (lane % 4 / 2 ^ line) << 4;
    }

    __device__ float2 *of(char *chunk, int j, int i) const
    {
        return (float2 *)(chunk + first + i * 8 * 128 + (column ^ j << 5));
    }
};

__device__ inline float2 sum_of(const float2 &x, const float2 &y)
{
    return make_float2(x.x + y.x, x.y + y.y);
}

enum old_place { OLD_NONE, OLD_IN_REGISTERS, OLD_IN_BOXES };

/* Chunks FIRST to FIRST + NUM of a half, for its storer. */
template <int FIRST, int NUM, enum old_place OLD>
__device__ inline void put_chunks(char *to, uint64_t *filled, const float (&acc)[128],
                                  const struct lane_place &place, const struct old_values &old)
{
#pragma unroll
    for (int chunk = 0; chunk < NUM; chunk++) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int at = ((FIRST + chunk) * 4 + j) * 4 + 2 * i;
                const float2 x = make_float2(acc[at], acc[at + 1]);
                float2 *element = place.of(to + chunk * CHUNK_BYTES, j, i);

                if constexpr (OLD == OLD_IN_BOXES) {
                    *element = sum_of(*element, x);
                } else if constexpr (OLD == OLD_IN_REGISTERS) {
                    *element = sum_of(old.value[(chunk * 4 + j) * 2 + i], x);
                } else {
                    *element = x;
                }
            }
        }
    }
    fence_async();
    __syncwarp();
    if (threadIdx.x % 32 == 0) {
        barrier_arrive(filled);
    }
}

/* Until all warps of both consumers have multiplied the tile, and the boxes are empty. */
__device__ inline void wait_for_room(const struct weights_ring &ring, int half, int parity)
{
    __syncwarp();
    if (threadIdx.x % 32 == 0) {
        barrier_arrive(&ring.barriers->multiplied);
    }
    barrier_wait(&ring.barriers->multiplied, parity);
    barrier_wait(&ring.barriers->half[half].taken, parity ^ 1);
}

template <bool OVERWRITE, bool SHARES>
__device__ inline void consume(const struct weights_ring &ring, const struct schedule &schedule,
                               const struct weights_args &args)
{
    const int half = threadIdx.x / 128 - 1, num = num_tiles(schedule, args.grid);
    struct half_barriers *barriers = &ring.barriers->half[half];
    char *early = ring.boxes(half), *late = early + EARLY_CHUNKS * CHUNK_BYTES;
    const struct lane_place place;
    ring_position<NUM_SLOTS> at = {0, 0};
    struct tile_reader<SHARES> tiles(&ring.barriers->queue);
    int parity = 0;

    for (int index; (index = tiles.take(false)) < num; parity ^= 1) {
        const struct tile tile = tile_at(schedule, args.grid, index);
        struct old_values old;
        float acc[128];

        multiply<OVERWRITE>(acc, old, ring, at, half, tile, args);
        wait_for_room(ring, half, parity);
        put_chunks<0, SLOT_CHUNKS, OVERWRITE ? OLD_NONE : OLD_IN_REGISTERS>(
            ring.a(slot_of_half(half, at.slot)), &barriers->in_slot, acc, place, old);
        if (!OVERWRITE) {
            barrier_wait(&barriers->old_early, parity);
        }
        put_chunks<SLOT_CHUNKS, EARLY_CHUNKS, OVERWRITE ? OLD_NONE : OLD_IN_BOXES>(
            early, &barriers->early, acc, place, old);
        if (!OVERWRITE) {
            barrier_wait(&barriers->old_late, parity);
        }
        put_chunks<SLOT_CHUNKS + EARLY_CHUNKS, LATE_CHUNKS, OVERWRITE ? OLD_NONE : OLD_IN_BOXES>(
            late, &barriers->late, acc, place, old);
    }
}

template <bool OVERWRITE, bool SHARES>
__global__ void __launch_bounds__(THREADS, 1)
    weights_kernel(const __grid_constant__ struct weights_maps maps, const struct weights_args args)
{
    extern __shared__ char shared[];
    __shared__ struct weights_barriers barriers;
    char *aligned = shared + (1024 - shared_address(shared) % 1024) % 1024;
    const struct weights_ring ring = {aligned, &barriers};
    int *numbers = (int *)ring.boxes(2);
    const struct schedule schedule = {numbers, numbers + args.grid.num_experts + 1};

    if (threadIdx.x == 0) {
        barriers.init();
    }
    const int first = threadIdx.x == 0 ? first_tile<SHARES>(args.counter) : 0;

    __syncwarp();
    schedule_init(schedule, args.grid);
    __syncthreads();
    if (threadIdx.x < 128) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 56;");
        if (threadIdx.x == 0) {
            produce<SHARES>(ring, schedule, {args.counter, &barriers.queue, first}, maps, args);
            counter_leave<SHARES>(args.counter, gridDim.x);
        } else if (threadIdx.x == 32 || threadIdx.x == 64) {
            store_halves<OVERWRITE, SHARES>(ring, schedule, threadIdx.x / 32 - 1, maps, args);
        }
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 224;");
        consume<OVERWRITE, SHARES>(ring, schedule, args);
    }
}

/* ---- on the host ---- */

/* C [E,M,N] in chunks: row r of a group of 8 lies in line 2 (r % 4) + r / 4 of the box. A consumer
 * stores 8 bytes a lane, of which half a warp holds 8 columns of 4 rows: so they fall into eight
 * different places of the swizzle; rows 2 i and 2 i + 1 in lines of their own would share theirs,
 * since pairs of lanes do. */
static CUtensorMap map_of_c(const struct tensor *c)
{
    const cuuint64_t depth = (cuuint64_t)c->dim[1], width = (cuuint64_t)c->dim[2];
    const struct tensor_view view = {
        c->dtype,
        c->data,
        5,
        {width, 2, 4, depth / 8, (cuuint64_t)c->dim[0]},
        {width * 16, width * 4, width * 32, depth * width * 4},
        {CHUNK_COLUMNS, 2, 4, 8, 1},
    };

    return tensor_map_of_view(&view);
}

static bool is_whole(const struct tensor *x)
{
    return x->dim[1] % 64 == 0;
}

/* TILE_K rows of num_boxes times 64 columns, laid side by side; or one box where the width is no
 * multiple of 64. One instruction for many boxes, since its issue is what a load costs here. */
static CUtensorMap operand_map_of(const struct tensor *x, int num_boxes)
{
    const struct tensor_view view = {
        x->dtype,
        x->data,
        3,
        {64, (cuuint64_t)x->dim[0], (cuuint64_t)x->dim[1] / 64},
        {(cuuint64_t)x->dim[1] * 2, 128},
        {64, TILE_K, (cuuint32_t)num_boxes},
    };

    return is_whole(x) ? tensor_map_of_view(&view) : tensor_map_of(x, TILE_K);
}

template <bool OVERWRITE, bool SHARES>
static void launch(struct stream *stream, const struct weights_maps &maps, struct weights_args args)
{
    const struct tile_grid all = args.grid;

    for (int e = 0; e < all.num_experts; e += LAUNCH_EXPERTS_MAX) {
        int shared_bytes;

        args.first_expert = e;
        args.grid = tile_grid_part(all, e);
        args.counter = SHARES ? counter_of_launch() : NULL;
        shared_bytes = SHARED_BYTES + schedule_bytes(args.grid.num_experts);
        CUDA_CHECK(cudaFuncSetAttribute((weights_kernel<OVERWRITE, SHARES>),
                                        cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
        LAUNCH(stream, (weights_kernel<OVERWRITE, SHARES>), num_multiprocessors(), THREADS,
               shared_bytes, maps, args);
    }
}

template <bool OVERWRITE>
static void launch_schedule(struct stream *stream, const struct weights_maps &maps,
                            const struct weights_args &args)
{
    if (stream->device->shares_multiprocessors) {
        launch<OVERWRITE, true>(stream, maps, args);
    } else {
        launch<OVERWRITE, false>(stream, maps, args);
    }
}

void hopper_weights_matmul(struct stream *stream, const struct grouped_weights *op)
{
    const struct weights_maps maps = {operand_map_of(op->a, TILE_M / 64),
                                      operand_map_of(op->b, TILE_N / 64), map_of_c(op->c)};
    struct weights_args args = {};

    args.whole_a = is_whole(op->a);
    args.whole_b = is_whole(op->b);
    args.c = data_of<float>(op->c);
    args.m = (int)op->a->dim[1];
    args.n = (int)op->b->dim[1];
    args.grid.offsets = data_of<int32_t>(op->offsets);
    args.grid.num_experts = (int)op->offsets->dim[0] - 1;
    args.grid.tiles_m = (int)ceil_div(args.m, TILE_M);
    args.grid.tiles_n = (int)ceil_div(args.n, TILE_N);
    args.grid.raster = RASTER;
    args.grid.empty_too = op->overwrite;
    if (op->overwrite) {
        launch_schedule<true>(stream, maps, args);
    } else {
        launch_schedule<false>(stream, maps, args);
    }
}
