/* Learning rate and weight decay against curves that Megatron's own scheduler gave. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#include "base/check.h"
#include "base/path.h"
#include "optim/lr_schedule.h"

enum { NUM_STEPS = 26, SAMPLES_PER_STEP = 8, FIXTURE_MAX_BYTES = 1 << 20 };

/* What the fixture's "meaning" says; the WSD tail and the weight decay's span are read off the
 * curves: flat up to sample 120, and 0.1 reached at sample 200. */
static const struct lr_schedule_config fixture_config = {
    .init_lr = 1e-6,
    .max_lr = 1e-3,
    .min_lr = 1e-4,
    .warmup_samples = 20,
    .decay_samples = 160,
    .wsd_decay_samples = 40,
    .start_weight_decay = 0.01,
    .end_weight_decay = 0.1,
    .weight_decay_samples = 200,
};

static const struct {
    const char *name;
    enum lr_decay_style style;
    enum lr_wsd_style wsd_style;
} lr_styles[] = {
    {"cosine", LR_DECAY_COSINE, 0},
    {"linear", LR_DECAY_LINEAR, 0},
    {"constant", LR_DECAY_CONSTANT, 0},
    {"isr", LR_DECAY_INVERSE_SQUARE_ROOT, 0},
    {"wsd-exp", LR_DECAY_WSD, LR_WSD_EXPONENTIAL},
    {"wsd-lin", LR_DECAY_WSD, LR_WSD_LINEAR},
    {"wsd-cos", LR_DECAY_WSD, LR_WSD_COSINE},
};

/* Reads the 2 * NUM_STEPS numbers after "name": in the fixture, which is nothing but names and
 * nested arrays of numbers. */
static void read_curve(const char *json, const char *name, double *numbers)
{
    char quoted[64];
    const char *next;

    snprintf(quoted, sizeof quoted, "\"%s\":", name);
    next = strstr(json, quoted);
    assert_non_null(next);
    next += strlen(quoted);
    for (int i = 0; i < 2 * NUM_STEPS; i++) {
        char *end;

        next += strspn(next, " \n[],");
        numbers[i] = strtod(next, &end);
        assert_true(end > next);
        next = end;
    }
}

static void compare_curve(const char *json, const char *name,
                          const struct lr_schedule_config *config)
{
    double curve[2 * NUM_STEPS]; /* [step, (lr, weight decay)] */

    read_curve(json, name, curve);
    assert_int_equal(lr_schedule_check(config), 0);
    for (int i = 0; i < NUM_STEPS; i++) {
        const double lr = lr_schedule_lr(config, i * SAMPLES_PER_STEP);
        const double weight_decay = lr_schedule_weight_decay(config, i * SAMPLES_PER_STEP);

        if (fabs(lr - curve[2 * i]) > 1e-12 || fabs(weight_decay - curve[2 * i + 1]) > 1e-12) {
            fail_msg("%s step %d: lr %.12g weight decay %.12g, expected %.12g %.12g", name, i, lr,
                     weight_decay, curve[2 * i], curve[2 * i + 1]);
        }
    }
}

static void every_style_gives_megatrons_curve(void **state)
{
    size_t length;
    char *json = path_read_file(FIXTURES "/megatron-lr.json", FIXTURE_MAX_BYTES, &length);

    assert_non_null(json);
    for (size_t i = 0; i < sizeof lr_styles / sizeof lr_styles[0]; i++) {
        for (int wd = WEIGHT_DECAY_CONSTANT; wd <= WEIGHT_DECAY_COSINE; wd++) {
            struct lr_schedule_config config = fixture_config;
            char name[64];

            config.style = lr_styles[i].style;
            config.wsd_style = lr_styles[i].wsd_style;
            config.weight_decay_style = (enum weight_decay_style)wd;
            if (wd == WEIGHT_DECAY_CONSTANT) {
                config.start_weight_decay = config.end_weight_decay;
            }
            snprintf(name, sizeof name, "%s/%s", lr_styles[i].name,
                     weight_decay_style_name(config.weight_decay_style));
            compare_curve(json, name, &config);
        }
    }
    free(json);
}

static void minus_sqrt_tail_falls_with_the_root(void **state)
{
    struct lr_schedule_config config = fixture_config;

    config.style = LR_DECAY_WSD;
    config.wsd_style = LR_WSD_MINUS_SQRT;
    assert_true(lr_schedule_lr(&config, 120) == 1e-3);
    /* A quarter of the tail: 1 - sqrt(1/4) of 9e-4 above 1e-4. */
    assert_true(fabs(lr_schedule_lr(&config, 130) - 5.5e-4) < 1e-15);
    assert_true(fabs(lr_schedule_lr(&config, 160) - 1e-4) < 1e-15);
}

