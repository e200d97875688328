/* ops_check.h - check_NAME(args) stops the job when an op's arguments break the contract of ops.h:
 * a tensor missing, of another dtype or shape, a number out of range. Shapes only: no element is
 * read. */
#ifndef CADRE_OPS_OPS_CHECK_H
#define CADRE_OPS_OPS_CHECK_H

#include "ops/ops.h"

#define OPS_CHECK_DECLARE(name, args) void check_##name(const struct args *a);
OPS_LIST(OPS_CHECK_DECLARE)
#undef OPS_CHECK_DECLARE

/* The building blocks. EXPECT(a->y, DTYPE_F32, T, H): a->y is there, has this dtype and shape.
 * EXPECT_OPTIONAL: or is NULL. EXPECT_DIMS(a->x, 2): is there, F32 or BF16, has so many dims. */
void expect_shape(const char *function, const char *name, const struct tensor *tensor,
                  enum dtype dtype, const int64_t *dims, int num_dims);
void expect_dims(const char *function, const char *name, const struct tensor *tensor, int num_dims);

#define EXPECT(tensor, dtype, ...)                                                                 \
    expect_shape(__func__, #tensor, (tensor), (dtype), (const int64_t[]){__VA_ARGS__},             \
                 (int)(sizeof((const int64_t[]){__VA_ARGS__}) / sizeof(int64_t)))
#define EXPECT_OPTIONAL(tensor, dtype, ...)                                                        \
    do {                                                                                           \
        if ((tensor) != NULL) {                                                                    \
            EXPECT(tensor, dtype, __VA_ARGS__);                                                    \
        }                                                                                          \
    } while (0)
#define EXPECT_DIMS(tensor, num_dims) expect_dims(__func__, #tensor, (tensor), (num_dims))

#endif
