/* Checkpoints: what is saved is loaded, from any cut into boxes; what is damaged is named. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <omp.h>
#include <pthread.h>
#include <sys/resource.h>
#include <unistd.h>
#include <cmocka.h>

#include "checkpoint_fixture.h"
#include "ckpt/checkpoint_layout.h"
#include "ckpt/manifest.h"
#include "ckpt/safetensors.h"
#include "ckpt/safetensors_writer.h"

static char directory[PATH_LENGTH_MAX];
static const char weights[] = "shard-00001-model-00001-of-00001.safetensors";

static int make_directory(void **state)
{
    strcpy(directory, "/tmp/cadre_checkpoint_XXXXXX");
    return mkdtemp(directory) != NULL ? 0 : -1;
}

static int remove_directory(void **state)
{
    return path_remove_tree(directory);
}

static void in_directory(char path[PATH_LENGTH_MAX], const char *name)
{
    assert_int_equal(path_format(path, "%s/%s", directory, name), 0);
}

static void assert_error_says(const char *text)
{
    if (strstr(error_text(), text) == NULL) {
        fail_msg("\"%s\" does not say \"%s\"", error_text(), text);
    }
}

static void what_is_saved_is_found_and_loaded(void **state)
{
    char path[PATH_LENGTH_MAX];
    char *text;
    size_t length;

    assert_int_equal(fixture_save(directory, 10, NULL), 0);
    assert_int_equal(fixture_save(directory, 20, NULL), 0);
    in_directory(path, CHECKPOINT_TRACKER);
    text = path_read_file(path, 100, &length);
    assert_string_equal(text, "20");
    free(text);
    assert_int_equal(fixture_load(directory, -1), 20);
    assert_int_equal(fixture_load(directory, 10), 10);
    in_directory(path, "iter_0000010");
    assert_int_equal(fixture_load(path, -1), 10);
    assert_int_equal(fixture_load(directory, 15), -1);
    assert_error_says("iter_0000015");
    assert_error_says("--ckpt-step 20");
}

static void the_same_iteration_is_replaced_either_way(void **state)
{
    for (int i = 0; i < 2; i++) {
        checkpoint_can_exchange = i == 0;
        assert_int_equal(fixture_save(directory, 10, NULL), 0);
        assert_int_equal(fixture_save(directory, 10, NULL), 0);
        assert_int_equal(fixture_load(directory, -1), 10);
    }
    checkpoint_can_exchange = true;
}

static void nothing_there_is_distinct_from_an_error(void **state)
{
    char path[PATH_LENGTH_MAX], tracker[PATH_LENGTH_MAX];

    assert_int_equal(checkpoint_find(directory, -1, path), CHECKPOINT_NONE);
    assert_int_equal(checkpoint_find("/nowhere", -1, path), CHECKPOINT_NONE);
    in_directory(tracker, CHECKPOINT_TRACKER);
    assert_int_equal(path_write_file_atomic(tracker, "", 0), 0);
    assert_int_equal(checkpoint_find(directory, -1, path), CHECKPOINT_ERROR);
    assert_error_says("neither an iteration nor");
    assert_int_equal(path_write_file_atomic(tracker, "7", 1), 0);
    assert_int_equal(checkpoint_find(directory, -1, path), CHECKPOINT_ERROR);
    assert_error_says("iter_0000007");
    assert_error_says("no other complete one");
}

static void without_a_tracker_the_newest_complete_one_is_taken(void **state)
{
    char path[PATH_LENGTH_MAX];

    assert_int_equal(fixture_save(directory, 10, NULL), 0);
    assert_int_equal(fixture_save(directory, 20, NULL), 0);
    in_directory(path, CHECKPOINT_TRACKER);
    assert_int_equal(unlink(path), 0);
    assert_int_equal(fixture_load(directory, -1), 20);
    in_directory(path, "iter_0000020/metadata.json");
    assert_int_equal(truncate(path, 10), 0);
    assert_int_equal(fixture_load(directory, -1), 10);
}

static void a_release_has_no_iteration_in_its_name(void **state)
{
    const float value[2] = {1, 2};
    const struct ckpt_item item = {.name = "x",
                                   .dtype = DTYPE_F32,
                                   .num_dims = 1,
                                   .global_shape = {2},
                                   .box = {1, {0}, {2}},
                                   .data = value};
    struct checkpoint_save_request request = {.directory = directory,
                                              .release = true,
                                              .items = &item,
                                              .num_items = 1,
                                              .state = json_object()};
    char path[PATH_LENGTH_MAX], expected[PATH_LENGTH_MAX];

    assert_int_equal(checkpoint_save(&request), 0);
    json_decref(request.state);
    assert_int_equal(checkpoint_find(directory, -1, path), CHECKPOINT_FOUND);
    in_directory(expected, "release");
    assert_string_equal(path, expected);
}

/* Flips one bit of the file and expects the damage to be seen, then repairs it. */
static void assert_flip_is_seen(const char *path, int64_t position, int bit)
{
    FILE *file = fopen(path, "r+b");
    int byte;

    assert_non_null(file);
    fseek(file, position, SEEK_SET);
    byte = fgetc(file);
    fseek(file, position, SEEK_SET);
    fputc(byte ^ 1 << bit, file);
    fclose(file);
    if (fixture_load(directory, 20) != -1) {
        fail_msg("bit %d of byte %lld of %s", bit, (long long)position, path);
    }
    assert_error_says("is damaged");
    assert_error_says("--ckpt-step 10");
    file = fopen(path, "r+b");
    fseek(file, position, SEEK_SET);
    fputc(byte, file);
    fclose(file);
}

