/* executor.h - walks a schedule and moves activations between the stages: output of chunk c goes to
 * the next stage, from the last stage to the first one's chunk c + 1; gradients go the other way.
 */
#ifndef CADRE_PIPELINE_EXECUTOR_H
#define CADRE_PIPELINE_EXECUTOR_H

#include "comm/comm.h"
#include "pipeline/schedule.h"

/* What the steps do. slot < max_in_flight tells forward where to keep what backward will need: a
 * forward's slot is free, its backward gets the same. Each returns 0, or -1 with an error, which
 * ends the walk. */
struct pipeline_work {
    /* input stays valid until the slot's backward has returned (until forward has returned where
     * the schedule has no backward). input is NULL on the first chunk of the first stage, output
     * on the last chunk of the last. */
    int (*forward)(void *context, const struct pipeline_step *step, int slot,
                   const struct tensor *input, struct tensor *output);
    /* d_output and d_input are NULL where output and input were. */
    int (*backward)(void *context, const struct pipeline_step *step, int slot,
                    const struct tensor *d_output, struct tensor *d_input);
    void *context;
};

/* How activations move. */
struct pipeline_transport {
    /* Groups "pp" and "pp-backward", two groups of the same ranks: messages between two ranks
     * arrive in the order in which they are issued, and with two stages the order of the
     * activations is not that of the gradients. */
    struct comm *forward, *backward;
    struct stream *stream;
    struct arena *arena; /* boundary tensors live here during the walk; nobody else's meanwhile */
    enum dtype dtype;
    int64_t num_rows, hidden_size; /* of a boundary tensor: this rank's tokens, [T,H] */
    /* --overlap-p2p-communication: a step's receive is posted before the step in front of it, to
     * arrive while that computes; otherwise when its step comes. The results are the same bits. */
    bool overlap;
};

/* transport may be NULL where there is one stage. After an error of the work other stages wait for
 * messages that will not come: it must end the job. */
int pipeline_execute(const struct pipeline_schedule *schedule, const struct pipeline_work *work,
                     const struct pipeline_transport *transport);

#endif
