/* comm_mpi.c - collectives made of nonblocking messages between pairs of ranks.
 *
 * Why not MPI's collectives: the order of their sums is not specified, so results would change with
 * the library and the number of ranks on a host; they have no deadline; and when one hangs, nobody
 * knows for whom it waits. Here a reduction sends part r of the data to rank r, who adds the parts
 * in rank order. It moves the same bytes as a ring: (n-1)/n of the data out of each rank, and as
 * much again to gather.
 *
 * An operation is a list of phases, each some messages. Every wait moves all operations in flight
 * along, not only its own: two ranks may wait for two operations in different orders. While no wait
 * is on, a thread does that (progress.h): below, whatever calls MPI or touches an operation holds
 * its lock. */
#ifdef CADRE_MPI
#include "comm/comm_mpi.h"

#include <math.h>
#include <mpi.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base/check.h"
#include "base/clock.h"
#include "comm/delay.h"
#include "comm/launch.h"
#include "comm/progress.h"
#include "comm/reduction.h"
#include "ops/ops.h"

enum {
    /* MPI promises tags up to 32767 only. Tag 0 of a group is for send and receive; the others go
     * round, so that operations in flight do not meet. */
    TAGS_PER_GROUP = 1024,
    SPINS_BEFORE_YIELD = 200,
    SPINS_BEFORE_SLEEP = 1000,
    SLEEP_NS = 50000,
    PEERS_NAMED_MAX = 8,
};

#define LOOK_MAX_SECONDS 0.1

static double timeout_seconds = 600.0;
static int64_t message_bytes_max = 1 << 30;
static int64_t staging_bytes_max = 16 << 20; /* other ranks' data that a reduction holds at once */

/* A group's side of struct comm. */
struct group {
    int *members; /* world ranks */
    int number;
    unsigned num_operations;
    struct comm_delay delay; /* artificial */
    double link_free_at;     /* with a delay per byte: when the last transfer is over */
};

struct message {
    int peer; /* in the group */
    bool is_receive;
};

/* When data starts to move at the earliest, and how long that takes; all zero without a delay. */
struct transfer {
    double starts_at, seconds;
};

/* A collective between its issue and its wait. */
struct operation {
    struct operation *next; /* in flight, or free */
    struct comm *comm;
    enum comm_kind kind;
    int tag;
    bool finished;
    int64_t sent_bytes;
    double issued_at;         /* with a delay */
    struct transfer transfer; /* with a delay: not complete before it is over */
    /* Called when all messages have arrived: posts the next ones; false when there are none. */
    bool (*next_phase)(struct operation *op);

    int num_messages, max_messages;
    MPI_Request *requests;
    struct message *messages;

    /* Reductions: whole is cut into the ranks' parts at begin[size + 1]; this rank's is part. */
    enum comm_reduction reduction;
    enum dtype dtype;
    char *part;
    char *whole;
    int64_t *begin, *extent; /* elements; [size + 1], [size] */
    int max_ranks;
    int64_t segment, done; /* elements of every part: reduced at once, reduced so far */
    char *staging;
    size_t staging_bytes;
};

static struct operation *in_flight, *spare;

static void check_mpi(int code, const char *call)
{
    char text[MPI_MAX_ERROR_STRING] = "";
    int length;

    if (code != MPI_SUCCESS) {
        MPI_Error_string(code, text, &length);
        PANIC("%s: %s", call, text);
    }
}

static bool progress(void);

int comm_mpi_start(int *argc, char ***argv, int *rank, int *size)
{
    int provided;

    TRY(comm_delay_parse(getenv("CADRE_COMM_DELAY_MS")));
    if (MPI_Init_thread(argc, argv, MPI_THREAD_SERIALIZED, &provided) != MPI_SUCCESS) {
        return error_set("MPI_Init failed");
    }
    check_mpi(MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN),
              "MPI_Comm_set_errhandler");
    check_mpi(MPI_Comm_rank(MPI_COMM_WORLD, rank), "MPI_Comm_rank");
    check_mpi(MPI_Comm_size(MPI_COMM_WORLD, size), "MPI_Comm_size");
    if (provided < MPI_THREAD_SERIALIZED) {
        return error_set("this MPI does not support programs with threads "
                         "(MPI_THREAD_SERIALIZED)");
    }
    progress_start(progress);
    return 0;
}

