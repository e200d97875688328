/* cuDNN's fused attention for Hopper exists as graphs of single operations that the library knows
 * by their form, so the formulas below are written in the order that it expects (that of its own
 * front end, cudnn-frontend 1.x).
 *
 * The backward pass writes the gradient of the scores, B * A * S * Skv numbers in bf16, to memory
 * and multiplies it with the keys in a second kernel: up to cuDNN 9.24 that is its only variant for
 * Hopper with a fixed order of sums (the other adds up d_q by atomics). So that this memory does
 * not grow with the square of the sequence, a call runs over part of the batch and of the heads at
 * a time. */
#ifdef CADRE_CUDNN
#include "ops/attention_cudnn_cuda.h"

#include <cuda_runtime_api.h>
#include <math.h>
#include <string.h>

#include "base/check.h"
#include "base/log.h"
#include "ops/cudnn_graph_cuda.h"

enum {
    HEAD_DIM_MAX = 128,
    QUERIES_MIN = 64, /* a plan takes 0.3 s to make: not for every length of a text being written */
    CACHE_SIZE = 64,
    VERSION_WITH_ODD_LENGTHS = 91600
};

static const int64_t score_bytes_max = (int64_t)2 << 30;

enum uid {
    UID_Q = 1,
    UID_K,
    UID_V,
    UID_OUT,
    UID_LSE,
    UID_D_OUT,
    UID_D_Q,
    UID_D_K,
    UID_D_V,
    UID_DELTA,
    UID_SCALE,
    UID_NOTHING, /* the score of a key that is not seen */
    UID_ONE,
    UID_NUM_QUERIES,
    UID_NUM_KEYS
};

/* What a plan depends on. Plain numbers without padding, so that memcmp compares. b, num_heads and
 * num_groups are those of a run; the tensors hold b_all, heads_all and groups_all. */
struct shape {
    int64_t s, s_kv, d, b, num_heads, num_groups, b_all, heads_all, groups_all;
    int64_t causal, backward;
};

static struct {
    const struct cudnn_library *library;
    cudnnHandle_t handle;
    struct {
        struct shape shape;
        struct cudnn_plan plan;
    } entries[CACHE_SIZE];
    int num_entries;
} cache;

/* ---- the formulas ---- */

struct formula {
    struct cudnn_graph *graph;
    const struct shape *shape;
    int64_t score[CUDNN_DIMS], row[CUDNN_DIMS]; /* dims of the scores, of a number a query */
};

static struct formula formula_of(struct cudnn_graph *graph, const struct shape *shape)
{
    return (struct formula){graph,
                            shape,
                            {shape->b, shape->num_heads, shape->s, shape->s_kv},
                            {shape->b, shape->num_heads, shape->s, 1}};
}

/* x [length, b_all, heads_all, D] as [b, heads, length, D]. */
static struct cudnn_value heads_of(const struct formula *f, enum uid uid, int64_t length,
                                   int64_t heads, int64_t heads_all)
{
    const int64_t d = f->shape->d;

    return cudnn_tensor(f->graph, uid, CUDNN_DATA_BFLOAT16,
                        (const int64_t[]){f->shape->b, heads, length, d},
                        (const int64_t[]){heads_all * d, d, f->shape->b_all * heads_all * d, 1});
}

static struct cudnn_value of_queries(const struct formula *f, enum uid uid)
{
    return heads_of(f, uid, f->shape->s, f->shape->num_heads, f->shape->heads_all);
}

static struct cudnn_value of_keys(const struct formula *f, enum uid uid)
{
    return heads_of(f, uid, f->shape->s_kv, f->shape->num_groups, f->shape->groups_all);
}

/* As [b, groups, D, length]. */
static struct cudnn_value of_keys_transposed(const struct formula *f, enum uid uid)
{
    const struct shape *s = f->shape;

    return cudnn_tensor(
        f->graph, uid, CUDNN_DATA_BFLOAT16, (const int64_t[]){s->b, s->num_groups, s->d, s->s_kv},
        (const int64_t[]){s->groups_all * s->d, s->d, 1, s->b_all * s->groups_all * s->d});
}

/* A number a query: [b_all, heads_all, S] as [b, heads, S, 1]. */
static struct cudnn_value of_rows(const struct formula *f, enum uid uid, int64_t heads_all)
{
    return cudnn_tensor(f->graph, uid, CUDNN_DATA_FLOAT, f->row,
                        (const int64_t[]){heads_all * f->shape->s, f->shape->s, 1, 1});
}

