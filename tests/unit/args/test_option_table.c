#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <stdlib.h>
#include <string.h>

#include "args/option_table.h"
#include "base/check.h"

struct values {
    bool loud, warm;
    int64_t times, threads, none_or_more;
    double rate, share;
    char *name, *style, *input;
    struct option_strings paths, kinds;
    struct option_ints ramp;
    struct option_floats weights;
};

static const struct option_row rows[] = {
    OPTION_SWITCH(struct values, "--loud", loud, "voice", "in capitals"),
    OPTION_NO_SWITCH(struct values, "--no-warm-up", warm, "voice", "start cold"),
    OPTION_INTEGER(struct values, "--times", times, "3", 1, 100, "voice", "how often"),
    {.flag = "--threads",
     .type = OPTION_INT,
     .offset = OPTION_FIELD(struct values, threads, int64_t),
     .default_text = "0",
     .max = 64,
     .environment = "CADRE_TEST_THREADS",
     .group = "voice",
     .help = "threads"},
    OPTION_INTEGER(struct values, "--step", none_or_more, "-1", 0, OPTION_NO_MAX, "voice", "step"),
    OPTION_NUMBER(struct values, "--rate", rate, "0.5", OPTION_ABOVE_ZERO, 10, "voice", "speed"),
    OPTION_NUMBER(struct values, "--share", share, NULL, 0, OPTION_BELOW_ONE, "voice", "share"),
    OPTION_TEXT(struct values, "--name", name, NULL, "voice", "whom"),
    OPTION_ONE_OF(struct values, "--style", style, "calm", "calm wild", "voice", "how"),
    OPTION_TEXTS(struct values, "--paths", paths, "files", "where"),
    {.flag = "--kinds",
     .type = OPTION_CHOICES,
     .offset = OPTION_FIELD(struct values, kinds, struct option_strings),
     .default_text = "a",
     .choices = "a b c",
     .is_model_arg = true,
     .group = "files",
     .help = "kinds"},
    {.flag = "--ramp",
     .type = OPTION_INTS,
     .offset = OPTION_FIELD(struct values, ramp, struct option_ints),
     .max = 1000,
     .group = "files",
     .help = "ramp"},
    {.flag = "--weights",
     .type = OPTION_FLOATS,
     .offset = OPTION_FIELD(struct values, weights, struct option_floats),
     .default_text = "0.25",
     .max = 1,
     .is_model_arg = true,
     .group = "files",
     .help = "weights"},
    {.flag = "--always",
     .type = OPTION_FLAG,
     .status = OPTION_ALWAYS,
     .offset = OPTION_NO_FIELD,
     .group = "files",
     .help = "always",
     .reason = "so it is"},
    {.flag = "--always-word",
     .type = OPTION_CHOICE,
     .status = OPTION_ALWAYS,
     .offset = OPTION_NO_FIELD,
     .default_text = "x",
     .choices = "x y",
     .group = "files",
     .help = "always",
     .reason = "so it is"},
    {.flag = "--always-number",
     .type = OPTION_INT,
     .status = OPTION_ALWAYS,
     .offset = OPTION_NO_FIELD,
     .min = OPTION_NO_MIN,
     .max = OPTION_NO_MAX,
     .group = "files",
     .help = "always",
     .reason = "so it is"},
    {.flag = "--refused",
     .type = OPTION_FLAG,
     .status = OPTION_REFUSED,
     .offset = OPTION_NO_FIELD,
     .group = "files",
     .help = "never",
     .reason = "use --loud"},
    {.flag = "--refused-word",
     .type = OPTION_STRING,
     .status = OPTION_REFUSED,
     .offset = OPTION_NO_FIELD,
     .default_text = "fp32",
     .group = "files",
     .help = "never",
     .reason = "not yet"},
    {.flag = "--refused-number",
     .type = OPTION_FLOAT,
     .status = OPTION_REFUSED,
     .offset = OPTION_NO_FIELD,
     .default_text = "1.0",
     .min = OPTION_NO_MIN,
     .max = OPTION_NO_MAX,
     .group = "files",
     .help = "never",
     .reason = "not yet"},
    OPTION_TEXT(struct values, "INPUT", input, NULL, "files", "what is read"),
};

static const struct option_table table = OPTION_TABLE("greet", "Says hello.", rows);
enum { NUM_ROWS = sizeof rows / sizeof rows[0], WORDS_MAX = 32 };

