#ifdef CADRE_CUDNN
#include "ops/cudnn_graph_cuda.h"

#include <stdbool.h>
#include <string.h>

#include "base/check.h"

enum { ENGINES_TRIED = 8 };

/* CALL(graph, cudnnFunction(arguments)): nothing once something has failed. */
#define CALL(graph_, call_)                                                                        \
    do {                                                                                           \
        if ((graph_)->failed == NULL) {                                                            \
            (graph_)->status = (graph_)->library->call_;                                           \
            if ((graph_)->status != CUDNN_STATUS_SUCCESS) {                                        \
                (graph_)->failed = #call_;                                                         \
            }                                                                                      \
        }                                                                                          \
    } while (0)

static cudnnBackendDescriptor_t descriptor_new(struct cudnn_graph *graph,
                                               cudnnBackendDescriptorType_t type)
{
    cudnnBackendDescriptor_t descriptor = NULL;

    CHECK(graph->num_kept < CUDNN_DESCRIPTORS, "a graph of more than %d descriptors",
          CUDNN_DESCRIPTORS);
    CALL(graph, cudnnBackendCreateDescriptor(type, &descriptor));
    graph->kept[graph->num_kept++] = descriptor;
    return descriptor;
}

static void set(struct cudnn_graph *graph, cudnnBackendDescriptor_t descriptor,
                cudnnBackendAttributeName_t name, cudnnBackendAttributeType_t type, int64_t count,
                const void *values)
{
    CALL(graph, cudnnBackendSetAttribute(descriptor, name, type, count, values));
}

static void set_descriptor(struct cudnn_graph *graph, cudnnBackendDescriptor_t descriptor,
                           cudnnBackendAttributeName_t name, cudnnBackendDescriptor_t value)
{
    set(graph, descriptor, name, CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, &value);
}

static void set_int64(struct cudnn_graph *graph, cudnnBackendDescriptor_t descriptor,
                      cudnnBackendAttributeName_t name, int64_t value)
{
    set(graph, descriptor, name, CUDNN_TYPE_INT64, 1, &value);
}

static void set_type(struct cudnn_graph *graph, cudnnBackendDescriptor_t descriptor,
                     cudnnBackendAttributeName_t name, cudnnDataType_t value)
{
    set(graph, descriptor, name, CUDNN_TYPE_DATA_TYPE, 1, &value);
}

static void finish_operation(struct cudnn_graph *graph, cudnnBackendDescriptor_t operation)
{
    CALL(graph, cudnnBackendFinalize(operation));
    graph->operations[graph->num_operations++] = operation;
}

/* ---- values ---- */

enum value_kind { VALUE_MEMORY, VALUE_SCALAR, VALUE_VIRTUAL };

static struct cudnn_value value_new(struct cudnn_graph *graph, enum value_kind kind, int64_t uid,
                                    cudnnDataType_t type, const int64_t dim[CUDNN_DIMS],
                                    const int64_t stride[CUDNN_DIMS])
{
    const bool yes = true;
    struct cudnn_value value = {.type = type};
    cudnnBackendDescriptor_t d = descriptor_new(graph, CUDNN_BACKEND_TENSOR_DESCRIPTOR);

    memcpy(value.dim, dim, sizeof value.dim);
    memcpy(value.stride, stride, sizeof value.stride);
    set_type(graph, d, CUDNN_ATTR_TENSOR_DATA_TYPE, type);
    set(graph, d, CUDNN_ATTR_TENSOR_DIMENSIONS, CUDNN_TYPE_INT64, CUDNN_DIMS, dim);
    set(graph, d, CUDNN_ATTR_TENSOR_STRIDES, CUDNN_TYPE_INT64, CUDNN_DIMS, stride);
    set_int64(graph, d, CUDNN_ATTR_TENSOR_UNIQUE_ID, uid);
    set_int64(graph, d, CUDNN_ATTR_TENSOR_BYTE_ALIGNMENT, 16);
    if (kind == VALUE_SCALAR) {
        set(graph, d, CUDNN_ATTR_TENSOR_IS_BY_VALUE, CUDNN_TYPE_BOOLEAN, 1, &yes);
    } else if (kind == VALUE_VIRTUAL) {
        set(graph, d, CUDNN_ATTR_TENSOR_IS_VIRTUAL, CUDNN_TYPE_BOOLEAN, 1, &yes);
    }
    CALL(graph, cudnnBackendFinalize(d));
    value.descriptor = d;
    return value;
}

