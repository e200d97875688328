/* compare_runs fp32|bf16 REFERENCE RUN: two folders of `cadre pretrain --save FOLDER
 * --tensorboard-dir FOLDER/tensorboard`. Prints how far RUN's losses, gradient norms and final
 * weights are from the reference's, and fails where one is further than two mappings of one
 * training in this precision may be. */
#include <dirent.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/check.h"
#include "ckpt/checkpoint.h"
#include "event.pb-c.h"

enum { STEPS_MAX = 256, HEADER_BYTES = 12, FOOTER_BYTES = 4, FILE_BYTES_MAX = 64 << 20 };

enum precision { FP32, BF16, NUM_PRECISIONS };

/* Scalars of TensorBoard: relative. Mappings differ by the order of sums: in fp32 a little above
 * its rounding. In bf16 as far as bf16 itself moves a run: of these models one rank in bf16 is from
 * one rank in fp32 by up to 2.6e-3 in losses, 2.9e-2 in norms, 0.12 in weights. */
static const struct {
    const char *tag, *name;
    double tolerance[NUM_PRECISIONS];
} series[] = {
    {"lm loss", "loss", {1e-5, 3e-3}},
    {"load_balancing_loss", "aux", {1e-5, 5e-3}},
    {"seq_load_balancing_loss", "seq_aux", {1e-5, 5e-3}},
    {"global_load_balancing_loss", "global_aux", {1e-5, 5e-3}},
    {"z_loss", "z", {1e-5, 5e-3}},
    {"grad-norm", "norm", {1e-4, 3e-2}},
};
enum { NUM_SERIES = sizeof series / sizeof series[0] };

/* Of a tensor's largest element. What moves by the sign of a difference that rounding makes, or
 * nearly so (Adam on the bias of keys, whose true gradient is 0; the bias of experts), may differ
 * by several steps of its rate in bf16: 0.21 between one rank in bf16 and one in fp32. */
static const double weight_tolerance[NUM_PRECISIONS] = {1e-4, 1e-1};
static const double sign_tolerance[NUM_PRECISIONS] = {1e-4, 2.5e-1};
static const char *const moved_by_signs[] = {"linear_qkv.bias", "router.expert_bias"};

struct curves {
    double value[NUM_SERIES][STEPS_MAX];
    bool is_known[NUM_SERIES][STEPS_MAX];
};

/* ---- TensorBoard files ---- */

static void take_event(struct curves *curves, const Tfevents__Event *event)
{
    if (event->what_case != TFEVENTS__EVENT__WHAT_SUMMARY || event->step < 0 ||
        event->step >= STEPS_MAX) {
        return;
    }
    for (size_t i = 0; i < event->summary->n_value; i++) {
        const Tfevents__Value *value = event->summary->value[i];

        for (int s = 0; s < NUM_SERIES; s++) {
            if (value->value_case == TFEVENTS__VALUE__VALUE_SIMPLE_VALUE &&
                strcmp(value->tag, series[s].tag) == 0) {
                curves->value[s][event->step] = (double)value->simple_value;
                curves->is_known[s][event->step] = true;
            }
        }
    }
}

/* Records of TFRecord: a length of 8 bytes and its checksum, an event and its checksum. */
static int read_events(struct curves *curves, const char *path)
{
    size_t size, at = 0;
    uint8_t *bytes = (uint8_t *)path_read_file(path, FILE_BYTES_MAX, &size);

    if (bytes == NULL) {
        return -1;
    }
    while (at + HEADER_BYTES <= size) {
        uint64_t length;
        Tfevents__Event *event;

        memcpy(&length, bytes + at, sizeof length);
        event = length <= size - at - HEADER_BYTES
                    ? tfevents__event__unpack(NULL, length, bytes + at + HEADER_BYTES)
                    : NULL;
        if (event == NULL) {
            free(bytes);
            return error_set("%s: damaged at byte %zu", path, at);
        }
        take_event(curves, event);
        tfevents__event__free_unpacked(event, NULL);
        at += HEADER_BYTES + length + FOOTER_BYTES;
    }
    free(bytes);
    return 0;
}

static int read_curves(struct curves *curves, const char *folder)
{
    char directory[PATH_LENGTH_MAX], path[PATH_LENGTH_MAX];
    DIR *entries;
    int result = 0;

    memset(curves, 0, sizeof *curves);
    TRY(path_format(directory, "%s/tensorboard", folder));
    entries = opendir(directory);
    if (entries == NULL) {
        return error_set("%s: cannot be opened", directory);
    }
    for (struct dirent *entry = readdir(entries); entry != NULL && result == 0;
         entry = readdir(entries)) {
        if (strstr(entry->d_name, "tfevents") != NULL) {
            result = path_format(path, "%s/%s", directory, entry->d_name);
            result = result == 0 ? read_events(curves, path) : result;
        }
    }
    closedir(entries);
    return result;
}

/* ---- comparison ---- */

/* A NaN is as far as can be. */
static double worse(double worst, double difference)
{
    return isnan(difference) ? INFINITY : fmax(worst, difference);
}

/* Prints the largest difference of every series that the reference has; true if all are small. */
static bool compare_curves(const struct curves *reference, const struct curves *run,
                           enum precision precision)
{
    bool good = true;

