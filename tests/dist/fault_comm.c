/* fault_comm COLLECTIVE FAULT RANK: a rank fails where the others wait for it; tests/dist/faults.sh
 * looks at how that ends. FAULT: stop (SIGSTOP), kill (SIGKILL), error (what a user caused, on this
 * rank only), panic. */
#include <signal.h>
#include <string.h>
#include <unistd.h>

#include "dist_test.h"

enum { RANKS_MAX = 16, NUM_ELEMENTS = 100000 };

static void fail(const char *fault)
{
    if (strcmp(fault, "stop") == 0) {
        raise(SIGSTOP);
        pause(); /* the launcher wakes it up to end it */
    } else if (strcmp(fault, "kill") == 0) {
        raise(SIGKILL);
    } else if (strcmp(fault, "error") == 0) {
        launch_fail("no such file");
    } else {
        PANIC("a broken invariant");
    }
}

/* Broadcast starts at `faulty`, messages go there or come from there: the others wait for it. */
static struct comm_handle issue(struct comm *world, const char *collective, int faulty)
{
    struct tensor x = tensor_new(arena, DTYPE_F32, NUM_ELEMENTS * world->size);
    struct tensor part = tensor_new(arena, DTYPE_F32, NUM_ELEMENTS);
    int64_t rows[RANKS_MAX];

    dist_fill(&x, 1, 0);
    dist_fill(&part, 1, 0);
    for (int r = 0; r < world->size; r++) {
        rows[r] = NUM_ELEMENTS;
    }
    if (strcmp(collective, "all_reduce") == 0) {
        return comm_all_reduce(world, stream, &x, COMM_SUM);
    }
    if (strcmp(collective, "all_gather") == 0) {
        return comm_all_gather(world, stream, &x, &part);
    }
    if (strcmp(collective, "reduce_scatter") == 0) {
        return comm_reduce_scatter(world, stream, &part, &x);
    }
    if (strcmp(collective, "all_to_all") == 0) {
        struct tensor y = tensor_new(arena, DTYPE_F32, NUM_ELEMENTS * world->size);

        return comm_all_to_all(world, stream, &y, rows, &x, rows);
    }
    if (strcmp(collective, "broadcast") == 0) {
        return comm_broadcast(world, stream, &x, faulty);
    }
    if (strcmp(collective, "send") == 0) {
        return comm_send(world, stream, &x, faulty);
    }
    return comm_receive(world, stream, &x, faulty);
}

int main(int argc, char **argv)
{
    int members[RANKS_MAX], faulty;
    struct tensor one;
    struct comm *world;

    dist_begin(argc, argv);
    comm_mpi_set_timeout(1.0);
    faulty = atoi(argv[3]);
    for (int r = 0; r < launch_size(); r++) {
        members[r] = r;
    }
    world = comm_mpi_create("world", 0, members, launch_size());
    one = tensor_new(arena, DTYPE_F32, 1);
    dist_fill(&one, 0, 0);
    comm_wait(comm_all_reduce(world, stream, &one, COMM_SUM), stream);
    if (world->rank == faulty) {
        fail(argv[2]);
    }
    comm_wait(issue(world, argv[1], faulty), stream);
    return dist_end();
}
