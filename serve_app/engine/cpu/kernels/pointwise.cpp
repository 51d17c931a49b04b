// The operations between matrix products: norms and rotary positions. Each takes one pass over the rows, where a
// composition of tensor operations takes ten.

#include "kernels.h"
#include "vectors.h"

constexpr int64_t PARALLEL = 32768;  // floats from which a second thread gains more than waking it costs

static inline float sum(vf v) {
    float total = 0.0f;
    for (int i = 0; i < VL; ++i) total += v[i];
    return total;
}

// y [rows, dim] = x / sqrt(mean(x^2) + eps) * scale. x and y may be the same.
extern "C" void serve_app_rms_norm(const float* x, const float* scale, float eps, float* y, int64_t rows, int64_t dim) {
#pragma omp parallel for schedule(static) if (rows * dim >= PARALLEL)
    for (int64_t row = 0; row < rows; ++row) {
        const float* from = x + row * dim;
        float* to = y + row * dim;
        vf squares[4] = {};
        int64_t i = 0;
        for (; i + 4 * VL <= dim; i += 4 * VL)
            for (int v = 0; v < 4; ++v) {
                const vf some = load(from + i + v * VL);
                squares[v] = fma(some, some, squares[v]);
            }
        float rest = 0.0f;
        for (; i < dim; ++i) rest += from[i] * from[i];
        const float mean = (sum((squares[0] + squares[1]) + (squares[2] + squares[3])) + rest) / static_cast<float>(dim);
        const float inverse = 1.0f / std::sqrt(mean + eps);
        for (i = 0; i < dim; ++i) to[i] = from[i] * inverse * scale[i];
    }
}

// In place, for each of `heads` heads of x [tokens, heads, dim]: x cos + rotate_half(x) sin, with cos and sin
// [tokens, dim] and rotate_half(a, b) = (-b, a) of the two halves of a head.
extern "C" void serve_app_rotate(float* x, const float* cos, const float* sin, int64_t tokens, int64_t heads,
                                 int64_t dim) {
    const int64_t half = dim / 2;
#pragma omp parallel for schedule(static) if (tokens * heads * dim >= PARALLEL)
    for (int64_t token = 0; token < tokens; ++token) {
        const float *c = cos + token * dim, *s = sin + token * dim;
        for (int64_t head = 0; head < heads; ++head) {
            float* a = x + (token * heads + head) * dim;
            float* b = a + half;
#pragma omp simd
            for (int64_t d = 0; d < half; ++d) {
                const float low = a[d], high = b[d];
                a[d] = low * c[d] - high * s[d];
                b[d] = high * c[half + d] + low * s[half + d];
            }
        }
    }
}
