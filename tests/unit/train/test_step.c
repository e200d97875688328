/* Training steps that are started before the one in front of them is finished, and steps that are
 * captured as a graph, on a device that counts the host's waits (guarded_device.h): of one rank,
 * and of the first and the last of eight, whose peers are emulated (comm_fake.h). */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>
#include <cmocka.h>

#include "guarded_run.h"
#include "train/step.h"
#include "train/walk.h"

enum { NUM_STEPS = 6 };

/* What a run leaves. */
struct outcome {
    struct step_result results[NUM_STEPS]; /* without moe_metrics */
    double moe_metrics[NUM_STEPS];         /* the sum of all */
    char *params;
    size_t params_bytes;
};

static void start(struct guarded_run *run, struct step *step)
{
    if (train_step_start(&run->trainer, run->data.train, step) != 0) {
        fail_msg("%s", error_text());
    }
    train_step_read_metrics(&run->trainer, step);
}

static double sum_of_metrics(const struct guarded_run *run, const struct step *step)
{
    double sum = 0.0;

    for (int i = 0; i < NUM_MOE_METRICS * run->trainer.config.num_layers; i++) {
        sum += (double)step->result.moe_metrics[i];
    }
    return sum;
}

static void finish(struct guarded_run *run, struct step *step, struct outcome *outcome, int number)
{
    if (train_step_finish(&run->trainer, step) != 0) {
        fail_msg("%s", error_text());
    }
    outcome->results[number] = step->result;
    outcome->results[number].moe_metrics = NULL;
    outcome->moe_metrics[number] = sum_of_metrics(run, step);
    assert_true(outcome->moe_metrics[number] > 0.0);
    train_step_free(&run->trainer, step);
}

static void keep_params(struct guarded_run *run, struct outcome *outcome)
{
    const struct tensor *values = &run->trainer.params.values;

    outcome->params_bytes = tensor_size_bytes(values);
    outcome->params = malloc(outcome->params_bytes);
    assert_non_null(outcome->params);
    stream_copy_to_host(run->trainer.stream, outcome->params, values->data, outcome->params_bytes);
}

/* Each step is finished num_behind steps after it was started. The start of a step may wait only
 * where a graph takes the place of another. */
static void train(struct guarded_run *run, int num_steps, int num_behind, struct outcome *outcome)
{
    struct step steps[2];

    *outcome = (struct outcome){0};
    for (int i = 0; i < num_steps + num_behind; i++) {
        if (i < num_steps) {
            const int before = guarded.num_waits, captures = guarded.num_captures;

            start(run, &steps[i % 2]);
            if (guarded.num_waits - before > (guarded.num_captures > captures && captures > 0)) {
                fail_msg("step %d: the host waited %d times", i, guarded.num_waits - before);
            }
        }
        if (i >= num_behind) {
            finish(run, &steps[(i - num_behind) % 2], outcome, i - num_behind);
        }
    }
    keep_params(run, outcome);
}

static void expect_same(struct outcome *a, struct outcome *b, const char *flags)
{
    for (int i = 0; i < NUM_STEPS; i++) {
        if (memcmp(&a->results[i], &b->results[i], sizeof a->results[i]) != 0 ||
            a->moe_metrics[i] != b->moe_metrics[i]) {
            fail_msg("%s: step %d: loss %.9g and %.9g, norm %.9g and %.9g, metrics %.9g and %.9g",
                     flags, i, a->results[i].loss_sum, b->results[i].loss_sum,
                     a->results[i].grad_norm, b->results[i].grad_norm, a->moe_metrics[i],
                     b->moe_metrics[i]);
        }
    }
    if (a->params_bytes != b->params_bytes || memcmp(a->params, b->params, a->params_bytes) != 0) {
        fail_msg("%s: other parameters", flags);
    }
    free(a->params);
    free(b->params);
}

