/* Every collective over MPI, for odd sizes and all dtypes, against the same sums in one process.
 * ranks: 2 3 4 */
#include "dist_test.h"

#include <time.h>

#include "base/clock.h"
#include "comm/delay.h"

enum { RANKS_MAX = 16 };

static const enum dtype dtypes[] = {DTYPE_F32, DTYPE_BF16, DTYPE_F64, DTYPE_I32, DTYPE_I64};
enum { NUM_DTYPES_TESTED = sizeof dtypes / sizeof *dtypes };

static const int64_t sizes[] = {0, 1, 2, 3, 7, 64, 1001, 70001};
enum { NUM_SIZES = sizeof sizes / sizeof *sizes };

static struct comm *world;

static struct tensor data_of_rank(enum dtype dtype, int64_t n, int rank)
{
    struct tensor x = tensor_new(arena, dtype, n);

    dist_fill(&x, (uint64_t)rank, 0);
    return x;
}

/* Sum in rank order by the arithmetic that comm.h promises. */
static struct tensor reduced(enum dtype dtype, int64_t n, enum comm_reduction reduction)
{
    struct tensor out = tensor_new(arena, dtype, n), parts[RANKS_MAX];

    for (int r = 0; r < world->size; r++) {
        parts[r] = data_of_rank(dtype, n, r);
    }
    for (int64_t i = 0; i < n; i++) {
        double value = dist_get(&parts[0], i);

        for (int r = 1; r < world->size; r++) {
            const double x = dist_get(&parts[r], i);

            if (reduction == COMM_MAX) {
                value = x > value ? x : value;
            } else if (dtype == DTYPE_F32 || dtype == DTYPE_BF16) {
                value = (float)value + (float)x;
            } else {
                value += x;
            }
        }
        dist_set(&out, i, value);
    }
    return out;
}

static void all_reduce_sums_in_rank_order(enum dtype dtype, int64_t n)
{
    for (int reduction = COMM_SUM; reduction <= COMM_MAX; reduction++) {
        struct tensor x = data_of_rank(dtype, n, world->rank);
        const struct tensor wanted = reduced(dtype, n, (enum comm_reduction)reduction);

        comm_wait(comm_all_reduce(world, stream, &x, (enum comm_reduction)reduction), stream);
        dist_compare("all_reduce", &x, &wanted, 0.0);
    }
}

static void reduce_scatter_gives_each_rank_its_part(enum dtype dtype, int64_t n)
{
    struct tensor in = data_of_rank(dtype, n * world->size, world->rank);
    struct tensor out = tensor_new(arena, dtype, n);
    const struct tensor all = reduced(dtype, n * world->size, COMM_SUM);
    const struct tensor wanted = tensor_rows(&all, n * world->rank, n);

    comm_wait(comm_reduce_scatter(world, stream, &out, &in), stream);
    dist_compare("reduce_scatter", &out, &wanted, 0.0);
}

/* Rows of width 3: rank r has (r * 5) % 7 of them, so that one rank has none. */
static void uneven_parts_are_gathered_and_reduced(enum dtype dtype)
{
    int64_t rows[RANKS_MAX], begin[RANKS_MAX + 1] = {0};
    struct tensor in, part, whole, wanted, mine;

    for (int r = 0; r < world->size; r++) {
        rows[r] = r * 5 % 7;
        begin[r + 1] = begin[r] + rows[r];
    }
    in = tensor_new(arena, dtype, begin[world->size], 3);
    dist_fill(&in, 77, 0);
    mine = tensor_rows(&in, begin[world->rank], rows[world->rank]);
    whole = tensor_new(arena, dtype, begin[world->size], 3);
    comm_wait(comm_all_gather_rows(world, stream, &whole, &mine, rows), stream);
    dist_compare("all_gather_rows", &whole, &in, 0.0);

    wanted = reduced(dtype, begin[world->size] * 3, COMM_SUM);
    whole = data_of_rank(dtype, begin[world->size] * 3, world->rank);
    whole = tensor_view(&whole, begin[world->size], 3);
    part = tensor_new(arena, dtype, rows[world->rank], 3);
    comm_wait(comm_reduce_scatter_rows(world, stream, &part, &whole, rows), stream);
    wanted = tensor_rows(&wanted, 3 * begin[world->rank], 3 * rows[world->rank]);
    dist_compare("reduce_scatter_rows", &part, &wanted, 0.0);
}