static enum option_origin origins[NUM_ROWS];

/* Parses the words of line, separated by blanks. */
static int parse(struct values *v, const char *line)
{
    static char copy[1024];
    char *argv[WORDS_MAX] = {"greet"};
    int argc = 1;

    snprintf(copy, sizeof copy, "%s", line);
    assert_int_equal(option_table_init(&table, v, origins), 0);
    for (char *word = strtok(copy, " "); word != NULL; word = strtok(NULL, " ")) {
        argv[argc++] = word;
    }
    return option_table_parse(&table, argc, argv, v, origins);
}

static void expect_error(const char *line, const char *text)
{
    struct values v;

    assert_int_equal(parse(&v, line), -1);
    if (strstr(error_text(), text) == NULL) {
        fail_msg("%s: said '%s', not '%s'", line, error_text(), text);
    }
    option_table_free(&table, &v);
}

static enum option_origin origin_of(const char *flag)
{
    return origins[option_table_index(&table, option_table_find(&table, flag))];
}

static void defaults_hold_when_nothing_is_given(void **state)
{
    struct values v;

    assert_int_equal(parse(&v, ""), 0);
    assert_false(v.loud);
    assert_true(v.warm);
    assert_int_equal(v.times, 3);
    assert_int_equal(v.none_or_more, -1);
    assert_true(v.rate == 0.5 && v.share == 0.0);
    assert_null(v.name);
    assert_string_equal(v.style, "calm");
    assert_int_equal(v.paths.num_items, 0);
    assert_int_equal(v.kinds.num_items, 1);
    assert_true(v.weights.items[0] == 0.25);
    assert_int_equal(origin_of("--times"), ORIGIN_DEFAULT);
    option_table_free(&table, &v);
}

static void values_follow_a_blank_or_an_equals_sign(void **state)
{
    struct values v;

    assert_int_equal(parse(&v, "--times 7 --rate=1e-3 --name=--odd=name --no-warm-up --loud"), 0);
    assert_int_equal(v.times, 7);
    assert_true(v.rate == 1e-3);
    assert_string_equal(v.name, "--odd=name");
    assert_true(v.loud);
    assert_false(v.warm);
    assert_int_equal(origin_of("--times"), ORIGIN_COMMAND_LINE);
    option_table_free(&table, &v);
}

static void the_last_of_a_repeated_flag_wins(void **state)
{
    struct values v;

    assert_int_equal(parse(&v, "--times 7 --name a --paths x y --times 8 --name b --paths z"), 0);
    assert_int_equal(v.times, 8);
    assert_string_equal(v.name, "b");
    assert_int_equal(v.paths.num_items, 1);
    assert_string_equal(v.paths.items[0], "z");
    option_table_free(&table, &v);
}

static void lists_take_every_word_up_to_the_next_flag(void **state)
{
    struct values v;

    assert_int_equal(parse(&v, "--paths 0.3 a 0.7 b --ramp 1 2 3 --weights 0 1 --kinds c a"), 0);
    assert_int_equal(v.paths.num_items, 4);
    assert_string_equal(v.paths.items[3], "b");
    assert_int_equal(v.ramp.num_items, 3);
    assert_int_equal(v.ramp.items[2], 3);
    assert_int_equal(v.weights.num_items, 2);
    assert_string_equal(v.kinds.items[0], "c");
    option_table_free(&table, &v);
}

static void origins_may_go_unrecorded(void **state)
{
    char *argv[] = {"greet", "--times", "7", "dir"};
    struct values v;

    assert_int_equal(option_table_init(&table, &v, NULL), 0);
    assert_int_equal(option_table_parse(&table, 4, argv, &v, NULL), 0);
    assert_int_equal(v.times, 7);
    assert_string_equal(v.input, "dir");
    assert_int_equal(option_table_set(&table, "--times", "8", ORIGIN_DERIVED, &v, NULL), 0);
    assert_int_equal(v.times, 8);
    assert_int_equal(option_table_set(&table, "--times", "x", ORIGIN_DERIVED, &v, NULL), -1);
    option_table_free(&table, &v);
}

