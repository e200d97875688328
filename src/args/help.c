#include "args/help.h"

#include <stdlib.h>
#include <string.h>

#include "base/check.h"

enum { HELP_WIDTH = 80, HELP_INDENT = 8, TEXT_MAX = 1024 };

/* What stands for the value in a synopsis, "" for a switch. */
static const char *placeholder(const struct option_row *row)
{
    switch (row->type) {
    case OPTION_FLAG:
    case OPTION_NO_FLAG:
        return "";
    case OPTION_INT:
        return "N";
    case OPTION_FLOAT:
        return "X";
    case OPTION_STRING:
    case OPTION_CHOICE:
        return "WORD";
    case OPTION_STRINGS:
    case OPTION_CHOICES:
        return "WORD...";
    case OPTION_INTS:
        return "N...";
    case OPTION_FLOATS:
        return "X...";
    }
    PANIC("%s: type %d", row->flag, row->type);
}

/* "an integer from 1 to 64; default 2", or "". */
static void describe_value(const struct option_row *row, char text[TEXT_MAX])
{
    size_t used;

    option_row_describe_legal(row, text, TEXT_MAX);
    used = strlen(text);
    if (row->default_text != NULL) {
        used += (size_t)snprintf(text + used, TEXT_MAX - used, "%sdefault %s", used > 0 ? "; " : "",
                                 row->default_text);
    }
    if (row->environment != NULL) {
        snprintf(text + used, TEXT_MAX - used, "; environment %s", row->environment);
    }
}

/* Prints words of text, broken to HELP_WIDTH, every line indented. */
static void print_wrapped(const char *text, int indent, FILE *out)
{
    int column = 0;

    while (*text != '\0') {
        const int length = (int)strcspn(text, " ");

        if (column > 0 && column + 1 + length > HELP_WIDTH) {
            fputc('\n', out);
            column = 0;
        }
        column += fprintf(out, "%*s%.*s", column == 0 ? indent : 1, "", length, text);
        text += length;
        text += strspn(text, " ");
    }
    fputc('\n', out);
}

static void print_row(const struct option_row *row, FILE *out)
{
    char value[TEXT_MAX], text[2 * TEXT_MAX];

    describe_value(row, value);
    fprintf(out, "  %s%s%s\n", row->flag, option_row_is_switch(row) ? "" : " ", placeholder(row));
    if (row->status == OPTION_REFUSED) {
        snprintf(text, sizeof text, "%s: not built, %s", row->help, row->reason);
    } else if (row->status == OPTION_ALWAYS) {
        snprintf(text, sizeof text, "%s: accepted, %s", row->help, row->reason);
    } else if (value[0] == '\0') {
        snprintf(text, sizeof text, "%s", row->help);
    } else {
        snprintf(text, sizeof text, "%s (%s)", row->help, value);
    }
    print_wrapped(text, HELP_INDENT, out);
}

/* The flags of one status on a few lines, without their texts. */
static void print_names(const struct option_table *table, const char *group,
                        enum option_status status, const char *title, FILE *out)
{
    char *text = NULL;
    size_t text_bytes = 0;
    FILE *names = open_memstream(&text, &text_bytes);

    if (names == NULL) {
        return;
    }
    for (int i = 0; i < table->num_rows; i++) {
        const struct option_row *row = &table->rows[i];

        if (row->status == status && strcmp(row->group, group) == 0) {
            fprintf(names, "%s ", row->flag);
        }
    }
    fclose(names);
    if (text_bytes > 0) {
        fprintf(out, "\n  %s:\n", title);
        print_wrapped(text, HELP_INDENT, out);
    }
    free(text);
}

/* Groups are runs of rows: true for the first row of one. */
static bool starts_group(const struct option_table *table, int i)
{
    return i == 0 || strcmp(table->rows[i - 1].group, table->rows[i].group) != 0;
}

static void print_group(const struct option_table *table, int first, FILE *out)
{
    const char *group = table->rows[first].group;

    fprintf(out, "\n%s:\n", group);
    for (int i = first; i < table->num_rows && strcmp(table->rows[i].group, group) == 0; i++) {
        if (table->rows[i].status == OPTION_BUILT) {
            print_row(&table->rows[i], out);
        }
    }
    print_names(table, group, OPTION_ALWAYS, "accepted; cadre always keeps the promise", out);
    print_names(table, group, OPTION_REFUSED, "known, but not built (an error)", out);
}

