/* ops.h - every formula that runs on a device, once.
 *
 * struct ops is the table a backend fills; the functions below it check shapes and dtypes and call
 * the stream's table. Variants lie side by side: rmsnorm_cpu.c, rmsnorm_cuda.cu. The
 * double-precision reference of each op lives with the op tests (tests/ops).
 *
 * Dimensions: T tokens, S sequence, B microbatch, H hidden, A query heads, G KV groups (heads), D
 * head dim, E experts, K top-k, F FFN, R routed rows, V vocabulary (of this rank), N any. Tokens
 * are in sequence-first order: token t = s * B + b.
 *
 * Dtypes: "act" is the activations' dtype, F32 or BF16, the same for all act tensors of a call.
 * What is marked f32 is always F32; indices are I32 unless said otherwise. Arithmetic is in f32
 * (norm and loss sums: at least f32).
 *
 * "+=" marks an output that is accumulated into; every other output is overwritten completely.
 * An optional tensor may be NULL. Outputs never alias inputs unless said. All ops are
 * deterministic: the same bits for any number of threads, except as docs/numerics.md says of matrix
 * libraries. */
#ifndef CADRE_OPS_OPS_H
#define CADRE_OPS_OPS_H

#include <stdbool.h>
#include <stdint.h>

#include "base/rng.h"
#include "device/device.h"
#include "tensor/box.h"
#include "tensor/tensor.h"

/* c[M,N] = op(a)[M,K] op(b)[K,N] (+ bias[N]), or c += with accumulate. a and b are act (same
 * dtype), c is act or f32, bias act. op transposes when its flag is set: a linear layer is y = x
 * W^T. */
struct matmul {
    struct tensor *c;
    const struct tensor *a, *b;
    const struct tensor *bias; /* optional */
    bool transpose_a, transpose_b, accumulate;
};

/* y[T,N] += bias[N], act (the bias of a product that was summed over ranks first). */
struct bias_forward {
    struct tensor *y;
    const struct tensor *bias;
};
/* d_bias[N] f32 += column sums of d_y[T,N]. */
struct bias_backward {
    struct tensor *d_bias;
    const struct tensor *d_y;
};

enum norm_kind { NORM_RMSNORM, NORM_LAYERNORM };

/* x' = x + residual (or x), y = (x' - mean) * inv_std * w + bias;  RMSNorm: mean = 0, no bias,
 * inv_std = 1/sqrt(mean(x'^2) + eps) (Zhang and Sennrich 2019); LayerNorm (Ba et al. 2016).
 * w = weight, or 1 + weight with one_plus (layernorm-1p). x, residual, sum, y: [T,H] act; weight,
 * bias [H] act; mean, inv_std [T] f32. */
struct norm_forward {
    enum norm_kind kind;
    bool one_plus;
    float eps;
    struct tensor *y, *inv_std;
    struct tensor *mean; /* LayerNorm only */
    struct tensor *sum;  /* x + residual; with residual only; may be x or residual itself */
    const struct tensor *x;
    const struct tensor *residual; /* optional */
    const struct tensor *weight;
    const struct tensor *bias; /* LayerNorm only */
};

/* x is the normalised input (sum where there was a residual). d_x = backward(d_y) + d_residual.
 * d_x may be d_residual. d_weight, d_bias [H] f32 +=. */
struct norm_backward {
    enum norm_kind kind;
    bool one_plus;
    struct tensor *d_x, *d_weight, *d_bias;
    const struct tensor *d_y, *x, *weight, *inv_std, *mean;
    const struct tensor *d_residual; /* optional */
};

/* Splits qkv [T, G*(A/G+2)*D] (per group: A/G query heads, k, v) into q [T,A,D], k, v [T,G,D] and
 * rotates q and k (Su et al. 2021): the pair (x0, x1) at frequency i becomes
 * (x0 cos - x1 sin, x1 cos + x0 sin); pairs are (i, i + P) or, interleaved, (2i, 2i+1), i < P.
 * table [positions, P, 2] f32 holds cos and sin; P = 0 columns or no table: split only. position
 * [T] indexes the table's rows. backward is the transposed rotation, d_q, d_k, d_v -> d_qkv. */
