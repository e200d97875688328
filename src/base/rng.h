/* rng.h - random numbers that know no layout: Philox-4x32-10 (Salmon et al., SC 2011), a function
 * of (seed, purpose, index). Whoever needs the number of a global element computes it, so the same
 * seed gives the same weights and masks under every parallel mapping and in every order of calls.
 * Also compiled by nvcc. */
#ifndef CADRE_BASE_RNG_H
#define CADRE_BASE_RNG_H

#include <math.h>
#include <stdint.h>

#ifdef __CUDACC__
#define RNG_INLINE static inline __host__ __device__
#else
#define RNG_INLINE static inline
#endif

/* A stream of random numbers: what is drawn. */
struct rng_key {
    uint32_t low, high;
};

/* 64-bit finaliser of MurmurHash3 (Appleby): every input bit reaches every output bit. */
RNG_INLINE uint64_t rng_mix(uint64_t x)
{
    x = (x ^ (x >> 33)) * 0xff51afd7ed558ccdull;
    x = (x ^ (x >> 33)) * 0xc4ceb9fe1a85ec53ull;
    return x ^ (x >> 33);
}

/* purpose: a name ("decoder.layers.3.mlp.router.weight", "hidden_dropout"); index: a layer or 0. */
RNG_INLINE struct rng_key rng_key(uint64_t seed, const char *purpose, uint64_t index)
{
    uint64_t hash = 0xcbf29ce484222325ull; /* FNV-1a */
    uint64_t mixed;
    struct rng_key key;

    for (const char *c = purpose; *c != '\0'; c++) {
        hash = (hash ^ (unsigned char)*c) * 0x100000001b3ull;
    }
    mixed = rng_mix(seed + 0x9e3779b97f4a7c15ull * (rng_mix(hash) ^ rng_mix(index + 1)));
    key.low = (uint32_t)mixed;
    key.high = (uint32_t)(mixed >> 32);
    return key;
}

/* Four independent 32-bit numbers for counter (high, low). */
RNG_INLINE void rng_philox(uint32_t out[4], struct rng_key key, uint64_t high, uint64_t low)
{
    uint32_t c0 = (uint32_t)low, c1 = (uint32_t)(low >> 32);
    uint32_t c2 = (uint32_t)high, c3 = (uint32_t)(high >> 32);

    for (int round = 0; round < 10; round++) {
        const uint64_t p0 = (uint64_t)0xD2511F53u * c0, p1 = (uint64_t)0xCD9E8D57u * c2;

        c0 = (uint32_t)(p1 >> 32) ^ c1 ^ key.low;
        c1 = (uint32_t)p1;
        c2 = (uint32_t)(p0 >> 32) ^ c3 ^ key.high;
        c3 = (uint32_t)p0;
        key.low += 0x9E3779B9u;
        key.high += 0xBB67AE85u;
    }
    out[0] = c0;
    out[1] = c1;
    out[2] = c2;
    out[3] = c3;
}

/* In [0, 1), 24 bits: exact in float. */
RNG_INLINE float rng_to_uniform(uint32_t bits)
{
    return (float)(bits >> 8) * (1.0f / 16777216.0f);
}

/* Uniform number of element `index` of row `row` (a global token id, or 0). */
RNG_INLINE float rng_uniform(struct rng_key key, uint64_t row, uint64_t index)
{
    uint32_t bits[4];

    rng_philox(bits, key, row, index / 4);
    return rng_to_uniform(bits[index % 4]);
}

/* Standard normal number of element `index` of row `row` (Box and Muller 1958), in double. */
RNG_INLINE double rng_normal(struct rng_key key, uint64_t row, uint64_t index)
{
    uint32_t bits[4];
    double radius, angle;

    rng_philox(bits, key, row, index / 2);
    radius = sqrt(-2.0 * log(((double)bits[index % 2 * 2] + 0.5) / 4294967296.0));
    angle = 2.0 * 3.14159265358979323846 * (double)bits[index % 2 * 2 + 1] / 4294967296.0;
    return radius * cos(angle);
}

#endif
