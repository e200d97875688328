/* A Hugging Face model seen as cadre's tensors: against loops that know both layouts element by
 * element, in all three layouts of the experts. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <cmocka.h>

#include "base/check.h"
#include "base/path.h"
#include "ckpt/hf_mixtral.h"
#include "ckpt/safetensors_writer.h"

static char directory[PATH_LENGTH_MAX];
static const char single[] = FIXTURES "/mixtral-tiny";
static const char sharded[] = FIXTURES "/mixtral-tiny-sharded";

static int make_directory(void **state)
{
    strcpy(directory, "/tmp/cadre_hf_XXXXXX");
    return mkdtemp(directory) != NULL ? 0 : -1;
}

static int remove_directory(void **state)
{
    return path_remove_tree(directory);
}

static void assert_error_says(const char *text)
{
    if (strstr(error_text(), text) == NULL) {
        fail_msg("\"%s\" does not say \"%s\"", error_text(), text);
    }
}

/* ---- reading whole tensors ---- */

/* A Hugging Face tensor by name, in f32; the caller frees. */
static float *load_hf(const char *path, const char *name)
{
    struct hf_weights *weights = hf_weights_open(path);
    const struct hf_tensor *found = hf_weights_find(weights, name);
    const struct box whole = box_whole(found->tensor->shape, found->tensor->num_dims);
    float *values = malloc((size_t)box_num_elements(&whole) * sizeof *values);

    assert_int_equal(
        safetensors_read_box(found->file, found->tensor, &whole, &whole, values, &whole, DTYPE_F32),
        0);
    hf_weights_close(weights);
    return values;
}

/* One of cadre's tensors by name, in f32; the caller frees. */
static float *load_cadre(struct hf_mixtral *model, int64_t padded_vocab_size, const char *name)
{
    int num_tensors;
    struct hf_model_tensor *tensors =
        hf_mixtral_tensors(hf_mixtral_config(model), padded_vocab_size, &num_tensors);
    float *values = NULL;

    for (int i = 0; i < num_tensors; i++) {
        if (strcmp(tensors[i].name, name) == 0) {
            const struct box whole = box_whole(tensors[i].global_shape, tensors[i].num_dims);

            values = malloc((size_t)box_num_elements(&whole) * sizeof *values);
            assert_int_equal(hf_mixtral_read_box(model, &tensors[i], &whole, DTYPE_F32, values), 0);
        }
    }
    assert_non_null(values);
    free(tensors);
    return values;
}

static struct hf_mixtral *open_complete(const char *path)
{
    struct hf_mixtral *model = hf_mixtral_open(path);
    struct hf_mixtral_inventory inventory;

    if (model == NULL || hf_mixtral_take_inventory(model, &inventory) != 0) {
        fail_msg("%s", error_text());
    }
    assert_int_equal(inventory.num_missing, 0);
    assert_int_equal(inventory.num_unused, 0);
    assert_null(inventory.missing);
    hf_mixtral_inventory_free(&inventory);
    return model;
}

/* ---- the maps ---- */

static void q_k_and_v_are_grouped(void **state)
{
    /* A = 4 heads in G = 2 groups, D = 16, H = 64 */
    struct hf_mixtral *model = open_complete(single);
    float *qkv = load_cadre(model, 128, "decoder.layers.1.self_attention.linear_qkv.weight");
    float *q = load_hf(single, "model.layers.1.self_attn.q_proj.weight");
    float *k = load_hf(single, "model.layers.1.self_attn.k_proj.weight");
    float *v = load_hf(single, "model.layers.1.self_attn.v_proj.weight");

    for (int g = 0; g < 2; g++) {
        for (int r = 0; r < 4; r++) {
            for (int i = 0; i < 16 * 64; i++) {
                const float expected = r < 2    ? q[(g * 2 + r) * 16 * 64 + i]
                                       : r == 2 ? k[g * 16 * 64 + i]
                                                : v[g * 16 * 64 + i];

                assert_true(qkv[(g * 4 + r) * 16 * 64 + i] == expected);
            }
        }
    }
    free(qkv);
    free(q);
    free(k);
    free(v);
    hf_mixtral_close(model);
}

