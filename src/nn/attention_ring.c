/* Ring attention (Liu et al. 2023) on zigzag chunks: the keys and values of every rank travel round
 * the group, each rank attends to the block at hand while the next one arrives, and the partial
 * results are merged by the logarithms of their softmax denominators.
 *
 * With 2*CP chunks of which a rank holds the r-th from either end, a chunk of queries sees all or
 * nothing of any chunk of keys but itself: of its own block the causal half, of a lower rank's the
 * first half of the keys, of a higher rank's all keys but by the second half of the queries. So
 * every rank has the same work at every step, and none of it is masked away.
 *
 * The order of sums is that of the ring, the same in every run. Gradients of keys and values do not
 * follow them round the ring but go straight home: fewer bytes, and no rank waits for a chain. */
#include "base/check.h"
#include "nn/attention_exchange.h"
#include "parallel/context_parallel.h"

/* A chunk of keys as a chunk of queries sees it. Keys past the queries are not visited. */
enum sight { SIGHT_DIAGONAL, SIGHT_WHOLE };

struct ring {
    const struct pass *pass;
    struct comm *cp;
    struct attention call;
    int64_t num_rows; /* of a chunk: tokens of all B sequences */
    struct context_chunks chunks;
};

static struct ring ring_of(const struct attention_layer *attention, const struct pass *pass,
                           int64_t num_tokens)
{
    struct comm *cp = pass->groups->cp;

    return (struct ring){.pass = pass,
                         .cp = cp,
                         .call = attention_call(attention, pass),
                         .num_rows = num_tokens / 2,
                         .chunks = context_parallel_chunks(
                             cp->size, cp->rank, num_tokens / pass->num_sequences * cp->size)};
}

/* The rank whose block is here in a step. */
static int owner_of_step(const struct ring *ring, int step)
{
    return (ring->cp->rank - step + ring->cp->size) % ring->cp->size;
}

/* ---- calls of the op ---- */

/* Half of the tokens x [T, heads, D] as [S/2, B, heads, D]. */
static struct tensor half_of(const struct ring *ring, const struct tensor *x, int half)
{
    const struct tensor rows = tensor_rows(x, half * ring->num_rows, ring->num_rows);

    return attention_by_sequence(&rows, ring->pass->num_sequences);
}

/* A chunk of queries with a chunk of keys, and the views that the call points to. */
struct chunk_pair {
    struct tensor q, k, v, out, lse, document_start;
    struct attention call;
};

/* kv [2T,G,D] is the block of owner; out is the place of the result so far, act or f32. */
static void chunk_pair_make(struct chunk_pair *pair, const struct ring *ring,
                            struct attention_saved *saved, const struct tensor *out,
                            const struct tensor *kv, int64_t k_start, int q_half, int k_half)
{
    const struct tensor *document_start = &ring->pass->document_start;
    const int64_t num_heads = saved->q.dim[1];

    pair->q = half_of(ring, &saved->q, q_half);
    pair->k = half_of(ring, kv, k_half);
    pair->v = half_of(ring, kv, 2 + k_half);
    pair->out = half_of(ring, out, q_half);
    pair->lse = tensor_rows(&saved->lse, q_half, 1);
    pair->lse = tensor_view(&pair->lse, ring->pass->num_sequences, num_heads, ring->chunks.length);
    pair->call = ring->call;
    pair->call.q_start = ring->chunks.start[q_half];
    pair->call.k_start = k_start;
    pair->call.kv_length = ring->chunks.length;
    pair->call.q = &pair->q;
    pair->call.k = &pair->k;
    pair->call.v = &pair->v;
    pair->call.out = &pair->out;
    pair->call.lse = &pair->lse;
    if (document_start->data != NULL) {
        pair->document_start = tensor_rows(document_start, q_half * ring->num_rows, ring->num_rows);
        pair->call.document_start = &pair->document_start;
    }
}

/* Where chunk k_half of the owner's keys begins, if chunk q_half of the queries sees it that way;
 * else -1. */
