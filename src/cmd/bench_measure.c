#include "cmd/bench_measure.h"

#include <stdlib.h>
#include <unistd.h>

#include "base/check.h"
#include "base/clock.h"
#include "base/rng.h"
#include "ops/ops.h"

enum {
    MIN_REPEATS = 5,
    REPEATS_MAX = 20,
    CPU_COPY_BYTES = 256 << 20,
    GPU_COPY_BYTES = 1 << 30,
    GPU_REST_SECONDS = 2,
    GPU_BURST_SECONDS = 1,
    GPU_WORK_SECONDS = 1
};

static int compare_doubles(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;

    return (x > y) - (x < y);
}

double bench_middle(double *seconds, int count)
{
    qsort(seconds, (size_t)count, sizeof *seconds, compare_doubles);
    return seconds[count / 2];
}

/* Runs work up to max_repeats times; no more once it has taken max_seconds in all and run
 * MIN_REPEATS times. */
static double median(void (*work)(void *context), void *context, int max_repeats,
                     double max_seconds)
{
    const double begin = clock_seconds();
    double seconds[REPEATS_MAX];
    int count = 0;

    while (count < max_repeats && (count < MIN_REPEATS || clock_seconds() - begin < max_seconds)) {
        const double start = clock_seconds();

        work(context);
        seconds[count++] = clock_seconds() - start;
    }
    return bench_middle(seconds, count);
}

static void work_for(void (*work)(void *context), void *context, double seconds)
{
    const double start = clock_seconds();

    while (clock_seconds() - start < seconds) {
        work(context);
    }
}

struct bench_seconds bench_median(struct stream *stream, void (*work)(void *context), void *context)
{
    struct bench_seconds seconds = {0};

    work(context); /* libraries load, arenas grow */
    if (stream->device->kind != DEVICE_CUDA) {
        seconds.burst = median(work, context, MIN_REPEATS, 0.0);
        return seconds;
    }
    sleep(GPU_REST_SECONDS);
    median(work, context, MIN_REPEATS, 0.0);
    seconds.burst = median(work, context, REPEATS_MAX, GPU_BURST_SECONDS);
    work_for(work, context, GPU_WORK_SECONDS);
    seconds.sustained = median(work, context, REPEATS_MAX, GPU_BURST_SECONDS);
    return seconds;
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

struct bench_seconds bench_matmul(struct stream *stream, enum dtype dtype, int64_t m, int64_t n,
                                  int64_t k)
{
    struct arena *arena = arena_create("bench", &stream->device->memory);
    struct product product = {.stream = stream,
                              .a = tensor_new(arena, dtype, m, k),
                              .b = tensor_new(arena, dtype, n, k),
                              .c = tensor_new(arena, dtype, m, n)};
    struct bench_seconds seconds;

    bench_fill_normal(stream, &product.a, "a");
    bench_fill_normal(stream, &product.b, "b");
    seconds = bench_median(stream, run_product, &product);
    arena_destroy(arena);
    return seconds;
}

struct copy {
    struct stream *stream;
    struct tensor to, from;
};

/* On a CPU by all of its threads. */
static void run_copy(void *context)
{
    struct copy *copy = context;

    if (copy->stream->device->kind == DEVICE_CUDA) {
        stream_copy(copy->stream, copy->to.data, copy->from.data, tensor_size_bytes(&copy->to));
    } else {
        op_linear_combination(copy->stream, &(struct linear_combination){
                                                .y = &copy->to, .x = &copy->from, .a = 1.0f});
    }
    stream_wait(copy->stream);
}

/* Bytes a second. The memory's clock does not depend on how warm a card is. */
static double copy_rate(struct stream *stream)
{
    const int64_t size_bytes =
        stream->device->kind == DEVICE_CUDA ? GPU_COPY_BYTES : CPU_COPY_BYTES;
    struct arena *arena = arena_create("bench", &stream->device->memory);
    struct copy copy = {.stream = stream,
                        .to = tensor_new(arena, DTYPE_F32, size_bytes / 4),
                        .from = tensor_new(arena, DTYPE_F32, size_bytes / 4)};
    double seconds;

    op_fill_zero(stream, &copy.from);
    run_copy(&copy);
    seconds = median(run_copy, &copy, MIN_REPEATS, 0.0);
    arena_destroy(arena);
    return 2.0 * (double)size_bytes / seconds;
}

int64_t bench_roof_size(const struct device *device)
{
    return device->kind == DEVICE_CUDA ? 8192 : 2048;
}

struct bench_roof bench_roof(struct stream *stream, enum dtype dtype)
{
    const int64_t size = bench_roof_size(stream->device);
    const struct bench_seconds product = bench_matmul(stream, dtype, size, size, size);
    const double flops = 2.0 * (double)size * (double)size * (double)size;
    const double copy = copy_rate(stream);

    struct bench_roof roof = {.burst = {flops / product.burst, copy}};

    if (product.sustained > 0.0) {
        roof.sustained = (struct op_roof){flops / product.sustained, copy};
    }
    return roof;
}
