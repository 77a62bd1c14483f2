// Exact weighted k-means in one dimension; see anyquant_core.h. anyquant/clustering/fallback.py does the same steps in
// the same order with NumPy and gives the same bytes: change both together.
//
// A row becomes u distinct ascending values with weights and their prefix sums W (weight), S (first moment) and Q
// (second moment), taken about the mean. Values i..j-1 as one cluster gain (S[j] - S[i])^2 / (W[j] - W[i]); the error
// of a clustering is Q[u] minus the sum of its gains. That gain makes least errors convex in k, so a clustering that
// is best when every cluster costs lambda is best for its own number of clusters, and k is reached by a search over
// lambda (Gronlund et al., arXiv 1701.07204). Where the least errors lie on a line around k no lambda
// singles k out; then a path of fewer and one of more clusters, both best, are crossed to k (Aggarwal, Schieber and
// Tokuyama, "Finding a minimum-weight k-link path in graphs with the concave Monge property and applications", 1994).
//
// For one lambda, g[j] = max over i < j of g[i] + gain(i, j) - lambda, and from[j] is the lowest i that reaches it.
// Two facts keep that near linear. from[] never falls, in j and in 1 / lambda. And with e[j] = Q[j] - g[j], which
// never falls in j either, a cluster that starts beyond a leaves at least e[a] + lambda: as long as the best start at
// or before a stays within that, a block of entries after a needs no start inside the block.
//
// The sums lose what is about 1e-15 of Q, which an outlier or far groups can make more than all else. Where the error
// found is that small, it shows gaps that no better clustering spans; sums about the means between them are finer.

#include <cstring>

#include "anyquant_core.h"
#include "kmeans_row.h"
#include "vector_units.h"

#define INLINE inline __attribute__((always_inline))

