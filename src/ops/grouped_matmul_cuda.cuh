/* grouped_matmul_cuda.cuh - products of rows grouped by expert, whose numbers only the device knows
 * (offsets[E+1]): one launch for all experts, no host in between. Two implementations share this
 * description: grouped_matmul_cuda.cu on the scalar units, for every dtype and size, and
 * grouped_matmul_hopper_cuda.cu on the matrix units, for bf16 in sizes that are multiples of 8. */
#ifndef CADRE_OPS_GROUPED_MATMUL_CUDA_CUH
#define CADRE_OPS_GROUPED_MATMUL_CUDA_CUH

#include "ops/ops_cuda_internal.cuh"

/* C[r, n] = sum_k A[r, k] B_e[n, k] (b_transposed: B_e[k, n]) + row_scale[r] * bias_e[n], for the
 * rows r of each expert e. A [R,K], B [E,N,K] (or [E,K,N]) and bias [E,N] act, C [R,N] act or f32.
 */
struct grouped_rows {
    struct tensor *c;
    const struct tensor *a, *b, *offsets;
    bool b_transposed;
    const struct tensor *bias;      /* optional */
    const struct tensor *row_scale; /* [R] f32, optional (1) */
};
void grouped_rows_matmul(struct stream *stream, const struct grouped_rows *args);

/* C_e[m, n] += (or =, with overwrite) sum over the rows r of e of A[r, m] B[r, n], zero for an
 * expert without rows. C [E,M,N] f32; A [R,M], B [R,N] act. */
struct grouped_weights {
    struct tensor *c;
    const struct tensor *a, *b, *offsets;
    bool overwrite;
};
void grouped_weights_matmul(struct stream *stream, const struct grouped_weights *args);

/* ---- on the matrix units: BF16, all widths multiples of 8 ----
 */

/* The first half of the experts, SwiGLU: h = x W1^T, a = prob * silu(gate) * up. x [R,H], fc1
 * [E,2F,H], h [R,2F], a [R,F]; row_prob optional. With row_token, the rows are tokens of x [T,H]
 * that it names, gathered on the way in. */
struct hopper_fc1 {
    struct tensor *h, *a;
    const struct tensor *x, *row_token, *fc1, *offsets, *row_prob;
};
void hopper_fc1(struct stream *stream, const struct hopper_fc1 *args);

/* Backward through fc2 and SwiGLU: d_a = d_y W2 (rounded to bf16), d_h [R,2F] from it and h, the
 * recomputed a = prob * silu(gate) * up, and d_row_prob = sum_f d_a silu(gate) up. fc2 [E,H,F]. */
struct hopper_d_fc2 {
    struct tensor *d_h, *a, *d_row_prob; /* d_row_prob optional */
    const struct tensor *d_y, *fc2, *h, *offsets, *row_prob;
};
void hopper_d_fc2(struct stream *stream, const struct hopper_d_fc2 *args);

/* The second half: y = a W2^T. a [R,F], fc2 [E,H,F], y [R,H]. */
struct hopper_fc2 {
    struct tensor *y;
    const struct tensor *a, *fc2, *offsets;
};
void hopper_fc2(struct stream *stream, const struct hopper_fc2 *args);

/* d_x = d_h W1. Beside the product, where x_rows [R,H] is given, the rows of x that row_token names
 * are copied to it, for the gradient of fc1. */
struct hopper_d_x {
    struct tensor *d_x, *x_rows; /* x_rows optional */
    const struct tensor *d_h, *fc1, *offsets, *x, *row_token;
};
void hopper_d_x(struct stream *stream, const struct hopper_d_x *args);

/* As grouped_weights_matmul, c at an address that is a multiple of 16. */
void hopper_weights_matmul(struct stream *stream, const struct grouped_weights *args);

#endif
