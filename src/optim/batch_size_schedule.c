#include "optim/batch_size_schedule.h"

#include "base/check.h"
#include "base/checked.h"

static int check_divisible(const struct batch_size_config *config, int64_t size, const char *what)
{
    const int64_t step = config->micro_batch_size * config->data_parallel_size;

    if (size < step) {
        return error_set("%s %lld is smaller than micro-batch size %lld times data-parallel size "
                         "%lld = %lld",
                         what, (long long)size, (long long)config->micro_batch_size,
                         (long long)config->data_parallel_size, (long long)step);
    }
    if (size % step != 0 && !config->decreases_if_needed) {
        return error_set("%s %lld is not a multiple of micro-batch size %lld times data-parallel "
                         "size %lld = %lld; use %lld, or --decrease-batch-size-if-needed",
                         what, (long long)size, (long long)config->micro_batch_size,
                         (long long)config->data_parallel_size, (long long)step,
                         (long long)(size / step * step));
    }
    return 0;
}

static int check_rampup(const struct batch_size_config *config)
{
    const int64_t rise = config->global_batch_size - config->rampup_start;

    if (config->rampup_start < 1 || rise < 0) {
        return error_set("batch size ramp-up starts at %lld; it must be in 1..%lld (the global "
                         "batch size)",
                         (long long)config->rampup_start, (long long)config->global_batch_size);
    }
    if (config->rampup_increment < 1 || rise % config->rampup_increment != 0) {
        return error_set("batch size ramp-up from %lld to %lld needs an increment that divides "
                         "%lld, found %lld",
                         (long long)config->rampup_start, (long long)config->global_batch_size,
                         (long long)rise, (long long)config->rampup_increment);
    }
    if (config->rampup_samples < 0) {
        return error_set("batch size ramp-up over %lld samples must be over 0 or more",
                         (long long)config->rampup_samples);
    }
    /* Every later size is start + i * increment: if these two are multiples, all are. */
    TRY(check_divisible(config, config->rampup_start, "batch size ramp-up start"));
    return rise == 0 ? 0
                     : check_divisible(config, config->rampup_start + config->rampup_increment,
                                       "batch size ramp-up's second size");
}

int batch_size_check(const struct batch_size_config *config)
{
    int64_t step;

    if (config->micro_batch_size < 1) {
        return error_set("micro-batch size %lld must be 1 or more",
                         (long long)config->micro_batch_size);
    }
    CHECK(config->data_parallel_size >= 1, "%lld", (long long)config->data_parallel_size);
    if (!checked_mul(config->micro_batch_size, config->data_parallel_size, &step)) {
        return error_set("micro-batch size %lld times data-parallel size %lld is too large",
                         (long long)config->micro_batch_size,
                         (long long)config->data_parallel_size);
    }
    TRY(check_divisible(config, config->global_batch_size, "global batch size"));
    return config->ramps_up ? check_rampup(config) : 0;
}

static int64_t scheduled_size(const struct batch_size_config *config, int64_t consumed_samples)
{
    const int64_t num_increments =
        config->ramps_up
            ? (config->global_batch_size - config->rampup_start) / config->rampup_increment
            : 0;
    int64_t increments;

    if (num_increments == 0 || consumed_samples >= config->rampup_samples) {
        return config->global_batch_size;
    }
    /* In doubles and in this order, as the reference does: at a boundary that is not a whole number
     * of samples both then switch at the same step. */
    increments = (int64_t)((double)consumed_samples /
                           ((double)config->rampup_samples / (double)num_increments));
    return config->rampup_start + increments * config->rampup_increment;
}

struct batch_size batch_size_at(const struct batch_size_config *config, int64_t consumed_samples)
{
    const int64_t step = config->micro_batch_size * config->data_parallel_size;
    struct batch_size size = {.global_batch_size = scheduled_size(config, consumed_samples)};

    size.num_microbatches = size.global_batch_size / step;
    size.running = size.num_microbatches * step;
    return size;
}