    for (int s = 0; s < NUM_SERIES; s++) {
        double worst = 0.0;
        int num_points = 0;

        for (int step = 0; step < STEPS_MAX; step++) {
            const double wanted = reference->value[s][step];

            if (reference->is_known[s][step] != run->is_known[s][step]) {
                worst = INFINITY;
            } else if (reference->is_known[s][step]) {
                worst = worse(worst, fabs(run->value[s][step] - wanted) / fabs(wanted));
                num_points++;
            }
        }
        if (num_points > 0 || worst > 0.0) {
            printf(" %s %.1e", series[s].name, worst);
        }
        good = good && worst <= series[s].tolerance[precision] && (s > 0 || num_points > 0);
    }
    return good;
}

static int read_tensor(const struct checkpoint *checkpoint, const struct checkpoint_tensor *tensor,
                       float *to)
{
    struct checkpoint_read read = {.name = tensor->name,
                                   .dtype = DTYPE_F32,
                                   .num_dims = tensor->num_dims,
                                   .box = box_whole(tensor->global_shape, tensor->num_dims)};

    memcpy(read.global_shape, tensor->global_shape, sizeof read.global_shape);
    return checkpoint_read_box(checkpoint, &read, to);
}

static int tensor_difference(const struct checkpoint *reference, const struct checkpoint *run,
                             const struct checkpoint_tensor *tensor, double *difference)
{
    const struct box whole = box_whole(tensor->global_shape, tensor->num_dims);
    const size_t count = (size_t)box_num_elements(&whole);
    float *wanted = calloc(2 * count, sizeof *wanted), *got = wanted + count;
    double largest = 0.0, worst = 0.0;
    int result;

    CHECK(wanted != NULL, "out of memory");
    result = read_tensor(reference, tensor, wanted);
    result = result == 0 ? read_tensor(run, tensor, got) : result;
    for (size_t i = 0; i < count && result == 0; i++) {
        largest = fmax(largest, fabs((double)wanted[i]));
        worst = worse(worst, fabs((double)got[i] - (double)wanted[i]));
    }
    *difference = worst > 0.0 ? worst / largest : 0.0;
    free(wanted);
    return result;
}

static struct checkpoint *open_newest(const char *folder)
{
    char path[PATH_LENGTH_MAX];

    if (checkpoint_find(folder, -1, path) != CHECKPOINT_FOUND) {
        return FAIL_NULL("%s holds no checkpoint", folder);
    }
    return checkpoint_open(path, NULL);
}

static double tolerance_of(const char *tensor_name, enum precision precision)
{
    for (size_t i = 0; i < sizeof moved_by_signs / sizeof *moved_by_signs; i++) {
        if (strstr(tensor_name, moved_by_signs[i]) != NULL) {
            return sign_tolerance[precision];
        }
    }
    return weight_tolerance[precision];
}

struct weights_difference {
    double worst, worst_share; /* the largest; the largest share of what its tensor may have */
    char name[256];            /* whose share that is */
};

static void take_difference(struct weights_difference *all, const char *name, double difference,
                            enum precision precision)
{
    const double share = difference / tolerance_of(name, precision);

    all->worst = fmax(all->worst, difference);
    if (share > all->worst_share) {
        all->worst_share = share;
        snprintf(all->name, sizeof all->name, "%s", name);
    }
}

static int compare_weights(const char *reference_folder, const char *run_folder,
                           enum precision precision, struct weights_difference *all)
{
    struct checkpoint *reference = open_newest(reference_folder);
    struct checkpoint *run = reference != NULL ? open_newest(run_folder) : NULL;
    int result = run != NULL ? 0 : -1;

    for (int i = 0; result == 0 && i < checkpoint_num_tensors(reference); i++) {
        const struct checkpoint_tensor *tensor = checkpoint_tensor_at(reference, i);
        double difference = 0.0;

        if (!tensor->is_optimizer) {
            result = tensor_difference(reference, run, tensor, &difference);
            take_difference(all, tensor->name, difference, precision);
        }
    }
    if (run != NULL) {
        checkpoint_close(run);
    }
    if (reference != NULL) {
        checkpoint_close(reference);
    }
    return result;
}

static int usage(void)
{
    printf("compare_runs fp32|bf16 REFERENCE RUN\n");
    return 1;
}

int main(int argc, char **argv)
{
    static struct curves reference, run;
    struct weights_difference weights = {0};
    enum precision precision;
    bool good;

    if (argc != 4 || (strcmp(argv[1], "fp32") != 0 && strcmp(argv[1], "bf16") != 0)) {
        return usage();
    }
    precision = strcmp(argv[1], "bf16") == 0 ? BF16 : FP32;
    if (read_curves(&reference, argv[2]) != 0 || read_curves(&run, argv[3]) != 0 ||
        compare_weights(argv[2], argv[3], precision, &weights) != 0) {
        printf("compare_runs: %s\n", error_text());
        return 1;
    }
    good = compare_curves(&reference, &run, precision) && weights.worst_share <= 1.0;
    printf(" weights %.1e", weights.worst);
    if (weights.worst_share > 1.0) {
        printf(" (%s)", weights.name);
    }
    printf("\n");
    return good ? 0 : 1;
}
