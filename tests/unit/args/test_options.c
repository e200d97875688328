#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <stdlib.h>

#include "base/path.h"
#include "options_case.h"

/* The flags of the seed document's Mixtral 8x7B script. */
#define SEED_FLAGS                                                                                 \
    "--disable-bias-linear --seq-length 4096 --max-position-embeddings 32768 --num-layers 32 "     \
    "--hidden-size 4096 --ffn-hidden-size 14336 --num-attention-heads 32 --init-method-std 0.01 "  \
    "--attention-dropout 0.0 --hidden-dropout 0.0 --normalization RMSNorm "                        \
    "--position-embedding-type rope --swiglu --untie-embeddings-and-output-weights "               \
    "--group-query-attention --num-query-groups 8 --no-masked-softmax-fusion "                     \
    "--no-position-embedding --num-experts 8 --expert-model-parallel-size 8 "                      \
    "--moe-router-load-balancing-type aux_loss --moe-router-topk 2 --moe-aux-loss-coeff 1e-2 "     \
    "--moe-grouped-gemm --tokenizer-type Llama2Tokenizer --tokenizer-model t.model "               \
    "--data-path my_text_document --split 99990,8,2 --micro-batch-size 1 "                         \
    "--global-batch-size 128 --lr 1e-4 --train-iters 500000 --lr-decay-iters 320000 "              \
    "--lr-decay-style cosine --min-lr 1.0e-5 --weight-decay 0.1 --lr-warmup-iters 500 "            \
    "--clip-grad 1.0 --bf16 --overlap-grad-reduce --overlap-param-gather "                         \
    "--tensor-model-parallel-size 1 --pipeline-model-parallel-size 4 "                             \
    "--num-layers-per-virtual-pipeline-stage 8 --sequence-parallel --use-distributed-optimizer "   \
    "--log-interval 1 --save-interval 10000 --eval-interval 1000 --eval-iters 10 --save ckpt "     \
    "--load ckpt --tensorboard-dir ckpt/tensorboard --no-load-optim --no-load-rng "

static void the_script_of_the_seed_is_accepted_on_32_ranks(void **state)
{
    struct options o;

    case_valid(&o, SEED_FLAGS, 32);
    assert_int_equal(o.data_parallel_size, 8);
    assert_int_equal(o.expert_data_parallel_size, 1);
    assert_int_equal(o.virtual_pipeline_size, 1);
    assert_int_equal(o.moe_ffn_hidden_size, 14336);
    assert_int_equal(o.kv_channels, 128);
    assert_int_equal(o.num_query_groups, 8);
    assert_false(o.sequence_parallel);
    assert_false(o.load_optim);
    assert_true(o.moe_aux_loss_coeff.items[0] == 0.01);
    assert_int_equal(options_padded_vocab_size(&o, 32001), 32128);
    options_free(&o);
    case_error(SEED_FLAGS, 1, "mpirun -n 4");
}

static void wandb_points_to_tensorboard(void **state)
{
    case_error(SEED_FLAGS "--wandb-project Mixtral --wandb-exp-name a", 32,
               "--wandb-project is not built in cadre: use --tensorboard-dir");
}

static void wrong_names_of_the_seed_get_the_right_ones(void **state)
{
    case_error(BASE_FLAGS "--moe-token-capacity-factor 1.0", 1,
               "did you mean --moe-expert-capacity-factor?");
    case_error(BASE_FLAGS "-moe-extended-tp", 1, "did you mean --moe-extended-tp?");
}

static void every_flag_of_the_reference_is_a_row(void **state)
{
    size_t length;
    char *flags = path_read_file(FIXTURES "/megatron-flags.txt", 1 << 20, &length);
    int num_flags = 0;

    assert_non_null(flags);
    for (char *flag = strtok(flags, "\n"); flag != NULL; flag = strtok(NULL, "\n")) {
        if (option_table_find(&options_table, flag) == NULL) {
            fail_msg("%s is no row", flag);
        }
        num_flags++;
    }
    assert_true(num_flags > 250);
    free(flags);
}

static bool is_number(const struct option_row *row)
{
    return row->type == OPTION_INT || row->type == OPTION_FLOAT || row->type == OPTION_INTS ||
           row->type == OPTION_FLOATS;
}

