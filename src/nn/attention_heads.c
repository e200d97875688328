/* The all-to-all exchange (Jacobs et al. 2023, DeepSpeed-Ulysses): each rank of the group gets the
 * whole sequences of 1/CP of the heads, attends as one rank would, and gives the results back to
 * the ranks of the tokens. */
#include <stdlib.h>

#include "base/check.h"
#include "nn/attention_exchange.h"
#include "parallel/context_parallel.h"

/* Rows (t, rank of the head) <-> (rank of the head, t), as an index for row_gather: I32 [T*CP]. */
static struct tensor head_order(const struct pass *pass, int64_t num_tokens, bool by_rank)
{
    const int64_t cp_size = pass->groups->cp->size;
    struct tensor index = tensor_new(pass->scratch, DTYPE_I32, num_tokens * cp_size);
    int32_t *host;

    if (pass->stream->device->kind == DEVICE_NULL) {
        return index;
    }
    host = malloc(tensor_size_bytes(&index) + 1);
    CHECK(host != NULL, "out of memory for %s", tensor_describe(&index));
    for (int64_t t = 0; t < num_tokens; t++) {
        for (int64_t r = 0; r < cp_size; r++) {
            const int64_t with_token = t * cp_size + r, with_rank = r * num_tokens + t;

            host[by_rank ? with_rank : with_token] = (int32_t)(by_rank ? with_token : with_rank);
        }
    }
    stream_copy_constant(pass->stream, index.data, host, tensor_size_bytes(&index));
    free(host);
    return index;
}

/* y[(rank, t), heads/CP * D] <-> x[(t, rank), heads/CP * D]; both [T*CP, heads/CP * D]. */
static void order_heads(const struct pass *pass, struct tensor *y, const struct tensor *x,
                        bool by_rank)
{
    const struct arena_mark mark = arena_mark(pass->scratch);
    const struct tensor index = head_order(pass, y->dim[0] / pass->groups->cp->size, by_rank);

    op_row_gather(pass->stream, &(struct row_gather){.y = y, .x = x, .index = &index});
    arena_release(pass->scratch, mark);
}

/* Part r of in to rank r, and its part of out from it; both [CP*T, ...]. */
static void exchange(const struct pass *pass, struct tensor *out, const struct tensor *in)
{
    struct comm *cp = pass->groups->cp;
    int64_t *rows = malloc((size_t)cp->size * sizeof *rows);

    CHECK(rows != NULL, "out of memory");
    for (int r = 0; r < cp->size; r++) {
        rows[r] = in->dim[0] / cp->size;
    }
    comm_wait(comm_all_to_all(cp, pass->stream, out, rows, in, rows), pass->stream);
    free(rows);
}

/* x, this rank's tokens [T, heads, D] -> y, its heads [S*B, heads/CP, D]. */
static void to_heads(const struct pass *pass, struct tensor *y, const struct tensor *x)
{
    const struct arena_mark mark = arena_mark(pass->scratch);
    const int64_t num_rows = y->dim[0], width = y->dim[1] * y->dim[2];
    const struct tensor rows = tensor_view(x, num_rows, width);
    struct tensor send = tensor_new(pass->scratch, x->dtype, num_rows, width);
    struct tensor received = tensor_new(pass->scratch, x->dtype, num_rows, width);

    order_heads(pass, &send, &rows, true);
    exchange(pass, &received, &send);
    context_parallel_to_sequence(pass->stream, pass->groups->cp->size, y, &received);
    arena_release(pass->scratch, mark);
}

/* The reverse. */
static void to_tokens(const struct pass *pass, struct tensor *x, const struct tensor *y)
{
    const struct arena_mark mark = arena_mark(pass->scratch);
    const int64_t num_rows = y->dim[0], width = y->dim[1] * y->dim[2];
    struct tensor rows = tensor_view(x, num_rows, width);
    struct tensor send = tensor_new(pass->scratch, y->dtype, num_rows, width);
    struct tensor received = tensor_new(pass->scratch, y->dtype, num_rows, width);

    context_parallel_to_ranks(pass->stream, pass->groups->cp->size, &send, y);
    exchange(pass, &received, &send);
    order_heads(pass, &rows, &received, false);
    arena_release(pass->scratch, mark);
}

/* Memory in arena for the heads of x [T, heads, D]. */
static struct tensor new_heads(const struct pass *pass, struct arena *arena, const struct tensor *x)
{
    const int cp_size = pass->groups->cp->size;

    return tensor_new(arena, x->dtype, x->dim[0] * cp_size, x->dim[1] / cp_size, x->dim[2]);
}

