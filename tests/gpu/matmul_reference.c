/* The CPU backend's matrix library for the GPU checks: sums in double, which makes the CPU's ops a
 * reference for products too. */
#include "ops/matmul_library_cpu.h"
#include "ops/ops_cpu_internal.h"

bool matmul_library_has_bf16(void)
{
    return true;
}

/* Row `index` of op(x), as doubles. */
static void line_of(double *line, const struct tensor *x, bool is_column, int64_t index)
{
    const int64_t n = x->dim[is_column ? 0 : 1], stride = is_column ? x->dim[1] : 1;
    const int64_t first = is_column ? index : index * x->dim[1];

    for (int64_t i = 0; i < n; i++) {
        line[i] = (double)float_get(x, first + i * stride);
    }
}

static void put(struct tensor *c, int64_t at, double value)
{
    if (c->dtype == DTYPE_F32) {
        ((float *)c->data)[at] = (float)value;
    } else {
        ((bf16_t *)c->data)[at] = bf16_from_float((float)value);
    }
}

void matmul_library_run(struct stream *stream, const struct matmul *args)
{
    const int64_t m = args->c->dim[0], n = args->c->dim[1];
    const int64_t k = args->a->dim[args->transpose_a ? 0 : 1];
    double *a = arena_allocate(stream->scratch, (size_t)(m * k) * sizeof *a);
    double *b = arena_allocate(stream->scratch, (size_t)(n * k) * sizeof *b);

#pragma omp parallel for
    for (int64_t i = 0; i < m; i++) {
        line_of(a + i * k, args->a, args->transpose_a, i);
    }
#pragma omp parallel for
    for (int64_t j = 0; j < n; j++) {
        line_of(b + j * k, args->b, !args->transpose_b, j);
    }
#pragma omp parallel for
    for (int64_t i = 0; i < m; i++) {
        for (int64_t j = 0; j < n; j++) {
            const double *x = a + i * k, *y = b + j * k;
            double sum = args->accumulate ? (double)float_get(args->c, i * n + j) : 0.0;

#pragma omp simd reduction(+ : sum)
            for (int64_t l = 0; l < k; l++) {
                sum += x[l] * y[l];
            }
            if (args->bias != NULL) {
                sum += (double)float_get(args->bias, j);
            }
            put(args->c, i * n + j, sum);
        }
    }
}