static void every_row_is_well_formed(void **state)
{
    for (int i = 0; i < options_table.num_rows; i++) {
        const struct option_row *row = &options_table.rows[i];
        const bool built = row->status == OPTION_BUILT;

        if (option_table_find(&options_table, row->flag) != row || row->help[0] == '\0' ||
            strncmp(row->flag, "--", 2) != 0 || built != (row->reason == NULL) ||
            built != (row->offset != OPTION_NO_FIELD) ||
            (is_number(row) && !(row->min < row->max)) ||
            (row->type == OPTION_NO_FLAG && strncmp(row->flag, "--no-", 5) != 0) ||
            ((row->type == OPTION_CHOICE || row->type == OPTION_CHOICES) && row->choices == NULL)) {
            fail_msg("%s", row->flag);
        }
        for (int j = 0; built && j < i; j++) {
            if (options_table.rows[j].offset == row->offset) {
                fail_msg("%s and %s share a field", row->flag, options_table.rows[j].flag);
            }
        }
    }
}

static void every_default_is_a_legal_value(void **state)
{
    for (int i = 0; i < options_table.num_rows; i++) {
        const struct option_row *row = &options_table.rows[i];
        struct options o;

        if (row->default_text == NULL || row->status != OPTION_BUILT ||
            strcmp(row->flag, "--ckpt-step") == 0) { /* -1: the newest */
            continue;
        }
        assert_int_equal(options_init(&o), 0);
        if (option_table_set(&options_table, row->flag, row->default_text, ORIGIN_COMMAND_LINE, &o,
                             o.origins) != 0) {
            fail_msg("%s", error_text());
        }
        options_free(&o);
    }
}

static void every_refused_flag_is_refused(void **state)
{
    for (int i = 0; i < options_table.num_rows; i++) {
        const struct option_row *row = &options_table.rows[i];
        char line[256];

        if (row->status != OPTION_REFUSED) {
            continue;
        }
        snprintf(line, sizeof line, "%s%s", row->flag, option_row_is_switch(row) ? "" : " 77");
        case_error(line, 1, row->reason);
    }
}

static void the_model_comes_back_from_the_saved_config(void **state)
{
    struct options saved, o;
    json_t *config;

    case_valid(&saved, SEED_FLAGS, 32);
    config = options_to_json(&saved);
    assert_non_null(config);
    assert_int_equal(case_parse(&o, "--micro-batch-size 1 --train-iters 1 --lr 1e-3 --mock-data "
                                    "--load ckpt --use-checkpoint-args --seq-length 128"),
                     0);
    assert_int_equal(options_apply_json(&o, config), 0);
    if (options_validate(&o, 1) != 0) {
        fail_msg("%s", error_text());
    }
    assert_int_equal(o.num_layers, 32);
    assert_int_equal(o.num_query_groups, 8);
    assert_int_equal(o.seq_length, 128); /* typed */
    assert_string_equal(o.normalization, "RMSNorm");
    assert_string_equal(o.tokenizer_model, "t.model");
    assert_true(o.swiglu && o.disable_bias_linear && o.untie_embeddings_and_output_weights);
    assert_int_equal(o.num_experts, 8);
    assert_int_equal(o.pipeline_model_parallel_size, 1); /* no model argument */
    assert_int_equal(o.vocab_size, 0);
    json_decref(config);
    options_free(&saved);
    options_free(&o);
}

static void a_damaged_saved_config_is_an_error(void **state)
{
    static const char *const bad[][2] = {
        {"{\"num_layers\": \"8\"}",
         "saved config: --num-layers: must be an integer from 1 to 4096, "
         "found a string"},
        {"{\"num_layers\": 8.5}", "found a number"},
        {"{\"num_layers\": -8}", "saved config: --num-layers -8: must be an integer from 1"},
        {"{\"num_layers\": [8]}", "found a list"},
        {"{\"swiglu\": 1}", "--swiglu: must be true or false, found an integer"},
        {"{\"tokenizer_model\": {}}", "--tokenizer-model: must be a string, found an object"},
        {"{\"normalization\": \"BatchNorm\"}", "must be one of LayerNorm, RMSNorm"},
        {"{\"rotary_base\": \"NaN\"}", "found a string"},
    };

    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        struct options o;
        json_t *config = json_loads(bad[i][0], 0, NULL);

        assert_non_null(config);
        assert_int_equal(case_parse(&o, ""), 0);
        assert_int_equal(options_apply_json(&o, config), -1);
        if (strstr(error_text(), bad[i][1]) == NULL) {
            fail_msg("%s: said '%s'", bad[i][0], error_text());
        }
        json_decref(config);
        options_free(&o);
    }
}

