/* attention_exchange.h - softmax attention over the positions of a context-parallel group: the
 * three exchanges of attention.h behind one form, for attention.c. */
#ifndef CADRE_NN_ATTENTION_EXCHANGE_H
#define CADRE_NN_ATTENTION_EXCHANGE_H

#include "nn/attention.h"
#include "ops/ops.h"

/* Of this rank's tokens, act: d_q [T,A,D], d_k, d_v [T,G,D]. */
struct attention_grads {
    struct tensor d_q, d_k, d_v;
};

/* Forward: saved->out [T,A,D], which has memory, from saved->q, ->k, ->v; makes saved->lse. Those
 * of CP_COMM_A2A find q, k and v in scratch memory and replace them by what they keep.
 * Backward: grads, which has memory, from d_out [T,A,D]. */
void attention_ring_forward(const struct attention_layer *attention, const struct pass *pass,
                            struct attention_saved *saved);
void attention_ring_backward(const struct attention_layer *attention, const struct pass *pass,
                             struct attention_grads *grads, const struct tensor *d_out,
                             struct attention_saved *saved);
void attention_gather_forward(const struct attention_layer *attention, const struct pass *pass,
                              struct attention_saved *saved);
void attention_gather_backward(const struct attention_layer *attention, const struct pass *pass,
                               struct attention_grads *grads, const struct tensor *d_out,
                               struct attention_saved *saved);
void attention_heads_forward(const struct attention_layer *attention, const struct pass *pass,
                             struct attention_saved *saved);
void attention_heads_backward(const struct attention_layer *attention, const struct pass *pass,
                              struct attention_grads *grads, const struct tensor *d_out,
                              struct attention_saved *saved);

/* What all calls of the op have in common: all but the tensors of tokens and the positions. */
struct attention attention_call(const struct attention_layer *attention, const struct pass *pass);
/* [S*B, heads, D] as [S, B, heads, D]. */
struct tensor attention_by_sequence(const struct tensor *x, int64_t num_sequences);

#endif