static int64_t start_in_sight(const struct ring *ring, int owner, enum sight sight, int q_half,
                              int k_half)
{
    const struct context_chunks keys =
        context_parallel_chunks(ring->cp->size, owner, 2 * ring->cp->size * ring->chunks.length);
    const int64_t q_start = ring->chunks.start[q_half], k_start = keys.start[k_half];
    const bool seen = sight == SIGHT_DIAGONAL ? k_start == q_start : k_start < q_start;

    return seen ? k_start : -1;
}

/* The diagonal comes first: it starts the result, which others are merged into. */
static void forward_block(const struct ring *ring, struct attention_saved *saved,
                          const struct tensor *out, const struct tensor *kv, int owner,
                          enum sight sight)
{
    for (int i = 0; i < 4; i++) {
        const int q_half = i / 2, k_half = i % 2;
        const int64_t k_start = start_in_sight(ring, owner, sight, q_half, k_half);
        struct chunk_pair pair;

        if (k_start >= 0) {
            chunk_pair_make(&pair, ring, saved, out, kv, k_start, q_half, k_half);
            pair.call.merge = sight == SIGHT_WHOLE;
            op_attention_forward(ring->pass->stream, &pair.call);
        }
    }
}

/* ---- the exchange of keys and values ---- */

/* Blocks on their way: while the one of this step is used and sent on, the next one arrives. */
struct traveller {
    struct tensor buffers[2];
    struct tensor here; /* [2T,G,D]: k, v */
    struct comm_handle send, receive;
};

static struct traveller traveller_start(const struct ring *ring,
                                        const struct attention_saved *saved)
{
    struct arena *scratch = ring->pass->scratch;
    const struct tensor *k = &saved->k;
    const int64_t kv_dims[3] = {2 * k->dim[0], k->dim[1], k->dim[2]};
    struct traveller traveller = {.here = tensor_wrap(k->data, k->dtype, kv_dims, 3)};

    CHECK((const char *)saved->v.data == (const char *)k->data + tensor_size_bytes(k),
          "values are not behind their keys");
    for (int i = 0; i < 2; i++) {
        traveller.buffers[i] = tensor_allocate(scratch, k->dtype, kv_dims, 3);
    }
    return traveller;
}

static void traveller_send(const struct ring *ring, struct traveller *traveller, int step)
{
    struct comm *cp = ring->cp;
    struct stream *stream = ring->pass->stream;

    if (step + 1 < cp->size) {
        traveller->receive = comm_receive(cp, stream, &traveller->buffers[step % 2],
                                          (cp->rank - 1 + cp->size) % cp->size);
        traveller->send = comm_send(cp, stream, &traveller->here, (cp->rank + 1) % cp->size);
    }
}

static void traveller_wait(const struct ring *ring, struct traveller *traveller, int step)
{
    if (step + 1 < ring->cp->size) {
        comm_wait(traveller->receive, ring->pass->stream);
        comm_wait(traveller->send, ring->pass->stream);
        traveller->here = traveller->buffers[step % 2];
    }
}

/* ---- forward ---- */

/* Where to sum up y: in f32, y itself if it is. */
static struct tensor f32_of(const struct pass *pass, const struct tensor *y)
{
    return y->dtype == DTYPE_F32 ? *y
                                 : tensor_allocate(pass->scratch, DTYPE_F32, y->dim, y->num_dims);
}

static void store(const struct pass *pass, struct tensor *y, const struct tensor *sum)
{
    if (y->data != sum->data) {
        op_linear_combination(pass->stream,
                              &(struct linear_combination){.y = y, .x = sum, .a = 1.0f});
    }
}

void attention_ring_forward(const struct attention_layer *attention, const struct pass *pass,
                            struct attention_saved *saved)
{
    const struct arena_mark mark = arena_mark(pass->scratch);
    const struct ring ring = ring_of(attention, pass, saved->q.dim[0]);
    const struct tensor out = f32_of(pass, &saved->out);
    struct traveller traveller = traveller_start(&ring, saved);

