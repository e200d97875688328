/* Attention in blocks, without the [S, Skv] matrix (Dao et al. 2022): a block of queries walks over
 * blocks of keys with a running maximum and sum; backward recomputes the probabilities from lse.
 * Blocks past the diagonal or before all documents of the queries are not visited.
 *
 * A head's k and v are first packed as F32, so that every product is one of block_product_cpu.h on
 * rows of consecutive memory: in the tensors, neighbouring keys of a head lie B*G*D elements apart,
 * which maps them onto few cache sets. Keys (and values, for backward) are also packed transposed,
 * in blocks [D, KEY_BLOCK]. D is padded to a multiple of BLOCK_VECTOR with zeros. */
#include <math.h>

#include "ops/block_product_cpu.h"
#include "ops/dropout_cpu.h"
#include "ops/ops_cpu_internal.h"

enum {
    QUERY_BLOCK = 48,
    KEY_BLOCK = 96,    /* both multiples of the product's tile; a block of scores takes 18 KB */
    DRAWN_AT_ONCE = 4, /* random numbers: dropout_factors begins at a multiple of it */
};

/* One (b, a) of a call. */
struct head {
    const struct attention *args;
    int64_t s, b, num_heads, num_groups, d, d_padded;
    int64_t batch, head, group;
};

static struct head head_of(const struct attention *a, int64_t batch, int64_t head)
{
    struct head h = {.args = a, .batch = batch, .head = head};

    h.s = a->q->dim[0];
    h.b = a->q->dim[1];
    h.num_heads = a->q->dim[2];
    h.d = a->q->dim[3];
    h.num_groups = a->k->dim[2];
    h.group = head / (h.num_heads / h.num_groups);
    h.d_padded = (h.d + BLOCK_VECTOR - 1) / BLOCK_VECTOR * BLOCK_VECTOR;
    return h;
}

/* First element of query s, or key j, of the head. */
static int64_t query_element(const struct head *h, int64_t s)
{
    return ((s * h->b + h->batch) * h->num_heads + h->head) * h->d;
}

static int64_t key_element(const struct head *h, int64_t j)
{
    return ((j * h->b + h->batch) * h->num_groups + h->group) * h->d;
}

static int64_t min_of(int64_t x, int64_t y)
{
    return x < y ? x : y;
}

static int64_t round_up(int64_t n, int64_t multiple)
{
    return (n + multiple - 1) / multiple * multiple;
}

/* Keys [first, end) that query s sees; none where end <= first. */
struct key_range {
    int64_t first, end;
};

static struct key_range keys_of_query(const struct head *h, int64_t s)
{
    const struct attention *a = h->args;
    struct key_range range = {0, a->kv_length};

    if (a->causal) {
        range.end = min_of(a->kv_length, a->q_start + s + 1 - a->k_start);
    }
    if (a->document_start != NULL) {
        const int64_t start = ((const int32_t *)a->document_start->data)[s * h->b + h->batch];

        range.first = start > a->k_start ? start - a->k_start : 0;
    }
    return range;
}

/* What some query of [s, s + m) sees, from the start of a key block on. */
static struct key_range keys_of_block(const struct head *h, int64_t s, int64_t m)
{
    struct key_range all = keys_of_query(h, s);

    for (int64_t i = 1; i < m; i++) {
        const struct key_range range = keys_of_query(h, s + i);

        all.first = min_of(all.first, range.first);
        all.end = range.end > all.end ? range.end : all.end;
    }
    all.first = all.first / KEY_BLOCK * KEY_BLOCK;
    return all;
}

/* Rows of a head lie pages apart, which the hardware does not foresee. */
static void prefetch_row(const struct tensor *x, int64_t first, const struct head *h)
{
    const int64_t element_bytes = dtype_size_bytes(x->dtype);
    const char *row = (const char *)x->data + first * element_bytes;

    for (int64_t i = 0; i < h->d * element_bytes; i += 64) {
        __builtin_prefetch(row + i);
    }
}

enum { PREFETCH_ROWS = 8 };

