// Float32 attention of a CPU over paged keys and values. Vectors run over keys and value dimensions.
//
// Layouts (P = PAGE tokens): keys [pages][kv_heads][key_dim][P] (transposed within a page),
// values [pages][kv_heads][P][value_dim].

#include <vector>

#include "kernels.h"
#include "vectors.h"

#if defined(__AVX512F__)
constexpr int ATTENTION_MR = 6;
#else
constexpr int ATTENTION_MR = 3;
#endif
constexpr int PAGE = 16;
constexpr int KEYS = 4 * PAGE;     // keys of a block of attention; blocks start at multiples of it
constexpr int SV = 4;              // vectors of scores, or of value dimensions, at once
constexpr int CHUNK = SV * VL;
constexpr int LINE = 16;            // floats of a cache line
constexpr int QUERY_ROWS = 48;     // query rows (queries x heads of a group) that share a pass over the keys

extern "C" int64_t serve_app_page_tokens() { return PAGE; }

static const vi LANES = [] {
    vi lanes;
    for (int i = 0; i < VL; ++i) lanes[i] = i;
    return lanes;
}();

struct Layer {
    int64_t heads, kv_heads, key_dim, value_dim;
    float scaling, softcap;  // softcap 0: none
    int64_t window;          // 0: none
};

// Where the keys or values of one key head lie in the pages of a block.
struct Pages {
    const float* at[KEYS / PAGE];
    // Prefetch the i-th cache line of each page. Values are fetched while keys are read, and the next keys while values
    // are read: 983 us instead of 1331 for 8 sequences of 1,000 tokens on one core.
    void prefetch(int64_t i) const {
        for (const float* page : at) __builtin_prefetch(page + i * LINE);
    }
};

template <int M>
static void score_rows(const float* q, int64_t dim, const Pages& pages, int64_t chunk, float* scores,
                       const Pages* ahead) {
    vf acc[M][SV];
    const float* keys[SV];
    for (int v = 0; v < SV; ++v) {
        const int64_t key = chunk * CHUNK + v * VL;
        keys[v] = pages.at[key / PAGE] + key % PAGE;
        for (int m = 0; m < M; ++m) acc[m][v] = vf{};
    }
    for (int64_t d = 0; d < dim; ++d) {
        vf column[SV];
        for (int v = 0; v < SV; ++v) column[v] = load(keys[v] + d * PAGE);
        if (ahead) ahead->prefetch(d);
        for (int m = 0; m < M; ++m) {
            const vf value = splat(q[m * dim + d]);
            for (int v = 0; v < SV; ++v) acc[m][v] = fma(value, column[v], acc[m][v]);
        }
    }
    for (int m = 0; m < M; ++m)
        for (int v = 0; v < SV; ++v) store(scores + m * KEYS + chunk * CHUNK + v * VL, acc[m][v]);
}

// acc [M][dim] (rows `dim` apart) += weights [M][KEYS] values, for value dimensions d0 .. d0 + W * VL.
template <int M, int W>
static void add_values(const float* weights, const Pages& pages, int64_t keys, int64_t dim, int64_t d0, float* acc,
                       const Pages* ahead) {
    vf sum[M][W];
    for (int m = 0; m < M; ++m)
        for (int v = 0; v < W; ++v) sum[m][v] = load(acc + m * dim + d0 + v * VL);
    for (int64_t j = 0; j < keys; ++j) {
        const float* value = pages.at[j / PAGE] + j % PAGE * dim + d0;
        vf part[W];
        for (int v = 0; v < W; ++v) part[v] = load(value + v * VL);
        if (ahead && d0 == 0) ahead->prefetch(j);
        for (int m = 0; m < M; ++m) {
            const vf weight = splat(weights[m * KEYS + j]);
            for (int v = 0; v < W; ++v) sum[m][v] = fma(weight, part[v], sum[m][v]);
        }
    }
    for (int m = 0; m < M; ++m)
        for (int v = 0; v < W; ++v) store(acc + m * dim + d0 + v * VL, sum[m][v]);
}

