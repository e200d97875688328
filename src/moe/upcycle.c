#include "moe/upcycle.h"

#include <math.h>

int upcycle_shard(const struct upcycle_plan *plan, int expert)
{
    return expert % plan->granularity;
}

double upcycle_weight_scale(const struct upcycle_plan *plan)
{
    const double g = plan->granularity, copies = plan->num_experts / g;
    const double scale = plan->pre_softmax ? copies * g * g / plan->topk : g;
    const double factors = plan->activation == ACTIVATION_GELU ? 2.0 : 3.0;

    return plan->granularity == 1 ? 1.0 : pow(scale, 1.0 / factors);
}

int upcycle_router_row(const struct upcycle_plan *plan, int expert)
{
    return expert / plan->granularity;
}