struct cudnn_value cudnn_tensor(struct cudnn_graph *graph, int64_t uid, cudnnDataType_t type,
                                const int64_t dim[CUDNN_DIMS], const int64_t stride[CUDNN_DIMS])
{
    return value_new(graph, VALUE_MEMORY, uid, type, dim, stride);
}

struct cudnn_value cudnn_scalar(struct cudnn_graph *graph, int64_t uid, cudnnDataType_t type)
{
    const int64_t ones[CUDNN_DIMS] = {1, 1, 1, 1};

    return value_new(graph, VALUE_SCALAR, uid, type, ones, ones);
}

struct cudnn_value cudnn_virtual(struct cudnn_graph *graph, cudnnDataType_t type,
                                 const int64_t dim[CUDNN_DIMS])
{
    const int64_t stride[CUDNN_DIMS] = {dim[1] * dim[2] * dim[3], dim[2] * dim[3], dim[3], 1};

    return value_new(graph, VALUE_VIRTUAL, CUDNN_UIDS + graph->num_virtual++, type, dim, stride);
}

/* ---- operations ---- */

void cudnn_matmul(struct cudnn_graph *graph, struct cudnn_value c, struct cudnn_value a,
                  struct cudnn_value b)
{
    cudnnBackendDescriptor_t matmul = descriptor_new(graph, CUDNN_BACKEND_MATMUL_DESCRIPTOR);
    cudnnBackendDescriptor_t operation =
        descriptor_new(graph, CUDNN_BACKEND_OPERATION_MATMUL_DESCRIPTOR);

    set_type(graph, matmul, CUDNN_ATTR_MATMUL_COMP_TYPE, CUDNN_DATA_FLOAT);
    CALL(graph, cudnnBackendFinalize(matmul));
    set_descriptor(graph, operation, CUDNN_ATTR_OPERATION_MATMUL_ADESC, a.descriptor);
    set_descriptor(graph, operation, CUDNN_ATTR_OPERATION_MATMUL_BDESC, b.descriptor);
    set_descriptor(graph, operation, CUDNN_ATTR_OPERATION_MATMUL_CDESC, c.descriptor);
    set_descriptor(graph, operation, CUDNN_ATTR_OPERATION_MATMUL_DESC, matmul);
    finish_operation(graph, operation);
}

static cudnnBackendDescriptor_t pointwise_new(struct cudnn_graph *graph, cudnnPointwiseMode_t mode,
                                              cudnnDataType_t type)
{
    cudnnBackendDescriptor_t pointwise = descriptor_new(graph, CUDNN_BACKEND_POINTWISE_DESCRIPTOR);

    set(graph, pointwise, CUDNN_ATTR_POINTWISE_MODE, CUDNN_TYPE_POINTWISE_MODE, 1, &mode);
    set_type(graph, pointwise, CUDNN_ATTR_POINTWISE_MATH_PREC, type);
    return pointwise;
}

/* b and t may be none. */
static void add_pointwise(struct cudnn_graph *graph, cudnnBackendDescriptor_t pointwise,
                          struct cudnn_value y, struct cudnn_value x, struct cudnn_value b,
                          struct cudnn_value t)
{
    cudnnBackendDescriptor_t operation =
        descriptor_new(graph, CUDNN_BACKEND_OPERATION_POINTWISE_DESCRIPTOR);

    CALL(graph, cudnnBackendFinalize(pointwise));
    set_descriptor(graph, operation, CUDNN_ATTR_OPERATION_POINTWISE_PW_DESCRIPTOR, pointwise);
    set_descriptor(graph, operation, CUDNN_ATTR_OPERATION_POINTWISE_XDESC, x.descriptor);
    if (b.descriptor != NULL) {
        set_descriptor(graph, operation, CUDNN_ATTR_OPERATION_POINTWISE_BDESC, b.descriptor);
    }
    if (t.descriptor != NULL) {
        set_descriptor(graph, operation, CUDNN_ATTR_OPERATION_POINTWISE_TDESC, t.descriptor);
    }
    set_descriptor(graph, operation, CUDNN_ATTR_OPERATION_POINTWISE_YDESC, y.descriptor);
    finish_operation(graph, operation);
}

void cudnn_pointwise(struct cudnn_graph *graph, cudnnPointwiseMode_t mode, cudnnDataType_t type,
                     struct cudnn_value y, struct cudnn_value x, struct cudnn_value b)
{
    add_pointwise(graph, pointwise_new(graph, mode, type), y, x, b, (struct cudnn_value){0});
}

