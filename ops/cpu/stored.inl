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

// An e4m3 number in the place of a half's leading bits is 2^-8 of its value.
static inline float fp8_to_float(uint8_t b) { return half_to_float(uint16_t((b & 0x80) << 8 | (b & 0x7F) << 7)) * 256.f; }

static inline uint16_t read_16(const unsigned char* at) {
  uint16_t x;
  std::memcpy(&x, at, 2);
  return x;
}

// Sixteen elements at a time, with compilers that have vector extensions.
#if defined(__GNUC__)
typedef uint8_t Bytes4 __attribute__((vector_size(4), aligned(1), may_alias));
typedef uint8_t Bytes8 __attribute__((vector_size(8), aligned(1), may_alias));
typedef uint8_t Bytes16 __attribute__((vector_size(16), aligned(1), may_alias));
typedef uint16_t Halves8 __attribute__((vector_size(16), aligned(1), may_alias));
typedef uint16_t Halves16 __attribute__((vector_size(32), aligned(1), may_alias));
typedef i32 Ints4 __attribute__((vector_size(16), aligned(4), may_alias));
typedef i32 Ints16 __attribute__((vector_size(64), aligned(4), may_alias));
typedef u32 Words16 __attribute__((vector_size(64), aligned(4), may_alias));
typedef Lanes<16>::V Floats16;

static inline Floats16 float_of_halves(Words16 h) {
  const Words16 size = h & 0x7FFF, special = (Words16)(size >= 0x7C00), small = (Words16)(size < 0x400);
  const Words16 normal = (size << 13) + (112u << 23) + (special & (112u << 23));
  const Words16 raised = (Words16)((Floats16)(size | 0x3F000000u) - 0.5f);
  return (Floats16)((small & raised) | (~small & normal) | (h & 0x8000) << 16);
}

static inline Floats16 halves(const unsigned char* from) {
  return float_of_halves(__builtin_convertvector(*reinterpret_cast<const Halves16*>(from), Words16));
}

static inline Floats16 eighths(const unsigned char* from) {
  const Words16 b = __builtin_convertvector(*reinterpret_cast<const Bytes16*>(from), Words16);
  return float_of_halves((b & 0x80) << 8 | (b & 0x7F) << 7) * 256.f;
}

static inline Floats16 brain_halves(const unsigned char* from) {
  return (Floats16)(__builtin_convertvector(*reinterpret_cast<const Halves16*>(from), Words16) << 16);
}

static inline Floats16 codes_of(i64 kind, const unsigned char* codes, i64 k) {
  auto floats = [](Bytes16 b) { return __builtin_convertvector(__builtin_convertvector(b, Ints16), Floats16); };
  if (kind == INT8) return floats(*reinterpret_cast<const Bytes16*>(codes + k));
  if (kind == INT2) {
    const Ints4 fours = __builtin_convertvector(*reinterpret_cast<const Bytes4*>(codes + k / 4), Ints4);
    // Code j of a byte is moved to byte j of an integer.
    const Ints4 apart = (fours | fours << 6 | fours << 12 | fours << 18) & 0x03030303;
    return floats((Bytes16)apart);
  }
  const Halves8 pairs = __builtin_convertvector(*reinterpret_cast<const Bytes8*>(codes + k / 2), Halves8);
  const Halves8 apart = (pairs | pairs << 4) & 0x0F0F;
  return floats((Bytes16)apart);
}

static inline i64 decode_whole(i64 kind, const unsigned char* from, i64 count, float* out) {
  i64 k = 0;
  if (kind == FP16)
    for (; k + 16 <= count; k += 16) Lanes<16>::store(out + k, halves(from + 2 * k));
  else if (kind == BF16)
    for (; k + 16 <= count; k += 16)
      Lanes<16>::store(out + k, brain_halves(from + 2 * k));
  else if (kind == FP8) {
    const float scale = half_to_float(read_16(from));
    for (; k + 16 <= count; k += 16) Lanes<16>::store(out + k, eighths(from + 2 + k) * scale);
  } else if (kind != FP32) {
    const float scale = half_to_float(read_16(from)), bias = half_to_float(read_16(from + 2));
    for (; k + 16 <= count; k += 16) Lanes<16>::store(out + k, codes_of(kind, from + 4, k) * scale + bias);
  }
  return k;
}
#else
static inline i64 decode_whole(i64, const unsigned char*, i64, float*) { return 0; }
#endif