static void every_flipped_bit_is_seen_and_the_previous_one_offered(void **state)
{
    static const char *names[] = {"iter_0000020/metadata.json",
                                  "iter_0000020/shard-00001-model-00001-of-00001.safetensors",
                                  "iter_0000020/optimizer/"
                                  "shard-00001-model-00001-of-00001.safetensors"};

    assert_int_equal(fixture_save(directory, 10, NULL), 0);
    assert_int_equal(fixture_save(directory, 20, NULL), 0);
    for (int f = 0; f < 3; f++) {
        char path[PATH_LENGTH_MAX];
        int64_t size_bytes;

        in_directory(path, names[f]);
        assert_int_equal(path_file_size(path, &size_bytes), 0);
        for (int64_t i = 0; i < size_bytes; i++) {
            assert_flip_is_seen(path, i, (int)(i % 8));
        }
    }
    assert_int_equal(fixture_load(directory, 20), 20);
}

static void every_truncation_and_a_missing_file_are_seen(void **state)
{
    static const char *names[] = {"metadata.json", "shard-00001-model-00001-of-00001.safetensors",
                                  "optimizer/shard-00001-model-00001-of-00001.safetensors"};

    assert_int_equal(fixture_save(directory, 10, NULL), 0);
    for (int f = 0; f < 3; f++) {
        char path[PATH_LENGTH_MAX];
        int64_t size_bytes;

        assert_int_equal(fixture_save(directory, 20, NULL), 0);
        assert_int_equal(path_format(path, "%s/iter_0000020/%s", directory, names[f]), 0);
        assert_int_equal(path_file_size(path, &size_bytes), 0);
        for (int64_t length = size_bytes - 1; length >= 0; length--) {
            assert_int_equal(truncate(path, length), 0);
            assert_int_equal(fixture_load(directory, -1), -1);
        }
        assert_int_equal(unlink(path), 0);
        assert_int_equal(fixture_load(directory, -1), -1);
        assert_error_says(f == 0 ? "metadata.json" : names[f]);
        assert_error_says("--ckpt-step 10");
    }
}

