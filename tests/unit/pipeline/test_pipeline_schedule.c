/* What must be true of schedules of any size: 1 to 8 stages, 1 to 8 chunks, 1 to 64 microbatches,
 * and some sizes of the groups. Part v of the model is chunk v / stages of stage v % stages. */
#include "pipeline/schedule.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

#include "base/check.h"

enum { STAGES_MAX = 8, CHUNKS_MAX = 8, MICROBATCHES_MAX = 64 };
enum { PARTS_MAX = STAGES_MAX * CHUNKS_MAX };

/* The schedules of all stages. */
struct pipeline {
    int num_stages, num_chunks, num_microbatches, group_size;
    bool training;
    struct pipeline_schedule stages[STAGES_MAX];
};

static bool is_legal(int num_stages, int num_chunks, int num_microbatches, int group_size)
{
    const int group = group_size > 0 ? group_size : num_stages;
    const int rest = num_microbatches % group;

    return num_chunks == 1 || (num_stages >= 2 && group >= num_stages &&
                               group <= num_microbatches && (rest == 0 || rest >= num_stages));
}

static void expect_refusal(struct pipeline *pipeline, const struct pipeline_shape *shape)
{
    error_clear();
    assert_int_equal(schedule_training(&pipeline->stages[0], shape), -1);
    assert_non_null(strstr(error_text(), "--"));
}

/* False where the shape is refused, as it should be. */
static bool pipeline_create(struct pipeline *pipeline)
{
    struct pipeline_shape shape = {.num_stages = pipeline->num_stages,
                                   .num_chunks = pipeline->num_chunks,
                                   .num_microbatches = pipeline->num_microbatches,
                                   .microbatch_group_size = pipeline->group_size};

    if (pipeline->training && !is_legal(pipeline->num_stages, pipeline->num_chunks,
                                        pipeline->num_microbatches, pipeline->group_size)) {
        expect_refusal(pipeline, &shape);
        return false;
    }
    for (shape.stage = 0; shape.stage < shape.num_stages; shape.stage++) {
        if (pipeline->training) {
            assert_int_equal(schedule_training(&pipeline->stages[shape.stage], &shape), 0);
        } else {
            schedule_forward_only(&pipeline->stages[shape.stage], &shape);
        }
    }
    return true;
}

static void pipeline_destroy(struct pipeline *pipeline)
{
    for (int stage = 0; stage < pipeline->num_stages; stage++) {
        pipeline_schedule_free(&pipeline->stages[stage]);
    }
}

static void for_group_sizes(struct pipeline shape, void (*check)(struct pipeline *pipeline))
{
    for (int group = shape.num_stages - 1; group <= 3 * shape.num_stages + 1; group++) {
        shape.group_size = group;
        if (group > 0 && pipeline_create(&shape)) {
            check(&shape);
            pipeline_destroy(&shape);
        }
    }
}

/* The default group in every size, other groups in smaller ones. */
static void for_all_sizes(bool training, void (*check)(struct pipeline *pipeline))
{
    for (int p = 1; p <= STAGES_MAX; p++) {
        for (int v = 1; v <= CHUNKS_MAX; v++) {
            for (int m = 1; m <= MICROBATCHES_MAX; m++) {
                struct pipeline pipeline = {
                    .num_stages = p, .num_chunks = v, .num_microbatches = m, .training = training};

                if (pipeline_create(&pipeline)) {
                    check(&pipeline);
                    pipeline_destroy(&pipeline);
                }
                if (p <= 4 && v <= 3 && m <= 20) {
                    for_group_sizes(pipeline, check);
                }
            }
        }
    }
}

static int part_of(const struct pipeline *pipeline, int stage, const struct pipeline_step *step)
{
    return step->chunk * pipeline->num_stages + stage;
}

static int num_parts(const struct pipeline *pipeline)
{
    return pipeline->num_stages * pipeline->num_chunks;
}

/* ---- every pass comes once ---- */

/* In a chunk passes come in the order of the microbatches: so the next one is the only legal one,
 * and each comes once. */
static void check_passes(struct pipeline *pipeline)
{
    for (int stage = 0; stage < pipeline->num_stages; stage++) {
        const struct pipeline_schedule *schedule = &pipeline->stages[stage];
        int next[2][CHUNKS_MAX] = {{0}};

        for (int i = 0; i < schedule->num_steps; i++) {
            const struct pipeline_step *step = &schedule->steps[i];

            assert_in_range(step->chunk, 0, pipeline->num_chunks - 1);
            assert_int_equal(step->microbatch, next[step->direction][step->chunk]++);
            if (step->direction == PIPELINE_BACKWARD) {
                assert_true(step->microbatch < next[PIPELINE_FORWARD][step->chunk]);
            }
        }
        for (int chunk = 0; chunk < pipeline->num_chunks; chunk++) {
            assert_int_equal(next[PIPELINE_FORWARD][chunk], pipeline->num_microbatches);
            assert_int_equal(next[PIPELINE_BACKWARD][chunk],
                             pipeline->training ? pipeline->num_microbatches : 0);
        }
    }
}

