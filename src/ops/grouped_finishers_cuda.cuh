/* grouped_finishers_cuda.cuh - the finishers of a block: the warps that turn a tile of a product of
 * the experts' rows into results, while the next one is multiplied. */
#ifndef CADRE_OPS_GROUPED_FINISHERS_CUDA_CUH
#define CADRE_OPS_GROUPED_FINISHERS_CUDA_CUH

#include "ops/activation_cuda.cuh"
#include "ops/grouped_rows_cuda.cuh"

enum { FINISHER_BARRIER = 1 };

/* 64 rows of a tile. */
struct half_tile {
    int row, num_rows; /* num_rows: of the expert, at most 64; none if not positive */
    int column;        /* the first, of the output */

    __device__ half_tile(const struct tile &tile, int i, int width)
        : row(tile.first_row + tile.m * TILE_M + i * 64),
          num_rows(min(64, tile.first_row + tile.num_rows - row)), column(tile.n * width)
    {
    }

    /* A box to columns [at, at + 64) of a part of the rows. */
    __device__ void store(const CUtensorMap *map, const char *from, int at, int part) const
    {
        if (num_rows > 0) {
            tma_store_4d(map, from, at, part, 64 - num_rows, row + num_rows);
        }
    }
};

/* A finisher's packs of 16 bytes of a box: pack thread % 8 of rows row + 4 i. The leader talks to
 * the copy engine, so its warp of three has fewer packs. */
template <int NUM_THREADS> struct finisher {
    int row, num_packs, column;
    bool is_leader;

    __device__ finisher(void)
    {
        const int thread = threadIdx.x - (128 - NUM_THREADS), warp = thread / 32;

        row = warp * 24 + thread % 32 / 8;
        num_packs = NUM_THREADS == 32 ? 16 : warp < 2 ? 6 : 4;
        column = thread % 8;
        is_leader = thread == NUM_THREADS - 32;
    }

    __device__ int row_of(int i) const
    {
        return row + 4 * i;
    }

    __device__ int pack(int i) const
    {
        return row_of(i) * 128 + ((column ^ row_of(i) % 8) << 4);
    }

    __device__ void sync(void) const
    {
        named_barrier_sync(FINISHER_BARRIER, NUM_THREADS);
    }
};

/* The router's, of a half's rows: a lane holds those of rows lane and lane + 32. */
struct row_probs {
    float prob[2];

    __device__ row_probs(const struct half_tile &half, const struct rows_args &args)
    {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int row = threadIdx.x % 32 + 32 * i;

            prob[i] =
                args.row_prob != NULL && row < half.num_rows ? args.row_prob[half.row + row] : 1.0f;
        }
    }

    /* By all lanes, whose rows lie on one side of 32. */
    __device__ float of(int row) const
    {
        return __shfl_sync(0xffffffffu, row < 32 ? prob[0] : prob[1], row % 32);
    }
};

/* Eight bf16. */
struct bf16_pack {
    uint32_t pair[4];
};

__device__ inline struct bf16_pack pack_of(const uint4 &x)
{
    return {{x.x, x.y, x.z, x.w}};
}

__device__ inline struct bf16_pack pack_at(const char *from)
{
    return pack_of(*(const uint4 *)from);
}

__device__ inline void pack_to(char *to, const struct bf16_pack &x)
{
    *(uint4 *)to = make_uint4(x.pair[0], x.pair[1], x.pair[2], x.pair[3]);
}

__device__ inline struct bf16_pack swiglu(const struct bf16_pack &gate, const struct bf16_pack &up,
                                          float prob)
{
    struct bf16_pack act;

#pragma unroll
    for (int j = 0; j < 4; j++) {
        const float2 g = floats_of(gate.pair[j]), u = floats_of(up.pair[j]);

        act.pair[j] = pair_of(prob * activation_value<ACTIVATION_SWIGLU, true>(g.x, u.x),
                              prob * activation_value<ACTIVATION_SWIGLU, true>(g.y, u.y));
    }
    return act;
}

/* The first half of the boxes is the gate, the other half up. a comes from the rounded h, which is
 * what backward will find. `acts`: a box for each of the gate's, which the copy engine has read. */
template <class T>
__device__ inline void finish_fc1(const struct finisher<T::num_finishers> &me, char *boxes,
                                  char *acts, const struct half_tile &half,
                                  const struct rows_maps &maps, const struct rows_args &args)
{
    const struct row_probs probs(half, args);

    me.sync();
#pragma unroll 1
    for (int chunk = 0; chunk < T::num_chunks / 2; chunk++) {
        const int column = half.column + chunk * 64;
        char *gate = boxes + chunk * BOX_BYTES, *up = gate + T::num_chunks / 2 * BOX_BYTES;
        char *act = acts + chunk * BOX_BYTES;

#pragma unroll 2
        for (int i = 0; i < me.num_packs; i++) {
            const int at = me.pack(i);

            pack_to(act + at, swiglu(pack_at(gate + at), pack_at(up + at), probs.of(me.row_of(i))));
        }
        fence_async();
        me.sync();
        if (me.is_leader) {
            half.store(&maps.out, gate, column, 0);
            half.store(&maps.out, up, column, 1);
            half.store(&maps.act, act, column, 0);
            tma_commit();
        }
    }
}

/* Packs of gate and up; they become d_gate and d_up, d_a becomes a. Returns d_prob's share. */
struct h_pack {
    struct bf16_pack gate, up;
};

