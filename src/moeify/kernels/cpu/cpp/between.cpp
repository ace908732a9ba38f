// The activation of rows between two projections, and its gradient, in one pass each; between.h describes them.
#include "between.h"

#include <algorithm>

#include "activations.h"

namespace {

template <class X>
struct Rows {
    const Between& call;
    const bool gated = call.gating == GLU;
    const Activation act = Activation(call.activation);

    const X* before(int64_t row) const { return (const X*)call.before + row * width(); }
    X* out(int64_t row, int64_t columns) const { return (X*)call.out + row * columns; }
    int64_t width() const { return (gated ? 2 : 1) * call.hidden; }

    void activate(int64_t row) const {
        const X *gate = before(row), *up = gate + call.hidden;
        X* to = out(row, call.hidden);
        by_vectors([&](int64_t i, int64_t count) {
            const Floats value = ::activate(act, some(gate + i, count));
            put(to + i, gated ? value * some(up + i, count) : value, count);
        });
    }

    void differentiate(int64_t row) const {
        const X *gate = before(row), *up = gate + call.hidden, *gradient = (const X*)call.gradient + row * call.hidden;
        X *to_gate = out(row, width()), *to_up = to_gate + call.hidden;
        const float scale = call.scale[row];
        Floats dot = {};
        by_vectors([&](int64_t i, int64_t count) {
            const Floats d = some(gradient + i, count);
            const Sloped of = activate_with_slope(act, some(gate + i, count));
            const Floats factor = gated ? some(up + i, count) : all(1.f);
            dot += d * of.value * factor;
            put(to_gate + i, d * scale * factor * of.slope, count);
            if (gated) put(to_up + i, d * scale * of.value, count);
        });
        call.dots[row] = sum(dot);
    }

  private:
    template <class F>
    void by_vectors(F f) const {
        for (int64_t i = 0; i < call.hidden; i += W) f(i, std::min<int64_t>(W, call.hidden - i));
    }
    static INLINE Floats some(const X* p, int64_t count) { return count < W ? load_first(p, count) : load(p); }
    static INLINE void put(X* p, Floats x, int64_t count) { count < W ? store_first(p, x, count) : store(p, x); }
};

template <class X>
void run(const Between& call) {
    const Rows<X> rows{call};
#pragma omp parallel for schedule(static) num_threads(call.threads) if (call.threads > 1)
    for (int64_t row = 0; row < call.rows; row++) call.gradient ? rows.differentiate(row) : rows.activate(row);
}

}  // namespace

extern "C" void moeify_between(const Between* call) {
    if (call->is_bf16)
        run<Bf16>(*call);
    else
        run<float>(*call);
}
