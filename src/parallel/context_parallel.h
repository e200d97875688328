/* context_parallel.h - which positions of a sequence a rank of the CP group holds.
 *
 * A sequence of S tokens is cut in 2*CP equal chunks; rank r holds chunks r and 2*CP-1-r, one after
 * the other ("zigzag"), so that every rank has the same share of the causal scores. S must be a
 * multiple of 2*CP (unless CP = 1: a rank then holds the whole sequence as it is). Local rows are
 * sequence-first: token t = s_local*B + b. */
#ifndef CADRE_PARALLEL_CONTEXT_PARALLEL_H
#define CADRE_PARALLEL_CONTEXT_PARALLEL_H

#include <stddef.h>
#include <stdint.h>

#include "device/device.h"
#include "tensor/tensor.h"

/* Positions [start[i], start[i] + length) of the sequence, i = 0, 1, in the order in which the rank
 * holds them. */
struct context_chunks {
    int64_t start[2], length;
};

struct context_chunks context_parallel_chunks(int cp_size, int cp_rank, int64_t seq_length);

/* The position in the sequence of local row s_local of [0, seq_length / cp_size). */
int64_t context_parallel_position(int cp_size, int cp_rank, int64_t seq_length, int64_t s_local);

/* local[S/CP] = this rank's positions of full[S], both arrays of rows of row_bytes: for a batch
 * [S,B] of elements of 4 bytes, row_bytes is 4*B. Host memory. */
void context_parallel_cut(void *local, const void *full, size_t row_bytes, int cp_size, int cp_rank,
                          int64_t seq_length);

/* by_rank holds the parts of all ranks of the group, in rank order; sequence holds the same rows in
 * the order of the sequence. On the stream's device; the rows are [S*B] of any kind. */
void context_parallel_to_sequence(struct stream *stream, int cp_size, struct tensor *sequence,
                                  const struct tensor *by_rank);
void context_parallel_to_ranks(struct stream *stream, int cp_size, struct tensor *by_rank,
                               const struct tensor *sequence);

#endif
