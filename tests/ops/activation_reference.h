/* activation_reference.h - the activations and their slopes in double, from the defining formulas.
 */
#ifndef CADRE_TESTS_OPS_ACTIVATION_REFERENCE_H
#define CADRE_TESTS_OPS_ACTIVATION_REFERENCE_H

#include "reference.h"

/* Columns of x for F of y. */
static inline int64_t activation_inputs(enum activation_kind kind, int64_t f)
{
    return kind == ACTIVATION_SWIGLU ? 2 * f : f;
}

/* 1 + tanh(u) of the tanh formula, written so that it does not cancel for negative u; 1 - tanh(u)
 * is gelu_one_plus_tanh(-x). */
static inline double gelu_one_plus_tanh(double x)
{
    return 2.0 / (1.0 + exp(-2.0 * sqrt(2.0 / M_PI) * (x + 0.044715 * x * x * x)));
}

/* y[F] = act(x) of one row. */
static inline void reference_activation(enum activation_kind kind, double *y, const double *x,
                                        int64_t f)
{
    for (int64_t i = 0; i < f; i++) {
        switch (kind) {
        case ACTIVATION_SWIGLU:
            y[i] = x[i] / (1.0 + exp(-x[i])) * x[f + i];
            break;
        case ACTIVATION_GELU:
            y[i] = 0.5 * x[i] * gelu_one_plus_tanh(x[i]);
            break;
        case ACTIVATION_SQUARED_RELU:
            y[i] = x[i] > 0.0 ? x[i] * x[i] : 0.0;
            break;
        }
    }
}

static inline void reference_activation_backward(enum activation_kind kind, double *d_x,
                                                 const double *x, const double *d_y, int64_t f)
{
    for (int64_t i = 0; i < f; i++) {
        const double s = 1.0 / (1.0 + exp(-x[i]));
        const double plus = gelu_one_plus_tanh(x[i]), minus = gelu_one_plus_tanh(-x[i]);
        const double slope = sqrt(2.0 / M_PI) * (1.0 + 3.0 * 0.044715 * x[i] * x[i]);

        switch (kind) {
        case ACTIVATION_SWIGLU:
            d_x[i] = d_y[i] * x[f + i] * (s + x[i] * s * (1.0 - s));
            d_x[f + i] = d_y[i] * x[i] * s;
            break;
        case ACTIVATION_GELU:
            d_x[i] = d_y[i] * (0.5 * plus + 0.5 * x[i] * plus * minus * slope);
            break;
        case ACTIVATION_SQUARED_RELU:
            d_x[i] = d_y[i] * 2.0 * fmax(x[i], 0.0);
            break;
        }
    }
}

#endif