static void legal_values_are_described(void **state)
{
    const struct {
        struct option_row row;
        const char *text;
    } cases[] = {
        {{.type = OPTION_INT, .min = 1, .max = 9}, "an integer from 1 to 9"},
        {{.type = OPTION_INT, .min = 1, .max = OPTION_NO_MAX}, "an integer of at least 1"},
        {{.type = OPTION_INT, .min = OPTION_NO_MIN, .max = OPTION_NO_MAX}, "an integer"},
        {{.type = OPTION_FLOAT, .min = OPTION_ABOVE_ZERO, .max = OPTION_NO_MAX},
         "a number above 0"},
        {{.type = OPTION_FLOAT, .min = OPTION_NO_MIN, .max = OPTION_NO_MAX}, "a number"},
        {{.type = OPTION_STRING}, ""},
        {{.type = OPTION_CHOICE, .choices = "a b"}, "one of a, b"},
        {{.type = OPTION_CHOICE, .choices = "a"}, "a"},
    };
    char text[64];

    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        option_row_describe_legal(&cases[i].row, text, sizeof text);
        assert_string_equal(text, cases[i].text);
    }
}

static void a_description_is_cut_where_room_ends(void **state)
{
    const struct option_row row = {.type = OPTION_CHOICE, .choices = "abcdefgh ijklmnop"};
    char text[12];

    option_row_describe_legal(&row, text, 10);
    assert_string_equal(text, "one of ab");
}

static void a_negative_number_is_a_value(void **state)
{
    expect_error("--times -5", "--times -5: must be an integer from 1 to 100");
}

static void unknown_flags_get_a_suggestion(void **state)
{
    expect_error("--tmes 3", "unknown flag --tmes: did you mean --times?");
    expect_error("-times 3", "unknown flag -times: did you mean --times?");
    expect_error("--no_warm_up", "did you mean --no-warm-up?");
    expect_error("--zzzzzzzzzzzz 3", "unknown flag --zzzzzzzzzzzz: `cadre greet --help`");
}

static void an_abbreviation_is_not_accepted(void **state)
{
    expect_error("--time 3", "unknown flag --time: did you mean --times?");
}

static void an_overlong_flag_is_an_error(void **state)
{
    char line[600] = "--";

    memset(line + 2, 'x', 500);
    line[502] = '\0';
    expect_error(line, "unknown flag --xxx");
}

static void missing_values_say_what_is_legal(void **state)
{
    expect_error("--times", "--times needs a value: an integer from 1 to 100");
    expect_error("--times --loud", "--times needs a value");
    expect_error("--paths --loud", "--paths needs a value");
    expect_error("--style", "--style needs a value: one of calm, wild");
}

static void ill_typed_numbers_are_refused(void **state)
{
    static const char *const bad_ints[] = {"",    "x",   "3x",  "1.0", "1e2",
                                           "0x3", "--",  "+-3", "nan", "99999999999999999999999",
                                           "4k",  "101", "0"};
    static const char *const bad_floats[] = {"",  "x",  "nan",  "inf", "0x1", "1e999",
                                             "0", "-1", "10.5", "1,5", "1.0f"};
    char line[128];

    for (size_t i = 0; i < sizeof bad_ints / sizeof bad_ints[0]; i++) {
        snprintf(line, sizeof line, "--times=%s", bad_ints[i]);
        expect_error(line, "must be an integer from 1 to 100");
    }
    for (size_t i = 0; i < sizeof bad_floats / sizeof bad_floats[0]; i++) {
        snprintf(line, sizeof line, "--rate=%s", bad_floats[i]);
        expect_error(line, "must be a number above 0 and at most 10");
    }
    expect_error("--share 1", "must be a number from 0 to below 1");
    expect_error("--step -1", "must be an integer of at least 0");
}

static void a_wrong_item_of_a_list_is_named(void **state)
{
    expect_error("--ramp 1 two 3", "--ramp two: must be an integer from 0 to 1000");
    expect_error("--weights 0.5 2", "--weights 2: must be a number from 0 to 1");
    expect_error("--kinds a d", "--kinds d: must be one of a, b, c");
}

static void a_wrong_choice_lists_the_legal_ones(void **state)
{
    expect_error("--style cal", "--style cal: must be one of calm, wild");
    expect_error("--style=", "must be one of calm, wild");
}

static void switches_take_no_value(void **state)
{
    expect_error("--loud=true", "--loud takes no value");
    expect_error("--name x --loud y z", "unexpected argument 'z'");
}

