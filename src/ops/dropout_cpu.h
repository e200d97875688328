/* dropout_cpu.h - the factors of a dropout rule, for the ops that apply one. */
#ifndef CADRE_OPS_DROPOUT_CPU_H
#define CADRE_OPS_DROPOUT_CPU_H

#include "ops/ops.h"

/* factor[i] = 0 or 1 / (1 - p) for elements first + i, i < n, of row `row`; first is a multiple
 * of 4. */
void dropout_factors(float *factor, const struct dropout_rule *rule, uint64_t row, uint64_t first,
                     int64_t n);

#endif
