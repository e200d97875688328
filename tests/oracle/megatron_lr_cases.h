/* megatron_lr_cases.h - DIR/megatron-lr.json: learning rate and weight decay before each step, a
 * curve for each pair of styles. */
#ifndef CADRE_TESTS_ORACLE_MEGATRON_LR_CASES_H
#define CADRE_TESTS_ORACLE_MEGATRON_LR_CASES_H

#include "oracle_case.h"
#include "oracle_files.h"
#include "optim/lr_schedule.h"

enum { LR_POINTS_MAX = 1 << 16 };

/* One curve and what it was made with. */
struct lr_curve {
    struct lr_schedule_config config;
    int64_t samples_per_step, num_points;
    const json_t *points; /* [[lr, weight decay], ...] */
};

static inline double lr_point(const struct lr_curve *curve, int64_t i, int column)
{
    return json_number_value(
        json_array_get(json_array_get(curve->points, (size_t)i), (size_t)column));
}

static inline int lr_check_points(const struct lr_curve *curve)
{
    if (!json_is_array(curve->points) || curve->num_points < 1 ||
        curve->num_points > LR_POINTS_MAX) {
        return error_set("a curve is not an array of 1 .. %d points", LR_POINTS_MAX);
    }
    for (int64_t i = 0; i < curve->num_points; i++) {
        const json_t *point = json_array_get(curve->points, (size_t)i);

        if (json_array_size(point) != 2 || !json_is_number(json_array_get(point, 0)) ||
            !json_is_number(json_array_get(point, 1))) {
            return error_set("point %lld is not [lr, weight decay]", (long long)i);
        }
    }
    return 0;
}

/* The numbers of the file's "meaning". */
static inline int lr_read_meaning(const json_t *json, struct lr_curve *curve)
{
    const char *meaning = json_string_value(json_object_get(json, "meaning"));
    struct lr_schedule_config *config = &curve->config;
    long long decay, per_step;

    if (meaning == NULL ||
        sscanf(meaning,
               "init_lr %lf max %lf min %lf warmup %lf decay %lld samples, %lld samples a step",
               &config->init_lr, &config->max_lr, &config->min_lr, &config->warmup_samples, &decay,
               &per_step) != 6 ||
        per_step < 1 || per_step > 1 << 20) {
        return error_set(
            "\"meaning\" does not say init_lr, max, min, warmup, decay, samples a step");
    }
    config->decay_samples = decay;
    curve->samples_per_step = per_step;
    return 0;
}

static inline int lr_read_styles(const char *name, struct lr_schedule_config *config)
{
    static const struct {
        const char *name;
        enum lr_decay_style style;
        enum lr_wsd_style wsd;
    } styles[] = {
        {"cosine", LR_DECAY_COSINE, 0},
        {"linear", LR_DECAY_LINEAR, 0},
        {"constant", LR_DECAY_CONSTANT, 0},
        {"isr", LR_DECAY_INVERSE_SQUARE_ROOT, 0},
        {"wsd-exp", LR_DECAY_WSD, LR_WSD_EXPONENTIAL},
        {"wsd-lin", LR_DECAY_WSD, LR_WSD_LINEAR},
        {"wsd-cos", LR_DECAY_WSD, LR_WSD_COSINE},
        {"wsd-sqrt", LR_DECAY_WSD, LR_WSD_MINUS_SQRT},
    };
    const char *slash = strchr(name, '/');

    if (slash == NULL) {
        return error_set("the name is not LR-STYLE/WEIGHT-DECAY-STYLE");
    }
    for (size_t i = 0; i < sizeof styles / sizeof styles[0]; i++) {
        if (strlen(styles[i].name) == (size_t)(slash - name) &&
            strncmp(styles[i].name, name, (size_t)(slash - name)) == 0) {
            config->style = styles[i].style;
            config->wsd_style = styles[i].wsd;
            return weight_decay_style_parse(slash + 1, &config->weight_decay_style);
        }
    }
    return error_set("learning rate style of %s is not known", name);
}

/* What the meaning leaves out is read off the curve: the weight decay goes from its first to its
 * last value over the whole curve; the WSD tail begins at the last point that has the full rate. */
static inline void lr_read_off_curve(struct lr_curve *curve)
{
    struct lr_schedule_config *config = &curve->config;
    const int64_t last = curve->num_points - 1;
    int64_t flat = 0;

    config->start_weight_decay = lr_point(curve, 0, 1);
    config->end_weight_decay = lr_point(curve, last, 1);
    config->weight_decay_samples = last * curve->samples_per_step;
    for (int64_t i = 0; i <= last; i++) {
        if (lr_point(curve, i, 0) == config->max_lr) {
            flat = i * curve->samples_per_step;
        }
    }
    config->wsd_decay_samples = config->decay_samples - flat;
}

/* The largest value of a column, by which errors are divided. */
static inline double lr_largest(const struct lr_curve *curve, int column)
{
    double largest = 1e-300;

    for (int64_t i = 0; i < curve->num_points; i++) {
        largest = fmax(largest, fabs(lr_point(curve, i, column)));
    }
    return largest;
}

static inline int lr_curve_compare(struct oracle_case *golden, struct lr_curve *curve)
{
    double largest_lr, largest_weight_decay;

    TRY(lr_check_points(curve));
    lr_read_off_curve(curve);
    TRY(lr_schedule_check(&curve->config));
    largest_lr = lr_largest(curve, 0);
    largest_weight_decay = lr_largest(curve, 1);
    for (int64_t i = 0; i < curve->num_points; i++) {
        const int64_t samples = i * curve->samples_per_step;
        const double lr = lr_schedule_lr(&curve->config, samples);
        const double weight_decay = lr_schedule_weight_decay(&curve->config, samples);

        oracle_note(golden, "lr", fabs(lr - lr_point(curve, i, 0)) / largest_lr);
        oracle_note(golden, "weight decay",
                    fabs(weight_decay - lr_point(curve, i, 1)) / largest_weight_decay);
    }
    return 0;
}

static inline void lr_case(const json_t *json, const char *name, const json_t *points)
{
    struct lr_curve curve = {.points = points, .num_points = (int64_t)json_array_size(points)};
    struct oracle_case golden;
    char full_name[128];
    int status;

    snprintf(full_name, sizeof full_name, "lr/%s", name);
    oracle_case_begin(&golden, full_name, 1e-9);
    status = lr_read_meaning(json, &curve);
    if (status == 0) {
        status = lr_read_styles(name, &curve.config);
    }
    if (status == 0) {
        status = lr_curve_compare(&golden, &curve);
    }
    oracle_case_end(&golden, status);
}

/* Returns the number of curves, or -1. */
static inline int megatron_lr_cases(const char *path)
{
    json_t *points, *json = oracle_json(path);
    const json_t *curves = json_object_get(json, "curves");
    const char *name;
    int count = 0;

    if (json == NULL) {
        return -1;
    }
    json_object_foreach((json_t *)curves, name, points)
    {
        lr_case(json, name, points);
        count++;
    }
    json_decref(json);
    return count;
}

#endif
