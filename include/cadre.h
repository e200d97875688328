/* cadre.h - libcadre: train a mixture-of-experts transformer, or run one, from a C program.
 *
 *     struct cadre_model *model = cadre_model_open("checkpoint", 512);
 *
 *     if (model == NULL || cadre_model_logits(model, tokens, 1, 10, logits) != 0) {
 *         fprintf(stderr, "%s\n", cadre_error_text());
 *     }
 *     cadre_model_close(model);
 *
 * Functions that return int give 0, or -1 with a message in cadre_error_text. What is no fault of
 * the caller (memory that runs out, a broken invariant) ends the process with one line on stderr.
 */
#ifndef CADRE_H
#define CADRE_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* "0.1.0" */
const char *cadre_version(void);
/* The calling thread's last error, one line. */
const char *cadre_error_text(void);

/* `cadre pretrain` with the flags argv[1] .. argv[argc - 1]; argv[0] is not looked at. */
int cadre_pretrain(int argc, char **argv);

/* A model in memory, in fp32: on the GPU where there is one. */
struct cadre_model;

/* directory: a cadre checkpoint, or a Hugging Face Mixtral model. max_positions: the longest
 * sequence that will be run. NULL on error. */
struct cadre_model *cadre_model_open(const char *directory, int64_t max_positions);
void cadre_model_close(struct cadre_model *model); /* NULL is fine */
int64_t cadre_model_vocab_size(const struct cadre_model *model);
/* logits [num_sequences, seq_length, vocab_size] of tokens [num_sequences, seq_length], row-major.
 */
int cadre_model_logits(struct cadre_model *model, const int64_t *tokens, int64_t num_sequences,
                       int64_t seq_length, float *logits);

#ifdef __cplusplus
}
#endif

#endif
