/* An event file is a sequence of records in TFRecord framing,
 *
 *     length u64 | masked crc32c of the length u32 | Event message | masked crc32c of it u32
 *
 * all little-endian (formats-and-ecosystem 1.7). Readers wait at an incomplete last record, so
 * appending whole records is safe beside a TensorBoard that watches the file. */
#include "train/tensorboard.h"

#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "base/check.h"
#include "base/log.h"
#include "base/path.h"
#include "event.pb-c.h"

enum {
    HEADER_BYTES = 12, /* length and its checksum */
    FOOTER_BYTES = 4,
    DTYPE_STRING = 7,
    UID_MAX = 10000,
    HOST_NAME_MAX_BYTES = 256,
};

struct tensorboard {
    char path[PATH_LENGTH_MAX];
    int fd;
    bool failed; /* a write failed: drop what comes */
    double (*clock)(void);
    int queue_size;
    int num_queued;
    uint8_t *queue; /* whole records, not yet written */
    size_t queue_length_bytes;
    size_t queue_capacity_bytes;
};

static double system_clock(void)
{
    struct timespec now;

    clock_gettime(CLOCK_REALTIME, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

/* CRC-32C bit by bit: records are some 60 bytes, a table would not be noticed. */
static uint32_t crc32c(const uint8_t *bytes, size_t length)
{
    uint32_t crc = UINT32_MAX;

    for (size_t i = 0; i < length; i++) {
        crc ^= bytes[i];
        for (int bit = 0; bit < 8; bit++) {
            crc = (crc >> 1) ^ (0x82F63B78u & -(crc & 1));
        }
    }
    return ~crc;
}

static uint32_t masked_crc32c(const uint8_t *bytes, size_t length)
{
    const uint32_t crc = crc32c(bytes, length);

    return ((crc >> 15) | (crc << 17)) + 0xa282ead8u;
}

static void put_little_endian(uint8_t *bytes, uint64_t value, int num_bytes)
{
    for (int i = 0; i < num_bytes; i++) {
        bytes[i] = (uint8_t)(value >> (8 * i));
    }
}

static uint8_t *queue_reserve(struct tensorboard *board, size_t length)
{
    const size_t needed = board->queue_length_bytes + length;

    if (needed > board->queue_capacity_bytes) {
        board->queue_capacity_bytes = 2 * needed;
        board->queue = realloc(board->queue, board->queue_capacity_bytes);
        CHECK(board->queue != NULL, "out of memory for %zu bytes", board->queue_capacity_bytes);
    }
    return board->queue + board->queue_length_bytes;
}

static void queue_event(struct tensorboard *board, Tfevents__Event *event)
{
    size_t length;
    uint8_t *record;

    if (board->failed) {
        return;
    }
    event->wall_time = board->clock();
    length = tfevents__event__get_packed_size(event);
    record = queue_reserve(board, HEADER_BYTES + length + FOOTER_BYTES);
    put_little_endian(record, length, 8);
    put_little_endian(record + 8, masked_crc32c(record, 8), 4);
    tfevents__event__pack(event, record + HEADER_BYTES);
    put_little_endian(record + HEADER_BYTES + length, masked_crc32c(record + HEADER_BYTES, length),
                      FOOTER_BYTES);
    board->queue_length_bytes += HEADER_BYTES + length + FOOTER_BYTES;
    if (++board->num_queued >= board->queue_size) {
        tensorboard_flush(board);
    }
}

static void queue_value(struct tensorboard *board, Tfevents__Value *value, int64_t step)
{
    Tfevents__Event event = TFEVENTS__EVENT__INIT;
    Tfevents__Summary summary = TFEVENTS__SUMMARY__INIT;

    summary.n_value = 1;
    summary.value = &value;
    event.step = step;
    event.what_case = TFEVENTS__EVENT__WHAT_SUMMARY;
    event.summary = &summary;
    queue_event(board, &event);
}

static void queue_file_version(struct tensorboard *board)
{
    Tfevents__Event event = TFEVENTS__EVENT__INIT;

    event.what_case = TFEVENTS__EVENT__WHAT_FILE_VERSION;
    event.file_version = (char[]){"brain.Event:2"};
    queue_event(board, &event);
}

/* Creates the first file name that is free: uid counts up where a process opens several. */
static int create_file(struct tensorboard *board, const char *directory)
{
    char host[HOST_NAME_MAX_BYTES] = "";

    if (gethostname(host, sizeof host - 1) != 0 || host[0] == '\0') {
        strcpy(host, "localhost");
    }
    for (int uid = 0; uid < UID_MAX; uid++) {
        TRY(path_format(board->path, "%s/events.out.tfevents.%010lld.%s.%ld.%d", directory,
                        (long long)board->clock(), host, (long)getpid(), uid));
        board->fd = open(board->path, O_WRONLY | O_CREAT | O_EXCL | O_APPEND | O_CLOEXEC, 0666);
        if (board->fd >= 0) {
            return 0;
        }
        if (errno != EEXIST) {
            break;
        }
    }
    return error_set("cannot create TensorBoard file %s: %s", board->path, strerror(errno));
}

struct tensorboard *tensorboard_open(const char *directory, int queue_size, double (*clock)(void))
{
    struct tensorboard *board;

    if (queue_size < 1) {
        return FAIL_NULL("TensorBoard queue size %d must be 1 or more", queue_size);
    }
    if (path_make_directories(directory) != 0) {
        return NULL;
    }
    board = calloc(1, sizeof *board);
    CHECK(board != NULL, "out of memory");
    board->queue_size = queue_size;
    board->clock = clock != NULL ? clock : system_clock;
    if (create_file(board, directory) != 0) {
        free(board);
        return NULL;
    }
    queue_file_version(board);
    tensorboard_flush(board);
    return board;
}

void tensorboard_scalar(struct tensorboard *board, const char *tag, double value, int64_t step)
{
    Tfevents__Value message = TFEVENTS__VALUE__INIT;

    if (board == NULL) {
        return;
    }
    message.tag = (char *)tag;
    message.value_case = TFEVENTS__VALUE__VALUE_SIMPLE_VALUE;
    message.simple_value = (float)value;
    queue_value(board, &message, step);
}

void tensorboard_text(struct tensorboard *board, const char *tag, const char *text, int64_t step)
{
    Tfevents__Value value = TFEVENTS__VALUE__INIT;
    Tfevents__SummaryMetadata metadata = TFEVENTS__SUMMARY_METADATA__INIT;
    Tfevents__PluginData plugin = TFEVENTS__PLUGIN_DATA__INIT;
    Tfevents__TensorProto tensor = TFEVENTS__TENSOR_PROTO__INIT;
    Tfevents__TensorShape shape = TFEVENTS__TENSOR_SHAPE__INIT;
    Tfevents__Dim dim = TFEVENTS__DIM__INIT;
    ProtobufCBinaryData bytes = {.len = strlen(text), .data = (uint8_t *)text};

    if (board == NULL) {
        return;
    }
    plugin.plugin_name = (char[]){"text"};
    metadata.plugin_data = &plugin;
    dim.size = 1;
    shape.n_dim = 1;
    shape.dim = (Tfevents__Dim *[]){&dim};
    tensor.dtype = DTYPE_STRING;
    tensor.tensor_shape = &shape;
    tensor.n_string_val = 1;
    tensor.string_val = &bytes;
    value.tag = (char *)tag;
    value.metadata = &metadata;
    value.value_case = TFEVENTS__VALUE__VALUE_TENSOR;
    value.tensor = &tensor;
    queue_value(board, &value, step);
}

void tensorboard_flush(struct tensorboard *board)
{
    if (board == NULL || board->failed) {
        return;
    }
    if (path_write_all(board->fd, board->path, board->queue, board->queue_length_bytes) != 0) {
        log_warn("%s; TensorBoard logging stops here, training goes on", error_text());
        error_clear();
        board->failed = true;
    }
    board->queue_length_bytes = 0;
    board->num_queued = 0;
}

void tensorboard_close(struct tensorboard *board)
{
    if (board == NULL) {
        return;
    }
    tensorboard_flush(board);
    close(board->fd);
    free(board->queue);
    free(board);
}
