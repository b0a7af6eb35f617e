// Lookup programs as records of 64-bit fields, which recsys_embed/kernels/native/records.py writes.
#pragma once
#include <cstdint>

using i32 = int32_t;
using i64 = int64_t;
using u32 = uint32_t;
using u64 = uint64_t;

#include "transforms.h"

enum Join : i64 { STORE = 0, ADD = 1, MUL = 2 };
// Number format of a storage. Integer rows: scale and bias in fp16, then codes; x = code * scale + bias. FP8 rows: scale in
// fp16, then e4m3 numbers.
// Rows that train have codes u = q + 2^(bits - 1) of values q * step, by one step of their storage (STEP_...).
enum Precision : i64 {
  FP32 = 0, FP16 = 1, BF16 = 2, INT8 = 3, INT4 = 4, INT2 = 5, FP8 = 6,
  STEP_INT8 = 7, STEP_INT4 = 8
};
// In place of a rule: gradients are handed out.
constexpr i64 DENSE_GRADIENT = -1, SPARSE_GRADIENT = -2, NO_UPDATE = -3;

// One table read per id: `num_rows` consecutive rows of `width` elements, at `column` of the feature's output.
struct RowLookup {
  i64 storage, base, rows, width;                  // table: rows [base, base + rows) of a storage
  i64 column, span, num_rows, join, product;       // span: columns it fills; join: how it combines with lookups before it
  i64 has_sign, sign;
  i64 weight_storage, weight_base, weight_rows;    // learned scalar per id; storage -1: none
  i64 kept;                                        // column among the values saved for backward: row, then weight
  double scale;
  Transform rows_of, weight_of;
};

struct Feature {
  i64 ids;                                         // column of the id matrix
  i64 first, row_lookups;                          // its row lookups
  i64 limit;                                       // ids lie in [0, limit); -1: any
  i64 optional;                                    // id -1 means no id; its vector is zeros
  i64 output, column, width;                       // destination of its vectors
  i64 padding;                                     // columns of zeros at the end of `width`
  i64 plain;                                       // the gradient of a row is that of the vector times a constant
  i64 mean;                                        // bags are averaged, not summed
};

struct Matrix {
  float* data;
  i64 stride;                                      // elements from one row to the next
};

// Mask of the vectors [batch, fields, width] of a lookup: columns beyond a width become zero and rows whose norm is at
// most a threshold are replaced by `fallback`; or, with `scales`, each vector is multiplied by the factors of its
// block.
struct Mask {
  i64 batch, fields, width;
  const void* ids;                                 // [batch, fields], for parameters by id
  i64 sample_stride, feature_stride, ids_are_32;
  const i64* starts;                               // [fields + 1] first id of each field; null: no parameter is per id
  const float* thresholds;                         // per id with `starts`, else per field; null: no row is pruned
  i64 norm;                                        // 1 or 2
  const i64* widths;                               // columns that are kept; null: all
  i64 widths_stride;                               // from sample to sample; 0: those of the fields
  const float* fallback;                           // [fields, width]; null: zeros
  const float* scales;                             // [block_count, width]; null: nothing is scaled
  const void* blocks;                              // [ids of all fields] block of each id
  i64 blocks_are_8, block_count;
  Matrix vectors, out;                             // may share memory
  Matrix gradient, of_vectors;                     // backward: of `out`; null where not wanted
  float* of_thresholds;                            // accumulated
  float* of_rest;                                  // of `fallback` or `scales`, accumulated; null where not wanted
  float* slopes;                                   // [batch, fields] for thresholds by id, else null
};

// One call: features, tables, ids, and where vectors (or their gradients) are. With `offsets`, ids are stored feature
// by feature, and those of sample b and id column f are [offsets[f * batch + b], offsets[f * batch + b + 1]).
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
  const double* storage_steps;                     // of STEP_INT8 and STEP_INT4; null where there are none
  i64 storage_count;
  const Matrix* outputs;
  i64 output_count;
  Matrix kept;                                     // values saved for backward by features that are not plain; may be
                                                   // null; with offsets packed feature by feature
  const void* const* index;                        // arrays of all indexes; transforms name theirs by number
  i64 threads;
  const Mask* mask;                                // applied to outputs[0], whose `vectors` this call fills; null: none
};

constexpr i64 MOST_CORES = 4;

// Slices of the cores of a tensor train, one after the other, and their products, or gradients of these and of the slices.
struct Train {
  i64 cores;
  i64 widths[MOST_CORES], ranks[MOST_CORES + 1];   // of slice k: [ranks[k], widths[k], ranks[k + 1]]
  i64 count;
  const float* columns;                            // [count, all slices of an id]
  float* out;                                      // [count, product of the widths]
  const float* gradient;                           // of `out`; null: the products are wanted
  float* of_columns;
};

// How rows that train in few bits are stored.
struct Stored {
  i64 kind, bytes;                                 // precision, and bytes from one row to the next; 0: floats
  i64 seed, stochastic;                            // of the rounding; not stochastic: to nearest
  double step;                                     // distance of two codes
  double step_rate;                                // of rows that have steps, which learn: INT8 and INT4
};

// How elements of a state are stored: in 16 or 8 bits; or, with 0, as floats or integers.
struct StateForm {
  i64 bits, has_sign, least;                       // exponent of the least number that 8 bits hold
};

// An optimizer's rule, and the state it keeps of one storage.
struct Rule {
  i64 number;                                      // place among the rules of rules.inl; or one of those above
  i64 elements;                                    // leading states with one number per weight; the others have one per row
  double constants[8];                             // in the order of its Python class
  float* state[4];                                 // in the order of its Python class; integers where it counts steps
  const double* curve;                             // correction by number of steps; the last entry holds for all later ones
  i64 curve_count;
  i64 rounded, seed;                               // whether some state has 16 or 8 bits; seed of their random bits
  StateForm forms[4];
};

// The optimizer step of a storage's rows, given their summed gradients.
struct Update {
  Rule rule;
  double decay;                                    // weight decay: decay * row is added to the row's gradient
  const double *sizes, *epsilons;                  // by step, first + 1 to step: learning rate (with Adam's correction), epsilon
  i64 first, step;
  i32* last;                                       // [rows] last step applied to each row; null: steps are never deferred
  float* gradient;                                 // dense [rows, width], or sparse [lookups, width]: one per distinct row
  i64* touched;                                    // [lookups] rows of a sparse gradient
  i64* touched_count;
  i64 rows;
  Stored stored;
};
