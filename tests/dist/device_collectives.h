/* device_collectives.h - a group's collectives of tensors of a device give what they give of the
 * same data in the host's memory. The programs that include it pretend a device each. */
#ifndef CADRE_TESTS_DIST_DEVICE_COLLECTIVES_H
#define CADRE_TESTS_DIST_DEVICE_COLLECTIVES_H

#include "dist_test.h"

#include "comm/comm_create.h"

enum { RANKS_MAX = 8 };

/* The including program's: the device's address of the host's memory; comm_wait on device_stream,
 * and for the device to have done what was issued. */
static void *device_address(void *host);
static void device_wait(struct comm_handle handle);

static struct comm *group;
static struct stream *device_stream;

static struct tensor random_rows(int64_t rows, int64_t width, int variant)
{
    struct tensor x = tensor_new(arena, DTYPE_F32, rows, width);

    dist_fill(&x, (uint64_t)(100 * variant + group->rank), 0);
    return x;
}

/* Two tensors with the same random rows: one for the host, one for the device. */
struct twins {
    struct tensor host, behind, device;
};

static struct twins twins(int64_t rows, int64_t width, int variant)
{
    struct twins t = {.host = random_rows(rows, width, variant),
                      .behind = random_rows(rows, width, variant)};

    t.device = t.behind;
    t.device.data = device_address(t.behind.data);
    return t;
}

static void wait_for(struct comm_handle host, struct comm_handle on)
{
    device_wait(on);
    comm_wait(host, stream);
}

static void all_reduce_and_broadcast(int64_t rows)
{
    struct twins sum = twins(rows, 3, 1), max = twins(rows, 3, 2), sent = twins(rows, 3, 3);

    wait_for(comm_all_reduce(group, stream, &sum.host, COMM_SUM),
             comm_all_reduce(group, device_stream, &sum.device, COMM_SUM));
    dist_compare("all_reduce", &sum.behind, &sum.host, 0.0);
    wait_for(comm_all_reduce(group, stream, &max.host, COMM_MAX),
             comm_all_reduce(group, device_stream, &max.device, COMM_MAX));
    dist_compare("all_reduce max", &max.behind, &max.host, 0.0);
    wait_for(comm_broadcast(group, stream, &sent.host, group->size - 1),
             comm_broadcast(group, device_stream, &sent.device, group->size - 1));
    dist_compare("broadcast", &sent.behind, &sent.host, 0.0);
}

static void gather_and_scatter(int64_t rows)
{
    const struct twins part = twins(rows, 5, 1), whole = twins(rows * group->size, 5, 2);
    struct twins all = twins(rows * group->size, 5, 3), mine = twins(rows, 5, 4);

    wait_for(comm_all_gather(group, stream, &all.host, &part.host),
             comm_all_gather(group, device_stream, &all.device, &part.device));
    dist_compare("all_gather", &all.behind, &all.host, 0.0);
    wait_for(comm_reduce_scatter(group, stream, &mine.host, &whole.host),
             comm_reduce_scatter(group, device_stream, &mine.device, &whole.device));
    dist_compare("reduce_scatter", &mine.behind, &mine.host, 0.0);
}

/* Rank r has 3 r % 4 rows: rank 0 none. */
static void uneven_parts(void)
{
    int64_t rows[RANKS_MAX], total = 0;
    struct twins part, whole, all, mine;

    for (int r = 0; r < group->size; r++) {
        rows[r] = 3 * r % 4;
        total += rows[r];
    }
    part = twins(rows[group->rank], 5, 1);
    all = twins(total, 5, 2);
    wait_for(comm_all_gather_rows(group, stream, &all.host, &part.host, rows),
             comm_all_gather_rows(group, device_stream, &all.device, &part.device, rows));
    dist_compare("all_gather_rows", &all.behind, &all.host, 0.0);
    whole = twins(total, 5, 3);
    mine = twins(rows[group->rank], 5, 4);
    wait_for(comm_reduce_scatter_rows(group, stream, &mine.host, &whole.host, rows),
             comm_reduce_scatter_rows(group, device_stream, &mine.device, &whole.device, rows));
    dist_compare("reduce_scatter_rows", &mine.behind, &mine.host, 0.0);
}

/* Rank a sends (a + 2 b) % 4 rows to rank b. What lies behind the rows received stays. */
static void all_to_all(void)
{
    int64_t send_rows[RANKS_MAX], recv_rows[RANKS_MAX];
    const struct twins in = twins(40, 2, 1);
    struct twins out = twins(40, 2, 2);

    for (int r = 0; r < group->size; r++) {
        send_rows[r] = (group->rank + 2 * r) % 4;
        recv_rows[r] = (r + 2 * group->rank) % 4;
    }
    wait_for(comm_all_to_all(group, stream, &out.host, recv_rows, &in.host, send_rows),
             comm_all_to_all(group, device_stream, &out.device, recv_rows, &in.device, send_rows));
    dist_compare("all_to_all", &out.behind, &out.host, 0.0);
}

/* Round a ring, both transports at once, handles waited for in another order than issued. */
static void messages(int64_t rows)
{
    const int next = (group->rank + 1) % group->size,
              previous = (group->rank + group->size - 1) % group->size;
    const struct twins x = twins(rows, 7, 1);
    struct twins got = twins(rows, 7, 2);
    struct comm_handle handles[4] = {comm_send(group, device_stream, &x.device, next),
                                     comm_receive(group, device_stream, &got.device, previous),
                                     comm_send(group, stream, &x.host, next),
                                     comm_receive(group, stream, &got.host, previous)};

    device_wait(handles[1]);
    comm_wait(handles[3], stream);
    comm_wait(handles[2], stream);
    device_wait(handles[0]);
    dist_compare("receive", &got.behind, &got.host, 0.0);
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
        dist_compare("one of many", &x[i].behind, &x[i].host, 0.0);
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

/* All of it over a group of all ranks, which it creates. */
static void run_device_collectives(const struct device *device)
{
    int members[RANKS_MAX];

    for (int r = 0; r < launch_size(); r++) {
        members[r] = r;
    }
    group = comm_create("world", 0, members, launch_size());
    device_stream = stream_create(device, ops_cpu());
    many_at_once();
    for (int64_t rows = 0; rows < 2000; rows = 3 * rows + 1) {
        all_reduce_and_broadcast(rows);
        gather_and_scatter(rows);
        messages(rows);
        all_to_all();
        uneven_parts();
        dist_release();
    }
    bytes_are_counted_once();
    stream_destroy(device_stream);
    comm_destroy(group);
}

#endif
