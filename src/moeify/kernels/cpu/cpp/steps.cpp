// Runs the steps of a decoder in order; see steps.h.
#include "steps.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "int8.h"

namespace {

// RMSNorm: y = x / rms(x) · gain, for every head of every token.
void norm(const Step& s, int64_t tokens) {
    for (int64_t piece = 0; piece < tokens * s.heads; piece++) {
        const float* x = s.x + piece * s.width;
        float* y = s.y + piece * s.width;
        Floats squares = {};
        int64_t i = 0;
        for (; i + W <= s.width; i += W) squares += load(x + i) * load(x + i);
        float total = sum(squares);
        for (; i < s.width; i++) total += x[i] * x[i];
        const float factor = 1.f / std::sqrt(total / s.width + s.eps);
        for (i = 0; i < s.width; i++) y[i] = x[i] * factor * s.gain[i];
    }
}

void round(const float* x, int64_t count, float* out) { std::copy(x, x + count, out); }
void round(const float* x, int64_t count, Bf16* out) {
    int64_t i = 0;
    for (; i + W <= count; i += W) store(out + i, load(x + i));
    if (i < count) store_first(out + i, load_first(x + i, count - i), count - i);
}

// y = act(gate) · up, or act(gate)
void gated_activation(Gating gating, int32_t activation, const float* gate, const float* up, int64_t count, float* y) {
    for (int64_t i = 0; i < count; i += W) {
        const bool whole = count - i >= W;
        const Floats g = whole ? load(gate + i) : load_first(gate + i, count - i);
        const Floats u = gating == PLAIN ? g : whole ? load(up + i) : load_first(up + i, count - i);
        const Floats value = gated_activation(gating, Activation(activation), 0, 0, g, u);
        whole ? store(y + i, value) : store_first(y + i, value, count - i);
    }
}

template <class X>
const X* rounded(const float* x, int64_t count) {
    static thread_local std::vector<X> kept;
    if (int64_t(kept.size()) < count) kept.resize(count);
    round(x, count, kept.data());
    return kept.data();
}

// Writes some columns of a token's y = W x + bias, or y += W x + bias
template <class X>
void write_output(const Step& s, int64_t token, const Columns& c, const float* product) {
    float* y = s.y + token * s.width_out + c.first;
    for (int n = 0; n < c.count; n++) {
        const float bias = s.weights.bias ? number(((const X*)s.weights.bias)[c.first + n]) : 0.f;
        y[n] = (s.adds ? y[n] : 0.f) + product[n] + bias;
    }
}

// y = W x + bias
template <class X, template <class> class M>
void linear(const Step& s, int64_t tokens, int threads) {
    const M<X> projection{s.weights};
    const X* inputs = rounded<X>(s.x, tokens * s.width);
    const int64_t size = tokens > MAX_ROWS ? M<X>::widest : BLOCK, blocks = (s.width_out + size - 1) / size;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        static thread_local std::vector<X> scratch;
        if (int64_t(scratch.size()) < M<X>::scratch_size(s.width)) scratch.resize(M<X>::scratch_size(s.width));
        alignas(64) float out[PANEL * BLOCK];
#pragma omp for schedule(static)
        for (int64_t block = 0; block < blocks; block++) {
            const int64_t column = block * size;
            const Columns c = {column, 1, int(std::min(size, s.width_out - column))};
            for (int64_t done = 0; done < tokens; done += PANEL) {
                const int rows = int(std::min<int64_t>(PANEL, tokens - done));
                const X* x[PANEL];
                for (int m = 0; m < rows; m++) x[m] = inputs + (done + m) * s.width;
                projection.multiply({0, c, {0, column + c.count}, tokens, done == 0}, x, rows, s.width, out, scratch.data());
                for (int m = 0; m < rows; m++) write_output<X>(s, done + m, c, out + m * BLOCK);
            }
        }
    }
}

