/* An attention layer whose sequences are cut over a CP group (and its heads over TP): outputs, all
 * gradients, bytes and memory of every exchange, against the layer of one rank. ranks: 2 4 */
#include "dist_test.h"

#include <string.h>

#include "nn/attention.h"
#include "nn/rope.h"
#include "parallel/context_parallel.h"
#include "parallel/tp_region.h"

enum { HIDDEN = 12 };

struct layer_case {
    int tp;
    enum cp_comm_type type;
    int64_t seq_length, num_sequences, num_heads, num_groups, head_dim;
    float dropout;
    bool documents, bias, whole_tokens; /* the last: TP without sequence parallelism */
    enum dtype dtype;
};

/* A layer, what it ran on and what came out; the outputs are of this rank's tokens. */
struct layer {
    struct groups groups;
    struct param_list params;
    struct attention_layer attention;
    struct arena *run, *saved, *scratch;
    struct tensor rope, y, d_x;
};

static const char *describe(const struct layer_case *c, int cp_size)
{
    static const char *const types[] = {"p2p", "all_gather", "a2a"};
    static char text[160];

    snprintf(text, sizeof text,
             "%s, tp %d cp %d, S %lld B %lld, %lld heads of %lld, %lld groups%s%s", types[c->type],
             c->tp, cp_size, (long long)c->seq_length, (long long)c->num_sequences,
             (long long)c->num_heads, (long long)c->head_dim, (long long)c->num_groups,
             c->dropout > 0.0f ? ", dropout" : "", c->documents ? ", documents" : "");
    return text;
}

/* This rank's rows of full [S*B, ...]: its positions and, outside TP regions, its slice of them. */
static struct tensor part_of(const struct groups *groups, const struct layer_case *c,
                             const struct tensor *full, bool outside)
{
    const int64_t num_tokens = full->dim[0] / groups->cp->size;
    const int64_t num_rows = outside ? tp_region_outside(groups, num_tokens) : num_tokens;
    struct tensor part = *full;

    part.dim[0] = num_tokens;
    part = tensor_allocate(arena, full->dtype, part.dim, part.num_dims);
    context_parallel_cut(part.data, full->data, tensor_size_bytes(full) / (size_t)c->seq_length,
                         groups->cp->size, groups->cp->rank, c->seq_length);
    return tensor_rows(&part, num_rows == num_tokens ? 0 : groups->tp->rank * num_rows, num_rows);
}

/* The same numbers on every rank. */
static struct tensor random_rows(const struct layer_case *c, uint64_t row)
{
    struct tensor x = tensor_new(arena, c->dtype, c->seq_length * c->num_sequences, HIDDEN);

    dist_fill(&x, row, 0);
    return x;
}

/* Documents of some tokens each, of other lengths in each sequence. */
static int64_t document_start_of(int64_t s, int64_t b)
{
    const int64_t length = 5 + 4 * b;

    return s < 3 ? 0 : 3 + (s - 3) / length * length;
}

static struct pass make_pass(struct layer *layer, const struct layer_case *c, struct stream *on)
{
    const int64_t num_tokens = c->seq_length * c->num_sequences;
    struct tensor token = tensor_new(arena, DTYPE_I32, num_tokens);
    struct tensor position = tensor_new(arena, DTYPE_I32, num_tokens);
    struct tensor document_start = tensor_new(arena, DTYPE_I32, num_tokens);
    struct pass pass = {.stream = on,
                        .groups = &layer->groups,
                        .saved = layer->saved,
                        .scratch = layer->scratch,
                        .dtype = c->dtype,
                        .training = true,
                        .seed = 7,
                        .num_sequences = c->num_sequences,
                        .sample_id = tensor_new(arena, DTYPE_I64, c->num_sequences)};

    for (int64_t t = 0; t < num_tokens; t++) {
        const int64_t s = t / c->num_sequences, b = t % c->num_sequences;

        dist_set(&position, t, (double)s);
        dist_set(&document_start, t, (double)document_start_of(s, b));
        dist_set(&pass.sample_id, b, (double)(40 + b));
    }
    pass.token = part_of(&layer->groups, c, &token, false);
    pass.position = part_of(&layer->groups, c, &position, false);
    if (c->documents) {
        pass.document_start = part_of(&layer->groups, c, &document_start, false);
    }
    return pass;
}

