/* numpy_random.h - numpy's random numbers, bit for bit: the order of training samples is defined by
 * them. Three sources:
 *
 *   numpy.random.RandomState(seed)      shuffle, randint (the frozen legacy generator)
 *   torch.randperm with a seeded CPU generator, which is the same Mersenne Twister
 *   numpy.random.default_rng(0).integers, for mock data */
#ifndef CADRE_DATA_NUMPY_RANDOM_H
#define CADRE_DATA_NUMPY_RANDOM_H

#include <stdint.h>

enum { MT19937_WORDS = 624 };

/* RandomState: one stream, continued by each call. */
struct numpy_random {
    uint32_t words[MT19937_WORDS];
    int position;
};

void numpy_random_seed(struct numpy_random *random, uint32_t seed);
uint32_t numpy_random_next(struct numpy_random *random);
/* Uniform in [0, max]. */
uint64_t numpy_random_interval(struct numpy_random *random, uint64_t max);
/* One number of randint(low, high): in [low, high). */
int64_t numpy_random_integer(struct numpy_random *random, int64_t low, int64_t high);
/* shuffle of a one-dimensional array of 4-byte items. */
void numpy_random_shuffle(struct numpy_random *random, uint32_t *items, int64_t count);

/* torch.randperm(count) of a generator with manual_seed(seed). */
void torch_randperm(uint32_t *items, int64_t count, uint32_t seed);

/* default_rng(0).integers(1, 4096, size=count, dtype=int32). */
void numpy_mock_lengths(int32_t *lengths, int64_t count);

#endif
