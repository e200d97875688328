/* grouped_schedule_cuda.cuh - which tiles the persistent kernels of the experts' products compute,
 * from numbers of rows that only the device knows.
 *
 * Block i of the grid takes the tiles i, i + blocks, ... But where communication may hold
 * multiprocessors while the kernel runs (SHARES), whose blocks then begin late, a block that is
 * done with a tile takes the next that nobody has. That costs about 1 % where all begin together.
 */
#ifndef CADRE_OPS_GROUPED_SCHEDULE_CUDA_CUH
#define CADRE_OPS_GROUPED_SCHEDULE_CUDA_CUH

#include "ops/hopper_cuda.cuh"

/* The grid of tiles of an expert; the same for all but for the number of tiles of M. */
struct tile_grid {
    const int32_t *offsets; /* [E+1] */
    int num_experts;
    int tiles_n;
    int tiles_m; /* of an expert that has rows, or 0: as many as its rows fill */
    int tile_rows;
    int raster; /* pairs of tiles of M walked for each tile of N, so that both stay in the L2 cache
                 */
    bool empty_too; /* an expert without rows has tiles_m too */
};

/* In shared memory, [E+1] each: the experts' rows and the number of tiles before each. */
struct schedule {
    int *first_row, *first_tile;
};

/* num_rows: of the expert. */
struct tile {
    int expert, m, n, first_row, num_rows;
};

/* Experts of a launch, so that their schedule fits in what the kernels leave of shared memory. */
enum { LAUNCH_EXPERTS_MAX = 192 };

/* The experts of the launch that begins with `first`. */
static inline struct tile_grid tile_grid_part(struct tile_grid grid, int first)
{
    const int rest = grid.num_experts - first;

    grid.offsets += first;
    grid.num_experts = rest < LAUNCH_EXPERTS_MAX ? rest : LAUNCH_EXPERTS_MAX;
    return grid;
}

static inline int schedule_bytes(int num_experts)
{
    return (num_experts + 1) * 2 * (int)sizeof(int);
}

__device__ inline int expert_tiles_m(const struct tile_grid &grid, int num_rows)
{
    if (grid.tiles_m > 0) {
        return num_rows > 0 || grid.empty_too ? grid.tiles_m : 0;
    }
    return (num_rows + grid.tile_rows - 1) / grid.tile_rows;
}

/* By the first warp of the block. */
__device__ inline void schedule_init(const struct schedule &schedule, const struct tile_grid &grid)
{
    const int lane = threadIdx.x;
    int before = 0;

    if (threadIdx.x >= 32) {
        return;
    }
    for (int begin = 0; begin < grid.num_experts; begin += 32) {
        const int e = begin + lane;
        const int first = e < grid.num_experts ? grid.offsets[e] : 0;
        const int end = e < grid.num_experts ? grid.offsets[e + 1] : first;
        const int tiles_m = expert_tiles_m(grid, end - first);
        int prefix = tiles_m * grid.tiles_n;

        for (int distance = 1; distance < 32; distance *= 2) {
            const int other = __shfl_up_sync(0xffffffffu, prefix, distance);

            prefix += lane >= distance ? other : 0;
        }
        if (e < grid.num_experts) {
            schedule.first_row[e + 1] = end;
            schedule.first_tile[e + 1] = before + prefix;
        }
        before += __shfl_sync(0xffffffffu, prefix, 31);
    }
    if (lane == 0) {
        schedule.first_row[0] = grid.offsets[0];
        schedule.first_tile[0] = 0;
    }
}

__device__ inline int num_tiles(const struct schedule &schedule, const struct tile_grid &grid)
{
    return schedule.first_tile[grid.num_experts];
}

__device__ inline struct tile tile_at(const struct schedule &schedule, const struct tile_grid &grid,
                                      int index)
{
    int low = 0, high = grid.num_experts; /* first_tile[low] <= index < first_tile[high] */
    struct tile tile;
    int tiles_m, group, group_size;

    while (high - low > 1) {
        const int middle = (low + high) / 2;

        if (schedule.first_tile[middle] <= index) {
            low = middle;
        } else {
            high = middle;
        }
    }
    tile.expert = low;
    tile.first_row = schedule.first_row[low];
    tile.num_rows = schedule.first_row[low + 1] - tile.first_row;
    tiles_m = expert_tiles_m(grid, tile.num_rows);
    index -= schedule.first_tile[low];
    group = index / (grid.raster * grid.tiles_n);
    index -= group * grid.raster * grid.tiles_n;
    group_size = min(grid.raster, tiles_m - group * grid.raster);
    tile.m = group * grid.raster + index % group_size;
    tile.n = index / group_size;
    return tile;
}

