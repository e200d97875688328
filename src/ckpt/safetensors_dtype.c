#include "ckpt/safetensors_dtype.h"

#include <string.h>

#include "base/check.h"

/* In the order of the reference implementation's enum, which its canonical file order follows. */
static const struct safetensors_dtype table[] = {
    {"BOOL", 8, DTYPE_BOOL},
    {"F4", 4, NUM_DTYPES},
    {"F6_E2M3", 6, NUM_DTYPES},
    {"F6_E3M2", 6, NUM_DTYPES},
    {"U8", 8, DTYPE_U8},
    {"I8", 8, DTYPE_I8},
    {"F8_E5M2", 8, NUM_DTYPES},
    {"F8_E4M3", 8, NUM_DTYPES},
    {"F8_E8M0", 8, NUM_DTYPES},
    {"F8_E4M3FNUZ", 8, NUM_DTYPES},
    {"F8_E5M2FNUZ", 8, NUM_DTYPES},
    {"I16", 16, DTYPE_I16},
    {"U16", 16, DTYPE_U16},
    {"F16", 16, DTYPE_F16},
    {"BF16", 16, DTYPE_BF16},
    {"I32", 32, DTYPE_I32},
    {"U32", 32, DTYPE_U32},
    {"F32", 32, DTYPE_F32},
    {"C64", 64, NUM_DTYPES},
    {"F64", 64, DTYPE_F64},
    {"I64", 64, DTYPE_I64},
    {"U64", 64, DTYPE_U64},
};

enum { NUM_TYPES = sizeof table / sizeof table[0] };

const struct safetensors_dtype *safetensors_dtype_find(const char *name)
{
    for (int i = 0; i < NUM_TYPES; i++) {
        if (strcmp(table[i].name, name) == 0) {
            return &table[i];
        }
    }
    return NULL;
}

int safetensors_dtype_rank(enum dtype dtype)
{
    for (int i = 0; i < NUM_TYPES; i++) {
        if (table[i].dtype == dtype) {
            return i;
        }
    }
    PANIC("dtype %d", (int)dtype);
}