template <int M>
static void attend_rows(const float* q, const Layer& layer, const Pages& keys, const Pages& values, const Pages* ahead,
                        int64_t first_key, int64_t count, const int64_t* positions, float* peaks, float* sums,
                        float* acc) {
    const float none = -std::numeric_limits<float>::infinity();
    float scores[M * KEYS];
    for (int64_t chunk = 0; chunk < KEYS / CHUNK; ++chunk) score_rows<M>(q, layer.key_dim, keys, chunk, scores, ahead ? &values : nullptr);
    for (int m = 0; m < M; ++m) {
        float* row = scores + m * KEYS;
        const int64_t last = positions[m] - first_key;  // the query's own key, within this block or after it
        const int64_t start = layer.window ? last - layer.window + 1 : 0;
        vf best = splat(none);
        for (int j = 0; j < KEYS; j += VL) {
            vf score = load(row + j) * splat(layer.scaling);
            if (layer.softcap != 0.0f)
                for (int lane = 0; lane < VL; ++lane)
                    score[lane] = layer.softcap * std::tanh(score[lane] / layer.softcap);
            const vi key = LANES + j;
            score = (key >= static_cast<int32_t>(start)) & (key <= static_cast<int32_t>(last)) ? score : splat(none);
            store(row + j, score);
            best = score > best ? score : best;
        }
        float peak = best[0];
        for (int lane = 1; lane < VL; ++lane) peak = std::max(peak, best[lane]);
        if (peak == none) {
            std::fill(row, row + KEYS, 0.0f);
            continue;
        }
        peak = std::max(peak, peaks[m]);
        vf total = vf{};
        for (int64_t j = 0; j < KEYS; j += VL) {
            const vf weight = exp_negative(load(row + j) - splat(peak));
            store(row + j, weight);
            total += weight;
        }
        float sum = 0.0f;
        for (int v = 0; v < VL; ++v) sum += total[v];
        if (peaks[m] == none) {
            sums[m] = sum;
        } else if (peaks[m] != peak) {
            const float shrink = exp_negative(splat(peaks[m] - peak))[0];
            sums[m] = sums[m] * shrink + sum;
            for (int64_t d = 0; d < layer.value_dim; ++d) acc[m * layer.value_dim + d] *= shrink;
        } else {
            sums[m] += sum;
        }
        peaks[m] = peak;
    }
    int64_t d = 0;
    for (; d + CHUNK <= layer.value_dim; d += CHUNK)
        add_values<M, SV>(scores, values, count, layer.value_dim, d, acc, ahead);
    for (; d < layer.value_dim; d += VL) add_values<M, 1>(scores, values, count, layer.value_dim, d, acc, ahead);
}

typedef void (*AttendRows)(const float*, const Layer&, const Pages&, const Pages&, const Pages*, int64_t, int64_t,
                           const int64_t*, float*, float*, float*);
#if defined(__AVX512F__)
static const AttendRows ATTEND[] = {attend_rows<1>, attend_rows<2>, attend_rows<3>,
                                    attend_rows<4>, attend_rows<5>, attend_rows<6>};
#else
static const AttendRows ATTEND[] = {attend_rows<1>, attend_rows<2>, attend_rows<3>};
#endif

struct Work {  // some queries of one sequence
    int64_t row, queries, position;
    const int32_t* pages;
};

