/* What there is to know of the processor, and which of its cores threads are on. */
#ifdef __linux__
#define _GNU_SOURCE
#include <sched.h>

extern int omp_get_thread_num(void); /* of the library that torch has loaded */

/* Where there are as many threads as cores, has each stay on one of its own, and tells how many do. */
int keep_apart(int threads) {
    cpu_set_t all;
    int kept = 0;
    if (sched_getaffinity(0, sizeof all, &all) || CPU_COUNT(&all) != threads) return 0;
#pragma omp parallel num_threads(threads) reduction(+ : kept)
    {
        int core = -1;
        for (int before = omp_get_thread_num() + 1; before; before -= CPU_ISSET(++core, &all) != 0);
        cpu_set_t own;
        CPU_ZERO(&own);
        CPU_SET(core, &own);
        kept = !sched_setaffinity(0, sizeof own, &own);
    }
    return kept;
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
#else
int has_vectors(void) { return 0; }
#endif