static void a_failing_flag_leaves_its_field_alone(void **state)
{
    struct values v;

    assert_int_equal(parse(&v, "--style wild --kinds b --style tame"), -1);
    assert_string_equal(v.style, "wild");
    assert_string_equal(v.kinds.items[0], "b");
    option_table_free(&table, &v);
}

static void refused_flags_are_errors_with_their_reason(void **state)
{
    expect_error("--refused", "--refused is not built in cadre: use --loud");
    expect_error("--refused-word bf16", "--refused-word bf16 is not built in cadre: not yet");
    expect_error("--refused-number 2", "--refused-number 2 is not built in cadre: not yet (1.0");
    expect_error("--refused-number", "--refused-number is not built in cadre: not yet");
}

static void a_refused_flag_may_have_its_default(void **state)
{
    struct values v;

    assert_int_equal(parse(&v, "--refused-number 1 --refused-word fp32"), 0);
    option_table_free(&table, &v);
}

static void promises_always_kept_are_accepted(void **state)
{
    struct values v;

    assert_int_equal(parse(&v, "--always --always-word y --always-number -7"), 0);
    assert_int_equal(origin_of("--always"), ORIGIN_COMMAND_LINE);
    option_table_free(&table, &v);
    expect_error("--always-word z", "--always-word z: must be one of x, y");
    expect_error("--always-number z", "--always-number z: must be an integer");
}

static void a_positional_argument_fills_its_row(void **state)
{
    struct values v;

    assert_int_equal(parse(&v, "--times 2 some/dir --loud"), 0);
    assert_string_equal(v.input, "some/dir");
    option_table_free(&table, &v);
    expect_error("one two", "unexpected argument 'two'");
}

static void the_environment_yields_to_the_command_line(void **state)
{
    struct values v;

    setenv("CADRE_TEST_THREADS", "5", 1);
    assert_int_equal(parse(&v, ""), 0);
    assert_int_equal(v.threads, 5);
    assert_int_equal(origin_of("--threads"), ORIGIN_ENVIRONMENT);
    option_table_free(&table, &v);
    assert_int_equal(parse(&v, "--threads 6"), 0);
    assert_int_equal(v.threads, 6);
    option_table_free(&table, &v);
    setenv("CADRE_TEST_THREADS", "many", 1);
    expect_error("", "environment variable CADRE_TEST_THREADS: --threads many: must be");
    unsetenv("CADRE_TEST_THREADS");
}

static void values_survive_a_trip_through_json(void **state)
{
    struct values v, w;
    json_t *object;

    assert_int_equal(parse(&v, "--weights 0.1 1e-05 --kinds c b --times 9 --ramp 4 5"), 0);
    object = option_table_to_json(&table, &v);
    assert_non_null(object);
    assert_true(json_is_true(json_object_get(object, "warm_up")));
    assert_true(json_is_null(json_object_get(object, "name")));
    assert_int_equal(json_integer_value(json_object_get(object, "times")), 9);
    assert_null(json_object_get(object, "always"));
    assert_int_equal(json_integer_value(json_array_get(json_object_get(object, "ramp"), 1)), 5);

    assert_int_equal(parse(&w, ""), 0);
    assert_int_equal(option_table_apply_json(&table, object, &w, origins), 0);
    assert_int_equal(w.weights.num_items, 2);
    assert_true(w.weights.items[1] == 1e-05);
    assert_string_equal(w.kinds.items[1], "b");
    assert_int_equal(origin_of("--kinds"), ORIGIN_CHECKPOINT);
    assert_int_equal(w.times, 3); /* no model argument */
    json_decref(object);
    option_table_free(&table, &v);
    option_table_free(&table, &w);
}

static void an_empty_list_in_json_empties_the_list(void **state)
{
    struct values v;
    json_t *object = json_pack("{s:[]}", "kinds");

    assert_int_equal(parse(&v, ""), 0);
    assert_int_equal(option_table_apply_json(&table, object, &v, origins), 0);
    assert_int_equal(v.kinds.num_items, 0);
    json_decref(object);
    option_table_free(&table, &v);
}

