#include "data/numpy_random.h"

/* MT19937 (Matsumoto and Nishimura 1998), with the initialisation of its 2002 version, which is
 * what RandomState(integer) and torch's manual_seed both use. */
void numpy_random_seed(struct numpy_random *random, uint32_t seed)
{
    random->words[0] = seed;
    for (uint32_t i = 1; i < MT19937_WORDS; i++) {
        const uint32_t before = random->words[i - 1];

        random->words[i] = 1812433253u * (before ^ (before >> 30)) + i;
    }
    random->position = MT19937_WORDS;
}

static void refill(struct numpy_random *random)
{
    enum { N = MT19937_WORDS, M = 397 };
    uint32_t *w = random->words;

    for (int i = 0; i < N; i++) {
        const uint32_t joined = (w[i] & 0x80000000u) | (w[(i + 1) % N] & 0x7fffffffu);

        w[i] = w[(i + M) % N] ^ (joined >> 1) ^ (joined & 1u ? 0x9908b0dfu : 0u);
    }
    random->position = 0;
}

uint32_t numpy_random_next(struct numpy_random *random)
{
    uint32_t y;

    if (random->position == MT19937_WORDS) {
        refill(random);
    }
    y = random->words[random->position++];
    y ^= y >> 11;
    y ^= (y << 7) & 0x9d2c5680u;
    y ^= (y << 15) & 0xefc60000u;
    return y ^ (y >> 18);
}

/* The first draw is the high half, in numpy as in torch. */
static uint64_t next64(struct numpy_random *random)
{
    const uint64_t high = numpy_random_next(random);

    return high << 32 | numpy_random_next(random);
}

/* Masks a draw with the next 2^b - 1 >= max and rejects what lies above max. */
uint64_t numpy_random_interval(struct numpy_random *random, uint64_t max)
{
    uint64_t mask, value;

    if (max == 0) {
        return 0; /* draws nothing */
    }
    mask = ~0ull >> __builtin_clzll(max);
    do {
        value = (max > UINT32_MAX ? next64(random) : numpy_random_next(random)) & mask;
    } while (value > max);
    return value;
}

int64_t numpy_random_integer(struct numpy_random *random, int64_t low, int64_t high)
{
    return low + (int64_t)numpy_random_interval(random, (uint64_t)(high - 1 - low));
}

void numpy_random_shuffle(struct numpy_random *random, uint32_t *items, int64_t count)
{
    for (int64_t i = count - 1; i > 0; i--) {
        const uint64_t j = numpy_random_interval(random, (uint64_t)i);
        const uint32_t swapped = items[i];

        items[i] = items[j];
        items[j] = swapped;
    }
}

void torch_randperm(uint32_t *items, int64_t count, uint32_t seed)
{
    struct numpy_random random;
    /* torch's own threshold: below it the bias of a 32-bit remainder is accepted */
    const int is_small = count < UINT32_MAX / 20;

    numpy_random_seed(&random, seed);
    for (int64_t i = 0; i < count; i++) {
        items[i] = (uint32_t)i;
    }
    for (int64_t i = 0; i < count - 1; i++) {
        const uint64_t draw = is_small ? numpy_random_next(&random) : next64(&random);
        const int64_t j = i + (int64_t)(draw % (uint64_t)(count - i));
        const uint32_t swapped = items[i];

        items[i] = items[j];
        items[j] = swapped;
    }
}

/* PCG64 (O'Neill 2014, XSL-RR output of a 128-bit LCG), from the state of default_rng(0). numpy
 * derives that state from the seed by hashing; only seed 0 is ever needed, so the state is written
 * down here as numpy prints it (default_rng(0).bit_generator.state). */
struct pcg64 {
    unsigned __int128 state, increment;
    uint32_t spare; /* the high half of the last draw */
    int has_spare;
};

#define U128(high, low) ((unsigned __int128)(high) << 64 | (low))

static uint32_t pcg64_next32(struct pcg64 *pcg)
{
    uint64_t folded, value;
    unsigned turn;

    if (pcg->has_spare) {
        pcg->has_spare = 0;
        return pcg->spare;
    }
    pcg->state = pcg->state * U128(0x2360ed051fc65da4u, 0x4385df649fccf645u) + pcg->increment;
    folded = (uint64_t)(pcg->state >> 64) ^ (uint64_t)pcg->state;
    turn = (unsigned)(pcg->state >> 122);
    value = folded >> turn | folded << (-turn & 63);
    pcg->spare = (uint32_t)(value >> 32);
    pcg->has_spare = 1;
    return (uint32_t)value;
}

/* Uniform in [0, range): Lemire's multiplication with rejection (2019). */
static uint32_t pcg64_below(struct pcg64 *pcg, uint32_t range)
{
    const uint32_t threshold = -range % range;
    uint64_t product;

    do {
        product = (uint64_t)pcg64_next32(pcg) * range;
    } while ((uint32_t)product < threshold);
    return (uint32_t)(product >> 32);
}

void numpy_mock_lengths(int32_t *lengths, int64_t count)
{
    struct pcg64 pcg = {
        .state = U128(0x1aa1b5345996452du, 0x9585eb7a69561e3u),
        .increment = U128(0x418ddadb3af71a82u, 0x588133bc447873a9u),
    };

    for (int64_t i = 0; i < count; i++) {
        lengths[i] = 1 + (int32_t)pcg64_below(&pcg, 4095);
    }
}
