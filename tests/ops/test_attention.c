#include "reference.h"

/* Everything as doubles, in the layout of the tensors. */
struct attention_case {
    int64_t s, b, num_heads, num_groups, d, kv_rows, kv_length, q_start;
    bool causal;
    double scale;
    struct dropout_rule dropout;
    const int32_t *document_start; /* or NULL */
    const int64_t *sample_id;
    int64_t head_start, num_heads_global;
    double *q, *k, *v;
    const double *d_out;
    const double *out; /* backward's input: the result of forward, as rounded */
};

static double *query_row(const struct attention_case *c, const double *x, int64_t s, int64_t b,
                         int64_t head)
{
    return (double *)(uintptr_t)x + ((s * c->b + b) * c->num_heads + head) * c->d;
}

static double *key_row(const struct attention_case *c, const double *x, int64_t j, int64_t b,
                       int64_t head)
{
    const int64_t group = head / (c->num_heads / c->num_groups);

    return (double *)(uintptr_t)x + ((j * c->b + b) * c->num_groups + group) * c->d;
}

static double row_dot(const double *x, const double *y, int64_t n)
{
    double sum = 0.0;

    for (int64_t i = 0; i < n; i++) {
        sum += x[i] * y[i];
    }
    return sum;
}

static bool sees(const struct attention_case *c, int64_t s, int64_t b, int64_t j)
{
    if (!c->causal) {
        return true;
    }
    return j <= c->q_start + s &&
           (c->document_start == NULL || j >= c->document_start[s * c->b + b]);
}

static double dropout_factor(const struct attention_case *c, int64_t s, int64_t b, int64_t head,
                             int64_t j)
{
    const uint64_t row = ((uint64_t)c->sample_id[b] * (uint64_t)c->num_heads_global +
                          (uint64_t)(c->head_start + head)) *
                             16777216u +
                         (uint64_t)(c->q_start + s);

    return rng_uniform(c->dropout.key, row, (uint64_t)j) >= c->dropout.p
               ? 1.0 / (1.0 - (double)c->dropout.p)
               : 0.0;
}

/* p[kv_length] of one query; returns lse. */
static double probabilities(const struct attention_case *c, int64_t s, int64_t b, int64_t head,
                            double *p)
{
    double max = -INFINITY, sum = 0.0;

    for (int64_t j = 0; j < c->kv_length; j++) {
        p[j] = sees(c, s, b, j) ? c->scale * row_dot(query_row(c, c->q, s, b, head),
                                                     key_row(c, c->k, j, b, head), c->d)
                                : -INFINITY;
        max = fmax(max, p[j]);
    }
    for (int64_t j = 0; j < c->kv_length; j++) {
        p[j] = exp(p[j] - max);
        sum += p[j];
    }
    for (int64_t j = 0; j < c->kv_length; j++) {
        p[j] /= sum;
    }
    return max + log(sum);
}

static void reference_query(const struct attention_case *c, int64_t s, int64_t b, int64_t head,
                            double *out, double *lse, double *p)
{
    double *out_row = query_row(c, out, s, b, head);

    lse[(b * c->num_heads + head) * c->s + s] = probabilities(c, s, b, head, p);
    memset(out_row, 0, (size_t)c->d * sizeof *out_row);
    for (int64_t j = 0; j < c->kv_length; j++) {
        const double weight = p[j] * dropout_factor(c, s, b, head, j);

        for (int64_t i = 0; i < c->d; i++) {
            out_row[i] += weight * key_row(c, c->v, j, b, head)[i];
        }
    }
}

/* From the softmax's derivative, d_score_j = p_j (d_p_j - sum_l p_l d_p_l), where the sum is d_out
 * . out; adds into d_q, d_k, d_v. */
