// Lookup programs as the kernels read them: plain records of 64-bit fields, written by recsys_embed/kernels/native/records.py.
#pragma once
#include <cstdint>

using i32 = int32_t;
using i64 = int64_t;
using u32 = uint32_t;
using u64 = uint64_t;

#include "transforms.h"

enum Join : i64 { STORE = 0, ADD = 1, MUL = 2 };
// How a storage keeps its rows. Integers: scale and bias in fp16, then codes, x = code * scale + bias; two INT4 to a byte.
enum Precision : i64 { FP32 = 0, FP16 = 1, BF16 = 2, INT8 = 3, INT4 = 4 };
// In place of a rule: gradients are handed out.
constexpr i64 DENSE_GRADIENT = -1, SPARSE_GRADIENT = -2;

// One read per id: `num_rows` rows of `width` from the row on, at `column` of the feature's part of an output.
struct RowLookup {
  i64 storage, base, rows, width;                  // table: rows [base, base + rows) of a storage
  i64 column, span, num_rows, join, product;          // span: columns it fills; join: with what other row lookups left there
  i64 has_sign, sign;
  i64 weight_storage, weight_base, weight_rows;    // learned scalar per id; storage -1: none
  i64 kept;                                        // column among what is kept for backward: row, then weight
  double scale;
  Transform rows_of, weight_of;
};

struct Feature {
  i64 ids;                                         // column of the id matrix
  i64 first, row_lookups;                               // its row lookups
  i64 limit;                                       // ids lie in [0, limit); -1: any
  i64 optional;                                    // the id -1 is none and gives zeros
  i64 output, column, width;                       // where its vectors go
  i64 padding;                                     // of the width, columns of zeros at the end
  i64 plain;                                       // gradients reach rows unchanged but for a constant factor
  i64 mean;                                        // bags are averaged, not summed
};

struct Matrix {
  float* data;
  i64 stride;                                      // elements from one row to the next
};

// What is done to vectors [batch, fields, width] before they are handed out: columns beyond a width become zeros and rows
// whose norm is at most a threshold give way to `fallback`; or, with `scales`, each id's block has a factor per column.
struct Mask {
  i64 batch, fields, width;
  const void* ids;                                 // [batch, fields], for parameters by id
  i64 sample_stride, feature_stride, ids_are_32;
  const i64* starts;                               // [fields + 1] first id of each field; null: no parameter goes by id
  const float* thresholds;                         // by id where there are starts, else by field; null: no row is pruned
  i64 norm;                                        // 1 or 2
  const i64* widths;                               // columns that are kept; null: all
  i64 widths_stride;                               // from sample to sample; 0: those of the fields
  const float* fallback;                              // [fields, width]; null: zeros
  const float* scales;                             // [block_count, width]; null: nothing is scaled
  const void* blocks;                              // of each id of all fields
  i64 blocks_are_8, block_count;
  Matrix vectors, out;                             // may be the same
  Matrix gradient, of_vectors;                     // backward: of `out`; null where not wanted
  float* of_thresholds;                            // added to
  float* of_rest;                                  // of `fallback` or `scales`, added to; null where not wanted
  float* slopes;                                   // [batch, fields] for thresholds by id, else null
};

// One call: what is looked up, in which tables, and where vectors (or their gradients) lie. With `offsets`, ids stand
// feature after feature, and those of sample b and id column f are [offsets[f * batch + b], offsets[f * batch + b + 1]).
struct Call {
  const Feature* features;
  const RowLookup* row_lookups;
  i64 feature_count, row_lookup_count;
  const void* ids;
  i64 batch, sample_stride, feature_stride, ids_are_32;
  const i64* offsets;                              // null: one id per sample
  const float* sample_weights;                     // [ids] factors of bags' vectors; may be null
  float* const* storages;
  const i64* storage_widths;
  const i64 *storage_kinds, *storage_bytes;        // precision, and bytes from one row to the next; null: all fp32
  i64 storage_count;
  const Matrix* outputs;
  i64 output_count;
  Matrix kept;                                     // rows as features that are not plain read them; data may be null;
                                                   // with offsets packed feature after feature
  const void* const* index;                        // arrays of all indexes, which transforms count from here
  i64 threads;
  const Mask* mask;                                // of outputs[0], its `vectors` are found here; null: none
};

// An optimizer's rule, and the state it keeps of one storage.
struct Rule {
  i64 number;                                      // place among the rules of rules.inl; or DENSE_, SPARSE_GRADIENT
  i64 elements;                                    // leading states with one number per weight; the others have one per row
  double constants[8];                             // as its Python class lists them
  float* state[4];                                 // in the order of its Python class; integers where it counts steps
  const double* curve;                             // what changes with the number of steps; from the last entry on it stays
  i64 curve_count;
};

// What becomes of the summed gradients of a storage's rows.
struct Update {
  Rule rule;
  double decay;                                    // decay times the row is part of its gradient
  const double *sizes, *epsilons;                  // of steps first + 1 to step: rate (with Adam's correction), epsilon
  i64 first, step;
  i32* last;                                       // [rows] step each row has come to; null: rows nobody reads stay
  float* gradient;                                 // [rows, width], or [lookups, width] of distinct rows
  i64* touched;                                    // [lookups] rows of a sparse gradient
  i64* touched_count;
  i64 rows;
};
