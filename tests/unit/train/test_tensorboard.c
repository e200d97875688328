/* Event files, byte by byte against golden records. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <dirent.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>
#include <cmocka.h>

#include "base/check.h"
#include "base/path.h"
#include "event.pb-c.h"
#include "train/tensorboard.h"

enum { FILE_MAX_BYTES = 1 << 20, RECORD_MAX_BYTES = 256, HEADER_BYTES = 12, FOOTER_BYTES = 4 };

/* Written by an independent encoder: at wall time 1 the file version, at 2 the scalar "lm loss" =
 * 3.25 of step 7, at 3 the text "config" = "hello". */
static const char golden_version[] =
    "1800000000000000a37f4b2209000000000000f03f1a0d627261696e2e4576656e743a3286bf577a";
static const char golden_scalar[] = "1d00000000000000602fdf2309000000000000004010072a100a0e0a076c6d"
                                    "206c6f73731500005040aac37b3c";
static const char golden_text[] =
    "300000000000000095f5d05f0900000000000008402a250a230a06636f6e6669674a080a060a0474657874420f0807"
    "120412020801420568656c6c6f3d5ec520";

static char directory[] = "/tmp/cadre_tensorboard_XXXXXX";

static double ticking_clock_seconds;

static double ticking_clock(void)
{
    return ticking_clock_seconds;
}

static size_t from_hex(uint8_t *bytes, const char *hex)
{
    const size_t length = strlen(hex) / 2;

    assert_true(length <= RECORD_MAX_BYTES);
    for (size_t i = 0; i < length; i++) {
        unsigned value;

        assert_int_equal(sscanf(hex + 2 * i, "%2x", &value), 1);
        bytes[i] = (uint8_t)value;
    }
    return length;
}

/* The path of the only file in folder. */
static void only_file(char path[PATH_LENGTH_MAX], const char *folder)
{
    DIR *listing = opendir(folder);
    int num_files = 0;

    assert_non_null(listing);
    for (struct dirent *entry; (entry = readdir(listing)) != NULL;) {
        if (entry->d_name[0] != '.') {
            assert_int_equal(path_format(path, "%s/%s", folder, entry->d_name), 0);
            num_files++;
        }
    }
    closedir(listing);
    assert_int_equal(num_files, 1);
}

static uint8_t *read_events(const char *folder, size_t *length)
{
    char path[PATH_LENGTH_MAX];
    char *bytes;

    only_file(path, folder);
    bytes = path_read_file(path, FILE_MAX_BYTES, length);
    assert_non_null(bytes);
    return (uint8_t *)bytes;
}

static struct tensorboard *open_board(char folder[PATH_LENGTH_MAX], const char *name,
                                      int queue_size)
{
    struct tensorboard *board;

    assert_int_equal(path_format(folder, "%s/%s", directory, name), 0);
    ticking_clock_seconds = 1;
    board = tensorboard_open(folder, queue_size, ticking_clock);
    assert_non_null(board);
    return board;
}

static void version_and_scalar_are_the_golden_bytes(void **state)
{
    char folder[PATH_LENGTH_MAX];
    struct tensorboard *board = open_board(folder, "scalar", 100);
    uint8_t expected[2 * RECORD_MAX_BYTES];
    size_t length, expected_length;
    uint8_t *bytes;

    ticking_clock_seconds = 2;
    tensorboard_scalar(board, "lm loss", 3.25, 7);
    tensorboard_close(board);
    bytes = read_events(folder, &length);
    expected_length = from_hex(expected, golden_version);
    expected_length += from_hex(expected + expected_length, golden_scalar);
    assert_int_equal(length, expected_length);
    assert_memory_equal(bytes, expected, length);
    free(bytes);
}

/* Protobuf leaves the order of fields open, and the golden record has one field earlier than
 * protobuf-c puts it: compare the message, in protobuf-c's order. */
static void text_is_the_golden_message(void **state)
{
    char folder[PATH_LENGTH_MAX];
    struct tensorboard *board = open_board(folder, "text", 100);
    uint8_t golden[RECORD_MAX_BYTES], packed[RECORD_MAX_BYTES];
    const size_t golden_length = from_hex(golden, golden_text);
    const size_t version_length = strlen(golden_version) / 2;
    Tfevents__Event *event = tfevents__event__unpack(
        NULL, golden_length - HEADER_BYTES - FOOTER_BYTES, golden + HEADER_BYTES);
    size_t length, packed_length;
    uint8_t *bytes;

    assert_non_null(event);
    packed_length = tfevents__event__pack(event, packed);
    assert_int_equal(packed_length, golden_length - HEADER_BYTES - FOOTER_BYTES);
    ticking_clock_seconds = 3;
    tensorboard_text(board, "config", "hello", 0);
    tensorboard_close(board);
    bytes = read_events(folder, &length);
    assert_int_equal(length, version_length + golden_length);
    assert_memory_equal(bytes + version_length, golden, HEADER_BYTES);
    assert_memory_equal(bytes + version_length + HEADER_BYTES, packed, packed_length);
    free(bytes);
    tfevents__event__free_unpacked(event, NULL);
}

