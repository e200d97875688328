/* hopper_cuda.cuh - Hopper's asynchronous machine, one function an instruction: barriers in shared
 * memory (mbarrier), the copy engine (TMA), the matrix units (wgmma); and
 * on the host, how the copy engine is told where a tensor lies.
 *
 * Techniques after CUTLASS's warp-specialised kernels and fast.cu (reference/performance.md 3). */
#ifndef CADRE_OPS_HOPPER_CUDA_CUH
#define CADRE_OPS_HOPPER_CUDA_CUH

#include <cuda.h>

#include "ops/ops_cuda_internal.cuh"

__device__ inline uint32_t shared_address(const void *p)
{
    return (uint32_t)__cvta_generic_to_shared(p);
}

/* ---- barriers: a phase ends when `count` arrivals and all expected bytes have come ---- */

__device__ inline void barrier_init(uint64_t *barrier, int count)
{
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
                 "r"(count));
}

/* Before the barriers' first use, by the thread that made them. */
__device__ inline void barrier_init_fence(void)
{
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ inline void barrier_expect(uint64_t *barrier, int num_bytes)
{
    asm volatile(
        "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
        "r"(num_bytes)
        : "memory");
}

__device__ inline void barrier_arrive(uint64_t *barrier)
{
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
                 : "memory");
}

/* Once the calling thread's copies (copy_async) have landed. */
__device__ inline void barrier_arrive_after_copies(uint64_t *barrier)
{
    asm volatile(
        "cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(barrier))
        : "memory");
}

/* Waits for the phase of this parity. A wait for the phase before the current one passes. */
__device__ inline void barrier_wait(uint64_t *barrier, int parity)
{
    asm volatile("{\n"
                 ".reg .pred p;\n"
                 "again:\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
                 "@p bra done;\n"
                 "bra again;\n"
                 "done:\n"
                 "}\n" ::"r"(shared_address(barrier)),
                 "r"(parity)
                 : "memory");
}

/* Barrier `id` of the block among num_threads threads. */
__device__ inline void named_barrier_sync(int id, int num_threads)
{
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(num_threads) : "memory");
}

/* Ordinary stores to shared memory before it are seen by the copy engine and the matrix units. */
__device__ inline void fence_async(void)
{
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

/* The calling thread alone. */
__device__ inline void pause(long long cycles)
{
    const long long begin = clock64();

    while (clock64() - begin < cycles) {
        __nanosleep(50);
    }
}

/* ---- the copy engine ---- */

__device__ inline void tma_load_2d(void *to, const CUtensorMap *map, uint64_t *barrier, int x,
                                   int y)
{
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%3, %4}], [%2];" ::"r"(shared_address(to)),
                 "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y)
                 : "memory");
}

__device__ inline void tma_load_3d(void *to, const CUtensorMap *map, uint64_t *barrier, int x,
                                   int y, int z)
{
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%3, %4, %5}], [%2];" ::"r"(shared_address(to)),
                 "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y), "r"(z)
                 : "memory");
}

__device__ inline void tma_load_4d(void *to, const CUtensorMap *map, uint64_t *barrier, int x,
                                   int y, int z, int w)
{
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(shared_address(to)),
                 "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y), "r"(z), "r"(w)
                 : "memory");
}

__device__ inline void tma_store_4d(const CUtensorMap *map, const void *from, int x, int y, int z,
                                    int w)
{
    asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group "
                 "[%0, {%2, %3, %4, %5}], [%1];" ::"l"(map),
                 "r"(shared_address(from)), "r"(x), "r"(y), "r"(z), "r"(w)
                 : "memory");
}

/* For what is touched once: it leaves the L2 cache first. */
__device__ inline uint64_t policy_once(void)
{
    uint64_t policy;

    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

__device__ inline void tma_load_5d_once(void *to, const CUtensorMap *map, uint64_t *barrier, int x,
                                        int y, int z, int w, int v, uint64_t policy)
{
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes"
        ".L2::cache_hint [%0], [%1, {%3, %4, %5, %6, %7}], [%2], %8;" ::"r"(shared_address(to)),
        "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y), "r"(z), "r"(w), "r"(v), "l"(policy)
        : "memory");
}

