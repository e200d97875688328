/* grouped_schedule_cuda.cuh - which tiles the persistent kernels of the experts' products compute,
 * from numbers of rows that only the device knows.
 *
 * Block i of the grid takes the tiles i, i + blocks, ... */
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

/* By the calling warpgroup. */
__device__ inline void slot_release(uint64_t *empty)
{
    if (threadIdx.x % 128 == 0) {
        barrier_arrive(empty);
    }
}

#endif