static void reading_checks_names_shapes_and_types(void **state)
{
    struct checkpoint_read read = {.name = "embedding.word_embeddings.weight",
                                   .dtype = DTYPE_F32,
                                   .num_dims = 2,
                                   .global_shape = {8, 4},
                                   .box = {2, {4, 0}, {4, 4}}};
    char path[PATH_LENGTH_MAX];
    struct checkpoint *checkpoint;
    float values[16];

    assert_int_equal(fixture_save(directory, 3, NULL), 0);
    assert_int_equal(checkpoint_find(directory, -1, path), CHECKPOINT_FOUND);
    checkpoint = checkpoint_open(path, NULL);
    assert_int_equal(checkpoint_read_box(checkpoint, &read, values), -1);
    assert_error_says("F32 [6, 4]");
    assert_error_says("F32 [8, 4]");
    for (int i = 0; i < 16; i++) {
        values[i] = -1;
    }
    read.allow_dim0_difference = true; /* rows 4 and 5 are there, 6 and 7 are left alone */
    assert_int_equal(checkpoint_read_box(checkpoint, &read, values), 0);
    assert_true(values[0] == fixture_value(3, 1, 16) && values[7] == fixture_value(3, 1, 23));
    assert_true(values[8] == -1 && values[15] == -1);
    read.global_shape[1] = 5;
    assert_int_equal(checkpoint_read_box(checkpoint, &read, values), -1);
    read.global_shape[0] = 6;
    read.global_shape[1] = 4;
    read.box.size[0] = 2;
    read.dtype = DTYPE_I32;
    assert_int_equal(checkpoint_read_box(checkpoint, &read, values), -1);
    assert_error_says("cannot be read as I32");
    read.name = "nothing";
    assert_int_equal(checkpoint_read_box(checkpoint, &read, values), -1);
    assert_error_says("no tensor nothing");
    checkpoint_close(checkpoint);
}

static void what_dead_runs_left_is_cleared_by_the_next_save(void **state)
{
    char host[65], name[256], dead[PATH_LENGTH_MAX], alive[PATH_LENGTH_MAX], old[PATH_LENGTH_MAX];

    gethostname(host, sizeof host);
    snprintf(name, sizeof name, "iter_0000005.tmp-%s-99999999", host);
    in_directory(dead, name);
    snprintf(name, sizeof name, "iter_0000005.tmp-%s-1", host); /* process 1 lives */
    in_directory(alive, name);
    assert_int_equal(path_make_directories(dead), 0);
    assert_int_equal(path_make_directories(alive), 0);
    assert_int_equal(fixture_save(directory, 10, NULL), 0);
    assert_false(path_exists(dead));
    assert_true(path_exists(alive));
    /* A run that died between the two renames of a replacement: found at once, put back at the
     * save. */
    snprintf(name, sizeof name, "iter_0000010.old-%s-99999999", host);
    in_directory(old, name);
    in_directory(dead, "iter_0000010");
    assert_int_equal(rename(dead, old), 0);
    assert_int_equal(fixture_load(directory, -1), 10);
    assert_int_equal(fixture_save(directory, 20, NULL), 0);
    assert_false(path_exists(old));
    assert_int_equal(fixture_load(directory, 10), 10);
}

/* ---- several ranks, as threads ---- */

enum { NUM_RANKS = 2 };
static pthread_barrier_t barrier;
static char gathered[NUM_RANKS][4096];

static void gather_in_memory(void *context, const void *mine, void *all, size_t size_bytes)
{
    const int rank = *(const int *)context;

    assert_true(size_bytes <= sizeof gathered[0]);
    memcpy(gathered[rank], mine, size_bytes);
    pthread_barrier_wait(&barrier);
    for (int r = 0; r < NUM_RANKS; r++) {
        memcpy((char *)all + (size_t)r * size_bytes, gathered[r], size_bytes);
    }
    pthread_barrier_wait(&barrier);
}

static void *save_and_load_as_rank(void *argument)
{
    const struct checkpoint_ranks ranks = {*(int *)argument, NUM_RANKS, gather_in_memory, argument};
    char path[PATH_LENGTH_MAX];
    struct checkpoint *checkpoint;
    int result = fixture_save(directory, 30, &ranks);

    if (result == 0 && checkpoint_find(directory, -1, path) == CHECKPOINT_FOUND) {
        checkpoint = checkpoint_open(path, &ranks);
        result = checkpoint != NULL ? fixture_check(checkpoint, 30) : -1;
        checkpoint_close(checkpoint);
    }
    return result == 0 ? argument : NULL;
}

static void run_ranks(void *(*function)(void *), bool expect_success)
{
    int ranks[NUM_RANKS];
    pthread_t threads[NUM_RANKS];

    pthread_barrier_init(&barrier, NULL, NUM_RANKS);
    for (int r = 0; r < NUM_RANKS; r++) {
        ranks[r] = r;
        assert_int_equal(pthread_create(&threads[r], NULL, function, &ranks[r]), 0);
    }
    for (int r = 0; r < NUM_RANKS; r++) {
        void *result;

        pthread_join(threads[r], &result);
        assert_true((result != NULL) == expect_success);
    }
    pthread_barrier_destroy(&barrier);
}

