/* device_collectives.h - a group's collectives of tensors of a device give what they give of the
 * same data in the host's memory: every kind, of every type, in small, odd, empty and large sizes,
 * in groups beside and across each other. The programs that include it have a device each, real or
 * pretended. */
#ifndef CADRE_TESTS_DIST_DEVICE_COLLECTIVES_H
#define CADRE_TESTS_DIST_DEVICE_COLLECTIVES_H

#include "dist_test.h"

#include "comm/comm_create.h"

enum { RANKS_MAX = 8 };

/* The including program's: a tensor of the device with the host's data, until device_release; the
 * device's data back to the host; comm_wait on device_stream, and for the device to have done what
 * was issued. */
static struct tensor device_copy(const struct tensor *host);
static void device_read(const struct tensor *device, struct tensor *host);
static void device_release(void);
static void device_wait(struct comm_handle handle);

static struct comm *group;
static struct stream *device_stream;

static struct tensor random_rows(enum dtype dtype, int64_t rows, int64_t width, int variant)
{
    struct tensor x = tensor_new(arena, dtype, rows, width);

    dist_fill(&x, (uint64_t)(100 * variant + launch_rank()), 0);
    return x;
}

/* The same random rows for the host, on the device, and where the device's will be read to. */
struct twins {
    struct tensor host, behind, device;
};

static struct twins twins_of(enum dtype dtype, int64_t rows, int64_t width, int variant)
{
    struct twins t = {.host = random_rows(dtype, rows, width, variant),
                      .behind = random_rows(dtype, rows, width, variant)};

    t.device = device_copy(&t.behind);
    return t;
}

static struct twins twins(int64_t rows, int64_t width, int variant)
{
    return twins_of(DTYPE_F32, rows, width, variant);
}

static void compare_within(const char *what, struct twins *t, double tolerance)
{
    device_read(&t->device, &t->behind);
    dist_compare(what, &t->behind, &t->host, tolerance);
}

static void compare(const char *what, struct twins *t)
{
    compare_within(what, t, 0.0);
}

/* Sums of two have one order, and so the same bits; of more, the transport's own. A sum in bf16 may
 * be rounded once for every rank. */
static void compare_sums(const char *what, struct twins *t)
{
    const double of_two = group->size > 2 ? 1e-6 : 0.0;

    compare_within(what, t,
                   t->host.dtype == DTYPE_BF16 && group->size > 2 ? 4e-3 * group->size : of_two);
}

static void wait_for(struct comm_handle host, struct comm_handle on)
{
    device_wait(on);
    comm_wait(host, stream);
}

static void all_reduce_and_broadcast(enum dtype dtype, int64_t rows)
{
    struct twins sum = twins_of(dtype, rows, 3, 1), max = twins_of(dtype, rows, 3, 2),
                 sent = twins_of(dtype, rows, 3, 3);

    wait_for(comm_all_reduce(group, stream, &sum.host, COMM_SUM),
             comm_all_reduce(group, device_stream, &sum.device, COMM_SUM));
    compare_sums("all_reduce", &sum);
    wait_for(comm_all_reduce(group, stream, &max.host, COMM_MAX),
             comm_all_reduce(group, device_stream, &max.device, COMM_MAX));
    compare("all_reduce max", &max);
    wait_for(comm_broadcast(group, stream, &sent.host, group->size - 1),
             comm_broadcast(group, device_stream, &sent.device, group->size - 1));
    compare("broadcast", &sent);
}

static void gather_and_scatter(enum dtype dtype, int64_t rows)
{
    const struct twins part = twins_of(dtype, rows, 5, 1),
                       whole = twins_of(dtype, rows * group->size, 5, 2);
    struct twins all = twins_of(dtype, rows * group->size, 5, 3),
                 mine = twins_of(dtype, rows, 5, 4);

    wait_for(comm_all_gather(group, stream, &all.host, &part.host),
             comm_all_gather(group, device_stream, &all.device, &part.device));
    compare("all_gather", &all);
    wait_for(comm_reduce_scatter(group, stream, &mine.host, &whole.host),
             comm_reduce_scatter(group, device_stream, &mine.device, &whole.device));
    compare_sums("reduce_scatter", &mine);
}

