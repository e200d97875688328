/* timers.h - named timers and the block of times in the log (--timing-log-level 0..2,
 * --timing-log-option).
 *
 *     timers_start(timers, "forward-backward", 1);     does nothing if the log level is 0
 *     timers_stop(timers, "forward-backward", 1);
 *     timers_read(timers, names, num_names, true, seconds);
 *     text = timer_report_format(&(struct timer_report){names, num_names, ...}, option);
 *
 * Times are kept by rank: with several, gather the arrays that timers_read gives and report them
 * together. All ranks then read the same names, in the same order. */
#ifndef CADRE_TRAIN_TIMERS_H
#define CADRE_TRAIN_TIMERS_H

#include <stdbool.h>
#include <stdint.h>

struct stream;

enum { TIMERS_MAX = 64, TIMER_LEVEL_MAX = 2 };

struct timer {
    const char *name;  /* not copied: a literal */
    int level;         /* logged from this log level on */
    double seconds;    /* finished spans since the last reset */
    double started_at; /* of the running span */
    bool running;
};

struct timers {
    int log_level;
    double (*clock)(void); /* monotonic seconds */
    struct stream *stream; /* of timers_wait_for, or NULL */
    int num_timers;
    struct timer timer[TIMERS_MAX];
};

/* clock NULL is clock_seconds. A timer above log_level costs a comparison and is never kept.
 */
void timers_init(struct timers *timers, int log_level, double (*clock)(void));
/* Before a span of level 1 or 2 begins and ends the host waits for the work issued to the stream:
 * what the span times is the device's work in it. */
void timers_wait_for(struct timers *timers, struct stream *stream);
/* A name always comes with the same level. Spans of one name add up and do not nest. */
void timers_start(struct timers *timers, const char *name, int level);
void timers_stop(struct timers *timers, const char *name, int level);
/* Seconds of one timer so far, a running span included; 0 for a name never started. With reset it
 * counts from here on. */
double timers_elapsed(struct timers *timers, const char *name, bool reset);
/* timers_elapsed of each name. */
void timers_read(struct timers *timers, const char *const *names, int num_names, bool reset,
                 double *seconds);

/* All names of the reference, in its order of logging. */
extern const char *const timer_names[];
extern const int num_timer_names;

enum timing_log_option { TIMING_LOG_MINMAX, TIMING_LOG_MAX, TIMING_LOG_ALL };

/* "minmax", "max" or "all"; -1 with error_set() otherwise. */
int timing_log_option_parse(const char *name, enum timing_log_option *option);

struct timer_report {
    const char *const *names;
    int num_names;
    int num_ranks;
    const double *seconds; /* [num_ranks, num_names] */
    int64_t num_spans;     /* times are divided by it: the iterations of the log interval */
};

/* The block of times in ms without the last newline; NULL if all are 0. The caller frees. */
char *timer_report_format(const struct timer_report *report, enum timing_log_option option);

struct tensorboard;
/* The slowest rank's seconds per span of each name, as the scalar "NAME-time". */
void timer_report_to_tensorboard(const struct timer_report *report, struct tensorboard *board,
                                 int64_t step);

#endif