__device__ inline void tma_store_5d_once(const CUtensorMap *map, const void *from, int x, int y,
                                         int z, int w, int v, uint64_t policy)
{
    asm volatile("cp.async.bulk.tensor.5d.global.shared::cta.tile.bulk_group.L2::cache_hint "
                 "[%0, {%2, %3, %4, %5, %6}], [%1], %7;" ::"l"(map),
                 "r"(shared_address(from)), "r"(x), "r"(y), "r"(z), "r"(w), "r"(v), "l"(policy)
                 : "memory");
}

/* num_bytes, a multiple of 16, that lie together. */
__device__ inline void bulk_load(void *to, const void *from, int num_bytes, uint64_t *barrier)
{
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
                 "[%0], [%1], %2, [%3];" ::"r"(shared_address(to)),
                 "l"(from), "r"(num_bytes), "r"(shared_address(barrier))
                 : "memory");
}

__device__ inline void bulk_store(void *to, const void *from, int num_bytes)
{
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to),
                 "r"(shared_address(from)), "r"(num_bytes)
                 : "memory");
}

/* Closes a group of the calling thread's stores. */
__device__ inline void tma_commit(void)
{
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

/* Until the shared memory of all but the last PENDING of the calling thread's groups was read. */
template <int PENDING> __device__ inline void tma_wait_read(void)
{
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(PENDING) : "memory");
}

/* Into the L2 cache only. */
__device__ inline void tma_prefetch_5d(const CUtensorMap *map, int x, int y, int z, int w, int v)
{
    asm volatile(
        "cp.async.bulk.prefetch.tensor.5d.L2.global.tile [%0, {%1, %2, %3, %4, %5}];" ::"l"(map),
        "r"(x), "r"(y), "r"(z), "r"(w), "r"(v)
        : "memory");
}

/* 16 bytes by the calling thread, zeros where num_bytes is 0. */
__device__ inline void copy_async(void *to, const void *from, int num_bytes)
{
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(to)),
                 "l"(from), "r"(num_bytes)
                 : "memory");
}

/* Four matrices of 8 x 8 bf16, in the layout of the accumulators; lane 8 i + r names where row r of
 * matrix i goes. */
__device__ inline void matrices_store(void *row, uint32_t a, uint32_t b, uint32_t c, uint32_t d)
{
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                     shared_address(row)),
                 "r"(a), "r"(b), "r"(c), "r"(d)
                 : "memory");
}

/* ---- the matrix units ---- */