static void test_every_pass_comes_once_and_backward_after_forward(void **state)
{
    for_all_sizes(true, check_passes);
    for_all_sizes(false, check_passes);
}

/* ---- messages ---- */

/* The next step at or after *i that sends to (or receives from) the neighbour; false: none. The
 * message is the part of the model that takes it. */
static bool next_message(const struct pipeline *pipeline, int stage,
                         enum pipeline_direction direction, bool receives, int *i, int *part,
                         int *microbatch)
{
    const struct pipeline_schedule *schedule = &pipeline->stages[stage];
    const int forth = direction == PIPELINE_FORWARD ? 1 : -1;

    for (; *i < schedule->num_steps; ++*i) {
        const struct pipeline_step *step = &schedule->steps[*i];
        const int own = part_of(pipeline, stage, step), taker = receives ? own : own + forth;
        const int sender = taker - forth;

        if (step->direction == direction && taker >= 0 && taker < num_parts(pipeline) &&
            sender >= 0 && sender < num_parts(pipeline)) {
            *part = taker;
            *microbatch = step->microbatch;
            ++*i;
            return true;
        }
    }
    return false;
}

/* All that a stage sends in a direction goes to one stage, which receives nothing else there. */
static void check_messages_of(const struct pipeline *pipeline, int stage,
                              enum pipeline_direction direction)
{
    const int p = pipeline->num_stages;
    const int to = (stage + (direction == PIPELINE_FORWARD ? 1 : p - 1)) % p;
    int i = 0, j = 0;
    int sent_part, sent_microbatch, part = -1, microbatch = -1;

    while (next_message(pipeline, stage, direction, false, &i, &sent_part, &sent_microbatch)) {
        assert_true(next_message(pipeline, to, direction, true, &j, &part, &microbatch));
        assert_int_equal(part, sent_part);
        assert_int_equal(part % p, to);
        assert_int_equal(microbatch, sent_microbatch);
    }
    assert_false(next_message(pipeline, to, direction, true, &j, &part, &microbatch));
}

static void check_messages(struct pipeline *pipeline)
{
    for (int stage = 0; stage < pipeline->num_stages; stage++) {
        check_messages_of(pipeline, stage, PIPELINE_FORWARD);
        check_messages_of(pipeline, stage, PIPELINE_BACKWARD);
    }
}

static void test_messages_are_received_in_the_order_in_which_they_are_sent(void **state)
{
    for_all_sizes(true, check_messages);
    for_all_sizes(false, check_messages);
}

/* ---- memory ---- */

static int smaller(int a, int b)
{
    return a < b ? a : b;
}

/* M5.4 and M5.5: warm-up, and one more. */
static int formula_in_flight(const struct pipeline *pipeline, int stage)
{
    const int behind = pipeline->num_stages - stage - 1;
    const int group = pipeline->group_size > 0 ? pipeline->group_size : pipeline->num_stages;
    const int warmup =
        pipeline->num_chunks == 1 ? behind : 2 * behind + (pipeline->num_chunks - 1) * group;

    return smaller(warmup + 1, pipeline->num_chunks * pipeline->num_microbatches);
}

static void check_in_flight(struct pipeline *pipeline)
{
    for (int stage = 0; stage < pipeline->num_stages; stage++) {
        const struct pipeline_schedule *schedule = &pipeline->stages[stage];
        int in_flight = 0, most = 0;

        for (int i = 0; i < schedule->num_steps; i++) {
            in_flight += schedule->steps[i].direction == PIPELINE_FORWARD ? 1 : -1;
            most = in_flight > most ? in_flight : most;
        }
        assert_int_equal(in_flight, 0);
        assert_int_equal(most, formula_in_flight(pipeline, stage));
        assert_int_equal(schedule->max_in_flight, most);
    }
}

static void test_in_flight_is_the_formula(void **state)
{
    for_all_sizes(true, check_in_flight);
}

