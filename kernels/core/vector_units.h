// Whether functions for wider vectors than the baseline's are compiled beside it, and one is chosen at run time.
// -DVECTOR_UNITS=0 leaves them out.
#pragma once

#ifndef VECTOR_UNITS
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define VECTOR_UNITS 1
#else
#define VECTOR_UNITS 0
#endif
#endif
