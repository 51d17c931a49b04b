// Vectors of floats of this processor's width, and what all kernels share.
//
// Everything here and in the kernels is batch-invariant by construction: each output is one chain of operations in an
// order that depends on its own row only, never on how many rows are computed beside it, or by how many threads. The
// compiler may not fuse multiplications and additions on its own (`-ffp-contract=off`): it fused them in one instance
// of a template and not in the instance for another number of rows. `fma` fuses them explicitly.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_FEATURE_FMA)
#include <arm_neon.h>
#endif

#if defined(__AVX512F__)
constexpr int VL = 16;
#elif defined(__AVX2__)
constexpr int VL = 8;
#else
constexpr int VL = 4;
#endif

typedef float vf __attribute__((vector_size(VL * 4)));
typedef int32_t vi __attribute__((vector_size(VL * 4)));

static inline vf load(const float* p) { vf v; std::memcpy(&v, p, sizeof v); return v; }
static inline void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }
static inline vf splat(float x) { return x - vf{}; }

// a * b + c, rounded once where the processor can.
static inline vf fma(vf a, vf b, vf c) {
#if defined(__AVX512F__)
    return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__) && defined(__FMA__)
    return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__ARM_FEATURE_FMA)
    return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}

// e^x for x <= 0, within 2 units in the last place; 0 below -87. After Cephes' expf (Moshier).
static inline vf exp_negative(vf x) {
    const vi tiny = x < splat(-87.0f);
    x = tiny ? splat(-87.0f) : x;
    const vf scaled = fma(x, splat(1.44269504088896341f), splat(-0.5f));
    const vi n = __builtin_convertvector(scaled, vi);  // towards zero: x <= 0, so this rounds to nearest
    const vf whole = __builtin_convertvector(n, vf);
    const vf r = fma(whole, splat(2.12194440e-4f), fma(whole, splat(-0.693359375f), x));
    vf y = splat(1.9875691500e-4f);
    for (const float next : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
        y = fma(y, r, splat(next));
    y = fma(y, r * r, r + splat(1.0f));
    const vi power = (n + 127) << 23;
    vf two_to_n;
    std::memcpy(&two_to_n, &power, sizeof two_to_n);
    return tiny ? vf{} : y * two_to_n;
}
