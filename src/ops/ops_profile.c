/* The stream's table is replaced by one whose entries put a mark before and after the real ones.
 * An op that calls others through the table is timed as a whole. */
#include "ops/ops_profile.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/check.h"

struct op_call {
    const char *name;
    char detail[40]; /* "" or the sizes */
    struct op_cost cost;
    void *from, *to; /* marks, until the stop */
    double start_ms, duration_ms;
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
    struct op_call *calls;
    int num_calls, capacity, depth;
} profile;

static void begin(struct stream *stream, const char *name)
{
    if (profile.depth++ > 0) {
        return;
    }
    stream->device->range_begin(name);
    if (profile.num_calls == profile.capacity) {
        profile.capacity = profile.capacity > 0 ? 2 * profile.capacity : 1024;
        profile.calls = realloc(profile.calls, (size_t)profile.capacity * sizeof *profile.calls);
        CHECK(profile.calls != NULL, "out of memory");
    }
    profile.calls[profile.num_calls++] =
        (struct op_call){.name = name, .from = stream_mark(stream)};
}

static void end(struct stream *stream)
{
    if (--profile.depth == 0) {
        profile.calls[profile.num_calls - 1].to = stream_mark(stream);
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
    return profile.depth == 1 ? &profile.calls[profile.num_calls - 1] : NULL;
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

void ops_profile_start(struct stream *stream)
{
#define PROFILED_ENTRY(name, args) .name = name##_profiled,
    static struct ops table = {OPS_LIST(PROFILED_ENTRY).fill_zero = fill_zero_profiled};
#undef PROFILED_ENTRY

    CHECK(profile.ops == NULL, "two profiles at a time");
    profile.ops = stream->ops;
    profile.num_calls = 0;
    table.backend = profile.ops->backend;
    stream->ops = &table;
}

bool ops_profile_is_running(void)
{
    return profile.ops != NULL;
}

void ops_profile_stop(struct stream *stream)
{
    stream_wait(stream);
    stream->ops = profile.ops;
    profile.ops = NULL;
    for (int i = 0; i < profile.num_calls; i++) {
        struct op_call *call = &profile.calls[i];

        call->start_ms = 1e3 * stream_mark_seconds(stream, profile.calls[0].from, call->from);
        call->duration_ms = 1e3 * stream_mark_seconds(stream, call->from, call->to);
    }
    for (int i = 0; i < profile.num_calls; i++) {
        stream_mark_free(stream, profile.calls[i].from);
        stream_mark_free(stream, profile.calls[i].to);
    }
}

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

void ops_profile_print(FILE *file, const struct op_roof *roof)
{
    struct op_kind *kinds = calloc((size_t)profile.num_calls + 1, sizeof *kinds);
    int num_kinds = 0;
    double whole_ms = 0.0, busy_ms = 0.0;

    CHECK(kinds != NULL, "out of memory");
    for (int i = 0; i < profile.num_calls; i++) {
        num_kinds = add_to_kinds(kinds, num_kinds, &profile.calls[i]);
        busy_ms += profile.calls[i].duration_ms;
        whole_ms = profile.calls[i].start_ms + profile.calls[i].duration_ms;
    }
    qsort(kinds, (size_t)num_kinds, sizeof *kinds, by_total);
    for (int k = 0; k < num_kinds; k++) {
        fprintf(file, "%-26s %-28s %5d calls %10.3f ms %5.1f %%", kinds[k].first->name,
                kinds[k].first->detail, kinds[k].num_calls, kinds[k].total_ms,
                100.0 * kinds[k].total_ms / whole_ms);
        print_rates(file, &kinds[k], roof);
        fprintf(file, "\n");
    }
    fprintf(file, "%-26s %-28s %5d calls %10.3f ms %5.1f %%\n", "in no op", "", profile.num_calls,
            whole_ms - busy_ms, 100.0 * (whole_ms - busy_ms) / whole_ms);
    free(kinds);
}

int ops_profile_write_trace(const char *path)
{
    FILE *file = fopen(path, "w");

    if (file == NULL) {
        return error_set("%s: %s", path, strerror(errno));
    }
    fprintf(file, "{\"traceEvents\":[");
    for (int i = 0; i < profile.num_calls; i++) {
        const struct op_call *call = &profile.calls[i];

        fprintf(file,
                "%s\n{\"name\":\"%s\",\"ph\":\"X\",\"pid\":0,\"tid\":0,\"ts\":%.3f,\"dur\":%.3f,"
                "\"args\":{\"sizes\":\"%s\"}}",
                i > 0 ? "," : "", call->name, call->start_ms * 1e3, call->duration_ms * 1e3,
                call->detail);
    }
    fprintf(file, "\n]}\n");
    if (fclose(file) != 0) {
        return error_set("%s: %s", path, strerror(errno));
    }
    return 0;
}
