/* upcycle.h - how the experts and the router of an upcycled model come from a dense feed-forward
 * block (M8.10).
 *
 * With granularity g every expert has 1/g of the dense FFN: expert e takes shard e mod g, so that
 * each run of g experts is one virtual copy of the dense block; the R = E/g copies get a router row
 * each, repeated g times. Scaling the weights makes the output that of the dense block: for
 * post-softmax routing by g, for pre-softmax by R*g*g/k, spread over the factors a product of the
 * weights has (3 for gated and squared ReLU, 2 otherwise). */
#ifndef CADRE_MOE_UPCYCLE_H
#define CADRE_MOE_UPCYCLE_H

#include <stdbool.h>
#include <stdint.h>

#include "ops/ops.h"

struct upcycle_plan {
    int num_experts, granularity, topk;
    bool pre_softmax;
    enum activation_kind activation;
};

/* Which shard of the dense FFN dim expert e holds, of granularity. */
int upcycle_shard(const struct upcycle_plan *plan, int expert);
/* What every weight of the experts is multiplied with; 1 for granularity 1 (plain upcycling
 * copies). */
double upcycle_weight_scale(const struct upcycle_plan *plan);
/* The router's row e is the initial row of this number. */
int upcycle_router_row(const struct upcycle_plan *plan, int expert);

#endif
