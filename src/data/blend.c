#include "data/blend.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

#include "base/check.h"
#include "data/split.h"

enum { SET, SAMPLE, NUM_ARRAYS };

int blend_normalize(double *weights, int num_sets)
{
    double sum;

    for (int i = 0; i < num_sets; i++) {
        if (!(weights[i] >= 0.0) || !isfinite(weights[i])) {
            return error_set("weight %g of data set %d is not a number >= 0", weights[i], i + 1);
        }
    }
    sum = numpy_sum(weights, num_sets);
    if (!(sum > 0.0) || !isfinite(sum)) {
        return error_set("the weights of the %d data sets sum to %g", num_sets, sum);
    }
    for (int i = 0; i < num_sets; i++) {
        weights[i] /= sum;
    }
    return 0;
}

int64_t blend_set_samples(double weight, int64_t num_samples)
{
    return (int64_t)ceil((double)num_samples * weight * 1.005);
}

static bool parse_number(const char *word, double *value)
{
    char *end;

    *value = strtod(word, &end);
    return end != word && *end == '\0';
}

int blend_parse(const char *const *words, int num_words, const char **prefixes, double *weights,
                bool *has_weights)
{
    bool all_numbers = num_words % 2 == 0;

    for (int i = 0; all_numbers && i < num_words; i += 2) {
        all_numbers = parse_number(words[i], &weights[i / 2]);
        prefixes[i / 2] = words[i + 1];
    }
    *has_weights = all_numbers;
    if (all_numbers) {
        return num_words / 2;
    }
    for (int i = 0; i < num_words; i++) {
        prefixes[i] = words[i];
    }
    return num_words;
}

/* The set that lags most: the largest weight*max(s, 1) - count, the first one on ties. */
static int most_behind(const double *weights, const int64_t *counts, const int64_t *available,
                       int num_sets, int64_t s)
{
    const double taken = s > 1 ? (double)s : 1.0;
    double most = -INFINITY;
    int set = -1;

    for (int i = 0; i < num_sets; i++) {
        const double lag = weights[i] * taken - (double)counts[i];

        if (counts[i] < available[i] && lag > most) {
            most = lag;
            set = i;
        }
    }
    return set;
}

static int build(struct index_array arrays[NUM_ARRAYS], const double *weights,
                 const int64_t *available, int num_sets, int64_t num_samples)
{
    int64_t *counts = calloc((size_t)num_sets, sizeof *counts);
    int16_t *sets;
    int64_t *samples;

    CHECK(counts != NULL, "out of memory");
    if (index_array_allocate(&arrays[SET]) != 0 || index_array_allocate(&arrays[SAMPLE]) != 0) {
        free(counts);
        return -1;
    }
    sets = arrays[SET].data;
    samples = arrays[SAMPLE].data;
    for (int64_t s = 0; s < num_samples; s++) {
        const int set = most_behind(weights, counts, available, num_sets, s);

        CHECK(set >= 0, "sample %lld of a blend of %lld", (long long)s, (long long)num_samples);
        sets[s] = (int16_t)set;
        samples[s] = counts[set]++;
    }
    free(counts);
    return 0;
}

static void format_facts(char *facts, size_t facts_bytes, const double *weights,
                         const int64_t *available, int num_sets, int64_t num_samples)
{
    snprintf(facts, facts_bytes,
             "cadre order of a blend, format 1\nsets %d\nweights xxh3 %016llx\n"
             "available xxh3 %016llx\nsamples %lld\n",
             num_sets, (unsigned long long)XXH3_64bits(weights, (size_t)num_sets * sizeof *weights),
             (unsigned long long)XXH3_64bits(available, (size_t)num_sets * sizeof *available),
             (long long)num_samples);
}

int blend_open(struct blend *blend, const double *weights, const int64_t *available, int num_sets,
               int64_t num_samples, const char *split_name, const char *cache_directory)
{
    char facts[512], name[64];
    const struct index_cache cache = {cache_directory, name, facts};
    double *shares = malloc((size_t)num_sets * sizeof *shares);

    CHECK(shares != NULL, "out of memory");
    CHECK(num_sets > 0 && num_sets <= BLEND_SETS_MAX, "%d sets", num_sets);
    *blend = (struct blend){.num_samples = num_samples};
    blend->arrays[SET] = (struct index_array){
        .name = "dataset_index", .dtype = "<i2", .item_bytes = 2, .num_rows = num_samples};
    blend->arrays[SAMPLE] = (struct index_array){
        .name = "dataset_sample_index", .dtype = "<i8", .item_bytes = 8, .num_rows = num_samples};
    memcpy(shares, weights, (size_t)num_sets * sizeof *shares);
    snprintf(name, sizeof name, "BlendedDataset-%s", split_name);
    if (blend_normalize(shares, num_sets) != 0) {
        free(shares);
        return -1;
    }
    format_facts(facts, sizeof facts, shares, available, num_sets, num_samples);
    if (!index_cache_load(&cache, blend->arrays, NUM_ARRAYS)) {
        if (build(blend->arrays, shares, available, num_sets, num_samples) != 0) {
            free(shares);
            blend_close(blend);
            return -1;
        }
        index_cache_store(&cache, blend->arrays, NUM_ARRAYS);
    }
    free(shares);
    blend->set_index = blend->arrays[SET].data;
    blend->sample_index = blend->arrays[SAMPLE].data;
    return 0;
}

void blend_close(struct blend *blend)
{
    for (int i = 0; i < NUM_ARRAYS; i++) {
        index_array_free(&blend->arrays[i]);
    }
}
