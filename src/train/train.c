#include "train/train.h"

#include <stdlib.h>
#include <string.h>

#include "base/check.h"
#include "base/clock.h"
#include "base/log.h"
#include "comm/comm_nccl.h"
#include "comm/launch.h"
#include "device/device_select.h"
#include "ops/ops.h"
#include "train/comm_log.h"
#include "train/evaluate.h"
#include "train/exit_signal.h"
#include "train/memory_report.h"
#include "train/model_setup.h"
#include "train/profile.h"
#include "train/run_data.h"
#include "train/train_checkpoint.h"
#include "train/training_log.h"
#include "train/upcycle.h"

/* One run of the command. */
struct training_run {
    const struct options *options;
    struct trainer trainer;
    struct run_data data;
    struct training_log log;
    /* The steps [num_logged, num_started) of this run are under way; the one at i is steps[i % 2].
     */
    struct step steps[2];
    int64_t num_started, num_logged;
    int64_t num_iterations;
    int64_t last_saved; /* iteration of the newest checkpoint; -1: none by this run */
    double started_at;
    bool memory_reported;
    struct profile profile;
};

static void log_datetime(const char *what)
{
    const time_t now = time(NULL);
    struct tm local;
    char text[32];

    localtime_r(&now, &local);
    strftime(text, sizeof text, "%Y-%m-%d %H:%M:%S", &local);
    log_info("[%s] datetime: %s ", what, text);
}

static int report_missing(const struct options *options)
{
    if (options->load == NULL) {
        return 0;
    }
    if (options->exit_on_missing_checkpoint) {
        return error_set("--load %s holds no checkpoint, and --exit-on-missing-checkpoint is set",
                         options->load);
    }
    log_warn("could not find the metadata file %s/latest_checkpointed_iteration.txt",
             options->load);
    log_info("    will not load any checkpoints and will start from random");
    return 0;
}

static int load_checkpoint(struct training_run *run)
{
    char path[PATH_LENGTH_MAX];
    struct checkpoint_ranks ranks;
    struct checkpoint *checkpoint;
    int result;

    switch (train_checkpoint_find(&run->trainer, path)) {
    case CHECKPOINT_ERROR:
        return -1;
    case CHECKPOINT_NONE:
        return report_missing(run->options);
    case CHECKPOINT_FOUND:
        break;
    }
    ranks = checkpoint_ranks_of(run->trainer.groups.world);
    checkpoint = checkpoint_open(path, &ranks);
    if (checkpoint == NULL) {
        return -1;
    }
    result = run->options->moe_use_upcycling ? upcycle_restore(&run->trainer, checkpoint)
                                             : train_checkpoint_restore(&run->trainer, checkpoint);
    checkpoint_close(checkpoint);
    if (result != 0) {
        return error_prepend("loading %s", path);
    }
    log_info("  successfully loaded checkpoint from %s at iteration %lld", path,
             (long long)run->trainer.iteration);
    return 0;
}

/* After the first step: what the arenas really held, to be compared with the report made before. */
static void report_memory_once(struct training_run *run, int64_t iteration)
{
    const struct trainer *trainer = &run->trainer;
    size_t used, peak;

    trainer_memory_bytes(trainer, &used, &peak);

    if (!run->memory_reported) {
        run->memory_reported = true;
        log_info("[Rank 0] (after %lld iterations) memory (MB) | allocated: %.1f | max allocated: "
                 "%.1f",
                 (long long)iteration, (double)used / 1e6, (double)peak / 1e6);
    }
}

/* How many steps the host is behind the one that it has issued last. Where the device works on its
 * own, the figures of a step are read while the next one runs; not where a flag asks for figures
 * that the next step would change. */
static int num_steps_behind(const struct training_run *run)
{
    const struct options *o = run->options;
    const bool waits = o->timing_log_level > 0 || o->log_params_norm || o->log_num_zeros_in_grad;

    return run->trainer.stream->device->kind == DEVICE_CUDA && !waits ? 1 : 0;
}

/* Until at most num_left are under way. */
static int log_steps(struct training_run *run, int num_left)
{
    while (run->num_started - run->num_logged > num_left) {
        struct step *step = &run->steps[run->num_logged % 2];

        TRY(train_step_finish(&run->trainer, step));
        training_log_step(&run->log, &step->result);
        report_memory_once(run, step->result.iteration);
        train_step_free(&run->trainer, step);
        run->num_logged++;
    }
    return 0;
}

/* A step that cannot start comes after those before it have had their say. */
static int start_step(struct training_run *run)
{
    struct step *step = &run->steps[run->num_started % 2];

    if (train_step_start(&run->trainer, run->data.train, step) != 0) {
        TRY(log_steps(run, 0));
        return -1;
    }
    train_step_read_metrics(&run->trainer, step);
    run->num_started++;
    return 0;
}

