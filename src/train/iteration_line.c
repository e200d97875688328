/* Fields, their order and their formats: reference M11.1 and M11.7. */
#include "train/iteration_line.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/check.h"

/* C prints the sign of a NaN and Python does not; log readers look for "nan". */
static double without_nan_sign(double value)
{
    return isnan(value) ? copysign(value, 1) : value;
}

static void put_timestamp(FILE *out, time_t now)
{
    char text[32];
    struct tm local;

    localtime_r(&now, &local);
    strftime(text, sizeof text, "%Y-%m-%d %H:%M:%S", &local);
    fprintf(out, " [%s]", text);
}

static void put_scientific(FILE *out, const char *name, double value)
{
    fprintf(out, " %s: %.6E |", name, without_nan_sign(value));
}

static void put_fixed(FILE *out, const char *name, int num_decimals, double value)
{
    fprintf(out, " %s: %.*f |", name, num_decimals, without_nan_sign(value));
}

static void put_interval(FILE *out, const struct iteration_line *line)
{
    put_timestamp(out, line->now);
    fprintf(out, " iteration %8lld/%8lld |", (long long)line->iteration,
            (long long)line->num_iterations);
    fprintf(out, " consumed samples: %12lld |", (long long)line->consumed_samples);
    if (line->skipped_samples > 0) {
        fprintf(out, " skipped samples: %12lld |", (long long)line->skipped_samples);
    }
    put_fixed(out, "elapsed time per iteration (ms)", 1, line->elapsed_ms);
    if (line->has_throughput) {
        put_fixed(out, "throughput per GPU (TFLOP/s/GPU)", 1, line->throughput_tflops);
    }
}

static void put_optimizer(FILE *out, const struct iteration_line *line)
{
    put_fixed(out, "loss scale", 1, line->loss_scale);
    if (line->has_grad_norm) {
        put_fixed(out, "grad norm", 3, line->grad_norm);
    }
    if (line->has_num_zeros) {
        put_fixed(out, "num zeros", 1, line->num_zeros);
    }
    if (line->has_params_norm) {
        put_fixed(out, "params norm", 3, line->params_norm);
    }
    fprintf(out, " number of skipped iterations: %3lld |", (long long)line->num_skipped_iterations);
    fprintf(out, " number of nan iterations: %3lld |", (long long)line->num_nan_iterations);
}

char *iteration_line_format(const struct iteration_line *line)
{
    char *text = NULL;
    size_t length;
    FILE *out = open_memstream(&text, &length);

    CHECK(out != NULL, "out of memory");
    put_interval(out, line);
    put_scientific(out, "learning rate", line->learning_rate);
    if (line->has_decoupled_learning_rate) {
        put_scientific(out, "decoupled learning rate", line->decoupled_learning_rate);
    }
    fprintf(out, " global batch size: %5lld |", (long long)line->global_batch_size);
    for (int i = 0; i < line->num_losses; i++) {
        if (line->losses[i].value > 0) {
            put_scientific(out, line->losses[i].name, line->losses[i].value);
        }
    }
    put_optimizer(out, line);
    CHECK(fclose(out) == 0, "out of memory");
    return text;
}

double validation_perplexity(double loss)
{
    return loss < 20 || isnan(loss) ? exp(loss) : exp(20);
}

static void put_dashes(FILE *out, size_t num_dashes)
{
    for (size_t i = 0; i < num_dashes; i++) {
        fputc('-', out);
    }
}

static char *validation_text(const char *where, const struct named_loss *losses, int num_losses)
{
    char *text = NULL;
    size_t length;
    FILE *out = open_memstream(&text, &length);

    CHECK(out != NULL, "out of memory");
    fprintf(out, " validation loss at %s | ", where);
    for (int i = 0; i < num_losses; i++) {
        const double loss = losses[i].value;

        fprintf(out, "%s value: %.6E | ", losses[i].name, without_nan_sign(loss));
        fprintf(out, "%s PPL: %.6E | ", losses[i].name,
                without_nan_sign(validation_perplexity(loss)));
    }
    CHECK(fclose(out) == 0, "out of memory");
    return text;
}

char *validation_line_format(const char *where, const struct named_loss *losses, int num_losses)
{
    char *line = validation_text(where, losses, num_losses);
    const size_t num_dashes = strlen(line) + 1; /* one more than the line, as Megatron's */
    char *text = NULL;
    size_t length;
    FILE *out = open_memstream(&text, &length);

    CHECK(out != NULL, "out of memory");
    put_dashes(out, num_dashes);
    fprintf(out, "\n%s\n", line);
    put_dashes(out, num_dashes);
    CHECK(fclose(out) == 0, "out of memory");
    free(line);
    return text;
}
