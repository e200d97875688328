/* iteration_line.h - the lines of a training log in Megatron's format, so that scripts which read
 * its logs read ours. */
#ifndef CADRE_TRAIN_ITERATION_LINE_H
#define CADRE_TRAIN_ITERATION_LINE_H

#include <stdbool.h>
#include <stdint.h>
#include <time.h>

struct named_loss {
    const char *name; /* "lm loss", "load_balancing_loss", "z_loss" */
    double value;     /* mean over the iterations of the interval that advanced */
};

/* What the log interval that ends here has to say. A field with a has_ flag is printed only if it
 * is set. */
struct iteration_line {
    time_t now;
    int64_t iteration;
    int64_t num_iterations; /* of the whole training */
    int64_t consumed_samples;
    int64_t skipped_samples; /* printed if above 0 */
    double elapsed_ms;       /* per iteration */
    bool has_throughput;
    double throughput_tflops; /* per device */
    double learning_rate;
    bool has_decoupled_learning_rate;
    double decoupled_learning_rate;
    int64_t global_batch_size;
    const struct named_loss *losses; /* in the order of printing; those above 0 are printed */
    int num_losses;
    double loss_scale;
    bool has_grad_norm;
    double grad_norm;
    bool has_num_zeros;
    double num_zeros;
    bool has_params_norm;
    double params_norm;
    int64_t num_skipped_iterations;
    int64_t num_nan_iterations;
};

/* One line without newline; the caller frees. */
char *iteration_line_format(const struct iteration_line *line);

/* Three lines, without the last newline: the losses and perplexities of an evaluation between
 * dashes. where is "iteration N", "iteration N on validation set" or "iteration N on test set".
 * The caller frees. */
char *validation_line_format(const char *where, const struct named_loss *losses, int num_losses);
/* exp(min(20, loss)): an untrained model's perplexity must not overflow the line. */
double validation_perplexity(double loss);

#endif
