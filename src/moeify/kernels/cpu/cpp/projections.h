// Stacked projections, one matrix per expert, by storage format of the weights.
#pragma once
#include "dots.h"
#include "int4.h"

enum Format { FLOAT32, BFLOAT16, INT8, INT4 };

struct Stack {  // projections of all experts; strides are in elements, for INT4 in bytes
    const void* data;
    const float* scales;
    const void* bias;
    int64_t expert_stride, row_stride, bias_stride;
    int32_t format, group_size;  // `group_size`: the weights of a row that share a scale
    int32_t in_order, prefetch;

    Reading reading() const { return {in_order != 0, Prefetch(prefetch)}; }
};

constexpr int BLOCK = 64;  // output columns of a block, at most
constexpr int PANEL = 24;  // rows that share a block of weights, at most
constexpr int MAX_ROWS = 8;     // rows per expert up to which weights are not unpacked to scratch memory

struct Columns {  // `count` columns of a projection: first, first + step, ...
    int64_t first, step;
    int count;
};

struct Place {  // the first of the columns that are needed next, to prefetch
    int64_t expert, column;
};

struct Block {  // one product: columns of one expert times some of its rows
    int64_t expert;
    Columns columns;
    Place next;
    int64_t rows_of_expert;
    bool is_new;  // whether this is the first panel of rows for these columns
};

// Unquantised weights.
template <class X>
struct Dense {
    static constexpr int widest = BLOCK;
    const Stack& s;

    static int64_t scratch_size(int64_t) { return 0; }

    const X* at(int64_t expert, int64_t column) const {
        return (const X*)s.data + expert * s.expert_stride + column * s.row_stride;
    }
    void multiply(const Block& b, const X* const* x, int rows, int64_t k, float* out, X*) const {
        product(at(b.expert, b.columns.first), b.columns.step * s.row_stride, b.columns.count,
                at(b.next.expert, b.next.column), x, rows, k, out, BLOCK, s.reading());
    }
};

template <class X>
void unpack(const int8_t* w, int64_t k, X* out) {
    int64_t i = 0;
    for (; i + W <= k; i += W) store(out + i, load(w + i));
    if (i < k) store_first(out + i, load_first(w + i, k - i), k - i);
}

// int8 weights with a scale per row.
template <class X>
struct Int8 {
    static constexpr int widest = 16;
    const Stack& s;

    static int64_t scratch_size(int64_t k) { return widest * k; }

    const int8_t* at(int64_t expert, int64_t column) const {
        return (const int8_t*)s.data + expert * s.expert_stride + column * s.row_stride;
    }
    void multiply(const Block& b, const X* const* x, int rows, int64_t k, float* out, X* scratch) const {
        const Columns& c = b.columns;
        const int8_t* w = at(b.expert, c.first);
        if (b.rows_of_expert <= MAX_ROWS) {
            product(w, c.step * s.row_stride, c.count, at(b.next.expert, b.next.column), x, rows, k, out, BLOCK,
                    s.reading());
        } else {
            for (int n = 0; b.is_new && n < c.count; n++)
                unpack(w + n * c.step * s.row_stride, k, scratch + n * k);
            product(scratch, k, c.count, scratch, x, rows, k, out, BLOCK);
        }
        const float* scales = s.scales + b.expert * (s.expert_stride / s.row_stride);
        for (int m = 0; m < rows; m++)
            for (int n = 0; n < c.count; n++) out[m * BLOCK + n] *= scales[c.first + n * c.step];
    }
};

// int4 weights with a scale per group of weights in a row.
template <class X>
struct Int4 {
    static constexpr int widest = 16;
    const Stack& s;

    static int64_t scratch_size(int64_t k) { return widest * (k + INT4_BLOCK); }

    void multiply(const Block& b, const X* const* x, int rows, int64_t k, float* out, X* scratch) const {
        const Columns& c = b.columns;
        const int64_t blocks = (k + INT4_BLOCK - 1) / INT4_BLOCK, padded = blocks * INT4_BLOCK, groups = padded / s.group_size;
        const int64_t row = b.expert * (s.expert_stride / s.row_stride) + c.first;
        const uint8_t* w = (const uint8_t*)s.data + row * s.row_stride;
        const float* scales = s.scales + row * groups;
        if (b.rows_of_expert > MAX_ROWS) {
            for (int n = 0; b.is_new && n < c.count; n++)
                unpack(w + n * c.step * s.row_stride, scales + n * c.step * groups, s.group_size, blocks, scratch + n * padded);
            product(scratch, padded, c.count, scratch, x, rows, k, out, BLOCK);
            return;
        }
        const X* full[MAX_ROWS];
        for (int m = 0; m < rows; m++) {
            full[m] = x[m];
            if (k == padded) continue;
            std::memcpy(scratch + m * padded, x[m], k * sizeof(X));
            std::memset((void*)(scratch + m * padded + k), 0, (padded - k) * sizeof(X));
            full[m] = scratch + m * padded;
        }
        for (int n = 0; n < c.count; n += 2) {
            const int64_t at = n * c.step, pair = n + 1 < c.count ? c.step : 0;
            for (int m = 0; m < rows; m += 2) {
                float sums[2][2];
                const uint8_t* here = w + at * s.row_stride;
                if (m + 1 < rows)
                    int4_dots<2>(here, pair * s.row_stride, scales + at * groups, pair * groups, s.group_size, blocks,
                                   full + m, sums);
                else
                    int4_dots<1>(here, pair * s.row_stride, scales + at * groups, pair * groups, s.group_size, blocks,
                                   full + m, sums);
                for (int i = 0; i < (m + 1 < rows ? 2 : 1); i++)
                    for (int j = 0; j < (pair ? 2 : 1); j++) out[(m + i) * BLOCK + n + j] = sums[i][j];
            }
        }
    }
};
