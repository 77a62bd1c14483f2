// Our tensor types, by numbers that ggml has given up; see docs/gguf-format.md.
#pragma once

constexpr int TYPES = 7;
constexpr struct {
  int number, bytes;  // of a block
  const char* name;
} TYPE[TYPES] = {{4, 8, "anyquant_2.0"},   {5, 10, "anyquant_2.5"},   {31, 12, "anyquant_3.0"}, {32, 14, "anyquant_3.5"},
                 {33, 17, "anyquant_4.25"}, {37, 21, "anyquant_5.25"}, {38, 34, "anyquant_8.5"}};