int comm_mpi_local_rank(void)
{
    MPI_Comm host;
    int rank;

    progress_lock();
    check_mpi(MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, 0, MPI_INFO_NULL, &host),
              "MPI_Comm_split_type");
    check_mpi(MPI_Comm_rank(host, &rank), "MPI_Comm_rank");
    check_mpi(MPI_Comm_free(&host), "MPI_Comm_free");
    progress_unlock(false);
    return rank;
}

void comm_mpi_finish(void)
{
    CHECK(in_flight == NULL, "%s of %s was never waited for", comm_kind_name(in_flight->kind),
          in_flight->comm->name);
    progress_stop();
    check_mpi(MPI_Finalize(), "MPI_Finalize");
}

void comm_mpi_abort(int status)
{
    MPI_Abort(MPI_COMM_WORLD, status);
    abort();
}

void comm_mpi_set_timeout(double seconds)
{
    timeout_seconds = seconds;
}

double comm_mpi_timeout(void)
{
    return timeout_seconds;
}

void comm_mpi_set_limits(int64_t message_bytes, int64_t staging_bytes)
{
    message_bytes_max = message_bytes;
    staging_bytes_max = staging_bytes;
}

static void *grow(void *memory, size_t size_bytes)
{
    void *grown = realloc(memory, size_bytes);

    CHECK(grown != NULL, "out of memory for a collective: %zu bytes", size_bytes);
    return grown;
}

/* ---- messages ---- */

static MPI_Request *new_request(struct operation *op, int peer, bool is_receive)
{
    if (op->num_messages == op->max_messages) {
        op->max_messages = op->max_messages > 0 ? 2 * op->max_messages : 16;
        op->requests = grow(op->requests, (size_t)op->max_messages * sizeof *op->requests);
        op->messages = grow(op->messages, (size_t)op->max_messages * sizeof *op->messages);
    }
    op->messages[op->num_messages] = (struct message){peer, is_receive};
    return &op->requests[op->num_messages++];
}

static void post_send(struct operation *op, int peer, const char *data, int64_t size_bytes)
{
    const struct group *group = op->comm->state;

    while (size_bytes > 0) {
        const int64_t n = size_bytes < message_bytes_max ? size_bytes : message_bytes_max;

        check_mpi(MPI_Isend(data, (int)n, MPI_BYTE, group->members[peer], op->tag, MPI_COMM_WORLD,
                            new_request(op, peer, false)),
                  "MPI_Isend");
        data += n;
        size_bytes -= n;
    }
}

static void post_receive(struct operation *op, int peer, char *data, int64_t size_bytes)
{
    const struct group *group = op->comm->state;

    while (size_bytes > 0) {
        const int64_t n = size_bytes < message_bytes_max ? size_bytes : message_bytes_max;

        check_mpi(MPI_Irecv(data, (int)n, MPI_BYTE, group->members[peer], op->tag, MPI_COMM_WORLD,
                            new_request(op, peer, true)),
                  "MPI_Irecv");
        data += n;
        size_bytes -= n;
    }
}

/* ---- operations ---- */

static bool is_delayed(const struct comm *comm)
{
    const struct group *group = comm->state;

    return group->delay.seconds > 0.0 || group->delay.seconds_per_byte > 0.0;
}

/* Takes the lock; operation_start gives it back. */
static struct operation *operation_new(struct comm *comm, const struct stream *stream,
                                       enum comm_kind kind)
{
    struct group *group = comm->state;
    struct operation *op;

