/* The keys and values of all ranks are gathered before attention, in the order of the sequence;
 * each of the rank's two chunks of queries then attends to the prefix it sees. Simple and without
 * overlap; the gathered tensors live for the call only, backward gathers them again. */
#include "nn/attention_exchange.h"
#include "parallel/context_parallel.h"

struct gathered {
    struct tensor k, v; /* [S,B,G,D] in pass->scratch */
};

/* x [T,G,D] of all ranks as [S,B,G,D]. */
static void gather(const struct pass *pass, struct tensor *sequence, const struct tensor *x)
{
    const struct arena_mark mark = arena_mark(pass->scratch);
    struct tensor by_rank =
        tensor_allocate(pass->scratch, x->dtype, sequence->dim, sequence->num_dims);

    comm_wait(comm_all_gather(pass->groups->cp, pass->stream, &by_rank, x), pass->stream);
    context_parallel_to_sequence(pass->stream, pass->groups->cp->size, sequence, &by_rank);
    arena_release(pass->scratch, mark);
}

/* [S,B,G,D] for tokens like x [T,G,D]. */
static struct tensor new_sequence(const struct pass *pass, enum dtype dtype, const struct tensor *x)
{
    return tensor_new(pass->scratch, dtype,
                      x->dim[0] / pass->num_sequences * pass->groups->cp->size, pass->num_sequences,
                      x->dim[1], x->dim[2]);
}

static struct gathered gather_keys(const struct pass *pass, const struct attention_saved *saved)
{
    struct gathered all = {.k = new_sequence(pass, saved->k.dtype, &saved->k),
                           .v = new_sequence(pass, saved->v.dtype, &saved->v)};

    gather(pass, &all.k, &saved->k);
    gather(pass, &all.v, &saved->v);
    return all;
}

/* A chunk of queries with the keys up to its end, and the views that the call points to. */
struct chunk_call {
    struct tensor q, out, lse, document_start;
    struct attention call;
};

/* Chunk `half` of the tokens x [T, heads, D] as [S/2, B, heads, D]. */
static struct tensor chunk_of(const struct pass *pass, const struct tensor *x, int half)
{
    const int64_t num_rows = x->dim[0] / 2;
    const struct tensor rows = tensor_rows(x, half * num_rows, num_rows);

    return attention_by_sequence(&rows, pass->num_sequences);
}

static void chunk_call_make(struct chunk_call *chunk, const struct attention_layer *attention,
                            const struct pass *pass, struct attention_saved *saved,
                            const struct gathered *all, int half)
{
    const struct comm *cp = pass->groups->cp;
    const struct context_chunks chunks = context_parallel_chunks(cp->size, cp->rank, all->k.dim[0]);
    const int64_t num_rows = saved->q.dim[0] / 2;

    chunk->q = chunk_of(pass, &saved->q, half);
    chunk->out = chunk_of(pass, &saved->out, half);
    chunk->lse = tensor_rows(&saved->lse, half, 1);
    chunk->lse = tensor_view(&chunk->lse, pass->num_sequences, saved->q.dim[1], chunks.length);
    chunk->call = attention_call(attention, pass);
    chunk->call.q_start = chunks.start[half];
    chunk->call.kv_length = chunks.start[half] + chunks.length;
    chunk->call.q = &chunk->q;
    chunk->call.k = &all->k;
    chunk->call.v = &all->v;
    chunk->call.out = &chunk->out;
    chunk->call.lse = &chunk->lse;
    if (pass->document_start.data != NULL) {
        chunk->document_start = tensor_rows(&pass->document_start, half * num_rows, num_rows);
        chunk->call.document_start = &chunk->document_start;
    }
}

void attention_gather_forward(const struct attention_layer *attention, const struct pass *pass,
                              struct attention_saved *saved)
{
    const struct arena_mark mark = arena_mark(pass->scratch);
    const struct gathered all = gather_keys(pass, saved);

    saved->lse = tensor_new(pass->saved, DTYPE_F32, 2, pass->num_sequences, saved->q.dim[1],
                            saved->q.dim[0] / pass->num_sequences / 2);
    for (int half = 0; half < 2; half++) {
        struct chunk_call chunk;

        chunk_call_make(&chunk, attention, pass, saved, &all, half);
        op_attention_forward(pass->stream, &chunk.call);
    }
    arena_release(pass->scratch, mark);
}

/* d_x [T,G,D] act = this rank's part of the sum over ranks of sequence [S,B,G,D] f32. */
static void scatter(const struct pass *pass, struct tensor *d_x, const struct tensor *sequence)
{
    const struct arena_mark mark = arena_mark(pass->scratch);
    struct tensor sum = tensor_allocate(pass->scratch, DTYPE_F32, d_x->dim, d_x->num_dims);
    struct tensor by_rank =
        tensor_allocate(pass->scratch, DTYPE_F32, sequence->dim, sequence->num_dims);

    context_parallel_to_ranks(pass->stream, pass->groups->cp->size, &by_rank, sequence);
    comm_wait(comm_reduce_scatter(pass->groups->cp, pass->stream, &sum, &by_rank), pass->stream);
    op_linear_combination(pass->stream,
                          &(struct linear_combination){.y = d_x, .x = &sum, .a = 1.0f});
    arena_release(pass->scratch, mark);
}

void attention_gather_backward(const struct attention_layer *attention, const struct pass *pass,
                               struct attention_grads *grads, const struct tensor *d_out,
                               struct attention_saved *saved)
{
    const struct arena_mark mark = arena_mark(pass->scratch);
    const struct gathered all = gather_keys(pass, saved);
    struct tensor d_k = new_sequence(pass, DTYPE_F32, &saved->k);
    struct tensor d_v = new_sequence(pass, DTYPE_F32, &saved->v);
    struct tensor d_q = tensor_allocate(pass->scratch, DTYPE_F32, saved->q.dim, 3);

    op_fill_zero(pass->stream, &d_q);
    op_fill_zero(pass->stream, &d_k);
    op_fill_zero(pass->stream, &d_v);
    for (int half = 0; half < 2; half++) {
        struct tensor d_q_chunk = chunk_of(pass, &d_q, half);
        const struct tensor d_out_chunk = chunk_of(pass, d_out, half);
        struct chunk_call chunk;

        chunk_call_make(&chunk, attention, pass, saved, &all, half);
        op_attention_backward(pass->stream, &(struct attention_backward){.forward = chunk.call,
                                                                         .d_out = &d_out_chunk,
                                                                         .d_q = &d_q_chunk,
                                                                         .d_k = &d_k,
                                                                         .d_v = &d_v,
                                                                         .accumulate = true});
    }
    op_linear_combination(pass->stream,
                          &(struct linear_combination){.y = &grads->d_q, .x = &d_q, .a = 1.0f});
    scatter(pass, &grads->d_k, &d_k);
    scatter(pass, &grads->d_v, &d_v);
    arena_release(pass->scratch, mark);
}
