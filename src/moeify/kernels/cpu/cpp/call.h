// The arguments of a fused sparse layer.
#pragma once
#include "projections.h"

struct Call {
    const void* x;
    int64_t x_stride, tokens, rows;
    const int64_t* source;  // the token of every row
    const float* weight;    // the weight of every row
    const int64_t* counts;  // the rows of every expert
    int64_t experts, width, hidden, width_out;
    Stack up, down;
    int32_t gating, activation;
    float alpha, limit;
    float* y;  // (tokens, width_out), accumulated into
    int32_t threads;
};

// Returns 0, or 1 if the counts do not sum to `rows` or a source is not a token index.
extern "C" int32_t moeify_layer(const Call* call, int32_t is_bf16);
