/* guarded_run.h - a small model and its data on the guarded device, as `cadre pretrain` sets them
 * up. Include cmocka.h first. */
#ifndef CADRE_TESTS_TRAIN_GUARDED_RUN_H
#define CADRE_TESTS_TRAIN_GUARDED_RUN_H

#include "comm/launch.h"
#include "guarded_device.h"
#include "train/run_data.h"
#include "train/trainer.h"

struct guarded_run {
    struct options options;
    struct run_data data;
    struct trainer trainer;
};

static void guarded_run_parse(struct options *options, const char *flags)
{
    static const char model_flags[] =
        "pretrain --num-layers 2 --hidden-size 32 --ffn-hidden-size 48 --num-attention-heads 4 "
        "--seq-length 16 --max-position-embeddings 16 --micro-batch-size 2 --global-batch-size 4 "
        "--vocab-size 120 --tokenizer-type NullTokenizer --mock-data --train-samples 64 "
        "--eval-iters "
        "1 --lr 1e-3 --lr-decay-style constant --num-experts 4 --moe-router-topk 2 "
        "--moe-aux-loss-coeff 1e-2 --moe-z-loss-coeff 1e-3 --bf16 ";
    char text[1024], *argv[96], *rest = text;
    int argc = 0;

    snprintf(text, sizeof text, "%s%s", model_flags, flags);
    while ((argv[argc] = strtok_r(rest, " ", &rest)) != NULL) {
        argc++;
    }
    if (options_init(options) != 0 || options_parse(options, argc, argv) != 0 ||
        options_validate(options, launch_size()) != 0) {
        fail_msg("%s: %s", flags, error_text());
    }
}

static void guarded_run_open(struct guarded_run *run, const char *flags)
{
    struct run_data_request request = {.options = &run->options, .num_iterations = 8};

    *run = (struct guarded_run){0};
    guarded_run_parse(&run->options, flags);
    if (run_data_open_tokenizer(&run->data, &run->options) != 0 ||
        trainer_create(&run->trainer, &run->options, tokenizer_vocab_size(run->data.tokenizer),
                       guarded_device(), guarded_ops(), &(struct trainer_memory){0}) != 0 ||
        run_data_open_sets(&run->data, &request) != 0 ||
        run_data_open_loaders(&run->data, &request) != 0) {
        fail_msg("%s: %s", flags, error_text());
    }
}

static void guarded_run_close(struct guarded_run *run)
{
    trainer_destroy(&run->trainer);
    run_data_close(&run->data);
    options_free(&run->options);
}

#endif
