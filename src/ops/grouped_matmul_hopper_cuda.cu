/* Products of the experts' rows on Hopper's matrix units: one persistent kernel for all experts,
 * whose numbers of rows it reads on the device.
 *
 * A block owns a multiprocessor. Its first warpgroup (the producer) brings tiles of A and B into a
 * ring of shared memory, by the copy engine, or where the rows of A are gathered by 128 threads,
 * 16 bytes each; two warpgroups (the consumers) multiply, 64 x 256 each of a tile of
 * 128 x 256, accumulators in registers. While they store one tile, the producer already fetches
 * the next.
 *
 * Ragged rows need no padding: a tile that runs over the end of its expert computes rows of the
 * next one, which are not stored. */
#include "ops/activation_cuda.cuh"
#include "ops/grouped_matmul_cuda.cuh"
#include "ops/grouped_schedule_cuda.cuh"

enum {
    TILE_M = 128,
    TILE_N = 256,
    THREADS = 384,
    BOX_BYTES = 64 * 64 * 2, /* 64 rows of 64 bf16 on their way out */
    RASTER = 16,             /* see struct tile_grid */
    CONSUMER_BARRIER = 1,    /* and 2: of one consumer */
};

/* What a product is for: where B lies, and what becomes of a tile. */
enum product {
    PRODUCT_FC1,    /* B [E,2F,K]: gate and up side by side in a tile; stores h and a */
    PRODUCT_ROWS,   /* B [E,N,K] */
    PRODUCT_ROWS_T, /* B [E,K,N] */
    PRODUCT_D_FC2,  /* B [E,K,N]; derivative of SwiGLU, stores d_h and a */
};

/* Slots of the ring are 64 deep. D_FC2's are 32 deep: it has less room, beside the tile of h that
 * its end needs, and a slot is taken for as long as it is multiplied. */
template <enum product P> struct sizes {
    static constexpr int tile_k = P == PRODUCT_D_FC2 ? 32 : 64;
    static constexpr int num_slots = P == PRODUCT_D_FC2 ? 6 : 4;
    static constexpr int num_boxes = P == PRODUCT_D_FC2 ? 5 : 2; /* of a consumer */
    static constexpr int a_bytes = TILE_M * tile_k * 2, b_bytes = TILE_N * tile_k * 2;
    static constexpr int b_box_bytes = 64 * tile_k * 2; /* where B is by rows */
    static constexpr int slot_bytes = a_bytes + b_bytes;
    static constexpr int shared_bytes = 1024 + num_slots * slot_bytes + 2 * num_boxes * BOX_BYTES;
};

struct rows_args {
    struct tile_grid grid;
    int first_expert; /* of this launch */
    int n, k;         /* n: width of an output row (F for FC1 and D_FC2) */
    int num_rows;
    const bf16 *x; /* gathered A: rows of width k that row_token names */
    const int32_t *row_token;
    const float *row_prob; /* FC1 and D_FC2, optional */
    float *prob_partial;   /* D_FC2: [tiles of N, R] */
};

/* out: y, h or d_h; act: a; h: of D_FC2, to be read. */
struct rows_maps {
    CUtensorMap a, b, out, act, h;
};

template <enum product P> struct rows_ring {
    char *slots;
    uint64_t *full, *empty;

    __device__ char *a(int slot) const
    {
        return slots + slot * sizes<P>::slot_bytes;
    }

    __device__ char *b(int slot) const
    {
        return a(slot) + sizes<P>::a_bytes;
    }
};

/* ---- the producer ---- */

