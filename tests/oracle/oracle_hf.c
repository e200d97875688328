/* oracle_hf DIR [--device cuda]: this build against transformers. DIR is a Hugging Face Mixtral directory with
 * golden.safetensors beside the weights: logits, router logits, loss and every gradient of one
 * batch, and a training trajectory. Prints the worst figure of each kind; exit 1 if one is over its
 * bar.
 *
 * transformers orders tokens b * S + s, cadre s * B + b. The vocabulary is not padded: padded rows
 * would take part in the softmax. */
#include "ckpt/hf_mixtral.h"
#include "model/transformer_stage.h"
#include "optim/grad_norm.h"
#include "optim/optimizer.h"
#include "oracle_case.h"
#include "oracle_files.h"
#include "oracle_run.h"

static const double value_bar = 1e-4, gradient_bar = 1e-4, training_bar = 1e-3;
static const float learning_rate = 1e-3f; /* of the trajectory */

/* Sizes of a batch. */
struct batch_shape {
    int64_t num_batches, num_sequences, num_positions; /* num_positions: S, of S + 1 tokens */
};

struct oracle {
    struct hf_mixtral *model;
    const struct hf_mixtral_config *config;
    struct hf_model_tensor *model_tensors;
    int num_model_tensors;
    struct oracle_tensors golden;
    struct oracle_run run;
    struct param_list params;
    struct transformer_stage stage;
    struct stage_saved saved;
    struct batch_shape batch, training;
};

/* ---- building ---- */

/* Top-k of the softmax, divided by the chosen ones' sum, as transformers does for every k. */
static void model_config_of(const struct oracle *o, struct model_config *model)
{
    const struct hf_mixtral_config *hf = o->config;

    *model = (struct model_config){
        .num_layers = (int)hf->num_hidden_layers,
        .hidden_size = hf->hidden_size,
        .ffn_hidden_size = hf->intermediate_size,
        .num_heads = hf->num_attention_heads,
        .num_groups = hf->num_key_value_heads,
        .head_dim = hf->head_dim,
        .vocab_size = hf->vocab_size,
        .padded_vocab_size = hf->vocab_size,
        .max_positions = hf->max_position_embeddings,
        .norm = NORM_RMSNORM,
        .norm_eps = hf->rms_norm_eps,
        .activation = ACTIVATION_SWIGLU,
        .tied_embeddings = hf->tie_word_embeddings,
        .position = POSITION_ROPE,
        .rope_base = hf->rope_theta,
        .rope_percent = 1.0,
        .rope_interpolation = 1.0,
        .dtype = DTYPE_F32,
        .num_experts = (int)hf->num_local_experts,
        .moe_ffn_hidden_size = hf->intermediate_size,
        .router_rule = {.pre_softmax = true,
                        .renormalize = true,
                        .topk = (int)hf->num_experts_per_tok,
                        .scaling_factor = 1.0f},
        .grouped_gemm = true,
    };
    model->seq_length = o->batch.num_positions > o->training.num_positions
                            ? o->batch.num_positions
                            : o->training.num_positions;
    for (int i = 0; i < model->num_layers; i++) {
        model->is_moe_layer[i] = true;
    }
}

/* The last two dims of a tensor of tokens are [B, S + 1]. */
static int read_batch_shape(struct oracle *o, const char *name, int num_dims,
                            struct batch_shape *shape)
{
    const struct safetensors_tensor *tokens = oracle_find(&o->golden, name);

    if (tokens == NULL || tokens->dtype != DTYPE_I64 || tokens->num_dims != num_dims) {
        return error_set("golden tensor %s is missing, or is no I64 of %d dims", name, num_dims);
    }
    shape->num_batches = num_dims == 3 ? tokens->shape[0] : 1;
    shape->num_sequences = tokens->shape[num_dims - 2];
    shape->num_positions = tokens->shape[num_dims - 1] - 1;
    if (shape->num_batches < 1 || shape->num_sequences < 1 || shape->num_positions < 1) {
        return error_set("golden tensor %s holds no batch", name);
    }
    return 0;
}