static void pack_row(float *to, const struct tensor *x, int64_t first, const struct head *h,
                     float scale)
{
    floats_copy(to, x, first, h->d);
#pragma omp simd
    for (int64_t i = 0; i < h->d; i++) {
        to[i] *= scale;
    }
    for (int64_t i = h->d; i < h->d_padded; i++) {
        to[i] = 0.0f;
    }
}

/* rows[m, d_padded] = scale * queries [s, s + m) of x (q, out or d_out). */
static void pack_queries(float *rows, const struct tensor *x, const struct head *h, int64_t s,
                         int64_t m, float scale)
{
    for (int64_t i = 0; i < m; i++) {
        prefetch_row(x, query_element(h, min_of(s + i + PREFETCH_ROWS, h->s - 1)), h);
        pack_row(rows + i * h->d_padded, x, query_element(h, s + i), h, scale);
    }
}

static void pack_keys(float *rows, const struct tensor *x, const struct head *h)
{
    const int64_t last = h->args->kv_length - 1;

    for (int64_t j = 0; j <= last; j++) {
        prefetch_row(x, key_element(h, min_of(j + PREFETCH_ROWS, last)), h);
        pack_row(rows + j * h->d_padded, x, key_element(h, j), h, 1.0f);
    }
}

/* blocks[ceil(kv_length / KEY_BLOCK), d, KEY_BLOCK] from x (k or v); zeros after the last key. */
static void pack_keys_transposed(float *blocks, const struct tensor *x, const struct head *h,
                                 float *row)
{
    const int64_t end = round_up(h->args->kv_length, KEY_BLOCK);

    for (int64_t j = 0; j < end; j++) {
        float *column = blocks + j / KEY_BLOCK * KEY_BLOCK * h->d + j % KEY_BLOCK;
        const float *x_row;

        prefetch_row(x, key_element(h, min_of(j + PREFETCH_ROWS, h->args->kv_length - 1)), h);
        if (j < h->args->kv_length) {
            x_row = floats_get(x, key_element(h, j), h->d, row);
        } else {
            memset(row, 0, (size_t)h->d * sizeof *row);
            x_row = row;
        }
        for (int64_t i = 0; i < h->d; i++) {
            column[i * KEY_BLOCK] = x_row[i];
        }
    }
}

/* -inf where query s does not see key j + i, i < n. False where it sees none. */
static bool mask_scores(float *scores, const struct head *h, int64_t s, int64_t j, int64_t n)
{
    const struct key_range range = keys_of_query(h, s);
    const int64_t first = range.first > j ? range.first - j : 0;
    const int64_t end = min_of(range.end - j, n);

    for (int64_t i = 0; i < min_of(first, n); i++) {
        scores[i] = -INFINITY;
    }
    for (int64_t i = end > 0 ? end : 0; i < n; i++) {
        scores[i] = -INFINITY;
    }
    return first < end;
}

/* x[i] := exp(x[i] - max), i < n, a multiple of BLOCK_VECTOR. Returns the sum, in SUM_LANES lanes.
 */
static float exp_row(float *x, float max, int64_t n)
{
    float lanes[SUM_LANES] = {0.0f};

    for (int64_t i = 0; i < n; i += SUM_LANES) {
#pragma omp simd
        for (int lane = 0; lane < SUM_LANES; lane++) {
            const float e = fast_exp(x[i + lane] - max);

            x[i + lane] = e;
            lanes[lane] += e;
        }
    }
    return lanes_sum(lanes);
}

static void scale_row(float *x, float factor, int64_t n)
{
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
        x[i] *= factor;
    }
}

static void multiply_row(float *restrict x, const float *restrict y, int64_t n)
{
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
        x[i] *= y[i];
    }
}

/* The factors of keys [j, j + n) of query s, somewhere in buffer[KEY_BLOCK + DRAWN_AT_ONCE]. */
static const float *head_dropout(float *buffer, const struct head *h, int64_t s, int64_t j,
                                 int64_t n)
{
    const struct attention *a = h->args;
    const uint64_t sample = (uint64_t)((const int64_t *)a->sample_id->data)[h->batch];
    const uint64_t head =
        sample * (uint64_t)a->num_heads_global + (uint64_t)(a->head_start + h->head);
    const int64_t first = a->k_start + j, before = first % DRAWN_AT_ONCE;

    dropout_factors(buffer, &a->dropout, (head << 24) + (uint64_t)(a->q_start + s),
                    (uint64_t)(first - before), n + before);
    return buffer + before;
}