static void reference_query_backward(const struct attention_case *c, int64_t s, int64_t b,
                                     int64_t head, double *d_q, double *d_k, double *d_v, double *p,
                                     double *d_p)
{
    const double *d_out = query_row(c, c->d_out, s, b, head);
    const double mean = row_dot(d_out, query_row(c, c->out, s, b, head), c->d);

    probabilities(c, s, b, head, p);
    for (int64_t j = 0; j < c->kv_length; j++) {
        const double factor = dropout_factor(c, s, b, head, j);

        d_p[j] = factor * row_dot(d_out, key_row(c, c->v, j, b, head), c->d);
        for (int64_t i = 0; i < c->d; i++) {
            key_row(c, d_v, j, b, head)[i] += p[j] * factor * d_out[i];
        }
    }
    for (int64_t j = 0; j < c->kv_length; j++) {
        const double d_score = c->scale * p[j] * (d_p[j] - mean);

        for (int64_t i = 0; i < c->d; i++) {
            query_row(c, d_q, s, b, head)[i] += d_score * key_row(c, c->k, j, b, head)[i];
            key_row(c, d_k, j, b, head)[i] += d_score * query_row(c, c->q, s, b, head)[i];
        }
    }
}

struct results {
    double *out, *lse, *d_q, *d_k, *d_v;
};

static struct results new_results(const struct attention_case *c)
{
    const int64_t q_size = c->s * c->b * c->num_heads * c->d;
    const int64_t k_size = c->kv_rows * c->b * c->num_groups * c->d;

    return (struct results){new_doubles(q_size), new_doubles(c->b * c->num_heads * c->s),
                            new_doubles(q_size), new_doubles(k_size), new_doubles(k_size)};
}

static void reference_attention(const struct attention_case *c, struct results *r, bool backward)
{
    double *p = new_doubles(c->kv_length), *d_p = new_doubles(c->kv_length);

    for (int64_t b = 0; b < c->b; b++) {
        for (int64_t head = 0; head < c->num_heads; head++) {
            for (int64_t s = 0; s < c->s; s++) {
                if (backward) {
                    reference_query_backward(c, s, b, head, r->d_q, r->d_k, r->d_v, p, d_p);
                } else {
                    reference_query(c, s, b, head, r->out, r->lse, p);
                }
            }
        }
    }
}

static double attention_loss(const void *context)
{
    const struct attention_case *c = context;
    double out[256], lse[64], p[64], loss;

    for (int64_t b = 0; b < c->b; b++) {
        for (int64_t head = 0; head < c->num_heads; head++) {
            for (int64_t s = 0; s < c->s; s++) {
                reference_query(c, s, b, head, out, lse, p);
            }
        }
    }
    loss = row_dot(out, c->d_out, c->s * c->b * c->num_heads * c->d);
    return loss;
}

static double *random_doubles(int64_t n)
{
    double *x = new_doubles(n);

    for (int64_t i = 0; i < n; i++) {
        x[i] = random_normal_number();
    }
    return x;
}

static void reference_backward_is_the_derivative(void **state)
{
    const int32_t document_start[8] = {0, 0, 1, 0, 1, 2, 1, 2};
    const int64_t sample_id[2] = {5, 9};
    struct attention_case c = {.s = 4,
                               .b = 2,
                               .num_heads = 4,
                               .num_groups = 2,
                               .d = 3,
                               .kv_rows = 4,
                               .kv_length = 4,
                               .causal = true,
                               .scale = 0.7,
                               .dropout = {0.3f, rng_key(3, "attention", 0)},
                               .document_start = document_start,
                               .sample_id = sample_id,
                               .num_heads_global = 4};
    struct results r;

    c.q = random_doubles(96);
    c.k = random_doubles(48);
    c.v = random_doubles(48);
    c.d_out = random_doubles(96);
    r = new_results(&c);
    reference_attention(&c, &r, false);
    c.out = r.out;
    reference_attention(&c, &r, true);
    assert_gradient(attention_loss, &c, c.q, 96, r.d_q);
    assert_gradient(attention_loss, &c, c.k, 48, r.d_k);
    assert_gradient(attention_loss, &c, c.v, 48, r.d_v);
}

/* Non-decreasing starts of documents, each at or before its token. */
static struct tensor random_documents(int64_t s, int64_t b)
{
    struct tensor start = tensor_new(arena, DTYPE_I32, s * b);
    int32_t *data = start.data;

    for (int64_t i = 0; i < b; i++) {
        data[i] = 0;
        for (int64_t t = 1; t < s; t++) {
            data[t * b + i] = random_below(12) == 0 ? (int32_t)t : data[(t - 1) * b + i];
        }
    }
    return start;
}

