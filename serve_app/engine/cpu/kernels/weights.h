// The forms in which float32 weights are kept, and how each gives a vector of them back.
//
// Many weights were 16 bit numbers once, or codes of 4 or 8 bits with a scale and an offset for each 16 or 32 of them,
// as in GGUF files. Such weights are kept in the smallest form from which every float32 value comes back bit for bit:
// the results are the same, and less memory is read.
//
// Layout of a matrix [n, k]: panels of NR columns (rows of the matrix, outputs of the product), padded with zeros. Each
// panel has k rows, one after the other. In forms with codes, a block of BLOCK rows begins with the columns' scales and
// offsets.
#pragma once

#include <type_traits>

#include "vectors.h"

constexpr int NV = 2;        // vectors of a panel
constexpr int NR = NV * VL;  // columns of a panel

enum Form : int64_t { FLOAT32, BFLOAT16, FLOAT16, CODES8_BY_16, CODES8_BY_32, CODES4_BY_16, CODES4_BY_32, FORMS };

// VL numbers as 32 bit integers. Compilers use one instruction for this only with intrinsics.
#if defined(__AVX512F__)
static inline vi widen(const int8_t* p) { return (vi)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)); }
static inline vi widen(const uint8_t* p) { return (vi)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)); }
static inline vi widen(const uint16_t* p) { return (vi)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)); }
#elif defined(__AVX2__)
static inline vi widen(const int8_t* p) { return (vi)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)); }
static inline vi widen(const uint8_t* p) { return (vi)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)); }
static inline vi widen(const uint16_t* p) { return (vi)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)); }
#else
template <class Number>
static inline vi widen(const Number* p) {
    vi wide;
    for (int i = 0; i < VL; ++i) wide[i] = p[i];
    return wide;
}
#endif

// To read a panel: make `Reader reader(panel)`, then call `reader.next(weights)` for each of its k rows, and
// `reader.begin_block()` before the first row of each block of BLOCK rows.

struct Float32Reader {
    static constexpr int64_t BLOCK = 0;  // no blocks
    static int64_t panel_bytes(int64_t k) { return k * NR * 4; }
    const float* at;
    explicit Float32Reader(const uint8_t* panel) : at(reinterpret_cast<const float*>(panel)) {}
    void begin_block() {}
    void next(vf* weights) {
        for (int v = 0; v < NV; ++v) weights[v] = load(at + v * VL);
        at += NR;
    }
};

struct Half {
    static constexpr int64_t BLOCK = 0;
    static int64_t panel_bytes(int64_t k) { return k * NR * 2; }
    const uint16_t* at;
    explicit Half(const uint8_t* panel) : at(reinterpret_cast<const uint16_t*>(panel)) {}
    void begin_block() {}
};

struct BFloat16Reader : Half {
    using Half::Half;
    void next(vf* weights) {
        for (int v = 0; v < NV; ++v) {
            const vi bits = widen(at + v * VL) << 16;
            std::memcpy(&weights[v], &bits, sizeof bits);
        }
        at += NR;
    }
};

#if defined(__F16C__)
struct Float16Reader : Half {
    using Half::Half;
    void next(vf* weights) {
        for (int v = 0; v < NV; ++v) {
#if defined(__AVX512F__)
            weights[v] = (vf)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at + v * VL)));
#else
            weights[v] = (vf)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at + v * VL)));
#endif
        }
        at += NR;
    }
};
#endif

// code * scale + offset. The product is exact, so it does not matter whether it is rounded before the sum.
template <int BITS, int ROWS_OF_ONE_SCALE>
struct CodesReader {
    static constexpr int64_t BLOCK = ROWS_OF_ONE_SCALE;
    static constexpr int64_t ROW_BYTES = NR * BITS / 8, BLOCK_BYTES = 2 * NR * 4 + BLOCK * ROW_BYTES;
    static int64_t panel_bytes(int64_t k) { return (k + BLOCK - 1) / BLOCK * BLOCK_BYTES; }
    const uint8_t* at;
    vf scale[NV], offset[NV];
    explicit CodesReader(const uint8_t* panel) : at(panel) {}
    void begin_block() {
        const float* values = reinterpret_cast<const float*>(at);
        for (int v = 0; v < NV; ++v) {
            scale[v] = load(values + v * VL);
            offset[v] = load(values + NR + v * VL);
        }
        at += 2 * NR * 4;
    }
    void next(vf* weights) {
        vi codes[NV];
        if (BITS == 8) {
            for (int v = 0; v < NV; ++v) codes[v] = widen(reinterpret_cast<const int8_t*>(at) + v * VL);
        } else {  // low halves of VL bytes: codes of the first vector; high halves: of the second
            const vi both = widen(at);
            codes[0] = both & 15;
            codes[NV - 1] = both >> 4;
        }
        for (int v = 0; v < NV; ++v) weights[v] = fma(__builtin_convertvector(codes[v], vf), scale[v], offset[v]);
        at += ROW_BYTES;
    }
};

static inline int64_t panels_of(int64_t n) { return (n + NR - 1) / NR; }

// Calls `use` with a null pointer to the form's reader, for its type.
template <class Use>
static inline auto with_reader(int64_t form, Use use) {
    switch (form) {
        case BFLOAT16: return use(static_cast<BFloat16Reader*>(nullptr));
#if defined(__F16C__)
        case FLOAT16: return use(static_cast<Float16Reader*>(nullptr));
#endif
        case CODES8_BY_16: return use(static_cast<CodesReader<8, 16>*>(nullptr));
        case CODES8_BY_32: return use(static_cast<CodesReader<8, 32>*>(nullptr));
        case CODES4_BY_16: return use(static_cast<CodesReader<4, 16>*>(nullptr));
        case CODES4_BY_32: return use(static_cast<CodesReader<4, 32>*>(nullptr));
        default: return use(static_cast<Float32Reader*>(nullptr));
    }
}

static inline int64_t panel_bytes(int64_t form, int64_t k) {
    return with_reader(form, [k](auto* kind) { return std::remove_reference_t<decltype(*kind)>::panel_bytes(k); });
}