static struct cudnn_value scores(const struct formula *f, cudnnDataType_t type)
{
    return cudnn_virtual(f->graph, type, f->score);
}

static struct cudnn_value rows(const struct formula *f)
{
    return cudnn_virtual(f->graph, CUDNN_DATA_FLOAT, f->row);
}

static struct cudnn_value product(const struct formula *f, struct cudnn_value a,
                                  struct cudnn_value b)
{
    const struct cudnn_value c = scores(f, CUDNN_DATA_FLOAT);

    cudnn_matmul(f->graph, c, a, b);
    return c;
}

static struct cudnn_value combine(const struct formula *f, cudnnPointwiseMode_t mode,
                                  struct cudnn_value x, struct cudnn_value b)
{
    const struct cudnn_value y = cudnn_virtual(f->graph, CUDNN_DATA_FLOAT, x.dim);

    cudnn_pointwise(f->graph, mode, CUDNN_DATA_FLOAT, y, x, b);
    return y;
}

static struct cudnn_value map(const struct formula *f, cudnnPointwiseMode_t mode,
                              struct cudnn_value x)
{
    return combine(f, mode, x, (struct cudnn_value){0});
}

static struct cudnn_value combine_indices(const struct formula *f, cudnnPointwiseMode_t mode,
                                          struct cudnn_value x, struct cudnn_value b)
{
    const struct cudnn_value y = scores(f, CUDNN_DATA_INT32);

    cudnn_pointwise(f->graph, mode, CUDNN_DATA_INT32, y, x, b);
    return y;
}

/* Query i sees keys to i + (num_keys - num_queries). */
static struct cudnn_value mask(const struct formula *f, struct cudnn_value score)
{
    struct cudnn_value query, key, seen, masked;

    if (!f->shape->causal) {
        return score;
    }
    query = scores(f, CUDNN_DATA_INT32);
    key = scores(f, CUDNN_DATA_INT32);
    cudnn_index(f->graph, query, score, 2);
    cudnn_index(f->graph, key, score, 3);
    if (f->shape->s != f->shape->s_kv) {
        query = combine_indices(f, CUDNN_POINTWISE_ADD, query,
                                cudnn_scalar(f->graph, UID_NUM_KEYS, CUDNN_DATA_INT32));
        query = combine_indices(f, CUDNN_POINTWISE_SUB, query,
                                cudnn_scalar(f->graph, UID_NUM_QUERIES, CUDNN_DATA_INT32));
    }
    seen = scores(f, CUDNN_DATA_BOOLEAN);
    cudnn_pointwise(f->graph, CUDNN_POINTWISE_CMP_GE, CUDNN_DATA_BOOLEAN, seen, query, key);
    masked = scores(f, CUDNN_DATA_FLOAT);
    cudnn_select(f->graph, masked, seen, score,
                 cudnn_scalar(f->graph, UID_NOTHING, CUDNN_DATA_FLOAT));
    return masked;
}

/* out = softmax(mask(scale q k^T)) v, lse = max + log(sum). */
static void write_forward(const struct formula *f)
{
    struct cudnn_graph *graph = f->graph;
    const struct cudnn_value q = of_queries(f, UID_Q), k = of_keys_transposed(f, UID_K);
    const struct cudnn_value scale = cudnn_scalar(graph, UID_SCALE, CUDNN_DATA_FLOAT);
    const struct cudnn_value score =
        mask(f, combine(f, CUDNN_POINTWISE_MUL, product(f, q, k), scale));
    const struct cudnn_value max = rows(f), sum = rows(f), p = scores(f, CUDNN_DATA_BFLOAT16);
    struct cudnn_value e;

    cudnn_reduce(graph, CUDNN_REDUCE_TENSOR_MAX, max, score);
    e = map(f, CUDNN_POINTWISE_EXP, combine(f, CUDNN_POINTWISE_SUB, score, max));
    cudnn_reduce(graph, CUDNN_REDUCE_TENSOR_ADD, sum, e);
    cudnn_pointwise(graph, CUDNN_POINTWISE_ADD, CUDNN_DATA_FLOAT,
                    of_rows(f, UID_LSE, f->shape->heads_all), max,
                    map(f, CUDNN_POINTWISE_LOG, sum));
    cudnn_pointwise(graph, CUDNN_POINTWISE_DIV, CUDNN_DATA_FLOAT, p, e, sum);
    cudnn_matmul(graph, of_queries(f, UID_OUT), p, of_keys(f, UID_V));
}

