/* The experts' feed-forward. What the matrix units can do (BF16, SwiGLU, no biases, widths of whole
 * packs) goes to fused kernels; everything else to plain grouped products with the activation
 * between them. Neither learns the number of rows of an expert on the host.
 *
 * Rows named by row_token are gathered into scratch first; or in forward, where experts are narrow,
 * by the product that reads them; or in backward, x's, beside the product before. */
#include "ops/activation_cuda.cuh"
#include "ops/grouped_matmul_cuda.cuh"

enum {
    BLOCK = 256,
    GATHER_WIDTH_MAX = 2048,    /* of an expert whose first product gathers */
    GATHER_DEPTH_MIN = 1024,    /* of that product */
    COPY_WEIGHTS_MIN = 1 << 20, /* of an expert's fc2, where rows are copied beside d_x */
};

/* Rows of an operand: those of x, or where row_token is given, the tokens of x that it names. */
struct operand {
    struct tensor x;
    const struct tensor *row_token, *token_rows;
};

/* The same operand without row_token, copied where needed. */
static struct operand gathered(struct stream *stream, struct operand operand,
                               const struct tensor *offsets)
{
    struct row_gather gather = {};
    struct operand rows = {operand.x, NULL, NULL};

    if (operand.row_token == NULL) {
        return operand;
    }
    rows.x.dim[0] = operand.row_token->dim[0];
    rows.x = tensor_allocate(stream->scratch, rows.x.dtype, rows.x.dim, 2);
    gather.y = &rows.x;
    gather.x = &operand.x;
    gather.index = operand.row_token;
    gather.offsets = offsets;
    gather.token_rows = operand.token_rows;
    row_gather_cuda(stream, &gather);
    return rows;
}

/* A gather in the product costs a part of the product, whose time grows with the experts' width; a
 * copy costs the same at any width. With little depth, the one warp that then finishes tiles is too
 * slow. */
static bool gathers_in_product(const struct experts_forward *op)
{
    return op->fc2->dim[2] <= GATHER_WIDTH_MAX && op->fc2->dim[1] >= GATHER_DEPTH_MIN;
}

/* A thread of each multiprocessor copies a row in about a microsecond, for which the product of the
 * row has to last. */
static bool copies_beside_product(const struct experts_forward *op)
{
    return op->row_token != NULL && op->fc2->dim[1] * op->fc2->dim[2] >= COPY_WEIGHTS_MIN;
}

static struct tensor scratch_tensor(struct stream *stream, enum dtype dtype, int64_t rows,
                                    int64_t columns)
{
    const int64_t dims[2] = {rows, columns};

    return tensor_allocate(stream->scratch, dtype, dims, 2);
}

static bool is_for_matrix_units(const struct experts_forward *op)
{
    return op->x->dtype == DTYPE_BF16 && op->activation == ACTIVATION_SWIGLU &&
           op->fc1_bias == NULL && op->fc2_bias == NULL && op->fc1->dim[2] % 8 == 0 &&
           op->fc2->dim[2] % 8 == 0 &&
           packable(8, {op->x, op->fc1, op->fc2, op->pre_activation, op->y});
}

/* ---- the plain way ---- */

struct activation_rows {
    const float *row_prob;
    const int32_t *num_used;
    int64_t num_rows, width;
    enum activation_kind kind;
};

__device__ inline struct activation_slopes slopes_of(enum activation_kind kind, float x, float up)
{
    switch (kind) {
    case ACTIVATION_SWIGLU:
        return activation_slopes_of<ACTIVATION_SWIGLU>(x, up);
    case ACTIVATION_GELU:
        return activation_slopes_of<ACTIVATION_GELU>(x, up);
    default:
        return activation_slopes_of<ACTIVATION_SQUARED_RELU>(x, up);
    }
}

/* Element i of row `row` of x: its value as the activation's input, and the other half of SwiGLU.
 */
template <class T>
__device__ inline struct activation_slopes slopes_at(const struct activation_rows &r, const T *h,
                                                     int64_t row, int64_t i)
{
    if (r.kind == ACTIVATION_SWIGLU) {
        const T *from = h + row * 2 * r.width;

        return slopes_of(r.kind, to_float(from[i]), to_float(from[r.width + i]));
    }
    return slopes_of(r.kind, to_float(h[row * r.width + i]), 0.0f);
}