// `count` elements of a row at `from`.
static void decode_row(i64 kind, const unsigned char* from, i64 count, float* __restrict out) {
  const unsigned char* codes = from + 4;
  i64 k = decode_whole(kind, from, count, out);
  switch (kind) {
    case FP32:
      std::memcpy(out, from, count * sizeof(float));
      break;
    case FP16:
      for (; k < count; k++) out[k] = half_to_float(read_16(from + 2 * k));
      break;
    case BF16:
      for (; k < count; k++) {
        const u32 bits = u32(read_16(from + 2 * k)) << 16;
        std::memcpy(out + k, &bits, 4);
      }
      break;
    case FP8: {
      const float scale = half_to_float(read_16(from));
      for (; k < count; k++) out[k] = fp8_to_float(from[2 + k]) * scale;
      break;
    }
    default: {
      if (k == count) break;
      const float scale = half_to_float(read_16(from)), bias = half_to_float(read_16(from + 2));
      if (kind == INT8)
        for (; k < count; k++) out[k] = float(codes[k]) * scale + bias;
      else if (kind == INT4)
        for (; k < count; k++) out[k] = float(codes[k / 2] >> (4 * (k & 1)) & 15) * scale + bias;
      else
        for (; k < count; k++) out[k] = float(codes[k / 4] >> (2 * (k & 3)) & 3) * scale + bias;
    }
  }
}

static inline const unsigned char* stored_row(const Call& c, i64 storage, i64 row) {
  return reinterpret_cast<const unsigned char*>(c.storages[storage]) + row * row_bytes(c, storage);
}

// Whether rows of this width are decoded in registers and combined directly with the output.
static inline bool decodes_blocks(i64 width) {
#if defined(__GNUC__)
  return width % 16 == 0;
#else
  return false;
#endif
}

template <i64 KIND>
static void read_stored(const Group& g, const Found& found, i64 n, const Matrix& out) {
#if defined(__GNUC__)
  // Rows are not aligned to cache lines.
  found.each<0>(g, n, g.slots[0].bytes + 63, out, [&](const char* const* rows, const float* factors, float* o) {
    if (!rows[0]) std::fill_n(o, g.width, g.empty);
    for (i64 j = 0; j < g.count; j++) {
      if (!rows[j]) continue;
      const unsigned char* row = reinterpret_cast<const unsigned char*>(rows[j]);
      const bool codes = KIND == INT8 || KIND == INT4 || KIND == INT2;
      const float scale = codes || KIND == FP8 ? half_to_float(read_16(row)) : 1.f;
      const float bias = codes ? half_to_float(read_16(row + 2)) : 0.f;
      for (i64 k = 0; k < g.width; k += 16) {
        Floats16 v;
        if (KIND == FP16) v = halves(row + 2 * k);
        else if (KIND == BF16) v = brain_halves(row + 2 * k);
        else if (KIND == FP8) v = eighths(row + 2 + k) * scale;
        else v = codes_of(KIND, row + 4, k) * scale + bias;
        if (g.factor) v *= factors[j];
        if (j && g.join == ADD) v = Lanes<16>::load(o + k) + v;
        if (j && g.join == MUL) v = Lanes<16>::load(o + k) * v;
        Lanes<16>::store(o + k, v);
      }
    }
  });
#endif
}

static void (*choose_decoder(i64 kind))(const Group&, const Found&, i64, const Matrix&) {
  switch (kind) {
    case FP16: return read_stored<FP16>;
    case BF16: return read_stored<BF16>;
    case INT8: return read_stored<INT8>;
    case INT4: return read_stored<INT4>;
    case INT2: return read_stored<INT2>;
    default: return read_stored<FP8>;
  }
}

// Values of a row lookup for n ids, from a storage of any precision.
static void gather_decoded(const Call& c, const RowLookup& p, i64 join, const i64* ids, const i32* rows, const float* factor,
                           i64 n, float* out, i64 stride) {
  const i64 kind = kind_of(c, p.storage), read = p.num_rows * p.width;
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
    decode_row(kind, stored_row(c, p.storage, rows[i]), straight, memory.data());
    if (straight < read) decode_row(kind, stored_row(c, p.storage, p.base), read - straight, memory.data() + straight);
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
