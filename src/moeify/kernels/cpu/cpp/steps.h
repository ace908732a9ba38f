// What a decoder does between its embedding and its logits, for one token of every sequence, as a list of steps.
//
// Numbers between steps are floats in buffers (tokens, width) that the caller owns. Products round their inputs to the
// type that the weights are multiplied in.
#pragma once
#include "activations.h"
#include "call.h"

enum Kind { NORM, LINEAR, ROTATE, ATTEND, GATED_ACTIVATION, EXPERTS };
enum Score { SOFTMAX, SIGMOID, SQRT_SOFTPLUS };

struct Step {
    int32_t kind, is_bf16;   // `is_bf16`: the type to multiply in, and that of keys and values
    int32_t adds;            // LINEAR: y += instead of y =
    int32_t heads, kv_heads; // NORM, ROTATE, ATTEND: pieces of a token, each `width` numbers
    int32_t gating, activation, score, by_logit, normalize, k;
    float eps, scale;        // NORM; ATTEND: of the scores, EXPERTS: of the weights
    const float *x, *x2, *x3;
    float* y;
    int64_t width, width_out;
    const float* gain;       // NORM: (width), EXPERTS: what moves choices (E), or null
    Stack weights;               // LINEAR
    const Call* call;        // EXPERTS: what does not depend on the tokens; x2 are the logits
};

struct LayerCache {  // keys or values of a layer: (tokens, kv_heads, capacity, width)
    void *keys, *values;
    int64_t token_stride, head_stride;
};

struct Turn {
    const Step* steps;
    int64_t count, tokens;
    const float *cos, *sin;  // (tokens, rotated)
    int64_t rotated;
    const LayerCache* caches;       // of each ATTEND in turn
    int64_t length;          // positions that are filled already
    const int64_t* first;    // of every sequence, the first position that is no padding
    int32_t threads;
};