/* ---- who computes which tile ---- */

/* In device memory; zero between launches. */
struct tile_counter {
    unsigned next_tile, next_copy, num_left;
};

enum { NUM_COUNTERS = 64 };
static __device__ struct tile_counter counters[NUM_COUNTERS];

/* Launches that may run side by side have counters of their own. */
static inline struct tile_counter *counter_of_launch(void)
{
    static struct tile_counter *first;
    static unsigned num_launches;

    if (first == NULL) {
        CUDA_CHECK(cudaGetSymbolAddress((void **)&first, counters));
    }
    return first + num_launches++ % NUM_COUNTERS;
}

__device__ inline int number_take(unsigned *next)
{
    return (int)atomicAdd(next, 1u);
}

/* By each of num_threads threads of the grid, after the last number that it takes: the last of them
 * leaves zeros for a launch to come. */
template <bool SHARES>
__device__ inline void counter_leave(struct tile_counter *counter, unsigned num_threads)
{
    if (SHARES && atomicInc(&counter->num_left, num_threads - 1) == num_threads - 1) {
        counter->next_tile = 0;
        counter->next_copy = 0;
    }
}

/* Where a producer or a consumer stands in the ring of slots. A slot is handed over by two
 * barriers: `full` counts the bytes that arrived, `empty` the consumers that are done with it. */
template <int NUM_SLOTS> struct ring_position {
    int slot, parity;

    __device__ void advance(void)
    {
        if (++slot == NUM_SLOTS) {
            slot = 0;
            parity ^= 1;
        }
    }
};

/* The block's tiles on their way from the producer, which takes them, to the warps that work on
 * them: in shared memory. The index that ends them is beyond the last tile. */
enum { QUEUE_TILES = 4 };

struct tile_queue {
    int index[QUEUE_TILES];
    uint64_t full[QUEUE_TILES], empty[QUEUE_TILES];

    /* Readers are warps, or single threads. */
    __device__ void init(int num_readers)
    {
        for (int i = 0; i < QUEUE_TILES; i++) {
            barrier_init(&full[i], 1);
            barrier_init(&empty[i], num_readers);
        }
    }
};

/* The producer's: which tile it is at. */
template <bool SHARES> struct tile_taker {
    struct tile_counter *counter;
    struct tile_queue *queue;
    int index;
    ring_position<QUEUE_TILES> at = {0, 1};

    /* Before the producer works on the tile. */
    __device__ void announce(void)
    {
        if constexpr (SHARES) {
            barrier_wait(&queue->empty[at.slot], at.parity);
            queue->index[at.slot] = index;
            barrier_arrive(&queue->full[at.slot]);
            at.advance();
        }
    }

    /* A while before the next is worked on. */
    __device__ void take_next(void)
    {
        index = SHARES ? number_take(&counter->next_tile) : index + gridDim.x;
    }
};

/* By the producer, first of all. */
template <bool SHARES> __device__ inline int first_tile(struct tile_counter *counter)
{
    return SHARES ? number_take(&counter->next_tile) : blockIdx.x;
}

/* The block's tiles for one of the others. */
template <bool SHARES> struct tile_reader {
    struct tile_queue *queue;
    int next;
    ring_position<QUEUE_TILES> at = {0, 0};

    __device__ explicit tile_reader(struct tile_queue *queue) : queue(queue), next(blockIdx.x)
    {
    }

    /* By all lanes of a warp, or by a thread that is alone. */
    __device__ int take(bool is_alone)
    {
        int index = next;

        if constexpr (!SHARES) {
            next += gridDim.x;
            return index;
        }
        barrier_wait(&queue->full[at.slot], at.parity);
        index = queue->index[at.slot];
        if (!is_alone) {
            __syncwarp();
        }
        if (is_alone || threadIdx.x % 32 == 0) {
            barrier_arrive(&queue->empty[at.slot]);
        }
        at.advance();
        return index;
    }
};

/* By the calling warpgroup. */
__device__ inline void slot_release(uint64_t *empty)
{
    if (threadIdx.x % 128 == 0) {
        barrier_arrive(empty);
    }
}

#endif
