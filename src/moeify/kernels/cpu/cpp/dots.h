// Dot products of C neighbouring weight rows with M inputs, all of length K: the inner loop of every kernel.
#pragma once
#include "vectors.h"

constexpr int LINE = 64;    // bytes of a cache line
constexpr int LEAD = 8192;  // minimal prefetch distance, in bytes
constexpr int COLUMNS = 4;  // weight rows that share the loads of the activations
#if defined(__AVX512F__)
constexpr int ROWS = 6;  // activations that share the loads of the weights: 4 x 6 sums and 4 + 1 operands in 32 registers
#elif defined(__AVX2__)
constexpr int ROWS = 2;
#else
constexpr int ROWS = 4;
#endif

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
             float* out, int64_t out_stride) {
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
