/* cadre: one program, a subcommand each for what a user does. */
#include <signal.h>
#include <stdio.h>
#include <string.h>

#include "args/edit_distance.h"
#include "base/check.h"
#include "cmd/cmd.h"
#include "comm/launch.h"

static const struct {
    const char *name;
    int (*run)(int argc, char **argv);
    const char *summary; /* NULL: not listed */
} commands[] = {
    {"pretrain", cmd_pretrain, "train a model (the flags of Megatron's pretrain_gpt)"},
    {"preprocess", cmd_preprocess, "turn jsonl or text into a data set (.bin and .idx)"},
    {"convert", cmd_convert, "Hugging Face Mixtral <-> cadre checkpoint"},
    {"logits", cmd_logits, "run tokens through a checkpoint, write the logits"},
    {"generate", cmd_generate, "sample text from a checkpoint"},
    {"inspect", cmd_inspect, "show what is in a checkpoint, a safetensors file or a data set"},
    {"bench", cmd_bench, "measure products, a MoE layer or a training step"},
    {"docs", cmd_docs, NULL},
};

enum { NUM_COMMANDS = sizeof commands / sizeof commands[0] };

static void print_usage(FILE *out)
{
    fputs("usage: cadre COMMAND [flags]\n\ncommands:\n", out);
    for (int i = 0; i < NUM_COMMANDS; i++) {
        if (commands[i].summary != NULL) {
            fprintf(out, "  %-11s %s\n", commands[i].name, commands[i].summary);
        }
    }
    fputs("\n`cadre COMMAND --help` shows a command's flags.\n", out);
}

/* The listed command most like an unknown one, NULL if none is close. */
static const char *nearest_command(const char *name)
{
    const char *nearest = NULL;
    int best = 4;

    for (int i = 0; i < NUM_COMMANDS; i++) {
        const int distance = edit_distance(name, commands[i].name);

        if (commands[i].summary != NULL && distance < best) {
            best = distance;
            nearest = commands[i].name;
        }
    }
    return nearest;
}

static int run(int argc, char **argv)
{
    for (int i = 0; i < NUM_COMMANDS; i++) {
        if (strcmp(argv[1], commands[i].name) == 0) {
            return commands[i].run(argc - 1, argv + 1);
        }
    }
    if (nearest_command(argv[1]) != NULL) {
        return error_set("unknown command %s: did you mean %s?", argv[1], nearest_command(argv[1]));
    }
    return error_set("unknown command %s (cadre --help lists them)", argv[1]);
}

int main(int argc, char **argv)
{
    if (argc < 2) {
        print_usage(stderr);
        return 2;
    }
    if (strcmp(argv[1], "--help") == 0 || strcmp(argv[1], "-h") == 0 ||
        strcmp(argv[1], "help") == 0) {
        print_usage(stdout);
        return 0;
    }
    if (strcmp(argv[1], "--version") == 0) {
        puts("cadre " CADRE_VERSION);
        return 0;
    }
    signal(SIGXFSZ, SIG_IGN); /* a limit on the size of files is a write's error, not a death */
    if (run(argc, argv) != 0) {
        launch_fail(error_text());
    }
    launch_finish();
    return 0;
}
