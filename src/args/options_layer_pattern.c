/* Which layers have experts. Megatron evaluates the text as a Python expression; here it is a
 * grammar of lists of 0 and 1, sums and products:
 *
 *     sum     = product { "+" product }       lists join
 *     product = factor { "*" factor }         a list times an integer repeats
 *     factor  = integer | "[" integer { "," integer } "]" | "(" sum ")"
 *
 * Lists never grow beyond OPTIONS_MAX_LAYERS, whatever the text says. */
#include <ctype.h>
#include <string.h>

#include "args/options.h"
#include "base/check.h"
#include "base/checked.h"

enum { NESTING_MAX = 16 };

struct pattern {
    bool is_list;
    int64_t number; /* when it is no list */
    int64_t length;
    bool layers[OPTIONS_MAX_LAYERS];
};

struct pattern_parser {
    const char *text; /* whole, for messages */
    const char *at;
    int depth;
};

static int parse_sum(struct pattern_parser *p, struct pattern *result);

static int illegal_pattern(const struct pattern_parser *p, const char *what)
{
    return error_set(
        "--moe-layer-freq %.80s: %s at '%.20s'; legal: an integer n, or a list of 0 and 1 "
        "such as ([0]*3+[1]*5)",
        p->text, what, p->at);
}

/* Steps over blanks, then over the character if it is there. */
static bool accept(struct pattern_parser *p, char character)
{
    p->at += strspn(p->at, " \t");
    if (*p->at != character) {
        return false;
    }
    p->at++;
    return true;
}

static int parse_number(struct pattern_parser *p, int64_t *number)
{
    p->at += strspn(p->at, " \t");
    if (!isdigit((unsigned char)*p->at)) {
        return illegal_pattern(p, "a number is missing");
    }
    *number = 0;
    while (isdigit((unsigned char)*p->at)) {
        *number = *number * 10 + (*p->at++ - '0');
        if (*number > OPTIONS_MAX_LAYERS) {
            return illegal_pattern(p, "a number is too large");
        }
    }
    return 0;
}

static int parse_list(struct pattern_parser *p, struct pattern *list)
{
    list->is_list = true;
    list->length = 0;
    if (accept(p, ']')) {
        return 0;
    }
    do {
        int64_t number;

        TRY(parse_number(p, &number));
        if (number > 1) {
            return illegal_pattern(p, "a layer is 0 (dense) or 1 (experts)");
        }
        if (list->length == OPTIONS_MAX_LAYERS) {
            return illegal_pattern(p, "too many layers");
        }
        list->layers[list->length++] = number == 1;
    } while (accept(p, ','));
    return accept(p, ']') ? 0 : illegal_pattern(p, "a ] is missing");
}

static int parse_factor(struct pattern_parser *p, struct pattern *result)
{
    if (accept(p, '[')) {
        return parse_list(p, result);
    }
    if (accept(p, '(')) {
        if (++p->depth > NESTING_MAX) {
            return illegal_pattern(p, "too many parentheses");
        }
        TRY(parse_sum(p, result));
        p->depth--;
        return accept(p, ')') ? 0 : illegal_pattern(p, "a ) is missing");
    }
    result->is_list = false;
    return parse_number(p, &result->number);
}

static int repeat(struct pattern_parser *p, struct pattern *list, int64_t times)
{
    const int64_t length = list->length;

    if (length * times > OPTIONS_MAX_LAYERS) {
        return illegal_pattern(p, "too many layers");
    }
    for (int64_t i = length; i < length * times; i++) {
        list->layers[i] = list->layers[i - length];
    }
    list->length = length * times;
    return 0;
}

static int multiply(struct pattern_parser *p, struct pattern *left, const struct pattern *right)
{
    const int64_t times = left->number;

    if (left->is_list && right->is_list) {
        return illegal_pattern(p, "a list times a list");
    }
    if (left->is_list) {
        return repeat(p, left, right->number);
    }
    if (right->is_list) {
        *left = *right;
        return repeat(p, left, times);
    }
    left->number *= right->number;
    return left->number <= OPTIONS_MAX_LAYERS ? 0 : illegal_pattern(p, "a number is too large");
}

static int parse_product(struct pattern_parser *p, struct pattern *result)
{
    struct pattern right;

    TRY(parse_factor(p, result));
    while (accept(p, '*')) {
        TRY(parse_factor(p, &right));
        TRY(multiply(p, result, &right));
    }
    return 0;
}

static int add(struct pattern_parser *p, struct pattern *left, const struct pattern *right)
{
    if (left->is_list != right->is_list) {
        return illegal_pattern(p, "a list plus a number");
    }
    if (!left->is_list) {
        left->number += right->number;
        return left->number <= OPTIONS_MAX_LAYERS ? 0 : illegal_pattern(p, "a number is too large");
    }
    if (left->length + right->length > OPTIONS_MAX_LAYERS) {
        return illegal_pattern(p, "too many layers");
    }
    memcpy(left->layers + left->length, right->layers, (size_t)right->length * sizeof(bool));
    left->length += right->length;
    return 0;
}

static int parse_sum(struct pattern_parser *p, struct pattern *result)
{
    struct pattern right;

    TRY(parse_product(p, result));
    while (accept(p, '+')) {
        TRY(parse_product(p, &right));
        TRY(add(p, result, &right));
    }
    return 0;
}

int options_parse_layer_pattern(const char *text, int64_t num_layers, bool *is_moe_layer)
{
    struct pattern_parser p = {text, text, 0};
    struct pattern pattern;

    CHECK(num_layers <= OPTIONS_MAX_LAYERS, "%lld layers", (long long)num_layers);
    TRY(parse_sum(&p, &pattern));
    p.at += strspn(p.at, " \t");
    if (*p.at != '\0') {
        return illegal_pattern(&p, "something is left over");
    }
    if (pattern.is_list && pattern.length != num_layers) {
        return error_set("--moe-layer-freq %.80s has %lld entries: must be --num-layers, %lld",
                         text, (long long)pattern.length, (long long)num_layers);
    }
    if (!pattern.is_list && pattern.number < 1) {
        return error_set("--moe-layer-freq %.80s: must be at least 1, or a list", text);
    }
    for (int64_t i = 0; i < num_layers; i++) {
        is_moe_layer[i] = pattern.is_list ? pattern.layers[i] : i % pattern.number == 0;
    }
    return 0;
}

int options_moe_layer_pattern(const struct options *o, bool *is_moe_layer)
{
    if (o->num_experts == 0) {
        memset(is_moe_layer, 0, (size_t)o->num_layers * sizeof(bool));
        return 0;
    }
    return options_parse_layer_pattern(o->moe_layer_freq, o->num_layers, is_moe_layer);
}