static void print_usage(const struct option_table *table, FILE *out)
{
    fprintf(out, "cadre %s", table->command);
    for (int i = 0; i < table->num_rows; i++) {
        if (table->rows[i].flag[0] != '-') {
            fprintf(out, " %s%s", table->rows[i].flag,
                    option_row_is_list(&table->rows[i]) ? "..." : "");
        }
    }
    fprintf(out, " [flags]\n");
}

static int print_topic(const struct option_table *table, const char *topic, FILE *out)
{
    const struct option_row *row = option_table_find(table, topic);
    char groups[TEXT_MAX] = "";
    size_t used = 0;

    if (row != NULL) {
        print_row(row, out);
        return 0;
    }
    for (int i = 0; i < table->num_rows; i++) {
        if (starts_group(table, i) && strcmp(table->rows[i].group, topic) == 0) {
            print_group(table, i, out);
            return 0;
        }
        if (starts_group(table, i) && used < sizeof groups) {
            used += (size_t)snprintf(groups + used, sizeof groups - used, "%s%s",
                                     used > 0 ? ", " : "", table->rows[i].group);
        }
    }
    return error_set("no help on '%s': legal are a flag or a group of flags: %s", topic, groups);
}

int help_print(const struct option_table *table, const char *topic, FILE *out)
{
    if (topic != NULL) {
        return print_topic(table, topic, out);
    }
    print_usage(table, out);
    fprintf(out, "%s\n", table->summary);
    for (int i = 0; i < table->num_rows; i++) {
        if (starts_group(table, i)) {
            print_group(table, i, out);
        }
    }
    fprintf(out, "\n`cadre %s --help GROUP` prints one group, `--help --flag` one flag.\n",
            table->command);
    return 0;
}

bool help_requested(const struct option_table *table, int argc, char **argv, FILE *out)
{
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--help") == 0 || strcmp(argv[i], "-h") == 0) {
            if (out != NULL && help_print(table, i + 1 < argc ? argv[i + 1] : NULL, out) != 0) {
                fprintf(out, "%s\n", error_text());
            }
            return true;
        }
    }
    return false;
}

/* Text for troff: a backslash and a hyphen are escaped, a leading dot or quote is guarded. */
static void print_roff(const char *text, FILE *out)
{
    if (*text == '.' || *text == '\'') {
        fputs("\\&", out);
    }
    for (; *text != '\0'; text++) {
        if (*text == '\\') {
            fputs("\\e", out);
        } else if (*text == '-') {
            fputs("\\-", out);
        } else {
            fputc(*text, out);
        }
    }
}

static void print_man_row(const struct option_row *row, FILE *out)
{
    char value[TEXT_MAX];

    describe_value(row, value);
    fputs(".TP\n.B ", out);
    print_roff(row->flag, out);
    if (!option_row_is_switch(row)) {
        fprintf(out, "\\fR \\fI%s\\fR", placeholder(row));
    }
    fputc('\n', out);
    print_roff(row->help, out);
    if (row->status != OPTION_BUILT) {
        fputs(row->status == OPTION_REFUSED ? " (not built: " : " (accepted: ", out);
        print_roff(row->reason, out);
        fputc(')', out);
    } else if (value[0] != '\0') {
        fputs(" (", out);
        print_roff(value, out);
        fputc(')', out);
    }
    fputc('\n', out);
}

void help_print_man(const struct option_table *const *tables, int num_tables, FILE *out)
{
    fprintf(out, ".TH CADRE 1 \"\" \"cadre %s\" \"User Commands\"\n", CADRE_VERSION);
    fprintf(out, ".SH NAME\ncadre \\- train mixture\\-of\\-experts transformers\n.SH SYNOPSIS\n"
                 ".B cadre\n.I command\n[flags]\n.SH COMMANDS\n");
    for (int t = 0; t < num_tables; t++) {
        fprintf(out, ".TP\n.B %s\n", tables[t]->command);
        print_roff(tables[t]->summary, out);
        fputc('\n', out);
    }
    for (int t = 0; t < num_tables; t++) {
        fprintf(out, ".SH CADRE %s\n", tables[t]->command);
        for (int i = 0; i < tables[t]->num_rows; i++) {
            if (starts_group(tables[t], i)) {
                fprintf(out, ".SS %s\n", tables[t]->rows[i].group);
            }
            print_man_row(&tables[t]->rows[i], out);
        }
    }
}

