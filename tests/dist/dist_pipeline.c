/* A toy model (unit/pipeline/toy_pipeline.h) over a pipeline of MPI ranks: every activation and
 * every gradient is the exact whole number, in every schedule, and what is sent is what the formula
 * says. ranks: 2 3 4 */
#include "dist_test.h"

#include "../unit/pipeline/toy_pipeline.h"
#include "parallel/groups.h"

static struct groups groups;

/* A stage sends a tensor for every pass of each of its chunks but the one at the model's end. */
static void expect_sent(const struct toy *toy, const struct comm *comm, bool has_end, bool is_used)
{
    const struct comm_counter *sends = &comm->counters[COMM_SEND];
    const int64_t num_chunks = toy->shape.num_chunks - (has_end ? 1 : 0);
    const int64_t wanted = is_used ? num_chunks * toy->shape.num_microbatches : 0;
    const int64_t size_bytes = toy->num_rows * toy->hidden_size * (int64_t)sizeof(float);

    if (sends->num_calls != wanted || sends->sent_bytes != wanted * size_bytes) {
        dist_failed("group %s: %lld sends of %lld bytes, wanted %lld of %lld", comm->name,
                    (long long)sends->num_calls, (long long)sends->sent_bytes, (long long)wanted,
                    (long long)(wanted * size_bytes));
    }
}

static void run(const struct pipeline_shape *shape, int64_t num_rows, bool training, bool overlap)
{
    const struct pipeline_transport transport = {
        .forward = groups.pp,
        .backward = groups.pp_backward,
        .stream = stream,
        .arena = arena,
        .dtype = DTYPE_F32,
        .num_rows = num_rows,
        .hidden_size = 37,
        .overlap = overlap,
    };
    struct toy toy = {
        .shape = *shape, .num_rows = num_rows, .hidden_size = 37, .training = training};

    groups_reset_counters(&groups);
    if (toy_run(&toy, &transport) != 0) {
        launch_fail(error_text());
    }
    if (toy.num_wrong > 0) {
        dist_failed("%d chunks, %d microbatches, %s%s: %d wrong: %s", shape->num_chunks,
                    shape->num_microbatches, training ? "training" : "evaluation",
                    overlap ? " with overlap" : "", toy.num_wrong, toy.first_wrong);
    }
    expect_sent(&toy, groups.pp, shape->stage == shape->num_stages - 1, true);
    expect_sent(&toy, groups.pp_backward, shape->stage == 0, training);
    if (arena_used_bytes(arena) != 0) {
        dist_failed("boundary tensors were not given back");
    }
}

static void run_all_ways(const struct pipeline_shape *shape, int64_t num_rows)
{
    for (int ways = 0; ways < 4; ways++) {
        run(shape, num_rows, (ways & 1) != 0, (ways & 2) != 0);
    }
}

int main(int argc, char **argv)
{
    const int size = dist_begin(argc, argv);
    const struct rank_grid_sizes sizes = {
        .world = size, .tp = 1, .cp = 1, .pp = size, .ep = 1, .etp = 1};
    struct pipeline_shape shape = {.num_stages = size, .num_chunks = 1};
    struct rank_grid grid;

    if (rank_grid_init(&grid, &sizes) != 0) {
        launch_fail(error_text());
    }
    groups_create(&groups, &grid, launch_rank(), false);
    shape.stage = groups.pp->rank;
    for (int m = 1; m <= 7; m++) {
        shape.num_microbatches = m;
        run_all_ways(&shape, 1 + 40 * (m % 3)); /* short messages go at once, long ones do not */
    }
    for (shape.num_chunks = 2; shape.num_chunks <= 3; shape.num_chunks++) {
        for (int m = size; m <= 3 * size; m += size) {
            shape.num_microbatches = m;
            run_all_ways(&shape, 1 + 40 * (m / size % 3));
        }
        shape.num_microbatches = 2 * size + 3;
        run(&shape, 41, false, true);
        shape.microbatch_group_size = 2 * size + 1;
        shape.num_microbatches = 2 * shape.microbatch_group_size + size;
        run_all_ways(&shape, 500);
        shape.microbatch_group_size = 0;
    }
    groups_destroy(&groups);
    return dist_end();
}
