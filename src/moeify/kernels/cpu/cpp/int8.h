// Integer products: int8 or int4 weights times activations quantised to int8 in groups of 64 that share a scale. An
// instruction multiplies two to four times as many numbers as one of floats does, and none is converted first.
#pragma once
#include "projections.h"

#include <algorithm>
#include <vector>

constexpr int INT8_MAX_ROWS = 24;  // rows per expert up to which integer products are used

struct Token {  // one quantised row of activations, zero-padded
    const int8_t* numbers;  // in the order of `Span`
    const float* scales;    // one per group of 64
    const float* sums;      // scaled sum of each group; products use weights w + OFFSET, and sums correct for it
};

constexpr int SHARED = 64;       // group size
constexpr int SCALE_LEAD = 256;  // prefetch distance of the scales of groups, in scales

#if defined(__AVX512F__) && !defined(__AVX512BF16__)
constexpr bool FOR_INT8 = false;  // weights of 8 bits are read as fast into floats, and activations are not rounded
#else
constexpr bool FOR_INT8 = true;
#endif

#if defined(__AVX512VNNI__) || defined(__AVX512BF16__)
#include "int8_avx512.h"
#elif defined(__AVX2__) && !defined(__AVX512F__)
#include "int8_avx2.h"
#endif

#if defined(BY_INT8)
constexpr int SCALES = W;  // scales that are loaded together

struct Rounded {  // rows of activations quantised to int8
    int64_t width = 0;
    std::vector<int8_t> numbers;
    std::vector<float> scales, sums;

    void resize(int64_t rows, int64_t k) {
        width = (k + SCALES * SHARED - 1) / (SCALES * SHARED) * SCALES * SHARED;
        const size_t size = rows * width;
        if (numbers.size() < size) numbers.resize(size), scales.resize(size / SHARED), sums.resize(size / SHARED);
    }
    Token operator[](int64_t row) const {
        const int64_t at = row * width;
        return {numbers.data() + at, scales.data() + at / SHARED, sums.data() + at / SHARED};
    }
    template <class X>
    void round(int64_t row, const X* x, int64_t k) {
        for (int64_t begin = 0; begin < width; begin += SPAN) {
            alignas(64) float padded[SPAN] = {};
            for (int64_t i = 0; i < SPAN && begin + i < k; i += W)
                store(padded + i, begin + i + W <= k ? load(x + begin + i) : load_first(x + begin + i, k - begin - i));
            Group groups[SPAN / SHARED];
            const int64_t at = (row * width + begin) / SHARED;
            for (int g = 0; g < SPAN / SHARED; g++) {
                groups[g] = round_group(padded + g * SHARED);
                scales[at + g] = groups[g].scale, sums[at + g] = groups[g].sum;
            }
            const Span span = in_order(groups);
            std::memcpy(numbers.data() + at * SHARED, &span, SPAN);
        }
    }
};

// out[c][m] = w[c] · x[m], as a vector of partial sums, for c < C, m < M. The weights and scales behind these are
// prefetched in memory order.
template <Format format, int C, int M, Prefetch into>
BY_INT8 inline void int8_sums(const uint8_t* const* w, const float* const* scales, const Token* x, int64_t k,
                              Floats (*out)[M]) {
    constexpr int bytes = format == INT8 ? SPAN : SPAN / 2;
    const int64_t blocks = (k + INT4_BLOCK - 1) / INT4_BLOCK, row_bytes = format == INT8 ? k : blocks * INT4_BLOCK / 2;
    Floats total[C][M] = {};
    for (int64_t begin = 0; begin < k; begin += SCALES * SHARED) {
        const int64_t end = std::min<int64_t>(begin + SCALES * SHARED, k);
        const int64_t groups = std::min<int64_t>(SCALES, 2 * blocks - begin / SHARED);
        alignas(64) float both[C][M][SCALES];  // products of weight and activation scales
#pragma GCC unroll 4
        for (int c = 0; c < C; c++) {
            if (format == INT4) __builtin_prefetch(scales[0] + SCALE_LEAD + begin / SHARED * C + c * SCALES);
            const Floats scale = format == INT8 ? all(1) : first_scales(scales[c] + begin / SHARED, groups);
#pragma GCC unroll 8
            for (int m = 0; m < M; m++) {
                store(both[c][m], scale * load(x[m].scales + begin / SHARED));
                if (OFFSET<format> != 0) total[c][m] -= OFFSET<format> * scale * load(x[m].sums + begin / SHARED);
            }
        }
        for (int64_t i = begin; i < end; i += SPAN) {
            Span numbers[C];
#pragma GCC unroll 4
            for (int c = 0; c < C; c++) {
                const int64_t at = i / SPAN * bytes;
                for (int line = 0; line < bytes; line += LINE)
                    prefetch<into>(w[0] + LEAD + at * C + c * bytes + line);
                if (at + bytes <= row_bytes) {
                    numbers[c] = weights_of<format>(w[c] + at);
                } else {
                    uint8_t padded[bytes];
                    std::memcpy(padded, w[c] + at, row_bytes - at);
                    numbers[c] = weights_of<format>(padded);
                }
            }
#pragma GCC unroll 8
            for (int m = 0; m < M; m++)
#pragma GCC unroll 4
                for (int c = 0; c < C; c++) {
                    const Floats scale = scales_of(both[c][m] + (i - begin) / SHARED);
                    total[c][m] += products_of<format>(numbers[c], x[m].numbers + i) * scale;
                }
        }
    }
#pragma GCC unroll 4
    for (int c = 0; c < C; c++)
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) out[c][m] = total[c][m];
}

