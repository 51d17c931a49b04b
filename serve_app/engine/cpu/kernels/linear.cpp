// Float32 matrix products with packed weights, and what is best done while a product's rows are still at hand.
//
// Vectors run over columns, so no sum is ever split over lanes, threads or blocks by the shape of the batch.
// Layout of weights: [ceil(n / NR)][k][NR], padded with zeros.

#include "kernels.h"
#include "vectors.h"

#if defined(__AVX512F__)
constexpr int MR = 12;  // rows at once
#else
constexpr int MR = 6;
#endif
constexpr int NV = 2;              // vectors of a panel of weights
constexpr int NR = NV * VL;        // columns of a panel
constexpr int ROWS = 96;           // at most so many rows of x share a pass over the weights,
constexpr int64_t X_FLOATS = 131072;  // and fewer where they would take more than this of the second-level cache
constexpr int LINE = 16;           // floats of a cache line
constexpr int NEAR = 16;           // rows of the panel ahead that are fetched into the first-level cache

extern "C" int64_t serve_app_panel_columns() { return NR; }

// out [M][NR] = x [M, k] times a panel. Meanwhile the panel that comes next is fetched into the second-level cache,
// LINES lines each `stride` floats: it is read from memory evenly over all blocks of rows that use the one before it,
// instead of in a burst by the first of them. On one core with AVX-512, weights [1536, 576]: 194 us instead of 246 at
// 1 row, 243 instead of 370 at 8, 418 instead of 579 at 32 (without any prefetching).
template <int M, int LINES>
static void multiply(const float* x, int64_t ldx, const float* w, int64_t k, const float* next, int64_t stride,
                     float* out) {
    vf acc[M][NV];
    for (int m = 0; m < M; ++m)
        for (int v = 0; v < NV; ++v) acc[m][v] = vf{};
    for (int64_t i = 0; i < k; ++i, next += stride) {
        vf weights[NV];
        for (int v = 0; v < NV; ++v) weights[v] = load(w + i * NR + v * VL);
        __builtin_prefetch(next, 0, 2);
        for (int c = 0; c < NR; c += LINE) __builtin_prefetch(w + (i + NEAR) * NR + c, 0, 3);
        if (LINES > 1) __builtin_prefetch(next + LINE, 0, 2);  // apart from the first: 204 us instead of 219 at 1 row
        for (int m = 0; m < M; ++m) {
            const vf value = splat(x[m * ldx + i]);
            for (int v = 0; v < NV; ++v) acc[m][v] += value * weights[v];
        }
    }
    for (int m = 0; m < M; ++m)
        for (int v = 0; v < NV; ++v) store(out + m * NR + v * VL, acc[m][v]);
}

typedef void (*Multiply)(const float*, int64_t, const float*, int64_t, const float*, int64_t, float*);
template <int... M>
struct Table {
    Multiply alone[sizeof...(M)] = {multiply<M, (NR + LINE - 1) / LINE>...};  // one block fetches all of the next panel
    Multiply shared[sizeof...(M)] = {multiply<M, 1>...};
};
#if defined(__AVX512F__)
static const Table<1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12> PANEL;
#else
static const Table<1, 2, 3, 4, 5, 6> PANEL;
#endif

// Some of the rows of x, in blocks, times a panel: out [rows][NR].
static void multiply_rows(const float* x, int64_t ldx, int64_t rows, const float* w, int64_t k, const float* next,
                          float* out) {
    const int64_t blocks = (rows + MR - 1) / MR, stride = NR / blocks;
    const Multiply* multiply_block = blocks == 1 ? PANEL.alone : PANEL.shared;
    for (int64_t block = 0; block < blocks; ++block) {
        const int64_t from = rows * block / blocks, to = rows * (block + 1) / blocks;
        multiply_block[to - from - 1](x + from * ldx, ldx, w, k, next + k * stride * block, stride, out + from * NR);
    }
}

// How many of m rows share a pass, evenly.
static inline int64_t rows_at_once(int64_t m, int64_t k) {
    const int64_t most = std::clamp<int64_t>(X_FLOATS / k, ROWS / 2, ROWS), passes = (m + most - 1) / most;
    return (m + passes - 1) / passes;
}

// w [n, k] with row stride ld and column stride step -> packed.
extern "C" void serve_app_pack(const float* w, int64_t ld, int64_t step, int64_t n, int64_t k, float* packed) {
#pragma omp parallel for schedule(static)
    for (int64_t panel = 0; panel < (n + NR - 1) / NR; ++panel)
        for (int64_t i = 0; i < k; ++i)
            for (int64_t c = 0; c < NR; ++c) {
                const int64_t row = panel * NR + c;
                packed[(panel * k + i) * NR + c] = row < n ? w[row * ld + i * step] : 0.0f;
            }
}

