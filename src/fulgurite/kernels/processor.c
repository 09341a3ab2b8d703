/* What there is to know of the processor, and which of its cores threads are on. */
#ifdef __linux__
#define _GNU_SOURCE
#include <sched.h>

extern int omp_get_thread_num(void); /* of the library that torch has loaded */

/* Of two threads on two cores, has each stay on one of its own: tells whether they do. Not of more: OpenMP ends some of
those and begins others as it needs them, which would stay on the core of who began them. */
int keep_apart(int threads) {
    cpu_set_t cores;
    int kept = 0;
    if (threads != 2 || sched_getaffinity(0, sizeof cores, &cores) || CPU_COUNT(&cores) != 2) return 0;
#pragma omp parallel num_threads(2) reduction(+ : kept)
    {
        cpu_set_t own = cores;
        int core = 0, second = omp_get_thread_num();
        while (!CPU_ISSET(core, &cores)) core++;
        if (second) CPU_CLR(core, &own);
        for (core++; core < CPU_SETSIZE && !second; core++) CPU_CLR(core, &own);
        kept = !sched_setaffinity(0, sizeof own, &own);
    }
    return kept == 2;
}
#else
int keep_apart(int threads) { return 0; }
#endif

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>

/* Whether it has matrix tiles, and the system lets this process use them. */
int has_tiles(void) {
    const long request = 0x1023, tile_data = 18; /* ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA */
    __builtin_cpu_init();
    return __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
           __builtin_cpu_supports("avx512bf16") && !syscall(SYS_arch_prctl, request, tile_data);
}
#else
int has_tiles(void) { return 0; }
#endif

#ifdef __x86_64__
/* Whether its vectors multiply bfloat16. */
int has_vectors(void) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512bf16");
}

/* Whether it has vectors of eight float32 that multiply and add at once. */
int has_floats(void) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}
#else
int has_vectors(void) { return 0; }
int has_floats(void) { return 0; }
#endif