__device__ inline float swiglu_backward(struct bf16_pack &act, struct h_pack &h, float prob)
{
    float d_prob = 0.0f;

#pragma unroll
    for (int j = 0; j < 4; j++) {
        const float2 g = floats_of(h.gate.pair[j]), u = floats_of(h.up.pair[j]);
        const float2 d = floats_of(act.pair[j]);
        const struct activation_slopes x = activation_slopes_of<ACTIVATION_SWIGLU, true>(g.x, u.x);
        const struct activation_slopes y = activation_slopes_of<ACTIVATION_SWIGLU, true>(g.y, u.y);

        act.pair[j] = pair_of(prob * x.value, prob * y.value);
        h.gate.pair[j] = pair_of(prob * d.x * x.d_x, prob * d.y * y.d_x);
        h.up.pair[j] = pair_of(prob * d.x * x.d_up, prob * d.y * y.d_up);
        d_prob += d.x * x.value + d.y * y.value;
    }
    return d_prob;
}

/* A finisher's packs of h of a line: one of each of the half's chunks. Those outside of the expert
 * or the width are neither read nor written. */
template <int NUM_CHUNKS> struct h_line {
    struct h_pack pack[NUM_CHUNKS];

    __device__ static bool has(const struct half_tile &half, const struct rows_args &args, int row,
                               int column)
    {
        return row < half.num_rows && column < args.n;
    }

    __device__ void load(const struct half_tile &half, const struct rows_args &args, int row,
                         int column)
    {
        const bf16 *from = args.h + (int64_t)(half.row + row) * 2 * args.n;

#pragma unroll
        for (int i = 0; i < NUM_CHUNKS; i++) {
            const int at = half.column + i * 64 + column;

            pack[i] = {};
            if (has(half, args, row, at)) {
                pack[i].gate = pack_of(__ldcs((const uint4 *)(from + at)));
                pack[i].up = pack_of(__ldcs((const uint4 *)(from + args.n + at)));
            }
        }
    }

    /* d_h, and a. */
    __device__ void store(int i, const struct bf16_pack &act, const struct half_tile &half,
                          const struct rows_args &args, int row, int column) const
    {
        const int at = half.column + i * 64 + column;
        const int64_t line = half.row + row;

        if (has(half, args, row, at)) {
            bf16 *to = args.d_h + line * 2 * args.n + at;

            pack_to((char *)to, pack[i].gate);
            pack_to((char *)(to + args.n), pack[i].up);
            pack_to((char *)(args.act + line * args.n + at), act);
        }
    }
};

/* h is read while d_a is still being multiplied, and a line ahead. Nothing passes through shared
 * memory but d_a, which leaves more of it to the ring. */
template <class T>
__device__ inline void finish_d_fc2(const struct finisher<T::num_finishers> &me, const char *boxes,
                                    uint64_t *filled, int parity, const struct half_tile &half,
                                    float *d_prob, const struct rows_args &args)
{
    const struct row_probs probs(half, args);
    struct h_line<T::num_chunks> ahead;

    ahead.load(half, args, me.row, me.column * 8);
    barrier_wait(filled, parity);
#pragma unroll 1
    for (int i = 0; i < me.num_packs; i++) {
        const int row = me.row_of(i);
        const float prob = probs.of(row);
        struct h_line<T::num_chunks> line = ahead;
        float sum = 0.0f;

        if (i + 1 < me.num_packs) {
            ahead.load(half, args, me.row_of(i + 1), me.column * 8);
        }
#pragma unroll
        for (int chunk = 0; chunk < T::num_chunks; chunk++) {
            struct bf16_pack act = pack_at(boxes + chunk * BOX_BYTES + me.pack(i));

            sum += swiglu_backward(act, line.pack[chunk], prob);
            line.store(chunk, act, half, args, row, me.column * 8);
        }
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        sum += __shfl_xor_sync(0xffffffffu, sum, 4);
        if (me.column == 0 && row < half.num_rows) {
            d_prob[half.row + row] = sum;
        }
    }
}

template <class T>
__device__ inline void finish_rows(const struct finisher<T::num_finishers> &me, char *boxes,
                                   const struct half_tile &half, const struct rows_maps &maps)
{
    if (me.is_leader) {
        for (int chunk = 0; chunk < T::num_chunks; chunk++) {
            half.store(&maps.out, boxes + chunk * BOX_BYTES, half.column + chunk * 64, 0);
        }
        tma_commit();
    }
}

/* The halves of the block's tiles, in order. */
template <class T>
__device__ inline void finish(const struct halves<T> &halves, struct block_tiles<T::shares> tiles,
                              const struct rows_maps &maps, const struct rows_args &args)
{
    const struct finisher<T::num_finishers> me;
    struct tile tile;
    int parity = 0;

    while (tiles.take(&tile, T::only_stores)) {
        for (int i = 0; i < 2; i++) {
            const struct half_tile half(tile, i, T::width);

            if constexpr (T::product == PRODUCT_D_FC2) {
                finish_d_fc2<T>(me, halves.of(i), &halves.filled[i], parity, half,
                                args.prob_partial + (int64_t)tile.n * args.num_rows, args);
                __syncwarp();
                if (threadIdx.x % 32 == 0) {
                    barrier_arrive(&halves.free[i]);
                }
                continue;
            }
            barrier_wait(&halves.filled[i], parity);
            if constexpr (T::product == PRODUCT_FC1) {
                finish_fc1<T>(me, halves.of(i), halves.of(2), half, maps, args);
            } else {
                finish_rows<T>(me, halves.of(i), half, maps);
            }
            if (me.is_leader) {
                tma_wait_read<0>();
                barrier_arrive(&halves.free[i]);
            }
        }
        parity ^= 1;
    }
}

#endif
