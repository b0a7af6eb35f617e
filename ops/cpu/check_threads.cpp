// Runs the kernels in one and in four threads on every instruction set, e.g. under a thread sanitizer, and checks that
// results are equal bit for bit; prints their hash, which is the same on every processor:
// g++ -fsanitize=thread -g -O1 -std=c++17 -ffp-contract=off -Wno-psabi check_threads.cpp && ./a.out
#include "native.cpp"

#include <cstdio>
#include <cstring>
#include <thread>

namespace {

thread_local int own_number = 0;
int team_size = 1;

void run_parallel(void (*fn)(void*), void* data, unsigned threads, unsigned) {
  team_size = int(threads);
  std::vector<std::thread> team;
  for (unsigned t = 0; t < threads; t++)
    team.emplace_back([=] {
      own_number = int(t);
      fn(data);
    });
  for (std::thread& t : team) t.join();
}

std::uint32_t bits_of(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

constexpr i64 ROWS = 5000, WIDTH = 16, BATCH = 3000, FEATURES = 3;

Transform hashed(i64 salt) {
  Transform t{};
  t.kind = HASH, t.salt = salt, t.size = ROWS, t.stride = 1;
  return t;
}

RowLookup row_lookup(i64 storage, i64 width, i64 column, i64 span, i64 join, i64 salt) {
  RowLookup p{};
  p.storage = storage, p.rows = ROWS, p.width = width, p.column = column, p.span = span, p.num_rows = 1, p.join = join;
  p.weight_storage = -1, p.scale = 1, p.rows_of = hashed(salt);
  return p;
}

// Results of one training run: vectors of every step, tables and optimizer state.
std::vector<float> train(i64 threads, i64 rule, bool bags, bool lazy) {
  std::vector<RowLookup> row_lookups = {row_lookup(0, WIDTH, 0, WIDTH, STORE, 1), row_lookup(0, WIDTH, 0, WIDTH, STORE, 2),
                               row_lookup(0, WIDTH, 0, WIDTH, MUL, 3), row_lookup(1, 1, 0, WIDTH, STORE, 4)};
  row_lookups[1].product = row_lookups[2].product = 1;
  row_lookups[2].kept = WIDTH, row_lookups[3].kept = 2 * WIDTH;
  row_lookups[3].num_rows = WIDTH, row_lookups[3].has_sign = 1, row_lookups[3].sign = 7;
  std::vector<Feature> features(FEATURES);
  for (i64 f = 0; f < FEATURES; f++) {
    features[f].ids = f, features[f].limit = -1, features[f].column = f * WIDTH, features[f].width = WIDTH;
    features[f].first = f == 0 ? 0 : f == 1 ? 1 : 3, features[f].row_lookups = f == 1 ? 2 : 1, features[f].plain = f == 0;
  }
  features[2].mean = 1;
  std::vector<float> tables[2] = {std::vector<float>(ROWS * WIDTH), std::vector<float>(ROWS)};
  std::vector<float> states[2][2];
  std::vector<i32> last[2];
  u64 seed = 1;
  auto random = [&] { return seed = seed * 6364136223846793005ull + 1442695040888963407ull, seed >> 33; };
  for (int s = 0; s < 2; s++) {
    for (float& x : tables[s]) x = float(random() % 2001) / 1000 - 1;
    for (auto& state : states[s]) state.assign(tables[s].size(), 0.f);
    last[s].assign(ROWS, 0);
  }
  std::vector<float> found;
  std::vector<double> sizes, epsilons;
  for (i64 step = 1; step <= 3; step++) {
    std::vector<i64> offsets = {0};
    for (i64 b = 0; b < FEATURES * BATCH; b++) offsets.push_back(offsets.back() + (bags ? i64(random() % 4) : 1));
    const i64 count = offsets.back();
    std::vector<i64> ids(count);
    for (i64& id : ids) id = i64(random() % (1 << (random() % 14)));
    std::vector<float> out(BATCH * FEATURES * WIDTH), gradient(out.size()), kept(std::max(count, BATCH) * 3 * WIDTH);
    for (float& g : gradient) g = float(random() % 2001) / 1000 - 1;
    float* storages[2] = {tables[0].data(), tables[1].data()};
    const i64 widths[2] = {WIDTH, 1};
    Matrix vectors{out.data(), FEATURES * WIDTH}, upstream{gradient.data(), FEATURES * WIDTH};
    Call c{};
    c.features = features.data(), c.row_lookups = row_lookups.data(), c.feature_count = FEATURES, c.row_lookup_count = i64(row_lookups.size());
    c.ids = ids.data(), c.batch = BATCH, c.sample_stride = 1, c.feature_stride = BATCH;
    c.offsets = bags ? offsets.data() : nullptr;
    c.storages = storages, c.storage_widths = widths, c.storage_count = 2, c.outputs = &vectors, c.output_count = 1;
    c.kept = {kept.data(), 3 * WIDTH}, c.threads = threads;
    sizes.push_back(0.01 / double(step)), epsilons.push_back(1e-8);
    Update updates[2] = {};
    auto prepare = [&](i64 to) {
      for (int s = 0; s < 2; s++) {
        Update& u = updates[s];
        u.rule.number = rule, u.rule.elements = 2, u.rule.constants[0] = 0.1, u.rule.constants[1] = 0.001, u.decay = 0.01, u.sizes = sizes.data(), u.epsilons = epsilons.data();
        u.step = to, u.rows = ROWS, u.last = lazy ? last[s].data() : nullptr;
        u.first = lazy ? 0 : to - 1, u.sizes += lazy ? 0 : to - 1, u.epsilons += lazy ? 0 : to - 1;
        for (int i = 0; i < 2; i++) u.rule.state[i] = states[s][i].data();
      }
    };
    prepare(step - 1);
    if (lazy && rse_backward(&c, updates, 1) != DONE) std::abort();
    if (rse_forward(&c) != DONE) std::abort();
    found.insert(found.end(), out.begin(), out.end());
    c.outputs = &upstream;
    prepare(step);
    if (rse_backward(&c, updates, 0) != DONE) std::abort();
    if (lazy && step == 3)
      for (int s = 0; s < 2; s++) rse_catch_up(&updates[s], storages[s], widths[s], threads, nullptr, 0);
  }
  for (int s = 0; s < 2; s++) {
    found.insert(found.end(), tables[s].begin(), tables[s].end());
    for (auto& state : states[s]) found.insert(found.end(), state.begin(), state.end());
  }
  return found;
}

// Results of a mask of one kind: masked vectors and all gradients.
std::vector<float> masked(i64 threads, i64 norm, bool by_id, bool scaled) {
  std::vector<RowLookup> row_lookups(FEATURES, row_lookup(0, WIDTH, 0, WIDTH, STORE, 1));
  std::vector<Feature> features(FEATURES);
  for (i64 f = 0; f < FEATURES; f++)
    features[f].ids = features[f].first = f, features[f].row_lookups = features[f].plain = 1, features[f].limit = ROWS,
    features[f].column = f * WIDTH, features[f].width = WIDTH;
  u64 seed = 5;
  auto random = [&] { return seed = seed * 6364136223846793005ull + 1442695040888963407ull, seed >> 33; };
  auto draw = [&](i64 count, float scale) {
    std::vector<float> out(count);
    for (float& x : out) x = scale * float(random() % 2001) / 1000;
    return out;
  };
  std::vector<float> table = draw(ROWS * WIDTH, 1), thresholds = draw(by_id ? FEATURES * ROWS : FEATURES, norm == 1 ? 16 : 4);
  std::vector<float> rest = draw(scaled ? 7 * WIDTH : FEATURES * WIDTH, 1), gradient = draw(BATCH * FEATURES * WIDTH, 1);
  std::vector<float> vectors(gradient.size()), out(gradient.size()), moved(gradient.size()), slopes(BATCH * FEATURES);
  std::vector<float> of_thresholds(thresholds.size()), of_rest(rest.size());
  std::vector<i64> ids(BATCH * FEATURES), widths(BATCH * FEATURES);
  for (i64& id : ids) id = i64(random() % ROWS);
  for (i64& w : widths) w = 1 + i64(random() % WIDTH);
  std::vector<uint8_t> blocks(FEATURES * ROWS);
  for (uint8_t& b : blocks) b = uint8_t(random() % 7);
  const i64 starts[] = {0, ROWS, 2 * ROWS, 3 * ROWS};
  const Matrix found{vectors.data(), FEATURES * WIDTH};
  Mask m{};
  m.batch = BATCH, m.fields = FEATURES, m.width = WIDTH, m.norm = norm, m.vectors = found, m.out = {out.data(), found.stride};
  m.ids = ids.data(), m.sample_stride = 1, m.feature_stride = BATCH, m.starts = by_id || scaled ? starts : nullptr;
  if (scaled) m.scales = rest.data(), m.blocks = blocks.data(), m.blocks_are_8 = 1, m.block_count = 7;
  else m.thresholds = thresholds.data(), m.fallback = rest.data(), m.widths = widths.data(), m.widths_stride = FEATURES;
  float* storages[1] = {table.data()};
  const i64 storage_widths[1] = {WIDTH};
  Call c{};
  c.features = features.data(), c.row_lookups = row_lookups.data(), c.feature_count = c.row_lookup_count = FEATURES;
  c.ids = ids.data(), c.batch = BATCH, c.sample_stride = 1, c.feature_stride = BATCH, c.mask = &m;
  c.storages = storages, c.storage_widths = storage_widths, c.storage_count = 1, c.outputs = &found, c.output_count = 1;
  c.threads = threads;
  if (rse_forward(&c) != DONE) std::abort();
  const std::vector<float> inside = out;
  if (rse_mask(&m, threads) != DONE || inside != out) std::abort();
  m.gradient = {gradient.data(), found.stride}, m.of_vectors = {moved.data(), found.stride};
  m.of_thresholds = of_thresholds.data(), m.of_rest = of_rest.data(), m.slopes = by_id ? slopes.data() : nullptr;
  if (rse_mask_backward(&m, threads) != DONE) std::abort();
  for (const auto* more : {&moved, &of_thresholds, &of_rest}) out.insert(out.end(), more->begin(), more->end());
  return out;
}

}  // namespace

int main() {
  rse_set_runtime(reinterpret_cast<void*>(run_parallel), reinterpret_cast<void*>(+[] { return own_number; }),
                  reinterpret_cast<void*>(+[] { return team_size; }));
  int wrong = 0;
  std::vector<u64> hashes;
  const std::string names = rse_rules();
  const i64 rules = std::count(names.begin(), names.end(), ' ');
  for (const Variant& variant : variants) {
    if (!rse_select(variant.name)) continue;
    u64 hash = 14695981039346656037ull;
    for (i64 rule = 0; rule < rules; rule++)
      for (bool bags : {false, true})
        for (bool lazy : {false, true}) {
          const std::vector<float> one = train(1, rule, bags, lazy);
          const bool same = one == train(4, rule, bags, lazy);
          wrong += !same;
          if (!same) std::printf("%s, rule %d, bags %d, lazy %d: other bits\n", variant.name, int(rule), bags, lazy);
          for (float x : one) hash = (hash ^ bits_of(x)) * 1099511628211ull;
        }
    for (i64 norm : {1, 2, 3}) {  // 3: scaled
      const std::vector<float> one = masked(1, norm % 3, norm == 2, norm == 3);
      const bool same = one == masked(4, norm % 3, norm == 2, norm == 3);
      wrong += !same;
      if (!same) std::printf("%s, mask %d: other bits\n", variant.name, int(norm));
      for (float x : one) hash = (hash ^ bits_of(x)) * 1099511628211ull;
    }
    hashes.push_back(hash);
    wrong += hash != hashes[0];
    std::printf("%s: %016llx\n", variant.name, static_cast<unsigned long long>(hash));
  }
  wrong += hashes.empty();
  std::printf("%s\n", wrong ? "results differ" : "four threads: the bits of one");
  return wrong != 0;
}
