// From logits to token ids: the largest, or a draw by the inverse CDF, in vocabulary order, over the tokens that top-k,
// top-p and min-p leave. `Sampler` in engine/sampling.py computes the same function with tensor operations.

#include <functional>
#include <vector>

#include "vectors.h"

constexpr int64_t BLOCK = 16 * VL;  // ids whose weights are summed first, to find the block of the drawn id

typedef double vd __attribute__((vector_size(VL * 8)));

static inline double sum(vd v) {
    double total = 0.0;
    for (int i = 0; i < VL; ++i) total += v[i];
    return total;
}

struct Choice {
    double temperature, top_k, top_p, min_p;  // temperature 0: the largest; top_k 0: off
    double draw;                              // in [0, 1)
};

struct Scratch {  // memory of one thread, kept between steps
    std::vector<float> weights, candidates;
    std::vector<double> blocks;
};

// Floats of one sign are in order of magnitude in buckets of their leading bits: eight buckets for a factor of 2.
constexpr uint32_t BUCKETS = 2048;

static inline uint32_t bucket(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return (bits & 0x7FFFFFFFu) >> 20;
}

// The k-th largest of numbers that are at most 0. Counting by buckets finds the bucket in which to look for it.
static float kth_largest(const float* x, int64_t n, int64_t k, std::vector<float>& candidates) {
    int64_t counts[BUCKETS] = {};
    for (int64_t i = 0; i < n; ++i) ++counts[bucket(x[i])];
    uint32_t at = 0;
    for (; counts[at] < k; ++at) k -= counts[at];
    candidates.clear();
    for (int64_t i = 0; i < n; ++i)
        if (bucket(x[i]) == at) candidates.push_back(x[i]);
    std::nth_element(candidates.begin(), candidates.begin() + (k - 1), candidates.end(), std::greater<float>());
    return candidates[k - 1];
}

// The smallest of the fewest largest weights (at most 1) whose sum reaches `wanted`; the smallest of all if none does.
static float nucleus(const float* weights, int64_t n, double wanted, std::vector<float>& candidates) {
    candidates.resize(n);
    // A few large weights usually reach the sum: collect those above a bound, which is divided by 64 until they do.
    int64_t count = 0;
    double all = 0.0;
    for (float bound = 1.0f / 64; count == 0 || (all < wanted && count < n);
         bound = bound > 1e-30f ? bound / 64 : 0.0f) {
        count = 0;
        for (int64_t i = 0; i < n; ++i) {
            candidates[count] = weights[i];
            count += weights[i] >= bound;
        }
        all = 0.0;
        for (int64_t i = 0; i < count; ++i) all += candidates[i];
    }
    double sums[BUCKETS] = {};
    for (int64_t i = 0; i < count; ++i) sums[bucket(candidates[i])] += candidates[i];
    uint32_t at = BUCKETS - 1;
    double above = 0.0;
    for (; at > 0 && (sums[at] == 0.0 || above + sums[at] < wanted); --at) above += sums[at];
    const auto end = std::partition(candidates.begin(), candidates.begin() + count,
                                    [at](float weight) { return bucket(weight) == at; });
    std::sort(candidates.begin(), end, std::greater<float>());
    for (auto weight = candidates.begin(); weight != end; ++weight)
        if ((above += *weight) >= wanted) return *weight;
    return end == candidates.begin() ? 0.0f : *(end - 1);
}

// The first id whose cumulative weight exceeds draw times the total.
static int64_t inverse_cdf(const float* weights, int64_t n, double draw, std::vector<double>& blocks) {
    blocks.clear();
    double total = 0.0;
    for (int64_t first = 0; first < n; first += BLOCK) {
        vd lanes = {};
        for (int64_t i = first; i < std::min(n, first + BLOCK); i += VL)
            lanes += __builtin_convertvector(load(weights + i), vd);
        blocks.push_back(sum(lanes));
        total += blocks.back();
    }
    // Rounding may lift draw * total to total itself, which no id exceeds.
    const double target = std::min(draw * total, std::nextafter(total, 0.0));
    double before = 0.0;
    size_t block = 0;
    while (before + blocks[block] <= target) before += blocks[block++];
    const int64_t first = static_cast<int64_t>(block) * BLOCK;
    int64_t chosen = first;
    for (int64_t i = first; i < std::min(n, first + BLOCK) && before <= target; ++i)
        if (weights[i] > 0.0f) {
            before += weights[i];
            chosen = i;
        }
    return chosen;
}

static inline bool any(vi lanes) {
    int32_t found = 0;
    for (int i = 0; i < VL; ++i) found |= lanes[i];
    return found != 0;
}

