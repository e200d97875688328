/* tensor.h - a pointer, a dtype, a shape. Always contiguous and row-major; owns nothing. The memory
 * belongs to an arena (or a buffer) of the device that the stream at hand works on. */
#ifndef CADRE_TENSOR_TENSOR_H
#define CADRE_TENSOR_TENSOR_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/arena.h"
#include "tensor/dtype.h"

enum { TENSOR_DIMS_MAX = 6 };

struct tensor {
    void *data;
    enum dtype dtype;
    int num_dims;
    int64_t dim[TENSOR_DIMS_MAX];
};

/* tensor_of(data, DTYPE_F32, T, H): wraps memory. Up to TENSOR_DIMS_MAX dims. */
#define tensor_of(data, dtype, ...)                                                                \
    tensor_wrap((data), (dtype), (const int64_t[]){__VA_ARGS__},                                   \
                (int)(sizeof((const int64_t[]){__VA_ARGS__}) / sizeof(int64_t)))
/* tensor_new(arena, DTYPE_F32, T, H): uninitialised memory from the arena. */
#define tensor_new(arena, dtype, ...)                                                              \
    tensor_allocate((arena), (dtype), (const int64_t[]){__VA_ARGS__},                              \
                    (int)(sizeof((const int64_t[]){__VA_ARGS__}) / sizeof(int64_t)))
/* tensor_view(&t, A, B): the same elements in another shape of the same size. */
#define tensor_view(tensor, ...)                                                                   \
    tensor_reshape((tensor), (const int64_t[]){__VA_ARGS__},                                       \
                   (int)(sizeof((const int64_t[]){__VA_ARGS__}) / sizeof(int64_t)))

struct tensor tensor_wrap(void *data, enum dtype dtype, const int64_t *dims, int num_dims);
struct tensor tensor_allocate(struct arena *arena, enum dtype dtype, const int64_t *dims,
                              int num_dims);
struct tensor tensor_reshape(const struct tensor *tensor, const int64_t *dims, int num_dims);
/* Rows [first, first + count) of the first dim. */
struct tensor tensor_rows(const struct tensor *tensor, int64_t first, int64_t count);

int64_t tensor_num_elements(const struct tensor *tensor);
size_t tensor_size_bytes(const struct tensor *tensor);
/* tensor_is(t, DTYPE_F32, T, H): has this dtype and shape. A NULL tensor has none. */
#define tensor_is(tensor, dtype, ...)                                                              \
    tensor_matches((tensor), (dtype), (const int64_t[]){__VA_ARGS__},                              \
                   (int)(sizeof((const int64_t[]){__VA_ARGS__}) / sizeof(int64_t)))
bool tensor_matches(const struct tensor *tensor, enum dtype dtype, const int64_t *dims,
                    int num_dims);
/* "BF16 [4096, 1024]" in a buffer of the calling thread (four are in rotation). */
const char *tensor_describe(const struct tensor *tensor);

#endif