/* a = prob * act(h), for the rows in use. */
template <class T>
__global__ void rows_activation_kernel(T *a, const T *h, struct activation_rows r)
{
    for (int64_t row = blockIdx.x; row < *r.num_used; row += gridDim.x) {
        const float prob = r.row_prob != NULL ? r.row_prob[row] : 1.0f;

        for (int64_t i = threadIdx.x; i < r.width; i += BLOCK) {
            a[row * r.width + i] = from_float<T>(prob * slopes_at(r, h, row, i).value);
        }
    }
}

template <class T> struct backward_rows {
    struct activation_rows r;
    T *d_h, *a;
    float *d_row_prob;
    const float *d_a;
    const T *h;
};

/* d_h, the recomputed a = prob act(h), and d_row_prob = sum_f d_a act(h). A block a row. */
template <class T> __global__ void rows_activation_backward_kernel(backward_rows<T> x)
{
    __shared__ float buffer[32];
    const struct activation_rows &r = x.r;

    for (int64_t row = blockIdx.x; row < *r.num_used; row += gridDim.x) {
        const float prob = r.row_prob != NULL ? r.row_prob[row] : 1.0f;
        float sum = 0.0f;

        for (int64_t i = threadIdx.x; i < r.width; i += BLOCK) {
            const struct activation_slopes s = slopes_at(r, x.h, row, i);
            const float d = x.d_a[row * r.width + i];

            x.a[row * r.width + i] = from_float<T>(prob * s.value);
            sum += d * s.value;
            if (r.kind == ACTIVATION_SWIGLU) {
                x.d_h[row * 2 * r.width + i] = from_float<T>(prob * d * s.d_x);
                x.d_h[row * 2 * r.width + r.width + i] = from_float<T>(prob * d * s.d_up);
            } else {
                x.d_h[row * r.width + i] = from_float<T>(prob * d * s.d_x);
            }
        }
        sum = block_sum(sum, buffer);
        if (threadIdx.x == 0 && x.d_row_prob != NULL) {
            x.d_row_prob[row] = sum;
        }
    }
}

static struct activation_rows activation_rows_of(const struct experts_forward *op)
{
    return {data_of<float>(op->row_prob), data_of<int32_t>(op->offsets) + op->offsets->dim[0] - 1,
            op->pre_activation->dim[0], op->fc2->dim[2], op->activation};
}

static void plain_forward(struct stream *stream, const struct experts_forward *op,
                          const struct tensor *x)
{
    const struct activation_rows r = activation_rows_of(op);
    struct tensor a = scratch_tensor(stream, x->dtype, r.num_rows, r.width);
    struct grouped_rows product = {};

    product.offsets = op->offsets;
    product.c = op->pre_activation;
    product.a = x;
    product.b = op->fc1;
    product.bias = op->fc1_bias;
    grouped_rows_matmul(stream, &product);
    WITH_ACT(x->dtype, {
        LAUNCH(stream, rows_activation_kernel<T>, r.num_rows, BLOCK, 0, data_of<T>(&a),
               data_of<T>(op->pre_activation), r);
    });
    product.c = op->y;
    product.a = &a;
    product.b = op->fc2;
    product.bias = op->fc2_bias;
    product.row_scale = op->row_prob;
    grouped_rows_matmul(stream, &product);
}

/* ---- biases: d_b1 += sum_r d_h, d_b2 += sum_r prob d_y, d_prob += d_y . b2 ---- */

/* A thread a column of an expert, over the expert's rows in order. */
template <class T>
__global__ void bias_sums_kernel(float *d_bias, const T *d, const float *row_scale,
                                 const int32_t *offsets, int64_t width, int64_t num_tiles)
{
    const int64_t e = blockIdx.x / num_tiles;
    const int64_t column = blockIdx.x % num_tiles * BLOCK + threadIdx.x;
    float sum = 0.0f;

    if (column >= width) {
        return;
    }
    for (int64_t row = offsets[e]; row < offsets[e + 1]; row++) {
        const float scale = row_scale != NULL ? row_scale[row] : 1.0f;

        sum += scale * to_float(d[row * width + column]);
    }
    d_bias[e * width + column] += sum;
}

