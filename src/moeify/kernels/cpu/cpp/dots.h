// Dot products of C neighbouring weight rows with M inputs, all of length K: the inner loop of every kernel.
#pragma once
#include "vectors.h"

constexpr int LINE = 64;    // bytes of a cache line
constexpr int LEAD = 8192;  // minimal prefetch distance, in bytes
constexpr int ORDERLY_LEAD = 4096;  // that of floats which are read one row after another
constexpr int COLUMNS = 4;  // weight rows that share the loads of the activations
#if defined(__AVX512F__)
constexpr int ROWS = 6;  // activations that share the loads of the weights: 4 x 6 sums and 4 + 1 operands in 32 registers
#elif defined(__AVX2__)
constexpr int ROWS = 2;
#else
constexpr int ROWS = 4;
#endif

enum Prefetch { NEVER, INTO_L2, INTO_L1 };

// How one row of activations reads weights that come from memory. What is fastest differs by processor, so it is measured.
struct Reading {
    bool in_order = true;  // one row of weights after another, a single stream, and not several rows abreast
    Prefetch prefetch = INTO_L2;
};

template <Prefetch into>
INLINE void prefetch(const void* p) {
    if (into != NEVER) __builtin_prefetch(p, 0, into == INTO_L1 ? 3 : 2);
}

// The multiply-adds of a step: one vector of fp32, two of bf16 as fp32, or one of pairs of bf16.
template <class Weight, class X>
struct Product {
    static constexpr int step = W, turns = 1, last = W;  // elements of a step, its vectors, and those of the last steps
    typedef Floats Vector;
    static INLINE Floats weights(const Weight* p, int turn) { return load(p); }
    static INLINE Floats first_weights(const Weight* p, int64_t count) { return load_first(p, count); }
    static INLINE Floats inputs(const X* p, int turn) { return load(p); }
    static INLINE Floats first_inputs(const X* p, int64_t count) { return load_first(p, count); }
    static INLINE Floats add(Floats sum, Floats w, Floats x) { return sum + w * x; }
};

#if defined(__AVX512BF16__)
template <>
struct Product<Bf16, Bf16> {
    static constexpr int step = 32, turns = 1, last = 32;
    typedef __m512i Vector;
    static INLINE Vector inputs(const Bf16* p, int turn) { return _mm512_loadu_si512(p); }
    static INLINE Vector first_inputs(const Bf16* p, int64_t count) {
        return _mm512_maskz_loadu_epi16(__mmask32((1ull << count) - 1), p);
    }
    static INLINE Vector weights(const Bf16* p, int turn) { return inputs(p, turn); }
    static INLINE Vector first_weights(const Bf16* p, int64_t count) { return first_inputs(p, count); }
    static INLINE Floats add(Floats sum, Vector w, Vector x) {
        return cast<Floats>(_mm512_dpbf16_ps(cast<__m512>(sum), cast<__m512bh>(w), cast<__m512bh>(x)));
    }
};

template <>
struct Product<int8_t, Bf16> {  // bf16 represents int8 exactly
    static constexpr int step = 32, turns = 1, last = 32;
    typedef __m512i Vector;
    static INLINE Vector inputs(const Bf16* p, int turn) { return _mm512_loadu_si512(p); }
    static INLINE Vector first_inputs(const Bf16* p, int64_t count) { return Product<Bf16, Bf16>::first_inputs(p, count); }
    static INLINE Vector weights(const int8_t* p, int turn) {
        return cast<__m512i>(_mm512_cvtne2ps_pbh(cast<__m512>(load(p + 16)), cast<__m512>(load(p))));
    }
    static INLINE Vector first_weights(const int8_t* p, int64_t count) {
        int8_t padded[step] = {};
        std::memcpy(padded, p, count);
        return weights(padded, 0);
    }
    static INLINE Floats add(Floats sum, Vector w, Vector x) { return Product<Bf16, Bf16>::add(sum, w, x); }
};
#elif defined(__AVX2__)
template <>
struct Product<Bf16, Bf16> {  // the even numbers, then the odd ones: one shift or mask each, where widening takes two
    static constexpr int step = 2 * W, turns = 2, last = W;
    typedef Floats Vector;
    static INLINE Floats inputs(const Bf16* p, int turn) {
        const Words both = load_bits<Words>(p);
        return cast<Floats>(turn == 0 ? both << 16 : both & 0xffff0000);
    }
    static INLINE Floats first_inputs(const Bf16* p, int64_t count) { return load_first(p, count); }
    static INLINE Floats weights(const Bf16* p, int turn) { return inputs(p, turn); }
    static INLINE Floats first_weights(const Bf16* p, int64_t count) { return load_first(p, count); }
    static INLINE Floats add(Floats sum, Floats w, Floats x) { return sum + w * x; }
};
#endif

