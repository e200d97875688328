/* activation_cpu.h - the activation of one row, shared by the dense MLP and the experts.
 *
 * Rows are [F] of y, d_y and a, and [F], or [2F] = gate and up for SwiGLU, of x and d_x. scale is
 * the expert's routing probability, 1 where there is none. */
#ifndef CADRE_OPS_ACTIVATION_CPU_H
#define CADRE_OPS_ACTIVATION_CPU_H

#include "ops/ops.h"

/* y[row] = scale * act(x[row]) */
void activation_row_forward(enum activation_kind kind, struct tensor *y, const struct tensor *x,
                            int64_t row, float scale);

/* d_x[row] = scale * act'(x[row]) d_y[row], and a[row] = scale * act(x[row]) where a is given.
 * Returns the gradient of scale: sum of d_y[row] * act(x[row]). d_x may be x. */
float activation_row_backward(enum activation_kind kind, struct tensor *d_x, struct tensor *a,
                              const struct tensor *x, const struct tensor *d_y, int64_t row,
                              float scale);

#endif