static int save_checkpoint(struct training_run *run)
{
    struct timers *timers = &run->trainer.timers;

    if (run->options->save == NULL || run->last_saved == run->trainer.iteration) {
        return 0;
    }
    TRY(log_steps(run, 0));
    progress_clear();
    timers_stop(timers, "interval-time", 0); /* a save is not time spent training */
    timers_start(timers, "save-checkpoint", 0);
    TRY(train_checkpoint_save(&run->trainer));
    timers_stop(timers, "save-checkpoint", 0);
    timers_start(timers, "interval-time", 0);
    progress_resume(&run->log.progress);
    run->last_saved = run->trainer.iteration;
    return 0;
}

/* Upcycling writes iteration 0 and starts there: it must not bury what an earlier run has trained.
 */
static int check_upcycling_target(const struct options *options)
{
    char path[PATH_LENGTH_MAX];

    if (!options->moe_use_upcycling) {
        return 0;
    }
    switch (checkpoint_find(options->save, -1, path)) {
    case CHECKPOINT_FOUND:
        return error_set("--moe-use-upcycling: --save %s holds a checkpoint already (%s); to go on "
                         "training it, drop the flag and --load it",
                         options->save, path);
    case CHECKPOINT_ERROR:
        return -1;
    default:
        return 0;
    }
}

/* Loads, or upcycles and saves at once: M8.10. */
static int restore(struct training_run *run)
{
    TRY(check_upcycling_target(run->options));
    timers_start(&run->trainer.timers, "load-checkpoint", 0);
    TRY(load_checkpoint(run));
    timers_stop(&run->trainer.timers, "load-checkpoint", 0);
    return run->options->moe_use_upcycling ? train_checkpoint_save(&run->trainer) : 0;
}

static void report_model(const struct training_run *run)
{
    const struct model_config *config = &run->trainer.config;

    log_info(" > padded vocab (size: %lld) with %lld dummy tokens (new size: %lld)",
             (long long)config->vocab_size,
             (long long)(config->padded_vocab_size - config->vocab_size),
             (long long)config->padded_vocab_size);
    log_info(" > number of parameters on (tensor, pipeline) model parallel rank (0, 0): %lld",
             (long long)param_list_num_local(&run->trainer.params));
}

/* Rank 0 builds the index files, the others wait and read them. */
static int open_data(struct training_run *run)
{
    struct trainer *trainer = &run->trainer;
    const struct comm *world = trainer->groups.world;
    const struct run_data_request request = {.options = run->options,
                                             .data_parallel_rank = trainer->groups.dp->rank,
                                             .num_iterations = run->num_iterations,
                                             .consumed_samples = trainer->consumed_samples,
                                             .consumed_valid_samples =
                                                 trainer->consumed_valid_samples};

    if (world->rank == 0) {
        TRY(run_data_open_sets(&run->data, &request));
    }
    trainer_barrier(trainer);
    if (world->rank != 0) {
        TRY(run_data_open_sets(&run->data, &request));
    }
    return run_data_open_loaders(&run->data, &request);
}

static int set_up(struct training_run *run)
{
    const struct options *options = run->options;
    const struct device *device = device_select(options->device, launch_local_rank());
    const struct ops *ops = device != NULL ? ops_for(device) : NULL;
    struct memory_report memory;
    int64_t vocab_size;

    if (ops == NULL) {
        return -1;
    }
    TRY(run_data_open_tokenizer(&run->data, options));
    vocab_size = tokenizer_vocab_size(run->data.tokenizer);
    TRY(memory_report_compute(&memory, options, vocab_size));
    memory_report_print(&memory);
    if (strcmp(options->distributed_backend, "nccl") == 0) {
        comm_nccl_choose(device);
    }
    TRY(trainer_create(&run->trainer, options, vocab_size, device, ops,
                       &(struct trainer_memory){.run_bytes = memory.run_bytes,
                                                .slot_bytes = memory.slot_bytes,
                                                .boundary_bytes = memory.boundary_bytes,
                                                .scratch_bytes = memory.scratch_bytes}));
    report_model(run);
    TRY(restore(run));
    run->num_iterations = training_num_iterations(options, &run->trainer.batch_size);
    log_datetime("after model, optimizer, and learning rate scheduler are built");
    TRY(open_data(run));
    log_datetime("after dataloaders are built");
    log_info("done with setup ...");
    return 0;
}

static int run_evaluation(struct training_run *run, struct loader *loader, const char *where)
{
    struct trainer *trainer = &run->trainer;
    double loss;

    if (loader == NULL || run->options->eval_iters == 0) {
        return 0;
    }
    TRY(log_steps(run, 0));
    progress_clear();
    timers_stop(&trainer->timers, "interval-time", 0);
    timers_start(&trainer->timers, "eval-time", 0);
    log_info("Evaluating on %lld samples",
             (long long)(run->options->eval_iters * run->options->global_batch_size));
    TRY(evaluate(trainer, loader, run->options->eval_iters, &loss));
    timers_stop(&trainer->timers, "eval-time", 0);
    timers_start(&trainer->timers, "interval-time", 0);
    training_log_validation(&run->log, where, loss);
    return 0;
}