struct qkv_split {
    struct tensor *q, *k, *v;      /* outputs of forward, inputs of backward */
    struct tensor *qkv;            /* input of forward, output of backward */
    const struct tensor *table;    /* optional */
    const struct tensor *position; /* with table */
    bool interleaved;
};

/* Which elements a dropout keeps: keep iff uniform(key, row, index) >= p; kept values are divided
 * by 1 - p. Rows are global token ids, so the mask does not depend on the layout. p = 0: no
 * dropout. */
struct dropout_rule {
    float p;
    struct rng_key key;
};

/* out[s,b,a,:] = sum_j softmax_j(scale q.k_j) v_j over keys j < kv_length of sequence b; with
 * causal only those with
 *   document_start[s,b] <= k_start + j <= q_start + s,
 * which are positions in the sequence: query s is at q_start + s, key j at k_start + j.
 *
 * q, out [S,B,A,D] act; k, v [Skv,B,G,D] act of which the first kv_length rows count; head a uses
 * group a / (A/G). lse [B,A,S] f32: log of the softmax denominator (with the maximum), for
 * backward. Dropout on the probabilities: row = (sample_id[b]*A_global + head_start + a) * 2^24 +
 * q_start + s, index = k_start + j. A query that sees no key gets out 0, lse -inf.
 *
 * A softmax over keys that come in parts (context parallelism): a call for each part, all but the
 * first with merge. out, which may be f32 then and later be rounded once, and lse hold the result
 * over the parts so far. Only calls with merge may have queries past the last key. */
struct attention {
    float scale;
    bool causal;
    int64_t q_start, k_start, kv_length;
    const struct tensor *q, *k, *v;
    struct tensor *out, *lse;
    const struct tensor *document_start; /* optional, [S*B] */
    struct dropout_rule dropout;
    const struct tensor *sample_id; /* with dropout: [B] I64 */
    int64_t head_start, num_heads_global;
    bool merge; /* into out and lse, whose memory holds the result over other keys */
};

/* Inputs as in forward, out and lse its results; writes d_q, d_k, d_v in the shapes of q, k, v (k,
 * v rows >= kv_length are zeroed). With accumulate they are f32 and added to; out and lse are the
 * results over all keys, of which k and v are a part. */
struct attention_backward {
    struct attention forward;
    const struct tensor *d_out;
    struct tensor *d_q, *d_k, *d_v;
    bool accumulate;
};

enum activation_kind { ACTIVATION_SWIGLU, ACTIVATION_GELU, ACTIVATION_SQUARED_RELU };

/* y[T,F] = act(x): SwiGLU (Shazeer 2020) silu(x[:, :F]) * x[:, F:] of x [T,2F]; GELU by the tanh
 * formula (Hendrycks and Gimpel 2016) or max(x,0)^2 of x [T,F]. Backward: d_x from d_y and x. */
struct activation {
    enum activation_kind kind;
    struct tensor *y; /* forward */
    const struct tensor *x;
    const struct tensor *d_y; /* backward */
    struct tensor *d_x;       /* backward; may be x's memory */
};

/* y[t,:] = x[t,:] * mask / (1 - p) (+ residual[t,:]), rows of the rule are token_id[t]. Backward is
 * the same call on d_y without residual. y may be x. [T,H] act; token_id [T] I64. */
struct dropout {
    struct tensor *y;
    const struct tensor *x;
    const struct tensor *residual; /* optional */
    const struct tensor *token_id;
    struct dropout_rule rule;
};

/* y[t,:] = x[t,:] * u, u uniform in [1-eps, 1+eps] (router input jitter); backward: the same call.
 */
struct jitter {
    struct tensor *y;
    const struct tensor *x, *token_id;
    float eps;
    struct rng_key key;
};

/* Rows of weight [V,H] that this rank holds, ids from vocab_start: y[t,:] =
 * weight[id[t]-vocab_start], zero where the id is another rank's; y += with accumulate (position
 * embeddings). */
