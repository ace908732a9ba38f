// One decoding step from the embeddings to the logits, one token per sequence, as a list of operations ("steps").
//
// Activations between steps are fp32 in buffers (tokens, width) that the caller owns. Products cast their inputs to the
// compute dtype.
#pragma once
#include "activations.h"
#include "call.h"

enum Kind { NORM, LINEAR, ROTATE, ATTEND, GATED_ACTIVATION, EXPERTS };
enum Score { SOFTMAX, SIGMOID, SQRT_SOFTPLUS };

struct Step {
    int32_t kind, is_bf16;   // `is_bf16`: whether bf16 is the compute dtype and that of the cache
    int32_t adds;            // LINEAR: y += instead of y =
    int32_t heads, kv_heads; // NORM, ROTATE, ATTEND: heads per token, each `width` elements
    int32_t gating, activation, score, by_logit, normalize, k;
    float eps, scale;        // `eps`: NORM; `scale`: of ATTEND's scores and EXPERTS' top-k weights
    const float *x, *x2, *x3;
    float* y;
    int64_t width, width_out;
    const float* gain;       // NORM: (width); EXPERTS: selection bias (E), or null
    Stack weights;               // LINEAR
    const Call* call;        // EXPERTS: the arguments that do not depend on tokens; x2: logits
};

struct LayerCache {  // keys and values of a layer, each (tokens, kv_heads, capacity, width)
    void *keys, *values;
    int64_t token_stride, head_stride;
};

struct Turn {
    const Step* steps;
    int64_t count, tokens;
    const float *cos, *sin;  // (tokens, rotated)
    int64_t rotated;
    const LayerCache* caches;       // one per ATTEND, in order
    int64_t length;          // positions in the cache before this step
    const int64_t* first;    // per sequence, the first position that is not padding
    int32_t threads;
};
