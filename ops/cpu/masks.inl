// Masks of vectors and their gradients: rows pruned by norm, columns cut off, vectors scaled by block of ids. Part of
// kernels.inl.

// Surrogate derivative of the unit step, from Dynamic Sparse Training (arXiv 2005.06870).
static inline float long_tailed(float u) {
  const float far = std::fabs(u);
  return far <= 0.4f ? 2.f - 4.f * far : far <= 1.f ? 0.4f : 0.f;
}

// The mask's parameters for one field of one sample.
struct Spot {
  i64 at;             // index of the id among those of all fields, if parameters are per id; -1: out of range
  i64 kept;           // number of columns
  float threshold;
  const float* fallback;  // replaces a pruned row; null: zeros
  i64 block;
};

static inline Spot spot_of(const Mask& m, i64 b, i64 f) {
  Spot spot{0, m.width, 0.f, nullptr, 0};
  if (m.starts) {
    const i64 id = m.ids_are_32 ? i64(static_cast<const i32*>(m.ids)[b * m.sample_stride + f * m.feature_stride])
                                : static_cast<const i64*>(m.ids)[b * m.sample_stride + f * m.feature_stride];
    const bool inside = id >= 0 && id < m.starts[f + 1] - m.starts[f];
    spot.at = inside ? m.starts[f] + id : -1;
    if (!inside) return spot;
  }
  if (m.widths) spot.kept = std::min(std::max<i64>(m.widths[b * m.widths_stride + f], 0), m.width);
  if (m.thresholds) spot.threshold = m.thresholds[m.starts ? spot.at : f];
  if (m.fallback) spot.fallback = m.fallback + f * m.width;
  if (!m.scales) return spot;
  spot.block = m.blocks_are_8 ? i64(static_cast<const uint8_t*>(m.blocks)[spot.at]) : i64(static_cast<const i32*>(m.blocks)[spot.at]);
  if (spot.block < 0 || spot.block >= m.block_count) spot.at = -1;
  return spot;
}

// Column masks of any width without a loop: `of(kept)` points into an array of ones followed by zeros.
class Prefixes {
 public:
  explicit Prefixes(i64 width) : width_(width), values_(2 * width, 0.f) { std::fill(values_.begin(), values_.begin() + width, 1.f); }
  const float* of(i64 kept) const { return values_.data() + width_ - kept; }

 private:
  i64 width_;
  std::vector<float> values_;
};

template <int W>
static inline __attribute__((always_inline)) void multiply_rows(const float* a, const float* b, float* to, i64 w) {
  blocks<W>(width_of<W>(w), [&](auto lanes, i64 k) { lanes.store(to + k, lanes.load(a + k) * lanes.load(b + k)); });
}

// Lower bound of the squared norm: the square root has no derivative at 0.
constexpr float SHORTEST = 1e-30f;

template <int W>
static inline __attribute__((always_inline)) float norm_of(const float* x, i64 w, i64 norm) {
  if (norm == 1) return row_sum<W>(w, [&](auto lanes, i64 k) { return lanes.far(lanes.load(x + k)); });
  const float squares = row_sum<W>(w, [&](auto lanes, i64 k) { return lanes.load(x + k) * lanes.load(x + k); });
  return std::sqrt(std::max(squares, SHORTEST));
}

// Samples [from, from + n); false where an id is out of range. `vectors` and `out` may be the same.
template <int W>
static bool mask_rows(const Mask& m, i64 from, i64 n, const Matrix& vectors, const Matrix& out) {
  const i64 width = width_of<W>(m.width);
  const Prefixes prefixes(width);
  bool good = true;
  for (i64 i = 0; i < n; i++) {
    for (i64 f = 0; f < m.fields; f++) {
      const Spot spot = spot_of(m, from + i, f);
      good &= spot.at >= 0;
      if (spot.at < 0) continue;
      const float* x = vectors.data + i * vectors.stride + f * width;
      float* y = out.data + i * out.stride + f * width;
      if (m.scales) {
        const float* by = m.scales + spot.block * width;
        multiply_rows<W>(x, by, y, width);
        continue;
      }
      // A NaN norm keeps its row, so that the loss becomes NaN too.
      if (m.thresholds && norm_of<W>(x, width, m.norm) <= spot.threshold) x = spot.fallback;
      if (x) multiply_rows<W>(x, prefixes.of(spot.kept), y, width);
      else std::memset(y, 0, width * sizeof(float));
    }
  }
  return good;
}

// Gradients of a mask's parameters from one part of the samples; parts are added in a fixed order, whichever thread
// ran.
struct MaskSums {
  std::vector<float> thresholds, rest;  // of fields; of `fallback` or `scales`
};