struct embedding {
    struct tensor *y;
    const struct tensor *weight, *id; /* id [T] */
    int64_t vocab_start;
    bool accumulate;
};

/* d_weight[V,H] f32 += rows of d_y [T,H], summed in token order. */
struct embedding_backward {
    struct tensor *d_weight;
    const struct tensor *d_y, *id;
    int64_t vocab_start;
};

/* Statistics of this rank's columns of the logits [T,V] (act or f32): max [T], sum_exp [T] =
 * sum_v exp(logit - max), target [T] = the label's logit, 0 where the label is another rank's. With
 * TP the caller combines them over ranks; loss[t] = log(sum_exp) + max - target. All f32.
 * Where a rank holds the whole vocabulary, the statistics are complete and the gradient can follow
 * while the logits are at hand: d_logits is what cross_entropy_backward makes of them. */
struct cross_entropy {
    struct tensor *max, *sum_exp, *target;
    struct tensor *d_logits;             /* optional; may be logits */
    const struct tensor *logits, *label; /* label [T] */
    const struct tensor *d_loss;         /* with d_logits: [T] f32 */
    int64_t vocab_start;
};

/* With TP: sum_exp[t] *= exp(local_max[t] - max[t]), before sum_exp is summed over ranks. f32. */
struct softmax_rescale {
    struct tensor *sum_exp;
    const struct tensor *local_max, *max;
};
/* loss[t] = log(sum_exp[t]) + max[t] - target[t]. f32. */
struct token_loss {
    struct tensor *loss;
    const struct tensor *max, *sum_exp, *target;
};

/* logits[t,v] := d_loss[t] * (exp(logit - max)/sum_exp - [v is the label]): the gradient replaces
 * the logits in place. d_loss [T] f32. */
struct cross_entropy_backward {
    struct tensor *logits;
    const struct tensor *max, *sum_exp, *label, *d_loss;
    int64_t vocab_start;
};

/* y = a*x (+ b*y when b != 0), any of f32 and bf16 (computed in f32, rounded once): copy, cast,
 * add, scale. Same number of elements; y may be x. */
struct linear_combination {
    struct tensor *y;
    const struct tensor *x;
    float a, b;
};

/* y = u + v elementwise, act; y may be u or v. */
struct add {
    struct tensor *y;
    const struct tensor *u, *v;
};

/* ---- mixture of experts ---- */

enum router_score { ROUTER_SOFTMAX, ROUTER_SIGMOID };

/* Top-k experts of every token and their probabilities (reference M1.4 to M1.6, M1.9).
 *   score = softmax over E, or sigmoid.
 *   selection: by `selection` [T,E] where given (sinkhorn), else by the logits (softmax, post) or
 * the score (pre-softmax, sigmoid), plus expert_bias where given, limited to group_topk of
 * num_groups groups where num_groups > 0 (group score: sum of its topk/group_topk best). Ties go to
 * the lowest expert. probability: softmax over the chosen logits (ROUTER_SOFTMAX, !pre_softmax);
 * the score itself (pre_softmax, or sigmoid with k = 1); score / (sum of the chosen + 1e-20)
 * (sigmoid, k > 1); times scaling_factor. Slots are in order of falling selection. logits,
 * selection [T,E] f32; expert_bias [E] f32; probs [T,K] f32; indices [T,K]. renormalize: with
 * pre_softmax, divide by the chosen sum (transformers' rule; equal to post-softmax for k > 1,
 * constant 1 for k = 1). */
struct router_rule {
    enum router_score score;
    bool pre_softmax, renormalize;
    int topk, num_groups, group_topk;
    float scaling_factor;
};
struct router_topk {
    struct router_rule rule;
    struct tensor *probs, *indices;
    const struct tensor *logits;
    const struct tensor *selection, *expert_bias; /* optional */
};
/* Sinkhorn balancing (M1.9) of exp(logits), in f32, computed with the row maximum taken out (which
 * the row scaling cancels): assignment [T,E]. Stops when the mean change of the column scale is <=
 * tolerance. */
