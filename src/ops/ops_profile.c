/* The stream's table is replaced by one whose entries put a mark before and after the real ones.
 * An op that calls others through the table is timed as a whole. Transfers are launched by other
 * threads too: they have a list and a lock of their own. */
#include "ops/ops_profile.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "base/check.h"
#include "ops/intervals.h"

struct op_call {
    const char *name;
    char detail[56]; /* "" or the sizes; of a transfer its lane */
    struct op_cost cost;
    void *from, *to; /* marks, until the stop */
    double start_ms, duration_ms;
};

struct call_list {
    struct op_call *calls;
    int num_calls, capacity;
};

/* Calls of one name and detail. */
struct op_kind {
    const struct op_call *first;
    int num_calls;
    double total_ms;
    struct op_cost cost;
};

static struct {
    const struct ops *ops; /* the real ones */
    void *start;           /* mark */
    struct call_list on_stream, transfers;
    int depth;
    double whole_ms;      /* to the end of the last op */
    pthread_mutex_t lock; /* of takes_transfers and transfers */
    bool takes_transfers;
} profile = {.lock = PTHREAD_MUTEX_INITIALIZER};

static struct op_call *add_call(struct call_list *list, const char *name)
{
    struct op_call *call;

    if (list->num_calls == list->capacity) {
        list->capacity = list->capacity > 0 ? 2 * list->capacity : 1024;
        list->calls = realloc(list->calls, (size_t)list->capacity * sizeof *list->calls);
        CHECK(list->calls != NULL, "out of memory");
    }
    call = &list->calls[list->num_calls++];
    *call = (struct op_call){.name = name};
    return call;
}

static struct op_call *last_call(void)
{
    return &profile.on_stream.calls[profile.on_stream.num_calls - 1];
}

static void begin(struct stream *stream, const char *name)
{
    if (profile.depth++ > 0) {
        return;
    }
    stream->device->range_begin(name);
    add_call(&profile.on_stream, name)->from = stream_mark(stream);
}

static void end(struct stream *stream)
{
    if (--profile.depth == 0) {
        last_call()->to = stream_mark(stream);
        stream->device->range_end();
    }
}

static void describe_matmul(struct op_call *call, const void *args)
{
    const struct matmul *a = args;

    snprintf(call->detail, sizeof call->detail, "%lld x %lld x %lld%s", (long long)a->c->dim[0],
             (long long)a->c->dim[1], (long long)a->a->dim[a->transpose_a ? 0 : 1],
             a->accumulate ? " +=" : "");
}

static void describe_nothing(struct op_call *call, const void *args)
{
}

#define DESCRIBE(args)                                                                             \
    _Generic(args, const struct matmul * : describe_matmul, default : describe_nothing)

/* Of an op that is not part of another. */
static struct op_call *outer_call(void)
{
    return profile.depth == 1 ? last_call() : NULL;
}