    CHECK(stream->device->kind == DEVICE_CPU, "MPI moves host memory");
    progress_lock();
    op = spare;
    if (op != NULL) {
        spare = op->next;
    } else {
        op = calloc(1, sizeof *op);
        CHECK(op != NULL, "out of memory");
    }
    op->comm = comm;
    op->kind = kind;
    op->finished = false;
    op->next_phase = NULL;
    op->num_messages = 0;
    op->sent_bytes = 0;
    op->issued_at = is_delayed(comm) ? clock_seconds() : 0.0;
    op->transfer = (struct transfer){0};
    op->tag = group->number * TAGS_PER_GROUP;
    if (kind != COMM_SEND && kind != COMM_RECEIVE) {
        op->tag += 1 + (int)(group->num_operations++ % (TAGS_PER_GROUP - 1));
    }
    return op;
}

/* Completes what can be completed of an operation without waiting. */
static void advance(struct operation *op)
{
    for (;;) {
        int arrived;

        check_mpi(MPI_Testall(op->num_messages, op->requests, &arrived, MPI_STATUSES_IGNORE),
                  comm_kind_name(op->kind));
        if (!arrived) {
            return;
        }
        op->num_messages = 0;
        if (op->next_phase == NULL || !op->next_phase(op)) {
            op->finished = true;
            return;
        }
    }
}

/* True where operations remain. */
static bool progress(void)
{
    struct operation **link = &in_flight;

    while (*link != NULL) {
        struct operation *op = *link;

        advance(op);
        if (op->finished) {
            *link = op->next;
        } else {
            link = &op->next;
        }
    }
    return in_flight != NULL;
}

/* Of what this rank sends, by its group's delay. */
static struct transfer begin_transfer(const struct operation *op)
{
    struct group *group = op->comm->state;
    const double on_link = group->delay.seconds_per_byte * (double)op->sent_bytes;
    const double start = fmax(op->issued_at, group->link_free_at);

    group->link_free_at = start + on_link;
    return (struct transfer){start, on_link + group->delay.seconds};
}

/* Gives the lock back that operation_new took. The last operation issued is the last in the list:
 * messages of a pair of ranks are posted in the order of issue. */
static struct comm_handle operation_start(struct operation *op)
{
    struct operation **link = &in_flight;

    if (is_delayed(op->comm) && op->kind != COMM_RECEIVE && op->kind != COMM_SEND) {
        op->transfer = begin_transfer(op);
    }
    while (*link != NULL) {
        link = &(*link)->next;
    }
    *link = op;
    op->next = NULL;
    progress_unlock(progress());
    return (struct comm_handle){op->comm, op};
}

bool comm_mpi_is_idle(void)
{
    bool idle;

    progress_lock();
    idle = in_flight == NULL;
    progress_unlock(!idle);
    return idle;
}

/* "rank 3 and rank 5": the world ranks whose messages are missing, receives before sends. */
static void missing_peers(struct operation *op, bool receives, char *text, size_t size_bytes)
{
    const struct group *group = op->comm->state;
    size_t length = 0;
    int num_named = 0, last = -1;

    text[0] = '\0';
    for (int i = 0; i < op->num_messages && num_named < PEERS_NAMED_MAX; i++) {
        int arrived = 1;

        if (op->messages[i].is_receive != receives || op->messages[i].peer == last) {
            continue;
        }
        MPI_Request_get_status(op->requests[i], &arrived, MPI_STATUS_IGNORE);
        if (!arrived) {
            last = op->messages[i].peer;
            length += (size_t)snprintf(text + length, size_bytes - length, "%s%d",
                                       num_named++ > 0 ? ", " : "", group->members[last]);
        }
    }
}

/* How long a wait has lasted. A rank that was stopped itself is not owed that time when it goes on:
 * a pause of its own counts as LOOK_MAX_SECONDS. */
struct patience {
    double looked_at, waited, limit; /* seconds */
};

