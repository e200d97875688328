/* checked.h - arithmetic on sizes that come from outside. Each returns false on overflow and leaves
 * *result unspecified. Every size read from a file or a flag goes through these. */
#ifndef CADRE_BASE_CHECKED_H
#define CADRE_BASE_CHECKED_H

#include <stdbool.h>
#include <stdint.h>

static inline bool checked_mul(int64_t a, int64_t b, int64_t *result)
{
    return !__builtin_mul_overflow(a, b, result);
}

/* Product of num_dims non-negative dims; the empty product is 1. */
static inline bool checked_product(const int64_t *dims, int num_dims, int64_t *result)
{
    int64_t product = 1;

    for (int i = 0; i < num_dims; i++) {
        if (dims[i] < 0 || !checked_mul(product, dims[i], &product)) {
            return false;
        }
    }
    *result = product;
    return true;
}

#endif
