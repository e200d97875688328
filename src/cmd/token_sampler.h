/* token_sampler.h - chooses the next token from its logits: temperature, top-k, top-p (Holtzman et
 * al. 2020). */
#ifndef CADRE_CMD_TOKEN_SAMPLER_H
#define CADRE_CMD_TOKEN_SAMPLER_H

#include <stdint.h>

struct token_sampler {
    double temperature; /* 0: the most likely token */
    int64_t top_k;      /* 0: all */
    double top_p;       /* 1: all */
    uint64_t seed;
};

/* logits [vocab_size]; step numbers the draw: the same (seed, step) draws the same number. */
int32_t token_sampler_choose(const struct token_sampler *sampler, const float *logits,
                             int64_t vocab_size, int64_t step);

#endif
