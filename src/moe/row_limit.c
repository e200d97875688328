#include "moe/row_limit.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>

#include "base/arena.h"
#include "base/check.h"

int64_t row_limit_rows(double rank_capacity_factor, int64_t even_rows)
{
    return (int64_t)ceil(rank_capacity_factor * (double)even_rows);
}

static int fullest_expert(int num_local, const int32_t *offsets)
{
    int fullest = 0;

    for (int e = 1; e < num_local; e++) {
        if (offsets[e + 1] - offsets[e] > offsets[fullest + 1] - offsets[fullest]) {
            fullest = e;
        }
    }
    return fullest;
}

static const char advice[] = "use more expert parallelism, a smaller --micro-batch-size, a "
                             "stronger balancing loss, or --moe-expert-capacity-factor, which "
                             "drops tokens";

void row_limit_check(const struct row_limit *limit, enum dtype dtype, int64_t even_rows,
                     int first_expert, int num_local, const int32_t *offsets)
{
    static double most_uneven = 1.0;
    const int64_t num_rows = offsets[num_local];
    const int64_t allowed = row_limit_rows(limit->rank_capacity_factor, even_rows);
    const int fullest = fullest_expert(num_local, offsets);
    const double load = (double)num_rows / fmax((double)even_rows, 1.0);
    const double row_mb = (double)(limit->row_elements * dtype_size_bytes(dtype)) / 1e6;
    const bool is_over = allowed > 0 && num_rows > allowed;
    char text[384];

    if (!is_over && load <= most_uneven) {
        return;
    }
    most_uneven = load;
    snprintf(text, sizeof text,
             "layer %d: %" PRId64 " rows (%.1f MB) are routed to this rank's experts %d to %d "
             "(expert %d alone: %d), where even routing brings %" PRId64 " (%.1f MB)",
             limit->layer, num_rows, row_mb * (double)num_rows, first_expert,
             first_expert + num_local - 1, first_expert + fullest,
             offsets[fullest + 1] - offsets[fullest], even_rows, row_mb * (double)even_rows);
    if (is_over) {
        PANIC("%s; --moe-expert-rank-capacity-factor %g allows %" PRId64 ": raise it, or %s", text,
              limit->rank_capacity_factor, allowed, advice);
    }
    arena_explain("the most uneven routing so far was in %s: %s", text, advice);
}
