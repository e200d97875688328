/* Products of the experts' rows on Hopper's matrix units: one persistent kernel for all experts,
 * whose numbers of rows it reads on the device.
 *
 * A block owns a multiprocessor. One warp (the producer) brings tiles of A and B into a ring of
 * shared memory by the copy engine; rows of A that are gathered are brought by two more, 16 bytes a
 * thread. Two warpgroups (the consumers) multiply, 64 rows each of a tile of 128, accumulators in
 * registers; at the end of a tile each puts its half as bf16 into boxes of shared memory and goes
 * on with the next. The remaining warps (the finishers) turn a half into results while the next
 * tile is multiplied: SwiGLU, or its derivative, and the copy engine's stores.
 *
 * Ragged rows need no padding: a tile that runs over the end of its expert computes rows of the
 * next one, which are not stored; a half without rows is not multiplied. */
#include "ops/grouped_finishers_cuda.cuh"
#include "ops/grouped_matmul_cuda.cuh"

enum {
    THREADS = 384,
    GATHERERS = 64,
    RASTER = 16,          /* see struct tile_grid */
    CONSUMER_BARRIER = 2, /* and 3 */
};

/* ---- the producer ---- */

/* Block k of a tile of B. By rows: at once where the width is a multiple of 64. */
template <class T>
__device__ inline void load_b(char *to, const CUtensorMap *map, uint64_t *full,
                              const struct rows_args &args, const struct tile &tile, int k)
{
    const int n = tile.n * T::width, expert = args.first_expert + tile.expert;

    k *= TILE_K;
    if constexpr (T::product == PRODUCT_FC1) {
        tma_load_3d(to, map, full, k, n, expert);
        tma_load_3d(to + T::b_bytes / 2, map, full, k, args.n + n, expert);
    } else if constexpr (T::product == PRODUCT_FC2) {
        tma_load_3d(to, map, full, k, n, expert);
    } else if (args.n % 64 == 0) {
        tma_load_4d(to, map, full, 0, k, n / 64, expert);
    } else {
        for (int i = 0; i < T::n / 64; i++) {
            tma_load_3d(to + i * T::b_box_bytes, map, full, n + i * 64, k, expert);
        }
    }
}

__device__ inline int num_blocks_k(const struct rows_args &args)
{
    return (args.k + TILE_K - 1) / TILE_K;
}

template <class T>
__device__ inline void produce(const struct rows_ring<T> &ring, const struct schedule &schedule,
                               struct tile_taker<T::shares> taker, const struct rows_maps &maps,
                               const struct rows_args &args)
{
    const int num = num_tiles(schedule, args.grid), num_blocks = num_blocks_k(args);
    const int taking_k = max(0, num_blocks - TAKE_AHEAD);
    typename T::ring_place at = {0, 1}; /* the first slots are empty */

    while (taker.announce(), taker.index < num) {
        const struct tile tile = tile_at(schedule, args.grid, taker.index);

        for (int k = 0; k < num_blocks; k++) {
            uint64_t *full = &ring.full[at.slot];

            if (k == taking_k) {
                taker.take_next();
            }
            barrier_wait(&ring.empty[at.slot], at.parity);
            barrier_expect(full, T::gather ? T::b_bytes : T::slot_bytes);
            if (!T::gather) {
                tma_load_2d(ring.a(at.slot), &maps.a, full, k * TILE_K,
                            tile.first_row + tile.m * TILE_M);
            }
            load_b<T>(ring.b(at.slot), &maps.b, full, args, tile, k);
            at.advance();
        }
    }
}

/* Pieces of 16 bytes of A by each gatherer: piece thread % 8 of rows thread / 8 + 8 i, swizzled. */
struct gathered_rows {
    static constexpr int step = GATHERERS / 8, count = TILE_M / step;
    uint32_t piece[count]; /* where the token begins, in pieces from the beginning of x */

    /* Rows beyond the expert's last are not stored: any row does. */
    __device__ void find(const struct rows_args &args, const struct tile &tile)
    {
        const int end = tile.first_row + tile.num_rows;
        const int first = tile.first_row + tile.m * TILE_M + threadIdx.x % GATHERERS / 8;

#pragma unroll
        for (int i = 0; i < count; i++) {
            piece[i] =
                (uint32_t)args.row_token[min(first + step * i, end - 1)] * (uint32_t)(args.k / 8);
        }
    }