static void a_scalar_of_zero_is_written(void **state)
{
    char folder[PATH_LENGTH_MAX];
    struct tensorboard *board = open_board(folder, "zero", 100);
    const size_t start = strlen(golden_version) / 2 + HEADER_BYTES;
    Tfevents__Event *event;
    size_t length;
    uint8_t *bytes;

    tensorboard_scalar(board, "num-zeros", 0, 1);
    tensorboard_close(board);
    bytes = read_events(folder, &length);
    event = tfevents__event__unpack(NULL, length - start - FOOTER_BYTES, bytes + start);
    assert_non_null(event);
    assert_int_equal(event->summary->n_value, 1);
    assert_int_equal(event->summary->value[0]->value_case, TFEVENTS__VALUE__VALUE_SIMPLE_VALUE);
    tfevents__event__free_unpacked(event, NULL);
    free(bytes);
}

static void events_wait_for_a_flush_or_a_full_queue(void **state)
{
    char folder[PATH_LENGTH_MAX], path[PATH_LENGTH_MAX];
    struct tensorboard *board = open_board(folder, "queue", 3);
    int64_t at_start, size;

    only_file(path, folder);
    assert_int_equal(path_file_size(path, &at_start), 0);
    assert_int_equal(at_start, strlen(golden_version) / 2); /* a reader sees the file at once */
    tensorboard_scalar(board, "a", 1, 1);
    tensorboard_scalar(board, "a", 1, 2);
    assert_int_equal(path_file_size(path, &size), 0);
    assert_int_equal(size, at_start);
    tensorboard_scalar(board, "a", 1, 3);
    assert_int_equal(path_file_size(path, &size), 0);
    assert_true(size > at_start);
    at_start = size;
    tensorboard_scalar(board, "a", 1, 4);
    tensorboard_flush(board);
    assert_int_equal(path_file_size(path, &size), 0);
    assert_true(size > at_start);
    tensorboard_close(board);
}

static void file_name_has_time_host_process_and_a_free_number(void **state)
{
    char folder[PATH_LENGTH_MAX], path[PATH_LENGTH_MAX], expected[PATH_LENGTH_MAX], host[256];
    struct tensorboard *first = open_board(folder, "name", 1), *second;

    assert_int_equal(gethostname(host, sizeof host), 0);
    only_file(path, folder);
    assert_int_equal(path_format(expected, "%s/events.out.tfevents.0000000001.%s.%ld.0", folder,
                                 host, (long)getpid()),
                     0);
    assert_string_equal(path, expected);
    second = tensorboard_open(folder, 1, ticking_clock);
    assert_non_null(second);
    expected[strlen(expected) - 1] = '1';
    assert_true(path_exists(expected));
    tensorboard_close(first);
    tensorboard_close(second);
}

static void a_directory_that_cannot_be_is_an_error(void **state)
{
    char path[PATH_LENGTH_MAX];

    assert_int_equal(path_format(path, "%s/file", directory), 0);
    assert_int_equal(path_write_file_atomic(path, "x", 1), 0);
    assert_int_equal(path_format(path, "%s/file/board", directory), 0);
    assert_null(tensorboard_open(path, 1, NULL));
    assert_non_null(strstr(error_text(), "/file"));
    assert_null(tensorboard_open(directory, 0, NULL));
    assert_non_null(strstr(error_text(), "0"));
}

/* Writes events to a board whose file may not grow past limit_bytes. */
static void write_past_the_limit(struct tensorboard *board, rlim_t limit_bytes)
{
    struct rlimit before, limit;

    assert_int_equal(getrlimit(RLIMIT_FSIZE, &before), 0);
    limit = before;
    limit.rlim_cur = limit_bytes;
    signal(SIGXFSZ, SIG_IGN);
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &limit), 0);
    for (int i = 0; i < 10; i++) {
        tensorboard_scalar(board, "lm loss", 1, i);
    }
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &before), 0);
}

static void a_failing_write_warns_once_and_training_goes_on(void **state)
{
    char folder[PATH_LENGTH_MAX], text[4096];
    struct tensorboard *board = open_board(folder, "full", 1);
    const int saved_stderr = dup(STDERR_FILENO);
    int warnings[2]; /* a pipe: the limit does not hold for it */
    char *warning;
    ssize_t length;

    assert_int_equal(pipe(warnings), 0);
    assert_true(dup2(warnings[1], STDERR_FILENO) >= 0);
    write_past_the_limit(board, 150);
    tensorboard_close(board);
    dup2(saved_stderr, STDERR_FILENO);
    close(saved_stderr);
    close(warnings[1]);
    length = read(warnings[0], text, sizeof text - 1);
    close(warnings[0]);
    assert_true(length > 0);
    text[length] = '\0';
    warning = strstr(text, "warning: cannot write");
    assert_non_null(warning);
    assert_null(strstr(warning + 1, "warning:"));
}

static void no_board_is_no_work(void **state)
{
    tensorboard_scalar(NULL, "a", 1, 1);
    tensorboard_text(NULL, "a", "b", 1);
    tensorboard_flush(NULL);
    tensorboard_close(NULL);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(version_and_scalar_are_the_golden_bytes),
        cmocka_unit_test(text_is_the_golden_message),
        cmocka_unit_test(a_scalar_of_zero_is_written),
        cmocka_unit_test(events_wait_for_a_flush_or_a_full_queue),
        cmocka_unit_test(file_name_has_time_host_process_and_a_free_number),
        cmocka_unit_test(a_directory_that_cannot_be_is_an_error),
        cmocka_unit_test(a_failing_write_warns_once_and_training_goes_on),
        cmocka_unit_test(no_board_is_no_work),
    };
    int result;

    if (mkdtemp(directory) == NULL) {
        return 1;
    }
    result = cmocka_run_group_tests(tests, NULL, NULL);
    return path_remove_tree(directory) != 0 ? 1 : result;
}
