#include "train/training_log.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/check.h"
#include "base/log.h"
#include "optim/grad_norm.h"
#include "train/model_setup.h"

enum { TENSORBOARD_QUEUE = 1000 };

/* The options as TensorBoard's text, one `name: value` a line. */
static void write_args(struct training_log *log)
{
    json_t *args = options_to_json(log->trainer->options);
    const char *name;
    json_t *value;

    json_object_foreach(args, name, value)
    {
        char *text = json_dumps(value, JSON_ENCODE_ANY);

        tensorboard_text(log->board, name, text, log->trainer->iteration);
        free(text);
    }
    json_decref(args);
}

int training_log_open(struct training_log *log, struct trainer *trainer, int64_t num_iterations)
{
    const struct options *options = trainer->options;

    *log = (struct training_log){.trainer = trainer, .num_iterations = num_iterations};
    if (options->tensorboard_dir != NULL && trainer->groups.world->rank == 0) {
        log->board = tensorboard_open(options->tensorboard_dir, TENSORBOARD_QUEUE, NULL);
        if (log->board == NULL) {
            return -1;
        }
        write_args(log);
    }
    progress_begin(&log->progress, trainer->iteration, num_iterations, "tok");
    timers_start(&trainer->timers, "interval-time", 0);
    return 0;
}

void training_log_close(struct training_log *log)
{
    progress_clear();
    tensorboard_close(log->board);
    log->board = NULL;
}

/* Both the scalar over iterations and the one over samples. */
static void scalar(struct training_log *log, const struct step_result *result, const char *name,
                   double value)
{
    char by_samples[96];

    if (log->board == NULL ||
        result->iteration % log->trainer->options->tensorboard_log_interval != 0) {
        return;
    }
    snprintf(by_samples, sizeof by_samples, "%s vs samples", name);
    tensorboard_scalar(log->board, name, value, result->iteration);
    tensorboard_scalar(log->board, by_samples, value, result->consumed_samples);
}

static void log_layers(struct training_log *log, const struct step_result *result,
                       enum moe_metric metric, const float *values, double scale)
{
    for (int layer = 0; layer < log->trainer->config.num_layers; layer++) {
        char name[96];

        if (log->trainer->config.is_moe_layer[layer]) {
            snprintf(name, sizeof name, "moe/%s_layer_%d", moe_metric_name(metric), layer);
            tensorboard_scalar(log->board, name, (double)values[layer] * scale, result->iteration);
        }
    }
}

/* Mean over the MoE layers and the microbatches. */
static void log_moe_metric(struct training_log *log, const struct step_result *result,
                           enum moe_metric metric)
{
    const struct trainer *trainer = log->trainer;
    const int num_layers = trainer->config.num_layers;
    const float *values = result->moe_metrics + metric * num_layers;
    const double scale = 1.0 / (double)result->num_microbatches;
    double mean = 0.0;

    for (int layer = 0; layer < num_layers; layer++) {
        mean += (double)values[layer] * scale;
    }
    mean /= fmax(1.0, (double)model_config_num_moe_layers(&trainer->config));
    log->loss_sums[1 + metric] += mean;
    log->seen[1 + metric] = true;
    tensorboard_scalar(log->board, moe_metric_name(metric), mean, result->iteration);
    if (trainer->options->moe_per_layer_logging) {
        log_layers(log, result, metric, values, scale);
    }
}

static void log_scalars(struct training_log *log, const struct step_result *result,
                        double params_norm_value)
{
    const struct options *options = log->trainer->options;

    scalar(log, result, "learning-rate", result->learning_rate);
    scalar(log, result, "batch-size", (double)result->num_samples);
    scalar(log, result, "lm loss", result->loss_sum / fmax(result->num_tokens, 1.0));
    if (options->log_loss_scale_to_tensorboard) {
        scalar(log, result, "loss-scale", 1.0);
    }
    if (options->log_world_size_to_tensorboard) {
        scalar(log, result, "world-size", (double)options->world_size);
    }
    scalar(log, result, "grad-norm", result->grad_norm);
    if (options->log_num_zeros_in_grad) {
        scalar(log, result, "num-zeros", result->num_zeros);
    }
    if (options->log_params_norm) {
        scalar(log, result, "params-norm", params_norm_value);
    }
    if (options->log_memory_to_tensorboard && log->board != NULL) {
        size_t used, peak;

        trainer_memory_bytes(log->trainer, &used, &peak);
        tensorboard_scalar(log->board, "mem-allocated-bytes", (double)peak, result->iteration);
    }
}

static int collect_losses(const struct training_log *log, struct named_loss *losses)
{
    int count = 0;

    losses[count++] = (struct named_loss){"lm loss", log->loss_sums[0] / (double)log->num_advanced};
    for (int m = 0; m < NUM_MOE_METRICS; m++) {
        if (log->seen[1 + m]) {
            losses[count++] =
                (struct named_loss){moe_metric_name((enum moe_metric)m),
                                    log->loss_sums[1 + m] / (double)log->num_advanced};
        }
    }
    return count;
}

