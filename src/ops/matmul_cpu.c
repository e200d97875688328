/* Matrix products: by the library, after the cases that it does not know. BF16 on machines without
 * BF16 units goes through F32, which is faster there than the library's emulation (37 against 110
 * GFLOP/s). */
#include "ops/matmul_library_cpu.h"
#include "ops/ops_cpu_internal.h"

static void to_dtype(struct stream *stream, struct tensor *to, const struct tensor *from)
{
    linear_combination_cpu(stream, &(struct linear_combination){.y = to, .x = from, .a = 1.0f});
}

/* k = 0: the product is zero. */
static void matmul_empty(struct stream *stream, const struct matmul *a)
{
    const int64_t m = a->c->dim[0], n = a->c->dim[1];

    if (!a->accumulate) {
        fill_zero_cpu(stream, a->c);
    }
    for (int64_t row = 0; row < m && a->bias != NULL; row++) {
        struct tensor c = tensor_rows(a->c, row, 1);

        c = tensor_view(&c, n);
        to_dtype(stream, &c, a->bias);
    }
}

static struct tensor f32_copy(struct stream *stream, const struct tensor *x)
{
    struct tensor copy = tensor_allocate(stream->scratch, DTYPE_F32, x->dim, x->num_dims);

    to_dtype(stream, &copy, x);
    return copy;
}

static void matmul_in_f32(struct stream *stream, const struct matmul *args)
{
    const struct arena_mark mark = arena_mark(stream->scratch);
    struct matmul f32 = *args;
    struct tensor a = f32_copy(stream, args->a), b = f32_copy(stream, args->b), c = *args->c, bias;

    f32.a = &a;
    f32.b = &b;
    if (args->bias != NULL) {
        bias = f32_copy(stream, args->bias);
        f32.bias = &bias;
    }
    if (c.dtype != DTYPE_F32) {
        c = args->accumulate ? f32_copy(stream, args->c)
                             : tensor_new(stream->scratch, DTYPE_F32, c.dim[0], c.dim[1]);
    }
    f32.c = &c;
    matmul_library_run(stream, &f32);
    if (args->c->dtype != DTYPE_F32) {
        to_dtype(stream, args->c, &c);
    }
    arena_release(stream->scratch, mark);
}

void matmul_cpu(struct stream *stream, const struct matmul *a)
{
    const int64_t k = a->a->dim[a->transpose_a ? 0 : 1];

    if (a->c->dim[0] == 0 || a->c->dim[1] == 0) {
        return;
    }
    if (k == 0) {
        matmul_empty(stream, a);
    } else if (a->a->dtype == DTYPE_BF16 && !matmul_library_has_bf16()) {
        matmul_in_f32(stream, a);
    } else {
        matmul_library_run(stream, a);
    }
}