static const char *const all_flags[] = {
    "",
    "--moe-grouped-gemm --moe-token-dispatcher-type alltoall",
    "--moe-token-dispatcher-type alltoall --moe-expert-capacity-factor 1.0 "
    "--moe-pad-expert-input-to-capacity",
    "--moe-expert-capacity-factor 1.0 --moe-token-dispatcher-type alltoall",
    "--moe-router-load-balancing-type global_aux_loss",
    "--moe-router-load-balancing-type sinkhorn --moe-aux-loss-coeff 0",
    "--moe-router-score-function sigmoid --moe-router-enable-expert-bias",
    "--moe-shared-expert-intermediate-size 24 --swiglu --disable-bias-linear",
    "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
    "--reset-attention-mask --reset-position-ids --eod-mask-loss --moe-input-jitter-eps 0.01",
    "--calculate-per-token-loss --attention-dropout 0.1 --hidden-dropout 0.1",
    "--overlap-grad-reduce --use-distributed-optimizer --overlap-param-gather --global-batch-size "
    "8",
};

static void expect_the_same_a_step_later(const char *flags)
{
    struct outcome at_once, later;
    struct guarded_run run;

    guarded_run_open(&run, flags);
    train(&run, NUM_STEPS, 0, &at_once);
    guarded_run_close(&run);
    guarded_run_open(&run, flags);
    train(&run, NUM_STEPS, 1, &later);
    guarded_run_close(&run);
    expect_same(&at_once, &later, flags);
}

static void a_step_starts_while_the_last_one_runs(void **state)
{
    for (size_t i = 0; i < sizeof all_flags / sizeof all_flags[0]; i++) {
        expect_the_same_a_step_later(all_flags[i]);
    }
}

/* What the host has counted while capturing is counted no more when the graph runs. */
static void forget_capture(struct trainer *trainer)
{
    struct grad_buckets *buckets = &trainer->buckets;

    for (int chunk = 0; chunk < trainer->num_chunks; chunk++) {
        for (int i = 0; i < trainer->chunks[chunk].place.num_layers; i++) {
            trainer->chunks[chunk].layers[i].moe.router.balance.num_microbatches = 0;
        }
    }
    for (int i = 0; i < buckets->num_buckets; i++) {
        buckets->buckets[i].num_pending = buckets->buckets[i].end - buckets->buckets[i].begin;
    }
}

/* Issues the passes of all microbatches again: what a launch of their graph runs. */
static void replay_passes(void *context)
{
    struct trainer *trainer = context;
    struct batch_walk walk = {.trainer = trainer,
                              .num_microbatches = trainer->captured.num_microbatches,
                              .training = true};

    for (int i = 0; i < (int)walk.num_microbatches; i++) {
        trainer->microbatches[i].number = i;
    }
    forget_capture(trainer);
    if (captured_step_pass_all(&walk) != 0) {
        fail_msg("%s", error_text());
    }
    for (int i = 0; i < (int)walk.num_microbatches; i++) {
        trainer->microbatches[i].number = i; /* a graph knows nothing of places */
    }
}

static void train_captured(const char *flags, struct outcome *outcome)
{
    char text[512];
    struct guarded_run run;

    snprintf(text, sizeof text, "--cuda-graph-impl full_iteration --cuda-graph-warmup-steps 2 %s",
             flags);
    guarded_run_open(&run, text);
    guarded.replay = replay_passes;
    guarded.replay_context = &run.trainer;
    guarded.num_captures = guarded.num_launches = 0;
    train(&run, NUM_STEPS, 1, outcome);
    guarded_run_close(&run);
}

static void expect_the_same_captured(const char *flags)
{
    struct outcome plain, captured;
    struct guarded_run run;

    guarded_run_open(&run, flags);
    train(&run, NUM_STEPS, 0, &plain);
    guarded_run_close(&run);
    train_captured(flags, &captured);
    assert_int_equal(guarded.num_captures, 1);
    assert_int_equal(guarded.num_launches, NUM_STEPS - 2);
    expect_same(&plain, &captured, flags);
}