// out[m * out_stride + c] = w[c] · x[m] for c < C, m < M. Weight rows are `w_stride` elements apart.
// `next` are the weights that are needed next, prefetched in memory order.
template <int C, int M, class Weight, class X>
INLINE void dots(const Weight* w, int64_t w_stride, const Weight* next, const X* const* x, int64_t k, float* out,
                 int64_t out_stride) {
    typedef Product<Weight, X> P;
    Floats sum_of[M][C] = {};
    int64_t i = 0;
    for (; i + P::step <= k; i += P::step) {
#pragma GCC unroll 2
        for (int turn = 0; turn < P::turns; turn++) {
            typename P::Vector weights[C];
#pragma GCC unroll 8
            for (int c = 0; c < C; c++) {
                weights[c] = P::weights(w + c * w_stride + i, turn);
                if (turn == 0 && c * P::step * sizeof(Weight) % LINE == 0)
                    __builtin_prefetch(next + i * C + c * P::step);
            }
#pragma GCC unroll 8
            for (int m = 0; m < M; m++) {
                const typename P::Vector input = P::inputs(x[m] + i, turn);
#pragma GCC unroll 8
                for (int c = 0; c < C; c++) sum_of[m][c] = P::add(sum_of[m][c], weights[c], input);
            }
        }
    }
    for (; i < k; i += P::last) {
        const int64_t count = k - i < P::last ? k - i : P::last;
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) {
            const typename P::Vector input = P::first_inputs(x[m] + i, count);
#pragma GCC unroll 8
            for (int c = 0; c < C; c++)
                sum_of[m][c] = P::add(sum_of[m][c], P::first_weights(w + c * w_stride + i, count), input);
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) {
        if (C == 4)
            sums(sum_of[m][0], sum_of[m][1 % C], sum_of[m][2 % C], sum_of[m][3 % C], out + m * out_stride);
        else
            for (int c = 0; c < C; c++) out[m * out_stride + c] = sum(sum_of[m][c]);
    }
}

// out[c] = w[c] · x for c < C, one row of weights after another.
template <Prefetch into, int C, class Weight, class X>
INLINE void dots_in_order(const Weight* w, int64_t w_stride, const X* x, int64_t k, float* out) {
    typedef Product<Weight, X> P;
    constexpr int parts = 4, steps = parts / P::turns;
    Floats total[C];
#pragma GCC unroll 8
    for (int c = 0; c < C; c++) {
        const Weight* row = w + c * w_stride;
        Floats part[parts] = {};
        int64_t i = 0;
        for (; i + steps * P::step <= k; i += steps * P::step) {
            for (size_t line = 0; line < steps * P::step * sizeof(Weight); line += LINE)
                prefetch<into>((const char*)(row + i) + ORDERLY_LEAD + line);
#pragma GCC unroll 4
            for (int p = 0; p < parts; p++) {
                const int64_t at = i + p / P::turns * P::step;
                part[p] = P::add(part[p], P::weights(row + at, p % P::turns), P::inputs(x + at, p % P::turns));
            }
        }
        for (; i + P::step <= k; i += P::step)
            for (int turn = 0; turn < P::turns; turn++)
                part[turn] = P::add(part[turn], P::weights(row + i, turn), P::inputs(x + i, turn));
        for (; i < k; i += P::last) {
            const int64_t count = k - i < P::last ? k - i : P::last;
            part[0] = P::add(part[0], P::first_weights(row + i, count), P::first_inputs(x + i, count));
        }
        total[c] = (part[0] + part[1]) + (part[2] + part[3]);
    }
    if (C == 4)
        sums(total[0], total[1 % C], total[2 % C], total[3 % C], out);
    else
        for (int c = 0; c < C; c++) out[c] = sum(total[c]);
}

