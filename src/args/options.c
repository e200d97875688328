#include "args/options.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "args/options_rules.h"
#include "args/option_value.h"
#include "base/check.h"
#include "base/log.h"

enum { VALUE_TEXT_MAX = 8192, DIVISORS_TEXT_MAX = 256 };

int options_init(struct options *o)
{
    memset(o, 0, sizeof *o);
    return option_table_init(&options_table, o, o->origins);
}

int options_parse(struct options *o, int argc, char **argv)
{
    return option_table_parse(&options_table, argc, argv, o, o->origins);
}

void options_free(struct options *o)
{
    option_table_free(&options_table, o);
}

static enum option_origin *origin_of(const struct options *o, const char *flag)
{
    const struct option_row *row = option_table_find(&options_table, flag);

    CHECK(row != NULL, "no row %s", flag);
    return (enum option_origin *)&o->origins[option_table_index(&options_table, row)];
}

bool options_given(const struct options *o, const char *flag)
{
    return *origin_of(o, flag) > ORIGIN_DERIVED;
}

void options_mark_derived(struct options *o, const char *flag)
{
    *origin_of(o, flag) = ORIGIN_DERIVED;
}

void options_derive_int(struct options *o, const char *flag, int64_t *field, int64_t value)
{
    if (!options_given(o, flag)) {
        *field = value;
        options_mark_derived(o, flag);
    }
}

void options_derive_float(struct options *o, const char *flag, double *field, double value)
{
    if (!options_given(o, flag)) {
        *field = value;
        options_mark_derived(o, flag);
    }
}

int options_derive_text(struct options *o, const char *flag, const char *text)
{
    return option_table_set(&options_table, flag, text, ORIGIN_DERIVED, o, o->origins);
}

/* "1, 2, 4, 8"; cut off with "..." where there are too many. */
static void list_divisors(int64_t value, char text[DIVISORS_TEXT_MAX])
{
    size_t used = 0;

    for (int64_t d = 1; d <= value && used < DIVISORS_TEXT_MAX - 32; d++) {
        if (value % d == 0) {
            used += (size_t)snprintf(text + used, DIVISORS_TEXT_MAX - used, "%s%lld",
                                     d == 1 ? "" : ", ", (long long)d);
        }
    }
    if (used >= DIVISORS_TEXT_MAX - 32) {
        snprintf(text + used, DIVISORS_TEXT_MAX - used, ", ...");
    }
}

int options_check_divisible(const char *what, int64_t value, const char *by, int64_t divisor)
{
    char legal[DIVISORS_TEXT_MAX];

    if (value % divisor == 0) {
        return 0;
    }
    list_divisors(value, legal);
    return error_set("%s %lld is not divisible by %s %lld: for %lld, legal are %s", what,
                     (long long)value, by, (long long)divisor, (long long)value, legal);
}

void options_warn_unless(const struct options *o, const char *flag, bool has_effect,
                         const char *needs)
{
    if (!has_effect && *origin_of(o, flag) == ORIGIN_COMMAND_LINE) {
        log_warn("%s has no effect without %s", flag, needs);
    }
}

bool options_balances_by(const struct options *o, const char *type)
{
    for (int i = 0; i < o->moe_router_load_balancing_type.num_items; i++) {
        if (strcmp(o->moe_router_load_balancing_type.items[i], type) == 0) {
            return true;
        }
    }
    return false;
}

int options_validate(struct options *o, int world_size)
{
    TRY(options_validate_model(o));
    TRY(options_validate_parallel(o, world_size));
    return options_validate_training(o);
}

int64_t options_padded_vocab_size(const struct options *o, int64_t vocab_size)
{
    const int64_t unit = o->make_vocab_size_divisible_by * o->tensor_model_parallel_size;

    return (vocab_size + unit - 1) / unit * unit;
}

static const char top1_key[] = "hf_top1_renormalized";

json_t *options_to_json(const struct options *o)
{
    json_t *object = option_table_to_json(&options_table, o);

    if (object != NULL &&
        json_object_set_new(object, top1_key, json_boolean(o->hf_top1_renormalized)) != 0) {
        json_decref(object);
        return FAIL_NULL("out of memory");
    }
    return object;
}

int options_apply_json(struct options *o, const json_t *object)
{
    o->hf_top1_renormalized = json_is_true(json_object_get(object, top1_key));
    return option_table_apply_json(&options_table, object, o, o->origins);
}

/* A value as Python's print() shows it. */
static void format_python(const struct option_row *row, const struct options *o, char *text,
                          size_t text_bytes)
{
    const void *field = (const char *)o + row->offset;

    option_row_format(row, o, text, text_bytes);
    if (option_row_is_switch(row)) {
        text[0] = text[0] == 't' ? 'T' : 'F';
    } else if (strcmp(text, "none") == 0 || (strcmp(text, "0") == 0 && row->default_text == NULL)) {
        snprintf(text, text_bytes, "None");
    } else if (row->type == OPTION_FLOAT && fmod(*(const double *)field, 1.0) == 0.0 &&
               strchr(text, 'e') == NULL) {
        snprintf(text + strlen(text), text_bytes - strlen(text), ".0");
    }
}

static int compare_names(const void *a, const void *b)
{
    char name_a[OPTION_NAME_MAX], name_b[OPTION_NAME_MAX];

    option_row_name(*(const struct option_row *const *)a, name_a);
    option_row_name(*(const struct option_row *const *)b, name_b);
    return strcasecmp(name_a, name_b);
}

void options_print(const struct options *o, FILE *out)
{
    const struct option_row *sorted[OPTIONS_MAX_ROWS];
    int num_sorted = 0;

    for (int i = 0; i < options_table.num_rows; i++) {
        if (options_table.rows[i].offset != OPTION_NO_FIELD) {
            sorted[num_sorted++] = &options_table.rows[i];
        }
    }
    qsort(sorted, (size_t)num_sorted, sizeof sorted[0], compare_names);
    fprintf(out, "------------------------ arguments ------------------------\n");
    for (int i = 0; i < num_sorted; i++) {
        char name[OPTION_NAME_MAX], value[VALUE_TEXT_MAX];
        int num_dots;

        option_row_name(sorted[i], name);
        format_python(sorted[i], o, value, sizeof value);
        num_dots = 48 - (int)strlen(name);
        fprintf(out, "  %s %.*s %s\n", name, num_dots > 0 ? num_dots : 0,
                "................................................", value);
    }
    fprintf(out, "-------------------- end of arguments ---------------------\n");
}

void options_print_config(const struct options *o, FILE *out)
{
    const char *group = "";

    for (int i = 0; i < options_table.num_rows; i++) {
        const struct option_row *row = &options_table.rows[i];
        const char *origin = option_origin_name(o->origins[i]);
        char name[OPTION_NAME_MAX], value[VALUE_TEXT_MAX];

        if (row->status == OPTION_REFUSED) {
            continue;
        }
        if (strcmp(group, row->group) != 0) {
            fprintf(out, "%s# %s\n", group[0] == '\0' ? "" : "\n", row->group);
            group = row->group;
        }
        option_row_name(row, name);
        if (row->status == OPTION_ALWAYS) {
            fprintf(out, "%-44s always  (%s)\n", name, row->reason);
        } else {
            option_row_format(row, o, value, sizeof value);
            fprintf(out, "%-44s %s  (%s)\n", name, value, origin);
        }
    }
}
