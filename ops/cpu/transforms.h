// Written by recsys_embed/kernels/kinds.py, which says how; do not edit.
#pragma once

enum Kind : i64 { DIGIT = 0, HASH = 1, MURMUR = 2, RANGE = 3, BITMAP = 4, SORTED = 5, IDENTITY = 6, CODES = 7 };

// From ids to rows of one table; -1 where an id has none.
struct Transform {
  i64 kind;  // one of Kind
  i64 div, mod, affine, a, b, p;  // DIGIT: ((a x + b) % p) / div % mod; mod 0 keeps the quotient
  i64 salt, size, stride, offset, num_frequent, absent;  // HASH: ids below num_frequent keep themselves, or have no row
  i64 word;  // MURMUR, with salt as its seed
  i64 start, count, rest;  // RANGE, BITMAP, SORTED; others hash into `rest` rows behind the members
  i64 bits;  // CODES: number x * stride + offset of `bits` bits
  i64 array, at;  // index: its first array among those of a call, and where it begins in each
};

constexpr char TRANSFORM_LAYOUT[] = "digit hash murmur range bitmap sorted identity codes; kind div mod affine a b p salt size stride offset num_frequent absent word start count rest bits array at";