static void bias_sums(struct stream *stream, struct tensor *d_bias, const struct tensor *d,
                      const struct tensor *row_scale, const struct tensor *offsets)
{
    const int64_t width = d_bias->dim[1], num_tiles = ceil_div(width, BLOCK);

    WITH_ACT(d->dtype, {
        LAUNCH(stream, bias_sums_kernel<T>, d_bias->dim[0] * num_tiles, BLOCK, 0,
               data_of<float>(d_bias), data_of<T>(d), data_of<float>(row_scale),
               data_of<int32_t>(offsets), width, num_tiles);
    });
}

/* A block a row. */
template <class T>
__global__ void bias_dot_kernel(float *d_row_prob, const T *d_y, const T *bias,
                                const int32_t *offsets, int num_experts, int64_t width)
{
    __shared__ float buffer[32];
    const int64_t row = blockIdx.x;
    float sum = 0.0f;
    int e = 0;

    if (row >= offsets[num_experts]) {
        return;
    }
    while (row >= offsets[e + 1]) {
        e++;
    }
    for (int64_t i = threadIdx.x; i < width; i += BLOCK) {
        sum += to_float(d_y[row * width + i]) * to_float(bias[e * width + i]);
    }
    sum = block_sum(sum, buffer);
    if (threadIdx.x == 0) {
        d_row_prob[row] += sum;
    }
}

static void bias_backward(struct stream *stream, const struct experts_backward *op,
                          const struct tensor *d_h, const struct tensor *d_y)
{
    const struct experts_forward *forward = &op->forward;

    if (op->d_fc1_bias != NULL) {
        bias_sums(stream, op->d_fc1_bias, d_h, NULL, forward->offsets);
    }
    if (op->d_fc2_bias != NULL) {
        bias_sums(stream, op->d_fc2_bias, d_y, forward->row_prob, forward->offsets);
    }
    if (forward->fc2_bias != NULL && op->d_row_prob != NULL) {
        WITH_ACT(d_y->dtype, {
            LAUNCH(stream, bias_dot_kernel<T>, d_y->dim[0], BLOCK, 0,
                   data_of<float>(op->d_row_prob), data_of<T>(d_y), data_of<T>(forward->fc2_bias),
                   data_of<int32_t>(forward->offsets), (int)forward->offsets->dim[0] - 1,
                   d_y->dim[1]);
        });
    }
}

/* d_a = d_y W2 (kept in f32, since d_row_prob is a sum over it that often cancels), then d_h, a and
 * d_row_prob through the activation. */
static void plain_activation_backward(struct stream *stream, const struct experts_backward *op,
                                      struct tensor *d_h, struct tensor *a,
                                      const struct tensor *d_y)
{
    const struct activation_rows r = activation_rows_of(&op->forward);
    struct tensor d_a = scratch_tensor(stream, DTYPE_F32, r.num_rows, r.width);
    struct grouped_rows product = {};

    product.offsets = op->forward.offsets;
    product.c = &d_a;
    product.a = d_y;
    product.b = op->forward.fc2;
    product.b_transposed = true;
    grouped_rows_matmul(stream, &product);
    WITH_ACT(d_y->dtype, {
        const backward_rows<T> rows = {r,
                                       data_of<T>(d_h),
                                       data_of<T>(a),
                                       data_of<float>(op->d_row_prob),
                                       data_of<float>(&d_a),
                                       data_of<T>(op->forward.pre_activation)};

        LAUNCH(stream, rows_activation_backward_kernel<T>, r.num_rows, BLOCK, 0, rows);
    });
}

static void hopper_forward(struct stream *stream, const struct experts_forward *op,
                           const struct operand *x)
{
    struct tensor a = scratch_tensor(stream, DTYPE_BF16, op->y->dim[0], op->fc2->dim[2]);
    const struct hopper_fc1 fc1 = {op->pre_activation, &a,          &x->x, x->row_token, op->fc1,
                                   op->offsets,        op->row_prob};
    const struct hopper_fc2 fc2 = {op->y, &a, op->fc2, op->offsets};

    hopper_fc1(stream, &fc1);
    hopper_fc2(stream, &fc2);
}

