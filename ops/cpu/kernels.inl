// One set of kernels for one instruction set; native.cpp includes it into a namespace of each.
#include "lanes.inl"
#include "transforms.inl"
#include "find.inl"
#include "gather.inl"
#include "lookup.inl"
#include "scatter.inl"
