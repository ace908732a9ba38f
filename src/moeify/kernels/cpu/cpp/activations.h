// Activations of feed-forward experts, on vectors.
#pragma once
#include "vectors.h"

enum Activation { SILU, GELU, GELU_TANH, RELU, RELU2 };
enum Gating { PLAIN, GLU, CLAMPED };

INLINE Floats select(Ints mask, Floats yes, Floats no) {
    return cast<Floats>((mask & cast<Ints>(yes)) | (~mask & cast<Ints>(no)));
}
INLINE Floats at_most(Floats x, float limit) { return select(x > all(limit), all(limit), x); }    // NaN stays NaN
INLINE Floats at_least(Floats x, float limit) { return select(x < all(limit), all(limit), x); }

INLINE Floats exponential(Floats x) {  // 2^n e^r with |r| <= ln 2 / 2, to 2 units in the last place
    x = at_least(at_most(x, 88.f), -87.f);
    const Floats shift = all(12582912.f);  // 1.5 * 2^23 rounds to the nearest integer
    const Floats shifted = x * 1.44269504f + shift, n = shifted - shift;
    const Floats r = x - n * 0.693359375f - n * -2.12194440e-4f;
    Floats p = all(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.f;
    const Ints power = (cast<Ints>(shifted) - 0x4b400000 + 127) << 23;
    return p * cast<Floats>(power);
}

INLINE Floats sigmoid(Floats x) { return 1.f / (1.f + exponential(-x)); }

INLINE Floats erf(Floats x) {  // Abramowitz and Stegun 7.1.26, to 1.5e-7
    const Floats positive = select(x < Floats{}, -x, x), t = 1.f / (1.f + 0.3275911f * positive);
    const Floats p = ((((1.061405429f * t - 1.453152027f) * t + 1.421413741f) * t - 0.284496736f) * t + 0.254829592f) * t;
    const Floats y = 1.f - p * exponential(-positive * positive);
    return select(x < Floats{}, -y, y);
}

INLINE Floats activate(Activation act, Floats x) {
    switch (act) {
        case SILU: return x * sigmoid(x);
        case GELU: return 0.5f * x * (1.f + erf(x * 0.70710678f));
        case GELU_TANH: return x * sigmoid(2.f * 0.79788456f * (x + 0.044715f * x * x * x));
        case RELU: return at_least(x, 0.f);
        case RELU2: return at_least(x, 0.f) * at_least(x, 0.f);
    }
    return x;
}

struct Sloped {
    Floats value, slope;  // of an activation at some x
};

INLINE Sloped activate_with_slope(Activation act, Floats x) {
    switch (act) {
        case SILU: {
            const Floats s = sigmoid(x);
            return {x * s, s * (1.f + x * (1.f - s))};
        }
        case GELU: {
            const Floats below = 0.5f * (1.f + erf(x * 0.70710678f));
            return {x * below, below + x * 0.39894228f * exponential(-0.5f * x * x)};
        }
        case GELU_TANH: {
            const Floats s = sigmoid(2.f * 0.79788456f * (x + 0.044715f * x * x * x));
            return {x * s, s + x * s * (1.f - s) * (2.f * 0.79788456f) * (1.f + 0.134145f * x * x)};
        }
        case RELU: return {at_least(x, 0.f), select(x > Floats{}, all(1.f), Floats{})};
        case RELU2: return {at_least(x, 0.f) * at_least(x, 0.f), 2.f * at_least(x, 0.f)};
    }
    return {x, all(1.f)};
}

// The activation between the up and the down projection; `up` is not read by PLAIN, `alpha` and `limit` only by CLAMPED.
INLINE Floats gated_activation(Gating gating, Activation act, float alpha, float limit, Floats gate, Floats up) {
    if (gating == PLAIN) return activate(act, gate);
    if (gating == GLU) return activate(act, gate) * up;
    gate = at_most(gate, limit);
    up = at_least(at_most(up, limit), -limit);
    return (up + 1.f) * gate * sigmoid(alpha * gate);
}