static void a_model_alone_can_be_validated(void **state)
{
    struct options o;

    assert_int_equal(case_parse(&o, MODEL_FLAGS "--num-experts 4"), 0);
    assert_int_equal(options_validate_model(&o), 0);
    assert_int_equal(o.ffn_hidden_size, 256);
    assert_true(o.moe_router_topk_scaling_factor == 1.0);
    options_free(&o);
}

/* What a function prints, as a malloc'd string. Inlined, gcc 12 takes the result for &text. */
__attribute__((noinline)) static char *printed(void (*print)(const struct options *, FILE *),
                                               const struct options *o)
{
    char *text = NULL;
    size_t length = 0;
    FILE *out = open_memstream(&text, &length);

    print(o, out);
    fclose(out);
    return text;
}

static void expect_printed(const char *text, const char *part)
{
    if (strstr(text, part) == NULL) {
        fail_msg("'%s' is missing in\n%s", part, text);
    }
}

static void arguments_print_as_megatron_prints_them(void **state)
{
    struct options o;
    char *text;

    case_valid(&o, BASE_FLAGS "--data-cache-path x --lr-warmup-iters 2", 1);
    text = printed(options_print, &o);
    assert_ptr_equal(strstr(text, "------------------------ arguments ------------------------\n"),
                     text);
    expect_printed(text, "-------------------- end of arguments ---------------------\n");
    expect_printed(text, "\n  num_layers ...................................... 8\n");
    expect_printed(text, "\n  bf16 ............................................ False\n");
    expect_printed(text, "\n  load_optim ...................................... True\n");
    expect_printed(text, "\n  save ............................................ None\n");
    expect_printed(text, "\n  save_interval ................................... None\n");
    expect_printed(text, "\n  clip_grad ....................................... 1.0\n");
    expect_printed(text, "\n  lr .............................................. 0.001\n");
    expect_printed(text, "\n  adam_eps ........................................ 1e-08\n");
    assert_true(strstr(text, "  adam_beta1 ") < strstr(text, "  bf16 "));
    free(text);
    options_free(&o);
}

static void the_config_says_where_values_come_from(void **state)
{
    struct options o;
    json_t *config = json_pack("{s:i,s:i}", "num_experts", 4, "moe_router_topk", 3);
    char *text;
    const char *heading;

    assert_int_equal(case_parse(&o, BASE_FLAGS "--moe-router-topk 2 --deterministic-mode"), 0);
    assert_int_equal(options_apply_json(&o, config), 0);
    assert_int_equal(options_validate(&o, 1), 0);
    text = printed(options_print_config, &o);
    expect_printed(text, "\nnum_layers                                   8  (command line)\n");
    expect_printed(text, "\nnum_experts                                  4  (checkpoint)\n");
    expect_printed(text, "\nmoe_router_topk                              2  (command line)\n");
    expect_printed(text, "\nffn_hidden_size                              256  (derived)\n");
    expect_printed(text, "\nseed                                         1234  (default)\n");
    expect_printed(text, "\ndeterministic_mode                           always  (cadre is");
    expect_printed(text, "\n# moe\n");
    heading = strstr(text, "\n# moe\n");
    assert_null(strstr(heading + 1, "\n# moe\n"));
    assert_null(strstr(text, "\nfp16 "));
    free(text);
    json_decref(config);
    options_free(&o);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(the_script_of_the_seed_is_accepted_on_32_ranks),
        cmocka_unit_test(wandb_points_to_tensorboard),
        cmocka_unit_test(wrong_names_of_the_seed_get_the_right_ones),
        cmocka_unit_test(every_flag_of_the_reference_is_a_row),
        cmocka_unit_test(every_row_is_well_formed),
        cmocka_unit_test(every_default_is_a_legal_value),
        cmocka_unit_test(every_refused_flag_is_refused),
        cmocka_unit_test(the_model_comes_back_from_the_saved_config),
        cmocka_unit_test(a_damaged_saved_config_is_an_error),
        cmocka_unit_test(a_model_alone_can_be_validated),
        cmocka_unit_test(arguments_print_as_megatron_prints_them),
        cmocka_unit_test(the_config_says_where_values_come_from),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