extern "C" void experts_forward_cuda(struct stream *stream, const struct experts_forward *op)
{
    const bool matrix_units = is_for_matrix_units(op);
    struct operand x = {*op->x, op->row_token, op->token_rows};

    if (op->pre_activation->dim[0] == 0 || op->x->dim[0] == 0) {
        return;
    }
    if (!matrix_units || !gathers_in_product(op)) {
        x = gathered(stream, x, op->offsets);
    }
    if (matrix_units) {
        hopper_forward(stream, op, &x);
    } else {
        plain_forward(stream, op, &x.x);
    }
}

/* Where x still has a row_token, its rows are copied beside d_x, for fc1's gradient. */
static void hopper_backward(struct stream *stream, const struct experts_backward *op,
                            struct tensor *d_h, struct tensor *a, const struct operand *x,
                            const struct tensor *d_y)
{
    const struct experts_forward *forward = &op->forward;
    const bool gathers = x->row_token != NULL;
    struct tensor x_rows =
        gathers ? scratch_tensor(stream, DTYPE_BF16, d_h->dim[0], x->x.dim[1]) : x->x;
    const struct hopper_d_fc2 through = {d_h,
                                         a,
                                         op->d_row_prob,
                                         d_y,
                                         forward->fc2,
                                         forward->pre_activation,
                                         forward->offsets,
                                         forward->row_prob};
    const struct grouped_weights d_fc2 = {op->d_fc2, d_y, a, forward->offsets, op->overwrite_grads};
    const struct grouped_weights d_fc1 = {op->d_fc1, d_h, &x_rows, forward->offsets,
                                          op->overwrite_grads};
    const struct hopper_d_x d_x = {op->d_x,      gathers ? &x_rows : NULL, d_h,
                                   forward->fc1, forward->offsets,         &x->x,
                                   x->row_token};

    hopper_d_fc2(stream, &through);
    hopper_weights_matmul(stream, &d_fc2);
    hopper_d_x(stream, &d_x);
    hopper_weights_matmul(stream, &d_fc1);
}

extern "C" void experts_backward_cuda(struct stream *stream, const struct experts_backward *op)
{
    const struct experts_forward *forward = &op->forward;
    const int64_t num_rows = forward->pre_activation->dim[0];

    if (num_rows == 0) {
        if (op->overwrite_grads) {
            fill_zero_cuda(stream, op->d_fc1);
            fill_zero_cuda(stream, op->d_fc2);
        }
        return;
    }

    const bool matrix_units =
        is_for_matrix_units(forward) && packable(8, {op->d_y, op->d_x, op->d_fc1, op->d_fc2});
    struct operand x = {*forward->x, forward->row_token, forward->token_rows};

    if (!matrix_units || !copies_beside_product(forward)) {
        x = gathered(stream, x, forward->offsets);
    }

    const struct operand d_y =
        gathered(stream, {*op->d_y, op->d_y_row_token, forward->token_rows}, forward->offsets);
    struct tensor d_h = scratch_tensor(stream, x.x.dtype, num_rows, forward->fc1->dim[1]);
    struct tensor a = scratch_tensor(stream, x.x.dtype, num_rows, forward->fc2->dim[2]);

    if (matrix_units) {
        hopper_backward(stream, op, &d_h, &a, &x, &d_y.x);
        return;
    }

    const struct grouped_weights d_fc2 = {op->d_fc2, &d_y.x, &a, forward->offsets,
                                          op->overwrite_grads};
    const struct grouped_weights d_fc1 = {op->d_fc1, &d_h, &x.x, forward->offsets,
                                          op->overwrite_grads};
    const struct grouped_rows d_x = {op->d_x, &d_h, forward->fc1, forward->offsets,
                                     true,    NULL, NULL};

    plain_activation_backward(stream, op, &d_h, &a, &d_y.x);
    grouped_weights_matmul(stream, &d_fc2);
    grouped_weights_matmul(stream, &d_fc1);
    grouped_rows_matmul(stream, &d_x);
    bias_backward(stream, op, &d_h, &d_y.x);
}
