/* The formulas are Megatron's optimizer_param_scheduler, restated in reference M6.6. Everything is
 * computed from the sample count and nothing is carried along, so a resumed run, whatever its
 * mapping, has the same rate as one that was never stopped. */
#include "optim/lr_schedule.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#include "base/check.h"

static const char *const decay_style_names[] = {
    [LR_DECAY_CONSTANT] = "constant", [LR_DECAY_LINEAR] = "linear",
    [LR_DECAY_COSINE] = "cosine",     [LR_DECAY_INVERSE_SQUARE_ROOT] = "inverse-square-root",
    [LR_DECAY_WSD] = "WSD",
};
static const char *const wsd_style_names[] = {
    [LR_WSD_EXPONENTIAL] = "exponential",
    [LR_WSD_LINEAR] = "linear",
    [LR_WSD_COSINE] = "cosine",
    [LR_WSD_MINUS_SQRT] = "minus_sqrt",
};
static const char *const weight_decay_style_names[] = {
    [WEIGHT_DECAY_CONSTANT] = "constant",
    [WEIGHT_DECAY_LINEAR] = "linear",
    [WEIGHT_DECAY_COSINE] = "cosine",
};

#define COUNT(array) ((int)(sizeof(array) / sizeof((array)[0])))

const char *lr_decay_style_name(enum lr_decay_style style)
{
    return decay_style_names[style];
}

const char *lr_wsd_style_name(enum lr_wsd_style style)
{
    return wsd_style_names[style];
}

const char *weight_decay_style_name(enum weight_decay_style style)
{
    return weight_decay_style_names[style];
}

/* The index of name, or -1 with an error that lists the names. */
static int name_index(const char *const *names, int num_names, const char *what, const char *name)
{
    char legal[256] = "";
    size_t length = 0;

    for (int i = 0; i < num_names; i++) {
        if (strcmp(names[i], name) == 0) {
            return i;
        }
        length += (size_t)snprintf(legal + length, sizeof legal - length, "%s%s",
                                   i == 0 ? "" : ", ", names[i]);
    }
    return error_set("%s \"%s\" is not known; legal are %s", what, name, legal);
}

int lr_decay_style_parse(const char *name, enum lr_decay_style *style)
{
    const int index =
        name_index(decay_style_names, COUNT(decay_style_names), "learning rate decay style", name);

    if (index < 0) {
        return -1;
    }
    *style = (enum lr_decay_style)index;
    return 0;
}

int lr_wsd_style_parse(const char *name, enum lr_wsd_style *style)
{
    const int index = name_index(wsd_style_names, COUNT(wsd_style_names), "WSD decay style", name);

    if (index < 0) {
        return -1;
    }
    *style = (enum lr_wsd_style)index;
    return 0;
}

int weight_decay_style_parse(const char *name, enum weight_decay_style *style)
{
    const int index = name_index(weight_decay_style_names, COUNT(weight_decay_style_names),
                                 "weight decay style", name);

    if (index < 0) {
        return -1;
    }
    *style = (enum weight_decay_style)index;
    return 0;
}

static int check_rates(const struct lr_schedule_config *config)
{
    /* Negated comparisons, so that NaN is refused too. */
    if (!(config->max_lr >= 0 && isfinite(config->max_lr))) {
        return error_set("learning rate %g must not be negative", config->max_lr);
    }
    if (!(config->min_lr >= 0 && config->min_lr <= config->max_lr)) {
        return error_set("minimum learning rate %g must be in 0..%g (the learning rate)",
                         config->min_lr, config->max_lr);
    }
    if (!(config->init_lr >= 0 && config->init_lr <= config->max_lr)) {
        return error_set("initial learning rate %g must be in 0..%g (the learning rate)",
                         config->init_lr, config->max_lr);
    }
    return 0;
}

static int check_spans(const struct lr_schedule_config *config)
{
    if (config->decay_samples <= 0) {
        return error_set("learning rate decay over %lld samples must be over 1 or more",
                         (long long)config->decay_samples);
    }
    if (!(config->warmup_samples >= 0 && config->warmup_samples < (double)config->decay_samples)) {
        return error_set("learning rate warmup over %.10g samples must be shorter than the decay, "
                         "which ends at sample %lld (warmup included)",
                         config->warmup_samples, (long long)config->decay_samples);
    }
    if (config->style == LR_DECAY_WSD &&
        (config->wsd_decay_samples < 1 || config->wsd_decay_samples > config->decay_samples)) {
        return error_set("WSD decay over the last %lld samples must be in 1..%lld (the learning "
                         "rate decay samples)",
                         (long long)config->wsd_decay_samples, (long long)config->decay_samples);
    }
    return 0;
}

