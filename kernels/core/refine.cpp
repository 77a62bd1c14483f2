// Codes and codebooks of rows, improved under the full moments of the input; see anyquant_core.h.
//
// Method: LNQ of Kim et al., "GuidedQuant" (arXiv 2505.07004): least squares for the centroids and cyclic coordinate
// descent on the codes, in turns. With w a row, q its values and H the moments, the loss is (q - w)^T H (q - w)
// and h = H (q - w), half its gradient, is kept up to date.
//
// A code goes to the entry nearest to q_j - h_j / H_jj; that adds a multiple of one row of H to h. Entries move by d,
// (P^T H P) d = -P^T h, where P_jc is the scale of column j if its code is c: least squares, seen from where the
// entries are, so that a ridge holds them there. An entry that nobody uses goes where one weight alone would gain
// most. Every step is kept only if it lowers the loss of what is stored, in FP16.
//
// All sums are in double and in one order: anyquant/refinement/fallback.py takes the same steps with the same bytes.

#include <cstring>

#include "anyquant_core.h"
#include "vector_units.h"

namespace {

constexpr double FP16_MAX = 65504;
constexpr double RIDGE = 1e-7;       // of the diagonal; ten times as much where that leaves no pivot, up to
constexpr double MOST_RIDGE = 10;
constexpr double LEAST_GAIN = 1e-4;  // of the loss: an alternation that gains less is the last
constexpr double LEAST_STEP = 1e-12; // of the loss, well above what h loses in rounding

typedef void (*Axpy)(double* h, const float* row, double factor, size_t n);

// h += factor * row, element by element: every vector unit gives the same bytes.
#define AXPY(name)                                                                        \
  void name(double* __restrict h, const float* __restrict row, double factor, size_t n) { \
    for (size_t i = 0; i < n; ++i) h[i] += factor * static_cast<double>(row[i]);          \
  }

AXPY(axpy_plain)

#if VECTOR_UNITS
__attribute__((target("avx2"))) AXPY(axpy_avx2)
__attribute__((target("avx512f,prefer-vector-width=512"))) AXPY(axpy_avx512)
#endif

Axpy axpy_for_this_machine() {
#if VECTOR_UNITS
  if (__builtin_cpu_supports("avx512f")) return axpy_avx512;
  if (__builtin_cpu_supports("avx2")) return axpy_avx2;
#endif
  return axpy_plain;
}

// The nearest FP16 number, ties to even, within its range.
double to_half(double x) {
  x = x > FP16_MAX ? FP16_MAX : x < -FP16_MAX ? -FP16_MAX : x;
  uint64_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  int exponent = static_cast<int>(bits >> 52 & 0x7FF) - 1023;
  exponent = exponent < -14 ? -14 : exponent;
  bits = static_cast<uint64_t>(exponent - 10 + 52 + 1023) << 52;  // 2^52 units in the last place
  double anchor;
  std::memcpy(&anchor, &bits, sizeof anchor);
  anchor *= 1.5;
  return (x + anchor) - anchor;
}

struct Row {
  Axpy axpy;
  const float *H, *w, *fixed, *scale;  // the last two may be null
  size_t n;
  int k;
  float* entries;  // [k]
  uint8_t* codes;  // [n]
  double *h, *old_h;             // [n]
  double *sums;                  // [k, n]: P^T H
  double *normal, *factors;      // [k, k]: P^T H P, and L D L^T of it
  double* step;                  // [k]
  float *q, *old_q, *old_entries;  // [n], [n], [k]