    saved->lse = tensor_new(pass->saved, DTYPE_F32, 2, pass->num_sequences, saved->q.dim[1],
                            ring.chunks.length);
    for (int step = 0; step < ring.cp->size; step++) {
        const int owner = owner_of_step(&ring, step);

        traveller_send(&ring, &traveller, step);
        if (step == 0) {
            forward_block(&ring, saved, &out, &traveller.here, owner, SIGHT_DIAGONAL);
        }
        forward_block(&ring, saved, &out, &traveller.here, owner, SIGHT_WHOLE);
        traveller_wait(&ring, &traveller, step);
    }
    store(pass, &saved->out, &out);
    arena_release(pass->scratch, mark);
}

/* ---- backward ---- */

/* Gradients of blocks, f32 [2,2,T/2,G,D]: halves, each with d_k and d_v, so that the first half
 * alone can be sent. */
struct block_grads {
    struct tensor own;
    struct tensor for_others[2]; /* the one is sent while the other is computed */
    struct tensor from_others;
    struct comm_handle send, receive;
};

static struct block_grads block_grads_new(const struct ring *ring, const struct tensor *k)
{
    struct arena *scratch = ring->pass->scratch;
    const int64_t dims[5] = {2, 2, ring->num_rows, k->dim[1], k->dim[2]};
    struct block_grads grads = {.own = tensor_allocate(scratch, DTYPE_F32, dims, 5),
                                .from_others = tensor_allocate(scratch, DTYPE_F32, dims, 5)};

    for (int i = 0; i < 2; i++) {
        grads.for_others[i] = tensor_allocate(scratch, DTYPE_F32, dims, 5);
    }
    return grads;
}

/* d_k (which = 0) or d_v (1) of a half, [T/2,G,D]. */
static struct tensor block_grads_part(const struct tensor *grads, int half, int which)
{
    const struct tensor of_half = tensor_rows(grads, half, 1);
    const struct tensor parts =
        tensor_view(&of_half, 2 * grads->dim[2], grads->dim[3], grads->dim[4]);

    return tensor_rows(&parts, which * grads->dim[2], grads->dim[2]);
}

/* How many halves of a block the rank sees. */
static int halves_seen(int owner, int rank)
{
    return owner < rank ? 1 : 2;
}

/* Adds to d_q (f32 [T,A,D]) and to d_kv, the gradients of the block. */
static void backward_block(const struct ring *ring, struct attention_saved *saved,
                           const struct tensor *d_q, const struct tensor *d_out,
                           const struct tensor *d_kv, const struct tensor *kv, int owner,
                           enum sight sight)
{
    for (int i = 0; i < 4; i++) {
        const int q_half = i / 2, k_half = i % 2;
        const int64_t k_start = start_in_sight(ring, owner, sight, q_half, k_half);
        const int64_t num_sequences = ring->pass->num_sequences;
        struct tensor d_q_half, d_out_half, d_k, d_v;
        struct chunk_pair pair;

        if (k_start < 0) {
            continue;
        }
        chunk_pair_make(&pair, ring, saved, &saved->out, kv, k_start, q_half, k_half);
        d_q_half = half_of(ring, d_q, q_half);
        d_out_half = half_of(ring, d_out, q_half);
        d_k = block_grads_part(d_kv, k_half, 0);
        d_k = attention_by_sequence(&d_k, num_sequences);
        d_v = block_grads_part(d_kv, k_half, 1);
        d_v = attention_by_sequence(&d_v, num_sequences);
        op_attention_backward(ring->pass->stream, &(struct attention_backward){.forward = pair.call,
                                                                               .d_out = &d_out_half,
                                                                               .d_q = &d_q_half,
                                                                               .d_k = &d_k,
                                                                               .d_v = &d_v,
                                                                               .accumulate = true});
    }
}