struct router_sinkhorn {
    struct tensor *assignment;
    const struct tensor *logits;
    float tolerance;
    int max_iterations;
};

/* Counts and scores per expert for the balancing losses (M1.7). Column c of C: C = 1 counts all
 * tokens together; C = B counts token t in column t % B (seq_aux_loss). counts [C,E] f32 = (token,
 * slot) pairs that chose e; score_sums [C,E] f32 = sum of softmax(logits), or of s/(sum s + 1e-20)
 * for sigmoid. */
struct router_balance {
    enum router_score score;
    struct tensor *counts, *score_sums;
    const struct tensor *logits, *indices;
};
/* loss [1] f32 = factor * sum_{c,e} counts * score_sums. */
struct router_balance_loss {
    struct tensor *loss;
    const struct tensor *counts, *score_sums;
    float factor;
};
/* loss [1] f32 = factor * mean_t logsumexp(logits_t)^2 (Zoph et al. 2022). */
struct router_z_loss {
    struct tensor *loss;
    const struct tensor *logits;
    float factor;
};

/* Of a balancing loss: scale times the gradient of sum_{c,e} counts[c,e] * score_sums[c,e]. */
struct router_balance_term {
    const struct tensor *counts; /* [C,E] f32, constants */
    float scale;
};
enum { ROUTER_BALANCE_TERMS_MAX = 3 };

/* d_logits[T,E] f32 = through probs, where d_probs [T,K] f32 is given (the selection carries no
 * gradient; indices are those of forward, before router_drop; d_probs of a dropped slot is 0), plus
 * the balancing losses' terms, plus z_scale * d(mean_t logsumexp(logits_t)^2). */
struct router_backward {
    struct router_rule rule; /* its score is the balancing losses' too */
    struct tensor *d_logits;
    const struct tensor *logits;
    const struct tensor *d_probs, *indices; /* optional */
    struct router_balance_term balance[ROUTER_BALANCE_TERMS_MAX];
    int num_balance_terms;
    float z_scale;
};

/* Of logits = x W^T: d_weight[E,H] f32 += d_logits^T x (= with overwrite_grads), d_x[T,H] +=
 * d_logits W. x, weight: act, d_x: act or f32. d_logits [T,E] f32 enters the products with at least
 * 16 bits of its fraction, and every sum is f32 (M1.11). */
struct router_linear_backward {
    struct tensor *d_x, *d_weight;
    const struct tensor *d_logits, *x, *weight;
    bool overwrite_grads;
};

enum drop_policy { DROP_BY_PROBS, DROP_BY_POSITION };

/* Drops all but `capacity` tokens of each expert (M2): the highest probabilities, ties to the
 * lowest token, or the lowest tokens. A dropped slot gets index -1 and probability 0. In place. */
struct router_drop {
    struct tensor *probs, *indices;
    int num_experts;
    int64_t capacity;
    enum drop_policy policy;
};

/* The rows in canonical order: by expert, then by token.
 *   row_of [T,K]: the row of slot (t,k), -1 where dropped;  row_token [R]: the token of a row;
 *   row_prob [R] f32;  offsets [E+1]: rows of expert e are offsets[e] .. offsets[e+1]-1.
 * padded_capacity = 0: R = T*K, of which offsets[E] are in use; the others are unspecified and
 * nobody reads them. Otherwise every expert has padded_capacity rows, fillers with token 0 and
 * probability 0. */
struct permutation {
    struct tensor *row_of, *row_token, *row_prob, *offsets;
    const struct tensor *indices, *probs;
    int64_t padded_capacity;
};

/* d_probs[T,K] f32 = d_row_prob[row_of], 0 where dropped. */
struct slot_gather {
    struct tensor *d_probs;
    const struct tensor *d_row_prob, *row_of;
};

/* y[r,:] = x[index[r],:] for r < num_rows, num_rows = offsets[E] where offsets is given, else R.
 * token_rows [T,K] says the same the other way round, where every such row is in it once: the rows
 * r with index[r] = t, -1 for none; it lets a row of x be read once. */