// The same for few tokens, with activations quantised to int8.
template <class X>
void linear_int8(const Step& s, int64_t tokens, int threads) {
    static thread_local Rounded kept;
    kept.resize(tokens, s.width);
    for (int64_t t = 0; t < tokens; t++) kept.round(t, s.x + t * s.width, s.width);
    Token x[INT8_MAX_ROWS];
    for (int64_t t = 0; t < tokens; t++) x[t] = kept[t];
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t column = 0; column < s.width_out; column += BLOCK) {
        const Columns c = {column, 1, int(std::min<int64_t>(BLOCK, s.width_out - column))};
        alignas(64) float out[INT8_MAX_ROWS * BLOCK];
        int8_products(s.weights, 0, c, x, int(tokens), s.width, out, BLOCK);
        for (int64_t t = 0; t < tokens; t++) write_output<X>(s, t, c, out + t * BLOCK);
    }
}

template <class X>
void linear(const Step& s, int64_t tokens, int threads) {
    if (takes_int8<X>(s.weights) && tokens <= INT8_MAX_ROWS)
        linear_int8<X>(s, tokens, threads);
    else if (s.weights.format == INT8)
        linear<X, Int8>(s, tokens, threads);
    else if (s.weights.format == INT4)
        linear<X, Int4>(s, tokens, threads);
    else
        linear<X, Dense>(s, tokens, threads);
}

// Rotary position embedding (RoPE) of the first `rotated` elements of every head, which pairs elements i and i + half.
void rotate(const Step& s, const Turn& t) {
    const int64_t half = t.rotated / 2;
    for (int64_t token = 0; token < t.tokens; token++) {
        const float *cos = t.cos + token * t.rotated, *sin = t.sin + token * t.rotated;
        for (int64_t head = 0; head < s.heads; head++) {
            float* y = s.y + (token * s.heads + head) * s.width;
            for (int64_t i = 0; i < half; i++) {
                const float a = y[i], b = y[i + half];
                y[i] = a * cos[i] - b * sin[i];
                y[i + half] = b * cos[i + half] + a * sin[i + half];
            }
        }
    }
}

void softmax(float* x, int64_t count) {
    const float most = *std::max_element(x, x + count);
    float total = 0;
    for (int64_t i = 0; i < count; i++) total += x[i] = std::exp(x[i] - most);
    for (int64_t i = 0; i < count; i++) x[i] /= total;
}

// Appends the new key and value to the cache, then y = softmax(scale · q kᵀ) v over all its positions.
template <class X>
void attend(const Step& s, const Turn& t, const LayerCache& cache) {
    const int64_t shared = s.heads / s.kv_heads, width = s.width;
#pragma omp parallel for collapse(2) schedule(static) num_threads(t.threads) if (t.threads > 1)
    for (int64_t token = 0; token < t.tokens; token++)
        for (int64_t kv_head = 0; kv_head < s.kv_heads; kv_head++) {
            const int64_t place = token * cache.token_stride + kv_head * cache.head_stride;
            X *keys = (X*)cache.keys + place, *values = (X*)cache.values + place;
            round(s.x2 + (token * s.kv_heads + kv_head) * width, width, keys + t.length * width);
            round(s.x3 + (token * s.kv_heads + kv_head) * width, width, values + t.length * width);
            const int64_t first = t.first[token], count = t.length + 1 - first, head = token * s.heads + kv_head * shared;
            static thread_local std::vector<float> kept;
            if (int64_t(kept.size()) < shared * count) kept.resize(shared * count);
            float* scores = kept.data();
            const X* queries = rounded<X>(s.x + head * width, shared * width);
            std::vector<const X*> x(shared);
            for (int64_t m = 0; m < shared; m++) x[m] = queries + m * width;
            const X *key = keys + first * width, *value = values + first * width;
            product(key, width, int(count), value, x.data(), int(shared), width, scores, count);
            for (int64_t m = 0; m < shared; m++) {
                for (int64_t i = 0; i < count; i++) scores[m * count + i] *= s.scale;
                softmax(scores + m * count, count);
                float* y = s.y + (head + m) * width;
                for (int64_t c = 0; c < width; c += W) {
                    Floats total = {};
                    const bool whole = c + W <= width;
                    for (int64_t i = 0; i < count; i++) {
                        const X* v = value + i * width + c;
                        total += scores[m * count + i] * (whole ? load(v) : load_first(v, width - c));
                    }
                    whole ? store(y + c, total) : store_first(y + c, total, width - c);
                }
            }
        }
}