    __device__ void copy(const struct rows_args &args, char *a, int k) const
    {
        const int row = threadIdx.x % GATHERERS / 8, column = threadIdx.x % 8;
        const int at = k * 8 + column, num_bytes = at < args.k / 8 ? 16 : 0;
        char *to = a + row * 128 + ((column ^ row) << 4);

#pragma unroll
        for (int i = 0; i < count; i++) {
            const uint64_t from = num_bytes > 0 ? piece[i] + (uint64_t)at : 0;

            copy_async(to + i * step * 128, args.x + from * 8, num_bytes);
        }
    }
};

template <class T>
__device__ inline void gather(const struct rows_ring<T> &ring, struct block_tiles<T::shares> tiles,
                              const struct rows_args &args)
{
    const int num_blocks = num_blocks_k(args);
    typename T::ring_place at = {0, 1};
    struct tile tile;

    while (tiles.take(&tile)) {
        struct gathered_rows rows;

        rows.find(args, tile);
        for (int k = 0; k < num_blocks; k++) {
            barrier_wait(&ring.empty[at.slot], at.parity);
            rows.copy(args, ring.a(at.slot), k);
            barrier_arrive_after_copies(&ring.full[at.slot]);
            at.advance();
        }
    }
}

/* ---- rows copied meanwhile ---- */

/* A piece of PIECE_BYTES of a row, or its rest. */
struct copied_piece {
    int64_t row;
    int at, num_bytes;

    __device__ copied_piece(const struct copied_rows &rows, int pieces_per_row, int piece)
    {
        row = piece / pieces_per_row;
        at = piece % pieces_per_row * PIECE_BYTES;
        num_bytes = min(PIECE_BYTES, rows.row_bytes - at);
    }
};

/* By one thread, through NUM_PIECES pieces of shared memory: two are on their way in while one
 * leaves. */
template <bool SHARES>
__device__ inline void copy_rows(const struct rows_args &args, char *memory, uint64_t *arrived)
{
    const struct copied_rows &rows = args.copied;
    const int pieces_per_row = (rows.row_bytes + PIECE_BYTES - 1) / PIECE_BYTES;
    const int num_pieces = *rows.num_rows * pieces_per_row;
    int coming[2] = {num_pieces, num_pieces}, next = 0;

    for (int i = 0; i < 2 || coming[0] < num_pieces; i++) {
        const int leaving = coming[0];

        if (!SHARES) {
            next = blockIdx.x + i * gridDim.x;
        } else if (i % BATCH_PIECES == 0) {
            next = number_take(&args.counter->next_copy) * BATCH_PIECES;
        } else {
            next++;
        }
        coming[0] = coming[1];
        coming[1] = next;
        if (next < num_pieces) {
            const struct copied_piece piece(rows, pieces_per_row, next);
            const int box = i % NUM_PIECES;

            tma_wait_read<1>(); /* what was in the box has left */
            barrier_expect(&arrived[box], piece.num_bytes);
            bulk_load(memory + box * PIECE_BYTES,
                      rows.from + (int64_t)rows.index[piece.row] * rows.row_bytes + piece.at,
                      piece.num_bytes, &arrived[box]);
        }
        if (leaving < num_pieces) {
            const struct copied_piece piece(rows, pieces_per_row, leaving);
            const int box = (i - 2) % NUM_PIECES;

            barrier_wait(&arrived[box], (i - 2) / NUM_PIECES % 2);
            bulk_store(rows.to + piece.row * rows.row_bytes + piece.at, memory + box * PIECE_BYTES,
                       piece.num_bytes);
            tma_commit();
        }
    }
    tma_wait_read<0>();
}

/* ---- the consumers ---- */

/* A warp of a consumer owns 16 rows. Accumulator 4 j + 2 i + c of a lane is row lane / 4 + 8 i,
 * column 8 j + 2 (lane % 4) + c. */
template <int NUM> __device__ inline void fill_boxes(char *boxes, const float (&acc)[NUM])
{
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, matrix = lane / 8;
    char *row = boxes + (warp * 16 + matrix % 2 * 8 + lane % 8) * 128;
    const int column = (matrix / 2 ^ lane % 8) << 4;

#pragma unroll
    for (int chunk = 0; chunk < NUM / 32; chunk++) {
#pragma unroll
        for (int j = 0; j < 8; j += 2) {
            const float *x = &acc[(chunk * 8 + j) * 4];

            matrices_store(row + chunk * BOX_BYTES + (column ^ j << 4), pair_of(x[0], x[1]),
                           pair_of(x[2], x[3]), pair_of(x[4], x[5]), pair_of(x[6], x[7]));
        }
    }
}

