// See cubin_cache.h.

#include "cubin_cache.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

namespace cuda {

namespace {

constexpr size_t MOST_PATH = 4000;

// False: there is no home, or the path is too long.
bool folder(char* path) {
  const char *own = getenv("ANYQUANT_CACHE"), *caches = getenv("XDG_CACHE_HOME"), *home = getenv("HOME");
  int length = -1;
  if (own && *own) {
    length = snprintf(path, MOST_PATH, "%s/cubins", own);
  } else if (caches && *caches) {
    length = snprintf(path, MOST_PATH, "%s/anyquant/cubins", caches);
  } else if (home && *home) {
    length = snprintf(path, MOST_PATH, "%s/.cache/anyquant/cubins", home);
  }
  return length > 0 && static_cast<size_t>(length) < MOST_PATH - 400;  // a name follows
}

void make_folders(char* path) {
  for (char* at = path + 1; *at; ++at) {
    if (*at != '/') continue;
    *at = 0;
    mkdir(path, 0777);
    *at = '/';
  }
  mkdir(path, 0777);
}

unsigned long long digest_of(const char* cubin, size_t bytes) {
  Digest digest;
  digest.add(cubin, bytes);
  return digest.value();
}

}  // namespace

char* kept_cubin(const char* name, size_t* bytes) {
  char path[MOST_PATH];
  if (!folder(path)) return nullptr;
  strcat(strcat(strcat(path, "/"), name), ".cubin");
  FILE* file = fopen(path, "rb");
  if (!file) return nullptr;
  struct stat found = {};
  unsigned long long digest = 0;
  char* cubin = nullptr;
  if (!fstat(fileno(file), &found) && static_cast<size_t>(found.st_size) > sizeof(digest)) {
    *bytes = static_cast<size_t>(found.st_size) - sizeof(digest);
    cubin = static_cast<char*>(malloc(*bytes));
    if (cubin && (fread(&digest, sizeof(digest), 1, file) != 1 || fread(cubin, 1, *bytes, file) != *bytes ||
                  digest != digest_of(cubin, *bytes))) {
      free(cubin);
      cubin = nullptr;
    }
  }
  fclose(file);
  return cubin;
}

void keep_cubin(const char* name, const char* cubin, size_t bytes) {
  char path[MOST_PATH], temporary[MOST_PATH + 8];
  if (!folder(path)) return;
  make_folders(path);
  strcat(strcat(strcat(path, "/"), name), ".cubin");
  // Under another name first: others may do the same.
  snprintf(temporary, sizeof(temporary), "%s-XXXXXX", path);
  const int handle = mkstemp(temporary);
  if (handle < 0) return;
  FILE* file = fdopen(handle, "wb");
  const unsigned long long digest = digest_of(cubin, bytes);
  const bool written = file && fwrite(&digest, sizeof(digest), 1, file) == 1 && fwrite(cubin, 1, bytes, file) == bytes;
  const bool closed = file ? !fclose(file) : !close(handle);
  if (!(written && closed) || rename(temporary, path)) unlink(temporary);
}

}  // namespace cuda