/* Waits for the gradients under way and adds what has come home to this rank's own. */
static void block_grads_wait(const struct ring *ring, struct block_grads *grads, int step)
{
    const int from = (ring->cp->rank + step) % ring->cp->size;
    const int num_halves = halves_seen(ring->cp->rank, from);
    struct tensor sum = tensor_rows(&grads->own, 0, num_halves);
    const struct tensor part = tensor_rows(&grads->from_others, 0, num_halves);

    comm_wait(grads->receive, ring->pass->stream);
    comm_wait(grads->send, ring->pass->stream);
    op_linear_combination(ring->pass->stream, &(struct linear_combination){
                                                  .y = &sum, .x = &part, .a = 1.0f, .b = 1.0f});
}

/* Sends home what the step computed; its counterpart comes from the rank that had this rank's
 * block. */
static void block_grads_send(const struct ring *ring, struct block_grads *grads, int step)
{
    struct comm *cp = ring->cp;
    const int owner = owner_of_step(ring, step), from = (cp->rank + step) % cp->size;
    struct tensor receive = tensor_rows(&grads->from_others, 0, halves_seen(cp->rank, from));
    const struct tensor send =
        tensor_rows(&grads->for_others[step % 2], 0, halves_seen(owner, cp->rank));

    grads->receive = comm_receive(cp, ring->pass->stream, &receive, from);
    grads->send = comm_send(cp, ring->pass->stream, &send, owner);
}

/* Of its own block the rank does the diagonal while the first block of another arrives, and the
 * rest while the last gradients travel. */
static void backward_steps(const struct ring *ring, struct attention_saved *saved,
                           struct tensor *d_q, const struct tensor *d_out,
                           struct block_grads *grads)
{
    struct stream *stream = ring->pass->stream;
    struct traveller traveller = traveller_start(ring, saved);
    const struct tensor own_kv = traveller.here;
    const int rank = ring->cp->rank, last = ring->cp->size - 1;

    traveller_send(ring, &traveller, 0);
    backward_block(ring, saved, d_q, d_out, &grads->own, &own_kv, rank, SIGHT_DIAGONAL);
    traveller_wait(ring, &traveller, 0);
    for (int step = 1; step <= last; step++) {
        const int owner = owner_of_step(ring, step);
        struct tensor *d_kv = &grads->for_others[step % 2];

        traveller_send(ring, &traveller, step);
        op_fill_zero(stream, d_kv);
        backward_block(ring, saved, d_q, d_out, d_kv, &traveller.here, owner, SIGHT_WHOLE);
        if (step > 1) {
            block_grads_wait(ring, grads, step - 1);
        }
        block_grads_send(ring, grads, step);
        traveller_wait(ring, &traveller, step);
    }
    backward_block(ring, saved, d_q, d_out, &grads->own, &own_kv, rank, SIGHT_WHOLE);
    block_grads_wait(ring, grads, last);
}

/* act d_k or d_v [T,G,D] from the two halves. */
static void store_halves(const struct ring *ring, struct tensor *d_x, const struct tensor *grads,
                         int which)
{
    for (int half = 0; half < 2; half++) {
        struct tensor y = tensor_rows(d_x, half * ring->num_rows, ring->num_rows);
        const struct tensor sum = block_grads_part(grads, half, which);

        store(ring->pass, &y, &sum);
    }
}

void attention_ring_backward(const struct attention_layer *attention, const struct pass *pass,
                             struct attention_grads *grads, const struct tensor *d_out,
                             struct attention_saved *saved)
{
    const struct arena_mark mark = arena_mark(pass->scratch);
    const struct ring ring = ring_of(attention, pass, saved->q.dim[0]);
    struct block_grads of_blocks = block_grads_new(&ring, &saved->k);
    struct tensor d_q = f32_of(pass, &grads->d_q);

    op_fill_zero(pass->stream, &d_q);
    op_fill_zero(pass->stream, &of_blocks.own);
    backward_steps(&ring, saved, &d_q, d_out, &of_blocks);
    store(pass, &grads->d_q, &d_q);
    store_halves(&ring, &grads->d_k, &of_blocks.own, 0);
    store_halves(&ring, &grads->d_v, &of_blocks.own, 1);
    arena_release(pass->scratch, mark);
}
