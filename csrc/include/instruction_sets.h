// Compiles the text METAKD_TEXT once for every instruction set, into the namespaces base, avx2 and
// avx512 (METAKD_ISA) with vectors of METAKD_BYTES. Included in an anonymous namespace, after cpu.h.

#define METAKD_ISA base
#define METAKD_BYTES 16
#include METAKD_TEXT
#undef METAKD_ISA
#undef METAKD_BYTES
#undef METAKD_INLINE
#undef METAKD_NOINLINE
#undef METAKD_LAMBDA

#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#define METAKD_ISA avx2
#define METAKD_BYTES 32
#include METAKD_TEXT
#undef METAKD_ISA
#undef METAKD_BYTES
#undef METAKD_INLINE
#undef METAKD_NOINLINE
#undef METAKD_LAMBDA
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c")
#endif
#define METAKD_ISA avx512
#define METAKD_BYTES 64
#include METAKD_TEXT
#undef METAKD_ISA
#undef METAKD_BYTES
#undef METAKD_INLINE
#undef METAKD_NOINLINE
#undef METAKD_LAMBDA
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // __x86_64__

#undef METAKD_TEXT
