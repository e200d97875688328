/* The time left comes from an exponential moving average, so that it follows a change of speed
 * (batch ramp-up) yet does not jump with every step. */
#include "train/progress.h"

#include <math.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "base/clock.h"

enum { COLUMNS_DEFAULT = 80, LINE_MAX_BYTES = 512, BAR_MIN = 10, BAR_MAX = 40 };

static const double average_weight = 0.1; /* of the newest update */
static const double redraw_seconds = 0.1;

static bool line_is_shown; /* the terminal is one for the process, so its state is too */

static int terminal_columns(void)
{
    struct winsize window;

    if (ioctl(STDERR_FILENO, TIOCGWINSZ, &window) != 0 || window.ws_col == 0) {
        return COLUMNS_DEFAULT;
    }
    return window.ws_col < LINE_MAX_BYTES ? window.ws_col : LINE_MAX_BYTES;
}

/* Three digits and a unit: "950", "12.3k", "4.56M". */
static void format_rate(char *text, size_t size, double rate)
{
    static const char *const suffixes[] = {"", "k", "M", "G", "T"};
    int suffix = 0;

    while (rate >= 999.5 && suffix < 4) {
        rate /= 1000;
        suffix++;
    }
    snprintf(text, size, "%.*f%s", rate < 9.995 ? 2 : rate < 99.95 ? 1 : 0, rate, suffixes[suffix]);
}

static void format_time_left(char *text, size_t size, double seconds_left)
{
    const long long seconds = llround(fmin(seconds_left, 1e9));

    if (seconds >= 86400) {
        snprintf(text, size, "%lldd %02lldh left", seconds / 86400, seconds / 3600 % 24);
    } else {
        snprintf(text, size, "%lld:%02lld:%02lld left", seconds / 3600, seconds / 60 % 60,
                 seconds % 60);
    }
}

/* What follows the bar: "  2%  loss 3.214  12.3k tok/s  0:04:10 left". */
static void format_tail(char *tail, size_t size, const struct progress_view *view, double fraction)
{
    char rate[32] = "", unit[48] = "", left[32] = "";

    if (view->rate > 0) {
        format_rate(rate, sizeof rate, view->rate);
        snprintf(unit, sizeof unit, "  %s %s/s", rate, view->rate_unit);
    }
    if (view->seconds_left >= 0) {
        format_time_left(left, sizeof left, view->seconds_left);
    }
    /* Rounded down: 100% is for the end. */
    snprintf(tail, size, "%3d%%%s%s%s%s%s", (int)(100 * fraction),
             view->note[0] != '\0' ? "  " : "", view->note, unit, left[0] != '\0' ? "  " : "",
             left);
}

static void format_bar(char *bar, int width, double fraction)
{
    const int filled = (int)(fraction * width);

    memset(bar, ' ', (size_t)width);
    memset(bar, '=', (size_t)filled);
    if (filled < width) {
        bar[filled] = '>';
    }
    bar[width] = '\0';
}

void progress_format(char *line, size_t size, const struct progress_view *view, int columns)
{
    const double fraction = view->num_total > 0
                                ? fmin(1, fmax(0, (double)view->num_done / (double)view->num_total))
                                : 0;
    char head[64], tail[256], bar[BAR_MAX + 1];
    size_t room = (size_t)(columns > 1 ? columns : 1); /* the NUL in the last column's place */
    int width;

    snprintf(head, sizeof head, "%lld/%lld", (long long)view->num_done, (long long)view->num_total);
    format_tail(tail, sizeof tail, view, fraction);
    width = columns - 1 - (int)(strlen(head) + strlen(" [") + strlen("] ") + strlen(tail));
    room = room < size ? room : size;
    if (width < BAR_MIN) {
        snprintf(line, room, "%s %s", head, tail);
        return;
    }
    format_bar(bar, width < BAR_MAX ? width : BAR_MAX, fraction);
    snprintf(line, room, "%s [%s] %s", head, bar, tail);
}

void progress_begin(struct progress *progress, int64_t num_done, int64_t num_total,
                    const char *rate_unit)
{
    *progress = (struct progress){
        .on = isatty(STDOUT_FILENO) && isatty(STDERR_FILENO),
        .clock = clock_seconds,
        .view = {.num_done = num_done,
                 .num_total = num_total,
                 .note = "",
                 .rate_unit = rate_unit,
                 .seconds_left = -1},
    };
    progress->updated_at = progress->clock();
}

static double moving_average(double average, double newest)
{
    return average == 0 ? newest : average + average_weight * (newest - average);
}

static void measure(struct progress *progress, int64_t num_done, int64_t work, double now)
{
    const int64_t num_steps = num_done - progress->view.num_done;
    const double seconds = fmax(now - progress->updated_at, 1e-9);

    if (num_steps <= 0) {
        return;
    }
    progress->seconds_per_step =
        moving_average(progress->seconds_per_step, seconds / (double)num_steps);
    if (work > 0) {
        progress->seconds_per_unit =
            moving_average(progress->seconds_per_unit, seconds / (double)work);
        progress->view.rate = 1 / progress->seconds_per_unit;
    }
    progress->view.num_done = num_done;
    progress->view.seconds_left =
        progress->seconds_per_step * fmax(0, (double)(progress->view.num_total - num_done));
    progress->updated_at = now;
}

static void draw(const struct progress *progress)
{
    char line[LINE_MAX_BYTES];

    progress_format(line, sizeof line, &progress->view, terminal_columns());
    fprintf(stderr, "\r%s\033[K", line); /* K: erase what an earlier, longer line left */
    fflush(stderr);
    line_is_shown = true;
}

void progress_update(struct progress *progress, int64_t num_done, int64_t work, const char *note)
{
    double now;

    if (!progress->on) {
        return;
    }
    now = progress->clock();
    measure(progress, num_done, work, now);
    snprintf(progress->note, sizeof progress->note, "%s", note);
    progress->view.note = progress->note;
    if (!line_is_shown || now - progress->drawn_at >= redraw_seconds) {
        draw(progress);
        progress->drawn_at = now;
    }
}

void progress_resume(struct progress *progress)
{
    progress->updated_at = progress->clock();
}

void progress_clear(void)
{
    if (line_is_shown) {
        fputs("\r\033[K", stderr);
        fflush(stderr);
        line_is_shown = false;
    }
}
