#include "train/loss_reading.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/check.h"

void loss_reading_begin(struct loss_reading *reading, int64_t num_microbatches, int64_t num_tokens)
{
    *reading = (struct loss_reading){
        .num_microbatches = num_microbatches,
        .num_tokens = num_tokens,
        .mask = calloc((size_t)(num_microbatches * num_tokens), sizeof *reading->mask)};
    CHECK(reading->mask != NULL, "out of memory");
}

void loss_reading_add(struct loss_reading *reading, int64_t number, const float *mask)
{
    CHECK(number < reading->num_microbatches, "microbatch %lld of %lld", (long long)number,
          (long long)reading->num_microbatches);
    memcpy(reading->mask + number * reading->num_tokens, mask,
           (size_t)reading->num_tokens * sizeof *mask);
}

static double sum(const float *values, int64_t count)
{
    double total = 0.0;

    for (int64_t i = 0; i < count; i++) {
        total += (double)values[i];
    }
    return total;
}

double loss_reading_num_tokens(const struct loss_reading *reading)
{
    return sum(reading->mask, reading->num_microbatches * reading->num_tokens);
}

static size_t losses_bytes(const struct loss_reading *reading)
{
    return (size_t)(reading->num_microbatches * reading->num_tokens) * sizeof(float);
}

void loss_reading_start(struct loss_reading *reading, struct stream *stream,
                        const struct tensor *losses)
{
    reading->read = stream_read_start(stream, losses->data, losses_bytes(reading));
}

/* What is masked counts nothing, not even where it is NaN. */
static double masked_sum(const float *losses, const float *mask, int64_t count)
{
    double total = 0.0;

    for (int64_t t = 0; t < count; t++) {
        if (mask[t] != 0.0f) {
            total += (double)losses[t] * (double)mask[t];
        }
    }
    return total;
}

static void add_up(const struct loss_reading *reading, const float *losses, struct loss_sums *sums)
{
    for (int64_t i = 0; i < reading->num_microbatches; i++) {
        const int64_t first = i * reading->num_tokens;
        const double loss = masked_sum(losses + first, reading->mask + first, reading->num_tokens);

        sums->loss += loss;
        sums->is_nan |= !isfinite(loss);
    }
    sums->num_tokens += loss_reading_num_tokens(reading);
}

void loss_reading_finish(struct loss_reading *reading, struct stream *stream,
                         struct loss_sums *sums)
{
    if (reading->read != NULL) {
        float *losses = malloc(losses_bytes(reading));

        CHECK(losses != NULL, "out of memory");
        stream_read_finish(stream, reading->read, losses);
        add_up(reading, losses, sums);
        free(losses);
    }
    free(reading->mask);
    *reading = (struct loss_reading){0};
}
