/* Names, levels and formats: reference M11.4. */
#include "train/timers.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/check.h"
#include "base/clock.h"
#include "device/device.h"
#include "train/tensorboard.h"

enum { TAG_MAX_BYTES = 128 };

const char *const timer_names[] = {
    /* level 0 */
    "interval-time",
    "save-checkpoint",
    "load-checkpoint",
    "model-and-optimizer-setup",
    "train/valid/test-data-iterators-setup",
    "evaluate",
    "eval-time",
    /* level 1 */
    "forward-backward",
    "layernorm-grads-all-reduce",
    "embedding-grads-all-reduce",
    "all-grads-sync",
    "params-all-gather",
    "optimizer-copy-to-main-grad",
    "optimizer-unscale-and-check-inf",
    "optimizer-clip-main-grad",
    "optimizer-count-zeros",
    "optimizer-inner-step",
    "optimizer-copy-main-to-model-params",
    "optimizer",
    /* level 2 */
    "batch-generator",
    "forward-compute",
    "backward-compute",
    "forward-recv",
    "forward-send",
    "backward-recv",
    "backward-send",
    "forward-send-forward-recv",
    "forward-send-backward-recv",
    "backward-send-forward-recv",
    "backward-send-backward-recv",
    "forward-backward-send-forward-backward-recv",
};
const int num_timer_names = (int)(sizeof timer_names / sizeof timer_names[0]);

void timers_init(struct timers *timers, int log_level, double (*clock)(void))
{
    *timers = (struct timers){
        .log_level = log_level,
        .clock = clock != NULL ? clock : clock_seconds,
    };
}

void timers_wait_for(struct timers *timers, struct stream *stream)
{
    timers->stream = stream;
}

static void wait_for_work(const struct timers *timers, int level)
{
    if (level > 0 && timers->stream != NULL) {
        stream_wait(timers->stream);
    }
}

static struct timer *find_timer(struct timers *timers, const char *name)
{
    for (int i = 0; i < timers->num_timers; i++) {
        if (strcmp(timers->timer[i].name, name) == 0) {
            return &timers->timer[i];
        }
    }
    return NULL;
}

static struct timer *add_timer(struct timers *timers, const char *name, int level)
{
    struct timer *timer = &timers->timer[timers->num_timers];

    CHECK(timers->num_timers < TIMERS_MAX, "no room for timer %s", name);
    timers->num_timers++;
    *timer = (struct timer){.name = name, .level = level};
    return timer;
}

void timers_start(struct timers *timers, const char *name, int level)
{
    struct timer *timer;

    if (level > timers->log_level) {
        return;
    }
    timer = find_timer(timers, name);
    if (timer == NULL) {
        timer = add_timer(timers, name, level);
    }
    CHECK(timer->level == level, "timer %s has level %d, not %d", name, timer->level, level);
    CHECK(!timer->running, "timer %s runs already", name);
    wait_for_work(timers, level);
    timer->running = true;
    timer->started_at = timers->clock();
}

void timers_stop(struct timers *timers, const char *name, int level)
{
    struct timer *timer;

    if (level > timers->log_level) {
        return;
    }
    timer = find_timer(timers, name);
    CHECK(timer != NULL && timer->running, "timer %s was not started", name);
    wait_for_work(timers, level);
    timer->running = false;
    timer->seconds += timers->clock() - timer->started_at;
}

double timers_elapsed(struct timers *timers, const char *name, bool reset)
{
    struct timer *timer = find_timer(timers, name);
    double seconds, now;

    if (timer == NULL) {
        return 0;
    }
    now = timers->clock();
    seconds = timer->seconds + (timer->running ? now - timer->started_at : 0);
    if (reset) {
        timer->seconds = 0;
        timer->started_at = now;
    }
    return seconds;
}

void timers_read(struct timers *timers, const char *const *names, int num_names, bool reset,
                 double *seconds)
{
    for (int i = 0; i < num_names; i++) {
        seconds[i] = timers_elapsed(timers, names[i], reset);
    }
}

int timing_log_option_parse(const char *name, enum timing_log_option *option)
{
    if (strcmp(name, "minmax") == 0) {
        *option = TIMING_LOG_MINMAX;
    } else if (strcmp(name, "max") == 0) {
        *option = TIMING_LOG_MAX;
    } else if (strcmp(name, "all") == 0) {
        *option = TIMING_LOG_ALL;
    } else {
        return error_set("timing log option \"%s\" is not known; legal are minmax, max, all", name);
    }
    return 0;
}

/* Extremes over the ranks that ran the timer (a pipeline stage without it has 0). False if none. */
static bool rank_extremes(const struct timer_report *report, int name, double *min, double *max)
{
    *min = INFINITY;
    *max = 0;
    for (int rank = 0; rank < report->num_ranks; rank++) {
        const double seconds = report->seconds[rank * report->num_names + name];

        if (seconds > 0) {
            *min = fmin(*min, seconds / (double)report->num_spans);
            *max = fmax(*max, seconds / (double)report->num_spans);
        }
    }
    return *max > 0;
}

/* "name ......" to 48 columns. */
static void put_padded_name(FILE *out, const char *name)
{
    static const char dots[] = "................................................";
    const int length = (int)strlen(name) + 1;
    const int width = (int)sizeof dots - 1;

    fprintf(out, "\n    %s %s: ", name, length < width ? dots + length : "");
}

static bool put_extremes(FILE *out, const struct timer_report *report, bool max_only)
{
    bool any = false;

    fputs(max_only ? "max time across ranks (ms):" : "(min, max) time across ranks (ms):", out);
    for (int i = 0; i < report->num_names; i++) {
        double min, max;

        if (!rank_extremes(report, i, &min, &max)) {
            continue;
        }
        any = true;
        put_padded_name(out, report->names[i]);
        if (max_only) {
            fprintf(out, "%.2f", 1e3 * max);
        } else {
            fprintf(out, "(%.2f, %.2f)", 1e3 * min, 1e3 * max);
        }
    }
    return any;
}

static bool put_all_ranks(FILE *out, const struct timer_report *report)
{
    bool any = false;

    fputs("times across ranks (ms):", out);
    for (int i = 0; i < report->num_names; i++) {
        double min, max;

        if (!rank_extremes(report, i, &min, &max)) {
            continue;
        }
        any = true;
        fprintf(out, "\n  %s:", report->names[i]);
        for (int rank = 0; rank < report->num_ranks; rank++) {
            const double seconds = report->seconds[rank * report->num_names + i];

            if (seconds > 0) {
                fprintf(out, "\n     rank %2d: %.2f", rank,
                        1e3 * seconds / (double)report->num_spans);
            }
        }
    }
    return any;
}

char *timer_report_format(const struct timer_report *report, enum timing_log_option option)
{
    char *text = NULL;
    size_t length;
    FILE *out = open_memstream(&text, &length);
    bool any;

    CHECK(out != NULL, "out of memory");
    any = option == TIMING_LOG_ALL ? put_all_ranks(out, report)
                                   : put_extremes(out, report, option == TIMING_LOG_MAX);
    CHECK(fclose(out) == 0, "out of memory");
    if (!any) {
        free(text);
        return NULL;
    }
    return text;
}

void timer_report_to_tensorboard(const struct timer_report *report, struct tensorboard *board,
                                 int64_t step)
{
    for (int i = 0; i < report->num_names; i++) {
        char tag[TAG_MAX_BYTES];
        double min, max;

        if (rank_extremes(report, i, &min, &max)) {
            snprintf(tag, sizeof tag, "%s-time", report->names[i]);
            tensorboard_scalar(board, tag, max, step);
        }
    }
}