static int open_files(struct oracle *o, const char *directory)
{
    char path[PATH_LENGTH_MAX];

    TRY(path_format(path, "%s/golden.safetensors", directory));
    TRY(oracle_tensors_open(&o->golden, path));
    TRY(read_batch_shape(o, "tokens", 2, &o->batch));
    TRY(read_batch_shape(o, "train.tokens", 3, &o->training));
    o->model = hf_mixtral_open(directory);
    if (o->model == NULL) {
        return -1;
    }
    o->config = hf_mixtral_config(o->model);
    o->model_tensors = hf_mixtral_tensors(o->config, o->config->vocab_size, &o->num_model_tensors);
    return 0;
}

static int check_inventory(struct oracle *o)
{
    struct hf_mixtral_inventory inventory;
    int status = 0;

    TRY(hf_mixtral_take_inventory(o->model, &inventory));
    if (inventory.num_missing > 0 || inventory.num_unexpected > 0) {
        status = error_set("%d tensors are missing, %d unexpected; the first: %s",
                           inventory.num_missing, inventory.num_unexpected,
                           inventory.missing != NULL ? inventory.missing : inventory.unexpected);
    }
    hf_mixtral_inventory_free(&inventory);
    return status;
}

/* The parameter of a tensor of the mapping; both must know the same shape. */
static struct param *param_of(struct oracle *o, const struct hf_model_tensor *tensor)
{
    struct param *param = param_find(&o->params, tensor->name);

    if (param == NULL || param->num_dims != tensor->num_dims ||
        memcmp(param->global_shape, tensor->global_shape,
               (size_t)param->num_dims * sizeof(int64_t)) != 0) {
        return FAIL_NULL("the model has no parameter %s of the mapping's shape", tensor->name);
    }
    return param;
}

static int load_weights(struct oracle *o)
{
    TRY(check_inventory(o));
    if (o->num_model_tensors != o->params.num_params) {
        return error_set("the model has %d parameters, the mapping %d", o->params.num_params,
                         o->num_model_tensors);
    }
    for (int i = 0; i < o->num_model_tensors; i++) {
        struct param *param = param_of(o, &o->model_tensors[i]);

        if (param == NULL) {
            return -1;
        }
        TRY(hf_mixtral_read_box(o->model, &o->model_tensors[i], &param->box, DTYPE_F32,
                                param->value.data));
    }
    return 0;
}

static int build(struct oracle *o, const char *directory)
{
    struct model_config config;
    struct stage_place place;

    TRY(open_files(o, directory));
    model_config_of(o, &config);
    param_list_init(&o->params);
    place = stage_place_whole(&config);
    transformer_stage_init(&o->stage, &o->params, &o->run.groups, &config, &place);
    param_list_allocate(&o->params, o->run.run, o->run.stream, config.dtype, true);
    transformer_stage_allocate(&o->stage, o->run.stream, o->run.run);
    stage_saved_init(&o->saved, place.num_layers);
    return load_weights(o);
}

/* ---- passes ---- */

/* A pass over the sequences of tokens[B, S + 1]. */
static int make_pass(struct oracle *o, const struct batch_shape *shape, const int64_t *tokens,
                     struct pass *pass)
{
    const int64_t num_sequences = shape->num_sequences, row = shape->num_positions + 1;

    *pass = oracle_pass(&o->run, shape->num_positions, num_sequences);
    for (int64_t t = 0; t < pass->token.dim[0]; t++) {
        const int64_t *at = tokens + t % num_sequences * row + t / num_sequences;

        if (at[0] < 0 || at[0] >= o->config->vocab_size || at[1] < 0 ||
            at[1] >= o->config->vocab_size) {
            return error_set("token %lld or its successor is not in the vocabulary of %lld",
                             (long long)at[0], (long long)o->config->vocab_size);
        }
        ((int32_t *)pass->token.data)[t] = (int32_t)at[0];
        ((int32_t *)pass->label.data)[t] = (int32_t)at[1];
    }
    return 0;
}