/* Open from the first pass of any chunk to the last; so many places are enough, and needed. */
static void check_open_microbatches(struct pipeline *pipeline)
{
    const int num_passes = pipeline->num_chunks * (pipeline->training ? 2 : 1);

    for (int stage = 0; stage < pipeline->num_stages; stage++) {
        const struct pipeline_schedule *schedule = &pipeline->stages[stage];
        int passes[MICROBATCHES_MAX] = {0}, holder[MICROBATCHES_MAX];
        int open = 0, most = 0;

        memset(holder, -1, sizeof holder);
        for (int i = 0; i < schedule->num_steps; i++) {
            const int microbatch = schedule->steps[i].microbatch;
            int *place = &holder[microbatch % schedule->max_open_microbatches];

            if (passes[microbatch]++ == 0) {
                assert_int_equal(*place, -1);
                *place = microbatch;
                open++;
            }
            most = open > most ? open : most;
            if (passes[microbatch] == num_passes) {
                *place = -1;
                open--;
            }
        }
        assert_int_equal(open, 0);
        assert_int_equal(schedule->max_open_microbatches, most);
        if (!pipeline->training) {
            assert_int_equal(schedule->max_in_flight, 1);
        }
    }
}

static void test_open_microbatches_find_room_by_their_number(void **state)
{
    for_all_sizes(true, check_open_microbatches);
    for_all_sizes(false, check_open_microbatches);
}

/* ---- time ---- */

struct clock {
    int finish[2][PARTS_MAX][MICROBATCHES_MAX]; /* -1: not yet */
    int now[STAGES_MAX], next_step[STAGES_MAX];
};

static struct clock time_of;

/* When what a step waits for is there: the pass of the part before (behind, for backward). -1: not
 * yet. */
static int arrival(const struct pipeline *pipeline, int stage, const struct pipeline_step *step)
{
    const int from =
        part_of(pipeline, stage, step) + (step->direction == PIPELINE_FORWARD ? -1 : 1);

    if (from < 0 || from == num_parts(pipeline)) {
        return 0;
    }
    return time_of.finish[step->direction][from][step->microbatch];
}

/* Runs a stage until it must wait; whether anything ran. */
static bool run_stage(const struct pipeline *pipeline, int stage, const int duration[2])
{
    const struct pipeline_schedule *schedule = &pipeline->stages[stage];
    const int first = time_of.next_step[stage];

    for (; time_of.next_step[stage] < schedule->num_steps; time_of.next_step[stage]++) {
        const struct pipeline_step *step = &schedule->steps[time_of.next_step[stage]];
        const int arrived = arrival(pipeline, stage, step);

        if (arrived < 0) {
            break;
        }
        time_of.now[stage] = arrived > time_of.now[stage] ? arrived : time_of.now[stage];
        time_of.now[stage] += duration[step->direction];
        time_of.finish[step->direction][part_of(pipeline, stage, step)][step->microbatch] =
            time_of.now[stage];
    }
    return time_of.next_step[stage] > first;
}

/* The time of a batch when messages take none and never wait for room; -1: the stages wait for each
 * other. */
static int simulate(const struct pipeline *pipeline, int forward_time, int backward_time)
{
    const int duration[2] = {forward_time, backward_time};
    bool runs = true;
    int end = 0;

    memset(&time_of, 0, sizeof time_of);
    memset(time_of.finish, -1, sizeof time_of.finish);
    while (runs) {
        runs = false;
        for (int stage = 0; stage < pipeline->num_stages; stage++) {
            runs = run_stage(pipeline, stage, duration) || runs;
        }
    }
    for (int stage = 0; stage < pipeline->num_stages; stage++) {
        if (time_of.next_step[stage] < pipeline->stages[stage].num_steps) {
            return -1;
        }
        end = time_of.now[stage] > end ? time_of.now[stage] : end;
    }
    return end;
}

/* Idle time is (stages - 1) / (chunks * microbatches) of the work: each stage has so many passes of
 * a chunk, and stages - 1 more fit in before the end. */
static void check_bubble(struct pipeline *pipeline)
{
    const int passes = pipeline->num_chunks * pipeline->num_microbatches;

    for (int backward = 1; backward <= 3; backward++) {
        assert_int_equal(simulate(pipeline, 1, backward),
                         (passes + pipeline->num_stages - 1) * (1 + backward));
    }
}

static void test_no_deadlock_and_the_bubble_is_the_formula(void **state)
{
    for_all_sizes(true, check_bubble);
}

/* A last group smaller than the pipeline waits for itself. */
static void check_forward_time(struct pipeline *pipeline)
{
    const int group = pipeline->group_size > 0 ? pipeline->group_size : pipeline->num_stages;
    const int shortest = pipeline->num_chunks * pipeline->num_microbatches + pipeline->num_stages;
    const int rest = pipeline->num_microbatches % group;
    const int time = simulate(pipeline, 1, 1);

    if (pipeline->num_chunks == 1 ||
        (group >= pipeline->num_stages && (rest == 0 || rest >= pipeline->num_stages))) {
        assert_int_equal(time, shortest - 1);
    } else {
        assert_true(time >= shortest - 1);
    }
}

