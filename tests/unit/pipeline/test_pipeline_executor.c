/* All stages of a pipeline as threads of one process, over a transport of the strictest kind: a
 * send completes only when its receive is posted, what is received is there only when waited for,
 * and a state in which everybody waits is found out. */
#include "pipeline/executor.h"

#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "base/check.h"
#include "ops/ops.h"
#include "toy_pipeline.h"

enum { STAGES_MAX = 5, DIRECTIONS = 2 };

struct stage {
    struct toy toy;
    struct comm comms[DIRECTIONS]; /* their state is the stage */
    struct pipeline_transport transport;
    int num_receives, num_late; /* late: issued when its step had come */
    int result;
};

static struct stage stages[STAGES_MAX];

/* ---- the transport ---- */

struct operation {
    struct operation *next, *older; /* in the channel; of all */
    bool is_send, is_matched, is_waited_for;
    char *data;      /* the caller's */
    char *in_flight; /* a send's bytes as they were when it was issued */
    size_t size_bytes;
    struct operation *peer; /* of a receive: the send */
    int num_passes_before;  /* that the stage had done when it was issued */
};

/* From one stage to another in one direction: either sends or receives wait for their match. */
struct channel {
    struct operation *first, *last;
};

static struct {
    pthread_mutex_t lock;
    pthread_cond_t changed;
    struct channel channels[DIRECTIONS][STAGES_MAX][STAGES_MAX];
    struct operation *newest; /* kept to the end of the run */
    int num_alive, num_waiting, num_operations;
    bool is_deadlock, is_overwritten;
} network = {.lock = PTHREAD_MUTEX_INITIALIZER, .changed = PTHREAD_COND_INITIALIZER};

static void mark_matched(struct operation *op)
{
    op->is_matched = true;
    network.num_waiting -= op->is_waited_for ? 1 : 0;
}

static void match(struct channel *channel, struct operation *op)
{
    struct operation *other = channel->first;

    if (other == NULL || other->is_send == op->is_send) {
        *(other == NULL ? &channel->first : &channel->last->next) = op;
        channel->last = op;
        return;
    }
    CHECK(other->size_bytes == op->size_bytes, "%zu bytes against %zu", other->size_bytes,
          op->size_bytes);
    channel->first = other->next;
    op->peer = other;
    other->peer = op;
    mark_matched(op);
    mark_matched(other);
    pthread_cond_broadcast(&network.changed);
}

static int num_passes(const struct stage *stage)
{
    return stage->toy.num_forwards + stage->toy.num_backwards;
}

static struct comm_handle issue(struct comm *comm, const struct tensor *x, int from, int to)
{
    const struct stage *stage = comm->state;
    const int direction = comm == stage->transport.backward;
    struct operation *op = calloc(1, sizeof *op);

    op->is_send = from == comm->rank;
    op->data = x->data;
    op->size_bytes = tensor_size_bytes(x);
    op->num_passes_before = num_passes(stage);
    op->in_flight = malloc(op->size_bytes);
    if (op->is_send) {
        memcpy(op->in_flight, op->data, op->size_bytes);
    } else {
        memset(op->data, 0xff, op->size_bytes); /* NaN: nobody may still need what was there */
    }
    pthread_mutex_lock(&network.lock);
    network.num_operations++;
    op->older = network.newest;
    network.newest = op;
    match(&network.channels[direction][from][to], op);
    pthread_mutex_unlock(&network.lock);
    return (struct comm_handle){comm, op};
}

static struct comm_handle strict_send(struct comm *comm, struct stream *stream,
                                      const struct tensor *x, int to)
{
    return issue(comm, x, comm->rank, to);
}

static struct comm_handle strict_receive(struct comm *comm, struct stream *stream, struct tensor *x,
                                         int from)
{
    return issue(comm, x, from, comm->rank);
}