/* The mean loss of the batch; gradients are left in the parameters. */
static float forward_backward(struct oracle *o, const struct pass *pass)
{
    const int64_t num_tokens = pass->token.dim[0];
    struct tensor loss = tensor_new(o->run.run, DTYPE_F32, num_tokens);
    double sum = 0.0;

    op_fill_zero(o->run.stream, &o->params.grads);
    transformer_stage_forward(&o->stage, pass, NULL, NULL, &loss, &o->saved);
    transformer_stage_backward(&o->stage, pass, NULL, NULL, &o->saved);
    for (int64_t t = 0; t < num_tokens; t++) {
        sum += (double)((const float *)loss.data)[t];
    }
    return (float)(sum / (double)num_tokens);
}

/* ---- one batch ---- */

/* "Within 1e-4": of the largest value, and absolutely. */
static void compare_values(struct oracle_case *c, const char *what, const float *got,
                           const float *expected, int64_t n)
{
    double largest = 0.0;

    for (int64_t i = 0; i < n; i++) {
        largest = fmax(largest, fabs((double)expected[i]));
    }
    oracle_note(c, what, oracle_error(got, expected, n) * fmax(1.0, largest));
}

/* x[S*B,N] with rows s * B + b -> [B*S,N] with rows b * S + s. */
static struct tensor by_sequence(struct oracle *o, const struct tensor *x,
                                 const struct batch_shape *shape)
{
    const int64_t width = x->dim[1], num_sequences = shape->num_sequences;
    struct tensor y = tensor_allocate(o->run.run, DTYPE_F32, x->dim, 2);

    for (int64_t t = 0; t < x->dim[0]; t++) {
        const int64_t row = t % num_sequences * shape->num_positions + t / num_sequences;

        memcpy((float *)y.data + row * width, (const float *)x->data + t * width,
               (size_t)width * sizeof(float));
    }
    return y;
}

static int compare_router_logits(struct oracle *o, struct oracle_case *c,
                                 const struct tensor *router_logits)
{
    const int64_t num_tokens = o->batch.num_sequences * o->batch.num_positions;

    for (int i = 0; i < o->stage.place.num_layers; i++) {
        const struct tensor got = by_sequence(o, &router_logits[i], &o->batch);
        struct tensor expected;
        char name[64];

        snprintf(name, sizeof name, "router_logits.%d", i);
        TRY(oracle_get(&o->golden, name, o->run.run, &expected, DTYPE_F32, num_tokens,
                       o->config->num_local_experts));
        compare_values(c, name, got.data, expected.data, tensor_num_elements(&got));
    }
    return 0;
}

/* torch's module.to(bfloat16) also rounds the rotary frequencies, which no checkpoint stores, and a
 * later .float() does not bring them back: golden files that were made so are those of a model with
 * rounded frequencies. cadre's own are exact, as are those of a model that transformers loads in
 * float32. */
static void round_rope_frequencies(struct oracle *o)
{
    const int64_t num_positions = o->stage.rope.dim[0], num_pairs = o->stage.rope.dim[1];
    float *table = o->stage.rope.data; /* [positions, pairs, (cos, sin)] */

    printf("note the reference's rotary frequencies are rounded to bf16: computing with those\n");
    for (int64_t i = 0; i < num_pairs; i++) {
        const double frequency = pow(o->config->rope_theta, -(double)i / (double)num_pairs);
        const float rounded = bf16_to_float(bf16_from_float((float)frequency));

        for (int64_t p = 0; p < num_positions; p++) {
            const double angle = (double)((float)p * rounded);

            table[(p * num_pairs + i) * 2] = (float)cos(angle);
            table[(p * num_pairs + i) * 2 + 1] = (float)sin(angle);
        }
    }
}

