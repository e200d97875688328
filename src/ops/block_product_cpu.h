/* block_product_cpu.h - small F32 products on blocks that lie in the cache, for attention.
 *
 *   c[m,n] (+)= a[m,k] b[k,n]:  a[i,l] = a.data[i * a.row + l * a.column], b and c row-major.
 *
 * n is a multiple of BLOCK_VECTOR (callers pad). Runs in the calling thread; the order of the sum
 * over k is l = 0, 1, ... for every element. */
#ifndef CADRE_OPS_BLOCK_PRODUCT_CPU_H
#define CADRE_OPS_BLOCK_PRODUCT_CPU_H

#include <stdbool.h>
#include <stdint.h>

enum { BLOCK_VECTOR = 16 };

struct block_operand {
    const float *data;
    int64_t row, column; /* strides, in floats */
};

void block_product(float *c, int64_t c_row, struct block_operand a, const float *b, int64_t b_row,
                   int64_t m, int64_t n, int64_t k, bool accumulate);

#endif