/* Rank r has (step * r + first) % 4 rows. */
static void parts_of_rows(int first, int step)
{
    int64_t rows[RANKS_MAX], total = 0;
    struct twins part, whole, all, mine;

    for (int r = 0; r < group->size; r++) {
        rows[r] = (step * r + first) % 4;
        total += rows[r];
    }
    part = twins(rows[group->rank], 5, 1);
    all = twins(total, 5, 2);
    wait_for(comm_all_gather_rows(group, stream, &all.host, &part.host, rows),
             comm_all_gather_rows(group, device_stream, &all.device, &part.device, rows));
    compare("all_gather_rows", &all);
    whole = twins(total, 5, 3);
    mine = twins(rows[group->rank], 5, 4);
    wait_for(comm_reduce_scatter_rows(group, stream, &mine.host, &whole.host, rows),
             comm_reduce_scatter_rows(group, device_stream, &mine.device, &whole.device, rows));
    compare_sums("reduce_scatter_rows", &mine);
}

/* Rank a sends (a + 2 b) % 4 rows to rank b. What lies behind the rows received stays. */
static void all_to_all(enum dtype dtype)
{
    int64_t send_rows[RANKS_MAX], recv_rows[RANKS_MAX];
    const struct twins in = twins_of(dtype, 40, 2, 1);
    struct twins out = twins_of(dtype, 40, 2, 2);

    for (int r = 0; r < group->size; r++) {
        send_rows[r] = (group->rank + 2 * r) % 4;
        recv_rows[r] = (r + 2 * group->rank) % 4;
    }
    wait_for(comm_all_to_all(group, stream, &out.host, recv_rows, &in.host, send_rows),
             comm_all_to_all(group, device_stream, &out.device, recv_rows, &in.device, send_rows));
    compare("all_to_all", &out);
}

/* Round a ring, both transports at once, handles waited for in another order than issued. */
static void messages(enum dtype dtype, int64_t rows)
{
    const int next = (group->rank + 1) % group->size,
              previous = (group->rank + group->size - 1) % group->size;
    const struct twins x = twins_of(dtype, rows, 7, 1);
    struct twins got = twins_of(dtype, rows, 7, 2);
    struct comm_handle handles[4] = {comm_send(group, device_stream, &x.device, next),
                                     comm_receive(group, device_stream, &got.device, previous),
                                     comm_send(group, stream, &x.host, next),
                                     comm_receive(group, stream, &got.host, previous)};

    device_wait(handles[1]);
    comm_wait(handles[3], stream);
    comm_wait(handles[2], stream);
    device_wait(handles[0]);
    compare("receive", &got);
}

/* More than one waits for the first, for which the ranks may have to find each other. */
static void many_at_once(void)
{
    enum { COUNT = 5 };
    struct twins x[COUNT];
    struct comm_handle handles[COUNT];

    for (int i = 0; i < COUNT; i++) {
        x[i] = twins(11, 3, i);
        handles[i] = comm_all_reduce(group, device_stream, &x[i].device, COMM_SUM);
    }
    for (int i = COUNT - 1; i >= 0; i--) {
        device_wait(handles[i]);
        comm_wait(comm_all_reduce(group, stream, &x[i].host, COMM_SUM), stream);
        compare_sums("one of many", &x[i]);
    }
}

/* Twice as much as the same calls for the host's tensors alone. */
static void bytes_are_counted_once(void)
{
    struct twins x = twins(9, 3, 1);
    int64_t of_host;

    comm_counters_reset(group);
    comm_wait(comm_all_reduce(group, stream, &x.host, COMM_SUM), stream);
    of_host = group->counters[COMM_ALL_REDUCE].sent_bytes;
    device_wait(comm_all_reduce(group, device_stream, &x.device, COMM_SUM));
    if (of_host <= 0 || group->counters[COMM_ALL_REDUCE].sent_bytes != 2 * of_host ||
        group->counters[COMM_ALL_REDUCE].num_calls != 2) {
        dist_failed("%lld bytes of the host, %lld of both", (long long)of_host,
                    (long long)group->counters[COMM_ALL_REDUCE].sent_bytes);
    }
}