/* Block k of a tile of B. By rows: at once where the width is a multiple of 64. */
template <enum product P>
__device__ inline void load_b(char *to, const CUtensorMap *map, uint64_t *full,
                              const struct rows_args &args, const struct tile &tile, int k)
{
    const int n = tile.n * TILE_N, expert = args.first_expert + tile.expert;

    k *= sizes<P>::tile_k;
    if constexpr (P == PRODUCT_FC1) {
        tma_load_3d(to, map, full, k, n / 2, expert);
        tma_load_3d(to + sizes<P>::b_bytes / 2, map, full, k, args.n + n / 2, expert);
    } else if constexpr (P == PRODUCT_ROWS) {
        tma_load_3d(to, map, full, k, n, expert);
    } else if (args.n % 64 == 0) {
        tma_load_4d(to, map, full, 0, k, n / 64, expert);
    } else {
        for (int i = 0; i < TILE_N / 64; i++) {
            tma_load_3d(to + i * sizes<P>::b_box_bytes, map, full, n + i * 64, k, expert);
        }
    }
}

/* The copy engine's share of block k of a tile. */
template <enum product P, bool GATHER>
__device__ inline void load_block(const struct rows_ring<P> &ring, int slot,
                                  const struct rows_maps &maps, const struct rows_args &args,
                                  const struct tile &tile, int k)
{
    uint64_t *full = &ring.full[slot];

    barrier_expect(full, GATHER ? sizes<P>::b_bytes : sizes<P>::slot_bytes);
    if (!GATHER) {
        tma_load_2d(ring.a(slot), &maps.a, full, k * sizes<P>::tile_k,
                    tile.first_row + tile.m * TILE_M);
    }
    load_b<P>(ring.b(slot), &maps.b, full, args, tile, k);
}

/* Pieces of 16 bytes of A by each of 128 threads: piece thread % 8 of rows thread / 8 + 16 i. */
struct gathered_rows {
    static constexpr int count = TILE_M / 16;
    uint32_t piece[count]; /* where the token begins, in pieces from the beginning of x */

    /* Rows beyond the expert's last are not stored: any row does. */
    __device__ void find(const struct rows_args &args, const struct tile &tile)
    {
        const int end = tile.first_row + tile.num_rows;
        const int first = tile.first_row + tile.m * TILE_M + threadIdx.x / 8;

#pragma unroll
        for (int i = 0; i < count; i++) {
            piece[i] =
                (uint32_t)args.row_token[min(first + 16 * i, end - 1)] * (uint32_t)(args.k / 8);
        }
    }

    __device__ void copy(const struct rows_args &args, char *a, int k) const
    {
        const int row = threadIdx.x / 8, column = threadIdx.x % 8, at = k * 8 + column;
        const int num_bytes = at < args.k / 8 ? 16 : 0;
        char *to = a + row * 128 + ((column ^ row % 8) << 4);

#pragma unroll
        for (int i = 0; i < count; i++) {
            const uint64_t from = num_bytes > 0 ? piece[i] + (uint64_t)at : 0;

            copy_async(to + i * 2048, args.x + from * 8, num_bytes);
        }
    }
};

template <enum product P> __device__ inline int num_blocks_k(const struct rows_args &args)
{
    return (args.k + sizes<P>::tile_k - 1) / sizes<P>::tile_k;
}

template <enum product P, bool GATHER>
__device__ inline void produce(const struct rows_ring<P> &ring, const struct schedule &schedule,
                               const struct rows_maps &maps, const struct rows_args &args)
{
    const int num = num_tiles(schedule, args.grid);
    const int num_blocks = num_blocks_k<P>(args);
    ring_position<sizes<P>::num_slots> at = {0, 1}; /* the first slots are empty */

    for (int i = blockIdx.x; i < num; i += gridDim.x) {
        const struct tile tile = tile_at(schedule, args.grid, i);
        struct gathered_rows rows;

        if (GATHER) {
            rows.find(args, tile);
        }
        for (int k = 0; k < num_blocks; k++) {
            barrier_wait(&ring.empty[at.slot], at.parity);
            if (threadIdx.x == 0) {
                load_block<P, GATHER>(ring, at.slot, maps, args, tile, k);
            }
            if (GATHER) {
                rows.copy(args, ring.a(at.slot), k);
                barrier_arrive_after_copies(&ring.full[at.slot]);
            }
            at.advance();
        }
    }
}

