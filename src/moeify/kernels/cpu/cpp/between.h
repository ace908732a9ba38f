// What lies between the up and the down projection of some rows: hidden = act(up), or act(gate) · up with gate and up side
// by side. Given the gradient of the loss by scale · hidden, that by `before` instead, and that by each row's scale.
#pragma once
#include <cstdint>

struct Between {
    const void* before;    // (R, H), or (R, 2 H) if gated
    const void* gradient;  // (R, H), or null
    const float* scale;    // (R), with a gradient
    void* out;             // hidden, (R, H); with a gradient that by `before`, in its shape
    float* dots;           // (R), gradient · hidden, which is the gradient by the scale
    int64_t rows, hidden;
    int32_t gating, activation, is_bf16, threads;
};

extern "C" void moeify_between(const Between* call);
