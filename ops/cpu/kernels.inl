// One set of kernels for one instruction set; native.cpp includes it into a namespace of each.
#include "lanes.inl"
#include "transforms.inl"
#include "gather.inl"
#include "scatter.inl"