/* After groups is filled in; on a device whose memory is empty nothing is initialised. */
static void layer_create(struct layer *layer, const struct layer_case *c, struct stream *on)
{
    const struct memory_source *memory = &on->device->memory;

    layer->run = arena_create("run", memory);
    layer->saved = arena_create("microbatch", memory);
    layer->scratch = arena_create("call", memory);
    param_list_init(&layer->params);
    attention_layer_init(&layer->attention, &layer->params, &layer->groups,
                         &(struct attention_config){.name = "self_attention",
                                                    .layer = 2,
                                                    .hidden_size = HIDDEN,
                                                    .num_heads = c->num_heads,
                                                    .num_groups = c->num_groups,
                                                    .head_dim = c->head_dim,
                                                    .qkv_bias = c->bias,
                                                    .proj_bias = c->bias,
                                                    .dropout = c->dropout,
                                                    .init_std = 0.4f,
                                                    .proj_init_std = 0.4f,
                                                    .cp_comm_type = c->type});
    param_list_allocate(&layer->params, layer->run, on, c->dtype, true);
    param_list_initialize(&layer->params, on, 3);
    layer->rope = rope_table(on, layer->run,
                             &(struct rope_config){.base = 1000.0,
                                                   .percent = 1.0,
                                                   .interpolation_factor = 1.0,
                                                   .head_dim = c->head_dim,
                                                   .num_positions = c->seq_length});
}

static void layer_destroy(struct layer *layer)
{
    param_list_free(&layer->params);
    arena_destroy(layer->run);
    arena_destroy(layer->saved);
    arena_destroy(layer->scratch);
    groups_destroy(&layer->groups);
}

static void layer_run(struct layer *layer, const struct layer_case *c, struct stream *on)
{
    const struct pass pass = make_pass(layer, c, on);
    const struct tensor full_x = random_rows(c, 1), full_d_y = random_rows(c, 2);
    const struct tensor x = part_of(&layer->groups, c, &full_x, true);
    const struct tensor d_y = part_of(&layer->groups, c, &full_d_y, true);
    struct attention_saved saved;

    layer->y = tensor_allocate(arena, c->dtype, x.dim, 2);
    layer->d_x = tensor_allocate(arena, c->dtype, x.dim, 2);
    memset(layer->y.data, 0xff, tensor_size_bytes(&layer->y)); /* NaN */
    memset(layer->d_x.data, 0xff, tensor_size_bytes(&layer->d_x));
    attention_layer_forward(&layer->attention, &pass, &layer->rope, NULL, &layer->y, &x, &saved);
    attention_layer_backward(&layer->attention, &pass, &layer->rope, &layer->d_x, &d_y, &saved);
    if (arena_used_bytes(layer->scratch) != 0) {
        dist_failed("%zu bytes of scratch are left", arena_used_bytes(layer->scratch));
    }
}

/* |got - wanted| <= tolerance * the largest |wanted|: gradients are sums over many tokens. */
static void compare_scaled(const char *what, const struct tensor *got, const struct tensor *wanted,
                           double tolerance)
{
    double largest = 0.0;

    for (int64_t i = 0; i < tensor_num_elements(wanted); i++) {
        largest = fmax(largest, fabs(dist_get(wanted, i)));
    }
    for (int64_t i = 0; i < tensor_num_elements(wanted); i++) {
        const double g = dist_get(got, i), w = dist_get(wanted, i);

        if (!(fabs(g - w) <= tolerance * largest)) {
            dist_failed("%s: element %lld is %.9g, wanted %.9g, the largest is %.9g", what,
                        (long long)i, g, w, largest);
            return;
        }
    }
}

/* Sums the gradients as the training step does, and compares with this rank's boxes of the whole.
 */
static void compare_gradients(const char *what, const struct layer *mine, const struct layer *one,
                              double tolerance)
{
    for (int i = 0; i < mine->params.num_params; i++) {
        struct param *param = mine->params.params[i];
        const struct param *whole = param_find(&one->params, param->name);
        const struct box box = box_whole(whole->global_shape, whole->num_dims);
        struct tensor wanted = tensor_allocate(arena, DTYPE_F32, param->box.size, param->num_dims);
        char text[256];

        comm_wait(comm_all_reduce(mine->groups.cp, stream, &param->grad, COMM_SUM), stream);
        if (param->sum_over_tp) {
            comm_wait(comm_all_reduce(mine->groups.tp, stream, &param->grad, COMM_SUM), stream);
        }
        box_copy(wanted.data, &param->box, whole->grad.data, &box, &param->box, sizeof(float));
        snprintf(text, sizeof text, "%s: gradient of %s", what, param->name);
        compare_scaled(text, &param->grad, &wanted, tolerance);
    }
}