/* Everybody is waiting: nobody will ever match anything again. */
static void look_for_deadlock(void)
{
    if (network.num_alive > 0 && network.num_waiting == network.num_alive) {
        network.is_deadlock = true;
        pthread_cond_broadcast(&network.changed);
    }
}

static void strict_wait(struct comm_handle handle, struct stream *stream)
{
    struct operation *op = handle.request;
    struct stage *stage = handle.comm->state;

    stage->num_receives += op->is_send ? 0 : 1;
    stage->num_late += !op->is_send && op->num_passes_before == num_passes(stage) ? 1 : 0;
    pthread_mutex_lock(&network.lock);
    if (!op->is_matched) {
        op->is_waited_for = true;
        network.num_waiting++;
        look_for_deadlock();
    }
    while (!op->is_matched && !network.is_deadlock) {
        pthread_cond_wait(&network.changed, &network.lock);
    }
    network.num_operations--;
    if (op->is_matched && op->is_send) {
        network.is_overwritten |= memcmp(op->data, op->in_flight, op->size_bytes) != 0;
    } else if (op->is_matched) {
        memcpy(op->data, op->peer->in_flight, op->size_bytes);
    }
    pthread_mutex_unlock(&network.lock);
}

static const struct comm_table strict = {
    .transport = "strict",
    .send = strict_send,
    .receive = strict_receive,
    .wait = strict_wait,
};

/* ---- the stages ---- */

static void stage_create(struct stage *stage, const struct pipeline_shape *shape, bool training,
                         bool overlap, const struct device *device)
{
    memset(stage, 0, sizeof *stage);
    stage->toy =
        (struct toy){.shape = *shape, .num_rows = 3, .hidden_size = 5, .training = training};
    for (int direction = 0; direction < DIRECTIONS; direction++) {
        stage->comms[direction] = (struct comm){.table = &strict,
                                                .name = direction == 0 ? "pp" : "pp-backward",
                                                .rank = shape->stage,
                                                .size = shape->num_stages,
                                                .state = stage};
    }
    stage->transport = (struct pipeline_transport){
        .forward = &stage->comms[PIPELINE_FORWARD],
        .backward = &stage->comms[PIPELINE_BACKWARD],
        .stream = stream_create(device, ops_cpu()),
        .arena = arena_create("boundary", &device->memory),
        .dtype = DTYPE_F32,
        .num_rows = stage->toy.num_rows,
        .hidden_size = stage->toy.hidden_size,
        .overlap = overlap,
    };
}

static void stage_destroy(struct stage *stage)
{
    arena_destroy(stage->transport.arena);
    stream_destroy(stage->transport.stream);
}

static void *stage_main(void *argument)
{
    struct stage *stage = argument;

    stage->result = toy_run(&stage->toy, &stage->transport);
    pthread_mutex_lock(&network.lock);
    network.num_alive--;
    look_for_deadlock();
    pthread_mutex_unlock(&network.lock);
    return NULL;
}

static void expect_all_right(const struct pipeline_shape *shape, bool training, bool overlap)
{
    for (int i = 0; i < shape->num_stages; i++) {
        const struct toy *toy = &stages[i].toy;

        if (network.is_deadlock || network.is_overwritten || stages[i].result != 0 ||
            toy->num_wrong > 0) {
            fail_msg("stage %d of %d, %d chunks, %d microbatches in groups of %d%s%s: %s", i,
                     shape->num_stages, shape->num_chunks, shape->num_microbatches,
                     shape->microbatch_group_size, training ? ", training" : "",
                     overlap ? ", overlap" : "",
                     network.is_deadlock      ? "all wait for each other"
                     : network.is_overwritten ? "overwritten before it was sent"
                                              : toy->first_wrong);
        }
        assert_int_equal(arena_used_bytes(stages[i].transport.arena), 0);
    }
    assert_int_equal(network.num_operations, 0); /* every handle was waited for */
}