/* The ranks' deadlines are near each other: lower ranks speak first, a second apart (the launcher
 * may need it to end the others) and all within the ten that a failure may take, so that one line
 * comes. */
static struct patience patience_of_this_rank(void)
{
    int rank;

    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    return (struct patience){clock_seconds(), 0.0, timeout_seconds + (rank < 8 ? rank : 8)};
}

static bool patience_ends(struct patience *patience)
{
    const double now = clock_seconds(), pause = now - patience->looked_at;

    patience->waited += pause < LOOK_MAX_SECONDS ? pause : LOOK_MAX_SECONDS;
    patience->looked_at = now;
    return patience->waited > patience->limit;
}

static void expire(struct operation *op)
{
    char peers[PEERS_NAMED_MAX * 16];
    bool receives = true;

    missing_peers(op, receives, peers, sizeof peers);
    if (peers[0] == '\0') {
        receives = false;
        missing_peers(op, receives, peers, sizeof peers);
    }
    PANIC("%s in group %s of %d ranks is not complete after %g s "
          "(--distributed-timeout-minutes): waiting for rank %s to %s",
          comm_kind_name(op->kind), op->comm->name, op->comm->size, timeout_seconds, peers,
          receives ? "send" : "receive");
}

static bool is_complete(const struct operation *op)
{
    const struct transfer *transfer = &op->transfer;

    return op->finished &&
           (transfer->starts_at == 0.0 ||
            clock_seconds() >= fmax(transfer->starts_at, op->issued_at) + transfer->seconds);
}

static void pause_between_looks(int64_t num_looks)
{
    if (num_looks > SPINS_BEFORE_SLEEP) {
        nanosleep(&(struct timespec){.tv_nsec = SLEEP_NS}, NULL);
    } else if (num_looks > SPINS_BEFORE_YIELD) {
        sched_yield();
    }
}

bool comm_mpi_is_complete(struct comm_handle handle)
{
    bool complete;

    if (handle.request == NULL) {
        return true;
    }
    progress_lock();
    progress();
    complete = is_complete(handle.request);
    progress_unlock(in_flight != NULL);
    return complete;
}

static void mpi_wait(struct comm_handle handle, struct stream *stream)
{
    struct operation *op = handle.request;
    struct patience patience = patience_of_this_rank();

    progress_lock();
    for (int64_t looks = 0; !is_complete(op); looks++) {
        progress();
        progress_unlock(false);
        pause_between_looks(looks);
        progress_lock();
        if (patience_ends(&patience) && !op->finished) {
            expire(op);
        }
    }
    op->next = spare;
    spare = op;
    progress_unlock(in_flight != NULL);
}

/* ---- parts: which elements of the whole are whose ---- */

static int64_t row_elements(const struct tensor *x)
{
    int64_t count = 1;

    for (int i = 1; i < x->num_dims; i++) {
        count *= x->dim[i];
    }
    return count;
}

/* Rank r has rows[r] rows of whole, or equal parts that differ by at most one element. */
static void set_parts(struct operation *op, const struct tensor *whole, const int64_t *rows)
{
    const int size = op->comm->size;
    const int64_t count = tensor_num_elements(whole), width = row_elements(whole);

    if (size > op->max_ranks) {
        op->max_ranks = size;
        op->begin = grow(op->begin, (size_t)(size + 1) * sizeof *op->begin);
        op->extent = grow(op->extent, (size_t)size * sizeof *op->extent);
    }
    op->dtype = whole->dtype;
    op->whole = whole->data;
    op->begin[0] = 0;
    for (int r = 0; r < size; r++) {
        op->begin[r + 1] = rows != NULL ? op->begin[r] + rows[r] * width
                                        : count / size * (r + 1) + (count % size) * (r + 1) / size;
        op->extent[r] = op->begin[r + 1] - op->begin[r];
    }
}

static char *element(const struct operation *op, int rank, int64_t offset)
{
    return op->whole + (op->begin[rank] + offset) * dtype_size_bytes(op->dtype);
}