static void experts_are_gate_then_up(void **state)
{
    struct hf_mixtral *model = open_complete(single);
    float *fc1 = load_cadre(model, 128, "decoder.layers.0.mlp.experts.linear_fc1.weight");
    float *fc2 = load_cadre(model, 128, "decoder.layers.0.mlp.experts.linear_fc2.weight");
    const size_t bytes = 96 * 64 * sizeof(float);

    for (int e = 0; e < 4; e++) {
        char name[HF_NAME_MAX];
        float *w[4];

        for (int i = 1; i <= 3; i++) {
            snprintf(name, sizeof name, "model.layers.0.block_sparse_moe.experts.%d.w%d.weight", e,
                     i);
            w[i] = load_hf(single, name);
        }
        assert_memory_equal(fc1 + (2 * e) * 96 * 64, w[1], bytes);
        assert_memory_equal(fc1 + (2 * e + 1) * 96 * 64, w[3], bytes);
        assert_memory_equal(fc2 + e * 96 * 64, w[2], bytes);
        free(w[1]);
        free(w[2]);
        free(w[3]);
    }
    free(fc1);
    free(fc2);
    hf_mixtral_close(model);
}

static void the_vocabulary_is_padded_with_zeros(void **state)
{
    struct hf_mixtral *model = open_complete(sharded);
    float *padded = load_cadre(model, 200, "output_layer.weight");
    float *head = load_hf(sharded, "lm_head.weight");

    assert_memory_equal(padded, head, 128 * 64 * sizeof *head);
    for (int i = 128 * 64; i < 200 * 64; i++) {
        assert_true(padded[i] == 0.0f);
    }
    free(padded);
    free(head);
    hf_mixtral_close(model);
}

/* Every element of every tensor of the files is in exactly one place. */
static void the_parts_cover_all_tensors_once(void **state)
{
    struct hf_mixtral *model = open_complete(sharded);
    int num_tensors, num_parts_total = 0;
    struct hf_model_tensor *tensors =
        hf_mixtral_tensors(hf_mixtral_config(model), 128, &num_tensors);

    for (int t = 0; t < num_tensors; t++) {
        const struct box whole = box_whole(tensors[t].global_shape, tensors[t].num_dims);
        int num_parts;
        struct hf_part *parts = hf_mixtral_parts(hf_mixtral_config(model), &tensors[t], &num_parts);
        int64_t count = 0;

        for (int i = 0; i < num_parts; i++) {
            struct box common;

            assert_true(box_inside(&parts[i].box, tensors[t].global_shape));
            count += box_num_elements(&parts[i].box);
            for (int j = 0; j < i; j++) {
                assert_false(box_intersect(&parts[i].box, &parts[j].box, &common));
            }
        }
        assert_int_equal(count, box_num_elements(&whole));
        assert_int_equal(hf_mixtral_dtype(model, &tensors[t]), DTYPE_BF16);
        num_parts_total += num_parts;
        free(parts);
    }
    assert_int_equal(num_parts_total, 2 * (2 + 4 + 1 + 8 * 3) + 3);
    free(tensors);
    hf_mixtral_close(model);
}

static void a_box_is_a_cut_of_the_whole(void **state)
{
    struct hf_mixtral *model = open_complete(single);
    int num_tensors;
    struct hf_model_tensor *tensors =
        hf_mixtral_tensors(hf_mixtral_config(model), 128, &num_tensors);

    for (int t = 0; t < num_tensors; t++) {
        const struct box whole = box_whole(tensors[t].global_shape, tensors[t].num_dims);
        const struct box part = box_part(&whole, tensors[t].num_dims - 1, 1, 2);
        const size_t part_bytes = (size_t)box_num_elements(&part) * sizeof(float);
        float *all = load_cadre(model, 128, tensors[t].name);
        float *read = malloc(part_bytes), *cut = malloc(part_bytes);

        assert_int_equal(hf_mixtral_read_box(model, &tensors[t], &part, DTYPE_F32, read), 0);
        box_copy(cut, &part, all, &whole, &part, sizeof(float));
        assert_memory_equal(read, cut, part_bytes);
        free(all);
        free(read);
        free(cut);
    }
    free(tensors);
    hf_mixtral_close(model);
}

/* ---- other layouts, made from the fixture ---- */

enum layout { LAYOUT_FUSED, LAYOUT_TRANSPOSED, LAYOUT_NEW_NAMES, LAYOUT_WITHOUT_NORM };
enum { TENSORS_MAX = 128 };

struct rewritten {
    char names[TENSORS_MAX][HF_NAME_MAX];
    struct tensor tensors[TENSORS_MAX];
    int num_tensors;
};

