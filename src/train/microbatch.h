/* microbatch.h - this rank's part of a microbatch, on the device.
 *
 * Every rank of a data-parallel rank loads the whole microbatch and keeps its part: under context
 * parallelism its positions of every sequence, under sequence parallelism the ids of the tokens
 * that it holds outside TP regions. T is the number of tokens that it keeps. */
#ifndef CADRE_TRAIN_MICROBATCH_H
#define CADRE_TRAIN_MICROBATCH_H

#include "data/loader.h"
#include "parallel/groups.h"

struct microbatch {
    int number;                           /* within the global batch; -1: free */
    int64_t num_all_tokens;               /* S*B */
    double num_all_unmasked;              /* of those, how many count in the loss */
    float *loss_mask;                     /* [T], on the host */
    struct tensor token, label, position; /* [T] I32 */
    struct tensor document_start;         /* [T] I32, or no data */
    struct tensor token_id;               /* I64 [T], or [T/TP] under sequence parallelism */
    struct tensor sample_id;              /* [B] I64 */
    struct tensor loss_weight;            /* [T] f32 */
    /* The tensors lie in one block of memory, and so do their contents on the host, at the same
     * distances: one copy brings them to the device. */
    struct tensor block; /* I32 */
    char *host;
};

struct microbatch_sizes {
    int64_t seq_length, num_sequences; /* S of the whole sequences, B */
    bool has_document_start;           /* attention stops at the ends of documents */
};

/* T of one rank. */
int64_t microbatch_num_tokens(const struct groups *groups, const struct microbatch_sizes *sizes);
void microbatch_init(struct microbatch *microbatch, struct arena *run, const struct groups *groups,
                     const struct microbatch_sizes *sizes);
void microbatch_free(struct microbatch *microbatch);
/* Takes the rank's part of the loader's batch, to the host's block. */
void microbatch_take(struct microbatch *microbatch, const struct groups *groups,
                     const struct batch *batch);
/* To the device, with loss_weight = loss_mask * scale. Nothing is waited for. */
void microbatch_upload(struct microbatch *microbatch, struct stream *stream, double scale);

#endif