struct attention_tensors {
    struct tensor q, k, v, out, lse, d_out, d_q, d_k, d_v, document_start, sample_id;
};

static struct attention_tensors make_tensors(const struct attention_case *c, enum dtype dtype)
{
    const int64_t s = c->s, b = c->b, a = c->num_heads, g = c->num_groups, d = c->d;
    struct attention_tensors t = {.q = normal_tensor(1.0, dtype, s, b, a, d),
                                  .k = normal_tensor(1.0, dtype, c->kv_rows, b, g, d),
                                  .v = normal_tensor(1.0, dtype, c->kv_rows, b, g, d),
                                  .out = poisoned_tensor(dtype, s, b, a, d),
                                  .lse = poisoned_tensor(DTYPE_F32, b, a, s),
                                  .d_out = normal_tensor(1.0, dtype, s, b, a, d),
                                  .d_q = poisoned_tensor(dtype, s, b, a, d),
                                  .d_k = poisoned_tensor(dtype, c->kv_rows, b, g, d),
                                  .d_v = poisoned_tensor(dtype, c->kv_rows, b, g, d),
                                  .document_start = random_documents(s, b),
                                  .sample_id = tensor_new(arena, DTYPE_I64, b)};

    for (int64_t i = 0; i < b; i++) {
        ((int64_t *)t.sample_id.data)[i] = random_below(1 << 20);
    }
    for (int64_t i = c->kv_length * b * g * d; i < tensor_num_elements(&t.k); i++) {
        tensor_set(&t.k, i, NAN); /* the rest of a cache is not read */
        tensor_set(&t.v, i, NAN);
    }
    return t;
}

static struct attention attention_args(const struct attention_case *c, struct attention_tensors *t,
                                       bool with_documents)
{
    return (struct attention){.scale = (float)c->scale,
                              .causal = c->causal,
                              .q_start = c->q_start,
                              .kv_length = c->kv_length,
                              .q = &t->q,
                              .k = &t->k,
                              .v = &t->v,
                              .out = &t->out,
                              .lse = &t->lse,
                              .document_start = with_documents ? &t->document_start : NULL,
                              .dropout = c->dropout,
                              .sample_id = &t->sample_id,
                              .head_start = c->head_start,
                              .num_heads_global = c->num_heads_global};
}

static void check_attention_within(struct attention_case c, enum dtype dtype, bool with_documents,
                                   double tolerance)
{
    struct attention_tensors t = make_tensors(&c, dtype);
    const struct attention args = attention_args(&c, &t, with_documents);
    struct results expected;

    c.scale = (double)args.scale;
    c.document_start = with_documents ? t.document_start.data : NULL;
    c.sample_id = t.sample_id.data;
    c.q = doubles_of(&t.q);
    c.k = doubles_of(&t.k);
    c.v = doubles_of(&t.v);
    c.d_out = doubles_of(&t.d_out);
    expected = new_results(&c);
    reference_attention(&c, &expected, false);
    WITH_THREADS(&t.out, &t.lse)
    {
        op_attention_forward(stream, &args);
    }
    assert_close(&t.out, expected.out, tolerance);
    assert_close(&t.lse, expected.lse, 1e-5);
    c.out = doubles_of(&t.out);
    reference_attention(&c, &expected, true);
    WITH_THREADS(&t.d_q, &t.d_k, &t.d_v)
    {
        op_attention_backward(
            stream,
            &(struct attention_backward){
                .forward = args, .d_out = &t.d_out, .d_q = &t.d_q, .d_k = &t.d_k, .d_v = &t.d_v});
    }
    assert_close(&t.d_q, expected.d_q, tolerance);
    assert_close(&t.d_k, expected.d_k, tolerance);
    assert_close(&t.d_v, expected.d_v, tolerance);
}

static void check_attention(struct attention_case c, enum dtype dtype, bool with_documents)
{
    check_attention_within(c, dtype, with_documents, tolerance_of(dtype));
}

