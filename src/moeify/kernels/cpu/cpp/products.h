// Grouped GEMMs: rows sorted by expert times the matrices of their experts, for few rows per expert. Every matrix is
// read or written once.
#pragma once
#include "vectors.h"

enum Layout { NT, NN, TN };

struct Run {  // consecutive rows of one expert
    int64_t expert, first, count;
};

struct Products {
    const void *left, *right;  // NT: rows (R, width); NN: rows (R, height); TN: (R, height) and (R, width)
    void* out;                 // NT: (R, height); NN: (R, width)
    int64_t left_stride, right_stride;
    void* weight;              // (E, height, width); TN writes it
    int64_t expert_stride, row_stride, height, width;
    const Run* runs;
    int64_t count;
    int32_t layout, is_bf16;
    int32_t adds;              // TN: += instead of =
    int32_t threads;
};

extern "C" void moeify_products(const Products* call);