/* ---- what becomes of a tile ----
 *
 * A consumer owns 64 rows, a warp of it 16. Accumulator 4 j + 2 i + c of a lane is row lane / 4 +
 * 8 i, column 8 j + 2 (lane % 4) + c. Chunks of 64 columns leave through boxes of shared memory,
 * which the copy engine stores while the next ones are filled; it leaves out the rows beyond the
 * expert's last. */

struct boxes {
    char *memory;   /* of the calling consumer */
    uint64_t *full; /* D_FC2: two, of the chunks of h */
    const struct rows_maps *maps;
    int barrier;
    bool is_leader; /* the thread that talks to the copy engine */
    int count;      /* of boxes used, by FC1 and ROWS */
    int row, num_rows, end,
        column; /* of the consumer's tile; num_rows: of the expert, at most 64 */

    __device__ void begin(const struct tile &tile, int consumer, int width)
    {
        row = tile.first_row + tile.m * TILE_M + consumer * 64;
        end = tile.first_row + tile.num_rows;
        num_rows = min(64, end - row);
        column = tile.n * width;
    }

    __device__ char *box(int i) const
    {
        return memory + i * BOX_BYTES;
    }

    /* Where a lane's pair of accumulators 4 j + 2 i lies in a box. */
    __device__ int pair(int i, int j) const
    {
        const int line = threadIdx.x % 32 / 4, warp = threadIdx.x / 32 % 4;

        return (warp * 16 + line + 8 * i) * 128 + ((j ^ line) << 4) + threadIdx.x % 4 * 4;
    }

    /* An empty box: of two, the one used before the last. */
    __device__ char *take(void)
    {
        if (is_leader) {
            tma_wait_read<1>();
        }
        named_barrier_sync(barrier, 128);
        return box(count++ % 2);
    }

    /* Makes what the consumer wrote visible to the copy engine. */
    __device__ void publish(void)
    {
        fence_async();
        named_barrier_sync(barrier, 128);
    }

    /* By the leader: a box to columns [at, at + 64) of a half of the rows. */
    __device__ void store(const CUtensorMap *map, const char *from, int at, int half)
    {
        if (num_rows > 0) {
            tma_store_4d(map, from, at, half, 64 - num_rows, row + num_rows);
        }
    }

    __device__ void give(const CUtensorMap *map, const char *from, int at, int half)
    {
        publish();
        if (is_leader) {
            store(map, from, at, half);
            tma_commit();
        }
    }

    /* By the leader: chunk `chunk` of h into boxes 2 i (gate) and 2 i + 1 (up), i = chunk % 2. */
    __device__ void load_h(int chunk)
    {
        const int i = chunk % 2;

        barrier_expect(&full[i], 2 * BOX_BYTES);
        tma_load_3d(box(2 * i), &maps->h, &full[i], column + chunk * 64, 0, row);
        tma_load_3d(box(2 * i + 1), &maps->h, &full[i], column + chunk * 64, 1, row);
    }

    __device__ void load_first(void)
    {
        if (is_leader) {
            tma_wait_read<0>(); /* the tile before has left */
            load_h(0);
            load_h(1);
        }
    }
};

__device__ inline uint32_t pair_of(float x, float y)
{
    const __nv_bfloat162 pair = __floats2bfloat162_rn(x, y);

    return *(const uint32_t *)&pair;
}

__device__ inline float2 floats_of(uint32_t pair)
{
    return __bfloat1622float2(*(const __nv_bfloat162 *)&pair);
}

/* Accumulators [first, first + 32) as a box. */
__device__ inline void fill_box(char *box, const float (&acc)[128], int first,
                                const struct boxes &boxes)
{
#pragma unroll
    for (int j = 0; j < 8; j++) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int at = first + 4 * j + 2 * i;

            *(uint32_t *)(box + boxes.pair(i, j)) = pair_of(acc[at], acc[at + 1]);
        }
    }
}

__device__ inline void store_rows(const float (&acc)[128], struct boxes &boxes)
{
#pragma unroll
    for (int chunk = 0; chunk < 4; chunk++) {
        char *box = boxes.take();

        fill_box(box, acc, chunk * 32, boxes);
        boxes.give(&boxes.maps->out, box, boxes.column + chunk * 64, 0);
    }
}

