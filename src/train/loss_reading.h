/* loss_reading.h - the losses of a global batch on their way to the host: the read starts when the
 * batch's work is issued, and the host waits for it when it wants the numbers, which may be after
 * it has issued the next batch.
 *
 *     loss_reading_begin(&reading, num_microbatches, num_tokens);
 *     loss_reading_add(&reading, number, loss_mask);      as microbatches are loaded
 *     loss_reading_start(&reading, stream, &losses);      after the last forward pass
 *     loss_reading_finish(&reading, stream, &sums);       waits */
#ifndef CADRE_TRAIN_LOSS_READING_H
#define CADRE_TRAIN_LOSS_READING_H

#include "device/device.h"
#include "tensor/tensor.h"

struct loss_reading {
    int64_t num_microbatches, num_tokens; /* M, T */
    float *mask;                          /* [M,T]: how much a token counts */
    void *read;                           /* NULL: none under way */
};

struct loss_sums {
    double loss, num_tokens; /* of unmasked tokens */
    bool is_nan;             /* a microbatch's sum was not finite */
};

void loss_reading_begin(struct loss_reading *reading, int64_t num_microbatches, int64_t num_tokens);
/* mask [T] of the microbatch; the number of unmasked tokens is known from then on. */
void loss_reading_add(struct loss_reading *reading, int64_t number, const float *mask);
double loss_reading_num_tokens(const struct loss_reading *reading);
/* losses: [M,T] f32 on the device, or more rows. */
void loss_reading_start(struct loss_reading *reading, struct stream *stream,
                        const struct tensor *losses);
/* Adds to sums, in the order of the microbatches; without a start, nothing. Gives up the memory. */
void loss_reading_finish(struct loss_reading *reading, struct stream *stream,
                         struct loss_sums *sums);

#endif
