/* Dense products by cuBLASLt. The library works in column-major order, where a row-major matrix is
 * its own transpose: C^T = op(B)^T op(A)^T, so the operands change places and nothing is copied.
 * F32 runs in full precision (no TF32). The algorithm that the library's heuristic proposes first
 * is kept for each shape, which also keeps the bits of a result the same from step to step. */
#ifdef CADRE_CUDA
#include <cuda_runtime_api.h>
#include <string.h>

#include "base/check.h"
#include "ops/libraries_cuda.h"
#include "ops/ops_cuda.h"

/* CUBLAS_CHECK(cublasLtFunction(arguments)) calls the loaded library's function. */
#define CUBLAS_CHECK(call)                                                                         \
    do {                                                                                           \
        const cublasStatus_t status_ = cache.library->call;                                        \
        CHECK(status_ == CUBLAS_STATUS_SUCCESS, "%s: %s", #call,                                   \
              cache.library->cublasLtGetStatusString(status_));                                    \
    } while (0)

enum { CACHE_SIZE = 4096 }; /* shapes; a power of two */

static const size_t workspace_bytes = (size_t)32 << 20;

/* What an algorithm depends on. Plain numbers without padding, so that memcmp compares. */
struct shape {
    int64_t m, n, k;
    int32_t transpose_a, transpose_b, accumulate, has_bias;
    int32_t in_dtype, out_dtype;
    int32_t alignment_a, alignment_b, alignment_c, in_use;
};

static struct {
    const struct cublaslt_library *library;
    cublasLtHandle_t handle;
    struct {
        struct shape shape;
        cublasLtMatmulAlgo_t algorithm;
    } entries[CACHE_SIZE];
} cache;

/* The library's descriptions of one product, on the caller's stack. */
struct product {
    struct shape shape;
    cublasLtMatmulDescOpaque_t operation;
    cublasLtMatrixLayoutOpaque_t a, b, c; /* in the library's roles: a is ours to the right */
};

static cudaDataType_t data_type(enum dtype dtype)
{
    return dtype == DTYPE_F32 ? CUDA_R_32F : CUDA_R_16BF;
}

/* The largest power of two that divides the address, at most 256. */
static int32_t alignment_of(const void *address)
{
    const uintptr_t lowest = (uintptr_t)address & -(uintptr_t)address;

    return lowest > 256 || lowest == 0 ? 256 : (int32_t)lowest;
}

static struct shape shape_of(const struct matmul *args)
{
    return (struct shape){
        .m = args->c->dim[0],
        .n = args->c->dim[1],
        .k = args->a->dim[args->transpose_a ? 0 : 1],
        .transpose_a = args->transpose_a,
        .transpose_b = args->transpose_b,
        .accumulate = args->accumulate,
        .has_bias = args->bias != NULL,
        .in_dtype = args->a->dtype,
        .out_dtype = args->c->dtype,
        .alignment_a = alignment_of(args->a->data),
        .alignment_b = alignment_of(args->b->data),
        .alignment_c = alignment_of(args->c->data),
        .in_use = 1,
    };
}

static void layout_init(cublasLtMatrixLayoutOpaque_t *layout, const struct tensor *x)
{
    CUBLAS_CHECK(cublasLtMatrixLayoutInit_internal(layout, sizeof *layout, data_type(x->dtype),
                                                   (uint64_t)x->dim[1], (uint64_t)x->dim[0],
                                                   x->dim[1]));
}

static void set_operation(struct product *product, cublasLtMatmulDescAttributes_t attribute,
                          const void *value, size_t size_bytes)
{
    CUBLAS_CHECK(cublasLtMatmulDescSetAttribute(&product->operation, attribute, value, size_bytes));
}

static void product_init(struct product *product, const struct matmul *args, const void *bias)
{
    const cublasOperation_t left = args->transpose_b ? CUBLAS_OP_T : CUBLAS_OP_N;
    const cublasOperation_t right = args->transpose_a ? CUBLAS_OP_T : CUBLAS_OP_N;

    product->shape = shape_of(args);
    CUBLAS_CHECK(cublasLtMatmulDescInit_internal(&product->operation, sizeof product->operation,
                                                 CUBLAS_COMPUTE_32F, CUDA_R_32F));
    set_operation(product, CUBLASLT_MATMUL_DESC_TRANSA, &left, sizeof left);
    set_operation(product, CUBLASLT_MATMUL_DESC_TRANSB, &right, sizeof right);
    if (bias != NULL) {
        const cublasLtEpilogue_t epilogue = CUBLASLT_EPILOGUE_BIAS;

        set_operation(product, CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue, sizeof epilogue);
        set_operation(product, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias, sizeof bias);
    }
    layout_init(&product->a, args->b);
    layout_init(&product->b, args->a);
    layout_init(&product->c, args->c);
}

