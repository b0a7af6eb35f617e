// Decodes rows of lower precision as they are read, for serving. Part of kernels.inl.

// Subnormal halves become normal floats by an exact addition, because processors are slow on subnormal floats. Without
// branches, so that the next row can be loaded before this one has arrived.
static inline float half_to_float(uint16_t h) {
  const u32 size = h & 0x7FFF, special = 0u - u32(size >= 0x7C00), small = 0u - u32(size < 0x400);
  const u32 normal = (size << 13) + (112u << 23) + (special & (112u << 23)), raised = size | 0x3F000000u;
  float f;
  std::memcpy(&f, &raised, 4);
  f -= 0.5f;
  u32 bits;
  std::memcpy(&bits, &f, 4);
  bits = (small & bits) | (~small & normal) | u32(h & 0x8000) << 16;
  std::memcpy(&f, &bits, 4);
  return f;
}

static inline uint16_t read_16(const unsigned char* at) {
  uint16_t x;
  std::memcpy(&x, at, 2);
  return x;
}

// An e4m3 number in the place of a half's leading bits is 2^-8 of its value.
static inline float fp8_to_float(uint8_t b) { return half_to_float(uint16_t((b & 0x80) << 8 | (b & 0x7F) << 7)) * 256.f; }

// Scale and bias at the head of a row; of fp8 the scale, and 0.
struct Line {
  float scale, bias;
};

// Bits of a code, and bytes before the numbers of a row.
static constexpr int bits_of(i64 kind) {
  return kind == INT8 || kind == STEP_INT8 ? 8 : kind == INT2 ? 2 : 4;
}
static constexpr i64 head_of(i64 kind) {
  return kind == FP8 ? 2 : kind == INT8 || kind == INT4 || kind == INT2 ? 4 : 0;
}

// Of rows that train: exact, and so the values q * step themselves, where the step is an fp16 number.
static inline Line line_of_step(i64 kind, float step) { return {step, -float(1 << (bits_of(kind) - 1)) * step}; }

#if RSE_FLOATS >= 8
// The conversions below by hand, because GCC widens bytes to integers one by one.
static inline Line line_of(i64 kind, const unsigned char* row) {
  i32 both;
  if (kind == FP8) both = read_16(row);
  else std::memcpy(&both, row, 4);
  const __m128 found = _mm_cvtph_ps(_mm_cvtsi32_si128(both));
  return {_mm_cvtss_f32(found), kind == FP8 ? 0.f : _mm_cvtss_f32(_mm_movehdup_ps(found))};
}

template <int N>
struct Block;

// The product of a code and a scale of half precision is exact, so that a fused addition rounds as one after it does.
template <>
struct Block<8> {
  typedef Lanes<8>::V V;

  static inline V on_line(V codes, Line line) {
    return (V)_mm256_fmadd_ps((__m256)codes, _mm256_set1_ps(line.scale), _mm256_set1_ps(line.bias));
  }

  static inline V halves(const unsigned char* from) {
    return (V)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  }
  static inline V brain_halves(const unsigned char* from) {
    const __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    return (V)_mm256_castsi256_ps(_mm256_slli_epi32(bits, 16));
  }
  static inline V eighths(const unsigned char* from) {
    const __m128i b = _mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
    const __m128i sign = _mm_slli_epi16(_mm_and_si128(b, _mm_set1_epi16(0x80)), 8);
    const __m128i size = _mm_slli_epi16(_mm_and_si128(b, _mm_set1_epi16(0x7F)), 7);
    return (V)_mm256_cvtph_ps(_mm_or_si128(sign, size)) * 256.f;
  }
  static inline V bytes(const unsigned char* from) {
    return (V)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
  }
  static inline V nibbles(const unsigned char* from, Line line) {
    u32 word;
    std::memcpy(&word, from, 4);
    const __m256i apart = _mm256_srlv_epi32(_mm256_set1_epi32(i32(word)), _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28));
    return on_line((V)_mm256_cvtepi32_ps(_mm256_and_si256(apart, _mm256_set1_epi32(15))), line);
  }
  static inline V pairs(const unsigned char* from) {
    const __m256i word = _mm256_set1_epi32(read_16(from));
    const __m256i apart = _mm256_srlv_epi32(word, _mm256_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14));
    return (V)_mm256_cvtepi32_ps(_mm256_and_si256(apart, _mm256_set1_epi32(3)));
  }
};

#if RSE_FLOATS == 16
template <>
struct Block<16> {
  typedef Lanes<16>::V V;

  static inline V on_line(V codes, Line line) {
    return (V)_mm512_fmadd_ps((__m512)codes, _mm512_set1_ps(line.scale), _mm512_set1_ps(line.bias));
  }

