#include "data_test.h"

#include "data/indexed_dataset.h"
#include "data/preprocess.h"

static struct tokenizer *numbers;
static struct preprocess_config config;
static const char *inputs[3];

static int set_up(void **state)
{
    static const char *const keys[] = {"text", "title"};
    static char prefix[PATH_LENGTH_MAX];

    if (make_scratch(state) != 0) {
        return -1;
    }
    snprintf(prefix, sizeof prefix, "%s/out", scratch);
    numbers =
        tokenizer_open(&(struct tokenizer_config){.type = "NullTokenizer", .vocab_size = 1000});
    config = (struct preprocess_config){
        .inputs = inputs,
        .num_inputs = 1,
        .keys = keys,
        .num_keys = 1,
        .output_prefix = prefix,
        .tokenizer = numbers,
        .num_workers = 2,
    };
    return 0;
}

static int tear_down(void **state)
{
    tokenizer_close(numbers);
    return remove_scratch(state);
}

static void write_input(int i, const char *name, const char *text)
{
    static char paths[3][PATH_LENGTH_MAX];

    assert_int_equal(path_format(paths[i], "%s/%s", scratch, name), 0);
    write_bytes(paths[i], text, strlen(text));
    inputs[i] = paths[i];
}

/* The data set as text: documents on "|", sequences on "/", tokens on blanks. */
static void assert_set_holds(const char *name, const char *expected)
{
    struct indexed_dataset set;
    char text[1024] = "";

    assert_int_equal(indexed_dataset_open(&set, scratch_path(name)), 0);
    for (int64_t d = 0; d < set.num_documents; d++) {
        for (int64_t s = indexed_dataset_document_start(&set, d);
             s < indexed_dataset_document_start(&set, d + 1); s++) {
            const int32_t length = indexed_dataset_length(&set, s);
            int32_t tokens[64];

            assert_int_equal(indexed_dataset_read(&set, s, 0, length, tokens), 0);
            for (int32_t i = 0; i < length; i++) {
                sprintf(text + strlen(text), "%d ", tokens[i]);
            }
            strcat(text, "/");
        }
        strcat(text, "|");
    }
    indexed_dataset_close(&set);
    assert_string_equal(text, expected);
}

static int run(void)
{
    struct preprocess_progress progress;

    return preprocess_run(&config, &progress);
}

static void a_line_is_a_document_and_a_list_is_sentences(void **state)
{
    write_input(0, "a.jsonl",
                "{\"text\": \"1 2\", \"title\": \"7\", \"n\": 123456789012345678901234567890}\n"
                "\n"
                "{\"title\": [], \"text\": [\"3\", \"\", \"4 5\"]}\r\n"
                "{\"text\": \"\", \"title\": \"8 9\"}");
    config.num_keys = 2;
    assert_int_equal(run(), 0);
    assert_set_holds("out_text_document", "1 2 /|3 /4 5 /||");
    assert_set_holds("out_title_document", "7 /||8 9 /|");
    config.append_eod = true; /* the last sequence ends with it, an empty document has none */
    assert_int_equal(run(), 0);
    assert_set_holds("out_text_document", "1 2 999 /|3 /4 5 999 /||");
}

static void a_text_file_is_one_document(void **state)
{
    write_input(0, "a.txt", "1 2\n\n3\n");
    write_input(1, "b.jsonl", "{\"text\": \"4\"}\n");
    write_input(2, "c.txt", "5");
    config.num_inputs = 3;
    assert_int_equal(run(), 0);
    assert_set_holds("out_text_document", "1 2 3 /|4 /|5 /|");
    config.num_inputs = 1;
    config.num_keys = 2;
    assert_int_equal(run(), -1);
    assert_error_mentions("plain text");
    config.num_keys = 1;
    config.format = PREPROCESS_JSONL;
    assert_int_equal(run(), -1);
    assert_error_mentions("a.txt, line 1");
}

static char *read_output(const char *name, size_t *num_bytes)
{
    char *bytes = path_read_file(scratch_path(name), 1 << 28, num_bytes);

    assert_non_null(bytes);
    return bytes;
}

/* 3 MB in lines of all lengths, one of them longer than a chunk. */
static void the_output_does_not_depend_on_the_workers(void **state)
{
    FILE *file;
    static const int workers[] = {1, 2, 7};
    char *idx[3], *bin[3];
    size_t idx_bytes[3], bin_bytes[3];

    write_input(0, "large.jsonl", "");
    file = fopen(inputs[0], "w");
    for (int d = 0; d < 2000; d++) {
        const int length = d == 700 ? 300000 : (d * 7919) % 500;

        fputs("{\"text\": \"", file);
        for (int i = 0; i < length; i++) {
            fprintf(file, "%d ", (d + i) % 1000);
        }
        fputs("\"}\n", file);
    }
    fclose(file);
    for (int w = 0; w < 3; w++) {
        config.num_workers = workers[w];
        assert_int_equal(run(), 0);
        idx[w] = read_output("out_text_document.idx", &idx_bytes[w]);
        bin[w] = read_output("out_text_document.bin", &bin_bytes[w]);
        assert_int_equal(idx_bytes[w], idx_bytes[0]);
        assert_int_equal(bin_bytes[w], bin_bytes[0]);
        assert_memory_equal(idx[w], idx[0], idx_bytes[0]);
        assert_memory_equal(bin[w], bin[0], bin_bytes[0]);
    }
    for (int w = 0; w < 3; w++) {
        free(idx[w]);
        free(bin[w]);
    }
}

static void assert_fails(const char *input, const char *message)
{
    write_input(0, "bad.jsonl", input);
    assert_int_equal(run(), -1);
    assert_error_mentions(message);
    assert_false(path_exists(scratch_path("out_text_document.bin")));
    assert_false(path_exists(scratch_path("out_text_document.idx")));
}

static void errors_name_file_and_line_and_leave_nothing(void **state)
{
    assert_fails("{\"text\": \"1\"}\n{\"text\": \"x\"}\n", "bad.jsonl, line 2: NullTokenizer");
    assert_fails("\n\n{\"text\"", "bad.jsonl, line 3: not JSON");
    assert_fails("[1]", "line 1: not a JSON object");
    assert_fails("{\"txt\": \"1\"}", "line 1: there is no key \"text\"");
    assert_fails("{\"text\": 1}", "neither a string nor a list");
    assert_fails("{\"text\": [1]}", "other than strings");
    assert_fails("{\"text\": \"\xff\"}", "line 1: not JSON");
    inputs[0] = "/nonexistent";
    assert_int_equal(run(), -1);
    assert_error_mentions("/nonexistent");
    write_input(0, "good.jsonl", "{\"text\": \"1\"}");
    config.output_prefix = "/nonexistent/out";
    assert_int_equal(run(), -1);
    assert_error_mentions("/nonexistent/out_text_document");
}

static void an_empty_input_gives_an_empty_set(void **state)
{
    write_input(0, "empty.jsonl", "");
    assert_int_equal(run(), 0);
    assert_set_holds("out_text_document", "");
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, set_up, tear_down)

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(a_line_is_a_document_and_a_list_is_sentences),
        TEST(a_text_file_is_one_document),
        TEST(the_output_does_not_depend_on_the_workers),
        TEST(errors_name_file_and_line_and_leave_nothing),
        TEST(an_empty_input_gives_an_empty_set),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