/* A rank's part lies where the whole is. */
static void in_place(int64_t rows)
{
    const int64_t first = group->rank * rows;
    struct twins all = twins(rows * group->size, 4, 1), whole = twins(rows * group->size, 4, 2);
    struct tensor part = tensor_rows(&all.host, first, rows),
                  device_part = tensor_rows(&all.device, first, rows),
                  sum = tensor_rows(&whole.host, first, rows),
                  device_sum = tensor_rows(&whole.device, first, rows);

    wait_for(comm_all_gather(group, stream, &all.host, &part),
             comm_all_gather(group, device_stream, &all.device, &device_part));
    compare("all_gather in place", &all);
    wait_for(comm_reduce_scatter(group, stream, &sum, &whole.host),
             comm_reduce_scatter(group, device_stream, &device_sum, &whole.device));
    device_read(&whole.device, &whole.behind);
    part = tensor_rows(&whole.behind, first, rows);
    dist_compare("reduce_scatter in place", &part, &sum, group->size > 2 ? 1e-6 : 0.0);
}

/* Two groups of the same ranks in opposite order; every rank issues the two groups' sums in an
 * order of its own. */
static void groups_across_each_other(const int *members)
{
    int reversed[RANKS_MAX];
    struct comm *groups[2];
    struct comm_handle handles[2];
    struct twins x[2];

    for (int r = 0; r < launch_size(); r++) {
        reversed[r] = members[launch_size() - 1 - r];
    }
    groups[0] = comm_create("forward", 1, members, launch_size());
    groups[1] = comm_create("reversed", 2, reversed, launch_size());
    for (int round = 0; round < 4; round++) {
        for (int i = 0; i < 2; i++) {
            const int which = (i + launch_rank() + round) % 2;

            x[which] = twins(1000, 3, which);
            handles[which] =
                comm_all_reduce(groups[which], device_stream, &x[which].device, COMM_SUM);
        }
        for (int i = 0; i < 2; i++) {
            device_wait(handles[i]);
            comm_wait(comm_all_reduce(groups[i], stream, &x[i].host, COMM_SUM), stream);
            compare_sums("groups across", &x[i]);
        }
        dist_release();
        device_release();
    }
    comm_destroy(groups[0]);
    comm_destroy(groups[1]);
}

/* Ranks 2 i and 2 i + 1, and, where there are four, ranks i and i + size / 2. */
static void groups_of_two(void)
{
    const int size = launch_size(), rank = launch_rank(), half = size / 2;
    const int near[2] = {rank - rank % 2, rank - rank % 2 + 1};
    const int far[2] = {rank % half, rank % half + half};
    const int *const pairs[2] = {near, far};
    struct comm *const world = group;

    for (int i = 0; i < 2 && size % 2 == 0; i++) {
        group = comm_create("pair", 3 + i, pairs[i], 2);
        all_reduce_and_broadcast(DTYPE_F32, 100);
        gather_and_scatter(DTYPE_BF16, 77);
        messages(DTYPE_F32, 9);
        all_to_all(DTYPE_F32);
        dist_release();
        device_release();
        comm_destroy(group);
    }
    group = world;
}

static void every_kind(enum dtype dtype, int64_t rows)
{
    all_reduce_and_broadcast(dtype, rows);
    gather_and_scatter(dtype, rows);
    messages(dtype, rows);
    all_to_all(dtype);
    parts_of_rows(0, 3); /* rank 0 has none */
    parts_of_rows(3, 0);
    in_place(rows);
    dist_release();
    device_release();
}

/* All of it, with large tensors of `large_rows` rows. */
static void run_device_collectives(const struct device *device, int64_t large_rows)
{
    static const enum dtype dtypes[] = {DTYPE_F32, DTYPE_BF16, DTYPE_F64, DTYPE_I32, DTYPE_I64};
    int members[RANKS_MAX];

    for (int r = 0; r < launch_size(); r++) {
        members[r] = r;
    }
    group = comm_create("world", 0, members, launch_size());
    device_stream = stream_create(device, ops_cpu());
    many_at_once();
    for (int64_t rows = 0; rows < 2000; rows = 3 * rows + 1) {
        every_kind(DTYPE_F32, rows);
    }
    for (size_t i = 0; i < sizeof dtypes / sizeof *dtypes; i++) {
        every_kind(dtypes[i], 131);
    }
    every_kind(DTYPE_F32, large_rows);
    bytes_are_counted_once();
    groups_across_each_other(members);
    if (launch_size() > 1) {
        groups_of_two();
    }
    device_release();
    stream_destroy(device_stream);
    comm_destroy(group);
}

#endif
