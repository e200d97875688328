/* compare_runs REFERENCE RUN: two folders of `cadre pretrain --save FOLDER --tensorboard-dir
 * FOLDER/tensorboard`. Prints how far RUN's losses, gradient norms and final weights are from the
 * reference's, and fails where one is further than the project promises for two mappings of one
 * training in fp32. */
#include <dirent.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/check.h"
#include "ckpt/checkpoint.h"
#include "event.pb-c.h"

enum { STEPS_MAX = 256, HEADER_BYTES = 12, FOOTER_BYTES = 4, FILE_BYTES_MAX = 64 << 20 };

/* Scalars of TensorBoard: relative. */
static const struct {
    const char *tag, *name;
    double tolerance;
} series[] = {
    {"lm loss", "loss", 1e-5},
    {"load_balancing_loss", "aux", 1e-5},
    {"seq_load_balancing_loss", "seq_aux", 1e-5},
    {"global_load_balancing_loss", "global_aux", 1e-5},
    {"z_loss", "z", 1e-5},
    {"grad-norm", "norm", 1e-4},
};
enum { NUM_SERIES = sizeof series / sizeof series[0] };

static const double weight_tolerance = 1e-4; /* of a tensor's largest element */

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
static bool compare_curves(const struct curves *reference, const struct curves *run)
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
        good = good && worst <= series[s].tolerance && (s > 0 || num_points > 0);
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

/* The largest difference over all weights, and whose it is. */
static int compare_weights(const char *reference_folder, const char *run_folder, double *worst,
                           char worst_name[256])
{
    struct checkpoint *reference = open_newest(reference_folder);
    struct checkpoint *run = reference != NULL ? open_newest(run_folder) : NULL;
    int result = run != NULL ? 0 : -1;

    *worst = 0.0;
    for (int i = 0; result == 0 && i < checkpoint_num_tensors(reference); i++) {
        const struct checkpoint_tensor *tensor = checkpoint_tensor_at(reference, i);
        double difference = 0.0;

        if (!tensor->is_optimizer) {
            result = tensor_difference(reference, run, tensor, &difference);
        }
        if (difference > *worst) {
            *worst = difference;
            snprintf(worst_name, 256, "%s", tensor->name);
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

int main(int argc, char **argv)
{
    static struct curves reference, run;
    double weights;
    char name[256] = "";
    bool good;

    if (argc != 3 || read_curves(&reference, argv[1]) != 0 || read_curves(&run, argv[2]) != 0 ||
        compare_weights(argv[1], argv[2], &weights, name) != 0) {
        printf("compare_runs: %s\n", argc == 3 ? error_text() : "needs two folders");
        return 1;
    }
    good = compare_curves(&reference, &run);
    printf(" weights %.1e", weights);
    if (weights > weight_tolerance) {
        printf(" (%s)", name);
    }
    printf("\n");
    return good && weights <= weight_tolerance ? 0 : 1;
}
