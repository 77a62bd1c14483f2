// One row of k-means: its distinct values, their prefix sums, and the pieces that it falls into.
#ifndef ANYQUANT_KMEANS_ROW_H
#define ANYQUANT_KMEANS_ROW_H

#include <cstdint>
#include <cstring>

namespace {

constexpr int PADDING = 8;  // entries past the last one that vectors may touch
constexpr int MOST_PIECES = 256;
constexpr double COARSE = 0x1p-22;       // of the second moment
constexpr double COARSE_MASS = 0x1p-26;  // of the widest value's, had it all the weight
constexpr double FLOOR = 0x1p-50;  // of the largest weight times n: keeps W strictly ascending

struct Row {
  int u;                // distinct values
  double *v, *w;        // [u] values, ascending, and their weights
  double floor;         // least weight in W, S and Q
  double *W, *S, *Q;    // [u + 1 + PADDING] prefix sums of weight, first and second moment about the piece's mean
  double coarse;        // smaller errors may drown in the rounding of the sums
  int pieces;           // values cuts[p]..cuts[p + 1] - 1 share no cluster with others
  int32_t cuts[MOST_PIECES + 1];
  double* g;            // [u + 1 + PADDING] most gain of the values before an entry
  int32_t* from[3];     // [u + 1 + PADDING] starts for a lambda below k, one above k and one in work
  int32_t *few, *many;  // [u + 1] two paths
  int32_t* bounds;      // [u + 1] the clusters: values bounds[c]..bounds[c + 1] - 1
};

// A number that orders like the float; -0 and 0 have the same.
uint32_t order_of(float x) {
  uint32_t bits = 0;
  x += 0.0f;
  std::memcpy(&bits, &x, sizeof bits);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

float value_of(uint32_t order) {
  const uint32_t bits = order & 0x80000000u ? order & 0x7fffffffu : ~order;
  float x = 0;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// Stable radix sort by the upper 32 bits; returns the one of the two buffers that holds the result.
template <int BITS>
uint64_t* sorted(uint64_t* from, uint64_t* to, int n) {
  constexpr int PASSES = (32 + BITS - 1) / BITS;
  constexpr uint32_t MASK = (1u << BITS) - 1;
  uint32_t place[PASSES][MASK + 1] = {};
  for (int i = 0; i < n; ++i) {
    for (int p = 0; p < PASSES; ++p) ++place[p][from[i] >> (32 + p * BITS) & MASK];
  }
  for (int p = 0; p < PASSES; ++p) {
    uint32_t next = 0;
    for (uint32_t& count : place[p]) {
      const uint32_t here = next;
      next += count;
      count = here;
    }
    for (int i = 0; i < n; ++i) to[place[p][from[i] >> (32 + p * BITS) & MASK]++] = from[i];
    uint64_t* swap = from;
    from = to;
    to = swap;
  }
  return from;
}

// W, S and Q, for the cuts as they are.
void sum_up(Row& row) {
  double mass = 0, first = 0, second = 0, widest = 0;
  row.W[0] = row.S[0] = row.Q[0] = 0;
  for (int p = 0; p < row.pieces; ++p) {
    const int start = row.cuts[p], end = row.cuts[p + 1];
    double part = 0, moment = 0;
    for (int i = start; i < end; ++i) {
      const double weight = row.w[i] > row.floor ? row.w[i] : row.floor;
      mass += weight;
      part += weight;
      moment += weight * (row.v[i] - row.v[start]);
      row.W[i + 1] = mass;
    }
    const double mean = row.v[start] + moment / part;
    for (int i = start; i < end; ++i) {
      const double weight = row.w[i] > row.floor ? row.w[i] : row.floor, y = row.v[i] - mean, wy = weight * y;
      first += wy;
      second += wy * y;
      widest = y * y > widest ? y * y : widest;
      row.S[i + 1] = first;
      row.Q[i + 1] = second;
    }
  }
  const double one = mass * widest * COARSE_MASS, all = second * COARSE;
  row.coarse = one > all ? one : all;
}

// The values of a row, as one piece.
void prepare(const float* values, const float* weights, int n, Row& row) {
  float heaviest = 0;
  for (int i = 0; weights && i < n; ++i) heaviest = weights[i] > heaviest ? weights[i] : heaviest;
  const bool weighted = heaviest > 0;  // a row without any weight counts as one without weights
  uint64_t* keys = reinterpret_cast<uint64_t*>(row.S);  // S and Q are not needed yet
  int kept = 0;
  for (int i = 0; i < n; ++i) {
    keys[kept] = static_cast<uint64_t>(order_of(values[i])) << 32 | static_cast<uint32_t>(i);
    kept += !weighted || weights[i] > 0;
  }
  uint64_t* spare = reinterpret_cast<uint64_t*>(row.Q);
  keys = kept < 1024 ? sorted<8>(keys, spare, kept) : sorted<11>(keys, spare, kept);

  int u = 0;
  for (int i = 0; i < kept; ++u) {
    const uint64_t order = keys[i] >> 32;
    double weight = 0;
    for (; i < kept && keys[i] >> 32 == order; ++i) weight += weighted ? weights[static_cast<uint32_t>(keys[i])] : 1.0;
    row.v[u] = value_of(static_cast<uint32_t>(order));
    row.w[u] = weight;
  }
  row.u = u;

  row.floor = (weighted ? heaviest : 1.0) * n * FLOOR;
  row.pieces = 1;
  row.cuts[0] = 0;
  row.cuts[1] = u;
  for (int i = u + 1; i <= u + PADDING; ++i) row.W[i] = row.S[i] = row.g[i] = 0;
  sum_up(row);
}

// Cuts a row where no clustering of at most this error joins two values, so that sums about the pieces' means resolve
// what sums over all values cannot: a cluster that holds two neighbours leaves at least the error of those two.
// Returns whether there are new cuts; the error never rises from call to call, so none is lost.
bool cut(Row& row, double error) {
  const int before = row.pieces;
  row.pieces = 1;
  for (int i = 1; i < row.u && row.pieces < MOST_PIECES; ++i) {
    const double d = row.v[i] - row.v[i - 1];
    const double alone = d * d * (row.w[i - 1] * row.w[i] / (row.w[i - 1] + row.w[i]));
    if (alone > error * (1 + 0x1p-20)) row.cuts[row.pieces++] = i;
  }
  row.cuts[row.pieces] = row.u;
  if (row.pieces == before) return false;
  sum_up(row);
  return true;
}

}  // namespace

#endif