/* ---- forward ---- */

struct forward_buffers {
    float *k_transposed, *v; /* of the head */
    float *q, *out, *scores, *factors, *row;
    float max[QUERY_BLOCK], sum[QUERY_BLOCK];
};

/* Floats of k or v of a head, packed. */
static int64_t packed_size(const struct head *h)
{
    return round_up(h->args->kv_length, KEY_BLOCK) * h->d_padded;
}

/* The next n of the floats of memory, of which *used are taken; NULL without memory. */
static float *take_floats(float *memory, int64_t *used, int64_t n)
{
    float *floats = memory != NULL ? memory + *used : NULL;

    *used += round_up(n, BLOCK_VECTOR);
    return floats;
}

/* Returns the floats needed; memory may be NULL to learn them. */
static int64_t forward_buffers_place(struct forward_buffers *buffers, const struct head *h,
                                     float *memory)
{
    int64_t used = 0;

    buffers->k_transposed = take_floats(memory, &used, packed_size(h));
    buffers->v = take_floats(memory, &used, packed_size(h));
    buffers->q = take_floats(memory, &used, QUERY_BLOCK * h->d_padded);
    buffers->out = take_floats(memory, &used, QUERY_BLOCK * h->d_padded);
    buffers->scores = take_floats(memory, &used, QUERY_BLOCK * KEY_BLOCK);
    buffers->factors = take_floats(memory, &used, KEY_BLOCK + DRAWN_AT_ONCE);
    buffers->row = take_floats(memory, &used, h->d_padded);
    return used;
}

/* Turns row i of the scores of keys [j, j + n) into exp(score - max), updates the running maximum
 * and sum and rescales what has been summed into out so far. */
static void softmax_row(struct forward_buffers *buffers, const struct head *h, int64_t s, int64_t i,
                        int64_t j, int64_t n)
{
    float *scores = buffers->scores + i * KEY_BLOCK;
    float block_max;

    if (!mask_scores(scores, h, s + i, j, n)) {
        memset(scores, 0, (size_t)n * sizeof *scores);
        return;
    }
    block_max = floats_max(scores, n);
    if (block_max > buffers->max[i]) {
        const float factor = fast_exp(buffers->max[i] - block_max);

        scale_row(buffers->out + i * h->d_padded, factor, h->d_padded);
        buffers->sum[i] *= factor;
        buffers->max[i] = block_max;
    }
    buffers->sum[i] += exp_row(scores, buffers->max[i], n);
    if (h->args->dropout.p > 0.0f) {
        multiply_row(scores, head_dropout(buffers->factors, h, s + i, j, n), n);
    }
}

/* Adds a result over other keys, with the log of its denominator, to that of this call. Returns the
 * log of the common denominator. */
static float merge_row(float *out, float lse, const struct tensor *other, int64_t first,
                       float other_lse, int64_t d)
{
    const float max = lse > other_lse ? lse : other_lse;
    const float both = max + log1pf(expf(-fabsf(lse - other_lse)));
    const float factor = expf(lse - both), other_factor = expf(other_lse - both);

    for (int64_t i = 0; i < d; i++) {
        out[i] = factor * out[i] + other_factor * float_get(other, first + i);
    }
    return both;
}