static void test_forward_only_ends_for_any_number_of_microbatches(void **state)
{
    for_all_sizes(false, check_forward_time);
}

/* ---- by hand ---- */

/* "F0.1" is the forward of microbatch 0 of chunk 1. */
static void expect_steps(const struct pipeline_schedule *schedule, const char *wanted)
{
    char text[512] = "";
    size_t length = 0;

    for (int i = 0; i < schedule->num_steps; i++) {
        const struct pipeline_step *step = &schedule->steps[i];

        length += (size_t)snprintf(
            text + length, sizeof text - length, "%s%c%d.%d", i > 0 ? " " : "",
            step->direction == PIPELINE_FORWARD ? 'F' : 'B', step->microbatch, step->chunk);
    }
    assert_string_equal(text, wanted);
}

static void expect_training(struct pipeline_shape shape, const char *wanted)
{
    struct pipeline_schedule schedule;

    assert_int_equal(schedule_training(&schedule, &shape), 0);
    expect_steps(&schedule, wanted);
    pipeline_schedule_free(&schedule);
}

static void test_schedules_written_out_by_hand(void **state)
{
    expect_training(
        (struct pipeline_shape){.num_stages = 1, .num_chunks = 1, .num_microbatches = 3},
        "F0.0 B0.0 F1.0 B1.0 F2.0 B2.0");
    expect_training(
        (struct pipeline_shape){
            .stage = 1, .num_stages = 4, .num_chunks = 1, .num_microbatches = 5},
        "F0.0 F1.0 F2.0 B0.0 F3.0 B1.0 F4.0 B2.0 B3.0 B4.0");
    expect_training(
        (struct pipeline_shape){.num_stages = 4, .num_chunks = 1, .num_microbatches = 2},
        "F0.0 F1.0 B0.0 B1.0");
    expect_training(
        (struct pipeline_shape){
            .stage = 1, .num_stages = 2, .num_chunks = 2, .num_microbatches = 4},
        "F0.0 F1.0 F0.1 B0.1 F1.1 B1.1 F2.0 B0.0 F3.0 B1.0 F2.1 B2.1 F3.1 B3.1 B2.0 "
        "B3.0");
}

static void test_the_last_group_may_be_smaller(void **state)
{
    struct pipeline_schedule schedule;

    schedule_forward_only(&schedule, &(struct pipeline_shape){.num_stages = 2,
                                                              .num_chunks = 2,
                                                              .num_microbatches = 5,
                                                              .microbatch_group_size = 3});
    expect_steps(&schedule, "F0.0 F1.0 F2.0 F0.1 F1.1 F2.1 F3.0 F4.0 F3.1 F4.1");
    pipeline_schedule_free(&schedule);
}

static void expect_message(struct pipeline_shape shape, const char *words)
{
    struct pipeline_schedule schedule;

    error_clear();
    assert_int_equal(schedule_training(&schedule, &shape), -1);
    if (strstr(error_text(), words) == NULL) {
        fail_msg("\"%s\" does not say \"%s\"", error_text(), words);
    }
}

static void test_refusals_name_the_flags(void **state)
{
    struct pipeline_shape shape = {.num_stages = 4, .num_chunks = 2, .num_microbatches = 6};

    expect_message(shape, "--global-batch-size / (--micro-batch-size * data-parallel size) = 6 "
                          "microbatches: must be a multiple of --pipeline-model-parallel-size 4");
    shape.microbatch_group_size = 3;
    expect_message(shape, "--microbatch-group-size-per-virtual-pipeline-stage 3: must be at least "
                          "--pipeline-model-parallel-size 4");
    shape.microbatch_group_size = 5;
    expect_message(shape, "groups of --microbatch-group-size-per-virtual-pipeline-stage 5 leave 1");
    shape.microbatch_group_size = 7;
    expect_message(shape, "groups of --microbatch-group-size-per-virtual-pipeline-stage 7 leave 6");
    shape = (struct pipeline_shape){.num_stages = 1, .num_chunks = 2, .num_microbatches = 6};
    expect_message(shape, "--pipeline-model-parallel-size of at least 2, not 1");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_every_pass_comes_once_and_backward_after_forward),
        cmocka_unit_test(test_messages_are_received_in_the_order_in_which_they_are_sent),
        cmocka_unit_test(test_in_flight_is_the_formula),
        cmocka_unit_test(test_open_microbatches_find_room_by_their_number),
        cmocka_unit_test(test_no_deadlock_and_the_bubble_is_the_formula),
        cmocka_unit_test(test_forward_only_ends_for_any_number_of_microbatches),
        cmocka_unit_test(test_schedules_written_out_by_hand),
        cmocka_unit_test(test_the_last_group_may_be_smaller),
        cmocka_unit_test(test_refusals_name_the_flags),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
