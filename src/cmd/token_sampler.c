#include "cmd/token_sampler.h"

#include <math.h>
#include <stdlib.h>

#include "base/check.h"
#include "base/rng.h"

struct candidate {
    double weight; /* probability, not normalised */
    int32_t token;
};

/* Likely tokens first, ties by token id. */
static int compare_candidates(const void *a, const void *b)
{
    const struct candidate *x = a, *y = b;

    if (x->weight != y->weight) {
        return x->weight < y->weight ? 1 : -1;
    }
    return (x->token > y->token) - (x->token < y->token);
}

static int32_t most_likely(const float *logits, int64_t vocab_size)
{
    int64_t best = 0;

    for (int64_t v = 1; v < vocab_size; v++) {
        if (logits[v] > logits[best]) {
            best = v;
        }
    }
    return (int32_t)best;
}

static void weigh(struct candidate *candidates, const float *logits, int64_t vocab_size,
                  double temperature)
{
    const double max = (double)logits[most_likely(logits, vocab_size)];

    for (int64_t v = 0; v < vocab_size; v++) {
        candidates[v].weight = exp(((double)logits[v] - max) / temperature);
        candidates[v].token = (int32_t)v;
    }
}

/* The shortest prefix of sorted candidates that holds at least top_p of the weight, at most top_k.
 */
static int64_t count_kept(const struct candidate *candidates, int64_t vocab_size,
                          const struct token_sampler *sampler, double *kept_weight)
{
    const int64_t most =
        sampler->top_k > 0 && sampler->top_k < vocab_size ? sampler->top_k : vocab_size;
    double total = 0.0;
    int64_t count = 0;

    for (int64_t i = 0; i < most; i++) {
        total += candidates[i].weight;
    }
    *kept_weight = 0.0;
    while (count < most && (count == 0 || *kept_weight < sampler->top_p * total)) {
        *kept_weight += candidates[count++].weight;
    }
    return count;
}

int32_t token_sampler_choose(const struct token_sampler *sampler, const float *logits,
                             int64_t vocab_size, int64_t step)
{
    const struct rng_key key = rng_key(sampler->seed, "token_sampler", 0);
    struct candidate *candidates;
    double kept_weight, draw;
    int64_t count, i;
    int32_t token;

    if (sampler->temperature == 0.0) {
        return most_likely(logits, vocab_size);
    }
    candidates = malloc((size_t)vocab_size * sizeof *candidates);
    CHECK(candidates != NULL, "out of memory");
    weigh(candidates, logits, vocab_size, sampler->temperature);
    qsort(candidates, (size_t)vocab_size, sizeof *candidates, compare_candidates);
    count = count_kept(candidates, vocab_size, sampler, &kept_weight);
    draw = (double)rng_uniform(key, 0, (uint64_t)step) * kept_weight;
    for (i = 0; i + 1 < count && draw >= candidates[i].weight; i++) {
        draw -= candidates[i].weight;
    }
    token = candidates[i].token;
    free(candidates);
    return token;
}