// The same for one row of activations, with weights read as measured.
template <Format format, int C, Prefetch into>
BY_INT8 inline void read_int8_sums(const uint8_t* const* w, const float* const* scales, bool in_order, const Token* x,
                                   int64_t k, Floats (*out)[1]) {
    if (!in_order) return int8_sums<format, C, 1, into>(w, scales, x, k, out);
    for (int c = 0; c < C; c++) int8_sums<format, 1, 1, into>(w + c, scales + c, x, k, out + c);
}

template <Format format, int C>
BY_INT8 inline void int8_sums(const uint8_t* const* w, const float* const* scales, Reading reading, const Token* x,
                              int64_t k, Floats (*out)[1]) {
    switch (reading.prefetch) {
        case NEVER: return read_int8_sums<format, C, NEVER>(w, scales, reading.in_order, x, k, out);
        case INTO_L2: return read_int8_sums<format, C, INTO_L2>(w, scales, reading.in_order, x, k, out);
        case INTO_L1: return read_int8_sums<format, C, INTO_L1>(w, scales, reading.in_order, x, k, out);
    }
}

template <Format format, int C, int M>
BY_INT8 inline void int8_sums(const uint8_t* const* w, const float* const* scales, Reading, const Token* x, int64_t k,
                              Floats (*out)[M]) {
    int8_sums<format, C, M, INTO_L2>(w, scales, x, k, out);
}

// out[m * stride + c] = w[c] · x[m] for c < C, m < M
template <Format format, int C, int M>
BY_INT8 inline void int8_dots(const uint8_t* const* w, const float* const* scales, Reading reading, const Token* x,
                              int64_t k, float* out, int64_t stride) {
    Floats total[C][M];
    int8_sums<format, C>(w, scales, reading, x, k, total);
#pragma GCC unroll 8
    for (int m = 0; format == INT8 && m < M; m++)
#pragma GCC unroll 4
        for (int c = 0; c < C; c++) total[c][m] *= *scales[c];
#pragma GCC unroll 8
    for (int m = 0; m < M; m += 4 / C) {
        const int other = C == 4 || m + 1 == M ? m : m + 1;
        float four[4];
        sums(total[0][m], total[1][m], total[2 % C][other], total[3 % C][other], four);
        std::memcpy(out + m * stride, four, C * sizeof(float));
        if (other > m) std::memcpy(out + other * stride, four + C, C * sizeof(float));
    }
}

template <Format format>
void some_byte_dots(int m, const uint8_t* const* w, const float* const* scales, Reading reading, const Token* x,
                    int64_t k, float* out, int64_t stride) {
    switch (m) {
        case 1: return int8_dots<format, 4, 1>(w, scales, reading, x, k, out, stride);
        case 2: return int8_dots<format, (NARROW < 2 ? 2 : 4), 2>(w, scales, reading, x, k, out, stride);
        case 3: return int8_dots<format, 2, 3>(w, scales, reading, x, k, out, stride);
        case 4: return int8_dots<format, 2, 4>(w, scales, reading, x, k, out, stride);
        case 5: return int8_dots<format, 2, 5>(w, scales, reading, x, k, out, stride);
        case 6: return int8_dots<format, 2, 6>(w, scales, reading, x, k, out, stride);
    }
}

template <Format format>
void int8_products(const Stack& s, int64_t expert, const Columns& columns, const Token* x, int rows, int64_t k, float* out,
                   int64_t stride) {
    const int64_t begin = expert * (s.expert_stride / s.row_stride) + columns.first;
    const int64_t groups = format == INT8 ? 1 : (k + INT4_BLOCK - 1) / INT4_BLOCK * 2;
    const int width = rows <= NARROW ? 4 : 2, parts = (rows + AT_ONCE - 1) / AT_ONCE;
    for (int n = 0; n < columns.count; n += width) {
        const uint8_t* w[4];
        const float* scales[4];
        for (int c = 0; c < width; c++) {
            const int64_t row = begin + std::min(n + c, columns.count - 1) * columns.step;
            w[c] = (const uint8_t*)s.data + row * s.row_stride, scales[c] = s.scales + row * groups;
        }
        for (int part = 0, m = 0; part < parts; part++) {
            const int height = rows * (part + 1) / parts - m;
            some_byte_dots<format>(height, w, scales, s.reading(), x + m, k, out + m * stride + n, stride);
            m += height;
        }
    }
}

// out[m * stride + n] = column n of an expert · x[m]; `out` has space for a multiple of four columns.
inline void int8_products(const Stack& s, int64_t expert, const Columns& columns, const Token* x, int rows, int64_t k,
                          float* out, int64_t stride) {
    s.format == INT8 ? int8_products<INT8>(s, expert, columns, x, rows, k, out, stride)
                     : int8_products<INT4>(s, expert, columns, x, rows, k, out, stride);
}

// Whether a projection's weights support integer products.
template <class X>
bool takes_int8(const Stack& s) {
    return sizeof(X) == sizeof(Bf16) && ((FOR_INT8 && s.format == INT8) || (s.format == INT4 && s.group_size == SHARED));
}
#else
struct Rounded {
    void resize(int64_t, int64_t) {}
    Token operator[](int64_t) const { return {}; }
    template <class X>
    void round(int64_t, const X*, int64_t) {}
};
inline void int8_products(const Stack&, int64_t, const Columns&, const Token*, int, int64_t, float*, int64_t) {}
template <class X>
bool takes_int8(const Stack&) {
    return false;
}
#endif
