/* Every conversion goes through f32, which holds each value of the other two exactly. */
#include "ckpt/convert_dtype.h"

#include <math.h>

#include "base/check.h"

static bool is_float(enum dtype dtype)
{
    return dtype == DTYPE_F32 || dtype == DTYPE_BF16 || dtype == DTYPE_F16;
}

bool convert_dtype_possible(enum dtype to, enum dtype from)
{
    return to == from || (is_float(to) && is_float(from));
}

/* f16 has a sign, 5 bits of exponent (bias 15; f32's is 127) and 10 of mantissa. */
static uint16_t f16_from_float(float value)
{
    const float magnitude = fabsf(value);
    uint32_t bits, sign, rest, half;

    memcpy(&bits, &value, sizeof bits);
    sign = bits >> 16 & 0x8000;
    bits &= 0x7fffffff;
    if (bits > 0x7f800000) {
        return (uint16_t)(sign | 0x7e00); /* NaN */
    }
    if (magnitude >= 65520.0f) {
        return (uint16_t)(sign | 0x7c00); /* rounds to infinity */
    }
    if (magnitude < 0x1p-14f) {
        return (uint16_t)(sign | (uint32_t)rintf(magnitude * 0x1p24f)); /* subnormal */
    }
    half = (bits - (112u << 23)) >> 13;
    rest = bits & 0x1fff;
    half += rest > 0x1000 || (rest == 0x1000 && (half & 1) != 0);
    return (uint16_t)(sign | half);
}

static float load(const char *from, enum dtype dtype)
{
    float value;
    uint16_t bits;

    if (dtype == DTYPE_F32) {
        memcpy(&value, from, sizeof value);
        return value;
    }
    memcpy(&bits, from, sizeof bits);
    return dtype == DTYPE_BF16 ? bf16_to_float(bits) : f16_to_float(bits);
}

static void store(char *to, enum dtype dtype, float value)
{
    if (dtype == DTYPE_F32) {
        memcpy(to, &value, sizeof value);
    } else {
        const uint16_t bits = dtype == DTYPE_BF16 ? bf16_from_float(value) : f16_from_float(value);

        memcpy(to, &bits, sizeof bits);
    }
}

void convert_dtype(void *to, enum dtype to_dtype, const void *from, enum dtype from_dtype,
                   int64_t count)
{
    const int64_t to_bytes = dtype_size_bytes(to_dtype), from_bytes = dtype_size_bytes(from_dtype);

    CHECK(convert_dtype_possible(to_dtype, from_dtype), "%s to %s", dtype_name(from_dtype),
          dtype_name(to_dtype));
    if (to_dtype == from_dtype) {
        memcpy(to, from, (size_t)(count * to_bytes));
        return;
    }
    for (int64_t i = 0; i < count; i++) {
        store((char *)to + i * to_bytes, to_dtype,
              load((const char *)from + i * from_bytes, from_dtype));
    }
}
