// Finds the smallest form that a matrix of weights can be kept in without a loss, and brings it into that form.

#include "weights.h"

// x rounded to `bits` significant bits. Scales and offsets in files have at most 17: a 16 bit float (11) times 6 bits.
static double rounded(double x, int bits) {
    int exponent;
    const double mantissa = std::frexp(x, &exponent);
    return std::ldexp(std::nearbyint(std::ldexp(mantissa, bits)), exponent - bits);
}

// Whether `code * scale + offset` gives each value back, with codes from `least` to `most`.
static bool fits(const float* values, int64_t count, float scale, float offset, int least, int most, int8_t* codes) {
    if (!(scale != 0.0f && std::isfinite(scale) && std::isfinite(offset))) return false;
    for (int64_t i = 0; i < count; ++i) {
        const double code = std::nearbyint((static_cast<double>(values[i]) - offset) / scale);
        if (!(code >= least && code <= most)) return false;
        const float product = static_cast<float>(code * scale);
        if (product != code * static_cast<double>(scale) || product + offset != values[i]) return false;
        codes[i] = static_cast<int8_t>(code);
    }
    return true;
}

// Finds the scale, offset and codes of values that share a scale; false when none fit. Files have codes from 0 up with
// an offset (Q4_1 and the K kinds), or codes on both sides of 0 without one. The largest code used gives the scale.
static bool encode(const float* values, int64_t count, int bits, float* scale, float* offset, int8_t* codes) {
    float low = values[0], high = values[0], size = 0.0f;
    for (int64_t i = 0; i < count; ++i) {
        if (!std::isfinite(values[i])) return false;
        low = std::min(low, values[i]);
        high = std::max(high, values[i]);
        size = std::max(size, std::fabs(values[i]));
    }
    if (low == high) {
        *scale = 0.0f;
        *offset = low;
        std::memset(codes, 0, count);
        return true;
    }
    if (bits == 8) {
        *offset = 0.0f;
        for (const int largest : {127, 16, 32, 8}) {
            *scale = size / largest;
            if (fits(values, count, *scale, 0.0f, -128, 127, codes)) return true;
        }
        for (int largest = 128; largest > 0; --largest) {
            *scale = size / largest;
            if (fits(values, count, *scale, 0.0f, -128, 127, codes)) return true;
        }
    }
    const int most = bits == 8 ? 31 : 15;
    for (int span = most; span > 0; --span) {
        *scale = static_cast<float>(rounded((static_cast<double>(high) - low) / span, 17));
        for (int first = 0; first <= most - span; ++first) {
            *offset = first ? static_cast<float>(rounded(low - static_cast<double>(*scale) * first, 17)) : low;
            if (fits(values, count, *scale, *offset, 0, most, codes)) return true;
        }
    }
    return false;
}

static uint32_t bits_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

// A value as a 16 bit float; false when that loses bits.
static bool halve(int64_t form, float value, uint16_t* half) {
    if (form == BFLOAT16) {
        *half = bits_of(value) >> 16;
        return (bits_of(value) & 0xffff) == 0;
    }
#if defined(__F16C__)
    *half = _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT);
    return bits_of(_cvtsh_ss(*half)) == bits_of(value);
#else
    return false;
#endif
}

struct Matrix {
    const float* w;  // [n, k] with row stride ld and column stride step
    int64_t ld, step, n, k;
    // `count` values of a row from the column `from` on.
    const float* some(int64_t row, int64_t from, int64_t count, float* values) const {
        for (int64_t i = 0; i < count; ++i) values[i] = w[row * ld + (from + i) * step];
        return values;
    }
};

// Encodes a row of a matrix; false when its values don't fit the form. Calls `write(from, count, ...)` for each block.
template <class Write>
static bool encode_row(const Matrix& matrix, int64_t row, int bits, int64_t block, Write write) {
    float values[32], scale, offset;
    int8_t codes[32];
    for (int64_t from = 0; from < matrix.k; from += block) {
        const int64_t count = std::min(block, matrix.k - from);
        if (!encode(matrix.some(row, from, count, values), count, bits, &scale, &offset, codes)) return false;
        write(from, count, scale, offset, codes);
    }
    return true;
}

