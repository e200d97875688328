#include "tensor/dtype.h"

#include <math.h>

#include "base/check.h"

static const struct {
    const char *name;
    int size_bytes;
} dtypes[NUM_DTYPES] = {
    [DTYPE_F32] = {"F32", 4},   [DTYPE_BF16] = {"BF16", 2}, [DTYPE_F16] = {"F16", 2},
    [DTYPE_F64] = {"F64", 8},   [DTYPE_I64] = {"I64", 8},   [DTYPE_I32] = {"I32", 4},
    [DTYPE_I16] = {"I16", 2},   [DTYPE_I8] = {"I8", 1},     [DTYPE_U8] = {"U8", 1},
    [DTYPE_U16] = {"U16", 2},   [DTYPE_U32] = {"U32", 4},   [DTYPE_U64] = {"U64", 8},
    [DTYPE_BOOL] = {"BOOL", 1},
};

int dtype_size_bytes(enum dtype dtype)
{
    CHECK(dtype < NUM_DTYPES, "dtype %d", (int)dtype);
    return dtypes[dtype].size_bytes;
}

const char *dtype_name(enum dtype dtype)
{
    CHECK(dtype < NUM_DTYPES, "dtype %d", (int)dtype);
    return dtypes[dtype].name;
}

float f16_to_float(uint16_t x)
{
    const int exponent = (x >> 10) & 31, mantissa = x & 1023;
    float magnitude;

    if (exponent == 31) {
        magnitude = mantissa != 0 ? NAN : INFINITY;
    } else if (exponent == 0) {
        magnitude = ldexpf((float)mantissa, -24);
    } else {
        magnitude = ldexpf((float)(mantissa + 1024), exponent - 25);
    }
    return (x & 0x8000) != 0 ? -magnitude : magnitude;
}
