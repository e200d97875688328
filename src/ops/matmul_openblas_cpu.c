/* Matrix products by OpenBLAS, where oneDNN is missing. F32 only.
 *
 * c is cut into tiles that depend on its shape only, each computed by one thread: the bits do not
 * depend on the number of threads, and OpenBLAS's own threads, which would fight with OpenMP's,
 * stay unused. */
#ifndef CADRE_ONEDNN
#include <cblas.h>

#include "ops/matmul_library_cpu.h"
#include "ops/ops_cpu_internal.h"

enum { TILE_ROWS = 256, TILE_COLUMNS = 256 };

bool matmul_library_has_bf16(void)
{
    return false;
}

static void run_tile(const struct matmul *a, int64_t row, int64_t column)
{
    const int64_t m = a->c->dim[0], n = a->c->dim[1], k = a->a->dim[a->transpose_a ? 0 : 1];
    const int64_t num_rows = m - row < TILE_ROWS ? m - row : TILE_ROWS;
    const int64_t num_columns = n - column < TILE_COLUMNS ? n - column : TILE_COLUMNS;
    const float *tile_a = (const float *)a->a->data + (a->transpose_a ? row : row * k);
    const float *tile_b = (const float *)a->b->data + (a->transpose_b ? column * k : column);
    float *c = (float *)a->c->data + row * n + column;

    for (int64_t i = 0; i < num_rows && a->bias != NULL; i++) {
        memcpy(c + i * n, (const float *)a->bias->data + column, (size_t)num_columns * sizeof *c);
    }
    cblas_sgemm(CblasRowMajor, a->transpose_a ? CblasTrans : CblasNoTrans,
                a->transpose_b ? CblasTrans : CblasNoTrans, (blasint)num_rows, (blasint)num_columns,
                (blasint)k, 1.0f, tile_a, (blasint)a->a->dim[1], tile_b, (blasint)a->b->dim[1],
                a->accumulate || a->bias != NULL ? 1.0f : 0.0f, c, (blasint)n);
}

void matmul_library_run(struct stream *stream, const struct matmul *a)
{
    const int64_t m = a->c->dim[0], n = a->c->dim[1];
    const int64_t num_columns = (n + TILE_COLUMNS - 1) / TILE_COLUMNS;
    const int64_t num_tiles = (m + TILE_ROWS - 1) / TILE_ROWS * num_columns;

    openblas_set_num_threads(1);
#pragma omp parallel for schedule(static) if (num_tiles > 1)
    for (int64_t tile = 0; tile < num_tiles; tile++) {
        run_tile(a, tile / num_columns * TILE_ROWS, tile % num_columns * TILE_COLUMNS);
    }
}
#endif