static void a_captured_step_is_the_same_step(void **state)
{
    for (size_t i = 0; i < sizeof all_flags / sizeof all_flags[0]; i++) {
        expect_the_same_captured(all_flags[i]);
    }
}

/* The batch grows from one microbatch to two and to three. */
static void another_number_of_microbatches_is_captured_anew(void **state)
{
    static const char flags[] = "--global-batch-size 6 --rampup-batch-size 2 2 12";
    struct outcome plain, captured;
    struct guarded_run run;

    guarded_run_open(&run, flags);
    train(&run, NUM_STEPS, 0, &plain);
    guarded_run_close(&run);
    assert_int_equal(plain.results[2].num_microbatches, 1);
    assert_int_equal(plain.results[NUM_STEPS - 1].num_microbatches, 3);
    train_captured(flags, &captured);
    assert_int_equal(guarded.num_captures, 3);
    assert_int_equal(guarded.num_launches, NUM_STEPS - 2);
    expect_same(&plain, &captured, flags);
}

/* Step 2's loss is not finite: it is an error of its own finish, after step 3 was started. */
static void a_nan_ends_the_run_a_step_later(void **state)
{
    struct guarded_run run;
    struct outcome outcome;
    struct step steps[3];

    guarded_run_open(&run, "--lr 1e10 --clip-grad 0");
    start(&run, &steps[0]);
    start(&run, &steps[1]);
    finish(&run, &steps[0], &outcome, 0);
    start(&run, &steps[2]);
    assert_int_equal(train_step_finish(&run.trainer, &steps[1]), -1);
    assert_string_equal(error_text(), "iteration 2: found NaN in local forward loss calculation "
                                      "(--no-check-for-nan-in-loss-and-grad goes on regardless)");
    train_step_free(&run.trainer, &steps[1]);
    train_step_free(&run.trainer, &steps[2]);
    guarded_run_close(&run);
}

/* The same sequences in one, two and four microbatches. */
static void the_loss_is_that_of_all_microbatches(void **state)
{
    static const char *const flags[] = {"--micro-batch-size 4", "--micro-batch-size 2",
                                        "--micro-batch-size 1"};
    struct step_result whole = {0};

    for (size_t i = 0; i < sizeof flags / sizeof flags[0]; i++) {
        struct step_result result;
        struct guarded_run run;

        guarded_run_open(&run, flags[i]);
        assert_int_equal(train_step(&run.trainer, run.data.train, &result), 0);
        guarded_run_close(&run);
        whole = i == 0 ? result : whole;
        assert_float_equal(result.num_tokens, whole.num_tokens, 0.0);
        assert_float_equal(result.loss_sum, whole.loss_sum, 1e-3 * whole.loss_sum);
    }
}

/* ---- a rank of several ---- */

enum { NUM_RANKS = 8 };

/* Where no host needs to know the routing. */
static const char *const all_mappings[] = {
    "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather",
    "--moe-router-load-balancing-type global_aux_loss --overlap-grad-reduce",
    "--calculate-per-token-loss",
    "--tensor-model-parallel-size 2 --sequence-parallel --expert-tensor-parallel-size 1",
    "--context-parallel-size 2 --cp-comm-type p2p",
    "--context-parallel-size 2 --cp-comm-type all_gather",
    "--context-parallel-size 2 --cp-comm-type a2a",
    "--pipeline-model-parallel-size 2",
    "--num-layers 4 --pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1 "
    "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather",
    "--expert-model-parallel-size 2 --moe-token-dispatcher-type alltoall "
    "--moe-expert-capacity-factor 1.0 --moe-pad-expert-input-to-capacity",
    "--tensor-model-parallel-size 2 --sequence-parallel --context-parallel-size 2 "
    "--pipeline-model-parallel-size 2 --expert-tensor-parallel-size 1",
};

