/* Gradients of the experts' weights on Hopper's matrix units: C_e[m,n] += (or =, OVERWRITE) sum
 * over the rows r of e of A[r,m] B[r,n], into f32. Rows are the depth here.
 *
 * At a thousand rows an expert, reading and writing C takes as long as the product, so the two must
 * overlap. A consumer's half of a tile of C passes through shared memory in boxes of 64 x 32: at
 * the end of a tile the consumer puts its accumulators into a box, which the copy engine takes away
 * while the next ones are worked on, and the last ones while the next tile is multiplied. To be
 * added to, the first boxes come by the copy engine while the consumer multiplies, and the others
 * into the L2 cache. (Reductions by the L2 cache, red.add or the copy engine's, need no reading,
 * but were measured at 1.1 TB/s of C; reading and writing: 1.4; storing only: 3.1. Room for a whole
 * tile of C starves the product of slots. Stores from registers are as fast while the card is
 * cool, and slower at its power limit.)
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
    NUM_CHUNKS = TILE_N / 32, /* of a consumer's 64 rows of C */
    CHUNK_BYTES = 64 * 32 * 4,
    NUM_BOXES = 5, /* for chunks, of a consumer */
    SHARED_BYTES = 1024 + NUM_SLOTS * SLOT_BYTES + 2 * NUM_BOXES * CHUNK_BYTES,
    RASTER = 8,            /* see struct tile_grid */
    CONSUMERS_BARRIER = 1, /* and 2, 3: of one consumer */
    /* wait_for_turn: */
    ROW_CYCLES = TILE_M * TILE_N / 2048, /* of a tile's product, a row */
    STORE_CYCLES = 5000,                 /* of a tile's end */
    TURNS_TILES_MIN = 32,                /* of a block: fewer are not worth the wait */
};

struct weights_args {
    struct tile_grid grid;
    int first_expert;      /* of this launch */
    bool whole_a, whole_b; /* widths are multiples of 64 */
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
    const long long begin = clock64(), tile_cycles = num_rows * ROW_CYCLES + STORE_CYCLES;

    while (clock64() - begin < tile_cycles * blockIdx.x / gridDim.x) {
        __nanosleep(100);
    }
}