static void network_start(int num_stages)
{
    memset(network.channels, 0, sizeof network.channels);
    network.num_alive = num_stages;
    network.num_waiting = network.num_operations = 0;
    network.is_deadlock = network.is_overwritten = false;
}

static void network_stop(void)
{
    while (network.newest != NULL) {
        struct operation *op = network.newest;

        network.newest = op->older;
        free(op->in_flight);
        free(op);
    }
}

/* The stages stay, to be looked at, until stages_destroy. */
static void run_stages(struct pipeline_shape shape, bool training, bool overlap)
{
    pthread_t threads[STAGES_MAX];

    network_start(shape.num_stages);
    for (shape.stage = 0; shape.stage < shape.num_stages; shape.stage++) {
        stage_create(&stages[shape.stage], &shape, training, overlap, device_cpu());
    }
    for (int i = 0; i < shape.num_stages; i++) {
        assert_int_equal(pthread_create(&threads[i], NULL, stage_main, &stages[i]), 0);
    }
    for (int i = 0; i < shape.num_stages; i++) {
        pthread_join(threads[i], NULL);
    }
    network_stop();
    expect_all_right(&shape, training, overlap);
}

static void stages_destroy(const struct pipeline_shape *shape)
{
    for (int i = 0; i < shape->num_stages; i++) {
        stage_destroy(&stages[i]);
    }
}

/* ---- tests ---- */

static void run_all_ways(const struct pipeline_shape *shape, bool training)
{
    for (int overlap = 0; overlap <= 1; overlap++) {
        run_stages(*shape, training, overlap == 1);
        stages_destroy(shape);
    }
}

static void test_stages_train_without_waiting_for_each_other(void **state)
{
    for (int p = 2; p <= STAGES_MAX; p++) {
        for (int m = 1; m <= 11; m += 2) {
            run_all_ways(
                &(struct pipeline_shape){.num_stages = p, .num_chunks = 1, .num_microbatches = m},
                true);
        }
        for (int v = 2; v <= 4; v++) {
            for (int m = p; m <= 4 * p; m += p) {
                run_all_ways(&(struct pipeline_shape){.num_stages = p,
                                                      .num_chunks = v,
                                                      .num_microbatches = m},
                             true);
            }
        }
    }
}

/* What goes around from the last stage to the first waits there for most of a group. */
static void test_groups_larger_than_the_pipeline_find_room(void **state)
{
    for (int p = 2; p <= 4; p++) {
        for (int group = p + 1; group <= 3 * p; group++) {
            run_all_ways(&(struct pipeline_shape){.num_stages = p,
                                                  .num_chunks = 3,
                                                  .num_microbatches = 2 * group + p,
                                                  .microbatch_group_size = group},
                         true);
        }
    }
}

static void test_evaluation_takes_any_number_of_microbatches(void **state)
{
    for (int p = 2; p <= 4; p++) {
        for (int v = 1; v <= 3; v++) {
            for (int m = 1; m <= 2 * p + 1; m++) {
                struct pipeline_shape shape = {
                    .num_stages = p, .num_chunks = v, .num_microbatches = m};

                run_all_ways(&shape, false);
                shape.microbatch_group_size = 2 * p;
                run_all_ways(&shape, false);
            }
        }
    }
}

/* With overlap only the first input has nothing to hide behind. */
static void test_receives_are_posted_a_pass_ahead_with_overlap(void **state)
{
    for (int v = 1; v <= 2; v++) {
        const struct pipeline_shape shape = {
            .num_stages = 3, .num_chunks = v, .num_microbatches = 6};

        for (int overlap = 0; overlap <= 1; overlap++) {
            run_stages(shape, true, overlap == 1);
            for (int i = 0; i < shape.num_stages; i++) {
                assert_true(stages[i].num_receives >= 6);
                assert_int_equal(stages[i].num_late, overlap == 0 ? stages[i].num_receives
                                                     : i > 0      ? 1
                                                                  : 0);
            }
            stages_destroy(&shape);
        }
    }
}