static void store_out(const struct forward_buffers *buffers, const struct head *h, int64_t s,
                      int64_t m)
{
    float *lse = (float *)h->args->lse->data + (h->batch * h->num_heads + h->head) * h->s;

    for (int64_t i = 0; i < m; i++) {
        const int64_t first = query_element(h, s + i);
        const bool sees_none = buffers->sum[i] == 0.0f;
        float *out = buffers->out + i * h->d_padded;
        float row_lse = sees_none ? -INFINITY : buffers->max[i] + logf(buffers->sum[i]);

        if (sees_none && h->args->merge) {
            continue;
        }
        scale_row(out, sees_none ? 0.0f : 1.0f / buffers->sum[i], h->d);
        if (h->args->merge) {
            row_lse = merge_row(out, row_lse, h->args->out, first, lse[s + i], h->d);
        }
        floats_put(h->args->out, first, h->d, out);
        lse[s + i] = row_lse;
    }
}

static void forward_queries(struct forward_buffers *buffers, const struct head *h, int64_t s,
                            int64_t m)
{
    const struct key_range keys = keys_of_block(h, s, m);
    const int64_t d_padded = h->d_padded;

    pack_queries(buffers->q, h->args->q, h, s, m, h->args->scale);
    memset(buffers->out, 0, (size_t)(m * d_padded) * sizeof *buffers->out);
    for (int64_t i = 0; i < m; i++) {
        buffers->max[i] = -INFINITY;
        buffers->sum[i] = 0.0f;
    }
    for (int64_t j = keys.first; j < keys.end; j += KEY_BLOCK) {
        const int64_t n = min_of(KEY_BLOCK, keys.end - j), n_padded = round_up(n, BLOCK_VECTOR);

        block_product(buffers->scores, KEY_BLOCK, (struct block_operand){buffers->q, d_padded, 1},
                      buffers->k_transposed + j * h->d, KEY_BLOCK, m, n_padded, h->d, false);
        for (int64_t i = 0; i < m; i++) {
            softmax_row(buffers, h, s, i, j, n_padded);
        }
        block_product(buffers->out, d_padded, (struct block_operand){buffers->scores, KEY_BLOCK, 1},
                      buffers->v + j * d_padded, d_padded, m, d_padded, n, true);
    }
    store_out(buffers, h, s, m);
}

static void forward_head(struct forward_buffers *buffers, const struct head *h)
{
    pack_keys_transposed(buffers->k_transposed, h->args->k, h, buffers->row);
    pack_keys(buffers->v, h->args->v, h);
    for (int64_t s = 0; s < h->s; s += QUERY_BLOCK) {
        forward_queries(buffers, h, s, min_of(QUERY_BLOCK, h->s - s));
    }
}

void attention_forward_cpu(struct stream *stream, const struct attention *a)
{
    const int64_t batch_size = a->q->dim[1], num_heads = a->q->dim[2];
    const struct head any = head_of(a, 0, 0);
    struct forward_buffers sizes;
    const struct thread_floats memory =
        thread_floats_new(stream, forward_buffers_place(&sizes, &any, NULL));

#pragma omp parallel for schedule(static) if (a->q->dim[0] * a->kv_length >=                       \
                                              QUERY_BLOCK * KEY_BLOCK)
    for (int64_t item = 0; item < batch_size * num_heads; item++) {
        const struct head h = head_of(a, item / num_heads, item % num_heads);
        struct forward_buffers buffers;

        forward_buffers_place(&buffers, &h, thread_floats_mine(&memory));
        forward_head(&buffers, &h);
    }
}

/* ---- backward ----
 *
 * With p = exp(score - lse), z the dropout factors and delta[s] = d_out[s] . out[s]:
 *   d_v[j] = sum_s p z d_out[s],   d_p = z (d_out[s] . v[j]),   d_score = p (d_p - delta[s]),
 *   d_q[s] = scale * sum_j d_score k[j],   d_k[j] = sum_s d_score (scale q[s]).
 * A thread does all heads of a group, which share d_k and d_v. */

struct backward_buffers {
    float *k, *k_transposed, *v_transposed, *d_k, *d_v; /* of the group */
    float *q, *out, *d_out, *d_q;                       /* of the query block */
    float *probs, *d_scores, *factors, *row;
    float delta[QUERY_BLOCK];
};