/* What leaves this rank, counted at issue. */
static void count_sent(struct operation *op, int64_t size_bytes)
{
    op->sent_bytes += size_bytes;
    op->comm->counters[op->kind].sent_bytes += size_bytes;
}

/* ---- gather ---- */

static int64_t gather_bytes(const struct operation *op)
{
    return (op->comm->size - 1) * op->extent[op->comm->rank] * dtype_size_bytes(op->dtype);
}

/* `own` is this rank's part; every rank's arrives in its place in whole. */
static void post_gather(struct operation *op, const char *own)
{
    const int size = op->comm->size, rank = op->comm->rank;
    const int64_t item = dtype_size_bytes(op->dtype);

    for (int i = 1; i < size; i++) {
        const int from = (rank - i + size) % size;

        post_receive(op, from, element(op, from, 0), op->extent[from] * item);
    }
    for (int i = 1; i < size; i++) {
        post_send(op, (rank + i) % size, own, op->extent[rank] * item);
    }
}

static struct comm_handle mpi_all_gather(struct comm *comm, struct stream *stream,
                                         struct tensor *out, const struct tensor *in,
                                         const int64_t *rows)
{
    struct operation *op = operation_new(comm, stream, COMM_ALL_GATHER);

    set_parts(op, out, rows);
    if (in->data != element(op, comm->rank, 0)) {
        memcpy(element(op, comm->rank, 0), in->data, tensor_size_bytes(in));
    }
    count_sent(op, gather_bytes(op));
    post_gather(op, in->data);
    return operation_start(op);
}

/* ---- reduce ---- */

static int64_t scatter_bytes(const struct operation *op)
{
    const int size = op->comm->size;

    return (op->begin[size] - op->extent[op->comm->rank]) * dtype_size_bytes(op->dtype);
}

static int64_t segment_elements(const struct operation *op, int rank)
{
    const int64_t rest = op->extent[rank] - op->done;

    return rest <= 0 ? 0 : rest < op->segment ? rest : op->segment;
}

static char *staging_of(const struct operation *op, int rank)
{
    const int slot = rank < op->comm->rank ? rank : rank - 1;

    return op->staging + slot * op->segment * dtype_size_bytes(op->dtype);
}

/* Sends the next segment of everybody's part, receives that of this rank's. */
static void post_segment(struct operation *op)
{
    const int size = op->comm->size, rank = op->comm->rank;
    const int64_t item = dtype_size_bytes(op->dtype);

    for (int i = 1; i < size; i++) {
        const int from = (rank - i + size) % size;

        post_receive(op, from, staging_of(op, from), segment_elements(op, rank) * item);
    }
    for (int i = 1; i < size; i++) {
        const int to = (rank + i) % size;

        post_send(op, to, element(op, to, op->done), segment_elements(op, to) * item);
    }
}

/* The ranks' segments of this rank's part have arrived: reduces them, in rank order. */
static void reduce_segment(struct operation *op)
{
    const int size = op->comm->size, rank = op->comm->rank;
    const void **sources = malloc((size_t)size * sizeof *sources);

    CHECK(sources != NULL, "out of memory");
    for (int r = 0; r < size; r++) {
        sources[r] = r == rank ? element(op, r, op->done) : staging_of(op, r);
    }
    reduction_apply(op->reduction, op->dtype, op->part + op->done * dtype_size_bytes(op->dtype),
                    sources, size, segment_elements(op, rank));
    free(sources);
    op->done += op->segment;
}

static int64_t largest_part(const struct operation *op)
{
    int64_t largest = 0;

    for (int r = 0; r < op->comm->size; r++) {
        largest = op->extent[r] > largest ? op->extent[r] : largest;
    }
    return largest;
}

static bool next_segment(struct operation *op)
{
    reduce_segment(op);
    if (op->done >= largest_part(op)) {
        return false;
    }
    post_segment(op);
    return true;
}