static void all_gather_is_in_rank_order(enum dtype dtype, int64_t n)
{
    struct tensor in = data_of_rank(dtype, n, world->rank);
    struct tensor out = tensor_new(arena, dtype, n * world->size);

    comm_wait(comm_all_gather(world, stream, &out, &in), stream);
    for (int r = 0; r < world->size; r++) {
        const struct tensor part = tensor_rows(&out, n * r, n), wanted = data_of_rank(dtype, n, r);

        dist_compare("all_gather", &part, &wanted, 0.0);
    }
}

/* Rank a sends (a * 3 + b * 2) % 5 rows of width 2 to rank b; their numbers are those of (a, b). */
static int64_t rows_between(int a, int b)
{
    return (a * 3 + b * 2) % 5;
}

static void all_to_all_brings_every_pair_its_rows(enum dtype dtype)
{
    int64_t send_rows[RANKS_MAX], recv_rows[RANKS_MAX], num_sent = 0, num_received = 0;
    struct tensor in = tensor_new(arena, dtype, 5 * RANKS_MAX, 2);
    struct tensor out = tensor_new(arena, dtype, 5 * RANKS_MAX, 2);

    for (int r = 0; r < world->size; r++) {
        struct tensor rows;

        send_rows[r] = rows_between(world->rank, r);
        recv_rows[r] = rows_between(r, world->rank);
        rows = tensor_rows(&in, num_sent, send_rows[r]);
        dist_fill(&rows, 1000, 10 * (world->rank * RANKS_MAX + r));
        num_sent += send_rows[r];
    }
    comm_wait(comm_all_to_all(world, stream, &out, recv_rows, &in, send_rows), stream);
    for (int r = 0; r < world->size; r++) {
        struct tensor wanted = tensor_new(arena, dtype, recv_rows[r], 2);
        const struct tensor got = tensor_rows(&out, num_received, recv_rows[r]);

        dist_fill(&wanted, 1000, 10 * (r * RANKS_MAX + world->rank));
        dist_compare("all_to_all", &got, &wanted, 0.0);
        num_received += recv_rows[r];
    }
}

static void broadcast_reaches_all_from_every_root(enum dtype dtype, int64_t n)
{
    for (int root = 0; root < world->size; root++) {
        struct tensor x = data_of_rank(dtype, n, world->rank);
        const struct tensor wanted = data_of_rank(dtype, n, root);

        comm_wait(comm_broadcast(world, stream, &x, root), stream);
        dist_compare("broadcast", &x, &wanted, 0.0);
    }
}

/* Round the ring, two messages in a row, which must not overtake each other. */
static void messages_keep_their_order(int64_t n)
{
    const int to = (world->rank + 1) % world->size;
    const int from = (world->rank + world->size - 1) % world->size;
    struct tensor sent[2], received[2];
    struct comm_handle handles[4];

    for (int i = 0; i < 2; i++) {
        const struct tensor wanted = data_of_rank(DTYPE_F32, n, world->rank + 100 * i);

        sent[i] = wanted;
        received[i] = tensor_new(arena, DTYPE_F32, n);
        handles[2 * i] = comm_receive(world, stream, &received[i], from);
        handles[2 * i + 1] = comm_send(world, stream, &sent[i], to);
    }
    for (int i = 3; i >= 0; i--) {
        comm_wait(handles[i], stream);
    }
    for (int i = 0; i < 2; i++) {
        const struct tensor wanted = data_of_rank(DTYPE_F32, n, from + 100 * i);

        dist_compare("send and receive", &received[i], &wanted, 0.0);
    }
}