template <bool OVERWRITE>
__device__ inline void produce(const struct weights_ring &ring, const struct schedule &schedule,
                               const struct weights_maps &maps, const struct weights_args &args)
{
    const int num = num_tiles(schedule, args.grid);
    ring_position<NUM_SLOTS> at = {0, 1}; /* the first wait for an empty slot passes */

    if (OVERWRITE && num >= TURNS_TILES_MIN * (int)gridDim.x) {
        const int num_experts = args.grid.num_experts;

        wait_for_turn((schedule.first_row[num_experts] - schedule.first_row[0]) / num_experts);
    }
    for (int i = blockIdx.x; i < num; i += gridDim.x) {
        const struct tile tile = tile_at(schedule, args.grid, i);

        for (int k = 0; k < tile.num_rows; k += TILE_K) {
            barrier_wait(&ring.empty[at.slot], at.parity);
            barrier_expect(&ring.full[at.slot], SLOT_BYTES);
            load_boxes(ring.a(at.slot), &maps.a, &ring.full[at.slot], tile.m * TILE_M,
                       tile.first_row + k, TILE_M / 64, args.whole_a);
            load_boxes(ring.b(at.slot), &maps.b, &ring.full[at.slot], tile.n * TILE_N,
                       tile.first_row + k, TILE_N / 64, args.whole_b);
            at.advance();
        }
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

/* A consumer's 64 rows of a tile of C on their way through shared memory. Chunk c of the consumer's
 * tiles, counted over all of them, is in box c % NUM_BOXES. */
template <bool OVERWRITE> struct rows_of_c {
    char *boxes;
    uint64_t *full; /* of each box: what is to be added to has come */
    const CUtensorMap *map;
    int barrier;
    bool is_leader; /* the thread that talks to the copy engine */
    uint64_t policy;
    unsigned first; /* chunk of the present tile */
    int num_asked;  /* chunks of it that have been asked for */
    int num_blocks; /* of the product */
    int expert, m, n;

    __device__ void begin(const struct tile &tile, int first_expert, int consumer)
    {
        num_asked = 0;
        num_blocks = (tile.num_rows + TILE_K - 1) / TILE_K;
        expert = first_expert + tile.expert;
        m = tile.m * TILE_M + consumer * 64;
        n = tile.n * TILE_N;
    }

    __device__ char *box(int chunk) const
    {
        return boxes + (first + chunk) % NUM_BOXES * CHUNK_BYTES;
    }

    __device__ void load(int chunk)
    {
        uint64_t *arrived = &full[(first + chunk) % NUM_BOXES];

        barrier_expect(arrived, CHUNK_BYTES);
        tma_load_3d_once(box(chunk), map, arrived, n + chunk * 32, m, expert, policy);
    }

    /* By the leader: the next chunk, into its box, or only into the L2 cache. */
    __device__ void ask(void)
    {
        if (num_asked == 0) {
            tma_wait_read<0>(); /* the tile before has left */
        }
        if (num_asked < NUM_BOXES) {
            load(num_asked);
        } else {
            tma_prefetch_3d(map, n + num_asked * 32, m, expert);
        }
        num_asked++;
    }

    /* With block `block` of the product: the chunks come evenly over the blocks, so that the
     * product's loads are not behind them; not at once, so that the tile before has left. */
    __device__ void go_on(int block)
    {
        if (!OVERWRITE && is_leader && block >= 2 && num_asked < NUM_CHUNKS &&
            block * NUM_CHUNKS >= num_asked * num_blocks) {
            ask();
        }
    }

    /* The box of a chunk, which may now be written; or, with what is to be added to in it. */
    __device__ char *take(int chunk)
    {
        const unsigned index = first + chunk;

        if (OVERWRITE) {
            return box(chunk); /* see give */
        }
        if (is_leader) {
            while (num_asked < NUM_BOXES) {
                ask();
            }
            if (chunk >= 2 && chunk + NUM_BOXES - 2 < NUM_CHUNKS) {
                tma_wait_read<1>();
                load(chunk + NUM_BOXES - 2); /* into the box of chunk - 2 */
            }
        }
        barrier_wait(&full[index % NUM_BOXES], index / NUM_BOXES % 2);
        return box(chunk);
    }

    __device__ void give(int chunk)
    {
        fence_async();
        if (OVERWRITE && is_leader) {
            tma_wait_read<NUM_BOXES - 2>(); /* the next chunk's box is empty */
        }
        named_barrier_sync(barrier, 128);
        if (is_leader) {
            tma_store_3d_once(map, box(chunk), n + chunk * 32, m, expert, policy);
            tma_commit();
        }
    }
};

/* Accumulator 4 j + 2 i + c of a lane is row lane / 4 + 8 i of the warp's 16, column 8 j +
 * 2 (lane % 4) + c. */
template <bool OVERWRITE>
__device__ inline void put_rows(const float (&acc)[128], struct rows_of_c<OVERWRITE> &c)
{
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, line = lane / 4;
    const int first = (warp * 16 + line) * 128 + lane % 2 * 8;

#pragma unroll
    for (int chunk = 0; chunk < NUM_CHUNKS; chunk++) {
        char *rows = c.take(chunk) + first;

#pragma unroll
        for (int j = 0; j < 4; j++) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int at = (chunk * 4 + j) * 4 + 2 * i;
                float2 *to =
                    (float2 *)(rows + i * 8 * 128 + (((j * 2 + lane % 4 / 2) ^ line) << 4));
                const float2 old = *to;

                *to = OVERWRITE ? make_float2(acc[at], acc[at + 1])
                                : make_float2(old.x + acc[at], old.y + acc[at + 1]);
            }
        }
        c.give(chunk);
    }
    c.first += NUM_CHUNKS;
}

/* Of an expert without rows. */
__device__ inline void put_zeros(struct rows_of_c<true> &c)
{
    for (int chunk = 0; chunk < NUM_CHUNKS; chunk++) {
        uint4 *packs = (uint4 *)c.take(chunk);

        for (int i = threadIdx.x % 128; i < CHUNK_BYTES / 16; i += 128) {
            packs[i] = make_uint4(0, 0, 0, 0);
        }
        c.give(chunk);
    }
    c.first += NUM_CHUNKS;
}

template <bool OVERWRITE>
__device__ inline void multiply(float (&acc)[128], const struct weights_ring &ring,
                                ring_position<NUM_SLOTS> &at, int consumer, int num_rows,
                                struct rows_of_c<OVERWRITE> &c)
{
    int previous = 0;

