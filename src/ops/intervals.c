#include "ops/intervals.h"

#include <math.h>
#include <stdlib.h>

static int by_begin(const void *a, const void *b)
{
    const struct interval *x = a, *y = b;

    return (x->begin > y->begin) - (x->begin < y->begin);
}

int intervals_join(struct interval *intervals, int count)
{
    int num_joined = 0;

    qsort(intervals, (size_t)count, sizeof *intervals, by_begin);
    for (int i = 0; i < count; i++) {
        if (num_joined > 0 && intervals[i].begin <= intervals[num_joined - 1].end) {
            struct interval *last = &intervals[num_joined - 1];

            last->end = fmax(last->end, intervals[i].end);
        } else {
            intervals[num_joined++] = intervals[i];
        }
    }
    return num_joined;
}

double intervals_length(const struct interval *joined, int count)
{
    double length = 0.0;

    for (int i = 0; i < count; i++) {
        length += joined[i].end - joined[i].begin;
    }
    return length;
}

double intervals_common_length(const struct interval *a, int num_a, const struct interval *b,
                               int num_b)
{
    double length = 0.0;

    for (int i = 0, j = 0; i < num_a && j < num_b;) {
        length += fmax(0.0, fmin(a[i].end, b[j].end) - fmax(a[i].begin, b[j].begin));
        if (a[i].end < b[j].end) {
            i++;
        } else {
            j++;
        }
    }
    return length;
}