static void ranks_save_their_boxes_and_one_rank_loads_them_all(void **state)
{
    char path[PATH_LENGTH_MAX];

    run_ranks(save_and_load_as_rank, true);
    assert_int_equal(fixture_load(directory, -1), 30);
    in_directory(path, "iter_0000030/shard-00002-model-00001-of-00001.safetensors");
    assert_true(path_exists(path));
}

static void more_files_than_the_limit_of_open_ones_are_loaded(void **state)
{
    struct rlimit limit, low;
    const int next = dup(0); /* the first free number */

    close(next);
    assert_int_equal(getrlimit(RLIMIT_NOFILE, &limit), 0);
    low = (struct rlimit){(rlim_t)next + 2, limit.rlim_max}; /* of four */
    run_ranks(save_and_load_as_rank, true);
    assert_int_equal(setrlimit(RLIMIT_NOFILE, &low), 0);
    assert_int_equal(fixture_load(directory, 30), 30);
    assert_int_equal(setrlimit(RLIMIT_NOFILE, &limit), 0);
}

static void a_rank_that_cannot_save_stops_all_of_them(void **state)
{
    char path[PATH_LENGTH_MAX];

    assert_int_equal(fixture_save(directory, 10, NULL), 0);
    in_directory(path, "iter_0000030");
    assert_int_equal(path_write_file_atomic(path, "in the way", 10), 0);
    /* A file where a directory has to go: the exchange works, so put the obstacle in the tracker.
     */
    in_directory(path, CHECKPOINT_TRACKER);
    assert_int_equal(path_remove_tree(path), 0);
    assert_int_equal(path_make_directories(path), 0);
    run_ranks(save_and_load_as_rank, false);
    assert_int_equal(path_remove_tree(path), 0);
    assert_int_equal(fixture_load(directory, 10), 10);
}

/* ---- several boxes of a tensor ---- */

/* A state [3,4,5] of the optimizer: element i holds i. */
enum { STATE_ELEMENTS = 60 };
static const char state_tensor[] = "optimizer.state.exp_avg.x";
static const int64_t state_shape[3] = {3, 4, 5};
static const float state_values[STATE_ELEMENTS] = {
    0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15, 16, 17, 18, 19,
    20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31, 32, 33, 34, 35, 36, 37, 38, 39,
    40, 41, 42, 43, 44, 45, 46, 47, 48, 49, 50, 51, 52, 53, 54, 55, 56, 57, 58, 59};

/* Each rank saves the run [first, end) of all elements. */
static int save_run(const struct checkpoint_ranks *ranks, int64_t first, int64_t end)
{
    const struct box whole = box_whole(state_shape, 3);
    struct ckpt_item items[BOX_RUN_PARTS_MAX];
    struct box parts[BOX_RUN_PARTS_MAX];
    struct checkpoint_save_request request = {
        .directory = directory, .iteration = 30, .items = items, .ranks = *ranks};
    int result;

    request.num_items = box_from_run(&whole, first, end - first, parts);
    for (int i = 0; i < request.num_items; i++) {
        items[i] = (struct ckpt_item){.name = state_tensor,
                                      .dtype = DTYPE_F32,
                                      .num_dims = 3,
                                      .global_shape = {3, 4, 5},
                                      .box = parts[i],
                                      .data = &state_values[first],
                                      .is_optimizer = true};
        first += box_num_elements(&parts[i]);
    }
    request.state = ranks->rank == 0 ? json_object() : NULL;
    result = checkpoint_save(&request);
    json_decref(request.state);
    return result;
}

/* Where rank 0's run ends and rank 1's begins. */
static int64_t run_end, run_begin;
static char run_errors[NUM_RANKS][2048];

static void *save_run_as_rank(void *argument)
{
    const int rank = *(int *)argument;
    const struct checkpoint_ranks ranks = {rank, NUM_RANKS, gather_in_memory, argument};
    const int result =
        rank == 0 ? save_run(&ranks, 0, run_end) : save_run(&ranks, run_begin, STATE_ELEMENTS);

    snprintf(run_errors[rank], sizeof run_errors[rank], "%s", error_text());
    return result == 0 ? argument : NULL;
}