/* Logits and router logits of the batch, without training. */
static int compare_logits(struct oracle *o, const struct pass *pass,
                          struct oracle_case *logits_case, struct oracle_case *router_case)
{
    const int64_t num_tokens = pass->token.dim[0], vocab_size = o->config->vocab_size;
    struct tensor expected, got = tensor_new(o->run.run, DTYPE_F32, num_tokens, vocab_size);
    struct tensor *router_logits =
        arena_allocate(o->run.run, (size_t)o->stage.place.num_layers * sizeof *router_logits);
    struct pass evaluation = *pass;

    evaluation.training = false;
    for (int i = 0; i < o->stage.place.num_layers; i++) {
        router_logits[i] =
            tensor_new(o->run.run, DTYPE_F32, num_tokens, o->config->num_local_experts);
    }
    TRY(oracle_get(&o->golden, "logits", o->run.run, &expected, DTYPE_F32, o->batch.num_sequences,
                   o->batch.num_positions, vocab_size));
    transformer_stage_logits(&o->stage, &evaluation, NULL, &got, router_logits);
    if (o->config->dtype == DTYPE_BF16 &&
        oracle_error(by_sequence(o, &got, &o->batch).data, expected.data,
                     tensor_num_elements(&got)) > value_bar) {
        round_rope_frequencies(o);
        transformer_stage_logits(&o->stage, &evaluation, NULL, &got, router_logits);
    }
    got = by_sequence(o, &got, &o->batch);
    compare_values(logits_case, "logits", got.data, expected.data, tensor_num_elements(&got));
    return compare_router_logits(o, router_case, router_logits);
}

/* ---- tensors under Hugging Face's names ---- */

typedef int part_function(struct oracle *o, struct oracle_case *c, const char *name,
                          const struct tensor *expected, const struct tensor *got);

/* Calls one(name, golden PREFIX.name, the part of the parameter's value or gradient) for every
 * tensor of the checkpoint. */
static int for_each_part(struct oracle *o, struct oracle_case *c, const char *prefix, bool grads,
                         part_function *one)
{
    for (int i = 0; i < o->num_model_tensors; i++) {
        const struct param *param = param_of(o, &o->model_tensors[i]);
        const struct tensor *whole;
        struct hf_part *parts;
        int num_parts, status = 0;

        if (param == NULL) {
            return -1;
        }
        whole = grads ? &param->grad : &param->value;
        parts = hf_mixtral_parts(o->config, &o->model_tensors[i], &num_parts);
        for (int p = 0; p < num_parts && status == 0; p++) {
            const struct arena_mark mark = arena_mark(o->run.run);
            struct tensor expected, got;
            char name[HF_NAME_MAX + 16];

            snprintf(name, sizeof name, "%s.%s", prefix, parts[p].name);
            got = tensor_allocate(o->run.run, DTYPE_F32, parts[p].shape, parts[p].num_dims);
            box_copy(got.data, &parts[p].box, whole->data, &param->box, &parts[p].box,
                     (int)sizeof(float));
            status = oracle_read(&o->golden, name, o->run.run, DTYPE_F32, parts[p].shape,
                                 parts[p].num_dims, &expected);
            if (status == 0) {
                status = one(o, c, name, &expected, &got);
            }
            arena_release(o->run.run, mark);
        }
        free(parts);
        TRY(status);
    }
    return 0;
}

static int compare_part(struct oracle *o, struct oracle_case *c, const char *name,
                        const struct tensor *expected, const struct tensor *got)
{
    oracle_compare(c, name, got->data, expected->data, tensor_num_elements(got));
    return 0;
}

/* The renormalised probability of a top-1 router is constant: the gradient of its weight is zero,
 * and what the reference wrote down there is rounding, which has no scale of its own. */
static bool is_noise_in_reference(const struct oracle *o, const char *name)
{
    return o->config->num_experts_per_tok == 1 && strstr(name, ".gate.weight") != NULL;
}

