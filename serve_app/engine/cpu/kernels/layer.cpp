// Decoder layers in one call. Each computes h = x + attention(norm(x)), then h + mlp(norm(h)).
//
// With a call for each kernel, Python's code and data had to be read again each time, since the weights had filled the
// cache: at one stream of the demo model that took 3.3 of 22 ms a step. With a call for each layer, Python's global
// lock had to be taken again each time, while another thread sent the last step's tokens.

#include <utility>

#include "kernels.h"

struct Norm {
    const float* scale;  // null: no norm
    double eps;
};

struct LayerPlan {
    Norm before_attention, before_mlp, of_queries, of_keys;
    Part query, key, value, output, gate, up, down;
    int64_t hidden, activation, heads, kv_heads, head_dim, window;
    double scaling, softcap;
};

// What the layers of a step share. The last seven fields are memory for results that one kernel leaves for the next.
struct StepPlan {
    const float *cos, *sin;
    const int64_t* slots;
    const int32_t *spans, *pages;
    int64_t tokens, sequences;
    float *normed, *gated, *middle, *queries, *keys, *values, *attended;
};

static void norm(const Norm& norm, const float* x, float* y, int64_t rows, int64_t dim) {
    if (norm.scale) serve_app_rms_norm(x, norm.scale, static_cast<float>(norm.eps), y, rows, dim);
}

static Part to(Part part, float* y, const float* add) {
    part.y = y;
    part.add = add;
    return part;
}

// x and y [tokens, hidden]; keys and values: the layer's part of the KV cache.
extern "C" void serve_app_layer(const LayerPlan* layer, const StepPlan* step, const float* x, float* y, float* keys,
                                float* values) {
    const int64_t tokens = step->tokens, hidden = layer->hidden, dim = layer->head_dim;
    norm(layer->before_attention, x, step->normed, tokens, hidden);
    const Part projections[] = {to(layer->query, step->queries, nullptr), to(layer->key, step->keys, nullptr),
                                to(layer->value, step->values, nullptr)};
    serve_app_linear(step->normed, hidden, projections, 3, tokens, hidden);
    norm(layer->of_queries, step->queries, step->queries, tokens * layer->heads, dim);
    norm(layer->of_keys, step->keys, step->keys, tokens * layer->kv_heads, dim);
    serve_app_rotate(step->queries, step->cos, step->sin, tokens, layer->heads, dim);
    serve_app_rotate(step->keys, step->cos, step->sin, tokens, layer->kv_heads, dim);
    serve_app_store(step->keys, step->values, step->slots, tokens, keys, values, layer->kv_heads, dim, dim);
    serve_app_attend(step->queries, keys, values, step->attended, step->spans, step->sequences, step->pages,
                     layer->heads, layer->kv_heads, dim, dim, static_cast<float>(layer->scaling),
                     static_cast<float>(layer->softcap), layer->window);
    const Part output = to(layer->output, step->middle, x);
    serve_app_linear(step->attended, layer->heads * dim, &output, 1, tokens, layer->heads * dim);
    norm(layer->before_mlp, step->middle, step->normed, tokens, hidden);
    serve_app_gated(step->normed, hidden, &layer->gate, &layer->up, layer->activation, step->gated, tokens, hidden);
    const Part down = to(layer->down, y, step->middle);
    serve_app_linear(step->gated, layer->gate.n, &down, 1, tokens, layer->gate.n);
}

// `count` layers one after the other, from x [tokens, hidden] to y and back: the result is in x when `count` is even,
// else in y. `memory`: for each layer its keys and its values in the KV cache.
extern "C" void serve_app_layers(const LayerPlan* const* layers, int64_t count, const StepPlan* step, float* x, float* y,
                                 float* const* memory) {
    for (int64_t i = 0; i < count; ++i) {
        serve_app_layer(layers[i], step, x, y, memory[2 * i], memory[2 * i + 1]);
        std::swap(x, y);
    }
}