/* Every box of the state that begins at this place, against its values. */
static void assert_state_reads(const struct checkpoint *checkpoint, int64_t element)
{
    struct checkpoint_read read = {
        .name = state_tensor, .dtype = DTYPE_F32, .num_dims = 3, .global_shape = {3, 4, 5}};
    const int64_t a = element / 20, b = element / 5 % 4, c = element % 5;

    for (int64_t size = 1; size <= (3 - a) * (4 - b) * (5 - c); size++) {
        float values[STATE_ELEMENTS];
        int64_t i = 0;

        read.box = (struct box){3, {a, b, c}, {1, 1 + size % (4 - b), 1 + size % (5 - c)}};
        read.box.size[0] += size % (3 - a);
        assert_int_equal(checkpoint_read_box(checkpoint, &read, values), 0);
        for (int64_t x = a; x < a + read.box.size[0]; x++) {
            for (int64_t y = b; y < b + read.box.size[1]; y++) {
                for (int64_t z = c; z < c + read.box.size[2]; z++) {
                    assert_true(values[i++] == (float)(x * 20 + y * 5 + z));
                }
            }
        }
    }
}

static void any_two_runs_of_a_tensor_are_saved_and_read_as_one(void **state)
{
    for (int64_t cut = 0; cut <= STATE_ELEMENTS; cut++) {
        char path[PATH_LENGTH_MAX];
        struct checkpoint *checkpoint;

        run_end = run_begin = cut;
        run_ranks(save_run_as_rank, true);
        assert_int_equal(checkpoint_find(directory, -1, path), CHECKPOINT_FOUND);
        checkpoint = checkpoint_open(path, NULL);
        assert_non_null(checkpoint);
        assert_int_equal(checkpoint_num_tensors(checkpoint), 1);
        for (int64_t i = 0; i < STATE_ELEMENTS; i++) {
            assert_state_reads(checkpoint, i);
        }
        checkpoint_close(checkpoint);
    }
}

static void assert_run_errors_say(const char *text)
{
    assert_string_equal(run_errors[0], run_errors[1]);
    if (strstr(run_errors[0], text) == NULL) {
        fail_msg("\"%s\" does not say \"%s\"", run_errors[0], text);
    }
}

static void a_save_with_a_gap_or_an_overlap_is_given_up_by_all_ranks(void **state)
{
    assert_int_equal(fixture_save(directory, 10, NULL), 0);
    run_end = 20;
    run_begin = 27;
    run_ranks(save_run_as_rank, false);
    assert_run_errors_say("only 53 of the 60 elements of optimizer.state.exp_avg.x");
    run_begin = 19;
    run_ranks(save_run_as_rank, false);
    assert_run_errors_say("elements of optimizer.state.exp_avg.x are saved twice, in ");
    assert_int_equal(fixture_load(directory, -1), 10);
}

/* ---- overlaps and gaps ---- */

static void write_manifest_of(const char *const *names, int num_names)
{
    struct manifest_file files[2] = {0};
    struct manifest manifest = {.iteration = 30, .files = files, .num_files = num_names};
    char path[PATH_LENGTH_MAX];
    char *text;

    manifest.state = json_object();
    for (int i = 0; i < num_names; i++) {
        snprintf(files[i].name, sizeof files[i].name, "%s", names[i]);
        assert_int_equal(path_format(path, "%s/iter_0000030/%s", directory, names[i]), 0);
        assert_int_equal(path_file_size(path, &files[i].size_bytes), 0);
        assert_int_equal(content_hash_file(path, files[i].hash), 0);
    }
    text = manifest_write(&manifest);
    in_directory(path, "iter_0000030/metadata.json");
    assert_int_equal(path_write_file_atomic(path, text, strlen(text)), 0);
    free(text);
    json_decref(manifest.state);
}

static void assert_opening_fails(const char *reason)
{
    char path[PATH_LENGTH_MAX];

    in_directory(path, "iter_0000030");
    assert_null(checkpoint_open(path, NULL));
    assert_error_says(reason);
    assert_error_says("iter_0000030 is damaged");
}

