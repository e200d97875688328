/* grouped_rows_cuda.cuh - a product of the experts' rows on the matrix units: what it is for, how
 * it is cut into tiles, and what the warps of a block hand to each other. */
#ifndef CADRE_OPS_GROUPED_ROWS_CUDA_CUH
#define CADRE_OPS_GROUPED_ROWS_CUDA_CUH

#include "ops/grouped_schedule_cuda.cuh"

extern "C" {
#include "ops/grouped_tiles.h"
}

enum {
    TILE_M = GROUPED_TILE_ROWS,
    TILE_K = 64,              /* 128 bytes of bf16: the width of the swizzle */
    TILES_BYTES = 224 * 1024, /* slots and boxes: what a block has, but for numbers and barriers */
    BOX_BYTES = 64 * 64 * 2,  /* 64 rows of 64 bf16 on their way out */
    PIECE_BYTES = 4096,       /* of rows copied meanwhile */
    NUM_PIECES = 4,           /* at a time */
    BATCH_PIECES = 16,        /* that a block takes at once */
    TAKE_AHEAD = 6,           /* blocks of k before its end, a tile's successor is taken */
};

/* What a product is for: where B lies, and what becomes of a tile. */
enum product {
    PRODUCT_FC1,   /* B [E,2F,K]: gate and up side by side in a tile; stores h and a */
    PRODUCT_FC2,   /* B [E,N,K] */
    PRODUCT_D_X,   /* B [E,K,N]; may copy rows meanwhile */
    PRODUCT_D_FC2, /* B [E,K,N]; derivative of SwiGLU, stores d_h and a */
};

/* A product in tiles of TILE_M x N, TILE_K deep in a slot of the ring. */
template <enum product P, int N, bool GATHER, bool SHARES> struct tiling {
    static constexpr enum product product = P;
    static constexpr bool gather = GATHER;
    static constexpr bool shares = SHARES; /* see grouped_schedule_cuda.cuh */
    static constexpr bool b_by_rows = P == PRODUCT_D_X || P == PRODUCT_D_FC2;
    static constexpr int n = N;
    static constexpr int width = P == PRODUCT_FC1 ? N / 2 : N; /* columns of the output */
    static constexpr int num_finishers = GATHER ? 32 : 96;     /* threads */
    static constexpr bool only_stores =
        P == PRODUCT_FC2 || P == PRODUCT_D_X; /* one thread finishes */
    /* Of the queue of tiles: consumers' warps, finishers, gatherers. */
    static constexpr int num_readers =
        8 + (only_stores ? 1 : num_finishers / 32) + (GATHER ? 2 : 0);
    /* Boxes of a half of a tile; and beside those of a tile: of a, of copied rows. */
    static constexpr int num_chunks = N / 64;
    static constexpr int num_more_boxes = P == PRODUCT_FC1   ? N / 128
                                          : P == PRODUCT_D_X ? NUM_PIECES * PIECE_BYTES / BOX_BYTES
                                                             : 0;
    static constexpr int boxes_bytes = (2 * num_chunks + num_more_boxes) * BOX_BYTES;
    static constexpr int a_bytes = TILE_M * TILE_K * 2, b_bytes = N * TILE_K * 2;
    static constexpr int slot_bytes = a_bytes + b_bytes;
    static constexpr int b_box_bytes = 64 * TILE_K * 2; /* where B is by rows */
    static constexpr int num_slots = (TILES_BYTES - boxes_bytes) / slot_bytes;
    static constexpr int shared_bytes = 1024 + num_slots * slot_bytes + boxes_bytes;
    using ring_place = ring_position<num_slots>;
};

/* Rows copied while a product runs: to[r] = from[index[r]], row_bytes a multiple of 16. */
struct copied_rows {
    const char *from;
    char *to; /* NULL: none */
    const int32_t *index, *num_rows;
    int row_bytes;
};

struct rows_args {
    struct tile_grid grid;
    int first_expert; /* of this launch */
    int n, k;         /* n: width of an output row (F for FC1 and D_FC2) */
    int num_rows;
    const bf16 *x; /* gathered A: rows of width k that row_token names */
    const int32_t *row_token;
    const float *row_prob; /* FC1 and D_FC2, optional */
    /* D_FC2: h and d_h [R,2N], a [R,N], d_row_prob's partial sums [tiles of N, R] */
    const bf16 *h;
    bf16 *d_h, *act;
    float *prob_partial;
    struct copied_rows copied;
    struct tile_counter *counter; /* where multiprocessors are shared */
};

/* out: y or h; act: a of FC1. */
struct rows_maps {
    CUtensorMap a, b, out, act;
};

template <class T> struct rows_ring {
    char *slots;
    uint64_t *full, *empty;

    __device__ char *a(int slot) const
    {
        return slots + slot * T::slot_bytes;
    }

    __device__ char *b(int slot) const
    {
        return a(slot) + T::a_bytes;
    }
};

/* The tiles of the calling block, in order, for one warp or thread of it. */
template <bool SHARES> struct block_tiles {
    const struct schedule &schedule;
    const struct tile_grid &grid;
    struct tile_reader<SHARES> reader;

    __device__ bool take(struct tile *tile, bool is_alone = false)
    {
        const int index = reader.take(is_alone);

        if (index >= num_tiles(schedule, grid)) {
            return false;
        }
        *tile = tile_at(schedule, grid, index);
        return true;
    }
};

/* ---- from the consumers to the finishers ----
 *
 * A consumer's 64 rows of a tile lie in boxes of 64 rows and 64 columns, swizzled as the copy
 * engine wants them. */

template <class T> struct halves {
    char *boxes;             /* those of consumer 0, those of 1 */
    uint64_t *filled, *free; /* of each consumer */

    __device__ char *of(int half) const
    {
        return boxes + half * T::num_chunks * BOX_BYTES;
    }
};

__device__ inline uint32_t pair_of(float x, float y)
{
    const __nv_bfloat162 pair = __floats2bfloat162_rn(x, y);

    return *(const uint32_t *)&pair;
}

__device__ inline float2 floats_of(uint32_t pair)
{
    return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
}

#endif