static int64_t backward_buffers_place(struct backward_buffers *buffers, const struct head *h,
                                      float *memory)
{
    int64_t used = 0;
    float **const of_group[] = {&buffers->k, &buffers->k_transposed, &buffers->v_transposed,
                                &buffers->d_k, &buffers->d_v};
    float **const of_block[] = {&buffers->q, &buffers->out, &buffers->d_out, &buffers->d_q};

    for (int i = 0; i < 5; i++) {
        *of_group[i] = take_floats(memory, &used, packed_size(h));
    }
    for (int i = 0; i < 4; i++) {
        *of_block[i] = take_floats(memory, &used, QUERY_BLOCK * h->d_padded);
    }
    buffers->probs = take_floats(memory, &used, QUERY_BLOCK * KEY_BLOCK);
    buffers->d_scores = take_floats(memory, &used, QUERY_BLOCK * KEY_BLOCK);
    buffers->factors = take_floats(memory, &used, KEY_BLOCK + DRAWN_AT_ONCE);
    buffers->row = take_floats(memory, &used, h->d_padded);
    return used;
}

/* Row i of the block: scores become p z, d_p becomes d_score. */
static void backward_row(struct backward_buffers *buffers, const struct head *h, int64_t s,
                         int64_t i, int64_t j, int64_t n)
{
    float *restrict p = buffers->probs + i * KEY_BLOCK;
    float *restrict d_score = buffers->d_scores + i * KEY_BLOCK;
    const float *lse =
        (const float *)h->args->lse->data + (h->batch * h->num_heads + h->head) * h->s;
    const float delta = buffers->delta[i];
    const float *factors = NULL;

    if (!mask_scores(p, h, s + i, j, n)) {
        memset(p, 0, (size_t)n * sizeof *p);
        memset(d_score, 0, (size_t)n * sizeof *d_score);
        return;
    }
    exp_row(p, lse[s + i], n);
    if (h->args->dropout.p > 0.0f) {
        factors = head_dropout(buffers->factors, h, s + i, j, n);
        multiply_row(d_score, factors, n);
    }
#pragma omp simd
    for (int64_t l = 0; l < n; l++) {
        d_score[l] = p[l] * (d_score[l] - delta);
    }
    if (factors != NULL) {
        multiply_row(p, factors, n);
    }
}

/* Keys [j, j + n) of the query block [s, s + m). */
static void backward_block(struct backward_buffers *buffers, const struct head *h, int64_t s,
                           int64_t m, int64_t j, int64_t n)
{
    const int64_t d_padded = h->d_padded, n_padded = round_up(n, BLOCK_VECTOR);
    const struct block_operand q = {buffers->q, d_padded, 1}, d_out = {buffers->d_out, d_padded, 1};
    const struct block_operand d_scores = {buffers->d_scores, KEY_BLOCK, 1};
    const struct block_operand d_scores_transposed = {buffers->d_scores, 1, KEY_BLOCK};
    const struct block_operand probs_transposed = {buffers->probs, 1, KEY_BLOCK};

    block_product(buffers->probs, KEY_BLOCK, q, buffers->k_transposed + j * h->d, KEY_BLOCK, m,
                  n_padded, h->d, false);
    block_product(buffers->d_scores, KEY_BLOCK, d_out, buffers->v_transposed + j * h->d, KEY_BLOCK,
                  m, n_padded, h->d, false);
    for (int64_t i = 0; i < m; i++) {
        backward_row(buffers, h, s, i, j, n_padded);
    }
    block_product(buffers->d_v + j * d_padded, d_padded, probs_transposed, buffers->d_out, d_padded,
                  n, d_padded, m, true);
    block_product(buffers->d_k + j * d_padded, d_padded, d_scores_transposed, buffers->q, d_padded,
                  n, d_padded, m, true);
    block_product(buffers->d_q, d_padded, d_scores, buffers->k + j * d_padded, d_padded, m,
                  d_padded, n, true);
}

/* x[first .. first + d) = or, with accumulate, += row, which it may change. */
static void store_gradient(struct tensor *x, int64_t first, float *row, int64_t d, bool accumulate)
{
    if (accumulate) {
        const float *sum = (const float *)x->data + first;

#pragma omp simd
        for (int64_t i = 0; i < d; i++) {
            row[i] += sum[i];
        }
    }
    floats_put(x, first, d, row);
}