struct row_gather {
    struct tensor *y;
    const struct tensor *x, *index;
    const struct tensor *offsets, *token_rows; /* optional */
};

/* y[t,:] = sum over k of rows[row_of[t,k],:], in slot order, + residual[t,:], in f32, rounded once.
 * Combine of the forward pass and the input gradient of the backward pass. */
struct row_sum {
    struct tensor *y;
    const struct tensor *rows, *row_of;
    const struct tensor *residual; /* optional; may be y */
};

/* The experts' feed-forward on rows grouped by expert (rows offsets[e] .. offsets[e+1]-1 belong to
 * e): h = x W1^T + b1,  a = prob * act(h),  y = a W2^T + prob * b2. x: rows [R,H], or with
 * row_token tokens [T,H] that are gathered (token_rows: see row_gather). fc1 [E,F1,H] (F1 = 2F for
 * SwiGLU: gate rows first), fc2 [E,H,F], biases [E,F1], [E,H] optional, prob [R] f32 optional (1).
 * Outputs: y [R,H], pre_activation h [R,F1], all act. Rows from offsets[E] on are neither read nor
 * written. */
struct experts_forward {
    enum activation_kind activation;
    struct tensor *y, *pre_activation;
    const struct tensor *x, *row_token, *offsets, *row_prob;
    const struct tensor *token_rows; /* optional */
    const struct tensor *fc1, *fc2, *fc1_bias, *fc2_bias;
};
/* From d_y (rows [R,H], or with d_y_row_token tokens [T,H] that are gathered, by the same
 * token_rows where those are given):
 *   d_x rows [R,H], d_row_prob [R] f32 (with row_prob), and f32 +=: d_fc1, d_fc2, d_fc1_bias,
 * d_fc2_bias. With overwrite_grads d_fc1 and d_fc2 are replaced, by zeros for an expert without
 * rows; the biases' gradients are still added to. */
struct experts_backward {
    struct experts_forward forward; /* its inputs and pre_activation; y is not needed */
    const struct tensor *d_y, *d_y_row_token;
    struct tensor *d_x, *d_row_prob, *d_fc1, *d_fc2, *d_fc1_bias, *d_fc2_bias;
    bool overwrite_grads;
};

/* ---- optimizer: flat ranges of n elements ---- */

/* AdamW with bias correction (Loshchilov and Hutter 2019), M6.4. g = grad * *grad_scale. master,
 * exp_avg, exp_avg_sq, grad [n] f32; param [n] act receives the rounded master (may be the master's
 * memory). */
struct adam_step {
    struct tensor *param, *master, *exp_avg, *exp_avg_sq;
    const struct tensor *grad, *grad_scale; /* grad_scale [1] f32 */
    float lr, beta1, beta2, eps, weight_decay;
    int64_t step; /* from 1 */
};
/* b = momentum * b + g + wd * p, p -= lr * b (torch's SGD). momentum_buffer is NULL for momentum 0.
 */
struct sgd_step {
    struct tensor *param, *master, *momentum_buffer;
    const struct tensor *grad, *grad_scale;
    float lr, momentum, weight_decay;
    bool first_step; /* b starts as g + wd * p */
};
/* sum [1] F64 += sum of x^2; in an order that depends on the number of elements only. x f32 or
 * bf16. */
struct square_sum {
    struct tensor *sum;
    const struct tensor *x;
};
/* count [1] F64 += number of zeros. */
struct zero_count {
    struct tensor *count;
    const struct tensor *x;
};
/* norm [1] f32 = sqrt(sum); scale [1] f32 = min(1, max_norm / (norm + 1e-6)), 1 when max_norm = 0.
 */
struct clip_scale {
    struct tensor *norm, *scale;
    const struct tensor *sum;
    float max_norm;
};

/* bias[e] += rate * sign(mean(counts) - counts[e]) (M1.12). [E] f32. */
struct expert_bias_update {
    struct tensor *bias;
    const struct tensor *counts;
    float rate;
};
/* x[t,i] = standard normal number (key, token_id[t], i) (router force load balancing). f32 [T,N].
 */
