/* dist_test.h - what the programs of several ranks share: they start under mpirun, compare what
 * their rank got with a computation of one process, and end with a status that says whether all of
 * it was right. */
#ifndef CADRE_TESTS_DIST_DIST_TEST_H
#define CADRE_TESTS_DIST_DIST_TEST_H

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

#include "base/check.h"
#include "base/rng.h"
#include "comm/comm_mpi.h"
#include "comm/launch.h"
#include "ops/ops.h"

static struct stream *stream;
static struct arena *arena; /* emptied after every case by dist_release */
static int num_failures;

/* Returns the number of ranks. */
static inline int dist_begin(int argc, char **argv)
{
    if (launch_init(&argc, &argv) != 0) {
        launch_fail(error_text());
    }
    comm_mpi_set_timeout(60.0);
    stream = stream_create(device_cpu(), ops_cpu());
    arena = arena_create("test", &device_cpu()->memory);
    return launch_size();
}

static inline void dist_release(void)
{
    arena_release(arena, (struct arena_mark){0});
}

static inline void dist_failed(const char *format, ...) PRINTF_LIKE(1, 2);
static inline void dist_failed(const char *format, ...)
{
    va_list args;

    if (num_failures++ < 10) {
        fprintf(stderr, "rank %d of %d: ", launch_rank(), launch_size());
        va_start(args, format);
        vfprintf(stderr, format, args);
        va_end(args);
        fputc('\n', stderr);
    }
}

/* The exit status of main. */
static inline int dist_end(void)
{
    arena_destroy(arena);
    stream_destroy(stream);
    launch_finish();
    return num_failures == 0 ? 0 : 1;
}

static inline double dist_get(const struct tensor *x, int64_t i)
{
    switch (x->dtype) {
    case DTYPE_F32:
        return ((const float *)x->data)[i];
    case DTYPE_BF16:
        return bf16_to_float(((const bf16_t *)x->data)[i]);
    case DTYPE_F64:
        return ((const double *)x->data)[i];
    case DTYPE_I32:
        return ((const int32_t *)x->data)[i];
    case DTYPE_I64:
        return (double)((const int64_t *)x->data)[i];
    default:
        PANIC("%s", dtype_name(x->dtype));
    }
}

static inline void dist_set(struct tensor *x, int64_t i, double value)
{
    switch (x->dtype) {
    case DTYPE_F32:
        ((float *)x->data)[i] = (float)value;
        break;
    case DTYPE_BF16:
        ((bf16_t *)x->data)[i] = bf16_from_float((float)value);
        break;
    case DTYPE_F64:
        ((double *)x->data)[i] = value;
        break;
    case DTYPE_I32:
        ((int32_t *)x->data)[i] = (int32_t)value;
        break;
    case DTYPE_I64:
        ((int64_t *)x->data)[i] = (int64_t)value;
        break;
    default:
        PANIC("%s", dtype_name(x->dtype));
    }
}

/* The numbers [first, first + n) of a stream that all ranks know; row names the stream. */
static inline void dist_fill(struct tensor *x, uint64_t row, int64_t first)
{
    const struct rng_key key = rng_key(1234, "dist test", 0);

    for (int64_t i = 0; i < tensor_num_elements(x); i++) {
        const double number = rng_normal(key, row, (uint64_t)(first + i));

        dist_set(x, i,
                 x->dtype == DTYPE_I32 || x->dtype == DTYPE_I64 ? floor(100.0 * number) : number);
    }
}

/* |got - wanted| <= tolerance * (1 + |wanted|) for every element; 0: the same values. */
static inline void dist_compare(const char *what, const struct tensor *got,
                                const struct tensor *wanted, double tolerance)
{
    const int64_t n = tensor_num_elements(wanted);

    if (tensor_num_elements(got) != n) {
        dist_failed("%s: %s, wanted %s", what, tensor_describe(got), tensor_describe(wanted));
        return;
    }
    for (int64_t i = 0; i < n; i++) {
        const double g = dist_get(got, i), w = dist_get(wanted, i);

        if (!(fabs(g - w) <= tolerance * (1.0 + fabs(w)))) {
            dist_failed("%s: element %lld of %lld is %.9g, wanted %.9g", what, (long long)i,
                        (long long)n, g, w);
            return;
        }
    }
}

#endif