float score_of(Score score, float logit) {
    if (score == SIGMOID) return 1.f / (1.f + std::exp(-logit));
    return std::sqrt(std::max(logit, 0.f) + std::log1p(std::exp(-std::fabs(logit))));
}

// Top-k token-choice routing, then y += the weighted outputs of the selected experts.
template <class X>
void experts(const Step& s, int64_t tokens, int threads) {
    const int64_t num_experts = s.call->experts, rows = tokens * s.k;
    std::vector<int64_t> chosen(rows), counts(num_experts), begin(num_experts), source(rows);
    std::vector<float> gates(rows), weight(rows), scores(num_experts), choice(num_experts);
    for (int64_t token = 0; token < tokens; token++) {
        const float* logits = s.x2 + token * num_experts;
        std::copy(logits, logits + num_experts, scores.begin());
        if (s.score == SOFTMAX)
            softmax(scores.data(), num_experts);
        else
            for (float& value : scores) value = score_of(Score(s.score), value);
        for (int64_t e = 0; e < num_experts; e++)
            choice[e] = (s.by_logit ? logits[e] : scores[e]) + (s.gain ? s.gain[e] : 0.f);
        float total = 0;
        for (int64_t i = token * s.k; i < (token + 1) * s.k; i++) {
            const int64_t e = std::max_element(choice.begin(), choice.end()) - choice.begin();
            choice[e] = -std::numeric_limits<float>::infinity();
            chosen[i] = e, gates[i] = scores[e], total += scores[e], counts[e]++;
        }
        for (int64_t i = token * s.k; i < (token + 1) * s.k; i++) gates[i] *= s.normalize ? s.scale / total : s.scale;
    }
    for (int64_t e = 1; e < num_experts; e++) begin[e] = begin[e - 1] + counts[e - 1];
    for (int64_t i = 0; i < rows; i++) {
        const int64_t row = begin[chosen[i]]++;
        source[row] = i / s.k, weight[row] = gates[i];
    }
    Call call = *s.call;
    call.tokens = tokens, call.rows = rows, call.threads = threads, call.y = s.y;
    call.source = source.data(), call.weight = weight.data(), call.counts = counts.data();
    call.x = rounded<X>(s.x, tokens * call.width), call.x_stride = call.width;
    moeify_layer(&call, s.is_bf16);
}

}  // namespace

extern "C" void moeify_steps(const Turn* turn) {
    const Turn& t = *turn;
    const LayerCache* cache = t.caches;
    for (const Step* s = t.steps; s < t.steps + t.count; s++) switch (Kind(s->kind)) {
            case NORM: norm(*s, t.tokens); break;
            case LINEAR: s->is_bf16 ? linear<Bf16>(*s, t.tokens, t.threads) : linear<float>(*s, t.tokens, t.threads); break;
            case ROTATE: rotate(*s, t); break;
            case ATTEND: s->is_bf16 ? attend<Bf16>(*s, t, *cache) : attend<float>(*s, t, *cache); cache++; break;
            case GATED_ACTIVATION: gated_activation(Gating(s->gating), s->activation, s->x, s->x2, t.tokens * s->width, s->y); break;
            case EXPERTS: s->is_bf16 ? experts<Bf16>(*s, t.tokens, t.threads) : experts<float>(*s, t.tokens, t.threads);
        }
}
