/* bench_measure.h - timing for `cadre bench`: medians, and the machine's roofs.
 *
 * A GPU at its power limit slows down as it gets warm: what runs for a moment on a card that has
 * rested is faster than what runs for long. Both are measured there, always in the same way. */
#ifndef CADRE_CMD_BENCH_MEASURE_H
#define CADRE_CMD_BENCH_MEASURE_H

#include "device/device.h"
#include "ops/op_cost.h"

struct bench_seconds {
    double burst;     /* after a rest; on a CPU without one */
    double sustained; /* after work for some seconds; 0 on a CPU: not measured */
};

/* Medians of work(context), which waits for the stream. */
struct bench_seconds bench_median(struct stream *stream, void (*work)(void *context),
                                  void *context);
/* The median; sorts them. */
double bench_middle(double *seconds, int count);
/* Standard normal numbers in x (f32 or bf16). */
void bench_fill_normal(struct stream *stream, struct tensor *x, const char *purpose);
/* Seconds of c[m,n] = a[m,k] b[n,k]^T through the op table. */
struct bench_seconds bench_matmul(struct stream *stream, enum dtype dtype, int64_t m, int64_t n,
                                  int64_t k);
/* What other figures are a percentage of: a product of this size cubed, and a copy of more than the
 * caches hold, its bytes counted as they are read and as they are written. */
int64_t bench_roof_size(const struct device *device);
struct bench_roof {
    struct op_roof burst, sustained;
};
struct bench_roof bench_roof(struct stream *stream, enum dtype dtype);

#endif
