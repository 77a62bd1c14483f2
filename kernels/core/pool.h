// Threads of our own that do the parts of one task, for hosts that lend none.
#pragma once

#include <stddef.h>

// Calls task(argument, part, parts) once for every part, in so many threads, this one among them; returns when all are
// done. Where the threads are at work for somebody else, or there are none to be had, this one does all parts.
void run_in_parts(void (*task)(void* argument, size_t part, size_t parts), void* argument, size_t parts);
