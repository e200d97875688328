/* An outer-product kernel: a tile of c stays in registers while l runs over k; each step loads a
 * few vectors of b and multiplies them by broadcast elements of a. With AVX-512 a tile is 6 rows of
 * 4 vectors: 24 accumulators hide the latency of the multiply-adds and leave room for b. Narrower
 * machines take tiles of fewer vectors. */
#include "ops/block_product_cpu.h"

#if defined(__AVX512F__)
enum { VECTOR_FLOATS = 16, TILE_VECTORS = 4 };
#elif defined(__AVX__)
enum { VECTOR_FLOATS = 8, TILE_VECTORS = 2 };
#else
enum { VECTOR_FLOATS = 4, TILE_VECTORS = 2 };
#endif
enum { TILE_ROWS = 6 };

typedef float vector __attribute__((vector_size(VECTOR_FLOATS * sizeof(float)), aligned(4)));

static inline __attribute__((always_inline)) void
tile_product(float *c, int64_t c_row, struct block_operand a, const float *b, int64_t b_row,
             int64_t k, bool accumulate, int num_rows, int num_vectors)
{
    vector sum[TILE_ROWS][TILE_VECTORS];

#pragma GCC unroll 8
    for (int i = 0; i < num_rows; i++) {
#pragma GCC unroll 8
        for (int v = 0; v < num_vectors; v++) {
            sum[i][v] =
                accumulate ? *(const vector *)(c + i * c_row + v * VECTOR_FLOATS) : (vector){0.0f};
        }
    }
    for (int64_t l = 0; l < k; l++) {
        vector b_l[TILE_VECTORS];

#pragma GCC unroll 8
        for (int v = 0; v < num_vectors; v++) {
            b_l[v] = *(const vector *)(b + l * b_row + v * VECTOR_FLOATS);
        }
#pragma GCC unroll 8
        for (int i = 0; i < num_rows; i++) {
            const float a_il = a.data[i * a.row + l * a.column];

#pragma GCC unroll 8
            for (int v = 0; v < num_vectors; v++) {
                sum[i][v] += a_il * b_l[v];
            }
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < num_rows; i++) {
#pragma GCC unroll 8
        for (int v = 0; v < num_vectors; v++) {
            *(vector *)(c + i * c_row + v * VECTOR_FLOATS) = sum[i][v];
        }
    }
}

/* All columns of num_rows rows: full tiles, then single vectors. num_rows is a constant where
 * inlined. */
static inline __attribute__((always_inline)) void
rows_product(float *c, int64_t c_row, struct block_operand a, const float *b, int64_t b_row,
             int64_t n, int64_t k, bool accumulate, int num_rows)
{
    const int64_t tile_columns = VECTOR_FLOATS * TILE_VECTORS;
    int64_t j = 0;

    for (; j + tile_columns <= n; j += tile_columns) {
        tile_product(c + j, c_row, a, b + j, b_row, k, accumulate, num_rows, TILE_VECTORS);
    }
    for (; j < n; j += VECTOR_FLOATS) {
        tile_product(c + j, c_row, a, b + j, b_row, k, accumulate, num_rows, 1);
    }
}

void block_product(float *c, int64_t c_row, struct block_operand a, const float *b, int64_t b_row,
                   int64_t m, int64_t n, int64_t k, bool accumulate)
{
    int64_t i = 0;

    for (; i + TILE_ROWS <= m; i += TILE_ROWS) {
        rows_product(c + i * c_row, c_row, a, b, b_row, n, k, accumulate, TILE_ROWS);
        a.data += TILE_ROWS * a.row;
    }
    for (; i + 2 <= m; i += 2) {
        rows_product(c + i * c_row, c_row, a, b, b_row, n, k, accumulate, 2);
        a.data += 2 * a.row;
    }
    if (i < m) {
        rows_product(c + i * c_row, c_row, a, b, b_row, n, k, accumulate, 1);
    }
}
