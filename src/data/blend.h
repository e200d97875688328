/* blend.h - in what order the samples of several data sets are mixed (reference M9.4). */
#ifndef CADRE_DATA_BLEND_H
#define CADRE_DATA_BLEND_H

#include <stdbool.h>
#include <stdint.h>

#include "data/index_cache.h"

enum { BLEND_SETS_MAX = 32766 }; /* set_index is int16 */

struct blend {
    int64_t num_samples;
    const int16_t *set_index;    /* [num_samples] which set */
    const int64_t *sample_index; /* [num_samples] which of its samples */
    struct index_array arrays[2];
};

/* weights[i] is set i's share of the samples (made to sum to 1 here), available[i] how many samples
 * it has. The order is greedy: always the set that lags most behind its share. A set that is used
 * up is passed over. num_samples is at most the sum of available. */
int blend_open(struct blend *blend, const double *weights, const int64_t *available, int num_sets,
               int64_t num_samples, const char *split_name, const char *cache_directory);
void blend_close(struct blend *blend);

/* weights /= their sum. -1 if a weight is negative or not finite, or all are 0. */
int blend_normalize(double *weights, int num_sets);
/* Samples that a set of this (normalised) weight is built with when num_samples are wanted in all:
 * half a percent more than its share. */
int64_t blend_set_samples(double weight, int64_t num_samples);

/* Splits the words of --data-path: "w1 p1 w2 p2 ..." if every other word is a number, else all are
 * prefixes. prefixes and weights have room for num_words; returns the number of sets; *has_weights
 * says which form it was. */
int blend_parse(const char *const *words, int num_words, const char **prefixes, double *weights,
                bool *has_weights);

#endif
