// See tensors.h. A host may put another model where one was: header and borders are compared every time.

#include "tensors.h"

#include "memory_map.h"

#include <pthread.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>

namespace {

pthread_rwlock_t lock = PTHREAD_RWLOCK_INITIALIZER;
// A list that grows and never shrinks: threads keep pointers.
Tensor* first_known = nullptr;
Tensor** end_of_known = &first_known;
const void* complained_about = nullptr;
constexpr int MOST_LINES = 20;
constexpr const char* DAMAGED = "the checksum of its data differs";

// Copies memory that may be gone; false where it is.
bool read_safely(const void* from, void* to, size_t bytes) {
  const iovec there = {const_cast<void*>(from), bytes}, here = {to, bytes};
  const ssize_t done = process_vm_readv(getpid(), &here, 1, &there, 1, 0);
  if (done >= 0 || (errno != ENOSYS && errno != EPERM)) return done == static_cast<ssize_t>(bytes);
  // Where this is not allowed: whether there is any memory, which might still be protected.
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  unsigned char ignored;
  if (mincore(reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(from) / page * page), 1, &ignored)) return false;
  std::memcpy(to, from, bytes);
  return true;
}

// Whether this row is one of a tensor still. Where another model lies now its beginning may be gone, or may have been
// left as it was, so that the row itself has to be what it was, too. What was damaged may be whole by now.
bool holds(const Tensor& t, const char* row, uint64_t stride) {
  if (row < t.begin || row >= t.begin + t.bytes || t.stride != stride || (row - t.begin) % stride) return false;
  uint32_t found[2];
  if (!read_safely(&t.header().header_checksum, found, sizeof(found))) return false;
  if (std::memcmp(found, t.checksums, sizeof(found))) return false;
  if (t.row_checksums[(row - t.begin) / stride] != blob::checksum(row, stride)) return false;
  return !t.damaged || !blob::is_whole(t.header());
}

// The blob that holds a row: rows lie one after the other, from its beginning on.
const blob::Header* find(const char* row, uint64_t columns, uint64_t stride) {
  const char *begin, *end;
  if (!readable_around(row, &begin, &end)) return nullptr;
  for (const char* at = row;; at -= stride) {
    if (blob::begins_at(at, static_cast<size_t>(end - at), columns, stride)) {
      const auto* header = reinterpret_cast<const blob::Header*>(at);
      return static_cast<uint64_t>(row - at) / stride < header->rows ? header : nullptr;
    }
    if (static_cast<uint64_t>(at - begin) < stride) return nullptr;
  }
}

// The first for which is_it(tensor), from the one on that was met after `before`: tensors are mostly asked for in the
// order in which they were first.
template <class Is>
Tensor* search(const Tensor* before, Is is_it) {
  const auto among = [&](Tensor* t, const Tensor* end) {
    while (t != end && !is_it(*t)) t = t->after;
    return t;
  };
  Tensor* start = before ? before->after : first_known;
  Tensor* found = among(start, nullptr);
  if (!found && start != first_known) found = among(first_known, start), found = found == start ? nullptr : found;
  return found;
}

void complain(const void* about, const char* name, const char* why) {
  static int lines = 0;
  if (complained_about == about || ++lines > MOST_LINES) return;
  complained_about = about;
  char shown[64] = {};
  for (int i = 0; i < 63 && name[i]; ++i) shown[i] = name[i] > ' ' && name[i] < 127 ? name[i] : '?';
  std::fprintf(stderr, "anyquant: tensor %s: %s; its products are not numbers\n", shown, why);
  if (lines == MOST_LINES) std::fprintf(stderr, "anyquant: and so on\n");
}

// Forgets what lay where a tensor lies now; false where something lies there still, which others may be using.
bool make_room(const char* begin, size_t bytes) {
  for (Tensor* known = first_known; known; known = known->after) {
    Tensor& t = *known;
    if (!t.bytes || t.begin >= begin + bytes || begin >= t.begin + t.bytes) continue;
    const uint64_t past = begin > t.begin ? static_cast<uint64_t>(begin - t.begin) / t.stride : 0;
    if (holds(t, t.begin + past * t.stride, t.stride)) return false;
    t.bytes = 0;
    for (auto& packed : t.packed) std::free(packed.exchange(nullptr));
    std::free(t.row_checksums);
    std::free(t.beginnings);
    t.row_checksums = nullptr;
    t.beginnings = nullptr;
  }
  return true;
}

