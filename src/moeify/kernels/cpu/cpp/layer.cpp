// A fused sparse layer: gather, up projection, activation, down projection, weighted sum.
//
// Rows are read through pointers, so no gathered copy is made. Each thread computes its own output columns, so outputs
// are accumulated without atomics, always in the order of the rows.
#include "activations.h"
#include "int8.h"
#include "call.h"

#include <algorithm>
#include <vector>

namespace {

constexpr int64_t HIDDEN_BYTES = 4 << 20;  // activations per chunk: small enough to stay in cache, large enough that
                                           // weights are rarely read again
struct Segment {
    int64_t expert, first, rows;
};
typedef std::vector<Segment> Chunk;

std::vector<Chunk> chunks_of(const Call& call, int64_t most) {
    std::vector<Chunk> chunks(1);
    int64_t row = 0, filled = 0;
    for (int64_t e = 0; e < call.experts; e++)
        for (int64_t left = call.counts[e]; left > 0;) {
            if (filled == most) chunks.emplace_back(), filled = 0;
            const int64_t rows = std::min(left, most - filled);
            chunks.back().push_back({e, row, rows});
            row += rows, left -= rows, filled += rows;
        }
    return chunks;
}

template <class X>
struct Inputs {  // input rows of a projection, and the same quantised to int8 for experts with few rows
    X* x;
    int64_t stride;
    Rounded* rounded;

    void round(int64_t rows, int64_t k) const {  // called by all threads of a parallel region
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; row++) rounded->round(row, x + row * stride, k);
    }
};

template <class X, template <class> class Projection>
struct Layer {
    const Call& call;
    const Projection<X> up{call.up}, down{call.down};
    const bool may_round = takes_int8<X>(call.up) && takes_int8<X>(call.down);

    bool by_int8(const Segment& s) const { return may_round && call.counts[s.expert] <= INT8_MAX_ROWS; }

    bool any_by_int8(const Chunk& chunk) const {
        return std::any_of(chunk.begin(), chunk.end(), [&](const Segment& s) { return by_int8(s); });
    }

    void run() const {
        const int64_t most = std::max<int64_t>(PANEL, HIDDEN_BYTES / (call.hidden * int64_t(sizeof(X))));
        const std::vector<Chunk> chunks = chunks_of(call, most);
        int64_t rows = 0;
        for (const Segment& s : chunks.front()) rows += s.rows;
        static thread_local std::vector<X> kept;
        static thread_local Rounded tokens, units;
        if (int64_t(kept.size()) < rows * call.hidden) kept.resize(rows * call.hidden);
        const bool rounds = std::any_of(chunks.begin(), chunks.end(), [&](const Chunk& c) { return any_by_int8(c); });
        if (rounds) tokens.resize(call.tokens, call.width), units.resize(rows, call.hidden);
        const Inputs<const X> x{(const X*)call.x, call.x_stride, &tokens};
        const Inputs<X> hidden{kept.data(), call.hidden, &units};
#pragma omp parallel num_threads(call.threads) if (call.threads > 1)
        {
            static thread_local std::vector<X> scratch;
            const int64_t needed = std::max(2 * Projection<X>::scratch_size(call.width), Projection<X>::scratch_size(call.hidden));
            if (int64_t(scratch.size()) < needed) scratch.resize(needed);
            if (rounds) x.round(call.tokens, call.width);
            for (const Chunk& chunk : chunks) run(chunk, x, hidden, scratch.data());
        }
    }

    // Called by all threads of a parallel region; each loop ends with a barrier.
    void run(const Chunk& chunk, const Inputs<const X>& x, const Inputs<X>& hidden, X* scratch) const {
        const int64_t segments = chunk.size();
        if (segments == 0) return;
        const int64_t first = chunk.front().first;
        int64_t most = 0, rows = 0;
        for (const Segment& s : chunk) most = std::max(most, by_int8(s) ? 1 : s.rows), rows += s.rows;
        const int64_t size = most > MAX_ROWS ? Projection<X>::widest : BLOCK, blocks = (call.hidden + size - 1) / size;
#pragma omp for schedule(dynamic)
        for (int64_t unit = 0; unit < segments * blocks; unit++) {
            const Segment& s = chunk[unit / blocks];
            const int64_t column = unit % blocks * size;
            const int count = int(std::min(size, call.hidden - column));
            project_up(s, column, count, x, hidden.x + (s.first - first) * call.hidden, scratch);
        }
        if (any_by_int8(chunk)) hidden.round(rows, call.hidden);
        const int64_t shares = call.threads > 1 ? 4 * call.threads : 1, share = (call.width_out + shares - 1) / shares;
#pragma omp for schedule(dynamic)
        for (int64_t begin = 0; begin < call.width_out; begin += share) {
            const int64_t end = std::min(begin + share, call.width_out);
            for (const Segment& s : chunk)
                for (int64_t column = begin; column < end; column += size) {
                    const Columns c = {column, 1, int(std::min(size, end - column))};
                    project_down(s, c, hidden, s.first - first, scratch);
                }
        }
    }

