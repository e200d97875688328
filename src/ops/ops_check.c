/* The contracts of ops.h as checks: blocks of the transformer, loss, elementwise. */
#include "ops/ops_check.h"

#include "base/check.h"

void expect_shape(const char *function, const char *name, const struct tensor *tensor,
                  enum dtype dtype, const int64_t *dims, int num_dims)
{
    if (!tensor_matches(tensor, dtype, dims, num_dims)) {
        const struct tensor expected = tensor_wrap(NULL, dtype, dims, num_dims);

        PANIC("%s: %s is %s, expected %s", function, name, tensor_describe(tensor),
              tensor_describe(&expected));
    }
}

void expect_dims(const char *function, const char *name, const struct tensor *tensor, int num_dims)
{
    CHECK(tensor != NULL, "%s: %s is missing", function, name);
    CHECK(tensor->dtype == DTYPE_F32 || tensor->dtype == DTYPE_BF16,
          "%s: %s is %s, expected F32 or BF16", function, name, tensor_describe(tensor));
    CHECK(tensor->num_dims == num_dims, "%s: %s is %s, expected %d dims", function, name,
          tensor_describe(tensor), num_dims);
}

static void expect_probability(const char *function, float p)
{
    CHECK(p >= 0.0f && p < 1.0f, "%s: dropout probability %g", function, (double)p);
}

void check_matmul(const struct matmul *a)
{
    int64_t m, n, k;

    EXPECT_DIMS(a->a, 2);
    EXPECT_DIMS(a->b, 2);
    EXPECT_DIMS(a->c, 2);
    m = a->c->dim[0];
    n = a->c->dim[1];
    k = a->a->dim[a->transpose_a ? 0 : 1];
    EXPECT(a->a, a->a->dtype, a->transpose_a ? k : m, a->transpose_a ? m : k);
    EXPECT(a->b, a->a->dtype, a->transpose_b ? n : k, a->transpose_b ? k : n);
    EXPECT(a->c, a->c->dtype == DTYPE_F32 ? DTYPE_F32 : a->a->dtype, m, n);
    EXPECT_OPTIONAL(a->bias, a->a->dtype, n);
    CHECK(a->bias == NULL || !a->accumulate, "a bias is not accumulated");
}

void check_bias_forward(const struct bias_forward *a)
{
    EXPECT_DIMS(a->y, 2);
    EXPECT(a->bias, a->y->dtype, a->y->dim[1]);
}

void check_bias_backward(const struct bias_backward *a)
{
    EXPECT_DIMS(a->d_y, 2);
    EXPECT(a->d_bias, DTYPE_F32, a->d_y->dim[1]);
}

void check_norm_forward(const struct norm_forward *a)
{
    int64_t t, h;

    EXPECT_DIMS(a->x, 2);
    t = a->x->dim[0];
    h = a->x->dim[1];
    EXPECT(a->y, a->x->dtype, t, h);
    EXPECT(a->inv_std, DTYPE_F32, t);
    EXPECT(a->weight, a->x->dtype, h);
    EXPECT_OPTIONAL(a->residual, a->x->dtype, t, h);
    CHECK((a->sum != NULL) == (a->residual != NULL), "sum and residual belong together");
    EXPECT_OPTIONAL(a->sum, a->x->dtype, t, h);
    if (a->kind == NORM_LAYERNORM) {
        EXPECT(a->mean, DTYPE_F32, t);
        EXPECT(a->bias, a->x->dtype, h);
    } else {
        CHECK(a->mean == NULL && a->bias == NULL, "RMSNorm has neither mean nor bias");
    }
    CHECK(a->eps >= 0.0f, "eps is %g", (double)a->eps);
}

void check_norm_backward(const struct norm_backward *a)
{
    int64_t t, h;

    EXPECT_DIMS(a->x, 2);
    t = a->x->dim[0];
    h = a->x->dim[1];
    EXPECT(a->d_x, a->x->dtype, t, h);
    EXPECT(a->d_y, a->x->dtype, t, h);
    EXPECT_OPTIONAL(a->d_residual, a->x->dtype, t, h);
    EXPECT(a->weight, a->x->dtype, h);
    EXPECT(a->d_weight, DTYPE_F32, h);
    EXPECT(a->inv_std, DTYPE_F32, t);
    if (a->kind == NORM_LAYERNORM) {
        EXPECT(a->mean, DTYPE_F32, t);
        EXPECT(a->d_bias, DTYPE_F32, h);
    } else {
        CHECK(a->mean == NULL && a->d_bias == NULL, "RMSNorm has neither mean nor bias");
    }
}