static bool next_segment_then_gather(struct operation *op)
{
    if (!next_segment(op)) {
        op->next_phase = NULL;
        post_gather(op, op->part);
    }
    return true;
}

/* All ranks choose the same segment: it depends on what all of them know. */
static void start_reduction(struct operation *op, enum comm_reduction reduction, char *part)
{
    const int64_t others = op->comm->size - 1, item = dtype_size_bytes(op->dtype);
    const int64_t fits = staging_bytes_max / (others * item), largest = largest_part(op);
    size_t needed_bytes;

    op->reduction = reduction;
    op->part = part;
    op->segment = largest < fits ? largest : fits > 0 ? fits : 1;
    op->done = 0;
    needed_bytes = (size_t)(others * op->segment * item);
    if (needed_bytes > op->staging_bytes) {
        op->staging = grow(op->staging, needed_bytes);
        op->staging_bytes = needed_bytes;
    }
    post_segment(op);
}

static struct comm_handle mpi_reduce_scatter(struct comm *comm, struct stream *stream,
                                             struct tensor *out, const struct tensor *in,
                                             const int64_t *rows)
{
    struct operation *op = operation_new(comm, stream, COMM_REDUCE_SCATTER);

    set_parts(op, in, rows);
    op->next_phase = next_segment;
    count_sent(op, scatter_bytes(op));
    start_reduction(op, COMM_SUM, out->data);
    return operation_start(op);
}

static struct comm_handle mpi_all_reduce(struct comm *comm, struct stream *stream, struct tensor *x,
                                         enum comm_reduction reduction)
{
    struct operation *op = operation_new(comm, stream, COMM_ALL_REDUCE);

    set_parts(op, x, NULL);
    op->next_phase = next_segment_then_gather;
    count_sent(op, scatter_bytes(op) + gather_bytes(op));
    start_reduction(op, reduction, element(op, comm->rank, 0));
    return operation_start(op);
}

/* ---- the others ---- */

static int64_t rows_before(const int64_t *rows, int rank)
{
    int64_t total = 0;

    for (int r = 0; r < rank; r++) {
        total += rows[r];
    }
    return total;
}

static struct comm_handle mpi_all_to_all(struct comm *comm, struct stream *stream,
                                         struct tensor *out, const int64_t *recv_rows,
                                         const struct tensor *in, const int64_t *send_rows)
{
    struct operation *op = operation_new(comm, stream, COMM_ALL_TO_ALL);
    const int64_t row_bytes = row_elements(in) * dtype_size_bytes(in->dtype);
    const int size = comm->size, rank = comm->rank;
    char *to = out->data;
    const char *from = in->data;

    CHECK(row_elements(out) == row_elements(in) && recv_rows[rank] == send_rows[rank],
          "%s: %s to %s", comm->name, tensor_describe(in), tensor_describe(out));
    for (int i = 1; i < size; i++) {
        const int peer = (rank - i + size) % size;

        post_receive(op, peer, to + rows_before(recv_rows, peer) * row_bytes,
                     recv_rows[peer] * row_bytes);
    }
    for (int i = 1; i < size; i++) {
        const int peer = (rank + i) % size;

        post_send(op, peer, from + rows_before(send_rows, peer) * row_bytes,
                  send_rows[peer] * row_bytes);
        count_sent(op, send_rows[peer] * row_bytes);
    }
    memcpy(to + rows_before(recv_rows, rank) * row_bytes,
           from + rows_before(send_rows, rank) * row_bytes, (size_t)(send_rows[rank] * row_bytes));
    return operation_start(op);
}

static struct comm_handle mpi_broadcast(struct comm *comm, struct stream *stream, struct tensor *x,
                                        int root)
{
    struct operation *op = operation_new(comm, stream, COMM_BROADCAST);
    const int64_t size_bytes = (int64_t)tensor_size_bytes(x);

    if (comm->rank != root) {
        post_receive(op, root, x->data, size_bytes);
    }
    for (int r = 0; r < comm->size && comm->rank == root; r++) {
        if (r != root) {
            post_send(op, r, x->data, size_bytes);
            count_sent(op, size_bytes);
        }
    }
    return operation_start(op);
}