/* d_x = a^T b, summed over the heads of a group. */
static void write_key_gradient(const struct formula *f, enum uid uid, struct cudnn_value a,
                               struct cudnn_value b)
{
    const struct shape *s = f->shape;
    const struct cudnn_value transposed = cudnn_transpose(f->graph, CUDNN_DATA_BFLOAT16, a);
    const struct cudnn_value d_x = of_keys(f, uid);
    struct cudnn_value each;

    if (s->num_heads == s->num_groups) {
        cudnn_matmul(f->graph, d_x, transposed, b);
        return;
    }
    each = cudnn_virtual(f->graph, CUDNN_DATA_BFLOAT16,
                         (const int64_t[]){s->b, s->num_heads, s->s_kv, s->d});
    cudnn_matmul(f->graph, each, transposed, b);
    cudnn_reduce(f->graph, CUDNN_REDUCE_TENSOR_ADD, d_x, each);
}

/* delta = sum(d_out out);  p = exp(mask(scale q k^T - lse));  d_v = p^T d_out;
 * d_score = scale p (d_out v^T - delta);  d_k = d_score^T q;  d_q = d_score k. */
static void write_backward(const struct formula *f)
{
    struct cudnn_graph *graph = f->graph;
    const struct cudnn_value d_out = of_queries(f, UID_D_OUT), q = of_queries(f, UID_Q);
    const struct cudnn_value k = of_keys_transposed(f, UID_K), v = of_keys_transposed(f, UID_V);
    const struct cudnn_value scale = cudnn_scalar(graph, UID_SCALE, CUDNN_DATA_FLOAT);
    const struct cudnn_value sum = rows(f), delta = of_rows(f, UID_DELTA, f->shape->num_heads);
    struct cudnn_value p, d_score;

    cudnn_reduce(graph, CUDNN_REDUCE_TENSOR_ADD, sum,
                 combine(f, CUDNN_POINTWISE_MUL, d_out, of_queries(f, UID_OUT)));
    cudnn_pointwise(graph, CUDNN_POINTWISE_MUL, CUDNN_DATA_FLOAT, delta, sum,
                    cudnn_scalar(graph, UID_ONE, CUDNN_DATA_FLOAT));
    p = combine(f, CUDNN_POINTWISE_MUL, product(f, q, k), scale);
    p = combine(f, CUDNN_POINTWISE_SUB, p, of_rows(f, UID_LSE, f->shape->heads_all));
    p = map(f, CUDNN_POINTWISE_EXP, mask(f, p));
    write_key_gradient(f, UID_D_V, p, d_out);
    d_score = combine(f, CUDNN_POINTWISE_SUB, product(f, d_out, v), delta);
    d_score = combine(f, CUDNN_POINTWISE_MUL, d_score, p);
    d_score = combine(f, CUDNN_POINTWISE_MUL, d_score, scale);
    write_key_gradient(f, UID_D_K, d_score, q);
    cudnn_matmul(graph, of_queries(f, UID_D_Q), d_score,
                 cudnn_transpose(graph, CUDNN_DATA_BFLOAT16, k));
}

/* ---- plans ---- */

static bool library_ready(void)
{
    if (cache.handle == NULL) {
        cache.library = cudnn_library();
        if (cache.library == NULL) {
            return false;
        }
        CHECK(cache.library->cudnnCreate(&cache.handle) == CUDNN_STATUS_SUCCESS, "cudnnCreate");
    }
    return true;
}

static struct cudnn_plan plan_new(const struct shape *shape)
{
    struct cudnn_graph graph = {.library = cache.library};
    const struct formula f = formula_of(&graph, shape);
    struct cudnn_plan plan;

    if (shape->backward) {
        write_backward(&f);
    } else {
        write_forward(&f);
    }
    plan = cudnn_graph_finish(&graph, cache.handle);
    if (plan.descriptor == NULL) {
        log_warn("attention of %lld queries, %lld keys, heads of %lld runs on cadre's own kernel: "
                 "%s",
                 (long long)shape->s, (long long)shape->s_kv, (long long)shape->d, error_text());
    }
    return plan;
}