static int evaluate_if_due(struct training_run *run)
{
    struct trainer *trainer = &run->trainer;
    char where[64];

    if (run->options->eval_interval == 0 || trainer->iteration % run->options->eval_interval != 0) {
        return 0;
    }
    snprintf(where, sizeof where, "iteration %lld", (long long)trainer->iteration);
    TRY(run_evaluation(run, run->data.valid, where));
    if (run->data.valid != NULL) {
        trainer->consumed_valid_samples +=
            run->options->eval_iters * run->options->global_batch_size;
    }
    return 0;
}

static int save_if_due(struct training_run *run)
{
    if (run->options->save_interval == 0 ||
        run->trainer.iteration % run->options->save_interval != 0) {
        return 0;
    }
    return save_checkpoint(run);
}

static double minutes_since_start(const struct training_run *run)
{
    return (clock_seconds() - run->started_at) / 60.0;
}

struct exit_reasons {
    bool signalled, out_of_time;
};

/* A rank's signal and its clock are its own; but all ranks must leave after the same iteration. */
static struct exit_reasons exit_reasons_of_any_rank(const struct training_run *run)
{
    const struct options *options = run->options;
    const double limit = (double)options->exit_duration_in_mins;
    double reasons[2] = {0.0, 0.0};

    if (!options->exit_signal_handler && limit == 0.0) {
        return (struct exit_reasons){false, false};
    }
    reasons[0] = options->exit_signal_handler && exit_signal_received();
    reasons[1] = limit > 0.0 && minutes_since_start(run) > limit;
    trainer_sum(&run->trainer, run->trainer.groups.world, reasons, 2);
    return (struct exit_reasons){reasons[0] > 0.0, reasons[1] > 0.0};
}

/* Does a flag end the run here (M8.8)? Saves first. */
static int exit_if_due(struct training_run *run, bool *leave)
{
    const struct options *options = run->options;
    const struct exit_reasons reasons = exit_reasons_of_any_rank(run);
    const bool at_interval =
        options->exit_interval > 0 && run->trainer.iteration % options->exit_interval == 0;

    *leave = reasons.signalled || reasons.out_of_time || at_interval;
    if (!*leave) {
        return 0;
    }
    TRY(log_steps(run, 0));
    TRY(save_checkpoint(run));
    if (reasons.signalled) {
        log_info("exiting program after receiving SIGTERM.");
    } else if (reasons.out_of_time) {
        log_info("exiting program after %.1f minutes", minutes_since_start(run));
    } else {
        log_info("exiting program at iteration %lld", (long long)run->trainer.iteration);
    }
    return 0;
}

static bool comm_log_is_due(const struct training_run *run)
{
    return run->options->log_comm && run->trainer.iteration % run->options->log_interval == 0;
}

static int training_loop(struct training_run *run, bool *left)
{
    const int num_behind = num_steps_behind(run);

    *left = false;
    while (run->trainer.iteration < run->num_iterations && !*left) {
        groups_reset_counters(&run->trainer.groups);
        profile_before_step(&run->profile, &run->trainer);
        TRY(start_step(run));
        TRY(log_steps(run, 1));
        TRY(profile_after_step(&run->profile, &run->trainer));
        if (comm_log_is_due(run)) {
            comm_log_step(&run->trainer);
        }
        TRY(log_steps(run, num_behind));
        TRY(evaluate_if_due(run));
        TRY(save_if_due(run));
        TRY(exit_if_due(run, left));
    }
    TRY(log_steps(run, 0));
    return profile_finish(&run->profile, &run->trainer);
}

static int evaluate_at_end(struct training_run *run)
{
    char where[96];

    snprintf(where, sizeof where, "iteration %lld on validation set",
             (long long)run->trainer.iteration);
    TRY(run_evaluation(run, run->data.valid, where));
    snprintf(where, sizeof where, "iteration %lld on test set", (long long)run->trainer.iteration);
    return run_evaluation(run, run->data.test, where);
}

static int train_and_evaluate(struct training_run *run)
{
    bool left = false;

    if (!run->options->skip_train && run->data.train != NULL) {
        log_info("training ...");
        log_datetime("before the start of training step");
        TRY(training_loop(run, &left));
        log_datetime("after training is done");
        if (!left) {
            TRY(save_checkpoint(run));
        }
    }
    return left ? 0 : evaluate_at_end(run);
}

int train(const struct options *options)
{
    struct training_run run = {.options = options, .last_saved = -1};
    int result;

    run.started_at = clock_seconds();
    ops_cpu_set_num_threads((int)options->num_threads);
    if (options->exit_signal_handler) {
        exit_signal_install();
    }
    result = set_up(&run);
    if (result == 0) {
        run.last_saved = run.trainer.iteration > 0 ? run.trainer.iteration : -1;
        result = training_log_open(&run.log, &run.trainer, run.num_iterations);
    }
    if (result == 0) {
        result = train_and_evaluate(&run);
    }
    training_log_close(&run.log);
    if (result != 0 && launch_size() > 1 && !launch_is_emulated()) {
        return result; /* to take groups down is to wait for ranks that may never come to it */
    }
    for (; run.num_logged < run.num_started; run.num_logged++) { /* after an error */
        train_step_free(&run.trainer, &run.steps[run.num_logged % 2]);
    }
    run_data_close(&run.data);
    trainer_destroy(&run.trainer);
    return result;
}