static int compare_gradient(struct oracle *o, struct oracle_case *c, const char *name,
                            const struct tensor *expected, const struct tensor *got)
{
    const float *noise = expected->data, *zero = got->data;

    if (!is_noise_in_reference(o, name)) {
        return compare_part(o, c, name, expected, got);
    }
    for (int64_t i = 0; i < tensor_num_elements(got); i++) {
        oracle_note(c, name, fabs((double)zero[i]) + fabs((double)noise[i]));
    }
    return 0;
}

/* Adam divides rounding by itself: a step of it is up to the learning rate in any direction. */
static int compare_trained(struct oracle *o, struct oracle_case *c, const char *name,
                           const struct tensor *expected, const struct tensor *got)
{
    const double reach = (double)learning_rate * (double)o->training.num_batches;

    if (!is_noise_in_reference(o, name)) {
        return compare_part(o, c, name, expected, got);
    }
    for (int64_t i = 0; i < tensor_num_elements(got); i++) {
        const double error = fabs((double)((const float *)got->data)[i] -
                                  (double)((const float *)expected->data)[i]);

        oracle_note(c, name, fmax(0.0, error - reach));
    }
    return 0;
}

/* ---- the trajectory ---- */

struct trajectory {
    struct oracle_case loss, norm;
    struct tensor expected_loss, expected_norm;
    struct optimizer optimizer;
    struct tensor grad_norm, grad_scale;
};

static int training_step(struct oracle *o, struct trajectory *trajectory, const int64_t *tokens,
                         int64_t i)
{
    const struct optimizer_rates rates = {
        .lr = learning_rate, .decoupled_lr = learning_rate, .weight_decay = 0.1f};
    const struct arena_mark mark = arena_mark(o->run.run);
    struct pass pass;
    char what[64];
    float loss;

    TRY(make_pass(o, &o->training, tokens, &pass));
    loss = forward_backward(o, &pass);
    grad_norm_clip_scale(&trajectory->optimizer, &o->run.groups, o->run.stream, o->run.scratch, 1.0f,
                         &trajectory->grad_norm, &trajectory->grad_scale);
    optimizer_step(&trajectory->optimizer, o->run.stream, &rates, &trajectory->grad_scale);
    snprintf(what, sizeof what, "step %lld", (long long)i);
    oracle_compare(&trajectory->loss, what, &loss,
                   (const float *)trajectory->expected_loss.data + i, 1);
    oracle_compare(&trajectory->norm, what, trajectory->grad_norm.data,
                   (const float *)trajectory->expected_norm.data + i, 1);
    arena_release(o->run.run, mark);
    return 0;
}

static int run_trajectory(struct oracle *o, struct trajectory *trajectory)
{
    const struct batch_shape *shape = &o->training;
    const int64_t batch_tokens = shape->num_sequences * (shape->num_positions + 1);
    struct tensor tokens;

    TRY(oracle_get(&o->golden, "train.tokens", o->run.run, &tokens, DTYPE_I64, shape->num_batches,
                   shape->num_sequences, shape->num_positions + 1));
    TRY(oracle_get(&o->golden, "train.loss", o->run.run, &trajectory->expected_loss, DTYPE_F32,
                   shape->num_batches));
    TRY(oracle_get(&o->golden, "train.grad_norm", o->run.run, &trajectory->expected_norm, DTYPE_F32,
                   shape->num_batches));
    for (int64_t i = 0; i < shape->num_batches; i++) {
        TRY(training_step(o, trajectory, (const int64_t *)tokens.data + i * batch_tokens, i));
    }
    return 0;
}