/* The call over the rank's heads, and the views that it points to. */
struct heads_call {
    struct tensor q, k, v, out, document_start;
    struct attention call;
};

/* [S*B] from the ranks' [T], in pass->scratch. */
static struct tensor gather_document_start(const struct pass *pass)
{
    const int64_t num_rows = pass->document_start.dim[0] * pass->groups->cp->size;
    struct tensor sequence = tensor_new(pass->scratch, DTYPE_I32, num_rows);
    const struct arena_mark mark = arena_mark(pass->scratch);
    struct tensor by_rank = tensor_new(pass->scratch, DTYPE_I32, num_rows);

    comm_wait(comm_all_gather(pass->groups->cp, pass->stream, &by_rank, &pass->document_start),
              pass->stream);
    context_parallel_to_sequence(pass->stream, pass->groups->cp->size, &sequence, &by_rank);
    arena_release(pass->scratch, mark);
    return sequence;
}

static void heads_call_make(struct heads_call *heads, const struct attention_layer *attention,
                            const struct pass *pass, struct attention_saved *saved)
{
    const int64_t num_sequences = pass->num_sequences;

    heads->q = attention_by_sequence(&saved->q, num_sequences);
    heads->k = attention_by_sequence(&saved->k, num_sequences);
    heads->v = attention_by_sequence(&saved->v, num_sequences);
    heads->out = attention_by_sequence(&saved->heads_out, num_sequences);
    heads->call = attention_call(attention, pass);
    heads->call.head_start += pass->groups->cp->rank * saved->q.dim[1];
    heads->call.kv_length = heads->q.dim[0];
    heads->call.q = &heads->q;
    heads->call.k = &heads->k;
    heads->call.v = &heads->v;
    heads->call.out = &heads->out;
    heads->call.lse = &saved->lse;
    if (pass->document_start.data != NULL) {
        heads->document_start = gather_document_start(pass);
        heads->call.document_start = &heads->document_start;
    }
}

void attention_heads_forward(const struct attention_layer *attention, const struct pass *pass,
                             struct attention_saved *saved)
{
    const struct arena_mark mark = arena_mark(pass->scratch);
    const struct tensor q = saved->q, k = saved->k, v = saved->v;
    struct heads_call heads;

    saved->q = new_heads(pass, pass->saved, &q);
    saved->k = new_heads(pass, pass->saved, &k);
    saved->v = new_heads(pass, pass->saved, &v);
    saved->heads_out = new_heads(pass, pass->saved, &q);
    saved->lse = tensor_new(pass->saved, DTYPE_F32, pass->num_sequences, saved->q.dim[1],
                            saved->q.dim[0] / pass->num_sequences);
    to_heads(pass, &saved->q, &q);
    to_heads(pass, &saved->k, &k);
    to_heads(pass, &saved->v, &v);
    heads_call_make(&heads, attention, pass, saved);
    op_attention_forward(pass->stream, &heads.call);
    to_tokens(pass, &saved->out, &saved->heads_out);
    arena_release(pass->scratch, mark);
}

void attention_heads_backward(const struct attention_layer *attention, const struct pass *pass,
                              struct attention_grads *grads, const struct tensor *d_out,
                              struct attention_saved *saved)
{
    const struct arena_mark mark = arena_mark(pass->scratch);
    const int64_t num_sequences = pass->num_sequences;
    struct tensor d_heads_out = new_heads(pass, pass->scratch, d_out);
    struct tensor d_q = new_heads(pass, pass->scratch, &grads->d_q);
    struct tensor d_k = new_heads(pass, pass->scratch, &grads->d_k);
    struct tensor d_v = new_heads(pass, pass->scratch, &grads->d_v);
    struct tensor d_q4 = attention_by_sequence(&d_q, num_sequences);
    struct tensor d_k4 = attention_by_sequence(&d_k, num_sequences);
    struct tensor d_v4 = attention_by_sequence(&d_v, num_sequences);
    struct tensor d_out4 = attention_by_sequence(&d_heads_out, num_sequences);
    struct heads_call heads;

    to_heads(pass, &d_heads_out, d_out);
    heads_call_make(&heads, attention, pass, saved);
    op_attention_backward(
        pass->stream,
        &(struct attention_backward){
            .forward = heads.call, .d_out = &d_out4, .d_q = &d_q4, .d_k = &d_k4, .d_v = &d_v4});
    to_tokens(pass, &grads->d_q, &d_q);
    to_tokens(pass, &grads->d_k, &d_k);
    to_tokens(pass, &grads->d_v, &d_v);
    arena_release(pass->scratch, mark);
}