struct random_normal {
    struct tensor *x;
    const struct tensor *token_id;
    struct rng_key key;
};

/* Initial weights: x holds a box of a tensor of global_shape; its element at global index i becomes
 * std * standard normal number (key, 0, i), rounded once. act. */
struct initial_normal {
    struct tensor *x;
    struct rng_key key;
    float std;
    struct box box;
    int64_t global_shape[TENSOR_DIMS_MAX];
};

/* Every op takes the stream and its arguments. X(name, argument struct). */
#define OPS_LIST(X)                                                                                \
    X(matmul, matmul)                                                                              \
    X(bias_forward, bias_forward)                                                                  \
    X(bias_backward, bias_backward)                                                                \
    X(norm_forward, norm_forward)                                                                  \
    X(norm_backward, norm_backward)                                                                \
    X(qkv_split_forward, qkv_split)                                                                \
    X(qkv_split_backward, qkv_split)                                                               \
    X(attention_forward, attention)                                                                \
    X(attention_backward, attention_backward)                                                      \
    X(activation_forward, activation)                                                              \
    X(activation_backward, activation)                                                             \
    X(dropout, dropout)                                                                            \
    X(jitter, jitter)                                                                              \
    X(embedding_forward, embedding)                                                                \
    X(embedding_backward, embedding_backward)                                                      \
    X(cross_entropy_forward, cross_entropy)                                                        \
    X(softmax_rescale, softmax_rescale)                                                            \
    X(token_loss, token_loss)                                                                      \
    X(cross_entropy_backward, cross_entropy_backward)                                              \
    X(linear_combination, linear_combination)                                                      \
    X(add, add)                                                                                    \
    X(router_topk_forward, router_topk)                                                            \
    X(router_sinkhorn, router_sinkhorn)                                                            \
    X(router_balance, router_balance)                                                              \
    X(router_balance_loss, router_balance_loss)                                                    \
    X(router_z_loss, router_z_loss)                                                                \
    X(router_backward, router_backward)                                                            \
    X(router_linear_backward, router_linear_backward)                                              \
    X(router_drop, router_drop)                                                                    \
    X(permutation, permutation)                                                                    \
    X(slot_gather, slot_gather)                                                                    \
    X(row_gather, row_gather)                                                                      \
    X(row_sum, row_sum)                                                                            \
    X(experts_forward, experts_forward)                                                            \
    X(experts_backward, experts_backward)                                                          \
    X(adam_step, adam_step)                                                                        \
    X(sgd_step, sgd_step)                                                                          \
    X(square_sum, square_sum)                                                                      \
    X(zero_count, zero_count)                                                                      \
    X(clip_scale, clip_scale)                                                                      \
    X(expert_bias_update, expert_bias_update)                                                      \
    X(random_normal, random_normal)                                                                \
    X(initial_normal, initial_normal)

struct ops {
    const char *backend;
#define OPS_FIELD(name, args) void (*name)(struct stream * stream, const struct args *args_);
    OPS_LIST(OPS_FIELD)
#undef OPS_FIELD
    void (*fill_zero)(struct stream *stream, struct tensor *x);
};

/* op_matmul(stream, &(struct matmul){...}) and so on: checks the arguments, then calls the table.
 */
#define OPS_DECLARE(name, args) void op_##name(struct stream *stream, const struct args *args_);
OPS_LIST(OPS_DECLARE)
#undef OPS_DECLARE
void op_fill_zero(struct stream *stream, struct tensor *x);

const struct ops *ops_cpu(void);
const struct ops *ops_null(void); /* checks arguments and does nothing: for DEVICE_NULL */
/* Those that compute on this device; NULL with an error where a library of theirs is missing. */
const struct ops *ops_for(const struct device *device);

/* CPU threads of the ops and of the matrix library; 0 takes all cores. */
void ops_cpu_set_num_threads(int num_threads);

#endif
