// Rows at lower precision, decoded as they are read: for serving. Part of kernels.inl.

static inline float half_to_float(uint16_t h) {
  u32 bits = u32(h & 0x7FFF) << 13;
  float f;
  std::memcpy(&f, &bits, 4);
  f *= 0x1p112f;  // the exponent's bias; subnormals come out right too
  std::memcpy(&bits, &f, 4);
  bits |= (h & 0x7FFF) >= 0x7C00 ? 0x7F800000u | u32(h & 0x3FF) << 13 : 0u;
  bits |= u32(h & 0x8000) << 16;
  std::memcpy(&f, &bits, 4);
  return f;
}

static inline uint16_t read_16(const unsigned char* at) {
  uint16_t x;
  std::memcpy(&x, at, 2);
  return x;
}

// `count` elements of a row at `from`.
static void decode_row(i64 kind, const unsigned char* from, i64 count, float* __restrict out) {
  const unsigned char* codes = from + 4;
  switch (kind) {
    case FP32:
      std::memcpy(out, from, count * sizeof(float));
      break;
    case FP16:
      for (i64 k = 0; k < count; k++) out[k] = half_to_float(read_16(from + 2 * k));
      break;
    case BF16:
      for (i64 k = 0; k < count; k++) {
        const u32 bits = u32(read_16(from + 2 * k)) << 16;
        std::memcpy(out + k, &bits, 4);
      }
      break;
    default: {
      const float scale = half_to_float(read_16(from)), bias = half_to_float(read_16(from + 2));
      if (kind == INT8)
        for (i64 k = 0; k < count; k++) out[k] = float(codes[k]) * scale + bias;
      else
        for (i64 k = 0; k < count; k++) out[k] = float(codes[k / 2] >> (4 * (k & 1)) & 15) * scale + bias;
    }
  }
}

static inline i64 kind_of(const Call& c, i64 storage) { return c.storage_kinds ? c.storage_kinds[storage] : i64(FP32); }

static inline const unsigned char* stored_row(const Call& c, i64 storage, i64 row) {
  return reinterpret_cast<const unsigned char*>(c.storages[storage]) + row * c.storage_bytes[storage];
}

// A probe's values of n ids from a storage that does not hold floats.
static void gather_stored(const Call& c, const Probe& p, i64 join, const i64* ids, const i32* rows, const float* factor,
                          i64 n, float* out, i64 stride) {
  const i64 kind = kind_of(c, p.storage), read = p.run * p.width;
  std::vector<float> memory(read);
  for (i64 i = 0; i < n; i++) {
    float* o = out + i * stride;
    if (rows[i] < 0) {
      for (i64 k = 0; k < p.span; k++) join_into(o[k], float(p.product), join);
      continue;
    }
    // Runs go on at the table's start; their rows are single elements side by side.
    const i64 straight = p.run > 1 ? std::min(p.run, p.base + p.rows - rows[i]) : read;
    decode_row(kind, stored_row(c, p.storage, rows[i]), straight, memory.data());
    if (straight < read) decode_row(kind, stored_row(c, p.storage, p.base), read - straight, memory.data() + straight);
    const float f = factor ? factor[i] : 1.f;
    for (i64 k = 0; k < p.span; k++) {
      float v = memory[read == p.span ? k : 0] * f;
      if (p.run > 1 && p.has_sign) v *= sign_of(ids[i], step_salt(p.sign, k));
      join_into(o[k], v, join);
    }
  }
}