/* Made once for each shape. A full cache is emptied. */
static const struct cudnn_plan *plan_of(const struct shape *shape)
{
    for (int i = 0; i < cache.num_entries; i++) {
        if (memcmp(&cache.entries[i].shape, shape, sizeof *shape) == 0) {
            return &cache.entries[i].plan;
        }
    }
    if (cache.num_entries == CACHE_SIZE) {
        for (int i = 0; i < CACHE_SIZE; i++) {
            cudnn_plan_destroy(cache.library, &cache.entries[i].plan);
        }
        cache.num_entries = 0;
    }
    cache.entries[cache.num_entries].shape = *shape;
    cache.entries[cache.num_entries].plan = plan_new(shape);
    return &cache.entries[cache.num_entries++].plan;
}

/* ---- calls ---- */

/* Whether some query does not see some key. */
static bool hides_keys(const struct attention *op)
{
    return op->causal && op->q_start < op->k_start + op->kv_length - 1;
}

/* The only mask here is that of the last query seeing the last key. */
static bool mask_fits(const struct attention *op)
{
    const int64_t s = op->q->dim[0];

    return !hides_keys(op) ||
           (op->q_start + s == op->k_start + op->kv_length && s <= op->kv_length);
}

bool attention_is_for_cudnn(const struct attention *op)
{
    const int64_t d = op->q->dim[3];

    return op->q->dtype == DTYPE_BF16 && d % 8 == 0 && d <= HEAD_DIM_MAX &&
           op->q->dim[0] >= QUERIES_MIN && op->q->dim[1] > 0 && !op->merge &&
           op->document_start == NULL && op->dropout.p == 0.0f && mask_fits(op) &&
           library_ready() &&
           (op->kv_length % 128 == 0 ||
            cache.library->cudnnGetVersion() >= VERSION_WITH_ODD_LENGTHS);
}

static struct shape shape_of(const struct attention *op, bool backward)
{
    return (struct shape){.s = op->q->dim[0],
                          .s_kv = op->kv_length,
                          .d = op->q->dim[3],
                          .b = op->q->dim[1],
                          .num_heads = op->q->dim[2],
                          .num_groups = op->k->dim[2],
                          .b_all = op->q->dim[1],
                          .heads_all = op->q->dim[2],
                          .groups_all = op->k->dim[2],
                          .causal = hides_keys(op),
                          .backward = backward};
}

/* The memory of a call by uid, and the numbers it points to. */
struct arguments {
    int64_t uids[CUDNN_UIDS];
    void *addresses[CUDNN_UIDS];
    int count;
    float scale, nothing, one;
    int32_t num_queries, num_keys;
};

static void bind(struct arguments *a, enum uid uid, void *address)
{
    a->uids[a->count] = uid;
    a->addresses[a->count++] = address;
}

static void bind_numbers(struct arguments *a, const struct attention *op, const struct shape *shape)
{
    a->scale = op->scale;
    a->nothing = -INFINITY;
    a->one = 1.0f;
    a->num_queries = (int32_t)shape->s;
    a->num_keys = (int32_t)shape->s_kv;
    bind(a, UID_SCALE, &a->scale);
    if (shape->causal) {
        bind(a, UID_NOTHING, &a->nothing);
    }
    if (shape->causal && shape->s != shape->s_kv) {
        bind(a, UID_NUM_QUERIES, &a->num_queries);
        bind(a, UID_NUM_KEYS, &a->num_keys);
    }
    if (shape->backward) {
        bind(a, UID_ONE, &a->one);
    }
}

static void run(struct stream *stream, const struct cudnn_plan *plan, struct arguments *a)
{
    void *workspace = arena_allocate(stream->scratch, (size_t)plan->workspace_bytes + 1);

    CHECK(cache.library->cudnnSetStream(cache.handle, stream->native) == CUDNN_STATUS_SUCCESS,
          "cudnnSetStream");
    cudnn_plan_run(cache.library, plan, cache.handle, a->count, a->uids, a->addresses, workspace);
}

