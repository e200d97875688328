/* progress.h - one live line at the bottom of a terminal: how far, how fast, how long still.
 *
 *     12/500 [===>                    ]   2%  loss 3.214  12.3k tok/s  0:04:10 left
 *
 * It is on stderr, and only if stdout and stderr are both terminals; in a pipe or a file nothing
 * of it is seen. Call progress_clear before printing any other line; the next update draws it
 * again. A process has one such line. */
#ifndef CADRE_TRAIN_PROGRESS_H
#define CADRE_TRAIN_PROGRESS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { PROGRESS_NOTE_BYTES = 64 };

/* What the line shows. */
struct progress_view {
    int64_t num_done; /* iterations, documents */
    int64_t num_total;
    const char *note; /* "loss 3.214"; "" for none */
    double rate;      /* per second; 0 while not known */
    const char *rate_unit;
    double seconds_left; /* negative while not known */
};

struct progress {
    bool on;
    double (*clock)(void);
    struct progress_view view;
    char note[PROGRESS_NOTE_BYTES];
    double updated_at; /* of the last update that advanced */
    double drawn_at;
    double seconds_per_step; /* moving averages over updates; 0 before the first */
    double seconds_per_unit;
};

/* num_done steps of num_total lie behind already (a resumed run). rate_unit is what
 * progress_update counts as work: "tok", "docs". */
void progress_begin(struct progress *progress, int64_t num_done, int64_t num_total,
                    const char *rate_unit);
/* num_done steps are done now, and work units were done since the last update. Draws at most ten
 * times a second. */
void progress_update(struct progress *progress, int64_t num_done, int64_t work, const char *note);
/* Time since the last update counts as a pause (evaluation, a checkpoint), not as slow steps. */
void progress_resume(struct progress *progress);
/* Wipes the line if it is shown. */
void progress_clear(void);

/* The line of a terminal of so many columns, cut to columns - 1 characters; the bar takes what the
 * rest leaves. size is at least columns. */
void progress_format(char *line, size_t size, const struct progress_view *view, int columns);

#endif