/* The timers of levels 1 and 2, which come after those of level 0: what a step is made of. */
static void log_timers(struct training_log *log, int64_t iteration)
{
    struct trainer *trainer = log->trainer;
    const struct comm *world = trainer->groups.world;
    enum timing_log_option option;
    double *seconds = calloc((size_t)world->size * TIMERS_MAX, sizeof *seconds);
    int first = 0;
    struct timer_report report;
    char *text;

    CHECK(seconds != NULL, "out of memory");

    while (strcmp(timer_names[first], "forward-backward") != 0) {
        first++;
    }
    report = (struct timer_report){.names = timer_names + first,
                                   .num_names = num_timer_names - first,
                                   .num_ranks = world->size,
                                   .seconds = seconds,
                                   .num_spans = log->num_advanced};
    timers_read(&trainer->timers, report.names, report.num_names, true,
                seconds + (ptrdiff_t)world->rank * report.num_names);
    trainer_sum(trainer, trainer->groups.world, seconds, world->size * report.num_names);
    CHECK(timing_log_option_parse(log->trainer->options->timing_log_option, &option) == 0,
          "timing option");
    text = timer_report_format(&report, option);
    if (text != NULL) {
        log_info("%s", text);
        free(text);
    }
    if (trainer->options->log_timers_to_tensorboard) {
        timer_report_to_tensorboard(&report, log->board, iteration);
    }
    free(seconds);
}

/* FLOPs by the seed's formula over the interval's time: docs/numerics.md names it. */
static double throughput_tflops(const struct training_log *log, const struct step_result *result,
                                double seconds)
{
    const struct flops_sizes sizes =
        flops_sizes_from_config(&log->trainer->config, result->num_samples);

    return flops_per_step_seed(&sizes) / seconds / 1e12 / (double)log->trainer->options->world_size;
}

static void print_line(struct training_log *log, const struct step_result *result,
                       double params_norm_value)
{
    struct trainer *trainer = log->trainer;
    const double seconds =
        timers_elapsed(&trainer->timers, "interval-time", true) / (double)log->num_advanced;
    struct named_loss losses[LOG_LOSSES_MAX];
    char *text;

    text = iteration_line_format(&(struct iteration_line){
        .now = time(NULL),
        .iteration = result->iteration,
        .num_iterations = log->num_iterations,
        .consumed_samples = result->consumed_samples,
        .skipped_samples = result->skipped_samples,
        .elapsed_ms = seconds * 1e3,
        .has_throughput = trainer->options->log_throughput,
        .throughput_tflops = throughput_tflops(log, result, seconds),
        .learning_rate = result->learning_rate,
        .global_batch_size = result->num_samples,
        .losses = losses,
        .num_losses = collect_losses(log, losses),
        .loss_scale = 1.0,
        .has_grad_norm = true,
        .grad_norm = result->grad_norm,
        .has_num_zeros = trainer->options->log_num_zeros_in_grad,
        .num_zeros = result->num_zeros,
        .has_params_norm = trainer->options->log_params_norm,
        .params_norm = params_norm_value,
        .num_nan_iterations = log->num_nan,
    });
    progress_clear();
    log_info("%s", text);
    free(text);
    if (log->board != NULL) {
        tensorboard_scalar(log->board, "iteration-time", seconds, result->iteration);
        tensorboard_scalar(log->board, "throughput", throughput_tflops(log, result, seconds),
                           result->iteration);
    }
    log_timers(log, result->iteration);
    tensorboard_flush(log->board);
}

static void start_interval(struct training_log *log)
{
    memset(log->loss_sums, 0, sizeof log->loss_sums);
    memset(log->seen, 0, sizeof log->seen);
    log->num_advanced = 0;
    log->num_nan = 0;
}

void training_log_step(struct training_log *log, const struct step_result *result)
{
    struct trainer *trainer = log->trainer;
    const double loss = result->loss_sum / fmax(result->num_tokens, 1.0);
    const bool line_is_due = result->iteration % trainer->options->log_interval == 0;
    double norm = 0.0;
    char note[PROGRESS_NOTE_BYTES];

    log->num_advanced++;
    log->num_nan += result->is_nan;
    log->loss_sums[0] += loss;
    for (int m = 0; m < NUM_MOE_METRICS; m++) {
        if (result->moe_metrics != NULL && result->has_metric[m]) {
            log_moe_metric(log, result, (enum moe_metric)m);
        }
    }
    if (trainer->options->log_params_norm &&
        (line_is_due || trainer->options->tensorboard_dir != NULL)) {
        norm =
            params_norm(&trainer->optimizer, &trainer->groups, trainer->stream, trainer->scratch);
    }
    log_scalars(log, result, norm);
    if (line_is_due) {
        print_line(log, result, norm);
        start_interval(log);
    }
    snprintf(note, sizeof note, "loss %.3f", loss);
    progress_update(&log->progress, result->iteration,
                    result->num_samples * trainer->config.seq_length, note);
}

void training_log_validation(struct training_log *log, const char *where, double loss)
{
    const struct named_loss named = {"lm loss", loss};
    char *text = validation_line_format(where, &named, 1);

    progress_clear();
    log_info("%s", text);
    free(text);
    if (log->board != NULL) {
        const struct trainer *trainer = log->trainer;

        tensorboard_scalar(log->board, "lm loss validation", loss, trainer->iteration);
        tensorboard_scalar(log->board, "lm loss validation vs samples", loss,
                           trainer->consumed_samples);
        if (trainer->options->log_validation_ppl_to_tensorboard) {
            tensorboard_scalar(log->board, "lm loss validation ppl", validation_perplexity(loss),
                               trainer->iteration);
            tensorboard_scalar(log->board, "lm loss validation ppl vs samples",
                               validation_perplexity(loss), trainer->consumed_samples);
        }
        tensorboard_flush(log->board);
    }
    progress_resume(&log->progress);
}
