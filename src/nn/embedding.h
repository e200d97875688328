/* embedding.h - word embeddings over the vocabulary-parallel table, learned positions, dropout. */
#ifndef CADRE_NN_EMBEDDING_H
#define CADRE_NN_EMBEDDING_H

#include "nn/param.h"
#include "nn/pass.h"

struct embedding_config {
    int64_t vocab_size; /* padded */
    int64_t hidden_size;
    int64_t num_positions; /* learned position embeddings; 0: none */
    float dropout;
    float init_std;
};

struct embedding_layer {
    struct param *word;     /* "embedding.word_embeddings.weight" */
    struct param *position; /* "embedding.position_embeddings.weight" or NULL */
    float dropout;
};

void embedding_layer_init(struct embedding_layer *embedding, struct param_list *params,
                          const struct groups *groups, const struct embedding_config *config);
/* y [T,H] from pass->token and pass->position. */
void embedding_layer_forward(const struct embedding_layer *embedding, const struct pass *pass,
                             struct tensor *y);
/* d_y is overwritten. */
void embedding_layer_backward(const struct embedding_layer *embedding, const struct pass *pass,
                              struct tensor *d_y);

#endif
