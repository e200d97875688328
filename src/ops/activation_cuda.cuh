/* activation_cuda.cuh - the activations of one element, for elementwise kernels and for the
 * epilogues of the experts' products. Formulas as in activation_cpu.c. */
#ifndef CADRE_OPS_ACTIVATION_CUDA_CUH
#define CADRE_OPS_ACTIVATION_CUDA_CUH

#include "ops/ops_cuda_internal.cuh"

/* FAST: by the fast exponential and quotient, a few units of the last place of f32 off. For results
 * that are rounded to bf16, where the epilogue of a product waits for it. */
template <bool FAST> __device__ inline float sigmoid(float x)
{
    if constexpr (FAST) {
        float power, quotient;

        asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(-1.442695041f * x));
        asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(quotient) : "f"(1.0f + power));
        return quotient;
    }
    return 1.0f / (1.0f + expf(-x));
}

/* tanh-GELU: 0.5 x (1 + tanh(u)) = x sigmoid(2u), 2u = 2 sqrt(2/pi) (x + 0.044715 x^3). */
#define GELU_LINEAR 1.595769122f
#define GELU_CUBIC (1.595769122f * 0.044715f)

/* x is the gate of SwiGLU, up its other half; the other kinds have x alone. */
template <enum activation_kind kind, bool FAST = false>
__device__ inline float activation_value(float x, float up)
{
    if constexpr (kind == ACTIVATION_SWIGLU) {
        return x * sigmoid<FAST>(x) * up;
    } else if constexpr (kind == ACTIVATION_GELU) {
        return x * sigmoid<FAST>(x * (GELU_LINEAR + GELU_CUBIC * x * x));
    } else {
        return x > 0.0f ? x * x : 0.0f;
    }
}

struct activation_slopes {
    float value, d_x, d_up;
};

/* d silu(g) = s (1 + g (1 - s)); with v = 2u: d (x sigmoid(v)) = s + x s (1 - s) v'. */
template <enum activation_kind kind, bool FAST = false>
__device__ inline struct activation_slopes activation_slopes_of(float x, float up)
{
    if constexpr (kind == ACTIVATION_SWIGLU) {
        const float s = sigmoid<FAST>(x), silu = x * s;

        return {silu * up, up * (s + silu * (1.0f - s)), silu};
    } else if constexpr (kind == ACTIVATION_GELU) {
        const float s = sigmoid<FAST>(x * (GELU_LINEAR + GELU_CUBIC * x * x));
        const float slope = GELU_LINEAR + 3.0f * GELU_CUBIC * x * x;

        return {x * s, s + x * s * (1.0f - s) * slope, 0.0f};
    } else {
        const float positive = x > 0.0f ? x : 0.0f;

        return {positive * positive, 2.0f * positive, 0.0f};
    }
}

#endif