/* Of a lane's two rows. */
struct row_pair {
    int row[2];
    float prob[2]; /* the router's */

    __device__ row_pair(const struct rows_args &args, const struct boxes &boxes)
    {
        for (int i = 0; i < 2; i++) {
            row[i] = boxes.row + threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4 + 8 * i;
            prob[i] = args.row_prob != NULL && row[i] < boxes.end ? args.row_prob[row[i]] : 1.0f;
        }
    }
};

/* Accumulators [0, 64) are the gate, [64, 128) the other half. a comes from the rounded h, which is
 * what backward will find. */
__device__ inline void store_fc1(const float (&acc)[128], struct boxes &boxes,
                                 const struct rows_args &args)
{
    const struct row_pair rows(args, boxes);

#pragma unroll
    for (int chunk = 0; chunk < 2; chunk++) {
        const int column = boxes.column + chunk * 64;
        char *box = boxes.take();

        fill_box(box, acc, chunk * 32, boxes);
        boxes.give(&boxes.maps->out, box, column, 0);
        box = boxes.take();
        fill_box(box, acc, 64 + chunk * 32, boxes);
        boxes.give(&boxes.maps->out, box, column, 1);
        box = boxes.take();
#pragma unroll
        for (int j = 0; j < 8; j++) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int at = (chunk * 8 + j) * 4 + 2 * i;
                const float2 gate = floats_of(pair_of(acc[at], acc[at + 1]));
                const float2 up = floats_of(pair_of(acc[64 + at], acc[64 + at + 1]));

                *(uint32_t *)(box + boxes.pair(i, j)) =
                    pair_of(rows.prob[i] * activation_value<ACTIVATION_SWIGLU, true>(gate.x, up.x),
                            rows.prob[i] * activation_value<ACTIVATION_SWIGLU, true>(gate.y, up.y));
            }
        }
        boxes.give(&boxes.maps->act, box, column, 0);
    }
}

/* A lane's pair: gate and up in their boxes become d_gate and d_up, and act receives a. Returns
 * d_prob's share. */
__device__ inline float swiglu_backward(char *gate_at, char *up_at, char *act_at, float d0,
                                        float d1, float prob)
{
    const float2 gate = floats_of(*(uint32_t *)gate_at), up = floats_of(*(uint32_t *)up_at);
    const struct activation_slopes x = activation_slopes_of<ACTIVATION_SWIGLU, true>(gate.x, up.x);
    const struct activation_slopes y = activation_slopes_of<ACTIVATION_SWIGLU, true>(gate.y, up.y);

    *(uint32_t *)gate_at = pair_of(prob * d0 * x.d_x, prob * d1 * y.d_x);
    *(uint32_t *)up_at = pair_of(prob * d0 * x.d_up, prob * d1 * y.d_up);
    *(uint32_t *)act_at = pair_of(prob * x.value, prob * y.value);
    return d0 * x.value + d1 * y.value;
}

/* In place: the boxes of h become d_h. Two chunks of h are there when the product ends; the others
 * come while the chunk before them is worked on. */
