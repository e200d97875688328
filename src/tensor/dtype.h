/* dtype.h - element types. The device computes in f32 and bf16 and indexes with i32 and i64; the
 * others exist in files. */
#ifndef CADRE_TENSOR_DTYPE_H
#define CADRE_TENSOR_DTYPE_H

#include <stdint.h>
#include <string.h>

enum dtype {
    DTYPE_F32,
    DTYPE_BF16,
    DTYPE_F16,
    DTYPE_F64,
    DTYPE_I64,
    DTYPE_I32,
    DTYPE_I16,
    DTYPE_I8,
    DTYPE_U8,
    DTYPE_U16,
    DTYPE_U32,
    DTYPE_U64,
    DTYPE_BOOL,
    NUM_DTYPES
};

int dtype_size_bytes(enum dtype dtype);
/* "F32", "BF16", ...: the names of safetensors. */
const char *dtype_name(enum dtype dtype);

typedef uint16_t bf16_t; /* the upper half of an IEEE float */

static inline float bf16_to_float(bf16_t x)
{
    const uint32_t bits = (uint32_t)x << 16;
    float value;

    memcpy(&value, &bits, sizeof value);
    return value;
}

/* Round to nearest, ties to even; a NaN stays a (quiet) NaN. */
static inline bf16_t bf16_from_float(float value)
{
    uint32_t bits;

    memcpy(&bits, &value, sizeof bits);
    if ((bits & 0x7fffffffu) > 0x7f800000u) {
        return (bf16_t)((bits >> 16) | 0x40);
    }
    return (bf16_t)((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

float f16_to_float(uint16_t x);

#endif