  double diagonal(size_t j) const { return H[j * n + j]; }
  float at(size_t j) const { return scale ? scale[j] : 1.0f; }
  bool coded(size_t j) const { return !fixed || fixed[j] != fixed[j]; }
};

double loss_of(const Row& row) {
  double loss = 0;
  for (size_t j = 0; j < row.n; ++j) loss += (static_cast<double>(row.q[j]) - row.w[j]) * row.h[j];
  return loss;
}

// q and h from scratch, and the loss.
double renew(Row& row) {
  const size_t n = row.n;
  for (size_t j = 0; j < n; ++j) row.q[j] = row.coded(j) ? row.entries[row.codes[j]] * row.at(j) : row.fixed[j];
  for (size_t j = 0; j < n; ++j) row.h[j] = 0;
  for (size_t j = 0; j < n; ++j) {
    const double e = static_cast<double>(row.q[j]) - row.w[j];
    if (e != 0) row.axpy(row.h, row.H + j * n, e, n);
  }
  return loss_of(row);
}

// L below the diagonal, D on it. False where a pivot is lost in rounding.
bool factorize(Row& row, double ridge) {
  const int k = row.k;
  double *F = row.factors, *N = row.normal;
  for (int a = 0; a < k; ++a) {
    for (int b = 0; b < a; ++b) F[a * k + b] = N[a * k + a] > 0 && N[b * k + b] > 0 ? N[a * k + b] : 0;
    // An entry that counts for nothing stays where it is.
    F[a * k + a] = N[a * k + a] > 0 ? N[a * k + a] + ridge * N[a * k + a] : 1;
  }
  for (int p = 0; p < k; ++p) {
    const double pivot = F[p * k + p], least = N[p * k + p] > 0 ? 0.5 * ridge * N[p * k + p] : 0;
    if (!(pivot > least)) return false;
    for (int a = p + 1; a < k; ++a) {
      const double factor = F[a * k + p] / pivot;
      for (int b = p + 1; b <= a; ++b) F[a * k + b] -= factor * F[b * k + p];
    }
    for (int a = p + 1; a < k; ++a) F[a * k + p] /= pivot;
  }
  return true;
}

// Turns step from the right-hand side into the solution.
void solve(Row& row) {
  const int k = row.k;
  double *F = row.factors, *x = row.step;
  for (int p = 0; p < k; ++p) {
    for (int a = p + 1; a < k; ++a) x[a] -= F[a * k + p] * x[p];
  }
  for (int p = 0; p < k; ++p) x[p] /= F[p * k + p];
  for (int p = k - 1; p > 0; --p) {
    for (int a = 0; a < p; ++a) x[a] -= F[p * k + a] * x[p];
  }
}

// Moves the entries to the least squares solution, if that lowers the loss.
void move_entries(Row& row, double* loss) {
  const size_t n = row.n;
  const int k = row.k;
  std::memset(row.sums, 0, sizeof(double) * k * n);
  std::memset(row.normal, 0, sizeof(double) * k * k);
  std::memset(row.step, 0, sizeof(double) * k);
  for (size_t j = 0; j < n; ++j) {
    if (!row.coded(j)) continue;
    row.axpy(row.sums + row.codes[j] * n, row.H + j * n, row.at(j), n);
    row.step[row.codes[j]] -= row.at(j) * row.h[j];
  }
  for (int a = 0; a < k; ++a) {
    const double* sums = row.sums + a * n;
    for (size_t j = 0; j < n; ++j) {
      if (row.coded(j)) row.normal[a * k + row.codes[j]] += row.at(j) * sums[j];
    }
  }
  for (int c = 0; c < k; ++c) {
    if (!(row.normal[c * k + c] > 0)) row.step[c] = 0;
  }
  double ridge = RIDGE;
  while (!factorize(row, ridge)) {
    ridge *= 10;
    if (ridge > MOST_RIDGE) return;
  }
  solve(row);
  std::memcpy(row.old_entries, row.entries, sizeof(float) * k);
  std::memcpy(row.old_h, row.h, sizeof(double) * n);
  std::memcpy(row.old_q, row.q, sizeof(float) * n);
  for (int c = 0; c < k; ++c) row.entries[c] = static_cast<float>(to_half(row.entries[c] + row.step[c]));
  const double found = renew(row);
  if (found < *loss) {
    *loss = found;
    return;
  }
  std::memcpy(row.entries, row.old_entries, sizeof(float) * k);
  std::memcpy(row.h, row.old_h, sizeof(double) * n);
  std::memcpy(row.q, row.old_q, sizeof(float) * n);
}

// Puts every entry that no code names to where the weight lies that would gain most by it, each to another one.
void plant_entries(Row& row) {
  int used[256] = {0};
  for (size_t j = 0; j < row.n; ++j) used[row.codes[j]] |= row.coded(j);
  double* gain = row.old_h;
  bool known = false;
  for (int c = 0; c < row.k; ++c) {
    if (used[c]) continue;
    if (!known) {
      for (size_t j = 0; j < row.n; ++j) {
        gain[j] = row.coded(j) && row.diagonal(j) > 0 ? row.h[j] * row.h[j] / row.diagonal(j) : 0;
      }
      known = true;
    }
    size_t best = 0;
    for (size_t j = 1; j < row.n; ++j) best = gain[j] > gain[best] ? j : best;
    if (!(gain[best] > 0)) return;
    gain[best] = 0;
    row.entries[c] = static_cast<float>(to_half((row.q[best] - row.h[best] / row.diagonal(best)) / row.at(best)));
  }
}

// Entries in ascending order; equal ones keep theirs.
void sort_entries(Row& row) {
  uint8_t order[256], rank[256];
  for (int c = 0; c < row.k; ++c) {
    const float entry = row.entries[c];
    int at = c;
    for (; at && row.entries[at - 1] > entry; --at) {
      row.entries[at] = row.entries[at - 1];
      order[at] = order[at - 1];
    }
    row.entries[at] = entry;
    order[at] = static_cast<uint8_t>(c);
  }
  for (int c = 0; c < row.k; ++c) rank[order[c]] = static_cast<uint8_t>(c);
  for (size_t j = 0; j < row.n; ++j) row.codes[j] = rank[row.codes[j]];
}

// Coordinate descent: `cycles` times each column once, or until nothing moves.
void move_codes(Row& row, int cycles, double* loss) {
  double middles[256];  // between different neighbours; the rest are never passed
  double low[256], high[256];  // what is nearest to a code
  uint8_t code[256] = {0};
  int distinct = 1, step = 1;
  for (int c = 0; c < row.k; ++c) {
    low[c] = __builtin_inf(), high[c] = -__builtin_inf();  // not even itself: what has a lower equal
    if (c && row.entries[c] == row.entries[c - 1]) continue;
    if (c) {
      middles[distinct - 1] = (static_cast<double>(row.entries[c - 1]) + row.entries[c]) / 2;
      high[code[distinct - 1]] = middles[distinct - 1];
      code[distinct++] = static_cast<uint8_t>(c);
    }
    low[c] = c ? middles[distinct - 2] : -__builtin_inf();
    high[c] = __builtin_inf();
  }
  while (step < distinct) step *= 2;
  for (int c = distinct - 1; c < 256; ++c) middles[c] = __builtin_inf();

  for (int cycle = 0; cycle < cycles; ++cycle) {
    const double least = LEAST_STEP * *loss;
    size_t moves = 0;
    for (size_t j = 0; j < row.n; ++j) {
      if (!row.coded(j)) continue;
      const double curvature = row.diagonal(j), scale = row.at(j);
      const bool alive = curvature > 0;  // else any entry will do: the nearest
      const double x = (alive ? row.q[j] - row.h[j] / curvature : row.w[j]) / scale;
      const int now = row.codes[j];
      if (x > low[now] && x <= high[now]) continue;
      int at = 0;
      for (int s = step / 2; s; s /= 2) at += middles[at + s - 1] < x ? s : 0;
      const float value = row.entries[code[at]] * row.at(j);
      const double d = static_cast<double>(value) - row.q[j], change = d * (2 * row.h[j] + d * curvature);
      if (!(change < -least || (!alive && change == 0 && d != 0))) continue;
      row.axpy(row.h, row.H + j * row.n, d, row.n);
      row.q[j] = value;
      row.codes[j] = code[at];
      ++moves;
    }
    *loss = loss_of(row);
    if (!moves) return;
  }
}

void refine(Row& row, int alternations, int cycles, double* losses) {
  double loss = renew(row);
  losses[0] = loss;
  for (int t = 0; t < alternations; ++t) {
    const double before = loss;
    move_entries(row, &loss);
    plant_entries(row);
    sort_entries(row);
    move_codes(row, cycles, &loss);
    if (!(before - loss > LEAST_GAIN * before)) break;
  }
  if (alternations) move_entries(row, &loss);
  sort_entries(row);
  losses[1] = loss;
}

constexpr size_t MOST_COLS = 1u << 24;

size_t doubles_of(size_t n, size_t k) { return 2 * n + k * n + 2 * k * k + k; }

}  // namespace