__device__ inline void store_d_fc2(const float (&acc)[128], struct boxes &boxes,
                                   const struct rows_args &args, int tile_n)
{
    const struct row_pair rows(args, boxes);
    float d_prob[2] = {0.0f, 0.0f};
    char *act = boxes.box(4);

#pragma unroll
    for (int chunk = 0; chunk < 4; chunk++) {
        char *gate = boxes.box(chunk % 2 * 2), *up = gate + BOX_BYTES;

        if (boxes.is_leader) {
            tma_wait_read<0>(); /* the chunk before has left */
            if (chunk == 1 || chunk == 2) {
                boxes.load_h(chunk + 1);
            }
        }
        named_barrier_sync(boxes.barrier, 128);
        barrier_wait(&boxes.full[chunk % 2], chunk / 2);
#pragma unroll
        for (int j = 0; j < 8; j++) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int at = (chunk * 8 + j) * 4 + 2 * i, pair = boxes.pair(i, j);

                d_prob[i] += swiglu_backward(gate + pair, up + pair, act + pair, acc[at],
                                             acc[at + 1], rows.prob[i]);
            }
        }
        boxes.publish();
        if (boxes.is_leader) {
            boxes.store(&boxes.maps->out, gate, boxes.column + chunk * 64, 0);
            boxes.store(&boxes.maps->out, up, boxes.column + chunk * 64, 1);
            boxes.store(&boxes.maps->act, act, boxes.column + chunk * 64, 0);
            tma_commit();
        }
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        d_prob[i] += __shfl_xor_sync(0xffffffffu, d_prob[i], 1);
        d_prob[i] += __shfl_xor_sync(0xffffffffu, d_prob[i], 2);
        if (threadIdx.x % 4 == 0 && rows.row[i] < boxes.end) {
            args.prob_partial[(int64_t)tile_n * args.num_rows + rows.row[i]] = d_prob[i];
        }
    }
}

/* ---- the product ---- */

