/* tensorboard.h - writes event files that TensorBoard reads.
 *
 *     struct tensorboard *board = tensorboard_open(directory, 1000, NULL);
 *     tensorboard_scalar(board, "lm loss", loss, iteration);
 *     tensorboard_flush(board);      at each log interval
 *     tensorboard_close(board);
 *
 * Logging never stops training: after a failed write the rest of the run is left out of the file,
 * with one warning. All functions but tensorboard_open accept NULL and then do nothing, so that
 * callers need not ask whether the run has a board. */
#ifndef CADRE_TRAIN_TENSORBOARD_H
#define CADRE_TRAIN_TENSORBOARD_H

#include <stdint.h>

struct tensorboard;

/* Makes directory if it is missing, and in it a new file of the name
 * events.out.tfevents.SECONDS.HOST.PID.UID; a resumed run so gets its own, as TensorBoard wants it.
 * queue_size events are held back at most (--tensorboard-queue-size, 1 or more). clock gives
 * seconds since 1970; NULL is the system's. NULL with error_set() on failure. */
struct tensorboard *tensorboard_open(const char *directory, int queue_size, double (*clock)(void));
void tensorboard_scalar(struct tensorboard *board, const char *tag, double value, int64_t step);
/* text is shown as markdown. */
void tensorboard_text(struct tensorboard *board, const char *tag, const char *text, int64_t step);
void tensorboard_flush(struct tensorboard *board);
void tensorboard_close(struct tensorboard *board); /* flushes and frees */

#endif
