/* intervals.h - how much of one kind of work runs beside another: lengths of sets of intervals of
 * time, in any unit. */
#ifndef CADRE_OPS_INTERVALS_H
#define CADRE_OPS_INTERVALS_H

struct interval {
    double begin, end;
};

/* Sorts them and joins those that meet; returns how many are left, at the beginning of the array.
 */
int intervals_join(struct interval *intervals, int count);
/* Of joined intervals. */
double intervals_length(const struct interval *joined, int count);
/* Of what two joined sets have in common. */
double intervals_common_length(const struct interval *a, int num_a, const struct interval *b,
                               int num_b);

#endif