static void test_one_stage_needs_no_transport(void **state)
{
    struct toy toy = {.shape = {.num_stages = 1, .num_chunks = 1, .num_microbatches = 5},
                      .num_rows = 2,
                      .hidden_size = 3,
                      .training = true};

    assert_int_equal(toy_run(&toy, NULL), 0);
    assert_int_equal(toy.num_wrong, 0);
}

static void test_an_error_of_the_work_ends_the_walk(void **state)
{
    struct toy toy = {.shape = {.num_stages = 1, .num_chunks = 1, .num_microbatches = 5},
                      .num_rows = 2,
                      .hidden_size = 3,
                      .training = true,
                      .fail_after = 3};

    error_clear();
    assert_int_equal(toy_run(&toy, NULL), -1);
    assert_string_equal(error_text(), "forward failed");
    assert_int_equal(toy.num_forwards, 3);
    assert_int_equal(toy.num_backwards, 2);
}

static int measure_forward(void *context, const struct pipeline_step *step, int slot,
                           const struct tensor *input, struct tensor *output)
{
    return 0;
}

static int measure_backward(void *context, const struct pipeline_step *step, int slot,
                            const struct tensor *d_output, struct tensor *d_input)
{
    return 0;
}

/* The peak of the boundary tensors when nothing moves. */
static size_t measured_bytes(struct pipeline_shape shape, int stage, bool overlap)
{
    const struct pipeline_work work = {.forward = measure_forward, .backward = measure_backward};
    struct pipeline_schedule schedule;
    struct stage measured;
    size_t peak;

    shape.stage = stage;
    stage_create(&measured, &shape, true, overlap, device_null());
    assert_int_equal(schedule_training(&schedule, &shape), 0);
    assert_int_equal(pipeline_execute(&schedule, &work, &measured.transport), 0);
    peak = arena_peak_bytes(measured.transport.arena);
    pipeline_schedule_free(&schedule);
    stage_destroy(&measured);
    return peak;
}

/* An input for every forward in flight, and a handful that are on their way or being computed. */
static void expect_measured_memory(const struct pipeline_shape *shape, bool overlap)
{
    run_stages(*shape, true, overlap);
    for (int i = 0; i < shape->num_stages; i++) {
        struct pipeline_shape own = *shape;
        struct pipeline_schedule schedule;

        own.stage = i;
        assert_int_equal(schedule_training(&schedule, &own), 0);
        assert_int_equal(arena_peak_bytes(stages[i].transport.arena),
                         measured_bytes(*shape, i, overlap));
        assert_true(arena_peak_bytes(stages[i].transport.arena) <=
                    (size_t)(schedule.max_in_flight + 5) * ARENA_ALIGNMENT_BYTES);
        pipeline_schedule_free(&schedule);
    }
    stages_destroy(shape);
}

static void test_the_null_device_measures_the_boundary_memory(void **state)
{
    for (int overlap = 0; overlap <= 1; overlap++) {
        expect_measured_memory(
            &(struct pipeline_shape){.num_stages = 4, .num_chunks = 1, .num_microbatches = 9},
            overlap == 1);
        expect_measured_memory(
            &(struct pipeline_shape){.num_stages = 3, .num_chunks = 3, .num_microbatches = 9},
            overlap == 1);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_stages_train_without_waiting_for_each_other),
        cmocka_unit_test(test_groups_larger_than_the_pipeline_find_room),
        cmocka_unit_test(test_evaluation_takes_any_number_of_microbatches),
        cmocka_unit_test(test_receives_are_posted_a_pass_ahead_with_overlap),
        cmocka_unit_test(test_one_stage_needs_no_transport),
        cmocka_unit_test(test_an_error_of_the_work_ends_the_walk),
        cmocka_unit_test(test_the_null_device_measures_the_boundary_memory),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