static void a_gap_and_an_overlap_between_boxes_are_errors(void **state)
{
    static const char *one[] = {"shard-00002-model-00001-of-00001.safetensors"};
    const char *twice[] = {weights, weights};

    run_ranks(save_and_load_as_rank, true);
    write_manifest_of(one, 1);
    assert_opening_fails("only 24 of the 48 elements of decoder.layers.0.mlp.experts.linear_fc2");
    write_manifest_of(twice, 2);
    assert_opening_fails("are saved twice, in ");
}

/* iter_0000030 with one shard: tensor x [2,2] and the metadata given (NULL: none). */
static void write_shard_with(const char *offsets, const char *shapes)
{
    static const float values[4];
    static const int64_t shape[2] = {2, 2};
    const char *names[] = {weights};
    struct safetensors_writer *writer = safetensors_writer_create();
    char path[PATH_LENGTH_MAX], hash[CONTENT_HASH_TEXT_BYTES];
    int64_t size_bytes;

    in_directory(path, "iter_0000030");
    assert_int_equal(path_make_directories(path), 0);
    assert_int_equal(path_format(path, "%s/iter_0000030/%s", directory, weights), 0);
    safetensors_writer_declare(writer, "x", DTYPE_F32, shape, 2);
    if (offsets != NULL) {
        safetensors_writer_metadata(writer, CHECKPOINT_SHARDING_KEY, offsets);
    }
    if (shapes != NULL) {
        safetensors_writer_metadata(writer, CHECKPOINT_SHAPE_KEY, shapes);
    }
    assert_int_equal(safetensors_writer_begin(writer, path), 0);
    assert_int_equal(safetensors_writer_append(writer, values, sizeof values), 0);
    assert_int_equal(safetensors_writer_finish(writer, hash, &size_bytes), 0);
    safetensors_writer_destroy(writer);
    write_manifest_of(names, 1);
}

static void sharding_metadata_that_lies_is_refused(void **state)
{
    static const struct {
        const char *offsets, *shapes, *reason;
    } cases[] = {
        {NULL, "{\"x\":[2,2]}", "no DCP_SHARDING_INFO"},
        {"{\"x\":{\"saved_offsets\":[0,0]}}", NULL, "no x_global_shape"},
        {"{\"x\":", "{\"x\":[2,2]}", "DCP_SHARDING_INFO"},
        {"{}", "{\"x\":[2,2]}", "saved_offsets of x is missing"},
        {"{\"x\":{\"saved_offsets\":[0]}}", "{\"x\":[2,2]}", "not 2 integers"},
        {"{\"x\":{\"saved_offsets\":[0,-1]}}", "{\"x\":[2,2]}", "non-negative"},
        {"{\"x\":{\"saved_offsets\":[0,0]}}", "{\"x\":[2,2,2]}", "x_global_shape of x"},
        {"{\"x\":{\"saved_offsets\":[1,0]}}", "{\"x\":[2,2]}", "outside its global shape"},
        {"{\"x\":{\"saved_offsets\":[9223372036854775807,0]}}", "{\"x\":[4,2]}", "outside"},
        {"{\"x\":{\"saved_offsets\":[0,0]}}", "{\"x\":[9223372036854775807,4]}", "outside"},
        {"{\"x\":{\"saved_offsets\":[2,0]}}", "{\"x\":[4,2]}", "only 4 of the 8 elements of x"},
    };
    char path[PATH_LENGTH_MAX];
    struct checkpoint *checkpoint;

    in_directory(path, "iter_0000030");
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        write_shard_with(cases[i].offsets, cases[i].shapes);
        assert_null(checkpoint_open(path, NULL));
        assert_error_says(cases[i].reason);
    }
    write_shard_with("{\"x\":{\"saved_offsets\":[0,0]}}", "{\"x\":[2,2]}");
    checkpoint = checkpoint_open(path, NULL);
    assert_non_null(checkpoint);
    assert_int_equal(checkpoint_find_tensor(checkpoint, "x")->global_shape[0], 2);
    checkpoint_close(checkpoint);
}