void cudnn_index(struct cudnn_graph *graph, struct cudnn_value y, struct cudnn_value x,
                 int64_t axis)
{
    cudnnBackendDescriptor_t pointwise =
        pointwise_new(graph, CUDNN_POINTWISE_GEN_INDEX, CUDNN_DATA_INT32);

    set_int64(graph, pointwise, CUDNN_ATTR_POINTWISE_AXIS, axis);
    add_pointwise(graph, pointwise, y, x, (struct cudnn_value){0}, (struct cudnn_value){0});
}

void cudnn_select(struct cudnn_graph *graph, struct cudnn_value y, struct cudnn_value condition,
                  struct cudnn_value x, struct cudnn_value otherwise)
{
    add_pointwise(graph, pointwise_new(graph, CUDNN_POINTWISE_BINARY_SELECT, CUDNN_DATA_FLOAT), y,
                  x, otherwise, condition);
}

void cudnn_reduce(struct cudnn_graph *graph, cudnnReduceTensorOp_t operation_, struct cudnn_value y,
                  struct cudnn_value x)
{
    cudnnBackendDescriptor_t reduction = descriptor_new(graph, CUDNN_BACKEND_REDUCTION_DESCRIPTOR);
    cudnnBackendDescriptor_t operation =
        descriptor_new(graph, CUDNN_BACKEND_OPERATION_REDUCTION_DESCRIPTOR);

    set_type(graph, reduction, CUDNN_ATTR_REDUCTION_COMP_TYPE, CUDNN_DATA_FLOAT);
    set(graph, reduction, CUDNN_ATTR_REDUCTION_OPERATOR, CUDNN_TYPE_REDUCTION_OPERATOR_TYPE, 1,
        &operation_);
    CALL(graph, cudnnBackendFinalize(reduction));
    set_descriptor(graph, operation, CUDNN_ATTR_OPERATION_REDUCTION_DESC, reduction);
    set_descriptor(graph, operation, CUDNN_ATTR_OPERATION_REDUCTION_XDESC, x.descriptor);
    set_descriptor(graph, operation, CUDNN_ATTR_OPERATION_REDUCTION_YDESC, y.descriptor);
    finish_operation(graph, operation);
}

struct cudnn_value cudnn_transpose(struct cudnn_graph *graph, cudnnDataType_t type,
                                   struct cudnn_value x)
{
    const int64_t dim[CUDNN_DIMS] = {x.dim[0], x.dim[1], x.dim[3], x.dim[2]};
    const int64_t stride[CUDNN_DIMS] = {x.stride[0], x.stride[1], x.stride[3], x.stride[2]};
    const struct cudnn_value y =
        value_new(graph, VALUE_VIRTUAL, CUDNN_UIDS + graph->num_virtual++, type, dim, stride);
    cudnnBackendDescriptor_t operation =
        descriptor_new(graph, CUDNN_BACKEND_OPERATION_RESHAPE_DESCRIPTOR);

    set_descriptor(graph, operation, CUDNN_ATTR_OPERATION_RESHAPE_XDESC, x.descriptor);
    set_descriptor(graph, operation, CUDNN_ATTR_OPERATION_RESHAPE_YDESC, y.descriptor);
    finish_operation(graph, operation);
    return y;
}

/* ---- plans ---- */

static cudnnBackendDescriptor_t operation_graph(struct cudnn_graph *graph, cudnnHandle_t handle)
{
    cudnnBackendDescriptor_t d = descriptor_new(graph, CUDNN_BACKEND_OPERATIONGRAPH_DESCRIPTOR);

    set(graph, d, CUDNN_ATTR_OPERATIONGRAPH_OPS, CUDNN_TYPE_BACKEND_DESCRIPTOR,
        graph->num_operations, graph->operations);
    set(graph, d, CUDNN_ATTR_OPERATIONGRAPH_HANDLE, CUDNN_TYPE_HANDLE, 1, &handle);
    CALL(graph, cudnnBackendFinalize(d));
    return d;
}