// One key head and the query heads that share it, over the keys of one sequence.
static void attend_work(const Work& work, int64_t kv_head, const float* q, const float* keys, const float* values,
                        float* out, const Layer& layer) {
    const int64_t group = layer.heads / layer.kv_heads, rows = work.queries * group;
    const int64_t key_page = layer.kv_heads * layer.key_dim * PAGE, value_page = layer.kv_heads * layer.value_dim * PAGE;
    static thread_local std::vector<float> query, acc, sums, peaks;  // kept for the step's other calls
    static thread_local std::vector<int64_t> positions;
    query.resize(rows * layer.key_dim);
    acc.assign(rows * layer.value_dim, 0.0f);
    sums.assign(rows, 0.0f);
    peaks.assign(rows, -std::numeric_limits<float>::infinity());
    positions.resize(rows);
    for (int64_t r = 0; r < rows; ++r) {
        const int64_t head = kv_head * group + r % group;
        positions[r] = work.position + r / group;
        std::memcpy(&query[r * layer.key_dim], q + ((work.row + r / group) * layer.heads + head) * layer.key_dim,
                    layer.key_dim * sizeof(float));
    }
    const int64_t end = work.position + work.queries;
    const int64_t oldest = layer.window ? std::max<int64_t>(0, work.position - layer.window + 1) : 0;
    // Past the last key no contents are used: the last page stands in for the missing ones.
    const auto pages_of = [&](const float* from, int64_t size, int64_t head, int64_t dim, int64_t first) {
        Pages found;
        for (int64_t p = 0; p < KEYS / PAGE; ++p)
            found.at[p] = from + work.pages[std::min(first / PAGE + p, (end - 1) / PAGE)] * size + head * dim * PAGE;
        return found;
    };
    const int64_t begin = oldest / KEYS * KEYS, next_head = std::min(kv_head + 1, layer.kv_heads - 1);
    for (int64_t first = begin; first < end; first += KEYS) {
        const int64_t count = std::min<int64_t>(KEYS, end - first);
        const Pages block_keys = pages_of(keys, key_page, kv_head, layer.key_dim, first);
        const Pages block_values = pages_of(values, value_page, kv_head, layer.value_dim, first);
        const Pages ahead = first + KEYS < end ? pages_of(keys, key_page, kv_head, layer.key_dim, first + KEYS)
                                               : pages_of(keys, key_page, next_head, layer.key_dim, begin);
        for (int64_t r = 0; r < rows; r += ATTENTION_MR)
            ATTEND[std::min<int64_t>(ATTENTION_MR, rows - r) - 1](
                &query[r * layer.key_dim], layer, block_keys, block_values, r == 0 ? &ahead : nullptr, first, count, &positions[r],
                &peaks[r], &sums[r], &acc[r * layer.value_dim]);
    }
    for (int64_t r = 0; r < rows; ++r) {
        const int64_t head = kv_head * group + r % group;
        float* to = out + ((work.row + r / group) * layer.heads + head) * layer.value_dim;
        for (int64_t d = 0; d < layer.value_dim; ++d) to[d] = acc[r * layer.value_dim + d] / sums[r];
    }
}

// Put k [tokens, kv_heads, key_dim] and v [tokens, kv_heads, value_dim] into their slots.
extern "C" void serve_app_store(const float* k, const float* v, const int64_t* slots, int64_t tokens, float* keys,
                                float* values, int64_t kv_heads, int64_t key_dim, int64_t value_dim) {
#pragma omp parallel for schedule(static) if (tokens > 16)
    for (int64_t t = 0; t < tokens; ++t) {
        const int64_t page = slots[t] / PAGE, place = slots[t] % PAGE;
        for (int64_t h = 0; h < kv_heads; ++h) {
            const float *key = k + (t * kv_heads + h) * key_dim, *value = v + (t * kv_heads + h) * value_dim;
            float* to = keys + (page * kv_heads + h) * key_dim * PAGE + place;
            for (int64_t d = 0; d < key_dim; ++d) to[d * PAGE] = key[d];
            std::memcpy(values + ((page * kv_heads + h) * PAGE + place) * value_dim, value, value_dim * sizeof(float));
        }
    }
}

// q [tokens, heads, key_dim] -> out [tokens, heads, value_dim]. spans [n][4]: first row, queries, keys, first entry in
// `pages`. window 0 and softcap 0 mean none.
extern "C" void serve_app_attend(const float* q, const float* keys, const float* values, float* out,
                                 const int32_t* spans, int64_t n, const int32_t* pages, int64_t heads,
                                 int64_t kv_heads, int64_t key_dim, int64_t value_dim, float scaling, float softcap,
                                 int64_t window) {
    const Layer layer{heads, kv_heads, key_dim, value_dim, scaling, softcap, window};
    const int64_t queries_at_once = std::max<int64_t>(1, QUERY_ROWS / (heads / kv_heads));
    std::vector<Work> works;
    for (int64_t s = 0; s < n; ++s) {
        const int32_t* span = spans + 4 * s;
        for (int64_t from = 0; from < span[1]; from += queries_at_once)
            works.push_back({span[0] + from, std::min<int64_t>(queries_at_once, span[1] - from),
                             span[2] - span[1] + from, pages + span[3]});
    }
    int64_t longest = 0, all = 0;
    for (const Work& work : works) {
        longest = std::max(longest, work.position + work.queries);
        all += work.position + work.queries;
    }
    // One thread computes all heads of a sequence, since it has already prefetched the next head's keys. A sequence so
    // long that the other threads would wait for it is divided by heads.
    const int64_t together = 4 * longest <= all ? kv_heads : 1;
#pragma omp parallel for schedule(dynamic, together) collapse(2)
    for (size_t w = 0; w < works.size(); ++w)
        for (int64_t head = 0; head < kv_heads; ++head) attend_work(works[w], head, q, keys, values, out, layer);
}