Tensor* meet(const char* row, uint64_t columns, uint64_t stride) {
  const blob::Header* header = find(row, columns, stride);
  if (!header) {
    complain(row, "?", "holds no tensor of anyquant, though its type says so");
    return nullptr;
  }
  const auto* begin = reinterpret_cast<const char*>(header);
  const size_t bytes = header->rows * stride;
  if (!make_room(begin, bytes)) {
    complain(begin, header->name, "lies within another tensor");
    return nullptr;
  }
  auto* t = new (std::nothrow) Tensor();
  auto* checksums = static_cast<uint32_t*>(std::malloc(header->rows * sizeof(uint32_t)));
  auto* beginnings = static_cast<uint64_t*>(std::malloc(header->rows * sizeof(uint64_t)));
  if (!t || !checksums || !beginnings) {
    delete t;
    std::free(checksums);
    std::free(beginnings);
    complain(begin, header->name, "there is no memory for it");
    return nullptr;
  }
  t->begin = begin;
  t->bytes = bytes;
  t->columns = columns;
  t->stride = stride;
  t->checksums[0] = header->header_checksum;
  t->checksums[1] = header->data_checksum;
  t->damaged = !blob::is_whole(*header);
  if (t->damaged) complain(begin, header->name, DAMAGED);
  for (uint64_t r = 0; r < header->rows; ++r) {
    checksums[r] = blob::checksum(begin + r * stride, stride);
    std::memcpy(beginnings + r, begin + r * stride, sizeof(uint64_t));
  }
  t->row_checksums = checksums;
  t->beginnings = beginnings;
  *end_of_known = t;
  end_of_known = &t->after;
  return t;
}

// What was met before, or else is met now.
template <class Is, class Meet>
Tensor* search_or_meet(const Tensor* before, Is is_it, Meet meet_it) {
  pthread_rwlock_rdlock(&lock);
  Tensor* found = search(before, is_it);
  pthread_rwlock_unlock(&lock);
  if (found) return found;
  pthread_rwlock_wrlock(&lock);
  found = search(before, is_it);  // another thread may have been first
  if (!found) found = meet_it();
  pthread_rwlock_unlock(&lock);
  return found;
}

// With the lock held. What lies there may have changed since it was met.
void pack(Tensor* t, Layout layout) {
  const char* why = "its sections do not fit together, or there is no memory for it";
  if (!blob::begins_at(t->begin, t->bytes, t->columns, t->stride) || !blob::is_whole(t->header())) {
    t->damaged = true;
    why = DAMAGED;
  } else {
    t->packed[layout] = blob::repack(t->header(), layout == BANDS);
    t->failed[layout] = !t->packed[layout];
  }
  if (!t->packed[layout]) complain(t->begin, t->header().name, why);
}

bool is_at(const Tensor& t, const char* begin, uint64_t rows, uint64_t columns, uint64_t stride) {
  const auto* header = reinterpret_cast<const blob::Header*>(begin);
  return t.begin == begin && t.bytes == rows * stride && t.columns == columns && t.stride == stride &&
         !std::memcmp(&header->header_checksum, t.checksums, sizeof(t.checksums));
}

}  // namespace

bool look_up(const char* row, uint64_t columns, uint64_t stride, Place* place) {
  if (!stride) return false;
  const auto is_it = [&](const Tensor& t) { return holds(t, row, stride); };
  Tensor* t = place->tensor;
  if (!t || !is_it(*t)) t = search_or_meet(place->tensor, is_it, [&] { return meet(row, columns, stride); });
  place->tensor = t;
  place->looked_up = true;
  place->row = t ? static_cast<uint64_t>(row - t->begin) / stride : 0;
  return t && !t->damaged;
}

const void* packed_for(Tensor* t, Layout layout) {
  if (!t->damaged && !t->packed[layout] && !t->failed[layout]) {
    pthread_rwlock_wrlock(&lock);
    if (!t->packed[layout] && !t->failed[layout]) pack(t, layout);
    pthread_rwlock_unlock(&lock);
  }
  return t->packed[layout];
}

bool is_sound(Tensor* t) { return t->packed[WHOLE] || packed_for(t, BANDS); }

Tensor* known_at(const char* begin, uint64_t rows, uint64_t columns, uint64_t stride, const Tensor* previous) {
  pthread_rwlock_rdlock(&lock);
  Tensor* found = search(previous, [&](const Tensor& t) { return is_at(t, begin, rows, columns, stride); });
  pthread_rwlock_unlock(&lock);
  return found;
}

Tensor* tensor_at(const char* begin, uint64_t rows, uint64_t columns, uint64_t stride) {
  const auto* header = reinterpret_cast<const blob::Header*>(begin);
  if (!blob::begins_at(begin, rows * stride, columns, stride) || header->rows != rows) return nullptr;
  const auto is_it = [&](const Tensor& t) {
    return is_at(t, begin, rows, columns, stride) && (!t.damaged || !blob::is_whole(*header));
  };
  return search_or_meet(nullptr, is_it, [&] { return meet(begin, columns, stride); });
}
