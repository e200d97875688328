/* split.h - "969,30,1": which range of a data set's sequences is for training, validation, test. */
#ifndef CADRE_DATA_SPLIT_H
#define CADRE_DATA_SPLIT_H

#include <stdbool.h>
#include <stdint.h>

enum { SPLIT_TRAIN, SPLIT_VALID, SPLIT_TEST, NUM_SPLITS };

extern const char *const split_names[NUM_SPLITS];

struct split {
    /* Bounds of split i as fractions of the set: bounds[i] to bounds[i + 1]. */
    double bounds[NUM_SPLITS + 1];
};

/* text: up to three numbers >= 0, not all 0, with anything but digits and points between them. */
int split_parse(struct split *split, const char *text);
/* A share of 0 means that there is no such split. */
bool split_exists(const struct split *split, int which);
/* Its sequences [first, end) among num_sequences. */
void split_range(const struct split *split, int which, int64_t num_sequences, int64_t *first,
                 int64_t *end);

/* numpy's sum of doubles, to the last bit: shares and weights are divided by it, and the order of
 * samples hangs on the quotients. */
double numpy_sum(const double *values, int64_t count);

#endif