static void no_warmup_starts_at_the_full_rate(void **state)
{
    struct lr_schedule_config config = fixture_config;

    config.warmup_samples = 0;
    config.style = LR_DECAY_COSINE;
    assert_true(lr_schedule_lr(&config, 0) == 1e-3);
    config.style = LR_DECAY_INVERSE_SQUARE_ROOT;
    assert_true(lr_schedule_lr(&config, 0) == 1e-3);
    assert_true(fabs(lr_schedule_lr(&config, 4) - 5e-4) < 1e-15);
}

static void a_warmup_fraction_need_not_be_whole(void **state)
{
    struct lr_schedule_config config = fixture_config;

    config.warmup_samples = 12.8;
    config.init_lr = 0;
    assert_true(fabs(lr_schedule_lr(&config, 8) - 1e-3 * 8 / 12.8) < 1e-15);
}

static void weight_decay_stays_at_its_end(void **state)
{
    struct lr_schedule_config config = fixture_config;

    for (int wd = WEIGHT_DECAY_CONSTANT; wd <= WEIGHT_DECAY_COSINE; wd++) {
        config.weight_decay_style = (enum weight_decay_style)wd;
        assert_true(lr_schedule_weight_decay(&config, 300) == 0.1);
    }
}

static void expect_refusal(struct lr_schedule_config config, const char *says)
{
    assert_int_equal(lr_schedule_check(&config), -1);
    if (strstr(error_text(), says) == NULL) {
        fail_msg("\"%s\" does not say \"%s\"", error_text(), says);
    }
}

static void contradictions_are_refused_with_their_values(void **state)
{
    struct lr_schedule_config config = fixture_config;

    config.style = LR_DECAY_WSD;
    config.weight_decay_style = WEIGHT_DECAY_LINEAR;
    assert_int_equal(lr_schedule_check(&config), 0);
#define REFUSE(field, value, says)                                                                 \
    do {                                                                                           \
        struct lr_schedule_config bad = config;                                                    \
        bad.field = value;                                                                         \
        expect_refusal(bad, says);                                                                 \
    } while (0)
    REFUSE(warmup_samples, 160, "160");
    REFUSE(warmup_samples, NAN, "warmup");
    REFUSE(decay_samples, 0, "decay over 0");
    REFUSE(max_lr, -1, "-1");
    REFUSE(min_lr, 2e-3, "0.002");
    REFUSE(init_lr, 2e-3, "0.002");
    REFUSE(wsd_decay_samples, 0, "1..160");
    REFUSE(wsd_decay_samples, 161, "161");
    REFUSE(start_weight_decay, 0.2, "0.2");
    REFUSE(start_weight_decay, -0.1, "-0.1");
    REFUSE(weight_decay_style, WEIGHT_DECAY_CONSTANT, "constant");
    REFUSE(weight_decay_samples, 0, "over 0 samples");
#undef REFUSE
}

static void names_go_there_and_back(void **state)
{
    enum lr_decay_style style;
    enum lr_wsd_style wsd_style;
    enum weight_decay_style wd_style;

    for (int i = LR_DECAY_CONSTANT; i <= LR_DECAY_WSD; i++) {
        assert_int_equal(lr_decay_style_parse(lr_decay_style_name(i), &style), 0);
        assert_int_equal(style, i);
    }
    for (int i = LR_WSD_EXPONENTIAL; i <= LR_WSD_MINUS_SQRT; i++) {
        assert_int_equal(lr_wsd_style_parse(lr_wsd_style_name(i), &wsd_style), 0);
        assert_int_equal(wsd_style, i);
    }
    for (int i = WEIGHT_DECAY_CONSTANT; i <= WEIGHT_DECAY_COSINE; i++) {
        assert_int_equal(weight_decay_style_parse(weight_decay_style_name(i), &wd_style), 0);
        assert_int_equal(wd_style, i);
    }
    assert_int_equal(lr_decay_style_parse("wsd", &style), -1);
    assert_string_equal(error_text(), "learning rate decay style \"wsd\" is not known; legal are "
                                      "constant, linear, cosine, inverse-square-root, WSD");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_style_gives_megatrons_curve),
        cmocka_unit_test(minus_sqrt_tail_falls_with_the_root),
        cmocka_unit_test(no_warmup_starts_at_the_full_rate),
        cmocka_unit_test(a_warmup_fraction_need_not_be_whole),
        cmocka_unit_test(weight_decay_stays_at_its_end),
        cmocka_unit_test(contradictions_are_refused_with_their_values),
        cmocka_unit_test(names_go_there_and_back),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