static void add_tensor(struct rewritten *out, const char *name, float *values, const int64_t *shape,
                       int num_dims)
{
    snprintf(out->names[out->num_tensors], HF_NAME_MAX, "%s", name);
    out->tensors[out->num_tensors++] = tensor_wrap(values, DTYPE_F32, shape, num_dims);
}

/* [E, rows, cols] -> [E, cols, rows] in place */
static void transpose_experts(float *values, int64_t experts, int64_t rows, int64_t cols)
{
    float *copy = malloc((size_t)(experts * rows * cols) * sizeof *copy);

    memcpy(copy, values, (size_t)(experts * rows * cols) * sizeof *copy);
    for (int64_t e = 0; e < experts; e++) {
        for (int64_t r = 0; r < rows; r++) {
            for (int64_t c = 0; c < cols; c++) {
                values[(e * cols + c) * rows + r] = copy[(e * rows + r) * cols + c];
            }
        }
    }
    free(copy);
}

/* cadre's [E,2,F,H] is [E,2F,H], its [E,H,F] is down_proj: the same bytes. */
static void add_fused(struct rewritten *out, struct hf_mixtral *model, int layer, bool transposed)
{
    const int64_t gate_up[2][3] = {{4, 192, 64}, {4, 64, 192}};
    const int64_t down[2][3] = {{4, 64, 96}, {4, 96, 64}};
    char name[HF_NAME_MAX];
    float *values;

    snprintf(name, sizeof name, "decoder.layers.%d.mlp.experts.linear_fc1.weight", layer);
    values = load_cadre(model, 128, name);
    snprintf(name, sizeof name, "model.layers.%d.mlp.experts.gate_up_proj", layer);
    if (transposed) {
        transpose_experts(values, 4, 192, 64);
    }
    add_tensor(out, name, values, gate_up[transposed], 3);
    snprintf(name, sizeof name, "decoder.layers.%d.mlp.experts.linear_fc2.weight", layer);
    values = load_cadre(model, 128, name);
    snprintf(name, sizeof name, "model.layers.%d.mlp.experts.down_proj", layer);
    if (transposed) {
        transpose_experts(values, 4, 64, 96);
    }
    add_tensor(out, name, values, down[transposed], 3);
}

static void copy_tensor(struct rewritten *out, const struct hf_tensor *found)
{
    const char *name = found->tensor->name, *block = strstr(name, "block_sparse_moe");
    char renamed[HF_NAME_MAX];

    snprintf(renamed, sizeof renamed, "%s", name);
    if (block != NULL) {
        snprintf(renamed, sizeof renamed, "%.*smlp%s", (int)(block - name), name, block + 16);
    }
    add_tensor(out, renamed, load_hf(single, name), found->tensor->shape, found->tensor->num_dims);
}

static void copy_config(void)
{
    char path[PATH_LENGTH_MAX];
    size_t length;
    char *text = path_read_file(FIXTURES "/mixtral-tiny/config.json", 10000, &length);

    assert_int_equal(path_format(path, "%s/config.json", directory), 0);
    assert_int_equal(path_write_file_atomic(path, text, length), 0);
    free(text);
}

/* Writes the single-file fixture into `directory` in another layout. */
static void rewrite(enum layout layout)
{
    static struct rewritten out;
    const char *names[TENSORS_MAX];
    struct hf_weights *weights = hf_weights_open(single);
    struct hf_mixtral *model = hf_mixtral_open(single);
    char path[PATH_LENGTH_MAX];

    out.num_tensors = 0;
    for (int i = 0; i < hf_weights_num_tensors(weights); i++) {
        const struct hf_tensor *found = hf_weights_at(weights, i);
        const bool is_expert = strstr(found->tensor->name, ".experts.") != NULL;

        if (!(is_expert && layout <= LAYOUT_TRANSPOSED) &&
            !(layout == LAYOUT_WITHOUT_NORM &&
              strcmp(found->tensor->name, "model.norm.weight") == 0)) {
            copy_tensor(&out, found);
        }
    }
    for (int layer = 0; layer < 2 && layout <= LAYOUT_TRANSPOSED; layer++) {
        add_fused(&out, model, layer, layout == LAYOUT_TRANSPOSED);
    }
    for (int i = 0; i < out.num_tensors; i++) {
        names[i] = out.names[i];
    }
    assert_int_equal(path_format(path, "%s/model.safetensors", directory), 0);
    assert_int_equal(safetensors_save(path, names, out.tensors, out.num_tensors), 0);
    for (int i = 0; i < out.num_tensors; i++) {
        free(out.tensors[i].data);
    }
    copy_config();
    hf_mixtral_close(model);
    hf_weights_close(weights);
}

