// libnvrtc.so on the C++ compiler: what it gives as a cubin is the path of a library of kernels for the emulator, whose
// header lies in FAKE_NVRTC_EMULATOR; it lies in FAKE_NVRTC_FOLDER.

#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <fstream>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

namespace {

struct Program {
  std::string source, name, path, log;
  std::vector<std::pair<std::string, std::string>> headers;
};

void write(const std::string& path, const std::string& text) { std::ofstream(path) << text; }

}  // namespace

extern "C" {

const char* nvrtcGetErrorString(int result) { return result == 6 ? "NVRTC_ERROR_COMPILATION" : "NVRTC_SUCCESS"; }
int nvrtcVersion(int* major, int* minor) {
  *major = 13, *minor = 0;
  return 0;
}
int nvrtcCreateProgram(Program** program, const char* source, const char* name, int count, const char* const* texts,
                       const char* const* names) {
  *program = new Program{source, name, "", "", {}};
  for (int i = 0; i < count; ++i) (*program)->headers.emplace_back(names[i], texts[i]);
  return 0;
}
int nvrtcDestroyProgram(Program** program) {
  delete *program;
  *program = nullptr;
  return 0;
}
int nvrtcCompileProgram(Program* program, int count, const char* const* options) {
  if (const char* log = getenv("FAKE_NVRTC_FAIL")) {
    Dl_info self;
    dladdr(reinterpret_cast<void*>(&nvrtcGetErrorString), &self);
    program->log = std::string(log) + " " + (strrchr(self.dli_fname, '/') + 1);
    return 6;
  }
  std::string folder = std::string(getenv("FAKE_NVRTC_FOLDER")) + "/XXXXXX";
  if (!mkdtemp(folder.data())) return 1;
  for (const auto& [name, text] : program->headers) write(folder + "/" + name, text);
  const std::string source = folder + "/source.cpp";
  program->path = folder + "/library.so";
  write(source, program->source);
  std::ostringstream command;
  command << "c++ -O1 -fPIC -shared -ffp-contract=off -w -DAQ_EMULATOR -I " << getenv("FAKE_NVRTC_EMULATOR") << " -I "
          << folder;
  bool has_architecture = false;
  for (int i = 0; i < count; ++i) {
    const std::string option = options[i];
    const std::string define = "--define-macro=";
    if (option.rfind(define, 0) == 0) {
      command << " -D" << option.substr(define.size());
    } else if (option == "--std=c++17") {
      command << " -std=c++17";
    } else if (option == "--gpu-architecture=sm_90") {
      has_architecture = true;
    } else {
      fprintf(stderr, "fake NVRTC: option %s\n", options[i]);
      abort();
    }
  }
  command << " " << source << " -o " << program->path << " 2> " << folder << "/log";
  if (!has_architecture || system(command.str().c_str())) {
    std::ifstream log(folder + "/log");
    std::ostringstream text;
    text << log.rdbuf();
    program->log = text.str();
    return 6;
  }
  return 0;
}
int nvrtcGetProgramLogSize(Program* program, size_t* bytes) {
  *bytes = program->log.size() + 1;
  return 0;
}
int nvrtcGetProgramLog(Program* program, char* log) {
  strcpy(log, program->log.c_str());
  return 0;
}
int nvrtcGetCUBINSize(Program* program, size_t* bytes) {
  *bytes = program->path.size() + 1;
  return 0;
}
int nvrtcGetCUBIN(Program* program, char* cubin) {
  strcpy(cubin, program->path.c_str());
  return 0;
}
}