/* What the header of attention.h says a rank sends, forward and backward together. */
static int64_t bytes_expected(const struct layer_case *c, const struct comm *cp)
{
    const int64_t act = dtype_size_bytes(c->dtype), others = cp->size - 1;
    const int64_t T = c->seq_length * c->num_sequences / cp->size;
    const int64_t A = c->num_heads / c->tp, G = c->num_groups / c->tp, D = c->head_dim;

    switch (c->type) {
    case CP_COMM_P2P:
        return 2 * others * 2 * T * G * D * act + (2 * others - cp->rank) * T * G * D * 4;
    case CP_COMM_ALL_GATHER:
        return others * 2 * T * G * D * (2 * act + 4);
    case CP_COMM_A2A:
        return 2 * others * (2 * A + 2 * G) * T * D / cp->size * act +
               (c->documents ? 2 * others * T * 4 : 0);
    }
    return -1;
}

static void check_bytes(const char *what, const struct layer_case *c, const struct comm *cp)
{
    int64_t sent_bytes = 0;

    for (int kind = 0; kind < NUM_COMM_KINDS; kind++) {
        sent_bytes += cp->counters[kind].sent_bytes;
    }
    if (sent_bytes != bytes_expected(c, cp)) {
        dist_failed("%s: %lld bytes were sent, %lld expected", what, (long long)sent_bytes,
                    (long long)bytes_expected(c, cp));
    }
}

/* The device that only measures finds the memory that the real one used. */
static void check_memory(const char *what, const struct layer_case *c, const struct rank_grid *grid,
                         const struct layer *mine)
{
    struct stream *null = stream_create(device_null(), ops_null());
    struct layer measured = {0};

    groups_create(&measured.groups, grid, launch_rank(), mine->groups.sequence_parallel);
    layer_create(&measured, c, null);
    layer_run(&measured, c, null);
    if (arena_peak_bytes(measured.saved) != arena_peak_bytes(mine->saved) ||
        arena_peak_bytes(measured.scratch) != arena_peak_bytes(mine->scratch)) {
        dist_failed("%s: measured %zu + %zu bytes, used %zu + %zu", what,
                    arena_peak_bytes(measured.saved), arena_peak_bytes(measured.scratch),
                    arena_peak_bytes(mine->saved), arena_peak_bytes(mine->scratch));
    }
    layer_destroy(&measured);
    stream_destroy(null);
}

static struct rank_grid grid_of(int tp, int cp)
{
    const struct rank_grid_sizes sizes = {
        .world = launch_size(), .tp = tp, .cp = cp, .pp = 1, .ep = 1, .etp = 1};
    struct rank_grid grid;

    if (rank_grid_init(&grid, &sizes) != 0) {
        launch_fail(error_text());
    }
    return grid;
}

static void test_case(const struct layer_case *c)
{
    const struct rank_grid grid = grid_of(c->tp, launch_size() / c->tp);
    const double tolerance = c->dtype == DTYPE_F32 ? 5e-6 : 2e-2;
    const char *what = describe(c, launch_size() / c->tp);
    struct layer mine = {0}, one = {0};
    struct tensor y, wanted_y, wanted_d_x;

    groups_create(&mine.groups, &grid, launch_rank(), c->tp > 1 && !c->whole_tokens);
    groups_create_self(&one.groups);
    layer_create(&mine, c, stream);
    layer_create(&one, c, stream);
    layer_run(&one, c, stream);
    wanted_y = part_of(&mine.groups, c, &one.y, true);
    wanted_d_x = part_of(&mine.groups, c, &one.d_x, true);
    layer_run(&mine, c, stream);
    compare_scaled(what, &mine.y, &wanted_y, tolerance);
    compare_scaled(what, &mine.d_x, &wanted_d_x, tolerance);
    check_bytes(what, c, mine.groups.cp);
    compare_gradients(what, &mine, &one, tolerance);
    check_memory(what, c, &grid, &mine);
    y = mine.y;
    arena_release(mine.saved, (struct arena_mark){0});
    layer_run(&mine, c, stream);
    dist_compare("the same bits twice", &mine.y, &y, 0.0);
    layer_destroy(&mine);
    layer_destroy(&one);
    dist_release();
}

/* Cases of all kinds for a number of TP ranks, with their numbers scaled to the ranks. */
static void test_exchange(int tp, enum cp_comm_type type)
{
    const int cp = launch_size() / tp;
    const bool by_heads = type == CP_COMM_A2A;
    const struct layer_case plain = {.tp = tp,
                                     .type = type,
                                     .seq_length = 6 * cp,
                                     .num_sequences = 2,
                                     .num_heads = 8,
                                     .num_groups = 4,
                                     .head_dim = 5,
                                     .dtype = DTYPE_F32};
    struct layer_case c = plain;

    test_case(&c);
    c.dropout = 0.3f;
    c.bias = true;
    test_case(&c);
    c.documents = true;
    test_case(&c);
    c.dtype = DTYPE_BF16;
    test_case(&c);
    c = plain;
    c.whole_tokens = true;
    c.seq_length = 2 * cp; /* a token a chunk */
    c.num_sequences = 3;
    c.num_groups = c.num_heads;
    test_case(&c);
    c.documents = true;
    c.dropout = 0.3f;
    c.seq_length = 2 * 67 * cp; /* several blocks of keys */
    c.num_sequences = 1;
    c.num_groups = by_heads ? 4 : tp;
    c.head_dim = 24;
    test_case(&c);
}