static struct attention_case case_of(int64_t s, int64_t b, int64_t num_heads, int64_t num_groups,
                                     int64_t d)
{
    return (struct attention_case){.s = s,
                                   .b = b,
                                   .num_heads = num_heads,
                                   .num_groups = num_groups,
                                   .d = d,
                                   .kv_rows = s,
                                   .kv_length = s,
                                   .causal = true,
                                   .scale = 1.0 / sqrt((double)d),
                                   .num_heads_global = num_heads};
}

static void causal_attention_agrees_with_the_formulas(void **state)
{
    const int64_t sizes[][5] = {{1, 1, 1, 1, 1},   {2, 1, 2, 1, 3},   {13, 2, 4, 2, 8},
                                {48, 1, 1, 1, 16}, {97, 2, 2, 2, 20}, {149, 1, 6, 2, 64},
                                {200, 3, 2, 1, 33}};

    for (int i = 0; i < 7; i++) {
        const int64_t *n = sizes[i];

        check_attention(case_of(n[0], n[1], n[2], n[3], n[4]), DTYPE_F32, false);
        check_attention(case_of(n[0], n[1], n[2], n[3], n[4]), DTYPE_BF16, false);
        reference_empty_arena(state);
    }
}

static void documents_do_not_see_each_other(void **state)
{
    check_attention(case_of(31, 2, 2, 2, 8), DTYPE_F32, true);
    check_attention(case_of(211, 2, 4, 2, 16), DTYPE_F32, true);
    check_attention(case_of(211, 2, 4, 2, 16), DTYPE_BF16, true);
}

static void full_attention_sees_all_keys_below_kv_length(void **state)
{
    struct attention_case c = case_of(37, 2, 4, 2, 24);

    c.causal = false;
    c.kv_rows = 330;
    c.kv_length = 103;
    check_attention(c, DTYPE_F32, false);
    check_attention(c, DTYPE_BF16, false);
}

/* Generation: the new queries follow q_start earlier tokens; the cache has room for more. */
static void queries_continue_a_cache(void **state)
{
    const int64_t counts[][2] = {{2, 0}, {1, 97}, {3, 96}, {60, 45}};

    for (int i = 0; i < 4; i++) {
        struct attention_case c = case_of(counts[i][0], 2, 4, 2, 16);

        c.q_start = counts[i][1];
        c.kv_length = c.q_start + c.s;
        c.kv_rows = c.kv_length + 5;
        check_attention(c, DTYPE_F32, false);
        check_attention(c, DTYPE_BF16, false);
    }
}

static void dropout_is_the_same_in_both_passes(void **state)
{
    struct attention_case c = case_of(130, 2, 4, 2, 16);

    c.dropout = (struct dropout_rule){0.2f, rng_key(11, "attention dropout", 2)};
    c.head_start = 4; /* the second of three tensor-parallel ranks */
    c.num_heads_global = 12;
    check_attention(c, DTYPE_F32, false);
    check_attention(c, DTYPE_F32, true);
    check_attention(c, DTYPE_BF16, false);
    c.q_start = 20;
    c.kv_rows = c.kv_length = c.s + c.q_start;
    check_attention(c, DTYPE_F32, false);
}

/* Half of the heads and one sequence of the batch, computed apart, give the same bits. */
static void masks_do_not_depend_on_the_layout(void **state)
{
    struct attention_case c = case_of(50, 2, 4, 4, 16), half = case_of(50, 1, 2, 2, 16);
    struct attention_tensors whole, part;
    struct attention args;

    c.dropout = half.dropout = (struct dropout_rule){0.5f, rng_key(1, "layout", 0)};
    half.head_start = 2;
    half.num_heads_global = 4;
    whole = make_tensors(&c, DTYPE_F32);
    part = make_tensors(&half, DTYPE_F32);
    ((int64_t *)part.sample_id.data)[0] = ((int64_t *)whole.sample_id.data)[1];
    for (int64_t i = 0; i < tensor_num_elements(&part.q); i++) {
        const int64_t of_whole =
            (i / 32 * 2 + 1) * 64 + 32 + i % 32; /* sequence 1, heads 2 and 3 */

        tensor_set(&part.q, i, tensor_get(&whole.q, of_whole));
        tensor_set(&part.k, i, tensor_get(&whole.k, of_whole));
        tensor_set(&part.v, i, tensor_get(&whole.v, of_whole));
    }
    args = attention_args(&c, &whole, false);
    op_attention_forward(stream, &args);
    args = attention_args(&half, &part, false);
    op_attention_forward(stream, &args);
    for (int64_t i = 0; i < tensor_num_elements(&part.out); i++) {
        assert_true(tensor_get(&part.out, i) ==
                    tensor_get(&whole.out, (i / 32 * 2 + 1) * 64 + 32 + i % 32));
    }
}

