/* balance.h - the load-balancing losses (reference M1.7).
 *
 * With n_e the (token, slot) pairs that chose expert e (before any drop), s_te the router's scores
 * over all experts, T the tokens that n counts and k the experts per token:
 *
 *   loss = E / (T * T_local * k) * sum_e n_e * sum_{t local} s_te          (1 when perfectly
 * balanced)
 *
 *   aux_loss         n over the ranks that share the microbatch's sequences (TPxCP), T_local = T
 *   seq_aux_loss     the same for every sequence apart; the mean over the sequences
 *   global_aux_loss  n over all data-parallel ranks too, averaged over the microbatches of the
 * global batch so far; T_local the tokens of this rank's TPxCP group, so that its gradient does not
 *                    shrink with the number of DP ranks (docs/differences.md) */
#ifndef CADRE_MOE_BALANCE_H
#define CADRE_MOE_BALANCE_H

#include "nn/pass.h"
#include "ops/ops.h"

enum balance_type {
    BALANCE_AUX_LOSS,
    BALANCE_SEQ_AUX_LOSS,
    BALANCE_GLOBAL_AUX_LOSS,
    NUM_BALANCE_TYPES
};

struct balance_config {
    float coefficient[NUM_BALANCE_TYPES]; /* 0: this loss is off */
    enum router_score score;
    int topk, num_experts;
    int layer; /* global number, for the metrics */
};

struct balance {
    struct balance_config config;
    struct tensor global_counts; /* [1,E] f32: sum over the microbatches since balance_reset */
    int num_microbatches;
};

struct balance_saved {
    struct tensor counts[NUM_BALANCE_TYPES]; /* what backward multiplies the scores with */
};

void balance_init(struct balance *balance, const struct balance_config *config,
                  struct stream *stream, struct arena *run);
/* At the start of every global batch. */
void balance_reset(struct balance *balance, struct stream *stream);
/* indices: the plain top-k of the scores. Leaves the losses in pass->metrics. */
void balance_forward(struct balance *balance, const struct pass *pass, const struct tensor *logits,
                     const struct tensor *indices, struct balance_saved *saved);
/* Gives the backward op of num_tokens tokens the losses' terms: pass->aux_loss_scale * coefficient
 * * d(loss)/d(logits). */
void balance_add_terms(const struct balance *balance, const struct pass *pass, int64_t num_tokens,
                       const struct balance_saved *saved, struct router_backward *op);

#endif
