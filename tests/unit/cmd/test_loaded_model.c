/* A loaded model gives the CPU's logits on a device whose memory the host cannot touch
 * (guarded_device.h) and on the GPU where there is one; token by token, with the cache of keys and
 * values, as for the whole sequence at once. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <cmocka.h>

#include "../train/guarded_device.h"
#include "cmd/loaded_model.h"
#include "device/device_select.h"

enum { NUM_SEQUENCES = 2, SEQ_LENGTH = 33, VOCAB = 128, PROMPT = 10, NUM_LAYERS_MAX = 8 };

static const char directory[] = FIXTURES "/mixtral-tiny";

static int32_t token_at(int sequence, int position)
{
    return (sequence * 29 + position * position * 7 + position) % VOCAB;
}

static void open_on(struct loaded_model *model, const struct device *device, const struct ops *ops)
{
    const struct loaded_model_request request = {.directory = directory,
                                                 .num_positions = SEQ_LENGTH,
                                                 .dtype = DTYPE_F32,
                                                 .device = device,
                                                 .ops = ops};

    if (loaded_model_open(model, &request) != 0) {
        fail_msg("%s", error_text());
    }
    assert_int_equal(model->config.vocab_size, VOCAB);
    assert_true(model->config.num_layers <= NUM_LAYERS_MAX);
}

/* [NUM_SEQUENCES, SEQ_LENGTH, VOCAB] */
static float *whole_logits(struct loaded_model *model)
{
    float *logits = malloc(sizeof(float[NUM_SEQUENCES][SEQ_LENGTH][VOCAB]));
    int64_t tokens[NUM_SEQUENCES * SEQ_LENGTH];

    for (int i = 0; i < NUM_SEQUENCES * SEQ_LENGTH; i++) {
        tokens[i] = token_at(i / SEQ_LENGTH, i % SEQ_LENGTH);
    }
    assert_non_null(logits);
    if (loaded_model_logits(model, tokens, NUM_SEQUENCES, SEQ_LENGTH, logits) != 0) {
        fail_msg("%s", error_text());
    }
    return logits;
}

static void assert_close(const float *x, const float *expected, int64_t n)
{
    float largest = 0.0f, worst = 0.0f;

    for (int64_t i = 0; i < n; i++) {
        const float error = fabsf(x[i] - expected[i]);

        largest = fmaxf(largest, fabsf(expected[i]));
        worst = error <= worst ? worst : error; /* takes NaN */
    }
    if (!(worst <= 1e-5f * largest)) {
        fail_msg("logits differ by %g, the largest is %g", (double)worst, (double)largest);
    }
}

/* The tokens of sequence 0 from `first` to before `end`: the last one's logits [VOCAB]. */
static void run_cached(struct loaded_model *model, struct kv_cache *caches, int first, int end,
                       float *last)
{
    const struct arena_mark mark = arena_mark(model->saved);
    int32_t tokens[SEQ_LENGTH];
    struct tensor logits;
    struct pass pass;

    for (int i = first; i < end; i++) {
        tokens[i - first] = token_at(0, i);
    }
    pass = loaded_model_pass(model, tokens, end - first, 1, first);
    logits = tensor_new(model->saved, DTYPE_F32, end - first, model->config.padded_vocab_size);
    transformer_stage_logits(&model->stage, &pass, caches, &logits, NULL);
    stream_copy_to_host(model->stream, last, tensor_rows(&logits, end - first - 1, 1).data,
                        VOCAB * sizeof *last);
    for (int i = 0; i < model->config.num_layers; i++) {
        caches[i].length = end;
    }
    arena_release(model->saved, mark);
}

/* A prompt at once, then a token at a time. */
static void check_cache(struct loaded_model *model, const float *expected)
{
    const struct model_config *config = &model->config;
    struct kv_cache caches[NUM_LAYERS_MAX] = {0};
    float last[VOCAB];

    for (int i = 0; i < config->num_layers; i++) {
        caches[i].k =
            tensor_new(model->run, DTYPE_F32, SEQ_LENGTH, 1, config->num_groups, config->head_dim);
        caches[i].v =
            tensor_new(model->run, DTYPE_F32, SEQ_LENGTH, 1, config->num_groups, config->head_dim);
    }
    for (int end = PROMPT; end <= SEQ_LENGTH; end++) {
        run_cached(model, caches, end == PROMPT ? 0 : end - 1, end, last);
        assert_close(last, expected + (int64_t)(end - 1) * VOCAB, VOCAB);
    }
}

static void check_device(const struct device *device, const struct ops *ops)
{
    struct loaded_model cpu, model;
    float *expected, *logits;

    open_on(&cpu, device_cpu(), ops_cpu());
    open_on(&model, device, ops);
    expected = whole_logits(&cpu);
    logits = whole_logits(&model);
    assert_close(logits, expected, (int64_t)NUM_SEQUENCES * SEQ_LENGTH * VOCAB);
    check_cache(&model, expected);
    free(logits);
    free(expected);
    loaded_model_close(&model);
    loaded_model_close(&cpu);
}

static void on_the_cpu(void **state)
{
    check_device(device_cpu(), ops_cpu());
}

static void host_code_reaches_device_memory_by_ops_and_copies_only(void **state)
{
    check_device(guarded_device(), guarded_ops());
}

static void on_the_gpu(void **state)
{
    struct loaded_model_request request = {0};

    assert_int_equal(loaded_model_choose_device(&request, "auto"), 0);
    if (request.device->kind == DEVICE_CPU) {
        skip();
    }
    check_device(request.device, request.ops);
}

static void a_device_that_is_not_there_is_refused(void **state)
{
    struct loaded_model_request request = {0};

    assert_int_equal(loaded_model_choose_device(&request, "tpu"), -1);
    assert_non_null(strstr(error_text(), "--device tpu: legal: cpu, cuda, auto"));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(on_the_cpu),
        cmocka_unit_test(host_code_reaches_device_memory_by_ops_and_copies_only),
        cmocka_unit_test(on_the_gpu),
        cmocka_unit_test(a_device_that_is_not_there_is_refused),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