  static inline V halves(const unsigned char* from) {
    return (V)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  }
  static inline V brain_halves(const unsigned char* from) {
    const __m512i bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    return (V)_mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
  }
  static inline V eighths(const unsigned char* from) {
    const __m256i b = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    const __m256i sign = _mm256_slli_epi16(_mm256_and_si256(b, _mm256_set1_epi16(0x80)), 8);
    const __m256i size = _mm256_slli_epi16(_mm256_and_si256(b, _mm256_set1_epi16(0x7F)), 7);
    return (V)_mm512_cvtph_ps(_mm256_or_si256(sign, size)) * 256.f;
  }
  static inline V bytes(const unsigned char* from) {
    return (V)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
  }
  // The sixteen values of a row are a register, from which the low bits of integers choose.
  static inline V nibbles(const unsigned char* from, Line line) {
    i32 low, high;
    std::memcpy(&low, from, 4);
    std::memcpy(&high, from + 4, 4);
    const V codes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const __m512i word = _mm512_mask_set1_epi32(_mm512_set1_epi32(low), 0xFF00, high);
    const __m512i by = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28);
    return (V)_mm512_permutexvar_ps(_mm512_srlv_epi32(word, by), (__m512)on_line(codes, line));
  }
  static inline V pairs(const unsigned char* from) {
    i32 word;
    std::memcpy(&word, from, 4);
    const __m512i by = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    return (V)_mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srlv_epi32(_mm512_set1_epi32(word), by), _mm512_set1_epi32(3)));
  }
};
constexpr int WIDEST_BLOCK = 16;
#else
constexpr int WIDEST_BLOCK = 8;
#endif
#else
static inline Line line_of(i64 kind, const unsigned char* row) {
  return {half_to_float(read_16(row)), kind == FP8 ? 0.f : half_to_float(read_16(row + 2))};
}
constexpr int WIDEST_BLOCK = 1;
#endif

// Element k of a row, or N elements from there on.
template <i64 KIND, int N>
static inline typename Lanes<N>::V decoded(const unsigned char* row, i64 k, Line line) {
  typedef Lanes<N> L;
  if constexpr (KIND == FP32) {
    return L::load(reinterpret_cast<const float*>(row) + k);
  } else if constexpr (N == 1) {
    if (KIND == FP16) return half_to_float(read_16(row + 2 * k));
    if (KIND == BF16) {
      const u32 bits = u32(read_16(row + 2 * k)) << 16;
      float f;
      std::memcpy(&f, &bits, 4);
      return f;
    }
    if (KIND == FP8) return fp8_to_float(row[2 + k]) * line.scale;
    const unsigned char* codes = row + head_of(KIND);
    const int code = bits_of(KIND) == 8 ? codes[k] : bits_of(KIND) == 4 ? codes[k / 2] >> (4 * (k & 1)) & 15 : codes[k / 4] >> (2 * (k & 3)) & 3;
    return float(code) * line.scale + line.bias;
  } else {
#if RSE_FLOATS >= 8
    typedef Block<N> B;
    if constexpr (KIND == FP16) return B::halves(row + 2 * k);
    else if constexpr (KIND == BF16) return B::brain_halves(row + 2 * k);
    else if constexpr (KIND == FP8) return B::eighths(row + 2 + k) * line.scale;
    else if constexpr (bits_of(KIND) == 8) return B::on_line(B::bytes(row + head_of(KIND) + k), line);
    else if constexpr (bits_of(KIND) == 4) return B::nibbles(row + head_of(KIND) + k / 2, line);
    else return B::on_line(B::pairs(row + head_of(KIND) + k / 4), line);
#endif
  }
}

// Calls fn(Lanes<N>, k, elements k to k + N) for the whole row. W: its width if known at compile time, else 0.
template <i64 KIND, int W, class F>
static inline __attribute__((always_inline)) void each_block(const unsigned char* row, i64 width, Line line, F&& fn) {
  const i64 w = W ? W : width;
  i64 k = 0;
  if constexpr (WIDEST_BLOCK == 16)
    for (; k + 16 <= w; k += 16) fn(Lanes<16>(), k, decoded<KIND, 16>(row, k, line));
  if constexpr (WIDEST_BLOCK >= 8)
    for (; k + 8 <= w; k += 8) fn(Lanes<8>(), k, decoded<KIND, 8>(row, k, line));
  for (; k < w; k++) fn(Lanes<1>(), k, decoded<KIND, 1>(row, k, line));
}

static inline bool has_line(i64 kind) { return kind >= INT8; }

template <i64 KIND>
static inline Line line_at(const unsigned char* row, float step) {
  if (KIND >= STEP_INT8) return line_of_step(KIND, step);
  return has_line(KIND) ? line_of(KIND, row) : Line{1.f, 0.f};
}

template <i64 KIND, int W = 0>
static inline void decode_row_of(const unsigned char* row, i64 count, float* __restrict out, float step = 0.f) {
  each_block<KIND, W>(row, count, line_at<KIND>(row, step), [&](auto lanes, i64 k, auto v) { lanes.store(out + k, v); });
}

// `count` elements of a row at `from`; `step` of STEP_INT8 and STEP_INT4.
static void decode_row(i64 kind, const unsigned char* from, i64 count, float* __restrict out, float step = 0.f) {
  switch (kind) {
    case FP32: std::memcpy(out, from, count * sizeof(float)); return;
    case FP16: return decode_row_of<FP16>(from, count, out);
    case BF16: return decode_row_of<BF16>(from, count, out);
    case INT8: return decode_row_of<INT8>(from, count, out);
    case INT4: return decode_row_of<INT4>(from, count, out);
    case INT2: return decode_row_of<INT2>(from, count, out);
    case STEP_INT8: return decode_row_of<STEP_INT8>(from, count, out, step);
    case STEP_INT4: return decode_row_of<STEP_INT4>(from, count, out, step);
    default: return decode_row_of<FP8>(from, count, out);
  }
}

