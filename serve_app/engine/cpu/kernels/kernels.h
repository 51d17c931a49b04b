// The kernels that a decoder layer is made of; each is described where it is defined.
#pragma once

#include <cstdint>

// One of several products of the same x: y [m, n] = x w^T + bias + add. Bias and add [m, n] may be null.
struct Part {
    const uint8_t* packed;
    const float *bias, *add;
    float* y;
    int64_t n, form;  // form: of the weights, see weights.h
};

extern "C" {
void serve_app_linear(const float* x, int64_t ldx, const Part* parts, int64_t count, int64_t m, int64_t k);
void serve_app_gated(const float* x, int64_t ldx, const Part* gate, const Part* up, int64_t activation, float* y,
                     int64_t m, int64_t k);
void serve_app_rms_norm(const float* x, const float* scale, float eps, float* y, int64_t rows, int64_t dim);
void serve_app_rotate(float* x, const float* cos, const float* sin, int64_t tokens, int64_t heads, int64_t dim);
void serve_app_store(const float* k, const float* v, const int64_t* slots, int64_t tokens, float* keys, float* values,
                     int64_t kv_heads, int64_t key_dim, int64_t value_dim);
void serve_app_attend(const float* q, const float* keys, const float* values, float* out, const int32_t* spans,
                      int64_t n, const int32_t* pages, int64_t heads, int64_t kv_heads, int64_t key_dim,
                      int64_t value_dim, float scaling, float softcap, int64_t window);
}
