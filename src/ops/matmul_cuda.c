/* Dense products by cuBLASLt. The library works in column-major order, where a row-major matrix is
 * its own transpose: C^T = op(B)^T op(A)^T, so the operands change places and nothing is copied.
 * F32 runs in full precision (no TF32).
 *
 * Each shape keeps the algorithm that the library's heuristic proposes first, or, for a large
 * product of bf16 numbers, the fastest of those proposals that are of the same kind and sum over k
 * in one piece: they go through k in the same order, so that the bits of a result do not depend on
 * which was fastest (docs/performance.md). */
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

enum {
    CACHE_SIZE = 4096, /* shapes; a power of two */
    PROPOSALS_MAX = 8,
    TRIAL_ROUNDS = 3,
};

static const size_t workspace_bytes = (size_t)32 << 20;
static const double trial_flops_min = 1e11; /* 0.15 ms */

/* What an algorithm depends on. Plain numbers without padding, so that memcmp compares. */
struct shape {
    int64_t m, n, k;
    int32_t transpose_a, transpose_b, has_bias, in_use;
    int32_t in_dtype, out_dtype;
    int32_t alignment_a, alignment_b, alignment_c, reserved;
};

struct choice {
    struct shape shape;
    cublasLtMatmulAlgo_t algorithm;
    bool is_tried;
};

static struct {
    const struct cublaslt_library *library;
    cublasLtHandle_t handle;
    struct choice entries[CACHE_SIZE];
} cache;

/* The library's descriptions of one product, on the caller's stack. */
struct product {
    struct shape shape;
    cublasLtMatmulDescOpaque_t operation;
    cublasLtMatrixLayoutOpaque_t a, b, c; /* in the library's roles: a is ours to the right */
    const struct matmul *args;
    void *workspace;
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
    product->args = args;
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

/* The library's proposals, best first; their number. */
static int propose(struct product *product, cublasLtMatmulHeuristicResult_t *proposals)
{
    const struct shape *shape = &product->shape;
    const uint64_t workspace = workspace_bytes;
    cublasLtMatmulPreferenceOpaque_t preference;
    int num_proposals = 0;

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
                                                PROPOSALS_MAX, proposals, &num_proposals));
    CHECK(num_proposals > 0, "cuBLASLt has no product for m %lld n %lld k %lld",
          (long long)shape->m, (long long)shape->n, (long long)shape->k);
    return num_proposals;
}

static void run_algorithm(struct stream *stream, struct product *product,
                          const cublasLtMatmulAlgo_t *algorithm)
{
    const struct matmul *args = product->args;
    const float one = 1.0f, beta = args->accumulate ? 1.0f : 0.0f;

    CUBLAS_CHECK(cublasLtMatmul(cache.handle, &product->operation, &one, args->b->data, &product->a,
                                args->a->data, &product->b, &beta, args->c->data, &product->c,
                                args->c->data, &product->c, algorithm, product->workspace,
                                workspace_bytes, stream->native));
}

static int32_t algorithm_number(const cublasLtMatmulAlgo_t *algorithm,
                                cublasLtMatmulAlgoConfigAttributes_t attribute)
{
    int32_t value = 0;
    size_t size_bytes;

    CUBLAS_CHECK(cublasLtMatmulAlgoConfigGetAttribute(algorithm, attribute, &value, sizeof value,
                                                      &size_bytes));
    return value;
}

/* Whether its results have the bits of the first's. */
static bool has_same_order(const cublasLtMatmulAlgo_t *algorithm, const cublasLtMatmulAlgo_t *first)
{
    return algorithm_number(algorithm, CUBLASLT_ALGO_CONFIG_ID) ==
               algorithm_number(first, CUBLASLT_ALGO_CONFIG_ID) &&
           algorithm_number(algorithm, CUBLASLT_ALGO_CONFIG_SPLITK_NUM) <= 1 &&
           algorithm_number(first, CUBLASLT_ALGO_CONFIG_SPLITK_NUM) <= 1;
}