// The largest of n numbers; NaN when one of them is NaN.
static float largest_of(const float* x, int64_t n) {
    vf best = splat(-std::numeric_limits<float>::infinity());
    vi strange = {};
    const auto take = [&](vf v) {
        best = v > best ? v : best;
        strange |= v != v;
    };
    int64_t i = 0;
    for (; i + VL <= n; i += VL) take(load(x + i));
    for (; i < n; ++i) take(splat(x[i]));
    float largest = best[0];
    for (int lane = 1; lane < VL; ++lane) largest = std::max(largest, best[lane]);
    return any(strange) ? std::numeric_limits<float>::quiet_NaN() : largest;
}

// The first index of `wanted`, which must be among the numbers.
static int64_t first_of(const float* x, int64_t n, float wanted) {
    int64_t i = 0;
    for (; i + BLOCK <= n; i += BLOCK) {
        vi equal = {};
        for (int64_t j = i; j < i + BLOCK; j += VL) equal |= load(x + j) == splat(wanted);
        if (any(equal)) break;
    }
    return std::find(x + i, x + n, wanted) - x;
}

// The id that one row's logits and choice give; -1 when a logit is NaN or the largest is infinite.
static int64_t choose(const float* logits, int64_t vocab, const Choice& choice, Scratch& scratch) {
    const float best = largest_of(logits, vocab);
    if (!std::isfinite(best)) return -1;
    if (choice.temperature == 0.0) return first_of(logits, vocab, best);

    const float none = -std::numeric_limits<float>::infinity();
    const int64_t n = (vocab + VL - 1) / VL * VL;
    scratch.weights.resize(n);
    float* weights = scratch.weights.data();
    // Subtracting the maximum first keeps a tiny temperature from overflowing.
    const float temperature = static_cast<float>(choice.temperature);
    for (int64_t i = 0; i < vocab; ++i) weights[i] = (logits[i] - best) / temperature;
    std::fill(weights + vocab, weights + n, none);
    const bool some = choice.top_k > 0 && choice.top_k < vocab;
    const float lowest =
        some ? kth_largest(weights, vocab, static_cast<int64_t>(choice.top_k), scratch.candidates) : none;
    vd lanes = {};
    for (int64_t i = 0; i < n; i += VL) {
        const vf scaled = load(weights + i), weight = exp_negative(scaled < splat(lowest) ? splat(none) : scaled);
        store(weights + i, weight);
        lanes += __builtin_convertvector(weight, vd);
    }
    // The largest weight is 1, so min_p is a bound on weights. top_p is a share of their sum.
    float least = static_cast<float>(choice.min_p);
    if (choice.top_p < 1.0)
        least = std::max(least, nucleus(weights, vocab, choice.top_p * sum(lanes), scratch.candidates));
    if (least > 0.0f)
        for (int64_t i = 0; i < n; i += VL) {
            const vf weight = load(weights + i);
            store(weights + i, weight < splat(least) ? vf{} : weight);
        }
    return inverse_cdf(weights, n, choice.draw, scratch.blocks);
}

// logits [rows, vocab], one choice a row -> ids [rows].
extern "C" void serve_app_sample(const float* logits, int64_t rows, int64_t vocab, const Choice* choices,
                                 int64_t* ids) {
#pragma omp parallel for schedule(dynamic) if (rows > 1)
    for (int64_t row = 0; row < rows; ++row) {
        static thread_local Scratch scratch;
        ids[row] = choose(logits + row * vocab, vocab, choices[row], scratch);
    }
}

// -inf where `allowed` is 0, else 0.
static inline vf minus_infinity_unless(vi allowed) {
    const vi infinite = allowed == 0;
    return (vf)(infinite & vi{} + static_cast<int32_t>(0xFF800000u));
}

// Adds -inf to the logits [*, vocab] of the ids that masks [count, words] forbid: id i is allowed in row rows[r] where bit
// i % 32 of word i / 32 of mask r is set. A logit that is not a number stays that.
extern "C" void serve_app_mask(float* logits, int64_t vocab, const uint32_t* masks, int64_t words, const int64_t* rows,
                               int64_t count) {
    vi bits[32 / VL];
    for (int i = 0; i < 32; ++i) bits[i / VL][i % VL] = static_cast<int32_t>(1u << i);
#pragma omp parallel for schedule(static) if (count > 1)
    for (int64_t r = 0; r < count; ++r) {
        float* row = logits + rows[r] * vocab;
        const uint32_t* mask = masks + r * words;
        int64_t first = 0;
        for (; first + 32 <= vocab; first += 32) {
            const uint32_t word = mask[first / 32];
            if (word == ~0u) continue;
            const vi all = vi{} + static_cast<int32_t>(word);
            for (int i = 0; i < 32 / VL; ++i) {
                float* x = row + first + i * VL;
                store(x, load(x) + minus_infinity_unless(all & bits[i]));
            }
        }
        for (int64_t i = first; i < vocab; ++i)
            if (!((mask[i / 32] >> (i % 32)) & 1u)) row[i] += -std::numeric_limits<float>::infinity();
    }
}
