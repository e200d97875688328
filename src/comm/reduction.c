/* reduction.c - block after block through an accumulator that stays in the first cache: each source
 * is read once, and out is written after all sources of the block were read, so it may be one of
 * them. */
#include "comm/reduction.h"

#include "base/check.h"

enum { BLOCK = 512, PARALLEL_MIN = 1 << 16 };

#define LOAD_AS_IS(x) (x)
#define ADD(a, b) ((a) + (b))
#define MAXIMUM(a, b) ((a) > (b) ? (a) : (b))

/* reduce_NAME_sum and reduce_NAME_max: type in memory, type of the accumulator, how to convert. */
#define DEFINE_REDUCTION(name, type, accumulator, LOAD, STORE, COMBINE)                            \
    static void name(void *out, const void *const *sources, int num_sources, int64_t begin,        \
                     int64_t n)                                                                    \
    {                                                                                              \
        accumulator block[BLOCK];                                                                  \
                                                                                                   \
        for (int s = 0; s < num_sources; s++) {                                                    \
            const type *x = (const type *)sources[s] + begin;                                      \
                                                                                                   \
            for (int64_t i = 0; i < n; i++) {                                                      \
                block[i] =                                                                         \
                    s == 0 ? (accumulator)LOAD(x[i]) : COMBINE(block[i], (accumulator)LOAD(x[i])); \
            }                                                                                      \
        }                                                                                          \
        for (int64_t i = 0; i < n; i++) {                                                          \
            ((type *)out)[begin + i] = (type)STORE(block[i]);                                      \
        }                                                                                          \
    }
#define DEFINE_REDUCTIONS(name, type, accumulator, LOAD, STORE)                                    \
    DEFINE_REDUCTION(reduce_##name##_sum, type, accumulator, LOAD, STORE, ADD)                     \
    DEFINE_REDUCTION(reduce_##name##_max, type, accumulator, LOAD, STORE, MAXIMUM)

DEFINE_REDUCTIONS(f32, float, float, LOAD_AS_IS, LOAD_AS_IS)
DEFINE_REDUCTIONS(bf16, bf16_t, float, bf16_to_float, bf16_from_float)
DEFINE_REDUCTIONS(f64, double, double, LOAD_AS_IS, LOAD_AS_IS)
DEFINE_REDUCTIONS(i32, int32_t, int32_t, LOAD_AS_IS, LOAD_AS_IS)
DEFINE_REDUCTIONS(i64, int64_t, int64_t, LOAD_AS_IS, LOAD_AS_IS)

typedef void reduce_function(void *out, const void *const *sources, int num_sources, int64_t begin,
                             int64_t n);

static reduce_function *function_of(enum comm_reduction reduction, enum dtype dtype)
{
    const bool sum = reduction == COMM_SUM;

    switch (dtype) {
    case DTYPE_F32:
        return sum ? reduce_f32_sum : reduce_f32_max;
    case DTYPE_BF16:
        return sum ? reduce_bf16_sum : reduce_bf16_max;
    case DTYPE_F64:
        return sum ? reduce_f64_sum : reduce_f64_max;
    case DTYPE_I32:
        return sum ? reduce_i32_sum : reduce_i32_max;
    case DTYPE_I64:
        return sum ? reduce_i64_sum : reduce_i64_max;
    default:
        PANIC("%s is not reduced", dtype_name(dtype));
    }
}

void reduction_apply(enum comm_reduction reduction, enum dtype dtype, void *out,
                     const void *const *sources, int num_sources, int64_t count)
{
    reduce_function *function = function_of(reduction, dtype);

#pragma omp parallel for schedule(static) if (count > PARALLEL_MIN)
    for (int64_t begin = 0; begin < count; begin += BLOCK) {
        function(out, sources, num_sources, begin, count - begin < BLOCK ? count - begin : BLOCK);
    }
}
