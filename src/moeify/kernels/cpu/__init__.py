"""Kernels for a CPU: whole sparse layers, products of sorted rows, packed weights, gradients, and our C++ (`cpp`)."""