    for (int k = 0; k < num_rows; k += TILE_K) {
        uint64_t a, b;

        barrier_wait(&ring.full[at.slot], at.parity);
        if (num_rows - k < TILE_K) {
            clear_foreign_rows(ring.a(at.slot), num_rows - k);
        }
        a = tile_descriptor<true>(ring.a(at.slot) + consumer * BOX_BYTES, BOX_BYTES);
        b = tile_descriptor<true>(ring.b(at.slot), BOX_BYTES);
        wgmma_begin();
#pragma unroll
        for (int i = 0; i < TILE_K / 16; i++) {
            wgmma<true, true>(acc, a + i * (2048 >> 4), b + i * (2048 >> 4), k > 0 || i > 0);
        }
        wgmma_commit();
        c.go_on(k / TILE_K);
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

template <bool OVERWRITE>
__device__ inline void consume(const struct weights_ring &ring, const struct schedule &schedule,
                               char *boxes, uint64_t *box_full, const struct weights_maps &maps,
                               const struct weights_args &args)
{
    const int consumer = threadIdx.x / 128 - 1, num = num_tiles(schedule, args.grid);
    ring_position<NUM_SLOTS> at = {0, 0};
    struct rows_of_c<OVERWRITE> c = {
    };
    float acc[128];

    c.boxes = boxes + CHUNK_BYTES * NUM_BOXES * consumer;
    c.full = box_full + NUM_BOXES * consumer;
    c.map = &maps.c;
    c.barrier = CONSUMERS_BARRIER + 1 + consumer;
    c.is_leader = threadIdx.x % 128 == 0;
    c.policy = policy_once();
    for (int i = blockIdx.x; i < num; i += gridDim.x) {
        const struct tile tile = tile_at(schedule, args.grid, i);

        c.begin(tile, args.first_expert, consumer);
        if constexpr (OVERWRITE) {
            if (tile.num_rows == 0) {
                put_zeros(c);
                continue;
            }
        }
        multiply(acc, ring, at, consumer, tile.num_rows, c);
        put_rows(acc, c);
    }
    if (c.is_leader) {
        tma_wait_read<0>();
    }
}

template <bool OVERWRITE>
__global__ void __launch_bounds__(THREADS, 1)
    weights_kernel(const __grid_constant__ struct weights_maps maps, const struct weights_args args)
{
    extern __shared__ char shared[];
    __shared__ uint64_t full[NUM_SLOTS], empty[NUM_SLOTS], box_full[2 * NUM_BOXES];
    char *aligned = shared + (1024 - shared_address(shared) % 1024) % 1024;
    const struct weights_ring ring = {aligned, full, empty};
    char *boxes = aligned + NUM_SLOTS * SLOT_BYTES;
    int *numbers = (int *)(boxes + 2 * NUM_BOXES * CHUNK_BYTES);
    const struct schedule schedule = {numbers, numbers + args.grid.num_experts + 1};

    if (threadIdx.x == 0) {
        for (int i = 0; i < NUM_SLOTS; i++) {
            barrier_init(&full[i], 1);
            barrier_init(&empty[i], 2);
        }
        for (int i = 0; i < 2 * NUM_BOXES; i++) {
            barrier_init(&box_full[i], 1);
        }
        barrier_init_fence();
    }
    schedule_init(schedule, args.grid);
    __syncthreads();
    if (threadIdx.x < 128) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        if (threadIdx.x == 0) {
            produce<OVERWRITE>(ring, schedule, maps, args);
        }
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
        consume<OVERWRITE>(ring, schedule, boxes, box_full, maps, args);
    }
}

/* ---- on the host ---- */

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

template <bool OVERWRITE>
static void launch(struct stream *stream, const struct weights_maps &maps, struct weights_args args)
{
    const struct tile_grid all = args.grid;

    for (int e = 0; e < all.num_experts; e += LAUNCH_EXPERTS_MAX) {
        int shared_bytes;

        args.first_expert = e;
        args.grid = tile_grid_part(all, e);
        shared_bytes = SHARED_BYTES + schedule_bytes(args.grid.num_experts);
        CUDA_CHECK(cudaFuncSetAttribute(weights_kernel<OVERWRITE>,
                                        cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
        LAUNCH(stream, weights_kernel<OVERWRITE>, num_multiprocessors(), THREADS, shared_bytes,
               maps, args);
    }
}

void hopper_weights_matmul(struct stream *stream, const struct grouped_weights *op)
{
    const struct weights_maps maps = {operand_map_of(op->a, TILE_M / 64),
                                      operand_map_of(op->b, TILE_N / 64), tensor_map_of(op->c, 64)};
    struct weights_args args = {};

    args.whole_a = is_whole(op->a);
    args.whole_b = is_whole(op->b);
    args.grid.offsets = data_of<int32_t>(op->offsets);
    args.grid.num_experts = (int)op->offsets->dim[0] - 1;
    args.grid.tiles_m = (int)ceil_div(op->a->dim[1], TILE_M);
    args.grid.tiles_n = (int)ceil_div(op->b->dim[1], TILE_N);
    args.grid.raster = RASTER;
    args.grid.empty_too = op->overwrite;
    if (op->overwrite) {
        launch<true>(stream, maps, args);
    } else {
        launch<false>(stream, maps, args);
    }
}
