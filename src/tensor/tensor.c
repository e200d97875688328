#include "tensor/tensor.h"

#include <stdio.h>

#include "base/check.h"
#include "base/checked.h"

struct tensor tensor_wrap(void *data, enum dtype dtype, const int64_t *dims, int num_dims)
{
    struct tensor tensor = {.data = data, .dtype = dtype, .num_dims = num_dims};

    CHECK(num_dims >= 0 && num_dims <= TENSOR_DIMS_MAX, "%d dims", num_dims);
    for (int i = 0; i < num_dims; i++) {
        CHECK(dims[i] >= 0, "dim %d is %lld", i, (long long)dims[i]);
        tensor.dim[i] = dims[i];
    }
    return tensor;
}

struct tensor tensor_allocate(struct arena *arena, enum dtype dtype, const int64_t *dims,
                              int num_dims)
{
    struct tensor tensor = tensor_wrap(NULL, dtype, dims, num_dims);

    tensor.data = arena_allocate(arena, tensor_size_bytes(&tensor));
    return tensor;
}

struct tensor tensor_reshape(const struct tensor *tensor, const int64_t *dims, int num_dims)
{
    const struct tensor view = tensor_wrap(tensor->data, tensor->dtype, dims, num_dims);

    CHECK(tensor_num_elements(&view) == tensor_num_elements(tensor), "%s seen as %s",
          tensor_describe(tensor), tensor_describe(&view));
    return view;
}

struct tensor tensor_rows(const struct tensor *tensor, int64_t first, int64_t count)
{
    struct tensor rows = *tensor;
    int64_t row_elements = 1;

    CHECK(tensor->num_dims >= 1 && first >= 0 && count >= 0 && first + count <= tensor->dim[0],
          "rows %lld + %lld of %s", (long long)first, (long long)count, tensor_describe(tensor));
    for (int i = 1; i < tensor->num_dims; i++) {
        row_elements *= tensor->dim[i];
    }
    rows.data = (char *)tensor->data + first * row_elements * dtype_size_bytes(tensor->dtype);
    rows.dim[0] = count;
    return rows;
}

int64_t tensor_num_elements(const struct tensor *tensor)
{
    int64_t count;

    CHECK(checked_product(tensor->dim, tensor->num_dims, &count), "shape overflows");
    return count;
}

size_t tensor_size_bytes(const struct tensor *tensor)
{
    return (size_t)tensor_num_elements(tensor) * (size_t)dtype_size_bytes(tensor->dtype);
}

bool tensor_matches(const struct tensor *tensor, enum dtype dtype, const int64_t *dims,
                    int num_dims)
{
    if (tensor == NULL || tensor->dtype != dtype || tensor->num_dims != num_dims) {
        return false;
    }
    for (int i = 0; i < num_dims; i++) {
        if (tensor->dim[i] != dims[i]) {
            return false;
        }
    }
    return true;
}

const char *tensor_describe(const struct tensor *tensor)
{
    static _Thread_local char buffers[4][160];
    static _Thread_local int next;
    char *buffer = buffers[next++ % 4];
    int length;

    if (tensor == NULL) {
        return "no tensor";
    }
    length = snprintf(buffer, sizeof buffers[0], "%s [", dtype_name(tensor->dtype));
    for (int i = 0; i < tensor->num_dims; i++) {
        length += snprintf(buffer + length, sizeof buffers[0] - (size_t)length, "%s%lld",
                           i > 0 ? ", " : "", (long long)tensor->dim[i]);
    }
    snprintf(buffer + length, sizeof buffers[0] - (size_t)length, "]");
    return buffer;
}
