/* grouped_schedule_cuda.cuh - which tiles the persistent kernels of the experts' products compute,
 * from numbers of rows that only the device knows.
 *
 * The blocks of a cluster of two work on a unit of two tiles at a time: neighbours along M, which
 * share the tile of B; or, for an expert's last tile of an odd number, neighbours along N, which
 * share nothing. Cluster i takes the units i, i + clusters, ... */
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
};

/* In shared memory, [E+1] each: the experts' rows and the number of units before each. */
struct schedule {
    int *first_row, *first_unit;
};

/* A block's share of a unit. num_rows: of the expert. */
struct tile {
    int expert, m, n, first_row, num_rows;
    bool shares_b; /* with the other block of the cluster */
};

static inline int schedule_bytes(int num_experts)
{
    return (num_experts + 1) * 2 * (int)sizeof(int);
}

__device__ inline int expert_tiles_m(const struct tile_grid &grid, int num_rows)
{
    if (grid.tiles_m > 0) {
        return num_rows > 0 ? grid.tiles_m : 0;
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
        int prefix = tiles_m / 2 * grid.tiles_n + tiles_m % 2 * ((grid.tiles_n + 1) / 2);

        for (int distance = 1; distance < 32; distance *= 2) {
            const int other = __shfl_up_sync(0xffffffffu, prefix, distance);

            prefix += lane >= distance ? other : 0;
        }
        if (e < grid.num_experts) {
            schedule.first_row[e + 1] = end;
            schedule.first_unit[e + 1] = before + prefix;
        }
        before += __shfl_sync(0xffffffffu, prefix, 31);
    }
    if (lane == 0) {
        schedule.first_row[0] = grid.offsets[0];
        schedule.first_unit[0] = 0;
    }
}

__device__ inline int num_units(const struct schedule &schedule, const struct tile_grid &grid)
{
    return schedule.first_unit[grid.num_experts];
}

/* The tile of block `rank` in a unit. It may lie beyond the last tile of N. */
__device__ inline struct tile tile_at(const struct schedule &schedule, const struct tile_grid &grid,
                                      int unit, int rank)
{
    int low = 0, high = grid.num_experts; /* first_unit[low] <= unit < first_unit[high] */
    struct tile tile;
    int num_pairs, group, group_size;

    while (high - low > 1) {
        const int middle = (low + high) / 2;

        if (schedule.first_unit[middle] <= unit) {
            low = middle;
        } else {
            high = middle;
        }
    }
    tile.expert = low;
    tile.first_row = schedule.first_row[low];
    tile.num_rows = schedule.first_row[low + 1] - tile.first_row;
    num_pairs = expert_tiles_m(grid, tile.num_rows) / 2;
    unit -= schedule.first_unit[low];
    tile.shares_b = unit < num_pairs * grid.tiles_n;
    if (!tile.shares_b) {
        tile.m = 2 * num_pairs;
        tile.n = 2 * (unit - num_pairs * grid.tiles_n) + rank;
        return tile;
    }
    group = unit / (grid.raster * grid.tiles_n);
    unit -= group * grid.raster * grid.tiles_n;
    group_size = min(grid.raster, num_pairs - group * grid.raster);
    tile.m = 2 * (group * grid.raster + unit % group_size) + rank;
    tile.n = unit / group_size;
    return tile;
}

/* Where a producer or a consumer stands in the ring of slots. A slot is handed over by two
 * barriers: `full` counts the bytes that arrived, `empty` the consumers that are done with it,
 * those of both blocks, since a tile of B is written into both. */
template <int NUM_SLOTS> struct ring_position {
    int slot, parity;

    __device__ void seek(unsigned block)
    {
        slot = (int)(block % NUM_SLOTS);
        parity = (int)(block / NUM_SLOTS % 2);
    }

    __device__ void advance(void)
    {
        if (++slot == NUM_SLOTS) {
            slot = 0;
            parity ^= 1;
        }
    }
};

/* By the calling warpgroup, to both blocks. */
__device__ inline void slot_release(uint64_t *empty)
{
    if (threadIdx.x % 128 < 2) {
        barrier_arrive_at(empty, threadIdx.x % 128);
    }
}

/* Clusters of two that fill the device. */
static inline int num_clusters(void)
{
    return num_multiprocessors() / 2;
}

#endif