static void set_preference(cublasLtMatmulPreferenceOpaque_t *preference,
                           cublasLtMatmulPreferenceAttributes_t attribute, uint32_t value)
{
    CUBLAS_CHECK(cublasLtMatmulPreferenceSetAttribute(preference, attribute, &value, sizeof value));
}

static cublasLtMatmulAlgo_t choose_algorithm(struct product *product)
{
    const struct shape *shape = &product->shape;
    const uint64_t workspace = workspace_bytes;
    cublasLtMatmulPreferenceOpaque_t preference;
    cublasLtMatmulHeuristicResult_t result;
    int num_results = 0;

    CUBLAS_CHECK(cublasLtMatmulPreferenceInit_internal(&preference, sizeof preference));
    CUBLAS_CHECK(cublasLtMatmulPreferenceSetAttribute(
        &preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace, sizeof workspace));
    set_preference(&preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
                   (uint32_t)shape->alignment_b);
    set_preference(&preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
                   (uint32_t)shape->alignment_a);
    set_preference(&preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
                   (uint32_t)shape->alignment_c);
    set_preference(&preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES,
                   (uint32_t)shape->alignment_c);
    CUBLAS_CHECK(cublasLtMatmulAlgoGetHeuristic(cache.handle, &product->operation, &product->a,
                                                &product->b, &product->c, &product->c, &preference,
                                                1, &result, &num_results));
    CHECK(num_results == 1, "cuBLASLt has no product for m %lld n %lld k %lld", (long long)shape->m,
          (long long)shape->n, (long long)shape->k);
    return result.algo;
}

static uint64_t shape_hash(const struct shape *shape)
{
    const unsigned char *bytes = (const unsigned char *)shape;
    uint64_t hash = 0xcbf29ce484222325ull; /* FNV-1a */

    for (size_t i = 0; i < sizeof *shape; i++) {
        hash = (hash ^ bytes[i]) * 0x100000001b3ull;
    }
    return hash;
}

/* From the cache, or chosen and put there. A full cache is emptied. */
static cublasLtMatmulAlgo_t algorithm_of(struct product *product)
{
    const uint64_t first = shape_hash(&product->shape);

    for (uint64_t probe = 0; probe < 64; probe++) {
        const uint64_t at = (first + probe) % CACHE_SIZE;

        if (!cache.entries[at].shape.in_use) {
            cache.entries[at].algorithm = choose_algorithm(product);
            cache.entries[at].shape = product->shape;
            return cache.entries[at].algorithm;
        }
        if (memcmp(&cache.entries[at].shape, &product->shape, sizeof product->shape) == 0) {
            return cache.entries[at].algorithm;
        }
    }
    memset(cache.entries, 0, sizeof cache.entries);
    return algorithm_of(product);
}

static void matmul_run(struct stream *stream, const struct matmul *args, const void *bias)
{
    const float one = 1.0f, beta = args->accumulate ? 1.0f : 0.0f;
    void *workspace = arena_allocate(stream->scratch, workspace_bytes);
    struct product product;
    cublasLtMatmulAlgo_t algorithm;

    if (cache.handle == NULL) {
        cache.library = cublaslt_library();
        CHECK(cache.library != NULL, "%s", error_text());
        CUBLAS_CHECK(cublasLtCreate(&cache.handle));
    }
    product_init(&product, args, bias);
    algorithm = algorithm_of(&product);
    CUBLAS_CHECK(cublasLtMatmul(cache.handle, &product.operation, &one, args->b->data, &product.a,
                                args->a->data, &product.b, &beta, args->c->data, &product.c,
                                args->c->data, &product.c, &algorithm, workspace, workspace_bytes,
                                stream->native));
}

/* k = 0: zero, plus the bias. */
static void matmul_empty(struct stream *stream, const struct matmul *args)
{
    if (!args->accumulate) {
        fill_zero_cuda(stream, args->c);
    }
    for (int64_t row = 0; row < args->c->dim[0] && args->bias != NULL; row++) {
        struct tensor c = tensor_rows(args->c, row, 1);

        linear_combination_cuda(stream,
                                &(struct linear_combination){.y = &c, .x = args->bias, .a = 1.0f});
    }
}

void matmul_cuda(struct stream *stream, const struct matmul *args)
{
    const void *bias = args->bias != NULL ? args->bias->data : NULL;

    if (args->c->dim[0] == 0 || args->c->dim[1] == 0) {
        return;
    }
    if (args->a->dim[args->transpose_a ? 0 : 1] == 0) {
        matmul_empty(stream, args);
        return;
    }
    if (bias != NULL && args->bias->dtype != args->c->dtype) { /* the library wants c's dtype */
        struct tensor wide = tensor_new(stream->scratch, args->c->dtype, args->c->dim[1]);

        linear_combination_cuda(
            stream, &(struct linear_combination){.y = &wide, .x = args->bias, .a = 1.0f});
        bias = wide.data;
    }
    matmul_run(stream, args, bias);
}
#endif
