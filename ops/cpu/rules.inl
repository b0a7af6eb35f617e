// Steps of the optimizers on one row. Part of kernels.inl.

template <int W>
static inline float mean_square(const float* g, i64 w) {
  float total = 0.f;
  auto wide = Lanes<16>::all(0.f);
  blocks<W>(w, [&](auto lanes, i64 k) {
    const auto v = lanes.load(g + k);
    if constexpr (sizeof(v) == sizeof(wide)) wide += v * v;
    else total += lanes.sum(v * v);
  });
  if (!W || W >= 16) total += Lanes<16>::sum(wide);
  return total / float(width_of<W>(w));
}

// Elements of one row, in registers where its width is known.
template <int W>
struct Row {
  float fixed[W ? W : 1];
  std::vector<float> memory;
  explicit Row(i64 width) : memory(W ? 0 : width) {}
  float* data() { return W ? fixed : memory.data(); }
};

// Steps of one element of each lane, given its gradient: what Adagrad and Adam do, once or many times in a row. Their
// vectors are named by the lanes: a type deduced from an argument is one that clang takes to be aligned.
struct AdagradStep {
  template <class L>
  static inline void run(L lanes, typename L::V v, typename L::V& weight, typename L::V& sum, float size, float eps) {
    sum += v * v;
    weight -= v / (lanes.root(sum) + eps) * size;
  }
};

struct AdamStep {
  float rest1, rest2;
  explicit AdamStep(const Update& u) : rest1(float(1 - u.beta1)), rest2(float(1 - u.beta2)) {}
  template <class L>
  inline void run(L lanes, typename L::V v, typename L::V& weight, typename L::V& mean, typename L::V& square, float size, float eps) const {
    mean += (v - mean) * rest1, square += (v * v - square) * rest2;
    weight -= mean / (lanes.root(square) + eps) * size;
  }
};

static inline float* state_of(const Update& u, i64 which, i64 place) {
  return u.state[which] ? u.state[which] + place : nullptr;
}

static inline float size_of(const Update& u, i64 step) { return float(u.sizes[step - u.first - 1]); }
static inline float epsilon_of(const Update& u, i64 step) { return float(u.epsilons[step - u.first - 1]); }

// Steps that a row missed, up to `to`: its gradient was its decay alone.
template <int W>
static inline void catch_up(const Update& u, float* table, i64 row, i64 to, i64 w) {
  if (!u.last || u.last[row] >= to) return;
  const i64 width = width_of<W>(w), place = row * width, from = u.last[row] + 1;
  const float decay = float(u.decay);
  float *weight = table + place, *first = state_of(u, 0, place), *second = state_of(u, 1, place);
  u.last[row] = i32(to);
  switch (u.rule) {
    case SGD:
      blocks<W>(width, [&](auto lanes, i64 k) {
        auto x = lanes.load(weight + k);
        for (i64 t = from; t <= to; t++) x -= x * decay * size_of(u, t);
        lanes.store(weight + k, x);
      });
      break;
    case ADAGRAD:
      blocks<W>(width, [&](auto lanes, i64 k) {
        auto x = lanes.load(weight + k), sum = lanes.load(first + k);
        for (i64 t = from; t <= to; t++) AdagradStep::run(lanes, x * decay, x, sum, size_of(u, t), epsilon_of(u, t));
        lanes.store(weight + k, x), lanes.store(first + k, sum);
      });
      break;
    case ROWWISE_ADAGRAD: {
      Row<W> memory(width);
      float *g = memory.data(), sum = u.state[0][row];
      for (i64 t = from; t <= to; t++) {
        blocks<W>(width, [&](auto lanes, i64 k) { lanes.store(g + k, lanes.load(weight + k) * decay); });
        const float step = size_of(u, t) / (std::sqrt(sum += mean_square<W>(g, w)) + epsilon_of(u, t));
        blocks<W>(width, [&](auto lanes, i64 k) { lanes.store(weight + k, lanes.load(weight + k) - lanes.load(g + k) * step); });
      }
      u.state[0][row] = sum;
      break;
    }
    default: {
      const AdamStep adam(u);
      // Rows that were never read stay where they are, unless they decay.
      float moved = decay;
      for (i64 k = 0; decay == 0 && k < width; k++) moved += std::abs(first[k]) + second[k];
      if (moved == 0) break;
      blocks<W>(width, [&](auto lanes, i64 k) {
        auto x = lanes.load(weight + k), mean = lanes.load(first + k), square = lanes.load(second + k);
        for (i64 t = from; t <= to; t++) adam.run(lanes, x * decay, x, mean, square, size_of(u, t), epsilon_of(u, t));
        lanes.store(weight + k, x), lanes.store(first + k, mean), lanes.store(second + k, square);
      });
    }
  }
}