// out[n] = w[n] · x for n < columns, one row of weights after another.
template <Prefetch into, class Weight, class X>
void product_in_order(const Weight* w, int64_t w_stride, int columns, const X* x, int64_t k, float* out) {
    int n = 0;
    for (; n + COLUMNS <= columns; n += COLUMNS) dots_in_order<into, COLUMNS>(w + n * w_stride, w_stride, x, k, out + n);
    for (; n < columns; n++) dots_in_order<into, 1>(w + n * w_stride, w_stride, x, k, out + n);
}

template <int C, class Weight, class X>
void some_dots(int m, const Weight* w, int64_t w_stride, const Weight* next, const X* const* x, int64_t k, float* out,
               int64_t out_stride) {
    switch (m) {
        case 1: return dots<C, 1>(w, w_stride, next, x, k, out, out_stride);
        case 2: return dots<C, 2>(w, w_stride, next, x, k, out, out_stride);
        case 3: return dots<C, (ROWS > 2 ? 3 : 1)>(w, w_stride, next, x, k, out, out_stride);
        case 4: return dots<C, (ROWS > 2 ? 4 : 1)>(w, w_stride, next, x, k, out, out_stride);
        case 5: return dots<C, (ROWS > 4 ? 5 : 1)>(w, w_stride, next, x, k, out, out_stride);
        case 6: return dots<C, (ROWS > 4 ? 6 : 1)>(w, w_stride, next, x, k, out, out_stride);
    }
}

// out[m * out_stride + n] = w[n] · x[m] for n < columns, m < rows; `next` are the weights that are needed next.
template <class Weight, class X>
void product(const Weight* w, int64_t w_stride, int columns, const Weight* next, const X* const* x, int rows, int64_t k,
             float* out, int64_t out_stride, Reading reading = {}) {
    if (rows == 1 && reading.in_order) switch (reading.prefetch) {
            case NEVER: return product_in_order<NEVER>(w, w_stride, columns, *x, k, out);
            case INTO_L2: return product_in_order<INTO_L2>(w, w_stride, columns, *x, k, out);
            case INTO_L1: return product_in_order<INTO_L1>(w, w_stride, columns, *x, k, out);
        }
    const int64_t some = COLUMNS * k * sizeof(Weight), lead = (LEAD + some - 1) / some * COLUMNS;
    const int groups = (rows + ROWS - 1) / ROWS, most = (rows + groups - 1) / groups;
    for (int n = 0; n < columns;) {
        const int width = columns - n >= COLUMNS ? COLUMNS : 1, then = n + int(lead);
        const Weight* here = w + n * w_stride;
        const Weight* ahead = then < columns ? w + then * w_stride : next + (then - columns) * w_stride;
        for (int m = 0; m < rows; m += most) {
            const int height = rows - m < most ? rows - m : most;
            float* to = out + m * out_stride + n;
            if (width == COLUMNS)
                some_dots<COLUMNS>(height, here, w_stride, ahead, x + m, k, to, out_stride);
            else
                some_dots<1>(height, here, w_stride, ahead, x + m, k, to, out_stride);
        }
        n += width;
    }
}