/* Even ranks wait in one order, odd ranks in the other: only progress of all of them ends it. */
static void handles_are_waited_for_in_any_order(int64_t n)
{
    struct tensor a = data_of_rank(DTYPE_F32, n, world->rank),
                  b = data_of_rank(DTYPE_BF16, n, world->rank);
    const struct tensor sum_a = reduced(DTYPE_F32, n, COMM_SUM);
    const struct tensor sum_b = reduced(DTYPE_BF16, n, COMM_SUM);
    struct comm_handle first = comm_all_reduce(world, stream, &a, COMM_SUM);
    struct comm_handle second = comm_all_reduce(world, stream, &b, COMM_SUM);

    comm_wait(world->rank % 2 == 0 ? first : second, stream);
    comm_wait(world->rank % 2 == 0 ? second : first, stream);
    dist_compare("first of two", &a, &sum_a, 0.0);
    dist_compare("second of two", &b, &sum_b, 0.0);
}

/* Groups of {0, 2, ...} and {1, 3, ...}, one number for both. */
static void groups_do_not_hear_each_other(void)
{
    int members[RANKS_MAX], size = 0;
    struct tensor x = tensor_new(arena, DTYPE_I64, 1);
    struct comm *comm;
    int64_t wanted = 0;

    for (int r = launch_rank() % 2; r < launch_size(); r += 2) {
        wanted += r + 1;
        members[size++] = r;
    }
    comm = comm_mpi_create("parity", 1, members, size);
    ((int64_t *)x.data)[0] = launch_rank() + 1;
    if (size > 1) {
        comm_wait(comm_all_reduce(comm, stream, &x, COMM_SUM), stream);
    }
    if (((int64_t *)x.data)[0] != wanted) {
        dist_failed("group of %d: sum %lld, wanted %lld", size, (long long)((int64_t *)x.data)[0],
                    (long long)wanted);
    }
    comm_destroy(comm);
}

/* A gather of n f32 sends 4n bytes to each of the others; an all-reduce 2 (size-1)/size of its
 * data. */
static void counters_say_what_left_this_rank(void)
{
    const int64_t n = 12 * world->size;
    struct tensor x = data_of_rank(DTYPE_F32, n, 0);
    struct tensor out = tensor_new(arena, DTYPE_F32, n * world->size);

    comm_counters_reset(world);
    comm_wait(comm_all_gather(world, stream, &out, &x), stream);
    comm_wait(comm_all_reduce(world, stream, &x, COMM_SUM), stream);
    if (world->counters[COMM_ALL_GATHER].num_calls != 1 ||
        world->counters[COMM_ALL_GATHER].sent_bytes != 4 * n * (world->size - 1)) {
        dist_failed("all_gather counted %lld bytes",
                    (long long)world->counters[COMM_ALL_GATHER].sent_bytes);
    }
    if (world->counters[COMM_ALL_REDUCE].sent_bytes !=
        2 * 4 * n / world->size * (world->size - 1)) {
        dist_failed("all_reduce counted %lld bytes",
                    (long long)world->counters[COMM_ALL_REDUCE].sent_bytes);
    }
}

static void sleep_seconds(double seconds)
{
    nanosleep(&(struct timespec){.tv_nsec = (long)(1e9 * seconds)}, NULL);
}

/* Nobody waits, and yet a large reduction of many segments ends. */
static void operations_advance_while_the_rank_computes(void)
{
    struct tensor x = data_of_rank(DTYPE_F32, 1 << 20, world->rank);
    const struct tensor wanted = reduced(DTYPE_F32, 1 << 20, COMM_SUM);
    const double start = clock_seconds();
    const struct comm_handle handle = comm_all_reduce(world, stream, &x, COMM_SUM);

    while (!comm_mpi_is_idle()) {
        sleep_seconds(0.01);
        if (clock_seconds() - start > 30.0) {
            dist_failed("a reduction does not advance without a wait");
            break;
        }
    }
    comm_wait(handle, stream);
    dist_compare("all_reduce without a wait", &x, &wanted, 0.0);
}