/* Scores that would overflow exp, and a maximum that rises from block to block. The rounding of
 * scores near 500 is what the bar allows for. */
static void large_scores_are_harmless(void **state)
{
    struct attention_case c = case_of(210, 1, 1, 1, 16);

    c.scale = 40.0;
    check_attention_within(c, DTYPE_F32, false, 1e-3);
}

/* The keys of a case in parts, as a ring of ranks meets them: the last part first, where early
 * queries see nothing yet, then the others from the start; gradients add up in f32. */
struct part_sums {
    struct tensor out, d_q, d_k, d_v; /* f32, of all queries and keys */
};

static struct attention part_call(struct attention args, struct tensor parts[2], int64_t first,
                                  int64_t end)
{
    parts[0] = tensor_rows(args.k, first, end - first);
    parts[1] = tensor_rows(args.v, first, end - first);
    args.k = &parts[0];
    args.v = &parts[1];
    args.k_start = first;
    args.kv_length = end - first;
    return args;
}

static void run_parts(const struct attention *args, struct part_sums *sums, const int64_t *cuts,
                      int num_parts)
{
    for (int i = 0; i < num_parts; i++) {
        const int part = i == 0 ? num_parts - 1 : i - 1;
        struct tensor parts[2];
        struct attention call = part_call(*args, parts, cuts[part], cuts[part + 1]);

        call.merge = i > 0;
        call.out = &sums->out;
        op_attention_forward(stream, &call);
    }
}

static void run_parts_backward(const struct attention *args, const struct tensor *d_out,
                               struct part_sums *sums, const int64_t *cuts, int num_parts)
{
    for (int part = 0; part < num_parts; part++) {
        const int64_t first = cuts[part], count = cuts[part + 1] - cuts[part];
        struct tensor parts[2], d_k = tensor_rows(&sums->d_k, first, count);
        struct tensor d_v = tensor_rows(&sums->d_v, first, count);
        const struct attention call = part_call(*args, parts, first, first + count);

        op_attention_backward(stream, &(struct attention_backward){.forward = call,
                                                                   .d_out = d_out,
                                                                   .d_q = &sums->d_q,
                                                                   .d_k = &d_k,
                                                                   .d_v = &d_v,
                                                                   .accumulate = true});
    }
}

/* Rounds to the dtype of x, as the layer does when all parts are in. */
static void round_to(struct tensor *x, const struct tensor *sum)
{
    for (int64_t i = 0; i < tensor_num_elements(x); i++) {
        tensor_set(x, i, tensor_get(sum, i));
    }
}

static void assert_sums(const struct part_sums *sums, const struct results *expected)
{
    /* What check_parts let them be added to. */
    for (int64_t i = 0; i < tensor_num_elements(&sums->d_q); i++) {
        expected->d_q[i] += 1.0;
    }
    for (int64_t i = 0; i < tensor_num_elements(&sums->d_k); i++) {
        expected->d_k[i] += 2.0;
        expected->d_v[i] += 3.0;
    }
    assert_close(&sums->d_q, expected->d_q, 1e-5);
    assert_close(&sums->d_k, expected->d_k, 1e-5);
    assert_close(&sums->d_v, expected->d_v, 1e-5);
}

static struct tensor filled(struct tensor x, double value)
{
    for (int64_t i = 0; i < tensor_num_elements(&x); i++) {
        tensor_set(&x, i, value);
    }
    return x;
}

