/* cudnn_graph_cuda.h - graphs of operations that cuDNN fuses into kernels, by its backend API.
 *
 * A graph is written down as a formula: each function below adds an operation and returns its
 * result, a virtual tensor that no memory holds, unless the caller gives a tensor that has memory.
 * Every value has four dims. cudnn_graph_finish turns the graph into a plan, which runs as often as
 * one likes on any addresses. The first thing that cuDNN refuses makes the rest of the graph, and
 * its plan, fail; the reason is the plan's error. */
#ifndef CADRE_OPS_CUDNN_GRAPH_CUDA_H
#define CADRE_OPS_CUDNN_GRAPH_CUDA_H

#include <stdint.h>

#include "device/device.h"
#include "ops/libraries_cuda.h"

enum {
    CUDNN_DIMS = 4,
    CUDNN_UIDS = 32,        /* ids of tensors with memory, and of scalars, are below */
    CUDNN_DESCRIPTORS = 192 /* of a graph */
};

struct cudnn_value {
    cudnnBackendDescriptor_t descriptor; /* NULL: none */
    cudnnDataType_t type;
    int64_t dim[CUDNN_DIMS], stride[CUDNN_DIMS];
};

struct cudnn_graph {
    const struct cudnn_library *library;
    cudnnBackendDescriptor_t kept[CUDNN_DESCRIPTORS]; /* destroyed with the graph */
    cudnnBackendDescriptor_t operations[CUDNN_DESCRIPTORS];
    int num_kept, num_operations;
    int64_t num_virtual;
    cudnnStatus_t status; /* of the first failure */
    const char *failed;   /* the call that failed, NULL so far */
};

struct cudnn_plan {
    cudnnBackendDescriptor_t descriptor; /* NULL: cuDNN has no kernel for the graph */
    int64_t workspace_bytes;
};

/* ---- values ---- */

/* Memory given at cudnn_plan_run by its uid. */
struct cudnn_value cudnn_tensor(struct cudnn_graph *graph, int64_t uid, cudnnDataType_t type,
                                const int64_t dim[CUDNN_DIMS], const int64_t stride[CUDNN_DIMS]);
/* A number in host memory given at cudnn_plan_run: f32 or i32. */
struct cudnn_value cudnn_scalar(struct cudnn_graph *graph, int64_t uid, cudnnDataType_t type);
/* No memory: row-major. */
struct cudnn_value cudnn_virtual(struct cudnn_graph *graph, cudnnDataType_t type,
                                 const int64_t dim[CUDNN_DIMS]);

/* ---- operations ---- */

/* c [.., M, N] = a [.., M, K] b [.., K, N]; the second dim of a may be a multiple of b's. */
void cudnn_matmul(struct cudnn_graph *graph, struct cudnn_value c, struct cudnn_value a,
                  struct cudnn_value b);
/* y = mode(x) or mode(x, b), where b may have dims of 1; computed in `type`, i32 for indices. */
void cudnn_pointwise(struct cudnn_graph *graph, cudnnPointwiseMode_t mode, cudnnDataType_t type,
                     struct cudnn_value y, struct cudnn_value x, struct cudnn_value b);
/* y = the index along `axis`, in the shape of x. */
void cudnn_index(struct cudnn_graph *graph, struct cudnn_value y, struct cudnn_value x,
                 int64_t axis);
/* y = condition ? x : otherwise. */
void cudnn_select(struct cudnn_graph *graph, struct cudnn_value y, struct cudnn_value condition,
                  struct cudnn_value x, struct cudnn_value otherwise);
/* Over the dims that are 1 in y. */
void cudnn_reduce(struct cudnn_graph *graph, cudnnReduceTensorOp_t operation, struct cudnn_value y,
                  struct cudnn_value x);
/* The last two dims of x change places; y is virtual. */
struct cudnn_value cudnn_transpose(struct cudnn_graph *graph, cudnnDataType_t type,
                                   struct cudnn_value x);

/* ---- plans ---- */

/* Chooses the kernels; frees the graph's descriptors. Without a plan, error_text() says why. */
struct cudnn_plan cudnn_graph_finish(struct cudnn_graph *graph, cudnnHandle_t handle);
void cudnn_plan_destroy(const struct cudnn_library *library, struct cudnn_plan *plan);
/* addresses[i] is the memory of uids[i]. workspace: plan.workspace_bytes of device memory. */
void cudnn_plan_run(const struct cudnn_library *library, const struct cudnn_plan *plan,
                    cudnnHandle_t handle, int num_uids, const int64_t *uids, void **addresses,
                    void *workspace);

#endif
