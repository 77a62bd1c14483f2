// Products with whole matrices, where ggml lets others do an operation.
#pragma once

// Adds them to the ggml whose names a library sees (a handle of dlopen), if it has what that takes and is the ggml that
// is known here. Otherwise, and where the environment variable ANYQUANT_GGML is "rows", nothing changes: the types' own
// functions, for one row after the other, are slower, and do all the same. No graph may be running meanwhile.
bool add_products(void* library);