/* Each of many collectives takes the delay; one after another they would take as many delays. */
static void delayed_collectives_end_late_but_together(struct comm *slow, double delay)
{
    enum { COUNT = 16 };
    const struct tensor wanted = reduced(DTYPE_F32, 100, COMM_SUM);
    struct comm_handle handles[COUNT];
    struct tensor x[COUNT];
    double start, seconds = 0.0;

    for (int i = 0; i < COUNT; i++) {
        x[i] = data_of_rank(DTYPE_F32, 100, world->rank);
    }
    start = clock_seconds();
    for (int i = 0; i < COUNT; i++) {
        handles[i] = comm_all_reduce(slow, stream, &x[i], COMM_SUM);
    }
    for (int i = 0; i < COUNT; i++) {
        comm_wait(handles[i], stream);
        seconds = clock_seconds() - start;
        if (seconds < delay) {
            dist_failed("a collective with a delay of %g s took %g s", delay, seconds);
        }
        dist_compare("delayed all_reduce", &x[i], &wanted, 0.0);
    }
    if (seconds >= COUNT * delay) {
        dist_failed("%d collectives with a delay of %g s took %g s", COUNT, delay, seconds);
    }
}

/* The delay counts from the sending, however early the receive was posted. */
static void delayed_messages_take_the_delay_from_their_sending(struct comm *slow, double delay)
{
    struct tensor sent = data_of_rank(DTYPE_F64, 3, slow->rank),
                  x = tensor_new(arena, DTYPE_F64, 3);
    const int to = (slow->rank + 1) % slow->size;
    const int from = (slow->rank + slow->size - 1) % slow->size;
    const struct tensor wanted = data_of_rank(DTYPE_F64, 3, from);
    const struct comm_handle receive = comm_receive(slow, stream, &x, from);
    struct tensor token = tensor_new(arena, DTYPE_I32, 1);
    struct comm_handle send;
    double start;

    dist_fill(&token, 0, 0);
    sleep_seconds(delay);
    start = clock_seconds(); /* nobody has sent before: all ranks meet after it */
    comm_wait(comm_all_reduce(world, stream, &token, COMM_MAX), stream);
    send = comm_send(slow, stream, &sent, to);
    comm_wait(receive, stream);
    if (clock_seconds() - start < delay) {
        dist_failed("a message with a delay of %g s took %g s", delay, clock_seconds() - start);
    }
    comm_wait(send, stream);
    dist_compare("delayed message", &x, &wanted, 0.0);
}

static void test_delays(const int *members)
{
    const double delay = 0.2;
    struct comm *slow;

    if (comm_delay_parse("slow:200") != 0) {
        launch_fail(error_text());
    }
    slow = comm_mpi_create("slow", 2, members, launch_size());
    delayed_collectives_end_late_but_together(slow, delay);
    delayed_messages_take_the_delay_from_their_sending(slow, delay);
    comm_destroy(slow);
    dist_release();
}

static void run_all(int64_t size_max)
{
    for (int d = 0; d < NUM_DTYPES_TESTED; d++) {
        for (int s = 0; s < NUM_SIZES && sizes[s] <= size_max; s++) {
            all_reduce_sums_in_rank_order(dtypes[d], sizes[s]);
            reduce_scatter_gives_each_rank_its_part(dtypes[d], sizes[s]);
            all_gather_is_in_rank_order(dtypes[d], sizes[s]);
            dist_release();
        }
        broadcast_reaches_all_from_every_root(dtypes[d], 1001);
        uneven_parts_are_gathered_and_reduced(dtypes[d]);
        all_to_all_brings_every_pair_its_rows(dtypes[d]);
        dist_release();
    }
    messages_keep_their_order(size_max);
    handles_are_waited_for_in_any_order(size_max);
    groups_do_not_hear_each_other();
    counters_say_what_left_this_rank();
    dist_release();
}

int main(int argc, char **argv)
{
    int members[RANKS_MAX];

    dist_begin(argc, argv);
    for (int r = 0; r < launch_size(); r++) {
        members[r] = r;
    }
    world = comm_mpi_create("world", 0, members, launch_size());
    run_all(70001);
    comm_mpi_set_limits(64, 1000); /* every message and reduction in pieces */
    run_all(1001);
    comm_mpi_set_limits(1 << 30, 1 << 16);
    operations_advance_while_the_rank_computes();
    test_delays(members);
    comm_destroy(world);
    return dist_end();
}