static void check_qkv_split(const struct qkv_split *a)
{
    int64_t t, num_heads, num_groups, d;

    EXPECT_DIMS(a->q, 3);
    EXPECT_DIMS(a->k, 3);
    t = a->q->dim[0];
    num_heads = a->q->dim[1];
    num_groups = a->k->dim[1];
    d = a->q->dim[2];
    CHECK(num_groups > 0 && num_heads % num_groups == 0, "%lld heads in %lld groups",
          (long long)num_heads, (long long)num_groups);
    EXPECT(a->k, a->q->dtype, t, num_groups, d);
    EXPECT(a->v, a->q->dtype, t, num_groups, d);
    EXPECT(a->qkv, a->q->dtype, t, (num_heads + 2 * num_groups) * d);
    if (a->table != NULL) {
        EXPECT_DIMS(a->table, 3);
        EXPECT(a->table, DTYPE_F32, a->table->dim[0], a->table->dim[1], 2);
        CHECK(2 * a->table->dim[1] <= d, "rotation of %lld pairs in a head of %lld",
              (long long)a->table->dim[1], (long long)d);
        EXPECT(a->position, DTYPE_I32, t);
    }
}

void check_qkv_split_forward(const struct qkv_split *a)
{
    check_qkv_split(a);
}

void check_qkv_split_backward(const struct qkv_split *a)
{
    check_qkv_split(a);
}

/* Of a part of the keys the queries may be past the last. */
static void check_attention_inputs(const struct attention *a, bool is_part)
{
    const int64_t s = a->q->dim[0], b = a->q->dim[1], num_heads = a->q->dim[2], d = a->q->dim[3];
    const int64_t num_groups = a->k->dim[2];

    CHECK(num_groups > 0 && num_heads % num_groups == 0, "%lld heads in %lld groups",
          (long long)num_heads, (long long)num_groups);
    EXPECT(a->k, a->q->dtype, a->k->dim[0], b, num_groups, d);
    EXPECT(a->v, a->q->dtype, a->k->dim[0], b, num_groups, d);
    EXPECT(a->lse, DTYPE_F32, b, num_heads, s);
    EXPECT_OPTIONAL(a->document_start, DTYPE_I32, s * b);
    CHECK(a->causal || a->document_start == NULL, "documents need causal attention");
    CHECK(a->q_start >= 0 && a->k_start >= 0 && a->kv_length <= a->k->dim[0],
          "q_start %lld, k_start %lld, kv_length %lld of %s", (long long)a->q_start,
          (long long)a->k_start, (long long)a->kv_length, tensor_describe(a->k));
    CHECK(!a->causal || is_part || a->q_start + s <= a->k_start + a->kv_length,
          "queries to %lld, keys to %lld", (long long)(a->q_start + s),
          (long long)(a->k_start + a->kv_length));
    CHECK(a->kv_length > 0 || s == 0, "no keys");
    expect_probability(__func__, a->dropout.p);
    if (a->dropout.p > 0.0f) {
        EXPECT(a->sample_id, DTYPE_I64, b);
        CHECK(a->head_start >= 0 && a->head_start + num_heads <= a->num_heads_global,
              "heads %lld + %lld of %lld", (long long)a->head_start, (long long)num_heads,
              (long long)a->num_heads_global);
    }
}

void check_attention_forward(const struct attention *a)
{
    EXPECT_DIMS(a->q, 4);
    EXPECT_DIMS(a->k, 4);
    EXPECT_DIMS(a->out, 4);
    EXPECT(a->out, a->out->dtype == DTYPE_F32 ? DTYPE_F32 : a->q->dtype, a->q->dim[0], a->q->dim[1],
           a->q->dim[2], a->q->dim[3]);
    check_attention_inputs(a, a->merge);
}

void check_attention_backward(const struct attention_backward *a)
{
    const struct tensor *q = a->forward.q, *k = a->forward.k;
    enum dtype dtype;

    EXPECT_DIMS(q, 4);
    EXPECT_DIMS(k, 4);
    EXPECT(a->forward.out, q->dtype, q->dim[0], q->dim[1], q->dim[2], q->dim[3]);
    check_attention_inputs(&a->forward, a->accumulate);
    dtype = a->accumulate ? DTYPE_F32 : q->dtype;
    EXPECT(a->d_out, q->dtype, q->dim[0], q->dim[1], q->dim[2], q->dim[3]);
    EXPECT(a->d_q, dtype, q->dim[0], q->dim[1], q->dim[2], q->dim[3]);
    EXPECT(a->d_k, dtype, k->dim[0], k->dim[1], k->dim[2], k->dim[3]);
    EXPECT(a->d_v, dtype, k->dim[0], k->dim[1], k->dim[2], k->dim[3]);
}

static int64_t activation_width(enum activation_kind kind, int64_t f)
{
    return kind == ACTIVATION_SWIGLU ? 2 * f : f;
}

void check_activation_forward(const struct activation *a)
{
    EXPECT_DIMS(a->y, 2);
    EXPECT(a->x, a->y->dtype, a->y->dim[0], activation_width(a->kind, a->y->dim[1]));
}