static double trial_seconds(struct stream *stream, struct product *product,
                            const cublasLtMatmulAlgo_t *algorithm)
{
    void *from = stream_mark(stream), *to;
    double seconds;

    run_algorithm(stream, product, algorithm);
    to = stream_mark(stream);
    seconds = stream_mark_seconds(stream, from, to);
    stream_mark_free(stream, from);
    stream_mark_free(stream, to);
    return seconds;
}

/* The fastest of the proposals by trial, in rounds since the clock may drift. Each run writes the
 * product to its place. */
static cublasLtMatmulAlgo_t fastest(struct stream *stream, struct product *product,
                                    cublasLtMatmulHeuristicResult_t *proposals, int num_proposals)
{
    double seconds[PROPOSALS_MAX] = {0.0};
    int best = 0;

    for (int round = 0; round <= TRIAL_ROUNDS; round++) {
        for (int i = 0; i < num_proposals; i++) {
            if (has_same_order(&proposals[i].algo, &proposals[0].algo)) {
                const double once = trial_seconds(stream, product, &proposals[i].algo);

                seconds[i] += round > 0 ? once : 0.0; /* the first loads the kernel */
            }
        }
    }
    for (int i = 1; i < num_proposals; i++) {
        if (seconds[i] > 0.0 && seconds[i] < seconds[best]) {
            best = i;
        }
    }
    return proposals[best].algo;
}

/* A trial writes c several times and waits: not where it would be added to, nor in a graph. */
static bool can_try(struct stream *stream, const struct product *product)
{
    enum cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;

    CHECK(cudaStreamIsCapturing(stream->native, &capture) == cudaSuccess, "cudaStreamIsCapturing");
    return !product->args->accumulate && capture == cudaStreamCaptureStatusNone;
}

static void choose_algorithm(struct stream *stream, struct product *product, struct choice *choice)
{
    const struct shape *shape = &product->shape;
    const double flops = 2.0 * (double)shape->m * (double)shape->n * (double)shape->k;
    const bool is_worth_it = shape->in_dtype == DTYPE_BF16 && flops >= trial_flops_min;
    cublasLtMatmulHeuristicResult_t proposals[PROPOSALS_MAX];
    const int num_proposals = propose(product, proposals);

    choice->shape = *shape;
    choice->algorithm = proposals[0].algo;
    choice->is_tried = !is_worth_it;
    if (is_worth_it && can_try(stream, product)) {
        choice->algorithm = fastest(stream, product, proposals, num_proposals);
        choice->is_tried = true;
    }
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

/* The shape's place in the cache, which may not be in use yet. A full cache is emptied. */
static struct choice *choice_of(const struct shape *shape)
{
    const uint64_t first = shape_hash(shape);

    for (uint64_t probe = 0; probe < 64; probe++) {
        struct choice *choice = &cache.entries[(first + probe) % CACHE_SIZE];

        if (!choice->shape.in_use || memcmp(&choice->shape, shape, sizeof *shape) == 0) {
            return choice;
        }
    }
    memset(cache.entries, 0, sizeof cache.entries);
    return choice_of(shape);
}

static void matmul_run(struct stream *stream, const struct matmul *args, const void *bias)
{
    struct product product = {.workspace = arena_allocate(stream->scratch, workspace_bytes)};
    struct choice *choice;

    if (cache.handle == NULL) {
        cache.library = cublaslt_library();
        CHECK(cache.library != NULL, "%s", error_text());
        CUBLAS_CHECK(cublasLtCreate(&cache.handle));
    }
    product_init(&product, args, bias);
    choice = choice_of(&product.shape);
    if (!choice->shape.in_use || (!choice->is_tried && can_try(stream, &product))) {
        choose_algorithm(stream, &product, choice);
    }
    run_algorithm(stream, &product, &choice->algorithm);
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