static void the_command_line_wins_over_json(void **state)
{
    struct values v;
    json_t *object = json_pack("{s:[s]}", "kinds", "c");

    assert_int_equal(parse(&v, "--kinds b"), 0);
    assert_int_equal(option_table_apply_json(&table, object, &v, origins), 0);
    assert_string_equal(v.kinds.items[0], "b");
    assert_int_equal(origin_of("--kinds"), ORIGIN_COMMAND_LINE);
    json_decref(object);
    option_table_free(&table, &v);
}

static void bad_json_values_are_errors(void **state)
{
    static const char *const bad[][2] = {
        {"[]", "not a JSON object"},
        {"{\"kinds\": \"a\"}", "saved config: --kinds: must be a list"},
        {"{\"kinds\": [\"d\"]}", "--kinds d: must be one of a, b, c"},
        {"{\"kinds\": [1]}", "found an integer"},
        {"{\"weights\": [\"0.5\"]}", "must be a list, each a number from 0 to 1, found a string"},
        {"{\"weights\": [2.5]}", "--weights 2.5: must be a number"},
        {"{\"weights\": [1e300]}", "must be a number"},
    };

    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        struct values v;
        json_t *object = json_loads(bad[i][0], 0, NULL);

        assert_non_null(object);
        assert_int_equal(parse(&v, ""), 0);
        assert_int_equal(option_table_apply_json(&table, object, &v, origins), -1);
        if (strstr(error_text(), bad[i][1]) == NULL) {
            fail_msg("%s: said '%s'", bad[i][0], error_text());
        }
        json_decref(object);
        option_table_free(&table, &v);
    }
}

static void numbers_print_as_short_as_they_read_back(void **state)
{
    struct values v;
    char text[64];

    assert_int_equal(parse(&v, "--rate 0.1 --ramp 1 22"), 0);
    option_row_format(option_table_find(&table, "--ramp"), &v, text, sizeof text);
    assert_string_equal(text, "1 22");
    option_row_format(option_table_find(&table, "--kinds"), &v, text, sizeof text);
    assert_string_equal(text, "a");
    option_row_format(option_table_find(&table, "--rate"), &v, text, sizeof text);
    assert_string_equal(text, "0.1");
    v.rate = 1.0 / 3.0;
    option_row_format(option_table_find(&table, "--rate"), &v, text, sizeof text);
    assert_true(strtod(text, NULL) == 1.0 / 3.0);
    option_row_format(option_table_find(&table, "--weights"), &v, text, sizeof text);
    assert_string_equal(text, "0.25");
    option_row_format(option_table_find(&table, "--paths"), &v, text, sizeof text);
    assert_string_equal(text, "none");
    option_table_free(&table, &v);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(defaults_hold_when_nothing_is_given),
        cmocka_unit_test(values_follow_a_blank_or_an_equals_sign),
        cmocka_unit_test(the_last_of_a_repeated_flag_wins),
        cmocka_unit_test(lists_take_every_word_up_to_the_next_flag),
        cmocka_unit_test(origins_may_go_unrecorded),
        cmocka_unit_test(legal_values_are_described),
        cmocka_unit_test(a_description_is_cut_where_room_ends),
        cmocka_unit_test(a_negative_number_is_a_value),
        cmocka_unit_test(unknown_flags_get_a_suggestion),
        cmocka_unit_test(an_abbreviation_is_not_accepted),
        cmocka_unit_test(an_overlong_flag_is_an_error),
        cmocka_unit_test(missing_values_say_what_is_legal),
        cmocka_unit_test(ill_typed_numbers_are_refused),
        cmocka_unit_test(a_wrong_item_of_a_list_is_named),
        cmocka_unit_test(a_wrong_choice_lists_the_legal_ones),
        cmocka_unit_test(switches_take_no_value),
        cmocka_unit_test(a_failing_flag_leaves_its_field_alone),
        cmocka_unit_test(refused_flags_are_errors_with_their_reason),
        cmocka_unit_test(a_refused_flag_may_have_its_default),
        cmocka_unit_test(promises_always_kept_are_accepted),
        cmocka_unit_test(a_positional_argument_fills_its_row),
        cmocka_unit_test(the_environment_yields_to_the_command_line),
        cmocka_unit_test(values_survive_a_trip_through_json),
        cmocka_unit_test(an_empty_list_in_json_empties_the_list),
        cmocka_unit_test(the_command_line_wins_over_json),
        cmocka_unit_test(bad_json_values_are_errors),
        cmocka_unit_test(numbers_print_as_short_as_they_read_back),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