static void every_layout_of_the_experts_gives_the_same_tensors(void **state)
{
    static const char *names[] = {"decoder.layers.0.mlp.experts.linear_fc1.weight",
                                  "decoder.layers.1.mlp.experts.linear_fc2.weight",
                                  "decoder.layers.1.mlp.router.weight"};
    static const size_t counts[] = {4 * 192 * 64, 4 * 96 * 64, 4 * 64};

    for (int layout = LAYOUT_FUSED; layout <= LAYOUT_NEW_NAMES; layout++) {
        struct hf_mixtral *original = open_complete(single), *model;

        rewrite((enum layout)layout);
        model = open_complete(directory);
        for (int i = 0; i < 3; i++) {
            float *expected = load_cadre(original, 128, names[i]);
            float *values = load_cadre(model, 128, names[i]);

            assert_memory_equal(values, expected, counts[i] * sizeof *values);
            free(expected);
            free(values);
        }
        hf_mixtral_close(original);
        hf_mixtral_close(model);
    }
}

static void change_config(const char *key, int64_t value)
{
    char path[PATH_LENGTH_MAX];
    json_error_t error;
    json_t *root;

    assert_int_equal(path_format(path, "%s/config.json", directory), 0);
    root = json_load_file(path, 0, &error);
    json_object_set_new(root, key, json_integer(value));
    assert_int_equal(json_dump_file(root, path, 0), 0);
    json_decref(root);
}

static void shapes_that_fit_no_layout_are_refused(void **state)
{
    rewrite(LAYOUT_TRANSPOSED);
    change_config("intermediate_size", 100);
    assert_null(hf_mixtral_open(directory));
    assert_error_says("neither layout");
}

static void a_missing_and_an_unexpected_tensor_are_counted_and_named(void **state)
{
    struct hf_mixtral_inventory inventory;
    struct hf_mixtral *model;

    rewrite(LAYOUT_WITHOUT_NORM);
    model = hf_mixtral_open(directory);
    assert_int_equal(hf_mixtral_take_inventory(model, &inventory), 0);
    assert_int_equal(inventory.num_missing, 1);
    assert_string_equal(inventory.missing, "model.norm.weight\n");
    hf_mixtral_inventory_free(&inventory);
    hf_mixtral_close(model);
    change_config("num_local_experts", 3);
    model = hf_mixtral_open(directory);
    assert_int_equal(hf_mixtral_take_inventory(model, &inventory), -1); /* the router has 4 rows */
    assert_error_says("config.json asks for [3, 64]");
    hf_mixtral_close(model);
    change_config("num_local_experts", 4);
    change_config("num_hidden_layers", 1);
    model = hf_mixtral_open(directory);
    assert_int_equal(hf_mixtral_take_inventory(model, &inventory), 0);
    assert_int_equal(inventory.num_unexpected, 2 + 4 + 1 + 4 * 3);
    assert_non_null(strstr(inventory.unexpected, "model.layers.1."));
    assert_non_null(strstr(inventory.unexpected, "...\n"));
    hf_mixtral_inventory_free(&inventory);
    hf_mixtral_close(model);
    change_config("num_hidden_layers", 4000);
    assert_null(hf_mixtral_open(directory));
    assert_error_says("4000 layers");
}

static void a_directory_without_weights_or_config_is_an_error(void **state)
{
    assert_null(hf_mixtral_open(directory));
    assert_error_says("config.json");
    copy_config();
    assert_null(hf_mixtral_open(directory));
    assert_error_says("model.safetensors");
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, make_directory, remove_directory)

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(q_k_and_v_are_grouped),
        TEST(experts_are_gate_then_up),
        TEST(the_vocabulary_is_padded_with_zeros),
        TEST(the_parts_cover_all_tensors_once),
        TEST(a_box_is_a_cut_of_the_whole),
        TEST(every_layout_of_the_experts_gives_the_same_tensors),
        TEST(shapes_that_fit_no_layout_are_refused),
        TEST(a_missing_and_an_unexpected_tensor_are_counted_and_named),
        TEST(a_directory_without_weights_or_config_is_an_error),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