/* The accumulators of one tile of the calling consumer. */
template <class T>
__device__ inline void multiply(float (&acc)[T::n / 2], const struct rows_ring<T> &ring,
                                typename T::ring_place &at, int consumer, int num_blocks)
{
    /* 16 of k further: 32 bytes along a line, or 16 lines */
    constexpr uint64_t a_step = 32 >> 4, b_step = (T::b_by_rows ? 2048 : 32) >> 4;
    const int a_offset = consumer * 64 * 128;
    int previous = 0;

    for (int k = 0; k < num_blocks; k++) {
        uint64_t a, b;

        barrier_wait(&ring.full[at.slot], at.parity);
        if (T::gather) {
            fence_async();
        }
        a = tile_descriptor<false>(ring.a(at.slot) + a_offset, 0);
        b = tile_descriptor<T::b_by_rows>(ring.b(at.slot), T::b_box_bytes);
        wgmma_begin();
#pragma unroll
        for (int i = 0; i < TILE_K / 16; i++) {
            wgmma<false, T::b_by_rows>(acc, a + i * a_step, b + i * b_step, k > 0 || i > 0);
        }
        wgmma_commit();
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

/* Instead, where the half has no rows. */
template <class T>
__device__ inline void skip(const struct rows_ring<T> &ring, typename T::ring_place &at,
                            int consumer, int num_blocks)
{
    for (int k = 0; k < num_blocks; k++) {
        barrier_wait(&ring.full[at.slot], at.parity);
        named_barrier_sync(CONSUMER_BARRIER + consumer, 128); /* all have seen it */
        slot_release(&ring.empty[at.slot]);
        at.advance();
    }
}

template <class T>
__device__ inline void consume(const struct rows_ring<T> &ring, const struct halves<T> &halves,
                               struct block_tiles<T::shares> tiles, const struct rows_args &args)
{
    const int consumer = threadIdx.x / 128 - 1, num_blocks = num_blocks_k(args);
    typename T::ring_place at = {0, 0};
    struct tile tile;
    int parity = 1; /* the boxes are free at first */

    while (tiles.take(&tile)) {
        const bool has_rows = tile.m * TILE_M + consumer * 64 < tile.num_rows;
        float acc[T::n / 2];

        if (has_rows) {
            multiply<T>(acc, ring, at, consumer, num_blocks);
        } else {
            skip<T>(ring, at, consumer, num_blocks);
        }
        barrier_wait(&halves.free[consumer], parity);
        if (has_rows) {
            fill_boxes(halves.of(consumer), acc);
            fence_async();
        }
        __syncwarp();
        if (threadIdx.x % 32 == 0) {
            barrier_arrive(&halves.filled[consumer]);
        }
        parity ^= 1;
    }
}

/* ---- the kernel ---- */

/* In shared memory. */
template <class T> struct rows_barriers {
    uint64_t full[T::num_slots], empty[T::num_slots];
    uint64_t filled[2], free[2], arrived[NUM_PIECES];
    struct tile_queue queue;

    __device__ void init(void)
    {
        for (int i = 0; i < T::num_slots; i++) {
            barrier_init(&full[i], T::gather ? 1 + GATHERERS : 1);
            barrier_init(&empty[i], 2);
        }
        for (int i = 0; i < 2; i++) {
            barrier_init(&filled[i], 4);
            barrier_init(&free[i], T::product == PRODUCT_D_FC2 ? T::num_finishers / 32 : 1);
        }
        for (int i = 0; i < NUM_PIECES; i++) {
            barrier_init(&arrived[i], 1);
        }
        if (T::shares) {
            queue.init(T::num_readers);
        }
        barrier_init_fence();
    }
};

/* Threads of a block that take numbers from the counter. */
template <class T> __device__ inline int num_takers(const struct rows_args &args)
{
    return T::product == PRODUCT_D_X && args.copied.to != NULL ? 2 : 1;
}

/* By the four warps that do not multiply. first: the block's first tile, for the producer. */
template <class T>
__device__ inline void attend(const struct rows_ring<T> &ring, const struct halves<T> &halves,
                              struct rows_barriers<T> &barriers, const struct schedule &schedule,
                              int first, const struct rows_maps &maps, const struct rows_args &args)
{
    const struct block_tiles<T::shares> tiles = {
        schedule, args.grid, tile_reader<T::shares>(&barriers.queue)
    };

    if (threadIdx.x < 32) {
        if (threadIdx.x == 0) {
            produce<T>(ring, schedule, {args.counter, &barriers.queue, first}, maps, args);
            counter_leave<T::shares>(args.counter, num_takers<T>(args) * gridDim.x);
        }
    } else if (T::gather && threadIdx.x < 32 + GATHERERS) {
        gather<T>(ring, tiles, args);
    } else if (!T::only_stores || threadIdx.x == 96) {
        finish<T>(halves, tiles, maps, args);
    } else if (threadIdx.x == 32 && num_takers<T>(args) == 2) {
        copy_rows<T::shares>(args, halves.of(2), barriers.arrived);
        counter_leave<T::shares>(args.counter, 2 * gridDim.x);
    }
}

template <class T>
__global__ void __launch_bounds__(THREADS, 1)
    rows_kernel(const __grid_constant__ struct rows_maps maps, const struct rows_args args)
{
    extern __shared__ char shared[];
    __shared__ struct rows_barriers<T> barriers;
    char *aligned = shared + (1024 - shared_address(shared) % 1024) % 1024;
    const struct rows_ring<T> ring = {
        aligned, barriers.full, barriers.empty
    };
    const struct halves<T> halves = {
        aligned + T::num_slots *T::slot_bytes, barriers.filled, barriers.free
    };
    int *numbers = (int *)(halves.boxes + T::boxes_bytes);
    const struct schedule schedule = {numbers, numbers + args.grid.num_experts + 1};

    if (threadIdx.x == 0) {
        barriers.init();
    }
    const int first = threadIdx.x == 0 ? first_tile<T::shares>(args.counter) : 0;

    __syncwarp();
    schedule_init(schedule, args.grid);
    __syncthreads();

    if (threadIdx.x < 128) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(T::shares ? 136 : 120));
        attend<T>(ring, halves, barriers, schedule, first, maps, args);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(T::shares ? 184 : 192));
        consume<T>(ring, halves, {schedule, args.grid, tile_reader<T::shares>(&barriers.queue)},
                   args);
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

/* B [E,K,N] in boxes of TILE_K rows and 64 columns: a tile's side by side, or one where N is no
 * multiple of 64. */
static CUtensorMap by_rows_map_of(const struct tensor *b, int tile_n)
{
    const cuuint64_t depth = (cuuint64_t)b->dim[1], width = (cuuint64_t)b->dim[2];
    const struct tensor_view view = {
        b->dtype,
        b->data,
        4,
        {64, depth, width / 64, (cuuint64_t)b->dim[0]},
        {width * 2, 128, depth * width * 2},
        {64, TILE_K, (cuuint32_t)tile_n / 64, 1},
    };

    return width % 64 == 0 ? tensor_map_of_view(&view) : tensor_map_of(b, TILE_K);
}

/* The operands of a product: A [R,K] or gathered, B, and the maps of its results. */
struct rows_problem {
    const struct tensor *a, *b;
    struct rows_maps results;
    struct rows_args args;
};

template <class T> static void launch(struct stream *stream, const struct rows_problem *problem)
{
    const int num_experts = problem->args.grid.num_experts;
    struct rows_maps maps = problem->results;
    struct rows_args args = problem->args;

    maps.a = tensor_map_of(problem->a, TILE_M);
    maps.b = T::b_by_rows ? by_rows_map_of(problem->b, T::n) : tensor_map_of(problem->b, T::width);
    args.grid.tile_rows = TILE_M;
    args.grid.tiles_n = (int)ceil_div(args.n, T::width);
    for (int e = 0; e < num_experts; e += LAUNCH_EXPERTS_MAX) {
        const struct tile_grid all = args.grid;
        int shared_bytes;

        args.first_expert = e;
        args.grid = tile_grid_part(all, e);
        args.counter = T::shares ? counter_of_launch() : NULL;
        shared_bytes = T::shared_bytes + schedule_bytes(args.grid.num_experts);
        CUDA_CHECK(cudaFuncSetAttribute(rows_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        shared_bytes));
        LAUNCH(stream, rows_kernel<T>, num_multiprocessors(), THREADS, shared_bytes, maps, args);
        args.grid = all;
        args.copied.to = NULL; /* by the first launch */
    }
}

template <enum product P, int N, bool GATHER>
static void launch_tiling(struct stream *stream, const struct rows_problem *problem)
{
    if (stream->device->shares_multiprocessors) {
        launch<tiling<P, N, GATHER, true>>(stream, problem);
    } else {
        launch<tiling<P, N, GATHER, false>>(stream, problem);
    }
}

/* Returns the columns of a tile. */
template <enum product P, bool GATHER>
static int launch_in_tiles(struct stream *stream, const struct rows_problem *problem)
{
    const int64_t columns = problem->args.n * (P == PRODUCT_FC1 ? 2 : 1);
    const int tile_columns = grouped_tile_columns(
        problem->args.num_rows, problem->args.grid.num_experts, columns, num_multiprocessors());

    if (tile_columns == GROUPED_TILE_WIDE) {
        launch_tiling<P, GROUPED_TILE_WIDE, GATHER>(stream, problem);
    } else {
        launch_tiling<P, GROUPED_TILE_NARROW, GATHER>(stream, problem);
    }
    return tile_columns;
}

static struct rows_problem rows_problem_of(const struct tensor *a, const struct tensor *row_token,
                                           const struct tensor *b, const struct tensor *offsets,
                                           int64_t n)
{
    struct rows_problem problem = {};
    struct rows_args *args = &problem.args;

    problem.a = a;
    problem.b = b;
    args->grid.offsets = data_of<int32_t>(offsets);
    args->grid.num_experts = (int)offsets->dim[0] - 1;
    args->grid.raster = RASTER;
    args->n = (int)n;
    args->k = (int)a->dim[1];
    args->num_rows = (int)(row_token != NULL ? row_token : a)->dim[0];
    args->x = data_of<bf16>(a);
    args->row_token = data_of<int32_t>(row_token);
    return problem;
}

void hopper_fc1(struct stream *stream, const struct hopper_fc1 *op)
{
    struct rows_problem problem =
        rows_problem_of(op->x, op->row_token, op->fc1, op->offsets, op->a->dim[1]);

    problem.args.row_prob = data_of<float>(op->row_prob);
    problem.results.out = store_map_of(op->h, 2);
    problem.results.act = store_map_of(op->a, 1);
    if (op->row_token != NULL) {
        launch_in_tiles<PRODUCT_FC1, true>(stream, &problem);
    } else {
        launch_in_tiles<PRODUCT_FC1, false>(stream, &problem);
    }
}

void hopper_fc2(struct stream *stream, const struct hopper_fc2 *op)
{
    struct rows_problem problem = rows_problem_of(op->a, NULL, op->fc2, op->offsets, op->y->dim[1]);

    problem.results.out = store_map_of(op->y, 1);
    launch_in_tiles<PRODUCT_FC2, false>(stream, &problem);
}

void hopper_d_x(struct stream *stream, const struct hopper_d_x *op)
{
    struct rows_problem problem =
        rows_problem_of(op->d_h, NULL, op->fc1, op->offsets, op->d_x->dim[1]);

    problem.results.out = store_map_of(op->d_x, 1);
    if (op->x_rows != NULL) {
        problem.args.copied = {
            (const char *)op->x->data, (char *)op->x_rows->data, data_of<int32_t>(op->row_token),
            problem.args.grid.offsets + problem.args.grid.num_experts, (int)op->x->dim[1] * 2};
    }
    launch_in_tiles<PRODUCT_D_X, false>(stream, &problem);
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
    struct rows_problem problem =
        rows_problem_of(op->d_y, NULL, op->fc2, op->offsets, op->a->dim[1]);
    struct rows_args *args = &problem.args;
    const int64_t num_partials = ceil_div(args->n, GROUPED_TILE_NARROW); /* at most */
    int tile_columns;

    args->row_prob = data_of<float>(op->row_prob);
    args->prob_partial =
        (float *)arena_allocate(stream->scratch, (size_t)(num_partials * args->num_rows) * 4);
    args->h = data_of<bf16>(op->h);
    args->d_h = data_of<bf16>(op->d_h);
    args->act = data_of<bf16>(op->a);
    tile_columns = launch_in_tiles<PRODUCT_D_FC2, false>(stream, &problem);
    if (op->d_row_prob != NULL) {
        LAUNCH(stream, prob_sum_kernel, ceil_div(args->num_rows, 256), 256, 0,
               data_of<float>(op->d_row_prob), args->prob_partial,
               args->grid.offsets + args->grid.num_experts, (int)ceil_div(args->n, tile_columns),
               args->num_rows);
    }
}