static inline int64_t panels_of(int64_t n) { return (n + NR - 1) / NR; }

// All products of x [m, k], whose rows are ldx apart, in one pass.
extern "C" void serve_app_linear(const float* x, int64_t ldx, const Part* parts, int64_t count, int64_t m, int64_t k) {
    const int64_t at_once = rows_at_once(std::max<int64_t>(m, 1), k);
    int64_t panels = 0;
    for (int64_t p = 0; p < count; ++p) panels += panels_of(parts[p].n);
#pragma omp parallel
    for (int64_t first = 0; first < m; first += at_once) {
        const int64_t rows = std::min(at_once, m - first);
#pragma omp for schedule(static) nowait
        for (int64_t panel = 0; panel < panels; ++panel) {
            const Part* part = parts;
            int64_t own = panel;
            for (; own >= panels_of(part->n); ++part) own -= panels_of(part->n);
            const float* w = part->packed + own * k * NR;
            const float* next = own + 1 < panels_of(part->n) ? w + k * NR : panel + 1 < panels ? part[1].packed : w;
            const int64_t columns = std::min<int64_t>(NR, part->n - own * NR);
            const float* bias = part->bias ? part->bias + own * NR : nullptr;
            float out[ROWS * NR];
            multiply_rows(x + first * ldx, ldx, rows, w, k, next, out);
            for (int64_t row = 0; row < rows; ++row) {
                const float* result = out + row * NR;
                const int64_t at = (first + row) * part->n + own * NR;
                float* y = part->y + at;
                for (int64_t c = 0; c < columns; ++c) y[c] = bias ? result[c] + bias[c] : result[c];
                if (part->add)
                    for (int64_t c = 0; c < columns; ++c) y[c] += part->add[at + c];
            }
        }
    }
}

// x / (1 + e^-x)
static inline vf silu(vf x) {
    const vf e = exp_negative(x < vf{} ? x : -x), one = splat(1.0f);
    return x * (x < vf{} ? e : one) / (one + e);
}

// x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))
static inline vf gelu_tanh(vf x) {
    const vf one = splat(1.0f);
    const vf z = splat(0.7978845608028654f) * (x + splat(0.044715f) * x * x * x);
    const vf e = exp_negative(splat(-2.0f) * (z < vf{} ? -z : z));
    const vf tanh = (one - e) / (one + e);
    return splat(0.5f) * x * (one + (z < vf{} ? -tanh : tanh));
}

// y [m, n] = act(x gate^T + gate_bias) (x up^T + up_bias); activation 0 is SiLU, 1 the GELU by tanh.
extern "C" void serve_app_gated(const float* x, int64_t ldx, const Part* gate, const Part* up, int64_t activation,
                                float* y, int64_t m, int64_t k) {
    const int64_t n = gate->n, panels = panels_of(n), at_once = rows_at_once(std::max<int64_t>(m, 1), k);
#pragma omp parallel
    for (int64_t first = 0; first < m; first += at_once) {
        const int64_t rows = std::min(at_once, m - first);
#pragma omp for schedule(static) nowait
        for (int64_t panel = 0; panel < panels; ++panel) {
            const float *w[2] = {gate->packed + panel * k * NR, up->packed + panel * k * NR};
            const float* next[2] = {w[1], panel + 1 < panels ? w[0] + k * NR : w[1]};
            float out[2][ROWS * NR];
            for (int half = 0; half < 2; ++half)
                multiply_rows(x + first * ldx, ldx, rows, w[half], k, next[half], out[half]);
            const int64_t columns = std::min<int64_t>(NR, n - panel * NR);
            for (int64_t row = 0; row < rows; ++row)
                for (int64_t c = 0; c < columns; c += VL) {
                    float result[VL];
                    vf opening = load(out[0] + row * NR + c), rising = load(out[1] + row * NR + c);
                    const int64_t width = std::min<int64_t>(VL, columns - c);
                    for (int64_t i = 0; i < width; ++i) {
                        if (gate->bias) opening[i] += gate->bias[panel * NR + c + i];
                        if (up->bias) rising[i] += up->bias[panel * NR + c + i];
                    }
                    store(result, (activation ? gelu_tanh(opening) : silu(opening)) * rising);
                    std::memcpy(y + (first + row) * n + panel * NR + c, result, width * sizeof(float));
                }
        }
    }
}
