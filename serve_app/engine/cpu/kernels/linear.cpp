// Float32 matrix products with packed weights, fused with the additions and activations that follow them.
//
// Vectors run over columns, so no sum is ever split over lanes, threads or blocks by the shape of the batch.

#include <utility>

#include "kernels.h"
#include "weights.h"

#if defined(__AVX512F__)
constexpr int MR = 12;  // rows at once
#else
constexpr int MR = 6;
#endif
constexpr int ROWS = 96;              // at most so many rows of x share a pass over the weights,
constexpr int64_t X_FLOATS = 131072;  // and fewer where they would take more than this of the second-level cache
constexpr int LINE_BYTES = 64, LINE = 16;  // bytes and floats of a cache line
constexpr int64_t SHARED_K = 1024;    // rows of a panel that are made float32 at once, where blocks of rows share them
constexpr int NEAR = 16;              // rows of the panel ahead that are fetched into the first-level cache

// out [M][NR] = x [M, k] times a panel; with `more`, the product is added to out. KEEP: the weights are also written to
// `kept` [k][NR], for the next blocks of rows; between the products this costs next to nothing.
//
// Meanwhile the next panel is fetched into the second-level cache, a line each `stride` bytes. So it is read evenly
// while all blocks of rows use this panel, instead of in a burst by the first block that uses the next one. On one core
// with AVX-512, float32 weights [1536, 576]: 194 us instead of 246 without prefetching at 1 row, 243 instead of 370 at
// 8, 418 instead of 579 at 32.
template <class Reader, int M, bool KEEP>
static void multiply(const float* x, int64_t ldx, const uint8_t* w, int64_t k, const uint8_t* next, int64_t stride,
                     float* out, bool more, float* kept) {
    constexpr bool wide = Reader::BLOCK == 0;  // a row of the panel is one cache line or more
    vf acc[M][NV];
    for (int m = 0; m < M; ++m)
        for (int v = 0; v < NV; ++v) acc[m][v] = more ? load(out + m * NR + v * VL) : vf{};
    Reader reader(w);
    for (int64_t from = 0; from < k;) {
        reader.begin_block();
        for (const int64_t to = Reader::BLOCK ? std::min(k, from + Reader::BLOCK) : k; from < to; ++from, next += stride) {
            vf weights[NV];
            reader.next(weights);
            if (KEEP)
                for (int v = 0; v < NV; ++v) store(kept + from * NR + v * VL, weights[v]);
            __builtin_prefetch(next, 0, 2);
            if (wide)
                for (int c = 0; c < NR; c += LINE) __builtin_prefetch(reader.at + NEAR * NR + c, 0, 3);
            if (stride > LINE_BYTES) __builtin_prefetch(next + LINE_BYTES, 0, 2);  // apart: 204 us instead of 219 at 1 row
            for (int m = 0; m < M; ++m) {
                const vf value = splat(x[m * ldx + from]);
                for (int v = 0; v < NV; ++v) acc[m][v] = fma(value, weights[v], acc[m][v]);
            }
        }
    }
    for (int m = 0; m < M; ++m)
        for (int v = 0; v < NV; ++v) store(out + m * NR + v * VL, acc[m][v]);
}

typedef void (*Multiply)(const float*, int64_t, const uint8_t*, int64_t, const uint8_t*, int64_t, float*, bool, float*);
template <class Reader, bool KEEP, int... M>
static Multiply multiply_for(std::integer_sequence<int, M...>, int64_t rows) {
    static constexpr Multiply of[] = {multiply<Reader, M + 1, KEEP>...};
    return of[rows - 1];
}

static inline int64_t blocks_of(int64_t rows) { return (rows + MR - 1) / MR; }

// The panels of a packed matrix.
struct Panels {
    const uint8_t* first;
    int64_t form, bytes, k;
    explicit Panels(const Part& part, int64_t inner)
        : first(part.packed), form(part.form), bytes(panel_bytes(form, inner)), k(inner) {}
    const uint8_t* operator[](int64_t panel) const { return first + panel * bytes; }
};

// Rows of x, in blocks, times one panel: out [rows][NR]. The first block makes the weights float32 for the others.
static void multiply_rows(const float* x, int64_t ldx, int64_t rows, const Panels& w, int64_t panel,
                          const uint8_t* next, float* out) {
    static thread_local float kept[SHARED_K * NR];
    const std::make_integer_sequence<int, MR> up_to_all{};
    const int64_t blocks = blocks_of(rows), stride = std::min<int64_t>(w.bytes / (w.k * blocks), 2 * LINE_BYTES);
    with_reader(w.form, [&](auto* kind) {
        using Reader = std::remove_reference_t<decltype(*kind)>;
        const bool keep = blocks > 1 && !std::is_same<Reader, Float32Reader>::value;
        const int64_t at_once = keep ? SHARED_K : w.k;
        for (int64_t first = 0; first < w.k; first += at_once) {
            const int64_t k = std::min(at_once, w.k - first);
            const uint8_t* weights = w[panel] + Reader::panel_bytes(first);
            for (int64_t block = 0; block < blocks; ++block, next += k * stride) {
                const int64_t from = rows * block / blocks, to = rows * (block + 1) / blocks;
                Multiply multiply_block = multiply_for<Reader, false>(up_to_all, to - from);
                if (keep) multiply_block = block == 0 ? multiply_for<Reader, true>(up_to_all, to - from)
                                                      : multiply_for<Float32Reader, false>(up_to_all, to - from);
                const uint8_t* from_here = keep && block > 0 ? reinterpret_cast<const uint8_t*>(kept) : weights;
                multiply_block(x + from * ldx + first, ldx, from_here, k, next, stride, out + from * NR, first > 0, kept);
            }
        }
    });
}

// How many rows share a pass over the weights, with m rows spread evenly over passes.
static inline int64_t rows_at_once(int64_t m, int64_t k) {
    const int64_t most = std::clamp<int64_t>(X_FLOATS / k, ROWS / 2, ROWS), passes = (m + most - 1) / most;
    return (m + passes - 1) / passes;
}

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
            const Panels w(*part, k);
            const uint8_t* next = w[own];
            if (own + 1 < panels_of(part->n)) next = w[own + 1];
            else if (panel + 1 < panels) next = part[1].packed;
            const int64_t columns = std::min<int64_t>(NR, part->n - own * NR);
            const float* bias = part->bias ? part->bias + own * NR : nullptr;
            float out[ROWS * NR];
            multiply_rows(x + first * ldx, ldx, rows, w, own, next, out);
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
            const Panels opening_w(*gate, k), rising_w(*up, k);
            float out[2][ROWS * NR];
            multiply_rows(x + first * ldx, ldx, rows, opening_w, panel, rising_w[panel], out[0]);
            multiply_rows(x + first * ldx, ldx, rows, rising_w, panel,
                          panel + 1 < panels ? opening_w[panel + 1] : rising_w[panel], out[1]);
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