    // hidden[row][column ...] = activation(up(x[source[row]]))
    void project_up(const Segment& s, int64_t column, int count, const Inputs<const X>& x, X* hidden, X* scratch) const {
        const Gating gating = Gating(call.gating);
        const int step = gating == CLAMPED ? 2 : 1;
        const Columns gates = {step * column, step, count};
        const Columns ups = {gating == CLAMPED ? 2 * column + 1 : call.hidden + column, step, count};
        const Place after = {s.expert, gates.first + step * count}, then = {s.expert, ups.first};
        alignas(64) float gate[PANEL * BLOCK], up_[PANEL * BLOCK];
        for (int64_t done = 0; done < s.rows; done += PANEL) {
            const int rows = int(std::min<int64_t>(PANEL, s.rows - done));
            const int64_t* tokens = call.source + s.first + done;
            const bool int8 = by_int8(s), is_new = done == 0;
            multiply(up, {s.expert, gates, gating == PLAIN ? after : then, s.rows, is_new}, x, tokens, rows, int8,
                     call.width, gate, scratch);
            if (gating != PLAIN)
                multiply(up, {s.expert, ups, after, s.rows, is_new}, x, tokens, rows, int8, call.width, up_,
                         scratch + Projection<X>::scratch_size(call.width));
            for (int m = 0; m < rows; m++) {
                X* to = hidden + (done + m) * call.hidden + column;
                for (int n = 0; n < count; n += W) {
                    const Floats value = gated_activation(gating, Activation(call.activation), call.alpha, call.limit,
                                                 load(gate + m * BLOCK + n), load(up_ + m * BLOCK + n));
                    n + W <= count ? store(to + n, value) : store_first(to + n, value, count - n);
                }
            }
        }
    }

    // y[source[row]][columns] += weight[row] * down(hidden[row])
    void project_down(const Segment& s, Columns c, const Inputs<X>& hidden, int64_t begin, X* scratch) const {
        alignas(64) float out[PANEL * BLOCK];
        for (int64_t done = 0; done < s.rows; done += PANEL) {
            const int rows = int(std::min<int64_t>(PANEL, s.rows - done));
            int64_t units[PANEL];
            for (int m = 0; m < rows; m++) units[m] = begin + done + m;
            multiply(down, {s.expert, c, {s.expert, c.first + c.count}, s.rows, done == 0}, hidden, units, rows,
                     by_int8(s), call.hidden, out, scratch);
            for (int m = 0; m < rows; m++) {
                const int64_t row = s.first + done + m;
                float* y = call.y + call.source[row] * call.width_out + c.first;
                for (int n = 0; n < c.count; n++) y[n] += call.weight[row] * out[m * BLOCK + n];
            }
        }
    }

    // out[m] = columns of the projection of in[which[m]]
    template <class In>
    static void multiply(const Projection<X>& projection, const Block& b, const Inputs<In>& in, const int64_t* which, int rows,
                         bool int8, int64_t k, float* out, X* scratch) {
        const X* x[PANEL];
        Token tokens[PANEL];
        for (int m = 0; m < rows; m++) x[m] = in.x + which[m] * in.stride;
        for (int m = 0; int8 && m < rows; m++) tokens[m] = (*in.rounded)[which[m]];
        if (int8)
            int8_products(projection.s, b.expert, b.columns, tokens, rows, k, out, BLOCK);
        else
            projection.multiply(b, x, rows, k, out, scratch);
        if (!projection.s.bias) return;
        const X* bias = (const X*)projection.s.bias + b.expert * projection.s.bias_stride + b.columns.first;
        for (int m = 0; m < rows; m++)
            for (int n = 0; n < b.columns.count; n++) out[m * BLOCK + n] += number(bias[n * b.columns.step]);
    }
};

template <class X>
void run(const Call& call) {
    if (call.up.format == INT8)
        Layer<X, Int8>{call}.run();
    else if (call.up.format == INT4)
        Layer<X, Int4>{call}.run();
    else
        Layer<X, Dense>{call}.run();
}

}  // namespace

extern "C" int32_t moeify_layer(const Call* call, int32_t is_bf16) {
    int64_t rows = 0;
    for (int64_t e = 0; e < call->experts; e++) rows += call->counts[e];
    bool fits = rows == call->rows;
    for (int64_t r = 0; r < call->rows; r++) fits &= call->source[r] >= 0 && call->source[r] < call->tokens;
    if (!fits) return 1;
    if (is_bf16)
        run<Bf16>(*call);
    else
        run<float>(*call);
    return 0;
}