__device__ inline void wgmma_begin(void)
{
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ inline void wgmma_commit(void)
{
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

template <int PENDING> __device__ inline void wgmma_wait(void)
{
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

/* A tile in shared memory as wgmma reads it, in swizzled lines of 128 bytes. Along k (a line is 64
 * k of one row of M or N): groups of 8 lines. By rows (a line is one k, 64 of M or N): groups of 8
 * k, and boxes of 64 of M or N, box_bytes apart. */
template <bool BY_ROWS> __device__ inline uint64_t tile_descriptor(const void *tile, int box_bytes)
{
    const uint64_t address = (shared_address(tile) & 0x3ffff) >> 4;
    const uint64_t leading = BY_ROWS ? box_bytes >> 4 : 1, stride = 1024 >> 4;

    return address | leading << 16 | stride << 32 | (uint64_t)1 << 62;
}

/* d [64,256] (+)= a [64,16] b [16,256]. */
template <bool A_BY_ROWS, bool B_BY_ROWS>
__device__ inline void wgmma(float (&d)[128], uint64_t a, uint64_t b, bool add)
{
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "setp.ne.b32 p, %130, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
        "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
        "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
        "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, "
        "%111, "
        "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, "
        "%127"
        "}, %128, %129, p, 1, 1, %131, %132;\n"
        "}\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),
          "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]),
          "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]),
          "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]),
          "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]),
          "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]),
          "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]),
          "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]),
          "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]),
          "+f"(d[63]), "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67]), "+f"(d[68]), "+f"(d[69]),
          "+f"(d[70]), "+f"(d[71]), "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75]), "+f"(d[76]),
          "+f"(d[77]), "+f"(d[78]), "+f"(d[79]), "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83]),
          "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87]), "+f"(d[88]), "+f"(d[89]), "+f"(d[90]),
          "+f"(d[91]), "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95]), "+f"(d[96]), "+f"(d[97]),
          "+f"(d[98]), "+f"(d[99]), "+f"(d[100]), "+f"(d[101]), "+f"(d[102]), "+f"(d[103]),
          "+f"(d[104]), "+f"(d[105]), "+f"(d[106]), "+f"(d[107]), "+f"(d[108]), "+f"(d[109]),
          "+f"(d[110]), "+f"(d[111]), "+f"(d[112]), "+f"(d[113]), "+f"(d[114]), "+f"(d[115]),
          "+f"(d[116]), "+f"(d[117]), "+f"(d[118]), "+f"(d[119]), "+f"(d[120]), "+f"(d[121]),
          "+f"(d[122]), "+f"(d[123]), "+f"(d[124]), "+f"(d[125]), "+f"(d[126]), "+f"(d[127])
        : "l"(a), "l"(b), "r"(add ? 1 : 0), "n"(A_BY_ROWS ? 1 : 0), "n"(B_BY_ROWS ? 1 : 0));
}

/* d [64,128] (+)= a [64,16] b [16,128]. */
template <bool A_BY_ROWS, bool B_BY_ROWS>
__device__ inline void wgmma(float (&d)[64], uint64_t a, uint64_t b, bool add)
{
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "setp.ne.b32 p, %66, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
        "}, %64, %65, p, 1, 1, %67, %68;\n"
        "}\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),
          "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]),
          "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]),
          "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]),
          "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]),
          "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]),
          "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]),
          "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]),
          "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]),
          "+f"(d[63])
        : "l"(a), "l"(b), "r"(add ? 1 : 0), "n"(A_BY_ROWS ? 1 : 0), "n"(B_BY_ROWS ? 1 : 0));
}

/* ---- on the host ---- */

typedef CUresult encode_function(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *,
                                 const cuuint64_t *, const cuuint64_t *, const cuuint32_t *,
                                 const cuuint32_t *, CUtensorMapInterleave, CUtensorMapSwizzle,
                                 CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

/* From the driver, which is not linked. */
static inline encode_function *tensor_map_encode(void)
{
    static void *function;

    if (function == NULL) {
        cudaDriverEntryPointQueryResult found;

        CUDA_CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                                    cudaEnableDefault, &found));
        CHECK(found == cudaDriverEntryPointSuccess, "the driver has no cuTensorMapEncodeTiled");
    }
    return (encode_function *)function;
}

/* How the copy engine sees memory: num_dims dims, the last named first, of `stride_bytes` (the
 * first is packed), in boxes of 128 bytes of the first dim, swizzled in shared memory. */
struct tensor_view {
    enum dtype dtype;
    void *data;
    int num_dims;
    cuuint64_t dims[5], stride_bytes[4];
    cuuint32_t box[5];
};

static inline CUtensorMap tensor_map_of_view(const struct tensor_view *x)
{
    const cuuint32_t steps[5] = {1, 1, 1, 1, 1};
    CUtensorMap map;
    const CUresult result = tensor_map_encode()(
        &map,
        x->dtype == DTYPE_F32 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        (cuuint32_t)x->num_dims, x->data, x->dims, x->stride_bytes, x->box, steps,
        CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
        CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);

    CHECK(result == CUDA_SUCCESS, "no tensor map of %d dims, %lld x %lld: error %d", x->num_dims,
          (long long)x->dims[1], (long long)x->dims[0], (int)result);
    return map;
}

/* x (2 or 3 dims) in boxes of 128 bytes of a row (64 bf16, 32 f32) and box_rows rows. */
static inline CUtensorMap tensor_map_of(const struct tensor *x, int box_rows)
{
    const int last = x->num_dims - 1;
    const cuuint64_t element_bytes = (cuuint64_t)dtype_size_bytes(x->dtype);
    const cuuint64_t row_bytes = (cuuint64_t)x->dim[last] * element_bytes;
    const struct tensor_view view = {
        x->dtype,
        x->data,
        x->num_dims,
        {(cuuint64_t)x->dim[last], (cuuint64_t)x->dim[last - 1], (cuuint64_t)x->dim[0]},
        {row_bytes, row_bytes * (cuuint64_t)x->dim[last - 1]},
        {(cuuint32_t)(128 / element_bytes), (cuuint32_t)box_rows, 1}};

    return tensor_map_of_view(&view);
}

#endif
