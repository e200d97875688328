#include "nn/embedding.h"

#include <stdio.h>

#include "ops/ops.h"
#include "parallel/tp_region.h"

void embedding_layer_init(struct embedding_layer *embedding, struct param_list *params,
                          const struct groups *groups, const struct embedding_config *config)
{
    struct param word = {.name = "embedding.word_embeddings.weight",
                         .num_dims = 2,
                         .global_shape = {config->vocab_size, config->hidden_size},
                         .init = PARAM_INIT_NORMAL,
                         .init_std = config->init_std,
                         .weight_decay = true,
                         .decoupled_lr = true};
    struct param position = word;

    word.box = box_whole(word.global_shape, 2);
    word.box = box_part(&word.box, 0, groups->tp->rank, groups->tp->size);
    embedding->word = param_add(params, &word);
    embedding->position = NULL;
    embedding->dropout = config->dropout;
    if (config->num_positions > 0) {
        snprintf(position.name, sizeof position.name, "embedding.position_embeddings.weight");
        position.global_shape[0] = config->num_positions;
        position.box = box_whole(position.global_shape, 2);
        position.sum_over_tp = groups->sequence_parallel;
        embedding->position = param_add(params, &position);
    }
}

static void apply_dropout(const struct embedding_layer *embedding, const struct pass *pass,
                          struct tensor *x)
{
    if (pass->training && embedding->dropout > 0.0f) {
        op_dropout(pass->stream,
                   &(struct dropout){.y = x,
                                     .x = x,
                                     .token_id = &pass->token_id,
                                     .rule = {.p = embedding->dropout,
                                              .key = rng_key(pass->seed, "embedding_dropout", 0)}});
    }
}

/* The positions of the tokens that this rank holds outside the region. */
static struct tensor positions_outside(const struct pass *pass, int64_t num_tokens)
{
    const bool all = num_tokens == pass->position.dim[0];

    return tensor_rows(&pass->position, all ? 0 : pass->groups->tp->rank * num_tokens, num_tokens);
}

/* A token's row is on one TP rank; the others give zeros to the sum. */
void embedding_layer_forward(const struct embedding_layer *embedding, const struct pass *pass,
                             struct tensor *y)
{
    const struct arena_mark mark = arena_mark(pass->scratch);
    struct tensor partial = tp_region_partial(pass->groups, pass->scratch, y);

    op_embedding_forward(pass->stream,
                         &(struct embedding){.y = &partial,
                                             .weight = &embedding->word->value,
                                             .id = &pass->token,
                                             .vocab_start = embedding->word->box.offset[0]});
    tp_region_reduce(pass->groups, pass->stream, y, &partial);
    if (embedding->position != NULL) {
        const struct tensor position = positions_outside(pass, y->dim[0]);

        op_embedding_forward(pass->stream,
                             &(struct embedding){.y = y,
                                                 .weight = &embedding->position->value,
                                                 .id = &position,
                                                 .accumulate = true});
    }
    apply_dropout(embedding, pass, y);
    arena_release(pass->scratch, mark);
}

void embedding_layer_backward(const struct embedding_layer *embedding, const struct pass *pass,
                              struct tensor *d_y)
{
    const struct arena_mark mark = arena_mark(pass->scratch);
    struct tensor all;

    apply_dropout(embedding, pass, d_y);
    all = tp_region_gather(pass->groups, pass->stream, pass->scratch, d_y);
    op_embedding_backward(
        pass->stream, &(struct embedding_backward){.d_weight = &embedding->word->grad,
                                                   .d_y = &all,
                                                   .id = &pass->token,
                                                   .vocab_start = embedding->word->box.offset[0]});
    if (embedding->position != NULL) {
        const struct tensor position = positions_outside(pass, d_y->dim[0]);

        op_embedding_backward(
            pass->stream, &(struct embedding_backward){
                              .d_weight = &embedding->position->grad, .d_y = d_y, .id = &position});
    }
    arena_release(pass->scratch, mark);
}