static int code_bits(int64_t form) { return form == CODES8_BY_16 || form == CODES8_BY_32 ? 8 : 4; }
static int64_t code_block(int64_t form) { return form == CODES8_BY_16 || form == CODES4_BY_16 ? 16 : 32; }
static bool has_codes(int64_t form) { return form >= CODES8_BY_16; }

static bool row_fits(const Matrix& matrix, int64_t row, int64_t form) {
    if (has_codes(form))
        return encode_row(matrix, row, code_bits(form), code_block(form),
                          [](int64_t, int64_t, float, float, const int8_t*) {});
    uint16_t half;
    for (int64_t i = 0; i < matrix.k; ++i)
        if (!halve(form, matrix.w[row * matrix.ld + i * matrix.step], &half)) return false;
    return true;
}

// The smallest form from which every value of w [n, k] comes back exactly.
extern "C" int64_t serve_app_form(const float* w, int64_t ld, int64_t step, int64_t n, int64_t k) {
    const Matrix matrix{w, ld, step, n, k};
    for (const Form form : {CODES4_BY_32, CODES4_BY_16, CODES8_BY_32, CODES8_BY_16, BFLOAT16, FLOAT16}) {
        bool all = true;
#pragma omp parallel for schedule(static) reduction(&& : all)
        for (int64_t row = 0; row < n; ++row) all = all && row_fits(matrix, row, form);
        if (all) return form;
    }
    return FLOAT32;
}

// Bytes that a matrix [n, k] takes in a form.
extern "C" int64_t serve_app_packed_bytes(int64_t form, int64_t n, int64_t k) {
    return panels_of(n) * panel_bytes(form, k);
}

static void pack_column(const Matrix& matrix, int64_t row, int64_t form, int64_t column, uint8_t* panel) {
    if (!has_codes(form)) {
        for (int64_t i = 0; i < matrix.k; ++i) {
            const float value = matrix.w[row * matrix.ld + i * matrix.step];
            if (form == FLOAT32)
                reinterpret_cast<float*>(panel)[i * NR + column] = value;
            else
                halve(form, value, &reinterpret_cast<uint16_t*>(panel)[i * NR + column]);
        }
        return;
    }
    const int bits = code_bits(form);
    const int64_t block = code_block(form), row_bytes = NR * bits / 8, block_bytes = 2 * NR * 4 + block * row_bytes;
    encode_row(matrix, row, bits, block,
               [&](int64_t from, int64_t count, float scale, float offset, const int8_t* codes) {
                   uint8_t* to = panel + from / block * block_bytes;
                   reinterpret_cast<float*>(to)[column] = scale;
                   reinterpret_cast<float*>(to)[NR + column] = offset;
                   to += 2 * NR * 4;
                   for (int64_t i = 0; i < count; ++i, to += row_bytes) {
                       if (bits == 8)
                           to[column] = static_cast<uint8_t>(codes[i]);
                       else
                           to[column % VL] |= codes[i] << (column < VL ? 0 : 4);
                   }
               });
}

// w [n, k] -> packed, in a form that fits it.
extern "C" void serve_app_pack(const float* w, int64_t ld, int64_t step, int64_t n, int64_t k, int64_t form,
                               uint8_t* packed) {
    const Matrix matrix{w, ld, step, n, k};
    const int64_t bytes = panel_bytes(form, k);
#pragma omp parallel for schedule(static)
    for (int64_t panel = 0; panel < panels_of(n); ++panel) {
        uint8_t* to = packed + panel * bytes;
        std::memset(to, 0, bytes);
        for (int64_t column = 0; column < std::min<int64_t>(NR, n - panel * NR); ++column)
            pack_column(matrix, panel * NR + column, form, column, to);
    }
}