extern "C" size_t aq_refine_workspace(size_t cols, int32_t k) {
  if (!cols || cols > MOST_COLS || k < 1 || k > 256) return 0;
  return doubles_of(cols, k) * sizeof(double) + (2 * cols + k) * sizeof(float);
}

extern "C" int aq_refine_rows(const float* moment, size_t moment_len, const float* weights, size_t weights_len,
                              const float* fixed, size_t fixed_len, const float* scale, size_t scale_len, size_t rows,
                              size_t cols, int32_t k, int32_t alternations, int32_t cycles, float* codebook,
                              size_t codebook_len, uint8_t* codes, size_t codes_len, double* losses, size_t losses_len,
                              void* workspace, size_t workspace_len) {
  size_t size = 0;
  if (!moment || !weights || !codebook || !codes || !losses || !workspace) return AQ_BAD_ARGUMENT;
  if (!fixed != !fixed_len || !scale != !scale_len) return AQ_BAD_ARGUMENT;
  if (!cols || cols > MOST_COLS || k < 1 || k > 256 || alternations < 0 || cycles < 0) return AQ_BAD_ARGUMENT;
  if (moment_len != cols * cols || (scale && scale_len != cols)) return AQ_BAD_LENGTH;
  if (__builtin_mul_overflow(rows, cols, &size) || size != weights_len || size != codes_len) return AQ_BAD_LENGTH;
  if (fixed && fixed_len != size) return AQ_BAD_LENGTH;
  if (__builtin_mul_overflow(rows, static_cast<size_t>(k), &size) || size != codebook_len) return AQ_BAD_LENGTH;
  if (__builtin_mul_overflow(rows, static_cast<size_t>(2), &size) || size != losses_len) return AQ_BAD_LENGTH;
  if (workspace_len < aq_refine_workspace(cols, k)) return AQ_BAD_LENGTH;
  for (size_t i = 0; i < codes_len; ++i) {
    if (codes[i] >= k) return AQ_BAD_VALUE;
  }
  Row row = {};
  row.axpy = axpy_for_this_machine();
  row.H = moment, row.scale = scale, row.n = cols, row.k = k;
  double* doubles = static_cast<double*>(workspace);
  float* floats = reinterpret_cast<float*>(doubles + doubles_of(cols, k));
  row.h = doubles, row.old_h = row.h + cols, row.sums = row.old_h + cols, row.normal = row.sums + k * cols;
  row.factors = row.normal + k * k, row.step = row.factors + k * k;
  row.q = floats, row.old_q = row.q + cols, row.old_entries = row.old_q + cols;
  for (size_t r = 0; r < rows; ++r) {
    row.w = weights + r * cols, row.fixed = fixed ? fixed + r * cols : nullptr;
    row.entries = codebook + r * k, row.codes = codes + r * cols;
    refine(row, alternations, cycles, losses + 2 * r);
  }
  return AQ_OK;
}