static void print_completion_command(const struct option_table *table, FILE *out)
{
    fprintf(out, "    %s)\n        case \"$previous\" in\n", table->command);
    for (int i = 0; i < table->num_rows; i++) {
        if (table->rows[i].choices != NULL && table->rows[i].status != OPTION_REFUSED) {
            fprintf(out, "        %s) words=\"%s\" ;;\n", table->rows[i].flag,
                    table->rows[i].choices);
        }
    }
    fprintf(out, "        *) words=\"--help");
    for (int i = 0; i < table->num_rows; i++) {
        if (table->rows[i].flag[0] == '-' && table->rows[i].status != OPTION_REFUSED) {
            fprintf(out, " %s", table->rows[i].flag);
        }
    }
    fprintf(out, "\" ;;\n        esac ;;\n");
}

/* A word that starts with a dash, or follows a flag with choices, is completed from the tables;
 * anything else is a file. */
void help_print_completion(const struct option_table *const *tables, int num_tables, FILE *out)
{
    fprintf(out, "# bash completion for cadre, generated from its option tables\n"
                 "_cadre() {\n"
                 "    local current=\"${COMP_WORDS[COMP_CWORD]}\"\n"
                 "    local previous=\"${COMP_WORDS[COMP_CWORD-1]}\" words=\"\"\n"
                 "    case \"$([ \"$COMP_CWORD\" -gt 1 ] && echo \"${COMP_WORDS[1]}\")\" in\n"
                 "    \"\") words=\"");
    for (int t = 0; t < num_tables; t++) {
        fprintf(out, "%s%s", t == 0 ? "" : " ", tables[t]->command);
    }
    fprintf(out, "\" ;;\n");
    for (int t = 0; t < num_tables; t++) {
        print_completion_command(tables[t], out);
    }
    fprintf(out, "    esac\n"
                 "    case \"$current:$words\" in\n"
                 "    -*) ;;\n"
                 "    *:--help*) words=\"\" ;;\n"
                 "    esac\n"
                 "    COMPREPLY=($(compgen -W \"$words\" -- \"$current\"))\n"
                 "}\n"
                 "complete -o default -F _cadre cadre\n");
}

static void print_markdown_rows(const struct option_table *table, int first,
                                enum option_status status, const char *heading, FILE *out)
{
    const char *group = table->rows[first].group;
    bool any = false;

    for (int i = first; i < table->num_rows && strcmp(table->rows[i].group, group) == 0; i++) {
        const struct option_row *row = &table->rows[i];
        char value[TEXT_MAX];

        if (row->status != status) {
            continue;
        }
        if (!any) {
            fputs(heading, out);
        }
        any = true;
        describe_value(row, value);
        fprintf(out, "| `%s` | %s | %s |\n", row->flag, status == OPTION_BUILT ? value : row->help,
                status == OPTION_BUILT ? row->help : row->reason);
    }
}

void help_print_markdown(const struct option_table *const *tables, int num_tables, FILE *out)
{
    fprintf(out, "# Flags\n\nGenerated from the option tables; do not edit. `cadre COMMAND --help` "
                 "says the same.\n");
    for (int t = 0; t < num_tables; t++) {
        const struct option_table *table = tables[t];

        fprintf(out, "\n## cadre %s\n\n%s\n", table->command, table->summary);
        for (int i = 0; i < table->num_rows; i++) {
            if (!starts_group(table, i)) {
                continue;
            }
            fprintf(out, "\n### %s: %s\n", table->command, table->rows[i].group);
            print_markdown_rows(table, i, OPTION_BUILT,
                                "\n| flag | value | meaning |\n| --- | --- | --- |\n", out);
            print_markdown_rows(table, i, OPTION_ALWAYS,
                                "\nAccepted; the promise is kept with or without them:\n\n"
                                "| flag | meaning | why |\n| --- | --- | --- |\n",
                                out);
            print_markdown_rows(table, i, OPTION_REFUSED,
                                "\nKnown, but not built; an error unless given their default:\n\n"
                                "| flag | meaning | why not, or what instead |\n"
                                "| --- | --- | --- |\n",
                                out);
        }
    }
}
