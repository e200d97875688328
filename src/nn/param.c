#include "nn/param.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/check.h"
#include "base/rng.h"
#include "ops/ops.h"

void param_list_init(struct param_list *list)
{
    memset(list, 0, sizeof *list);
}

void param_list_free(struct param_list *list)
{
    for (int i = 0; i < list->num_params; i++) {
        free(list->params[i]);
    }
    free(list->params);
    memset(list, 0, sizeof *list);
}

struct param *param_find(const struct param_list *list, const char *name)
{
    for (int i = 0; i < list->num_params; i++) {
        if (strcmp(list->params[i]->name, name) == 0) {
            return list->params[i];
        }
    }
    return NULL;
}

/* Elements of the buffers that the parameter takes. */
static int64_t padded_size(const struct param *param)
{
    return (box_num_elements(&param->box) + PARAM_ALIGNMENT_ELEMENTS - 1) /
           PARAM_ALIGNMENT_ELEMENTS * PARAM_ALIGNMENT_ELEMENTS;
}

struct param *param_add(struct param_list *list, const struct param *facts)
{
    struct param *param = malloc(sizeof *param);

    CHECK(param != NULL, "out of memory");
    CHECK(param_find(list, facts->name) == NULL, "parameter %s added twice", facts->name);
    CHECK(box_inside(&facts->box, facts->global_shape), "box of %s", facts->name);
    *param = *facts;
    list->params = realloc(list->params, (size_t)(list->num_params + 1) * sizeof *list->params);
    CHECK(list->params != NULL, "out of memory");
    list->params[list->num_params++] = param;
    param->start = list->num_elements;
    list->num_elements += padded_size(param);
    return param;
}

static struct tensor slice(const struct tensor *buffer, const struct param *param)
{
    char *first = (char *)buffer->data + param->start * dtype_size_bytes(buffer->dtype);

    return tensor_wrap(first, buffer->dtype, param->box.size, param->num_dims);
}

void param_list_allocate(struct param_list *list, struct arena *arena, struct stream *stream,
                         enum dtype dtype, bool with_grads)
{
    list->values = tensor_new(arena, dtype, list->num_elements);
    op_fill_zero(stream, &list->values);
    list->grads = tensor_of(NULL, DTYPE_F32, 0);
    if (with_grads) {
        list->grads = tensor_new(arena, DTYPE_F32, list->num_elements);
        op_fill_zero(stream, &list->grads);
    }
    for (int i = 0; i < list->num_params; i++) {
        struct param *param = list->params[i];

        param->value = slice(&list->values, param);
        if (with_grads) {
            param->grad = slice(&list->grads, param);
        }
    }
}

static void fill_ones(const struct param *param, struct stream *stream)
{
    const int64_t count = box_num_elements(&param->box);
    const bool bf16 = param->value.dtype == DTYPE_BF16;
    char *host = malloc(tensor_size_bytes(&param->value) + 1);

    CHECK(host != NULL, "out of memory for the initial values of %s", param->name);
    for (int64_t i = 0; i < count; i++) {
        if (bf16) {
            ((bf16_t *)host)[i] = bf16_from_float(1.0f);
        } else {
            ((float *)host)[i] = 1.0f;
        }
    }
    stream_copy_from_host(stream, param->value.data, host, tensor_size_bytes(&param->value));
    free(host);
}

static void initialize(struct param *param, struct stream *stream, uint64_t seed)
{
    struct initial_normal normal = {.x = &param->value,
                                    .key = rng_key(seed, param->name, 0),
                                    .std = param->init_std,
                                    .box = param->box};

    switch (param->init) {
    case PARAM_INIT_NORMAL:
        memcpy(normal.global_shape, param->global_shape, sizeof normal.global_shape);
        op_initial_normal(stream, &normal);
        break;
    case PARAM_INIT_ONES:
        fill_ones(param, stream);
        break;
    case PARAM_INIT_ZEROS:
        op_fill_zero(stream, &param->value);
        break;
    }
}

void param_list_initialize(struct param_list *list, struct stream *stream, uint64_t seed)
{
    if (stream->device->kind == DEVICE_NULL) {
        return;
    }
    for (int i = 0; i < list->num_params; i++) {
        initialize(list->params[i], stream, seed);
    }
}

static void clear_run(const struct param_list *list, struct stream *stream, int64_t begin,
                      int64_t end)
{
    struct tensor run = tensor_rows(&list->grads, begin, end - begin);

    if (begin < end) {
        op_fill_zero(stream, &run);
    }
}

/* Parameters registered one after the other are neighbours in the buffer, in either order: what
 * lies together is zeroed at once. */
void param_list_clear_grads(const struct param_list *list, struct stream *stream)
{
    int64_t begin = 0, end = 0;

    for (int i = 0; i < list->num_params; i++) {
        const struct param *param = list->params[i];
        const int64_t first = param->start, last = first + padded_size(param);

        if (param->grad_is_product) {
            continue;
        }
        if (last == begin) {
            begin = first;
        } else if (first == end) {
            end = last;
        } else {
            clear_run(list, stream, begin, end);
            begin = first;
            end = last;
        }
    }
    clear_run(list, stream, begin, end);
}

bool param_grad_accumulates(const struct param *param, bool overwrite_grads)
{
    return !(param->grad_is_product && overwrite_grads);
}

int64_t param_list_num_local(const struct param_list *list)
{
    int64_t total = 0;

    for (int i = 0; i < list->num_params; i++) {
        total += box_num_elements(&list->params[i]->box);
    }
    return total;
}
