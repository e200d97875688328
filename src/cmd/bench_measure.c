#include "cmd/bench_measure.h"

#include <stdlib.h>

#include "base/check.h"
#include "base/clock.h"
#include "base/rng.h"
#include "ops/ops.h"

enum { ROOF_REPEATS = 9, REPEATS_MAX = 64 };

static int compare_doubles(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;

    return (x > y) - (x < y);
}

double bench_median_seconds(void (*work)(void *context), void *context, int warmups, int repeats)
{
    double seconds[REPEATS_MAX];

    CHECK(repeats >= 1 && repeats <= REPEATS_MAX, "%d repeats", repeats);
    for (int i = 0; i < warmups; i++) {
        work(context);
    }
    for (int i = 0; i < repeats; i++) {
        const double start = clock_seconds();

        work(context);
        seconds[i] = clock_seconds() - start;
    }
    qsort(seconds, (size_t)repeats, sizeof seconds[0], compare_doubles);
    return seconds[repeats / 2];
}

void bench_fill_normal(struct stream *stream, struct tensor *x, const char *purpose)
{
    const struct rng_key key = rng_key(1234, purpose, 0);
    const int64_t count = tensor_num_elements(x);
    char *host = malloc(tensor_size_bytes(x));

    CHECK(host != NULL, "out of memory for %s", tensor_describe(x));
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < count; i++) {
        const float value = (float)rng_normal(key, 0, (uint64_t)i);

        if (x->dtype == DTYPE_BF16) {
            ((bf16_t *)host)[i] = bf16_from_float(value);
        } else {
            ((float *)host)[i] = value;
        }
    }
    stream_copy_from_host(stream, x->data, host, tensor_size_bytes(x));
    free(host);
}

struct product {
    struct stream *stream;
    struct tensor a, b, c;
};

static void run_product(void *context)
{
    struct product *product = context;

    op_matmul(product->stream,
              &(struct matmul){
                  .c = &product->c, .a = &product->a, .b = &product->b, .transpose_b = true});
    stream_wait(product->stream);
}

double bench_matmul_gflops(struct stream *stream, enum dtype dtype, int64_t m, int64_t n, int64_t k)
{
    struct arena *arena = arena_create("bench", &stream->device->memory);
    struct product product = {.stream = stream,
                              .a = tensor_new(arena, dtype, m, k),
                              .b = tensor_new(arena, dtype, n, k),
                              .c = tensor_new(arena, dtype, m, n)};
    double seconds;

    bench_fill_normal(stream, &product.a, "a");
    bench_fill_normal(stream, &product.b, "b");
    seconds = bench_median_seconds(run_product, &product, 2, ROOF_REPEATS);
    arena_destroy(arena);
    return 2.0 * (double)m * (double)n * (double)k / seconds / 1e9;
}

int64_t bench_roof_size(const struct device *device)
{
    return device->kind == DEVICE_CUDA ? 8192 : 2048;
}

double bench_roof_gflops(struct stream *stream, enum dtype dtype)
{
    const int64_t size = bench_roof_size(stream->device);

    return bench_matmul_gflops(stream, dtype, size, size, size);
}