#define PROFILED(name, args)                                                                       \
    static void name##_profiled(struct stream *stream, const struct args *args_)                   \
    {                                                                                              \
        struct op_call *call;                                                                      \
                                                                                                   \
        begin(stream, #name);                                                                      \
        call = outer_call();                                                                       \
        if (call != NULL) {                                                                        \
            DESCRIBE(args_)(call, args_);                                                          \
            call->cost = OP_COST(args_);                                                           \
        }                                                                                          \
        profile.ops->name(stream, args_);                                                          \
        end(stream);                                                                               \
    }
OPS_LIST(PROFILED)
#undef PROFILED

static void fill_zero_profiled(struct stream *stream, struct tensor *x)
{
    struct op_call *call;

    begin(stream, "fill_zero");
    call = outer_call();
    if (call != NULL) {
        call->cost = op_cost_fill_zero(x);
    }
    profile.ops->fill_zero(stream, x);
    end(stream);
}

/* ---- transfers ---- */

static void take_transfers(bool whether)
{
    pthread_mutex_lock(&profile.lock);
    profile.takes_transfers = whether;
    pthread_mutex_unlock(&profile.lock);
}

void *ops_profile_transfer_begin(const struct device *device, void *native)
{
    bool is_profiled;

    pthread_mutex_lock(&profile.lock);
    is_profiled = profile.takes_transfers;
    pthread_mutex_unlock(&profile.lock);
    return is_profiled ? device->mark(native) : NULL;
}

void ops_profile_transfer_end(const struct device *device, void *native, void *begin_mark,
                              const struct transfer *transfer)
{
    pthread_mutex_lock(&profile.lock);
    if (profile.takes_transfers) {
        struct op_call *call = add_call(&profile.transfers, transfer->name);

        snprintf(call->detail, sizeof call->detail, "%s", transfer->lane);
        call->cost.bytes = (double)transfer->size_bytes;
        call->from = begin_mark;
        call->to = device->mark(native);
    } else {
        device->mark_free(begin_mark);
    }
    pthread_mutex_unlock(&profile.lock);
}

/* ---- from start to stop ---- */

void ops_profile_start(struct stream *stream)
{
#define PROFILED_ENTRY(name, args) .name = name##_profiled,
    static struct ops table = {OPS_LIST(PROFILED_ENTRY).fill_zero = fill_zero_profiled};
#undef PROFILED_ENTRY

    CHECK(profile.ops == NULL, "two profiles at a time");
    profile.ops = stream->ops;
    profile.on_stream.num_calls = profile.transfers.num_calls = 0;
    table.backend = profile.ops->backend;
    stream->ops = &table;
    profile.start = stream_mark(stream);
    take_transfers(true);
}

bool ops_profile_is_running(void)
{
    return profile.ops != NULL;
}

static void read_marks(struct stream *stream, struct call_list *list)
{
    for (int i = 0; i < list->num_calls; i++) {
        struct op_call *call = &list->calls[i];

        call->duration_ms = 1e3 * stream_mark_seconds(stream, call->from, call->to);
        call->start_ms = 1e3 * stream_mark_seconds(stream, profile.start, call->from);
    }
    for (int i = 0; i < list->num_calls; i++) {
        stream_mark_free(stream, list->calls[i].from);
        stream_mark_free(stream, list->calls[i].to);
    }
}

void ops_profile_stop(struct stream *stream)
{
    take_transfers(false);
    stream_wait(stream);
    stream->ops = profile.ops;
    profile.ops = NULL;
    read_marks(stream, &profile.on_stream);
    read_marks(stream, &profile.transfers);
    stream_mark_free(stream, profile.start);
    profile.whole_ms =
        profile.on_stream.num_calls > 0 ? last_call()->start_ms + last_call()->duration_ms : 0.0;
}

/* ---- the table ---- */

static int by_total(const void *a, const void *b)
{
    const struct op_kind *x = a, *y = b;

    return (x->total_ms < y->total_ms) - (x->total_ms > y->total_ms);
}

static int add_to_kinds(struct op_kind *kinds, int num_kinds, const struct op_call *call)
{
    int k = 0;

    while (k < num_kinds && (strcmp(kinds[k].first->name, call->name) != 0 ||
                             strcmp(kinds[k].first->detail, call->detail) != 0)) {
        k++;
    }
    if (k == num_kinds) {
        kinds[num_kinds++] = (struct op_kind){.first = call};
    }
    kinds[k].num_calls++;
    kinds[k].total_ms += call->duration_ms;
    kinds[k].cost.flops += call->cost.flops;
    kinds[k].cost.bytes += call->cost.bytes;
    return num_kinds;
}

/* What the op reached: of operations, of bytes, and of the roof. */
static void print_rates(FILE *file, const struct op_kind *kind, const struct op_roof *roof)
{
    const double seconds = kind->total_ms / 1e3;
    const double at_roof = op_cost_seconds(&kind->cost, roof);

    if (seconds <= 0.0 || kind->cost.bytes <= 0.0) {
        return;
    }
    if (kind->cost.flops > 0.0) {
        op_rate_print(file, kind->cost.flops / seconds, "FLOP");
    } else {
        fprintf(file, " %16s", "");
    }
    op_rate_print(file, kind->cost.bytes / seconds, "B");
    if (at_roof > 0.0) {
        fprintf(file, " %5.1f %% of the roof", 100.0 * at_roof / seconds);
    }
}

/* A line for each kind; returns the sum of the milliseconds. */
static double print_kinds(FILE *file, const struct call_list *list, const struct op_roof *roof)
{
    struct op_kind *kinds = calloc((size_t)list->num_calls + 1, sizeof *kinds);
    int num_kinds = 0;
    double total_ms = 0.0;

    CHECK(kinds != NULL, "out of memory");
    for (int i = 0; i < list->num_calls; i++) {
        num_kinds = add_to_kinds(kinds, num_kinds, &list->calls[i]);
        total_ms += list->calls[i].duration_ms;
    }
    qsort(kinds, (size_t)num_kinds, sizeof *kinds, by_total);
    for (int k = 0; k < num_kinds; k++) {
        fprintf(file, "%-26s %-28s %5d calls %10.3f ms %5.1f %%", kinds[k].first->name,
                kinds[k].first->detail, kinds[k].num_calls, kinds[k].total_ms,
                100.0 * kinds[k].total_ms / profile.whole_ms);
        print_rates(file, &kinds[k], roof);
        fprintf(file, "\n");
    }
    free(kinds);
    return total_ms;
}

/* The times of the calls, joined, in a new array. */
static struct interval *intervals_of(const struct call_list *list, int *num_joined)
{
    struct interval *intervals = calloc((size_t)list->num_calls + 1, sizeof *intervals);

    CHECK(intervals != NULL, "out of memory");
    for (int i = 0; i < list->num_calls; i++) {
        const struct op_call *call = &list->calls[i];

        intervals[i] = (struct interval){call->start_ms, call->start_ms + call->duration_ms};
    }
    *num_joined = intervals_join(intervals, list->num_calls);
    return intervals;
}

/* Exposed: while there was a transfer, no op ran. */
static void print_hidden(FILE *file)
{
    int num_busy, num_moving;
    struct interval *busy = intervals_of(&profile.on_stream, &num_busy);
    struct interval *moving = intervals_of(&profile.transfers, &num_moving);
    const double moving_ms = intervals_length(moving, num_moving);
    const double hidden_ms = intervals_common_length(busy, num_busy, moving, num_moving);

    fprintf(file,
            "communication %.3f ms of %.3f: %.3f ms hidden behind ops (%.1f %%), %.3f exposed\n",
            moving_ms, profile.whole_ms, hidden_ms, 100.0 * hidden_ms / moving_ms,
            moving_ms - hidden_ms);
    free(busy);
    free(moving);
}

void ops_profile_print(FILE *file, const struct op_roof *roof)
{
    const double in_no_op_ms = profile.whole_ms - print_kinds(file, &profile.on_stream, roof);

    fprintf(file, "%-26s %-28s %5d calls %10.3f ms %5.1f %%\n", "in no op", "",
            profile.on_stream.num_calls, in_no_op_ms, 100.0 * in_no_op_ms / profile.whole_ms);
    if (profile.transfers.num_calls > 0) {
        print_kinds(file, &profile.transfers, &(struct op_roof){0});
        print_hidden(file);
    }
}

/* ---- the trace ---- */

enum { OPS_LANE };

/* A lane has the number of its first transfer, counted from 1. */
static int lane_of(const struct op_call *transfer)
{
    int lane = OPS_LANE + 1;

    while (strcmp(profile.transfers.calls[lane - 1].detail, transfer->detail) != 0) {
        lane++;
    }
    return lane;
}

static void write_lane_name(FILE *file, int lane, const char *name)
{
    fprintf(file,
            "{\"name\":\"thread_name\",\"ph\":\"M\",\"pid\":0,\"tid\":%d,"
            "\"args\":{\"name\":\"%s\"}}",
            lane, name);
}

static void write_call(FILE *file, int lane, const struct op_call *call)
{
    fprintf(file,
            ",\n{\"name\":\"%s\",\"ph\":\"X\",\"pid\":0,\"tid\":%d,\"ts\":%.3f,\"dur\":%.3f,"
            "\"args\":{\"sizes\":\"%s\",\"bytes\":%.0f}}",
            call->name, lane, call->start_ms * 1e3, call->duration_ms * 1e3, call->detail,
            call->cost.bytes);
}

int ops_profile_write_trace(const char *path)
{
    FILE *file = fopen(path, "w");

    if (file == NULL) {
        return error_set("%s: %s", path, strerror(errno));
    }
    fprintf(file, "{\"traceEvents\":[\n");
    write_lane_name(file, OPS_LANE, "ops");
    for (int i = 0; i < profile.on_stream.num_calls; i++) {
        write_call(file, OPS_LANE, &profile.on_stream.calls[i]);
    }
    for (int i = 0; i < profile.transfers.num_calls; i++) {
        const struct op_call *call = &profile.transfers.calls[i];
        const int lane = lane_of(call);

        if (lane == i + 1) {
            fprintf(file, ",\n");
            write_lane_name(file, lane, call->detail);
        }
        write_call(file, lane, call);
    }
    fprintf(file, "\n]}\n");
    if (fclose(file) != 0) {
        return error_set("%s: %s", path, strerror(errno));
    }
    return 0;
}