static void backward_queries(struct backward_buffers *buffers, const struct attention_backward *a,
                             const struct head *h, int64_t s, int64_t m)
{
    const struct key_range keys = keys_of_block(h, s, m);
    const int64_t d_padded = h->d_padded;

    pack_queries(buffers->q, h->args->q, h, s, m, h->args->scale);
    pack_queries(buffers->out, h->args->out, h, s, m, 1.0f);
    pack_queries(buffers->d_out, a->d_out, h, s, m, 1.0f);
    memset(buffers->d_q, 0, (size_t)(m * d_padded) * sizeof *buffers->d_q);
    for (int64_t i = 0; i < m; i++) {
        buffers->delta[i] =
            floats_dot(buffers->out + i * d_padded, buffers->d_out + i * d_padded, d_padded);
    }
    for (int64_t j = keys.first; j < keys.end; j += KEY_BLOCK) {
        backward_block(buffers, h, s, m, j, min_of(KEY_BLOCK, keys.end - j));
    }
    for (int64_t i = 0; i < m; i++) {
        float *d_q = buffers->d_q + i * d_padded;

        scale_row(d_q, h->args->scale, h->d);
        store_gradient(a->d_q, query_element(h, s + i), d_q, h->d, a->accumulate);
    }
}

/* d_k or d_v of the group; zero from kv_length on. */
static void store_keys(struct tensor *d_x, float *rows, const struct head *h, float *zeros,
                       bool accumulate)
{
    const int64_t num_rows = accumulate ? h->args->kv_length : d_x->dim[0];

    memset(zeros, 0, (size_t)h->d * sizeof *zeros);
    for (int64_t j = 0; j < num_rows; j++) {
        store_gradient(d_x, key_element(h, j),
                       j < h->args->kv_length ? rows + j * h->d_padded : zeros, h->d, accumulate);
    }
}

static void backward_group(struct backward_buffers *buffers, const struct attention_backward *a,
                           int64_t batch, int64_t group)
{
    const struct attention *forward = &a->forward;
    const int64_t per_group = forward->q->dim[2] / forward->k->dim[2];
    const struct head first = head_of(forward, batch, group * per_group);

    pack_keys(buffers->k, forward->k, &first);
    pack_keys_transposed(buffers->k_transposed, forward->k, &first, buffers->row);
    pack_keys_transposed(buffers->v_transposed, forward->v, &first, buffers->row);
    memset(buffers->d_k, 0, (size_t)packed_size(&first) * sizeof *buffers->d_k);
    memset(buffers->d_v, 0, (size_t)packed_size(&first) * sizeof *buffers->d_v);
    for (int64_t i = 0; i < per_group; i++) {
        const struct head h = head_of(forward, batch, group * per_group + i);

        for (int64_t s = 0; s < h.s; s += QUERY_BLOCK) {
            backward_queries(buffers, a, &h, s, min_of(QUERY_BLOCK, h.s - s));
        }
    }
    store_keys(a->d_k, buffers->d_k, &first, buffers->row, a->accumulate);
    store_keys(a->d_v, buffers->d_v, &first, buffers->row, a->accumulate);
}

void attention_backward_cpu(struct stream *stream, const struct attention_backward *a)
{
    const struct attention *forward = &a->forward;
    const int64_t batch_size = forward->k->dim[1], num_groups = forward->k->dim[2];
    const struct head any = head_of(forward, 0, 0);
    struct backward_buffers sizes;
    const struct thread_floats memory =
        thread_floats_new(stream, backward_buffers_place(&sizes, &any, NULL));

#pragma omp parallel for schedule(static) if (forward->q->dim[0] * forward->kv_length >=           \
                                              QUERY_BLOCK * KEY_BLOCK)
    for (int64_t item = 0; item < batch_size * num_groups; item++) {
        struct backward_buffers buffers;

        backward_buffers_place(&buffers, &any, thread_floats_mine(&memory));
        backward_group(&buffers, a, item / num_groups, item % num_groups);
    }
}