// One step of the rule on a row whose summed gradient is g; `at` is the row's place in a sparse gradient.
template <int W>
static inline void update_row(const Update& u, float* table, i64 row, i64 at, float* g, i64 w) {
  const i64 width = width_of<W>(w), place = row * width;
  float *weight = table + place, *first = state_of(u, 0, place), *second = state_of(u, 1, place);
  if (u.rule >= DENSE_GRADIENT) {
    const bool sparse = u.rule == SPARSE_GRADIENT;
    if (sparse) u.touched[at] = row;
    float* to = u.gradient + (sparse ? at * width : place);
    blocks<W>(width, [&](auto lanes, i64 k) { lanes.store(to + k, lanes.load(g + k)); });
    return;
  }
  if (u.last) {
    catch_up<W>(u, table, row, u.step - 1, w);
    u.last[row] = i32(u.step);
  }
  if (u.decay != 0)
    blocks<W>(width, [&](auto lanes, i64 k) { lanes.store(g + k, lanes.load(g + k) + lanes.load(weight + k) * float(u.decay)); });
  float size = size_of(u, u.step);
  const float eps = epsilon_of(u, u.step);
  switch (u.rule) {
    case SGD:
      blocks<W>(width, [&](auto lanes, i64 k) { lanes.store(weight + k, lanes.load(weight + k) - lanes.load(g + k) * size); });
      break;
    case ADAGRAD:
      blocks<W>(width, [&](auto lanes, i64 k) {
        auto x = lanes.load(weight + k), sum = lanes.load(first + k);
        AdagradStep::run(lanes, lanes.load(g + k), x, sum, size, eps);
        lanes.store(weight + k, x), lanes.store(first + k, sum);
      });
      break;
    case ROWWISE_ADAGRAD: {
      const float step = size / (std::sqrt(u.state[0][row] += mean_square<W>(g, w)) + eps);
      blocks<W>(width, [&](auto lanes, i64 k) { lanes.store(weight + k, lanes.load(weight + k) - lanes.load(g + k) * step); });
      break;
    }
    default: {
      const AdamStep adam(u);
      if (u.count) size *= float(u.corrections[std::min<i64>(++u.count[row], u.correction_count) - 1]);
      blocks<W>(width, [&](auto lanes, i64 k) {
        auto x = lanes.load(weight + k), mean = lanes.load(first + k), square = lanes.load(second + k);
        adam.run(lanes, lanes.load(g + k), x, mean, square, size, eps);
        lanes.store(weight + k, x), lanes.store(first + k, mean), lanes.store(second + k, square);
      });
    }
  }
}

static inline void prefetch_state(const Update& u, const float* table, i64 row, i64 width) {
  if (u.rule < DENSE_GRADIENT) prefetch<1>(table + row * width, 4 * width);
  if (u.rule == ROWWISE_ADAGRAD) prefetch<1>(u.state[0] + row, 4);
  if (u.rule == ADAGRAD || u.rule == ADAM) prefetch<1>(u.state[0] + row * width, 4 * width);
  if (u.rule == ADAM) prefetch<1>(u.state[1] + row * width, 4 * width);
  if (u.last) prefetch<1>(u.last + row, 4);
  if (u.count) prefetch<1>(u.count + row, 4);
}
