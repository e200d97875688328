#include "data/split.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/check.h"

const char *const split_names[NUM_SPLITS] = {"train", "valid", "test"};

/* numpy adds eight running sums when there are eight values or more, and halves longer arrays. */
double numpy_sum(const double *values, int64_t count)
{
    double sums[8];
    int64_t i;

    if (count < 8) {
        double sum = -0.0;

        for (i = 0; i < count; i++) {
            sum += values[i];
        }
        return sum;
    }
    if (count > 128) {
        const int64_t half = count / 2 - count / 2 % 8;

        return numpy_sum(values, half) + numpy_sum(values + half, count - half);
    }
    memcpy(sums, values, sizeof sums);
    for (i = 8; i + 8 <= count; i += 8) {
        for (int j = 0; j < 8; j++) {
            sums[j] += values[i + j];
        }
    }
    sums[0] =
        ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
    for (; i < count; i++) {
        sums[0] += values[i];
    }
    return sums[0];
}

int split_parse(struct split *split, const char *text)
{
    static const char number_characters[] = "0123456789.";
    double shares[NUM_SPLITS] = {0};
    double sum;
    int num_shares = 0;

    for (const char *at = text + strcspn(text, number_characters); *at != '\0';
         at += strcspn(at, number_characters)) {
        char *end;

        if (num_shares == NUM_SPLITS) {
            return error_set("--split \"%s\" has more than three numbers (train, valid, test)",
                             text);
        }
        if (strspn(at, number_characters) >= 32) {
            return error_set("--split \"%s\" holds a number too long to be a share", text);
        }
        shares[num_shares++] = strtod(at, &end);
        at += strspn(at, number_characters);
        if (end != at) {
            return error_set("--split \"%s\" holds something that is not a number; write it like "
                             "969,30,1",
                             text);
        }
    }
    sum = numpy_sum(shares, NUM_SPLITS);
    if (sum <= 0.0 || strchr(text, '-') != NULL) {
        return error_set("--split \"%s\" needs up to three shares >= 0, not all 0, like 969,30,1",
                         text);
    }
    split->bounds[0] = 0.0;
    for (int i = 0; i < NUM_SPLITS; i++) {
        split->bounds[i + 1] = split->bounds[i] + shares[i] / sum;
    }
    return 0;
}

bool split_exists(const struct split *split, int which)
{
    return split->bounds[which] < split->bounds[which + 1];
}

void split_range(const struct split *split, int which, int64_t num_sequences, int64_t *first,
                 int64_t *end)
{
    /* rint: to the nearest, halves to even, like Python's round. A sum of shares may end a hair
     * above 1. */
    *first = (int64_t)rint(split->bounds[which] * (double)num_sequences);
    *end = (int64_t)rint(split->bounds[which + 1] * (double)num_sequences);
    *end = *end < num_sequences ? *end : num_sequences;
}
