// Products of sorted rows with the matrices of their experts, for experts that have few rows: every matrix is read once,
// or written once, and nothing else is large.
#pragma once
#include "vectors.h"

enum ProductKind { FORTH, BACK, OUTER };

struct Run {  // rows of one expert
    int64_t expert, first, count;
};

struct Products {
    const void *left, *right;  // FORTH: rows (R, width); BACK: rows (R, height); OUTER: (R, height) and (R, width)
    void* out;                 // FORTH: (R, height); BACK: (R, width)
    int64_t left_stride, right_stride;
    void* weight;              // (E, height, width); OUTER writes it
    int64_t expert_stride, row_stride, height, width;
    const Run* runs;
    int64_t count;
    int32_t kind, is_bf16;
    int32_t adds;              // OUTER: += instead of =
    int32_t threads;
};

extern "C" void moeify_products(const Products* call);