namespace {

constexpr int GROUP = 8;  // entries that are done together
constexpr int HALF_GROUP = 4;
constexpr int64_t BRACKET = 8;  // starts per entry up to which brackets are worth scanning in full
constexpr int PATIENCE = 3;     // guesses from one side before the chord, which always gets further

int least(int a, int b) { return a < b ? a : b; }
int most(int a, int b) { return a > b ? a : b; }

namespace sse2 {
constexpr int LANES = 2;
#include "kmeans_lambda.h"
}  // namespace sse2

#if VECTOR_UNITS
#pragma GCC push_options
#pragma GCC target("avx2")
namespace avx2 {
constexpr int LANES = 4;
#include "kmeans_lambda.h"
}  // namespace avx2
#pragma GCC target("avx512f,avx512vl,avx512dq")
namespace avx512 {
constexpr int LANES = 4;
#include "kmeans_lambda.h"
}  // namespace avx512
#pragma GCC pop_options
#endif

// The two ways to do all entries of a row for one lambda.
struct Engine {
  void (*by_blocks)(const Row& row, double lambda, int32_t* from);
  void (*by_brackets)(const Row& row, double lambda, const int32_t* low, const int32_t* high, int32_t* from);
};

Engine engine_for_this_machine() {
#if VECTOR_UNITS
  if (__builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    return {avx512::by_blocks, avx512::by_brackets};
  }
  if (__builtin_cpu_supports("avx2")) return {avx2::by_blocks, avx2::by_brackets};
#endif
  return {sse2::by_blocks, sse2::by_brackets};
}

// What a lambda led to: as many clusters, their gain, and the starts.
struct Found {
  double lambda;
  int count;
  double gain;
  int32_t* from;
  bool sought;  // or one of the two ends that need no search
};

Found every_value_alone(const Row& row, int32_t* from) {
  from[0] = 0;
  for (int j = 1; j <= row.u; ++j) from[j] = j - 1;
  return {0.0, row.u, row.Q[row.u], from, false};
}

Found every_piece_whole(const Row& row, int32_t* from) {
  double gain = 0;
  from[0] = 0;
  for (int p = 0; p < row.pieces; ++p) {
    const int start = row.cuts[p], end = row.cuts[p + 1];
    const double ds = row.S[end] - row.S[start];
    gain += ds * ds / (row.W[end] - row.W[start]);
    for (int j = start + 1; j <= end; ++j) from[j] = start;
  }
  return {__builtin_inf(), row.pieces, gain, from, false};
}

int clusters(const Row& row, const int32_t* from) {
  int count = 0;
  for (int j = row.u; j; j = from[j]) ++count;
  return count;
}

// The starts of the clusters, and u.
void walk(const Row& row, const Found& found, int32_t* path) {
  int j = row.u;
  for (int c = found.count; c >= 0; --c) {
    path[c] = j;
    j = found.from[j];
  }
}

// A lambda that might lead to k clusters, from what is known below and above; sets chord where only the slope between
// the two is sure to lead to another number of clusters, if any does.
double guess(const Row& row, const Found& below, const Found& above, int k, int* misses, bool* chord) {
  const double few = below.count, many = above.count, want = k, u = row.u;
  const double all = row.Q[row.u], slope = (above.gain - below.gain) / (many - few);
  double lambda = 0;
  if (below.sought && above.sought) {  // error ~ 1 / clusters^2 between the two
    lambda = slope * (2 * few * few * many * many) / ((few + many) * want * want * want);
    if (above.count - below.count == 2) *chord = true;
  } else if (below.sought) {  // the same from below alone; it falls faster when few values are left
    const double left = (u - want) / (u - few), ratio = few / want, beyond = few / (want + ((1 << *misses) - 1));
    lambda = want >= 1.25 * few ? 2 * (all - below.gain) * (ratio * ratio * left) / want
                                : below.lambda * (beyond * beyond * beyond * beyond * left);
  } else if (above.sought) {
    const double ratio = many / want;
    lambda = above.lambda * (ratio * ratio * ratio);
  } else {  // what normally distributed values need
    lambda = 5 * all * (u - want) / (u * want * want * (want + 2));
  }
  if (!below.sought || !above.sought) {
    if (*misses == PATIENCE) *chord = true;
    *misses += *misses < PATIENCE;
  }
  if (!(lambda > above.lambda && lambda < below.lambda)) *chord = true;
  return *chord ? slope : lambda;
}

// Crosses a best path of fewer clusters and one of more to one of k: where a cluster of the second lies inside one of
// the first, so many clusters further on, the second path leads up to it and the first goes on behind it.
void cross(const Row& row, const Found& below, const Found& above, int k) {
  walk(row, below, row.few);
  walk(row, above, row.many);
  const int ahead = k - below.count;
  int t = 0;
  while (row.many[t + ahead + 1] > row.few[t + 1]) ++t;
  for (int i = 0; i <= t + ahead; ++i) row.bounds[i] = row.many[i];
  for (int i = t + 1; i <= below.count; ++i) row.bounds[i + ahead] = row.few[i];
}

// Finds the best k < u clusters, narrowing down what is known below and above.
void search(const Row& row, const Engine& engine, int k, Found& below, Found& above, int32_t*& spare) {
  bool chord = false;
  int misses = 0;
  while (below.count != k && above.count != k) {
    const double lambda = guess(row, below, above, k, &misses, &chord);
    if (!(lambda > above.lambda && lambda < below.lambda)) return cross(row, below, above, k);
    const int64_t few = below.count, many = above.count;
    if (row.u * (many - few) <= BRACKET * few * many) {
      engine.by_brackets(row, lambda, below.from, above.from, spare);
    } else {
      engine.by_blocks(row, lambda, spare);
    }
    const int count = clusters(row, spare);
    const bool missed = count <= below.count || count >= above.count;
    if (missed && chord) return cross(row, below, above, k);  // below, k and above lie on a line
    chord = missed && below.sought && above.sought;
    if (count < below.count || count > above.count) continue;
    Found& end = count <= k ? below : above;
    int32_t* old = end.from;
    end = {lambda, count, row.g[row.u] + lambda * count, spare, true};
    spare = old;
  }
  walk(row, below.count == k ? below : above, row.bounds);
}

// The error of the clusters, from the values themselves, and their centroids unless null.
double measure(const Row& row, int k, double* centroids) {
  double error = 0;
  for (int c = 0; c < k; ++c) {
    const int start = row.bounds[c], end = row.bounds[c + 1];
    const double first = row.v[start], last = row.v[end - 1];
    double mass = 0, moment = 0, part = 0;
    for (int i = start; i < end; ++i) {
      mass += row.w[i];
      moment += row.w[i] * (row.v[i] - first);
    }
    double centroid = first + moment / mass;
    centroid = centroid < last ? centroid : last;
    for (int i = start; i < end; ++i) {
      const double d = row.v[i] - centroid;
      part += row.w[i] * d * d;
    }
    error += part;
    if (centroids) centroids[c] = centroid;
  }
  return error;
}

// Everything for one prepared row: the errors for all ks, or the centroids for one.
void cluster(Row& row, const Engine& engine, const int32_t* ks, size_t ks_len, double* errors, double* centroids) {
  Found below = every_piece_whole(row, row.from[0]), above = every_value_alone(row, row.from[1]);
  int32_t* spare = row.from[2];
  double bound = __builtin_inf();  // that no best error from here on exceeds
  for (size_t q = 0; q < ks_len; ++q) {
    const int k = ks[q];
    if (k >= row.u) {
      if (errors) errors[q] = 0;
      for (int c = 0; centroids && c < k; ++c) centroids[c] = row.v[least(c, row.u - 1)];
      continue;
    }
    if (above.count < k) {
      int32_t* old = below.from;
      below = above;
      above = every_value_alone(row, old);
    }
    search(row, engine, k, below, above, spare);
    double error = measure(row, k, centroids);
    bound = error < bound ? error : bound;
    while (error < row.coarse && cut(row, bound)) {
      below = every_piece_whole(row, below.from);
      above = every_value_alone(row, above.from);
      search(row, engine, k, below, above, spare);
      error = measure(row, k, centroids);
      bound = error < bound ? error : bound;
    }
    if (errors) errors[q] = error;
  }
}

constexpr size_t MOST_COLS = 1u << 28;
constexpr size_t ENTRY = 6 * sizeof(double) + 6 * sizeof(int32_t);  // of workspace, for each value

int run(const float* values, size_t values_len, const float* weights, size_t weights_len, size_t rows, size_t cols,
        const int32_t* ks, size_t ks_len, double* errors, double* centroids, void* workspace, size_t workspace_len) {
  size_t size = 0;
  if (!values || !workspace || (!weights && weights_len) || (weights && !weights_len)) return AQ_BAD_ARGUMENT;
  if (cols == 0 || cols > MOST_COLS) return AQ_BAD_ARGUMENT;
  for (size_t q = 0; q < ks_len; ++q) {
    if (ks[q] < 1 || ks[q] > 256 || (q && ks[q] <= ks[q - 1])) return AQ_BAD_ARGUMENT;
  }
  if (__builtin_mul_overflow(rows, cols, &size) || size != values_len) return AQ_BAD_LENGTH;
  if (weights && weights_len != cols && weights_len != values_len) return AQ_BAD_LENGTH;
  if (workspace_len < aq_kmeans_workspace(cols)) return AQ_BAD_LENGTH;

  const size_t n = cols + 1 + PADDING;
  double* doubles = static_cast<double*>(workspace);
  int32_t* ints = reinterpret_cast<int32_t*>(doubles + 6 * n);
  Row row = {};
  double** const parts[] = {&row.v, &row.w, &row.W, &row.S, &row.Q, &row.g};
  for (double** part : parts) *part = doubles, doubles += n;
  int32_t** const paths[] = {&row.from[0], &row.from[1], &row.from[2], &row.few, &row.many, &row.bounds};
  for (int32_t** part : paths) *part = ints, ints += n;

  const Engine engine = engine_for_this_machine();
  for (size_t r = 0; r < rows; ++r) {
    prepare(values + r * cols, weights && weights_len == values_len ? weights + r * cols : weights,
            static_cast<int>(cols), row);
    cluster(row, engine, ks, ks_len, errors ? errors + r * ks_len : nullptr,
            centroids ? centroids + r * ks[0] : nullptr);
  }
  return AQ_OK;
}

}  // namespace