static int check_weight_decay(const struct lr_schedule_config *config)
{
    const double start = config->start_weight_decay, end = config->end_weight_decay;

    if (!(start >= 0 && isfinite(start))) {
        return error_set("start weight decay %g must not be negative", start);
    }
    if (!(end >= start && isfinite(end))) {
        return error_set("end weight decay %g must not be below the start weight decay %g", end,
                         start);
    }
    if (config->weight_decay_style == WEIGHT_DECAY_CONSTANT) {
        if (start != end) {
            return error_set("weight decay from %g to %g needs an increment style other than "
                             "constant: linear or cosine",
                             start, end);
        }
        return 0;
    }
    if (config->weight_decay_samples < 1) {
        return error_set("weight decay increment over %lld samples must be over 1 or more",
                         (long long)config->weight_decay_samples);
    }
    return 0;
}

int lr_schedule_check(const struct lr_schedule_config *config)
{
    TRY(check_rates(config));
    TRY(check_spans(config));
    return check_weight_decay(config);
}

/* Share of (max - min) left after a fraction q, in 0..1, of the WSD tail. */
static double wsd_tail(enum lr_wsd_style style, double q)
{
    switch (style) {
    case LR_WSD_EXPONENTIAL:
        return 2 * pow(0.5, q) - 1;
    case LR_WSD_LINEAR:
        return 1 - q;
    case LR_WSD_COSINE:
        return (cos(M_PI * q) + 1) / 2;
    case LR_WSD_MINUS_SQRT:
        return 1 - sqrt(q);
    }
    PANIC("WSD style %d", (int)style);
}

static double wsd_coefficient(const struct lr_schedule_config *config, int64_t num_samples)
{
    const int64_t tail_start = config->decay_samples - config->wsd_decay_samples;

    if (num_samples <= tail_start) {
        return 1;
    }
    return wsd_tail(config->wsd_style,
                    (double)(num_samples - tail_start) / (double)config->wsd_decay_samples);
}

double lr_schedule_lr(const struct lr_schedule_config *config, int64_t num_samples)
{
    const double n = (double)num_samples, warmup = config->warmup_samples;
    const double span = config->max_lr - config->min_lr;
    const double progress = (n - warmup) / ((double)config->decay_samples - warmup);

    if (warmup > 0 && n <= warmup) {
        return config->init_lr + (config->max_lr - config->init_lr) * n / warmup;
    }
    if (config->style == LR_DECAY_CONSTANT) {
        return config->max_lr;
    }
    if (num_samples > config->decay_samples) {
        return config->min_lr;
    }
    switch (config->style) {
    case LR_DECAY_LINEAR:
        return config->min_lr + (1 - progress) * span;
    case LR_DECAY_COSINE:
        return config->min_lr + (cos(M_PI * progress) + 1) / 2 * span;
    case LR_DECAY_INVERSE_SQUARE_ROOT:
        return fmax(config->min_lr, config->max_lr * sqrt(fmax(warmup, 1)) / sqrt(fmax(n, 1)));
    case LR_DECAY_WSD:
        return config->min_lr + wsd_coefficient(config, num_samples) * span;
    case LR_DECAY_CONSTANT:
        break;
    }
    PANIC("learning rate style %d", (int)config->style);
}

double lr_schedule_weight_decay(const struct lr_schedule_config *config, int64_t num_samples)
{
    const double span = config->end_weight_decay - config->start_weight_decay;
    double progress;

    if (config->weight_decay_style == WEIGHT_DECAY_CONSTANT ||
        num_samples > config->weight_decay_samples) {
        return config->end_weight_decay;
    }
    progress = (double)num_samples / (double)config->weight_decay_samples;
    if (config->weight_decay_style == WEIGHT_DECAY_COSINE) {
        progress = (cos(M_PI * (1 - progress)) + 1) / 2;
    }
    return config->start_weight_decay + progress * span;
}
