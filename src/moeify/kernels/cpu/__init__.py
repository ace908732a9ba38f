"""CPU kernels: fused sparse layers, grouped GEMMs, packed weights, weight gradients, and C++ kernels (`cpp`)."""