static void flags_of(char text[512], const char *mapping)
{
    snprintf(text, 512, "--global-batch-size 32 --disable-bias-linear --swiglu %s", mapping);
}

static void a_rank_starts_a_step_while_the_last_one_runs(void **state)
{
    for (size_t i = 0; i < sizeof all_mappings / sizeof all_mappings[0]; i++) {
        char flags[512];

        flags_of(flags, all_mappings[i]);
        expect_the_same_a_step_later(flags);
    }
}

static void a_rank_s_captured_step_is_the_same_step(void **state)
{
    for (size_t i = 0; i < sizeof all_mappings / sizeof all_mappings[0]; i++) {
        char flags[512];

        flags_of(flags, all_mappings[i]);
        expect_the_same_captured(flags);
    }
}

/* For --log-comm a launch counts what its capture counted, and nothing is sent beside it that is
 * part of it: values that were gathered before the capture (for an evaluation) are stale before
 * each launch. */
static void expect_launches_count(const char *mapping)
{
    const size_t count = (size_t)groups_num_comms() * NUM_COMM_KINDS;
    struct comm_counter *counters = calloc(2 * count, sizeof *counters);
    char flags[512];
    struct guarded_run run;

    assert_non_null(counters);
    snprintf(flags, sizeof flags,
             "--global-batch-size 32 --disable-bias-linear --cuda-graph-impl full_iteration "
             "--cuda-graph-warmup-steps 2 %s",
             mapping);
    guarded_run_open(&run, flags);
    guarded.replay = NULL;
    for (int i = 0; i < 5; i++) {
        struct comm_counter *seen = counters + (i > 2 ? count : 0);
        struct step_result result;

        if (i == 2) {
            param_gather_finish(&run.trainer.buckets);
        }
        groups_reset_counters(&run.trainer.groups);
        assert_int_equal(train_step(&run.trainer, run.data.train, &result), 0);
        groups_read_counters(&run.trainer.groups, seen);
        if (i > 2) {
            assert_memory_equal(seen, counters, count * sizeof *seen);
        }
        if (i >= 2 && run.options.overlap_param_gather) {
            assert_true(run.trainer.groups.dp_cp->counters[COMM_ALL_GATHER].num_calls > 0);
        }
    }
    guarded_run_close(&run);
    free(counters);
}

static void a_launch_counts_what_it_moves(void **state)
{
    expect_launches_count("--tensor-model-parallel-size 2 --sequence-parallel "
                          "--expert-tensor-parallel-size 1");
    expect_launches_count("--use-distributed-optimizer --overlap-grad-reduce "
                          "--overlap-param-gather");
}

/* In a process of its own, which is that rank for good. Returns whether something failed. */
static bool fails_as_rank(const char *rank)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_rank_starts_a_step_while_the_last_one_runs),
        cmocka_unit_test(a_rank_s_captured_step_is_the_same_step),
        cmocka_unit_test(a_launch_counts_what_it_moves),
    };
    const pid_t child = fork();
    char size[16];
    int status = 0;

    if (child == 0) {
        snprintf(size, sizeof size, "%d", NUM_RANKS);
        setenv("WORLD_SIZE", size, 1);
        setenv("RANK", rank, 1);
        exit(launch_emulate() != 0 || cmocka_run_group_tests(tests, NULL, NULL) != 0);
    }
    return child < 0 || waitpid(child, &status, 0) != child || !WIFEXITED(status) ||
           WEXITSTATUS(status) != 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(the_loss_is_that_of_all_microbatches),
        cmocka_unit_test(a_step_starts_while_the_last_one_runs),
        cmocka_unit_test(a_captured_step_is_the_same_step),
        cmocka_unit_test(another_number_of_microbatches_is_captured_anew),
        cmocka_unit_test(a_nan_ends_the_run_a_step_later),
    };

    const bool rank_failed = fails_as_rank("0") | fails_as_rank("7");

    return cmocka_run_group_tests(tests, NULL, NULL) != 0 || rank_failed;
}