static void check_parts(struct attention_case c, enum dtype dtype, bool with_documents,
                        const int64_t *cuts, int num_parts)
{
    struct attention_tensors t = make_tensors(&c, dtype);
    const struct attention args = attention_args(&c, &t, with_documents);
    struct part_sums sums = {
        .out = poisoned_tensor(DTYPE_F32, c.s, c.b, c.num_heads, c.d),
        .d_q = filled(tensor_new(arena, DTYPE_F32, c.s, c.b, c.num_heads, c.d), 1.0),
        .d_k = filled(tensor_new(arena, DTYPE_F32, c.kv_rows, c.b, c.num_groups, c.d), 2.0),
        .d_v = filled(tensor_new(arena, DTYPE_F32, c.kv_rows, c.b, c.num_groups, c.d), 3.0)};
    struct results expected;

    c.scale = (double)args.scale;
    c.document_start = with_documents ? t.document_start.data : NULL;
    c.sample_id = t.sample_id.data;
    c.q = doubles_of(&t.q);
    c.k = doubles_of(&t.k);
    c.v = doubles_of(&t.v);
    c.d_out = doubles_of(&t.d_out);
    expected = new_results(&c);
    reference_attention(&c, &expected, false);
    run_parts(&args, &sums, cuts, num_parts);
    assert_close(&sums.out, expected.out, 1e-5);
    assert_close(&t.lse, expected.lse, 1e-5);
    round_to(&t.out, &sums.out);
    c.out = doubles_of(&t.out);
    reference_attention(&c, &expected, true);
    run_parts_backward(&args, &t.d_out, &sums, cuts, num_parts);
    assert_sums(&sums, &expected);
}

static void parts_of_the_keys_add_up_to_the_whole(void **state)
{
    const int64_t few[] = {0, 1, 4, 13}, many[] = {0, 97, 101, 203, 211};
    struct attention_case c = case_of(13, 2, 4, 2, 7);

    check_parts(c, DTYPE_F32, false, few, 3);
    check_parts(c, DTYPE_F32, true, few, 3);
    c = case_of(211, 2, 4, 2, 16);
    check_parts(c, DTYPE_F32, true, many, 4);
    check_parts(c, DTYPE_BF16, true, many, 4);
    c.dropout = (struct dropout_rule){0.4f, rng_key(8, "parts", 1)};
    check_parts(c, DTYPE_F32, false, many, 4);
    check_parts(c, DTYPE_BF16, true, many, 4);
    c.s = 50; /* queries that begin within the keys */
    c.q_start = 161;
    check_parts(c, DTYPE_F32, false, many, 4);
}

static void a_query_that_sees_no_key_counts_for_nothing(void **state)
{
    struct attention_case c = case_of(5, 1, 2, 1, 8);
    struct attention_tensors t = make_tensors(&c, DTYPE_F32);
    struct attention args = attention_args(&c, &t, false);

    args.k_start = 3; /* queries 0, 1, 2 are before all keys */
    op_attention_forward(stream, &args);
    for (int64_t i = 0; i < tensor_num_elements(&t.out); i++) {
        assert_true(i < 3 * 16 ? tensor_get(&t.out, i) == 0.0 : tensor_get(&t.out, i) != 0.0);
    }
    for (int64_t i = 0; i < tensor_num_elements(&t.lse); i++) {
        assert_true((tensor_get(&t.lse, i) == -INFINITY) == (i % 5 < 3));
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_teardown(reference_backward_is_the_derivative, reference_empty_arena),
        cmocka_unit_test_teardown(causal_attention_agrees_with_the_formulas, reference_empty_arena),
        cmocka_unit_test_teardown(documents_do_not_see_each_other, reference_empty_arena),
        cmocka_unit_test_teardown(full_attention_sees_all_keys_below_kv_length,
                                  reference_empty_arena),
        cmocka_unit_test_teardown(queries_continue_a_cache, reference_empty_arena),
        cmocka_unit_test_teardown(dropout_is_the_same_in_both_passes, reference_empty_arena),
        cmocka_unit_test_teardown(masks_do_not_depend_on_the_layout, reference_empty_arena),
        cmocka_unit_test_teardown(large_scores_are_harmless, reference_empty_arena),
        cmocka_unit_test_teardown(parts_of_the_keys_add_up_to_the_whole, reference_empty_arena),
        cmocka_unit_test_teardown(a_query_that_sees_no_key_counts_for_nothing,
                                  reference_empty_arena),
    };

    return cmocka_run_group_tests(tests, reference_start, reference_stop);
}
