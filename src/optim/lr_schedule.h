/* lr_schedule.h - learning rate and weight decay as pure functions of the number of samples that
 * training has consumed (of successful steps). Step 1 uses lr_schedule_lr(config, 0); the line
 * printed after a step shows the rate of the next one.
 *
 * A parameter group with its own rate (--decoupled-lr) copies the config and sets max_lr, min_lr.
 */
#ifndef CADRE_OPTIM_LR_SCHEDULE_H
#define CADRE_OPTIM_LR_SCHEDULE_H

#include <stdint.h>

enum lr_decay_style {
    LR_DECAY_CONSTANT,
    LR_DECAY_LINEAR,
    LR_DECAY_COSINE,
    LR_DECAY_INVERSE_SQUARE_ROOT,
    LR_DECAY_WSD, /* warmup, stable, decay: constant, then a tail of wsd_decay_samples */
};

enum lr_wsd_style {
    LR_WSD_EXPONENTIAL,
    LR_WSD_LINEAR,
    LR_WSD_COSINE,
    LR_WSD_MINUS_SQRT,
};

enum weight_decay_style {
    WEIGHT_DECAY_CONSTANT,
    WEIGHT_DECAY_LINEAR,
    WEIGHT_DECAY_COSINE,
};

struct lr_schedule_config {
    double init_lr; /* at sample 0, rising to max_lr over warmup_samples */
    double max_lr;
    double min_lr;
    double warmup_samples; /* not always whole: --lr-warmup-fraction times decay_samples */
    int64_t decay_samples; /* counted from 0, warmup included; min_lr after it */
    enum lr_decay_style style;
    enum lr_wsd_style wsd_style;
    int64_t wsd_decay_samples; /* the tail before decay_samples; only for LR_DECAY_WSD */
    double start_weight_decay; /* equal to the end for WEIGHT_DECAY_CONSTANT */
    double end_weight_decay;
    enum weight_decay_style weight_decay_style;
    int64_t weight_decay_samples; /* from start to end; all of training */
};

/* 0, or -1 with error_set() for the first contradiction. The functions below need a config that
 * passed. */
int lr_schedule_check(const struct lr_schedule_config *config);
double lr_schedule_lr(const struct lr_schedule_config *config, int64_t num_samples);
double lr_schedule_weight_decay(const struct lr_schedule_config *config, int64_t num_samples);

/* The names the flags take: "constant", "linear", "cosine", "inverse-square-root", "WSD";
 * "exponential", "linear", "cosine", "minus_sqrt"; "constant", "linear", "cosine". */
const char *lr_decay_style_name(enum lr_decay_style style);
const char *lr_wsd_style_name(enum lr_wsd_style style);
const char *weight_decay_style_name(enum weight_decay_style style);
/* 0, or -1 with error_set() listing what is legal. */
int lr_decay_style_parse(const char *name, enum lr_decay_style *style);
int lr_wsd_style_parse(const char *name, enum lr_wsd_style *style);
int weight_decay_style_parse(const char *name, enum weight_decay_style *style);

#endif