static inline const unsigned char* stored_row(const Call& c, i64 storage, i64 row) {
  return reinterpret_cast<const unsigned char*>(c.storages[storage]) + row * row_bytes(c, storage);
}

// SINGLE: each item is one row, stored without a factor.
template <i64 KIND, int W, bool SINGLE>
static void read_stored(const Group& g, const Found& found, i64 n, const Matrix& out) {
  const i64 width = W ? W : g.width;
  found.each<SINGLE ? 1 : 0>(g, n, g.slots[0].bytes, true, out, [&](const char* const* rows, const float* factors, float* o) {
    if (!rows[0]) std::fill_n(o, width, g.empty);
    const i64 count = SINGLE ? 1 : g.count;
    for (i64 j = 0; j < count; j++) {
      if (!rows[j]) continue;
      const unsigned char* row = reinterpret_cast<const unsigned char*>(rows[j]);
      const Line line = line_at<KIND>(row, g.step);
      each_block<KIND, W>(row, width, line, [&](auto lanes, i64 k, auto v) {
        if (!SINGLE) {
          if (g.factor) v *= factors[j];
          if (j && g.join == ADD) v = lanes.load(o + k) + v;
          if (j && g.join == MUL) v = lanes.load(o + k) * v;
        }
        lanes.store(o + k, v);
      });
    }
  });
}

using ReadStored = void (*)(const Group&, const Found&, i64, const Matrix&);

template <i64 KIND>
static ReadStored decoder_of(const Group& g) {
  if (g.count > 1 || g.factor) return read_stored<KIND, 0, false>;
  switch (g.width) {
    case 8: return read_stored<KIND, compiled(8), true>;
    case 16: return read_stored<KIND, 16, true>;
    case 32: return read_stored<KIND, compiled(32), true>;
    case 64: return read_stored<KIND, compiled(64), true>;
    default: return read_stored<KIND, 0, true>;
  }
}

static ReadStored choose_decoder(const Group& g) {
  switch (g.kind) {
    case FP16: return decoder_of<FP16>(g);
    case BF16: return decoder_of<BF16>(g);
    case INT8: return decoder_of<INT8>(g);
    case INT4: return decoder_of<INT4>(g);
    case INT2: return decoder_of<INT2>(g);
    case STEP_INT8: return decoder_of<STEP_INT8>(g);
    case STEP_INT4: return decoder_of<STEP_INT4>(g);
    default: return decoder_of<FP8>(g);
  }
}

// Values of a row lookup for n ids, from a storage of any precision.
static void gather_decoded(const Call& c, const RowLookup& p, i64 join, const i64* ids, const i32* rows, const float* factor,
                           i64 n, float* out, i64 stride) {
  const i64 kind = kind_of(c, p.storage), read = p.num_rows * p.width;
  const float step = step_of(c, p.storage);
  // All rows are prefetched first: decoding one takes so many instructions that the processor does not reach the next.
  const i64 bytes = row_bytes(c, p.storage) * p.num_rows;
  for (i64 i = 0; i < n; i++)
    if (rows[i] >= 0) {
      const unsigned char* row = stored_row(c, p.storage, rows[i]);
      prefetch(row, bytes);
      prefetch(row + bytes - 1, 1);  // rows are not aligned to cache lines
    }
  std::vector<float> memory(read);
  for (i64 i = 0; i < n; i++) {
    float* o = out + i * stride;
    if (rows[i] < 0) {
      for (i64 k = 0; k < p.span; k++) join_into(o[k], float(p.product), join);
      continue;
    }
    // A slice wraps around at the table's end; its rows are single elements.
    const i64 straight = p.num_rows > 1 ? std::min(p.num_rows, p.base + p.rows - rows[i]) : read;
    decode_row(kind, stored_row(c, p.storage, rows[i]), straight, memory.data(), step);
    if (straight < read) decode_row(kind, stored_row(c, p.storage, p.base), read - straight, memory.data() + straight, step);
    if (read != p.span || (p.num_rows > 1 && p.has_sign)) {
      const float f = factor ? factor[i] : 1.f;
      for (i64 k = 0; k < p.span; k++) {
        float v = memory[read == p.span ? k : 0] * f;
        if (p.num_rows > 1 && p.has_sign) v *= sign_of(ids[i], step_salt(p.sign, k));
        join_into(o[k], v, join);
      }
      continue;
    }
    blocks<0>(read, [&](auto lanes, i64 k) {
      auto v = lanes.load(memory.data() + k);
      if (factor) v *= factor[i];
      if (join == ADD) v = lanes.load(o + k) + v;
      if (join == MUL) v = lanes.load(o + k) * v;
      lanes.store(o + k, v);
    });
  }
}