void check_activation_backward(const struct activation *a)
{
    int64_t t, f;

    EXPECT_DIMS(a->d_y, 2);
    t = a->d_y->dim[0];
    f = a->d_y->dim[1];
    EXPECT(a->x, a->d_y->dtype, t, activation_width(a->kind, f));
    EXPECT(a->d_x, a->d_y->dtype, t, activation_width(a->kind, f));
}

void check_dropout(const struct dropout *a)
{
    int64_t t, h;

    EXPECT_DIMS(a->x, 2);
    t = a->x->dim[0];
    h = a->x->dim[1];
    EXPECT(a->y, a->x->dtype, t, h);
    EXPECT_OPTIONAL(a->residual, a->x->dtype, t, h);
    expect_probability(__func__, a->rule.p);
    if (a->rule.p > 0.0f) {
        EXPECT(a->token_id, DTYPE_I64, t);
    }
}

void check_jitter(const struct jitter *a)
{
    EXPECT_DIMS(a->x, 2);
    EXPECT(a->y, a->x->dtype, a->x->dim[0], a->x->dim[1]);
    EXPECT(a->token_id, DTYPE_I64, a->x->dim[0]);
}

void check_embedding_forward(const struct embedding *a)
{
    EXPECT_DIMS(a->y, 2);
    EXPECT_DIMS(a->weight, 2);
    EXPECT(a->weight, a->y->dtype, a->weight->dim[0], a->y->dim[1]);
    EXPECT(a->id, DTYPE_I32, a->y->dim[0]);
}

void check_embedding_backward(const struct embedding_backward *a)
{
    EXPECT_DIMS(a->d_y, 2);
    EXPECT_DIMS(a->d_weight, 2);
    EXPECT(a->d_weight, DTYPE_F32, a->d_weight->dim[0], a->d_y->dim[1]);
    EXPECT(a->id, DTYPE_I32, a->d_y->dim[0]);
}

void check_cross_entropy_forward(const struct cross_entropy *a)
{
    int64_t t;

    EXPECT_DIMS(a->logits, 2);
    t = a->logits->dim[0];
    CHECK(a->logits->dim[1] > 0, "empty vocabulary");
    EXPECT(a->max, DTYPE_F32, t);
    EXPECT(a->sum_exp, DTYPE_F32, t);
    EXPECT(a->target, DTYPE_F32, t);
    EXPECT(a->label, DTYPE_I32, t);
    if (a->d_logits != NULL) {
        EXPECT(a->d_logits, a->logits->dtype, t, a->logits->dim[1]);
        EXPECT(a->d_loss, DTYPE_F32, t);
    }
}

static int64_t expect_tokens(const char *function, const struct tensor *x)
{
    CHECK(x != NULL && x->num_dims == 1, "%s: %s, expected [T]", function, tensor_describe(x));
    return x->dim[0];
}

void check_softmax_rescale(const struct softmax_rescale *a)
{
    const int64_t t = expect_tokens(__func__, a->sum_exp);

    EXPECT(a->sum_exp, DTYPE_F32, t);
    EXPECT(a->local_max, DTYPE_F32, t);
    EXPECT(a->max, DTYPE_F32, t);
}

void check_token_loss(const struct token_loss *a)
{
    const int64_t t = expect_tokens(__func__, a->loss);

    EXPECT(a->loss, DTYPE_F32, t);
    EXPECT(a->max, DTYPE_F32, t);
    EXPECT(a->sum_exp, DTYPE_F32, t);
    EXPECT(a->target, DTYPE_F32, t);
}

void check_cross_entropy_backward(const struct cross_entropy_backward *a)
{
    int64_t t;

    EXPECT_DIMS(a->logits, 2);
    t = a->logits->dim[0];
    EXPECT(a->max, DTYPE_F32, t);
    EXPECT(a->sum_exp, DTYPE_F32, t);
    EXPECT(a->label, DTYPE_I32, t);
    EXPECT(a->d_loss, DTYPE_F32, t);
}

static void expect_float(const char *function, const char *name, const struct tensor *tensor)
{
    CHECK(tensor != NULL, "%s: %s is missing", function, name);
    CHECK(tensor->dtype == DTYPE_F32 || tensor->dtype == DTYPE_BF16,
          "%s: %s is %s, expected F32 or BF16", function, name, tensor_describe(tensor));
}

void check_linear_combination(const struct linear_combination *a)
{
    expect_float(__func__, "y", a->y);
    expect_float(__func__, "x", a->x);
    CHECK(tensor_num_elements(a->x) == tensor_num_elements(a->y), "x is %s, y is %s",
          tensor_describe(a->x), tensor_describe(a->y));
}

void check_add(const struct add *a)
{
    expect_float(__func__, "y", a->y);
    CHECK(tensor_matches(a->u, a->y->dtype, a->y->dim, a->y->num_dims) &&
              tensor_matches(a->v, a->y->dtype, a->y->dim, a->y->num_dims),
          "u is %s, v is %s, y is %s", tensor_describe(a->u), tensor_describe(a->v),
          tensor_describe(a->y));
}