extern "C" size_t aq_kmeans_workspace(size_t cols) {
  return cols && cols <= MOST_COLS ? (cols + 1 + PADDING) * ENTRY : 0;
}

extern "C" int aq_kmeans_errors(const float* values, size_t values_len, const float* weights, size_t weights_len,
                                size_t rows, size_t cols, const int32_t* ks, size_t ks_len, double* errors,
                                size_t errors_len, void* workspace, size_t workspace_len) {
  size_t size = 0;
  if ((!ks && ks_len) || (!errors && errors_len)) return AQ_BAD_ARGUMENT;
  if (__builtin_mul_overflow(rows, ks_len, &size) || size != errors_len) return AQ_BAD_LENGTH;
  return run(values, values_len, weights, weights_len, rows, cols, ks, ks_len, errors, nullptr, workspace,
             workspace_len);
}

extern "C" int aq_kmeans(const float* values, size_t values_len, const float* weights, size_t weights_len, size_t rows,
                         size_t cols, int32_t k, double* centroids, size_t centroids_len, void* workspace,
                         size_t workspace_len) {
  size_t size = 0;
  if (!centroids || k < 1) return AQ_BAD_ARGUMENT;
  if (__builtin_mul_overflow(rows, static_cast<size_t>(k), &size) || size != centroids_len) return AQ_BAD_LENGTH;
  return run(values, values_len, weights, weights_len, rows, cols, &k, 1, nullptr, centroids, workspace,
             workspace_len);
}