/* The accumulators of one tile of the calling consumer. */
template <enum product P, bool GATHER>
__device__ inline void multiply(float (&acc)[128], const struct rows_ring<P> &ring,
                                ring_position<sizes<P>::num_slots> &at, int consumer,
                                int num_blocks, struct boxes &boxes)
{
    constexpr bool b_by_rows = P == PRODUCT_ROWS_T || P == PRODUCT_D_FC2;
    /* 16 of k further: 32 bytes along a line, or 16 lines */
    constexpr uint64_t a_step = 32 >> 4, b_step = (b_by_rows ? 2048 : 32) >> 4;
    constexpr int a_line_bytes = sizes<P>::tile_k * 2;
    const int a_offset = consumer * 64 * a_line_bytes;
    int previous = 0;

    for (int k = 0; k < num_blocks; k++) {
        uint64_t a, b;

        barrier_wait(&ring.full[at.slot], at.parity);
        if (GATHER) {
            fence_async();
        }
        a = tile_descriptor<false, a_line_bytes>(ring.a(at.slot) + a_offset, 0);
        b = tile_descriptor<b_by_rows>(ring.b(at.slot), sizes<P>::b_box_bytes);
        wgmma_begin();
#pragma unroll
        for (int i = 0; i < sizes<P>::tile_k / 16; i++) {
            wgmma<false, b_by_rows>(acc, a + i * a_step, b + i * b_step, k > 0 || i > 0);
        }
        wgmma_commit();
        if (P == PRODUCT_D_FC2 && k == min(4, num_blocks - 1)) {
            boxes.load_first();
        }
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

/* ---- the kernel ---- */

template <enum product P, bool GATHER>
__device__ inline void consume(const struct rows_ring<P> &ring, const struct schedule &schedule,
                               char *memory, uint64_t *h_full, const struct rows_maps &maps,
                               const struct rows_args &args)
{
    constexpr int box_bytes = sizes<P>::num_boxes * BOX_BYTES;
    const int consumer = threadIdx.x / 128 - 1, num = num_tiles(schedule, args.grid);
    const int num_blocks = num_blocks_k<P>(args);
    ring_position<sizes<P>::num_slots> at = {0, 0};
    struct boxes boxes = {memory + consumer * box_bytes, h_full + 2 * consumer, &maps,
                          CONSUMER_BARRIER + consumer, threadIdx.x % 128 == 0};

    for (int i = blockIdx.x; i < num; i += gridDim.x) {
        const struct tile tile = tile_at(schedule, args.grid, i);
        float acc[128];

        boxes.begin(tile, consumer, P == PRODUCT_FC1 ? TILE_N / 2 : TILE_N);
        multiply<P, GATHER>(acc, ring, at, consumer, num_blocks, boxes);
        if (P == PRODUCT_FC1) {
            store_fc1(acc, boxes, args);
        } else if (P == PRODUCT_D_FC2) {
            store_d_fc2(acc, boxes, args, tile.n);
        } else {
            store_rows(acc, boxes);
        }
    }
    if (boxes.is_leader) {
        tma_wait_read<0>();
    }
}

template <enum product P, bool GATHER>
__global__ void __launch_bounds__(THREADS, 1)
    rows_kernel(const __grid_constant__ struct rows_maps maps, const struct rows_args args)
{
    constexpr int num_slots = sizes<P>::num_slots;
    extern __shared__ char shared[];
    __shared__ uint64_t full[num_slots], empty[num_slots], h_full[4];
    char *aligned = shared + (1024 - shared_address(shared) % 1024) % 1024;
    const struct rows_ring<P> ring = {
        aligned, full, empty
    };
    char *boxes = aligned + num_slots * sizes<P>::slot_bytes;
    int *numbers = (int *)(boxes + 2 * sizes<P>::num_boxes * BOX_BYTES);
    const struct schedule schedule = {numbers, numbers + args.grid.num_experts + 1};

    if (threadIdx.x == 0) {
        for (int i = 0; i < num_slots; i++) {
            barrier_init(&full[i], GATHER ? 129 : 1);
            barrier_init(&empty[i], 2);
        }
        for (int i = 0; i < 4; i++) {
            barrier_init(&h_full[i], 1);
        }
        barrier_init_fence();
    }
    __syncwarp();
    schedule_init(schedule, args.grid);
    __syncthreads();
    if (threadIdx.x < 128) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        if (GATHER || threadIdx.x == 0) {
            produce<P, GATHER>(ring, schedule, maps, args);
        }
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
        consume<P, GATHER>(ring, schedule, boxes, h_full, maps, args);
    }
}

/* ---- on the host ---- */

/* How the copy engine stores 64 rows of x, of which the last may be left out: rows are seen as
 * [R+1][64] from 64 rows before the first, both of the same stride. A box of n rows from row r on
 * that begins at row 64 - n of group r + n holds its first n rows within the bounds. `halves` equal
 * parts of a row have bounds of their own. The technique is Triton's ragged TMA. */
static CUtensorMap store_map_of(const struct tensor *x, int halves)
{
    const cuuint64_t width = (cuuint64_t)(x->dim[1] / halves), row_bytes = width * halves * 2;
    const struct tensor_view view = {
        x->dtype,
        (char *)x->data - 64 * row_bytes,
        4,
        {width, (cuuint64_t)halves, 64, (cuuint64_t)x->dim[0] + 1},
        {width * 2, row_bytes, row_bytes},
        {64, 1, 64, 1},
    };

    return tensor_map_of_view(&view);
}

/* A in boxes of TILE_M rows and tile_k columns. */
static CUtensorMap a_map_of(const struct tensor *a, int tile_k)
{
    const cuuint64_t width = (cuuint64_t)a->dim[1];
    const struct tensor_view view = {a->dtype,    a->data,
                                     2,           {width, (cuuint64_t)a->dim[0]},
                                     {width * 2}, {(cuuint32_t)tile_k, TILE_M}};

    return tensor_map_of_view(&view);
}

/* B [E,K,N] in boxes of tile_k rows and 64 columns: a tile's four side by side, or one where N is
 * no multiple of 64. */
static CUtensorMap b_by_rows_map_of(const struct tensor *b, int tile_k)
{
    const cuuint64_t depth = (cuuint64_t)b->dim[1], width = (cuuint64_t)b->dim[2];
    const struct tensor_view view = {
        b->dtype,
        b->data,
        4,
        {64, depth, width / 64, (cuuint64_t)b->dim[0]},
        {width * 2, 128, depth * width * 2},
        {64, (cuuint32_t)tile_k, TILE_N / 64, 1},
    };

    return width % 64 == 0 ? tensor_map_of_view(&view) : tensor_map_of(b, tile_k);
}

/* 64 rows and 64 columns of one half of h. */
static CUtensorMap halves_map_of(const struct tensor *h)
{
    const cuuint64_t width = (cuuint64_t)(h->dim[1] / 2);
    const struct tensor_view view = {
        h->dtype,   h->data, 3, {width, 2, (cuuint64_t)h->dim[0]}, {width * 2, width * 4},
        {64, 1, 64}};

    return tensor_map_of_view(&view);
}

template <enum product P, bool GATHER>
static void launch(struct stream *stream, const struct rows_maps &maps, const struct rows_args &all)
{
    const int num_experts = all.grid.num_experts;
    struct rows_args args = all;

    for (int e = 0; e < num_experts; e += LAUNCH_EXPERTS_MAX) {
        int shared_bytes;

        args.first_expert = e;
        args.grid = tile_grid_part(all.grid, e);
        shared_bytes = sizes<P>::shared_bytes + schedule_bytes(args.grid.num_experts);
        CUDA_CHECK(cudaFuncSetAttribute((rows_kernel<P, GATHER>),
                                        cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
        LAUNCH(stream, (rows_kernel<P, GATHER>), num_multiprocessors(), THREADS, shared_bytes, maps,
               args);
    }
}

static struct rows_args rows_args_of(const struct tensor *a, const struct tensor *row_token,
                                     const struct tensor *offsets, int64_t n, int64_t tiles_n)
{
    struct rows_args args = {};

    args.grid.offsets = data_of<int32_t>(offsets);
    args.grid.num_experts = (int)offsets->dim[0] - 1;
    args.grid.tiles_n = (int)tiles_n;
    args.grid.tile_rows = TILE_M;
    args.grid.raster = RASTER;
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
    const struct rows_maps maps = {a_map_of(op->x, sizes<PRODUCT_FC1>::tile_k),
                                   tensor_map_of(op->fc1, TILE_N / 2), store_map_of(op->h, 2),
                                   store_map_of(op->a, 1)};
    struct rows_args args =
        rows_args_of(op->x, op->row_token, op->offsets, width, ceil_div(width, TILE_N / 2));

    args.row_prob = data_of<float>(op->row_prob);
    if (op->row_token != NULL) {
        launch<PRODUCT_FC1, true>(stream, maps, args);
    } else {
        launch<PRODUCT_FC1, false>(stream, maps, args);
    }
}

void hopper_rows_matmul(struct stream *stream, const struct grouped_rows *op)
{
    const int64_t width = op->c->dim[1];
    const struct rows_args args =
        rows_args_of(op->a, NULL, op->offsets, width, ceil_div(width, TILE_N));
    const struct rows_maps maps = {
        a_map_of(op->a, sizes<PRODUCT_ROWS>::tile_k),
        op->b_transposed ? b_by_rows_map_of(op->b, sizes<PRODUCT_ROWS_T>::tile_k)
                         : tensor_map_of(op->b, TILE_N),
        store_map_of(op->c, 1),
    };

    if (op->b_transposed) {
        launch<PRODUCT_ROWS_T, false>(stream, maps, args);
    } else {
        launch<PRODUCT_ROWS, false>(stream, maps, args);
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
    const int tile_k = sizes<PRODUCT_D_FC2>::tile_k;
    const struct rows_maps maps = {a_map_of(op->d_y, tile_k), b_by_rows_map_of(op->fc2, tile_k),
                                   store_map_of(op->d_h, 2), store_map_of(op->a, 1),
                                   halves_map_of(op->h)};
    struct rows_args args = rows_args_of(op->d_y, NULL, op->offsets, width, num_partials);

    args.row_prob = data_of<float>(op->row_prob);
    args.prob_partial =
        (float *)arena_allocate(stream->scratch, (size_t)(num_partials * args.num_rows) * 4);
    launch<PRODUCT_D_FC2, false>(stream, maps, args);
    if (op->d_row_prob != NULL) {
        LAUNCH(stream, prob_sum_kernel, ceil_div(args.num_rows, 256), 256, 0,
               data_of<float>(op->d_row_prob), args.prob_partial,
               args.grid.offsets + args.grid.num_experts, (int)num_partials, args.num_rows);
    }
}