static void check_trajectory(struct oracle *o)
{
    struct trajectory trajectory;
    struct oracle_case weights;
    int status;

    oracle_case_begin(&trajectory.loss, "training losses", training_bar);
    oracle_case_begin(&trajectory.norm, "training gradient norms", training_bar);
    oracle_case_begin(&weights, "weights after training", training_bar);
    trajectory.grad_norm = tensor_new(o->run.run, DTYPE_F32, 1);
    trajectory.grad_scale = tensor_new(o->run.run, DTYPE_F32, 1);
    optimizer_init(&trajectory.optimizer,
                   &(struct optimizer_config){
                       .kind = OPTIMIZER_ADAM, .beta1 = 0.9f, .beta2 = 0.95f, .eps = 1e-8f},
                   &o->params, NULL, o->run.stream, o->run.run);
    status = run_trajectory(o, &trajectory);
    oracle_case_end(&trajectory.loss, status);
    oracle_case_end(&trajectory.norm, status);
    if (status == 0) {
        status = for_each_part(o, &weights, "final", false, compare_trained);
    }
    oracle_case_end(&weights, status);
    optimizer_free(&trajectory.optimizer);
}

static int compare_batch(struct oracle *o, struct oracle_case *logits, struct oracle_case *router,
                         struct oracle_case *loss_case, struct oracle_case *gradients)
{
    const struct batch_shape *shape = &o->batch;
    struct tensor tokens, expected;
    struct pass pass;
    float loss;

    TRY(oracle_get(&o->golden, "tokens", o->run.run, &tokens, DTYPE_I64, shape->num_sequences,
                   shape->num_positions + 1));
    TRY(make_pass(o, shape, tokens.data, &pass));
    TRY(compare_logits(o, &pass, logits, router));
    loss = forward_backward(o, &pass);
    TRY(oracle_read(&o->golden, "loss", o->run.run, DTYPE_F32, NULL, 0, &expected));
    compare_values(loss_case, "loss", &loss, expected.data, 1);
    return for_each_part(o, gradients, "grad", true, compare_gradient);
}

static void check_batch(struct oracle *o)
{
    struct oracle_case logits, router, loss, gradients;
    int status;

    oracle_case_begin(&logits, "logits", value_bar);
    oracle_case_begin(&router, "router logits", value_bar);
    oracle_case_begin(&loss, "loss", value_bar);
    oracle_case_begin(&gradients, "gradients", gradient_bar);
    status = compare_batch(o, &logits, &router, &loss, &gradients);
    oracle_case_end(&logits, status);
    oracle_case_end(&router, status);
    oracle_case_end(&loss, status);
    oracle_case_end(&gradients, status);
}

/* Whatever else the golden file says. */
static void check_rest(struct oracle *o)
{
    oracle_find(&o->golden,
                "hf_aux_loss"); /* of another formula than Megatron's: cadre has no such loss */
    if (oracle_tally.num_failed == 0 && oracle_all_read(&o->golden) != 0) {
        printf("FAIL golden.safetensors: %s\n", error_text());
        oracle_tally.num_failed++;
    }
}

int main(int argc, char **argv)
{
    struct oracle o = {0};

    if (argc != 2 && !(argc == 4 && strcmp(argv[2], "--device") == 0)) {
        fprintf(stderr, "usage: oracle_hf DIR [--device cpu|cuda]\n");
        return 2;
    }
    if (oracle_run_begin_on(&o.run, argc == 4 ? argv[3] : "cpu") != 0) {
        fprintf(stderr, "oracle_hf: %s\n", error_text());
        return 77;
    }
    if (build(&o, argv[1]) == 0) {
        check_batch(&o);
        check_trajectory(&o);
        check_rest(&o);
    } else {
        printf("FAIL %s\n", error_text());
        oracle_tally.num_failed++;
    }
    stage_saved_free(&o.saved);
    transformer_stage_free(&o.stage);
    param_list_free(&o.params);
    free(o.model_tensors);
    hf_mixtral_close(o.model);
    oracle_tensors_close(&o.golden);
    oracle_run_end(&o.run);
    return oracle_tally.num_failed == 0 ? 0 : 1;
}