/* What the library proposes, best first. Returns how many. */
static int64_t propose(struct cudnn_graph *graph, cudnnHandle_t handle,
                       cudnnBackendDescriptor_t engines[ENGINES_TRIED])
{
    const cudnnBackendHeurMode_t mode = CUDNN_HEUR_MODE_A;
    const cudnnBackendDescriptor_t operations = operation_graph(graph, handle);
    cudnnBackendDescriptor_t d = descriptor_new(graph, CUDNN_BACKEND_ENGINEHEUR_DESCRIPTOR);
    int64_t count = 0;

    set_descriptor(graph, d, CUDNN_ATTR_ENGINEHEUR_OPERATION_GRAPH, operations);
    set(graph, d, CUDNN_ATTR_ENGINEHEUR_MODE, CUDNN_TYPE_HEUR_MODE, 1, &mode);
    CALL(graph, cudnnBackendFinalize(d));
    for (int i = 0; i < ENGINES_TRIED; i++) {
        engines[i] = descriptor_new(graph, CUDNN_BACKEND_ENGINECFG_DESCRIPTOR);
    }
    CALL(graph,
         cudnnBackendGetAttribute(d, CUDNN_ATTR_ENGINEHEUR_RESULTS, CUDNN_TYPE_BACKEND_DESCRIPTOR,
                                  ENGINES_TRIED, &count, engines));
    return graph->failed == NULL ? count : 0;
}

static void destroy(const struct cudnn_library *library, cudnnBackendDescriptor_t descriptor)
{
    if (descriptor != NULL) {
        library->cudnnBackendDestroyDescriptor(descriptor);
    }
}

void cudnn_plan_destroy(const struct cudnn_library *library, struct cudnn_plan *plan)
{
    destroy(library, plan->descriptor);
    plan->descriptor = NULL;
}

/* A proposal may still be refused here. */
static struct cudnn_plan plan_from(struct cudnn_graph *graph, cudnnHandle_t handle,
                                   cudnnBackendDescriptor_t engine)
{
    struct cudnn_plan plan = {NULL, 0};

    CALL(graph,
         cudnnBackendCreateDescriptor(CUDNN_BACKEND_EXECUTION_PLAN_DESCRIPTOR, &plan.descriptor));
    set_descriptor(graph, plan.descriptor, CUDNN_ATTR_EXECUTION_PLAN_ENGINE_CONFIG, engine);
    set(graph, plan.descriptor, CUDNN_ATTR_EXECUTION_PLAN_HANDLE, CUDNN_TYPE_HANDLE, 1, &handle);
    CALL(graph, cudnnBackendFinalize(plan.descriptor));
    CALL(graph, cudnnBackendGetAttribute(plan.descriptor, CUDNN_ATTR_EXECUTION_PLAN_WORKSPACE_SIZE,
                                         CUDNN_TYPE_INT64, 1, NULL, &plan.workspace_bytes));
    if (graph->failed != NULL) {
        cudnn_plan_destroy(graph->library, &plan);
    }
    return plan;
}

struct cudnn_plan cudnn_graph_finish(struct cudnn_graph *graph, cudnnHandle_t handle)
{
    cudnnBackendDescriptor_t engines[ENGINES_TRIED];
    const int64_t count = propose(graph, handle, engines);
    struct cudnn_plan plan = {NULL, 0};

    for (int64_t i = 0; i < count && plan.descriptor == NULL; i++) {
        graph->failed = NULL;
        plan = plan_from(graph, handle, engines[i]);
    }
    if (plan.descriptor == NULL) {
        error_set("cuDNN %zu: %s: %s", graph->library->cudnnGetVersion(),
                  graph->failed != NULL ? graph->failed : "no engine",
                  graph->library->cudnnGetErrorString(graph->status));
    }
    for (int i = 0; i < graph->num_kept; i++) {
        destroy(graph->library, graph->kept[i]);
    }
    graph->num_kept = 0;
    return plan;
}

void cudnn_plan_run(const struct cudnn_library *library, const struct cudnn_plan *plan,
                    cudnnHandle_t handle, int num_uids, const int64_t *uids, void **addresses,
                    void *workspace)
{
    struct cudnn_graph pack = {.library = library};
    cudnnBackendDescriptor_t d = descriptor_new(&pack, CUDNN_BACKEND_VARIANT_PACK_DESCRIPTOR);

    set(&pack, d, CUDNN_ATTR_VARIANT_PACK_UNIQUE_IDS, CUDNN_TYPE_INT64, num_uids, uids);
    set(&pack, d, CUDNN_ATTR_VARIANT_PACK_DATA_POINTERS, CUDNN_TYPE_VOID_PTR, num_uids, addresses);
    set(&pack, d, CUDNN_ATTR_VARIANT_PACK_WORKSPACE, CUDNN_TYPE_VOID_PTR, 1, &workspace);
    CALL(&pack, cudnnBackendFinalize(d));
    CALL(&pack, cudnnBackendExecute(handle, plan->descriptor, d));
    CHECK(pack.failed == NULL, "cuDNN: %s: %s", pack.failed,
          library->cudnnGetErrorString(pack.status));
    destroy(library, d);
}
#endif