/* With a delay, a message brings its transfer. */
static struct comm_handle mpi_send(struct comm *comm, struct stream *stream, const struct tensor *x,
                                   int to)
{
    struct operation *op = operation_new(comm, stream, COMM_SEND);

    count_sent(op, (int64_t)tensor_size_bytes(x));
    if (is_delayed(comm)) {
        op->transfer = begin_transfer(op);
        post_send(op, to, (const char *)&op->transfer, sizeof op->transfer);
    }
    post_send(op, to, x->data, (int64_t)tensor_size_bytes(x));
    return operation_start(op);
}

static struct comm_handle mpi_receive(struct comm *comm, struct stream *stream, struct tensor *x,
                                      int from)
{
    struct operation *op = operation_new(comm, stream, COMM_RECEIVE);

    if (is_delayed(comm)) {
        post_receive(op, from, (char *)&op->transfer, sizeof op->transfer);
    }
    post_receive(op, from, x->data, (int64_t)tensor_size_bytes(x));
    return operation_start(op);
}

static void mpi_destroy(struct comm *comm)
{
    struct group *group = comm->state;

    free(group->members);
    free(group);
    free(comm);
}

static const struct comm_table mpi = {
    .transport = "mpi",
    .all_reduce = mpi_all_reduce,
    .all_gather = mpi_all_gather,
    .reduce_scatter = mpi_reduce_scatter,
    .all_to_all = mpi_all_to_all,
    .broadcast = mpi_broadcast,
    .send = mpi_send,
    .receive = mpi_receive,
    .wait = mpi_wait,
    .destroy = mpi_destroy,
};

struct comm *comm_mpi_create(const char *name, int number, const int *members, int size)
{
    struct comm *comm = calloc(1, sizeof *comm);
    struct group *group = calloc(1, sizeof *group);
    int world_rank;

    CHECK(number >= 0 && number < COMM_MPI_GROUPS_MAX, "group %s has number %d", name, number);
    CHECK(comm != NULL && group != NULL, "out of memory");
    check_mpi(MPI_Comm_rank(MPI_COMM_WORLD, &world_rank), "MPI_Comm_rank");
    group->number = number;
    group->delay = comm_delay_of(name);
    group->members = grow(NULL, (size_t)size * sizeof *members);
    memcpy(group->members, members, (size_t)size * sizeof *members);
    *comm = (struct comm){.table = &mpi, .name = name, .rank = -1, .size = size, .state = group};
    for (int r = 0; r < size; r++) {
        comm->rank = members[r] == world_rank ? r : comm->rank;
    }
    CHECK(comm->rank >= 0, "rank %d is not in its group %s", world_rank, name);
    return comm;
}

int comm_mpi_group_number(const struct comm *comm)
{
    const struct group *group = comm->state;

    return group->number;
}

int comm_mpi_world_rank(const struct comm *comm, int rank)
{
    const struct group *group = comm->state;

    return group->members[rank];
}

void comm_mpi_gather(void *all, const void *mine, size_t size_bytes)
{
    const int size = launch_size();
    int *members = grow(NULL, (size_t)size * sizeof *members);
    struct stream *stream = stream_create(device_cpu(), ops_cpu());
    const struct tensor in = tensor_of((void *)mine, DTYPE_U8, (int64_t)size_bytes);
    struct tensor out = tensor_of(all, DTYPE_U8, size * (int64_t)size_bytes);
    struct comm *world;

    for (int r = 0; r < size; r++) {
        members[r] = r;
    }
    world = comm_mpi_create("world", COMM_MPI_GROUPS_MAX - 1, members, size);
    comm_wait(comm_all_gather(world, stream, &out, &in), stream);
    comm_destroy(world);
    stream_destroy(stream);
    free(members);
}
#endif