static void the_weights_carry_what_pytorch_reads(void **state)
{
    char path[PATH_LENGTH_MAX];
    struct safetensors *file;

    run_ranks(save_and_load_as_rank, true);
    in_directory(path, "iter_0000030/shard-00002-model-00001-of-00001.safetensors");
    file = safetensors_open(path);
    assert_string_equal(safetensors_metadata(file, "format"), "pt");
    assert_string_equal(safetensors_metadata(file, "DCP_VERSION"), "1.0");
    assert_string_equal(
        safetensors_metadata(file, "DCP_SHARDING_INFO"),
        "{\"decoder.layers.0.mlp.experts.linear_fc2.weight\":{\"saved_offsets\":[2,0,0]},"
        "\"embedding.word_embeddings.weight\":{\"saved_offsets\":[3,0]}}");
    safetensors_close(file);
}

/* Counts what it brings; the context is the count. */
static void copy_counting(void *context, void *host, const void *data, size_t size_bytes)
{
    *(size_t *)context += size_bytes;
    memcpy(host, data, size_bytes);
}

enum { LARGE_COUNT = (70 << 20) / 4 + 3 };

static void save_large(const int32_t *data)
{
    size_t copied_bytes = 0;
    json_t *nothing = json_object();
    struct ckpt_item item = {.name = "x",
                             .dtype = DTYPE_I32,
                             .num_dims = 1,
                             .global_shape = {LARGE_COUNT},
                             .data = data};
    const struct checkpoint_save_request request = {.directory = directory,
                                                    .iteration = 1,
                                                    .items = &item,
                                                    .num_items = 1,
                                                    .copy = copy_counting,
                                                    .context = &copied_bytes,
                                                    .state = nothing};

    item.box = box_whole(item.global_shape, 1);
    assert_int_equal(checkpoint_save(&request), 0);
    assert_int_equal(copied_bytes, LARGE_COUNT * sizeof *data);
    json_decref(nothing);
}

static void load_large(int32_t *data)
{
    struct checkpoint_read read = {
        .name = "x", .dtype = DTYPE_I32, .num_dims = 1, .global_shape = {LARGE_COUNT}};
    char path[PATH_LENGTH_MAX];
    struct checkpoint *checkpoint;

    in_directory(path, "iter_0000001");
    checkpoint = checkpoint_open(path, NULL);
    assert_non_null(checkpoint);
    read.box = box_whole(read.global_shape, 1);
    assert_int_equal(checkpoint_read_box(checkpoint, &read, data), 0);
    checkpoint_close(checkpoint);
}

/* Larger than two pieces and a part, by one thread and by two. */
static void a_large_item_is_copied_in_pieces(void **state)
{
    int32_t *saved = calloc(LARGE_COUNT, sizeof *saved);
    int32_t *loaded = calloc(LARGE_COUNT, sizeof *loaded);

    assert_true(saved != NULL && loaded != NULL);
    for (int num_threads = 1; num_threads <= 2; num_threads++) {
        for (int i = 0; i < LARGE_COUNT; i++) {
            saved[i] = i * 7 + num_threads;
        }
        omp_set_num_threads(num_threads);
        save_large(saved);
        load_large(loaded);
        assert_memory_equal(loaded, saved, LARGE_COUNT * sizeof *saved);
    }
    free(saved);
    free(loaded);
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, make_directory, remove_directory)

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(what_is_saved_is_found_and_loaded),
        TEST(a_large_item_is_copied_in_pieces),
        TEST(the_same_iteration_is_replaced_either_way),
        TEST(nothing_there_is_distinct_from_an_error),
        TEST(without_a_tracker_the_newest_complete_one_is_taken),
        TEST(a_release_has_no_iteration_in_its_name),
        TEST(every_flipped_bit_is_seen_and_the_previous_one_offered),
        TEST(every_truncation_and_a_missing_file_are_seen),
        TEST(reading_checks_names_shapes_and_types),
        TEST(what_dead_runs_left_is_cleared_by_the_next_save),
        TEST(ranks_save_their_boxes_and_one_rank_loads_them_all),
        TEST(more_files_than_the_limit_of_open_ones_are_loaded),
        TEST(a_rank_that_cannot_save_stops_all_of_them),
        TEST(any_two_runs_of_a_tensor_are_saved_and_read_as_one),
        TEST(a_save_with_a_gap_or_an_overlap_is_given_up_by_all_ranks),
        TEST(a_gap_and_an_overlap_between_boxes_are_errors),
        TEST(sharding_metadata_that_lies_is_refused),
        TEST(the_weights_carry_what_pytorch_reads),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
