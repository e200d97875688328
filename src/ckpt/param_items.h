/* param_items.h - parameters and their optimizer states as boxes of a checkpoint: which of them
 * this rank writes, and reading them back under any mapping.
 *
 * Saving: each element once over all ranks. A parameter that several ranks hold alike (the DP and
 * CP ranks; the TP ranks, where TP does not cut it) is written by the first of them, or in shares
 * of rows when it is large. Copies (tied embeddings on the last stage) are not written. Loading: a
 * rank reads the boxes it needs, whoever wrote them. */
#ifndef CADRE_CKPT_PARAM_ITEMS_H
#define CADRE_CKPT_PARAM_ITEMS_H

#include "ckpt/checkpoint.h"
#include "nn/param.h"
#include "optim/optimizer.h"
#include "parallel/groups.h"

/* The items of a save; it owns their names. Starts all zero. */
struct ckpt_item_list {
    struct ckpt_item *items;
    int num_items, capacity;
};

/* Copies the item and its name. */
void ckpt_item_list_add(struct ckpt_item_list *list, const struct ckpt_item *item);
void ckpt_item_list_free(struct ckpt_item_list *list);

/* Data stays where it is, on the device. */
void ckpt_item_list_add_params(struct ckpt_item_list *list, const struct param_list *params,
                               const struct groups *groups);
void ckpt_item_list_add_optimizer(struct ckpt_item_list *list, struct optimizer *optimizer,
                                  const struct groups *groups);

/* One parameter's box, read from anywhere into host memory (packed). */
struct param_reader {
    int (*read)(void *context, const struct param *param, void *host);
    void *context;
};
/* Every parameter of the list, through host memory, to the device. */
int param_list_read(struct param_list *params, struct stream *stream,
                    const struct param_reader *reader);
/* From a checkpoint. The vocabulary's padding may differ; new rows keep their values. */
int checkpoint_read_params(const struct checkpoint *checkpoint, struct param_list *params,
                           struct stream *stream);
/* The states this rank's shards need; the number of steps is the caller's. */
int checkpoint_read_optimizer(const struct checkpoint *checkpoint, struct optimizer *optimizer,
                              struct stream *stream);

#endif
