/* vector_math.h - scalar functions that the compiler turns into vector code inside a loop marked
 * `#pragma omp simd`: no branches, no tables, no calls. And pieces of F32 or
 * BF16 arrays as floats. */
#ifndef CADRE_OPS_VECTOR_MATH_H
#define CADRE_OPS_VECTOR_MATH_H

#include <stdint.h>
#include <string.h>

#include "tensor/dtype.h"

static inline float float_from_bits(uint32_t bits)
{
    float value;

    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline uint32_t float_bits(float value)
{
    uint32_t bits;

    memcpy(&bits, &value, sizeof bits);
    return bits;
}

/* e^x within 1.1 ulp; exact limits: 0 from below the denormals on, infinity above, NaN stays NaN.
 *
 * x = n ln2 + r with |r| <= ln2/2; e^r = 1 + r + r^2 p(r), p the polynomial through
 * (e^r - 1 - r) / r^2 at five Chebyshev nodes (error below 1e-8). 2^n is applied as two powers,
 * since n runs from -150 (denormals) to 128, more than one exponent field holds. */
static inline float fast_exp(float x)
{
    /* Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits. */
    const float rounder = 12582912.0f;
    const float low = x < -104.0f ? -104.0f : x, clamped = low > 89.0f ? 89.0f : low;
    const float shifted = clamped * 1.44269504f + rounder, n = shifted - rounder;
    const float r = (clamped - n * 0x1.62e4p-1f) - n * 1.42860682e-6f; /* ln2 in two parts */
    const uint32_t exponent = float_bits(shifted) - float_bits(rounder) + 512; /* n + 512 > 0 */
    const uint32_t half = exponent >> 1;
    float p = 0x1.6d10fcp-10f;

    p = p * r + 0x1.120b62p-7f;
    p = p * r + 0x1.55551ap-5f;
    p = p * r + 0x1.5554dep-3f;
    p = p * r + 0.5f;
    p = p * (r * r) + r + 1.0f;
    return p * float_from_bits((half - 256 + 127) << 23) *
           float_from_bits((exponent - half - 256 + 127) << 23);
}

/* 1 / (1 + e^-x) */
static inline float fast_sigmoid(float x)
{
    return 1.0f / (1.0f + fast_exp(-x));
}

/* bf16_from_float without a branch, for loops. */
static inline bf16_t bf16_round(float value)
{
    const uint32_t bits = float_bits(value);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16;

    return (bf16_t)(value != value ? (bits >> 16 | 0x40) : rounded);
}

/* Elements [first, first + count) of an F32 or BF16 array as floats: the array itself, or converted
 * into buffer. */
static inline const float *vector_load(enum dtype dtype, const void *array, int64_t first,
                                       int64_t count, float *buffer)
{
    const bf16_t *from;

    if (dtype == DTYPE_F32) {
        return (const float *)array + first;
    }
    from = (const bf16_t *)array + first;
#pragma omp simd
    for (int64_t i = 0; i < count; i++) {
        buffer[i] = float_from_bits((uint32_t)from[i] << 16);
    }
    return buffer;
}

/* Where to compute elements that vector_store then puts into the array: in place, or in buffer. */
static inline float *vector_target(enum dtype dtype, void *array, int64_t first, float *buffer)
{
    return dtype == DTYPE_F32 ? (float *)array + first : buffer;
}

/* Puts values computed at vector_target into the array. */
static inline void vector_store(enum dtype dtype, void *array, int64_t first, int64_t count,
                                const float *values)
{
    bf16_t *to = (bf16_t *)array + first;

    if (dtype == DTYPE_F32) {
        return; /* they are there */
    }
#pragma omp simd
    for (int64_t i = 0; i < count; i++) {
        to[i] = bf16_round(values[i]);
    }
}

#endif