// Gradients of vectors and parameters from samples [from, to); those of thresholds per id are written to `slopes`.
// False if an id is out of range: the caller may have overwritten the ids since forward.
template <int W>
static bool mask_gradients(const Mask& m, i64 from, i64 to, MaskSums& sums) {
  const i64 width = width_of<W>(m.width);
  const Prefixes prefixes(width);
  for (i64 b = from; b < to; b++) {
    for (i64 f = 0; f < m.fields; f++) {
      const Spot spot = spot_of(m, b, f);
      if (spot.at < 0) return false;
      const float* x = m.vectors.data + b * m.vectors.stride + f * width;
      const float* g = m.gradient.data + b * m.gradient.stride + f * width;
      float* to_x = m.of_vectors.data ? m.of_vectors.data + b * m.of_vectors.stride + f * width : nullptr;
      if (m.scales) {
        const float* by = m.scales + spot.block * width;
        if (to_x) multiply_rows<W>(g, by, to_x, width);
        if (sums.rest.empty()) continue;
        float* sum = sums.rest.data() + spot.block * width;
        blocks<W>(width, [&](auto lanes, i64 k) { lanes.store(sum + k, lanes.load(sum + k) + lanes.load(g + k) * lanes.load(x + k)); });
        continue;
      }
      float u = 1.f, length = 0.f, slope = 0.f;
      const float* cut = prefixes.of(spot.kept);
      if (m.thresholds) {
        length = norm_of<W>(x, width, m.norm);
        u = length - spot.threshold;
        slope = long_tailed(u);
        if (slope != 0.f)
          slope *= row_sum<W>(width, [&](auto lanes, i64 k) {
            auto change = lanes.load(x + k);
            if (spot.fallback) change -= lanes.load(spot.fallback + k);
            return lanes.load(g + k) * lanes.load(cut + k) * change;
          });
        if (m.slopes) m.slopes[b * m.fields + f] = -slope;
        else sums.thresholds[f] -= slope;
      }
      const bool keep = !(u <= 0.f);
      if (!keep && !sums.rest.empty()) {
        float* sum = sums.rest.data() + f * width;
        blocks<W>(width, [&](auto lanes, i64 k) { lanes.store(sum + k, lanes.load(sum + k) + lanes.load(g + k) * lanes.load(cut + k)); });
      }
      if (!to_x) continue;
      multiply_rows<W>(g, keep ? cut : prefixes.of(0), to_x, width);
      if (slope == 0.f) continue;
      const float pull = m.norm == 1 ? slope : slope / length;
      blocks<W>(width, [&](auto lanes, i64 k) {
        const auto row = lanes.load(x + k);
        lanes.store(to_x + k, lanes.load(to_x + k) + (m.norm == 1 ? lanes.sign(row) : row) * pull);
      });
    }
  }
  return true;
}

struct MaskKernels {
  bool (*rows)(const Mask&, i64, i64, const Matrix&, const Matrix&);
  bool (*gradients)(const Mask&, i64, i64, MaskSums&);
};

static MaskKernels choose_mask(i64 width) {
  switch (width) {
    case 8: return {mask_rows<compiled(8)>, mask_gradients<compiled(8)>};
    case 16: return {mask_rows<16>, mask_gradients<16>};
    case 32: return {mask_rows<compiled(32)>, mask_gradients<compiled(32)>};
    case 64: return {mask_rows<compiled(64)>, mask_gradients<compiled(64)>};
    default: return {mask_rows<0>, mask_gradients<0>};
  }
}

// Samples [from, to); false where an id is out of range.
static bool mask(const Mask& m, i64 from, i64 to) {
  const Matrix vectors{m.vectors.data + from * m.vectors.stride, m.vectors.stride};
  const Matrix out{m.out.data + from * m.out.stride, m.out.stride};
  return choose_mask(m.width).rows(m, from, to - from, vectors, out);
}

// Number of parts that are summed separately: bounded by memory, and independent of the number of threads.
static i64 mask_parts(const Mask& m, i64 parameters) {
  return std::max<i64>(1, std::min({i64(16), m.batch / 256, (i64(1) << 22) / std::max<i64>(1, parameters)}));
}

// All gradients of a mask; false where an id is out of range.
static bool mask_backward(const Mask& m, i64 threads) {
  const i64 rest = m.of_rest ? (m.scales ? m.block_count : m.fields) * m.width : 0, parts = mask_parts(m, rest);
  std::vector<MaskSums> sums(parts);
  const MaskKernels kernels = choose_mask(m.width);
  bool good = true;
  i64 next = 0;
  parallel(threads, [&](i64, i64) {
    for (i64 p; (p = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < parts;) {
      sums[p].thresholds.assign(m.fields, 0.f);
      sums[p].rest.assign(rest, 0.f);
      if (!kernels.gradients(m, m.batch * p / parts, m.batch * (p + 1) / parts, sums[p]))
        __atomic_store_n(&good, false, __ATOMIC_RELAXED);
    }
  });
  if (!good) return false;
  for (const MaskSums& part : sums) {
    for (i64 f = 0; m.of_thresholds && !m.slopes && f < m.fields; f++) m.of_thresholds[f] += part.thresholds[f];
    for (i64 k = 0; k < rest; k++) m.of_rest[k] += part.rest[k];
  }
  if (!m.slopes) return true;
  // Fields have no id in common, so each thread takes whole fields.
  next = 0;
  parallel(threads, [&](i64, i64) {
    for (i64 f; (f = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < m.fields;)
      for (i64 b = 0; b < m.batch; b++) m.of_thresholds[spot_of(m, b, f).at] += m.slopes[b * m.fields + f];
  });
  return true;
}
