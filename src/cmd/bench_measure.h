/* bench_measure.h - timing for `cadre bench`: medians, and the machine's matrix-product roof. */
#ifndef CADRE_CMD_BENCH_MEASURE_H
#define CADRE_CMD_BENCH_MEASURE_H

#include "device/device.h"
#include "tensor/tensor.h"

/* Median seconds of work(context) over `repeats` runs after `warmups`. */
double bench_median_seconds(void (*work)(void *context), void *context, int warmups, int repeats);
/* Standard normal numbers in x (f32 or bf16). */
void bench_fill_normal(struct stream *stream, struct tensor *x, const char *purpose);
/* GFLOP/s of c[m,n] = a[m,k] b[n,k]^T through the op table. */
double bench_matmul_gflops(struct stream *stream, enum dtype dtype, int64_t m, int64_t n,
                           int64_t k);
/* The roof that other figures are a percentage of: a product of this size cubed. */
int64_t bench_roof_size(const struct device *device);
double bench_roof_gflops(struct stream *stream, enum dtype dtype);

#endif