bool attention_forward_cudnn(struct stream *stream, const struct attention *op)
{
    struct arguments a = {.count = 0};
    struct shape shape;
    const struct cudnn_plan *plan;

    if (!attention_is_for_cudnn(op)) {
        return false;
    }
    shape = shape_of(op, false);
    plan = plan_of(&shape);
    if (plan->descriptor == NULL) {
        return false;
    }
    bind(&a, UID_Q, op->q->data);
    bind(&a, UID_K, op->k->data);
    bind(&a, UID_V, op->v->data);
    bind(&a, UID_OUT, op->out->data);
    bind(&a, UID_LSE, op->lse->data);
    bind_numbers(&a, op, &shape);
    run(stream, plan, &a);
    return true;
}

static int64_t score_bytes(const struct shape *shape)
{
    return shape->b * shape->num_heads * shape->s * shape->s_kv * 2;
}

/* Halves the batch, then the heads, until the scores of a run fit. Each part's lse must begin on 16
 * bytes. */
static void take_part(struct shape *shape)
{
    if (shape->s % 4 != 0) {
        return;
    }
    while (score_bytes(shape) > score_bytes_max && shape->b % 2 == 0) {
        shape->b /= 2;
    }
    while (score_bytes(shape) > score_bytes_max && shape->num_groups % 2 == 0) {
        shape->num_groups /= 2;
        shape->num_heads /= 2;
    }
}

static void *part_of(const struct tensor *x, int64_t batch, int64_t head)
{
    return (char *)x->data + (batch * x->dim[2] + head) * x->dim[3] * dtype_size_bytes(x->dtype);
}

static void run_backward_part(struct stream *stream, const struct attention_backward *op,
                              const struct shape *shape, const struct cudnn_plan *plan,
                              int64_t batch, int64_t group)
{
    const struct arena_mark mark = arena_mark(stream->scratch);
    const struct attention *forward = &op->forward;
    const int64_t head = group * (shape->heads_all / shape->groups_all);
    struct arguments a = {.count = 0};

    bind(&a, UID_Q, part_of(forward->q, batch, head));
    bind(&a, UID_K, part_of(forward->k, batch, group));
    bind(&a, UID_V, part_of(forward->v, batch, group));
    bind(&a, UID_OUT, part_of(forward->out, batch, head));
    bind(&a, UID_D_OUT, part_of(op->d_out, batch, head));
    bind(&a, UID_D_Q, part_of(op->d_q, batch, head));
    bind(&a, UID_D_K, part_of(op->d_k, batch, group));
    bind(&a, UID_D_V, part_of(op->d_v, batch, group));
    bind(&a, UID_LSE, (float *)forward->lse->data + (batch * shape->heads_all + head) * shape->s);
    bind(&a, UID_DELTA,
         arena_allocate(stream->scratch, (size_t)(shape->b * shape->num_heads * shape->s) * 4));
    bind_numbers(&a, forward, shape);
    run(stream, plan, &a);
    arena_release(stream->scratch, mark);
}

/* Keys that do not count get no gradient. */
static void clear_rest(struct stream *stream, const struct tensor *d_x, int64_t kv_length)
{
    struct tensor rest = tensor_rows(d_x, kv_length, d_x->dim[0] - kv_length);

    if (rest.dim[0] > 0) {
        stream->ops->fill_zero(stream, &rest);
    }
}

bool attention_backward_cudnn(struct stream *stream, const struct attention_backward *op)
{
    struct shape shape;
    const struct cudnn_plan *plan;

    if (op->accumulate || !attention_is_for_cudnn(&op->forward)) {
        return false;
    }
    shape = shape_of(&op->forward, true);
    take_part(&shape);
    plan = plan_of(&shape);
    if (plan->descriptor == NULL) {
        return false;
    }
    for (int64_t batch = 0; batch < shape.b_all; batch += shape.b) {
        for (int64_t group = 0; group < shape.groups_all; group += shape.num_groups) {
            run_backward_part(stream, op, &shape, plan, batch, group);
        }
    }
    clear_rest(stream, op->d_k, op->forward.kv_length);
    clear_rest(stream, op->d_v, op->forward.kv_length);
    return true;
}
#elif defined(CADRE_CUDA)
#include "ops/attention_cudnn_cuda.h"

bool attention_is_for_cudnn(const struct attention *op)
{
    return false;
}

bool attention_forward_cudnn(struct stream *stream, const struct attention *op)
{
    return false;
}

bool attention_backward_cudnn(struct stream *stream, const struct attention_backward *op)
{
    return false;
}
#endif
