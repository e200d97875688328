/* lm_loss.h - the language-model head and its loss: logits = x W^T over the vocabulary-parallel
 * rows of W, loss[t] = log sum_v exp(logits[t,v]) - logits[t, label[t]] in f32. Padded vocabulary
 * rows take part in the denominator, as in Megatron. */
#ifndef CADRE_NN_LM_LOSS_H
#define CADRE_NN_LM_LOSS_H

#include "nn/param.h"
#include "nn/pass.h"

struct lm_loss_config {
    int64_t vocab_size; /* padded */
    int64_t hidden_size;
    float init_std;
    struct param *tied;        /* the word embedding, or NULL: a weight of its own */
    bool is_copy_of_embedding; /* that weight is a copy of the embedding on the first stage */
};

struct lm_loss {
    struct param *weight; /* [V,H], "output_layer.weight" unless tied */
};

struct lm_loss_saved {
    struct tensor x;      /* the caller's, [T,H] */
    struct tensor logits; /* [T,V] act, from the forward on or by the backward their gradient */
    struct tensor max, sum_exp;
};

void lm_loss_init(struct lm_loss *head, struct param_list *params, const struct groups *groups,
                  const struct lm_loss_config *config);
void lm_loss_logits(const struct lm_loss *head, const struct pass *pass, struct tensor *logits,
                    const struct tensor *x);
/* loss [T] f32, of pass->label. */
void lm_loss_forward(const struct lm_loss *head, const struct pass *pass, struct tensor *loss,
                     const struct tensor *x, struct lm_loss_saved *saved);
/* From d(total)/d(loss[t]) = pass->loss_weight. */
void lm_loss_backward(const struct lm_loss *head, const struct pass *pass, struct tensor *d_x,
                      struct lm_loss_saved *saved);

#endif