/* ---- overlap ----
 *
 * On a clock that only attention and late messages move, so that other work on the machine does not
 * count: a call of attention takes as long as it has pairs of a query and a key that sees it
 * (backward twice that), and a message comes `delay` after its issue. */
static double clock_now, work_done, delay;
static const struct ops *real_ops;
static const struct comm_table *real_comm;
static struct {
    const void *request;
    double issued;
} in_flight[8];

/* Chunks are below the diagonal, or on it. */
static void spend(const struct attention *a, double per_pair)
{
    const double pairs = (double)(a->q->dim[0] * a->kv_length);
    const double work = per_pair * pairs * (a->q_start == a->k_start ? 0.5 : 1.0);

    clock_now += work;
    work_done += work;
}

static void timed_forward(struct stream *on, const struct attention *a)
{
    real_ops->attention_forward(on, a);
    spend(a, 1.0);
}

static void timed_backward(struct stream *on, const struct attention_backward *a)
{
    real_ops->attention_backward(on, a);
    spend(&a->forward, 2.0);
}

static struct comm_handle note_issue(struct comm_handle handle)
{
    int i = 0;

    while (in_flight[i].request != NULL) {
        i++;
        CHECK(i < 8, "too many messages in flight");
    }
    in_flight[i].request = handle.request;
    in_flight[i].issued = clock_now;
    return handle;
}

static struct comm_handle timed_send(struct comm *comm, struct stream *on, const struct tensor *x,
                                     int to)
{
    return note_issue(real_comm->send(comm, on, x, to));
}

static struct comm_handle timed_receive(struct comm *comm, struct stream *on, struct tensor *x,
                                        int from)
{
    return note_issue(real_comm->receive(comm, on, x, from));
}

static void timed_wait(struct comm_handle handle, struct stream *on)
{
    for (int i = 0; i < 8; i++) {
        if (in_flight[i].request == handle.request) {
            clock_now = fmax(clock_now, in_flight[i].issued + delay);
            in_flight[i].request = NULL;
        }
    }
    real_comm->wait(handle, on);
}

static void run_timed(struct layer *layer, const struct layer_case *c)
{
    struct comm *cp = layer->groups.cp;
    struct comm_table comm = *cp->table;
    struct ops ops = *stream->ops;
    struct stream timed = *stream;

    real_comm = cp->table;
    real_ops = stream->ops;
    comm.send = timed_send;
    comm.receive = timed_receive;
    comm.wait = timed_wait;
    ops.attention_forward = timed_forward;
    ops.attention_backward = timed_backward;
    timed.ops = &ops;
    cp->table = &comm;
    layer_run(layer, c, &timed);
    cp->table = real_comm;
}

/* Every rank does its share of the causal pairs and none else, three times as many with backward;
 * and messages that are under way as long as the shortest piece of work (the two diagonal chunks in
 * backward) cost no time. */
static void ring_does_its_share_and_hides_delays(void)
{
    const int cp_size = launch_size();
    const struct layer_case c = {.tp = 1,
                                 .type = CP_COMM_P2P,
                                 .seq_length = 6 * cp_size,
                                 .num_sequences = 1,
                                 .num_heads = 2,
                                 .num_groups = 1,
                                 .head_dim = 4,
                                 .dtype = DTYPE_F32};
    const double length = (double)c.seq_length, chunk = length / (2 * cp_size);
    const double share = 3.0 * length * length / (2.0 * cp_size);
    const struct rank_grid grid = grid_of(1, cp_size);
    struct layer layer = {0};

    groups_create(&layer.groups, &grid, launch_rank(), false);
    layer_create(&layer, &c, stream);
    delay = 2.0 * chunk * chunk;
    run_timed(&layer, &c);
    if (work_done != share) {
        dist_failed("the ring did %g pairs, its share is %g", work_done, share);
    }
    if (clock_now != work_done) {
        dist_failed("the ring took %g for work of %g, with messages of %g", clock_now, work_done,
                    delay);
    }
    layer_destroy(&layer);
    dist_release();
}

int main(int argc, char **argv)
{
    const int size = dist_begin(argc, argv);

    for (int tp = 1; 2 * tp <= size; tp *= 2) {
        for (int type = CP_COMM_P2P; type <= CP_COMM_A2A; type++) {
            test_exchange(tp, (enum cp_comm_type)type);
        }
    }
    ring_does_its_share_and_hides_delays();
    return dist_end();
}
